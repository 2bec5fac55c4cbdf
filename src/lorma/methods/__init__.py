"""The fine-tuning methods a recipe can name, each built from the same few knobs. Light to import.

A method of your own is a module that calls :func:`register_method`, and an entry point of the group ``lorma.methods``
that names the module; see docs/methods.md.
"""

from lorma.methods import whole  # isort: skip
from lorma.methods import adalora, peft  # isort: skip
from lorma.methods import bottleneck, lorma, relora, svft, tlora
from lorma.methods.base import (
    GROUP,
    Context,
    Hooks,
    Method,
    Options,
    all_methods,
    get_method,
    method_names,
    register_method,
)

__all__ = [
    "GROUP",
    "Context",
    "Hooks",
    "Method",
    "Options",
    "adalora",
    "all_methods",
    "bottleneck",
    "get_method",
    "lorma",
    "method_names",
    "peft",
    "register_method",
    "relora",
    "svft",
    "tlora",
    "whole",
]
