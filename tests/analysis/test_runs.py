from __future__ import annotations

import json
import math

import pytest

from lorma.analysis import load_run
from lorma.errors import InputError


def append(path, *entries, tail=""):
    with (path / "metrics.jsonl").open("a") as file:
        file.write("".join(json.dumps(entry) + "\n" for entry in entries) + tail)


def change_summary(path, **values):
    summary = json.loads((path / "summary.json").read_text()) | values
    (path / "summary.json").write_text(json.dumps({k: v for k, v in summary.items() if v is not ...}))


def test_a_finished_run(write_run):
    run = load_run(str(write_run("a", "lorma-plus", 3, losses=[0.7, 0.5, 0.4], every=10, accuracy=0.9)))
    assert (run.method, run.seed, run.primary) == ("lorma-plus", 3, 0.9)
    assert run.steps == (10, 20, 30)
    assert run.losses == (0.7, 0.5, 0.4)
    assert not run.diverged
    (evaluation,) = run.evaluations
    assert evaluation.step == 30
    assert evaluation.metrics == {"loss": 0.4, "accuracy": 0.9}


@pytest.mark.parametrize("tail", ['{"step": 4, "lo', "{", '{"step": 4, "loss": 0.1, "note": "\\u00'])
def test_a_last_line_cut_in_half_is_ignored(write_run, tail):
    assert load_run(write_run("a", losses=[0.7, 0.5, 0.4], tail=tail)).steps == (1, 2, 3)


def test_a_last_line_cut_inside_a_character_is_ignored(write_run):
    path = write_run("a", losses=[0.7, 0.5])
    with (path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 3, "note": "\xc3')
    assert load_run(path).steps == (1, 2)


def test_a_whole_last_line_without_its_line_end_counts(write_run):
    assert load_run(write_run("a", losses=[0.7], tail='{"step": 2, "loss": 0.6}')).steps == (1, 2)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"step": 3, "lo\n', "line 4: not valid JSON"),
        ("[1]\n", "line 4: must be a JSON object"),
        ('{"loss": 1}\n', "line 4: step=None must be a whole number"),
        ('{"step": 3, "loss": "low"}\n', "line 4: loss='low' must be a number"),
    ],
)
def test_a_broken_line_elsewhere_is_named(write_run, line, message):
    path = write_run("a", losses=[0.7, 0.5], tail=line + '{"step": 4, "loss": 0.1}\n')
    with pytest.raises(InputError, match=rf"metrics\.jsonl, {message}"):
        load_run(path)


def test_resumed_steps_replace_the_first_attempt(write_run):
    path = write_run("a", losses=[0.9, 0.8, 0.7])
    append(path, {"step": 2, "loss": 0.5}, {"step": 2, "eval_loss": 0.3}, {"step": 3, "loss": 0.4})
    run = load_run(path)
    assert run.steps == (1, 2, 3)
    assert run.losses == (0.9, 0.5, 0.4)
    assert [(point.step, point.metrics) for point in run.evaluations] == [(2, {"loss": 0.3})]


def test_lines_of_another_kind_are_passed_over(write_run):
    path = write_run("a", losses=[0.9])
    append(path, {"step": 1, "train_runtime": 12.0})
    assert load_run(path).steps == (1,)


def test_a_loss_that_is_not_finite_marks_the_run_as_diverged(write_run):
    path = write_run("a", losses=[0.9, math.nan])
    append(path, {"step": 3, "loss": None})
    run = load_run(path)
    assert run.diverged
    assert math.isnan(run.losses[2])


def test_an_undefined_primary_metric_is_nan(write_run):
    path = write_run("a")
    change_summary(path, final_metrics={"accuracy": None})
    assert math.isnan(load_run(path).primary)


def test_no_directory(tmp_path):
    with pytest.raises(InputError, match="nowhere: not a run directory"):
        load_run(tmp_path / "nowhere")


def test_an_unfinished_run(write_run):
    path = write_run("a")
    (path / "summary.json").unlink()
    with pytest.raises(InputError, match="a: unfinished; run `lorma train` again to resume it"):
        load_run(path)


def test_a_run_without_metrics(write_run):
    path = write_run("a")
    (path / "metrics.jsonl").unlink()
    with pytest.raises(InputError, match=r"a: has no metrics\.jsonl"):
        load_run(path)
    (path / "metrics.jsonl").write_text("")
    with pytest.raises(InputError, match=r"metrics\.jsonl: holds no training loss"):
        load_run(path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"schema_version": 2}, "schema_version=2 is not known; this version reads 1"),
        ({"schema_version": ...}, "schema_version=None is not known"),
        ({"method": ..., "seconds": ...}, r"summary\.json: missing method, seconds"),
        ({"seed": "zero"}, "seed='zero' must be of type int"),
        ({"seconds": None}, "seconds=None must be of type int or float"),
        ({"final_metrics": {"accuracy": "high"}}, "final_metrics.accuracy='high' must be a number"),
        ({"primary_metric": "mcc"}, r"primary_metric='mcc' is not among final_metrics \(accuracy, f1, loss\)"),
    ],
)
def test_summaries_that_are_refused(write_run, values, message):
    path = write_run("a")
    change_summary(path, **values)
    with pytest.raises(InputError, match=message) as caught:
        load_run(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "message"), [("{", "not valid JSON"), ("[]", "must hold a JSON object")])
def test_a_summary_that_is_no_object(write_run, text, message):
    path = write_run("a")
    (path / "summary.json").write_text(text)
    with pytest.raises(InputError, match=message):
        load_run(path)
