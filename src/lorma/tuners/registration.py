"""Making PEFT know a method it does not ship.

PEFT looks methods up by members of its ``PeftType`` enum, which has no door for third parties. The enum is therefore
given one more member at import; what PEFT relies on (lookup by value, by attribute, by iteration) is checked at once,
so that a PEFT or Python that changes the ground under us fails with a clear error and not somewhere in a training run.
"""

from __future__ import annotations

import platform
from typing import Any

import peft
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType, register_peft_method
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from lorma.tuners.factors import MAGNITUDE, WEIGHT

TESTED_PEFT_VERSIONS = ("0.21.0", "0.21.1", "0.21.2")
"""PEFT releases the test suite was run against."""


def extend_peft_type(name: str) -> PeftType:
    """Add ``name`` to ``PeftType``, or return the member it already has.

    Raises:
        RuntimeError: if the member cannot be found again in every way PEFT looks one up.
    """
    if name not in PeftType.__members__:
        member: Any = str.__new__(PeftType, name)
        member._name_ = member._value_ = name
        member._sort_order_ = len(PeftType.__members__)
        member.__objclass__ = PeftType
        type.__setattr__(PeftType, name, member)
        PeftType._member_names_.append(name)
        PeftType._member_map_[name] = member
        PeftType._value2member_map_[name] = member
    found: Any = PeftType.__members__.get(name)
    taken = (
        isinstance(found, PeftType)
        and found == name
        and getattr(PeftType, name, None) is found
        and PeftType(name) is found
        and found in list(PeftType)
    )
    if not taken:
        raise RuntimeError(
            f"PEFT {peft.__version__} on Python {platform.python_version()} did not take the method {name!r} "
            f"(tested with PEFT {', '.join(TESTED_PEFT_VERSIONS)}); please report this with both versions"
        )
    return found


def register(name: str, config_cls: type, model_cls: Any) -> None:
    """Register a method with PEFT under the lower-case ``name``; doing it again is harmless.

    Raises:
        RuntimeError: if another package has registered a method of this name, or PEFT did not take it.
    """
    peft_type = extend_peft_type(name.upper())
    if peft_type not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls)
        _add_renamings(model_cls.prefix)
    if PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type) is not config_cls:
        raise RuntimeError(f"the PEFT method {name!r} is taken by {PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type)!r}")
    if PEFT_TYPE_TO_TUNER_MAPPING.get(peft_type) is not model_cls:
        raise RuntimeError(f"PEFT {peft.__version__} did not take the tuner class of {name!r}")


def _add_renamings(prefix: str) -> None:
    """Make transformers' own ``load_adapter`` find the parameters of a method by their names in adapter files.

    It puts the adapter's name behind ``lorma_A`` and does not ask PEFT for the rest of the name.
    """
    ends = {rf"{prefix}magnitude_vector": MAGNITUDE, rf"{prefix}\w+": WEIGHT}
    ours = [WeightRenaming(rf"(\.{part}\.[^.]+)(?!.)", rf"\1.{leaf}") for part, leaf in ends.items()]
    known = get_checkpoint_conversion_mapping("legacy") or []
    register_checkpoint_conversion_mapping("legacy", [*known, *ours], overwrite=True)
