"""``lorma compose``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorma.cli.common import silence_libraries
from lorma.errors import InputError

HEADS = ("first", "second")


def register(app: typer.Typer) -> None:
    app.command(
        "compose",
        help="Two LoRMA₊ adapters into one that equals applying both: FIRST acts on the base weights first. Exact, of "
        "rank r₁ + r₂; no model is loaded.",
    )(compose)


def compose(
    first: Annotated[str, typer.Argument(help="The adapter that acts first: an adapter folder or a run directory.")],
    second: Annotated[str, typer.Argument(help="The adapter that acts on what the first has made.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write the new adapter into.")],
    base: Annotated[
        str | None,
        typer.Option(
            help="The base model. Its structure (no weights) tells the sides of side=auto, experts and grouped "
            "convolutions, which the adapters' files do not."
        ),
    ] = None,
    heads_from: Annotated[
        str | None,
        typer.Option(help="first or second: whose heads to keep where both adapters have trained the same ones."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a folder that holds nothing but an adapter.")
    ] = False,
) -> None:
    if heads_from not in (None, *HEADS):
        raise InputError(f"--heads-from={heads_from!r} must be first or second")
    silence_libraries()
    from lorma.export import ADAPTER, Base
    from lorma.export.compose import compose as write
    from lorma.files import check_output
    from lorma.runs.locate import base_arguments, finished_adapter

    check_output(output, overwrite, first, second, kind=ADAPTER)
    one, two = finished_adapter(first), finished_adapter(second)
    model = Base(**base_arguments(one, base)) if base is not None else None
    written = write(one, two, output, base=model, heads_from=heads_from)  # type: ignore[arg-type]
    ranks = sorted({written.tensors[f"{module}.lorma_A"].shape[0] for module in written.modules("lorma_A")})
    typer.echo(f"{output}: one adapter of rank {' or '.join(map(str, ranks))} that equals {first} and then {second}")
