"""Stage 0: a host of any family teaches its translator, nothing else of the surrogate or the host changes, and what was kept is the host's"""
import json
import pytest
import torch
from transformers import (AutoModelForCausalLM, CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel, CohereConfig, Gemma3TextConfig, LlamaConfig,
    Olmo2Config, StableLmConfig)
from families import FAMILIES, make_tokenizer
from graftlab.data import Collator
from graftlab.host import GraftError
from graftlab.refresh import keep_seen, refresh, refreshing
from graftlab.surrogate import build_surrogate
from graftlab.teach import TeachLoss, collate_kept, keep_states, stage0, teach
from graftlab.trainable import set_trainable, trainable_names
from graftlab.vlm import assemble, build_vlm
from test_train import make_records

SIZE = dict(vocab_size=101, hidden_size=32, intermediate_size=48, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0,
    bos_token_id=1, eos_token_id=2)
CONFIGS = dict(llama=LlamaConfig(**SIZE), olmo2=Olmo2Config(**SIZE),
    gemma3=Gemma3TextConfig(**SIZE, head_dim=8, query_pre_attn_scalar=8, layer_types=['sliding_attention', 'full_attention']*3, sliding_window=4),
    stablelm=StableLmConfig(**SIZE), cohere=CohereConfig(**SIZE, logit_scale=.5)) # the last two: LayerNorm
CUT = 2, 4


@pytest.fixture(params=CONFIGS)
def host(request):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[request.param]).eval()
    for p in model.parameters(): p.data.normal_(0, .3) if p.ndim > 1 else p.data.add_(.1*torch.randn_like(p))
    return model


def texts(n=24):
    gen = torch.Generator().manual_seed(1)
    return [torch.randint(3, 101, (5+i % 7,), generator=gen).tolist() for i in range(n)]


def kl(host, surrogate):
    "KL(host || surrogate) in nats a token over all texts, from the two models' own logits, one text at a time, in float64"
    total = count = 0
    for ids in texts():
        p, q = (m(torch.tensor([ids])).logits[0].double().log_softmax(-1) for m in (host, surrogate))
        total, count = total+(p.exp()*(p-q)).sum().item(), count+len(ids)
    return total/count


def test_the_translator_learns_and_nothing_else_changes(host, tmp_path):
    before = {n: p.clone() for n, p in host.named_parameters()}
    surrogate = build_surrogate(host, *CUT)
    kept = keep_states(host, texts(), CUT[:1], tmp_path/'states', batch_size=5, per_file=10, progress=False)
    with torch.no_grad():
        start = kl(host, surrogate)
        loss = TeachLoss(surrogate, CUT[0], positions=0)
        asked = sum(loss(collate_kept([kept[i]], CUT[0])).item() for i in range(len(kept)))/sum(map(len, texts()))
    assert asked == pytest.approx(start, rel=.02) # from states kept in bf16
    own = {n: p.clone() for n, p in surrogate.named_parameters()}
    done = teach(surrogate, kept, stage0(steps=60, batch_size=8, lr=5e-3, precision='no'), tmp_path/'run', CUT[:1], progress=False)
    with torch.no_grad(): end = kl(host, surrogate)
    assert end < .8*start and done['steps'] == 60
    for n, p in host.named_parameters(): assert torch.equal(p, before[n]), n
    for n, p in surrogate.named_parameters(): assert torch.equal(p, own[n]) == (f'layers.{CUT[0]}.' not in n), n


def test_a_run_on_other_texts_is_refused(tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS['llama']).eval()
    recipe = stage0(steps=2, batch_size=8, precision='no')
    for name, some in dict(a=texts(), b=texts()[::-1], c=texts(23)).items(): keep_states(model, some, CUT[:1], tmp_path/name, progress=False)
    again = lambda name: teach(build_surrogate(model, *CUT), keep_states(model, [], CUT[:1], tmp_path/name), recipe, tmp_path/'run', CUT[:1], progress=False)
    first = again('a')
    assert again('a') == first == json.loads((tmp_path/'run'/'metrics.json').read_text())
    with pytest.raises(GraftError, match='finished run on other data, 24 records then and 24 now'): again('b')
    with pytest.raises(GraftError, match='finished run on other data, 24 records then and 23 now'): again('c')


