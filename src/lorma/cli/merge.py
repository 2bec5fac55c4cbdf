"""``lorma merge``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorma.cli.common import BaseOption, silence_libraries


def register(app: typer.Typer) -> None:
    app.command(
        "merge",
        help="Write the base model with an adapter merged into it, as an ordinary checkpoint. Weights are read and "
        "written one at a time; then the result is compared with the adapted model on a prompt.",
    )(merge)


def merge(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="A run directory, or an adapter folder.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    base: BaseOption = None,
    verify: Annotated[
        bool, typer.Option(help="Load the adapted and the merged model, one at a time, and compare their outputs.")
    ] = True,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a folder that holds nothing but a model.")
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let the base model's repository run its own Python.")
    ] = False,
) -> None:
    silence_libraries()
    from lorma.export import MODEL, Base
    from lorma.export.merge import merge as write
    from lorma.files import check_output
    from lorma.runs.locate import base_arguments, finished_adapter

    check_output(output, overwrite, adapter, kind=MODEL)
    folder = finished_adapter(adapter)
    model = Base(**base_arguments(folder, base, trust_remote_code=trust_remote_code))
    done = write(folder, output, model, verify=verify)
    typer.echo(
        f"{done.tensors} weights, {done.changed} of them changed, {done.bytes / 1e6:,.0f} MB in {done.shards} file(s): "
        f"{done.folder}"
    )
    typer.echo(done.note or f"outputs on a prompt differ from the adapted model's by {done.difference:.2g} (relative)")
