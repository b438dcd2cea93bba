"""Baselines on small random models: LoRA against its formula in several families, LDIFS against a loop, every one stopped and resumed, and on two ranks.

The module is also what torchrun starts: `python -m torch.distributed.run --nproc-per-node 2 tests/test_baselines.py FOLDER`."""
import copy
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel,
                          SiglipVisionConfig, SiglipVisionModel)

from families import FAMILIES, make_tokenizer
from graftlab.baselines import (BASELINES, Alignment, LdifsLoss, adaptation, align, fine_tune, fold_alignment, ldifs, ldifs_ft, lora_ft, lora_layers,
                                picture_weights, plug_small, tower_states, vision_ft, vision_names)
from graftlab.data import Collator
from graftlab.host import GraftError, HostMismatch, UnsupportedConfig
from graftlab.sharding import leave, whole
from graftlab.train import Passes, StepLoss, make_accelerator, optimiser_step, stage3, train
from graftlab.vlm import build_vlm, image_features, save_vlm, set_trainable
from test_sharding import torchrun
from test_train import make_records, on_nth, terminate

TOKENIZER = make_tokenizer(FAMILIES["smollm2"])
SIZE = dict(intermediate_size=64, num_attention_heads=4)


def make_vlm(width=32, seed=0, family="llama", pixels=28, tower=CLIPVisionModel, tokenizer=TOKENIZER):
    torch.manual_seed(seed)
    decoder = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, vocab_size=512, hidden_size=width, num_hidden_layers=2, num_key_value_heads=2,
                                                                    head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2, **SIZE))
    config = {CLIPVisionModel: CLIPVisionConfig, SiglipVisionModel: SiglipVisionConfig}[tower]
    tower = tower(config(hidden_size=32, num_hidden_layers=3, image_size=pixels, patch_size=14, **SIZE))
    square = dict(height=pixels, width=pixels)
    return build_vlm(decoder, tower, copy.deepcopy(tokenizer), processor=CLIPImageProcessorPil(size=square, crop_size=square))