@pytest.mark.parametrize("family", ["llama", "olmo2", "gemma3"])
def test_the_refresh_reads_what_the_host_says_behind_pictures(family, tmp_path):
    "Against LLaVA's own forward pass, with the decoder of the host and with the surrogate's, one record at a time"
    torch.manual_seed(0)
    size = dict(intermediate_size=64, num_attention_heads=4)
    host = AutoModelForCausalLM.from_config(type(CONFIGS[family])(**CONFIGS[family].to_dict() | dict(vocab_size=512))).eval()
    for p in host.parameters(): p.data.normal_(0, .3) if p.ndim > 1 else p.data.add_(.1*torch.randn_like(p))
    tower = CLIPVisionModel(CLIPVisionConfig(hidden_size=32, num_hidden_layers=3, image_size=28, patch_size=14, **size))
    square, surrogate = dict(height=28, width=28), build_surrogate(host, *CUT)
    vlm, processor = build_vlm(surrogate, tower, make_tokenizer(FAMILIES["smollm2"]), processor=CLIPImageProcessorPil(size=square, crop_size=square))
    on_host = assemble(host, vlm.model.vision_tower, vlm.config.image_token_index)
    on_host.model.multi_modal_projector = vlm.model.multi_modal_projector
    collate, records = Collator.from_processor(processor, stage=3, system=""), make_records(tmp_path, 11, text={1, 6})

    def behind(record):
        "KL(host || surrogate) summed over the positions behind the picture, in float64, and their number"
        batch = {k: v for k, v in collate([record]).items() if k in ("input_ids", "attention_mask", "pixel_values")}
        with torch.no_grad(): p, q = (m(**batch).logits[0, :, :host.config.vocab_size].double().log_softmax(-1) for m in (on_host, vlm))
        last = max((i for i, t in enumerate(batch["input_ids"][0].tolist()) if t == vlm.config.image_token_index), default=-1)
        return (p.exp()*(p-q)).sum(-1)[last+1:].sum().item(), len(p)-last-1

    seen = keep_seen(vlm, host, records, collate, CUT[:1], tmp_path/"seen", batch_size=3, per_file=5, progress=False)
    before = [behind(r) for r in records]
    with torch.no_grad():
        for i, (kl, n) in enumerate(before):
            assert int(seen[i]["counts"].sum()) == n
            assert TeachLoss(surrogate, CUT[0], positions=0)(collate_kept([seen[i]], CUT[0])).item() == pytest.approx(kl, rel=.03)
        together = TeachLoss(surrogate, CUT[0], positions=0)(collate_kept([seen[i] for i in range(11)], CUT[0])).item()
    assert together == pytest.approx(sum(kl for kl, _ in before), rel=.02)
    kept, own = keep_states(host, texts(), CUT[:1], tmp_path/"states", progress=False), {n: p.clone() for n, p in vlm.named_parameters()}
    refresh(vlm, seen, kept, refreshing(steps=40, lr=5e-3, precision="no"), tmp_path/"run", CUT[:1], progress=False)
    assert sum(kl for kl, _ in map(behind, records)) < .9*sum(kl for kl, _ in before)
    for n, p in vlm.named_parameters(): assert torch.equal(p, own[n]) == (f"language_model.layers.{CUT[0]}." not in n), n
    set_trainable(vlm, trainable_names(vlm, 2, 1), torch.bfloat16) # as stage 2 in bf16 leaves it: dtypes mixed
    mixed = keep_seen(vlm, host, records, collate, CUT[:1], tmp_path/"mixed", progress=False)
    for i in range(11):
        assert torch.equal(mixed[i]["counts"], seen[i]["counts"])
        assert (mixed[i]["final"].float()-seen[i]["final"].float()).norm() < .1*seen[i]["final"].float().norm()


def test_a_lesson_in_bf16_leaves_the_rotary_frequencies_alone(tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"]).eval()
    surrogate = build_surrogate(model, *CUT)
    before = {n: b.clone() for n, b in surrogate.named_buffers()}
    teach(surrogate, keep_states(model, texts(8), CUT[:1], tmp_path/"states", progress=False), stage0(steps=1, batch_size=4, precision="bf16"), tmp_path/"run", CUT[:1], progress=False)
    assert {p.dtype for p in surrogate.parameters()} == {torch.bfloat16}
    for n, b in surrogate.named_buffers(): assert b.dtype == before[n].dtype and torch.equal(b, before[n]), n
