"""Running the command line: in this process for speed, or as a real process where that is the point."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Sequence
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


IN_TURN = """
import contextlib, io, json, sys
from lorma.cli import main
results = []
for command in json.load(sys.stdin):
    sys.argv, out, err, code = ["lorma", *command], io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
    results.append((code, out.getvalue(), err.getvalue()))
print(json.dumps(results))
"""


def cli_as_anybody(*commands: Sequence[object]) -> list[Result]:
    """Several ``lorma`` commands in a process in which permissions hold for root as well."""
    done = subprocess.run(
        [sys.executable, "-c", IN_TURN],
        input=json.dumps([list(map(str, command)) for command in commands]),
        env=os.environ | {"COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
        preexec_fn=_give_up_capabilities,
    )
    return [Result(*result) for result in json.loads(done.stdout)]


def _give_up_capabilities() -> None:
    if os.geteuid() == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        drop_from_bounds, override_permissions, override_reading = 24, 1, 2
        for capability in (override_permissions, override_reading):
            if libc.prctl(drop_from_bounds, capability, 0, 0, 0):
                raise OSError(ctypes.get_errno(), "prctl")