def make_collate(processor): return Collator.from_processor(processor, stage=3, system="")
def weights(model): return {n: p.detach().clone() for n, p in model.named_parameters()}
def changed(model, before): return {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
def names_in(path):
    with safe_open(path, "pt") as f: return set(f.keys())


def recipe(**kw): return adaptation(**dict(steps=6, batch_size=4, lr=1e-3, eps=1e-5, precision="no", checkpoint_every=2) | kw)


@pytest.fixture(scope="module")
def records(tmp_path_factory): return make_records(tmp_path_factory.mktemp("pictures"), 12, text={5})


@pytest.fixture(scope="module")
def inputs(records):
    batch = make_collate(make_vlm()[1])(records[:3])
    return {k: batch[k] for k in ("input_ids", "attention_mask", "pixel_values")}


def disturb(model, names, size=.1):
    params = dict(model.named_parameters())
    with torch.no_grad():
        for n in names: params[n] += size*torch.randn_like(params[n])


# LoRA

@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma3_text"])
def test_merged_logits_equal_those_with_lora_beside(family, inputs):
    vlm, _ = make_vlm(family=family)
    before, kinds, kept = weights(vlm), {n: type(m) for n, m in vlm.named_modules()}, set(vlm.state_dict())
    with torch.no_grad(), lora_layers(vlm) as names:
        disturb(vlm, names)
        beside = vlm(**inputs).logits
    with torch.no_grad(): merged = vlm(**inputs).logits
    assert (merged-beside).abs().max() <= 1e-5*beside.abs().max().clamp(min=1)
    assert changed(vlm, before) == {f"model.language_model.layers.{i}.self_attn.{t}_proj.weight" for i in range(2) for t in "qk"}
    assert {n: type(m) for n, m in vlm.named_modules()} == kinds and set(vlm.state_dict()) == kept
    assert not hasattr(vlm.model.language_model, "peft_config")


def test_rank_scale_and_places_are_those_of_the_paper():
    vlm, _ = make_vlm()
    with lora_layers(vlm) as names:
        params = dict(vlm.named_parameters())
        assert {n.split("model.language_model.")[1].replace(".default.weight", "") for n in names} == \
            {f"layers.{i}.self_attn.{t}_proj.lora_{m}" for i in range(2) for t in "qk" for m in "AB"}
        assert all(params[n].shape[0 if "lora_A" in n else 1] == 8 for n in names)
        assert {m.scaling["default"] for m in vlm.modules() if hasattr(m, "lora_A")} == {32/8}
        assert all(bool(params[n].any()) == ("lora_A" in n) for n in names) # B is zero


@settings(max_examples=10, deadline=None)
@given(rank=st.integers(1, 20), alpha=st.floats(.5, 64), seed=st.integers(0, 99))
def test_merging_adds_the_product(rank, alpha, seed):
    vlm, _ = make_vlm()
    before = weights(vlm)
    with lora_layers(vlm, rank, alpha, ("v_proj",), seed) as names:
        disturb(vlm, names)
        p = weights(vlm)
    for i in range(2):
        n = f"model.language_model.layers.{i}.self_attn.v_proj"
        want = before[n+".weight"].double()+alpha/rank*p[n+".lora_B.default.weight"].double()@p[n+".lora_A.default.weight"].double()
        torch.testing.assert_close(dict(vlm.named_parameters())[n+".weight"].double(), want, rtol=1e-5, atol=1e-5)


def test_base_is_untouched_while_lora_trains(records, tmp_path):
    vlm, processor = make_vlm()
    before = {id(p): p.detach().clone() for p in vlm.parameters()}
    with lora_layers(vlm) as names:
        fine_tune(vlm, names, records, make_collate(processor), recipe(), tmp_path)
        assert all(torch.equal(p, before[id(p)]) for p in vlm.parameters() if id(p) in before) and len(before) == len(list(vlm.parameters()))-len(names)
        trained = dict(vlm.named_parameters())
        assert all(trained[n].any() for n in names) # B has left zero


@pytest.mark.parametrize("stage", [2, 3])
def test_checkpoints_hold_what_is_trained_and_no_base(records, tmp_path, stage):
    vlm, processor = make_vlm()
    before, asked = weights(vlm), recipe(stage=stage, last_k=1)
    with pytest.raises(KeyboardInterrupt): lora_ft(vlm, records, on_nth(3, terminate)(make_collate(processor)), asked, tmp_path)
    assert not (changed(vlm, before) and stage == 2) and set(weights(vlm)) == set(before) # taken off again
    file, = (tmp_path/"checkpoints").glob("step-000003*")
    inside = {n for n in names_in(file) if n.startswith("weight/")}
    assert len([n for n in inside if ".lora_" in n]) == 8
    assert {n.split(".")[2] for n in inside if ".lora_" not in n} == (set() if stage == 2 else {"vision_tower", "multi_modal_projector"})
    assert not any("language_model" in n and ".lora_" not in n for n in inside)


def test_frozen_weights_in_bf16_are_merged_in_fp32(records, tmp_path):
    vlm, processor = make_vlm()
    vlm.to(torch.bfloat16)
    before = weights(vlm)
    lora_ft(vlm, records, make_collate(processor), recipe(precision="bf16", steps=2), tmp_path)
    touched = {n for n, p in vlm.named_parameters() if not torch.equal(p.float(), before[n].float())}
    assert touched and all(".q_proj" in n or ".k_proj" in n for n in touched)
    queries_and_keys = {n for n in before if "language_model" in n and n.endswith(("q_proj.weight", "k_proj.weight"))}
    assert {n for n, p in vlm.named_parameters() if p.dtype == torch.float32} == queries_and_keys
    assert not any(p.requires_grad for p in vlm.parameters())


def test_lora_leaves_the_random_state_alone_and_has_a_seed():
    drawn = []
    for seed in 1, 1, 2:
        vlm, _ = make_vlm()
        torch.manual_seed(7)
        with lora_layers(vlm, seed=seed) as names: drawn.append(dict(vlm.named_parameters())[names[0]].detach().clone())
        assert torch.rand(1).item() == torch.rand(1, generator=torch.Generator().manual_seed(7)).item()
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_families_with_fused_projections_are_refused(records, tmp_path):
    vlm, processor = make_vlm(family="phi3")
    before = weights(vlm)
    with pytest.raises(UnsupportedConfig, match="phi3: layer 0 has no linear map called q_proj"): lora_ft(vlm, records, make_collate(processor), recipe(), tmp_path)
    assert not changed(vlm, before)
    with lora_layers(vlm, targets=("qkv_proj",)) as names: assert len(names) == 4


def test_without_peft_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None) # what Python itself does for a module that may not be imported
    with pytest.raises(GraftError, match=r"graftlab\[lora\]"):
        with lora_layers(make_vlm()[0]): pass


# LDIFS

