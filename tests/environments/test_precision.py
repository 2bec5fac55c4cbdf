"""Half precision, autocast and gradient checkpointing; merging a thousand times; inverses, bounded or refused."""

import copy

import pytest
import torch
from peft import get_peft_model
from torch.testing import assert_close
from workers import EVERY, adapted, build, config, gradients, outputs, tokens

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
AUTOCAST = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def distance(got, expected):
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def under(autocast):
    return torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None)


@pytest.mark.parametrize("adapter_autocast", [True, False], ids=["adapter-fp32", "adapter-as-base"])
@pytest.mark.parametrize("autocast", AUTOCAST)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["plus-pre", "plus-post", "permutation-pre", "dora-pre", "tlora"])
@pytest.mark.parametrize("name", ["llama", "channels"])
def test_every_precision(name, mode, dtype, autocast, adapter_autocast):
    """As near to float32 as the base model itself comes, and no further for the gradients than some roundings."""
    dtype, autocast = DTYPES[dtype], AUTOCAST[autocast]
    exact = adapted(name, mode)
    expected = outputs(exact)
    expected.square().mean().backward()
    base = build(name).to(dtype)
    with under(autocast), torch.no_grad():
        plain = outputs(base)
    own_error = distance(plain, outputs(build(name)))

    model = adapted(name, mode, base=base, autocast=adapter_autocast)
    factor_dtype = torch.float32 if adapter_autocast else dtype
    with under(autocast):
        got = outputs(model)
        loss = got.float().square().mean()
    loss.backward()
    assert got.dtype == plain.dtype
    assert torch.isfinite(loss)
    found, wanted = gradients(model), gradients(exact)
    assert {gradient.dtype for gradient in found.values()} == {factor_dtype}
    factor_error = 0.0 if factor_dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    assert distance(got, expected) <= 2 * own_error + factor_error
    step = max(torch.finfo(used).eps for used in (dtype, autocast or dtype))
    for key, gradient in wanted.items():
        assert gradient.norm() > 0
        roundings = 10 if gradient.numel() > 1 else 20  # of a single number, a sum in which terms cancel
        assert distance(found[key], gradient) <= roundings * step, key


KINDS = [("channels", "embed"), ("channels", "conv"), ("channels", "grouped"), ("gpt2", "transformer.h.0.attn.c_attn")]


@pytest.mark.parametrize(("mode", "noise"), [("plus-pre", 2e-3), ("permutation-pre", 3e-4), ("tlora", 1e-3)])
@pytest.mark.parametrize(("name", "path"), KINDS, ids=["embedding", "conv2d", "grouped", "fused"])
@torch.no_grad()
def test_a_small_update_on_a_bfloat16_layer(name, path, mode, noise):
    """Of relative size 1e-3, so below bfloat16's step of 4e-3.

    On its own it is formed in float32. In the layer its factors are rounded to bfloat16, which changes the update in
    its own last bits but never drops it: nearly every output is that of the exact update, rounded once.
    """
    model = get_peft_model(build(name).bfloat16(), config(name, mode))
    generator = torch.Generator().manual_seed(3)
    noise *= 5 if (mode, path) == ("tlora", "embed") else 1  # a token reads one row of A, no sum over inputs
    for parameter in gradients(model):
        model.get_parameter(parameter).add_(
            noise * torch.randn(model.get_parameter(parameter).shape, generator=generator)
        )
    layer = model.base_model.model.get_submodule(path)
    x = tokens(16) if path == "embed" else torch.randn(64, 4 if path == "conv" else 6, 5, 5, generator=generator)
    x = torch.randn(256, 32, generator=generator) if name == "gpt2" else x
    x = x if path == "embed" else x.bfloat16()
    y, doubled = layer.base_layer(x), copy.deepcopy(layer).double()
    if mode == "tlora":
        update = layer._update(x, *layer._matrices("default"))
        exact = doubled._update(x if path == "embed" else x.double(), *doubled._matrices("default"))
    else:
        y = y if layer._bias() is None else y - layer._bias()
        update, exact = layer.multiplier_update(y, "default"), doubled.multiplier_update(y.double(), "default")
    assert update.dtype == torch.float32
    assert 1e-4 < exact.norm() / y.double().norm() < 4e-3
    assert distance(update, exact) < 1e-3
    once_rounded = (layer.base_layer(x).double() + exact).bfloat16()
    assert (layer(x) == once_rounded).double().mean() > 0.99
    assert not torch.equal(layer(x), layer.base_layer(x))


# Merging, again and again


def weights(model):
    return {layer.layer_name: layer._parameter().detach().clone() for layer in model.base_model._layers()}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mode"), [("channels", "dora-pre"), ("gpt2", "permutation-post")])
def test_a_thousand_snapshots(name, mode):
    model = adapted(name, mode, base=build(name).bfloat16())
    before, expected = weights(model), outputs(model)
    for _ in range(1000):
        assert [report.error_bound for report in model.merge_adapter()] == [0.0] * len(before)
        model.unmerge_adapter()
    assert_close(weights(model), before, rtol=0, atol=0)
    assert torch.equal(outputs(model), expected)


