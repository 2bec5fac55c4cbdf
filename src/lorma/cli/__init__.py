"""The ``lorma`` command. One file a subcommand: parse, call, print. Heavy imports wait until a command runs."""

from __future__ import annotations

import io
import sys
from typing import Annotated

import typer

from lorma._version import __version__
from lorma.cli import compare, compose, doctor, evaluate, export, merge, methods, predict, report, train
from lorma.cli.common import plain_console
from lorma.errors import InputError, one_line

ERROR_LENGTH = 2000
INTERRUPTED = 130
"""The exit code typer turns Ctrl-C into."""
RESUMED = frozenset({"train", "compare"})
"""Commands that go on where they were interrupted."""

app = typer.Typer(
    name="lorma",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    help="Fine-tune language models by multiplying their weights (LoRMA), beside LoRA and full fine-tuning.",
    epilog="Exit codes: 0 done; 1 the work failed; 2 the command, recipe or data is wrong.",
)
for module in (train, evaluate, predict, compare, report, methods, merge, export, compose, doctor):
    module.register(app)


@app.callback(invoke_without_command=True)
def common(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and the libraries' own messages.")] = False,
) -> None:
    if version:
        typer.echo(f"lorma {__version__}")
        raise typer.Exit
    if not debug:
        _quieten()


def main() -> None:
    """Run the command line; errors become one line and an exit code."""
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.insert(1, sys.argv.pop(sys.argv.index("--debug")))
    if isinstance(sys.stdout, io.TextIOWrapper):  # an ASCII terminal gets a question mark for what it cannot show
        sys.stdout.reconfigure(errors="replace")
    errors = plain_console(stderr=True)
    try:
        app(prog_name="lorma")
    except InputError as error:
        if debug:
            raise
        errors.print(f"lorma: {one_line(error, ERROR_LENGTH)}")
        sys.exit(2)
    except SystemExit as stop:
        if stop.code != INTERRUPTED:
            raise
        resumes = not RESUMED.isdisjoint(sys.argv[1:3])
        errors.print("lorma: interrupted" + "; the same command goes on from the last checkpoint" * resumes)
        sys.exit(1)
    except Exception as error:
        if debug:
            raise
        reason = one_line(error, ERROR_LENGTH) or "no message"
        errors.print(f"lorma: failed: {type(error).__name__}: {reason} (--debug shows more)")
        sys.exit(1)


def _quieten() -> None:
    import logging
    import os
    import warnings

    warnings.filterwarnings("ignore")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
