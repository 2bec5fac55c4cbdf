"""``lorma methods``."""

from __future__ import annotations

import typer

from lorma.cli.common import plain_console, print_rows


def register(app: typer.Typer) -> None:
    app.command("methods", help="The methods a recipe can name, with equation, parameters of a d × k weight, source.")(
        methods
    )


def methods() -> None:
    from lorma.methods import all_methods

    rows = [(m.name, m.equation, m.parameters, m.knob or "—", m.source) for m in all_methods()]
    print_rows(plain_console(), ("method", "adapted weight", "parameters", "adapter.r is", "source"), rows, blocks=True)
