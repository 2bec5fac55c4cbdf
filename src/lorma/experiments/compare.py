"""Methods × seeds: each run in a process of its own, what is done already left alone.

A process a run keeps the runs apart: peak memory and seconds are each run's own, and a run that fails does not take
the others with it.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from lorma.errors import InputError
from lorma.experiments.budget import Choice, Counter
from lorma.methods import get_method, method_names
from lorma.runs.directory import RunDirectory
from lorma.runs.recipe import Recipe, apply_override, differences, load_recipe, override_key, parse_recipe
from lorma.tasks.fingerprint import fingerprints
from lorma.training.exits import describe_exit

REFUSED = 2
"""The exit code of ``lorma train`` for wrong input."""
POLL_SECONDS = 0.5
"""How often to look whether another process has finished the runs that are left."""
EVERY = "all"
"""Stands for every method that is possible on the model of the recipe."""


@dataclass(frozen=True)
class Planned:
    """A run: its recipe, and what it changes in the one compared."""

    recipe: Recipe
    changes: list[str]

    @property
    def path(self) -> Path:
        return Path(self.recipe.output)


@dataclass
class Comparison:
    """What came of it: finished run directories in order, and how the runs that failed ended, by their names."""

    output: Path
    finished: list[Path] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def compare(
    recipe_path: str,
    overrides: list[str],
    *,
    methods: list[str] | None = None,
    seeds: list[int] | None = None,
    budget: int | None = None,
    overwrite: bool = False,
    launcher: str | None = None,
    console: Console,
) -> Comparison:
    """Train one recipe with every method and seed, into ``<output>/<method>-seed<seed>``.

    A method differs from the recipe in its learning rate if ``compare.learning_rates`` gives it one, and in
    ``adapter.target_modules`` if it chooses its places itself (bottleneck adapters).

    Several comparisons may work in one output at once. Each takes the runs that nobody is training, and waits for the
    others at the end; what another process leaves unfinished it goes on with.

    Args:
        recipe_path, overrides: as for :func:`load_recipe`.
        methods, seeds: instead of the recipe's ``compare`` section; ``["all"]`` is every method that is possible on
            the model.
        budget: adapter parameters. Each method takes the ``adapter.r`` that brings it nearest.
        overwrite: train finished runs anew.
        launcher: words to start each run with, such as ``accelerate launch``; plain Python when left out.
        console: where to say what is going on.

    Raises:
        InputError: before the first run, for a wrong recipe, method or seed, or a finished run of another recipe or of
            other data.
        KeyboardInterrupt: after a SIGTERM, which the run in progress gets as well.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("lorma compare starts its own processes; give the launcher as --launcher 'accelerate launch'")
    recipe = load_recipe(recipe_path, overrides, many_runs=True)
    if methods == [EVERY]:
        methods = possible_methods(recipe, console)
    chosen: dict[str, Any] = {"methods": methods, "seeds": seeds}
    changes = {key: value for key, value in chosen.items() if value is not None}
    recipe = parse_recipe(recipe.model_dump() | {"compare": recipe.compare.model_dump() | changes})
    methods, seeds = recipe.compare.methods, recipe.compare.seeds
    choices = {} if budget is None else _choose(recipe, methods, budget, console)
    planned = [_plan(recipe, method, seed, choices.get(method)) for seed in seeds for method in methods]
    result = Comparison(Path(recipe.output))
    data = fingerprints(recipe.data)
    earlier = {run.path: _finished_at(run) for run in planned} if overwrite else {}

    def is_done(run: Planned) -> bool:
        """Whether a run is finished; with ``overwrite``, since this comparison began."""
        return _finished_at(run) != earlier.get(run.path) and _is_done(run.recipe, data)

    titles = {run.path: f"[{number}/{len(planned)}] {run.path.name}" for number, run in enumerate(planned, start=1)}
    done = [run.path for run in planned if is_done(run)]
    for path in done:
        console.print(f"{titles[path]}: done before")
    waiting = [run for run in planned if run.path not in done]
    while waiting:
        busy = []
        for run in waiting:
            name, status = run.path.name, None
            if not is_done(run) and not RunDirectory(run.path).in_use:
                console.print(titles[run.path])
                status = _run(_command(recipe_path, overrides, run, overwrite, launcher))
            if status == 0 or is_done(run):
                done.append(run.path)
                if status != 0:
                    console.print(f"{titles[run.path]}: done meanwhile by another process")
            elif status is None or RunDirectory(run.path).in_use:
                busy.append(run)
            elif status == REFUSED:
                raise InputError(f"{name} was refused (see above); nothing further was started")
            else:
                result.failed[name] = describe_exit(status)
                console.print(f"  {name} {result.failed[name]}")
        if busy == waiting:
            time.sleep(POLL_SECONDS)
        else:
            for run in busy:
                console.print(f"{titles[run.path]}: another process trains it; its result is waited for")
        waiting = busy
    result.finished = [run.path for run in planned if run.path in done]
    return result


