from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorma.analysis import auc_change, default_window, final_loss, has_fallen, loss_auc, smooth, steps_to_reach
from lorma.errors import InputError

LOSS = st.floats(0, 100)
LOSSES = st.lists(LOSS, min_size=1, max_size=60)
CURVES = st.dictionaries(st.integers(1, 5000), LOSS, min_size=2, max_size=40).map(
    lambda points: (sorted(points), [points[step] for step in sorted(points)])
)


def test_auc_by_hand():
    assert loss_auc([1, 2, 4], [3.0, 1.0, 2.0]) == 2.0 + 3.0


def test_auc_of_one_point_is_zero():
    assert loss_auc([7], [0.5]) == 0.0


@given(loss=LOSS, steps=st.sets(st.integers(1, 5000), min_size=1, max_size=40).map(sorted))
def test_auc_of_a_constant_is_a_rectangle(loss, steps):
    assert loss_auc(steps, [loss] * len(steps)) == pytest.approx(loss * (steps[-1] - steps[0]))


@given(curve=CURVES, data=st.data())
def test_auc_adds_up_over_split_ranges(curve, data):
    steps, losses = curve
    cut = data.draw(st.integers(0, len(steps) - 1))
    parts = loss_auc(steps[: cut + 1], losses[: cut + 1]) + loss_auc(steps[cut:], losses[cut:])
    assert loss_auc(steps, losses) == pytest.approx(parts)


@given(curve=CURVES)
def test_auc_change_is_zero_against_itself(curve):
    area = loss_auc(*curve)
    if area > 0:
        assert auc_change(area, area) == 0.0


def test_auc_change_is_negative_for_a_smaller_area():
    assert auc_change(90.0, 100.0) == pytest.approx(-10.0)


@pytest.mark.parametrize(("auc", "baseline", "message"), [(1.0, 0.0, "baseline=0.0"), (math.nan, 1.0, "auc=nan")])
def test_auc_change_refuses(auc, baseline, message):
    with pytest.raises(InputError, match=message):
        auc_change(auc, baseline)


@pytest.mark.parametrize(
    ("steps", "losses", "message"),
    [
        ([], [], "losses is empty"),
        ([1, 2], [0.5], "steps has 2 entries and losses 1"),
        ([1, 2], [0.5, math.inf], r"losses\[1\]=inf must be a finite number"),
        ([1, math.nan], [0.5, 0.4], r"steps\[1\]=nan must be a finite number"),
        ([1, 3, 3], [0.5, 0.4, 0.3], r"steps\[2\]=3 must be greater than the step before it, 3"),
        ([3, 1], [0.5, 0.4], r"steps\[1\]=1 must be greater"),
    ],
)
def test_curves_that_are_refused(steps, losses, message):
    with pytest.raises(InputError, match=message):
        loss_auc(steps, losses)
    with pytest.raises(InputError, match=message):
        steps_to_reach(steps, losses, 0.1, 1)


def test_smooth_by_hand():
    assert smooth([4.0, 2.0, 0.0, 6.0], 2) == [4.0, 3.0, 1.0, 3.0]


@given(losses=LOSSES)
def test_smooth_with_window_one_changes_nothing(losses):
    assert smooth(losses, 1) == pytest.approx(losses, abs=1e-9)


@given(losses=LOSSES, window=st.integers(1, 80))
def test_smooth_stays_within_the_losses(losses, window):
    smoothed = smooth(losses, window)
    assert len(smoothed) == len(losses)
    assert min(losses) - 1e-9 <= min(smoothed) <= max(smoothed) <= max(losses) + 1e-9


def test_smooth_refuses():
    with pytest.raises(InputError, match="window=0 must be at least 1"):
        smooth([1.0], 0)
    with pytest.raises(InputError, match="losses is empty"):
        smooth([], 1)


@given(losses=LOSSES, window=st.integers(1, 80))
def test_final_loss_is_the_mean_of_the_last_losses(losses, window):
    last = losses[-window:]
    assert final_loss(losses, window) == pytest.approx(sum(last) / len(last), abs=1e-9)


def test_steps_to_reach_waits_for_a_full_window():
    assert steps_to_reach([10, 20, 30, 40], [0.1, 0.9, 0.2, 0.2], 0.3, 1) == 10
    assert steps_to_reach([10, 20, 30, 40], [0.1, 0.9, 0.2, 0.2], 0.3, 2) == 40
    assert steps_to_reach([10, 20], [0.1, 0.1], 0.3, 3) is None


@given(losses=LOSSES, targets=st.tuples(LOSS, LOSS).map(sorted), window=st.integers(1, 10))
def test_a_lower_target_is_never_reached_earlier(losses, targets, window):
    steps = range(1, len(losses) + 1)
    low, high = (steps_to_reach(steps, losses, target, window) or math.inf for target in targets)
    assert low >= high


@given(losses=LOSSES)
def test_a_run_reaches_its_own_final_loss(losses):
    window = default_window(len(losses))
    reached = steps_to_reach(range(len(losses)), losses, final_loss(losses, window), window)
    assert reached is not None


def test_steps_to_reach_refuses_a_target_that_is_not_finite():
    with pytest.raises(InputError, match="target=nan"):
        steps_to_reach([1], [1.0], math.nan, 1)


@pytest.mark.parametrize(("points", "window"), [(0, 1), (1, 1), (39, 1), (40, 2), (250, 12)])
def test_default_window(points, window):
    assert default_window(points) == window


def test_a_loss_has_fallen_when_noise_does_not_explain_it():
    noise = [0.02, -0.03, 0.01, 0.0, -0.02, 0.03, -0.01] * 12
    assert has_fallen([1.0] * 20 + [0.2] * 20)
    assert has_fallen([0.7 - i / 1000 + e for i, e in enumerate(noise)])
    assert not has_fallen([0.693 + e for e in noise])
    assert not has_fallen([0.693 + i / 1000 + e for i, e in enumerate(noise)])
    assert not has_fallen([0.7])
    assert not has_fallen([0.5] * 10)
