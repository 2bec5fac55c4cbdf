"""The fine-tuning methods a recipe can name, each built from the same few knobs. Light to import.

A method of your own is a module that calls :func:`register_method`, and an entry point of the group ``lorma.methods``
that names the module; see docs/methods.md.
"""

from lorma.training.methods import whole  # isort: skip
from lorma.training.methods import adalora, additive, multiplicative, own
from lorma.training.methods.registry import GROUP, Method, all_methods, get_method, method_names, register_method

__all__ = [
    "GROUP",
    "Method",
    "adalora",
    "additive",
    "all_methods",
    "get_method",
    "method_names",
    "multiplicative",
    "own",
    "register_method",
    "whole",
]
