"""Label masks of seven families against an independent reading; packing is exact; bad pictures and bad JSON are named, none lost."""
import json
import random
import re
from itertools import groupby

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from torch.utils.data import DataLoader
from transformers import CLIPImageProcessorPil

from families import FAMILIES, byte_spans, make_tokenizer, spans
from graftlab.chat import Chat, Kind, block_mask, pack, shared_prefix, supervised, truncate
from graftlab.data import Collator, load_conversations, mix, multiple_choice
from graftlab.images import BadImage, BadRecord, open_image, open_images
from graftlab.prompts import chat_batches
from graftlab.records import Conversations, check_record

TOKENIZERS = {name: make_tokenizer(f) for name, f in FAMILIES.items()}
CHATS = {}
words = st.text(alphabet=st.sampled_from("abcdefghij 0123.,?é漢\n"), min_size=1, max_size=30).filter(lambda s: s.strip())
loud = st.text(alphabet=st.sampled_from("ABCDEFGHIJ !'Ü語\n"), min_size=1, max_size=30).filter(lambda s: s.strip())
talks = st.lists(st.tuples(words, loud), min_size=1, max_size=4)


def chat(name, system=None, image_tokens=3):
    key = name, system, image_tokens
    if key not in CHATS: CHATS[key] = Chat(TOKENIZERS[name], system, image_tokens=image_tokens)
    return CHATS[key]


def render(name, turns):
    messages = [dict(role=r, content=c.strip()) for q, a in turns for r, c in [('user', q), ('assistant', a)]]
    return TOKENIZERS[name].apply_chat_template(messages, tokenize=False)


@pytest.mark.parametrize('name', FAMILIES)
@settings(max_examples=25, deadline=None)
@given(turns=talks, picture=st.booleans())
def test_masks_are_those_of_an_independent_reading(name, turns, picture):
    family, tok = FAMILIES[name], TOKENIZERS[name]
    if picture: turns = [('<image>\n' + turns[0][0].strip(), turns[0][1]), *turns[1:]]
    text = render(name, turns)
    tokens = chat(name, image_tokens=1).encode(turns)
    whole = tok(text, add_special_tokens=False).input_ids
    assert tokens.ids.tolist() == whole[:len(tokens)] # exactly the template's tokens, up to the last turn's end
    for special in False, True:
        mask = supervised(tokens, special)
        theirs = [s for s in spans(family, text, special) if s[0] > 0] # nothing predicts the very first token
        expected = ''.join(text[a:b] for a, b in theirs)
        assert tok.decode(tokens.ids[mask]).replace(' ', '') == expected.replace(' ', '')
        if family.kind == 'bytes':
            chars = np.cumsum([0] + [len(c.encode()) for c in text])
            ours = [s for s, m in zip(byte_spans(tok, tokens.ids.tolist()), mask) if m]
            assert {n for a, b in ours for n in range(a, b)} == {n for a, b in theirs for n in range(chars[a], chars[b])}


@pytest.mark.parametrize('name', FAMILIES)
@settings(max_examples=25, deadline=None)
@given(turns=talks)
def test_labels_of_a_trajectory_hold_the_answers_and_nothing_of_the_next_question(name, turns):
    "Also where a template writes its last answer otherwise than those before"
    family, tok = FAMILIES[name], TOKENIZERS[name]
    (batch,) = chat_batches(tok, [[dict(role=r, content=c.strip()) for q, a in turns for r, c in [('user', q), ('assistant', a)]]])
    runs = [[t for _, t in run] for labelled, run in groupby(zip((batch['labels'][0] != -100).tolist(), batch['input_ids'][0].tolist()), key=lambda x: x[0]) if labelled]
    bare = lambda text: re.sub(r'\s|<think>|</think>', '', text)
    answers, ours = [bare(m['a']) for m in re.finditer(family.turn, render(name, turns), flags=re.S)], [bare(tok.decode(run)) for run in runs]
    if ours[-1] == answers[-1]+tok.eos_token: ours[-1] = answers[-1]          # a text's end behind the last answer
    assert ours == answers


