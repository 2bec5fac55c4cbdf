"""The update of LoRMA₊ for a few tokens in one launch, for GPUs.

Decoding spends its time on launches, not on arithmetic, and plain PyTorch needs two or three for the update. Here each
program takes one token and a block of columns. It computes all r numbers of u itself and so waits for no other program;
the price is that every program reads all of A, which is small and stays in the cache. Since all of them read the whole
row, the result goes to a tensor of its own.

Triton is imported when the kernel is built. The kernel has been compared with the formula in Triton's interpreter and
compiled for GPUs, but never timed on one. So it is used only where ``LORMA_TRITON=1`` is set, until
``benchmarks/cases/triton_decode.py`` shows it at least 10 % faster than plain PyTorch on the shape of a real layer.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    import triton.language as tl
else:
    tl = None  # set by _kernel; the kernel looks it up among the names of this module

MAX_RANK = 256
MAX_TOKENS = 16
"""Tokens up to which :func:`available` says yes: each of them reads both factors anew."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Not measured: elements of a factor that a program holds at a time, columns of the result, and warps.
_TILE, _COLUMNS, _WARPS = 8192, 128, 8


def available(out: Tensor, rank: int) -> bool:
    """Whether the kernel is asked for (``LORMA_TRITON=1``) and can serve ``out`` (…, d) with factors of ``rank``.

    It serves plain tensors of at most ``MAX_TOKENS`` rows on a GPU, and ranks up to ``MAX_RANK``, where Triton is
    installed. It must be asked for because it has not been measured on a GPU yet; see the module's text.
    """
    asked = out.is_cuda and os.environ.get("LORMA_TRITON") == "1"
    if not asked or type(out) is not Tensor or out.dtype not in _DTYPES or rank > MAX_RANK:
        return False
    return out.numel() <= MAX_TOKENS * out.shape[-1] and _installed()


def low_rank_update(
    out: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float, u: Tensor | None = None
) -> Tensor:
    """``out + s·((out − bias)·Aᵀ)·Bᵀ``: LoRMA₊ on what a base layer gave (arXiv 2506.07621, eq. 8, side ``pre``).

    Computed in float32 and rounded once; each tensor is float32, bfloat16 or float16. Not differentiable.

    Args:
        out: (…, d), output of the base layer with its bias; left as it is.
        bias: (d,), which is not multiplied, or None.
        A: (r, d), r up to ``MAX_RANK``.
        B: (d, r).
        scaling: the scalar s.
        u: (tokens, r), contiguous, is filled with ``(out − bias)·Aᵀ`` for a backward pass; None where none follows.

    Returns:
        (…, d), new and contiguous, in the dtype of ``out``.

    Raises:
        ValueError: a rank, shape, stride, dtype or device that does not fit, or a gradient that would be lost.
        ImportError: Triton is not installed.
    """
    kernel, interpreted = _kernel()
    if out.is_cpu and not interpreted:
        raise ValueError("out is on cpu; allowed: a GPU, or TRITON_INTERPRET=1 set before Triton is imported")
    if not 1 <= len(A) <= MAX_RANK:
        raise ValueError(f"A has r = {len(A)}; allowed: 1 to {MAX_RANK}")
    width, rank = out.shape[-1], len(A)
    tokens = out.shape[:-1].numel()
    shapes = {"out": out.shape, "bias": (width,), "A": (rank, width), "B": (width, rank), "u": (tokens, rank)}
    for (name, shape), tensor in zip(shapes.items(), (out, bias, A, B, u), strict=True):
        if tensor is not None:
            _check(name, tensor, tuple(shape), out.device)
    if u is not None and not u.is_contiguous():
        raise ValueError(f"u has strides {u.stride()}; allowed: contiguous")
    result = torch.empty_like(out, memory_format=torch.contiguous_format)
    if not result.numel():
        return result
    ranks = 1 << (rank - 1).bit_length()
    depth, columns = max(16, _TILE // ranks), max(16, min(_COLUMNS, _TILE // ranks))
    row = None if bias is None else bias.contiguous()
    operands = (out.contiguous(), row, A.contiguous(), B.contiguous(), float(scaling), width, rank)
    with torch.cuda.device_of(out):
        kernel[tokens, -(-width // columns)](result, u, *operands, ranks, depth, columns, num_warps=_WARPS)
    return result


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; allowed here: {shape}")
    if tensor.dtype not in _DTYPES:
        raise ValueError(f"{name} has dtype {tensor.dtype}; allowed: {', '.join(map(str, _DTYPES))}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}; allowed: {device}, where out is")
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires a gradient, which would be lost; allowed: calls under torch.no_grad()")


@cache
def _installed() -> bool:
    return find_spec("triton") is not None


@cache
def _kernel() -> tuple[Any, bool]:
    """The kernel, and whether Triton's interpreter runs it."""
    global tl
    import triton
    import triton.language as tl

    kernel = triton.jit(_update)
    return kernel, not isinstance(kernel, triton.JITFunction)


def _update(  # type: ignore[no-untyped-def]
    result, kept, out, bias, A, B, scaling, width, rank, RANKS: tl.constexpr, DEPTH: tl.constexpr, COLUMNS: tl.constexpr
):
    token, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    ranks = tl.arange(0, RANKS)
    products = tl.zeros((RANKS, DEPTH), tl.float32)
    for start in range(0, width, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        y = tl.load(out + token * width + depth, depth < width, 0.0).to(tl.float32)
        if bias is not None:
            y -= tl.load(bias + depth, depth < width, 0.0).to(tl.float32)
        inside = (ranks < rank)[:, None] & (depth < width)[None, :]
        a = tl.load(A + ranks[:, None] * width + depth[None, :], inside, 0.0).to(tl.float32)
        products += a * y[None, :]
    u = tl.sum(products, 1)
    if kept is not None:
        tl.store(kept + token * rank + ranks, u, (ranks < rank) & (block == 0))
    columns = block * COLUMNS + tl.arange(0, COLUMNS)
    inside = (columns < width)[:, None] & (ranks < rank)[None, :]
    b = tl.load(B + columns[:, None] * rank + ranks[None, :], inside, 0.0).to(tl.float32)
    place = token * width + columns
    y = tl.load(out + place, columns < width, 0.0).to(tl.float32) + scaling * tl.sum(b * u[None, :], 1)
    tl.store(result + place, y, columns < width)
