"""``lorma doctor``."""

from __future__ import annotations

from itertools import takewhile
from typing import Annotated

import typer

from lorma.cli.common import plain_console, print_rows, silence_libraries


def register(app: typer.Typer) -> None:
    app.command(
        "doctor",
        help="What is installed and usable here; for an adapter: its method, ranks, and whether it is in good health. "
        "Needs no base model. Exit code 1 if the adapter is broken.",
    )(doctor)


def doctor(
    adapter: Annotated[
        str | None, typer.Argument(metavar="[ADAPTER]", help="An adapter folder, or the directory of a finished run.")
    ] = None,
) -> None:
    silence_libraries()
    from lorma.export.doctor import environment, examine
    from lorma.runs.locate import finished_adapter

    console = plain_console()
    health = examine(finished_adapter(adapter)) if adapter is not None else None
    for name, value in environment().items():
        console.print(f"{name:>22}  {value}")
    if health is None:
        return
    console.print()
    for name, value in (
        ("method", health.method),
        ("base model", health.base),
        ("as a plain LoRA", health.lora),
        ("trained whole", ", ".join(health.others) or "nothing"),
    ):
        console.print(f"{name:>22}  {value}")
    rows = []
    for layer in health.layers:
        shapes = ", ".join(" × ".join(map(str, shape)) for shape in layer.shapes)
        condition = "—" if layer.condition is None else f"{layer.condition:.3g}"
        rank = "—" if layer.rank is None else str(layer.rank)
        rows.append((layer.name, rank, shapes, layer.dtype, "yes" if layer.finite else "NO", condition))
    levels = takewhile(lambda level: len(set(level)) == 1, zip(*(row[0].split(".")[:-1] for row in rows), strict=False))
    prefix = "".join(f"{level[0]}." for level in levels)
    if prefix and console.is_terminal:
        console.print(f"{'layers':>22}  names begin with {prefix}")
    print_rows(console, ("layer", "rank", "shapes", "dtype", "finite", "condition"), rows, prefix)
    for fault in health.faults:
        console.print(f"broken: {fault}")
    if health.faults:
        raise typer.Exit(1)
    console.print("healthy")
