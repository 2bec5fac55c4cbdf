"""Methods of this package besides LoRMA: TLoRA, SVFT and bottleneck adapters. None of them has an alpha."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorma.training.methods.additive import places
from lorma.training.methods.registry import Method, register, register_method

if TYPE_CHECKING:
    from peft import PeftConfig

    from lorma.training.recipe import AdapterSpec

HOULSBY = "Houlsby et al., arXiv 1902.00751"
PFEIFFER = "Pfeiffer et al., arXiv 2005.00247"


@register_method(
    "tlora", equation="W0 + α·(A·B·C)ᵀ, A and C fixed", parameters="r² + 1", source="TLoRA, arXiv 2504.18735"
)
def tlora(adapter: AdapterSpec, task_type: str) -> PeftConfig:
    """B is r × r and α is trained; the paper takes r = 32 where LoRA has 8, and drops half of the update's outputs."""
    from lorma.tuners import TLoraConfig

    return TLoraConfig(r=adapter.r, tlora_dropout=adapter.dropout, **places(adapter, task_type))


def _svft(name: str, parameters: str, knob: str | None, pattern: str) -> None:
    def build(adapter: AdapterSpec, task_type: str) -> PeftConfig:
        from lorma.tuners import SvftConfig

        where = places(adapter, task_type)
        return SvftConfig(r=adapter.r, pattern=pattern, svft_dropout=adapter.dropout, **where)

    equation = f"U(Σ + M)Vᵀ, M {'diagonal' if pattern == 'plain' else 'sparse'}"
    register(Method(name, equation, parameters, "SVFT, arXiv 2405.19597", build, knob))


def _bottleneck(placement: str, source: str, activation: str) -> None:
    def build(adapter: AdapterSpec, task_type: str) -> PeftConfig:
        from lorma.tuners import BottleneckConfig

        fixed: dict[str, Any] = {"placement": placement, "activation": activation}
        return BottleneckConfig(r=adapter.r, bottleneck_dropout=adapter.dropout, **fixed, **places(adapter, task_type))

    equation = "h + up(f(down(h))), h = W0·x + b"
    parameters = "2·r·d + r + d"
    register(Method(f"adapter-{placement}", equation, parameters, source, build, "r, the width", own_targets=True))


_bottleneck("houlsby", HOULSBY, "gelu")
_bottleneck("pfeiffer", PFEIFFER, "relu")
_svft("svft-plain", "n = min(d, k)", None, "plain")
_svft("svft-random", "(2r + 1)·n − r·(r + 1)", "r bands' worth of entries on each side", "random")
