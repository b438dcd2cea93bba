"What lmms-eval calls for each question of easy_vqa.yaml"
from PIL import Image

def picture(doc):
    "The picture of a question"
    return [Image.open(doc['image']).convert('RGB')]
