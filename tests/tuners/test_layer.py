"""A layer against the plain definition: build I(BA), multiply W0, add the bias."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model
from torch import nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from lorma import LormaConfig
from lorma.functional import INFLATIONS, SIDES
from lorma.methods.lorma.tuner import Linear


def make_layer(kind, in_features, out_features, bias, dtype=torch.float64, *, r=2, alpha=3, **config):
    if kind == "linear":
        base = nn.Linear(in_features, out_features, bias=bias)
    else:
        base = Conv1D(out_features, in_features)
        nn.init.normal_(base.bias)
        if not bias:
            base.bias.data.zero_()
    base = base.to(dtype)
    layer = Linear(base, "default", layer_name="layer", r=r, lorma_alpha=alpha, config=LormaConfig(r=r, **config))
    for factor in (layer.lorma_A["default"], layer.lorma_B["default"]):
        factor.data.add_(torch.randn_like(factor))
    return layer


def plain_output(layer, x, inflation, side, s):
    A, B = layer.lorma_A["default"], layer.lorma_B["default"]
    product = B @ A
    n = product.shape[0]
    M = {
        "plus": lambda: torch.eye(n, dtype=x.dtype) + s * product,
        "none": lambda: s * product,
        "permutation": lambda: s * torch.stack([torch.roll(product[i], i) for i in range(n)]),
    }[inflation]()
    base = layer.base_layer
    W = base.weight.T if isinstance(base, Conv1D) else base.weight
    W = M @ W if side == "pre" else W @ M
    out = x @ W.T
    return out if base.bias is None else out + base.bias


@given(
    kind=st.sampled_from(["linear", "conv1d"]),
    inflation=st.sampled_from(INFLATIONS),
    side=st.sampled_from(SIDES),
    bias=st.booleans(),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    leading=st.lists(st.integers(1, 3), min_size=1, max_size=2),
    r=st.integers(1, 4),
)
def test_output_and_gradients_equal_the_plain_definition(kind, inflation, side, bias, shape, leading, r):
    layer = make_layer(kind, *shape, bias, r=r, inflation=inflation, side=side)
    x = torch.randn(*leading, shape[0], dtype=torch.float64, requires_grad=True)
    wanted = (x, layer.lorma_A["default"], layer.lorma_B["default"])
    got, plain = layer(x), plain_output(layer, x, inflation, side, 3 / r)
    assert_close(got, plain, rtol=1e-10, atol=1e-10)
    seed = torch.randn_like(plain)
    for mine, expected in zip(
        torch.autograd.grad(got, wanted, seed), torch.autograd.grad(plain, wanted, seed), strict=True
    ):
        assert_close(mine, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("inflation", INFLATIONS)
@pytest.mark.parametrize("side", SIDES)
def test_delta_weight_and_merge(kind, inflation, side):
    layer = make_layer(kind, 5, 7, True, inflation=inflation, side=side)
    x = torch.randn(4, 5, dtype=torch.float64)
    before, weight = layer(x), layer.base_layer.weight.data.clone()
    delta = layer.get_delta_weight("default")
    layer.merge(safe_merge=True)
    assert_close(layer.base_layer.weight.data, weight + delta)
    assert_close(layer(x), before)
    assert_close(layer.get_delta_weight("default"), delta)
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight.data, weight)


@pytest.mark.parametrize(("shape", "side", "n"), [((5, 7), "post", 5), ((7, 5), "pre", 5), ((6, 6), "pre", 6)])
def test_auto_takes_the_narrower_side(shape, side, n):
    layer = make_layer("linear", *shape, True, side="auto")
    assert layer.side["default"] == side
    assert layer.lorma_A["default"].shape == (2, n)


def test_rslora_scaling():
    assert make_layer("linear", 4, 4, True, r=4, alpha=6).scaling["default"] == 1.5
    assert make_layer("linear", 4, 4, True, r=4, alpha=6, use_rslora=True).scaling["default"] == 3.0


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("inflation", INFLATIONS)
def test_dropout_acts_on_the_update_only(inflation, side):
    layer = make_layer("linear", 6, 6, True, inflation=inflation, side=side, lorma_dropout=0.5)
    x = torch.randn(3, 6, dtype=torch.float64)
    layer.train()
    torch.manual_seed(3)
    got = layer(x)
    base = layer.base_layer
    y = x if side == "post" else x @ base.weight.T
    torch.manual_seed(3)
    dropped = nn.functional.dropout(y, 0.5)
    A, B, s = layer.lorma_A["default"], layer.lorma_B["default"], layer.scaling["default"]
    product = B @ A
    rotated = torch.stack([torch.roll(product[i], i) for i in range(6)])
    M = {"plus": torch.eye(6) + s * product, "none": s * product, "permutation": s * rotated}[inflation]
    y = y + dropped @ (M - torch.eye(6)).T
    expected = y @ base.weight.T + base.bias if side == "post" else y + base.bias
    assert_close(got, expected)
    layer.eval()
    assert_close(layer(x), plain_output(layer, x, inflation, side, s))


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("inflation", INFLATIONS)
@pytest.mark.parametrize("side", SIDES)
def test_output_has_the_base_layers_dtype(base_dtype, adapter_dtype, autocast, inflation, side):
    torch.manual_seed(0)
    layer = make_layer("linear", 16, 16, True, base_dtype, inflation=inflation, side=side)
    assert layer.lorma_A["default"].dtype == torch.float32
    layer.cast_adapter("default", adapter_dtype)
    x = torch.randn(3, 16, dtype=base_dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got, base = layer(x), layer.base_layer(x)
    assert got.dtype == base.dtype
    got.sum().backward()
    for factor in (layer.lorma_A["default"], layer.lorma_B["default"]):
        assert factor.grad.dtype == adapter_dtype
        assert torch.isfinite(factor.grad).all()
    exact = plain_output(layer.double(), x.double(), inflation, side, layer.scaling["default"])
    assert (got.double() - exact).norm() / exact.norm() < 0.02


@pytest.mark.parametrize(("inflation", "noise"), [("plus", 2e-3), ("permutation", 3e-4)])
def test_a_small_update_survives_a_bfloat16_base(inflation, noise):
    """An update of relative size 1e-3 lies below bfloat16's step of 4e-3 in the multiplier; it must still act."""
    torch.manual_seed(0)
    base = nn.Linear(64, 64, bias=False).to(torch.bfloat16)
    config = LormaConfig(inflation=inflation)
    layer = Linear(base, "default", layer_name="layer", r=8, lorma_alpha=8, config=config)
    for factor in (layer.lorma_A["default"], layer.lorma_B["default"]):
        factor.data.add_(noise * torch.randn_like(factor))
    x = torch.randn(512, 64, dtype=torch.bfloat16)
    y = base(x).double()
    s, A, B = layer.scaling["default"], layer.lorma_A["default"].double(), layer.lorma_B["default"].double()
    product = B @ A
    if inflation == "permutation":
        product = torch.stack([torch.roll(product[i], i) for i in range(64)]) - torch.eye(64)
    exact = y @ (s * product).T
    assert 1e-4 < exact.norm() / y.norm() < 1e-2
    got = layer.multiplier_update(base(x), "default").double()
    assert (got - exact).norm() / exact.norm() < 1e-3


