"""TLoRA on each kind of layer: ``out = base(x) + dropout(α·x·A·B·C)``, the base layer a black box."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, cast

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lorma import functional, kernels
from lorma.methods.tlora.tuner.config import TLoraConfig
from lorma.methods.tlora.tuner.layer import TLoraLayer
from lorma.tuners.attention import AttentionLayer
from lorma.tuners.parameter import ParameterLayer, ParameterWrapper
from lorma.tuners.plain import drops, plain_weight
from lorma.tuners.updating import UpdatingLayer


class Updated(UpdatingLayer, TLoraLayer):
    """What layers that are called have in common."""

    def _updated(self, x: Tensor, result: Tensor, name: str) -> Tensor:
        return result + self.tlora_dropout[name](self._update(x, *self._matrices(name)))

    @abstractmethod
    def _update(self, x: Tensor, A: Tensor, B: Tensor, C: Tensor, scale: Tensor) -> Tensor:
        """``α·x·A·B·C`` in the dtype of the matrices."""


class Linear(Updated):
    """TLoRA on ``nn.Linear``, transformers' ``Conv1D`` and every quantised linear layer."""

    def _is_plain(self, name: str, x: Tensor) -> bool:
        held = cast(Any, self._modules)  # looked up once: this is called for every token that is generated
        dropout, A = held["tlora_dropout"]._modules[name], held["tlora_A"]._modules[name].weight
        if drops(dropout) or type(x) is not Tensor or A.is_meta or held["tlora_B"]._modules[name].weight.is_meta:
            return False
        weight = plain_weight(self.base_layer)
        return weight is not None and x.dtype == weight.dtype == A.dtype and not kernels.under_autocast(x)

    def _forward_alone(self, x: Tensor, name: str, *args: Any, **kwargs: Any) -> Tensor:
        """The update is added to the base layer's output where it lies; nothing but x·A (r numbers a token) is kept."""
        base: Any = self.base_layer
        if args or kwargs:
            return super()._forward_alone(x, name, *args, **kwargs)
        A, B, C, scale = self._matrices(name)
        rows = x if x.ndim == 2 else x.reshape(-1, A.shape[0])
        out = F.linear(rows, base.weight.T if type(base) is Conv1D else base.weight, base.bias)
        out = kernels.add_product(out, (rows @ A) @ (scale * B), C)
        return out if x.ndim == 2 else out.view(*x.shape[:-1], C.shape[1])

    def _update(self, x: Tensor, A: Tensor, B: Tensor, C: Tensor, scale: Tensor) -> Tensor:
        return functional.tri_matrix_update(self._cast_input_dtype(x, A.dtype), A, B, C, scale)

    def _stored(self, matrix: Tensor, weight: Tensor) -> Tensor:
        return matrix.mT if isinstance(self.get_base_layer(), Conv1D) else matrix


class Embedding(Updated):
    """TLoRA on ``nn.Embedding``: tokens are inputs, so A is V × r and C is r × D."""

    def _update(self, x: Tensor, A: Tensor, B: Tensor, C: Tensor, scale: Tensor) -> Tensor:
        update = (F.embedding(x, A) @ (scale * B)) @ C
        base: Any = self.get_base_layer()
        factor = getattr(base, "embed_scale", None)  # Gemma multiplies what it looks up, rounded to the weight's dtype
        if isinstance(factor, Tensor):
            factor = factor.to(base.weight.dtype)
        return update if factor is None else update * factor

    def _stored(self, matrix: Tensor, weight: Tensor) -> Tensor:
        return matrix.mT

    def lora_form_of(self, adapter_name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
        """As every layer's, for the weight as V × D: ``A' = C``, ``B' = α·A·B``."""
        down, up = super().lora_form_of(adapter_name, weight)
        return up.mT, down.mT


class ConvNd(Updated):
    """TLoRA on ``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d``.

    A is a kernel with r outputs, run with the strides, padding and dilation of the base layer, and B·C a kernel of
    size 1. With groups, each group of inputs passes through the same A and B, and has its own columns of C.
    """

    @property
    def blocks(self) -> int:  # type: ignore[override]
        """Groups of the convolution."""
        return cast(int, self.get_base_layer().groups)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Outputs, and inputs of a group times positions of the kernel."""
        base: Any = self.get_base_layer()
        return base.out_channels, base.in_channels // base.groups * math.prod(base.kernel_size)

    def _update(self, x: Tensor, A: Tensor, B: Tensor, C: Tensor, scale: Tensor) -> Tensor:
        base: Any = self.get_base_layer()
        kernel = A.mT.reshape(A.shape[1], -1, *base.kernel_size)
        kernel = kernel.repeat(base.groups, *(1,) * (kernel.ndim - 1))
        narrow = base._conv_forward(self._cast_input_dtype(x, A.dtype), kernel, None)
        wide = ((scale * B) @ C).mT.reshape(C.shape[1], -1, *(1,) * len(base.kernel_size))
        convolve = (F.conv1d, F.conv2d, F.conv3d)[len(base.kernel_size) - 1]
        return convolve(narrow, wide, groups=base.groups)


class TLoraParameterLayer(ParameterLayer, TLoraLayer):
    """A bare parameter that is updated."""

    def update_layer(self, adapter_name: str, *, config: TLoraConfig, **options: Any) -> None:
        """As every layer's.

        Raises:
            ValueError: for dropout, which needs the layer's own output.
        """
        self.refuse(tlora_dropout=config.tlora_dropout)
        super().update_layer(adapter_name, config=config, **options)


class ParamWrapper(ParameterWrapper, TLoraParameterLayer):
    """TLoRA on one 2-D or 3-D parameter of any module; the experts of a stack count as one tall matrix."""

    def _stored(self, matrix: Tensor, weight: Tensor) -> Tensor:
        if not self._transposed:
            return matrix.reshape(weight.shape)
        return matrix.reshape(weight.mT.shape).mT


class MultiheadAttention(AttentionLayer, TLoraParameterLayer):
    """TLoRA on both weights of ``nn.MultiheadAttention``: query, key and value as one tall matrix, and ``out_proj``."""

    inner_class = Linear
    blocks = 3


KINDS: dict[type[nn.Module], Any] = {
    nn.Linear: Linear,
    Conv1D: Linear,
    nn.Embedding: Embedding,
    nn.Conv1d: ConvNd,
    nn.Conv2d: ConvNd,
    nn.Conv3d: ConvNd,
    nn.MultiheadAttention: MultiheadAttention,
}
