"""Cuts that are killed, starved of disk, fed bad files or served by a hub: the destination is whole or absent, and the reason is said"""
import json, os, random, re, resource, shutil, signal, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest
import torch
from hypothesis import given, settings, strategies as st
from huggingface_hub import constants
from safetensors.torch import load_file
from transformers import (AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig, LlamaConfig, Qwen2Config,
    SiglipVisionConfig)

from graftlab.host import BadCheckpoint, GraftError, UnsupportedConfig, fingerprint
from graftlab.ranges import HubFiles, LocalFiles, checkpoint_entries
from graftlab.spans import BadSpan, cut_layers
from graftlab.surrogate import build_surrogate, cut_checkpoint, plan_cut, surrogate_info

SIZE = dict(vocab_size=500, hidden_size=64, intermediate_size=160, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2)


def make_host(folder, config=LlamaConfig(**SIZE), shard="200KB"):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder, max_shard_size=shard)
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def host(tmp_path_factory): return make_host(tmp_path_factory.mktemp("host"))


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    "100 MB in many shards, so that a cut takes a while"
    size = dict(vocab_size=2000, hidden_size=640, intermediate_size=1280, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=8)
    return make_host(tmp_path_factory.mktemp("big"), LlamaConfig(**size), "8MB")


def tensors(folder):
    out = {}
    for f in Path(folder).glob("*.safetensors"): out |= load_file(f)
    return out


def in_child(work):
    "Run `work` in a forked process; its pid"
    if pid := os.fork(): return pid
    code = 1
    try: work(); code = 0
    finally: os._exit(code)


def leftovers(dst): return [p.name for p in dst.parent.iterdir() if p.name.startswith(f".{dst.name}.")]


def whole(src, dst):
    plan = plan_cut(src, 2, 5)
    entries = checkpoint_entries(LocalFiles(dst))
    assert set(entries) == set(plan.tensors) and (dst / "tokenizer.json").exists() and surrogate_info(dst)["translators"] == [2]
    return True


def test_killed_at_random_moments(big, tmp_path):
    cut = lambda: cut_checkpoint(big, tmp_path / "dst", 2, 5, max_shard_bytes=8_000_000, verify=True, progress=False)
    start = time.monotonic()
    assert os.waitpid(in_child(cut), 0)[1] == 0
    full = time.monotonic() - start
    assert whole(big, tmp_path / "dst")
    rng, died, mess = random.Random(0), 0, 0
    for _ in range(20):
        shutil.rmtree(tmp_path / "dst", ignore_errors=True)
        pid = in_child(cut)
        time.sleep(rng.uniform(0, full))
        os.kill(pid, signal.SIGKILL)
        died += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        mess += bool(leftovers(tmp_path / "dst"))
        assert not (tmp_path / "dst").exists() or whole(big, tmp_path / "dst")
    assert died >= 10 and mess >= 5  # most were killed at work, not before or after
    shutil.rmtree(tmp_path / "dst", ignore_errors=True)
    cut()
    assert whole(big, tmp_path / "dst") and not leftovers(tmp_path / "dst")


def test_interrupt_cleans_up(big, tmp_path):
    dst, status = tmp_path / "dst", 0
    for _ in range(20):  # until the signal comes while it works, not after
        shutil.rmtree(dst, ignore_errors=True)
        pid = in_child(lambda: cut_checkpoint(big, dst, 2, 5, verify=True, progress=False))
        limit = time.monotonic() + 60
        while not any(tmp_path.glob(f'.{dst.name}.*/*')) and not dst.exists() and time.monotonic() < limit: time.sleep(.001)  # it has begun to write
        os.kill(pid, signal.SIGINT)
        if status := os.waitpid(pid, 0)[1]: break
    assert status != 0
    assert not dst.exists() and not leftovers(dst)


def test_a_running_cut_is_not_swept(big, tmp_path):
    "A second run to the same place leaves the first one's hidden folder alone; both end whole"
    cut = lambda: cut_checkpoint(big, tmp_path / "dst", 2, 5, verify=True, progress=False)
    pids = [in_child(cut), in_child(cut)]
    assert [os.waitpid(p, 0)[1] for p in pids] == [0, 0]
    assert whole(big, tmp_path / "dst") and not leftovers(tmp_path / "dst")


