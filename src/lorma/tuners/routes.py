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
    """Rows of a mixed batch whose adapters differ in nothing but their numbers, so that one product serves all.

    Attributes:
        rows: which rows, ascending.
        names: the adapter of each.
        on_inputs: whether they multiply the input of the base layer, and not its output.
        inflation: which multiplier they have.
    """

    rows: Tensor
    names: list[str]
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
    single: dict[str, list[int]] = {}
    together: dict[tuple[bool, Inflation, int], list[int]] = {}
    kinds = {name: kind_of(name) for name in dict.fromkeys(adapter_names) if name in known}
    for row, name in enumerate(adapter_names):
        if name not in kinds:
            continue
        kind = kinds[name]
        if kind is None:
            single.setdefault(name, []).append(row)
        else:
            together.setdefault(kind, []).append(row)
    routes: Routes = [(torch.tensor(rows, device=device), [name]) for name, rows in single.items()]
    groups = [
        Group(torch.tensor(rows, device=device), [adapter_names[row] for row in rows], on_inputs, inflation)
        for (on_inputs, inflation, _), rows in together.items()
    ]
    return routes, groups
