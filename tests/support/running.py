"""Features of running: low precision, autocast, compilation, gradient checkpointing."""

import torch
from torch.utils.checkpoint import checkpoint

from support.case import Case, gradients, quiet, trained
from support.kinds import LOOSE

INSTANTIATED = ".*should not be instantiated"
"""What torch says about itself when it traces a bitsandbytes layer."""


def in_bfloat16(case: Case):
    _low_precision(case, torch.bfloat16)


def in_float16(case: Case):
    _low_precision(case, torch.float16)


def _low_precision(case, dtype):
    base, x = case.base(dtype), case.x(dtype)
    output_dtype = base(x).dtype
    model = case.adapted(case.base(dtype))
    got = model(x)
    assert got.dtype == output_dtype == dtype
    _check_close_to_exact(case, model, got, x)
    weight = case.weight(model)
    model.merge_adapter(quantized=case.quantized)
    merged = model(x)
    assert merged.dtype == dtype
    case.check_close(merged, got, LOOSE)
    model.unmerge_adapter()
    assert torch.equal(case.weight(model), weight)
    assert torch.equal(model(x), got)


def _check_close_to_exact(case, model, got, x):
    adapter = case.adapter(model)
    exact = [
        tuple(f.detach().to(case.kind.dtype).requires_grad_() if isinstance(f, torch.Tensor) else f for f in factors)
        for factors in adapter
    ]
    exact_x = x.to(case.kind.dtype) if x.is_floating_point() else x
    expected = case.plain_output(exact_x, exact)
    case.check_close(got, expected, LOOSE)
    mine = gradients(got, *trained(adapter))
    assert {gradient.dtype for gradient in mine} == {torch.float32}
    case.check_all_close(mine, gradients(expected, *trained(exact)), LOOSE)


def autocast(case: Case):
    x = case.x(torch.float32)
    model, base = case.adapted(case.base(torch.float32)), case.base(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got, plain = model(x), base(x)
    assert got.dtype == plain.dtype
    _check_close_to_exact(case, model, got, x)


def compiled(case: Case):
    model, x = case.adapted(), case.x()
    torch._dynamo.reset()
    expected = model(x)
    with quiet(INSTANTIATED):
        got = torch.compile(model, backend="eager", fullgraph=True)(x)
    case.check_close(got, expected)
    wanted = trained(case.adapter(model))
    case.check_all_close(gradients(got, *wanted), gradients(expected, *wanted))


def checkpointed(case: Case):
    _checkpointed(case, False)


def checkpointed_reentrant(case: Case):
    _checkpointed(case, True)


def _checkpointed(case, use_reentrant):
    model, x = case.adapted(), case.x()
    wanted = trained(case.adapter(model))
    expected = model(x)
    before = gradients(expected, *wanted)
    ones = torch.ones(1, requires_grad=True)  # the reentrant variant looks for an input with a gradient

    def run(x, ones):
        return model(x) * ones.to(expected.dtype)

    got = checkpoint(run, x, ones, use_reentrant=use_reentrant)
    case.check_close(got, expected)
    seed = torch.randn(got.shape, generator=torch.Generator().manual_seed(4)).to(got.dtype)
    got.backward(seed)
    case.check_all_close([factor.grad for factor in wanted], before)