def test_write_that_fails_midway(big, tmp_path):
    "A limit on file sizes stands for a disk or quota that runs out after the check for room"
    said = tmp_path / "said"
    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000_000, 10_000_000))
        try: cut_checkpoint(big, tmp_path / "dst", 2, 5, progress=False)
        except GraftError as e: said.write_text(str(e))
    assert os.waitpid(in_child(work), 0)[1] == 0
    assert "cannot be written" in said.read_text() and "File too large" in said.read_text()
    assert not (tmp_path / "dst").exists() and not leftovers(tmp_path / "dst")


def test_no_room_for_the_tokenizer(host, tmp_path):
    "Files beside the weights are written with the same care"
    said,src = tmp_path / "said", tmp_path / "src"
    shutil.copytree(host, src)
    (src / "tokenizer.json").write_text(" " * 3_000_000)
    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))
        try: cut_checkpoint(src, tmp_path / "dst", 2, 5, progress=False)
        except GraftError as e: said.write_text(str(e))
    assert os.waitpid(in_child(work), 0)[1] == 0
    assert "tokenizer.json: cannot be written: File too large" in said.read_text()
    assert not (tmp_path / "dst").exists() and not leftovers(tmp_path / "dst")


def test_not_enough_room(host, tmp_path):
    "A sparse source twice as large as the whole disk is refused before a byte is written"
    src, size = tmp_path / "src", 2 * shutil.disk_usage(tmp_path).total // 64 * 64
    shutil.copytree(host, src)
    index = json.loads((src / "model.safetensors.index.json").read_text())["weight_map"]
    file = src / index["model.embed_tokens.weight"]
    entries = checkpoint_entries(LocalFiles(src))
    header = {k: dict(dtype="U8", shape=[size], data_offsets=[0, size]) if k == "model.embed_tokens.weight" else
              dict(dtype="U8", shape=[1], data_offsets=[size + i, size + i + 1]) for i, k in enumerate(k for k, e in entries.items() if e.file == file.name)}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(file, 8 + len(text) + size + len(header))
    with pytest.raises(GraftError, match="are needed and"): cut_checkpoint(src, tmp_path / "dst", 2, 5)
    assert not (tmp_path / "dst").exists() and not leftovers(tmp_path / "dst")


def spoil(name):
    def missing(src): sorted(src.glob("*.safetensors"))[1].unlink()
    def truncated(src): os.truncate(f := sorted(src.glob("*.safetensors"))[1], f.stat().st_size - 5)
    def absent(src):
        index = json.loads((p := src / "model.safetensors.index.json").read_text())
        index["weight_map"]["model.layers.3.extra.weight"] = index["weight_map"]["model.norm.weight"]
        p.write_text(json.dumps(index))
    def pickled(src):
        for p in [*src.glob("*.safetensors"), src / "model.safetensors.index.json"]: p.unlink()
        torch.save({}, src / "pytorch_model.bin")
    def no_config(src): (src / "config.json").unlink()
    def empty(src):
        for p in src.iterdir(): p.unlink()
    return locals()[name]


@pytest.mark.parametrize("how, says", [("missing", "named in model.safetensors.index.json but not there"), ("truncated", "cannot be bytes"),
    ("absent", "model.layers.3.extra.weight is said to be in"), ("pickled", "pytorch_model.bin: pickled weights are not read"), ("no_config", "no config.json"),
    ("empty", "no config.json")])
def test_bad_sources(host, tmp_path, how, says):
    src = tmp_path / "src"
    shutil.copytree(host, src)
    spoil(how)(src)
    with pytest.raises(BadCheckpoint, match=re.escape(says)): cut_checkpoint(src, tmp_path / "dst", 2, 5)
    assert not (tmp_path / "dst").exists() and not leftovers(tmp_path / "dst")


@pytest.mark.parametrize("kw, says", [(dict(start=5, end=2), "removes no layer"), (dict(start=2, end=8), "does not fit a host with layers 0..7"),
    (dict(spans=[(1, 3), (3, 5)]), "overlaps"), (dict(start=2), "give either"), (dict(start=2, end=3, translators=2), "removes no layer"),
    (dict(start=2, end=5, translators=0), "at least one translator")])
def test_bad_spans(host, tmp_path, kw, says):
    with pytest.raises(BadSpan, match=re.escape(says)): cut_checkpoint(host, tmp_path / "dst", **kw)
    with pytest.raises(BadSpan, match=re.escape(says)): build_surrogate(AutoModelForCausalLM.from_pretrained(host), **kw)


def test_last_layer_warns(host, tmp_path):
    with pytest.warns(UserWarning, match="removes the host's last layer, 7"): cut_checkpoint(host, tmp_path / "dst", 4, 7, progress=False)
    assert surrogate_info(tmp_path / "dst")["layers"] == [0, 1, 2, 3, 4]


