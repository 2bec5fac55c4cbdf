"""What every TLoRA layer has, whatever it wraps: fixed and trained matrices, the formula for ΔW.

The weight counts as one matrix of d × k: a convolution's kernel as out × (in/groups · positions), stacked experts and
the projections of an attention as one tall matrix. So every layer trains r² + 1 numbers, and its update has rank r.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lorma import functional
from lorma.methods.tlora.tuner.config import TLoraConfig
from lorma.tuners.additive import AdditiveLayer
from lorma.tuners.devices import execution_device
from lorma.tuners.factors import Factors
from lorma.tuners.names import unwrapped


class TLoraLayer(AdditiveLayer):
    """Base of all TLoRA layers.

    Attributes, each keyed by adapter name: ``tlora_B`` (r × r) and ``tlora_scale`` (one number), trained; ``tlora_A``
    (k × r) and ``tlora_C`` (r × d), buffers; ``r``, ``seed``, ``tlora_dropout``, ``undo``; and on the first layer of
    an adapter ``tlora_checksum``, 8 bytes and one more for each of the adapter's layers. ``drawn_as`` has the name that
    the layer was trained under, where transformers has renamed it since.
    """

    adapter_layer_names = ("tlora_B", "tlora_scale")
    fixed_names = ("tlora_A", "tlora_C")
    other_param_names = (
        "r",
        "seed",
        "tlora_dropout",
        "undo",
        "tlora_A",
        "tlora_C",
        "tlora_checksum",
        "drawn_as",
        "sources",
        "twins",
    )

    def __init__(self, base_layer: nn.Module, layer_name: str, **quantization_kwargs: Any) -> None:
        super().__init__(base_layer, layer_name, **quantization_kwargs)
        self.r: dict[str, int] = {}
        self.seed: dict[str, int] = {}
        self.drawn_as: dict[str, str] = {}
        self.sources: dict[str, TLoraLayer] = {}
        self.tlora_dropout = nn.ModuleDict({})
        self.tlora_B = Factors()
        self.tlora_scale = Factors()
        self.tlora_A = Factors()
        self.tlora_C = Factors()
        self.tlora_checksum = Factors()
        module: Any = self
        module.register_load_state_dict_post_hook(_draw_again)

    @classmethod
    def tensor_names(cls) -> tuple[str, ...]:
        """As every layer's, and the checksum."""
        return (*super().tensor_names(), "tlora_checksum")

    def update_layer(self, adapter_name: str, *, config: TLoraConfig, r: int) -> None:
        """Add an adapter, or replace the one of this name."""
        self.r[adapter_name] = r
        self.seed[adapter_name] = config.seed
        self.undo[adapter_name] = config.undo
        self.twins.pop(adapter_name, None)
        self.sources.pop(adapter_name, None)
        self.tlora_dropout[adapter_name] = nn.Dropout(config.tlora_dropout) if config.tlora_dropout else nn.Identity()
        dtype = self._start_dtype()
        self.tlora_B[adapter_name] = nn.Parameter(torch.zeros(r, r, dtype=dtype))
        self.tlora_scale[adapter_name] = nn.Parameter(torch.ones(1, dtype=dtype))
        twin = self._twin(adapter_name) if config.save_projection else None
        if twin is None:
            matrices = self._start_projections(adapter_name)
        else:
            matrices = self.tlora_A[twin].clone(), self.tlora_C[twin].clone()
        for held, matrix in zip((self.tlora_A, self.tlora_C), matrices, strict=True):
            held.put(adapter_name, matrix.to(dtype), saved=config.save_projection)
        if adapter_name in self.tlora_checksum:
            del self.tlora_checksum[adapter_name]
        self.reset_parameters(adapter_name, config.init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    def tie(self, adapter_name: str, source: Any) -> None:
        """As every layer's: ``W0 + α·A·B·C`` for the weight as V × D, so that a linear layer transposes all three."""
        for values in ("r", "seed"):
            getattr(self, values)[adapter_name] = getattr(source, values)[adapter_name]
        self.sources[adapter_name] = source
        self.tlora_B.share(adapter_name, source.tlora_B)
        self.tlora_scale.share(adapter_name, source.tlora_scale)
        saved = source.tlora_A.is_saved(adapter_name)
        A, C = self._as_here(source, source.tlora_A[adapter_name], source.tlora_C[adapter_name])
        for held, matrix in ((self.tlora_A, A), (self.tlora_C, C)):
            held.put(adapter_name, matrix.clone(), saved=saved)
        super().tie(adapter_name, source)

    def _as_here(self, source: TLoraLayer, A: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
        """A and C of an embedding for this layer, which may store the same weight with inputs and outputs swapped."""
        return (C.mT.contiguous(), A.mT.contiguous()) if self.matrix_shape != source.matrix_shape else (A, C)

    def _twin(self, adapter_name: str) -> str | None:
        """Another adapter of the same rank and seed whose A and C came with its file, and may be drawn nowhere else."""
        kind = self.r[adapter_name], self.seed[adapter_name]
        others = (name for name in self.tlora_A if name != adapter_name and (self.r[name], self.seed[name]) == kind)
        return next((name for name in others if self.tlora_A.is_saved(name)), None)

    def reset_parameters(self, adapter_name: str, init_weights: bool) -> None:
        """Fill B and the scale with the start of training, or B with noise if ``init_weights`` is False."""
        B, scale = self.tlora_B[adapter_name], self.tlora_scale[adapter_name]
        if B.is_meta:
            return
        with torch.no_grad():
            scale.fill_(1)
            if init_weights:
                B.zero_()
            else:
                nn.init.kaiming_uniform_(B, a=5**0.5)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """d and k of the weight as one matrix."""
        return self.out_features, self.in_features // self.blocks

    def _start_projections(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """A and C; without memory for a model without memory, whose parameters are only counted or not yet loaded."""
        base = self.get_base_layer()
        device = execution_device(base, self._get_base_layer_device_and_dtype(base)[0])
        if device is not None and device.type == "meta":
            (d, k), r = self.matrix_shape, self.r[adapter_name]
            return torch.empty(k, r, device="meta"), torch.empty(r, d, device="meta")
        return self.draw_projections(adapter_name)

    def draw_projections(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """A (k × r) and C (r × d) of one adapter, drawn again; see :func:`functional.draw_projections`.

        What ``torch.compile`` puts into the names of modules is left out: the matrices are those of the plain model.
        """
        if adapter_name in self.sources:
            source = self.sources[adapter_name]
            return self._as_here(source, *source.draw_projections(adapter_name))
        name = unwrapped(self.drawn_as.get(adapter_name, self.layer_name))
        return functional.draw_projections(self.seed[adapter_name], name, *self.matrix_shape, self.r[adapter_name])

    def projection_checksum(self, adapter_name: str) -> bytes:
        """8 bytes that tell whether two machines have drawn the same A and C."""
        held = self.tlora_A[adapter_name], self.tlora_C[adapter_name]
        exact = not held[0].is_meta and held[0].dtype.itemsize >= 4
        return functional.checksum(*(held if exact else self.draw_projections(adapter_name)))

    def redraw(self, adapter_name: str) -> None:
        """Put A and C as they are drawn in place of what is held, which a cast of the model may have rounded."""
        for held, matrix in zip((self.tlora_A, self.tlora_C), self.draw_projections(adapter_name), strict=True):
            old = held[adapter_name]
            if not old.is_meta:
                held[adapter_name] = matrix.to(old.device, old.dtype)

    def _tensors(self, adapter_name: str) -> Iterator[tuple[Any, Tensor]]:
        """As every layer's; matrices that had no memory get it when the base layer has."""
        self._draw_late(adapter_name)
        return super()._tensors(adapter_name)

    def _draw_late(self, adapter_name: str) -> None:
        if adapter_name in self.tlora_A and self.tlora_A[adapter_name].is_meta:
            matrices = self._start_projections(adapter_name)
            dtype = self.tlora_A[adapter_name].dtype
            for held, matrix in zip((self.tlora_A, self.tlora_C), matrices, strict=True):
                held[adapter_name] = matrix.to(dtype)

    def _matrices(self, adapter_name: str, like: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A, B, C and α of one adapter, on the device and in the dtype of ``like``."""
        A, C = self.tlora_A[adapter_name], self.tlora_C[adapter_name]
        if A.is_meta and like is not None and not like.is_meta:
            A, C = self.draw_projections(adapter_name)
        B = self.tlora_B[adapter_name]
        if adapter_name in self.sources and self.matrix_shape != self.sources[adapter_name].matrix_shape:
            B = B.mT
        all_four = A, B, C, self.tlora_scale[adapter_name]
        return all_four if like is None else tuple(t.to(like.device, like.dtype) for t in all_four)

    def _stored(self, matrix: Tensor, weight: Tensor) -> Tensor:
        """A d × k matrix in the layout of the stored ``weight``."""
        return matrix.reshape(weight.shape)

    def delta_weight_of(self, adapter_name: str, weight: Tensor) -> Tensor:
        """``α·(A·B·C)ᵀ`` in the layout, device and dtype of ``weight``, whatever numbers that holds."""
        return self._stored(functional.tri_matrix_delta(*self._matrices(adapter_name, weight)), weight)

    def lora_form_of(self, adapter_name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
        """As every layer's; see :func:`functional.tri_matrix_lora_form`."""
        if self.blocks > 1:
            raise ValueError(
                f"adapter {adapter_name!r} of {self.layer_name} is no LoRA: one update runs through all groups or "
                "experts of the weight"
            )
        return functional.tri_matrix_lora_form(*self._matrices(adapter_name, weight))

    def arithmetic_error_of(self, adapter_name: str, norm: float) -> float:
        """Bound on the error (Frobenius norm) of adding the update to a weight of this norm in float64."""
        A, B, C, scale = (t.double() for t in self._matrices(adapter_name))
        size = (A.norm() * (scale * B).norm() * C.norm()).item()
        return 4 * torch.finfo(torch.float64).eps * (sum(self.matrix_shape) * size + norm)


def _draw_again(layer: Any, _: Any) -> None:
    """After a state dict is loaded: A and C that are no part of it are put as they are drawn, whatever was there."""
    for name in layer.undo:
        layer._draw_late(name)
        if not layer.tlora_A.is_saved(name):
            layer.redraw(name)
