"""Synthetic run directories, as the training code writes them."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

WriteRun = Callable[..., Path]


def curve(seed: int, points: int = 100, rate: float = 0.03, floor: float = 0.3, noise: float = 0.03) -> list[float]:
    """A falling, noisy training loss that starts near 0.7."""
    draw = random.Random(seed)
    return [floor + (0.7 - floor) * math.exp(-rate * i) + draw.gauss(0, noise) for i in range(points)]


def write_run(
    path: Path,
    method: str = "lora",
    seed: int = 0,
    *,
    losses: Sequence[float] | None = None,
    accuracy: float = 0.87,
    every: int = 1,
    tail: str = "",
    **summary: Any,
) -> Path:
    """A finished run at ``path``; ``tail`` is appended to ``metrics.jsonl`` as it is."""
    losses = curve(seed) if losses is None else losses
    steps = [every * (i + 1) for i in range(len(losses))]
    lines = [
        {"step": step, "epoch": step / 50, "loss": loss, "learning_rate": 1e-3, "grad_norm": 1.0}
        for step, loss in zip(steps, losses, strict=True)
    ]
    lines.append({"step": steps[-1], "epoch": 2.0, "eval_loss": 0.4, "eval_accuracy": accuracy})
    path.mkdir(parents=True)
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
    content = {
        "schema_version": 1,
        "method": method,
        "task": "classification",
        "model": "minilm",
        "seed": seed,
        "trainable_parameters": 221_954,
        "adapter_parameters": 73_728,
        "steps": steps[-1],
        "primary_metric": "accuracy",
        "greater_is_better": True,
        "final_metrics": {"accuracy": accuracy, "f1": accuracy - 0.01, "loss": 0.4},
        "best_metrics": {"accuracy": accuracy},
        "seconds": 41.2,
        "peak_memory_bytes": 700 * 2**20,
        "versions": {"torch": "2.9.0", "transformers": "5.1.0", "peft": "0.21.0", "lorma": "0.1.0"},
        "device": "cpu, 2 threads",
    }
    (path / "summary.json").write_text(json.dumps(content | summary))
    return path


@pytest.fixture(name="write_run")
def write_run_fixture(tmp_path: Path) -> WriteRun:
    """``write_run(name, method, seed, …)`` below ``tmp_path``."""

    def write(name: str, method: str = "lora", seed: int = 0, **options: Any) -> Path:
        return write_run(tmp_path / name, method, seed, **options)

    return write
