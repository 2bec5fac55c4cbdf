"""Features of several adapters: their order, mixed batches, combinations, switching them off and taking them out."""

import copy

import torch

from support.case import ADDITIONALLY, Case, quiet, scaled

BOTH = ["default", "second"]


def order(case: Case):
    model, x = case.with_two(), case.x()
    outputs = []
    for names in (BOTH, BOTH[::-1]):
        model.base_model.set_adapter(names)
        together = model(x)
        case.check_close(together, case.plain_output(x, *(case.adapter(model, name) for name in names)))
        at_once = copy.deepcopy(model).base_model
        at_once.merge_adapter(names, quantized=case.quantized)
        case.check_close(at_once(x), together)
        one_by_one = copy.deepcopy(model).base_model
        with quiet(ADDITIONALLY):
            for name in names:
                one_by_one.merge_adapter([name], quantized=case.quantized)
        assert torch.equal(one_by_one(x), at_once(x))
        one_by_one.unmerge_adapter()
        assert torch.equal(case.weight(one_by_one), case.weight(model))
        outputs.append(together)
    if case.ordered:
        case.check_differs(*outputs)


@torch.no_grad()
def mixed_batch(case: Case, **config):
    model, x = case.with_two(**config).eval(), case.x()
    names = ["second", "__base__", "default"]
    assert len(x) == len(names)
    single = {"__base__": case.base().eval()(x)}
    for name in BOTH:
        model.set_adapter(name)
        single[name] = model(x)
    expected = torch.stack([single[name][row] for row, name in enumerate(names)])
    case.check_close(model(x, adapter_names=names), expected, case.eval_tolerance)
    case.check_close(model(x, adapter_names=["__base__"] * 3), single["__base__"], case.eval_tolerance)


def composed(case: Case):
    model, x = case.with_two(), case.x()
    model.base_model.set_adapter(BOTH)
    expected = model(x)
    model.base_model.add_weighted_adapter(BOTH, [1.0, 1.0], "joined", "compose")
    model.set_adapter("joined")
    assert all(layer.r["joined"] == 5 for layer in case.layers(model))
    case.check_close(model(x), expected)
    model.base_model.add_weighted_adapter(BOTH, [0.5, -0.7], "weighted", "compose")
    model.set_adapter("weighted")
    first, second = (case.adapter(model, name) for name in BOTH)
    case.check_close(model(x), case.plain_output(x, scaled(first, 0.5), scaled(second, -0.7)))


def linearly_combined(case: Case):
    model, x = case.with_two(r=2), case.x()
    model.base_model.add_weighted_adapter(BOTH, [0.5, -0.7], "mean", "linear")
    model.set_adapter("mean")
    combined = []
    for (A1, B1, s1), (A2, B2, s2) in zip(*(case.adapter(model, name) for name in BOTH), strict=True):
        first, second = (0.5 * s1) ** 0.5, (0.7 * s2) ** 0.5
        combined.append((first * A1 + second * A2, first * B1 - second * B2, 1.0))
    case.check_close(model(x), case.plain_output(x, combined))


def deleted(case: Case):
    model, x = case.with_two(), case.x()
    expected = model(x)
    model.delete_adapter("second")
    assert list(model.peft_config) == ["default"]
    assert not any("second" in name for name in model.state_dict())
    for layer in case.layers(model):
        for held in (*layer.adapter_layer_names, *layer.other_param_names):
            assert "second" not in getattr(layer, held)
    assert torch.equal(model(x), expected)


def disabled(case: Case):
    model, x = case.adapted(), case.x()
    base, expected = case.base()(x), model(x)
    with model.disable_adapter():
        assert torch.equal(model(x), base)
    assert torch.equal(model(x), expected)
    model.merge_adapter(quantized=case.quantized)
    with model.disable_adapter():
        assert torch.equal(model(x), base)
    assert torch.equal(model(x), expected)
