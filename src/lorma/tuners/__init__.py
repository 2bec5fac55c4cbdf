"""LoRMA, TLoRA and what they are compared with as PEFT methods: configurations, layers, models, registration."""

from lorma.tuners.bottleneck import BottleneckConfig, BottleneckModel
from lorma.tuners.lorma import LormaConfig, LormaLayer, LormaModel, hotswap_adapter, prepare_for_hotswap
from lorma.tuners.originals import MergeReport
from lorma.tuners.quantized import prepare_gguf_for_training
from lorma.tuners.svft import SvftConfig, SvftModel
from lorma.tuners.tlora import TLoraConfig, TLoraLayer, TLoraModel

__all__ = [
    "BottleneckConfig",
    "BottleneckModel",
    "LormaConfig",
    "LormaLayer",
    "LormaModel",
    "MergeReport",
    "SvftConfig",
    "SvftModel",
    "TLoraConfig",
    "TLoraLayer",
    "TLoraModel",
    "hotswap_adapter",
    "prepare_for_hotswap",
    "prepare_gguf_for_training",
]
