"""``lorma train``."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from lorma.cli.common import OverridesArgument, RecipeArgument, plain_console, silence_libraries


def register(app: typer.Typer) -> None:
    app.command("train", help="Train one recipe into a run directory; the same command resumes an unfinished run.")(
        train
    )


def train(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a finished run, or one of another recipe.")
    ] = False,
    usage: Annotated[bool, typer.Option(help="Print the lines of Python that use the adapter.")] = True,
) -> None:
    from lorma.runs.directory import RunDirectory
    from lorma.runs.recipe import load_recipe

    loaded = load_recipe(recipe, overrides)
    RunDirectory(loaded.output).check(loaded, overwrite)
    silence_libraries()
    from lorma.training.inference import usage_lines
    from lorma.training.processes import processes
    from lorma.training.run import train as train_recipe

    console = plain_console(quiet=not processes().is_main_process)
    run = train_recipe(loaded, overwrite=overwrite, console=console)
    if usage:
        console.print(f"Finished: {run.path}. To use it from Python:")
        for line in usage_lines(run):
            console.print(f"    {line}")
        console.print(f"or from here: lorma predict {shlex.quote(str(run.path))} --text '…'")
