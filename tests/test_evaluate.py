"Properties of scores and of ranking over random questions, with a tiny vision-language model"
import csv
import importlib.util
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import (AutoModelForCausalLM, AutoTokenizer, BitImageProcessorPil, Dinov2Config, Gemma3TextConfig, LlamaConfig, LlavaConfig,
                          LlavaForConditionalGeneration, LlavaProcessor)

from graftlab import cli
from graftlab.asking import encode_question, pack_candidates
from graftlab.evaluate import EvaluationError, compare, evaluate, generate_answers, rank_candidates, without_pictures
from graftlab.chat import Chat
from graftlab.harness import decoder_of
from graftlab.host import GraftError, fingerprint
from graftlab.lmms import lmms_results
from graftlab.scores import (MME, WORD_PROMPT, average_score, binary_prompts, exact_match, mme_scores, normalize_answer, paired_difference, score_table, wilson, yes_no,
                             yes_no_scores)
from graftlab.vlm import graft, save_graft, save_vlm
from graftlab.zoo import get_llm
from plain import plain_answers

WORDS = st.sampled_from('red dark green teal blue a circle not at all the color is 12 .'.split())
PHRASES = st.lists(WORDS, min_size=1, max_size=5).map(' '.join)


@pytest.fixture(scope='module')
def tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(get_llm('smollm2'))
    tokenizer.add_special_tokens({'additional_special_tokens': ['<image>']})
    return tokenizer


SIZE = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, initializer_range=.3)


def make_vlm(tokenizer, text):
    torch.manual_seed(0)
    vision = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=tokenizer.convert_tokens_to_ids('<image>'),
                         vision_feature_layer=-2, vision_feature_select_strategy='default', tie_word_embeddings=True)
    return LlavaForConditionalGeneration(config).eval()


@pytest.fixture(scope='module')
def vlm(tokenizer): return make_vlm(tokenizer, LlamaConfig(**SIZE, vocab_size=len(tokenizer)))


@pytest.fixture(scope='module', params=['llama', 'gemma3'])
def any_vlm(request, tokenizer, vlm):
    if request.param=='llama': return vlm
    return make_vlm(tokenizer, Gemma3TextConfig(**SIZE, vocab_size=len(tokenizer), head_dim=8, query_pre_attn_scalar=8, sliding_window=6,
                                                layer_types=['sliding_attention', 'full_attention'])) # six tokens: fewer than any question has


@pytest.fixture(scope='module')
def processor(tokenizer):
    pictures = BitImageProcessorPil(size=dict(height=28, width=28), do_center_crop=False)
    return LlavaProcessor(pictures, tokenizer, patch_size=14, vision_feature_select_strategy='default', num_additional_image_tokens=1)


def ask(i, phrases, image=None):
    return dict(id=str(i), image=image, question='What is it?', answer=phrases[0], candidates=phrases, type='t')


candidates = st.lists(PHRASES, min_size=1, max_size=5, unique_by=normalize_answer)
slow = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@slow
@given(sets=st.lists(candidates, min_size=1, max_size=4), picture=st.lists(st.booleans(), min_size=4, max_size=4), size=st.integers(1, 4))
def test_packed_ranking_is_one_at_a_time(any_vlm, processor, sets, picture, size):
    "Any candidates, any mixture of pictures and none, any batch size: the log-likelihoods of each candidate alone"
    image = Image.new('RGB', (28, 28), 'red')
    questions = [ask(i, c, image if p else None) for i,(c,p) in enumerate(zip(sets, picture))]
    scores,choices = rank_candidates(any_vlm, processor, questions, size, system='')
    pixels = processor.image_processor(image, return_tensors='pt')['pixel_values']
    for q,s,choice in zip(questions, scores, choices):
        for c,value in zip(q['candidates'], s):
            ids,start = encode_question(Chat(processor.tokenizer, system=''), q, c, 4 if q['image'] else 0)
            with torch.no_grad(): logits = any_vlm(input_ids=torch.tensor([ids]), pixel_values=pixels if q['image'] else None).logits
            logp = logits[0,start-1:-1].log_softmax(-1).gather(1, torch.tensor(ids)[start:,None]).sum()
            assert abs(float(value-logp))<1e-4*max(1, abs(float(logp)))
        assert choice==q['candidates'][int(s.argmax())]


