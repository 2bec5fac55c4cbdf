"""Features of DoRA on top of LoRMA₊ (``use_dora=True``)."""

import copy
from tempfile import TemporaryDirectory

import torch
from peft import PeftModel

from lorma import hotswap_adapter, prepare_for_hotswap
from support.adapters import BOTH, mixed_batch
from support.case import Case, flat, gradients, quiet, trained
from support.files import check_equal_outputs
from support.running import INSTANTIATED
from support.training import check_output_and_gradients

NOT_A_LEAF = "The .grad attribute of a Tensor that is not a leaf"
"""What torch says about itself when it continues after a graph break."""


def dora(case: Case):
    x, started = case.x(), case.started(use_dora=True)
    case.check_close(started(x), case.base()(x), 1e-12 if case.kind.dtype == torch.float64 else 1e-5)
    check_output_and_gradients(case, case.adapted(use_dora=True), x)


def dora_merged(case: Case):
    model, x = case.adapted(use_dora=True), case.x()
    expected, before = model(x), case.weight(model)
    model.merge_adapter(quantized=case.quantized)
    case.check_close(model(x), expected)
    case.check_close(case.weight(model), flat(case.plain_weights(case.adapter(model))))
    model.unmerge_adapter()
    assert torch.equal(case.weight(model), before)
    assert torch.equal(model(x), expected)


def dora_inverse(case: Case):
    case.adapted(use_dora=True).merge_adapter(undo="inverse", quantized=case.quantized)


def dora_saved(case: Case):
    model = case.adapted(use_dora=True)
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for low_cpu_mem_usage in (False, True):
            loaded = PeftModel.from_pretrained(case.base(), folder, low_cpu_mem_usage=low_cpu_mem_usage)
            check_equal_outputs(case, loaded, model)


def dora_two_at_once(case: Case):
    model, x = case.with_two(use_dora=True), case.x()
    for names in (BOTH, BOTH[::-1]):
        model.base_model.set_adapter(names)
        together = model(x)
        merged = copy.deepcopy(model).base_model
        merged.merge_adapter(names, quantized=case.quantized)
        case.check_close(merged(x), together)
        merged.unmerge_adapter()
        assert torch.equal(merged(x), together)


def dora_mixed_batch(case: Case):
    mixed_batch(case, use_dora=True)


def dora_combined(case: Case):
    case.with_two(use_dora=True).base_model.add_weighted_adapter(BOTH, [1.0, 1.0], "joined", "compose")


def dora_hotswapped(case: Case):
    model, x = case.adapted(use_dora=True), case.x()
    prepare_for_hotswap(model, target_rank=4)
    case.check_close(model(x), case.adapted(use_dora=True)(x))
    model.eval()
    with torch.no_grad():
        model(x)  # keeps the norms of the first adapter
    other = case.adapted(r=1, lorma_alpha=1, use_dora=True)
    with TemporaryDirectory() as folder:
        other.save_pretrained(folder)
        hotswap_adapter(model, folder)
    with torch.no_grad():
        case.check_close(model(x), other.eval()(x), case.eval_tolerance)


def dora_compiled(case: Case):
    model, x = case.adapted(use_dora=True), case.x()
    breaks = case.kind.name.startswith("bitsandbytes")
    torch._dynamo.reset()
    expected, wanted = model(x), trained(case.adapter(model))
    with quiet(INSTANTIATED, NOT_A_LEAF):
        got = torch.compile(model, backend="eager", fullgraph=not breaks)(x)
    case.check_close(got, expected)
    case.check_all_close(gradients(got, *wanted), gradients(expected, *wanted))
    return "graph-break" if breaks else None
