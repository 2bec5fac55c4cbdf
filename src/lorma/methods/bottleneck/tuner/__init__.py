"""Bottleneck adapters as a PEFT method."""

from lorma.adapters.kinds import AdapterKind, register_kind
from lorma.methods.bottleneck.tuner.config import BottleneckConfig
from lorma.methods.bottleneck.tuner.layer import BottleneckLayer
from lorma.methods.bottleneck.tuner.model import BottleneckModel
from lorma.tuners.registration import register

register("bottleneck", BottleneckConfig, BottleneckModel)
register_kind(AdapterKind("BOTTLENECK", title=lambda config: "bottleneck", linear=False))

__all__ = ["BottleneckConfig", "BottleneckLayer", "BottleneckModel"]
