"""LoRMA as PEFT methods: configuration, layers, models, and their registration with PEFT."""

from lorma.tuners.lorma import LormaConfig, LormaLayer, LormaModel, hotswap_adapter, prepare_for_hotswap
from lorma.tuners.originals import MergeReport

__all__ = ["LormaConfig", "LormaLayer", "LormaModel", "MergeReport", "hotswap_adapter", "prepare_for_hotswap"]