def loop(states, reference, unit):
    "The formula, number by number, in Python's own floats"
    out = []
    for i in range(len(states[0])):
        total = 0.
        for a, b in zip(states, reference):
            for x, y in zip(a[i].tolist(), b[i].tolist()):
                nx, ny = (sum(v*v for v in x)**.5, sum(v*v for v in y)**.5) if unit else (1, 1)
                total += sum((v/nx-w/ny)**2 for v, w in zip(x, y))/(a.shape[1]*len(states) if unit else 1)
        out.append(total)
    return out


@settings(max_examples=40, deadline=None)
@given(layers=st.integers(1, 3), pictures=st.integers(1, 3), tokens=st.integers(1, 4), width=st.integers(1, 5), unit=st.booleans(), seed=st.integers(0, 10**6))
def test_ldifs_equals_a_loop(layers, pictures, tokens, width, unit, seed):
    g = torch.Generator().manual_seed(seed)
    a, b = ([torch.randn(pictures, tokens, width, generator=g) for _ in range(layers)] for _ in range(2))
    torch.testing.assert_close(ldifs(a, b, unit), torch.tensor(loop(a, b, unit)), rtol=1e-4, atol=1e-5)
    assert torch.equal(ldifs(a, a, unit), torch.zeros(pictures))
    torch.testing.assert_close(ldifs(a, b, unit), ldifs(b, a, unit))
    if unit: # whatever a layer's scale
        torch.testing.assert_close(ldifs([3*x for x in a], [.1*x for x in b]), ldifs(a, b), rtol=1e-4, atol=1e-5)
        assert ldifs(a, b).max() <= 4+1e-4


def test_ldifs_of_bf16_features_is_computed_in_fp32():
    a = [torch.randn(2, 3, 64).bfloat16()]
    b = [a[0]*(1+2**-7)]
    assert ldifs(a, b).dtype == torch.float32 and ldifs(a, b, unit=False).max() > 0


def one_step(records, micro, weight=10.):
    vlm, processor = make_vlm()
    set_trainable(vlm, vision_names(vlm, 2), torch.float32)
    model = LdifsLoss(vlm, weight=weight)
    torch.manual_seed(1)
    disturb(vlm, vision_names(vlm, 2), .02)
    passes = Passes(records, make_collate(processor), recipe(batch_size=12, micro_batch=micro, steps=1), 1)
    loss, tokens, _ = optimiser_step(make_accelerator("no"), model, [passes[j] for j in range(passes.per_step)])
    return loss, torch.cat([p.grad.flatten() for p in vlm.parameters() if p.grad is not None]), vlm, model, passes


@pytest.mark.parametrize("micro", [1, 3, 6])
def test_micro_batches_have_the_gradient_of_one_big_batch(records, micro):
    "One of the records is text alone"
    (loss, grad, *_), (whole, want, *_) = one_step(records, micro), one_step(records, None)
    assert abs(loss-whole) <= 1e-5*whole and (grad-want).norm() <= 1e-4*want.norm()


def test_the_step_s_loss_is_task_plus_lambda_times_token_weighted_distance(records):
    loss, _, vlm, model, passes = one_step(records, None, weight=3.)
    batch = passes[0]
    batch["weight"] = torch.ones(len(batch["target"]))
    with torch.no_grad():
        moved, old = (tower_states(t, batch["pixel_values"], 0, 2) for t in (vlm.model.vision_tower, model.reference))
        own = picture_weights(batch, vlm.config.image_token_index)
        want = (StepLoss(vlm)(batch)+3*(own*ldifs(moved, old)).sum())/len(batch["target"])
    assert abs(loss-want) <= 1e-5*want and own.sum() < len(batch["target"]) and len(own) == 11


@pytest.mark.parametrize("tower", [CLIPVisionModel, SiglipVisionModel])
def test_features_move_less_with_a_larger_weight(records, tmp_path, tower):
    moved = []
    for i, weight in enumerate((None, 0., .02, .2)):
        vlm, processor = make_vlm(tower=tower)
        old, collate = copy.deepcopy(vlm.model.vision_tower), make_collate(processor)
        asked, more = recipe(steps=12), {} if weight is None else dict(weight=weight)
        (ldifs_ft if more else vision_ft)(vlm, records, collate, asked, tmp_path/str(i), **more)
        with torch.no_grad():
            px = collate(records[:4])["pixel_values"]
            moved.append(ldifs(tower_states(vlm.model.vision_tower, px, 0, 2), tower_states(old, px, 0, 2)).mean().item())
    free, none, light, usual = moved
    assert free == none and light < .8*free and usual < .5*light


