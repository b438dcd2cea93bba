"""A model folder in plain transformers: asked by a process of its own that cannot import graftlab"""
import json, subprocess, sys
from pathlib import Path

CODE = """import json, sys
sys.modules['graftlab'] = None # from here on `import graftlab`, or any part of it, is an ImportError
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
folder,asked,most = sys.argv[1:]
model,info = AutoModelForImageTextToText.from_pretrained(folder, dtype='float32', output_loading_info=True)
assert not any(info.values()), info
processor = AutoProcessor.from_pretrained(folder)
out = []
for q in json.load(open(asked)):
    text = f"<|im_start|>user\\n<image>\\n{q['question']}<|im_end|>\\n<|im_start|>assistant\\n"
    x = processor(images=Image.open(q['image']).convert('RGB'), text=text, return_tensors='pt')
    y = model.generate(**x, max_new_tokens=int(most), do_sample=False)[0, x['input_ids'].shape[1]:]
    out.append(processor.tokenizer.decode(y, skip_special_tokens=True).strip())
assert not [m for m in sys.modules if m.startswith('graftlab.')]
print(json.dumps(out))"""


def plain_answers(folder, questions, work, most=10):
    "Greedy answers to questions whose pictures are square files"
    (Path(work)/'asked.json').write_text(json.dumps([{k: str(q[k]) for k in ('question', 'image')} for q in questions]))
    said = subprocess.run([sys.executable, '-c', CODE, str(folder), 'asked.json', str(most)], cwd=work, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr[-2000:]
    return json.loads(said.stdout.splitlines()[-1])
