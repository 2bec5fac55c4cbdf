"""The fine-tuning methods a recipe can name, each built from the same few knobs. Light to import."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorma.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from peft import PeftConfig

    from lorma.training.recipe import AdapterSpec


@dataclass(frozen=True)
class Method:
    """A way to fine-tune.

    Attributes:
        name: what recipes and tables call it.
        equation: the adapted weight.
        parameters: trainable numbers for one d × k weight.
        source: where it was published.
        build: from the adapter section of a recipe and PEFT's task type to a PEFT configuration; None trains the
            whole model.
    """

    name: str
    equation: str
    parameters: str
    source: str
    build: Callable[[AdapterSpec, str], PeftConfig] | None


def _shared(adapter: AdapterSpec, task_type: str) -> dict[str, Any]:
    return {
        "r": adapter.r,
        "target_modules": adapter.target_modules,
        "modules_to_save": adapter.modules_to_save,
        "task_type": task_type,
    }


def _lora(adapter: AdapterSpec, task_type: str) -> PeftConfig:
    from peft import LoraConfig

    alpha: Any = adapter.alpha or adapter.r
    return LoraConfig(lora_alpha=alpha, lora_dropout=adapter.dropout, **_shared(adapter, task_type))


def _lorma(**fixed: Any) -> Callable[[AdapterSpec, str], PeftConfig]:
    def build(adapter: AdapterSpec, task_type: str) -> PeftConfig:
        from lorma.tuners import LormaConfig

        alpha = adapter.alpha or adapter.r
        return LormaConfig(lorma_alpha=alpha, lorma_dropout=adapter.dropout, **_shared(adapter, task_type), **fixed)

    return build


LORMA_PAPER = "arXiv 2506.07621"
METHODS = {
    method.name: method
    for method in (
        Method("full", "W trained whole", "d·k", "—", None),
        Method("lora", "W0 + s·BA", "r·(d + k)", "arXiv 2106.09685", _lora),
        Method("lorma-plus", "(I + s·BA)·W0", "2·r·d", f"{LORMA_PAPER}, eq. 8", _lorma(inflation="plus")),
        Method(
            "lorma-plus-post",
            "W0·(I + s·BA)",
            "2·r·k",
            f"{LORMA_PAPER}, Table 7",
            _lorma(inflation="plus", side="post"),
        ),
        Method("lorma-permutation", "s·Iπ(BA)·W0", "2·r·d", f"{LORMA_PAPER}, eq. 7", _lorma(inflation="permutation")),
        Method("lorma-none", "s·BA·W0", "2·r·d", f"{LORMA_PAPER}, eq. 6", _lorma(inflation="none")),
    )
}


def get_method(name: str) -> Method:
    """The method called ``name``.

    Raises:
        InputError: there is none; the message lists them and the nearest.
    """
    if name not in METHODS:
        raise InputError(f"method={name!r} is unknown; allowed: {', '.join(METHODS)}{did_you_mean(name, METHODS)}")
    return METHODS[name]