@pytest.mark.parametrize('name', FAMILIES)
@pytest.mark.parametrize('system', [None, ''])
@settings(max_examples=10, deadline=None)
@given(turns=talks)
def test_prompt_is_what_training_put_before_the_answer(name, system, turns):
    c = chat(name, system)
    tokens = c.encode(turns)
    start = int(((tokens.kind == Kind.RESPONSE) & (tokens.turn == len(turns)-1)).nonzero()[0])
    ids = c.prompt(turns[-1][0], history=turns[:-1])
    assert ids.tolist() == tokens.ids[:start].tolist()


BARE = {'llama3': '<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi', 'gemma': '<bos><start_of_turn>user\nhi', 'mistral': '<s>[INST] hi', 'phi3': '<|user|>\nhi'}


@pytest.mark.parametrize('name', FAMILIES)
def test_no_system_prompt(name):
    text = ''.join(t for t, _, _ in chat(name, '').regions([('hi', 'HO')]))
    assert text.startswith(BARE.get(name, '<|im_start|>user\nhi'))
    ids = chat(name, '').encode([('hi', 'HO')]).ids
    assert ids.tolist() == TOKENIZERS[name](text, add_special_tokens=False).input_ids


@settings(max_examples=30, deadline=None)
@given(turns=talks, limit=st.integers(1, 120), name=st.sampled_from(sorted(FAMILIES)))
def test_truncation_leaves_whole_pictures_and_something_to_learn(turns, limit, name):
    turns = [('<image>\n' + turns[0][0], turns[0][1]), *turns[1:]]
    tokens = chat(name).encode(turns)
    if not (tokens.kind[:limit] == Kind.RESPONSE).any(): # the picture stands before the first answer: where that begins, there is something to keep
        with pytest.raises(BadRecord, match='no response begins'): truncate(tokens, limit)
        return
    cut = truncate(tokens, limit)
    assert len(cut) <= limit and (cut.ids == tokens.ids[:len(cut)]).all()
    assert (cut.kind == Kind.IMAGE).sum() == 3
    for t in range(int(cut.turn.max())+1): assert ((cut.turn == t) & (cut.kind == Kind.RESPONSE)).any()


def collator(name, **kw):
    tok = TOKENIZERS[name]
    return Collator(tok, None, tok.convert_tokens_to_ids('<image>'), 3, **{'stage': 2, 'system': '', **kw})


def record(turns, i='r'):
    return dict(id=i, conversations=[{'from': r, 'value': v} for q, a in turns for r, v in [('human', q), ('gpt', a)]])


@settings(max_examples=40, deadline=None)
@given(talk=talks, same=st.booleans(), name=st.sampled_from(sorted(FAMILIES)), stage=st.integers(0, 3), limit=st.sampled_from([90, 150, 2048]))
def test_packed_pairs_are_those_of_separate_conversations(talk, same, name, stage, limit):
    if same: talk = [(talk[0][0], a) for _, a in talk] # one question, several answers: blocks begin with a supervised token
    c = collator(name, stage=stage, independent_turns=True, max_length=limit)
    rows, cut = c.rows(record(talk))
    apart = [collator(name, stage=stage, max_length=limit).rows(record([t]))[0][0] for t in talk]
    def pairs(rows): return [(int(p), int(i), int(t)) for r in rows for p, i, t in
                             zip(r['position_ids'][r['source']], r['input_ids'][r['source']], r['target'])]
    assert pairs(rows) == pairs(apart) # same predictor, at the same position, of the same token
    assert all(len(r['block']) <= limit for r in rows)
    for r in rows: # a source sees exactly the tokens before the target in its own conversation
        mask = block_mask(r['block'][None])[0, 0]
        for s in r['source'].tolist(): assert mask[s].sum() == r['position_ids'][s]+1


