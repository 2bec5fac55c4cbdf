"""TLoRA as a PEFT method."""

from lorma.tuners.registration import register
from lorma.tuners.tlora.config import TLoraConfig
from lorma.tuners.tlora.layer import TLoraLayer
from lorma.tuners.tlora.model import TLoraModel

register("tlora", TLoraConfig, TLoraModel)

__all__ = ["TLoraConfig", "TLoraLayer", "TLoraModel"]
