"Properties of the quantiser: codes against float64, both modes, a peer, frozen tables, bad input"
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from graftlab.host import GraftError
from graftlab.nearest import exact_search
from graftlab.quantize import BadFeatures, CodebookMismatch, ResidualQuantizer, check_codebook, make_codebook

SHAPES = dict(n=st.integers(1, 60), k=st.integers(1, 200), d=st.integers(1, 40), seed=st.integers(0, 2**31))

def drawn(n, k, d, seed, levels=None):
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=gen),torch.randn(*([levels] if levels else []), k, d, generator=gen)

def distances(r, table): return (r.double()[:, None]-table.double()).square().sum(-1)

def assert_nearest(z, rq, ids):
    "Each code is the float64 winner of its level wherever the two nearest differ by more than 1e-5 relative"
    r = z.float()
    for l in range(rq.depth):
        d = distances(r, rq.table(l)); two = d.topk(min(2, d.shape[1]), largest=False).values
        clear = (two[:, -1]-two[:, 0] > 1e-5*two[:, -1]) | (d.shape[1]==1)
        assert torch.equal(ids[clear, l], d.argmin(1)[clear])
        r = r - rq.table(l)[ids[:, l]]

@settings(max_examples=60, deadline=None)
@given(**SHAPES, depth=st.integers(1, 4))
def test_codes_are_those_of_float64(n, k, d, seed, depth):
    z,table = drawn(n, k, d, seed)
    for fast in (False, True):
        rq = ResidualQuantizer(table, depth, fast)
        assert_nearest(z, rq, rq.encode(z))

@settings(max_examples=30, deadline=None)
@given(**SHAPES, depth=st.integers(1, 3))
def test_per_level_tables(n, k, d, seed, depth):
    z,tables = drawn(n, k, d, seed, depth)
    rq = ResidualQuantizer(tables, depth)
    assert_nearest(z, rq, rq.encode(z))