@slow
@given(n=st.integers(1, 5), size=st.integers(1, 5), new=st.integers(1, 4))
def test_generation_does_not_depend_on_the_batch(vlm, processor, n, size, new):
    "Left padding: rows of different lengths answer as they do alone"
    image = Image.new('RGB', (28, 28), 'teal')
    questions = [ask(i, ['yes'], image if i%2 else None) | {'question': 'What is it, please? '*(i+1)} for i in range(n)]
    together = generate_answers(vlm, processor, questions, new, size, system='')
    assert together==[generate_answers(vlm, processor, [q], new, 1, system='')[0] for q in questions]


def test_an_answer_is_cut_off_at_five_tokens(vlm, processor, monkeypatch):
    "A model that goes on writes as many tokens as it may, and that is no exact match of the answer it began with"
    questions,lengths,generate = [ask(i, ['red', 'dark green']) | {'question': f'What is number {i}?'} for i in range(4)],[],vlm.generate
    def counted(**kw): out = generate(**kw); lengths.append(out.shape[1]); return out
    monkeypatch.setattr(vlm, 'generate', counted)
    said = [generate_answers(vlm, processor, questions, n, system='', progress=False) for n in (1, 5, 12)]
    assert lengths==[1, 5, 12] and all(len(a)<len(b)<len(c) for a,b,c in zip(*said))
    began = [q | {'answer': a, 'candidates': [a, 'other']} for q,a in zip(questions, said[0])]
    assert not evaluate(vlm, processor, began, max_new_tokens=5, system='', progress=False)['scores']['t']['exact']['correct']


@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=5), min_size=1, max_size=5), st.lists(st.integers(0, 5), min_size=1, max_size=5))
def test_every_target_of_a_packed_row_is_where_it_says(tails, prompt):
    "Following a candidate's tokens through prefix and block gives the candidate back; each source precedes its target by one position"
    seqs = [prompt+t+[9] for t in tails]
    row = pack_candidates(seqs, len(prompt))
    for k,seq in enumerate(seqs):
        mine = (row['block']==0) | (row['block']==k+1)
        assert row['input_ids'][mine].tolist()==seq and row['position_ids'][mine].tolist()==list(range(len(seq)))
        of = row['owner']==k
        assert row['target'][of].tolist()==seq[len(prompt):]
        assert row['position_ids'][row['source'][of]].tolist()==list(range(len(prompt)-1, len(seq)-1))
        assert mine[row['source'][of]].all()
    assert len(row['block'])<=sum(map(len, seqs))


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.sampled_from([.8, .95, .99]))
def test_wilson_is_symmetric_and_holds_the_estimate(kn, confidence):
    k,n = kn
    low,high = wilson(k, n, confidence)
    assert 0<=low<=k/n<=high<=1 and (low, high)==pytest.approx([1-x for x in wilson(n-k, n, confidence)][::-1])
    wider = wilson(k, n, confidence+.005)
    assert wider[0]<=low and high<=wider[1] and wilson(2*k, 2*n, confidence)[1]-wilson(2*k, 2*n, confidence)[0]<high-low


@given(st.text(max_size=20))
def test_normal_form_is_stable_under_what_it_forgives(text):
    form = normalize_answer(text)
    assert normalize_answer(f'  {text}\n')==form
    assert exact_match([f' {text.strip()} '], [text]).all()
    assert form==' '.join(form.split())
    if not text.rstrip().endswith('.'): assert normalize_answer(text+'.')==form


REPLIES = st.sampled_from(['yes', 'no', 'Yes', 'No.', 'Yes, it is', 'n', 'y', 'know', '', 'maybe', ' NO ', 'not.. no', '.yes'])


