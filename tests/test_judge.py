"The judge against a server on loopback that misbehaves: a thousand connections, kill and restart, keys"
import asyncio, json, logging, os, random, signal, subprocess, sys, threading, time
from pathlib import Path
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image
from graftlab.endpoint import Endpoint, EndpointError, Patience
from graftlab.judge import GRADES, BadVerdict, JudgeError, judge, read_verdict

ROOT = Path(__file__).resolve().parent.parent
KEY = 'sk-test-0123456789abcdef'
GOOD = dict(correctness=True, presence=True, relevance=3, faithfulness=4, verbosity=1, notes='Fine.')

def chat(text, paid): return json.dumps(dict(choices=[dict(message=dict(content=text))], usage=dict(prompt_tokens=0, completion_tokens=paid)))

# What a server may do in place of an answer: status (None: hang up, 0: never answer), headers, body
FAULTS = {'nonsense': (200, {}, chat('I would say four out of five.', 0)), 'torn': (200, {}, chat(json.dumps(GOOD)[:-9], 0)),
          'range': (200, {}, chat(json.dumps(GOOD | dict(relevance=7)), 0)), 'type': (200, {}, chat(json.dumps(GOOD | dict(verbosity=2.5)), 0)),
          'empty': (200, {}, '{}'), 'html': (200, {}, '<html>busy</html>'), 'limit': (429, {'retry-after': '0.05'}, 'slow down'),
          'date': (429, {'retry-after': 'Wed, 21 Oct 2015 07:28:00 GMT'}, ''), 'broken': (500, {}, 'Traceback'), 'busy': (503, {}, ''),
          'overloaded': (529, {}, '{"type": "error"}'), 'gone': (None, {}, '')}

class Server:
    "HTTP on loopback in a thread of its own; `script(sample, attempt)` names a fault, a status line, or None for a verdict"
    def __init__(self, script):
        self.script,self.asked,self.answered,self.open,self.most = script,{},{},0,0
        self.loop,started = asyncio.new_event_loop(),threading.Event()
        async def _start():
            server = await asyncio.start_server(self.talk, '127.0.0.1', 0, backlog=2048)
            self.url = f'http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1'
            started.set()
        self.loop.create_task(_start())
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        assert started.wait(60)
    async def talk(self, reader, writer):
        self.open += 1; self.most = max(self.most, self.open)
        try:
            while True:
                head = (await reader.readuntil(b'\r\n\r\n')).decode().lower()
                body = json.loads(await reader.readexactly(int(head.split('content-length: ')[1].split('\r\n')[0])))
                sample = json.loads(body['messages'][1]['content'][-1]['text'])['task']
                attempt = self.asked[sample] = self.asked.get(sample, 0)+1
                what = self.script(sample, attempt)
                status,headers,text = FAULTS[what] if isinstance(what, str) else what or (200, {}, chat(json.dumps(GOOD | dict(notes=sample)), 1))
                if status is None: return
                if status == 0: await reader.read(); return                # until the client hangs up
                if what is None: self.answered[sample] = self.answered.get(sample, 0)+1
                lines = [f'HTTP/1.1 {status} X', f'content-length: {len(text.encode())}', *(f'{k}: {v}' for k,v in headers.items()), '', '']
                writer.write('\r\n'.join(lines).encode()+text.encode())
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError): pass
        finally: self.open -= 1; writer.close()

def samples(n, **more): return [dict(id=i, image=None, question=f's{i}', answer='no', response='No, I see none.') | more for i in range(n)]
def endpoint(server, **kw): return Endpoint(server.url, 'strict', **dict(key_env=None) | kw)
QUICK = Patience(wait=.01)

