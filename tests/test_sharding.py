"""However a model is spread over ranks, it trains as one process does in one big batch, and its runs move between layouts.

The module is also what torchrun starts: `python -m torch.distributed.run --nproc-per-node 4 tests/test_sharding.py FOLDER`."""
import copy
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from transformers import CLIPImageProcessorPil, Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

import test_train as tt
from families import FAMILIES, make_tokenizer
from graftlab.baselines import adaptation, ldifs_ft
from graftlab.cli import main
from graftlab.cut_noise import noise_before
from graftlab.host import GraftError
from graftlab.sharding import empty_vlm, held, leave, place, rows, whole, wrap
from graftlab.train import Passes, StepLoss, draw, make_accelerator, optimiser_step, train
from graftlab.vision import run_tower
from graftlab.vlm import build_vlm, image_features, save_vlm, set_trainable, trainable_names

CASES = {2: {"ddp-4-paper": {}, "full-1-None": {}, "full-2-paper": dict(activation_checkpointing=True), "full-4-None": {}},
         4: {"full-1-paper": {}, "full-2-None": {}, "full-4-paper": {}, "hsdp-1-None": {}, "hsdp-2-paper": dict(activation_checkpointing=True), "hsdp-4-None": {}}}
NAMED = {f"{world}-{name}": (world, name) for world in CASES for name in CASES[world]}
SHARD = dict(ddp=None, full="full", hsdp=2)
LARGE = LlamaConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=16, num_attention_heads=12, vocab_size=8192) # 654 MB in fp32, beside which 50 MB of modules imported on the way count for little


