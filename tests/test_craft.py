"""CRAFT's losses equal plain loops in float64, passes and ranks add up to one batch, what is frozen keeps its bits, killed runs go on.

The module is also what torchrun and a child process start: `test_craft.py FOLDER` and `test_craft.py FOLDER OUT PASS`."""
import copy
import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, SiglipVisionConfig, SiglipVisionModel

from families import FAMILIES, make_tokenizer
from graftlab.contrastive import ContrastiveHead, TextBank, draw_sentence, record_class, same_class, sigmoid_contrastive, statement
from graftlab.craft import (CraftStep, WithSentences, commitment, craft_loss, craft_names, craft_recipe, craft_terms, plug_in, save_encoder, speak_llm,
                            speak_projector, teach_codebook, train_craft)
from graftlab.data import Collator
from graftlab.host import GraftError
from graftlab.images import BadRecord
from graftlab.quantize import BadFeatures, CodebookMismatch, ResidualQuantizer
from graftlab.tower import QuantizedTower, quantize_tower
from graftlab.train import Passes, make_accelerator, optimiser_step
from graftlab.vlm import build_vlm, graft, save_vlm, set_trainable

STEPS, BATCH, WORDS = 4, 8, "red green blue circle square two three".split()


def recipe(**kw): return craft_recipe(**dict(steps=STEPS, batch_size=BATCH, lr=1e-3, precision="no", eps=1e-5) | kw)


def make_tower(entries=24, dim=32, shift=0., cls_token=True):
    torch.manual_seed(0)
    encoder = SiglipVisionModel(SiglipVisionConfig(hidden_size=dim, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=24, patch_size=6))
    return quantize_tower(encoder, torch.randn(entries, dim, generator=torch.Generator().manual_seed(1))+shift, depth=2, cls_token=cls_token).eval()


def make_vlm(width=32, dtype=torch.float32, tower=None):
    "A random Llama around a random SigLIP that speaks a random codebook, with its processor and a collator"
    tower, square = tower or make_tower(), dict(height=24, width=24)
    torch.manual_seed(width)
    llm = LlamaForCausalLM(LlamaConfig(vocab_size=512, hidden_size=width, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2))
    vlm, processor = build_vlm(llm, tower, make_tokenizer(FAMILIES["smollm2"]), processor=CLIPImageProcessorPil(size=square, crop_size=square))
    return vlm.to(dtype), processor, Collator.from_processor(processor, stage=3, system="")


def make_records(folder, n, seed=0):
    "Questions about noise, some with captions, so that sentences are drawn"
    rng, records = random.Random(seed), []
    for i in range(n):
        path = folder/f"{seed}-{i}.png"
        if not path.exists(): Image.frombytes("RGB", (24, 24), rng.randbytes(24*24*3)).save(path)
        records.append(dict(id=str(i), image=str(path), captions=[f"Number {i%5} of noise.", "A caption."][:i%3],
                            conversations=[{"from": "human", "value": "<image>\nWhat is the shape?"}, {"from": "gpt", "value": " ".join(WORDS[i%7:i%7+1+i%2])}]))
    return records


def encode(texts): # a text encoder that needs no model
    return torch.stack([torch.randn(20, generator=torch.Generator().manual_seed(sum(map(ord, t)))) for t in texts])


def run(records, out, asked, wrap=lambda collate: collate, **kw):
    vlm, _, collate = make_vlm(**kw)
    return vlm, train_craft(vlm, records, wrap(collate), asked, out, encode=encode, progress=False)


