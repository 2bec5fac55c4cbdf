"""Adapters on whole models through PEFT's own calls."""

import copy
import warnings

import pytest
import torch
from helpers import TARGETS, adapted, randomise
from peft import PeftConfig, PeftModel, get_peft_model
from peft.helpers import disable_input_dtype_casting
from torch import nn
from torch.testing import assert_close

from lorma import LormaConfig, TLoraConfig
from lorma.functional import INFLATIONS
from lorma.methods.lorma.tuner import LormaLayer

SIDES = ("pre", "post", "auto")


def tokens(rows=2, length=7):
    return torch.randint(0, 60, (rows, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("model", ["bert", "gpt2"])
def test_training_starts_at_the_base_model(model, side, request):
    base = request.getfixturevalue(model)
    expected = base(tokens()).logits
    plus = get_peft_model(copy.deepcopy(base), LormaConfig(side=side)).eval()
    assert torch.equal(plus(tokens()).logits, expected)
    permutation = get_peft_model(copy.deepcopy(base), LormaConfig(side=side, inflation="permutation", lorma_alpha=20))
    assert_close(permutation.eval()(tokens()).logits, expected, rtol=0, atol=1e-5)


def test_random_start_is_not_the_identity(mlp):
    x = torch.randn(3, 6)
    for inflation in INFLATIONS:
        config = LormaConfig(inflation=inflation, target_modules=TARGETS, init_weights=False)
        assert not torch.allclose(get_peft_model(copy.deepcopy(mlp), config)(x), mlp(x), atol=1e-4)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("inflation", INFLATIONS)
def test_merge_unmerge_and_unload(mlp, inflation, side):
    x = torch.randn(3, 6)
    model = adapted(mlp, inflation=inflation, side=side)
    expected = model(x)
    assert not torch.allclose(expected, mlp(x), atol=1e-3)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    model.merge_adapter()
    assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        model.merge_adapter()
    assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert torch.equal(model(x), expected)
    merged = model.merge_and_unload()
    assert_close(merged(x), expected, rtol=1e-4, atol=1e-5)
    assert not any(isinstance(module, LormaLayer) for module in merged.modules())
    assert sum(p.numel() for p in merged.parameters()) == sum(p.numel() for p in mlp.parameters())


def test_unload_gives_the_base_model_back(mlp):
    x = torch.randn(3, 6)
    assert torch.equal(adapted(mlp).unload()(x), mlp(x))


@pytest.mark.parametrize("inflation", INFLATIONS)
def test_a_thousand_merges_in_bfloat16_are_undone_bit_for_bit(mlp, inflation):
    model = adapted(mlp.to(torch.bfloat16), inflation=inflation)
    layer = model.base_model.model.up
    before = layer.base_layer.weight.data.clone()
    for _ in range(1000):
        layer.merge()
        layer.unmerge()
    assert torch.equal(layer.base_layer.weight.data, before)
    layer.merge()
    assert not torch.equal(layer.base_layer.weight.data, before)


def test_disabling_gives_the_base_model_also_when_merged(mlp):
    x = torch.randn(3, 6)
    model = adapted(mlp)
    with model.disable_adapter():
        assert torch.equal(model(x), mlp(x))
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(x), mlp(x))


@pytest.mark.parametrize("sides", [("pre", "pre"), ("post", "post"), ("pre", "post"), ("post", "pre")])
def test_two_active_adapters_act_in_their_order(mlp, sides):
    x = torch.randn(3, 6, dtype=torch.float64)
    model = adapted(mlp.double(), side=sides[0])
    model.add_adapter("second", LormaConfig(target_modules=TARGETS, side=sides[1], r=3))
    randomise(model, "second", seed=5)
    outputs = {}
    for order in (["default", "second"], ["second", "default"]):
        model.base_model.set_adapter(order)
        together = model(x)
        merged_at_once = copy.deepcopy(model).base_model.merge_and_unload(adapter_names=order)
        one_by_one = copy.deepcopy(model).base_model
        one_by_one.merge_adapter([order[0]])
        with pytest.warns(UserWarning, match="You are now additionally merging"):
            one_by_one.merge_adapter([order[1]])
        assert_close(merged_at_once(x), together)
        assert torch.equal(one_by_one(x), merged_at_once(x))
        outputs[order[0]] = together
    if sides[0] == sides[1]:
        assert not torch.allclose(outputs["default"], outputs["second"], atol=1e-4)


def test_switching_and_deleting_adapters(mlp):
    x = torch.randn(3, 6)
    model = adapted(mlp)
    first = model(x)
    model.add_adapter("second", LormaConfig(target_modules=["up"], inflation="permutation", r=3))
    randomise(model, "second", seed=5)
    assert torch.equal(model(x), first)
    model.set_adapter("second")
    second = model(x)
    assert not torch.allclose(first, second, atol=1e-4)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable
    assert all(".second." in name for name in trainable)
    model.set_adapter("default")
    assert torch.equal(model(x), first)
    model.delete_adapter("second")
    assert "second" not in model.peft_config
    assert not any("second" in name for name in model.state_dict())
    layer = model.base_model.model.up
    for held in (*layer.adapter_layer_names, *layer.other_param_names):
        assert "second" not in getattr(layer, held)


def test_rank_and_alpha_patterns(mlp):
    model = adapted(mlp, r=2, rank_pattern={"up": 5}, alpha_pattern={"^conv": 32})
    up, gate, conv = (getattr(model.base_model.model, name) for name in TARGETS)
    assert (up.r["default"], gate.r["default"], conv.r["default"]) == (5, 2, 2)
    assert (up.scaling["default"], gate.scaling["default"], conv.scaling["default"]) == (8 / 5, 4.0, 16.0)


@pytest.mark.parametrize("bias", ["none", "all", "lorma_only"])
def test_bias_training_and_saving(mlp, bias, tmp_path):
    model = get_peft_model(copy.deepcopy(mlp), LormaConfig(target_modules=TARGETS, bias=bias))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad and name.endswith("bias")}
    prefix = "base_model.model."
    adapted_biases = {f"{prefix}up.base_layer.bias", f"{prefix}conv.base_layer.bias"}
    expected = {"none": set(), "lorma_only": adapted_biases, "all": adapted_biases | {f"{prefix}head.bias"}}[bias]
    assert trainable == expected
    for name, p in model.named_parameters():
        if name in trainable:
            p.data.add_(1)
    model.save_pretrained(tmp_path)
    x = torch.randn(3, 6)
    assert torch.equal(PeftModel.from_pretrained(copy.deepcopy(mlp), tmp_path)(x), model(x))


