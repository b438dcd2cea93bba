"README's own program: an LLM, a vision transformer and pictures of one's own, by one process and by two"
import json, os, re, shutil, subprocess, sys
from pathlib import Path
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM
from graftlab.zoo import get_llm

ROOT = Path(__file__).resolve().parent.parent
SECTION = (ROOT/'README.md').read_text(encoding='utf-8').split('## Your own LLM and pictures')[1]
CUT,TRAIN,GRAFT = re.findall(r'```python\n(.*?)```', SECTION, re.S)[:3]

@pytest.fixture
def own(tmp_path, monkeypatch):
    "my-llm, my-vit, data.json and pictures, as README names them"
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(get_llm('smollm2'))
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=32, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True)).save_pretrained('my-llm')
    tokenizer.save_pretrained('my-llm')
    CLIPVisionModel(CLIPVisionConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=10, num_attention_heads=4, image_size=28, patch_size=14)).save_pretrained('my-vit')
    CLIPImageProcessorPil(size=dict(shortest_edge=28), crop_size=dict(height=28, width=28)).save_pretrained('my-vit')
    Path('pictures').mkdir()
    records = []
    for i,colour in enumerate(['red', 'green', 'blue', 'white']*2):
        Image.new('RGB', (28, 28), colour).save(f'pictures/{i}.png')
        records.append(dict(id=str(i), image=f'{i}.png', conversations=[{'from':'human', 'value':'<image>\nWhich color?'}, {'from':'gpt', 'value':colour}]))
    Path('data.json').write_text(json.dumps(records))
    Path('train.py').write_text(TRAIN)
    exec(CUT, {})
    return tmp_path

def train(*command):
    env = {**os.environ, 'OMP_NUM_THREADS':'1', 'PYTHONPATH':str(ROOT)}
    out = subprocess.run([sys.executable, *command, 'train.py'], env=env, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    return [json.loads(Path(f'runs/stage{s}/metrics.json').read_text()) for s in (1, 2)]

def test_readmes_program_by_one_process_and_by_two(own):
    one = train()
    before = (own/'my-llm/model.safetensors').read_bytes()
    names = {}
    exec(GRAFT, names)
    model,processor = names['model'],names['processor']
    assert model.config.text_config.num_hidden_layers == 32 and (own/'my-llm/model.safetensors').read_bytes() == before
    batch = processor(images=Image.open('pictures/0.png').convert('RGB'), text='<image>\nWhich color?', return_tensors='pt')
    with torch.no_grad(): assert torch.isfinite(model(**batch).logits).all()
    for made in ('runs', 'my-graft'): shutil.rmtree(own/made)
    two = train('-m', 'torch.distributed.run', '--nproc_per_node', '2')
    for a,b in zip(one, two): assert a['steps'] == b['steps'] and b['loss'] == pytest.approx(a['loss'], rel=1e-2) # bf16 autocast
    exec(GRAFT, names)
