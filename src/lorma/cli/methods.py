"""``lorma methods``."""

from __future__ import annotations

import typer
from rich.table import Table

from lorma.cli.common import plain_console


def register(app: typer.Typer) -> None:
    app.command("methods", help="The methods a recipe can name, with equation, parameters of a d × k weight, source.")(
        methods
    )


def methods() -> None:
    from lorma.training.methods import all_methods

    table = Table()
    for column in ("method", "adapted weight", "parameters", "adapter.r is", "source"):
        table.add_column(column)
    for method in all_methods():
        table.add_row(method.name, method.equation, method.parameters, method.knob or "—", method.source)
    plain_console().print(table, soft_wrap=False)
