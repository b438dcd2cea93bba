"Properties of pruning: exact budgets, nesting, monotone quotas, determinism, bad input; a model that prunes for itself"
import functools
import pytest, torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from transformers import (AutoModelForImageTextToText, AutoProcessor, BitImageProcessorPil, CLIPVisionConfig, CLIPVisionModel, Dinov2Config, Dinov2Model,
                          LlamaConfig, LlamaForCausalLM, LlavaProcessor, SiglipVisionConfig, SiglipVisionModel)
from families import FAMILIES, make_tokenizer
from graftlab.host import GraftError, UnsupportedConfig
from graftlab.prune import (BadPruning, allocate, code_frequencies, critical_gamma, keep_count, keep_features, prune_prompt, quota,
    relative_rarity, select_tokens)
from graftlab.pruned_vlm import original_positions, placed_inputs, prune_tower, prune_vlm, tower_frequencies
from graftlab.tower import prune_inputs, quantize_tower
from graftlab.vlm import assemble, save_vlm

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

# A model that prunes for itself

SIZES = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, image_size=24, patch_size=6)
ENCODERS = dict(siglip=lambda: SiglipVisionModel(SiglipVisionConfig(**SIZES, intermediate_size=48)),
                clip=lambda: CLIPVisionModel(CLIPVisionConfig(**SIZES, intermediate_size=48)),
                dinov2=lambda: Dinov2Model(Dinov2Config(**SIZES, mlp_ratio=2)))

@functools.cache
def speaker(kind):
    "A small model with a quantised tower, its processor, the frequencies of eight pictures"
    torch.manual_seed(0)
    tokenizer,encoder = make_tokenizer(FAMILIES['smollm2']),ENCODERS[kind]().eval()
    pixels = torch.randn(8, 3, 24, 24)
    with torch.no_grad(): states = encoder(pixels, output_hidden_states=True).hidden_states[-2][:, -16:].flatten(0, 1)
    tower = quantize_tower(encoder, states[::5]+.1*torch.randn(26, 32)).eval()
    llama = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=len(tokenizer),
                        initializer_range=.3, pad_token_id=tokenizer.pad_token_id, eos_token_id=None)
    vlm = assemble(LlamaForCausalLM(llama).eval(), tower, tokenizer.convert_tokens_to_ids('<image>'))
    tokenizer.padding_side = 'left'
    images = BitImageProcessorPil(size=dict(height=24, width=24), do_center_crop=False)
    return vlm,LlavaProcessor(images, tokenizer, patch_size=6, vision_feature_select_strategy='full'),tower_frequencies(tower, pixels.split(3))

def noise(n): return [Image.effect_noise((24, 24), 100).convert('RGB') for _ in range(n)]
RATIOS = (.05, .3, .5, .8, .99, 1.)

@pytest.mark.parametrize('kind', ENCODERS)
def test_prompt_and_features_agree_at_every_ratio(kind):
    vlm,processor,freq = speaker(kind)
    before = processor.num_additional_image_tokens
    for ratio in RATIOS:
        model,short = prune_vlm(vlm, processor, freq, ratio)
        x = short(images=noise(1), text='<image> what?', return_tensors='pt')
        assert int((x['input_ids']==vlm.config.image_token_id).sum())==keep_count(ratio, 16)==model.model.vision_tower.tokens
        with torch.no_grad(): assert model(**x).logits.isfinite().all()
    assert processor.num_additional_image_tokens==before and vlm.config.image_seq_length==16

@pytest.mark.parametrize('kind', ENCODERS)
def test_ratio_one_is_the_model_without_pruning_to_the_last_bit(kind):
    vlm,processor,freq = speaker(kind)
    model,same = prune_vlm(vlm, processor, freq, 1.)
    pictures,texts = noise(3),['<image> what?', 'a <image> in words', '<image> which colour is it']
    x,y = (p(images=pictures, text=texts, padding=True, return_tensors='pt') for p in (processor, same))
    assert all(torch.equal(x[k], y[k]) for k in x)
    with torch.no_grad(): assert torch.equal(vlm(**x).logits, model(**y).logits)
    assert torch.equal(vlm.generate(**x, max_new_tokens=5, do_sample=False), model.generate(**y, max_new_tokens=5, do_sample=False))

@pytest.mark.parametrize('kind', ENCODERS)
@pytest.mark.parametrize('positions', ['contiguous', 'original'])
def test_pruning_inside_equals_dropping_from_a_full_prompt(kind, positions):
    vlm,processor,freq = speaker(kind)
    pictures,texts = noise(2),['<image> what?', 'a <image> in words, quite a few']
    full = dict(processor(images=pictures, text=texts, padding=True, return_tensors='pt'))
    for ratio in RATIOS:
        model,short = prune_vlm(vlm, processor, freq, ratio)
        x = short(images=pictures, text=texts, padding=True, return_tensors='pt')
        real = x['attention_mask'].bool()
        if positions=='original': x = placed_inputs(model, x)
        else: x['position_ids'] = (real.cumsum(1)-1).clamp_min(0)                    # padded in front: positions are given, as `generate` does
        with torch.no_grad(): ours,naive = model(**x).logits,vlm(**prune_inputs(vlm, full, freq, ratio, positions)).logits
        torch.testing.assert_close(ours[real], naive[real], atol=2e-5, rtol=1e-4)

