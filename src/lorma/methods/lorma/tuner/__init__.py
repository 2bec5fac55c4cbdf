"""LoRMA as a PEFT method."""

from lorma.adapters.kinds import AdapterKind, register_kind
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


def _title(config: LormaConfig) -> str:
    return "DoRMA" if config.use_dora else "LoRMA"


def _summary(config: LormaConfig) -> str:
    extra = " with DoRA (DoRMA)" if config.use_dora else ""
    return f"LoRMA, inflation={config.inflation}, side={config.side}{extra}"


def _equation(config: LormaConfig) -> str:
    multiplier = {"plus": "(I + s·BA)", "permutation": "s·Iπ(BA)", "none": "s·BA"}[config.inflation]
    product = f"W0·{multiplier}" if config.side == "post" else f"{multiplier}·W0"
    where = ", on the narrower side of each layer" if config.side == "auto" else ""
    rows = ", each row rescaled to a trained magnitude (DoRA, arXiv 2402.09353)" if config.use_dora else ""
    return f"`W = {product}`{where} with A and B trained{rows} (LoRMA, arXiv 2506.07621)"


def _not_lora(config: LormaConfig) -> str | None:
    if config.inflation != "plus":
        return f"no: with inflation={config.inflation!r} the update has full rank; truncated only"
    if config.use_dora:
        return "no: use_dora rescales whole rows of the weight"
    return "no: each expert has an update of its own" if config.target_parameters else None


register("lorma", LormaConfig, LormaModel)
register_kind(
    AdapterKind("LORMA", _title, _equation, _summary, _not_lora, {"lorma_A": 0, "lorma_B": 1}),
)

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
