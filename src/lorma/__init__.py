"""LoRMA: fine-tuning by multiplying frozen weights, as a method of Hugging Face PEFT.

Importing this package makes ``LORMA`` known to PEFT; from there ``get_peft_model``, ``PeftModel.from_pretrained``,
``model.add_adapter``, the Trainer and TRL take a :class:`LormaConfig` like any other.
"""

from lorma._quiet import without_remarks
from lorma._version import __version__
from lorma.errors import InputError

with without_remarks():
    from lorma.tuners import LormaConfig, LormaModel, MergeReport, hotswap_adapter, prepare_for_hotswap

__all__ = [
    "InputError",
    "LormaConfig",
    "LormaModel",
    "MergeReport",
    "__version__",
    "hotswap_adapter",
    "prepare_for_hotswap",
]
