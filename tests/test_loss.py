"""The chunked loss is the naive one; weights are convex; statistics of a step do not depend on how it is spread over processes."""
import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn

from graftlab.loss import response_weights, step_factors, token_factors, token_loss

lengths = st.lists(st.integers(1, 3000), min_size=1, max_size=40).map(torch.tensor)


@settings(max_examples=50, deadline=None)
@given(L=lengths, ord=st.floats(0, 2), loss=st.floats(0, 20))
def test_paper_weights_are_a_convex_combination(L, ord, loss):
    w = response_weights(L, ord)
    assert (w > 0).all() and torch.isclose(w.sum(), L.sum().float(), rtol=1e-4)
    assert torch.isclose((w*loss).sum()/L.sum(), torch.tensor(loss, dtype=torch.float32), rtol=1e-4, atol=1e-6)
    short_first = L.argsort()
    assert (w[short_first].diff() <= 1e-4*w.max()).all()


@settings(max_examples=50, deadline=None)
@given(L=lengths)
def test_weights_do_not_depend_on_order(L):
    p = torch.randperm(len(L), generator=torch.Generator().manual_seed(0))
    for mode in 'paper', 'official': torch.testing.assert_close(response_weights(L, mode=mode)[p], response_weights(L[p], mode=mode), rtol=1e-4, atol=1e-5)
    assert response_weights(L, mode='official').max() <= 1


@settings(max_examples=50, deadline=None)
@given(L=st.lists(st.integers(2, 3000), min_size=1, max_size=40).map(torch.tensor))
def test_literal_weights_are_the_printed_formula(L):
    w = [(max(L.tolist())/torch.tensor(float(x)).log().item())**.5 for x in L.tolist()]
    expected = torch.tensor([x/(sum(w)/sum(L.tolist())) for x in w])
    torch.testing.assert_close(response_weights(L, mode='literal'), expected, rtol=1e-4, atol=1e-4)


class Capped(nn.Module):
    "A head with norm, scale and soft cap, as some families have it"
    def __init__(self, d, v):
        super().__init__()
        self.norm, self.head = nn.RMSNorm(d), nn.Linear(d, v)
    def forward(self, x): return 5*torch.tanh(self.head(self.norm(x))*2/5)


@settings(max_examples=40, deadline=None)
@given(b=st.integers(1, 3), n=st.integers(2, 12), v=st.integers(2, 60), share=st.floats(0, 1), budget=st.integers(1, 500), seed=st.integers(0, 99),
       weighted=st.booleans(), plain=st.booleans(), bf16=st.booleans())
