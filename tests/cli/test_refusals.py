"""Bad input: exit code 2, one line, nothing left behind."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file

from helpers_cli import cli_as_anybody


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["adapter.r=0"], "adapter.r=0"),
        (["adapter.r=1.5"], "adapter.r=1.5"),
        (["adapter.rr=1"], "unknown key 'adapter.rr'"),
        (["method=lorma-minus"], "method='lorma-minus' is unknown"),
        (["adapter.target_modules=[qeury]"], "'qeury' matches no module; closest names: query"),
        (["adapter.target_modules=qeury"], "adapter: target_modules='qeury' matches no module of this model"),
        (["adapter.target_modules=[q]"], "'q' matches no module; closest names: query"),
        (
            ["adapter.target_modules=[nope]"],
            "'nope' matches no module; layers that can be adapted: classifier, dense, key",
        ),
        (["adapter.modules_to_save=[clasifier]"], "adapter.modules_to_save: 'clasifier' matches no module"),
        (["method=full", "adapter.target_modules=[qeury]"], "'qeury' matches no module"),
        (["adapter.target_modules=[LayerNorm]"], "LayerNorm (LayerNorm) is not supported"),
        (["model.name=minilmm"], "model.name='minilmm' is neither an alias"),
        (["model.name=nobody/nothing"], "model.name='nobody/nothing' cannot be loaded"),
        (["data.train=nowhere.csv"], "data.train"),
        (["data.label=lable"], "data.label"),
        (["data.text=txet"], "data.text"),
        (["data.text=label", "data.label=label"], "data: text and label are both the column 'label'"),
        (["data.text=label"], "data: text and label are both the column 'label'"),
        (["data.label=text", "task=regression"], "data: text and label are both the column 'text'"),
        (["data.text_pair=text"], "data: text and text_pair are both the column 'text'"),
        (["data.train=movie_reviews", "data.text=rating", "task=regression"], "both the column 'rating'"),
        (["data.labels=[good,awful]"], "bad"),
        (["data.train=movie_review"], "movie_reviews"),
        (["task=regression"], "label"),
    ],
)
def test_a_bad_recipe_starts_nothing(overrides, message, recipe_file, tmp_path, cli):
    refused = cli("train", recipe_file(), *overrides)
    assert refused.code == 2
    assert message in refused.err
    assert len(refused.err.strip().splitlines()) == 1, refused.err
    assert not (tmp_path / "run").exists()


def test_empty_data(recipe_file, tmp_path, cli):
    empty = tmp_path / "empty.csv"
    empty.write_text("text,label\n")
    refused = cli("train", recipe_file(data={"train": str(empty)}))
    assert refused.code == 2
    assert "empty" in refused.err


def test_an_output_that_is_no_run(recipe_file, tmp_path, cli):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("precious")
    refused = cli("train", recipe_file(), "--overwrite")
    assert refused.code == 2
    assert "holds other files and no run" in refused.err
    assert (tmp_path / "run" / "thesis.txt").read_text() == "precious"


@pytest.fixture
def run(recipe_file, tmp_path, cli):
    assert cli("train", recipe_file()).code == 0
    return tmp_path / "run"


def break_truncate(run):
    path = run / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def break_foreign(run):
    path = run / "adapter" / "adapter_model.safetensors"
    save_file({name.replace("lorma_", "lora_"): t for name, t in load_file(path).items()}, path)


def break_shape(run):
    path = run / "adapter" / "adapter_model.safetensors"
    save_file({n: t[:, :5].contiguous() if "lorma_A" in n else t for n, t in load_file(path).items()}, path)


def break_type(run):
    path = run / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lorma_alpha": "eight"}))


def break_method(run):
    path = run / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"peft_type": "NOT_A_METHOD"}))


def break_missing(run):
    (run / "adapter" / "adapter_model.safetensors").unlink()


def break_head(run):
    path = run / "adapter" / "adapter_model.safetensors"
    save_file({n: t for n, t in load_file(path).items() if "classifier" not in n}, path)


def break_some_factors(run):
    path = run / "adapter" / "adapter_model.safetensors"
    save_file({n: t for n, t in load_file(path).items() if "layer.1" not in n}, path)


def break_config(run):
    (run / "adapter" / "adapter_config.json").write_text("[1]")


def break_task(run):
    (run / "adapter" / "lorma_task.json").write_text("{}")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_truncate, "adapter_model.safetensors is truncated or not a safetensors file"),
        (break_foreign, "holds no weights named lorma_A"),
        (break_shape, "lorma_A has shape [2, 5], the model has room for [2, 32]"),
        (break_type, "lorma_alpha='eight' must be a finite number"),
        (break_method, "NOT_A_METHOD"),
        (break_missing, "has no adapter_model.safetensors"),
        (break_task, "does not describe a task"),
        (break_head, "classifier"),
        (break_some_factors, "lacks base_model.model.bert.encoder.layer.1"),
        (break_config, "adapter_config.json must hold a JSON object"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_broken_adapters(damage, message, run, cli):
    damage(run)
    for source in (run, run / "adapter"):
        refused = cli("predict", source, "--text", "the film was great")
        assert refused.code == 2, refused
        assert message in refused.err
        assert len(refused.err.strip().splitlines()) == 1


def test_a_head_stored_in_another_precision_is_read(run, cli):
    path = run / "adapter" / "adapter_model.safetensors"
    expected = cli("predict", run, "--text", "the film was great").out.split("\t")
    save_file({n: t.bfloat16() if "classifier" in n else t for n, t in load_file(path).items()}, path)
    found = cli("predict", run, "--text", "the film was great")
    assert found.code == 0, found.err
    assert float(found.out.split("\t")[1]) == pytest.approx(float(expected[1]), abs=0.01)


@pytest.mark.parametrize("method", ["lora", "lorma-plus"])
def test_weights_of_another_method(method, recipe_file, tmp_path, cli):
    other = "lora" if method == "lorma-plus" else "lorma-plus"
    for name in (method, other):
        assert cli("train", recipe_file(), f"method={name}", f"output={tmp_path / name}").code == 0
    weights = (tmp_path / other / "adapter" / "adapter_model.safetensors").read_bytes()
    (tmp_path / method / "adapter" / "adapter_model.safetensors").write_bytes(weights)
    refused = cli("predict", tmp_path / method, "--text", "the film was great")
    assert refused.code == 2
    assert "adapter_model.safetensors" in refused.err


def test_an_adapter_cannot_ask_for_remote_code(run, tiny_bert, tmp_path, cli):
    trap, proof = tmp_path / "trap", tmp_path / "ran"
    shutil.copytree(tiny_bert, trap)
    config = json.loads((trap / "config.json").read_text())
    config |= {"model_type": "trap", "auto_map": {"AutoConfig": "trap.TrapConfig"}}
    (trap / "config.json").write_text(json.dumps(config))
    (trap / "trap.py").write_text(f"open({str(proof)!r}, 'w')\n")
    kept = json.loads((run / "adapter" / "lorma_task.json").read_text())
    kept["model"] |= {"name": str(trap), "trust_remote_code": True}
    (run / "adapter" / "lorma_task.json").write_text(json.dumps(kept))
    refused = cli("predict", run / "adapter", "--text", "the film was great")
    assert refused.code == 2
    assert not proof.exists()


def test_predict_arguments(run, tmp_path, cli):
    assert "give either --text or --file" in cli("predict", run).err
    assert "does not exist" in cli("predict", tmp_path / "nothing", "--text", "x").err
    nowhere = cli("predict", run, "--text", "a", "-o", tmp_path / "no" / "answers.jsonl")
    assert nowhere.code == 2
    assert "its directory does not exist" in nowhere.err
    assert "takes one text, two are given" in cli("predict", run, "--text", "a", "--text-pair", "b").err
    missing = cli("predict", run, "--file", tmp_path / "nothing.csv")
    assert missing.code == 2
    assert "nothing.csv" in missing.err
    (run / "summary.json").unlink()
    unfinished = cli("predict", run, "--text", "x")
    assert unfinished.code == 2
    assert "is an unfinished run" in unfinished.err


def test_predict_overwrites_nothing_by_accident(run, tmp_path, cli, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = tmp_path / "new.csv"
    table.write_text("text\nthe film was great\n")
    (tmp_path / "link.csv").symlink_to(table)
    for output in ("new.csv", "link.csv", "run/../new.csv"):
        for more in ([], ["--overwrite"]):
            refused = cli("predict", run, "--file", "new.csv", "-o", output, *more)
            assert (refused.code, refused.err.count("\n")) == (2, 1)
            assert "is 'new.csv', which is read; choose another output" in refused.err
    assert table.read_text() == "text\nthe film was great\n"
    answers = tmp_path / "answers.jsonl"
    answers.write_text("mine")
    refused = cli("predict", run, "--file", table, "-o", answers)
    assert refused.code == 2
    assert "answers.jsonl' exists; give --overwrite to replace it" in refused.err
    assert answers.read_text() == "mine"
    done = cli("predict", run, "--file", table, "-o", answers, "--overwrite")
    assert done.code == 0, done.err
    assert json.loads(answers.read_text())["text"] == "the film was great"


def test_outputs_below_a_file_are_refused_before_the_work(recipe_file, tmp_path, cli):
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "out"
    for arguments in (
        ("train", recipe_file(), f"output={out}", "model.name=nobody/nothing"),
        ("compare", recipe_file(), f"output={out}", "--budget", "300"),
        ("report", tmp_path / "no-run", "-o", out),
        ("predict", tmp_path / "no-run", "--text", "a", "-o", out),
    ):
        refused = cli(*arguments)
        assert (refused.code, refused.out) == (2, ""), arguments
        assert refused.err == f"lorma: output='{out}': its directory cannot be written: '{tmp_path}/file' is a file\n"


@pytest.mark.slow
def test_outputs_in_a_read_only_directory(recipe_file, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    commands = (
        ("train", recipe_file(), f"output={locked / 'deep' / 'out'}"),
        ("compare", recipe_file(), f"output={locked / 'deep' / 'out'}"),
        ("report", tmp_path / "no-run", "-o", locked / "deep" / "out"),
        ("predict", tmp_path / "no-run", "--text", "a", "-o", locked / "out"),
    )
    for command, refused in zip(commands, cli_as_anybody(*commands), strict=True):
        assert (refused.code, refused.out, refused.err.count("\n")) == (2, "", 1), command
        assert refused.err.endswith("out': its directory cannot be written\n")


READERS = {"predict": ["--text", "a"], "evaluate": [], "doctor": [], "report": ["-o", "report"]}
LOCKED = {
    ".": ["predict", "evaluate", "doctor"],
    "adapter": ["predict", "evaluate", "doctor"],
    "adapter/adapter_config.json": ["predict", "evaluate", "doctor"],
    "adapter/adapter_model.safetensors": ["predict", "evaluate", "doctor"],
    "recipe.yaml": ["evaluate"],
    "summary.json": ["evaluate", "report"],
    "metrics.jsonl": ["report"],
}
"""What may not be read, and the commands that need it."""


@pytest.mark.slow
def test_what_may_not_be_read(run, tmp_path):
    commands, places = [], []
    for number, (name, readers) in enumerate(LOCKED.items()):
        copy = tmp_path / f"copy-{number}"
        shutil.copytree(run, copy)
        commands += [(reader, copy, *READERS[reader]) for reader in readers]
        places += [copy / name] * len(readers)
    modes = {path: path.stat().st_mode for path in places}
    for path in modes:
        path.chmod(0)
    results = cli_as_anybody(*commands)
    for path, mode in modes.items():
        path.chmod(mode)
    for path, command, refused in zip(places, commands, results, strict=True):
        assert (refused.code, refused.err.count("\n")) == (2, 1), (command, refused)
        assert str(path) in refused.err
        assert refused.err.endswith("cannot be read: permission denied\n")


def test_click_errors_keep_their_exit_code(cli):
    assert cli("train").code == 2
    assert cli("nonsense").code == 2
    assert cli("predict", "x", "--max-new-tokens", 0).code == 2
    assert cli("compare", "quickstart", "--seeds", "a,b").code == 2


COMMANDS = "train evaluate predict compare report methods merge export compose doctor".split()


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_explains_itself(command, cli):
    shown = cli(*command, "--help")
    assert shown.code == 0
    assert cli(*command, "-h") == shown
    assert "Usage: lorma" in shown.out
    assert len(shown.out) > 300


def test_commands_are_listed_as_they_are_used(cli):
    shown = cli("--help").out
    assert re.findall(r"^│ (\w+)  ", shown, re.MULTILINE) == COMMANDS


def test_version_and_methods(cli):
    assert cli("--version").out.startswith("lorma 0.")
    assert "lorma-permutation" in cli("methods").out


def test_debug_shows_the_traceback(recipe_file, cli, monkeypatch):
    from lorma.errors import InputError

    with pytest.raises(InputError, match="adapter.r=0"):
        cli("train", recipe_file(), "adapter.r=0", "--debug")


def test_a_base_in_pytorchs_format_is_refused_with_the_command_that_converts_it(recipe_file, tiny_bert, tmp_path, cli):
    import torch
    from transformers import AutoModelForSequenceClassification

    base = tmp_path / "a base's folder"
    shutil.copytree(tiny_bert, base)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=2)
    model.save_pretrained(base)
    adapter = tmp_path / "run" / "adapter"
    assert cli("train", recipe_file(model={"name": str(base)})).code == 0
    (base / "model.safetensors").unlink()
    torch.save(model.state_dict(), base / "pytorch_model.bin")
    shutil.rmtree(tmp_path / "again", ignore_errors=True)
    commands = [
        ["train", recipe_file(model={"name": str(base)}, output=str(tmp_path / "again"))],
        ["predict", adapter, "--text", "a film"],
        ["export", adapter, "-o", tmp_path / "lora"],
        ["merge", adapter, "-o", tmp_path / "merged"],
    ]
    hints = set()
    for command in commands:
        done = cli(*command)
        assert done.code == 2
        assert "has pytorch_model.bin and no safetensors; a pickle is never read here" in done.err
        assert done.err.count("\n") == 1
        hints.add(done.err.strip().partition("convert it: ")[2])
    (hint,) = hints
    python, *arguments = shlex.split(hint)
    assert python == "python"
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True, env=os.environ)
    assert load_file(base / "model.safetensors").keys() == model.state_dict().keys() - {
        "bert.embeddings.position_ids",
        "bert.embeddings.token_type_ids",
    }
    for command in commands:
        done = cli(*command)
        assert done.code == 0, done.err


@pytest.mark.parametrize("revision", [None, "v1"])
def test_how_a_hub_model_in_pytorchs_format_is_converted(revision, tmp_path, monkeypatch):
    """The hub's cache holds a ``.bin``; no network is asked."""
    from lorma.models.pickled import conversion_hint

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--model"
    for name, content in (("config.json", '{"architectures": ["BertModel"]}'), ("pytorch_model.bin", "")):
        path = repository / "snapshots" / "1" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    (repository / "refs").mkdir()
    (repository / "refs" / (revision or "main")).write_text("1")
    hint = conversion_hint("someone/model", revision)
    assert "BertModel.from_pretrained(" in hint
    assert ("revision=" in hint) is (revision is not None)
    assert hint.endswith("and name the folder model")
