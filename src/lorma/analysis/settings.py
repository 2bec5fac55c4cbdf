"""What was run: the settings of runs as people read them, told apart by method where they differ."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from lorma import formatting as show
from lorma.runs.reading import Run

Value = Callable[[Run], str | None]


def described(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """The settings that decide what was trained, by the names people use; those that no run records are left out."""
    found = [(name, _over_runs(runs, value)) for name, value in _DESCRIBED.items()]
    return [(name, value) for name, value in found if value is not None]


def complete(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Every key of the recipes but those of the runs' own names, as ``section.key``, with its values."""

    def value_of(key: str) -> Value:
        return lambda run: _plain(run.settings.get(key))

    keys = dict.fromkeys(key for run in runs for key in run.settings)
    return [(key, _over_runs(runs, value_of(key)) or show.MISSING) for key in keys]


def _over_runs(runs: Sequence[Run], value: Value) -> str | None:
    """The value of all runs; where they differ each value with the methods that have it."""
    methods: dict[str, list[str]] = {}
    for run in runs:
        if (found := value(run)) is not None:
            methods.setdefault(found, []).append(run.method)
    if len(methods) <= 1:
        return next(iter(methods), None)
    return "; ".join(f"{found} ({', '.join(dict.fromkeys(names))})" for found, names in methods.items())


def _plain(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _get(run: Run, key: str, form: str = "{}") -> str | None:
    value = run.settings.get(key)
    return None if value is None else form.format(_plain(value))


def _joined(*parts: str | None) -> str | None:
    given = [part for part in parts if part is not None]
    return ", ".join(given) if given else None


def _model(run: Run) -> str | None:
    return _joined(
        _file(run.summary["model"]),
        _get(run, "model.gguf_file"),
        _get(run, "model.revision", "revision {}"),
        _get(run, "model.quantization") or _get(run, "model.dtype"),
    )


def _file(name: str) -> str:
    """The name of a file or folder without the folders above it; a hub name as it is."""
    return os.path.basename(name.rstrip("/")) if name.startswith(("/", "~", ".")) else name


def _rows(run: Run, part: str) -> str | None:
    count, limit = run.summary.get(f"{part}_rows"), run.settings.get(f"data.max_{part}_rows")
    if count is None:
        return None if limit is None else f"at most {limit:,} rows"
    return f"{count:,} rows" + (f" (max_{part}_rows)" if limit is not None else "")


def _train_data(run: Run) -> str | None:
    source = run.settings.get("data.train")
    return _joined(None if source is None else _file(source), _get(run, "data.config"), _rows(run, "train"))


def _eval_data(run: Run) -> str | None:
    source = run.settings.get("data.eval")
    split = _get(run, "data.eval_split", "split {}")
    if source is None and split is None and "data.train" in run.settings:
        split = "held out of the same source"
    return _joined(None if source is None else _file(source), split, _rows(run, "eval"))


def _columns(run: Run) -> str | None:
    fields = ("text", "text_pair", "label", "prompt", "completion", "messages")
    return _joined(*(_get(run, f"data.{field}", f"{field} = {{}}") for field in fields))


def _rank(run: Run) -> str | None:
    r = run.summary.get("r")
    if r is None:
        return None
    alpha, dropout = run.settings.get("adapter.alpha"), run.settings.get("adapter.dropout")
    return _joined(
        f"r = {r}",
        f"alpha = {r if alpha is None else alpha:g}" if "adapter.alpha" in run.settings else None,
        f"dropout {dropout:g}" if dropout else None,
    )


def _targets(run: Run) -> str | None:
    targets = run.summary.get("target_modules") or run.settings.get("adapter.target_modules")
    whole = _get(run, "adapter.modules_to_save", "whole: {}")
    return _joined(None if targets is None else _plain(targets), whole)


def _rate(run: Run) -> str | None:
    rate = run.summary.get("learning_rate")
    warmup = run.settings.get("train.warmup_ratio")
    return _joined(
        None if rate is None else f"{rate:g}",
        _get(run, "train.schedule"),
        f"warm-up over {100 * warmup:g} % of the steps" if warmup else None,
    )


def _batch(run: Run) -> str | None:
    size, together = run.settings.get("train.batch_size"), run.settings.get("train.gradient_accumulation_steps")
    if size is None:
        return None
    return f"{size} rows" + (f" × {together} accumulated" if together and together > 1 else "") + " a process"


def _length(run: Run) -> str | None:
    epochs = _get(run, "train.epochs", "epochs: {}") if run.settings.get("train.max_steps") is None else None
    return _joined(f"{run.summary['steps']:,} steps", epochs)


def _regularisation(run: Run) -> str | None:
    return _joined(
        _get(run, "train.weight_decay", "weight decay {}"), _get(run, "train.max_grad_norm", "gradients cut to norm {}")
    )


_DESCRIBED: dict[str, Value] = {
    "Model": _model,
    "Task": lambda run: run.summary["task"],
    "Training data": _train_data,
    "Evaluation data": _eval_data,
    "Columns": _columns,
    "Longest input": lambda run: _get(run, "data.max_length", "{} tokens"),
    "Rank": _rank,
    "Adapted modules": _targets,
    "Learning rate": _rate,
    "Batch": _batch,
    "Length": _length,
    "Regularisation": _regularisation,
    "Precision": lambda run: _get(run, "train.precision"),
}