@given(st.lists(st.tuples(REPLIES, st.sampled_from(['yes', 'no'])), min_size=1, max_size=30), st.booleans())
def test_yes_no_scores_count_what_they_say(pairs, lenient):
    said,true = zip(*pairs)
    s = yes_no_scores(said, true, lenient)
    read = [yes_no(t, lenient) for t in said]
    assert s['accuracy']==pytest.approx(np.mean([a==b for a,b in zip(read, true)]))
    positives = [b for a,b in zip(read, true) if a=='yes']
    assert s['precision']==pytest.approx(np.mean([b=='yes' for b in positives]) if positives else 0)
    assert s['yes_rate']+s['other_rate']<=1+1e-9 and 0<=s['f1']<=1
    assert min(s['precision'], s['recall'])-1e-9<=s['f1']<=max(s['precision'], s['recall'])+1e-9


@given(st.lists(st.tuples(REPLIES, REPLIES), min_size=1, max_size=10))
def test_mme_is_accuracy_plus_pairs(replies):
    records = [dict(category='count', image=i, prediction=p, answer=a) for i,pair in enumerate(replies) for p,a in zip(pair, ('Yes', 'No'))]
    right = np.array([[yes_no(p, True)=='yes', yes_no(q, True)=='no'] for p,q in replies])
    assert mme_scores(records)['total']==pytest.approx(100*right.mean()+100*right.all(1).mean())
    assert mme_scores(records[::-1])==pytest.approx(mme_scores(records))


def lmms(task):
    "lmms-eval's own functions of a task, read from its file: its package imports far more than they need"
    file = Path(importlib.util.find_spec('lmms_eval').submodule_search_locations[0])/'tasks'/task/'utils.py'
    spec = importlib.util.spec_from_file_location(f'lmms_{task}', file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


POPE_UTILS,MME_UTILS = lmms('pope'),lmms('mme')
LETTERS = st.text('yesno. YNOt,', max_size=6)
BURIED = st.tuples(LETTERS, st.sampled_from(['yes', 'no', 'Yes.', 'NO', 'y', 'n']), LETTERS).map(''.join) # a word anywhere in an answer, early or too late
SAID = REPLIES | LETTERS | BURIED | st.text(max_size=6)
WANTED = st.sampled_from(['yes', 'no', 'Yes', 'No', ' no'])


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(SAID, WANTED), min_size=1, max_size=30))
def test_pope_is_scored_as_lmms_eval_does(pairs):
    "Accuracy, precision, recall, F1 and the ratio of expected answers, on any answers"
    ours = yes_no_scores(*zip(*pairs))
    results = [POPE_UTILS.pope_process_results(dict(question_id=i, answer=a), [p])['pope_accuracy'] for i,(p,a) in enumerate(pairs)]
    for mine,theirs in (('accuracy', 'accuracy'), ('precision', 'precision'), ('recall', 'recall'), ('f1', 'f1_score'), ('yes_ratio', 'yes_ratio')):
        assert ours[mine]==pytest.approx(getattr(POPE_UTILS, f'pope_aggregate_{theirs}')(results), abs=1e-12), mine


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(sum(MME.values(), [])), SAID, SAID, WANTED, WANTED), min_size=1, max_size=20))
def test_mme_is_scored_as_lmms_eval_does(pictures):
    "Perception and cognition, on any answers to any mixture of categories"
    assert {k.lower(): v for k,v in MME_UTILS.eval_type_dict.items()}==MME
    records = [dict(category=c, image=i, prediction=p, answer=a) for i,(c,p,q,a,b) in enumerate(pictures) for p,a in ((p, a), (q, b))]
    theirs = dict(perception=[], cognition=[])
    for r in records:
        for key,value in MME_UTILS.mme_process_results(dict(question_id=r['image'], category=r['category'], answer=r['answer']), [r['prediction']]).items():
            theirs[key.removeprefix('mme_').removesuffix('_score')].append(value)
    ours = mme_scores(records)
    for key,results in theirs.items(): assert ours[key]==pytest.approx(MME_UTILS.mme_aggregate_results(results) if results else 0)
    assert ours['total']==pytest.approx(ours['perception']+ours['cognition'])


