"""The plain definition: multipliers formed in full, one row at a time, and put in front of or behind the weight.

Written without :mod:`lorma.functional`, and slowly, so that the two can be held against each other.
"""

import torch


def multiplier(A, B, s, inflation):
    """I(BA) as the paper writes it, from A (r × n) and B (n × r)."""
    product = sum(torch.outer(B[:, k], A[k]) for k in range(A.shape[0]))
    if inflation == "permutation":
        return s * torch.stack([torch.roll(row, i) for i, row in enumerate(product)])
    return s * product if inflation == "none" else torch.eye(len(product), dtype=product.dtype) + s * product


def multipliers(A, B, s, inflation, widths):
    """One multiplier for each matrix that the weight holds: A and B are cut along their long side."""
    assert A.shape[1] == B.shape[0] == sum(widths)
    cut = zip(A.split(widths, dim=1), B.split(widths, dim=0), strict=True)
    return [multiplier(a, b, s, inflation) for a, b in cut]


def one(W, M, side):
    """A weight stored out × in."""
    return M @ W if side == "pre" else W @ M


def matrix(W, Ms, side):
    """``nn.Linear``."""
    (M,) = Ms
    return one(W, M, side)


def transposed(W, Ms, side):
    """``Conv1D`` of transformers, stored in × out."""
    return matrix(W.T, Ms, side).T


def embedding(W, Ms, side):
    """``nn.Embedding``: V × D, multiplied from the right."""
    (M,) = Ms
    return W @ M


def convolution(W, Ms, side):
    """out × in/groups × positions: at every position the same multiplier, in each group its own."""
    groups = []
    for kernel, M in zip(W.chunk(len(Ms)), Ms, strict=True):
        positions = kernel.flatten(2).unbind(2)
        groups.append(torch.stack([one(w, M, side) for w in positions], dim=2).reshape(kernel.shape))
    return torch.cat(groups)


def fused(splits, adapt):
    """Several projections on top of each other (out × in), some of them adapted."""

    def multiply(W, Ms, side):
        slices = list(W.split(splits))
        for index, M in zip(adapt, Ms, strict=True):
            slices[index] = one(slices[index], M, side)
        return torch.cat(slices)

    return multiply


def stored_in_out(multiply):
    """The same for a weight that is stored in × out."""
    return lambda W, Ms, side: multiply(W.mT, Ms, side).mT


def stacked(W, Ms, side):
    """experts × out × in."""
    return torch.stack([one(w, M, side) for w, M in zip(W, Ms, strict=True)])


def rescaled(W, magnitude, axis):
    """DoRA: each output's part of W brought to a magnitude, its norm taken as a constant."""
    others = [d for d in range(W.ndim) if d != axis]
    norms = W.detach().pow(2).sum(others, keepdim=True).sqrt()
    return magnitude.reshape(norms.shape) * W / norms
