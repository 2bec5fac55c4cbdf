"""How fast a training loss falls: area under the curve, smoothing, and the first step below a target."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise

from lorma.errors import InputError


def default_window(points: int) -> int:
    """``max(1, points // 20)``: one twentieth of the logged points, the window of every table and figure here."""
    return max(1, points // 20)


def loss_auc(steps: Sequence[float], losses: Sequence[float]) -> float:
    r"""Area under the training-loss curve; a smaller area over the same steps means faster convergence.

    .. math:: \sum_{i=1}^{n-1} \tfrac{1}{2}(L_i + L_{i+1})(t_{i+1} - t_i)

    The convergence measure of the LoRMA paper (§5.1, Table 5), taken with the trapezoidal rule over optimizer steps.

    Args:
        steps: ``n`` optimizer steps :math:`t_i`, strictly increasing.
        losses: ``n`` training losses :math:`L_i`, one for each step.

    Returns:
        The area in loss × steps; 0.0 for one point, which spans no steps.

    Raises:
        InputError: no points, unequal lengths, a value that is not finite, or steps that do not increase.
    """
    _check_curve(steps, losses)
    return math.fsum((losses[i] + losses[i - 1]) / 2 * (steps[i] - steps[i - 1]) for i in range(1, len(steps)))


def auc_change(auc: float, baseline: float) -> float:
    """``100 (auc / baseline - 1)``: change in percent against a baseline area, negative when the area is smaller.

    Raises:
        InputError: ``auc`` is not finite, or ``baseline`` is not a finite number above zero.
    """
    if not math.isfinite(auc):
        raise InputError(f"auc={auc!r} must be a finite number")
    if not (math.isfinite(baseline) and baseline > 0):
        raise InputError(f"baseline={baseline!r} must be a finite number above zero")
    return 100 * (auc / baseline - 1)


def smooth(losses: Sequence[float], window: int) -> list[float]:
    """Causal moving mean: entry ``i`` is the mean of ``losses[max(0, i - window + 1) : i + 1]``.

    The first ``window - 1`` entries average the points there are so far, so the result is as long as ``losses``.

    Raises:
        InputError: no losses, a loss that is not finite, or a window below 1.
    """
    _check_losses(losses)
    if window < 1:
        raise InputError(f"window={window!r} must be at least 1")
    sums = [0.0, *accumulate(losses)]
    return [(sums[i] - sums[max(0, i - window)]) / min(i, window) for i in range(1, len(sums))]


def final_loss(losses: Sequence[float], window: int) -> float:
    """Mean of the last ``window`` losses (of all of them when there are fewer), in units of the loss.

    Raises:
        InputError: as :func:`smooth`.
    """
    return smooth(losses, window)[-1]


def has_fallen(losses: Sequence[float]) -> bool:
    r"""Whether a training loss ends lower than it began by more than its noise explains.

    The mean of the last quarter must lie below that of the first by more than twice the standard error of the
    difference of two means of ``q`` losses, :math:`2\sigma\sqrt{2/q}`. The variance :math:`\sigma^2` is taken between
    neighbours, :math:`\tfrac{1}{2}\,\overline{(L_{i+1} - L_i)^2}`, so that a slow fall does not count as noise.

    Raises:
        InputError: no losses, or a loss that is not finite.
    """
    _check_losses(losses)
    quarter = max(1, len(losses) // 4)
    jumps = [after - before for before, after in pairwise(losses)]
    if not jumps:
        return False
    noise = math.sqrt(math.fsum(jump * jump for jump in jumps) / len(jumps) / 2)
    fall = (math.fsum(losses[:quarter]) - math.fsum(losses[-quarter:])) / quarter
    return fall > 2 * noise * math.sqrt(2 / quarter)


def steps_to_reach(steps: Sequence[float], losses: Sequence[float], target: float, window: int) -> float | None:
    """The first optimizer step whose moving mean over ``window`` full points is at or below ``target``.

    "At" allows for rounding (relative 1e-9), so a run always reaches its own :func:`final_loss`.

    Returns:
        An entry of ``steps``, or None when the smoothed loss never gets there.

    Raises:
        InputError: as :func:`loss_auc` and :func:`smooth`, or a target that is not finite.
    """
    _check_curve(steps, losses)
    if not math.isfinite(target):
        raise InputError(f"target={target!r} must be a finite number")
    for index, value in enumerate(smooth(losses, window)):
        if index + 1 >= window and (value <= target or math.isclose(value, target, rel_tol=1e-9)):
            return steps[index]
    return None


def _check_losses(losses: Sequence[float]) -> None:
    if not losses:
        raise InputError("losses is empty; at least one point is needed")
    for index, loss in enumerate(losses):
        if not math.isfinite(loss):
            raise InputError(f"losses[{index}]={loss!r} must be a finite number")


def _check_curve(steps: Sequence[float], losses: Sequence[float]) -> None:
    if len(steps) != len(losses):
        raise InputError(f"steps has {len(steps)} entries and losses {len(losses)}; they must be equally many")
    _check_losses(losses)
    for index, step in enumerate(steps):
        if not math.isfinite(step):
            raise InputError(f"steps[{index}]={step!r} must be a finite number")
        if index and step <= steps[index - 1]:
            raise InputError(f"steps[{index}]={step!r} must be greater than the step before it, {steps[index - 1]!r}")
