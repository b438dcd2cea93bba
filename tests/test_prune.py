"Properties of pruning: exact budgets, nesting, monotone quotas, determinism, bad input"
import pytest, torch
from hypothesis import given, settings, strategies as st
from graftlab.prune import (BadPruning, allocate, code_frequencies, critical_gamma, keep_count, keep_features, prune_prompt, quota,
    relative_rarity, select_tokens)

def pictures(seed, batch, grid, size):
    "Codes with a few common and many rare entries, residuals with ties, frequencies from a domain"
    gen = torch.Generator().manual_seed(seed)
    n = grid[0]*grid[1]
    ids = (torch.rand(batch, n, generator=gen)**3*size).long().clamp_max(size-1)
    rest = (torch.rand(batch, n, generator=gen)*20).round()/20
    return ids,rest,code_frequencies((torch.rand(500, generator=gen)**4*size).long().clamp_max(size-1), size)

CASES = dict(seed=st.integers(0, 2**31), grid=st.tuples(st.integers(1, 7), st.integers(1, 7)), size=st.integers(1, 30))

def test_exactly_m_tokens_for_every_m_on_a_thousand_pictures():
    ids,rest,freq = pictures(0, 1000, (6, 6), 24)
    before = torch.zeros(1000, 36, dtype=torch.bool)
    for m in range(1, 37):
        keep = select_tokens(ids, rest, (6, 6), freq, m)
        assert keep.shape==(1000, m) and (m==1 or (keep.diff(dim=1)>0).all())       # raster order, none twice
        kept = torch.zeros_like(before).scatter_(1, keep, True)
        assert (kept.sum(1)==m).all() and (kept | ~before).all()                     # what a smaller budget kept stays
        before = kept
    assert before.all()

@settings(max_examples=15, deadline=None)
@given(**CASES)
def test_every_budget_of_any_picture(seed, grid, size):
    ids,rest,freq = pictures(seed, 2, grid, size)
    distinct = [len(i.unique()) for i in ids]
    for m in range(1, ids.shape[1]+1):
        keep = select_tokens(ids, rest, grid, freq, m)
        assert torch.equal(keep, select_tokens(ids.clone(), rest.clone(), grid, freq.clone(), m))
        assert keep.shape==(2, m) and keep.min()>=0 and keep.max()<ids.shape[1]
        for i,k in enumerate(keep):
            codes = ids[i, k].unique()
            assert len(codes)==min(m, distinct[i])                                   # every code has a say as long as it can
            if m<distinct[i]:
                gone = [c for c in ids[i].unique().tolist() if c not in codes.tolist()]
                assert freq[gone].min()>=freq[codes].max()                           # the commonest went
            counts,quotas = ids[i].bincount(minlength=size),allocate(ids[i].bincount(minlength=size), freq, m)
            got = ids[i, k].bincount(minlength=size)
            assert (got<=quotas).all() and quotas.sum()>=m and (quotas<=counts).all()