def test_loss_and_gradients_are_the_naive_ones(b, n, v, share, budget, seed, weighted, plain, bf16):
    g = torch.manual_seed(seed)
    head = (nn.Linear(8, v) if plain else Capped(8, v)).to(torch.bfloat16 if bf16 else torch.float32)
    hidden = torch.randn(b, n, 8, generator=g).to(head.weight.dtype if plain else head.head.weight.dtype)
    labels = torch.randint(v, (b, n), generator=g).masked_fill(torch.rand(b, n, generator=g) > share, -100)
    labels[:, 0] = -100
    at = labels.flatten().ge(0).nonzero()[:, 0]
    weights = torch.rand(len(at), generator=g) if weighted else None

    def run(loss):
        h = hidden.clone().requires_grad_()
        head.zero_grad()
        out = loss(h)
        out.backward()
        return [out.detach(), h.grad, *(p.grad for p in head.parameters())]

    def naive(h):
        nll = F.cross_entropy(head(h).float()[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction='none')[labels[:, 1:].flatten() >= 0]
        return (nll if weights is None else nll*weights).sum()
    tol = dict(rtol=5e-2, atol=5e-2) if bf16 else dict(rtol=1e-4, atol=1e-5)
    for a, e in zip(run(lambda h: token_loss(h, head, at-1, labels.flatten()[at], weights=weights, logits=budget)), run(naive)):
        torch.testing.assert_close(a, e, **tol)


def test_chunks_hold_no_more_logits_than_asked():
    sizes = []
    def head(x):
        out = x @ torch.ones(4, 100)
        sizes.append(out.numel())
        return out
    hidden = torch.randn(1, 50, 4, requires_grad=True)
    token_loss(hidden, head, torch.arange(50), torch.zeros(50, dtype=torch.long), logits=700).backward()
    assert max(sizes) == 700 and sum(sizes) >= 2*50*100 # forward, and again in the backward pass


@settings(max_examples=30, deadline=None)
@given(parts=st.lists(lengths, min_size=1, max_size=4), mode=st.sampled_from([None, 'paper', 'official']))
def test_a_step_in_pieces_has_the_factors_of_one(parts, mode):
    factors, n = step_factors(parts, mode=mode)
    assert n == int(torch.cat(parts).sum()) and [len(f) for f in factors] == [len(p) for p in parts]
    torch.testing.assert_close(torch.cat(factors), token_factors(torch.cat(parts), mode=mode))


STEP = '''
import torch
from graftlab.loss import step_factors, token_loss

def step(rank, world):
    "Gradients of one optimiser step of four micro-batches, this rank's share of them"
    torch.manual_seed(0)
    head, lengths = torch.nn.Linear(8, 30), [[3, 50], [1, 7], [20, 2], [400, 1]]
    hidden = [torch.randn(1, sum(l), 8) for l in lengths]
    target = [torch.randint(30, (sum(l),)) for l in lengths]
    mine, out = range(rank, 4, world), {}
    for mode in None, 'paper', 'official':
        head.zero_grad()
        factors, n = step_factors([torch.tensor(lengths[i]) for i in mine], mode=mode)
        for i, f in zip(mine, factors):
            response = torch.arange(2).repeat_interleave(torch.tensor(lengths[i]))
            (token_loss(hidden[i], head, torch.arange(len(response)), target[i], response, f)/n).backward()
        out[str(mode)] = head.weight.grad.clone()
    return out
'''
RANK = STEP + '''
import json, sys
import torch.distributed as dist
dist.init_process_group('gloo', init_method='file://'+sys.argv[1], rank=int(sys.argv[2]), world_size=2)
out = step(dist.get_rank(), 2)
for g in out.values(): dist.all_reduce(g)
if dist.get_rank() == 0: json.dump({k: g.tolist() for k, g in out.items()}, open(sys.argv[1]+'.json', 'w'))
dist.barrier()
dist.destroy_process_group()
'''


def test_gradients_do_not_depend_on_the_number_of_processes(tmp_path):
    (tmp_path/'rank.py').write_text(RANK)
    meet = str(tmp_path/'meet')
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': os.pathsep.join(p for p in sys.path if p)}
    ranks = [subprocess.Popen([sys.executable, str(tmp_path/'rank.py'), meet, str(r)], env=env) for r in (0, 1)]
    space = {}
    exec(STEP, space)
    one = space['step'](0, 1)
    assert [r.wait(timeout=300) for r in ranks] == [0, 0]
    with open(meet+'.json') as f: two = json.load(f)
    for mode in one: torch.testing.assert_close(torch.tensor(two[mode]), one[mode], rtol=1e-5, atol=1e-7)
    assert not torch.allclose(one['None'], one['paper']) and not torch.allclose(one['paper'], one['official'])


def test_bad_input_is_refused():
    for bad, why in [(torch.tensor([0, 3]), 'without a supervised token')]:
        with pytest.raises(ValueError, match=why): response_weights(bad)
    with pytest.raises(ValueError, match='one token'): response_weights(torch.tensor([1, 3]), mode='literal')
    with pytest.raises(ValueError, match='mode must be'): response_weights(torch.tensor([1, 3]), mode='printed')
