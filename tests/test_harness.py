"lm-evaluation-harness through graftlab and through its own command line, on tiny checkpoints, offline"
import json
import os
import random
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BitImageProcessorPil, CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from graftlab import cli
from graftlab.harness import PAPER_TASKS, decoder_of, find_tasks, language_change, load_tasks, text_change, text_scores
from graftlab.host import GraftError
from graftlab.scores import EvaluationError
from graftlab.surrogate import cut_checkpoint
from graftlab.vlm import build_vlm, save_vlm

ENV = os.environ | dict(HF_HUB_OFFLINE='1', HF_DATASETS_OFFLINE='1', OMP_NUM_THREADS='1', TOKENIZERS_PARALLELISM='false')
WORDS = [f'w{i}' for i in range(98)]
YAML = '''task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/{name}.jsonl
    train: {folder}/shots.jsonl
test_split: test
fewshot_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: gold
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata:
  version: 1.0
'''
GROUP = '''group: both
task: [one, two]
aggregate_metric_list:
  - {metric: acc, weight_by_size: true}
metadata:
  version: 2.0
'''


def write_task(folder, name, n, seed=0):
    "A multiple-choice task of n questions made of random words"
    rng = random.Random(seed)
    phrase = lambda k: ' '.join(rng.choices(WORDS, k=k))
    docs = [dict(question=phrase(rng.randint(1, 9)), choices=[phrase(rng.randint(1, 5)) for _ in range(3)], gold=rng.randrange(3)) for _ in range(n)]
    (folder/f'{name}.jsonl').write_text(''.join(json.dumps(d)+'\n' for d in docs))
    (folder/f'{name}.yaml').write_text(YAML.format(name=name, folder=folder))


@pytest.fixture(scope='module')
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp('tasks')
    for name,n,seed in (('one', 20, 1), ('two', 8, 2), ('shots', 6, 3)): write_task(folder, name, n, seed)
    (folder/'both.yaml').write_text(GROUP)
    return folder


def save_host(folder, **config):
    torch.manual_seed(0)
    tok = Tokenizer(models.WordLevel({w: i for i,w in enumerate(['<unk>', '<eos>', *WORDS])}, unk_token='<unk>'))
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tok, unk_token='<unk>', eos_token='<eos>').save_pretrained(folder)
    LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1, vocab_size=100,
                                 eos_token_id=1, bos_token_id=None, initializer_range=.3, **config)).save_pretrained(folder)
    return folder


@pytest.fixture(scope='module')
def host(tmp_path_factory): return save_host(tmp_path_factory.mktemp('host'))


@pytest.fixture(scope='module')
def surrogate(host, tmp_path_factory): return cut_checkpoint(host, tmp_path_factory.mktemp('cut')/'surrogate', 1, 2, progress=False)


def test_our_numbers_are_those_of_the_harness_command_line(surrogate, tasks, tmp_path, capsys):
    "A task and a group, two shots: every number of `graftlab evaluate --text` equals the harness's own. SmolLM2 and its surrogate: nbs/07c_harness.ipynb"
    done = subprocess.run([sys.executable, '-m', 'lm_eval', 'run', '--model', 'hf', '--model_args', f'pretrained={surrogate}', '--tasks', 'both', '--num_fewshot', '2',
                           '--include_path', str(tasks), '--output_path', str(tmp_path/'theirs'), '--log_samples'], env=ENV, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = json.loads(next((tmp_path/'theirs').rglob('results_*.json')).read_text())
    for task in ('both', 'one'):
        assert cli.main(['evaluate', str(surrogate), '--text', '--tasks', task, '--shots', '2', '--include', str(tasks), '--out', str(tmp_path/'ours.json')]) == 0
        mine = json.loads((tmp_path/'ours.json').read_text())['tasks'][task]
        assert mine['metrics'] == {k: v for k,v in theirs['results'][task].items() if ',' in k} and mine['shots'] == 2 and mine['version'] == theirs['versions'][task]
        assert capsys.readouterr().out.splitlines()[1].split()[:5] == [task, mine['measure'], '2', str(mine['n']), f"{100*mine['score']:.1f}"]
    samples = [json.loads(l) for l in next((tmp_path/'theirs').rglob('samples_one_*.jsonl')).read_text().splitlines()]
    assert mine['right'] == {f"one/{s['doc_id']}": s['acc_norm'] for s in samples} and len(samples) == mine['n'] == 20


def test_a_group_counts_every_question_once(host, tasks):
    both = text_scores(host, ['both'], include=tasks)['tasks']['both']
    alone = text_scores(host, {t: (None, 'acc') for t in ('one', 'two')}, include=tasks)['tasks']
    assert both['n'] == 28 and both['measure'] == 'acc' and both['right'] == alone['one']['right'] | alone['two']['right']
    assert both['score'] == pytest.approx(sum(both['right'].values())/28) and both['low'] < both['score'] < both['high']


def test_shots_of_a_preset_go_with_their_tasks(host, tasks):
    "Tasks with different shots in one call give what each gives alone; what names no shots gets the task's own, none"
    preset = {'one': (3, 'acc'), 'two': (0, 'acc_norm')}
    got = text_scores(host, preset, limit=8, include=tasks)['tasks']
    for name,spec in preset.items(): assert text_scores(host, {name: spec}, limit=8, include=tasks)['tasks'][name] == got[name]
    assert [(t['shots'], t['n'], t['measure']) for t in got.values()] == [(3, 8, 'acc'), (0, 8, 'acc_norm')]
    assert text_scores(host, 'one', limit=8, include=tasks)['tasks']['one']['shots'] == 0


def test_the_decoder_inside_a_vlm_folder_is_scored_as_it_is_alone(host, tasks, tmp_path):
    tower = CLIPVisionModel(CLIPVisionConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14))
    vlm,processor = build_vlm(str(host), tower, processor=BitImageProcessorPil(size=dict(height=28, width=28), do_center_crop=False))
    save_vlm(vlm, processor, tmp_path/'vlm', torch.float32)
    decoder_of(vlm).save_pretrained(tmp_path/'alone')
    processor.tokenizer.save_pretrained(tmp_path/'alone')
    inside,alone = (text_scores(tmp_path/n, 'one', include=tasks) for n in ('vlm', 'alone'))
    assert inside == alone


