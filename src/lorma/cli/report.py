"""``lorma report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lorma.cli.common import print_report_place, print_table


def register(app: typer.Typer) -> None:
    app.command("report", help="Table, figure and HTML page of finished runs.")(report)


def report(
    run_dirs: Annotated[list[Path], typer.Argument(help="Directories of finished runs.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to write the report into.")],
) -> None:
    from lorma.analysis import build_table, load_run, write_report

    console = Console()
    runs = [load_run(path) for path in run_dirs]
    print_table(console, build_table(runs))
    print_report_place(console, write_report(runs, output, title="Comparison"))
