"""LoRMA as a PEFT method."""

from lorma.tuners.lorma.config import LormaConfig
from lorma.tuners.lorma.layer import Linear, LormaLayer
from lorma.tuners.lorma.model import LormaModel
from lorma.tuners.registration import register

register("lorma", LormaConfig, LormaModel)

__all__ = ["Linear", "LormaConfig", "LormaLayer", "LormaModel"]
