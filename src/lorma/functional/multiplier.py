"""The multiplier I(BA), applied to activations and to a weight.

Layout. PyTorch keeps activations as rows, so ``M·y`` for a column vector reads ``y @ M.T`` here. That makes the two
sides the same operation on different tensors: ``pre`` multiplies the base layer's output (without its bias), ``post``
its input. Everything is written in the *update* form ``M − I``: adding the update to what the base layer gives keeps
small changes apart from large values, which is what survives in low precision.

Permutation without an index. Row i of BA is rotated right by i. With ``[P P]`` two copies of P side by side
(n × 2n), element (i, j) of the rotation is ``[P P]`` at flat position ``n + i·(2n − 1) + j``: drop the first n numbers,
re-cut the rest into rows of 2n − 1, keep the first n columns. Three views, no gather, no n × n integer index. The
identity is itself a rotation, of the matrix whose first column is all ones, so ``M − I`` is the rotation of a product
of rank r + 1 and needs no n × n identity either.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

Inflation = Literal["plus", "permutation", "none"]
Side = Literal["pre", "post"]
Scaling: TypeAlias = float | Tensor
"""The scalar s: a number, or a tensor without dimensions where a compiled model must not be tied to its value."""
INFLATIONS: tuple[Inflation, ...] = get_args(Inflation)
SIDES: tuple[Side, ...] = get_args(Side)


def widen(tensor: Tensor) -> Tensor:
    """``tensor`` in at least float32, where solving and merging are done."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def check_factors(A: Tensor, B: Tensor) -> int:
    """Return n after checking that ``A`` is (…, r, n) and ``B`` is (…, n, r); raise ``ValueError`` otherwise."""
    if A.ndim < 2 or B.ndim < 2 or A.shape[-2] != B.shape[-1] or A.shape[-1] != B.shape[-2]:
        raise ValueError(
            f"A must have shape (..., r, n) and B (..., n, r); got A {tuple(A.shape)} and B {tuple(B.shape)}"
        )
    return A.shape[-1]


def check_inflation(inflation: str) -> None:
    """Raise ``ValueError`` unless ``inflation`` is one of :data:`INFLATIONS`."""
    if inflation not in INFLATIONS:
        raise ValueError(f"inflation={inflation!r} is not known; allowed: {', '.join(INFLATIONS)}")


def check_side(side: str) -> None:
    """Raise ``ValueError`` unless ``side`` is one of :data:`SIDES`."""
    if side not in SIDES:
        raise ValueError(f"side={side!r} is not known; allowed: {', '.join(SIDES)}")


def check_fits(weight: Tensor, n: int, side: Side) -> None:
    """Raise ``ValueError`` unless an n × n multiplier fits ``side`` of ``weight`` (…, d, k)."""
    check_side(side)
    multiplied = weight.shape[-2 if side == "pre" else -1]
    if n != multiplied:
        raise ValueError(f"side={side!r} of a weight {tuple(weight.shape)} needs n = {multiplied}; A has n = {n}")


def rotate_rows(doubled: Tensor) -> Tensor:
    """Rotate row i of a matrix right by i (the paper's Fig. 3): ``out[i, j] = P[i, (j − i) mod n]``.

    Args:
        doubled: ``[P P]``, shape (…, n, 2n): the matrix P written twice side by side.

    Returns:
        Shape (…, n, n), a view of ``doubled``.
    """
    n = doubled.shape[-2]
    if doubled.shape[-1] != 2 * n:
        raise ValueError(f"doubled must have shape (..., n, 2n); got {tuple(doubled.shape)}")
    return doubled.flatten(-2)[..., n:].unflatten(-1, (n, 2 * n - 1))[..., :n]


def _rotated_product(A: Tensor, B: Tensor) -> Tensor:
    return rotate_rows(B @ torch.cat((A, A), dim=-1))