@settings(max_examples=20, deadline=None)
@given(batch=st.lists(talks, min_size=1, max_size=4), packed=st.booleans(), name=st.sampled_from(sorted(FAMILIES)))
def test_batches_are_their_rows(batch, packed, name):
    c = collator(name, independent_turns=packed)
    records = [record(t, i) for i, t in enumerate(batch)]
    out = c(records)
    rows = [r for x in records for r in c.rows(x)[0]]
    assert out['input_ids'].flatten()[out['source']].tolist() == torch.cat([r['input_ids'][r['source']] for r in rows]).tolist()
    assert out['response'].unique().tolist() == list(range(sum(map(len, batch))))
    assert out['attention_mask'].sum(1).tolist() == [len(r['block']) for r in rows]
    assert (out['labels'][out['attention_mask'] == 0] == -100).all() and len(out['ids']) == len(rows)
    if not packed:
        places = out['labels'].flatten().ge(0).nonzero()[:, 0]
        assert (places-1).tolist() == out['source'].tolist() and (out['response_ids'].flatten()[places]-1).tolist() == out['response'].tolist()


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(0, 6), min_size=1, max_size=5), p=st.integers(1, 6), pad=st.integers(0, 4))
def test_block_mask_is_the_rule(sizes, p, pad):
    b = pack(torch.zeros(p, dtype=torch.long), [torch.zeros(s, dtype=torch.long) for s in sizes])['block']
    b = torch.cat([b, torch.full((pad,), -1)])
    mask = block_mask(b[None])[0, 0]
    for i in range(len(b)):
        for j in range(len(b)): assert mask[i, j] == (i == j or (j <= i and b[j] >= 0 and (b[j] == 0 or b[j] == b[i])))


# bad files ---------------------------------------------------------------------------------------------------

def talk(*values): return [{'from': ('human', 'gpt')[i % 2], 'value': v} for i, v in enumerate(values)]


@pytest.fixture(scope='module')
def zoo(tmp_path_factory):
    "A folder of pictures, most of them bad, and what is to be said of each"
    d = tmp_path_factory.mktemp('images')
    good = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    good.save(d/'good.png'); good.save(d/'good.jpg')
    data = (d/'good.jpg').read_bytes()
    (d/'corrupt.jpg').write_bytes(data[:200] + b'\0'*100)
    (d/'cut.png').write_bytes((d/'good.png').read_bytes()[:1000])
    (d/'noise.png').write_bytes(bytes(random.Random(0).randrange(256) for _ in range(500)))
    (d/'empty.png').write_bytes(b'')
    good.save(d/'moving.gif', save_all=True, append_images=[Image.new('RGB', good.size)])
    good.save(d/'moving.webp', save_all=True, append_images=[Image.new('RGB', good.size)])
    good.convert('CMYK').save(d/'cmyk.jpg')
    Image.fromarray((np.arange(40*60).reshape(40, 60)*27).astype(np.uint16)).save(d/'deep.png')
    Image.fromarray((np.arange(40*60).reshape(40, 60)*27).astype(np.uint16)).save(d/'deep.tif')
    Image.new('RGB', (1, 1)).save(d/'pixel.png')
    Image.new('1', (10_000, 10_000)).save(d/'huge.png')
    Image.new('RGB', (4, 4)).save(d.parent/'outside.png')
    bad = {'corrupt.jpg': 'cannot be read', 'cut.png': 'cannot be read', 'noise.png': 'cannot be read', 'empty.png': 'empty', 'gone.png': 'no such file',
           'moving.gif': '2 frames', 'moving.webp': '2 frames', 'pixel.png': '1x1', 'huge.png': '10000x10000', '../outside.png': 'outside the image folder'}
    return d, ['good.png', 'good.jpg', 'cmyk.jpg', 'deep.png', 'deep.tif'], bad


