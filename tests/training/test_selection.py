"""Early stopping and the best evaluation: when a run ends, whose weights it saves, and the same after a kill."""

import math
import signal
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file

from helpers_cli import cli_process, start_cli
from lorma.analysis import build_table, load_run
from lorma.runs.directory import RunDirectory
from lorma.runs.recipe import differences, load_recipe, parse_recipe
from lorma.training.selection import best_step, since_improvement

TRAIN = {"max_steps": 40, "batch_size": 8, "learning_rate": 0.05, "schedule": "constant", "eval_steps": 3}
STOPPING = {"patience": 2, "min_improvement": 0.001, "metric": "accuracy"}


def test_the_best_step_is_the_earliest_of_equals():
    assert best_step([(1, 0.5), (2, 0.7), (3, 0.7), (4, math.nan)], True) == 2
    assert best_step([(1, 0.5), (2, 0.7), (3, 0.5)], False) == 1
    assert best_step([(1, math.nan)], True) is None


@pytest.mark.parametrize(
    ("values", "least", "passed"),
    [
        ([], 0.0, 0),
        ([0.5], 0.0, 0),
        ([0.5, 0.5], 0.0, 1),
        ([0.5, 0.4, 0.6], 0.0, 0),
        ([0.5, 0.55, 0.62], 0.1, 0),  # slow, but together more than the least
        ([0.5, 0.55, 0.59], 0.1, 2),
        ([0.5, math.nan, math.nan], 0.0, 2),
        ([math.nan, 0.1], 0.0, 0),
    ],
)
def test_evaluations_since_an_improvement(values, least, passed):
    assert since_improvement(list(enumerate(values)), True, least) == passed
    assert since_improvement([(step, -value) for step, value in enumerate(values)], False, least) == passed


@pytest.mark.parametrize("method", ["lorma-plus", "lora", "adalora", "full"])
def test_the_best_evaluation_is_saved(method, recipe_file, tmp_path, cli, read_json):
    recipe = recipe_file(method=method, train=TRAIN | {"early_stopping": STOPPING, "keep": "best"})
    done = cli("train", recipe)
    assert done.code == 0, done.err
    summary = read_json(tmp_path / "run" / "summary.json")
    entries = RunDirectory(tmp_path / "run").metrics()
    reached = {entry["step"]: entry["eval_accuracy"] for entry in entries if "eval_accuracy" in entry}
    assert summary["best_step"] == summary["saved_step"] == max(reached, key=reached.get)
    assert summary["best_by"] == "accuracy"
    assert summary["final_metrics"] == summary["best_metrics"]
    assert summary["final_metrics"]["accuracy"] == max(reached.values())
    assert summary["last_metrics"]["accuracy"] == reached[max(reached)]
    assert summary["stopped_early"]
    assert summary["saved_step"] < summary["steps"] < 40
    assert f"stopped at step {summary['steps']}: no better accuracy for 2 evaluations" in done.out
    measured = dict(line.split("\t") for line in cli("evaluate", tmp_path / "run").out.strip().splitlines())
    for name, value in summary["final_metrics"].items():
        assert float(measured[name]) == pytest.approx(value, abs=1e-4)