def possible_methods(recipe: Recipe, console: Console) -> list[str]:
    """Names of all methods but those that the model of the recipe does not allow; of these the reason is told."""
    counter, names = Counter(recipe), []
    for name in method_names():
        try:
            if recipe.model.quantization is not None and get_method(name).build is None:
                raise InputError("it trains weights that are quantised (model.quantization)")
            counter.count(get_method(name), recipe.adapter.r)
        except InputError as error:
            console.print(f"{name} is left out: {error}")
        else:
            names.append(name)
    return names


def _choose(recipe: Recipe, methods: list[str], budget: int, console: Console) -> dict[str, Choice]:
    """What each method is trained with, told as it is chosen."""
    console.print(f"Budget: {budget:,} adapter parameters")
    choices = {}
    for name in methods:
        adapted = _changed(recipe, _own_settings(recipe, name))
        choice = choices[name] = Counter(adapted).choose(get_method(name), budget)
        has_knob = get_method(name).knob is not None
        setting = f"r = {choice.r}, " if has_knob else ""
        reason = "no r comes near" if has_knob else "there is no r to choose"
        remark = "" if choice.fits else f"; {reason}, trained as it is"
        console.print(f"  {name}: {setting}{choice.parameters:,}{remark}")
    return choices


def _own_settings(recipe: Recipe, method: str) -> list[str]:
    """What a method has of its own in a comparison."""
    settings = []
    if (rate := recipe.compare.learning_rates.get(method)) is not None:
        settings.append(f"train.learning_rate={rate!r}")
    if get_method(method).own_targets and recipe.adapter.target_modules is not None:
        settings.append("adapter.target_modules=null")
    return settings


def _changed(recipe: Recipe, changes: list[str]) -> Recipe:
    content = recipe.model_dump()
    for change in changes:
        apply_override(content, change)
    return parse_recipe(content)


def _plan(recipe: Recipe, method: str, seed: int, choice: Choice | None) -> Planned:
    changes = _own_settings(recipe, method)
    if choice is not None:
        changes.append(f"adapter.r={choice.r}")
    output = str(Path(recipe.output) / f"{method}-seed{seed}")
    chosen = json.dumps(recipe.method, ensure_ascii=False) if method == recipe.method_name else method
    changes += [f"method={chosen}", f"seed={seed}", f"output={json.dumps(output, ensure_ascii=False)}"]
    return Planned(_changed(recipe, changes), changes)


def _run(command: list[str]) -> int:
    """The exit code of a command. Whoever terminates this process terminates that one first.

    Raises:
        KeyboardInterrupt: this process was told to end (SIGTERM), and the command has ended.
    """
    child: subprocess.Popen[bytes] | None = None
    told = False

    def pass_on(number: int, frame: FrameType | None) -> None:
        nonlocal told
        told = True
        if child is not None:
            child.send_signal(number)

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        with subprocess.Popen(command) as child:
            if told:  # while it was being started
                child.terminate()
            try:
                status = child.wait()
            except BaseException:
                child.kill()
                raise
    finally:
        signal.signal(signal.SIGTERM, before)
    if told:
        raise KeyboardInterrupt
    return status


def _finished_at(run: Planned) -> int | None:
    """When the summary of a run was written, in nanoseconds; None when there is none."""
    try:
        return RunDirectory(run.path).summary_file.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _is_done(recipe: Recipe, data: dict[str, str]) -> bool:
    run = RunDirectory(recipe.output)
    if not run.finished:
        return False
    changed = differences(run.read_recipe(), recipe)
    if changed:
        raise InputError(
            f"{run.path} was trained with another {', '.join(changed)}; give --overwrite or another output"
        )
    run.check_data(data, overwrite=False)
    return True


def _command(recipe_path: str, overrides: list[str], run: Planned, overwrite: bool, launcher: str | None) -> list[str]:
    start = shlex.split(launcher) if launcher else [sys.executable]
    further = ["--no-usage", *(["--overwrite"] if overwrite else [])]
    changed = [override_key(change) for change in run.changes]
    kept = [
        override
        for override in overrides
        if override_key(override) not in changed and not override_key(override).startswith("method.")
    ]
    return [*start, "-m", "lorma", "train", recipe_path, *kept, *run.changes, *further]
