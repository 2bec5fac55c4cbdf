"""One budget of parameters for all methods, and what a comparison gives each of them."""

import json
import re

import pytest
import torch
from rich.console import Console

from lorma.errors import InputError
from lorma.experiments.budget import TOLERANCE, Counter, parse_budget
from lorma.experiments.compare import possible_methods
from lorma.methods import all_methods, get_method, method_names
from lorma.models.load import attach, count_parameters
from lorma.runs.recipe import load_recipe

# OFT's blocks become the nearest size that divides the width, which PEFT remarks on.
pytestmark = pytest.mark.filterwarnings("ignore:Invalid `oft_block_size`")

BUDGET = 3000


@pytest.mark.parametrize(
    ("text", "count"),
    [("0.3M", 300_000), ("300k", 300_000), ("300000", 300_000), (" .5m", 500_000), ("1B", 10**9), ("1.5K", 1500)],
)
def test_budgets_as_people_write_them(text, count):
    assert parse_budget(text) == count


@pytest.mark.parametrize("text", ["", "many", "-3k", "0", "0.1", "1e6", "3 kk", "3kM", "nan", "٣k", "9" * 400])
def test_wrong_budgets(text, recipe_file, cli):
    with pytest.raises(InputError, match="must be a number of parameters above 0, such as 0.3M, 300k or 300000"):
        parse_budget(text)
    assert cli("compare", recipe_file(), f"--budget={text}").code == 2


@pytest.mark.parametrize("method", all_methods(), ids=lambda method: method.name)
def test_the_choice_is_the_best_there_is(method, recipe_file):
    recipe = load_recipe(recipe_file())
    counter = Counter(recipe)
    choice = counter.choose(method, BUDGET)
    assert choice.parameters == counter.count(method, choice.r)
    if not choice.fits:
        assert choice.r == recipe.adapter.r
    if method.knob is None:
        assert choice.r == recipe.adapter.r
        return
    counts = {r: counter.count(method, r) for r in range(1, 33)}
    best = min(abs(count - BUDGET) for count in counts.values())
    assert choice.fits == (best <= TOLERANCE * BUDGET)
    if choice.fits:
        assert abs(choice.parameters - BUDGET) == best


@pytest.mark.parametrize("name", ["full", "bitfit", "lora-fa", "adalora", "vera", "oft", "svft-random", "dorma"])
def test_counts_without_weights_are_those_of_a_run(name, tiny_bert, recipe_file):
    from transformers import AutoModelForSequenceClassification

    recipe = load_recipe(recipe_file())
    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert, dtype=torch.float32)
    real = count_parameters(attach(model, get_method(name), recipe.adapter, "SEQ_CLS"), recipe.adapter, "SEQ_CLS")
    assert Counter(recipe).count(get_method(name), recipe.adapter.r) == real["adapter_parameters"]


@pytest.mark.slow
def test_a_comparison_at_a_budget(recipe_file, tmp_path, cli, read_json):
    compare = {"methods": ["lora", "svft-plain", "adapter-pfeiffer"], "learning_rates": {"svft-plain": 0.1}}
    train = {"max_steps": 2, "batch_size": 4, "learning_rate": 0.01}
    recipe = recipe_file(compare=compare, adapter={"r": 2, "target_modules": ["query", "value"]}, train=train)
    done = cli("compare", recipe, "--budget", "3k", f"output={tmp_path / 'all'}")
    assert done.code == 0, done.err
    assert "Budget: 3,000 adapter parameters" in done.out
    assert re.search(r"lora: r = 12, 3,072$", done.out, re.MULTILINE)
    assert re.search(r"svft-plain: 128; there is no r to choose, trained as it is$", done.out, re.MULTILINE)
    table = read_json(tmp_path / "all" / "report" / "table.json")
    rows = {row["method"]: row for row in table["rows"]}
    assert [row["r"] for row in rows.values()] == [12, None, 23]
    assert [row["learning_rate"] for row in rows.values()] == [0.01, 0.1, 0.01]
    assert {row["head_parameters"] for row in rows.values()} == {66}
    header = (tmp_path / "all" / "report" / "table.md").read_text().splitlines()[0]
    assert "Seeds,r,Learning rate,Adapter,Head" in ",".join(cell.strip() for cell in header.split("|"))
    config = json.loads((tmp_path / "all" / "adapter-pfeiffer-seed0" / "adapter" / "adapter_config.json").read_text())
    assert "output" in config["target_modules"], "bottlenecks keep their own places"
    again = cli("compare", recipe, "--budget", "3k", f"output={tmp_path / 'all'}")
    assert again.out.count("done before") == 3
    other = cli("compare", recipe, f"output={tmp_path / 'all'}")
    assert other.code == 2
    assert "was trained with another adapter.r" in other.err


def test_all_methods_are_those_that_are_possible(tiny_llama, recipe_file, capsys):
    data, model = {"train": "text.jsonl", "max_length": 16}, {"name": str(tiny_llama)}
    recipe = load_recipe(recipe_file(task="causal-lm", model=model, data=data))
    console = Console(width=200)
    assert set(method_names()) - set(possible_methods(recipe, console)) == {"bitfit"}
    said = capsys.readouterr().out
    assert "bitfit is left out: method='bitfit' is not possible: LlamaForCausalLM has no biases" in said
    quantized = recipe.model_copy(update={"model": recipe.model.model_copy(update={"quantization": "nf4"})})
    assert set(method_names()) - set(possible_methods(quantized, console)) == {"bitfit", "full"}


def test_learning_rates_of_unknown_methods(recipe_file):
    with pytest.raises(InputError, match="method='lroa' is unknown"):
        load_recipe(recipe_file(compare={"learning_rates": {"lroa": 0.1}}))
    with pytest.raises(InputError, match="compare.learning_rates.lora=0.0: Input should be greater than 0"):
        load_recipe(recipe_file(compare={"learning_rates": {"lora": 0.0}}))