@pytest.mark.parametrize('placed', [False, True])
def test_generation_with_and_without_cache_alone_and_in_a_batch(placed):
    vlm,processor,freq = speaker('siglip')
    model,short = prune_vlm(vlm, processor, freq, .4)
    pictures,texts = noise(3),['<image> what?', 'a <image> in words, quite a few', '<image>']
    def said(i, **kw):
        x = short(images=[pictures[k] for k in i], text=[texts[k] for k in i], padding=True, return_tensors='pt')
        n = 0 if placed else x['input_ids'].shape[1]
        return model.generate(**(placed_inputs(model, x) if placed else x), max_new_tokens=6, do_sample=False, **kw)[:, n:]
    together = said(range(3))
    assert together.shape==(3, 6) and torch.equal(together, said(range(3), use_cache=False))
    assert torch.equal(together, torch.cat([said([i]) for i in range(3)]))

def test_several_pictures_a_row():
    vlm,processor,freq = speaker('dinov2')
    model,short = prune_vlm(vlm, processor, freq, .5)
    x = short(images=noise(3), text=['<image> and <image> differ', 'only <image>'], padding=True, return_tensors='pt')
    with torch.no_grad(): assert model(**x).logits.isfinite().all() and model(**placed_inputs(model, x)).logits.isfinite().all()
    assert placed_inputs(model, x)['position_ids'].max()>=2*16

@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), n=st.integers(1, 9), rows=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), min_size=1, max_size=3))
def test_original_positions_are_those_of_the_full_prompt(seed, n, rows):
    gen = torch.Generator().manual_seed(seed)
    m = int(torch.randint(1, n+1, (1,), generator=gen))
    want,ids,keeps = [],[],[]
    for gaps in rows:                                                                # text of these lengths between pictures
        row,at,place = [],[],0
        for i,g in enumerate(gaps):
            row += [5]*g; at += range(place, place+g); place += g
            if i<len(gaps)-1:
                keep = torch.randperm(n, generator=gen)[:m].sort().values
                row += [9]*m; at += (keep+place).tolist(); place += n; keeps.append(keep)
        ids.append(row); want.append(at)
    width = max(map(len, ids))
    if not keeps or not width: return
    pad = lambda rows: torch.tensor([[0]*(width-len(r))+r for r in rows])
    inputs = dict(input_ids=pad(ids), attention_mask=pad([[1]*len(r) for r in ids]))
    got = original_positions(inputs, torch.stack(keeps), n, 9)
    assert torch.equal(got*inputs['attention_mask'], pad(want)*inputs['attention_mask'])

@pytest.mark.parametrize('kind', ENCODERS)
def test_a_folder_keeps_ratio_and_frequencies_in_any_dtype(kind, tmp_path):
    vlm,processor,freq = speaker(kind)
    model,short = prune_vlm(vlm, processor, freq, .3)
    for dtype in (torch.float32, torch.bfloat16):
        again = AutoModelForImageTextToText.from_pretrained(save_vlm(model, short, tmp_path/str(dtype), dtype), dtype=dtype)
        proc = AutoProcessor.from_pretrained(tmp_path/str(dtype), backend='pil')
        x = proc(images=noise(2), text=['<image> what?']*2, return_tensors='pt')
        assert torch.equal(again.model.vision_tower.frequency, freq) and again.model.vision_tower.tokens==5
        with torch.no_grad(): ours,theirs = model(**x).logits,again(**x).logits
        if dtype==torch.float32: torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
        assert theirs.dtype==dtype and theirs.isfinite().all()

def test_gradients_reach_the_encoder_through_kept_tokens():
    vlm,_,freq = speaker('siglip')
    tower = prune_tower(vlm.model.vision_tower, freq, .5)
    tower(torch.randn(2, 3, 24, 24)).last_hidden_state.square().sum().backward()
    got = [n for n,p in tower.named_parameters() if p.grad is not None and p.grad.abs().sum()>0]
    assert any('layers.0' in n for n in got) and not any('layers.2' in n for n in got)   # the last layer lies behind the quantised one
    tower.zero_grad()

def test_what_cannot_be_pruned_is_named():
    vlm,processor,freq = speaker('dinov2')
    tower = vlm.model.vision_tower
    for ratio in (0, -.5, 1.01, float('nan')):
        with pytest.raises(BadPruning, match='keep ratio'): prune_vlm(vlm, processor, freq, ratio)
    for bad,told in ((freq[:-1], 'codebook of 26'), (freq*0, 'above 0'), (freq/0, 'finite')):
        with pytest.raises(BadPruning, match=told): prune_vlm(vlm, processor, bad, .5)
    with pytest.raises(UnsupportedConfig, match='no codebook'): prune_tower(tower.backbone, freq)
    with pytest.raises(BadPruning, match='no picture'): tower_frequencies(tower, [])
    model,short = prune_vlm(vlm, processor, freq, .5)
    for h,w in ((12, 48), (24, 30), (48, 48)):                                       # as many patches as a square, more, another size
        with pytest.raises(BadPruning, match=f'{h} x {w} pixels'): model.model.vision_tower(torch.zeros(1, 3, h, w))
    x = short(images=noise(1), text='<image>', return_tensors='pt')
    with pytest.raises(ValueError, match='tokens'): vlm(**x)                         # the pruned processor with the other model
    model.model.vision_tower.backbone.embeddings.patch_embeddings.projection.bias.data[0] = float('nan')
    try:
        with pytest.raises(GraftError, match='NaN'): model(**x)
    finally: model.model.vision_tower.backbone.embeddings.patch_embeddings.projection.bias.data[0] = 0.
