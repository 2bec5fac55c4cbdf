"""LoRMA adapters as they lie in a folder: factors and scalings of each layer, without a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lorma.adapters.folder import AdapterFile, compiled, matching
from lorma.functional.multiplier import Side
from lorma.methods.lorma.tuner.config import LormaConfig
from lorma.methods.lorma.tuner.fused import FusedProjection
from lorma.tuners.names import PREFIX


@dataclass(frozen=True)
class LayerFile:
    """One adapted layer of an adapter folder.

    Attributes:
        name: the layer's path in the base model.
        A, B: the factors as they are stored, r × N and N × r.
        scaling: the scalar s.
        fused: how the layer is cut, if the configuration says that it is.
    """

    name: str
    A: Tensor
    B: Tensor
    scaling: float
    fused: FusedProjection | None


def layers_of(adapter: AdapterFile) -> Iterator[LayerFile]:
    """The layers of a LoRMA adapter in order, each read when it is asked for.

    Raises:
        ValueError: one of the factors of a layer is missing, or they do not fit each other.
    """
    config: Any = adapter.config
    fused = compiled(config.fused_projections)
    for path in adapter.modules("lorma_A"):
        name = path.removeprefix(PREFIX)
        for factor in ("lorma_A", "lorma_B"):
            if f"{path}.{factor}" not in adapter.tensors:
                raise ValueError(f"{adapter.folder} lacks {path}.{factor}")
        A, B = adapter.read(f"{path}.lorma_A"), adapter.read(f"{path}.lorma_B")
        if A.ndim != 2 or B.shape != A.shape[::-1]:
            raise ValueError(f"{path}: lorma_A {tuple(A.shape)} and lorma_B {tuple(B.shape)} must be r × n and n × r")
        scaling = scaling_of(config, config_name(name, config), len(A))
        cut = matching(fused, config.fused_projections or {}, None, name)
        yield LayerFile(name, A, B, scaling, None if cut is None else FusedProjection.parse(name, cut))


def scaling_of(config: LormaConfig, name: str, r: int) -> float:
    """The scalar s of a layer of rank ``r`` that the configuration's patterns know as ``name``."""
    alphas = config.alpha_pattern
    return config.scaling(r, matching(compiled(alphas), alphas, config.lorma_alpha, name))


def config_name(name: str, config: LormaConfig) -> str:
    """The name under which the configuration's patterns know a layer, for one that holds a single weight."""
    return name.partition(".base_layer")[0]


def parts_of(layer: LayerFile, side: Side, blocks: int = 1) -> list[tuple[Tensor, Tensor]]:
    """The multipliers of a layer as views of its A and B: one for each slice, or one batch for all blocks.

    Raises:
        ValueError: the slices or blocks do not add up to the factors' width.
    """
    return split_factors(layer.A, layer.B, layer.fused, side, blocks)


def split_factors(
    A: Tensor, B: Tensor, fused: FusedProjection | None, side: Side, blocks: int
) -> list[tuple[Tensor, Tensor]]:
    """As :func:`parts_of`, for factors that are being written."""
    N = A.shape[1]
    if fused is not None:
        cuts = fused.cuts(side, N // len(fused.adapt))
        if cuts[-1][1].stop != N:
            raise ValueError(f"fused_projections cut a width of {cuts[-1][1].stop}, but the factors have {N}")
        return [(A[:, columns], B[columns]) for _, columns in cuts]
    if N % blocks:
        raise ValueError(f"factors of width {N} cannot be cut into {blocks} blocks")
    if blocks == 1:
        return [(A, B)]
    return [(A.unflatten(1, (blocks, -1)).movedim(1, 0), B.unflatten(0, (blocks, -1)))]
