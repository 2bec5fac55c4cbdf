"""Features of merging: into which weights, and how it is undone."""

import math

import pytest
import torch

from support.case import ADDITIONALLY, Case, distance, flat, quiet, trained


def merge(case: Case):
    """Without saying what to do with a quantised base."""
    _merged_equals_unmerged(case)


def _merged_equals_unmerged(case, **how):
    model, x = case.adapted(), case.x()
    expected = model(x)
    reports = model.merge_adapter(**how)
    assert [report.layer for report in reports] == [layer.layer_name for layer in case.layers(model)]
    case.check_close(model(x), expected)
    case.check_close(case.weight(model), flat(case.plain_weights(case.adapter(model))))
    return model, x, reports


def snapshot(case: Case):
    model, x = case.adapted(undo="snapshot"), case.x()
    expected, weight = model(x), case.weight(model)
    for _ in range(2):
        model.merge_adapter(quantized=case.quantized)
        assert not torch.equal(case.weight(model), weight)
        assert {report.error_bound for report in model.unmerge_adapter()} == {0}
        assert torch.equal(case.weight(model), weight)
        assert torch.equal(model(x), expected)
    model.eval()
    with torch.no_grad():  # bitsandbytes may store a weight in another way from here on
        expected = model(x)
        model.merge_adapter(quantized=case.quantized)
        case.check_close(model(x), expected, case.eval_tolerance)
        model.unmerge_adapter()
        assert torch.equal(model(x), expected)


def inverse(case: Case):
    model, x = case.adapted(), case.x()
    expected, weight = model(x), case.weight(model)
    reports = model.merge_adapter(undo="inverse", quantized=case.quantized)
    assert all(report.condition >= 1 for report in reports)
    case.check_close(model(x), expected)
    _undone_within_bound(case, model, weight)
    case.check_close(model(x), expected)
    model = case.with_two()
    with quiet(ADDITIONALLY):
        for name in ("default", "second"):
            model.base_model.merge_adapter([name], undo="inverse")
    _undone_within_bound(case, model, weight)


def _undone_within_bound(case, model, weight):
    bound = sum(report.error_bound for report in model.unmerge_adapter())
    away = (case.weight(model) - weight).norm().item()
    assert away <= bound < 1e-6 * weight.norm().item()


def refuse(case: Case):
    model, x = case.adapted(), case.x()
    expected = model(x)
    reports = model.merge_adapter(undo="refuse", quantized=case.quantized)
    assert {report.error_bound for report in reports} == {math.inf}
    with pytest.raises(ValueError, match="cannot be unmerged"):
        model.unmerge_adapter()
    case.check_close(model(x), expected)


def merge_and_unload(case: Case):
    model, x = case.adapted(), case.x()
    expected = model(x)
    how = {"quantized": case.quantized} if case.quantized else {}
    merged = model.merge_and_unload(safe_merge=True, **how)
    case.check_close(merged(x), expected)
    assert not any("lorma" in type(module).__module__ for module in merged.modules())
    assert not any(case.marker.partition("_")[0] in name for name in merged.state_dict())
    unloaded = case.adapted().unload()
    assert torch.equal(unloaded(x), case.base()(x))
    assert not any("lorma" in type(module).__module__ for module in unloaded.modules())


def safe_merge(case: Case):
    model, x = case.adapted(), case.x()
    factor = trained(case.adapter(model))[-1].view(-1)
    expected, weight, kept = model(x), case.weight(model), factor[0].item()
    factor.data[0] = math.nan
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True, quantized=case.quantized)
    factor.data[0] = kept
    assert torch.equal(case.weight(model), weight)
    assert torch.equal(model(x), expected)
    model.merge_adapter(safe_merge=True, quantized=case.quantized)
    case.check_close(model(x), expected)


def requantize(case: Case):
    model, x = case.adapted(), case.x()
    expected, weight, (layer,) = model(x), case.weight(model), case.layers(model)
    exact = weight + layer.get_delta_weight("default").flatten()
    storage = type(layer.get_base_layer().weight)
    (report,) = model.merge_adapter(quantized="requantize")
    assert type(layer.get_base_layer().weight) is storage
    error = distance(case.weight(model), exact)
    assert 0 < error < 0.2
    assert math.isclose(report.requantization_error, error, rel_tol=1e-2)
    assert distance(model(x), expected) < 2 * error + case.eval_tolerance
    model.unmerge_adapter()
    assert torch.equal(case.weight(model), weight)
    assert torch.equal(model(x), expected)
    _requantized_one_by_one(case)


def _requantized_one_by_one(case):
    """Each merge starts from the original weight, so rounding does not add up."""
    together, one_by_one, x = case.with_two(), case.with_two(), case.x()
    before = case.weight(together)
    together.base_model.merge_adapter(["default", "second"], quantized="requantize")
    with quiet(ADDITIONALLY):
        for name in ("default", "second"):
            one_by_one.base_model.merge_adapter([name], quantized="requantize")
    assert torch.equal(case.weight(one_by_one), case.weight(together))
    assert torch.equal(one_by_one(x), together(x))
    one_by_one.unmerge_adapter()
    assert torch.equal(case.weight(one_by_one), before)


def dequantize(case: Case):
    model, x, (report,) = _merged_equals_unmerged(case, quantized="dequantize")
    assert report.requantization_error < case.kind.tolerance
    merged = case.adapted().merge_and_unload(quantized="dequantize")
    assert type(merged.layer) is torch.nn.Linear
    assert torch.equal(merged(x), model(x))
