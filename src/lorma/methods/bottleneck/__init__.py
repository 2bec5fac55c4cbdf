"""Bottleneck adapters after a layer or a block. They have no alpha."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorma.methods.base import Method, register
from lorma.methods.peft import targeting_kwargs

if TYPE_CHECKING:
    from peft import PeftConfig

    from lorma.schema import AdapterSpec


HOULSBY = "Houlsby et al., arXiv 1902.00751"
PFEIFFER = "Pfeiffer et al., arXiv 2005.00247"


def _bottleneck(placement: str, source: str, activation: str) -> None:
    def build(adapter: AdapterSpec, task_type: str) -> PeftConfig:
        from lorma.methods.bottleneck.tuner import BottleneckConfig

        fixed: dict[str, Any] = {"placement": placement, "activation": activation}
        return BottleneckConfig(
            r=adapter.r, bottleneck_dropout=adapter.dropout, **fixed, **targeting_kwargs(adapter, task_type)
        )

    equation = "h + up(f(down(h))), h = W0·x + b"
    parameters = "2·r·d + r + d"
    register(Method(f"adapter-{placement}", equation, parameters, source, build, "r, the width", own_targets=True))


_bottleneck("houlsby", HOULSBY, "gelu")

_bottleneck("pfeiffer", PFEIFFER, "relu")
