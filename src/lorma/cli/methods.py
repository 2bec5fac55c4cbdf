"""``lorma methods``."""

from __future__ import annotations

import inspect
from typing import Annotated

import typer

from lorma.cli.common import plain_console, print_rows
from lorma.methods import Method, all_methods, get_method


def register(app: typer.Typer) -> None:
    app.command("methods", help="The methods a recipe can name, with equation, parameters of a d × k weight, source.")(
        methods
    )


def methods(
    name: Annotated[str | None, typer.Argument(help="One method: its options with defaults, and an example.")] = None,
) -> None:
    console = plain_console()
    if name is not None:
        console.print("\n".join(description(get_method(name))), soft_wrap=True)
        return
    rows = [(m.name, m.equation, m.parameters, m.knob or "—", m.source) for m in all_methods()]
    print_rows(console, ("method", "adapted weight", "parameters", "adapter.r is", "source"), rows, blocks=True)


def description(method: Method) -> list[str]:
    """A method in lines of text: equation, parameters, source, options with defaults, an example for a recipe."""
    lines = [
        method.name,
        f"  adapted weight  {method.equation}",
        f"  parameters      {method.parameters} for a d × k weight",
        f"  adapter.r is    {method.knob or '—'}",
        f"  source          {method.source}",
    ]
    remark = inspect.getdoc(method.build) if method.build else None
    if remark:
        lines.append(f"  remark          {' '.join(remark.split())}")
    options = method.options.model_fields
    if not options:
        return [*lines, "  options         none", f"  example         method: {method.name}"]
    lines.append("  options")
    for key, field in options.items():
        allowed = getattr(field.annotation, "__args__", None)
        kind = " | ".join(map(str, allowed)) if allowed else getattr(field.annotation, "__name__", "")
        lines.append(
            f"    {key} = {field.get_default()} ({kind}){f': {field.description}' if field.description else ''}"
        )
    first, field = next(iter(options.items()))
    return [*lines, f"  example         method: {{name: {method.name}, {first}: {field.get_default()}}}"]
