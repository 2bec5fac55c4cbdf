"""Every method of the registry: what it trains, what it saves, how it goes on; methods of other packages."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.text import Text
from safetensors.torch import load_file

from helpers_docs import blocks, page
from lorma.errors import InputError
from lorma.methods import Method, all_methods, base, get_method, method_names, register_method
from lorma.models.load import attach, count_parameters
from lorma.runs.recipe import load_recipe
from lorma.schema import AdapterSpec, TrainSpec
from lorma.training.run import train

# PEFT takes a layer that AdaLoRA has left without a rank for a sign of ZeRO-3.
pytestmark = pytest.mark.filterwarnings("ignore:Adapter 'default'.* LoRA tensor.* have invalid shape")

ROOT = Path(__file__).parents[2]
OWN = ["lora_", "lorma_", "tlora_", "vera_lambda_", "hira_", "oft_R", "svft_M", "bottleneck_"]
WHOLE = ["full", "bitfit"]


def tiny(folder):
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(folder).train()


def optimizer(method, model):
    spec = TrainSpec(learning_rate=0.01)
    if method.optimizer is not None:
        return method.optimizer(model, spec)
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=spec.learning_rate)


@pytest.mark.parametrize("name", method_names())
def test_a_step_changes_what_the_method_trains_and_nothing_else(name, tiny_bert):
    method, adapter = get_method(name), AdapterSpec(r=2)
    model = attach(tiny(tiny_bert), method, adapter, "SEQ_CLS")
    counts = count_parameters(model, adapter, "SEQ_CLS")
    before = {path: tensor.clone() for path, tensor in model.state_dict().items()}
    trained = {path for path, parameter in model.named_parameters() if parameter.requires_grad}
    own = {path for path in trained if "classifier" not in path}
    assert counts["head_parameters"] == 2 * 32 + 2
    assert counts["adapter_parameters"] == sum(before[path].numel() for path in own) > 0
    if name == "bitfit":
        assert all(path.endswith(".bias") for path in own)
    elif name != "full":
        assert all(any(f".{part}" in path for part in OWN) for path in own)
        assert not any("lora_A" in path for path in own) or name != "lora-fa"

    steps = optimizer(method, model)
    for _ in range(2):
        steps.zero_grad()
        batch = torch.randint(0, 40, (4, 7))
        model(input_ids=batch, labels=torch.tensor([0, 1, 1, 0])).loss.backward()
        steps.step()
    changed = {path for path, tensor in model.state_dict().items() if not tensor.equal(before[path])}
    assert changed <= trained
    untouched = {path for path in trained - changed if "token_type" not in path and "position" not in path}
    assert len(untouched) <= (0 if name != "full" else 2), untouched


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_bert):
    """Two steps with every method, once for this module."""
    folder = tmp_path_factory.mktemp("methods")
    words = ["film", "plot", "cast", "movie"]
    rows = [f"the {word} was {verdict},{verdict}" for word in words * 3 for verdict in ("good", "bad")]
    (folder / "rows.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    recipe = {
        "task": "classification",
        "model": {"name": str(tiny_bert)},
        "data": {"train": str(folder / "rows.csv"), "max_length": 16},
        "adapter": {"r": 2},
        "train": {"max_steps": 2, "batch_size": 4, "learning_rate": 0.05},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    for name in method_names():
        train(load_recipe(folder / "recipe.yaml", [f"method={name}", f"output={folder / name}"]))
    return folder


AGAIN = """
import json, sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
from lorma.training.inference import evaluate
from lorma.runs.directory import RunDirectory
found = {name: evaluate(RunDirectory(Path(sys.argv[1], name))) for name in sys.argv[2:]}
print("RESULT" + json.dumps(found))
"""


@pytest.mark.slow
def test_a_new_process_gets_the_same_predictions(runs):
    command = [sys.executable, "-c", AGAIN, str(runs), *method_names()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.partition("RESULT")[2])
    for name, metrics in found.items():
        expected = json.loads((runs / name / "summary.json").read_text())["final_metrics"]
        assert metrics["loss"] == pytest.approx(expected["loss"], abs=1e-6), name
        assert metrics["accuracy"] == expected["accuracy"], name


@pytest.mark.slow
def test_summaries_count_the_head_apart_and_name_the_settings(runs):
    for method in all_methods():
        summary = json.loads((runs / method.name / "summary.json").read_text())
        assert summary["head_parameters"] == 66
        assert summary["adapter_parameters"] == summary["trainable_parameters"] - 66 > 0
        assert summary["r"] == (2 if method.knob else None)
        assert summary["learning_rate"] == 0.05
        assert (runs / method.name / ("model" if method.name in WHOLE else "adapter")).is_dir()


def losses(run):
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [entry["loss"] for entry in entries if "loss" in entry]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adalora", "lora-fa", "bitfit", "vera", "svft-random", "adapter-houlsby"])
def test_an_interrupted_run_ends_as_an_undisturbed_one(name, recipe_file, tmp_path, monkeypatch):
    monkeypatch.setattr("lorma.training.run.KEPT_CHECKPOINTS", 9)
    steps = {"max_steps": 12, "save_steps": 4, "batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": 0.02}
    file = recipe_file(method=name, adapter={"r": 2, "dropout": 0.2}, train=steps)
    undisturbed = train(load_recipe(file)).path
    for stopped in (4, 8):
        run = tmp_path / f"stopped-{stopped}"
        shutil.copytree(undisturbed, run)
        (run / "summary.json").unlink()
        for folder in (*run.glob("adapter"), *run.glob("model"), *run.glob("checkpoints/checkpoint-*")):
            if folder.name in ("adapter", "model") or int(folder.name.partition("-")[2]) > stopped:
                shutil.rmtree(folder)
        train(load_recipe(file, [f"output={run}"]))
        weights = next(undisturbed.glob("*/*model.safetensors")).relative_to(undisturbed)
        expected, found = load_file(undisturbed / weights), load_file(run / weights)
        assert found.keys() == expected.keys()
        for path, tensor in found.items():
            torch.testing.assert_close(tensor, expected[path], rtol=0, atol=1e-6)
        assert losses(run) == pytest.approx(losses(undisturbed), abs=1e-5)


def test_adalora_ends_with_the_ranks_it_was_given(recipe_file):
    run = train(load_recipe(recipe_file(method="adalora", train={"max_steps": 12, "batch_size": 8}))).path
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert (config["init_r"], config["target_r"], config["tinit"], config["tfinal"]) == (3, 2, 1, 6)
    assert sum(map(sum, config["rank_pattern"].values())) == 2 * len(config["rank_pattern"]) == 8
    # The loss is the task's: PEFT's penalty would add about 0.8 to it.
    assert losses(run)[0] == pytest.approx(0.69, abs=0.1)


def test_bitfit_needs_biases(tiny_llama, recipe_file, cli, tmp_path):
    (tmp_path / "text.jsonl").write_text('{"text": "the film was good"}\n' * 8)
    data, model = {"train": str(tmp_path / "text.jsonl"), "max_length": 16}, {"name": str(tiny_llama)}
    refused = cli("train", recipe_file(method="bitfit", task="causal-lm", data=data, model=model))
    assert refused.code == 2
    assert "method='bitfit' is not possible: LlamaForCausalLM has no biases to train" in refused.err


@pytest.mark.parametrize("name", ["full", "bitfit", "lora", "adapter-pfeiffer"])
def test_modules_to_save_count_as_heads(name, tiny_bert):
    adapter = AdapterSpec(r=2, modules_to_save=["pooler.dense"])
    model = attach(tiny(tiny_bert), get_method(name), adapter, "SEQ_CLS")
    assert count_parameters(model, adapter, "SEQ_CLS")["head_parameters"] == 66 + 32 * 32 + 32


def test_methods_adapt_the_same_modules_where_the_recipe_names_none(tiny_bert):
    for method in all_methods():
        if method.build is None or method.own_targets:
            continue
        adapted = attach(tiny(tiny_bert), method, AdapterSpec(r=2), "SEQ_CLS")
        assert adapted.peft_config["default"].target_modules == {"query", "value"}, method.name


def test_the_list_of_methods(cli):
    listed = cli("methods").out
    for method in all_methods():
        assert method.name in listed
        assert method.source.split(",")[0] in listed
    lines = listed.splitlines()
    assert [line.split("\t")[0] for line in lines] == ["method", *method_names()]
    assert {line.count("\t") for line in lines} == {4}


def test_the_list_of_methods_on_a_narrow_terminal(cli, monkeypatch):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "80")
    shown = [Text.from_ansi(line).plain for line in cli("methods").out.splitlines()]
    assert max(map(len, shown)) <= 80
    assert not [line for line in shown if "…" in line]
    assert set(method_names()) <= {line.split()[0] for line in shown if line.strip()}
    for method in all_methods():
        start = shown.index(method.name)
        values = (method.equation, method.parameters, method.knob or "—", method.source)
        for line, value in zip(shown[start + 1 : start + 5], values, strict=True):
            assert line.startswith("  ")
            assert line.rstrip().endswith(value)


def test_the_list_of_methods_on_a_wide_terminal(cli, monkeypatch):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "200")
    shown = [Text.from_ansi(line).plain for line in cli("methods").out.splitlines()]
    assert len(shown) == 1 + len(method_names())
    for line, method in zip(shown[1:], all_methods(), strict=True):
        assert method.equation in line
        assert method.source in line


@pytest.fixture
def forget():
    """Takes methods out again that a test has entered."""
    names = dict(base._METHODS)
    yield
    base._METHODS.clear()
    base._METHODS.update(names)


def build(adapter, task_type):
    raise AssertionError("never called")


def test_a_name_is_given_once(forget):
    enter = register_method("mine", equation="W0", parameters="0", source="—")
    enter(build)
    assert isinstance(get_method("mine"), Method)
    enter(build)
    with pytest.raises(ValueError, match="the method 'mine' is registered already"):
        enter(lambda adapter, task_type: None)
    with pytest.raises(ValueError, match="the method 'lora' is registered already"):
        register_method("lora", equation="W0", parameters="0", source="—")(build)
    with pytest.raises(TypeError, match="optimiser"):
        register_method("other", equation="W0", parameters="0", source="—", optimiser=None)(build)


@pytest.fixture
def installed(tmp_path, monkeypatch, forget):
    """Installs a distribution of one module with one entry point."""

    def install(name, code, module="my_method"):
        site = tmp_path / f"site-{module}"
        info = site / f"{module}-1.0.dist-info"
        info.mkdir(parents=True)
        (site / f"{module}.py").write_text(code)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[lorma.methods]\n{name} = {module}\n")
        monkeypatch.syspath_prepend(str(site))
        monkeypatch.delitem(sys.modules, module, raising=False)

    return install


def documented():
    """The method that the manual adds: its module, and its entry point."""
    text = page("docs/methods.md")
    (code,) = blocks(text, "python")
    (entry,) = re.findall(r'^\[project\.entry-points\."lorma\.methods"\]\n(\S+) = "(\S+)"$', text, re.MULTILINE)
    return code, entry


def test_the_documented_method_trains(installed, recipe_file, cli, tmp_path, read_json):
    code, (name, module) = documented()
    assert len(code.splitlines()) <= 15
    installed(name, code, module)
    assert name in cli("methods").out
    trained = cli("train", recipe_file(method=name))
    assert trained.code == 0, trained.err
    summary = read_json(tmp_path / "run" / "summary.json")
    assert (summary["method"], summary["adapter_parameters"]) == (name, 4 * 2 * 2 * 32)
    assert cli("predict", tmp_path / "run", "--text", "the film was good").code == 0


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import nothing_like_it", "method='broken' of broken_method (broken_method) cannot be loaded: ModuleNotFound"),
        ("x = 1", "method='broken' of broken_method: loading broken_method registered no method of this name"),
    ],
)
def test_a_broken_plugin_is_named(code, message, installed, recipe_file, cli):
    installed("broken", code, "broken_method")
    for command in (("methods",), ("train", recipe_file(method="broken"))):
        refused = cli(*command)
        assert refused.code == 2
        assert message in refused.err
    with pytest.raises(InputError, match="method='brokn' is unknown; allowed: .*broken; did you mean 'broken'"):
        get_method("brokn")
    assert get_method("lora").name == "lora"
