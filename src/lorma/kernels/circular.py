"""LoRMAπ by circular correlations: O(r·n·log n) for a token, where a product with the multiplier takes O(n²).

``Iπ(BA)·z = Σ_k B_k ∘ corr(A_k, z)`` with ``corr(a, z) = irfft(conj(rfft(a))·rfft(z))``, A_k the rows of A and B_k the
columns of B. Nothing of size n × n is formed and only z is kept. With ``h_k = B_k ∘ g`` the gradients are
``dz = Σ_k A_k ∗ h_k`` (a circular convolution), ``dA_k = corr(h_k, z)``, summed over tokens before it is transformed
back, and ``dB_k = g ∘ corr(A_k, z)`` summed over tokens. Tokens are taken in chunks: on a CPU the spectra of a chunk
stay in the cache, which makes it two to three times as fast as autograd over all tokens at once; elsewhere a chunk
bounds the memory.

Transforms are computed in float32 or above, whatever the dtype around them. Conjugates are written out: a lazy
``conj()`` loses its mark inside a custom operator of a compiled model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.fft import irfft, rfft

from lorma.functional import update_matrix
from lorma.kernels.form import Form, Gradients, Operands, as_rows, in_dtype, register

_CHUNK = {"cpu": 2**18}
_CHUNK_ELSEWHERE = 2**26
"""Real numbers of one spectrum-sized tensor, tokens × r × n."""


def _wide(o: Operands) -> torch.dtype:
    return torch.promote_types(torch.promote_types(o.A.dtype, o.dtype), torch.float32)


def _chunks(o: Operands, *tensors: Tensor) -> Iterator[tuple[slice, list[Tensor]]]:
    """Rows of each tensor, a chunk of tokens at a time, in the wide dtype."""
    step = max(1, _CHUNK.get(o.x.device.type, _CHUNK_ELSEWHERE) // o.A.numel())
    wide = _wide(o)
    for start in range(0, len(tensors[0]), step):
        rows = slice(start, start + step)
        yield rows, [t[rows].to(wide) for t in tensors]


def _correlate(o: Operands, _: Tensor | None) -> tuple[Tensor, Tensor]:
    wide, n = _wide(o), o.A.shape[-1]
    spectra = rfft(o.A.to(wide)).conj_physical()
    Bt = (o.B.mT * o.scaling).to(wide).contiguous()
    bias = None if o.bias is None else o.bias.to(wide)
    z = as_rows(o.x)
    out = z.new_empty(z.shape, dtype=o.dtype)
    for rows, (part,) in _chunks(o, z):
        spectrum = rfft(part if bias is None else part - bias)
        found = irfft(spectrum[:, None] * spectra, n=n).mul_(Bt).sum(1)
        out[rows] = found if bias is None else found.add_(bias)
    return out, out.new_empty(0)


def _correlate_backward(grad: Tensor, o: Operands, _: Tensor, needs: Sequence[bool]) -> Gradients:
    wide, n = _wide(o), o.A.shape[-1]
    spectra = rfft(o.A.to(wide))
    conjugates = spectra.conj_physical()
    Bt = (o.B.mT * o.scaling).to(wide).contiguous()
    bias = None if o.bias is None else o.bias.to(wide)
    g = as_rows(grad)
    dz = g.new_empty(g.shape, dtype=wide) if needs[0] or needs[1] else None
    dA, dB = torch.zeros_like(spectra), torch.zeros_like(Bt)
    for rows, (inputs, gradients) in _chunks(o, as_rows(o.x), g):
        spectrum = rfft(inputs if bias is None else inputs - bias)[:, None]
        if needs[3]:
            dB += irfft(spectrum * conjugates, n=n).mul_(gradients[:, None]).sum(0)
        if dz is not None or needs[2]:
            weighted = rfft(gradients[:, None] * Bt)
            if dz is not None:
                dz[rows] = irfft((weighted * spectra).sum(1), n=n)
            if needs[2]:
                dA += weighted.mul_(spectrum.conj_physical()).sum(0)
    dbias = g.to(wide).sum(0) - dz.sum(0) if needs[1] and dz is not None else None
    return (
        dz.view(o.x.shape) if needs[0] and dz is not None else None,
        dbias,
        irfft(dA.conj_physical(), n=n) if needs[2] else None,
        dB.mT * o.scaling if needs[3] else None,
    )


def correlated_rows(x: Tensor, A: Tensor, B: Tensor, which: Tensor, bias: Tensor | None) -> Tensor:
    """``Iπ(BA)·(x − bias) + bias`` with a multiplier for each row of a batch; ordinary differentiable operations.

    Args:
        x: (g, t, n), t tokens in each row.
        A: (u, r, n), of u adapters.
        B: (u, n, r), times the scalar s.
        which: (g,), the adapter of each row.
        bias: (n,), or None.
    """
    wide, n = torch.promote_types(torch.promote_types(A.dtype, x.dtype), torch.float32), A.shape[-1]
    spectra, Bt = rfft(A.to(wide)).conj_physical(), B.mT.to(wide)
    step = max(1, _CHUNK.get(x.device.type, _CHUNK_ELSEWHERE) // max(1, x.shape[1] * A[0].numel()))
    parts = []
    for rows, adapters in zip(x.split(step), which.split(step), strict=True):
        spectrum = rfft(rows.to(wide) if bias is None else rows.to(wide) - bias)[:, :, None]
        found = (irfft(spectrum * spectra[adapters][:, None], n=n) * Bt[adapters][:, None]).sum(2)
        parts.append((found if bias is None else found + bias).to(x.dtype))
    return torch.cat(parts)


def permuted(o: Operands) -> Tensor:
    """``s·Iπ(BA)·(x − bias) + bias``, the formula behind every form of it; the update is rounded once."""
    update = update_matrix(o.A, o.B, o.scaling, "permutation").to(o.dtype)
    x, bias = in_dtype(o.x, o.dtype), o.shift
    return x + (x if bias is None else x - bias) @ update.mT


CORRELATE = register(Form("correlate", _correlate, _correlate_backward, permuted, lambda o: (0,)))
