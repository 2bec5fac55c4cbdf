"""Run directories and adapters of version 0.1 before its code moved: they load, evaluate, resume, merge and export.

``data/earlier_runs.tar.gz`` was written by commit de3908c: a tiny base model, sixty rows, a finished run of eleven
methods and an unfinished one of four, killed after step 8 of 12; ``expected.json`` says what that commit made of each.
"""

import json
import tarfile
from pathlib import Path

import pytest
from safetensors.torch import load_file

from lorma.export import Base, export_lora
from lorma.export.merge import merge
from lorma.runs.directory import RunDirectory
from lorma.runs.recipe import load_recipe
from lorma.training.inference import evaluate, load_predictor
from lorma.training.run import train

# PEFT tells AdaLoRA's final ranks by names that it does not look for when a model is wrapped.
pytestmark = pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning")

ARCHIVE = Path(__file__).parent / "data" / "earlier_runs.tar.gz"
METHODS = """lora lorma-plus lorma-plus-post lorma-permutation dorma tlora adalora svft-plain adapter-pfeiffer full
    bitfit""".split()
UNFINISHED = ["lorma-plus", "lorma-permutation", "tlora", "adalora"]
MERGES = ["lorma-plus", "lorma-plus-post", "lorma-permutation", "dorma", "tlora", "svft-plain"]
EXPORTS = ["lorma-plus", "lorma-plus-post", "tlora"]


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("earlier")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    for file in folder.rglob("*"):
        if file.suffix in (".json", ".yaml") and "@FOLDER@" in (text := file.read_text(encoding="utf-8")):
            file.write_text(text.replace("@FOLDER@", str(folder)), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def expected(earlier):
    return json.loads((earlier / "expected.json").read_text())


def scores(folder, expected):
    return [row["score"] for row in load_predictor(folder).predict([{"text": text} for text in expected["texts"]])]


@pytest.mark.parametrize("method", METHODS)
def test_a_finished_run_answers_and_evaluates_as_before(method, earlier, expected):
    before = expected["runs"][method]
    assert scores(earlier / method, expected) == pytest.approx([row["score"] for row in before["answers"]], abs=1e-6)
    measured = evaluate(RunDirectory(earlier / method))
    assert measured == pytest.approx(before["final_metrics"], abs=1e-6)


@pytest.mark.parametrize("method", UNFINISHED)
def test_an_unfinished_run_goes_on_to_the_same_end(method, earlier, expected):
    output = earlier / f"{method}-unfinished"
    recipe = load_recipe(earlier / "recipe.yaml", [f"method={method}", f"output={output}"])
    assert RunDirectory(output).last_step() == 8
    train(recipe)
    summary, before = json.loads((output / "summary.json").read_text()), expected["runs"][method]
    assert summary["final_train_loss"] == pytest.approx(before["final_train_loss"], abs=1e-6)
    assert summary["train_loss_auc"] == pytest.approx(before["train_loss_auc"], abs=1e-5)
    assert scores(output, expected) == pytest.approx([row["score"] for row in before["answers"]], abs=1e-6)
    assert set(load_file(output / "adapter" / "adapter_model.safetensors")) >= {
        name for name in load_file(earlier / method / "adapter" / "adapter_model.safetensors") if "classifier" in name
    }


def base_of(earlier):
    labels = {"num_labels": 2, "id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
    return Base(str(earlier / "base"), auto_model="AutoModelForSequenceClassification", model_kwargs=labels)


@pytest.mark.parametrize("method", MERGES)
def test_an_adapter_merges_as_before(method, earlier, expected, tmp_path):
    merge(earlier / method / "adapter", tmp_path / "merged", base_of(earlier))
    before = [row["score"] for row in expected["runs"][method]["answers"]]
    assert scores(tmp_path / "merged", expected) == pytest.approx(before, abs=1e-5)


@pytest.mark.parametrize("method", EXPORTS)
def test_an_adapter_exports_as_before(method, earlier, expected, tmp_path):
    export_lora(earlier / method / "adapter", tmp_path / "lora", base=base_of(earlier))
    before = [row["score"] for row in expected["runs"][method]["answers"]]
    assert scores(tmp_path / "lora", expected) == pytest.approx(before, abs=1e-5)
