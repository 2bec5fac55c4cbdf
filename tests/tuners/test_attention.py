"""nn.MultiheadAttention, also where nn.TransformerEncoder would read its weights past the adapter."""

import copy

import pytest
import torch
from helpers import randomise
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn.utils import parametrizations
from torch.testing import assert_close

from lorma import LormaConfig, TLoraConfig, hotswap_adapter


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0), 2).eval()


def attention(model, **config):
    return get_peft_model(copy.deepcopy(model), LormaConfig(r=4, target_modules=["self_attn"], **config)).eval()


@pytest.mark.parametrize("side", ["pre", "post"])
@pytest.mark.parametrize("inflation", ["plus", "permutation"])
def test_the_fast_path_does_not_pass_the_adapter_by(encoder, inflation, side, tmp_path):
    x = torch.randn(3, 5, 16)
    model = attention(encoder, inflation=inflation, side=side)
    with torch.no_grad():
        base = encoder(x)
        assert_close(model(x), base, rtol=0, atol=1e-5)
        randomise(model, std=0.2)
        adapted = model(x)
        assert (adapted - base).abs().max() > 0.1
        with model.disable_adapter():
            assert_close(model(x), base, rtol=0, atol=1e-5)
    with_gradients = model(x)
    assert_close(with_gradients, adapted, rtol=1e-4, atol=1e-5)
    with_gradients.sum().backward()
    assert all(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if "lorma_" in n)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(PeftModel.from_pretrained(copy.deepcopy(encoder), tmp_path).eval()(x), adapted)
        model.merge_adapter()
        assert_close(model(x), adapted, rtol=1e-4, atol=1e-5)
        model.unmerge_adapter()
        assert torch.equal(model(x), adapted)
        merged = model.merge_and_unload()
        assert_close(merged(x), adapted, rtol=1e-4, atol=1e-5)
    assert {name for name, _ in merged.named_parameters()} == {name for name, _ in encoder.named_parameters()}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")  # of the base model itself
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
@pytest.mark.parametrize("target", ["linear1", "linear2", "self_attn", "layers.1.linear1"])
@pytest.mark.parametrize("config", [LormaConfig, TLoraConfig])
def test_padded_input_takes_the_ordinary_path_and_unloading_brings_the_fast_one_back(encoder, config, target, grad):
    x, padding = torch.randn(3, 5, 16), torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = True
    base = copy.deepcopy(encoder)
    model = get_peft_model(base, config(r=4, target_modules=[target])).eval()
    randomise(model, std=0.2)
    with torch.set_grad_enabled(grad):
        out = model(x, src_key_padding_mask=padding)
        assert_close(out[1, :3], model(x[1:2, :3])[0], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(out[1, :3], encoder(x[1:2, :3])[0], atol=1e-3)
    unloaded = model.unload()
    assert unloaded.use_nested_tensor
    assert [layer.activation_relu_or_gelu for layer in unloaded.layers] == [1, 1]
    with torch.no_grad():
        assert torch.equal(unloaded(x, src_key_padding_mask=padding), encoder(x, src_key_padding_mask=padding))


def test_query_key_and_value_have_a_multiplier_each(encoder):
    layer = attention(encoder).base_model.model.layers[0].self_attn
    assert (layer.lorma_A["default"].shape, layer.lorma_B["default"].shape) == ((4, 48), (48, 4))
    B = layer.lorma_B["default"].data
    B[:16] = torch.randn(16, 4)
    weight = layer.base_layer.in_proj_weight.data
    change = layer.get_delta_weight("default")
    expected = layer.scaling["default"] * B[:16] @ layer.lorma_A["default"].data[:, :16] @ weight[:16]
    assert_close(change[:16], expected)
    assert not change[16:].any()


def test_several_adapters_on_an_attention(encoder):
    x = torch.randn(3, 5, 16)
    model = attention(encoder)
    model.add_adapter("second", LormaConfig(r=2, side="post", target_modules=["self_attn"]))
    randomise(model, std=0.2)
    randomise(model, "second", std=0.2, seed=5)
    model.base_model.set_adapter(["default", "second"])
    together = model(x)
    merged = copy.deepcopy(model).merge_and_unload(adapter_names=["default", "second"])
    assert_close(merged(x), together, rtol=1e-4, atol=1e-5)
    model.delete_adapter("second")
    assert not any("second" in name for name in model.state_dict())


def test_what_an_attention_refuses(encoder):
    for option, message in (({"use_dora": True}, "use_dora=True"), ({"lorma_dropout": 0.1}, "lorma_dropout=0.1")):
        with pytest.raises(ValueError, match=f"{message} is not supported on nn.MultiheadAttention"):
            attention(encoder, **option)
    with pytest.raises(ValueError, match="only the same embed_dim, kdim and vdim are"):
        get_peft_model(nn.Sequential(nn.MultiheadAttention(8, 2, kdim=4)), LormaConfig(target_modules=["0"]))
    model = attention(encoder)
    with pytest.raises(ValueError, match="does not support mixed batches"):
        model(torch.randn(2, 5, 16), adapter_names=["default", "__base__"])


@torch.no_grad()
def test_linear_layers_beside_an_attention_are_not_passed_by_either(encoder):
    x = torch.randn(3, 5, 16)
    base = encoder(x)
    model = get_peft_model(copy.deepcopy(encoder), LormaConfig(r=4, target_modules=["linear1", "self_attn"])).eval()
    randomise(model, std=0.2)
    adapted = model(x)
    assert_close(model.train()(x), adapted, rtol=1e-4, atol=1e-5)
    model.eval().merge_adapter()
    assert_close(model(x), adapted, rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        assert_close(model(x), base, rtol=1e-4, atol=1e-5)


def test_a_swap_gives_both_weights_of_an_attention_their_scaling(encoder, tmp_path):
    x = torch.randn(3, 5, 16)
    model = attention(encoder, lorma_alpha=8, rank_pattern={"self_attn": 2})
    randomise(model, std=0.2)
    model.save_pretrained(tmp_path)
    other = attention(encoder, lorma_alpha=8, rank_pattern={"self_attn": 2})
    hotswap_adapter(other, tmp_path)
    assert_close(other(x), model(x))


@pytest.mark.parametrize("config", [LormaConfig, TLoraConfig])
@pytest.mark.parametrize("where", ["in_proj_weight", "out_proj", "parameter"])
def test_a_parametrized_weight_is_refused_and_left_as_it_is(where, config):
    model = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2), "l": nn.Linear(8, 8)})
    places = {"in_proj_weight": model["a"], "out_proj": model["a"].out_proj, "parameter": model["l"]}
    module, name = places[where], where if where == "in_proj_weight" else "weight"
    parametrizations.weight_norm(module, name)
    before = getattr(module, name).detach().clone()
    target = {"target_parameters": ["l.weight"]} if where == "parameter" else {"target_modules": ["a"]}
    with pytest.raises(ValueError, match=f"{name} is computed by torch.nn.utils.parametrize and cannot be adapted"):
        get_peft_model(model, config(r=2, **target))
    assert torch.equal(getattr(module, name), before)


def test_a_parametrized_linear_layer_is_adapted_and_not_merged():
    model = nn.ModuleDict({"l": parametrizations.weight_norm(nn.Linear(8, 8))})
    x, before = torch.randn(3, 8), model["l"].weight.detach().clone()
    adapted = get_peft_model(model, LormaConfig(target_modules=["l"]))
    randomise(adapted)
    layer = adapted.base_model.model["l"]
    expected = layer(x)
    assert not torch.allclose(expected, layer.base_layer(x))
    with pytest.raises(ValueError, match="l: weight is computed by torch.nn.utils.parametrize; it cannot be replaced"):
        layer.merge()
    assert torch.equal(layer.base_layer.weight, before)
    assert torch.equal(layer(x), expected)
