"""AdaLoRA (arXiv 2303.10512): PEFT's tuner with what training it needs around it.

The rank budget starts at 1.5·r a layer and falls to r by a cubic schedule; the first tenth of the steps keeps the
starting budget and the last half the final one. Three things are not as PEFT does them:

* PEFT adds the penalty that keeps A and B orthogonal to the loss, in evaluation too. Losses would then say nothing
  beside those of other methods. Here the loss stays the task's, and the penalty's gradient is added just before the
  optimizer step, after the task's gradient is clipped.
* PEFT would train ``ranknum``, a constant divisor that it does not save. It is frozen.
* PEFT's files hold only the ranks that are left, and not the importance of each. Checkpoints carry both besides.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from lorma.methods.base import Context, Hooks, register_method
from lorma.methods.peft import targeting_kwargs

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import Tensor

    from lorma.schema import AdapterSpec

START = 1.5
"""Ranks at the start of training for one that is left at its end, as in the paper."""
TABLES = ("ipt", "exp_avg_ipt", "exp_avg_unc")
"""PEFT's tables of importance: of the last step, smoothed, and how uncertain it is."""


def loss_of_the_task(model: Any) -> None:
    """Keep PEFT's AdaLoRA from adding its penalty to the loss; other models are left alone.

    Without this a loaded adapter cannot compute a loss at all: PEFT looks for the name of the trained one.
    """
    from peft import AdaLoraModel

    tuner: Any = model.base_model
    if isinstance(tuner, AdaLoraModel):
        vars(tuner)["forward"] = tuner.model.forward


def _prepare(model: Any, adapter: AdapterSpec, task_type: str) -> None:
    loss_of_the_task(model)
    for path, parameter in model.named_parameters():
        if "ranknum" in path.split("."):
            parameter.requires_grad_(False)


class Allocation(Hooks):
    """The schedule, the penalty, the allocation after each step, and the importance of each rank in each checkpoint."""

    restores_weights = True
    earlier_state_file = "adalora_state.safetensors"

    def start(self, context: Context) -> None:
        config = context.model.peft_config["default"]
        config.total_step = context.max_steps
        config.tinit, config.tfinal = context.max_steps // 10, context.max_steps // 2
        config.deltaT = max(1, context.max_steps // 100)

    def before_step(self, context: Context) -> None:
        import torch

        model = context.model
        named = model.base_model.named_parameters()
        factors = [p for path, p in named if {"lora_A", "lora_B"} & set(path.split("."))]
        weight = model.peft_config["default"].orth_reg_weight / len(factors)
        with torch.enable_grad():
            penalty = weight * sum(_distance_to_orthogonal(factor) for factor in factors)
            gradients = torch.autograd.grad(penalty, factors)
        for factor, gradient in zip(factors, gradients, strict=True):
            factor.grad = gradient if factor.grad is None else factor.grad + gradient

    def after_step(self, context: Context) -> None:
        if not context.skipped:  # whose gradients are infinite
            context.model.base_model.update_and_allocate(context.step)

    def state_dict(self, model: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {f"trained/{path}": p.detach() for path, p in model.named_parameters() if p.requires_grad}
        for table in TABLES:
            held = getattr(model.base_model.rankallocator, table)
            tensors |= {f"{table}/{path}": tensor for path, tensor in held.items()}
        return tensors, {"rank_pattern": model.peft_config["default"].rank_pattern}

    def load_state_dict(self, model: Any, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        import torch

        parameters = dict(model.named_parameters())
        model.peft_config["default"].rank_pattern = values["rank_pattern"]
        for name, tensor in tensors.items():
            table, path = name.split("/", 1)
            if table == "trained":
                with torch.no_grad():
                    parameters[path].copy_(tensor)
            else:
                device = next(p for full, p in parameters.items() if full.endswith(path)).device
                getattr(model.base_model.rankallocator, table)[path] = tensor.to(device)


def _distance_to_orthogonal(factor: Any) -> Any:
    """‖AAᵀ − I‖ of A (r × k), or ‖BᵀB − I‖ of B (d × r); r is the smaller width."""
    import torch

    rows = factor if factor.shape[0] <= factor.shape[1] else factor.T
    return torch.linalg.matrix_norm(rows @ rows.T - torch.eye(len(rows), dtype=rows.dtype, device=rows.device))


@register_method(
    "adalora",
    equation="W0 + s·P·Λ·Q, ranks shared out by importance",
    parameters="1.5·r·(d + k + 1), at the end r on average",
    source="AdaLoRA, arXiv 2303.10512",
    knob="r on average at the end, 1.5·r at the start",
    prepare=_prepare,
    hooks=Allocation,
)
def adalora(adapter: AdapterSpec, task_type: str) -> PeftConfig:
    """PEFT divides alpha by the starting rank, so it is scaled up by as much: s stays alpha/r."""
    from peft import AdaLoraConfig

    start = math.ceil(START * adapter.r)
    alpha: Any = (adapter.alpha or adapter.r) * start / adapter.r
    return AdaLoraConfig(
        init_r=start,
        target_r=adapter.r,
        lora_alpha=alpha,
        lora_dropout=adapter.dropout,
        total_step=10,  # the real number is known, and set, when training begins
        **targeting_kwargs(adapter, task_type),
    )
