"""Trajectories: every family against an independent loop, streamed runs killed and resumed, bad input"""
import os, signal, subprocess, sys, time
import pytest
import torch
from safetensors import safe_open
from transformers import (AutoModelForCausalLM, CLIPVisionConfig, Gemma2Config, Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig, GraniteConfig,
    LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, MistralConfig, Olmo2Config, Phi3Config, Qwen2Config, Qwen3Config, Qwen3MoeConfig, SiglipVisionConfig,
    SmolLM3Config)
from graftlab import host as families
from graftlab.host import BadCheckpoint, GraftError, Host, UnsupportedConfig
from graftlab.lens import BadSample
from graftlab.prompts import load_tokenizer
from graftlab.trajectory import NonFinite, NoTransition, find_transition, prediction_trajectory

SIZE = dict(vocab_size=101, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    pad_token_id=0, bos_token_id=1, eos_token_id=2)
LOCAL = ['sliding_attention', 'full_attention']*2
CONFIGS = dict(
    llama=LlamaConfig(**SIZE), mistral=MistralConfig(**SIZE, sliding_window=4), qwen3=Qwen3Config(**SIZE, head_dim=8),
    qwen2=Qwen2Config(**SIZE, use_sliding_window=True, sliding_window=4, max_window_layers=2),
    qwen3_moe=Qwen3MoeConfig(**SIZE, head_dim=8, mlp_only_layers=[1], num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    gemma2=Gemma2Config(**SIZE, head_dim=8, sliding_window=4, query_pre_attn_scalar=8, final_logit_softcapping=4.),
    gemma3=Gemma3TextConfig(**SIZE, head_dim=8, sliding_window=4, query_pre_attn_scalar=8, layer_types=LOCAL),
    phi3=Phi3Config(**SIZE), smollm3=SmolLM3Config(**SIZE), olmo2=Olmo2Config(**SIZE), granite=GraniteConfig(**SIZE, logits_scaling=3.))


def make(config, cls=AutoModelForCausalLM.from_config):
    torch.manual_seed(0)
    model = cls(config).eval()
    for p in model.parameters(): p.data.normal_(0, .15) if p.ndim > 1 else p.data.add_(.1*torch.randn_like(p))
    return model


def batch(*lengths, seed=0):
    gen, n = torch.Generator().manual_seed(seed), max(lengths)
    mask = torch.tensor([[1]*k+[0]*(n-k) for k in lengths])
    ids = torch.randint(3, 101, mask.shape, generator=gen)*mask
    return dict(input_ids=ids, attention_mask=mask)


def loop(model, seq):
    "Eq. 1 to 4 in float64, from the states and logits that the model itself returns"
    out = model(seq[None], output_hidden_states=True)
    last, logits, rows = model.get_submodule('model.norm'), out.logits[0].double(), []
    for l, x in enumerate(out.hidden_states[1:]):
        z = logits
        if l < len(out.hidden_states)-2:
            z = model.lm_head(last(x))[0].double()/getattr(model.config, 'logits_scaling', 1)
            if cap := getattr(model.config, 'final_logit_softcapping', None): z = cap*torch.tanh(z/cap)
        q = torch.stack([z[n].softmax(0)[seq[n+1]] for n in range(len(seq)-1)])
        rows.append(q/q.sum())
    return torch.stack([(q*(q.log()-rows[-1].log())).sum() for q in rows]).float()


@pytest.mark.parametrize('family', CONFIGS)
@torch.no_grad()
def test_every_family(family, tmp_path):
    model = make(CONFIGS[family])
    data = [batch(11, 7), batch(9, seed=1)]
    tr = prediction_trajectory(model, data)
    for kl, seq in zip(tr.kl, [data[0]['input_ids'][0], data[0]['input_ids'][1, :7], data[1]['input_ids'][0]]):
        torch.testing.assert_close(kl, loop(model, seq), atol=1e-5, rtol=1e-5)
    alone = prediction_trajectory(model, [dict(input_ids=data[0]['input_ids'][1:, :7], attention_mask=torch.ones(1, 7, dtype=torch.long))])
    torch.testing.assert_close(alone.kl[0], tr.kl[1], atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path, max_shard_size='20KB')
    streamed = prediction_trajectory(tmp_path, data)
    torch.testing.assert_close(streamed.kl, tr.kl, atol=1e-5, rtol=1e-5)
    assert streamed.info['fingerprint'] == tr.info['fingerprint']
    kept = []
    hook = Host(model).layers[-1].register_forward_hook(lambda mod, args, out: kept.append(out[0] if isinstance(out, tuple) else out))
    logits = model(data[0]['input_ids'], attention_mask=data[0]['attention_mask']).logits
    hook.remove()
    torch.testing.assert_close(Host(model).lens(kept[0]), logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('wrapper', ['gemma3', 'llava'])
@torch.no_grad()
def test_the_text_model_inside_a_multimodal_one(wrapper, tmp_path):
    "In memory and streamed from the wrapper's files, the trajectory of the text model alone"
    tower = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2, image_size=28, patch_size=14)
    if wrapper == 'gemma3': config = Gemma3Config(text_config=CONFIGS['gemma3'], vision_config=SiglipVisionConfig(**tower), mm_tokens_per_image=1, image_token_index=100)
    else: config = LlavaConfig(text_config=CONFIGS['qwen3'], vision_config=CLIPVisionConfig(**tower), image_token_index=100)
    model = make(config, Gemma3ForConditionalGeneration if wrapper == 'gemma3' else LlavaForConditionalGeneration)
    alone = make(model.config.get_text_config(decoder=True))
    alone.model.load_state_dict(model.model.language_model.state_dict())
    alone.lm_head.load_state_dict(model.lm_head.state_dict())
    data = [batch(11, 7)]
    data[0]['input_ids'].clamp_(max=90) # no picture among the tokens
    want = prediction_trajectory(alone, data, details=True)
    model.save_pretrained(tmp_path, max_shard_size='20KB')
    for source in (model, tmp_path):
        got = prediction_trajectory(source, data, details=True)
        for part in ('kl', 'agreement', 'entropy'): torch.testing.assert_close(getattr(got, part), getattr(want, part), atol=1e-5, rtol=1e-5)
        assert got.info['fingerprint'] == want.info['fingerprint']


RUN = """
import sys, torch
from graftlab.trajectory import prediction_trajectory
ids = torch.load(sys.argv[2])
prediction_trajectory(sys.argv[1], [dict(input_ids=ids, attention_mask=torch.ones_like(ids))], work=sys.argv[3])
"""


def test_killed_and_resumed(tmp_path):
    model = make(LlamaConfig(**{**SIZE, 'num_hidden_layers': 40, 'hidden_size': 64, 'intermediate_size': 512}))
    model.save_pretrained(tmp_path/'host')
    ids, work = batch(256, 256)['input_ids'], tmp_path/'work'
    torch.save(ids, tmp_path/'ids.pt')
    run = subprocess.Popen([sys.executable, '-c', RUN, tmp_path/'host', tmp_path/'ids.pt', work], env={**os.environ, 'OMP_NUM_THREADS': '1'})
    deadline = time.time()+400
    while not list(work.glob('layer-000[2-9]')) and run.poll() is None and time.time() < deadline: time.sleep(.005)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    done = max(int(p.parent.name[6:]) for p in work.glob('layer-*/state.safetensors'))
    assert 2 <= done < 39
    with safe_open(str(work/f'layer-{done:04}'/'state.safetensors'), 'pt') as f: assert {'state.0', f'logprob.{done}'} <= set(f.keys())
    data = [dict(input_ids=ids, attention_mask=torch.ones_like(ids))]
    resumed = prediction_trajectory(tmp_path/'host', data, work=work)
    torch.testing.assert_close(resumed.kl, prediction_trajectory(tmp_path/'host', data).kl, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope='module')
def model(): return make(CONFIGS['llama'])


def test_empty_and_short_samples(model):
    with pytest.raises(BadSample, match='no samples'): prediction_trajectory(model, [])
    with pytest.raises(BadSample, match='sample 1 has 0'): prediction_trajectory(model, [batch(5, 1)])
    with pytest.raises(BadSample, match='labels'): prediction_trajectory(model, [batch(5)], response_only=True)
    unanswered = batch(5) | dict(labels=torch.full((1, 5), -100))
    with pytest.raises(BadSample, match='sample 0 has 0'): prediction_trajectory(model, [unanswered], response_only=True)


def test_nan_names_layer_and_sample():
    sick = make(CONFIGS['llama'])
    sick.model.layers[2].mlp.down_proj.weight.data[0] = float('nan')
    with pytest.raises(NonFinite, match='layer 2, sample 0'): prediction_trajectory(sick, [batch(5, 4)])
    sick = make(CONFIGS['llama'])
    sick.model.embed_tokens.weight.data[100] = float('inf')
    data = batch(6, 6)
    data['input_ids'][data['input_ids'] == 100] = 50
    data['input_ids'][1, 2] = 100
    with pytest.raises(NonFinite, match='layer 0, sample 1'): prediction_trajectory(sick, [data])


def test_nan_in_a_stream(tmp_path):
    "The sample is counted over all batches"
    sick = make(CONFIGS['llama'])
    sick.model.embed_tokens.weight.data[100] = float('nan')
    data = [batch(6, 6), batch(6, 4, seed=1)]
    for b in data: b['input_ids'].clamp_(max=99)
    sick.save_pretrained(tmp_path/'host')
    assert prediction_trajectory(tmp_path/'host', data).kl.isfinite().all()
    data[1]['input_ids'][1, 2] = 100
    for source in (sick, tmp_path/'host'):
        with pytest.raises(NonFinite, match='layer 0, sample 3'): prediction_trajectory(source, data)


def test_bad_folders(model, tmp_path):
    with pytest.raises(BadCheckpoint, match='config.json'): prediction_trajectory(tmp_path, [batch(5)])
    with pytest.raises(BadCheckpoint, match='tokenizer'): load_tokenizer(tmp_path)
    model.save_pretrained(tmp_path, max_shard_size='20KB')
    shard = sorted(tmp_path.glob('*.safetensors'))[2]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:len(whole)//2])
    with pytest.raises(BadCheckpoint, match=shard.name): prediction_trajectory(tmp_path, [batch(5)])
    for f in tmp_path.glob('*.safetensors*'): f.unlink()
    torch.save(model.state_dict(), tmp_path/'pytorch_model.bin')
    with pytest.raises(BadCheckpoint, match='pytorch_model.bin'): prediction_trajectory(tmp_path, [batch(5)])


def test_unknown_head_is_noticed(model):
    odd = make(CONFIGS['llama'])
    forward = odd.forward
    odd.forward = lambda *a, **k: _halved(forward(*a, **k))
    with pytest.raises(GraftError, match='off the model'): prediction_trajectory(odd, [batch(5)])


def test_an_unknown_cap_is_noticed_in_a_stream(tmp_path, monkeypatch):
    make(CONFIGS['gemma2']).save_pretrained(tmp_path)
    assert prediction_trajectory(tmp_path, [batch(9)]).kl.shape == (1, 4)
    monkeypatch.setattr(families, 'CAPS', ()) # as if this family's soft cap were not known
    with pytest.raises(UnsupportedConfig, match='off the model'): prediction_trajectory(tmp_path, [batch(9)])


def _halved(out):
    out.logits = out.logits/2
    return out


@pytest.mark.parametrize('seed', range(4))
def test_an_untrained_model_has_no_transition(seed):
    kl = torch.rand(60, 30, generator=torch.Generator().manual_seed(seed))+1
    kl[:, -1] = 0
    with pytest.raises(NoTransition): find_transition(kl)
