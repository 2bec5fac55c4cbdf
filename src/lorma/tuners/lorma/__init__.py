"""LoRMA as a PEFT method."""

from lorma.tuners.lorma.attention import MultiheadAttention
from lorma.tuners.lorma.config import LormaConfig
from lorma.tuners.lorma.convolution import ConvNd
from lorma.tuners.lorma.embedding import Embedding
from lorma.tuners.lorma.hotswap import hotswap_adapter, prepare_for_hotswap
from lorma.tuners.lorma.layer import LormaLayer
from lorma.tuners.lorma.linear import Linear
from lorma.tuners.lorma.model import LormaModel
from lorma.tuners.lorma.parameter import ParamWrapper
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