def test_never_over_something(host, tmp_path):
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst" / "precious").write_text("")
    for make in (cut_checkpoint, lambda s, d, a, b: build_surrogate(s, a, b, save_to=d)):
        with pytest.raises(GraftError, match="not empty"): make(host, tmp_path / "dst", 2, 5)
    with pytest.raises(GraftError, match="not empty"): cut_checkpoint(host, host, 2, 5)
    assert [p.name for p in (tmp_path / "dst").iterdir()] == ["precious"]


def test_extra_layers_are_refused(host, tmp_path):
    src = tmp_path / "src"
    shutil.copytree(host, src)
    config = json.loads((src / "config.json").read_text()) | dict(num_hidden_layers=7)
    (src / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedConfig, match="layer 7"): cut_checkpoint(src, tmp_path / "dst", 2, 5)


@given(st.data())
def test_spans_add_up(data):
    n = data.draw(st.integers(3, 60))
    t = data.draw(st.integers(1, 3))
    points = sorted(data.draw(st.sets(st.integers(0, n - 1), max_size=8)))
    spans = [(a, b) for a, b in zip(points[::2], points[1::2]) if b >= a + t and b < n - 1]
    if not spans: return
    cut = cut_layers(n, spans=data.draw(st.permutations(spans)), translators=t)
    assert len(cut.kept) == n - sum(b - a - t + 1 for a, b in spans)
    assert [cut.kept[j] for j in cut.translators] == [a + i for a, b in spans for i in range(t)]
    assert cut.kept == sorted(set(range(n)) - {i for a, b in spans for i in range(a + t, b + 1)})


@settings(max_examples=8, deadline=None)
@given(a=st.integers(0, 5), n=st.integers(1, 5), t=st.integers(1, 2), shard=st.sampled_from([10**4, 10**5, 10**9]), tied=st.booleans())
def test_files_equal_memory(tmp_path_factory, a, n, t, shard, tied):
    b = min(a + t - 1 + n, 6)
    if b < a + t: return
    tmp = tmp_path_factory.mktemp("equal")
    src = make_host(tmp / "src", Qwen2Config(**SIZE, tie_word_embeddings=tied))
    dst = cut_checkpoint(src, tmp / "dst", a, b, translators=t, max_shard_bytes=shard, progress=False)
    build_surrogate(AutoModelForCausalLM.from_pretrained(src), a, b, translators=t, save_to=tmp / "memory")
    x, y = tensors(dst), tensors(tmp / "memory")
    assert set(x) == set(y) and all(torch.equal(x[k], y[k]) for k in x)
    assert ("lm_head.weight" in x) == (not tied)
    assert {k: v for k, v in surrogate_info(dst).items() if k != "source"} == {k: v for k, v in surrogate_info(tmp / "memory").items() if k != "source"}
    shutil.rmtree(tmp)


def test_the_text_model_inside_a_multimodal_host_is_cut(tmp_path):
    "Gemma-3 with its vision tower: layers of the text model go, the tower stays, files equal memory"
    text = Gemma3TextConfig(**SIZE, head_dim=16, sliding_window=4, query_pre_attn_scalar=16)
    eye = SiglipVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=8, num_attention_heads=2, image_size=28, patch_size=14)
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=eye, mm_tokens_per_image=1, image_token_index=499)).eval()
    model.save_pretrained(tmp_path / "host", max_shard_size="200KB")
    loaded, info = AutoModelForCausalLM.from_pretrained(cut_checkpoint(tmp_path / "host", tmp_path / "dst", 2, 4, progress=False), output_loading_info=True)
    assert not any(info.values()) and [t[:4] for t in loaded.config.text_config.layer_types] == ["slid", "slid", "slid", "full", "slid", "slid"]
    memory = build_surrogate(model, 2, 4)
    ids = torch.randint(3, 490, (2, 9))
    x, y = loaded.eval().state_dict(), memory.state_dict()
    assert set(x) == set(y) and all(torch.equal(x[k], y[k]) for k in x)
    with torch.no_grad(): assert torch.equal(loaded(ids).logits, memory(ids).logits)