@given(st.text(max_size=20), st.booleans())
def test_prompts_are_those_of_lmms_eval(text, own):
    question = dict(question=text+' Please answer yes or no.'*own)
    kw = dict(pre_prompt='', post_prompt=WORD_PROMPT)
    ours = binary_prompts([question | {'candidates': []}], WORD_PROMPT)[0]
    assert ours['question']==MME_UTILS.mme_doc_to_text(question, kw) and ours['candidates']==['yes', 'no']
    if not own: assert ours['question']==POPE_UTILS.pope_doc_to_text(question, kw)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(st.characters(exclude_categories=['Cs'])) | st.sampled_from(['a\u2028b', '\x85', 'a\rb\n', '']), max_size=6))
def test_answers_in_the_results_of_lmms_eval_are_read_as_they_were_written(tmp_path, said):
    "Whatever a model says, line ends of all kinds among it; newest results first"
    for stamp,lines in (('20260101_000000', ['old']), ('20260102_000000', said)):
        (tmp_path/f'{stamp}_results.json').write_text(json.dumps(dict(results=dict(task=dict(alias='task', accuracy=.5)))))
        with open(tmp_path/f'{stamp}_samples_task.jsonl', 'w', encoding='utf-8', newline='\n') as f:
            for i,text in reversed(list(enumerate(lines))): f.write(json.dumps(dict(doc_id=i, filtered_resps=[text]), ensure_ascii=False)+'\n')
    assert lmms_results(tmp_path)==(dict(task=dict(accuracy=.5)), dict(task=list(enumerate(said))))


def test_mme_records_that_cannot_be_scored_are_named():
    record = dict(category='count', image='7', prediction='yes', answer='yes')
    for change,words in (({'answer': 'maybe'}, "count/7.*'maybe'"), ({'category': 'cats'}, "got \\['cats'\\]"), ({}, 'count/7 has 1')):
        with pytest.raises(EvaluationError, match=words): mme_scores([record | change])
    with pytest.raises(EvaluationError, match='got none'): mme_scores([])


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=60))
def test_paired_difference_is_antisymmetric(pairs):
    a,b = zip(*pairs)
    there,back = paired_difference(a, b, 2000),paired_difference(b, a, 2000)
    assert there['difference']==pytest.approx(-back['difference']) and there['low']<=there['difference']+1e-9<=there['high']+2e-9
    assert there['low']==pytest.approx(-back['high'], abs=.15)
    assert paired_difference(a, b, 2000)==there


@given(st.lists(st.floats(0, 1), min_size=19, max_size=19))
def test_average_score_is_linear_and_bounded(shares):
    top = [800, 2000]*2+[100]*15
    assert average_score([s*t for s,t in zip(shares, top)])==pytest.approx(np.mean(shares))


@given(st.lists(st.dictionaries(st.sampled_from('abc'), st.integers() | st.text('xy|, "\n', max_size=4), min_size=1), min_size=1, max_size=5))
def test_a_csv_table_reads_back(rows):
    columns = list(dict.fromkeys(c for r in rows for c in r))
    back = list(csv.DictReader(io.StringIO(score_table(rows, 'csv'), newline='')))
    assert back==[{c: str(r.get(c, '')) for c in columns} for r in rows]


def test_a_type_may_have_a_single_candidate_and_results_compare(vlm, processor):
    questions = [ask(i, ['red', 'dark green', 'blue']) for i in range(3)]+[ask(3, ['circle']) | {'type': 'one'}]
    result = evaluate(vlm, processor, questions, max_new_tokens=6)
    assert result['scores']['one']['rank']['accuracy']==1 and result['types']['one']['chance']==1
    assert json.loads(json.dumps(result))==result
    assert compare(result, result, 'exact')['all']==dict(difference=0., low=0., high=0., n=4)