def test_ldifs_needs_a_trained_encoder():
    vlm, _ = make_vlm()
    with pytest.raises(GraftError, match="no weight of the encoder is trained"): LdifsLoss(vlm.requires_grad_(False))


def test_ldifs_does_not_resume_from_an_encoder_that_has_moved(records, tmp_path):
    vlm, processor = make_vlm()
    collate = make_collate(processor)
    with pytest.raises(KeyboardInterrupt): ldifs_ft(vlm, records, on_nth(3, terminate)(collate), recipe(), tmp_path)
    with pytest.raises(GraftError, match="as it was before"): ldifs_ft(vlm, records, collate, recipe(), tmp_path)
    done = ldifs_ft(make_vlm()[0], records, collate, recipe(), tmp_path)
    assert ldifs_ft(vlm, None, None, recipe(), tmp_path) == done # finished: its weights are loaded, wherever the encoder was


# All of them, stopped and resumed

def prepared(name):
    vlm, processor = make_vlm()
    if name == "distilled":
        small, its = make_vlm(width=16, seed=1)
        plug_small(vlm, small, processor.tokenizer, its.tokenizer)
    return vlm, processor


@pytest.mark.parametrize("name", BASELINES)
def test_a_run_that_was_stopped_ends_like_a_whole_one(name, records, inputs, tmp_path):
    vlm, processor = prepared(name)
    collate, baseline = make_collate(processor), BASELINES[name]
    whole = baseline(vlm, records, collate, recipe(), tmp_path/"whole", progress=False)
    end = weights(vlm)
    with pytest.raises(KeyboardInterrupt, match="after step 3 of 6"): baseline(prepared(name)[0], records, on_nth(3, terminate)(collate), recipe(), tmp_path/"cut")
    again, _ = prepared(name)
    metrics = baseline(again, records, collate, recipe(), tmp_path/"cut")
    assert not changed(again, end) and metrics["loss"] == whole["loss"] and metrics["steps"] == 6
    loaded, _ = prepared(name)
    assert baseline(loaded, None, None, recipe(), tmp_path/"whole") == whole and not changed(loaded, end)
    plain, _ = make_vlm()
    assert {n: p.shape for n, p in end.items()} == {n: p.shape for n, p in plain.named_parameters()} # an ordinary model
    save_vlm(vlm, processor, tmp_path/"model", dtype=torch.float32)
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path/"model").eval()
    with torch.no_grad(): torch.testing.assert_close(theirs(**inputs).logits, vlm(**inputs).logits, rtol=1e-4, atol=1e-5)


def test_all_have_one_interface(records, tmp_path):
    lines = []
    for name, baseline in BASELINES.items():
        vlm, processor = prepared(name)
        metrics = baseline(vlm, records, make_collate(processor), recipe(steps=2), tmp_path/name, workers=0, progress=False)
        lines.append((set(metrics), set(json.loads((tmp_path/name/"metrics.jsonl").read_text().splitlines()[0]))))
    assert all(l == lines[0] for l in lines)


# On two ranks

LAYOUTS = [("ldifs", None), *((name, "full") for name in BASELINES)]


def on_each_rank(folder):
    records, rank = json.loads((folder/"records.json").read_text()), int(os.environ["RANK"])
    for name, shard in LAYOUTS:
        vlm, processor = prepared(name)
        BASELINES[name](vlm, records, make_collate(processor), recipe(steps=4, shard=shard), folder/f"run-{name}-{shard}", progress=False)
        end = {n: whole(p).detach() for n, p in vlm.named_parameters()}
        if rank: save_file(end, folder/f"{name}-{shard}.safetensors")
    leave()


