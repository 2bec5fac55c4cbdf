"""``lorma compare`` and ``lorma report``, with a real process a run."""

import fcntl
import json
import signal
import time

import psutil
import pytest
from rich.text import Text

from helpers_cli import cli_process, start_cli

pytestmark = pytest.mark.slow


@pytest.fixture
def compared(recipe_file, tmp_path, cli):
    recipe = recipe_file(compare={"methods": ["lora", "lorma-plus"], "seeds": [0, 1]})
    result = cli("compare", recipe, f"output={tmp_path / 'all'}")
    assert result.code == 0, result
    return recipe, tmp_path / "all", result


def test_table_report_and_skipping(compared, reviews, cli, tmp_path, monkeypatch):
    recipe, folder, first = compared
    assert {path.name for path in folder.iterdir()} == {
        "lora-seed0",
        "lora-seed1",
        "lorma-plus-seed0",
        "lorma-plus-seed1",
        "report",
    }
    assert {"index.html", "loss.png", "loss.svg", "evaluation.svg", "table.json", "table.md"} <= {
        path.name for path in (folder / "report").iterdir()
    }
    table = json.loads((folder / "report" / "table.json").read_text())
    assert [row["method"] for row in table["rows"]] == ["lora", "lorma-plus"]
    assert [row["seeds"] for row in table["rows"]] == [[0, 1], [0, 1]]
    for row in table["rows"]:
        assert row["adapter_parameters"] == 512
        assert row["metric_sd"] is not None
        assert row["loss_auc"] > 0
    assert "lorma-plus" in first.out
    assert str(folder / "report" / "index.html") in first.out

    before = (folder / "lora-seed0" / "summary.json").stat().st_mtime_ns
    again = cli("compare", recipe, f"output={folder}")
    assert again.code == 0
    assert again.out.count("done before") == 4
    assert (folder / "lora-seed0" / "summary.json").stat().st_mtime_ns == before

    other = cli("compare", recipe, f"output={folder}", "adapter.r=3")
    assert other.code == 2
    assert "was trained with another adapter.r" in other.err

    reviews.write_text(reviews.read_text().replace("great", "fine"))
    changed = cli("compare", recipe, f"output={folder}")
    assert changed.code == 2
    assert "lora-seed0': data.train has changed since this run began" in changed.err

    pair = (folder / "lora-seed0", folder / "lorma-plus-seed1")
    report = cli("report", *pair, "-o", tmp_path / "mine")
    assert report.code == 0
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "60")
    shown = [Text.from_ansi(line).plain for line in cli("report", *pair, "-o", tmp_path / "mine").out.splitlines()]
    notes = shown[next(number for number, line in enumerate(shown) if line.startswith("- ")) : -1]
    assert len(notes) > 6
    assert all(line.startswith(("- ", "  ")) for line in notes)
    assert (tmp_path / "mine" / "index.html").is_file()


def test_a_failing_method_does_not_take_the_others_with_it(recipe_file, tmp_path, cli):
    recipe = recipe_file(train={"max_steps": 3, "batch_size": 8, "learning_rate": 1e30, "max_grad_norm": 1e30})
    result = cli("compare", recipe, "--methods", "full,lorma-none", "--seeds", "0", "train.warmup_ratio=0")
    assert result.code == 1
    assert "Failed, and not in the table: full-seed0" in result.out


def test_who_terminates_a_comparison_terminates_its_run(recipe_file, tmp_path):
    train = {"max_steps": 300, "batch_size": 8, "save_steps": 25, "eval_steps": 300}
    recipe = recipe_file(train=train, compare={"methods": ["lora", "lorma-plus"]})
    first, second = tmp_path / "run" / "lora-seed0", tmp_path / "run" / "lorma-plus-seed0"
    process = start_cli("compare", recipe)
    deadline = time.monotonic() + 120
    while not any(first.glob("checkpoints/*/complete")) and time.monotonic() < deadline:
        time.sleep(0.02)
    runs = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert runs
    assert not [run for run in runs if run.is_running()]
    assert process.returncode == 1
    assert err.strip() == "lorma: interrupted; the same command goes on from the last checkpoint"
    assert not (first / "summary.json").exists()
    assert not second.exists()

    again = cli_process("compare", recipe)
    assert again.code == 0, again.err
    assert again.out.count("going on from step") == 1
    assert (second / "summary.json").is_file()


def test_two_comparisons_share_the_runs(recipe_file, tmp_path):
    train = {"max_steps": 5, "batch_size": 8, "save_steps": 5, "eval_steps": 5}
    recipe = recipe_file(train=train, compare={"methods": ["lora", "lorma-plus"]})
    both = [start_cli("compare", recipe) for _ in range(2)]
    for process in both:
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0, err
        assert "ailed" not in out
        assert "│ lora " in out
        assert "│ lorma-plus " in out
    assert all((tmp_path / "run" / f"{method}-seed0" / "summary.json").is_file() for method in ("lora", "lorma-plus"))


def test_a_run_that_another_process_holds_is_waited_for(recipe_file, tmp_path):
    recipe = recipe_file(compare={"methods": ["lora", "lorma-plus"]}, train={"max_steps": 2, "batch_size": 8})
    folder = tmp_path / "run" / "lora-seed0"
    folder.mkdir(parents=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = start_cli("compare", recipe)
        seen = ""
        while "lora-seed0: another process trains it" not in seen:
            line = process.stdout.readline()
            assert line, process.stderr.read()
            seen += line
        assert "[2/2] lorma-plus-seed0" in seen
        assert "[1/2] lora-seed0\n" not in seen
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "[1/2] lora-seed0\n" in out
    assert (folder / "summary.json").is_file()


def test_a_killed_run_is_said_to_be_killed(recipe_file, tmp_path):
    train = {"max_steps": 3000, "batch_size": 8, "save_steps": 3000, "eval_steps": 3000}
    process = start_cli("compare", recipe_file(train=train), "--methods", "lora")
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "lora-seed0" / ".lock").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    (run,) = psutil.Process(process.pid).children()
    run.kill()
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    told = "lora-seed0 was killed (SIGKILL), perhaps because memory ran out"
    assert f"Failed, and not in the table: {told}" in out


def test_refusals_come_before_the_first_run(recipe_file, tmp_path, cli, monkeypatch):
    recipe = recipe_file()
    assert "method='lorma+' is unknown" in cli("compare", recipe, "--methods", "lora,lorma+").err
    assert cli("compare", recipe, "--seeds", "0,x").code == 2
    assert "compare.seeds=[0, 0]: 0 is listed twice" in cli("compare", recipe, "--seeds", "0,0").err
    assert "compare.methods=[]" in cli("compare", recipe, "--methods", "").err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "--launcher 'accelerate launch'" in cli("compare", recipe).err
    assert not (tmp_path / "run").exists()
