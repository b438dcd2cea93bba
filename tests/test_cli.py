"The command line as a user meets it: in processes of its own"
import json, os, re, signal, subprocess, sys, time
from pathlib import Path
import pytest
from graftlab import cli

REPO = Path(cli.__file__).parents[1]
ENV = os.environ | dict(PYTHONPATH=str(REPO), HF_HUB_OFFLINE='1', OMP_NUM_THREADS='1', TOKENIZERS_PARALLELISM='false')
RUN = [sys.executable, '-c', 'import sys; from graftlab.cli import main; sys.exit(main())']


def graftlab(*argv, **kw): return subprocess.run([*RUN, *map(str, argv)], env=ENV, capture_output=True, text=True, timeout=300, **kw)


@pytest.fixture(scope='module')
def host(tmp_path_factory):
    "A small checkpoint: ten layers, a plain tokenizer"
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    folder = tmp_path_factory.mktemp('host')
    torch.manual_seed(0)
    words = ['<unk>', '<eos>'] + [f'w{i}' for i in range(98)]
    tok = Tokenizer(models.WordLevel({w: i for i,w in enumerate(words)}, unk_token='<unk>'))
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tok, unk_token='<unk>', eos_token='<eos>').save_pretrained(folder)
    LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=10, num_attention_heads=2, num_key_value_heads=1,
                                 vocab_size=100)).save_pretrained(folder)
    return folder


def test_help_is_light_and_complete():
    "Nothing that takes time to load is loaded for it; every command has examples that its own parser takes"
    done = subprocess.run([RUN[0], '-X', 'importtime', *RUN[1:], '--help'], env=ENV, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and re.search(r'\| +graftlab\.cli$', done.stderr, re.M)
    assert re.findall(r'\| +(torch|transformers|numpy|datasets|accelerate|matplotlib|PIL|IPython)$', done.stderr, re.M) == []
    parser = cli.make_parser()
    for name,(f,_,examples) in cli.COMMANDS.items():
        assert re.search(rf'^    {name}\s+{re.escape(f.__doc__[:20])}', done.stdout, re.M), done.stdout
        for line in re.sub(r'\\\n\s*', ' ', examples).splitlines(): # a backslash goes on in the next line
            words = line.partition('graftlab ')[2].split()
            assert words[0] == name or f' {name} ' in examples, line
            parser.parse_args(words)


def test_errors_are_one_line(host, tmp_path):
    for argv,part in {('report', tmp_path): 'no run.json', ('surrogate', host, tmp_path/'x', '--start', 8, '--end', 3): 'removes no layer',
                      ('trajectory', 'no-such-model'): "neither of the zoo"}.items():
        done = graftlab(*argv)
        lines = done.stderr.strip().splitlines()
        assert done.returncode == 2 and lines[-1].startswith('graftlab: ') and part in lines[-1] and 'Traceback' not in done.stderr, done.stderr
        assert done.stdout == ''
    assert graftlab('zoo', 'eat').returncode == 2
    done = graftlab('evaluate', host, 'questions.json', '--out', tmp_path)                 # before anything is loaded
    assert done.returncode == 2 and 'argument --out' in done.stderr and 'is a folder' in done.stderr, done.stderr
    assert graftlab().returncode == 2


def test_cut_and_look_at_the_cut(host, tmp_path):
    "A surrogate, cut and verified, is a checkpoint that the next command takes"
    done = graftlab('surrogate', host, tmp_path/'cut', '--start', 3, '--end', 5, '--verify')
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path/'cut/config.json').read_text())['num_hidden_layers'] == 8
    (tmp_path/'chats.jsonl').write_text(''.join(json.dumps(dict(messages=[dict(role='user', content=' '.join(f'w{(i*j)%98}' for j in range(1, 20)))]))+'\n' for i in range(1, 9)))
    with (tmp_path/'chats.jsonl').open('a') as f: f.write(json.dumps(dict(messages=[dict(role='user', content='w1')]))+'\n')
    done = graftlab('trajectory', tmp_path/'cut', '--texts', tmp_path/'chats.jsonl', '--stream', '--out', tmp_path/'out')
    assert done.returncode == 2 and 'graftlab: no transition' in done.stderr, done.stderr # a random model has none, but has curves
    assert '1 of 9 conversations left out' in done.stderr, done.stderr                     # nothing to compare in one word
    rows = (tmp_path/'out/trajectory.csv').read_text().splitlines()
    assert len(rows) == 9 and rows[0].endswith('layer_7')
    assert (tmp_path/'out/trajectory.png').stat().st_size > 1000


