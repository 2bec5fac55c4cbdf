"""TLoRA as a PEFT method."""

from lorma.methods.tlora.tuner.config import TLoraConfig
from lorma.methods.tlora.tuner.layer import TLoraLayer
from lorma.methods.tlora.tuner.model import TLoraModel
from lorma.tuners.registration import register

register("tlora", TLoraConfig, TLoraModel)

__all__ = ["TLoraConfig", "TLoraLayer", "TLoraModel"]
