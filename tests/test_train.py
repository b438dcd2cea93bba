"""Two ranks train as one process does, a killed run ends bit for bit like a whole one, runs move between numbers of ranks.

The module is also what torchrun starts: `python -m torch.distributed.run --nproc-per-node 2 tests/test_train.py FOLDER`."""
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st
from accelerate.tracking import GeneralTracker
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from families import FAMILIES, TEXT, make_tokenizer
from graftlab.checkpoint import load_trained
from graftlab.data import Collator
from graftlab.host import GraftError
from graftlab.images import BadRecord
from graftlab.order import draw_alike
from graftlab.records import load_conversations
from graftlab.train import Passes, StepLoss, draw, fit, make_accelerator, optimiser_step, schedule, shares, stage3, train
from graftlab.vlm import build_vlm, set_trainable, trainable_names

STEPS, BATCH = 5, 16
CASES = {f"{passes}-{mode}": dict(micro_batch=BATCH//2//passes, response_weight=mode) for passes in (1, 2) for mode in (None, "paper")}


def recipe(**kw):
    # AdamW divides by the gradient's own size: the biases of CLIP's keys have none (softmax does not see them), and with the
    # usual eps their rounding errors would become whole steps
    return stage3(**dict(steps=STEPS, batch_size=BATCH, lr=1e-3, eps=1e-5, clip=.5, last_k=None, precision="no") | kw)


def make_vlm(width=32):
    "A random Llama and a random CLIP tower, with a collator"
    torch.manual_seed(0)
    size = dict(intermediate_size=64, num_attention_heads=4)
    decoder = LlamaForCausalLM(LlamaConfig(vocab_size=512, hidden_size=width, num_hidden_layers=2, num_key_value_heads=2, **size))
    tower = CLIPVisionModel(CLIPVisionConfig(hidden_size=32, num_hidden_layers=3, image_size=28, patch_size=14, **size))
    square = dict(height=28, width=28)
    vlm, processor = build_vlm(decoder, tower, make_tokenizer(FAMILIES["smollm2"]), processor=CLIPImageProcessorPil(size=square, crop_size=square))
    return vlm, Collator.from_processor(processor, stage=3, system="")


def make_records(folder, n, text=()):
    "Questions about noise, with answers of one to twelve words; those in `text` have no picture"
    rng, words = random.Random(0), " ".join(TEXT[:3]).split()
    records = []
    for i in range(n):
        question, answer = " ".join(rng.sample(words, 4)), " ".join(rng.sample(words, rng.randint(1, 12)))
        if i not in text: Image.frombytes("RGB", (28, 28), rng.randbytes(28*28*3)).save(folder/f"{i}.png")
        records.append(dict(id=str(i), conversations=[{"from": "human", "value": question if i in text else "<image>\n"+question},
                                                      {"from": "gpt", "value": answer}]) | ({} if i in text else dict(image=str(folder/f"{i}.png"))))
    return records


def run(records, out, asked, wrap=lambda collate: collate):
    vlm, collate = make_vlm()
    return train(vlm, records, wrap(collate), asked, out, progress=False)


def one_step(records, asked):
    "Loss, tokens and gradients of the first optimiser step"
    vlm, collate = make_vlm()
    model, acc = StepLoss(set_trainable(vlm, trainable_names(vlm, 3, None), torch.float32)), make_accelerator("no")
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    passes = Passes(records, collate, asked, 1, acc.process_index, acc.num_processes)
    loss, tokens, _ = optimiser_step(acc, acc.prepare(model), [passes[j] for j in range(passes.per_step)], asked.response_weight)
    return dict(loss=loss, tokens=tokens, passes=passes.per_step), {n: p.grad for n, p in params.items()}


def on_nth(n, act):
    "Wraps a collator: `act` is called when it is asked for the n-th time"
    def wrap(collate):
        asked = []
        def collating(rs):
            asked.append(1)
            if len(asked) == n: act()
            return collate(rs)
        return collating
    return wrap


def spoiled(collate):
    "Pictures of the second batch are no numbers"
    asked = []
    def collating(rs):
        asked.append(1)
        batch = collate(rs)
        if len(asked) == 2: batch["pixel_values"] = batch["pixel_values"]*float("nan")
        return batch
    return collating


def terminate(): os.kill(os.getpid(), signal.SIGTERM)
def metrics(out): return [json.loads(l) for l in (out/"metrics.jsonl").read_text().splitlines()]
def flat(tensors): return torch.cat([tensors[n].flatten() for n in sorted(tensors)])


def assert_near(got, want, eps=1e-5):
    "Of each tensor, and of all together"
    assert got.keys() == want.keys()
    assert (flat(got)-flat(want)).norm() <= eps*flat(want).norm()
    floor = eps*flat(want).norm()/len(want)
    for n in want: assert (got[n]-want[n]).norm() <= eps*want[n].norm()+floor, n


def on_each_rank(folder):
    "What torchrun runs, once for each rank"
    records, rank = json.loads((folder/"records.json").read_text()), int(os.environ["RANK"])
    for name, kw in CASES.items():
        facts, grads = one_step(records, recipe(**kw))
        save_file(grads, folder/f"grads-{name}-{rank}.safetensors")
        (folder/f"facts-{name}-{rank}.json").write_text(json.dumps(facts))
        run(records, folder/name, recipe(**kw))
    run(records, folder/"from-one", recipe())
    try: run(records, folder/"from-two", recipe(), on_nth(3, terminate) if rank == 1 else lambda c: c)
    except KeyboardInterrupt as e: (folder/f"stopped-{rank}").write_text(str(e))
    try: run(records, folder/"spoiled", recipe(), lambda c: c if rank else spoiled(c))
    except GraftError as e: (folder/f"spoiled-{rank}").write_text(str(e))
    torch.distributed.destroy_process_group()


def torchrun(folder):
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port), __file__, str(folder)],
                          env=os.environ | dict(PYTHONPATH=str(Path(__file__).parents[1]), OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false"),
                          capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    "A folder in which two ranks have trained, the second one on text alone"
    folder, n = tmp_path_factory.mktemp("ranks"), STEPS*BATCH
    records = make_records(folder, n, text={i for s in range(STEPS) for i in draw(n, s, BATCH)[1::2]})
    (folder/"records.json").write_text(json.dumps(records))
    with pytest.raises(KeyboardInterrupt, match="after step 3 of 5"): run(records, folder/"from-one", recipe(), on_nth(3, terminate))
    done = torchrun(folder)
    assert done.returncode == 0, done.stdout+done.stderr
    return folder, records


@pytest.fixture(scope="module")
def alone(ranks):
    "The same by one process in one big batch, with and without dynamic weights"
    folder, records = ranks
    out = {}
    for mode in None, "paper":
        out[mode] = *one_step(records, recipe(response_weight=mode)), folder/f"alone-{mode}"
        run(records, out[mode][2], recipe(response_weight=mode))
    return out


def test_tokens_that_truncation_leaves_out_are_counted(tmp_path):
    "Step by step and over the run: the difference of the rows' lengths with and without a limit"
    records, whole = make_records(tmp_path, 10), make_vlm()[1]
    lengths = [whole.length(r) for r in records]
    limit = min(lengths)+8                                             # the question fits, and some of the answer
    def shortened(collate):
        collate.max_length = limit
        return collate
    done = run(records, tmp_path/"run", recipe(steps=3, batch_size=4), shortened)
    over = [max(0, n-limit) for n in lengths]
    want = [sum(over[i] for i in draw(10, s, 4)) for s in range(3)]
    assert [m.get("cut", 0) for m in metrics(tmp_path/"run")] == want and done["cut"] == sum(want) > 0


@pytest.mark.parametrize("workers,gone", [(0, False), (2, False), (0, True)])
def test_a_run_that_a_broken_picture_stopped_goes_on_without_it(workers, gone, tmp_path):
    "As if it had been left out from the beginning, bit for bit; the record is named, and listed once however often it is drawn"
    whole = make_records(tmp_path, 24)
    asked = recipe(batch_size=6, steps=9, checkpoint_every=1, micro_batch=2)
    broken = draw(24, 2, 6, asked.seed)[1]
    stopping = load_conversations(whole)
    if gone: (tmp_path/f"{broken}.png").unlink()
    else: (tmp_path/f"{broken}.png").write_bytes(b"no picture")
    def running(out, on_error):
        vlm, collate = make_vlm()
        return train(vlm, stopping if on_error == "stop" else load_conversations(whole, on_error=on_error), collate, asked, tmp_path/out, workers=workers, progress=False)
    with pytest.raises(BadRecord) as e: running("stopped", "stop")
    assert str(e.value).startswith(f"records: record {broken} (id '{broken}'): ") and "\n" not in str(e.value) and "--on-error skip" in str(e.value)
    assert len(metrics(tmp_path/"stopped")) == 2 or workers # batches are prepared ahead
    running("stopped", "skip")
    running("whole", "skip")
    a, b = (load_file(tmp_path/n/"trained.safetensors") for n in ("stopped", "whole"))
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    for n in ("stopped", "whole"): assert [json.loads(l)["record"] for l in (tmp_path/n/"skipped.jsonl").read_text().splitlines()] == [broken]
    with_it = draw(24, 2, 6, asked.seed)
    vlm, collate = make_vlm()
    seen = [i for j in range(6, 9) for i in Passes(load_conversations(whole, on_error="skip"), collate, asked, 9)[j]["ids"]]
    assert seen == [str((i+1) % 24 if i == broken else i) for i in with_it]


@pytest.mark.parametrize("grouped", [False, True])
def test_a_missing_picture_of_the_first_step_is_left_out(grouped, tmp_path):
    "What identifies the data, and the lengths by which records are grouped, look at no picture"
    whole = make_records(tmp_path, 12)
    asked = recipe(batch_size=4, steps=3, group_by_length=grouped)
    gone = draw(12, 0, 4, asked.seed)[0]
    (tmp_path/f"{gone}.png").unlink()
    vlm, collate = make_vlm()
    done = train(vlm, load_conversations(whole, on_error="skip"), collate, asked, tmp_path/"out", progress=False)
    assert done["steps"] == 3 and [json.loads(l)["record"] for l in (tmp_path/"out"/"skipped.jsonl").read_text().splitlines()] == [gone]
    with pytest.raises(BadRecord, match=f"{gone}.png: no such file"): train(make_vlm()[0], load_conversations(whole), collate, asked, tmp_path/"stops", progress=False)


def test_a_packed_record_may_take_several_rows(tmp_path):
    "Each has noise of its own, and a record that is drawn twice has other noise the second time"
    record = make_records(tmp_path, 1)[0]
    record["conversations"] = record["conversations"]*6
    for m in record["conversations"][2::2]: m["value"] = m["value"].replace("<image>\n", "")
    record["conversations"][0] = dict(record["conversations"][0], value="<image>\n"+record["conversations"][2]["value"])
    vlm, _ = make_vlm()
    _, processor = make_vlm()
    collate = Collator(processor.tokenizer, processor.image_processor, processor.chat.image_id, 4, 2, max_length=40, independent_turns=True, system="")
    batch = Passes([record], collate, recipe(batch_size=2), 1)[0]
    assert len(batch["ids"]) > 2 and len(set(batch["draws"])) == len(batch["draws"]) == len(batch["ids"])
    train(vlm, [record], collate, recipe(batch_size=2, steps=1), tmp_path/"out", progress=False)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_have_the_gradients_of_one_big_batch(ranks, alone, case):
    facts, grads, _ = alone[CASES[case]["response_weight"]]
    for rank in 0, 1:
        theirs = json.loads((ranks[0]/f"facts-{case}-{rank}.json").read_text())
        assert theirs["passes"] == int(case[0]) and facts["passes"] == 1
        assert theirs["tokens"] == facts["tokens"]
        assert theirs["loss"] == pytest.approx(facts["loss"], rel=1e-5)
        assert_near(load_file(ranks[0]/f"grads-{case}-{rank}.safetensors"), grads)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_end_with_the_weights_of_one_process(ranks, alone, case):
    ours = alone[CASES[case]["response_weight"]][2]
    theirs = ranks[0]/case
    for key in "loss", "grad_norm", "tokens": assert [l[key] for l in metrics(theirs)] == pytest.approx([l[key] for l in metrics(ours)], rel=1e-5)
    assert max(l["grad_norm"] for l in metrics(ours)) > recipe().clip # so clipping was at work
    assert_near(load_file(theirs/"trained.safetensors"), load_file(ours/"trained.safetensors"))


def test_dynamic_weights_make_a_difference(alone):
    a, b = flat(alone[None][1]), flat(alone["paper"][1])
    assert (a-b).norm() > .01*a.norm()


def test_a_run_begun_by_one_process_is_ended_by_two(ranks, alone):
    got, want = metrics(ranks[0]/"from-one"), metrics(alone[None][2])
    assert [l["loss"] for l in got] == pytest.approx([l["loss"] for l in want], rel=1e-5)
    assert_near(load_file(ranks[0]/"from-one"/"trained.safetensors"), load_file(alone[None][2]/"trained.safetensors"))


def test_a_signal_to_one_rank_stops_both_and_one_process_goes_on(ranks, alone):
    folder, records = ranks
    for rank in 0, 1: assert (folder/f"stopped-{rank}").read_text().startswith("stopped after step 3 of 5")
    assert [l["step"] for l in metrics(folder/"from-two")] == [1, 2, 3]
    assert [f.name for f in (folder/"from-two"/"checkpoints").iterdir()] == ["step-000003.safetensors"]
    run(records, folder/"from-two", recipe())
    assert [l["loss"] for l in metrics(folder/"from-two")] == pytest.approx([l["loss"] for l in metrics(alone[None][2])], rel=1e-5)
    assert_near(load_file(folder/"from-two"/"trained.safetensors"), load_file(alone[None][2]/"trained.safetensors"))


def test_a_loss_that_is_not_finite_on_one_rank_stops_both_before_a_weight_takes_it_up(ranks):
    folder, records = ranks
    mine = [records[i]["id"] for i in draw(len(records), 1, BATCH)[::2]] # the first rank's, of the second step
    said = [(folder/f"spoiled-{rank}").read_text() for rank in (0, 1)]
    assert "step 2: the loss is nan with the records" in said[0] and all(repr(i) in said[0] for i in mine)
    assert "step 2: the loss is not finite on another rank" in said[1]
    assert len(metrics(folder/"spoiled")) == 1


class Kept(GeneralTracker):
    "A tracker of accelerate's kind that keeps what it is told in files"
    name, requires_logging_directory, tracker = "kept", False, None
    def __init__(self, folder): super().__init__(); self.folder = folder
    def store_init_configuration(self, values): (self.folder/"told.json").write_text(json.dumps(values))
    def log(self, values, step=None, **kw):
        with open(self.folder/"logged.jsonl", "a") as f: f.write(json.dumps(dict(values, step=step))+"\n")
    def finish(self): (self.folder/"closed").touch()


def test_trackers_are_told_what_the_metrics_say_and_closed_also_after_a_stop(tmp_path):
    records, (vlm, collate) = make_records(tmp_path, 8), make_vlm()
    asked = recipe(batch_size=4)
    with pytest.raises(KeyboardInterrupt): train(vlm, records, on_nth(2, terminate)(collate), asked, tmp_path/"run", progress=False, trackers=(Kept(tmp_path),))
    assert (tmp_path/"closed").exists() and json.loads((tmp_path/"told.json").read_text())["lr"] == asked.lr
    train(*make_vlm()[:1], records, collate, asked, tmp_path/"run", progress=False, trackers=(Kept(tmp_path),))
    logged = [json.loads(l) for l in (tmp_path/"logged.jsonl").read_text().splitlines()]
    assert [l["step"] for l in logged] == [1, 2, 3, 4, 5] and logged == metrics(tmp_path/"run")
    with pytest.raises(GraftError, match="not installed here"): make_accelerator("no", ["clearml"])


KILLED = dict(steps=80, batch_size=4, micro_batch=2, precision="bf16", noise=.1, response_weight="paper", checkpoint_every=3)


def in_child(folder, out, at=0, wait=0.):
    "Train in a process of its own, which kills itself `wait` seconds after its `at`-th pass; its exit status"
    return subprocess.run([sys.executable, __file__, str(folder), out, str(at), str(wait)], timeout=300,
                          env=os.environ | dict(PYTHONPATH=str(Path(__file__).parents[1]), OMP_NUM_THREADS="1")).returncode


def train_in_child(folder, out, at, wait):
    "What `in_child` starts"
    kill = threading.Timer(wait, lambda: os.kill(os.getpid(), signal.SIGKILL))
    run(json.loads((folder/"records.json").read_text()), folder/out, recipe(**KILLED), on_nth(at, kill.start))


def test_a_run_that_is_killed_again_and_again_ends_bit_for_bit_the_same(tmp_path):
    records, rng = make_records(tmp_path, 20), random.Random(7)
    (tmp_path/"records.json").write_text(json.dumps(records))
    assert in_child(tmp_path, "whole") == 0
    seen = []
    for _ in range(10): # at a random pass, and a random while later: while it computes, writes a line, writes a checkpoint
        assert in_child(tmp_path, "cut", rng.randint(8, 11), rng.uniform(0, .02)) == -signal.SIGKILL
        seen.append(len(metrics(tmp_path/"cut")))
    assert seen == sorted(seen) and 0 < seen[0] < seen[-1] < 80 # it went on, not back to the start
    assert in_child(tmp_path, "cut") == 0
    assert (tmp_path/"cut"/"trained.safetensors").read_bytes() == (tmp_path/"whole"/"trained.safetensors").read_bytes()
    for key in "step", "loss", "grad_norm", "lr": assert [l[key] for l in metrics(tmp_path/"cut")] == [l[key] for l in metrics(tmp_path/"whole")]
    assert list((tmp_path/"cut"/"checkpoints").iterdir()) == []


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 40), batch=st.integers(1, 50), seed=st.integers(0, 5), steps=st.integers(1, 6))
def test_the_order_is_a_chain_of_whole_epochs(n, batch, seed, steps):
    parts = [draw(n, s, batch, seed) for s in range(steps)]
    assert all(len(p) == batch for p in parts)
    chain = sum(parts, [])
    for e in range(len(chain)//n): assert sorted(chain[e*n:(e+1)*n]) == list(range(n))
    rest = chain[len(chain)//n*n:]
    assert len(set(rest)) == len(rest)


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 500), min_size=1, max_size=60), batch=st.integers(1, 9), steps=st.integers(1, 30), stretch=st.integers(1, 12), seed=st.integers(0, 5))
def test_records_of_like_size_are_the_same_records(sizes, batch, steps, stretch, seed):
    "Over each stretch of steps, hence over each run; and within a stretch, no step overlaps another in size"
    ways = [[draw_alike(sizes, s, steps, batch, seed, stretch) for s in range(steps)], [draw(len(sizes), s, batch, seed) for s in range(steps)]]
    assert all(len(p) == batch for p in ways[0])
    for first in range(0, steps, stretch):
        alike, plain = (w[first:first+stretch] for w in ways)
        assert sorted(sum(alike, [])) == sorted(sum(plain, []))
        spans = sorted((min(sizes[i] for i in p), max(sizes[i] for i in p)) for p in alike)
        assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:]))
    assert max(sizes[i] for i in ways[0][0]) == max(sizes[i] for p in ways[1][:stretch] for i in p)


