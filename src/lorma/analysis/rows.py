"""A row of the comparison table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One method, or one of its recipes, over its seeds. Means are over seeds; None where a number does not exist.

    ``head_parameters`` are those of task heads and other modules that are trained whole; ``r`` is the recipe's
    ``adapter.r`` (None for a method without such a knob).
    ``metric_sd`` is the sample standard deviation (two seeds or more). ``loss_auc`` is in loss × steps and
    ``auc_change_percent`` is against LoRA over the same steps. ``steps_to_lora_loss`` is the mean over the
    ``seeds_reached`` of ``seeds_compared`` seeds that reached the final loss of the LoRA run with their seed; runs
    whose LoRA run diverged or never got below its first losses are not compared.
    ``peak_memory_bytes`` is the largest over the seeds.
    """

    method: str
    seeds: tuple[int, ...]
    trainable_parameters: int
    adapter_parameters: int
    head_parameters: int
    r: int | None
    learning_rate: float | None
    metric_mean: float | None
    metric_sd: float | None
    loss_auc: float | None
    auc_change_percent: float | None
    steps_to_lora_loss: float | None
    seeds_reached: int
    seeds_compared: int
    seconds: float
    peak_memory_bytes: int | None
