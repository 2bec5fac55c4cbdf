"""Which way is chosen, when a folded weight is used again, and which layers may be computed past their module."""

import copy
import pickle

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from lorma import LormaConfig, functional, kernels
from lorma.kernels import circular, dispatch
from lorma.kernels.costs import RATES, Rates, Shape, cheapest, costs, kind_of, rates
from lorma.kernels.form import Form
from lorma.tuners.plain import plain_weight

CPU = RATES["cpu", torch.float32]


@pytest.fixture
def taken(monkeypatch):
    """Names of the forms that are run."""
    names = []

    def noting(form: Form, *arguments):
        names.append(form.name)
        return run(form, *arguments)

    run = dispatch.run
    monkeypatch.setattr(dispatch, "run", noting)
    return names


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (Shape(1, 1024, 1024, 8), "correlate"),
        (Shape(16, 4096, 4096, 16), "correlate"),
        (Shape(4096, 768, 768, 8), "fold"),
        (Shape(8192, 1024, 1024, 8), "fold"),
        (Shape(4096, 256, 4096, 64), "multiply"),
        (Shape(4096, 384, 0, 8), "multiply"),
    ],
    ids=str,
)
def test_the_cheapest_way(shape, expected):
    assert cheapest(shape, CPU, training=True) == expected


def test_costs_follow_the_counts():
    shape, rate = Shape(1000, 100, 300, 4), Rates(1.0, element=0.0, transform=0.0, mixed_transform=0.0, call=0.0)
    frozen = 2 * 1000 * 100 * 300
    form = 4 * 100 * 100
    found = costs(shape, rate, training=True)
    assert found["multiply"] - 3 * form == pytest.approx(1.5 * 100 / 300 * frozen)
    assert found["fold"] - 3 * form == pytest.approx((0.5 + 100 / 1000) * frozen)
    assert "fold" not in costs(Shape(1000, 100, 0, 4), rate, training=True)


def test_rates_that_nobody_measured_are_those_nearest_to_it():
    assert rates("cpu", torch.float64) == CPU
    assert rates("a new device", torch.bfloat16) == RATES["cpu", torch.bfloat16]
    assert kind_of("cuda") == "cuda"
    assert kind_of("cpu") in {kind for kind, _ in RATES}


def layer(inflation="permutation", side="pre", base=None, **options):
    """A LoRMA layer on 24 × 16, its factors moved off their start."""
    torch.manual_seed(0)
    model = get_peft_model(
        nn.ModuleDict({"p": base or nn.Linear(16, 24)}),
        LormaConfig(r=3, lorma_alpha=4, target_modules=["p"], inflation=inflation, side=side, **options),
    )
    adapted = model.base_model.model["p"]
    with torch.no_grad():
        for factor in (adapted.lorma_A["default"], adapted.lorma_B["default"]):
            factor.add_(0.1 * torch.randn_like(factor))
    return adapted.train()


def definition(adapted, x):
    base = adapted.get_base_layer()
    A, B = adapted.lorma_A["default"], adapted.lorma_B["default"]
    M = functional.multiplier(A, B, adapted.scaling["default"], adapted.inflation["default"])
    W = M @ base.weight if adapted.side["default"] == "pre" else base.weight @ M
    return nn.functional.linear(x, W, base.bias)


@pytest.fixture
def folding(monkeypatch):
    monkeypatch.setattr(dispatch, "cheapest", lambda shape, *_, **__: "fold" if shape.m else "multiply")


def folded(adapted):
    held = adapted._folded._cached
    return None if held is None else held[0]


def micro_step(adapted, x):
    adapted(x).square().mean().backward()


CHANGES = {
    "an optimiser's step": lambda a: torch.optim.AdamW(a.parameters(), lr=0.1).step(),
    "a fused optimiser's step": lambda a: torch.optim.AdamW(a.parameters(), lr=0.1, fused=True).step(),
    "a write in place": lambda a: a.lorma_B["default"].data.add_(0.1),
    "a write past autograd": lambda a: a.lorma_A["default"].detach().numpy().__iadd__(0.1),
    "a new factor": lambda a: a.lorma_A.__setitem__("default", nn.Parameter(2 * a.lorma_A["default"].detach())),
    "another scaling": lambda a: a.set_scaling("default", 0.5),
    "a change of the base weight": lambda a: a.get_base_layer().weight.mul_(2),
    "a new base weight": lambda a: setattr(a.get_base_layer(), "weight", nn.Parameter(torch.ones(24, 16), False)),
}


