"""SVFT as a PEFT method."""

from lorma.tuners.registration import register
from lorma.tuners.svft.config import SvftConfig
from lorma.tuners.svft.layer import SvftLayer
from lorma.tuners.svft.model import SvftModel

register("svft", SvftConfig, SvftModel)

__all__ = ["SvftConfig", "SvftLayer", "SvftModel"]
