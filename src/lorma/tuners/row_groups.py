"""Which rows of a batch pass through which adapters."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass

import torch
from torch import Tensor

from lorma.functional.multiplier import Inflation

Routes = list[tuple[Tensor | None, list[str]]]
"""Which rows of a batch (None: all) pass through which adapters, in their order."""
BASE = "__base__"


@dataclass(frozen=True)
class Group:
    """Rows of a mixed batch whose adapters differ in nothing but their numbers, so that one product can serve all.

    Attributes:
        rows: which rows, those of one adapter after those of another.
        names: the adapters.
        counts: how many rows each has.
        on_inputs: whether they multiply the input of the base layer, and not its output.
        inflation: which multiplier they have.
    """

    rows: Tensor
    names: list[str]
    counts: list[int]
    on_inputs: bool
    inflation: Inflation


def divide(
    adapter_names: list[str],
    known: Container[str],
    kind_of: Callable[[str], tuple[bool, Inflation, int] | None],
    device: torch.device,
) -> tuple[Routes, list[Group]]:
    """Divide the rows of a mixed batch: routes through single adapters, and groups.

    Args:
        adapter_names: one for each row; names that are not ``known`` stand for the base layer.
        kind_of: whether an adapter acts on inputs, its inflation and its rank; None if it cannot be grouped.
    """
    rows_of: dict[str, list[int]] = {}
    for row, name in enumerate(adapter_names):
        rows_of.setdefault(name, []).append(row)
    routes: Routes = []
    together: dict[tuple[bool, Inflation, int], list[str]] = {}
    for name, rows in rows_of.items():
        if name in known:
            kind = kind_of(name)
            if kind is None:
                routes.append((torch.tensor(rows, device=device), [name]))
            else:
                together.setdefault(kind, []).append(name)
    groups = []
    for (on_inputs, inflation, _), names in together.items():
        order = torch.tensor([row for name in names for row in rows_of[name]], device=device)
        groups.append(Group(order, names, [len(rows_of[name]) for name in names], on_inputs, inflation))
    return routes, groups
