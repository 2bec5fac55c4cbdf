"""``lorma export``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorma.cli.common import BaseOption, silence_libraries
from lorma.errors import InputError

if TYPE_CHECKING:
    from lorma.export import LayerReport

FORMATS = ("lora", "gguf")


def register(app: typer.Typer) -> None:
    app.command("export", help="Write an adapter as plain LoRA: a PEFT folder, or a file for llama.cpp.")(export)


def export(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="A run directory, or an adapter folder.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder to write; for gguf, a file that ends in .gguf.")
    ],
    format: Annotated[
        str, typer.Option("--format", help="lora (a folder that PEFT loads without lorma) or gguf (llama.cpp).")
    ] = "lora",
    base: BaseOption = None,
    dtype: Annotated[str, typer.Option(help="Precision of the LoRA: float32, float16 or bfloat16.")] = "float32",
    uniform_rank: Annotated[
        bool, typer.Option("--uniform-rank", help="Pad all layers to the largest rank, for servers that need one.")
    ] = False,
    truncate_rank: Annotated[
        int | None, typer.Option(help="Approximate layers that are no LoRA (permutation, none) by one of this rank.")
    ] = None,
    truncate_energy: Annotated[
        float | None, typer.Option(help="The same, by the lowest rank that keeps this share of ‖ΔW‖², e.g. 0.99.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a file, or a folder that holds nothing but an adapter.")
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let the base model's repository run its own Python.")
    ] = False,
) -> None:
    if format not in FORMATS:
        raise InputError(f"--format={format!r} must be {' or '.join(FORMATS)}")
    if format == "lora" and output.suffix == ".gguf":
        raise InputError(
            f"output={str(output)!r}: a file for llama.cpp takes --format gguf; --format lora writes a folder, whose "
            "name must not end in .gguf"
        )
    silence_libraries()
    from lorma.export import ADAPTER, Base, Truncation, export_gguf, export_lora
    from lorma.files import check_output
    from lorma.runs.locate import base_arguments, finished_adapter

    check_output(output, overwrite, adapter, kind=None if format == "gguf" else ADAPTER)
    truncation = None
    if truncate_rank is not None or truncate_energy is not None:
        truncation = Truncation(truncate_rank, truncate_energy)
    folder = finished_adapter(adapter)
    model = Base(**base_arguments(folder, base, trust_remote_code=trust_remote_code))
    write = export_gguf if format == "gguf" else export_lora
    reports = write(
        folder,
        output,
        base=model,
        dtype=dtype,
        uniform_rank=uniform_rank,
        truncation=truncation,
        overwrite=overwrite,
    )
    _print(reports, output)


def _print(reports: list[LayerReport], output: Path) -> None:
    truncated = [report for report in reports if report.error is not None]
    if truncated:
        typer.echo("layer\trank\terror\t‖ΔW‖/‖W0‖")
        for report in truncated:
            typer.echo(f"{report.layer}\t{report.rank}\t{report.error:.3g}\t{report.change:.3g}")
        typer.echo(f"{len(truncated)} layers are approximated; error is ‖ΔW − B'A'‖ / ‖ΔW‖")
    ranks = sorted({report.rank for report in reports})
    shown = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    typer.echo(f"{len(reports)} layers, {shown}: {output}")