def bits(module): return {n: v.detach().clone() for n, v in module.state_dict().items()}
def metrics(out): return [{k: v for k, v in json.loads(l).items() if k != "seconds"} for l in (out/"metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return folder, make_records(folder, 16)


# The losses

@settings(deadline=None, max_examples=40)
@given(st.integers(1, 7), st.integers(1, 5), st.integers(0, 10**6), st.floats(.1, 50), st.floats(-15, 5), st.integers(1, 2))
def test_contrastive_equals_a_float64_loop(b, d, seed, temperature, bias, columns):
    g = torch.Generator().manual_seed(seed)
    image, text = torch.randn(b, d, generator=g), torch.randn(b, d, generator=g)
    classes = torch.randint(3, (b, columns), generator=g)
    total, v, t = 0., image.double().tolist(), text.double().tolist()
    for i in range(b):
        for j in range(b):
            cos = sum(x*y for x, y in zip(v[i], t[j]))/math.sqrt(sum(x*x for x in v[i])*sum(x*x for x in t[j]))
            s = temperature*cos+bias
            if i != j and any(p == q for p, q in zip(classes[i].tolist(), classes[j].tolist())): continue
            x = -s if i == j else s
            total += max(x, 0)+math.log1p(math.exp(-abs(x)))         # log(1 + e^x)
    got = sigmoid_contrastive(image, text, classes if columns == 2 else classes[:, 0], temperature, bias)
    assert got.dtype == torch.float32 and got.item() == pytest.approx(total/b, rel=2e-5, abs=2e-5)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.booleans(), st.booleans(), st.integers(0, 10**6))
def test_commitment_equals_a_float64_loop(b, n, d, depth, shared, per_level, seed):
    g = torch.Generator().manual_seed(seed)
    q = ResidualQuantizer(torch.randn(5, d, generator=g) if shared else torch.randn(depth, 5, d, generator=g), depth)
    z = torch.randn(b, n, d, generator=g).requires_grad_()
    ids, terms = q.encode(z), []
    for i in range(b):
        for p in range(n):
            for c in range(d):
                sums = [sum(float(q.table(l)[ids[i, p, l], c]) for l in range(k)) for k in range(1, depth+1)]
                terms += [(z[i, p, c].double().item()-s)**2 for s in (sums if per_level else sums[-1:])]
    loss = commitment(z, q, ids, per_level)
    assert loss.item() == pytest.approx(sum(terms)/len(terms), rel=1e-5, abs=1e-7)
    loss.backward()
    assert z.grad.isfinite().all() and q.codebook.grad is None


@pytest.mark.parametrize("temperature", [0., 1e-6, 40., 1e4, 1e8])
@pytest.mark.parametrize("kind", ["equal", "opposite", "zero", "huge"])
def test_extreme_scores_stay_finite(kind, temperature):
    image = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    text = dict(equal=image, opposite=-image, zero=torch.zeros(5, 8), huge=image*1e18)[kind].clone().requires_grad_()
    image = image.clone().requires_grad_()
    loss = sigmoid_contrastive(image, text, torch.arange(5), temperature, -10.)
    loss.backward()
    assert loss.isfinite() and image.grad.isfinite().all() and text.grad.isfinite().all()


def test_masked_pairs_have_no_gradient_and_a_batch_of_one_class_only_pulls():
    image, text = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    classes = torch.tensor([[0, 9], [1, 8], [2, 9], [3, 7]])         # pictures 0 and 2: another answer, the same sentence
    def pulled(i): return -torch.nn.functional.logsigmoid(10*torch.cosine_similarity(image[i], text[i], dim=0)).item()
    def loss(rows, classes): return sigmoid_contrastive(image[rows], text[rows], classes[rows], 10.).item()
    assert same_class(classes).nonzero().tolist() == [[0, 0], [0, 2], [1, 1], [2, 0], [2, 2], [3, 3]]
    assert loss([0, 2], classes) == pytest.approx((pulled(0)+pulled(2))/2, rel=1e-5)
    assert loss([0, 1], classes) > (pulled(0)+pulled(1))/2+1e-4
    assert loss([0, 1, 2, 3], torch.zeros(4)) == pytest.approx(sum(map(pulled, range(4)))/4, rel=1e-5)
    assert loss([1], classes) == pytest.approx(pulled(1), rel=1e-5)


@settings(deadline=None, max_examples=60)
@given(st.text(max_size=60), st.text(min_size=1, max_size=30))
def test_any_question_becomes_one_line(question, answer):
    s = statement(question, answer)
    assert "\n" not in s and (not answer.strip() or answer.split()[0].rstrip(".").casefold() in s.casefold() or answer.casefold().strip(" .\n") in ("yes", "no"))


# One optimiser step

def one_step(world, micro, **kw):
    "Loss and gradients of the first step"
    asked, (vlm, _, collate) = recipe(micro_batch=micro, **kw), make_vlm()
    set_trainable(vlm, craft_names(vlm), None)
    torch.manual_seed(0)
    model = CraftStep(vlm, ContrastiveHead(32, 20, bias=True), asked)
    acc = make_accelerator("no")
    passes = Passes(world[1], WithSentences(collate, TextBank(world[1], encode)), asked, 1, acc.process_index, acc.num_processes)
    batches = [passes[j] for j in range(passes.per_step)]
    loss, tokens, _ = optimiser_step(acc, acc.prepare(model), batches)
    return loss, tokens, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, batches, model


def flat(grads): return torch.cat([grads[n].flatten() for n in sorted(grads)])


@pytest.mark.parametrize("micro", [4, 2, 1])
def test_passes_add_up_to_one_batch(world, micro):
    whole, parts = one_step(world, None, lambda_con=0.), one_step(world, micro, lambda_con=0.)
    assert whole[1] == parts[1] and parts[0] == pytest.approx(whole[0], rel=1e-5)
    assert (flat(parts[2])-flat(whole[2])).norm() < 1e-5*flat(whole[2]).norm()
    assert not any("codebook" in n or "multi_modal" in n or "language_model" in n for n in whole[2])


def test_contrastive_passes_count_by_their_pictures(world):
    loss, tokens, _, batches, model = one_step(world, 3, lambda_sal=0., lambda_commit=0., lambda_con=1.)
    assert [len(b["ids"]) for b in batches] == [2, 3, 3]
    torch.manual_seed(0); ContrastiveHead(32, 20, bias=True)         # the random numbers that came before the first sentence was drawn
    with torch.no_grad():
        want = []
        for b in batches:
            text, ids = draw_sentence(b)
            image = model.head.projection(model.vlm.model.vision_tower(b["pixel_values"]).pooler_output)
            want.append(len(text)*sigmoid_contrastive(image, text, ids, 10., 0.).item())
    assert loss == pytest.approx(sum(want)/BATCH, rel=1e-5)
    assert model.take_parts()["con"] == pytest.approx(loss, rel=1e-5)


def test_two_ranks_train_as_one_process(world, tmp_path):
    run(world[1], tmp_path/"one", recipe(lambda_con=0.))
    (tmp_path/"records.json").write_text(json.dumps(world[1]))
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port), __file__, str(tmp_path)],
                          env=os.environ | dict(PYTHONPATH=str(Path(__file__).parents[1]), OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false"),
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout+done.stderr
    one, start = load_file(tmp_path/"one"/"trained.safetensors"), dict(make_vlm()[0].named_parameters())
    moved = torch.cat([(v-start[n[4:]]).flatten() for n, v in one.items() if n.startswith("vlm.")])
    for way in "copies", "shards":
        two = load_file(tmp_path/way/"trained.safetensors")
        apart = torch.cat([(two[n]-v).flatten() for n, v in one.items() if n.startswith("vlm.")])
        assert moved.norm() > 0 and apart.norm() < 1e-3*moved.norm()
        for l1, l2 in zip(metrics(tmp_path/"one"), metrics(tmp_path/way)):
            assert l1["tokens"] == l2["tokens"] and l1["loss"] == pytest.approx(l2["loss"], rel=1e-4) and l1["temperature"] == pytest.approx(l2["temperature"])


# What changes and what does not

@pytest.mark.parametrize("dtype,precision", [(torch.float32, "no"), (torch.float32, "bf16"), (torch.bfloat16, "bf16")])
def test_only_the_encoder_changes(world, tmp_path, dtype, precision):
    vlm, _, collate = make_vlm(dtype=dtype)
    before, trained = bits(vlm), set(craft_names(vlm))
    train_craft(vlm, world[1], collate, recipe(precision=precision, lr=1e-2), tmp_path, encode=encode, progress=False)
    after = bits(vlm)
    for n in before:
        if n in trained: assert after[n].dtype == torch.float32 and not torch.equal(after[n], before[n].float()), n
        else: assert after[n].dtype == before[n].dtype and torch.equal(after[n], before[n]), n
    assert "model.vision_tower.quantizer.codebook" in before and not any("codebook" in n for n in trained)


def test_last_layers_alone(world, tmp_path):
    vlm, _, collate = make_vlm()
    before = bits(vlm)
    train_craft(vlm, world[1], collate, recipe(last_k=1), tmp_path, encode=encode, progress=False)
    moved = {n for n, v in bits(vlm).items() if not torch.equal(v, before[n])}
    assert moved and all("layers.1." in n or n.endswith("cls_token") for n in moved)


@pytest.mark.parametrize("make", [speak_projector, speak_llm])
def test_teaching_a_codebook_leaves_encoder_and_codebook(world, tmp_path, make):
    vlm, _, collate = make_vlm()
    before = bits(vlm)
    teach_codebook(vlm, world[1], collate, make(steps=2, batch_size=4, lr=1e-2), tmp_path, progress=False)
    moved = {n for n, v in bits(vlm).items() if not torch.equal(v, before[n])}
    assert moved and all("vision_tower" not in n for n in moved) and any("multi_modal_projector" in n for n in moved)
    assert any("language_model" in n for n in moved) == (make is speak_llm)


def test_codes_with_and_without_cls_are_equal_before_training(world):
    plain, (vlm, _, collate) = make_tower(cls_token=False), make_vlm()
    set_trainable(vlm, craft_names(vlm), None)
    vlm.model.vision_tower.cls_token.data.normal_(0, 3)
    pixels = collate(world[1])["pixel_values"]
    with torch.no_grad(): assert torch.equal(plain(pixels).ids, vlm.model.vision_tower(pixels).ids)


# Stop, kill, resume

def on_nth(n, act):
    def wrap(collate):
        seen = []
        def collating(rs):
            seen.append(1)
            if len(seen) == n: act()
            return collate(rs)
        collating.tokenizer = collate.tokenizer
        return collating
    return wrap


def test_a_run_that_is_stopped_and_killed_ends_bit_for_bit_the_same(world, tmp_path):
    asked = recipe(micro_batch=4, checkpoint_every=1)
    (tmp_path/"records.json").write_text(json.dumps(world[1]))
    run(world[1], tmp_path/"whole", asked)
    with pytest.raises(KeyboardInterrupt, match="after step 1 of 4"):
        run(world[1], tmp_path/"cut", asked, on_nth(2, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    killed = subprocess.run([sys.executable, __file__, str(tmp_path), "cut", "5"], timeout=300,
                            env=os.environ | dict(PYTHONPATH=str(Path(__file__).parents[1]), TOKENIZERS_PARALLELISM="false",
                                                  OMP_NUM_THREADS=str(torch.get_num_threads()))) # another number of threads rounds otherwise
    assert killed.returncode == -signal.SIGKILL and len(metrics(tmp_path/"cut")) in (2, 3)
    run(world[1], tmp_path/"cut", asked)
    assert (tmp_path/"whole"/"trained.safetensors").read_bytes() == (tmp_path/"cut"/"trained.safetensors").read_bytes()
    assert metrics(tmp_path/"whole") == metrics(tmp_path/"cut")
    with pytest.raises(GraftError, match="another recipe"): run(world[1], tmp_path/"cut", recipe(micro_batch=4, checkpoint_every=1, lambda_con=1.))


# Errors

def test_nan_features_are_an_error(world, tmp_path):
    vlm, _, collate = make_vlm()
    vlm.model.vision_tower.backbone.embeddings.patch_embedding.bias.data[3] = torch.nan
    with pytest.raises(BadFeatures, match="NaN or infinity: look at the encoder"):
        train_craft(vlm, world[1], collate, recipe(), tmp_path/"a", encode=encode, progress=False)
    vlm, _, collate = make_vlm()
    vlm.model.multi_modal_projector.linear_2.bias.data[0] = torch.nan
    with pytest.raises(GraftError, match="step 1: the loss is nan with the records"):
        train_craft(vlm, world[1], collate, recipe(), tmp_path/"b", encode=encode, progress=False)


def test_an_empty_class_and_a_class_on_its_own(world, tmp_path):
    def talk(r, answer): return [r["conversations"][0], {"from": "gpt", "value": answer}]
    for label in "", "  ", ".": # a full stop is no answer
        with pytest.raises(BadRecord, match="record 'x' has an empty class"): record_class(dict(id="x", label=label, conversations=[]))
    for bad in dict(world[1][0], label=""), dict(world[1][0], conversations=talk(world[1][0], ".")):
        with pytest.raises(BadRecord, match="'0' has an empty class"): run([bad, *world[1][1:]], tmp_path/"a", recipe())
    alone = [dict(r, label="one") for r in world[1]]                  # no negatives at all
    _, done = run(alone, tmp_path/"b", recipe(lambda_con=1.))
    assert math.isfinite(done["loss"])


def test_records_that_craft_cannot_take_are_named(world, tmp_path):
    text = dict(id="t", conversations=[{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Hi."}])
    with pytest.raises(GraftError, match=r"1 pictures in 2 records .*'t'"): run([world[1][0], text], tmp_path/"a", recipe(batch_size=2))
    with pytest.raises(GraftError, match="no records"): run([], tmp_path/"b", recipe())
    clip = CLIPVisionModel(CLIPVisionConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=24, patch_size=6))
    vlm, _, collate = make_vlm(tower=clip)
    for f in lambda: train_craft(vlm, world[1], collate, recipe(), tmp_path/"c", encode=encode), lambda: teach_codebook(vlm, world[1], collate, speak_llm(), tmp_path/"c"):
        with pytest.raises(GraftError, match="CLIPVisionModel has no codebook"): f()
    vlm, _, collate = make_vlm(tower=make_tower(cls_token=False))
    with pytest.raises(GraftError, match="cls_token=True"): train_craft(vlm, world[1], collate, recipe(), tmp_path/"d", encode=encode, progress=False)


# Grafts

@pytest.fixture(scope="module")
def adapted(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("adapted")
    vlm, _ = run(world[1], out/"run", recipe(lr=1e-2))
    return vlm, save_encoder(vlm, out/"graft", make_vlm()[1], surrogate="a"), out/"run"


def test_a_graft_goes_into_every_model_that_speaks_the_codebook(world, adapted, tmp_path):
    vlm, folder, _ = adapted
    info = json.loads((folder/"graftlab.json").read_text())
    assert info["kind"] == "craft" and info["codebook"] == vlm.model.vision_tower.quantizer.identity() and info["surrogate"] == "a"
    assert type(AutoModel.from_pretrained(folder)) is QuantizedTower and not any("language_model" in n for n in load_file(folder/"model.safetensors"))
    for dtype in torch.float32, torch.bfloat16:
        host, processor, collate = make_vlm(width=48, dtype=dtype)
        before, pixels = bits(host), collate(world[1])["pixel_values"]
        plugged = plug_in(folder, host)
        assert all(torch.equal(v, before[n]) for n, v in bits(plugged).items() if "vision_tower" not in n)
        with torch.no_grad():
            ids = plugged.model.vision_tower(pixels).ids
            if dtype == torch.float32: assert torch.equal(ids, vlm.model.vision_tower(pixels).ids)
            batch = collate(world[1][:2])
            assert plugged(**{k: batch[k] for k in ("input_ids", "attention_mask")}, pixel_values=batch["pixel_values"].to(dtype)).logits.isfinite().all()
        save_vlm(plugged, processor, tmp_path/"whole")
        again = type(plugged).from_pretrained(tmp_path/"whole", dtype=torch.float32)
        assert again.model.vision_tower.quantizer.identity() == info["codebook"]


@pytest.mark.parametrize("other", [dict(entries=25), dict(dim=16), dict(shift=1e-4)], ids=["size", "width", "content"])
def test_another_codebook_is_refused_and_both_are_named(adapted, other):
    host = make_vlm(tower=make_tower(**other))[0]
    before, theirs = bits(host), host.model.vision_tower.quantizer.identity()
    with pytest.raises(CodebookMismatch) as e: plug_in(adapted[1], host)
    for c in theirs, adapted[0].model.vision_tower.quantizer.identity(): assert f"{c['size']} entries x {c['dim']}" in str(e.value) and c["sha256"][:12] in str(e.value)
    assert all(torch.equal(v, before[n]) for n, v in bits(host).items())


def test_a_note_that_lies_about_its_codebook_is_found_out(adapted, tmp_path):
    host = make_vlm(tower=make_tower(shift=1e-4))[0]
    lie = tmp_path/"lie"; lie.mkdir()
    for f in adapted[1].iterdir(): (lie/f.name).write_bytes(f.read_bytes())
    note = json.loads((lie/"graftlab.json").read_text()) | dict(codebook=host.model.vision_tower.quantizer.identity())
    (lie/"graftlab.json").write_text(json.dumps(note))
    with pytest.raises(CodebookMismatch, match="model.safetensors speaks"): plug_in(lie, host)


def test_what_is_no_such_graft_is_refused(adapted, tmp_path):
    host, processor, _ = make_vlm()
    with pytest.raises(GraftError, match="no CRAFT graft"): plug_in(adapted[2], host)
    with pytest.raises(GraftError, match="plug_in"): graft(adapted[1], host)
    coarse = SiglipVisionModel(SiglipVisionConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=24, patch_size=12))
    other = make_vlm(tower=quantize_tower(coarse, adapted[0].model.vision_tower.quantizer.codebook, depth=2, cls_token=True))[0]
    with pytest.raises(GraftError, match="patches of 6, the model 24 in 12"): plug_in(adapted[1], other)
    clip = CLIPVisionModel(CLIPVisionConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=24, patch_size=6))
    with pytest.raises(GraftError, match="has no codebook"): plug_in(adapted[1], make_vlm(tower=clip)[0])


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    records = json.loads((folder/"records.json").read_text())
    if len(sys.argv) == 2:
        for way, shard in dict(copies=None, shards="full").items(): run(records, folder/way, recipe(lambda_con=0., shard=shard))
        torch.distributed.destroy_process_group()
    else: run(records, folder/sys.argv[2], recipe(micro_batch=4, checkpoint_every=1), on_nth(int(sys.argv[3]), lambda: os.kill(os.getpid(), signal.SIGKILL)))
