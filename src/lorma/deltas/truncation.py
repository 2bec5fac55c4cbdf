"""The nearest matrix of low rank, where an update has no exact low-rank form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorma.errors import InputError

EXACT_SIDE = 1024
"""Up to this many rows or columns the whole SVD is computed; beyond, a randomised one."""
OVERSAMPLING = 16
POWER_ITERATIONS = 4


@dataclass(frozen=True)
class Truncation:
    """How much of an update is kept: a number of directions, or a share of its energy (squared Frobenius norm).

    Raises:
        InputError: neither or both are given, or a value is out of range.
    """

    rank: int | None = None
    energy: float | None = None

    def __post_init__(self) -> None:
        if (self.rank is None) == (self.energy is None):
            raise InputError("give either --truncate-rank or --truncate-energy")
        if self.rank is not None and self.rank < 1:
            raise InputError(f"--truncate-rank={self.rank} must be at least 1")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise InputError(f"--truncate-energy={self.energy} must be above 0 and at most 1")


def truncate(delta: Tensor, keep: Truncation) -> tuple[Tensor, Tensor]:
    """Factors ``up`` (d × r) and ``down`` (r × k) of the best approximation ``up·down`` of ``delta`` (d × k).

    By Eckart and Young this is the truncated SVD; each factor gets the square roots of the singular values. Where both
    sides exceed ``EXACT_SIDE`` the SVD is randomised (Halko, Martinsson and Tropp, 2011) with a fixed seed, and an
    asked-for energy is reached by doubling the number of directions.

    Args:
        delta: the update, in floating point.
        keep: how much of it.
    """
    full = min(delta.shape)
    total = delta.double().square().sum().item()
    directions = full if keep.energy is not None else min(keep.rank or full, full)
    if full <= EXACT_SIDE:
        left, values, right = torch.linalg.svd(delta, full_matrices=False)
        right = right.mT
    else:
        asked = 2 * OVERSAMPLING if keep.energy is not None else directions
        left, values, right = _randomised(delta, asked)
        while keep.energy is not None and values.double().square().sum().item() < keep.energy * total and asked < full:
            asked = min(2 * asked, full)
            left, values, right = _randomised(delta, asked)
    if keep.energy is not None:
        reached = values.double().square().cumsum(0) >= keep.energy * total * (1 - 1e-12)
        directions = int(reached.int().argmax()) + 1 if bool(reached.any()) else len(values)
    root = values[:directions].sqrt()
    return left[:, :directions] * root, (right[:, :directions] * root).mT


def _randomised(delta: Tensor, directions: int) -> tuple[Tensor, Tensor, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        asked = min(directions + OVERSAMPLING, min(delta.shape))
        left, values, right = torch.svd_lowrank(delta, q=asked, niter=POWER_ITERATIONS)
    return left[:, :directions], values[:directions], right[:, :directions]
