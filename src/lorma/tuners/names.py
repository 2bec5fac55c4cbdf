"""Names of weights without what wrappers of the model put into them.

``torch.compile`` of a base model puts ``_orig_mod.`` into the path of every module, and ``get_peft_model`` on a model
that is a ``PeftModel`` already puts ``base_model.model.`` there twice. An adapter belongs to the model inside, with
whichever of these it was trained and is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable

from lorma.errors import InputError

PREFIX = "base_model.model."
"""What PEFT calls the base model in the names of weights."""
COMPILED = "_orig_mod."
"""What ``torch.compile`` calls it."""


def unwrapped(name: str) -> str:
    """The name that a weight has without wrappers."""
    name = name.replace(COMPILED, "")
    while name.startswith(PREFIX + PREFIX):
        name = name.removeprefix(PREFIX)
    return name


def by_unwrapped(names: Iterable[str]) -> dict[str, str]:
    """Names by what they are without wrappers.

    Raises:
        InputError: two of them are the same then.
    """
    found: dict[str, str] = {}
    for name in names:
        if found.setdefault(unwrapped(name), name) != name:
            raise InputError(f"{found[unwrapped(name)]} and {name} name the same weight")
    return found