@pytest.fixture(scope="module")
def ranks(records, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    (folder/"records.json").write_text(json.dumps(records))
    torchrun(2, __file__, folder)
    return folder


@pytest.mark.parametrize("name, shard", LAYOUTS)
def test_two_ranks_end_where_one_does(name, shard, records, ranks, tmp_path):
    vlm, processor = prepared(name)
    before = weights(vlm)
    BASELINES[name](vlm, records, make_collate(processor), recipe(steps=4), tmp_path)
    end, theirs = weights(vlm), load_file(ranks/f"{name}-{shard}.safetensors")
    assert end.keys() == theirs.keys()
    moved = [n for n in end if not torch.equal(end[n], before.get(n))] if name != "distilled" else [n for n in end if "multi_modal_projector" in n]
    assert moved and all(torch.equal(end[n], theirs[n]) for n in end.keys()-set(moved))
    flat = lambda t: torch.cat([t[n].flatten() for n in moved])
    way = flat(end)-flat(before) if name != "distilled" else flat(end)
    assert (flat(theirs)-flat(end)).norm() <= 1e-4*way.norm()


# A distilled model as stand-in

@settings(max_examples=10, deadline=None)
@given(width=st.sampled_from([8, 16, 24, 32]), seed=st.integers(0, 99))
def test_folding_changes_nothing_and_leaves_no_dead_unit(width, seed):
    (vlm, processor), (small, its) = make_vlm(), make_vlm(width=width, seed=1)
    plug_small(vlm, small, processor.tokenizer, its.tokenizer, seed)
    with torch.no_grad():
        old = vlm.model.multi_modal_projector
        for p in old.parameters(): p.add_(.1*torch.randn_like(p)) # biases, too
        px = torch.randn(2, 3, 28, 28)
        want = old(image_states := small.model.vision_tower(px, output_hidden_states=True).hidden_states[-2][:, 1:])
        assert image_states.shape == (2, 4, 32) and want.shape == (2, 4, 32)
        fold_alignment(vlm, seed)
        torch.testing.assert_close(image_features(vlm, px), want, rtol=1e-4, atol=1e-5)
    new = vlm.model.multi_modal_projector
    assert type(new) is type(old.adapter) and new.linear_2.weight.shape == (32, 32)
    image_features(vlm, px).square().sum().backward()
    assert (new.linear_2.weight.grad.abs().sum(0) > 0).all()


def test_only_the_map_is_trained_and_the_small_model_stays(records, tmp_path):
    (vlm, processor), (small, its) = make_vlm(), make_vlm(width=16, seed=1)
    plug_small(vlm, small, processor.tokenizer, its.tokenizer)
    host, stand_in, adapter = weights(vlm), weights(small), weights(vlm.model.multi_modal_projector.adapter)
    held = vlm.model.multi_modal_projector
    metrics = align(vlm, records, make_collate(processor), recipe(), tmp_path)
    assert metrics["trainable"] == 16*32+32 and names_in(tmp_path/"trained.safetensors") == {f"vlm.model.multi_modal_projector.linear_2.{p}" for p in ("weight", "bias")}
    assert not changed(held.adapter, adapter) and not changed(small, stand_in)
    assert all(torch.equal(p, host[n]) for n, p in vlm.named_parameters() if "multi_modal_projector" not in n)


@pytest.mark.parametrize("other, message", [
    (dict(width=64), "64 wide and the host 32"),
    (dict(width=16, pixels=56), "image_seq_length is 16 in the small model and 4"),
    (dict(width=16, tower=SiglipVisionModel), "vision_feature_select_strategy is full"),
    (dict(width=16, tokenizer=make_tokenizer(FAMILIES["llama3"])), "tokenizer has .* tokens and the host's")])
def test_models_that_do_not_fit_are_refused(other, message):
    (vlm, processor), (small, its) = make_vlm(), make_vlm(**other)
    before, stay = weights(vlm), weights(small)
    with pytest.raises(HostMismatch, match=message): plug_small(vlm, small, processor.tokenizer, its.tokenizer)
    assert not changed(vlm, before) and not changed(small, stay)


def test_a_tokenizer_with_the_same_words_in_another_order_is_refused():
    (vlm, processor), (small, _) = make_vlm(), make_vlm(width=16)
    ours, theirs = make_tokenizer(FAMILIES["smollm2"]), make_tokenizer(FAMILIES["smollm2"])
    ours.add_tokens(["red", "blue"]); theirs.add_tokens(["blue", "red"])
    with pytest.raises(HostMismatch, match="'blue' is"): plug_small(vlm, small, ours, theirs)


def test_align_needs_a_map(records, tmp_path):
    vlm, processor = make_vlm()
    with pytest.raises(GraftError, match="plug_small"): align(vlm, records, make_collate(processor), recipe(), tmp_path)
    assert not isinstance(vlm.model.multi_modal_projector, Alignment)


def test_stage_3_goes_on_from_a_folded_model(records, tmp_path):
    vlm, processor = prepared("distilled")
    align(vlm, records, make_collate(processor), recipe(), tmp_path/"align")
    before = weights(vlm)
    train(vlm, records, make_collate(processor), stage3(steps=2, batch_size=4, lr=1e-3, precision="no"), tmp_path/"3")
    spare = "model.multi_modal_projector.linear_2.weight"
    assert spare in changed(vlm, before) and dict(vlm.named_parameters())[spare][:, 16:].any() # the spare units have begun to work


if __name__ == "__main__": on_each_rank(Path(sys.argv[1]))
