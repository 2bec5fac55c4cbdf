"""Methods that PEFT has, but for AdaLoRA, which has a module of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorma.methods.base import register_method

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch.optim import Optimizer

    from lorma.schema import AdapterSpec, TrainSpec

VERA_RANKS = 32
"""VeRA's rank for one of ``adapter.r``: its factors are frozen and shared, so it needs hundreds (256 for r = 8)."""
OFT_BLOCK = 4
"""Size of OFT's blocks for one of ``adapter.r``: k·(4r − 1)/2 parameters, near the 2·r·k of LoRA on a square."""


def targeting_kwargs(adapter: AdapterSpec, task_type: str) -> dict[str, Any]:
    """The fields of a PEFT configuration that say which modules are adapted, and for which task."""
    return {
        "target_modules": adapter.target_modules,
        "modules_to_save": adapter.modules_to_save,
        "task_type": task_type,
    }


def lora_config(adapter: AdapterSpec, task_type: str, **fixed: Any) -> PeftConfig:
    """LoRA with the knobs that all methods share."""
    from peft import LoraConfig

    alpha: Any = adapter.alpha or adapter.r
    where = targeting_kwargs(adapter, task_type)
    return LoraConfig(r=adapter.r, lora_alpha=alpha, lora_dropout=adapter.dropout, **where, **fixed)


@register_method("lora", equation="W0 + s·BA", parameters="r·(d + k)", source="LoRA, arXiv 2106.09685")
def lora(adapter: AdapterSpec, task_type: str) -> PeftConfig:
    """s = alpha/r."""
    return lora_config(adapter, task_type)


@register_method(
    "rslora", equation="W0 + (alpha/√r)·BA", parameters="r·(d + k)", source="rank-stabilised LoRA, arXiv 2312.03732"
)
def rslora(adapter: AdapterSpec, task_type: str) -> PeftConfig:
    """With alpha left out, alpha = r as for LoRA, and so a scaling of √r."""
    return lora_config(adapter, task_type, use_rslora=True)


@register_method(
    "dora",
    equation="m ∘ (W0 + s·BA) / ‖W0 + s·BA‖",
    parameters="r·(d + k) + d",
    source="DoRA, arXiv 2402.09353",
)
def dora(adapter: AdapterSpec, task_type: str) -> PeftConfig:
    """m and the norms are those of the rows."""
    return lora_config(adapter, task_type, use_dora=True)


def _freeze_a(model: Any, adapter: AdapterSpec, task_type: str) -> None:
    for path, parameter in model.named_parameters():
        if "lora_A" in path.split("."):
            parameter.requires_grad_(False)


def _lora_fa_optimizer(model: Any, train: TrainSpec) -> Optimizer:
    from peft.optimizers import create_lorafa_optimizer

    config = model.peft_config["default"]
    return create_lorafa_optimizer(
        model, config.r, config.lora_alpha, lr=train.learning_rate, weight_decay=train.weight_decay
    )


@register_method(
    "lora-fa",
    equation="W0 + s·BA, A fixed",
    parameters="r·d",
    source="LoRA-FA, arXiv 2308.03303",
    prepare=_freeze_a,
    optimizer=_lora_fa_optimizer,
)
def lora_fa(adapter: AdapterSpec, task_type: str) -> PeftConfig:
    """A LoRA of which only B trains, with PEFT's optimizer for it, which corrects B's gradient by (AAᵀ)⁻¹."""
    return lora_config(adapter, task_type)


@register_method(
    "vera",
    equation="W0 + Λb·B·Λd·A, A and B fixed, shared",
    parameters="d + r′",
    source="VeRA, arXiv 2310.11454",
    knob=f"r′ = {VERA_RANKS}·r",
)
def vera(adapter: AdapterSpec, task_type: str) -> PeftConfig:
    """Λb and Λd are trained diagonals."""
    from peft import VeraConfig

    rank = VERA_RANKS * adapter.r
    return VeraConfig(r=rank, vera_dropout=adapter.dropout, **targeting_kwargs(adapter, task_type))


@register_method("hira", equation="W0 + W0 ∘ BA", parameters="r·(d + k)", source="HiRA, ICLR 2025 (TwJrTz9cRS)")
def hira(adapter: AdapterSpec, task_type: str) -> PeftConfig:
    """There is no alpha."""
    from peft import HiraConfig

    return HiraConfig(r=adapter.r, hira_dropout=adapter.dropout, **targeting_kwargs(adapter, task_type))


@register_method(
    "oft",
    equation="W0·R, R block-orthogonal",
    parameters="k·(b − 1)/2",
    source="OFT, arXiv 2306.07280, 2506.19847",
    knob=f"b = {OFT_BLOCK}·r (nearest divisor of k)",
)
def oft(adapter: AdapterSpec, task_type: str) -> PeftConfig:
    """The adapter's dropout sets whole blocks to the identity."""
    from peft import OFTConfig

    size = OFT_BLOCK * adapter.r
    return OFTConfig(oft_block_size=size, module_dropout=adapter.dropout, **targeting_kwargs(adapter, task_type))
