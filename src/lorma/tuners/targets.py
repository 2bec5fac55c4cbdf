"""Names of modules, for errors about targets that match nothing."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from lorma.errors import closest

SHOWN = 12


def near_modules(model: nn.Module, wanted: Iterable[str]) -> str:
    """What to say of ``wanted`` names that match nothing: the closest ones, or which layers there are to adapt.

    Near is what begins with a wanted name, else what holds it, else what is spelled like it. Names are the last parts
    of modules' paths.
    """
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    known = sorted(name for name in names if name and not name.isdigit() and name != "base_layer")
    near: list[str] = []
    for target in (target.rpartition(".")[2] for target in wanted):
        begin = [name for name in known if target and name.startswith(target)]
        near += begin or [name for name in known if target and target in name] or closest(target, known)
    if near:
        return f"closest names: {', '.join(list(dict.fromkeys(near))[:SHOWN])}"
    layers = {
        path.removesuffix(".base_layer").rpartition(".")[2]
        for path, module in model.named_modules()
        if getattr(getattr(module, "weight", None), "ndim", 0) > 1
    }
    shown = sorted(layers)
    return f"layers that can be adapted: {', '.join(shown[:SHOWN])}{', …' if len(shown) > SHOWN else ''}"


def no_match(model: nn.Module, config: Any, reason: object) -> str:
    """The message for a configuration that matches no module; PEFT's ``reason`` where its target modules do exist."""
    targets = config.target_modules or ()
    paths = [f".{path}" for path, _ in model.named_modules()]
    if isinstance(targets, str):
        known = any(re.fullmatch(targets, path[1:]) for path in paths)
        rule = "; a string is a regular expression that whole paths must match" if targets.isidentifier() else ""
        shown, wanted = repr(targets), [targets]
    else:
        wanted, rule = sorted(targets), ""
        known = any(path.endswith(f".{name}") for path in paths for name in wanted)
        shown = repr(wanted)
    if known or not targets:
        return str(reason)
    return f"target_modules={shown} matches no module of this model{rule}; {near_modules(model, wanted)}"
