"""What can be done with multipliers besides applying them: undo, join, and rewrite as LoRA."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorma.functional.multiplier import (
    Inflation,
    Scaling,
    Side,
    check_factors,
    check_fits,
    check_inflation,
    check_side,
    multiplier,
    widen,
)


def _core(A: Tensor, B: Tensor, scaling: Scaling) -> Tensor:
    """``I_r + s·AB`` (…, r, r): regular exactly when ``I + s·BA`` is."""
    return torch.eye(A.shape[-2], dtype=A.dtype, device=A.device) + scaling * (A @ B)


def condition_number(A: Tensor, B: Tensor, scaling: Scaling, inflation: Inflation) -> Tensor:
    """2-norm condition number of the multiplier; shape (…), in at least float32.

    It depends on the product BA alone. That of ``I_r + s·AB`` also depends on how BA is split: 10⁷·A and 10⁻⁷·B are the
    same multiplier, and may make it 10¹³ times larger. Infinite when singular, which ``none`` always is for r < n.

    Raises:
        ValueError: if the shapes do not fit or ``inflation`` is unknown.
    """
    largest, smallest = singular_range(A, B, scaling, inflation)
    return largest / smallest


def invert_plus(A: Tensor, B: Tensor, scaling: Scaling) -> tuple[Tensor, Tensor]:
    """Factors of the inverse: ``(I + s·BA)⁻¹ = I + s·B'A'`` with ``A' = −(I_r + s·AB)⁻¹A``, ``B' = B``.

    An r × r solve (the Woodbury identity); the inverse of a LoRMA₊ multiplier is again one, of the same rank and
    scaling. Returns (A', B'), shapes (…, r, n) and (…, n, r).

    Raises:
        ValueError: if the shapes do not fit.
        torch.linalg.LinAlgError: if I_r + s·AB is singular.
    """
    check_factors(A, B)
    solved = torch.linalg.solve(_core(widen(A), widen(B), scaling), widen(A))
    return -solved.to(A.dtype), B


def invert(A: Tensor, B: Tensor, scaling: Scaling, inflation: Inflation) -> Tensor:
    """The inverse of the multiplier in full, shape (…, n, n).

    ``plus`` goes through :func:`invert_plus`; ``permutation`` and ``none`` are an n × n inverse.

    Raises:
        ValueError: if the shapes do not fit or ``inflation`` is unknown, or if ``none`` has r < n (rank r: no inverse).
        torch.linalg.LinAlgError: if the multiplier is singular.
    """
    n = check_factors(A, B)
    check_inflation(inflation)
    dtype, A, B = A.dtype, widen(A), widen(B)
    if inflation == "plus":
        return multiplier(*invert_plus(A, B, scaling), scaling, "plus").to(dtype)
    _check_invertible(n, A, inflation)
    return torch.linalg.inv(multiplier(A, B, scaling, inflation)).to(dtype)


def singular_range(A: Tensor, B: Tensor, scaling: Scaling, inflation: Inflation) -> tuple[Tensor, Tensor]:
    """Largest and smallest singular value of the multiplier, exactly; shapes (…).

    ``I + s·BA`` differs from the identity only in the span of B's columns and A's rows, so ``plus`` needs the singular
    values of a 2r × 2r matrix; the others are an n × n decomposition. ``none`` with r < n is singular.

    Raises:
        ValueError: if the shapes do not fit or ``inflation`` is unknown.
    """
    n = check_factors(A, B)
    check_inflation(inflation)
    A, B = widen(A), widen(B)
    if inflation == "plus" and 2 * A.shape[-2] < n:
        values = torch.linalg.svdvals(_restricted(A, B, scaling)[1])
        return values[..., 0].clamp_min(1), values[..., -1].clamp_max(1)
    values = torch.linalg.svdvals(multiplier(A, B, scaling, inflation))
    smallest = values[..., -1]
    return values[..., 0], torch.zeros_like(smallest) if inflation == "none" and A.shape[-2] < n else smallest


def _restricted(A: Tensor, B: Tensor, scaling: Scaling) -> tuple[Tensor, Tensor]:
    """Orthonormal basis Q (…, n, 2r) of all that ``I + s·BA`` changes, and ``Qᵀ(I + s·BA)Q`` (…, 2r, 2r)."""
    basis = torch.linalg.qr(torch.cat((B, A.mT), dim=-1)).Q
    return basis, multiplier(A @ basis, basis.mT @ B, scaling, "plus")


def inverse_delta_weight(
    weight: Tensor, A: Tensor, B: Tensor, scaling: Scaling, inflation: Inflation, side: Side = "pre"
) -> Tensor:
    """What undoes a merge: ``I(BA)⁻¹·W − W`` (side ``pre``) or ``W·I(BA)⁻¹ − W`` (``post``), shape (…, d, k).

    ``plus`` solves in an orthonormal basis of what it changes (2r × 2r), ``permutation`` with the n × n multiplier.
    Both are as well conditioned as the multiplier; ``I_r + s·AB``, which :func:`invert_plus` solves, may be far worse.

    Raises:
        ValueError: if the shapes do not fit or ``inflation`` is unknown, or if ``none`` has r < n (rank r: no inverse).
        torch.linalg.LinAlgError: if the multiplier is singular.
    """
    n = check_factors(A, B)
    check_inflation(inflation)
    check_fits(weight, n, side)
    _check_invertible(n, A, inflation)
    if inflation == "plus" and 2 * A.shape[-2] < n:
        basis, core = _restricted(A, B, scaling)
        eye = torch.eye(core.shape[-1], dtype=core.dtype, device=core.device)
        left, right = basis @ (torch.linalg.inv(core) - eye), basis.mT
        return left @ (right @ weight) if side == "pre" else (weight @ left) @ right
    return torch.linalg.solve(multiplier(A, B, scaling, inflation), weight, left=side == "pre") - weight


def _check_invertible(n: int, A: Tensor, inflation: Inflation) -> None:
    if inflation == "none" and A.shape[-2] < n:
        raise ValueError(f"inflation='none' with r = {A.shape[-2]} < n = {n} has no inverse: its rank is at most r")


def compose(
    first: tuple[Tensor, Tensor, Scaling], second: tuple[Tensor, Tensor, Scaling], side: Side = "pre"
) -> tuple[Tensor, Tensor]:
    """One LoRMA₊ multiplier of rank r₁ + r₂ that equals ``first`` and then ``second`` on W0.

    pre: ``(I + s₂B₂A₂)(I + s₁B₁A₁)·W0 = (I + BA)·W0`` with ``B = [s₂B₂, s₁B₁]`` and
    ``A = [A₂ + s₁(A₂B₁)A₁ ; A₁]``. post: ``W0·(I + s₁B₁A₁)(I + s₂B₂A₂)``, the same with the two exchanged.

    Args:
        first, second: ``(A, B, scaling)`` each, of one n.
        side: which side of W0 the multipliers stand on.

    Returns:
        (A, B) of shapes (…, r₁ + r₂, n) and (…, n, r₁ + r₂); the scaling is 1.

    Raises:
        ValueError: if the shapes do not fit or ``side`` is unknown.
    """
    check_side(side)
    (A1, B1, s1), (A2, B2, s2) = (first, second) if side == "pre" else (second, first)
    n1, n2 = check_factors(A1, B1), check_factors(A2, B2)
    if n1 != n2:
        raise ValueError(f"both multipliers must have the same n; got {n1} and {n2}")
    A = torch.cat((A2 + s1 * (A2 @ B1) @ A1, A1), dim=-2)
    B = torch.cat((s2 * B2, s1 * B1), dim=-1)
    return A, B


def compose_all(parts: Sequence[tuple[Tensor, Tensor, Scaling]], side: Side = "pre") -> tuple[Tensor, Tensor]:
    """One LoRMA₊ multiplier of rank Σrᵢ that equals ``parts`` after each other, the first on W0 first.

    :func:`compose` again and again. Returns (A, B) of shapes (…, Σrᵢ, n) and (…, n, Σrᵢ); the scaling is 1.

    Args:
        parts: ``(A, B, scaling)`` each, of one n; at least one.
        side: which side of W0 the multipliers stand on.

    Raises:
        ValueError: if the shapes do not fit or ``side`` is unknown.
    """
    A, B, s = parts[0]
    for part in parts[1:]:
        A, B = compose((A, B, s), part, side)
        s = 1.0
    return A, s * B


def lora_form(weight: Tensor, A: Tensor, B: Tensor, scaling: Scaling, side: Side = "pre") -> tuple[Tensor, Tensor]:
    """LoRMA₊ as a LoRA of the same rank, exactly: ``ΔW = B'A'``.

    pre: ``A' = A·W0``, ``B' = s·B``; post: ``A' = A``, ``B' = s·W0·B``.

    Args:
        weight: W0, shape (…, d, k).
        A, B, scaling: the LoRMA₊ factors, n = d for ``pre`` and n = k for ``post``.
        side: which side the multiplier stands on.

    Returns:
        (A', B') of shapes (…, r, k) and (…, d, r), for a LoRA scaling of 1.

    Raises:
        ValueError: if the shapes do not fit or ``side`` is unknown.
    """
    check_fits(weight, check_factors(A, B), side)
    return (A @ weight, scaling * B) if side == "pre" else (A, scaling * (weight @ B))
