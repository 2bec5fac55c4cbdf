"""Features of training: the start, the forward pass and its gradients, dropout."""

import torch
from torch import nn

from support import plain
from support.case import Case, distance, gradients, trained


def starts_as_the_base_model(case: Case):
    x, model = case.x(), case.started()
    base = case.base()(x)
    if case.starts_exactly:
        assert torch.equal(model(x), base)
    elif case.inflation == "permutation":
        case.check_close(model(x), base, 1e-12 if case.kind.dtype == torch.float64 else 1e-5)
    else:
        return _starts_as_a_projection(case, model)
    return None


def _starts_as_a_projection(case, model):
    for part, (A, B, s) in zip(case.kind.parts, case.adapter(model), strict=True):
        for M in plain.multipliers(A, B, s, case.inflation, part.widths(part.acting_side(case.side))):
            assert distance(M @ M, M) < 1e-5
            assert distance(M, M.T) < 1e-5
            assert abs(M.trace().item() - min(2, len(M))) < 1e-4
    return "projection"


def output_and_gradients(case: Case):
    model, x = case.adapted(), case.x()
    check_output_and_gradients(case, model, x)


def check_output_and_gradients(case, model, x):
    adapter = case.adapter(model)
    wanted = trained(adapter)
    if not case.kind.vocabulary:
        wanted.append(x.requires_grad_())
    got, expected = model(x), case.plain_output(x, adapter)
    case.check_differs(got, case.base()(x))
    case.check_close(got, expected)
    case.check_all_close(gradients(got, *wanted), gradients(expected, *wanted))


class Nothing(nn.Module):
    """Dropout of everything."""

    def forward(self, x):
        return torch.zeros_like(x)


def dropout(case: Case):
    model, x = case.adapted(**{case.dropout_name: 0.5}), case.x()
    expected = case.plain_output(x, case.adapter(model))
    model.train()
    case.check_differs(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))
    case.check_close(model(x), expected, case.eval_tolerance)
    for layer in case.layers(model):
        getattr(layer, case.dropout_name)["default"] = Nothing()
    with torch.no_grad():
        assert torch.equal(model(x), case.base().eval()(x))