def test_the_last_weights_are_kept_unless_asked(recipe_file, tmp_path, cli, read_json):
    recipe = recipe_file(train=TRAIN | {"early_stopping": STOPPING})
    assert cli("train", recipe).code == 0
    summary = read_json(tmp_path / "run" / "summary.json")
    assert summary["stopped_early"]
    assert summary["saved_step"] == summary["steps"] < 40
    assert summary["planned_steps"] == 40
    assert summary["final_metrics"] == summary["last_metrics"]
    measured = dict(line.split("\t") for line in cli("evaluate", tmp_path / "run").out.strip().splitlines())
    assert float(measured["loss"]) == pytest.approx(summary["last_metrics"]["loss"], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("save", [{"save_steps": 5}, {}], ids=["save_steps", "epochs"])
def test_kills_at_any_step_change_nothing(save, recipe_file, tmp_path, read_json):
    """Killed after each evaluation and at the very end, among them between the stop and the summary."""
    recipe = recipe_file(
        adapter={"r": 2, "dropout": 0.2}, train=TRAIN | save | {"early_stopping": STOPPING, "keep": "best"}
    )
    assert cli_process("train", recipe, f"output={tmp_path / 'whole'}").code == 0
    whole, run = read_json(tmp_path / "whole" / "summary.json"), tmp_path / "killed"
    for step in (4, whole["best_step"], whole["best_step"] + 1, whole["steps"]):
        process = start_cli("train", recipe, f"output={run}")
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            entries = RunDirectory(run).metrics()
            if entries and entries[-1]["step"] >= step:
                break
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    (run / "summary.json").unlink(missing_ok=True)
    done = cli_process("train", recipe, f"output={run}")
    assert done.code == 0, done.err
    found = read_json(run / "summary.json")
    for key in ("steps", "best_step", "saved_step", "stopped_early", "planned_steps"):
        assert found[key] == whole[key], key
    assert found["final_metrics"] == pytest.approx(whole["final_metrics"], abs=1e-5)
    for name, tensor in load_file(run / "adapter" / "adapter_model.safetensors").items():
        expected = load_file(tmp_path / "whole" / "adapter" / "adapter_model.safetensors")[name]
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("train", "reason"),
    [
        (
            {"keep": "best", "save_steps": 5},
            "train: save_steps=5 with evaluations after each epoch does not go with keep",
        ),
        (
            {"early_stopping": {"patience": 1}, "save_steps": 5},
            "does not go with early_stopping; give eval_steps as well",
        ),
        ({"early_stopping": {"patience": 0}}, "train.early_stopping.patience=0"),
        ({"early_stopping": {"patience": 1, "min_improvement": -1.0}}, "train.early_stopping.min_improvement=-1.0"),
        ({"early_stopping": {"patience": 1, "min_improvment": 0.1}}, "did you mean 'min_improvement'?"),
        ({"early_stopping": {"patience": 1, "metric": "mse"}}, "allowed: loss, accuracy, f1, matthews"),
        ({"keep": "bset"}, "train.keep='bset'"),
        ({"keep": "best", "eval_steps": 9, "max_steps": 8}, "eval_steps=9 is more than max_steps=8"),
    ],
)
def test_what_cannot_decide_is_refused_before_the_work(train, reason, recipe_file, tmp_path, cli):
    refused = cli("train", recipe_file(train={"batch_size": 8} | train))
    assert refused.code == 2
    assert reason in refused.err
    assert len(refused.err.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_recipes_of_earlier_versions_are_the_same_run(recipe_file):
    recipe = load_recipe(recipe_file())
    written = yaml.safe_load(recipe.to_yaml())
    assert (written["train"]["keep"], written["train"]["early_stopping"]) == ("last", None)
    for key in ("keep", "early_stopping"):
        del written["train"][key]
    assert differences(parse_recipe(written), recipe) == []


@pytest.mark.slow
def test_a_comparison_of_runs_that_stop(recipe_file, tmp_path, cli):
    """Finished is finished, and a shorter run has no smaller area for that."""
    recipe = recipe_file(train=TRAIN | {"early_stopping": STOPPING, "keep": "best"})
    assert cli("compare", recipe, "--methods", "lora,lorma-plus").code == 0
    again = cli("compare", recipe, "--methods", "lora,lorma-plus")
    assert again.code == 0
    runs = [load_run(tmp_path / "run" / f"{method}-seed0") for method in ("lora", "lorma-plus")]
    table = build_table(runs)
    assert any("chosen on these same rows" in note for note in table.notes)
    if len({run.steps[-1] for run in runs}) > 1:
        assert [row.loss_auc for row in table.rows] == [None, None]
        assert any("Stopped early" in note for note in table.notes)