def test_a_thousand_at_once_every_one_judged_or_listed_and_none_twice(tmp_path):
    "Each sample meets up to four faults of twelve kinds before its verdict; a few time out, a few never get one"
    def script(sample, attempt):
        i = int(sample[1:])
        if i % 100 == 7: return 400, {}, f'cannot read {sample}'                     # refused for good
        if i % 100 == 8: return 'nonsense'                                           # never understood
        if i % 50 == 9 and attempt == 1: return 0, {}, ''                            # no answer: time-out
        faults = random.Random(i).choices(list(FAULTS), k=random.Random(-i).randrange(5))
        return faults[attempt-1] if attempt <= len(faults) else None
    server,path = Server(script),tmp_path/'v.jsonl'
    result = judge(samples(1000), endpoint(server), path, concurrency=1000, patience=Patience(attempts=10, timeout=10, wait=.02))
    assert server.most > 500, f'{server.most} connections at once'
    refused,vain = {i for i in range(1000) if i%100 == 7},{i for i in range(1000) if i%100 == 8}
    assert set(result['failed']) == refused | vain and set(result['judged']) == set(range(1000))-refused-vain
    for i in refused: assert result['failed'][i] == f'HTTP 400: cannot read s{i}' and server.asked[f's{i}'] == 1
    for i in vain: assert '10 attempts' in result['failed'][i] and 'no JSON object' in result['failed'][i]
    assert all(v == GOOD | dict(notes=f's{i}') for i,v in result['judged'].items())  # everyone has their own verdict
    assert result['new'] == 980 and result['tokens'] == [0, 980]                     # a verdict costs one token: as many paid for as kept
    lines = [json.loads(l) for l in path.read_text().splitlines()]
    assert len(lines) == len({l['key'] for l in lines}) == len({l['id'] for l in lines}) == 980
    # once more: nobody who has a verdict is asked again, those who have not are
    before,server.script = dict(server.asked),lambda sample, attempt: None
    again = judge(samples(1000), endpoint(server), path, concurrency=50)
    assert again['new'] == 20 and not again['failed'] and set(again['judged']) == set(range(1000))
    assert {int(s[1:]) for s in server.asked if server.asked[s] > before[s]} == refused | vain

SCRIPT = """
import json, sys
from graftlab.endpoint import Endpoint, Patience
from graftlab.judge import judge
samples = json.loads(sys.argv[3])
result = judge(samples, Endpoint(sys.argv[1], 'strict', None), sys.argv[2], concurrency=8, patience=Patience(wait=.01))
print(json.dumps([result['new'], len(result['judged']), len(result['failed'])]))
"""

