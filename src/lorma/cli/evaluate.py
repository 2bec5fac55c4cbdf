"""``lorma evaluate``."""

from __future__ import annotations

from typing import Annotated

import typer

from lorma.cli.common import BaseOption, silence_libraries


def register(app: typer.Typer) -> None:
    app.command("evaluate", help="Measure a finished run again on its evaluation rows, from the saved weights.")(
        evaluate
    )


def evaluate(
    run_dir: Annotated[str, typer.Argument(help="The directory of a finished run.")],
    base: BaseOption = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let the base model's repository run its own Python.")
    ] = False,
) -> None:
    silence_libraries()
    from lorma.runs.directory import RunDirectory
    from lorma.training.inference import evaluate as measure

    for name, value in measure(RunDirectory(run_dir), base, trust_remote_code=trust_remote_code).items():
        typer.echo(f"{name}\t{value:.6g}")