@pytest.mark.parametrize('how', [[], ['--stream']])
def test_what_cannot_be_looked_at_is_named(host, tmp_path, capsys, how):
    "Folders and texts that are not what they should be, in memory and streamed: one line, and nothing is written"
    import shutil, torch
    from transformers import AutoModelForCausalLM
    text = tmp_path/'chats.jsonl'
    text.write_text(json.dumps(dict(messages=[dict(role='user', content='w1 w2 w3 w4')]))+'\n')
    for name,words in dict(empty='holds no conversation', short='sample 0 has 0 next token', absent='absent.jsonl').items():
        if name != 'absent': (tmp_path/f'{name}.jsonl').write_text('' if name == 'empty' else json.dumps(dict(messages=[dict(role='user', content='w1')]))+'\n')
        assert cli.main(['trajectory', str(host), '--texts', str(tmp_path/f'{name}.jsonl'), '--out', str(tmp_path/'out'), *how]) == 2
        assert words in capsys.readouterr().err
    model = AutoModelForCausalLM.from_pretrained(host)
    def truncated(folder): (f := sorted(folder.glob('*.safetensors'))[1]).write_bytes(f.read_bytes()[:-9])
    def missing(folder): sorted(folder.glob('*.safetensors'))[1].unlink()
    def pickled(folder):
        for f in folder.glob('*.safetensors*'): f.unlink()
        torch.save(model.state_dict(), folder/'pytorch_model.bin')
    def untold(folder):
        for f in folder.glob('token*'): f.unlink()
    def halved(folder): (f := folder/'config.json').write_bytes(f.read_bytes()[:60])
    def unlisted(folder): (f := folder/'model.safetensors.index.json').write_bytes(f.read_bytes()[:200])
    for spoil,words in {truncated: 'model-00002-of', missing: 'model-00002-of', pickled: 'pytorch_model.bin', untold: 'no tokenizer files',
                        halved: 'config.json: not a whole JSON file', unlisted: 'index.json: not a whole JSON file'}.items():
        folder = tmp_path/spoil.__name__
        shutil.copytree(host, folder); (folder/'model.safetensors').unlink(); model.save_pretrained(folder, max_shard_size='60KB'); spoil(folder)
        assert cli.main(['trajectory', str(folder), '--texts', str(text), '--out', str(tmp_path/'out'), *how]) == 2, spoil
        assert words in capsys.readouterr().err, spoil
    assert not (tmp_path/'out/trajectory.json').exists()


