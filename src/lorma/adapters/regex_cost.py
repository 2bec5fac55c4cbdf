"""How long a regular expression can take, told from the expression alone.

Python's engine tries every way in which a pattern can match before it gives up, and a pattern like ``(a+)+$`` has
exponentially many. Adapters are passed around and carry patterns for module names, so the ways are counted first: a
bound is multiplied up over what follows each other, over what is repeated, and over alternatives that can begin alike.
What grows with a power of the name's length is counted for a usual name, what grows exponentially for the longest.
"""

from __future__ import annotations

import itertools
import re
import sys
from typing import Any

from lorma.adapters.untrusted import MAX_NAME

if sys.version_info >= (3, 11):
    from re import _constants as op  # type: ignore[attr-defined]
    from re import _parser as parser  # type: ignore[attr-defined]
else:
    import sre_constants as op
    import sre_parse as parser

NAME_LENGTH = 40
"""Length of a module name that ways are counted for, except of repeats that have several ways each time."""
MAX_WAYS = 10_000_000
"""Four ``.*`` in a row have 2.8 million; matching a name of 60 letters against that takes 0.05 seconds."""
MAX_BRANCHES = 1000
"""Alternatives that are compared pairwise."""
MAX_LENGTH = 100_000
"""Characters of a pattern. A list of every layer of a large model, joined by ``|``, has some ten thousand."""

REPEATS = {op.MAX_REPEAT, op.MIN_REPEAT, getattr(op, "POSSESSIVE_REPEAT", None)}
TOO_MANY = MAX_WAYS + 1


def check_cost(name: str, pattern: str) -> None:
    """Refuse a regular expression that can take too long to match.

    Raises:
        ValueError: if it does not compile, is too long, or has too many ways to match a module name.
    """
    if len(pattern) > MAX_LENGTH:
        raise ValueError(f"{name} is a pattern of {len(pattern):,} characters; allowed: {MAX_LENGTH:,}")
    try:
        ways = ways_of(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"{name}={pattern!r} is not a regular expression: {reason}") from None
    if ways > MAX_WAYS:
        raise ValueError(
            f"{name}={pattern!r} can take very long to match: it nests or strings together too many repetitions; "
            "name the modules with fewer of + * ? and {}, or in a list"
        )


def ways_of(pattern: str) -> int:
    """Bound on the ways in which a pattern that :func:`check_cost` lets pass can match a module name."""
    tree = parser.parse(pattern)
    return _ways(tree, bool(tree.state.flags & re.IGNORECASE))


def _ways(sequence: Any, folded: bool) -> int:
    """Of a sequence; ``folded`` where upper and lower case match each other."""
    ways = 1
    for kind, argument in sequence:
        ways = min(ways * _ways_of(kind, argument, folded), TOO_MANY)
    return ways


def _ways_of(kind: Any, argument: Any, folded: bool) -> int:
    if kind in REPEATS:
        low, high, body = argument
        return _ways_of_repeat(low, high, body, folded)
    if kind is op.BRANCH:
        branches = argument[1]
        return min(_ways_of_branches(branches, folded), TOO_MANY)
    if kind is op.SUBPATTERN:
        _, on, off, body = argument
        return _ways(body, bool((folded or on & re.IGNORECASE) and not off & re.IGNORECASE))
    if kind in (op.ASSERT, op.ASSERT_NOT):
        return _ways(argument[1], folded)
    if kind is op.GROUPREF_EXISTS:
        return min(sum(_ways(part, folded) for part in argument[1:] if part is not None), TOO_MANY)
    if kind is getattr(op, "ATOMIC_GROUP", None):
        return _ways(argument, folded)
    return 1


def _ways_of_repeat(low: int, high: int, body: Any, folded: bool) -> int:
    """However long the body, one time more than ``low`` is counted: many such repeats may follow each other."""
    inner, shortest = _ways(body, folded), max(body.getwidth()[0], 1)
    longest = NAME_LENGTH if inner == 1 else MAX_NAME
    most = max(min(int(high), max(longest // shortest, 1)), int(low))
    if inner == 1:
        return min(most - int(low) + 1, TOO_MANY)
    ways, power = 0, min(inner ** min(int(low), 30), TOO_MANY)
    for _ in range(int(low), most + 1):
        ways += power
        if ways > MAX_WAYS:
            return TOO_MANY
        power *= inner
    return ways


def _ways_of_branches(branches: Any, folded: bool) -> int:
    """Alternatives match at one place only if the letters that one begins with begin the other.

    Which letters match each other without regard to case is not looked up: any two alternatives are then taken to.
    """
    if folded or len(branches) > MAX_BRANCHES:
        return sum(_ways(branch, folded) for branch in branches)
    known = [(_beginning(branch), _ways(branch, folded)) for branch in branches]
    return max(sum(w for other, w in known if b[: len(other)] == other[: len(b)]) for b, _ in known)


def _beginning(branch: Any) -> list[int]:
    return [letter for _, letter in itertools.takewhile(lambda part: part[0] is op.LITERAL, branch)]