@pytest.mark.parametrize('how', [signal.SIGKILL, signal.SIGINT])
def test_killed_and_started_again_goes_on(tmp_path, how):
    "After 40 verdicts the server goes silent; the process is killed, a half-written line is added, and a new one finishes"
    gate = dict(shut=True)
    lock = threading.Lock()
    def script(sample, attempt):
        with lock: return (0, {}, '') if gate['shut'] and len(server.answered) >= 40 else None
    server,path = Server(script),tmp_path/'v.jsonl'
    start = lambda: subprocess.Popen([sys.executable, '-c', SCRIPT, server.url, str(path), json.dumps(samples(100))], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process = start()
    try:
        end = time.monotonic()+300
        while not path.exists() or path.read_bytes().count(b'\n') < 40:
            assert process.poll() is None and time.monotonic() < end, process.stderr.read()
            time.sleep(.02)
        os.kill(process.pid, how)
        _,err = process.communicate(timeout=120)
    finally: process.kill(); process.wait()
    assert process.returncode != 0 and (how == signal.SIGKILL or b'KeyboardInterrupt' in err)
    done = {json.loads(l)['id'] for l in path.read_text().splitlines()}
    assert len(done) == 40
    with open(path, 'ab') as f: f.write(b'{"key": "5f1c", "verd')
    gate['shut'] = False
    out,err = start().communicate(timeout=300)
    assert json.loads(out) == [60, 100, 0], err
    assert all(server.answered[f's{i}'] == 1 for i in range(100))                    # all verdicts were given once
    assert all(server.asked[f's{i}'] == 1 for i in done)                             # and of those kept, nothing was asked again
    assert len([json.loads(l) for l in path.read_text().splitlines()]) == 100

def test_the_key_is_nowhere(tmp_path, monkeypatch, caplog):
    "Not in the cache, the log, a failure's reason or an error, though the server repeats it"
    monkeypatch.setenv('JUDGE_KEY', KEY)
    caplog.set_level(logging.DEBUG)
    echo = lambda status: lambda sample, attempt: (status, {}, f'got Bearer {KEY} for {sample}') if sample != 's0' else None
    for status in (400, 500, 401):
        server = Server(echo(status))
        try: said = json.dumps(judge(samples(3), endpoint(server, key_env='JUDGE_KEY'), tmp_path/f'{status}.jsonl', concurrency=1, patience=Patience(attempts=2, wait=.01)))
        except EndpointError as e: said = str(e)+repr(e.__cause__)+repr(e.__context__)
        assert 'Bearer ***' in said and KEY not in said
        assert (tmp_path/f'{status}.jsonl').read_text().count('\n') == 1             # what was judged before is kept
    assert 'HTTP Request' in caplog.text and KEY not in caplog.text
    assert not any(KEY in p.read_text() for p in tmp_path.iterdir())

def test_a_wrong_key_stops_the_run_at_once(tmp_path):
    server = Server(lambda sample, attempt: (401, {}, 'who are you?'))
    with pytest.raises(EndpointError, match='HTTP 401: who are you'): judge(samples(200), endpoint(server), tmp_path/'v.jsonl', concurrency=4, patience=QUICK)
    assert sum(server.asked.values()) <= 8                                           # nobody goes on to ask for all 200

def test_servers_are_waited_for_as_long_as_they_ask(tmp_path):
    times = []
    def script(sample, attempt):
        times.append(time.monotonic())
        return (429, {'retry-after': '0.7'}, '') if attempt == 1 else None
    assert len(judge(samples(1), endpoint(Server(script)), tmp_path/'a.jsonl', patience=QUICK)['judged']) == 1
    assert times[1]-times[0] >= .7
    later = Server(lambda sample, attempt: (503, {'retry-after': '86400'}, 'tomorrow'))
    assert judge(samples(1), endpoint(later), tmp_path/'b.jsonl', patience=QUICK)['failed'][0] == 'HTTP 503: tomorrow (the server wants a wait of 86400 s)'

def test_two_runs_do_not_share_a_file(tmp_path):
    shut = threading.Event()
    server = Server(lambda sample, attempt: None if shut.is_set() else 'busy')
    first = threading.Thread(target=judge, args=(samples(1), endpoint(server), tmp_path/'v.jsonl', 1, Patience(attempts=1000, wait=.01)))
    first.start()
    while not server.asked: time.sleep(.01)
    with pytest.raises(JudgeError, match='in use by another run'): judge(samples(1), endpoint(server), tmp_path/'v.jsonl')
    shut.set(); first.join(120)
    assert not first.is_alive() and judge(samples(1), endpoint(server), tmp_path/'v.jsonl')['new'] == 0

def test_pictures_arrive_as_they_are(tmp_path):
    Image.effect_noise((20, 10), 50).convert('RGB').save(tmp_path/'a.jpg')
    (tmp_path/'b.jpg').write_bytes(b'no picture')
    server = Server(lambda sample, attempt: None)
    two = [samples(1, id='a', image=tmp_path/'a.jpg')[0], samples(1, id='b', question='s1', image=tmp_path/'b.jpg')[0]]
    result = judge(two, endpoint(server), tmp_path/'v.jsonl')
    assert list(result['judged']) == ['a'] and 'b.jpg' in result['failed']['b'] and list(server.asked) == ['s0']

grade = st.one_of(st.booleans(), st.integers(-2, 8), st.floats(), st.none(), st.text(max_size=3))

@settings(deadline=None, max_examples=300)
@given(st.dictionaries(st.sampled_from([*GRADES, 'notes', 'mood']), grade), st.booleans())
def test_a_verdict_is_read_exactly_or_not_at_all(change, fence):
    verdict = GOOD | change
    right = set(verdict) == set(GOOD) and isinstance(verdict['notes'], str) and all(
        isinstance(verdict[k], bool) if kind is bool else type(verdict[k]) is int and verdict[k] in range(6) for k,kind in GRADES.items())
    text = json.dumps(verdict)
    if fence: text = f'```json\n{text}\n```'
    if right: assert read_verdict(text) == verdict
    else:
        with pytest.raises(BadVerdict): read_verdict(text)

@settings(deadline=None)
@given(st.text())
def test_any_text_is_a_verdict_or_a_bad_one(text):
    with pytest.raises(BadVerdict): read_verdict(text)