@pytest.mark.parametrize("inflation", INFLATIONS)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saving_and_loading(mlp, inflation, side, low_cpu_mem_usage, tmp_path):
    x = torch.randn(3, 6)
    model = adapted(mlp, inflation=inflation, side=side, modules_to_save=["head"], rank_pattern={"up": 3})
    model.base_model.model.head.modules_to_save["default"].weight.data.add_(0.1)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    config = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(config, LormaConfig)
    assert (config.inflation, config.side, config.peft_type) == (inflation, side, "LORMA")
    loaded = PeftModel.from_pretrained(copy.deepcopy(mlp), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    torch.testing.assert_close(loaded.eval()(x), model(x), rtol=1e-6, atol=1e-6)
    loaded.load_adapter(tmp_path, "again")
    loaded.set_adapter("again")
    torch.testing.assert_close(loaded.eval()(x), model(x), rtol=1e-6, atol=1e-6)


def test_a_bfloat16_base_keeps_float32_adapters_through_a_file(mlp, tmp_path):
    base = mlp.to(torch.bfloat16)
    model = adapted(base)
    factor = model.base_model.model.up.lorma_A["default"]
    assert factor.dtype == torch.float32
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(loaded.base_model.model.up.lorma_A["default"], factor)
    half = get_peft_model(copy.deepcopy(base), LormaConfig(target_modules=TARGETS), autocast_adapter_dtype=False)
    assert half.base_model.model.up.lorma_A["default"].dtype == torch.bfloat16
    x = torch.randn(3, 6, dtype=torch.bfloat16)
    assert half(x).dtype == torch.bfloat16


def test_training_moves_the_adapter_and_nothing_else(mlp):
    for inflation in INFLATIONS:
        torch.manual_seed(0)
        model = get_peft_model(copy.deepcopy(mlp), LormaConfig(target_modules=TARGETS, inflation=inflation))
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        x, target = torch.randn(16, 6), torch.randn(16, 3)
        losses = []
        for _ in range(20):
            loss = nn.functional.mse_loss(model(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        for name, p in model.named_parameters():
            assert torch.equal(p, before[name]) != ("lorma_" in name)


def test_nothing_warns_in_an_ordinary_life(mlp, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = get_peft_model(copy.deepcopy(mlp), LormaConfig(target_modules=TARGETS))
        randomise(model)
        model.save_pretrained(tmp_path)
        merged = PeftModel.from_pretrained(copy.deepcopy(mlp), tmp_path).merge_and_unload()
    x = torch.randn(3, 6)
    assert_close(merged(x), model.eval()(x), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(merged(x), mlp(x), atol=1e-3)


@pytest.mark.parametrize("config", [LormaConfig, TLoraConfig])
def test_peft_can_leave_the_dtype_of_inputs_alone(mlp, config):
    model, x = get_peft_model(copy.deepcopy(mlp), config(target_modules=TARGETS)).eval(), torch.randn(3, 6)
    layer = model.base_model.model.up
    with disable_input_dtype_casting(model):
        assert not layer.cast_input_dtype_enabled
        assert_close(model(x), mlp(x))
    assert layer.cast_input_dtype_enabled


def test_peft_converts_an_adapter_to_lora(mlp):
    """PEFT's own SVD conversion: at full rank it is exact, because ΔW is the additive residual."""
    from peft import convert_to_lora

    x = torch.randn(3, 6)
    model = adapted(mlp, target_modules=["up"], r=2)
    config, state = convert_to_lora(model, rank=2)
    assert config.peft_type == "LORA"
    lora = get_peft_model(copy.deepcopy(mlp), config)
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(lora, state)
    assert_close(lora.eval()(x), model(x), rtol=1e-4, atol=1e-5)
