"""SVFT: the singular values of W0, and sparse entries beside them, are trained. It has no alpha."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorma.methods.base import Method, register
from lorma.methods.peft import targeting_kwargs

if TYPE_CHECKING:
    from peft import PeftConfig

    from lorma.schema import AdapterSpec


def _svft(name: str, parameters: str, knob: str | None, pattern: str) -> None:
    def build(adapter: AdapterSpec, task_type: str) -> PeftConfig:
        from lorma.methods.svft.tuner import SvftConfig

        where = targeting_kwargs(adapter, task_type)
        return SvftConfig(r=adapter.r, pattern=pattern, svft_dropout=adapter.dropout, **where)

    equation = f"U(Σ + M)Vᵀ, M {'diagonal' if pattern == 'plain' else 'sparse'}"
    register(Method(name, equation, parameters, "SVFT, arXiv 2405.19597", build, knob))


_svft("svft-plain", "n = min(d, k)", None, "plain")

_svft("svft-random", "(2r + 1)·n − r·(r + 1)", "r bands' worth of entries on each side", "random")
