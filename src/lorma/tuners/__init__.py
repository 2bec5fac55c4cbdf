"""LoRMA as PEFT methods: configuration, layers, models, and their registration with PEFT."""

from lorma.tuners.bottleneck import BottleneckConfig, BottleneckModel
from lorma.tuners.lorma import LormaConfig, LormaLayer, LormaModel, hotswap_adapter, prepare_for_hotswap
from lorma.tuners.originals import MergeReport
from lorma.tuners.svft import SvftConfig, SvftModel

__all__ = [
    "BottleneckConfig",
    "BottleneckModel",
    "LormaConfig",
    "LormaLayer",
    "LormaModel",
    "MergeReport",
    "SvftConfig",
    "SvftModel",
    "hotswap_adapter",
    "prepare_for_hotswap",
]
