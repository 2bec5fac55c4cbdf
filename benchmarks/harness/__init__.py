"""What every benchmark shares: timing contenders in turns, and writing results.

Times on a shared machine drift, and the drift is common to what runs within a second. So all contenders run in one
process and in turns, once a round, in an order that is drawn anew for each round; a ratio of two contenders is taken
within each round, and the median of those ratios is what the tables give. Garbage collection waits until a round is
over, and a GPU is waited for before and after each run.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import random
import shlex
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

PACKAGES = ("torch", "transformers", "peft", "lorma")
ROOT = Path(__file__).parents[2]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
REFERENCES = ("frozen", "lora", "rebuild-plus", "rebuild-permutation")
"""Contenders that others are divided by, wherever they take part."""

Run = Callable[[], Any]
Case = dict[str, Any]


def parser(docstring: str | None, rounds: int) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    made = argparse.ArgumentParser(description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("-o", "--output", type=Path, required=True, help="the JSON file to write")
    made.add_argument("--rounds", type=int, default=rounds, help=f"timed rounds (default {rounds})")
    made.add_argument("--quick", action="store_true", help="tiny sizes and 2 rounds: shows that it runs, nothing else")
    return made


def parse(made: argparse.ArgumentParser) -> argparse.Namespace:
    """The options given, two rounds if quick."""
    # PEFT reads an attribute that transformers 5 has renamed.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
    arguments = made.parse_args()
    if arguments.quick:
        arguments.rounds = min(arguments.rounds, 2)
    return arguments


def interleave(
    contenders: Mapping[str, Run],
    rounds: int,
    warmup: int = 1,
    *,
    every: Mapping[str, int] | None = None,
    reset: Mapping[str, Run] | None = None,
    least_seconds: float = 0.0,
) -> dict[str, Case]:
    """Time contenders in turns.

    Args:
        contenders: what to run, by name.
        rounds: timed rounds.
        warmup: rounds before them that are not kept.
        every: contenders that take part in every k-th round only, the first included.
        reset: what to do, untimed, after each run of a contender.
        least_seconds: repeat a run so often within its turn that the turn lasts about this long. Not with ``reset``.

    Returns:
        For each contender ``rounds`` (its own), ``seconds`` of one run and ``ratio`` to each of ``REFERENCES``, both
        as percentiles over rounds.
    """
    every, reset = every or {}, reset or {}
    times: dict[str, list[float]] = {name: [math.nan] * rounds for name in contenders}
    repeats = dict.fromkeys(contenders, 1)
    order = list(contenders)
    shuffle = random.Random(0).shuffle
    gc.collect()
    gc.freeze()  # what is there already need not be looked at again after every round
    for index in range(-warmup, rounds):
        shuffle(order)
        gc.collect()
        gc.disable()
        try:
            for name in order:
                if index % every.get(name, 1) and index >= 0:
                    continue
                seconds = _turn(contenders[name], repeats[name])
                reset.get(name, _nothing)()
                if index >= 0:
                    times[name][index] = seconds
                elif name not in reset:
                    repeats[name] = max(1, min(1000, round(least_seconds / seconds)))
        finally:
            gc.enable()
    gc.unfreeze()
    references = [name for name in REFERENCES if name in contenders]
    return {name: _summary(times[name], {ref: times[ref] for ref in references}) for name in contenders}


def _nothing() -> None:
    pass


def _turn(run: Run, repeats: int) -> float:
    synchronise()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    synchronise()
    return (time.perf_counter() - start) / repeats


def synchronise() -> None:
    """Wait for the GPU, if there is one."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def _summary(times: list[float], references: dict[str, list[float]]) -> Case:
    own = np.array(times)
    ratios = {name: own / np.array(other) for name, other in references.items()}
    return {
        "rounds": int(np.isfinite(own).sum()),
        "seconds": percentiles(own),
        "ratio": {name: percentiles(ratio) for name, ratio in ratios.items() if np.isfinite(ratio).any()},
    }


def percentiles(values: Sequence[float] | np.ndarray[Any, Any]) -> dict[str, float]:
    """Minimum, tenth, fiftieth and ninetieth percentile, to six digits; what is not finite is left out."""
    kept = np.array(values, dtype=float)
    kept = kept[np.isfinite(kept)]
    numbers = [kept.min(), *np.percentile(kept, [10, 50, 90])]
    return {name: float(f"{x:.6g}") for name, x in zip(("min", "p10", "p50", "p90"), numbers, strict=True)}


def environment() -> Case:
    """Commit, versions and device; nothing that names a machine or a place on it."""
    return {
        "commit": _commit(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else _processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def _commit() -> str | None:
    """As ``git describe --always --dirty``, but results that are being written anew do not make it dirty."""
    options: dict[str, Any] = {"capture_output": True, "text": True, "check": False, "cwd": ROOT}
    commit = subprocess.run(["git", "describe", "--always"], **options).stdout.strip()
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", ".", ":!docs"], **options).returncode
    return commit + "-dirty" * (changed != 0) if commit else None


def _processor() -> str:
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores"


def write(arguments: argparse.Namespace, content: Case) -> None:
    """Write the results under their final name in one step, with the command and the environment at the top."""
    output: Path = arguments.output
    given = [_without_place(argument) for argument in sys.argv[1:]]
    command = shlex.join(["python", "-m", f"benchmarks.cases.{Path(sys.argv[0]).stem}", *given])
    head = {"command": command, "quick": arguments.quick, "rounds": arguments.rounds, **environment()}
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_suffix(".partial")
    partial.write_text(json.dumps(head | content, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, output)
    print(f"Results: {_without_place(str(output))}")


def _without_place(argument: str) -> str:
    """An absolute path relative to the repository, or its last part if it lies outside."""
    path = Path(argument)
    if not path.is_absolute():
        return argument
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name
