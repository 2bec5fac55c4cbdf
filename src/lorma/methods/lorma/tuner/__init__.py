"""LoRMA as a PEFT method."""

from lorma.methods.lorma.tuner.attention import MultiheadAttention
from lorma.methods.lorma.tuner.config import LormaConfig
from lorma.methods.lorma.tuner.convolution import ConvNd
from lorma.methods.lorma.tuner.embedding import Embedding
from lorma.methods.lorma.tuner.hotswap import hotswap_adapter, prepare_for_hotswap
from lorma.methods.lorma.tuner.layer import LormaLayer
from lorma.methods.lorma.tuner.linear import Linear
from lorma.methods.lorma.tuner.model import LormaModel
from lorma.methods.lorma.tuner.parameter import ParamWrapper
from lorma.tuners.registration import register

register("lorma", LormaConfig, LormaModel)

__all__ = [
    "ConvNd",
    "Embedding",
    "Linear",
    "LormaConfig",
    "LormaLayer",
    "LormaModel",
    "MultiheadAttention",
    "ParamWrapper",
    "hotswap_adapter",
    "prepare_for_hotswap",
]