def test_ctrl_c(host, tmp_path):
    "Ctrl-C in the middle of work: one line, exit code 130"
    (tmp_path/'chats.jsonl').write_text(json.dumps(dict(messages=[dict(role='user', content='w1 '*200)]))+'\n')
    text = (tmp_path/'chats.jsonl').read_text()
    (tmp_path/'chats.jsonl').write_text(text*20000)
    p = subprocess.Popen([*RUN, 'trajectory', str(host), '--texts', str(tmp_path/'chats.jsonl'), '--samples', '20000', '--out', str(tmp_path/'out')],
                         env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    limit = time.time()+120
    while 'libtorch' not in Path(f'/proc/{p.pid}/maps').read_text():
        assert time.time() < limit and p.poll() is None
        time.sleep(.05)
    time.sleep(8)
    assert p.poll() is None, 'it ended before it was stopped'
    p.send_signal(signal.SIGINT)
    out,err = p.communicate(timeout=120)
    assert p.returncode == 130 and err.strip().splitlines()[-1] == 'graftlab: stopped' and 'Traceback' not in err, err
    assert not (tmp_path/'out').exists()


def test_teach_goes_on_where_it_was_stopped(host, tmp_path):
    "Stage 0 in a process, once in one go and once with Ctrl-C in the middle: the same weights, of which only the translator's are new"
    import torch
    from safetensors.torch import load_file
    assert graftlab('surrogate', host, tmp_path/'cut', '--start', 3, '--end', 5).returncode == 0
    say = lambda i, n: ' '.join(f'w{i*j%98}' for j in range(1, n))
    (tmp_path/'talk.json').write_text(json.dumps([dict(id=i, conversations=[{'from': 'human', 'value': say(i, 9)}, {'from': 'gpt', 'value': say(i+1, 20)}]) for i in range(1, 41)]))
    def argv(out, of=host): return ['teach', tmp_path/'cut', of, tmp_path/out, '--data', tmp_path/'talk.json', '--steps', '400', '--max-tokens', '24',
                                    '--set', 'batch_size=4', 'precision=no', 'lr=1e-2']
    done = graftlab(*argv('whole'))
    assert done.returncode == 0 and done.stdout.startswith('stage 0: 400 steps on 40 texts'), done.stderr
    p = subprocess.Popen([*RUN, *map(str, argv('halves'))], env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log,limit = tmp_path/'halves/metrics.jsonl',time.time()+120
    while not log.exists() or log.read_text().count('\n') < 3:
        assert time.time() < limit and p.poll() is None, p.communicate()[1]
        time.sleep(.02)
    p.send_signal(signal.SIGINT)
    _,err = p.communicate(timeout=120)
    assert p.returncode == 130 and 'stopped after step' in err and 'Traceback' not in err and not (tmp_path/'halves/model').exists(), err
    again = graftlab(*argv('halves'))
    assert again.returncode == 0 and again.stdout == done.stdout.replace('whole', 'halves'), again.stderr
    cut,whole,halves = (load_file(tmp_path/f/'model.safetensors') for f in ('cut', 'whole/model', 'halves/model'))
    assert all(torch.equal(whole[n], halves[n]) for n in whole) and whole.keys() == cut.keys()
    assert {n.split('.')[2] for n in cut if not torch.equal(cut[n], whole[n])} == {'3'}
    kl = [json.loads(l)['loss'] for l in log.read_text().splitlines()]
    assert len(kl) == 400 and sum(kl[-20:]) < .8*sum(kl[:20]), (kl[:20], kl[-20:])
    assert json.loads((tmp_path/'whole/model/graftlab.json').read_text())['taught']['steps'] == 400
    wrong = graftlab(*argv('wrong', tmp_path/'cut'))
    assert wrong.returncode == 2 and 'was cut out of' in wrong.stderr.strip().splitlines()[-1] and not (tmp_path/'wrong').exists(), wrong.stderr
    (tmp_path/'taken/model').mkdir(parents=True); (tmp_path/'taken/model/thesis.txt').write_text('years')
    taken = graftlab(*argv('taken'))
    assert taken.returncode == 2 and 'would be lost' in taken.stderr, taken.stderr
    assert [p.name for p in (tmp_path/'taken').rglob('*')] == ['model', 'thesis.txt']               # and nothing was done before


def test_settings_add_up():
    "`--set` given twice is both"
    for line in ('train 1 out --data d.json', 'teach s h out', 'craft m out --data d.json', 'speak out --data d.json --llm l --tower t', 'plan h --encoder e'):
        args = cli.make_parser().parse_args([*line.split(), '--set', 'steps=500', '--set', 'lr=1e-3', 'seed=1'])
        assert args.set == ['steps=500', 'lr=1e-3', 'seed=1'], line


def test_a_line_of_json_ends_at_its_newline_only(tmp_path):
    "U+2028 is a line's end to str.splitlines and a letter to JSON"
    from graftlab.cli_cut import _conversations
    (tmp_path/'chats.jsonl').write_text(json.dumps(dict(messages=[dict(role='user', content='one\u2028two')]), ensure_ascii=False)+'\n\n', encoding='utf-8')
    assert _conversations(tmp_path/'chats.jsonl', 9, 0) == [[dict(role='user', content='one\u2028two')]]


@pytest.mark.parametrize('more', [(), ('--dry-run',)])
def test_a_model_and_its_parts_are_not_both_a_start(more, host, tmp_path):
    (tmp_path/'d.json').write_text(json.dumps([dict(id='0', conversations=[{'from': 'human', 'value': 'w1'}, {'from': 'gpt', 'value': 'w2'}])]))
    done = graftlab('train', 2, tmp_path/'run', '--model', host, '--image-size', 28, '--data', tmp_path/'d.json', *more)
    assert done.returncode == 2 and 'leave out --llm, --encoder and --image-size' in done.stderr, done.stderr
    done = graftlab('train', 2, tmp_path/'run', '--llm', host, '--data', tmp_path/'d.json', *more)
    assert done.returncode == 2 and 'say where to begin' in done.stderr, done.stderr
