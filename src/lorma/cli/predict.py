"""``lorma predict``."""

from __future__ import annotations

from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Annotated

import typer

from lorma.cli.common import BaseOption, silence_libraries, split_list
from lorma.errors import InputError
from lorma.files import check_output, write_atomic


def register(app: typer.Typer) -> None:
    app.command("predict", help="Classify, rate or complete texts with a finished run or an adapter folder.")(predict)


def predict(
    source: Annotated[str, typer.Argument(metavar="RUN_OR_ADAPTER", help="A run directory, or its adapter folder.")],
    text: Annotated[list[str] | None, typer.Option(help="A text; repeat for several.")] = None,
    text_pair: Annotated[
        list[str] | None, typer.Option(help="The second text of each pair, for adapters trained on pairs.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help="A .txt file (a text a line) or a table with the training columns.")
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(help="Columns of the file to give beside the answers, parted by commas. [default: all with -o]"),
    ] = None,
    delimiter: Annotated[str | None, typer.Option(help="What parts the fields of a CSV or TSV file.")] = None,
    encoding: Annotated[str | None, typer.Option(help="Of a text file that is not UTF-8, e.g. cp1252.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write JSON lines here instead of printing.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that exists.")] = False,
    base: BaseOption = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Length limit of a completion; the model's positions bound it as well.")
    ] = 128,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let the base model's repository run its own Python.")
    ] = False,
) -> None:
    if bool(text) == bool(file):
        raise InputError("give either --text or --file")
    if text_pair and len(text_pair) != len(text or []):
        raise InputError(f"--text-pair is given {len(text_pair)} times and --text {len(text or [])} times")
    for option, value in (("columns", columns), ("delimiter", delimiter), ("encoding", encoding)):
        if value is not None and not file:
            raise InputError(f"--{option} applies only to --file")
    if output:
        check_output(output, overwrite, *([file] if file else []), kind=None)
    silence_libraries()
    from lorma.tasks import answer_line, kept_columns, read_prediction_rows, text_row
    from lorma.training.inference import load_predictor

    predictor = load_predictor(source, base, trust_remote_code=trust_remote_code)
    if file:
        rows = read_prediction_rows(file, predictor.meta, delimiter=delimiter, encoding=encoding)
    else:
        rows = [text_row(predictor.meta, *pair) for pair in zip_longest(text or [], text_pair or [])]
    kept = kept_columns(rows, predictor.meta, split_list(columns), written=output is not None)
    answers = predictor.predict(rows, max_new_tokens, say=partial(typer.echo, err=True))
    if output:
        lines = [answer_line(row, answer, kept) for row, answer in zip(rows, answers, strict=True)]
        write_atomic(output, "\n".join(lines) + "\n")
        typer.echo(f"{len(lines)} answers in {output}")
        return
    for row, answer in zip(rows, answers, strict=True):
        shown = [f"{part:.4f}" if isinstance(part, float) else str(part) for part in answer.values()]
        if columns is not None or "completion" not in answer:
            shown.append(" | ".join(str(row.get(column)) for column in kept))
        typer.echo("\t".join(shown))