def test_adapters_of_a_float64_base_are_float64():
    layer = make_layer("linear", 4, 4, True, torch.float64, inflation="permutation", alpha=2)
    assert layer.lorma_A["default"].dtype == torch.float64


NORM_CHANGES = {
    "another scaling": lambda layer: layer.scaling.update(default=5 * layer.scaling["default"]),
    "another dtype": lambda layer: layer.double(),
    "an optimiser's step": lambda layer: torch.optim.SGD(layer.parameters(), lr=1.0, foreach=True).step(),
    "a new base weight": lambda layer: setattr(
        layer.get_base_layer(), "weight", nn.Parameter(torch.randn(5, 7), False)
    ),
}


@pytest.mark.parametrize("change", NORM_CHANGES)
def test_norms_of_dora_that_are_kept_in_evaluation_are_not_used_after_a_change(change):
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(7, 5)), LormaConfig(r=2, target_modules=["0"], use_dora=True)).eval()
    layer, x = model.base_model.model[0], torch.randn(3, 7)
    with torch.no_grad():
        for factor in (layer.lorma_A["default"], layer.lorma_B["default"]):
            factor.add_(0.3 * torch.randn_like(factor))
    model(x).square().sum().backward()
    with torch.no_grad():
        before = model(x)
        NORM_CHANGES[change](layer)
        x = x.to(layer.lorma_A["default"].dtype)
        after = model(x)
    assert after.dtype == x.dtype
    assert_close(after, model(x))  # with gradients the norms are computed anew
    assert change == "another dtype" or not torch.allclose(after, before, atol=1e-3)
