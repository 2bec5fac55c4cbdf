"""LoRMA and TLoRA: fine-tuning by multiplying frozen weights, or with r × r numbers a layer, as methods of PEFT.

Importing this package makes ``LORMA`` and ``TLORA`` known to PEFT; from there ``get_peft_model``,
``PeftModel.from_pretrained``, ``model.add_adapter``, the Trainer and TRL take a :class:`LormaConfig` or
:class:`TLoraConfig` like any other.
"""

from lorma._quiet import without_remarks
from lorma._version import __version__
from lorma.errors import InputError

with without_remarks():
    from lorma.tuners import (
        LormaConfig,
        LormaModel,
        MergeReport,
        TLoraConfig,
        TLoraModel,
        hotswap_adapter,
        prepare_for_hotswap,
    )

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
]
