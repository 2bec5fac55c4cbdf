"""Running the command line: in this process for speed, or as a real process where that is the point."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest


class Result(NamedTuple):
    code: int
    out: str
    err: str


def run_cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> Result:
    """``lorma ARGUMENTS`` in this process."""
    from lorma.cli import main

    monkeypatch.setattr(sys, "argv", ["lorma", *map(str, arguments)])
    capsys.readouterr()
    try:
        main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return Result(code, captured.out, captured.err)


def start_cli(*arguments: object, cwd: Path | None = None, **options: object) -> subprocess.Popen[str]:
    """``lorma ARGUMENTS`` as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "lorma", *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "200"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,  # type: ignore[call-overload]
    )


def cli_process(*arguments: object, cwd: Path | None = None, **options: object) -> Result:
    """``lorma ARGUMENTS`` as a process of its own, waited for."""
    process = start_cli(*arguments, cwd=cwd, **options)
    out, err = process.communicate(timeout=600)
    return Result(process.returncode, out, err)
