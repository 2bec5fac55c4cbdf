"""Sixteen bits: where training starts, what a pass without gradients computes, gradients beside a large bias."""

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from lorma import LormaConfig, TLoraConfig
from lorma.kernels import dispatch, rotation
from lorma.kernels.form import Operands

SIZES = {"few": (1, 512), "small": (200, 64), "large": (2048, 512)}


class BlackBox(nn.Linear):
    """A linear layer of a class of its own, which is called and not computed past."""


def biased(kind, width, scale=1.0):
    torch.manual_seed(0)
    base = kind(width, width)
    with torch.no_grad():
        base.weight.normal_(std=width**-0.5)
        base.bias.normal_(std=scale)
    return base


def wrapped(base, method, **options):
    config = TLoraConfig if method == "tlora" else LormaConfig
    options = options if method == "tlora" else {"inflation": method, **options}
    return get_peft_model(nn.Sequential(copy.deepcopy(base)), config(target_modules=["0"], **options)).eval()


def moved(model, std=0.01):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(std * torch.randn(parameter.shape))
    return model


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "narrow-base"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D, BlackBox])
@pytest.mark.parametrize(("method", "options"), [("plus", {"side": "pre"}), ("plus", {"side": "post"}), ("tlora", {})])
def test_training_starts_at_a_base_with_a_bias_bit_for_bit(method, options, kind, size, autocast, grad):
    tokens, width = SIZES[size]
    base, x = biased(kind, width), torch.randn(tokens, width)
    if not autocast:
        base, x = base.bfloat16(), x.bfloat16()
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert torch.equal(wrapped(base, method, **options)(x), base(x))


@pytest.mark.parametrize("kind", [nn.Linear, BlackBox])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("side", ["pre", "post"])
@pytest.mark.parametrize("method", ["plus", "permutation"])
def test_without_gradients_it_is_computed_as_with_them(method, side, size, kind, monkeypatch):
    monkeypatch.setattr(dispatch, "cheapest", lambda *_, training: "multiply" if training else "correlate")
    tokens, width = SIZES[size]
    model = moved(wrapped(biased(kind, width).bfloat16(), method, side=side, r=8, lorma_alpha=13))
    x = torch.randn(tokens, width).bfloat16()
    with torch.no_grad():
        rolled_out = model(x)
    assert torch.equal(rolled_out, model(x))


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "narrow-base"])
@pytest.mark.parametrize(("method", "kind"), [("plus", nn.Linear), ("plus", BlackBox), ("permutation", nn.Linear)])
def test_gradients_are_not_lost_beside_a_large_bias(method, kind, autocast):
    base = biased(kind, 768, scale=5)
    model = moved(wrapped(base if autocast else base.bfloat16(), method))
    x, towards = torch.randn(1024, 768).bfloat16(), 0.3 * torch.randn(768)
    gradient = (torch.randn(1024, 768) + towards).bfloat16()
    exact = copy.deepcopy(model).double()
    exact(x.double()).backward(gradient.double())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(x.float() if autocast else x)
    out.backward(gradient.to(out.dtype))
    pairs = zip(model.parameters(), exact.parameters(), strict=True)
    for found, expected in [(p.grad, q.grad) for p, q in pairs if p.requires_grad]:
        assert ((found - expected).norm() / expected.norm()).item() < 0.02


def test_the_gradient_of_a_factor_is_summed_in_its_own_precision(monkeypatch):
    """Eight blocks of rows: one gives 256, and each of the others half a unit, which bfloat16 has no place for."""
    monkeypatch.setattr(rotation, "_ROWS", 2)
    A, B = torch.ones(1, 16), torch.ones(16, 1)
    operands = Operands(torch.ones(1, 16), None, None, A, B, 1.0, torch.bfloat16)
    left, right = torch.full((16, 1), 0.25).bfloat16(), torch.ones(1, 16).bfloat16()
    left[0], left[1] = 256, 0
    dA, _ = rotation.factor_gradients(operands, left, right)
    assert_close(dA, torch.full((1, 16), 256 + 7 * 0.5))
