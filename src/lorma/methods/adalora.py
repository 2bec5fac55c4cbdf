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

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorma.methods.base import register_method
from lorma.methods.peft import places

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import TrainerCallback

    from lorma.schema import AdapterSpec

START = 1.5
"""Ranks at the start of training for one that is left at its end, as in the paper."""
STATE_FILE = "adalora_state.safetensors"
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


def _callback(model: Any) -> TrainerCallback:
    import torch
    from safetensors.torch import save_file
    from transformers import TrainerCallback

    tuner = model.base_model

    class Allocation(TrainerCallback):
        """The schedule, the penalty, the allocation after each step, and the state in each checkpoint."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            config = model.peft_config["default"]
            config.total_step = state.max_steps
            config.tinit, config.tfinal = state.max_steps // 10, state.max_steps // 2
            config.deltaT = max(1, state.max_steps // 100)

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            factors = [p for path, p in tuner.named_parameters() if {"lora_A", "lora_B"} & set(path.split("."))]
            weight = model.peft_config["default"].orth_reg_weight / len(factors)
            with torch.enable_grad():
                penalty = weight * sum(_distance_to_orthogonal(factor) for factor in factors)
                gradients = torch.autograd.grad(penalty, factors)
            for factor, gradient in zip(factors, gradients, strict=True):
                factor.grad = gradient if factor.grad is None else factor.grad + gradient

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            tuner.update_and_allocate(state.global_step)

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if not state.is_world_process_zero:
                return
            tensors = {f"trained/{path}": p.detach() for path, p in model.named_parameters() if p.requires_grad}
            for table in TABLES:
                tensors |= {f"{table}/{path}": t for path, t in getattr(tuner.rankallocator, table).items()}
            folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
            kept = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
            pattern = json.dumps(model.peft_config["default"].rank_pattern)
            save_file(kept, folder / STATE_FILE, metadata={"rank_pattern": pattern})

    return Allocation()


def _distance_to_orthogonal(factor: Any) -> Any:
    """‖AAᵀ − I‖ of A (r × k), or ‖BᵀB − I‖ of B (d × r); r is the smaller width."""
    import torch

    rows = factor if factor.shape[0] <= factor.shape[1] else factor.T
    return torch.linalg.matrix_norm(rows @ rows.T - torch.eye(len(rows), dtype=rows.dtype, device=rows.device))


def _restore(model: Any, checkpoint: Path) -> None:
    import torch
    from safetensors import safe_open

    tuner, parameters = model.base_model, dict(model.named_parameters())
    with safe_open(checkpoint / STATE_FILE, framework="pt") as file, torch.no_grad():
        model.peft_config["default"].rank_pattern = json.loads(file.metadata()["rank_pattern"])
        for name in file.keys():  # noqa: SIM118
            table, path = name.split("/", 1)
            if table == "trained":
                parameters[path].copy_(file.get_tensor(name))
            else:
                place = next(p for full, p in parameters.items() if full.endswith(path)).device
                getattr(tuner.rankallocator, table)[path] = file.get_tensor(name).to(place)


@register_method(
    "adalora",
    equation="W0 + s·P·Λ·Q, ranks shared out by importance",
    parameters="1.5·r·(d + k + 1), at the end r on average",
    source="AdaLoRA, arXiv 2303.10512",
    knob="r on average at the end, 1.5·r at the start",
    prepare=_prepare,
    callback=_callback,
    restore=_restore,
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
        **places(adapter, task_type),
    )
