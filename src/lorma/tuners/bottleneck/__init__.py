"""Bottleneck adapters as a PEFT method."""

from lorma.tuners.bottleneck.config import BottleneckConfig
from lorma.tuners.bottleneck.layer import BottleneckLayer
from lorma.tuners.bottleneck.model import BottleneckModel
from lorma.tuners.registration import register

register("bottleneck", BottleneckConfig, BottleneckModel)

__all__ = ["BottleneckConfig", "BottleneckLayer", "BottleneckModel"]
