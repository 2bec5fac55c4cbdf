"""LoRMA in all its forms."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorma.methods.base import Method, register
from lorma.methods.peft import targeting_kwargs

if TYPE_CHECKING:
    from peft import PeftConfig

    from lorma.schema import AdapterSpec

PAPER = "LoRMA, arXiv 2506.07621"


def lorma_config(adapter: AdapterSpec, task_type: str, **fixed: Any) -> PeftConfig:
    """LoRMA with the knobs that all methods share."""
    from lorma.methods.lorma.tuner import LormaConfig

    alpha = adapter.alpha or adapter.r
    targets = targeting_kwargs(adapter, task_type)
    return LormaConfig(r=adapter.r, lorma_alpha=alpha, lorma_dropout=adapter.dropout, **targets, **fixed)


def _lorma(name: str, equation: str, parameters: str, where: str, **fixed: Any) -> None:
    def build(adapter: AdapterSpec, task_type: str) -> PeftConfig:
        return lorma_config(adapter, task_type, **fixed)

    register(Method(name, equation, parameters, where, build))


_lorma("lorma-none", "s·BA·W0", "2·r·d", f"{PAPER}, eq. 6", inflation="none")
_lorma("lorma-plus", "(I + s·BA)·W0", "2·r·d", f"{PAPER}, eq. 8")
_lorma("lorma-plus-post", "W0·(I + s·BA)", "2·r·k", f"{PAPER}, Table 7", side="post")
_lorma("lorma-plus-auto", "plus on the narrower side", "2·r·min(d, k)", f"{PAPER}, eq. 8", side="auto")
_lorma("lorma-permutation", "s·Iπ(BA)·W0", "2·r·d", f"{PAPER}, eq. 7", inflation="permutation")
_lorma("lorma-permutation-post", "W0·s·Iπ(BA)", "2·r·k", f"{PAPER}, eq. 7", inflation="permutation", side="post")
_lorma("dorma", "m ∘ (I + s·BA)·W0 / ‖(I + s·BA)·W0‖", "2·r·d + d", "lorma-plus with DoRA's magnitudes", use_dora=True)
