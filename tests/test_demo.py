"""The main job as a process: offline, killed and started again, the same numbers; its graft in plain transformers"""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from plain import plain_answers

ROOT = Path(__file__).resolve().parents[1]
PHASES = {'stage0-late', 'stage0-early', 'stage1-late', 'stage2-late', 'stage1-early', 'stage2-early', 'stage1-host', 'stage2-host', 'stage3-grafted', 'stage3-untrained'}
REFRESH = {f'{phase}-{cut}' for phase in ('refresh', 'again') for cut in ('late', 'early')}
# An audit hook that refuses every connection, whoever asks for it, but those to this machine
OFFLINE = """import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)   # a parent in the background hands on that Ctrl-C is ignored
def refuse(event, args):
    if event=='socket.connect' and isinstance(args[1], tuple) and args[1][0] not in ('127.0.0.1', '::1', 'localhost'): raise OSError(f'no network here: {args[1]}')
    if event=='socket.getaddrinfo' and args[0] not in ('127.0.0.1', '::1', 'localhost', None): raise OSError(f'no network here: {args[0]}')
sys.addaudithook(refuse)
from graftlab.cli import main
sys.exit(main(sys.argv[1:]))"""


def start(out, **kw):
    env = {**os.environ, 'OMP_NUM_THREADS': '2', 'PYTHONPATH': str(ROOT)}
    return subprocess.Popen([sys.executable, '-c', OFFLINE, 'demo', '--quick', '--out', str(out), '--seed', '3', '--precision', 'fp32'], cwd=ROOT, env=env,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kw)


def finish(process, code=0):
    said,_ = process.communicate(timeout=600)
    assert process.returncode==code, said[-3000:]
    return said


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "One quick run, start to end, without a network"
    out = tmp_path_factory.mktemp('demo')/'run'
    finish(start(out))
    return out


def read(folder, name): return json.loads((folder/name).read_text())


def losses(folder):
    "Losses and gradient norms of every training phase, without the times"
    return {p.parent.name: [(x['step'], x['loss'], x['grad_norm'], x['tokens']) for x in map(json.loads, p.read_text().splitlines())]
            for p in sorted(folder.glob('*/metrics.jsonl'))}


def test_leaves_everything(run):
    for name in ('run.json', 'trajectory.json', 'models.json', 'phases.json', 'scores.json', 'examples.json', 'report.html'): assert (run/name).exists(), name
    assert read(run, 'run.json')['finished'] and read(run, 'run.json')['claims']==[]          # a quick run claims nothing
    rows = {r['name'] for r in read(run, 'scores.json')['rows']}
    assert rows=={'prior', 'random', 'surrogate', 'graft', 'early-surrogate', 'early-graft', 'full-grafted', 'full-untrained', 'host'}
    assert set(losses(run))==PHASES | REFRESH
    assert not [p for p in run.rglob('*.tmp')]


@pytest.mark.timeout(1800) # eight starts of the whole job
def test_killed_in_each_phase_and_started_again(run, tmp_path):
    "SIGKILL and Ctrl-C at many places; the run that goes on ends with the numbers of the one that was left alone"
    out = tmp_path/'run'
    places = [('trajectory.json', signal.SIGKILL), ('stage0-late/metrics.jsonl', signal.SIGKILL), ('stage2-late/metrics.jsonl', signal.SIGINT),
              ('refresh-late/metrics.jsonl', signal.SIGKILL), ('scores/graft.json', signal.SIGINT), ('stage2-host/metrics.jsonl', signal.SIGKILL),
              ('stage3-grafted/metrics.jsonl', signal.SIGKILL)]
    for name,how in places:
        process = start(out)
        while process.poll() is None and not ((out/name).exists() and (out/name).stat().st_size): time.sleep(.05)
        assert process.poll() is None, f"the run ended before {name}: {process.communicate()[0][-2000:]}"
        process.send_signal(how)
        said,_ = process.communicate(timeout=120)
        assert process.returncode in (-signal.SIGKILL, 130), said[-2000:]
    finish(start(out))
    assert losses(out)==losses(run)
    assert read(out, 'scores.json')==read(run, 'scores.json')
    assert read(out, 'trajectory.json')==read(run, 'trajectory.json')


def test_other_seed_in_the_same_folder_is_refused(run):
    said = subprocess.run([sys.executable, '-c', OFFLINE, 'demo', '--quick', '--out', str(run), '--seed', '4'], cwd=ROOT, capture_output=True, text=True)
    assert said.returncode==2 and 'another seed' in said.stderr


def test_report_again(run):
    page = (run/'report.html').read_bytes()
    (run/'report.html').unlink()
    subprocess.run([sys.executable, '-c', OFFLINE, 'report', str(run)], cwd=ROOT, check=True, capture_output=True)
    assert (run/'report.html').read_bytes()==page


def test_grafted_folder_in_plain_transformers(run, tmp_path):
    "A process that cannot import graftlab gives the answers that stand in the scores"
    from graftlab.shapes import read_shapes, shape_questions
    from graftlab.zoo import get_data
    questions = shape_questions(read_shapes(get_data('easy-vqa'), 'test'), 6)[:8]
    ours = {p['id']: p['generated'] for p in read(run, 'scores/graft.json')['predictions']}
    assert plain_answers(run/'grafted', questions, tmp_path)==[ours[q['id']] for q in questions]
