"""Numbers as people read them."""

from __future__ import annotations

import math
from collections.abc import Sequence

MISSING = "—"


def count(value: int) -> str:
    return f"{value:,}"


def setting(value: float | None) -> str:
    return MISSING if value is None else f"{value:g}"


def metric(value: float | None, sd: float | None = None) -> str:
    """Three decimals below 10 (accuracy, F1, loss), two above (BLEU, perplexity); the deviation to the same place."""
    if value is None or not math.isfinite(value):
        return MISSING
    places = 3 if abs(value) < 10 else 2
    return f"{value:.{places}f}" if sd is None else f"{value:.{places}f} ± {sd:.{places}f}"


def area(value: float | None) -> str:
    return MISSING if value is None else f"{value:,.2f}"


def percent(value: float | None) -> str:
    """A signed change, with a true minus sign and no sign on what rounds to zero."""
    if value is None:
        return MISSING
    text = f"{value:+.1f} %".replace("-", "−")
    return text[1:] if text[1:] == "0.0 %" else text


def seconds(value: float) -> str:
    return f"{value:,.1f} s"


def memory(value: int | None) -> str:
    if value is None:
        return MISSING
    return f"{value / 2**30:,.2f} GiB" if value >= 2**30 else f"{value / 2**20:,.0f} MiB"


def listing(items: Sequence[object]) -> str:
    """``a, b and c``."""
    words = [str(item) for item in items]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