def test_every_bad_picture_is_named_and_none_is_lost(zoo):
    folder, good, bad = zoo
    names = [*bad, *good]
    random.Random(1).shuffle(names)
    path = folder/'train.json'
    path.write_text(json.dumps([dict(id=f'id-{n}', image=n, conversations=talk('<image>', 'Yes.')) for n in names]))
    ds = load_conversations(path, on_error='skip')
    assert len(ds) == len(names)-1 # the text tells of one, whose path leads out of the folder
    ds.check(open_images)
    assert [r['id'] for r in ds] == [f'id-{n}' for n in names if n in good]
    assert len(ds)+len(ds.skipped) == len(names)
    for i, why in ds.skipped:
        assert names[i] in bad and bad[names[i]] in why and f'id-{names[i]}' in why and str(path) in why and f'record {i}' in why


def test_with_stop_a_bad_picture_raises_at_the_latest_when_it_is_opened(zoo):
    folder, good, bad = zoo
    for n, why in bad.items():
        with pytest.raises(BadImage) as e: load_conversations([dict(id='seventh', image=n, conversations=talk('<image>', 'Yes.'))], image_folder=folder).check(open_images)
        assert why in str(e.value) and n in str(e.value) and 'record 0' in str(e.value) and 'seventh' in str(e.value)


def test_deep_and_cmyk_pictures_come_out_right(zoo):
    folder = zoo[0]
    expected = (np.arange(40*60).reshape(40, 60)*27)/257
    for n in 'deep.png', 'deep.tif': assert np.abs(np.asarray(open_image(folder/n))[:, :, 1]-expected).max() <= 1
    cmyk, rgb = np.asarray(open_image(folder/'cmyk.jpg')).astype(float), np.asarray(open_image(folder/'good.png')).astype(float)
    assert np.corrcoef(cmyk.ravel(), rgb.ravel())[0, 1] > 0.7 # not inverted; noise through JPEG


BAD_RECORDS = {
    'missing conversations': dict(id=1), 'missing id': dict(conversations=talk('a', 'b')), 'not an object': 'text', 'a number': 7,
    'wrong roles': dict(id=1, conversations=[{'from': 'gpt', 'value': 'a'}, {'from': 'human', 'value': 'b'}]),
    'unknown role': dict(id=1, conversations=[{'from': 'user', 'value': 'a'}, {'from': 'assistant', 'value': 'b'}]),
    'odd': dict(id=1, conversations=talk('a')), 'empty': dict(id=1, conversations=[]), 'null': dict(id=1, conversations=None),
    'empty answer': dict(id=1, conversations=talk('a', '  ')), 'number for text': dict(id=1, conversations=talk('a', 5)),
    'too few placeholders': dict(id=1, image='good.png', conversations=talk('a', 'b')),
    'too many placeholders': dict(id=1, image='good.png', conversations=talk('<image><image>', 'b')),
    'placeholder without picture': dict(id=1, conversations=talk('<image>', 'b')),
    'placeholder in answer': dict(id=1, image='good.png', conversations=talk('a', '<image>')),
    'lone surrogate': dict(id=1, conversations=talk('a\ud800', 'b')), 'image of a wrong type': dict(id=1, image={}, conversations=talk('<image>', 'b'))}


@pytest.mark.parametrize('kind', ['json', 'jsonl'])
def test_every_bad_record_is_named_and_none_is_lost(zoo, kind):
    folder = zoo[0]
    records = list(BAD_RECORDS.values())
    good = dict(id='good', image='good.png', conversations=talk('<image>', 'b'))
    every = [x for r in records for x in (r, good)]
    path = folder/f'bad.{kind}'
    path.write_text(json.dumps(every) if kind == 'json' else '\n'.join(map(json.dumps, every)))
    ds = load_conversations(path, on_error='skip')
    assert len(ds) == len(records) and [i for i, _ in ds.skipped] == list(range(0, len(every), 2))
    for i, why in ds.skipped: assert f'{path}: record {i}' in why
    with pytest.raises(BadRecord, match='record 0'): load_conversations(path)


