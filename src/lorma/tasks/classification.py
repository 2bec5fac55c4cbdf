"""One class for each text or pair of texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from lorma.errors import InputError, did_you_mean
from lorma.labels import class_order, label_text, listed
from lorma.schema import DataSpec
from lorma.tasks.base import Meta, Prepared, TrivialBaseline
from lorma.tasks.table import Rows, Splits, load_splits
from lorma.tasks.text_input import TextTask

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
    from transformers import EvalPrediction, PreTrainedTokenizerBase


class Classification(TextTask):
    """Single-label classification of texts or pairs of texts.

    Columns: ``data.text`` (default ``text``), ``data.text_pair`` and ``data.label`` (default ``label``). Labels may
    be text, whole numbers or booleans, see :func:`lorma.labels.label_text`; numbers that a data set declares
    as class labels stand for the names it declares. The order of the classes is ``data.labels``, else the order the
    data set declares, else sorted.
    """

    name = "classification"
    primary_metric = "accuracy"
    greater_is_better = True
    metrics: ClassVar = {"loss": False, "accuracy": True, "f1": True, "matthews": True}

    def prepare(self, spec: DataSpec, tokenizer: PreTrainedTokenizerBase) -> Prepared:
        """See :meth:`Task.prepare`; ``labels`` are indices into ``meta["labels"]``."""
        column = spec.label or "label"
        spec = self._fitted(spec, column, tokenizer)
        splits = load_splits(spec, sentiment=True)
        classes = spec.labels or _find_classes(splits, column)
        meta = self._meta(spec, column, classes)
        train = self._tokenised(splits.train, _class_indices(splits.train, column, classes), meta, tokenizer)
        held = self._tokenised(splits.eval, _class_indices(splits.eval, column, classes), meta, tokenizer)
        trivial = majority_class(held["labels"], classes)
        return self._prepared(train, held, meta, tokenizer, evaluation_metrics, trivial)

    def model_kwargs(self, meta: Meta, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """``num_labels``, ``id2label``, ``label2id``, ``problem_type`` and ``pad_token_id``."""
        names = meta["labels"]
        return {
            "num_labels": len(names),
            "id2label": dict(enumerate(names)),
            "label2id": {name: index for index, name in enumerate(names)},
            "problem_type": "single_label_classification",
            "pad_token_id": tokenizer.pad_token_id,
        }

    def decode_outputs(self, logits: Tensor, meta: Meta) -> list[dict[str, Any]]:
        """The likeliest class of each row of ``logits`` (rows, classes) as ``label`` and its probability ``score``."""
        best = logits.detach().float().softmax(-1).max(-1)
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [{"label": meta["labels"][index], "score": score} for index, score in pairs]


def classification_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """``accuracy``, ``f1`` and ``matthews`` (Matthews correlation coefficient) of logits (rows, classes).

    With two classes ``f1`` is that of the second one, as GLUE reports it; with more it is the unweighted mean over
    the classes that occur (macro). A metric that is 0/0 counts as 0.
    """
    import numpy as np
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    truth, guess = np.asarray(prediction.label_ids), _predicted(prediction)
    average = "binary" if np.shape(logits)[-1] == 2 else "macro"
    one_class = np.unique(np.concatenate([truth, guess])).size < 2
    return {
        "accuracy": float(accuracy_score(truth, guess)),
        "f1": float(f1_score(truth, guess, average=average, zero_division=0)),
        "matthews": 0.0 if one_class else float(matthews_corrcoef(truth, guess)),
    }


def evaluation_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """:func:`classification_metrics`, and ``predicted_classes``: how many different classes were predicted."""
    return classification_metrics(prediction) | {"predicted_classes": len(set(_predicted(prediction).tolist()))}


def majority_class(labels: Sequence[int], classes: Sequence[str]) -> TrivialBaseline:
    """The most frequent class of ``labels``, indices into ``classes``, as the answer for every row."""
    import numpy as np
    from transformers import EvalPrediction

    counts = np.bincount(labels, minlength=len(classes))
    best = int(counts.argmax())
    logits = np.tile(np.eye(len(classes))[best], (len(labels), 1))
    metrics = classification_metrics(EvalPrediction(predictions=logits, label_ids=np.asarray(labels)))
    return TrivialBaseline("majority class", classes[best], metrics)


def _predicted(prediction: EvalPrediction) -> np.ndarray:
    import numpy as np

    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return np.asarray(logits).argmax(-1)


def _labels(rows: Rows, column: str) -> list[str | None]:
    """The label of every row as a class name, ``None`` where there is none."""
    values = rows.column("label", column)
    feature = rows.data.features[column]
    declared = getattr(feature, "names", None)
    if declared is not None:
        return [None if value is None or value < 0 else declared[value] for value in values]
    names: list[str | None] = []
    for number, value in zip(rows.numbers, values, strict=True):
        try:
            names.append(label_text(value))
        except ValueError as error:
            raise InputError(
                f"data.label: {rows.source} row {number}, column {column!r}: {error}; "
                "the task 'regression' learns numbers"
            ) from error
    return names


def _find_classes(splits: Splits, column: str) -> list[str]:
    found = {name for name in _labels(splits.source, column) if name is not None}
    if len(found) < 2:
        raise InputError(
            f"data.label: column {column!r} of {splits.source.source} holds {len(found)} class(es) "
            f"({listed(sorted(found))}); at least 2 are needed"
        )
    declared = getattr(splits.source.data.features[column], "names", None)
    return list(declared) if declared is not None else class_order(found)


def _class_indices(rows: Rows, column: str, classes: list[str]) -> list[int]:
    index = {name: position for position, name in enumerate(classes)}
    indices = []
    for number, name in zip(rows.numbers, _labels(rows, column), strict=True):
        if name is None:
            raise InputError(f"data.label: column {column!r} is empty in {rows.source} row {number}")
        if name not in index:
            raise InputError(
                f"data.label: {name!r} in {rows.source} row {number} is none of the classes; "
                f"allowed: {listed(classes)}{did_you_mean(name, classes)}"
            )
        indices.append(index[name])
    return indices
