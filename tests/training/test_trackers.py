"""Trackers for real: TensorBoard's event files and trackio's database, read back."""

import json
import sqlite3

import pytest
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from helpers_cli import cli_process
from lorma.runs.recipe import differences, load_recipe

TRAIN = {"max_steps": 6, "batch_size": 8, "learning_rate": 0.01, "eval_steps": 4, "save_steps": 3}


@pytest.fixture(autouse=True)
def no_folder_of_the_environment(monkeypatch):
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)


@pytest.fixture
def recipe(recipe_file):
    return lambda report_to: recipe_file(train=TRAIN | {"report_to": report_to})


def logged(run, name):
    """``metrics.jsonl`` as step → value."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: pytest.approx(line[name], rel=1e-6) for line in lines if name in line}


def events(folder):
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()


def scalars(folder, name):
    """Step → value, of which each step has one."""
    found = events(folder).Scalars(name)
    assert len({event.step for event in found}) == len(found)
    return {event.step: event.value for event in found}


def leave_unfinished(run):
    """As a kill between the two checkpoints does."""
    (run / "summary.json").unlink()
    (run / "checkpoints" / "checkpoint-6" / "complete").unlink()


def test_tensorboard(recipe, tmp_path, cli):
    run, folder = tmp_path / "run", tmp_path / "run" / "tensorboard"
    assert cli("train", recipe(None)).code == 0
    untracked = load_file(run / "adapter" / "adapter_model.safetensors")
    assert not folder.exists()

    trained = cli("train", recipe("tensorboard"), "--overwrite")
    assert trained.code == 0, trained.err
    assert "accuracy 0." in trained.out
    assert "predicted_classes" not in trained.out
    tracked = load_file(run / "adapter" / "adapter_model.safetensors")
    assert all((tensor == untracked[name]).all() for name, tensor in tracked.items())
    for name, tag in (("loss", "train/loss"), ("eval_accuracy", "eval/accuracy")):
        assert scalars(folder, tag) == logged(run, name)
    assert list(scalars(folder, "eval/loss")) == [4, 6], "the evaluation after the last step as well"
    text = events(folder).Tensors("args/text_summary")[0].tensor_proto.string_val[0].decode()
    settings = json.loads(text)
    assert (settings["recipe/adapter/r"], settings["recipe/method"], settings["recipe/seed"]) == (2, "lorma-plus", 0)
    assert settings["recipe/train/learning_rate"] == 0.01
    assert settings["run_name"].startswith("run-")

    leave_unfinished(run)
    assert "going on from step 3" in cli("train", recipe("tensorboard")).out
    assert scalars(folder, "train/loss") == logged(run, "loss")
    assert len(list(folder.iterdir())) == 2

    assert cli("train", recipe("tensorboard"), "--overwrite", "seed=1").code == 0
    assert scalars(folder, "train/loss") == logged(run, "loss")
    assert len(list(folder.iterdir())) == 1


def test_a_common_folder_has_one_for_each_run(recipe, tmp_path, cli, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "all"))
    assert cli("train", recipe("tensorboard"), "train.max_steps=4").code == 0
    assert cli("train", recipe("tensorboard"), "train.max_steps=4", "--overwrite").code == 0
    assert [path.name.startswith("run-") for path in (tmp_path / "all").iterdir()] == [True, True]


@pytest.mark.slow
def test_trackio(recipe, tmp_path, monkeypatch):
    """In processes of their own, because trackio reads its folder when it is imported."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    run = tmp_path / "run"
    for going_on in (False, True):
        trained = cli_process("train", recipe(["trackio"]))
        assert trained.code == 0, trained.err
        assert ("going on from step 3" in trained.out) == going_on
        with sqlite3.connect(tmp_path / "trackio" / "lorma.db") as database:
            configs = database.execute("SELECT run_name, config FROM configs").fetchall()
            metrics = database.execute("SELECT run_name, metrics FROM metrics ORDER BY step").fetchall()
        database.close()
        [(name, settings)] = configs
        assert name.startswith("run-")
        assert {run_name for run_name, _ in metrics} == {name}
        assert json.loads(settings)["recipe/adapter/r"] == 2
        entries = [json.loads(text) for _, text in metrics]
        losses = [(entry["train/global_step"], entry["train/loss"]) for entry in entries if "train/loss" in entry]
        assert [step for step, _ in losses] == [1, 2, 3, 4, 5, 6, *([4, 5, 6] if going_on else [])]
        assert dict(losses) == logged(run, "loss")
        assert {e["train/global_step"]: e["eval/loss"] for e in entries if "eval/loss" in e} == logged(run, "eval_loss")
        leave_unfinished(run)


@pytest.mark.parametrize(
    ("report_to", "line"),
    [
        ("tensorbord", "train.report_to='tensorbord' is unknown; allowed: none, all, azure_ml, "),
        (["tensorboard", "wandbb"], "train.report_to='wandbb' is unknown; allowed: azure_ml, "),
        (
            "clearml",
            "train.report_to='clearml' cannot be used: ClearMLCallback requires 'clearml' to be installed",
        ),
        (["trackio", "trackio"], "train.report_to=['trackio', 'trackio']: 'trackio' is listed twice"),
    ],
)
def test_trackers_that_are_not_there(report_to, line, recipe, tmp_path, cli):
    refused = cli("train", recipe(report_to))
    assert refused.code == 2
    assert line in refused.err
    assert not (tmp_path / "run").exists()


def test_a_tracker_changes_no_run(recipe):
    first, second = load_recipe(recipe(None)), load_recipe(recipe(["tensorboard"]))
    assert differences(first, second) == []


@pytest.mark.slow
def test_compare(recipe, tmp_path, cli):
    done = cli("compare", recipe("tensorboard"), "--methods", "lora", "train.max_steps=4")
    assert done.code == 0, done.err
    run = tmp_path / "run" / "lora-seed0"
    assert scalars(run / "tensorboard", "train/loss") == logged(run, "loss")
