"""TLoRA against its plain matrix definition in float64, and matrices that any machine draws again."""

import hashlib
import math
import struct

import pytest
import torch
from torch.autograd import gradcheck
from torch.testing import assert_close

from lorma import functional
from lorma.functional.projection import standard_normal

SIZES = [(5, 7, 3), (7, 5, 1), (4, 4, 6), (1, 3, 2)]
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def matrices(d, k, r, seed=0):
    """x of three rows, A, B, C, alpha and W0."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (3, k), (k, r), (r, r), (r, d), (1,), (d, k)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]


def by_entries(A, B, C, alpha):
    """ΔW written out: entry (i, j) is α·Σ_pq A_jp·B_pq·C_qi."""
    d, k, r = C.shape[1], A.shape[0], len(B)
    delta = torch.zeros(d, k, dtype=torch.float64)
    for i in range(d):
        for j in range(k):
            delta[i, j] = alpha[0] * sum(A[j, p] * B[p, q] * C[q, i] for p in range(r) for q in range(r))
    return delta


@pytest.mark.parametrize(("d", "k", "r"), SIZES)
def test_the_definition(d, k, r):
    x, A, B, C, alpha, W0 = matrices(d, k, r)
    delta = by_entries(A, B, C, alpha)
    assert_close(functional.tri_matrix_delta(A, B, C, alpha), delta, **EXACT)
    assert_close(x @ W0.T + functional.tri_matrix_update(x, A, B, C, alpha), x @ (W0 + delta).T, **EXACT)
    stacked = x.reshape(1, 3, k)
    assert_close(functional.tri_matrix_update(stacked, A, B, C, alpha), (x @ delta.T)[None], **EXACT)
    assert functional.tri_matrix_update(x[:0], A, B, C, alpha).shape == (0, d)


@pytest.mark.parametrize(("d", "k", "r"), SIZES)
def test_the_start_is_the_base_model(d, k, r):
    x, A, _, C, _, W0 = matrices(d, k, r)
    nothing = functional.tri_matrix_update(x, A, torch.zeros(r, r).double(), C, torch.ones(1).double())
    assert torch.equal(x @ W0.T + nothing, x @ W0.T)


@pytest.mark.parametrize(("d", "k", "r"), SIZES)
def test_gradients(d, k, r):
    x, A, B, C, alpha, _ = matrices(d, k, r)
    trained = x.requires_grad_(), B.requires_grad_(), alpha.requires_grad_()
    assert gradcheck(lambda x, B, alpha: functional.tri_matrix_update(x, A, B, C, alpha), trained)
    assert gradcheck(lambda B, alpha: functional.tri_matrix_delta(A, B, C, alpha), trained[1:])
    loss = torch.randn(3, d, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (functional.tri_matrix_update(x, A, B, C, alpha) * loss).sum().backward()
    assert_close(B.grad, alpha.detach() * (x @ A).T @ loss @ C.T, **EXACT)
    assert_close(x.grad, loss @ functional.tri_matrix_delta(A, B, C, alpha), **EXACT)


@pytest.mark.parametrize(("d", "k", "r"), SIZES)
def test_the_lora_form(d, k, r):
    _, A, B, C, alpha, _ = matrices(d, k, r)
    down, up = functional.tri_matrix_lora_form(A, B, C, alpha)
    assert (down.shape, up.shape) == ((r, k), (d, r))
    assert torch.equal(down, A.T)
    assert_close(up @ down, by_entries(A, B, C, alpha), **EXACT)


def wrong(A, B, C, which):
    changed = {"A": A.T, "B": B[:1], "C": C.T}
    return [changed[name] if name == which else M for name, M in (("A", A), ("B", B), ("C", C))]


@pytest.mark.parametrize("which", "ABC")
def test_shapes_that_do_not_fit_are_named(which):
    x, A, B, C, alpha, _ = matrices(5, 7, 3)
    bad = wrong(A, B, C, which)
    message = r"A must have shape \(k, r\), B \(r, r\) and C \(r, d\); got A \(\d, \d\), B \(\d, \d\) and C \(\d, \d\)"
    for call in (functional.tri_matrix_delta, functional.tri_matrix_lora_form):
        with pytest.raises(ValueError, match=message):
            call(*bad, alpha)
    with pytest.raises(ValueError, match=message):
        functional.tri_matrix_update(x, *bad, alpha)


# The draws


def test_moments_are_those_of_the_normal_distribution():
    z = standard_normal(0, "layer", (1000, 1001), "A")
    assert z.dtype == torch.float64
    count = z.numel()
    for power, expected, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        # The mean of z^power, within five of its standard errors.
        assert abs(z.pow(power).mean().item() - expected) < 5 * math.sqrt(spread / count)
    assert abs((z[:, :-1] * z[:, 1:]).mean().item()) < 5 / math.sqrt(count)
    half = z.flatten()[: count // 2], z.flatten()[-(count // 2) :]
    assert abs((half[0] * half[1]).mean().item()) < 5 / math.sqrt(count // 2)
    within = [(z.abs() < limit).double().mean().item() for limit in (1, 2, 3)]
    assert within == pytest.approx([0.682689, 0.954500, 0.997300], abs=2e-3)


@pytest.mark.parametrize(("d", "k", "r"), [(512, 2048, 16), (2048, 512, 32)])
def test_standard_deviations(d, k, r):
    """√(2/6)/√fan_in where fan_in is the last dimension."""
    A, C = functional.draw_projections(3, "layer", d, k, r)
    assert (A.shape, C.shape) == ((k, r), (r, d))
    assert A.dtype == C.dtype == torch.float32
    for matrix, fan_in in ((A, r), (C, d)):
        assert matrix.std().item() == pytest.approx(math.sqrt(2 / 6) / math.sqrt(fan_in), rel=0.02)
        assert abs(matrix.mean().item()) < 5 * matrix.std().item() / math.sqrt(matrix.numel())


@pytest.mark.parametrize("change", [{"seed": 1}, {"name": "b"}, {"label": "C"}, {"shape": (12, 4)}, {"shape": (6, 9)}])
def test_other_arguments_give_other_numbers(change):
    arguments = {"seed": 0, "name": "a", "shape": (6, 8), "label": "A"}
    first, again, other = (standard_normal(**a) for a in (arguments, arguments, arguments | change))
    assert torch.equal(first, again)
    size = min(first.numel(), other.numel())
    assert (first.flatten()[:size] == other.flatten()[:size]).sum() <= 1


def test_a_name_and_a_label_cannot_be_exchanged():
    """The arguments are written as a list, so that none runs into the next."""
    draws = [
        standard_normal(*a) for a in ((1, "a", (2, 2), "b"), (1, 'a", [2, 2], "b', (2, 2), ""), (11, "a", (2, 2), "b"))
    ]
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) == 3


PINNED = {
    (0, "layer", 3, 4, 2): "31d0a3892e507ff2",
    (0, "layer", 1, 1, 1): "ce3cc961b4965752",
    (42, "model.layers.0.self_attn.q_proj", 64, 48, 8): "f28d1bfb0ba3e93d",
    (2**64 + 1, "Schicht für Schicht", 5, 7, 3): "20001e11c3935b2b",
}
"""Adapter files rely on these numbers: they may never change."""


@pytest.mark.parametrize("arguments", PINNED, ids=lambda arguments: f"{arguments[0]}-{arguments[2:]}")
def test_pinned_draws(arguments):
    assert functional.checksum(*functional.draw_projections(*arguments)).hex() == PINNED[arguments]


def test_the_numbers_are_those_of_a_few_lines_of_plain_python():
    """SHAKE-256 of the arguments as JSON, 32 bits a uniform number, Box and Muller, a grid of 2⁻¹⁶."""
    found = (standard_normal(0, "layer", (3, 3), "A") * 2**16).flatten().tolist()
    words = struct.unpack("<10I", hashlib.shake_256(b'[0, "layer", [3, 3], "A"]').digest(40))
    uniform = [(word + 0.5) / 2**32 for word in words]
    pairs = list(zip([math.sqrt(-2 * math.log(u)) for u in uniform[:5]], uniform[5:], strict=True))
    normal = [radius * wave(2 * math.pi * u) for wave in (math.cos, math.sin) for radius, u in pairs]
    assert found == [round(z * 2**16) for z in normal[:9]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_neither_the_default_dtype_nor_the_default_device_matters(dtype):
    arguments = 7, "layer", 9, 11, 3
    expected = functional.draw_projections(*arguments)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.device("meta"):
            found = functional.draw_projections(*arguments)
    finally:
        torch.set_default_dtype(before)
    for got, wanted in zip(found, expected, strict=True):
        assert got.dtype == torch.float32
        assert torch.equal(got, wanted)


def test_checksums():
    """Of the float32 numbers and their shapes, whatever they are held in; one of all with a byte for each."""
    A, C = functional.draw_projections(7, "layer", 9, 11, 3)
    first = functional.checksum(A, C)
    assert len(first) == 8
    assert functional.checksum(A.double(), C.T.contiguous().T) == first
    changed = A.clone()
    changed[2, 1] += 1e-6
    others = [functional.checksum(*m) for m in ((changed, C), (C, A), (A.T, C), (A.reshape(3, 11), C))]
    assert len({first, *others}) == 5
    joint = functional.joint_checksum([first, others[0]])
    assert joint.dtype == torch.uint8
    assert bytes(joint[:8].tolist()) == hashlib.sha256(first + others[0]).digest()[:8]
    assert joint[8:].tolist() == [first[0], others[0][0]]
