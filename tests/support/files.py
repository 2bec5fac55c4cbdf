"""Features of files and of models without memory."""

from tempfile import TemporaryDirectory

import torch
from peft import PeftModel
from torch.testing import assert_close

from lorma import hotswap_adapter, prepare_for_hotswap
from support.case import Case, trained


def saved_and_loaded(case: Case):
    _load(case)


def loaded_without_memory(case: Case):
    _load(case, low_cpu_mem_usage=True)


def _load(case, **options):
    model = case.adapted()
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(case.base(), folder, **options)
    assert case.same_settings(loaded, model)
    check_equal_outputs(case, loaded, model)


@torch.no_grad()
def check_equal_outputs(case, loaded, model):
    """Factors to the bit, outputs up to rounding: products add up in another order at another place in memory."""
    for mine, theirs in zip(trained(case.adapter(loaded)), trained(case.adapter(model)), strict=True):
        assert torch.equal(mine, theirs)
    assert_close(loaded.train()(case.x()), model(case.x()))


def hotswapped(case: Case):
    model, x = case.adapted(), case.x()
    prepare_for_hotswap(model, target_rank=4)
    case.check_close(model(x), case.adapted()(x))
    before = trained(case.adapter(model))
    other = case.adapted(r=1, lorma_alpha=1)
    with TemporaryDirectory() as folder:
        other.save_pretrained(folder)
        hotswap_adapter(model, folder)
    case.check_close(model(x), other(x))
    assert all(mine is old for mine, old in zip(trained(case.adapter(model)), before, strict=True))


def on_the_meta_device(case: Case):
    with torch.device("meta"):
        base = case.base()
    model = case.started(base)
    prefix = f"{case.marker.partition('_')[0]}_"
    adapter = {name: p for name, p in model.named_parameters() if prefix in name}
    assert all(p.is_meta for p in model.parameters())
    assert sum(p.numel() for p in adapter.values()) == case.parameters()
    assert all(p.requires_grad for p in adapter.values())
