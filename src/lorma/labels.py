"""One spelling for a class label, whatever type the file kept it in."""

from __future__ import annotations

import math
from collections.abc import Iterable


def label_text(value: object) -> str | None:
    """The class name of a label cell, or ``None`` when the cell is empty.

    Text is stripped of surrounding white space; whole numbers lose their decimals (``1.0`` → ``"1"``); booleans are
    spelled as JSON and YAML spell them (``"true"``, ``"false"``). NaN, ``None`` and blank text count as empty.

    Raises:
        ValueError: the value is a fractional number, a list or anything else that cannot name a class.
    """
    if value is None:
        return None
    if isinstance(value, str):
        return value.strip() or None
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        if math.isnan(value):
            return None
        if value.is_integer():
            return str(int(value))
    raise ValueError(f"{value!r} cannot name a class: use text or whole numbers")


def class_order(names: Iterable[str]) -> list[str]:
    """Distinct class names in sorted order: by value when all are integers (``"2"`` before ``"10"``), else by text."""
    distinct = set(names)
    if all(name.removeprefix("-").isdecimal() for name in distinct):
        return sorted(distinct, key=lambda name: (int(name), name))
    return sorted(distinct)


def listed(names: Iterable[str], limit: int = 12) -> str:
    """``"'a', 'b', … (40 in all)"``: names for an error message, cut after ``limit``."""
    everything = list(names)
    shown = ", ".join(repr(name) for name in everything[:limit])
    return shown if len(everything) <= limit else f"{shown}, … ({len(everything)} in all)"
