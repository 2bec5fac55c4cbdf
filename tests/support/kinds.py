"""The kinds of layers: how each is built, and what an adapter does to its weight by the plain definition."""

from collections.abc import Callable
from dataclasses import dataclass, field

import bitsandbytes
import torch
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
from transformers.pytorch_utils import Conv1D

from support import plain

MODULE = {"target_modules": ["layer"]}
PARAMETER = {"target_parameters": ["layer.weight"]}
SPLITS, ADAPT = [4, 3, 3], [0, 2]
FUSED = {**MODULE, "fused_projections": {"layer": {"splits": SPLITS, "adapt": ADAPT}}}
QUANTISED_SIZE = (64, 128)
LOOSE = 3e-2
"""Relative tolerance where arithmetic in 8 bits or half precision is compared with exact arithmetic."""


@dataclass(frozen=True)
class Part:
    """One multiplied weight of a layer, by its name there.

    ``shape`` is (out, in) of one matrix, ``blocks`` how many of that shape there are; ``widths_by_side`` says otherwise
    where they differ. ``multiply`` is the plain definition, ``out_axis`` the dimension of the outputs.
    """

    shape: tuple[int, int]
    multiply: Callable = plain.matrix
    blocks: int = 1
    widths_by_side: dict[str, list[int]] | None = None
    out_axis: int = 0
    only_side: str | None = None
    weight: str = "weight"

    def widths(self, side: str) -> list[int]:
        """The n of every multiplier."""
        if self.widths_by_side is not None:
            return self.widths_by_side[side]
        return [self.shape[0 if side == "pre" else 1]] * self.blocks

    def acting_side(self, side: str) -> str:
        """The side that is multiplied in the end."""
        if self.only_side or side != "auto":
            return self.only_side or side
        return "pre" if sum(self.widths("pre")) <= sum(self.widths("post")) else "post"


@dataclass(frozen=True)
class Kind:
    """One row of the tables. Comparisons are relative, to ``tolerance``."""

    name: str
    built: str
    make: Callable[[torch.dtype], nn.Module]
    x: tuple[int, ...]
    parts: tuple[Part, ...]
    targets: dict = field(default_factory=lambda: MODULE)
    dtype: torch.dtype = torch.float64
    tolerance: float = 1e-10
    eval_tolerance: float | None = None
    """Where the base layer itself is less exact in evaluation mode."""
    vocabulary: int = 0
    read: Callable[[nn.Module], torch.Tensor] | None = None
    """Dequantises, for a kind that is quantised."""


class Experts(nn.Module):
    """Stacked weights; row i of a batch goes to expert i."""

    def __init__(self, transposed):
        super().__init__()
        self.is_transposed = transposed
        self.weight = nn.Parameter(torch.randn(3, 4, 5) if transposed else torch.randn(3, 5, 4))

    def forward(self, x):
        weight = self.weight if self.is_transposed else self.weight.mT
        return torch.einsum("bi,bio->bo", x, weight)


class Matrix(nn.Module):
    """A bare matrix and no bias."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 6))

    def forward(self, x):
        return nn.functional.linear(x, self.weight)


class Attention(nn.MultiheadAttention):
    """Self-attention of one input and one output."""

    def forward(self, x, **kwargs):
        return super().forward(x, x, x, **kwargs)[0]


def conv1d(outputs, inputs):
    """transformers' Conv1D, with a bias that is not zero."""
    layer = Conv1D(outputs, inputs)
    nn.init.normal_(layer.bias)
    nn.init.normal_(layer.weight)
    return layer


def full_precision(dtype):
    return nn.Linear(*QUANTISED_SIZE[::-1]).to(dtype)


def bnb_4bit(dtype):
    layer = bitsandbytes.nn.Linear4bit(*QUANTISED_SIZE[::-1], quant_type="nf4", compute_dtype=dtype)
    layer.support_avx512bf16_for_cpu = False  # as adapted layers have it: no repacking in evaluation
    return _bnb(layer, dtype)


def bnb_8bit(dtype):
    return _bnb(bitsandbytes.nn.Linear8bitLt(*QUANTISED_SIZE[::-1], has_fp16_weights=False), dtype)


def _bnb(layer, dtype):
    """bitsandbytes quantises when the layer is moved; on the meta device there is nothing to quantise yet."""
    if layer.weight.is_meta:
        return layer
    layer.to(dtype).load_state_dict(full_precision(dtype).state_dict())
    return layer.to("cpu")


def torchao(config):
    def make(dtype):
        layer = full_precision(dtype)
        quantize_(layer, config)
        return layer

    return make


def read_bnb_4bit(layer):
    return bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def read_bnb_8bit(layer):
    state = layer.state if layer.weight.CB is None else layer.weight
    return state.CB.float() * state.SCB[:, None] / 127


def read_torchao(layer):
    return layer.weight.dequantize()


