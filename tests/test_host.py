"""Hosts: names and fields under random inputs, and folders that are not what they should be"""
import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, Qwen3MoeConfig, SmolLM3Config
from graftlab.host import BadCheckpoint, GraftError, Host, UnsupportedConfig, fingerprint, layer_fields, layer_of, rename_layer, tensor_files, text_name

SIZE = dict(vocab_size=61, hidden_size=16, intermediate_size=24, num_attention_heads=2, num_key_value_heads=1, pad_token_id=0)
PREFIXES = ('model.layers', 'model.language_model.layers', 'language_model.model.layers', 'transformer.h', 'gpt_neox.layers')


@given(prefix=st.sampled_from(PREFIXES), old=st.integers(0, 999), new=st.integers(0, 999), tail=st.sampled_from(('mlp.experts.7.w.weight', 'a.b', '3.layers.4')))
def test_a_renamed_layer_is_found_under_its_new_index(prefix, old, new, tail):
    name = rename_layer(f'{prefix}.{old}.{tail}', new)
    assert layer_of(name) == new
    assert rename_layer(name, old) == f'{prefix}.{old}.{tail}'
    assert layer_of(text_name(name)) == new


@settings(deadline=None, max_examples=60)
@given(kept=st.sets(st.integers(0, 11), min_size=1).map(sorted))
def test_fields_of_a_cut_are_the_kept_layers_fields(kept):
    gemma = Gemma3TextConfig(**SIZE, num_hidden_layers=12)
    assert layer_fields(gemma, kept)['layer_types'] == [gemma.layer_types[i] for i in kept]
    smol = SmolLM3Config(**SIZE, num_hidden_layers=12)
    assert layer_fields(smol, kept)['no_rope_layers'] == [smol.no_rope_layers[i] for i in kept]
    moe = Qwen3MoeConfig(**SIZE, num_hidden_layers=12, mlp_only_layers=[2, 5, 6])
    assert [kept[i] for i in layer_fields(moe, kept)['mlp_only_layers']] == [i for i in (2, 5, 6) if i in kept]


@settings(deadline=None, max_examples=60)
@given(step=st.integers(2, 4), start=st.integers(0, 10), gone=st.integers(1, 8))
def test_a_pattern_is_refused_unless_it_survives(step, start, gone):
    kept = [i for i in range(12) if not start < i <= start+gone]
    moe = Qwen3MoeConfig(**SIZE, num_hidden_layers=12, decoder_sparse_step=step)
    survives = all((new+1) % step == 0 if (old+1) % step == 0 else (new+1) % step for new, old in enumerate(kept))
    if survives: assert layer_fields(moe, kept)['num_hidden_layers'] == len(kept)
    else:
        with pytest.raises(UnsupportedConfig, match='decoder_sparse_step'): layer_fields(moe, kept)


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**SIZE, num_hidden_layers=3))


def test_every_row_of_the_embedding_and_every_layer_tensor_is_in_the_fingerprint(model):
    before = fingerprint(model)
    for name, p in model.named_parameters():
        if name in ('lm_head.weight', 'model.norm.weight'): continue
        keep = p.data.clone()
        p.data[-1 if 'embed' in name else 0] += .5
        assert fingerprint(model) != before, name
        p.data.copy_(keep)
    assert fingerprint(model) == before


def test_sharded_and_single_folders_have_one_fingerprint(model, tmp_path):
    model.save_pretrained(tmp_path/'one')
    model.save_pretrained(tmp_path/'many', max_shard_size='4KB')
    assert len(set(tensor_files(tmp_path/'many').values())) > 3
    assert fingerprint(tmp_path/'one') == fingerprint(tmp_path/'many') == fingerprint(model)


def test_an_index_that_names_an_absent_tensor_is_an_error(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size='4KB')
    shard = tensor_files(tmp_path)['model.layers.1.mlp.up_proj.weight']
    tensors = load_file(shard)
    del tensors['model.layers.1.mlp.up_proj.weight']
    save_file(tensors or {'other': torch.zeros(1)}, shard)
    with pytest.raises(BadCheckpoint, match='up_proj'): fingerprint(tmp_path)


def test_a_truncated_shard_is_named(model, tmp_path):
    model.save_pretrained(tmp_path)
    f = tmp_path/'model.safetensors'
    f.write_bytes(f.read_bytes()[:500])
    with pytest.raises(BadCheckpoint, match='model.safetensors'): tensor_files(tmp_path)


def test_an_empty_folder_and_a_pickle_are_refused(tmp_path):
    with pytest.raises(BadCheckpoint, match='neither'): tensor_files(tmp_path)
    torch.save({}, tmp_path/'pytorch_model.bin')
    with pytest.raises(BadCheckpoint, match='pytorch_model.bin.*Convert'): fingerprint(tmp_path)


def test_a_folder_of_something_else_has_no_fingerprint(tmp_path):
    save_file({'weight': torch.zeros(2, 2)}, tmp_path/'model.safetensors')
    with pytest.raises(GraftError, match='decoder'): fingerprint(tmp_path)


def test_meta_models_are_refused():
    with torch.device('meta'): empty = AutoModelForCausalLM.from_config(LlamaConfig(**SIZE, num_hidden_layers=1))
    with pytest.raises(BadCheckpoint, match='meta'): fingerprint(empty)


def test_a_config_that_counts_other_layers_than_the_model_has_is_refused():
    m = AutoModelForCausalLM.from_config(LlamaConfig(**SIZE, num_hidden_layers=2))
    m.config.num_hidden_layers = 1
    with pytest.raises(UnsupportedConfig, match='a list of 1 layers'): Host(m)
