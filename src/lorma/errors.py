"""Errors that mean "the input is wrong", kept apart from "the work failed"."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """A recipe, command, data file or adapter that cannot be used as given.

    The message is one line that names the key, its value and what is allowed. The command line turns it into exit
    code 2; every other exception is exit code 1.
    """


@contextmanager
def reading() -> Iterator[None]:
    """While inputs are read: what permissions do not allow becomes an :class:`InputError`. Also a decorator."""
    try:
        yield
    except PermissionError as error:
        raise InputError(f"{error.filename} cannot be read: permission denied") from None


def closest(name: str, options: Iterable[str], limit: int = 3) -> list[str]:
    """The ``limit`` entries of ``options`` spelled most like ``name``, best first; empty when none is near."""
    return difflib.get_close_matches(name, list(options), n=limit, cutoff=0.5)


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the nearest option, or an empty string when none is near."""
    near = closest(name, options, limit=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def one_line(message: object, limit: int = 400) -> str:
    """A message in one line that a terminal can show: no breaks, no control characters, its middle cut out if long."""
    text = str(message)
    if len(text) > limit:
        text = f"{text[: limit // 2]} … {text[-(limit // 2) :]}"
    text = " ".join(text.split())
    return "".join(letter if letter.isprintable() else "?" for letter in text)