def multiplier(A: Tensor, B: Tensor, scaling: Scaling, inflation: Inflation) -> Tensor:
    """The matrix W0 is multiplied by, formed in full.

    * ``plus`` (LoRMA paper, eq. 8): ``I + s·BA``
    * ``permutation`` (eq. 7): ``s·Iπ(BA)``, row i of BA rotated right by i
    * ``none`` (eq. 6): ``s·BA``

    Args:
        A: shape (…, r, n).
        B: shape (…, n, r).
        scaling: the scalar s.
        inflation: which of the three.

    Returns:
        Shape (…, n, n).

    Raises:
        ValueError: if the shapes do not fit or ``inflation`` is unknown.
    """
    n = check_factors(A, B)
    check_inflation(inflation)
    if inflation == "permutation":
        return scaling * _rotated_product(A, B)
    product = scaling * (B @ A)
    return product + torch.eye(n, dtype=product.dtype, device=product.device) if inflation == "plus" else product


def update_matrix(A: Tensor, B: Tensor, scaling: Scaling, inflation: Inflation) -> Tensor:
    """``I(BA) − I``, formed in full and always in the dtype of the factors, whatever autocast says.

    Args and errors as :func:`multiplier`. Returns shape (…, n, n).
    """
    n = check_factors(A, B)
    check_inflation(inflation)
    device = A.device.type
    with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
        if inflation == "permutation":
            first = torch.zeros_like(A[..., :1, :])
            first[..., 0] = 1
            minus_one = -torch.ones_like(B[..., :1])
            return _rotated_product(torch.cat((A, first), dim=-2), torch.cat((scaling * B, minus_one), dim=-1))
        product = scaling * (B @ A)
        return product if inflation == "plus" else product - torch.eye(n, dtype=product.dtype, device=product.device)


def multiplier_update(
    x: Tensor, A: Tensor, B: Tensor, scaling: Scaling, inflation: Inflation, *, transpose: bool = False
) -> Tensor:
    """``(I(BA) − I)·x`` for every row x, without forming an n × n matrix where the product is low-rank.

    Args:
        x: shape (…, n); with batched factors, (…, b, n).
        A, B, scaling, inflation: as :func:`multiplier`.
        transpose: ``(I(BA) − I)ᵀ·x`` instead: rows of an embedding W0·I(BA) are multiplied from the right.

    Returns:
        The shape of ``x``. Adding it to ``x`` gives ``I(BA)·x``.
    """
    check_factors(A, B)
    check_inflation(inflation)
    if inflation == "permutation":
        update = update_matrix(A, B, scaling, inflation)
        return x @ (update if transpose else update.mT)
    down, up = (B, A) if transpose else (A.mT, B.mT)
    low_rank = (scaling * (x @ down)) @ up
    return low_rank if inflation == "plus" else low_rank - x


def apply_multiplier(x: Tensor, A: Tensor, B: Tensor, scaling: Scaling, inflation: Inflation) -> Tensor:
    """``I(BA)·x`` for every row x of ``x`` (…, n). See :func:`multiplier_update`."""
    return x + multiplier_update(x, A, B, scaling, inflation)


def delta_weight(
    weight: Tensor, A: Tensor, B: Tensor, scaling: Scaling, inflation: Inflation, side: Side = "pre"
) -> Tensor:
    """``ΔW = I(BA)·W0 − W0`` (side ``pre``) or ``W0·I(BA) − W0`` (side ``post``).

    Args:
        weight: W0, shape (…, d, k), i.e. ``out_features × in_features``.
        A, B, scaling, inflation: as :func:`multiplier`, with n = d for ``pre`` and n = k for ``post``.
        side: which side of W0 the multiplier stands on.

    Returns:
        Shape (…, d, k).

    Raises:
        ValueError: if the multiplier does not fit that side of ``weight``.
    """
    n = check_factors(A, B)
    check_inflation(inflation)
    check_fits(weight, n, side)
    if inflation == "permutation":
        update = update_matrix(A, B, scaling, inflation)
        return update @ weight if side == "pre" else weight @ update
    low_rank = scaling * (B @ (A @ weight)) if side == "pre" else scaling * ((weight @ B) @ A)
    return low_rank if inflation == "plus" else low_rank - weight