@pytest.mark.parametrize(
    ("name", "mode", "dtype", "cycles"),
    [
        pytest.param("gpt2", "plus-post", "bf16", 1000, marks=pytest.mark.slow),
        pytest.param("channels", "permutation-pre", "bf16", 1000, marks=pytest.mark.slow),
        pytest.param("gpt2", "permutation-pre", "fp32", 1000, marks=pytest.mark.slow),
        ("channels", "plus-pre", "bf16", 50),
        ("channels", "plus-post", "fp16", 50),
        ("mixtral", "permutation-post", "bf16", 20),
        ("channels", "tlora", "bf16", 50),
        ("mixtral", "tlora", "fp16", 20),
    ],
)
def test_inverses_stay_within_the_reported_bound(name, mode, dtype, cycles):
    dtype = DTYPES[dtype]
    changes = {"target_modules": ["conv", "grouped"]} if cycles == 1000 and name == "channels" else {}
    model = adapted(name, mode, base=build(name).to(dtype), undo="inverse", **changes)
    layers = {layer.layer_name: layer for layer in model.base_model._layers()}
    before = weights(model)
    previous = dict.fromkeys(before, 0.0)
    for cycle in range(cycles):
        merged = {report.layer: report for report in model.merge_adapter()}
        for report in model.unmerge_adapter():
            was = before[report.layer].double()
            apart = (layers[report.layer]._parameter().detach().double() - was).norm().item()
            assert apart <= report.error_bound
            assert previous[report.layer] < report.error_bound
            if cycle == 0:
                assert report.condition == merged[report.layer].condition
                assert report.error_bound <= 4 * report.condition * torch.finfo(dtype).eps * was.norm()
            previous[report.layer] = report.error_bound
    assert len(previous) == len(layers)


def singular(model, layer, distance_to_zero):
    """Make ``I + s·BA`` of one layer shrink one direction to almost nothing."""
    A, B, s = layer.lorma_A["default"], layer.lorma_B["default"], layer.scaling["default"]
    A.data.zero_()
    B.data.zero_()
    A.data[0, 0], B.data[0, 0] = 1.0, (distance_to_zero - 1) / s
    return model


def test_an_inverse_past_the_condition_limit_is_refused():
    """With 1e-5 left of one direction; nothing is changed, in the layers before it either."""
    model = adapted("bert", "plus-pre")
    layers = model.base_model._layers()
    singular(model, layers[-1], 1e-5)
    before, expected = copy.deepcopy(model.state_dict()), outputs(model)
    message = r"undo='inverse' is refused.*value: the condition number of its multiplier is 1e\+05, the limit 1e\+04"
    for merge in (model.merge_adapter, layers[-1].merge):
        with pytest.raises(ValueError, match=message):
            merge(undo="inverse")
        assert not any(layer.merged for layer in layers)
        assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
        assert torch.equal(outputs(model), expected)
    singular(model, layers[-1], 1e-3)
    assert layers[-1].merge(undo="inverse").condition == pytest.approx(1e3, rel=1e-3)


def test_a_refused_adapter_leaves_no_trace_in_the_next_report():
    """The first adapter is invertible and the second is not: refused together, the first is merged alone."""
    model = adapted("bert", "plus-pre", std=0.3)
    model.add_adapter("mild", config("bert", "plus-pre"))
    model.add_adapter("bad", config("bert", "plus-pre"))
    layer = model.base_model._layers()[0]
    layer.lorma_A["bad"].data[0, 0], layer.lorma_B["bad"].data[0, 0] = 1e6, 1e6
    with pytest.raises(ValueError, match="undo='inverse' is refused for adapter 'bad'"):
        layer.merge(adapter_names=["default", "bad"], undo="inverse")
    assert layer.merge(adapter_names=["mild"], undo="inverse").condition == 1.0


@pytest.mark.parametrize(("dtype", "spread"), [(torch.float64, 1e2), (torch.float32, 1e4)])
def test_an_inverse_is_bounded_for_factors_that_nearly_cancel(dtype, spread):
    """The same well-conditioned BA written with a large A and B: what is solved for the inverse is worse than BA."""
    model = adapted("bert", "plus-pre", base=build("bert").to(dtype), r=4, std=0.2)
    layer = model.base_model._layers()[0]
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64)).Q for _ in range(2))
    stretch = torch.tensor([1 / spread, 1.0, 1.0, spread], dtype=torch.float64)
    A, B = layer.lorma_A["default"], layer.lorma_B["default"]
    A.data = (left @ stretch.diag() @ right @ A.data.double()).to(dtype)
    B.data = (B.data.double() @ right.T @ (1 / stretch).diag() @ left.T).to(dtype)
    before = layer.original_weight().clone()
    assert layer.merge(undo="inverse").condition < 100
    report = layer.unmerge()
    assert (layer.original_weight() - before).norm() <= report.error_bound


@pytest.mark.parametrize("mode", EVERY)
def test_refuse_cannot_be_unmerged(mode):
    model = adapted("channels", mode, undo="refuse")
    expected = outputs(model)
    assert all(report.error_bound == float("inf") for report in model.merge_adapter())
    merged = weights(model)
    with pytest.raises(ValueError, match="head was merged with undo='refuse'; it cannot be unmerged"):
        model.unmerge_adapter()
    assert_close(weights(model), merged, rtol=0, atol=0)
    assert_close(outputs(model), expected, atol=1e-5, rtol=1e-4)


# Gradient checkpointing


# transformers 5 has renamed gradient checkpointing; the old names are what PEFT and the Trainer call.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "saved-tensors"])
@pytest.mark.parametrize("mode", EVERY)
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_gradient_checkpointing(name, mode, reentrant):
    model = adapted(name, mode, base=build(name, layers=2), dropout=0.2).train()
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
            assert model.base_model.model.is_gradient_checkpointing
        model.zero_grad(set_to_none=True)
        torch.manual_seed(4)
        got = outputs(model)
        got.square().mean().backward()
        results.append((got.detach(), {key: gradient.clone() for key, gradient in gradients(model).items()}))
    assert all(gradient.norm() > 0 for gradient in results[0][1].values())
    assert_close(results[1], results[0])
