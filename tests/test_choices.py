"Multiple choice from class labels: held-out names stay unknown, questions are fair, seeded, and what cannot be asked is refused"
import subprocess, sys
from collections import Counter
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image
from graftlab.choices import choice_questions, multiple_choice, split_choices, split_classes
from graftlab.data import load_conversations, multiple_choice as from_data
from graftlab.asking import check_questions
from graftlab.host import GraftError
from graftlab.images import BadRecord

ICON = Image.new('RGB', (4, 4))
def labels(k, each): return [(ICON, f'class {i}') for i in range(k)]*each
CASES = dict(k=st.integers(8, 40), seed=st.integers(0, 2**31), share=st.sampled_from([0, .1, .2, .4]), options=st.integers(2, 4))

@settings(max_examples=40, deadline=None)
@given(**CASES)
def test_held_out_names_are_unknown_and_known_ones_are_all_there(k, seed, share, options):
    both = split_choices(labels(k, 3), labels(k, 2), held_out=share, seed=seed, options=options)
    met,new = {o for r in both['train'] for o in r['options']},{r['label'] for r in both['new']}
    assert len(new)==round(share*k) and not met & new and met==met | {r['label'] for r in both['known']}
    assert {r['label'] for r in both['train']}=={r['label'] for r in both['known']} and len(both['train'])==3*(k-len(new))
    for kind,records in both.items():
        for r in records:
            letter = r['conversations'][1]['value']
            assert len(set(r['options']))==options and r['options'][ord(letter)-65]==r['label']
            others = set(r['options'])-{r['label']}
            assert len(others & new)==(min(options-1, len(new)-1) if kind=='new' else 0)
            assert all(f'\n{chr(65+i)}. {o}\n' in r['conversations'][0]['value'] for i,o in enumerate(r['options']))

@settings(max_examples=20, deadline=None)
@given(**CASES)
def test_a_question_depends_on_seed_and_example_alone(k, seed, share, options):
    kw,classes = dict(held_out=share, seed=seed, options=options),[f'class {i}' for i in range(k)]
    one = multiple_choice(labels(k, 2), classes, **kw)
    assert one==multiple_choice(labels(k, 2), reversed(classes), **kw)==from_data(labels(k, 2), **kw)
    longer = multiple_choice(labels(k, 4), classes, **kw)
    for few,many in zip(one, longer): assert few==[r for r in many if int(r['id'])<2*k]

def test_the_hash_seed_of_a_process_does_not_matter():
    code = "from graftlab.choices import multiple_choice as m; print([r['options'] for part in m([('x.png', f'class {i}') for i in range(30)]) for r in part])"
    said = {subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, timeout=300, env={'PYTHONHASHSEED': s, 'PYTHONPATH': ':'.join(sys.path)}).stdout
            for s in '12'}
    assert len(said)==1 and 'class 7' in said.pop()

def test_no_letter_and_no_held_out_name_is_favoured():
    both = split_choices(labels(20, 100), labels(20, 100))
    for records in both.values():
        right = Counter(r['conversations'][1]['value'] for r in records)
        n = len(records)
        assert all(abs(right[l]-n/4)<4*(n*3/16)**.5 for l in 'ABCD')                 # within four standard deviations
        offered = Counter(o for r in records for o in r['options'] if o!=r['label'])
        assert max(offered.values())<1.5*min(offered.values())

def test_questions_are_those_of_the_records():
    both = split_choices(labels(10, 2), labels(10, 1))
    for kind in ('known', 'new'):
        questions = choice_questions(load_conversations(both[kind]), kind)
        check_questions(questions)
        assert [q['id'] for q in questions]==[r['id'] for r in both[kind]] and {q['type'] for q in questions}=={kind}
        assert all(q['candidates']==list('ABCD') and q['label']==r['options'][ord(q['answer'])-65] for q,r in zip(questions, both[kind]))

REFUSED = {
    'too few for 4 options': lambda: multiple_choice(labels(3, 5)),
    '4 classes are left.*too few for 5': lambda: multiple_choice(labels(5, 5), options=5),
    "'class 9' has examples in train only": lambda: split_choices(labels(10, 1), labels(9, 1)),
    "'class 9' has examples in test only": lambda: split_choices(labels(9, 1), labels(10, 1)),
    "'class 10' is empty": lambda: split_choices(labels(10, 1), labels(10, 1), [f'class {i}' for i in range(11)]),
    "'class 9' is not among": lambda: split_choices(labels(10, 1), labels(10, 1), [f'class {i}' for i in range(9)]),
    'too few for 4': lambda: split_choices([], []),
    'without a name': lambda: multiple_choice(labels(9, 1)+[(ICON, ' ')]),
    'without a name: 3': lambda: multiple_choice(labels(9, 1)+[(ICON, 3)]),
    'case and white space': lambda: multiple_choice(labels(9, 1)+[(ICON, 'Class  1')]),
    r'\[0, 1\)': lambda: split_classes(['a', 'b'], held_out=1.),
    '2 to 26': lambda: multiple_choice(labels(9, 1), options=1)}

@pytest.mark.parametrize('told', REFUSED)
def test_what_cannot_be_asked_is_refused(told):
    with pytest.raises(BadRecord, match=told): REFUSED[told]()
    assert issubclass(BadRecord, GraftError)