def test_what_changed_is_one_command(host, surrogate, tasks, tmp_path, capsys):
    assert cli.main(['evaluate', str(surrogate), '--text', '--before', str(host), '--tasks', 'one', 'two', '--include', str(tasks), '--out', str(tmp_path/'x.json')]) == 0
    head,*lines = capsys.readouterr().out.splitlines()
    result = json.loads((tmp_path/'x.json').read_text())
    assert head.split()[:4] == ['task', 'measure', 'shots', 'n'] and [l.split()[0] for l in lines] == ['one', 'two']
    assert result == language_change(host, surrogate, ['one', 'two'], include=tasks)
    for row in result['change']:
        a,b = (100*result[k]['tasks'][row['task']]['score'] for k in ('after', 'before'))
        low,high = map(float, row['95 %'].split(' to '))
        assert row['difference'] == round(a-b, 1) and low <= row['difference'] <= high


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=30))
def test_change_is_antisymmetric_and_needs_the_same_questions(pairs):
    def result(right, shots=0):
        right = {f't/{i}': float(r) for i,r in enumerate(right)}
        return dict(chat=False, tasks=dict(t=dict(measure='acc', score=sum(right.values())/len(right), n=len(right), shots=shots, version=1, right=right)))
    first,second = zip(*pairs)
    there,back = text_change(result(first), result(second))[0],text_change(result(second), result(first))[0]
    assert there['difference'] == -back['difference'] and there['before'] == back['after'] and there['n'] == len(pairs)
    for other in (result(second[1:]), result(second, 5), result(second) | {'chat': True}, dict(chat=False, tasks={})):
        with pytest.raises(EvaluationError, match='the same questions'): text_change(other, result(first))


def test_the_papers_tasks_are_known_to_the_harness_with_their_accuracies():
    "Table A.5, against the task files of the installed harness; nothing is fetched"
    assert PAPER_TASKS == dict(mmlu=(5, 'acc'), hellaswag=(10, 'acc_norm'), arc_easy=(0, 'acc_norm'), arc_challenge=(25, 'acc_norm'),
                               winogrande=(5, 'acc'), piqa=(0, 'acc_norm'), boolq=(0, 'acc'), openbookqa=(0, 'acc_norm'))
    manager = find_tasks(PAPER_TASKS)
    for name,(_,measure) in PAPER_TASKS.items():
        file = manager.task_index[name].yaml_path
        texts = [f.read_text().splitlines() for f in (file, file.with_name('arc_easy.yaml')) if f.exists()]
        assert any(f'  - metric: {measure}' in t for t in texts), name


def test_errors_say_what_to_do(host, tasks, tmp_path, capsys, monkeypatch):
    short = save_host(tmp_path/'short', max_position_embeddings=3)
    bad = tmp_path/'bad'
    bad.mkdir()
    for name in ('empty', 'gone'): write_task(bad, name, 0)
    write_task(bad, 'shots', 3)
    (bad/'gone.jsonl').unlink()
    for argv,words in {(host, '--tasks', 'onne', '--include', tasks): "no task 'onne'; similar names: ", (host, '--tasks', 'one', '--include', tmp_path/'no'): 'is no folder',
                       (host, '--tasks', 'one', '--include', tasks, '--chat'): 'no chat_template', (short, '--tasks', 'one', '--include', tasks): 'longer than the 3 tokens',
                       (host, '--tasks', 'empty', '--include', bad): "'empty'", (host, '--tasks', 'gone', '--include', bad): "cannot load task 'gone'",
                       (host, '--tasks', 'one', '--include', tasks, '--limit', 0): 'at least 1', (tmp_path/'nothing',): 'neither of the zoo'}.items():
        assert cli.main(['evaluate', str(argv[0]), '--text', *map(str, argv[1:])]) == 2, argv
        err = capsys.readouterr().err.splitlines()[-1]
        assert err.startswith('graftlab: ') and words in err, err
    with pytest.raises(EvaluationError, match='no accuracy of type f1; it gives acc,none'): text_scores(host, {'one': (0, 'f1')}, 2, include=tasks)
    with pytest.raises(EvaluationError, match='needs its tokenizer'): text_scores(LlamaForCausalLM.from_pretrained(host), 'one', 2, include=tasks)
    monkeypatch.setitem(sys.modules, 'lm_eval.tasks', None)
    with pytest.raises(GraftError, match=r"pip install 'graftlab\[eval\]'"): load_tasks(['one'], tasks)


def test_prompts_that_lose_their_beginning_are_counted(tasks, tmp_path, capsys):
    short = save_host(tmp_path/'short', max_position_embeddings=8)
    got = text_scores(short, 'one', include=tasks)['tasks']['one']
    docs = [json.loads(l) for l in (tasks/'one.jsonl').read_text().splitlines()]
    assert got['too_long'] == sum(len(d['question'].split())+max(len(c.split()) for c in d['choices']) > 9 for d in docs) > 0
    assert cli.main(['evaluate', str(short), '--text', '--tasks', 'one', '--include', str(tasks)]) == 0
    assert f"{got['too_long']} prompts were longer" in capsys.readouterr().out
