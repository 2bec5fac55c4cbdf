"""``lorma report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorma.cli.common import plain_console, print_report_place, print_table
from lorma.files import check_directory


def register(app: typer.Typer) -> None:
    app.command("report", help="Table, figure and HTML page of finished runs.")(report)


def report(
    run_dirs: Annotated[list[Path], typer.Argument(help="Directories of finished runs.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to write the report into.")],
) -> None:
    from lorma.analysis import build_table, load_run, write_report

    check_directory(output)
    console = plain_console()
    runs = [load_run(path) for path in run_dirs]
    print_table(console, build_table(runs))
    print_report_place(console, write_report(runs, output, title="Comparison"))
