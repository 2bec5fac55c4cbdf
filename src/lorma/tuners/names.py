"""Names of weights without what wrappers of the model put into them, and after transformers has renamed its modules.

``torch.compile`` of a base model puts ``_orig_mod.`` into the path of every module, and ``get_peft_model`` on a model
that is a ``PeftModel`` already puts ``base_model.model.`` there twice. An adapter belongs to the model inside, with
whichever of these it was trained and is loaded.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

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


def renamed(model: nn.Module, names: Iterable[str], known: Collection[str]) -> dict[str, str]:
    """New names of weights of an adapter by those that its file has.

    A name that the model does not know is tried with the renamings with which transformers reads older checkpoints of
    this architecture, as PEFT does for LoRA's weights and no others. Names that stay unknown are left as they are.

    Args:
        model: adapted or not.
        names: names in the file.
        known: names that the adapted model has, as they stand in a file.
    """
    found = {name: name for name in names}
    unknown = [name for name in found if name not in known]
    base: Any = getattr(model, "get_base_model", lambda: model)()
    renamings = renamings_of(base) if unknown else []
    inner = {name.removeprefix(PREFIX): name for name in known} if renamings else {}
    for name in unknown if renamings else ():
        plain = name.removeprefix(PREFIX)
        new, _ = rename_source_key(plain, renamings, [], getattr(base, "base_model_prefix", ""), inner)
        found[name] = inner.get(new, name)
    return found


def renamings_of(base: nn.Module) -> list[WeightRenaming]:
    """How transformers renames the weights of older checkpoints of a model; of other libraries' models none."""
    inner: Any = getattr(base, "_orig_mod", base)
    if not hasattr(getattr(inner, "config", None), "model_type"):
        return []
    transforms = get_model_conversion_mapping(inner)
    return [transform for transform in transforms if isinstance(transform, WeightRenaming)]
