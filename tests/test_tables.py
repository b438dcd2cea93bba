"The papers' figures as data, and our own tables, over random rows"
import random
import re
from types import MappingProxyType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftlab.scores import EvaluationError
from graftlab.tables import PRINTED, beside, difference_table, keep_tables, printed

NAMES = st.text('abcdefgh', min_size=1, max_size=6)
NUMBERS = st.one_of(st.none(), st.integers(0, 9999), st.integers(0, 99999).map(lambda i: i/100))


@given(st.lists(NAMES, min_size=1, max_size=5, unique=True), st.lists(st.tuples(NAMES, st.lists(NUMBERS, min_size=5, max_size=5)), min_size=1, max_size=5))
def test_the_notation_reads_back(columns, rows):
    cell = lambda v: '-' if v is None else str(v)
    text = '\n'.join(['Table 1: some figures', 'row label: '+' '.join(columns), *(f"{n}: {' '.join(map(cell, v[:len(columns)]))}" for n,v in rows)])
    try: t, = keep_tables('Nobody', text)
    finally: PRINTED.pop(('Nobody', '1'), None)
    assert [dict(r) for r in t.rows] == [{'row label': n} | dict(zip(columns, v)) for n,v in rows]
    for line in (text+' 7', text.replace(': ', ' ', 1)):
        with pytest.raises((EvaluationError, ValueError)): keep_tables('Nobody', line+'\nlast / label: 1')
        PRINTED.pop(('Nobody', '1'), None)


def test_printed_tables_are_whole_and_cannot_be_changed():
    for (paper,number),t in PRINTED.items():
        assert t is printed(paper, number) and t.source == f'{paper}, Table {number}' and len({tuple(r) for r in t.rows}) == 1
        assert all(isinstance(r, MappingProxyType) for r in t.rows)
        with pytest.raises(TypeError): t.rows[0]['n'] = 1
        with pytest.raises(AttributeError): t.rows = ()


def result(right, types='ab'):
    "What `evaluate` gives, for given right and wrong answers"
    said = ['yes' if r else 'no' for r in right]
    kinds = [types[i%len(types)] for i in range(len(right))]
    return dict(types={t: {} for t in dict.fromkeys(kinds)}, predictions=[dict(id=str(i), type=k, answer='yes', ranked=s, generated='no') for i,(k,s) in enumerate(zip(kinds, said))])


ANSWERS = st.integers(2, 12).flatmap(lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=2, max_size=4))


@given(ANSWERS)
def test_differences_are_of_the_same_questions_over_all_seeds(answers):
    first,*seeds = answers
    rows = difference_table({'one': result(first), 'many': [result(s) for s in seeds]}, 'one')
    alone = difference_table({'many': [result(s) for s in seeds], 'one': result(first)}, 'many')
    for t in ('a', 'b', 'all'):
        one,many = (next(r for r in rows if (r['type'], r['model'])==(t, m)) for m in ('one', 'many'))
        idx = [i for i in range(len(first)) if t=='all' or 'ab'[i%2]==t]
        share = lambda a: sum(a[i] for i in idx)/len(idx)
        assert one['n']==many['n']==len(idx) and (one['seeds'], many['seeds'])==(1, len(seeds)) and 'difference' not in one
        assert many['difference']==pytest.approx(100*(sum(map(share, seeds))/len(seeds)-share(first)), abs=.051)
        low,high = map(float, many['difference 95 %'].split(' to '))
        assert low-.11<=many['difference']<=high+.11
        back = next(r for r in alone if (r['type'], r['model'])==(t, 'one'))
        assert back['difference']==pytest.approx(-many['difference'], abs=.11)
        assert many['seed range']==f'{100*min(map(share, seeds)):.1f} to {100*max(map(share, seeds)):.1f}'
    assert all(r['score']==0 for r in difference_table({'one': result(first)}, 'one', 'exact'))


@given(st.sampled_from(sorted(PRINTED)), st.sampled_from(['markdown', 'html']), st.integers(1, 99))
def test_two_tables_stay_two(key, form, n):
    "No line of a page holds cells of both tables, and captions stand before their own"
    page = beside(printed(*key), [dict(model='OURS', n=n)], 'python x.py --seed 0', form)
    first,second = re.split(r'Measured here', page)
    assert 'OURS' in second and 'OURS' not in first and printed(*key).source in first and printed(*key).source not in second
    cells = [str(v) for v in printed(*key).rows[0].values() if isinstance(v, float)]
    assert all(c in first for c in cells)
    with pytest.raises(EvaluationError, match='is among'): beside(printed(*key), [dict(model='OURS', n=n), random.choice(printed(*key).rows)], 'x', form)