@settings(max_examples=200, deadline=None)
@given(n=st.integers(0, 40), world=st.integers(1, 9), micro=st.none() | st.integers(1, 12))
def test_shares_are_a_partition_in_step(n, world, micro):
    most = -(-n//world)
    passes = -(-most//micro) if micro else 1
    if n < world*max(1, passes):
        with pytest.raises(GraftError, match="multiple of"): shares(list(range(n)), 0, world, micro)
        return
    parts = [shares(list(range(n)), r, world, micro) for r in range(world)]
    assert sorted(i for p in parts for m in p for i in m) == list(range(n))
    assert {len(p) for p in parts} == {passes}
    sizes = [len(m) for p in parts for m in p]
    assert min(sizes) > 0 and max(sizes) <= (micro or most)
    assert max(sum(map(len, p)) for p in parts)-min(sum(map(len, p)) for p in parts) <= 1


@settings(max_examples=100, deadline=None)
@given(steps=st.integers(1, 500), warmup=st.floats(0, 1))
def test_the_rate_rises_to_its_peak_and_falls_to_almost_zero(steps, warmup):
    curve = [schedule(s, steps, warmup) for s in range(steps)]
    top = curve.index(max(curve))
    assert all(0 < x <= 1 for x in curve) and max(curve) == 1
    assert curve[:top+1] == sorted(curve[:top+1]) and curve[top:] == sorted(curve[top:], reverse=True)
    assert top == max(0, -int(-(warmup*steps)//1)-1)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    "A run that was stopped in the middle"
    folder = tmp_path_factory.mktemp("stopped")
    records = make_records(folder, 8)
    with pytest.raises(KeyboardInterrupt): run(records, folder/"run", recipe(batch_size=2), on_nth(2, terminate))
    return folder/"run", records


def test_a_checkpoint_of_other_parameters_is_named_and_nothing_is_loaded(stopped):
    out, records = stopped
    vlm, collate = make_vlm(width=16)
    before = {n: p.clone() for n, p in vlm.named_parameters()}
    with pytest.raises(GraftError, match=r"step-000002.safetensors holds other parameters .* \[.*\] in the file, \[.*\] here"):
        train(vlm, records, collate, recipe(batch_size=2), out, progress=False)
    for n, p in vlm.named_parameters(): assert torch.equal(p, before[n]), n
    vlm, collate = make_vlm()
    model = StepLoss(set_trainable(vlm, trainable_names(vlm, 2, None), torch.float32)) # another stage under the same recipe
    with pytest.raises(GraftError, match="not trained here"): fit(model, records, collate, recipe(batch_size=2), out, progress=False)


def test_another_recipe_is_refused_and_the_folder_left_alone(stopped):
    out, records = stopped
    def state(): return {f.relative_to(out): f.read_bytes() for f in out.rglob("*") if f.is_file()}
    before = state()
    with pytest.raises(GraftError, match="another recipe.*recipe.json"): run(records, out, recipe(batch_size=2, lr=2e-3))
    assert state() == before


def test_other_data_are_refused_and_the_folder_left_alone(stopped):
    out, records = stopped
    def state(): return {f.relative_to(out): f.read_bytes() for f in out.rglob("*") if f.is_file()}
    before = state()
    fewer, others = records[:-1], [r | dict(conversations=[m | dict(value=m["value"]+"!") for m in r["conversations"]]) for r in records]
    for data in fewer, others:
        with pytest.raises(GraftError, match=f"on other data, {len(records)} records then and {len(data)} now .*recipe.json"): run(data, out, recipe(batch_size=2))
    assert state() == before


def test_a_finished_run_is_loaded_and_only_into_what_it_trained(ranks, alone):
    out = alone[None][2]
    vlm, collate = make_vlm()
    train(vlm, None, None, recipe(), out, progress=False) # needs no data any more
    trained = load_file(out/"trained.safetensors")
    for n, p in vlm.named_parameters():
        if f"vlm.{n}" in trained: assert torch.equal(p, trained[f"vlm.{n}"]), n
    with pytest.raises(GraftError, match="another recipe.*metrics.json"): run(ranks[1], out, recipe(seed=1))
    with pytest.raises(GraftError, match="not trained here"): load_trained(out, {"x": torch.nn.Parameter(torch.zeros(2))})


def test_nothing_to_learn_from_and_nothing_to_train(tmp_path, stopped):
    with pytest.raises(GraftError, match="no records"): run([], tmp_path/"a", recipe(steps=None))
    vlm, collate = make_vlm()
    with pytest.raises(GraftError, match="nothing to train"): fit(StepLoss(vlm.requires_grad_(False)), stopped[1], collate, recipe(), tmp_path/"b")
    assert not (tmp_path/"a").exists() and not (tmp_path/"b").exists()


def test_ranks_that_did_not_find_each_other_are_an_error(monkeypatch):
    assert make_accelerator("no").num_processes == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(GraftError, match="2 processes were launched but 1 joined"): make_accelerator("no")


CTRL_C = """import os, signal, sys, threading, time, torch
from torch import nn
from graftlab.train import fit, stage1
class Slow(nn.Module):
    def __init__(self): super().__init__(); self.w = nn.Parameter(torch.ones(3))
    def forward(self, batch): time.sleep(.1); return (self.w*batch['x'].sum()).sum()
def collate(records): return dict(x=torch.tensor(records, dtype=torch.float32), response=torch.zeros(len(records), dtype=torch.long), ids=records)
signal.signal(signal.SIGINT, signal.default_int_handler)
def stop():
    while not os.path.exists(sys.argv[1]+'/metrics.jsonl') or not os.path.getsize(sys.argv[1]+'/metrics.jsonl'): time.sleep(.05)
    os.killpg(0, int(sys.argv[3]))
threading.Thread(target=stop).start()
fit(Slow(), list(range(100)), collate, stage1(steps=200, batch_size=4, precision='no'), sys.argv[1], workers=int(sys.argv[2]), progress=False)"""


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM]) # from a terminal; from a cluster to a job
def test_a_signal_to_all_processes_saves_and_stops(workers, sent, tmp_path):
    env = os.environ | dict(PYTHONPATH=str(Path(__file__).parents[1]), CUDA_VISIBLE_DEVICES="")
    said = subprocess.run([sys.executable, "-c", CTRL_C, str(tmp_path/"run"), str(workers), str(int(sent))], env=env, capture_output=True, text=True, timeout=300, start_new_session=True).stderr
    assert "KeyboardInterrupt: stopped after step" in said, said[-2000:]
    [kept] = (tmp_path/"run"/"checkpoints").glob("step-*.safetensors")
    assert len((tmp_path/"run"/"metrics.jsonl").read_text().splitlines()) == int(kept.stem.split("-")[1])


def test_a_finished_run_is_not_handed_out_for_other_records(tmp_path):
    class Sum(torch.nn.Module):
        def __init__(self): super().__init__(); self.inner = torch.nn.Linear(2, 1)
        def forward(self, batch): return self.inner(batch["x"]).sum()
    collate = lambda records: dict(x=torch.ones(len(records), 2), response=torch.zeros(len(records), dtype=torch.long))    # no ids: nothing to seed noise with, nothing to name
    short = recipe(steps=None, epochs=1., batch_size=4)
    assert fit(Sum(), list(range(8)), collate, short, tmp_path/"run", progress=False)["steps"] == 2
    assert fit(Sum(), list(range(8)), collate, short, tmp_path/"run", progress=False)["steps"] == 2
    with pytest.raises(GraftError, match="finished run on other data, 8 records then and 40 now"): fit(Sum(), list(range(40)), collate, short, tmp_path/"run", progress=False)


def test_emulated_bf16_is_said():
    "On a processor without bf16 instructions training says that fp32 is faster; with them, and in fp32, it says nothing"
    code = "import sys; from graftlab.train import make_accelerator; make_accelerator(sys.argv[1])"
    def said(precision, kind):
        env = os.environ | dict(ATEN_CPU_CAPABILITY=kind, CUDA_VISIBLE_DEVICES="", PYTHONPATH=str(Path(__file__).parents[1]))
        return "precision='no'" in subprocess.run([sys.executable, "-c", code, precision], env=env, check=True, capture_output=True, text=True).stderr
    assert said("bf16", "avx2") and not said("no", "avx2") and not said("bf16", "default")


if __name__ == "__main__":
    if len(sys.argv) == 2: on_each_rank(Path(sys.argv[1]))
    else: train_in_child(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