@settings(max_examples=30, deadline=None)
@given(**CASES)
def test_a_batch_is_its_pictures_one_by_one(seed, grid, size):
    ids,rest,freq = pictures(seed, 3, grid, size)
    m = max(1, ids.shape[1]//2)
    alone = torch.cat([select_tokens(ids[i:i+1], rest[i:i+1], grid, freq, m) for i in range(3)])
    assert torch.equal(select_tokens(ids, rest, grid, freq, m), alone)

@settings(max_examples=30, deadline=None)
@given(counts=st.lists(st.integers(0, 40), min_size=1, max_size=20).filter(any), seed=st.integers(0, 2**31),
       gammas=st.lists(st.floats(0, 50), min_size=2, max_size=8))
def test_quota_is_monotone(counts, seed, gammas):
    counts = torch.tensor(counts)
    freq = torch.rand(len(counts), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 1e-3
    assert torch.equal(quota(counts, freq, 0.), counts)
    steps = torch.stack([quota(counts, freq, g) for g in sorted(gammas)])
    assert (steps.diff(dim=0)<=0).all() and ((steps>0)==(counts>0)).all() and (steps<=counts).all()
    share = steps.double()/counts.clamp_min(1)
    for row in share[:, counts>0]:                                                   # a commoner code keeps no larger share
        order = freq[counts>0].argsort()
        assert (row[order].diff() <= 1/counts[counts>0][order][1:]).all()

@settings(max_examples=20, deadline=None)
@given(counts=st.lists(st.integers(0, 8), min_size=1, max_size=12).filter(any), seed=st.integers(0, 2**31))
def test_allocation_is_the_smallest_total_that_reaches_the_budget(counts, seed):
    counts = torch.tensor(counts)
    freq = torch.rand(len(counts), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 1e-3
    code = torch.arange(len(counts)).repeat_interleave(counts)
    place = torch.cat([torch.arange(c) for c in counts.tolist()])
    drops = critical_gamma(counts[code], place, relative_rarity(counts, freq)[code])
    finite = drops[drops.isfinite()].unique()
    totals = sorted({int(quota(counts, freq, g).sum()) for g in [0., *(finite-1e-6).clamp_min(0).tolist(), *(finite+1e-6).tolist(), 1e5]})
    for m in range(1, int(counts.sum())+1):
        assert int(allocate(counts, freq, m).sum())==min(t for t in totals if t>=m)

@pytest.mark.parametrize('cues', [('residual',), ('isolation',)])
def test_cues_can_be_taken_one_by_one(cues):
    ids,rest,freq = pictures(3, 4, (5, 8), 3)
    one,both = (select_tokens(ids, rest, (5, 8), freq, 12, c) for c in (cues, ('residual', 'isolation')))
    assert one.shape==both.shape==(4, 12) and not torch.equal(one, both)

def test_dtype_of_features_does_not_matter():
    ids,rest,freq = pictures(4, 8, (6, 6), 9)
    assert torch.equal(select_tokens(ids, (rest*16).round(), (6, 6), freq, 20), select_tokens(ids, (rest*16).round().bfloat16(), (6, 6), freq.float().double(), 20))

def test_uniform_frequencies_and_single_codes():
    rest = torch.rand(1, 16, generator=torch.Generator().manual_seed(0))
    for ids in (torch.zeros(1, 16, dtype=torch.long), torch.arange(16)[None]):
        for m in range(1, 17): assert select_tokens(ids, rest, (4, 4), torch.full((16,), 1/16), m).shape==(1, m)

def test_bad_input_is_named():
    ids,rest,freq = pictures(5, 2, (4, 4), 6)
    for bad,told in [(dict(budget=0), 'budget of 0'), (dict(budget=17), 'budget of 17'), (dict(grid=(4, 5)), '4 x 5 patches'),
                     (dict(ids=ids[0]), r'\(B, N\)'), (dict(residual=rest[:, :9]), r'\(2, 9\)'), (dict(frequency=freq[:2]), 'frequencies of 2'),
                     (dict(residual=rest/0), 'NaN or infinity')]:
        with pytest.raises(BadPruning, match=told): select_tokens(**{**dict(ids=ids, residual=rest, grid=(4, 4), frequency=freq, budget=8), **bad})
    for ratio in (0, -.1, 1.01, float('nan')):
        with pytest.raises(BadPruning, match='keep ratio'): keep_count(ratio, 16)
    with pytest.raises(BadPruning, match='alpha'): code_frequencies(ids, 6, 0)
    with pytest.raises(BadPruning, match='codebook of 2'): code_frequencies(ids, 2)

@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), n=st.integers(1, 12), pad=st.integers(0, 3), after=st.integers(0, 4))
def test_prompt_and_features_agree(seed, n, pad, after):
    gen = torch.Generator().manual_seed(seed)
    m = int(torch.randint(1, n+1, (1,), generator=gen))
    keep = torch.stack([torch.randperm(n, generator=gen)[:m].sort().values for _ in range(2)])
    row = [0]*pad+[5]+[9]*n+list(range(10, 10+after))
    inputs = dict(input_ids=torch.tensor([row, row]), attention_mask=(torch.tensor([row, row])>0).long(), pixel_values=torch.zeros(2, 3, 4, 4))
    short,gaps = (prune_prompt(inputs, keep, 9, p) for p in ('contiguous', 'original'))
    assert short['input_ids'].shape==(2, len(row)-n+m) and (short['input_ids']==9).sum(1).tolist()==[m, m]
    assert torch.equal(short['input_ids'][short['input_ids']!=9], inputs['input_ids'][inputs['input_ids']!=9])
    assert torch.equal(gaps['position_ids'][gaps['input_ids']==9].view(2, m), keep+1) and short['pixel_values'].shape==(2, 3, 4, 4)
    want = (short['attention_mask'].cumsum(1)-1).clamp_min(0)
    assert torch.equal(short['position_ids'], want)
    z = torch.arange(2*n*3.).view(2, n, 3)
    assert torch.equal(keep_features(z, keep), torch.stack([z[i, keep[i]] for i in range(2)]))
