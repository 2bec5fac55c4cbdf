"""SVFT as a PEFT method."""

from lorma.methods.svft.tuner.config import SvftConfig
from lorma.methods.svft.tuner.layer import SvftLayer
from lorma.methods.svft.tuner.model import SvftModel
from lorma.tuners.registration import register

register("svft", SvftConfig, SvftModel)

__all__ = ["SvftConfig", "SvftLayer", "SvftModel"]