def quantised(name, built, make, read, eval_tolerance=None):
    return Kind(
        name=name,
        built=built,
        make=make,
        x=(3, QUANTISED_SIZE[1]),
        parts=(Part(QUANTISED_SIZE),),
        dtype=torch.float32,
        tolerance=1e-5,
        eval_tolerance=eval_tolerance,
        read=read,
    )


def kind(name, built, build, x, *parts, **options):
    """A kind that is built in float32 and then cast."""
    return Kind(name, built, lambda dtype: build().to(dtype), x, parts, **options)


def slices(inputs):
    """Widths of the multipliers of a fused projection."""
    return {"pre": [SPLITS[i] for i in ADAPT], "post": [inputs] * len(ADAPT)}


FUSED_MATRIX = plain.fused(SPLITS, ADAPT)
KINDS = [
    kind("Linear", "`nn.Linear`", lambda: nn.Linear(6, 5), (3, 4, 6), Part((5, 6))),
    kind("Linear, no bias", "`nn.Linear(bias=False)`", lambda: nn.Linear(5, 6, bias=False), (3, 5), Part((6, 5))),
    kind(
        "Conv1D",
        "`transformers.pytorch_utils.Conv1D` (GPT-2)",
        lambda: conv1d(7, 6),
        (3, 6),
        Part((7, 6), plain.transposed, out_axis=1),
    ),
    kind(
        "Embedding",
        "`nn.Embedding`; multiplied on its embedding dimension, `post`, whatever `side` says",
        lambda: nn.Embedding(9, 6),
        (3, 4),
        Part((6, 6), plain.embedding, out_axis=1, only_side="post"),
        vocabulary=9,
    ),
    kind("Conv1d", "`nn.Conv1d`", lambda: nn.Conv1d(4, 6, 3), (3, 4, 7), Part((6, 4), plain.convolution)),
    kind(
        "Conv2d",
        "`nn.Conv2d`",
        lambda: nn.Conv2d(4, 3, (2, 3), stride=2, padding=1),
        (3, 4, 4, 5),
        Part((3, 4), plain.convolution),
    ),
    kind("Conv3d", "`nn.Conv3d`", lambda: nn.Conv3d(3, 4, 2), (3, 3, 3, 2, 3), Part((4, 3), plain.convolution)),
    kind(
        "Conv2d, groups",
        "`nn.Conv2d(groups=2)`; each group has its own multiplier",
        lambda: nn.Conv2d(8, 6, 2, groups=2),
        (3, 8, 3, 4),
        Part((3, 4), plain.convolution, blocks=2),
    ),
    kind(
        "Fused Linear",
        "`nn.Linear` that holds slices of unequal widths, two of three adapted (`fused_projections`)",
        lambda: nn.Linear(6, 10),
        (3, 4, 6),
        Part((10, 6), FUSED_MATRIX, widths_by_side=slices(6)),
        targets=FUSED,
    ),
    kind(
        "Fused Conv1D",
        "the same on `Conv1D` (GPT-2's `c_attn`)",
        lambda: conv1d(10, 3),
        (3, 3),
        Part((10, 3), plain.stored_in_out(FUSED_MATRIX), widths_by_side=slices(3), out_axis=1),
        targets=FUSED,
    ),
    kind(
        "Experts",
        "a parameter of shape experts × out × in (`target_parameters`); each expert has its own multiplier",
        lambda: Experts(False),
        (3, 4),
        Part((5, 4), plain.stacked, blocks=3),
        targets=PARAMETER,
    ),
    kind(
        "Experts, transposed",
        "the same stored experts × in × out (`is_transposed`)",
        lambda: Experts(True),
        (3, 4),
        Part((5, 4), plain.stored_in_out(plain.stacked), blocks=3),
        targets=PARAMETER,
    ),
    kind(
        "Matrix parameter",
        "a parameter of shape out × in (`target_parameters`)",
        Matrix,
        (3, 6),
        Part((5, 6)),
        targets=PARAMETER,
    ),
    kind(
        "MultiheadAttention",
        "`nn.MultiheadAttention`; query, key, value and output each have their own multiplier",
        lambda: Attention(6, 2, batch_first=True),
        (3, 4, 6),
        Part((6, 6), plain.fused([6, 6, 6], [0, 1, 2]), blocks=3, weight="in_proj_weight"),
        Part((6, 6), weight="out_proj.weight"),
    ),
    quantised("bitsandbytes NF4", "`bitsandbytes.nn.Linear4bit`", bnb_4bit, read_bnb_4bit, LOOSE),
    quantised("bitsandbytes int8", "`bitsandbytes.nn.Linear8bitLt`", bnb_8bit, read_bnb_8bit, LOOSE),
    quantised(
        "torchao int8", "`Int8WeightOnlyConfig` on `nn.Linear`", torchao(Int8WeightOnlyConfig(version=2)), read_torchao
    ),
    quantised(
        "torchao int4",
        "`IntxWeightOnlyConfig(weight_dtype=torch.int4)` on `nn.Linear`",
        torchao(IntxWeightOnlyConfig(weight_dtype=torch.int4)),
        read_torchao,
    ),
]