def asked(world, name):
    "Recipe of a case: layout, passes, response weights"
    layout, passes, mode = name.split("-")
    return tt.recipe(shard=SHARD[layout], micro_batch=tt.BATCH//world//int(passes), response_weight=None if mode == "None" else mode, **CASES[world][name])


def noisy(**kw): return tt.recipe(noise=.2, cut_noise=.2, **kw)


def one_step(records, recipe):
    "Facts and whole gradients of the first optimiser step, and what was held"
    vlm, collate = tt.make_vlm()
    acc = make_accelerator(recipe.precision)
    with noise_before(vlm.model.language_model.layers[1:], recipe.cut_noise) as cut:
        model = place(StepLoss(set_trainable(vlm, trainable_names(vlm, 3, None), torch.float32), noise=recipe.noise, cut=cut), acc, recipe)
        passes = Passes(records, collate, recipe, 1, acc.process_index, acc.num_processes)
        loss, tokens, _ = optimiser_step(acc, wrap(model.train(), acc, recipe), [passes[j] for j in range(passes.per_step)], recipe.response_weight)
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    grads = [p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad for p in params.values()]
    facts = dict(loss=loss, tokens=tokens, passes=passes.per_step, bytes=sum(4*g.numel() for g in grads), held=held(model)["gradients"],
                 frozen=[n for n, p in model.named_parameters() if not p.requires_grad and p.grad is not None])
    return facts, {n: whole(p.grad) for n, p in params.items()}


def empty(folder, **kw):
    "The model of `make_vlm` with its decoder on the meta device"
    vlm, collate = tt.make_vlm()
    square = dict(height=28, width=28)
    got, _, weights = empty_vlm(folder, vlm.model.vision_tower, make_tokenizer(FAMILIES["smollm2"]),
                                processor=CLIPImageProcessorPil(size=square, crop_size=square))
    return vlm, got, weights, collate


def test_an_empty_gemma_shows_its_pictures_as_large_as_its_words(tmp_path):
    "Gemma enlarges words on the way in; image tokens of a model without numbers begin at that size too, as in one that is whole"
    config = Gemma3TextConfig(vocab_size=2000, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, head_dim=8, pad_token_id=0)
    decoder, square = Gemma3ForCausalLM(config), dict(height=28, width=28)
    decoder.save_pretrained(tmp_path)
    tower, pixels = tt.make_vlm()[0].model.vision_tower, torch.rand(32, 3, 28, 28)
    def size(build):
        vlm = build(tmp_path, tower, make_tokenizer(FAMILIES["gemma"]), processor=CLIPImageProcessorPil(size=square, crop_size=square))[0]
        with torch.no_grad(): return image_features(vlm, pixels).square().mean().sqrt().item()
    with torch.no_grad(): words = decoder.get_input_embeddings()(torch.arange(1, 2000)).square().mean().sqrt().item()
    assert [size(build_vlm), size(empty_vlm)] == pytest.approx([words, words], rel=.1)


def from_meta(records, out, recipe, folder):
    "Train a model whose decoder was empty"
    vlm, got, weights, collate = empty(folder)
    got.model.multi_modal_projector = vlm.model.multi_modal_projector
    assert next(got.model.language_model.parameters()).is_meta
    train(got, records, collate, recipe, out, weights=weights, progress=False)


class Watch:
    "Largest growth of a process's own memory (not of mapped files) inside the block, in bytes"
    def anon(self): return next(int(l.split()[1])*1024 for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("RssAnon"))
    def look(self):
        while self.on: self.peak = max(self.peak, self.anon()); time.sleep(.001)
    def __enter__(self):
        self.start = self.peak = self.anon(); self.on = True
        self.thread = threading.Thread(target=self.look); self.thread.start()
        return self
    def __exit__(self, *error): self.peak = max(self.peak, self.anon()); self.on = False; self.thread.join()
    @property
    def growth(self): return self.peak-self.start


def load_large(folder):
    "What a rank of four holds, reads and needs of a large decoder"
    acc = make_accelerator("no")
    with Watch() as memory:
        _, vlm, weights, _ = empty(folder)
        model = place(StepLoss(set_trainable(vlm, trainable_names(vlm, 2, None), torch.float32)), acc, tt.recipe(shard="full"),
                      {f"vlm.{n}": w for n, w in weights.items()})
    same, params = [], dict(model.named_parameters())
    for n, (file, key) in weights.items():
        p = params[f"vlm.{n}"]
        with safe_open(file, "pt") as f: same.append(torch.equal(p.to_local(), f.get_slice(key)[rows(p)]))
    return dict(growth=memory.growth, weights=held(model)["weights"], same=all(same), tensors=len(same))


def from_kept(records, out, shard=None):
    "Training on states that enter the encoder's second layer, of which a rank with text alone has none"
    vlm, collate = tt.make_vlm()
    frozen = copy.deepcopy(vlm.model.vision_tower)
    def kept(rs):
        batch = collate(rs)
        return batch | (dict(pixel_values=run_tower(frozen, batch["pixel_values"], 0, 1).detach()) if "pixel_values" in batch else {})
    return train(vlm, records, kept, tt.recipe(shard=shard, last_k=1), out, start=1, progress=False)


def near_its_old_features(records, out, shard=None):
    "LDIFS, whose loss runs two encoders"
    vlm, collate = tt.make_vlm()
    return ldifs_ft(vlm, records, collate, adaptation(**{k: getattr(tt.recipe(), k) for k in ("steps", "batch_size", "lr", "eps", "precision")}, shard=shard), out, progress=False)


OTHERS = dict(kept=from_kept, ldifs=near_its_old_features)


def on_each_rank(folder):
    "What torchrun runs, once for each rank"
    records, rank, world = json.loads((folder/"records.json").read_text()), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for name in CASES[world]:
        facts, grads = one_step(records, asked(world, name))
        if rank == world-1: save_file(grads, folder/f"grads-{world}-{name}.safetensors")
        (folder/f"facts-{world}-{name}-{rank}.json").write_text(json.dumps(facts))
        tt.run(records, folder/f"{world}-{name}", asked(world, name))
    if world == 2: # the last is begun by one process; here with another layout, until a signal comes to the second rank
        for name, way in OTHERS.items(): way(records, folder/f"2-{name}", "full")
        try: tt.run(records, folder/"moved", tt.recipe(shard="full"), tt.on_nth(2, tt.terminate) if rank else lambda c: c)
        except KeyboardInterrupt as e: (folder/f"stopped-{rank}").write_text(str(e))
        facts, grads = one_step(records, tt.recipe(shard="full", precision="bf16"))
        if rank: save_file(grads, folder/"grads-bf16.safetensors")
    else:
        _, grads = one_step(records, noisy(shard=2, micro_batch=1, activation_checkpointing=True))
        if rank: save_file(grads, folder/"grads-noisy.safetensors")
        tt.run(records, folder/"moved", tt.recipe(shard=2, micro_batch=1))
        from_meta(records, folder/"meta", tt.recipe(shard=2), folder/"decoder")
        (folder/f"large-{rank}.json").write_text(json.dumps(load_large(folder/"large")))
        torch.manual_seed(rank) # as nobody should
        different = place(torch.nn.Linear(6, 5), make_accelerator("no"), tt.recipe(shard=2))
        save_file({n: whole(p.data) for n, p in different.named_parameters()}, folder/f"replica-{rank}.safetensors")
        with pytest.raises(GraftError, match="shard=3 does not divide 4 ranks"): tt.run(records, folder/"wrong", tt.recipe(shard=3))
    leave()


def torchrun(world, *args):
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world), "--master-port", str(port), *map(str, args)],
                          env=os.environ | dict(PYTHONPATH=str(Path(__file__).parents[1]), OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false",
                                                MALLOC_ARENA_MAX="1", MALLOC_MMAP_THRESHOLD_="1000000"), # what is freed goes back, so that growth is what is held
                          capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout+done.stderr


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    "A folder in which two ranks and then four have trained; every second record, all that some ranks see, is text alone"
    folder, n = tmp_path_factory.mktemp("ranks"), tt.STEPS*tt.BATCH
    records = tt.make_records(folder, n, text={i for s in range(tt.STEPS) for i in draw(n, s, tt.BATCH)[1::2]})
    (folder/"records.json").write_text(json.dumps(records))
    vlm, _ = tt.make_vlm()
    decoder = LlamaForCausalLM(vlm.config.text_config)
    decoder.model, decoder.lm_head = vlm.model.language_model, vlm.lm_head
    decoder.save_pretrained(folder/"decoder")
    LlamaForCausalLM(LARGE).save_pretrained(folder/"large", max_shard_size="100MB")
    with pytest.raises(KeyboardInterrupt, match="after step 2 of 5"): tt.run(records, folder/"moved", tt.recipe(), tt.on_nth(2, tt.terminate))
    for world in CASES: torchrun(world, __file__, folder)
    return folder, records


