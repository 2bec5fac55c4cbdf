"""LoRMA: fine-tuning by multiplying frozen weights, as a method of Hugging Face PEFT.

Importing this package makes ``LORMA`` known to PEFT; from there ``get_peft_model``, ``PeftModel.from_pretrained``,
``model.add_adapter``, the Trainer and TRL take a :class:`LormaConfig` like any other.
"""

import logging

# Importing PEFT imports what is installed for quantisation, which tells at length of kernels it has not got here.
_disabled = logging.root.manager.disable
logging.disable(max(_disabled, logging.WARNING))

from lorma._version import __version__  # noqa: E402
from lorma.errors import InputError  # noqa: E402
from lorma.tuners import LormaConfig, LormaModel, MergeReport, hotswap_adapter, prepare_for_hotswap  # noqa: E402

logging.disable(_disabled)

__all__ = [
    "InputError",
    "LormaConfig",
    "LormaModel",
    "MergeReport",
    "__version__",
    "hotswap_adapter",
    "prepare_for_hotswap",
]
