"""Checks of configuration values: each raises naming the argument, its value and what is allowed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lorma.adapters.regex_cost import check_cost
from lorma.errors import did_you_mean

FLOAT32 = 2.0**-126, (2 - 2.0**-23) * 2.0**127
"""The smallest normal and the largest number of float32."""
MAX_RANK = 1 << 28
"""No factor holds more numbers than that: 1 GiB in float32."""


def check_rank(name: str, value: Any) -> None:
    """A rank is an int of at least 1, of a factor that can be held."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r} must be an int of at least 1, not {type(value).__name__}")
    if not 1 <= value <= MAX_RANK:
        raise ValueError(f"{name}={value} must be an int of at least 1 and at most {MAX_RANK:,}")


def check_alpha(name: str, value: Any) -> None:
    """An alpha is a finite number above 0: the scaling alpha / r appears under a square root.

    What counts is what it becomes beside factors in float32; other dtypes are asked by :func:`check_scaling`.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}={value!r} must be a finite number above 0, not {type(value).__name__}")
    least, most = FLOAT32
    if not least <= value <= most:
        raise ValueError(f"{name}={value} must be a finite number above 0 in float32: from {least:.3g} to {most:.3g}")


def check_scaling(layer: str, value: float, kind: Any) -> None:
    """A scaling must be a finite number above 0 in the dtype of the factors, whose ``torch.finfo`` is ``kind``."""
    if not kind.smallest_normal <= value <= kind.max:
        raise ValueError(
            f"the scaling of {layer}, {value:.3g} (alpha over the rank), must lie from {kind.smallest_normal:.3g} to "
            f"{kind.max:.3g}, what {kind.dtype} holds"
        )


def check_float32(name: str, value: Any) -> None:
    """A number must be finite in float32; what is no number is not looked at."""
    most = FLOAT32[1]
    if isinstance(value, (int, float)) and not -most <= value <= most:
        raise ValueError(f"{name}={value} must be a finite number in float32: at most {most:.3g}")


def check_dropout(name: str, value: Any) -> None:
    """A dropout probability lies in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}={value!r} must be a number in [0, 1), not {type(value).__name__}")
    if not 0 <= value < 1:
        raise ValueError(f"{name}={value} must lie in [0, 1)")


def check_choice(name: str, value: Any, allowed: Iterable[str]) -> None:
    """One of a fixed set of strings."""
    allowed = tuple(allowed)
    if not isinstance(value, str):
        raise TypeError(f"{name}={value!r} must be one of {', '.join(allowed)}, not {type(value).__name__}")
    if value not in allowed:
        raise ValueError(
            f"{name}={value!r} is not allowed; choose one of {', '.join(allowed)}{did_you_mean(value, allowed)}"
        )


def check_bool(name: str, value: Any) -> None:
    """True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r} must be true or false, not {type(value).__name__}")


def check_names(name: str, value: Any, *, pattern: bool = True) -> None:
    """None, a collection of strings, or (with ``pattern``) one string."""
    if value is None or (pattern and isinstance(value, str)):
        return
    kinds = "a string or a list of strings" if pattern else "a list of strings"
    if isinstance(value, (list, tuple, set)):
        wrong = [entry for entry in value if not isinstance(entry, str)]
        if not wrong:
            return
        raise TypeError(f"{name} must be {kinds}; it holds {wrong[0]!r}")
    raise TypeError(f"{name}={value!r} must be {kinds}, not {type(value).__name__}")


def check_regex(name: str, value: Any) -> None:
    """A string must compile as a regular expression that cannot take long; other values are not looked at."""
    if isinstance(value, str):
        check_cost(name, value)


def check_pattern(name: str, value: Any, check: Any) -> None:
    """A dict from module names (or regular expressions) to values that ``check`` accepts."""
    if not isinstance(value, dict):
        raise TypeError(f"{name}={value!r} must be a dict from module names to values, not {type(value).__name__}")
    for key, entry in value.items():
        if not isinstance(key, str):
            raise TypeError(f"{name} has the key {key!r}; keys must be module names or regular expressions")
        check_regex(f"key of {name}", key)
        check(f"{name}[{key!r}]", entry)


def check_tokens(name: str, value: Any) -> None:
    """None, a list of different token numbers (ints from 0), or a dict from names of embeddings to such lists."""
    if value is None:
        return
    if not isinstance(value, (list, tuple, dict)):
        raise TypeError(
            f"{name}={value!r} must be a list of token numbers, or a dict from names of embeddings to such lists, not "
            f"{type(value).__name__}"
        )
    if not value:
        raise ValueError(f"{name}={value!r} must name at least one token")
    if isinstance(value, dict):
        for key, entry in value.items():
            if not isinstance(key, str) or not key:
                raise TypeError(f"{name} has the key {key!r}; keys must be names of embeddings")
            if not isinstance(entry, (list, tuple)):
                raise TypeError(f"{name}[{key!r}]={entry!r} must be a list of token numbers")
            check_tokens(f"{name}[{key!r}]", entry)
        return
    seen = set()
    for token in value:
        if isinstance(token, bool) or not isinstance(token, int):
            raise TypeError(f"{name} must hold token numbers (ints from 0); it holds {token!r}")
        if token < 0:
            raise ValueError(f"{name} must hold token numbers (ints from 0); it holds {token}")
        if token in seen:
            raise ValueError(f"{name} must hold each token once; it holds {token} twice")
        seen.add(token)


def check_seed(name: str, value: Any) -> None:
    """A seed is an int from 0."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r} must be an int from 0, not {type(value).__name__}")
    if value < 0:
        raise ValueError(f"{name}={value} must be an int from 0")
