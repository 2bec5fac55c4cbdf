"""``lorma compare``."""

from __future__ import annotations

from typing import Annotated

import typer

from lorma.cli.common import (
    OverridesArgument,
    RecipeArgument,
    plain_console,
    print_report_place,
    print_table,
    split_list,
)
from lorma.errors import InputError
from lorma.files import check_directory


def register(app: typer.Typer) -> None:
    app.command("compare", help="Train a recipe with several methods and seeds; print one table, write a report.")(
        compare
    )


def compare(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    methods: Annotated[
        str | None,
        typer.Option(help="Comma-separated, or all; see `lorma methods`. Default: the recipe's compare.methods."),
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(help="Comma-separated, e.g. 0,1,2. Default: the recipe's compare.seeds.")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Adapter parameters, e.g. 0.3M, 300k or 300000: choose each method's r so that it has about as many."
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Train finished runs anew instead of skipping them.")
    ] = False,
    launcher: Annotated[str | None, typer.Option(help="Start each run with this, e.g. 'accelerate launch'.")] = None,
) -> None:
    from lorma.analysis import build_table, load_run, write_report
    from lorma.experiments.budget import parse_budget
    from lorma.experiments.compare import compare as run_comparison
    from lorma.runs.recipe import load_recipe

    check_directory(load_recipe(recipe, overrides, many_runs=True).output)
    console = plain_console()
    parameters = None if budget is None else parse_budget(budget)
    result = run_comparison(
        recipe,
        overrides or [],
        methods=split_list(methods),
        seeds=_seeds(seeds),
        budget=parameters,
        overwrite=overwrite,
        launcher=launcher,
        console=console,
    )
    if result.finished:
        runs = [load_run(path) for path in result.finished]
        print_table(console, build_table(runs))
        print_report_place(console, write_report(runs, result.output / "report", title=f"Comparison: {recipe}"))
    if result.failed:
        reasons = "; ".join(f"{name} {reason}" for name, reason in result.failed.items())
        console.print(f"Failed, and not in the table: {reasons}")
        raise typer.Exit(1)


def _seeds(text: str | None) -> list[int] | None:
    parts = split_list(text)
    if parts is None:
        return None
    if not parts or not all(part.isdigit() for part in parts):
        raise InputError(f"--seeds={text!r} must be whole numbers from 0, separated by commas")
    return [int(part) for part in parts]
