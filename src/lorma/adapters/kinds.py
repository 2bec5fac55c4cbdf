"""What the adapter folders of each method of PEFT hold and are called, as the methods have entered it.

Reading, cards, `lorma doctor` and export ask here and know no method themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


def _nothing(config: Any) -> str:
    return ""


def _keep(model: Any) -> None:
    return None


@dataclass(frozen=True)
class AdapterKind:
    """The adapters of one ``peft_type``. What depends on the configuration is a function of it.

    Attributes:
        peft_type: what ``adapter_config.json`` calls the method.
        title: its name in text.
        equation: the adapted weight with its source, in Markdown; empty where it is not known here.
        summary: the method and its settings in one line; empty for the title alone.
        not_lora: why an adapter is no plain LoRA in other words; None where it is one, exactly.
        rank_dimension: which dimension of a weight is the rank, by the name of the weight.
        ranks_change: whether training leaves layers with other ranks than the configuration states, or none.
        linear: whether the update is a matrix that is added to the weight.
        after_loading: puts a loaded model right where PEFT's loading leaves it otherwise than it is used.
    """

    peft_type: str
    title: Callable[[Any], str]
    equation: Callable[[Any], str] = _nothing
    summary: Callable[[Any], str] = _nothing
    not_lora: Callable[[Any], str | None] = lambda config: "not known"
    rank_dimension: Mapping[str, int] = field(default_factory=dict)
    ranks_change: bool = False
    linear: bool = True
    after_loading: Callable[[Any], None] = _keep


_KINDS: dict[str, AdapterKind] = {}


def register_kind(kind: AdapterKind) -> None:
    """Enter what is known of a method's adapters; doing it again replaces it."""
    _KINDS[kind.peft_type] = kind


def known_types() -> list[str]:
    """The ``peft_type`` of every method that is entered."""
    return list(_KINDS)


def peft_type_of(config: Any) -> str:
    """``peft_type`` of a configuration as a plain text."""
    return str(getattr(config.peft_type, "value", config.peft_type))


def kind_of(config: Any) -> AdapterKind:
    """What is known of the adapters of a configuration; of a method that is not entered only its name."""
    name = peft_type_of(config)
    return _KINDS.get(name) or AdapterKind(name, lambda config: name)


def rank_dimensions() -> dict[str, int]:
    """Which dimension of a weight is the rank, by the name of the weight, over all methods."""
    return {name: dimension for kind in _KINDS.values() for name, dimension in kind.rank_dimension.items()}
