"""TLoRA: only r × r numbers a layer are trained. It has no alpha."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorma.methods.base import register_method
from lorma.methods.peft import targeting_kwargs

if TYPE_CHECKING:
    from peft import PeftConfig

    from lorma.schema import AdapterSpec


@register_method(
    "tlora", equation="W0 + α·(A·B·C)ᵀ, A and C fixed", parameters="r² + 1", source="TLoRA, arXiv 2504.18735"
)
def tlora(adapter: AdapterSpec, task_type: str) -> PeftConfig:
    """B is r × r and α is trained; the paper takes r = 32 where LoRA has 8, and drops half of the update's outputs."""
    from lorma.methods.tlora.tuner import TLoraConfig

    return TLoraConfig(r=adapter.r, tlora_dropout=adapter.dropout, **targeting_kwargs(adapter, task_type))
