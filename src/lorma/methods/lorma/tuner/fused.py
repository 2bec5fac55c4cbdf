"""Fused projections: one linear layer that holds several weights on top of each other.

GPT-2's ``c_attn`` holds the query, key and value projections, Phi's ``qkv_proj`` the same with unequal widths, and
``gate_up_proj`` two halves of an MLP. Each slice that is adapted has a multiplier of its own, as if it were a layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lorma.functional.multiplier import Side


@dataclass(frozen=True)
class FusedProjection:
    """How the outputs of one layer are cut, and which slices are adapted.

    Attributes:
        splits: widths of the slices, in order; their sum is the layer's number of outputs.
        adapt: indices of the adapted slices, ascending.
    """

    splits: tuple[int, ...]
    adapt: tuple[int, ...]

    @classmethod
    def parse(cls, name: str, value: Any) -> FusedProjection:
        """Read one entry of ``fused_projections``; ``adapt`` left out means every slice.

        Raises:
            TypeError, ValueError: naming the entry, its value and what is allowed.
        """
        where = f"fused_projections[{name!r}]"
        shape = '{"splits": [768, 768, 768], "adapt": [0, 2]}'
        if not isinstance(value, dict) or not {"splits"} <= set(value) <= {"splits", "adapt"}:
            raise TypeError(f"{where}={value!r} must be a dict like {shape}")
        splits = value["splits"]
        adapt = value.get("adapt")
        if not _ints(splits) or len(splits) < 2 or min(splits) < 1:
            raise ValueError(f"{where}['splits']={splits!r} must be a list of two or more widths (ints of at least 1)")
        if adapt is None:
            adapt = range(len(splits))
        elif not _ints(adapt) or not adapt or len(set(adapt)) < len(adapt) or not set(adapt) <= set(range(len(splits))):
            raise ValueError(
                f"{where}['adapt']={adapt!r} must be a list of different slice indices from 0 to {len(splits) - 1}"
            )
        return cls(tuple(splits), tuple(sorted(adapt)))

    def width(self, side: Side, in_features: int) -> int:
        """N: the widths of the adapted slices together (``pre``), or the inputs once for each of them (``post``)."""
        return sum(self.splits[i] for i in self.adapt) if side == "pre" else len(self.adapt) * in_features

    def rows(self, index: int) -> slice:
        """The outputs of slice ``index``."""
        start = sum(self.splits[:index])
        return slice(start, start + self.splits[index])

    def cuts(self, side: Side, in_features: int) -> list[tuple[slice, slice]]:
        """For every adapted slice: its outputs, and its part of N in A and B."""
        cuts, start = [], 0
        for index in self.adapt:
            stop = start + (self.splits[index] if side == "pre" else in_features)
            cuts.append((self.rows(index), slice(start, stop)))
            start = stop
        return cuts


def _ints(values: Any) -> bool:
    return isinstance(values, (list, tuple)) and all(isinstance(v, int) and not isinstance(v, bool) for v in values)
