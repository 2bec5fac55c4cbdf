"""LoRMA and TLoRA: fine-tuning by multiplying frozen weights, or with r × r numbers a layer, as methods of PEFT.

Importing this package makes ``LORMA`` and ``TLORA`` known to PEFT, at once if PEFT is imported already, else as soon as
it is; from there ``get_peft_model``, ``PeftModel.from_pretrained``, ``model.add_adapter``, the Trainer and TRL take a
:class:`LormaConfig` or :class:`TLoraConfig` like any other. The import itself costs next to nothing: torch,
transformers and PEFT are imported when one of the names below is asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lorma._peft_hook import when_peft_is_imported
from lorma._version import __version__
from lorma.errors import InputError

if TYPE_CHECKING:
    from lorma.methods.lorma.tuner import LormaConfig, LormaModel, hotswap_adapter, prepare_for_hotswap
    from lorma.methods.tlora.tuner import TLoraConfig, TLoraModel
    from lorma.tuners.merge_state import MergeReport
    from lorma.tuners.quantized import prepare_gguf_for_training

__all__ = [
    "InputError",
    "LormaConfig",
    "LormaModel",
    "MergeReport",
    "TLoraConfig",
    "TLoraModel",
    "__version__",
    "hotswap_adapter",
    "prepare_for_hotswap",
    "prepare_gguf_for_training",
]


_TUNERS = {
    **dict.fromkeys(
        ("LormaConfig", "LormaModel", "hotswap_adapter", "prepare_for_hotswap"), "lorma.methods.lorma.tuner"
    ),
    **dict.fromkeys(("TLoraConfig", "TLoraModel"), "lorma.methods.tlora.tuner"),
    "MergeReport": "lorma.tuners.merge_state",
    "prepare_gguf_for_training": "lorma.tuners.quantized",
}


def __getattr__(name: str) -> Any:
    if name not in _TUNERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lorma._quiet import without_remarks

    with without_remarks():
        return getattr(importlib.import_module(_TUNERS[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


when_peft_is_imported("lorma.methods.tuners")
