"""SVFT (Lingam et al., arXiv 2405.19597): a weight changed in the basis of its own singular vectors.

``W = U(Σ + M)Vᵀ`` with ``W0 = UΣVᵀ``, U (d × n) and V (k × n) fixed, n = min(d, k), and M (n × n) sparse and trained.
The diagonal of M is always trained; ``plain`` has nothing else, ``random`` also entries off the diagonal.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def singular_basis(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Left and right singular vectors of a weight, (d × n) and (k × n), in the order of falling singular values.

    They are computed in float64 and are the same wherever that is done, up to rounding: of the two signs of each pair
    the one is taken with which the left vector's entry of largest magnitude is positive. Vectors of singular values
    that are equal, or nearly so, remain undetermined.

    Args:
        weight: (d × k).
    """
    U, _, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
    largest = U.gather(0, U.abs().argmax(dim=0, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0).to(U.dtype)
    return U * signs, (Vh * signs.T).T.contiguous()


def off_diagonal_count(n: int, bands: int) -> int:
    """How many entries an n × n matrix has on ``bands`` diagonals on each side of the main one.

    That is 2·bands·n − bands·(bands + 1); more bands than there are count as all of them.
    """
    bands = min(bands, n - 1)
    return 2 * bands * n - bands * (bands + 1)


@lru_cache(maxsize=16)
def random_positions(n: int, count: int, seed: int) -> Tensor:
    """``count`` different positions off the diagonal of an n × n matrix, drawn from ``seed``: (2 × count), by rows.

    They depend on nothing else, so that a file need not hold them. What comes back is shared: do not change it.

    Raises:
        ValueError: if there are not so many.
    """
    if not 0 <= count <= n * (n - 1):
        raise ValueError(f"count={count} must lie between 0 and n·(n − 1) = {n * (n - 1)}")
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(n * (n - 1), generator=generator, device="cpu")[:count].sort().values
    rows, columns = drawn // max(1, n - 1), drawn % max(1, n - 1)
    return torch.stack([rows, columns + (columns >= rows).long()])


def sparse_matrix(entries: Tensor, positions: Tensor) -> Tensor:
    """M (n × n) from its trained numbers: the n of the diagonal, then those at ``positions`` (2 × count)."""
    n = len(entries) - positions.shape[1]
    return torch.diag(entries[:n]).index_put((positions[0], positions[1]), entries[n:])


def singular_update(x: Tensor, U: Tensor, V: Tensor, entries: Tensor, positions: Tensor) -> Tensor:
    """``x·(U·M·Vᵀ)ᵀ``: what M adds to the output of the layer. x is (…, k), what comes back (…, d)."""
    inner = x @ V
    inner = inner @ sparse_matrix(entries, positions).T if positions.shape[1] else inner * entries
    return inner @ U.T


def singular_delta(U: Tensor, V: Tensor, entries: Tensor, positions: Tensor) -> Tensor:
    """``U·M·Vᵀ`` (d × k)."""
    return U @ sparse_matrix(entries, positions) @ V.T