@pytest.mark.parametrize('name,record', BAD_RECORDS.items())
def test_each_bad_record_stops(zoo, name, record):
    with pytest.raises(BadRecord, match='train.json: record 0'): Conversations([record], 'train.json', zoo[0])


def test_broken_bytes_spoil_their_own_record(zoo):
    folder = zoo[0]
    good = json.dumps(dict(id='good', conversations=talk('question', 'answer'))).encode()
    broken = good.replace(b'answer', b'ans\xffwer')
    (folder/'utf.json').write_bytes(b'[' + b','.join([good, broken, good]) + b']')
    (folder/'utf.jsonl').write_bytes(b'\n'.join([good, broken, b'{"id": ', good]))
    for name, bad in [('utf.json', [1]), ('utf.jsonl', [1, 2])]:
        ds = load_conversations(folder/name, on_error='skip')
        assert len(ds) == 2 and [i for i, _ in ds.skipped] == bad and 'UTF-8' in ds.skipped[0][1]
    (folder/'broken.json').write_bytes(b'[' + good)
    with pytest.raises(BadRecord, match='broken.json: line 1'): load_conversations(folder/'broken.json', on_error='skip')


# together ------------------------------------------------------------------------------------------------------

def test_workers_give_the_same_batches_and_each_record_once(zoo):
    folder = zoo[0]
    tok = TOKENIZERS['llama3']
    c = Collator(tok, CLIPImageProcessorPil(size=dict(shortest_edge=28), crop_size=dict(height=28, width=28)), tok.convert_tokens_to_ids('<image>'), 3, 2)
    records = [dict(id=f'{i}', image=['good.png', 'cmyk.jpg'], conversations=talk('<image> or <image>?', f'Number {i}.')) for i in range(5)]
    records.append(dict(id='text', conversations=talk('Hello', 'Hi')))
    ds = load_conversations(records, image_folder=folder)
    batches = [[b for b in DataLoader(ds, batch_size=2, collate_fn=c, num_workers=n)] for n in (0, 2)]
    for a, b in zip(*batches, strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a)
    assert [len(b['pixel_values']) for b in batches[0]] == [4, 4, 2]
    first, second = batches[0][0]['pixel_values'][:2]
    assert torch.equal(first, c.pixels(dict(id='', image=str(folder/'good.png')))[0]) and torch.equal(second, c.pixels(dict(id='', image=str(folder/'cmyk.jpg')))[0])
    stream = load_conversations(iter(records), image_folder=folder)
    assert sorted(i for b in DataLoader(stream, batch_size=2, collate_fn=c, num_workers=2) for i in b['ids']) == sorted(r['id'] for r in records)


# order and choice ----------------------------------------------------------------------------------------------

@settings(max_examples=50, deadline=None)
@given(n=st.integers(0, 60), m=st.integers(0, 60))
def test_mix_is_even(n, m):
    a, b = [('i', k) for k in range(n)], [('t', k) for k in range(m)]
    if n+m == 0: return
    out = list(mix(a, b)) if n and m else a+b
    assert sorted(out) == sorted(a+b)
    if n and m:
        seen = np.cumsum([x[0] == 't' for x in out])
        assert np.abs(seen-np.arange(1, n+m+1)*m/(n+m)).max() <= 1 # never more than one text away from an even share


@settings(max_examples=30, deadline=None)
@given(k=st.integers(6, 40), seed=st.integers(0, 9), share=st.floats(0, .3))
def test_held_out_names_never_occur_in_training(k, seed, share):
    classes = [f'class {i}' for i in range(k)]
    train, test = multiple_choice([('x.png', c) for c in classes*2], held_out=share, seed=seed)
    assert len(train)+len(test) == 2*k and len({r['label'] for r in test}) == round(share*k)
    names = {r['label'] for r in test}
    text = [r['conversations'][0]['value'] for r in train]
    assert not any(f'. {n}\n' in t for n in names for t in text)
    for r in train+test: assert check_record({**r, 'image': Image.new('RGB', (2, 2))})
