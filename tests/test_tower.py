"The quantised tower with several encoders: saving, gradients, class tokens"
import pytest, torch
from transformers import (AutoModel, CLIPVisionConfig, CLIPVisionModel, Dinov2Config, Dinov2Model, SiglipVisionConfig, SiglipVisionModel)
from graftlab.host import UnsupportedConfig
from graftlab.tower import QuantizedTower, quantize_tower

SIZES = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, image_size=24, patch_size=6)
ENCODERS = dict(siglip=lambda: SiglipVisionModel(SiglipVisionConfig(**SIZES, intermediate_size=48)),
                clip=lambda: CLIPVisionModel(CLIPVisionConfig(**SIZES, intermediate_size=48)),
                dinov2=lambda: Dinov2Model(Dinov2Config(**SIZES, mlp_ratio=2)))

def made(kind, **kwargs):
    torch.manual_seed(0)
    encoder,pixels = ENCODERS[kind]().eval(),torch.randn(4, 3, 24, 24)
    with torch.no_grad(): states = encoder(pixels, output_hidden_states=True).hidden_states[-2][:, -16:]
    return quantize_tower(encoder, states.flatten(0, 1)[::2].clone(), **kwargs).eval(),pixels,states

@pytest.mark.parametrize('kind', ENCODERS)
def test_features_are_the_penultimate_patches(kind):
    tower,pixels,states = made(kind)
    with torch.no_grad(): out = tower(pixels)
    torch.testing.assert_close(out.features, states, atol=1e-5, rtol=1e-4)
    assert out.last_hidden_state.shape==(4, 16, 32) and (out.pooler_output is None)==(kind=='siglip')

@pytest.mark.parametrize('kind', ENCODERS)
def test_auto_classes_load_what_was_saved(kind, tmp_path):
    tower,pixels,_ = made(kind, cls_token=kind=='siglip')
    tower.save_pretrained(tmp_path)
    again,info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is QuantizedTower and not any(info[k] for k in ('missing_keys', 'unexpected_keys', 'mismatched_keys'))
    with torch.no_grad(): one,two = tower(pixels),again.eval()(pixels)
    assert torch.equal(one.ids, two.ids) and torch.equal(one.last_hidden_state, two.last_hidden_state)

def test_gradients_reach_encoder_and_cls_but_not_the_table():
    tower,pixels,_ = made('siglip', cls_token=True)
    before = tower.quantizer.codebook.clone()
    opt = torch.optim.AdamW(tower.train().parameters(), lr=1e-3)
    for _ in range(3):
        out = tower(pixels)
        loss = out.last_hidden_state.square().mean() + out.pooler_output.sum()
        opt.zero_grad(); loss.backward(); opt.step()
    used = [n for n,p in tower.named_parameters() if p.grad is not None and p.grad.abs().sum()>0]
    assert 'cls_token' in used and any('layers.0' in n for n in used) and not any('layers.2' in n for n in used)
    assert torch.equal(tower.quantizer.codebook, before)

def test_codes_are_the_same_with_and_without_cls():
    plain,pixels,_ = made('siglip')
    spoken,_,_ = made('siglip', cls_token=True)
    spoken.backbone.load_state_dict(plain.backbone.state_dict()); spoken.cls_token.data.normal_(0, 3)
    many = torch.randn(64, 3, 24, 24)
    with torch.no_grad(): assert torch.equal(plain(many).ids, spoken(many).ids)

def test_a_second_class_token_is_refused():
    with pytest.raises(UnsupportedConfig, match='class token of its own'): made('dinov2', cls_token=True)[0](torch.zeros(1, 3, 24, 24))