def test_wrong_questions_and_models_are_named(vlm, processor, tokenizer, tmp_path):
    q = ask(0, ['red', 'blue'])
    bad = tmp_path/'bad.png'
    bad.write_bytes(b'not a picture')
    for image,words in ((bad, 'bad.png'), (tmp_path/'none.png', 'none.png')):
        with pytest.raises(GraftError, match=words): rank_candidates(vlm, processor, [q | {'image': image}])
    blind = AutoModelForCausalLM.from_config(vlm.config.text_config)
    with pytest.raises(EvaluationError, match='cannot see'): rank_candidates(blind, tokenizer, [q | {'image': Image.new('RGB', (28, 28))}])
    assert len(rank_candidates(blind, tokenizer, without_pictures([q]))[1])==1
    with pytest.raises(EvaluationError, match='max_new_tokens is 1'): evaluate(vlm, processor, [q], max_new_tokens=1)
    with pytest.raises(EvaluationError, match='no questions'): evaluate(vlm, processor, [])
    bare = AutoTokenizer.from_pretrained(get_llm('smollm2'))
    bare.chat_template = None
    with pytest.raises(GraftError, match='chat_template'): rank_candidates(blind, bare, [q])


def test_questions_from_the_command_line(vlm, processor, tmp_path, capsys):
    "The first questions of a file; no questions and answers that are too long for the limit are errors of one line"
    save_vlm(vlm, processor, tmp_path/'model', torch.float32)
    file = tmp_path/'questions.json'
    file.write_text(json.dumps([ask(i, ['red', 'dark green']) for i in range(3)]))
    assert cli.main(['evaluate', str(tmp_path/'model'), str(file), '--limit', '2', '--out', str(tmp_path/'scores.json')]) == 0
    assert json.loads((tmp_path/'scores.json').read_text()) == evaluate(vlm, processor, [ask(i, ['red', 'dark green']) for i in range(2)], progress=False)
    assert [l.split()[:2] for l in capsys.readouterr().out.splitlines()] == [['type', 'n'], ['t', '2'], ['all', '2']]
    for change,words in (('--max-new-tokens=1', 'max_new_tokens is 1'), ('--limit=-1', 'at least 1'), (None, 'no questions')):
        if change is None: file.write_text('[]')
        assert cli.main(['evaluate', str(tmp_path/'model'), str(file), *([change] if change else [])]) == 2
        assert words in capsys.readouterr().err


def test_a_saved_model_answers_the_same_in_plain_transformers(vlm, processor, tokenizer, tmp_path):
    "Encoder and adapter as a graft, plugged into the host's files, saved: a process that cannot import graftlab loads it and says what we say"
    host = AutoModelForCausalLM.from_config(vlm.config.text_config)
    host.load_state_dict(decoder_of(vlm).state_dict())
    host.save_pretrained(tmp_path/'host'); tokenizer.save_pretrained(tmp_path/'host')
    save_graft(vlm, tmp_path/'graft', processor, fingerprint(tmp_path/'host'), 'host', 2)
    model,its_processor = graft(tmp_path/'graft', tmp_path/'host')
    save_vlm(model, its_processor, tmp_path/'model', torch.float32)
    questions = []
    for i in range(6):
        Image.effect_noise((28, 28), 20*i+5).convert('RGB').save(tmp_path/f'{i}.png')
        questions.append(ask(i, ['yes'], str(tmp_path/f'{i}.png')) | {'question': f'Is it number {i}?'})
    ours = generate_answers(vlm, processor, questions, 6, system='', progress=False)
    assert plain_answers(tmp_path/'model', questions, tmp_path, 6)==ours and len(set(ours))>2


def test_scores_need_neither_a_model_nor_transformers():
    code = "import sys, graftlab.scores as s; s.exact_match(['a'], ['A']); print('transformers' in sys.modules)"
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert out.stdout.strip()=='False'