@settings(max_examples=40, deadline=None)
@given(**SHAPES, shift=st.sampled_from([0., 1., 1e2, 1e4]), scale=st.sampled_from([1e-4, 1., 1e3]), spread=st.floats(0, 6))
def test_modes_agree_on_awkward_tables(n, k, d, seed, shift, scale, spread):
    z,table = drawn(n, k, d, seed)
    table = table*torch.exp(torch.linspace(-spread, 0, k))[:, None]      # entries of very different length
    z,table = (z+shift)*scale,(torch.cat([table, table[:k//2]])+shift)*scale # and some twice
    lean,fast = (ResidualQuantizer(table, 3, f).encode(z) for f in (False, True))
    assert torch.equal(lean, fast)
    assert torch.equal(lean[:, 0], distances(z, table).argmin(1)) or torch.equal(lean[:, 0], exact_search(z, table, 2**20))

@pytest.mark.parametrize('name', ['equal entries', 'zero table', 'zero features', 'one entry'])
@pytest.mark.parametrize('fast', [False, True])
def test_ties_go_to_the_lowest_index(name, fast):
    z,table = drawn(9, 130, 8, 0)
    if name=='equal entries': table = table[:1].repeat(130, 1)
    if name=='zero table': table = torch.zeros_like(table)
    if name=='zero features': z,table = torch.zeros_like(z),nn.functional.one_hot(torch.arange(130) % 8, 8).float()
    if name=='one entry': table = table[:1]
    ids = ResidualQuantizer(table, 2, fast).encode(z)
    assert (ids[:, 0]==0).all() and ids.max()<len(table)

@pytest.mark.parametrize('budget', [1, 3000, 10**6])
def test_chunks_do_not_matter(budget):
    z,table = drawn(70, 90, 16, 1)
    for fast in (False, True):
        rq = ResidualQuantizer(table, fast=fast); want = rq.encode(z)
        rq.budget = budget
        assert torch.equal(rq.encode(z), want)

def test_scores_stay_within_the_budget():
    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        most = 0
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor): self.most = max(self.most, out.numel()*out.element_size())
            return out
    z,table = drawn(3000, 1024, 16, 2)                    # all scores at once: 12 MB
    for fast in (False, True):
        rq = ResidualQuantizer(table, fast=fast, budget=1); rq._knowledge()
        with Largest() as seen: rq.encode(z)
        assert seen.most <= 2**20

def test_equal_to_vector_quantize_pytorch():
    "The frozen ResidualVQ of the usual library, in eval mode on the same table"
    from vector_quantize_pytorch import ResidualVQ
    z,table = drawn(500, 256, 64, 3)
    peer = ResidualVQ(dim=64, num_quantizers=4, codebook_size=256, shared_codebook=True).eval()
    for layer in peer.layers: layer._codebook.embed.data.copy_(table[None])
    with torch.no_grad(): theirs,codes,_ = peer(z[None])
    mine,ids = ResidualQuantizer(table)(z)
    assert torch.equal(ids, codes[0])
    torch.testing.assert_close(mine, theirs[0])

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_training_leaves_the_table_bit_for_bit(dtype):
    torch.manual_seed(0)
    z,table = drawn(64, 40, 16, 4)
    rq = ResidualQuantizer(table)
    model = nn.Sequential(nn.Linear(16, 16), rq, nn.Linear(16, 1)).to(dtype).train()
    before,moved = rq.codebook.clone(),model[0].weight.detach().clone()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(10):
        hidden = model[0](z.to(dtype)); loss = model[2](model[1](hidden)[0]).float().square().mean()
        opt.zero_grad(); loss.backward(); opt.step()
    assert rq.codebook.dtype==torch.float32 and torch.equal(rq.codebook, before) and torch.equal(before, table)
    assert not torch.equal(model[0].weight, moved)

def test_table_survives_saving_and_moving_through_meta(tmp_path):
    from safetensors.torch import load_file, save_file
    z,table = drawn(20, 30, 8, 5)
    save_file(ResidualQuantizer(table).state_dict(), tmp_path/'q.safetensors')
    with torch.device('meta'): empty = ResidualQuantizer(torch.empty(30, 8))
    rq = empty.to_empty(device='cpu'); rq.load_state_dict(load_file(tmp_path/'q.safetensors'))
    assert torch.equal(rq.encode(z), ResidualQuantizer(table).encode(z))

def test_loading_another_table_is_noticed_by_fast_mode():
    z,table = drawn(20, 30, 8, 6)
    rq = ResidualQuantizer(table, fast=True); rq.encode(z)
    rq.load_state_dict(dict(codebook=table.flip(0)))
    assert torch.equal(rq.encode(z), ResidualQuantizer(table.flip(0)).encode(z))

@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_bad_numbers_are_named(bad):
    z,table = drawn(50, 30, 8, 7); z[31, 2] = bad
    with pytest.raises(BadFeatures, match='feature 31 of 50'): ResidualQuantizer(table).encode(z)

def test_mismatch_names_both():
    _,table = drawn(1, 30, 8, 8)
    a,b = ResidualQuantizer(table),ResidualQuantizer(table[:20])
    with pytest.raises(CodebookMismatch, match='30 entries x 8.*20 entries x 8'): check_codebook(a.identity(), b.identity())
    with pytest.raises(CodebookMismatch, match='depth 4.*depth 2'): check_codebook(a.identity(), ResidualQuantizer(table, 2).identity())
    with pytest.raises(CodebookMismatch): check_codebook(a.identity(), ResidualQuantizer(table.flip(0)).identity())
    with pytest.raises(CodebookMismatch, match='width 9.*width 8'): a.encode(torch.zeros(2, 9))
    check_codebook(a.identity(), ResidualQuantizer(table, fast=True, budget=1).identity())

@settings(max_examples=30, deadline=None)
@given(fraction=st.floats(0.01, 1), k=st.integers(1, 300))
def test_downsampling_is_even(fraction, k):
    small,index = ResidualQuantizer(torch.arange(k*2.).view(k, 2)).downsample(fraction)
    assert small.size==len(index)==max(1, round(k*fraction)) and index[0]==0 and index[-1]<k
    assert len(index)==1 or index.diff().max()-index.diff().min()<=1
    assert torch.equal(small.codebook, torch.arange(k*2.).view(k, 2)[index])

def test_codebook_from_features():
    z,_ = drawn(400, 1, 12, 9)
    kept = torch.randint(400, (100,), generator=torch.Generator().manual_seed(0))
    for shared in (True, False):
        book = make_codebook(z, 32, depth=4, shared=shared)
        assert book.shape==((32, 12) if shared else (4, 32, 12)) and book.isfinite().all()
        rq = ResidualQuantizer(book)
        assert (z[kept]-rq(z[kept])[0]).square().mean() < 0.6*z[kept].var()
    with pytest.raises(GraftError, match='multiple of the depth'): make_codebook(z, 30)
