"""SVFT against the plain matrix definition, in float64, with gradients."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from lorma.functional import singular

TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}
sizes = st.integers(1, 9)


def drawn(d, k, bands, seed=0):
    torch.manual_seed(seed)
    weight, n = torch.randn(d, k, dtype=torch.float64), min(d, k)
    positions = singular.random_positions(n, singular.off_diagonal_count(n, bands), seed)
    entries = torch.randn(n + positions.shape[1], dtype=torch.float64)
    return weight, positions, entries


@given(d=sizes, k=sizes, bands=st.integers(0, 4), batch=st.integers(0, 3))
def test_update_and_gradients_are_those_of_the_whole_weight(d, k, bands, batch):
    weight, positions, entries = drawn(d, k, bands)
    U, V = singular.singular_basis(weight)
    S = torch.linalg.svdvals(weight)
    assert_close(U @ torch.diag(S) @ V.T, weight, **TOLERANCE)
    x = torch.randn(batch, k, dtype=torch.float64)
    results = []
    for plain in (True, False):
        m, inputs = entries.clone().requires_grad_(), x.clone().requires_grad_()
        if plain:
            M = torch.zeros(len(S), len(S), dtype=torch.float64)
            for index in range(len(S)):
                M[index, index] = m[index]
            for index, (row, column) in enumerate(positions.T.tolist()):
                M[row, column] = m[len(S) + index]
            y = inputs @ (U @ (torch.diag(S) + M) @ V.T).T
        else:
            y = inputs @ weight.T + singular.singular_update(inputs, U, V, m, positions)
        (y**2).sum().backward()
        results.append((y, m.grad, inputs.grad))
    for found, expected in zip(*results, strict=True):
        assert_close(found, expected, **TOLERANCE)
    assert_close(x @ singular.singular_delta(U, V, entries, positions).T, results[1][0] - x @ weight.T, **TOLERANCE)


def test_signs_are_settled():
    weight, *_ = drawn(7, 5, 0)
    U, V = singular.singular_basis(weight)
    assert (U.gather(0, U.abs().argmax(dim=0, keepdim=True)) > 0).all()
    for rounded in (weight.float(), weight * (1 + 1e-12)):
        again, other = singular.singular_basis(rounded)
        assert_close(again, U, rtol=0, atol=1e-5)
        assert_close(other, V, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("n", "bands", "count"), [(6, 0, 0), (6, 1, 10), (6, 2, 18), (6, 99, 30), (1, 3, 0)])
def test_positions_are_as_many_as_bands_hold(n, bands, count):
    assert singular.off_diagonal_count(n, bands) == count
    rows, columns = singular.random_positions(n, count, 3)
    assert len({*zip(rows.tolist(), columns.tolist(), strict=True)}) == count
    assert (rows != columns).all()
    assert count == 0 or (max(rows.max(), columns.max()) < n and min(rows.min(), columns.min()) >= 0)


def test_positions_follow_the_seed():
    first, again, other = (singular.random_positions(20, 30, seed) for seed in (1, 1, 2))
    assert first.equal(again)
    assert not first.equal(other)
    with pytest.raises(ValueError, match="count=7 must lie between 0 and n·\\(n − 1\\) = 6"):
        singular.random_positions(3, 7, 0)
