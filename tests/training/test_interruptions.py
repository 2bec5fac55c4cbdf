"""Runs that are killed, interrupted or starved of disk go on to the same result; real processes, real signals."""

import json
import random
import resource
import signal
import subprocess
import time

import pytest
import torch
from safetensors.torch import load_file

from helpers_cli import cli_process, start_cli
from lorma.errors import InputError
from lorma.runs.directory import RunDirectory
from lorma.runs.recipe import load_recipe

pytestmark = pytest.mark.slow

STEPS = 400
TRAIN = {
    "max_steps": STEPS,
    "batch_size": 8,
    "learning_rate": 0.01,
    "save_steps": 10,
    "eval_steps": 100,
}


@pytest.fixture
def recipe(recipe_file):
    return recipe_file(adapter={"r": 2, "dropout": 0.2}, train=TRAIN)


@pytest.fixture(scope="module")
def undisturbed_run():
    return {}


@pytest.fixture
def undisturbed(recipe, undisturbed_run, tmp_path):
    """The run that nothing happened to, trained once for this module."""
    if not undisturbed_run:
        done = cli_process("train", recipe, f"output={tmp_path / 'undisturbed'}")
        assert done.code == 0, done.err
        undisturbed_run["path"] = tmp_path / "undisturbed"
    return undisturbed_run["path"]


def lines(run):
    path = run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def wait_for_lines(run, count, process):
    deadline = time.monotonic() + 120
    while lines(run) < count and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)


def finish(recipe, run, undisturbed):
    """Run to the end and compare everything with the undisturbed run."""
    done = cli_process("train", recipe, f"output={run}")
    assert done.code == 0, done.err
    expected = load_file(undisturbed / "adapter" / "adapter_model.safetensors")
    found = load_file(run / "adapter" / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)
    curves = []
    for folder in (undisturbed, run):
        entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        curves.append([(e["step"], round(e["loss"], 5)) for e in entries if "loss" in e])
    assert [step for step, _ in curves[1]] == list(range(1, STEPS + 1))
    assert curves[0] == curves[1]
    assert not [path for path in run.rglob("*") if path.name.endswith(".tmp")]


def test_ten_kills_at_random_moments(recipe, undisturbed, tmp_path):
    run, chance = tmp_path / "killed", random.Random()
    for kill in range(10):
        process = start_cli("train", recipe, f"output={run}")
        if kill % 3 == 2:
            time.sleep(chance.uniform(0, 8))
        else:
            seen = lines(run)
            deadline = time.monotonic() + 120
            while lines(run) == seen and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(chance.uniform(0, 0.4))
        assert process.poll() is None, process.communicate()
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert not (run / "summary.json").exists()
        assert not (run / "adapter").exists()
    assert lines(run) > 10
    finish(recipe, run, undisturbed)