class Hub(BaseHTTPRequestHandler):
    "A hub with one model, in `root`; `sent` are the byte ranges of safetensors files that went out"
    root, sent = None, []
    def log_message(self, *args): "Say nothing"
    def reply(self, body, status=200):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        path = unquote(urlparse(self.path).path)
        listing = [dict(type="file", path=p.name, size=p.stat().st_size, oid="0") for p in self.root.iterdir()]
        if "/tree/" in path: return self.reply(json.dumps(listing).encode())
        if path.startswith("/api/models/tiny/host"): return self.reply(json.dumps(dict(id="tiny/host", sha="c" * 40, siblings=[])).encode())
        if not path.startswith("/tiny/host/resolve/"): return self.reply(b"{}", 404)
        a, b = map(int, re.match(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups())
        if path.endswith(".safetensors"): self.sent.append((path.rsplit("/", 1)[-1], a, b + 1))
        self.reply((self.root / path.rsplit("/", 1)[-1]).read_bytes()[a:b + 1], 206)


@pytest.fixture()
def hub(host, monkeypatch):
    Hub.root, Hub.sent = host, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # this hub is in our own process
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown(); server.server_close()


def test_from_a_hub_only_kept_bytes(host, hub, tmp_path):
    files = HubFiles("tiny/host", endpoint=hub)
    dst = cut_checkpoint(files, tmp_path / "hub", 2, 5, progress=False)
    sent = sum(b - a for _, a, b in Hub.sent)
    local = cut_checkpoint(host, tmp_path / "local", 2, 5, progress=False)
    x, y = tensors(dst), tensors(local)
    assert set(x) == set(y) and all(torch.equal(x[k], y[k]) for k in x)
    assert surrogate_info(dst)["fingerprint"] == fingerprint(host) and surrogate_info(dst)["revision"] == "c" * 40
    plan, source = plan_cut(host, 2, 5), LocalFiles(host)
    shards = {e.file for e in plan.entries.values()}
    headers = sum(8 + int.from_bytes(source.read(f, 0, 8), "little") for f in shards)
    kept = sum(e.end - e.start for e in plan.tensors.values())
    removed = [e for e in plan.entries.values() if e not in plan.tensors.values()]
    rows = lambda e: len({r * e.shape[0] // 16 for r in range(16)}) if len(e.shape) > 1 else e.shape[0]
    sampled = sum(rows(e) * ((e.end - e.start) // e.shape[0]) for e in removed)  # for the fingerprint
    assert sent == headers + kept + sampled
    assert sent < .8 * sum(source.size(f) for f in shards)


def test_hub_id(host, hub, tmp_path, monkeypatch):
    "A plain hub id, where the hub that huggingface_hub is set up for is ours"
    monkeypatch.setattr(constants, "ENDPOINT", hub)  # what HF_ENDPOINT sets when huggingface_hub is imported
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub + "/{repo_id}/resolve/{revision}/{filename}")
    model = build_surrogate("tiny/host@main", 2, 5, save_to=tmp_path / "dst")
    info = surrogate_info(tmp_path / "dst")
    assert model.surrogate_info == info and (info["source"], info["revision"]) == ("tiny/host@main", "c" * 40)
    assert info["fingerprint"] == fingerprint(host)
    with pytest.raises(GraftError, match="not to be had from the hub"): build_surrogate("tiny/other", 2, 5)


def test_a_hub_that_sends_too_little(host, hub, tmp_path):
    files = HubFiles("tiny/host", endpoint=hub)
    shutil.copytree(host, tmp_path / "short")
    for p in (tmp_path / "short").glob("*.safetensors"): os.truncate(p, p.stat().st_size * 3 // 4)
    Hub.root = tmp_path / "short"
    with pytest.raises(BadCheckpoint, match="is the file complete"): cut_checkpoint(files, tmp_path / "dst", 2, 5, progress=False)
    assert not (tmp_path / "dst").exists() and not leftovers(tmp_path / "dst")


def test_training_a_surrogates_shared_layers_leaves_the_host_as_it_was():
    "What the control T* trains is a copy; what is frozen stays shared"
    from transformers import LlamaForCausalLM
    from graftlab.trainable import set_trainable
    torch.manual_seed(0)
    host = LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=6, num_attention_heads=2, num_key_value_heads=1, vocab_size=50))
    before = {n: p.clone() for n,p in host.named_parameters()}
    surrogate = build_surrogate(host, 2, 4)
    set_trainable(surrogate, [n for n,_ in surrogate.named_parameters() if '.layers.0.' in n or '.layers.2.' in n], torch.float32)
    with torch.no_grad():
        for p in surrogate.parameters():
            if p.requires_grad: p.add_(1)
    assert all(torch.equal(p, before[n]) for n,p in host.named_parameters())
    assert surrogate.model.layers[1].mlp.up_proj.weight.data_ptr() == host.model.layers[1].mlp.up_proj.weight.data_ptr()
