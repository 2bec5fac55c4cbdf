"""Every formula against the plain matrix definition, in float64, with gradients."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from lorma import functional as F

TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}
sizes = st.integers(1, 12)
ranks = st.integers(1, 5)
inflations = st.sampled_from(F.INFLATIONS)
sides = st.sampled_from(F.SIDES)


def plain_multiplier(A, B, s, inflation):
    """I(BA) as the paper writes it, one row at a time."""
    product = B @ A
    n = product.shape[0]
    if inflation == "plus":
        return torch.eye(n, dtype=product.dtype) + s * product
    if inflation == "none":
        return s * product
    return s * torch.stack([torch.roll(product[i], i) for i in range(n)])


def factors(n, r, *, batch=(), seed=0, requires_grad=False):
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(*batch, r, n, dtype=torch.float64, generator=generator).requires_grad_(requires_grad)
    B = torch.randn(*batch, n, r, dtype=torch.float64, generator=generator).requires_grad_(requires_grad)
    return A, B


@given(n=sizes, r=ranks, inflation=inflations, s=st.floats(0.1, 4))
def test_multiplier_is_the_plain_definition(n, r, inflation, s):
    A, B = factors(n, r)
    plain = plain_multiplier(A, B, s, inflation)
    assert_close(F.multiplier(A, B, s, inflation), plain, **TOLERANCE)
    assert_close(F.update_matrix(A, B, s, inflation), plain - torch.eye(n, dtype=torch.float64), **TOLERANCE)


@given(n=sizes, r=ranks, inflation=inflations, leading=st.lists(st.integers(0, 3), max_size=3))
def test_applying_to_activations(n, r, inflation, leading):
    A, B = factors(n, r)
    x = torch.randn(*leading, n, dtype=torch.float64)
    assert_close(F.apply_multiplier(x, A, B, 0.7, inflation), x @ plain_multiplier(A, B, 0.7, inflation).T, **TOLERANCE)


@given(d=sizes, k=sizes, r=ranks, inflation=inflations, side=sides)
def test_delta_weight(d, k, r, inflation, side):
    A, B = factors(d if side == "pre" else k, r)
    W = torch.randn(d, k, dtype=torch.float64)
    M = plain_multiplier(A, B, 1.3, inflation)
    expected = (M @ W if side == "pre" else W @ M) - W
    assert_close(F.delta_weight(W, A, B, 1.3, inflation, side), expected, **TOLERANCE)


@pytest.mark.parametrize("inflation", F.INFLATIONS)
def test_gradients(inflation):
    A, B = factors(6, 2, requires_grad=True)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 6, dtype=torch.float64)
    ours = torch.autograd.grad((F.apply_multiplier(x, A, B, 0.5, inflation) * weight).sum(), (x, A, B))
    plain = torch.autograd.grad(((x @ plain_multiplier(A, B, 0.5, inflation).T) * weight).sum(), (x, A, B))
    for mine, expected in zip(ours, plain, strict=True):
        assert_close(mine, expected, **TOLERANCE)
    assert torch.autograd.gradcheck(lambda *a: F.apply_multiplier(*a, 0.5, inflation), (x, A, B))


@pytest.mark.parametrize("inflation", F.INFLATIONS)
def test_batched_factors(inflation):
    A, B = factors(5, 2, batch=(4,))
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    W = torch.randn(4, 5, 7, dtype=torch.float64)
    applied = F.apply_multiplier(x, A, B, 0.5, inflation)
    delta = F.delta_weight(W, A, B, 0.5, inflation)
    for e in range(4):
        M = plain_multiplier(A[e], B[e], 0.5, inflation)
        assert_close(applied[e], x[e] @ M.T, **TOLERANCE)
        assert_close(delta[e], M @ W[e] - W[e], **TOLERANCE)


def test_rotation_needs_no_copy():
    doubled = torch.arange(18.0).reshape(3, 6)
    rotated = F.rotate_rows(doubled)
    assert rotated.data_ptr() == doubled.data_ptr() + 3 * doubled.element_size()
    P = torch.arange(9.0).reshape(3, 3)
    expected = torch.tensor([[0.0, 1, 2], [5, 3, 4], [7, 8, 6]])
    assert_close(F.rotate_rows(torch.cat((P, P), 1)), expected)


@given(n=sizes, r=ranks, s=st.floats(0.05, 8))
def test_starts_are_the_identity(n, r, s):
    A, B = factors(n, r)
    identity = torch.eye(n, dtype=torch.float64)
    F.init_factors(A, B, s, "plus")
    assert torch.equal(F.multiplier(A, B, s, "plus"), identity)
    assert A.any()
    F.init_factors(A, B, s, "permutation")
    assert_close(F.multiplier(A, B, s, "permutation"), identity, **TOLERANCE)


@given(n=sizes, r=ranks, s=st.floats(0.05, 8))
def test_start_of_none_is_a_projection_of_rank_r(n, r, s):
    A, B = factors(n, r)
    F.init_factors(A, B, s, "none")
    M = F.multiplier(A, B, s, "none")
    assert_close(M @ M, M, rtol=1e-7, atol=1e-7)
    assert M.trace().item() == pytest.approx(min(r, n), abs=1e-6)


def test_kaiming_bounds_of_the_starts():
    A, B = torch.empty(4, 100), torch.empty(100, 4)
    F.init_factors(A, B, 4.0, "plus")
    assert A.abs().max() <= 1 / math.sqrt(100)
    F.init_factors(A, B, 4.0, "permutation")
    assert B[:, 1:].abs().max() <= 1 / math.sqrt(4) / 2
    assert A[0, 0] == 0.5
    assert A.abs().sum() == 0.5


@given(n=sizes, r=ranks)
def test_inverse_of_plus(n, r):
    A, B = factors(n, r)
    A, B = A / 10, B / 10
    identity = torch.eye(n, dtype=torch.float64)
    assert_close(F.invert(A, B, 0.5, "plus") @ F.multiplier(A, B, 0.5, "plus"), identity, **TOLERANCE)
    A_inverse, B_inverse = F.invert_plus(A, B, 0.5)
    x = torch.randn(3, n, dtype=torch.float64)
    there = F.apply_multiplier(x, A, B, 0.5, "plus")
    assert_close(F.apply_multiplier(there, A_inverse, B_inverse, 0.5, "plus"), x, **TOLERANCE)


def test_inverse_of_permutation_and_none():
    A, B = factors(6, 2)
    M = F.multiplier(A, B, 0.5, "permutation")
    assert_close(F.invert(A, B, 0.5, "permutation") @ M, torch.eye(6, dtype=torch.float64), **TOLERANCE)
    with pytest.raises(ValueError, match="has no inverse: its rank is at most r"):
        F.invert(A, B, 0.5, "none")
    A, B = factors(4, 4)
    M = F.multiplier(A, B, 0.5, "none")
    assert_close(F.invert(A, B, 0.5, "none") @ M, torch.eye(4, dtype=torch.float64), **TOLERANCE)


def test_condition_numbers():
    A, B = factors(6, 2)
    for inflation in ("plus", "permutation"):
        expected = torch.linalg.cond(plain_multiplier(A, B, 0.5, inflation))
        assert_close(F.condition_number(A, B, 0.5, inflation), expected)
    A, B = factors(9, 2)
    for size in (1e-7, 1, 1e7):
        split = torch.tensor([size, 1], dtype=torch.float64)
        expected = torch.linalg.cond(plain_multiplier(A, B, 0.5, "plus"))
        assert_close(F.condition_number(split[:, None] * A, B / split, 0.5, "plus"), expected, rtol=1e-6, atol=0)
    assert F.condition_number(A, B, 0.5, "none").isinf()
    low = F.condition_number(A.bfloat16(), B.bfloat16(), 0.5, "plus")
    assert low.dtype == torch.float32


@given(n=sizes, r1=ranks, r2=ranks, side=sides)
def test_composition_is_the_product_in_order(n, r1, r2, side):
    first, second = factors(n, r1, seed=1), factors(n, r2, seed=2)
    M1, M2 = plain_multiplier(*first, 0.5, "plus"), plain_multiplier(*second, 0.8, "plus")
    A, B = F.compose((*first, 0.5), (*second, 0.8), side)
    assert A.shape == (r1 + r2, n)
    expected = M2 @ M1 if side == "pre" else M1 @ M2
    assert_close(F.multiplier(A, B, 1.0, "plus"), expected, rtol=1e-9, atol=1e-9)


@given(d=sizes, k=sizes, r=ranks, side=sides)
def test_lora_form(d, k, r, side):
    A, B = factors(d if side == "pre" else k, r)
    W = torch.randn(d, k, dtype=torch.float64)
    lora_A, lora_B = F.lora_form(W, A, B, 0.6, side)
    assert lora_A.shape == (r, k)
    assert lora_B.shape == (d, r)
    assert_close(lora_B @ lora_A, F.delta_weight(W, A, B, 0.6, "plus", side), **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("inflation", F.INFLATIONS)
def test_every_dtype_comes_back(dtype, inflation):
    A, B = (t.to(dtype) / 4 for t in factors(6, 2))
    x = torch.randn(3, 6).to(dtype)
    got = F.apply_multiplier(x, A, B, 0.5, inflation)
    assert got.dtype == dtype
    exact = x.double() @ plain_multiplier(A.double(), B.double(), 0.5, inflation).T
    assert_close(got.double(), exact, rtol=20 * torch.finfo(dtype).eps, atol=20 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("inflation", F.INFLATIONS)
def test_update_matrix_keeps_small_updates_under_autocast(inflation):
    A, B = torch.empty(2, 16), torch.empty(16, 2)
    F.init_factors(A, B, 1.0, inflation)
    B = B + 1e-4
    with torch.autocast("cpu", torch.bfloat16):
        got = F.update_matrix(A, B, 1.0, inflation)
    assert got.dtype == torch.float32
    exact = plain_multiplier(A.double(), B.double(), 1.0, inflation) - torch.eye(16, dtype=torch.float64)
    assert_close(got.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("inflation", F.INFLATIONS)
def test_low_precision_solves_and_meta_shapes(inflation):
    A, B = (t.bfloat16() / 4 for t in factors(4, 4))
    F.init_factors(A, B, 1.0, inflation)
    assert F.invert(A, B, 1.0, inflation).dtype == torch.bfloat16
    A, B = torch.empty(2, 6, device="meta"), torch.empty(6, 2, device="meta")
    assert F.apply_multiplier(torch.empty(3, 6, device="meta"), A, B, 1.0, inflation).shape == (3, 6)


def test_non_contiguous_and_empty_inputs():
    A, B = factors(6, 2)
    x = torch.randn(6, 4, dtype=torch.float64).T
    for inflation in F.INFLATIONS:
        M = plain_multiplier(A, B, 0.5, inflation)
        assert_close(F.apply_multiplier(x, A.T.contiguous().T, B, 0.5, inflation), x @ M.T, **TOLERANCE)
        assert F.apply_multiplier(x[:0], A, B, 0.5, inflation).shape == (0, 6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda A, B: F.multiplier(A, B.T, 1.0, "plus"), r"A must have shape \(..., r, n\)"),
        (lambda A, B: F.multiplier(A, B, 1.0, "add"), "inflation='add' is not known; allowed: plus, permutation, none"),
        (lambda A, B: F.delta_weight(torch.eye(6), A, B, 1.0, "plus", "left"), "side='left' is not known"),
        (lambda A, B: F.delta_weight(torch.zeros(5, 6), A, B, 1.0, "plus", "pre"), "needs n = 5; A has n = 6"),
        (lambda A, B: F.lora_form(torch.zeros(6, 5), A, B, 1.0, "post"), "needs n = 5; A has n = 6"),
        (lambda A, B: F.init_factors(A, B, 0.0, "plus"), "scaling=0.0 must be positive"),
        (lambda A, B: F.rotate_rows(A), r"doubled must have shape \(..., n, 2n\)"),
        (lambda A, B: F.compose((A, B, 1.0), (A[:, :3], B[:3], 1.0)), "the same n; got 6 and 3"),
    ],
)
def test_bad_input_names_what_is_wrong(call, message):
    A, B = torch.zeros(2, 6), torch.zeros(6, 2)
    with pytest.raises(ValueError, match=message):
        call(A, B)


@given(n=sizes, r=ranks, inflation=inflations)
def test_the_transposed_update(n, r, inflation):
    A, B = factors(n, r)
    x = torch.randn(3, n, dtype=torch.float64)
    expected = x @ plain_multiplier(A, B, 0.7, inflation) - x
    assert_close(F.multiplier_update(x, A, B, 0.7, inflation, transpose=True), expected, **TOLERANCE)


@given(d=sizes, k=sizes, r=ranks, side=sides)
def test_row_norms_of_the_multiplied_weight_and_their_gradients(d, k, r, side):
    A, B = factors(d if side == "pre" else k, r, requires_grad=True)
    W = torch.randn(d, k, dtype=torch.float64)
    M = plain_multiplier(A, B, 1.3, "plus")
    expected = torch.linalg.vector_norm(M @ W if side == "pre" else W @ M, dim=-1)
    norms = F.multiplied_row_norms(W, A, B, 1.3, side)
    assert_close(norms, expected, rtol=1e-6, atol=1e-6)
    weights = torch.randn(d, dtype=torch.float64)
    grads = torch.autograd.grad((norms * weights).sum(), (A, B))
    assert_close(grads, torch.autograd.grad((expected * weights).sum(), (A, B)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", F.SIDES)
def test_row_norms_of_a_low_precision_weight_are_summed_in_pieces(side):
    W = torch.randn(2, 2500, 6).bfloat16()
    n = 2500 if side == "pre" else 6
    A, B = torch.randn(2, 3, n) / n**0.5, torch.randn(2, n, 3) / n**0.5
    plain = W.float() + F.delta_weight(W.float(), A, B, 0.7, "plus", side)
    norms = F.multiplied_row_norms(W, A, B, 0.7, side)
    assert norms.dtype == torch.float32
    assert_close(norms, plain.norm(dim=-1))


@given(n=sizes, r=ranks, inflation=inflations)
def test_singular_range(n, r, inflation):
    A, B = factors(n, r, batch=(2,))
    values = torch.stack([torch.linalg.svdvals(plain_multiplier(A[i], B[i], 0.7, inflation)) for i in range(2)])
    largest, smallest = F.singular_range(A, B, 0.7, inflation)
    assert_close(largest, values[:, 0], **TOLERANCE)
    assert_close(smallest, values[:, -1], **TOLERANCE)


@given(d=st.integers(3, 9), k=st.integers(3, 9), inflation=st.sampled_from(("plus", "permutation")), side=sides)
def test_the_inverse_takes_a_merge_back(d, k, inflation, side):
    A, B = factors(d if side == "pre" else k, 2)
    W = torch.randn(d, k, dtype=torch.float64)
    merged = W + F.delta_weight(W, A, B, 0.3, inflation, side)
    condition = torch.linalg.cond(plain_multiplier(A, B, 0.3, inflation)).item()
    restored = merged + F.inverse_delta_weight(merged, A, B, 0.3, inflation, side)
    assert_close(restored, W, rtol=0, atol=1e-13 * condition**2)


def test_none_of_low_rank_has_no_inverse():
    A, B = factors(4, 2)
    with pytest.raises(ValueError, match="has no inverse: its rank is at most r"):
        F.inverse_delta_weight(torch.zeros(4, 3, dtype=torch.float64), A, B, 1.0, "none")
