"""What several subcommands share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

if TYPE_CHECKING:
    from lorma.analysis import Table

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="Recipe file, or the name of a shipped recipe such as quickstart.")
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[SECTION.KEY=VALUE]...", help="Changes to the recipe, e.g. train.learning_rate=5e-4 adapter.r=16."
    ),
]
BaseOption = Annotated[
    str | None,
    typer.Option("--base", help="Base model, if not the recorded one: alias, directory, GGUF file or hub name."),
]


def plain_console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """A console that prints paths and messages as they are: no markup in them, no colours guessed, no line broken."""
    return Console(stderr=stderr, quiet=quiet, markup=False, highlight=False, soft_wrap=True)


def silence_libraries() -> None:
    """Turn off transformers' loading bars and chatter; recipes are checked before this costs its import."""
    import os

    if os.environ.get("TRANSFORMERS_VERBOSITY") == "error":
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()


def split_list(text: str | None) -> list[str] | None:
    """``"a,b"`` → ``["a", "b"]``; None stays None."""
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def print_table(console: Console, table: Table) -> None:
    """A comparison table and the notes under it; methods become columns where the terminal is too narrow for rows."""
    header, rows = table.cells()
    lines = [header, *rows]
    shown = _rich_table(table, lines)
    if Console(width=1000).measure(shown).maximum > console.width:
        shown = _rich_table(table, [list(column) for column in zip(*lines, strict=True)])
    console.print(shown, soft_wrap=False)
    for mark, note in [*(("Warning:", warning) for warning in table.warnings), *(("-", note) for note in table.notes)]:
        if console.is_terminal:
            hanging = RichTable.grid(padding=(0, 1, 0, 0))
            hanging.add_row(mark, note)
            console.print(hanging, soft_wrap=False)
        else:
            console.print(f"{mark} {note}")


def _rich_table(table: Table, lines: list[list[str]]) -> RichTable:
    shown = RichTable(title=f"{table.task} · {table.model}", title_justify="left")
    for position, name in enumerate(lines[0]):
        shown.add_column(name, justify="left" if position == 0 else "right")
    for line in lines[1:]:
        shown.add_row(*line)
    return shown


def print_rows(
    console: Console, header: Sequence[str], rows: Sequence[Sequence[str]], prefix: str = "", blocks: bool = False
) -> None:
    """Rows as a table whose first column is never cut or broken; without a terminal, a row a line, parted by tabs.

    Args:
        prefix: what every first column begins with; the table leaves it out.
        blocks: where the terminal is too narrow for the table, give each row a heading with its columns as lines below.
    """
    if not console.is_terminal:
        for row in (header, *rows):
            print("\t".join(row), file=console.file)  # a console would turn tabs into spaces
        return
    shown = RichTable(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    names = [row[0].removeprefix(prefix) for row in rows]
    shown.add_column(header[0], no_wrap=True, min_width=max(map(len, names), default=1))
    for name in header[1:]:
        shown.add_column(name, overflow="fold", min_width=max(map(len, name.split())))
    for name, row in zip(names, rows, strict=True):
        shown.add_row(name, *row[1:])
    if not blocks or Console(width=1000).measure(shown).maximum <= console.width:
        console.print(shown, soft_wrap=False)
        return
    for name, row in zip(names, rows, strict=True):
        console.print(Text(name, style="bold"))
        block = RichTable.grid(padding=(0, 2, 0, 0))
        for title, value in zip(header[1:], row[1:], strict=True):
            block.add_row(title, value)
        console.print(Padding(block, (0, 0, 0, 2)), soft_wrap=False)


def print_report_place(console: Console, index: Path) -> None:
    """Say where a report is."""
    console.print(f"Report: {index}")
