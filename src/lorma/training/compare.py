"""Methods × seeds: each run in a process of its own, what is done already left alone.

A process a run keeps the runs apart: peak memory and seconds are each run's own, and a run that fails does not take
the others with it.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from lorma.errors import InputError
from lorma.training.recipe import Recipe, differences, load_recipe, parse_recipe
from lorma.training.rundir import RunDirectory


@dataclass
class Comparison:
    """What came of it: finished run directories in order, and the names of runs that failed."""

    output: Path
    finished: list[Path] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


def compare(
    recipe_path: str,
    overrides: list[str],
    *,
    methods: list[str] | None = None,
    seeds: list[int] | None = None,
    overwrite: bool = False,
    launcher: str | None = None,
    console: Console,
) -> Comparison:
    """Train one recipe with every method and seed, into ``<output>/<method>-seed<seed>``.

    Args:
        recipe_path, overrides: as for :func:`load_recipe`.
        methods, seeds: instead of the recipe's ``compare`` section.
        overwrite: train finished runs anew.
        launcher: words to start each run with, such as ``accelerate launch``; plain Python when left out.
        console: where to say what is going on.

    Raises:
        InputError: before the first run, for a wrong recipe, method or seed, or a finished run of another recipe.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("lorma compare starts its own processes; give the launcher as --launcher 'accelerate launch'")
    recipe = load_recipe(recipe_path, overrides, many_runs=True)
    chosen: dict[str, Any] = {"methods": methods, "seeds": seeds}
    changes = {key: value for key, value in chosen.items() if value is not None}
    recipe = parse_recipe(recipe.model_dump() | {"compare": recipe.compare.model_dump() | changes})
    methods, seeds = recipe.compare.methods, recipe.compare.seeds
    planned = [_plan(recipe, method, seed) for seed in seeds for method in methods]
    result = Comparison(Path(recipe.output))
    waiting = [run for run in planned if overwrite or not _is_done(run)]
    for number, run in enumerate(planned, start=1):
        name = Path(run.output).name
        if run not in waiting:
            console.print(f"[{number}/{len(planned)}] {name}: done before")
        else:
            console.print(f"[{number}/{len(planned)}] {name}")
            command = _command(recipe_path, overrides, run, overwrite, launcher)
            status = subprocess.run(command, check=False).returncode
            if status == 2:
                raise InputError(f"{name} was refused (see above); nothing further was started")
            if status != 0:
                console.print(f"  {name} failed with exit code {status}")
                result.failed.append(name)
                continue
        result.finished.append(Path(run.output))
    return result


def _plan(recipe: Recipe, method: str, seed: int) -> Recipe:
    output = str(Path(recipe.output) / f"{method}-seed{seed}")
    return recipe.model_copy(update={"method": method, "seed": seed, "output": output})


def _is_done(recipe: Recipe) -> bool:
    run = RunDirectory(recipe.output)
    if not run.finished:
        return False
    changed = differences(run.read_recipe(), recipe)
    if changed:
        raise InputError(
            f"{run.path} was trained with another {', '.join(changed)}; give --overwrite or another output"
        )
    return True


def _command(recipe_path: str, overrides: list[str], run: Recipe, overwrite: bool, launcher: str | None) -> list[str]:
    start = shlex.split(launcher) if launcher else [sys.executable]
    chosen = [f"method={run.method}", f"seed={run.seed}", f"output={json.dumps(run.output)}"]
    return [
        *start,
        "-m",
        "lorma",
        "train",
        recipe_path,
        *overrides,
        *chosen,
        "--no-usage",
        *(["--overwrite"] if overwrite else []),
    ]