@pytest.mark.usefixtures("folding")
@pytest.mark.parametrize("side", ["pre", "post"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_folded_weight_is_used_again_until_something_changes(change, side):
    adapted, x = layer(side=side), torch.randn(5, 16)
    micro_step(adapted, x)
    first = folded(adapted)
    assert first is not None
    micro_step(adapted, 2 * x)
    assert folded(adapted) is first
    CHANGES[change](adapted)
    assert_close(adapted(x), definition(adapted, x))
    assert folded(adapted) is not first


@pytest.mark.usefixtures("folding")
@pytest.mark.parametrize("side", ["pre", "post"])
def test_accumulated_gradients_are_those_of_one_batch(side):
    adapted, x = layer(side=side), torch.randn(8, 16)
    for rows in x.split(2):
        adapted(rows).square().sum().backward()
    found = [adapted.lorma_A["default"].grad, adapted.lorma_B["default"].grad]
    factors = [adapted.lorma_A["default"], adapted.lorma_B["default"]]
    assert_close(found, list(torch.autograd.grad(definition(adapted, x).square().sum(), factors)))


@pytest.mark.usefixtures("folding")
def test_a_folded_weight_is_not_kept_where_it_is_no_use():
    adapted, x = layer(), torch.randn(5, 16)
    with torch.no_grad():
        adapted(x)
    assert folded(adapted) is None
    micro_step(adapted, x)
    assert folded(copy.deepcopy(adapted)) is None
    assert folded(pickle.loads(pickle.dumps(adapted))) is None
    adapted.eval()
    assert folded(adapted) is None
    adapted.train()
    micro_step(adapted, x)
    adapted.to(torch.float32)
    assert folded(adapted) is None
    micro_step(adapted, x)
    adapted.merge()
    assert folded(adapted) is None
    adapted.unmerge()
    assert_close(adapted(x), definition(adapted, x))


def test_what_is_held_off_the_cpu_is_gone_with_an_optimisers_step():
    """Where A and B are not compared with copies: on the meta device as on a GPU."""
    weight, A, B = (torch.empty(4, 4, device="meta") for _ in range(3))
    held, result = kernels.TensorCache(), torch.ones(1)
    held.keep(result, weight, A, B, 1.0)
    assert held.look_up(weight, A, B, 1.0) is result
    trained = nn.Parameter(torch.ones(1))
    trained.sum().backward()
    torch.optim.SGD([trained]).step()
    assert held.look_up(weight, A, B, 1.0) is None


def test_what_is_held_depends_on_a_scaling_that_is_a_tensor():
    weight, A, B, scaling = (torch.ones(4, 4) for _ in range(4))
    held = kernels.TensorCache()
    held.keep(weight, weight, A, B, scaling)
    assert held.look_up(weight, A, B, scaling) is weight
    scaling.fill_(2)
    assert held.look_up(weight, A, B, scaling) is None


@pytest.mark.usefixtures("folding")
def test_no_folded_weight_is_held_in_a_process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        adapted, x = layer(), torch.randn(5, 16)
        micro_step(adapted, x)
        assert folded(adapted) is None
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("inflation", ["plus", "permutation"])
def test_a_convolutions_output_lies_in_memory_as_the_base_layers(inflation):
    model = nn.ModuleDict({"p": nn.Conv2d(3, 8, 3)})
    model = get_peft_model(model, LormaConfig(target_modules=["p"], inflation=inflation))
    adapted = model.base_model.model["p"].eval()
    for x in (torch.randn(2, 3, 9, 9), torch.randn(2, 3, 9, 9).contiguous(memory_format=torch.channels_last)):
        assert adapted(x).stride() == adapted.get_base_layer()(x).stride()


@pytest.mark.usefixtures("folding")
def test_a_folded_weight_of_a_transposed_base_is_used_again():
    base = Conv1D(24, 16).requires_grad_(False)
    adapted, x = layer(base=base), torch.randn(5, 16)
    micro_step(adapted, x)
    first = folded(adapted)
    micro_step(adapted, x)
    assert folded(adapted) is first


@pytest.mark.usefixtures("folding")
@pytest.mark.parametrize("why", ["a trained base weight", "a scaling that is a tensor"])
def test_a_folded_weight_that_could_not_be_used_again_is_not_held(why):
    adapted, x = layer(), torch.randn(5, 16)
    if why == "a trained base weight":
        adapted.get_base_layer().weight.requires_grad_()
    else:
        adapted.scaling["default"] = torch.tensor(4 / 3)
    micro_step(adapted, x)
    assert folded(adapted) is None
    assert_close(adapted(x), definition(adapted, x))


def test_checkpointed_and_not_in_one_graph():
    """The way is chosen by sizes alone, so what a checkpoint recomputes is what it computed."""
    adapted = layer(base=nn.Linear(256, 256))
    x, y = torch.randn(183, 256, requires_grad=True), torch.randn(9000, 256)
    loss = checkpoint(adapted, x, use_reentrant=False).square().sum() + adapted(y).square().sum()
    factors = [adapted.lorma_A["default"], adapted.lorma_B["default"]]
    expected = definition(adapted, x).square().sum() + definition(adapted, y).square().sum()
    found = torch.autograd.grad(loss, factors)
    assert_close(found, torch.autograd.grad(expected, factors), atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("inflation", ["plus", "permutation"])
def test_one_graph_for_a_dynamic_number_of_tokens(inflation, grad):
    torch._dynamo.reset()
    adapted = layer(inflation)
    compiled = torch.compile(adapted, backend="eager", fullgraph=True, dynamic=True)
    with torch.set_grad_enabled(grad):
        for tokens in (3, 40, 2000):
            x = torch.randn(tokens, 16)
            assert_close(compiled(x), definition(adapted, x), atol=1e-5, rtol=1e-5)


def test_the_start_in_bfloat16_is_the_base_layer_wherever_the_formula_takes_over():
    torch.manual_seed(0)
    base = nn.Linear(256, 256, bias=False).bfloat16()
    config = LormaConfig(r=8, lorma_alpha=12, target_modules=["p"], inflation="permutation")
    adapted = get_peft_model(nn.ModuleDict({"p": base}), config).base_model.model["p"]
    x = torch.randn(64, 256).bfloat16()
    with torch.no_grad():
        expected = base(x)
        assert_close(adapted(x), expected, atol=1e-6, rtol=0)
        torch._dynamo.reset()
        assert_close(torch.compile(adapted, backend="eager")(x), expected, atol=1e-6, rtol=0)
        assert_close(torch.func.vmap(adapted)(x[:, None])[:, 0], expected, atol=1e-6, rtol=0)


def test_autocast_rounds_the_update_of_an_embedding_and_not_the_embedding():
    model = nn.ModuleDict({"p": nn.Embedding(8, 64)})
    adapted = get_peft_model(model, LormaConfig(target_modules=["p"])).base_model.model["p"]
    tokens = torch.arange(8)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(adapted(tokens), adapted.get_base_layer()(tokens))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_the_input_is_kept_whatever_its_dtype(dtype, taken):
    with torch.autocast("cpu", torch.bfloat16):
        layer("plus")(torch.randn(5, 16, dtype=dtype))
    assert taken == ["low_rank_linear"]


@pytest.mark.usefixtures("folding")
def test_a_low_precision_base_is_never_folded(taken):
    adapted = layer(base=nn.Linear(16, 24).bfloat16())
    micro_step(adapted, torch.randn(5, 16).bfloat16())
    assert taken == ["rotate"]
    taken.clear()
    with torch.autocast("cpu", torch.bfloat16):
        layer()(torch.randn(5, 16))
    assert taken == ["rotate"]


EXPECTED = {
    ("plus", "pre"): "low_rank_linear",
    ("plus", "post"): "low_rank",
    ("permutation", "pre"): "fold_pre",
    ("permutation", "post"): "fold_post",
}


@pytest.mark.parametrize(("inflation", "side"), EXPECTED)
def test_a_plain_layer(inflation, side, taken):
    adapted, x = layer(inflation, side), torch.randn(2, 5, 16)
    assert_close(adapted(x), definition(adapted, x))
    assert taken == [EXPECTED[inflation, side]]


class Special(nn.Linear):
    """A linear layer of somebody else's."""


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def hooked(attach):
    calls = []
    base = nn.Linear(16, 24)
    attach(base, lambda *_: calls.append(1))
    return base, calls


@pytest.mark.parametrize("attach", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize("inflation", ["plus", "permutation"])
def test_a_hook_on_the_base_layer_is_called(attach, inflation):
    base, calls = hooked(getattr(nn.Linear, attach))
    adapted, x = layer(inflation, base=base), torch.randn(5, 16)
    assert_close(adapted(x), definition(adapted, x))
    assert calls == [1]


def test_a_hook_on_every_module_sees_the_base_layer():
    adapted, seen = layer("plus"), []
    handle = register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        adapted(torch.randn(5, 16))
    finally:
        handle.remove()
    assert adapted.get_base_layer() in seen


def test_where_the_weight_is_not_what_the_module_computes():
    plain = nn.Linear(16, 24)
    assert plain_weight(plain) is plain.weight
    assert plain_weight(Special(16, 24)) is None
    assert plain_weight(parametrize.register_parametrization(nn.Linear(16, 24), "weight", Doubled())) is None
    patched = nn.Linear(16, 24)
    patched.forward = lambda x: x
    assert plain_weight(patched) is None
    assert plain_weight(nn.Linear(16, 24).to(torch.float8_e4m3fn)) is None


@pytest.mark.parametrize("inflation", ["plus", "permutation"])
def test_dropout_several_adapters_and_dora_go_the_general_way(inflation, taken):
    adapted, x = layer(inflation, lorma_dropout=0.5), torch.randn(5, 16)
    adapted(x)
    assert taken == []
    adapted.eval()
    assert_close(adapted(x), definition(adapted, x))
    assert len(taken) == 1
    config = LormaConfig(r=3, target_modules=["p"], inflation=inflation)
    adapted.update_layer("second", config=config, r=3, lorma_alpha=3)
    adapted.set_adapter(["default", "second"])
    assert_close(adapted(x), definition(adapted, x))  # the second is at its start
    assert len(taken) == 1
    if inflation == "plus":
        dora = layer(inflation, use_dora=True)
        dora(x)
        assert "default" in dora.lorma_magnitude_vector
        assert len(taken) == 1


def test_factors_of_another_dtype_and_the_naive_form_take_the_formula():
    x, A, B = torch.randn(4, 6).half(), torch.randn(2, 6), torch.randn(6, 2)
    out = kernels.multiply(x, A, B, 0.5, "plus")
    assert out.dtype == torch.float16
    assert_close(out, functional.apply_multiplier(x.float(), A, B, 0.5, "plus").half())
    assert_close(kernels.multiply(x.float(), A, B, 0.5, "none"), 0.5 * x.float() @ A.T @ B.T)
    assert kernels.multiplied_linear(x.float(), torch.eye(6), None, A, B, 0.5, "none", "pre") is None


@pytest.mark.parametrize("chunk", [2**18, 1], ids="chunk{}".format)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("inflation", ["plus", "permutation"])
def test_a_multiplier_for_each_row(inflation, bias, chunk, monkeypatch):
    monkeypatch.setitem(circular._CHUNK, "cpu", chunk)
    x, A, B = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((5, 3, 7), (3, 2, 7), (3, 7, 2)))
    shift = torch.randn(7, dtype=torch.float64) if bias else None
    which = torch.tensor([2, 0, 0, 1, 2])
    out = kernels.multiply_rows(x, A, B, which, inflation, shift)
    rows = zip(x, which, strict=True)
    expected = torch.stack([kernels.multiply(row, A[i], B[i], 1.0, inflation, shift) for row, i in rows])
    assert_close(out, expected)
    assert_close(torch.autograd.grad(out.sum(), (x, A, B)), torch.autograd.grad(expected.sum(), (x, A, B)))
    narrow = kernels.multiply_rows(x.bfloat16(), A.float(), B.float(), which, inflation)
    assert narrow.dtype == torch.bfloat16
    assert_close(narrow.double(), kernels.multiply_rows(x, A, B, which, inflation), atol=0.1, rtol=0.05)


def test_rows_are_taken_together_where_that_is_cheaper():
    A, together = torch.zeros(8, 1024), kernels.rows_belong_together
    assert together(64, 16, 1, A, "permutation")
    assert not together(64, 16, 4096, torch.zeros(64, 256), "permutation")
    assert together(64, 64, 4096, A, "plus")
    assert not together(64, 8, 1, A, "plus")
    assert together(64, 8, 1, A.to("meta"), "plus")
    assert not together(64, 64, 1, A, "none")


@pytest.mark.parametrize("together", [True, False], ids=["together", "one-by-one"])
@pytest.mark.parametrize("side", ["pre", "post"])
def test_a_mixed_batch_takes_rows_together_or_one_adapter_after_the_other(side, together, monkeypatch):
    model = nn.ModuleDict({"p": nn.Linear(16, 24)})
    model = get_peft_model(model, LormaConfig(r=3, target_modules=["p"], inflation="permutation", side=side))
    for name, inflation in (("other", "permutation"), ("plus", "plus"), ("plus2", "plus")):
        model.add_adapter(name, LormaConfig(r=3, target_modules=["p"], inflation=inflation, side=side))
    adapted, calls = model.base_model.model["p"].eval(), []
    with torch.no_grad():
        for factor in (*adapted.lorma_A.values(), *adapted.lorma_B.values()):
            factor.add_(0.1 * torch.randn_like(factor))
    rows = kernels.multiply_rows
    monkeypatch.setattr(kernels, "multiply_rows", lambda *a: calls.append(a[4]) or rows(*a))
    monkeypatch.setattr(kernels, "rows_belong_together", lambda *a: together)
    x, names = torch.randn(7, 16), ["plus", "default", "__base__", "other", "plus2", "default", "other"]
    out = adapted(x, adapter_names=names)
    assert sorted(calls) == (["permutation", "plus"] if together else [])
    for row, name, found in zip(x, names, out, strict=True):
        if name == "__base__":
            assert_close(found, adapted.get_base_layer()(row))
        else:
            adapted.set_adapter(name)
            assert_close(found, adapted(row[None])[0])
