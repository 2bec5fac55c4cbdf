"""What goes on around a layer: selective checkpointing, batched gradients, tracers, a default device."""

import copy
from functools import partial

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from lorma import LormaConfig, TLoraConfig
from lorma.kernels import dispatch, rotation

CONFIGS = {
    "plus": partial(LormaConfig, side="pre"),
    "plus-post": partial(LormaConfig, side="post"),
    "permutation": partial(LormaConfig, inflation="permutation"),
    "dora": partial(LormaConfig, use_dora=True),
    "tlora": TLoraConfig,
}


@pytest.fixture(params=CONFIGS)
def model(request):
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(16, 24)), CONFIGS[request.param](r=3, target_modules=["0"])).eval()
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("way", ["fold", "multiply", "correlate", None])
def test_selective_checkpointing(model, way, monkeypatch):
    if way is not None:
        monkeypatch.setattr(
            dispatch, "cheapest", lambda shape, *_, **__: way if shape.m or way != "fold" else "multiply"
        )
    x, wanted = torch.randn(40, 16, requires_grad=True), list(trained(model).values())
    kept = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
    contexts = partial(create_selective_checkpoint_contexts, kept)
    for _ in range(2):  # also when something has been kept from the pass before
        out = checkpoint(model, x, use_reentrant=False, context_fn=contexts)
        found = torch.autograd.grad(out.square().sum(), [x, *wanted])
        assert_close(found, torch.autograd.grad(model(x).square().sum(), [x, *wanted]))


def test_batched_gradients(model):
    x = torch.randn(3, 16, requires_grad=True)
    found = torch.autograd.functional.jacobian(model, x, vectorize=True)
    assert_close(found, torch.autograd.functional.jacobian(model, x))


def test_adapters_side_by_side_in_a_vmap(model):
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in trained(other).values():
            parameter.mul_(2)
    parameters, buffers = stack_module_state([model, other])
    x = torch.randn(5, 16)
    out = vmap(lambda *state: functional_call(model, state, (x,)))(parameters, buffers)
    assert_close(out, torch.stack([model(x), other(x)]))


def test_tracers_see_a_program_of_their_own(model):
    x, y = torch.randn(4, 16), torch.randn(4, 16)
    expected = model(y)
    assert_close(make_fx(model)(x)(y), expected)
    for strict in (True, False):
        exported = torch.export.export(model.base_model.model, (x,), strict=strict).module()
        assert_close(exported(y), expected)
    assert_close(model(y), expected)


def test_work_space_lies_where_the_layer_is_whatever_the_default_device(model, monkeypatch):
    monkeypatch.setattr(dispatch, "cheapest", lambda *_, **__: "multiply")
    x = torch.randn(4, 16)
    expected = model(x)
    rotation.drop_work_space()
    with torch.device("meta"):
        assert_close(model(x), expected)
    assert_close(model(x), expected)
