"""SVFT and bottleneck adapters as PEFT methods."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.testing import assert_close
from transformers import AutoModel, GPT2Config, GPT2Model, LlamaConfig, T5Config

from lorma.functional import singular
from lorma.methods.bottleneck.tuner import BottleneckConfig
from lorma.methods.bottleneck.tuner.layer import BottleneckLayer
from lorma.methods.svft.tuner import SvftConfig

TARGETS = ["up", "gate", "conv"]
CONFIGS = {
    "svft-plain": lambda **o: SvftConfig(**o),
    "svft-random": lambda **o: SvftConfig(pattern="random", r=2, seed=5, **o),
    "houlsby": lambda **o: BottleneckConfig(r=3, **o),
    "pfeiffer": lambda **o: BottleneckConfig(r=3, placement="pfeiffer", activation="relu", **o),
}
SVFT = [name for name in CONFIGS if name.startswith("svft")]


def noisy(model, name, **options):
    adapted = get_peft_model(copy.deepcopy(model), CONFIGS[name](target_modules=TARGETS, **options)).eval()
    for path, parameter in adapted.named_parameters():
        if parameter.requires_grad and ".default." in path:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return adapted


@pytest.fixture
def x():
    torch.manual_seed(7)
    return torch.randn(5, 6)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_start_is_the_base_model(name, mlp, x):
    adapted = get_peft_model(copy.deepcopy(mlp), CONFIGS[name](target_modules=TARGETS))
    assert adapted(x).equal(mlp(x))


@pytest.mark.parametrize("name", CONFIGS)
def test_saving_and_loading(name, mlp, x, tmp_path):
    adapted = noisy(mlp, name)
    adapted.save_pretrained(tmp_path)
    for quick in (False, True):
        loaded = PeftModel.from_pretrained(copy.deepcopy(mlp), tmp_path, low_cpu_mem_usage=quick)
        assert loaded(x).equal(adapted(x))
    assert not adapted(x).equal(mlp(x))
    with adapted.disable_adapter():
        assert adapted(x).equal(mlp(x))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_batch_of_several_adapters(name, mlp, x):
    adapted = noisy(mlp, name)
    adapted.add_adapter("other", CONFIGS[name](target_modules=TARGETS, init_weights=False))
    alone = {}
    for adapter in ("default", "other"):
        adapted.set_adapter(adapter)
        alone[adapter] = adapted(x)
    rows = ["default", "other", "__base__", "default", "other"]
    expected = torch.stack([alone.get(row, mlp(x))[i] for i, row in enumerate(rows)])
    assert_close(adapted(x, adapter_names=rows), expected)


@pytest.mark.parametrize("name", SVFT)
@pytest.mark.parametrize("undo", ["snapshot", "inverse"])
def test_svft_is_the_plain_definition_merged_or_not(name, undo, mlp, x):
    mlp, x = mlp.double(), x.double()
    adapted = noisy(mlp, name, undo=undo)
    expected = copy.deepcopy(mlp)
    for target in TARGETS:
        layer, base = getattr(adapted.base_model.model, target), getattr(expected, target)
        transposed = target == "conv"
        weight = base.weight.data.T if transposed else base.weight.data
        U, V = singular.singular_basis(weight)
        entries = layer.svft_M["default"].data
        positions = singular.random_positions(6, len(entries) - 6, 5)
        M = torch.diag(entries[:6])
        M[positions[0], positions[1]] = entries[6:]
        weight = U @ (torch.diag(torch.linalg.svdvals(weight)) + M) @ V.T
        base.weight.data = weight.T.contiguous() if transposed else weight
    assert_close(adapted(x), expected(x))
    adapted.merge_adapter()
    assert_close(adapted(x), expected(x))
    adapted.unmerge_adapter()
    assert_close(adapted.base_model.model.up.get_base_layer().weight, mlp.up.weight)
    assert_close(adapted.merge_and_unload()(x), expected(x))


def test_another_weight_has_another_basis(mlp, x):
    adapted = noisy(mlp, "svft-plain")
    before = adapted(x)
    layer = adapted.base_model.model.up
    old = layer.basis(torch.float32)[0]
    with torch.no_grad():
        layer.get_base_layer().weight.mul_(-1).add_(1)
    assert not layer.basis(torch.float32)[0].equal(old)
    assert not adapted(x).equal(before)


def test_a_bottleneck_is_what_it_says(mlp, x):
    adapted = noisy(mlp, "houlsby")
    layer = adapted.base_model.model.up
    down, down_bias, up, up_bias = (getattr(layer, name)["default"] for name in layer.adapter_layer_names)
    h = mlp.up(x)
    assert_close(layer(x), h + torch.nn.functional.gelu(h @ down.T + down_bias) @ up.T + up_bias)
    assert down.shape == (3, 10)


def test_a_bottleneck_cannot_be_merged(mlp, x):
    adapted = noisy(mlp, "houlsby")
    before = adapted(x)
    for refused in (adapted.merge_adapter, adapted.merge_and_unload):
        with pytest.raises(ValueError, match="up carries a bottleneck adapter, which is not linear"):
            refused()
    assert adapted(x).equal(before)
    assert adapted.unload()(x).equal(mlp(x))


HEADS = {"num_attention_heads": 2, "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "vocab_size": 60}
LAYERS = {
    "bert": ({"attention.output.dense": 2}, {"output.dense": 2}),
    "gpt2": ({"attn.c_proj": 2}, {"mlp.c_proj": 2}),
    "llama": ({"self_attn.o_proj": 2}, {"mlp.down_proj": 2}),
    "t5": ({"SelfAttention.o": 4, "EncDecAttention.o": 2}, {"DenseReluDense.wo": 4}),
}


def architecture(name, bert):
    if name == "bert":
        return copy.deepcopy(bert)
    if name == "gpt2":
        return GPT2Model(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=60, n_positions=32))
    if name == "llama":
        return AutoModel.from_config(LlamaConfig(**HEADS, num_key_value_heads=2))
    return AutoModel.from_config(T5Config(vocab_size=60, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer"])
def test_bottlenecks_find_their_places(name, placement, bert):
    attention, feed_forward = LAYERS[name]
    adapted = get_peft_model(architecture(name, bert), BottleneckConfig(r=2, placement=placement))
    found = [path for path, module in adapted.named_modules() if isinstance(module, BottleneckLayer)]
    for ending, count in attention.items():
        assert sum(path.endswith(f".{ending}") for path in found) == (count if placement == "houlsby" else 0)
    expected = sum(feed_forward.values()) + (sum(attention.values()) if placement == "houlsby" else 0)
    assert len(found) == expected
    assert all(any(path.endswith(f".{ending}") for ending in attention | feed_forward) for path in found)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (SvftConfig, {"pattern": "banded"}, "pattern='banded' is not allowed; choose one of plain, random"),
        (SvftConfig, {"seed": -1}, "seed=-1 must be an int from 0"),
        (SvftConfig, {"svft_dropout": 1.0}, "svft_dropout=1.0 must lie in"),
        (SvftConfig, {"target_parameters": ["w"]}, "target_parameters=.*is not supported by SVFT"),
        (BottleneckConfig, {"placement": "parallel"}, "placement='parallel' is not allowed"),
        (BottleneckConfig, {"activation": "tanh"}, "activation='tanh' is not allowed"),
        (BottleneckConfig, {"r": 0}, "r=0 must be an int of at least 1"),
    ],
)
def test_wrong_values_are_refused(config, options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


def test_a_model_without_known_names(mlp):
    with pytest.raises(ValueError, match="target_modules must be given: Mlp has none of the names known"):
        get_peft_model(mlp, BottleneckConfig())


def test_the_basis_follows_a_weight_that_is_replaced(mlp, x):
    model = noisy(mlp, "svft-plain")
    before = model(x)
    layer = model.base_model.model.up
    layer.base_layer.weight.data = layer.base_layer.weight.data.flip(0).contiguous()
    after = model(x)
    layer._basis = None
    assert_close(model(x), after, atol=0, rtol=0)
    assert not torch.allclose(before, after)


def test_one_of_two_merged_with_an_inverse(mlp, x):
    model = noisy(mlp, "svft-plain")
    model.add_adapter("second", SvftConfig(pattern="random", r=1, target_modules=TARGETS, init_weights=False))
    model.base_model.set_adapter(["default", "second"])
    expected = model(x)
    model.base_model.merge_adapter(["default"], undo="inverse")
    assert_close(model(x), expected, atol=1e-5, rtol=1e-4)
    model.unmerge_adapter()
    assert_close(model(x), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:Already following adapters were merged")
@pytest.mark.parametrize("undo", ["snapshot", "inverse"])
@pytest.mark.parametrize("name", SVFT)
def test_updates_that_are_added_merge_in_any_order(name, undo, mlp, x):
    adapted = noisy(mlp, name)
    adapted.add_adapter("second", CONFIGS[name](target_modules=TARGETS, init_weights=False))
    adapted.base_model.set_adapter(["default", "second"])
    before = adapted(x)
    adapted.merge_adapter(["second"], undo=undo)
    assert_close(adapted(x), before, rtol=1e-4, atol=1e-5)
    adapted.merge_adapter(["default"], undo=undo)
    assert_close(adapted(x), before, rtol=1e-4, atol=1e-5)
    adapted.unmerge_adapter()
    assert_close(adapted(x), before, rtol=1e-4, atol=1e-5)
