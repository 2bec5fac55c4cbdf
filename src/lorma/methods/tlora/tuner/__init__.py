"""TLoRA as a PEFT method."""

from lorma.adapters.kinds import AdapterKind, register_kind
from lorma.methods.tlora.tuner.config import TLoraConfig
from lorma.methods.tlora.tuner.layer import TLoraLayer
from lorma.methods.tlora.tuner.model import TLoraModel
from lorma.tuners.registration import register

EQUATION = "`W = W0 + α·(A·B·C)ᵀ` with A and C fixed and random, B and α trained (TLoRA, arXiv 2504.18735)"

register("tlora", TLoraConfig, TLoraModel)
register_kind(
    AdapterKind(
        "TLORA",
        title=lambda config: "TLoRA",
        equation=lambda config: EQUATION,
        not_lora=lambda config: None,
        rank_dimension={"tlora_A": 1, "tlora_B": 0, "tlora_C": 0},
    )
)

__all__ = ["TLoraConfig", "TLoraLayer", "TLoraModel"]