@pytest.fixture(scope="module")
def alone(ranks):
    "The same by one process in one big batch, with and without dynamic weights"
    folder, records = ranks
    for mode in None, "paper": tt.run(records, folder/f"alone-{mode}", tt.recipe(response_weight=mode))
    return {str(mode): (*tt.one_step(records, tt.recipe(response_weight=mode)), folder/f"alone-{mode}") for mode in (None, "paper")}


@pytest.mark.parametrize("case", NAMED)
def test_gradients_are_those_of_one_big_batch(ranks, alone, case):
    world, name = NAMED[case]
    layout, passes, mode = name.split("-")
    facts, grads, _ = alone[mode]
    total = sum(4*g.numel() for g in grads.values())
    for rank in range(world):
        theirs = json.loads((ranks[0]/f"facts-{case}-{rank}.json").read_text())
        assert (theirs["passes"], theirs["tokens"], theirs["frozen"]) == (int(passes), facts["tokens"], [])
        assert theirs["loss"] == pytest.approx(facts["loss"], rel=1e-5)
        share = dict(ddp=1, full=world, hsdp=2)[layout]
        assert theirs["bytes"] == theirs["held"] and theirs["bytes"] == pytest.approx(total/share, rel=.05) # spread, and as was foretold
    tt.assert_near(load_file(ranks[0]/f"grads-{case}.safetensors"), grads)


def test_noise_is_that_of_the_record_whatever_the_layout(ranks, alone):
    _, want = one_step(ranks[1], noisy())
    assert (tt.flat(want)-tt.flat(alone["None"][1])).norm() > .01*tt.flat(want).norm() # so noise was at work
    tt.assert_near(load_file(ranks[0]/"grads-noisy.safetensors"), want)


@pytest.mark.parametrize("case", [*NAMED, "meta", "moved"])
def test_five_steps_give_the_weights_of_one_process(ranks, alone, case):
    ours, theirs = alone[case.split("-")[-1] if case in NAMED else "None"][2], ranks[0]/case
    for key in "loss", "grad_norm", "tokens": assert [l[key] for l in tt.metrics(theirs)] == pytest.approx([l[key] for l in tt.metrics(ours)], rel=1e-5)
    assert max(l["grad_norm"] for l in tt.metrics(ours)) > tt.recipe().clip # so clipping was at work
    tt.assert_near(load_file(theirs/"trained.safetensors"), load_file(ours/"trained.safetensors"))
    assert json.loads((theirs/"metrics.json").read_text())["trainable"] == json.loads((ours/"metrics.json").read_text())["trainable"]


@pytest.mark.parametrize("name", OTHERS)
def test_a_rank_with_text_alone_runs_the_layers_that_the_other_runs(ranks, tmp_path, name):
    OTHERS[name](ranks[1], tmp_path/"alone")
    ours, theirs = tmp_path/"alone", ranks[0]/f"2-{name}"
    assert [l["loss"] for l in tt.metrics(theirs)] == pytest.approx([l["loss"] for l in tt.metrics(ours)], rel=1e-5)
    tt.assert_near(load_file(theirs/"trained.safetensors"), load_file(ours/"trained.safetensors"))


def test_begun_by_one_process_gone_on_by_two_ended_by_four(ranks):
    for rank in 0, 1: assert (ranks[0]/f"stopped-{rank}").read_text().startswith("stopped after step 4 of 5")
    assert [l["step"] for l in tt.metrics(ranks[0]/"moved")] == [1, 2, 3, 4, 5]
    assert list((ranks[0]/"moved"/"checkpoints").iterdir()) == []


