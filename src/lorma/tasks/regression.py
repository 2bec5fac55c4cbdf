"""One number for each text or pair of texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from lorma.errors import InputError
from lorma.schema import DataSpec
from lorma.tasks.base import Meta, Prepared, TrivialBaseline
from lorma.tasks.table import PACKAGED, Rows, load_splits
from lorma.tasks.text_input import TextTask

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
    from transformers import EvalPrediction, PreTrainedTokenizerBase


class Regression(TextTask):
    """Regression on texts or pairs of texts.

    Columns: ``data.text`` (default ``text``), ``data.text_pair`` and ``data.label`` (default ``label``, or ``rating``
    for the packaged movie reviews). A label is a finite number, or text that spells one.
    """

    name = "regression"
    primary_metric = "pearson"
    greater_is_better = True
    metrics: ClassVar = {"loss": False, "pearson": True, "spearman": True, "mse": False}

    def prepare(self, spec: DataSpec, tokenizer: PreTrainedTokenizerBase) -> Prepared:
        """See :meth:`Task.prepare`; ``labels`` are floats."""
        column = spec.label or ("rating" if spec.train in PACKAGED else "label")
        spec = self._fitted(spec, column, tokenizer)
        if spec.labels is not None:
            raise InputError(f"data.labels: {spec.labels!r} does not apply to the task 'regression'")
        splits = load_splits(spec)
        meta = self._meta(spec, column, None)
        train = self._tokenised(splits.train, _numbers(splits.train, column), meta, tokenizer)
        held = self._tokenised(splits.eval, _numbers(splits.eval, column), meta, tokenizer)
        return self._prepared(train, held, meta, tokenizer, regression_metrics, mean_label(held["labels"]))

    def model_kwargs(self, meta: Meta, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """``num_labels=1``, ``problem_type`` and ``pad_token_id``."""
        return {"num_labels": 1, "problem_type": "regression", "pad_token_id": tokenizer.pad_token_id}

    def decode_outputs(self, logits: Tensor, meta: Meta) -> list[dict[str, Any]]:
        """The ``value`` predicted by each row of ``logits`` (rows, 1), in the unit of the training labels."""
        return [{"value": value} for value in logits.detach().float().reshape(-1).tolist()]


def regression_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """``pearson``, ``spearman`` (correlations, −1 to 1) and ``mse`` (squared unit of the labels).

    A correlation that does not exist, because predictions or labels are constant or not finite, counts as 0.
    """
    import numpy as np
    from scipy.stats import rankdata

    values = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    guess = np.asarray(values, dtype=np.float64).reshape(-1)
    truth = np.asarray(prediction.label_ids, dtype=np.float64).reshape(-1)
    defined = bool(np.isfinite(guess).all() and np.ptp(guess) > 0 and np.ptp(truth) > 0)
    return {
        "pearson": _correlation(guess, truth) if defined else 0.0,
        "spearman": _correlation(rankdata(guess), rankdata(truth)) if defined else 0.0,
        "mse": float(np.square(guess - truth).mean()),
    }


def mean_label(labels: Sequence[float]) -> TrivialBaseline:
    """The mean of ``labels``, of all constants the one with the smallest ``mse``, as the answer for every row."""
    import numpy as np
    from transformers import EvalPrediction

    truth = np.asarray(labels, dtype=np.float64)
    constant = np.full_like(truth, truth.mean())
    metrics = regression_metrics(EvalPrediction(predictions=constant, label_ids=truth))
    return TrivialBaseline("mean label", f"{truth.mean():.4g}", metrics)


def _correlation(first: np.ndarray, second: np.ndarray) -> float:
    import numpy as np

    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.nan_to_num(np.corrcoef(first, second)[0, 1]))


def _numbers(rows: Rows, column: str) -> list[float]:
    numbers = []
    for number, value in zip(rows.numbers, rows.column("label", column), strict=True):
        try:
            parsed = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            parsed = math.nan
        if not math.isfinite(parsed):
            raise InputError(
                f"data.label: {value!r} in column {column!r} of {rows.source} row {number}; allowed: a finite number"
            )
        numbers.append(parsed)
    return numbers