def test_ctrl_c(recipe, undisturbed, tmp_path):
    run = tmp_path / "interrupted"
    process = start_cli(
        "train", recipe, f"output={run}", preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    )
    wait_for_lines(run, 25, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.strip() == "lorma: interrupted; the same command goes on from the last checkpoint"
    finish(recipe, run, undisturbed)


def limit_file_size():
    """A stand-in for a full disk that needs no rights: the kernel refuses to let any file grow further."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))


def test_a_disk_that_fills(recipe, undisturbed, tmp_path):
    run = tmp_path / "full"
    failed = cli_process("train", recipe, f"output={run}", preexec_fn=limit_file_size)
    assert failed.code == 1
    assert "File too large" in failed.err
    assert len(failed.err.strip().splitlines()) == 1
    assert lines(run) > 50
    assert not (run / "adapter").exists()
    finish(recipe, run, undisturbed)


def test_another_recipe_does_not_go_on_with_it(recipe, tmp_path):
    run = tmp_path / "killed"
    process = start_cli("train", recipe, f"output={run}")
    wait_for_lines(run, 12, process)
    process.kill()
    process.communicate()
    refused = cli_process("train", recipe, f"output={run}", "adapter.r=3")
    assert refused.code == 2
    assert "holds an unfinished run with another adapter.r" in refused.err


def test_other_data_does_not_go_on_with_it(recipe, reviews, tmp_path, cli):
    """What it is evaluated on could have been trained on."""
    run, rows = tmp_path / "killed", reviews.read_text()
    process = start_cli("train", recipe, f"output={run}")
    wait_for_lines(run, 12, process)
    process.kill()
    process.communicate()
    step = RunDirectory(run).last_step()
    reviews.write_text(rows.replace("great", "fine"))
    refused = cli("train", recipe, f"output={run}")
    assert refused.code == 2
    assert "data.train has changed since this run began; give --overwrite to start anew" in refused.err
    assert len(refused.err.strip().splitlines()) == 1
    reviews.write_text(rows)
    went_on = cli("train", recipe, f"output={run}")
    assert f"going on from step {step}" in went_on.out

    (run / "summary.json").unlink()
    reviews.write_text(rows.replace("great", "fine"))
    anew = cli("train", recipe, f"output={run}", "--overwrite")
    assert anew.code == 0, anew.err
    assert "going on" not in anew.out


def test_runs_without_a_record_of_their_data_go_on(recipe_file, reviews, tmp_path, cli):
    """As those of earlier versions; from then on there is one."""
    recipe, run = recipe_file(train={"max_steps": 12, "batch_size": 8, "save_steps": 6}), tmp_path / "run"
    assert cli("train", recipe).code == 0
    (run / "summary.json").unlink()
    (run / "checkpoints" / "data.json").unlink()
    assert "going on from step 12" in cli("train", recipe).out
    (run / "summary.json").unlink()
    reviews.write_text(reviews.read_text().replace("great", "fine"))
    assert "data.train has changed since this run began" in cli("train", recipe).err


@pytest.mark.parametrize("ends", ["finished", "killed"])
def test_a_run_that_began_meanwhile_is_left_alone(ends, recipe, recipe_file, tmp_path, cli, monkeypatch):
    """While one process loads its model, another trains there from start to end, or gets killed."""
    from lorma.training import run as training

    run, load_model, kept = tmp_path / "run", training.load_model, {}

    def load_slowly(*arguments, **options):
        if ends == "finished":
            assert cli_process("train", recipe, "train.max_steps=12").code == 0
        else:
            other = start_cli("train", recipe)
            wait_for_lines(run, 12, other)
            other.kill()
            other.communicate()
        kept.update({path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"})
        return load_model(*arguments, **options)

    monkeypatch.setattr(training, "load_model", load_slowly)
    refused = cli("train", recipe_file("second.yaml", adapter={"r": 3}))
    assert refused.code == 2
    reason = "a finished run; give --overwrite" if ends == "finished" else "an unfinished run with another adapter.r"
    assert reason in refused.err
    assert kept[run / "recipe.yaml"]
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == kept


def test_a_lock_is_on_the_file_that_others_see(recipe, tmp_path, monkeypatch):
    """A run ends, and removes its lock file, after the next one has opened that file and before it locks it."""
    import fcntl

    loaded, lock = load_recipe(recipe), fcntl.flock
    first, second, third = (RunDirectory(tmp_path / "run") for _ in range(3))
    first.open(loaded, overwrite=False, data={})

    def flock(file, operation):
        first.close()
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    second.open(loaded, overwrite=False, data={})
    with pytest.raises(InputError, match="is being trained by another process"):
        third.open(loaded, overwrite=False, data={})
    second.close()
    assert not (tmp_path / "run" / ".lock").exists()
    third.open(loaded, overwrite=False, data={})
    third.close()


def test_two_processes_under_torchrun(recipe, tmp_path):
    import sys

    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    arguments = ["-m", "lorma", "train", str(recipe), "train.max_steps=12", "train.save_steps=6"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    entries = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [e["step"] for e in entries if "loss" in e] == list(range(1, 13))
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["device"].endswith("× 2 processes")
    assert done.stdout.count("Finished:") == 1