def test_replicas_start_alike_whatever_their_seeds(ranks):
    first, *others = [load_file(ranks[0]/f"replica-{rank}.safetensors") for rank in range(4)]
    for other in others: assert all(torch.equal(first[n], other[n]) for n in first)


def test_in_bf16_gradients_agree_to_its_precision(ranks, alone):
    got, want = load_file(ranks[0]/"grads-bf16.safetensors"), alone["None"][1]
    assert {g.dtype for g in got.values()} == {torch.float32} # master weights and their gradients
    assert 1e-4 < (tt.flat(got)-tt.flat(want)).norm()/tt.flat(want).norm() < .02


def test_no_rank_ever_holds_the_whole_model(ranks):
    total = sum(f.stat().st_size for f in (ranks[0]/"large").glob("*.safetensors"))
    assert total > 650e6
    for rank in range(4):
        large = json.loads((ranks[0]/f"large-{rank}.json").read_text())
        assert large["same"] and large["tensors"] == 16*9+3
        assert large["weights"] == pytest.approx(total/4, rel=.01)
        assert .9*total/4 < large["growth"] < .5*total, large


def test_an_empty_model_wants_its_own_checkpoint(ranks, tmp_path):
    folder = ranks[0]/"decoder"
    for f in folder.iterdir(): (tmp_path/f.name).write_bytes(f.read_bytes())
    tensors = load_file(tmp_path/"model.safetensors")
    save_file({k: v for k, v in tensors.items() if "layers.1.mlp.up_proj" not in k}, tmp_path/"model.safetensors")
    with pytest.raises(GraftError, match="no file in .* holds model.language_model.layers.1.mlp.up_proj.weight"): empty(tmp_path)
    save_file(tensors | {"model.norm.weight": torch.ones(5)}, tmp_path/"model.safetensors")
    with pytest.raises(GraftError, match=r"model.norm.weight has shape \[5\], the config wants \[32\]"): empty(tmp_path)
    _, vlm, weights, _ = empty(folder)
    with pytest.raises(GraftError, match="has no numbers"): place(StepLoss(vlm), make_accelerator("no"), tt.recipe())
    acc = make_accelerator("no")
    loaded = place(StepLoss(vlm), acc, tt.recipe(shard="full"), {f"vlm.{n}": w for n, w in weights.items()}) # one process: all rows
    want = dict(tt.make_vlm()[0].named_parameters())
    for n, p in loaded.vlm.named_parameters():
        if "language_model" in n or "lm_head" in n: assert torch.equal(p, want[n]), n


def test_processes_that_srun_started_without_a_rank_are_an_error(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "128")
    with pytest.raises(GraftError, match="128 processes were launched but 1 joined"): make_accelerator("no")


def test_the_command_trains_an_empty_model_on_two_ranks_and_writes_it_whole(ranks, tmp_path):
    folder, records = ranks
    vlm, _ = tt.make_vlm()
    _, processor, _ = empty_vlm(folder/"decoder", vlm.model.vision_tower, make_tokenizer(FAMILIES["smollm2"]),
                                processor=CLIPImageProcessorPil(size=dict(height=28, width=28), crop_size=dict(height=28, width=28)))
    save_vlm(vlm, processor, tmp_path/"llava", torch.float32)
    (tmp_path/"llava"/"graftlab.json").write_text(json.dumps(dict(fingerprint="abc", translators=[])))
    def command(out, *recipe): return ["train", "3", str(tmp_path/out), "--model", str(tmp_path/"llava"), "--data", str(folder/"records.json"),
                                       "--set", "steps=2", "batch_size=8", "precision=no", "last_k=null", "lr=1e-3", "eps=1e-5", *recipe]
    assert main(command("one")) == 0
    torchrun(2, "-m", "graftlab.cli", *command("two", "shard=full"))
    one, two = tmp_path/"one", tmp_path/"two"
    tt.assert_near(load_file(two/"trained.safetensors"), load_file(one/"trained.safetensors"))
    got, want = load_file(two/"model"/"model.safetensors"), load_file(one/"model"/"model.safetensors")
    assert {n: (t.dtype, t.shape) for n, t in got.items()} == {n: (t.dtype, t.shape) for n, t in want.items()}
    for n in want: torch.testing.assert_close(got[n], want[n], rtol=1e-2, atol=1e-3) # bfloat16
    for run in one, two: # the host was trained too: no graft, and no word of the host that it was
        assert not (run/"graft").exists() and json.loads((run/"model"/"graftlab.json").read_text()) == dict(translators=[], kind="vlm", stage=3)


if __name__ == "__main__": on_each_rank(Path(sys.argv[1]))
