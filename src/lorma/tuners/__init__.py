"""LoRMA as PEFT methods: configuration, layers, models, and their registration with PEFT."""

from lorma.tuners.lorma import LormaConfig, LormaLayer, LormaModel

__all__ = ["LormaConfig", "LormaLayer", "LormaModel"]
