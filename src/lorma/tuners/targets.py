"""Names of modules, for errors about targets that match nothing."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from lorma.errors import closest


def closest_modules(model: nn.Module, wanted: Iterable[str]) -> str:
    """Last parts of module names that are spelled most like ``wanted``; the first eight if none is near."""
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    leaves = sorted(name for name in names if name and not name.isdigit() and name != "base_layer")
    near = [match for target in wanted for match in closest(target.rpartition(".")[2], leaves)]
    return ", ".join(dict.fromkeys(near or leaves[:8]))
