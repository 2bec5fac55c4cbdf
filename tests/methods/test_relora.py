"""ReLoRA and ReLoRMA: cycles that add up, kept as a chain or merged."""

import json

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file

from helpers_cli import start_cli
from lorma import LormaConfig
from lorma.errors import InputError
from lorma.methods import get_method
from lorma.runs.directory import RunDirectory
from lorma.runs.recipe import load_recipe
from lorma.training.inference import load_predictor
from lorma.training.run import train
from lorma.tuners.surgery import extend_chain, restart

ROWS = [{"text": "the movie was great"}, {"text": "the plot was dull and slow"}]
SETTINGS = [
    "train.max_steps=12",
    "train.save_steps=2",
    "train.eval_steps=12",
    "train.learning_rate=0.05",
    "adapter.r=2",
]


def trained(recipe_file, tmp_path, name, method, *more):
    recipe = load_recipe(recipe_file(), [*SETTINGS, f"method={json.dumps(method)}", f"output={tmp_path / name}", *more])
    return train(recipe)


def scores(run):
    return [answer["score"] for answer in load_predictor(run.path).predict(ROWS)]


def update(run, layer=0):
    """ΔW of the query weight of one layer, by what the saved adapter does to the base weight."""
    folder = run.path / "adapter"
    config = json.loads((folder / "adapter_config.json").read_text())
    state = load_file(folder / "adapter_model.safetensors")
    part = "lora" if config["peft_type"] == "LORA" else "lorma"
    key = f"base_model.model.bert.encoder.layer.{layer}.attention.self.query.{part}_"
    A, B = (state[next(name for name in state if name.startswith(f"{key}{f}"))].double() for f in "AB")
    alpha = config["lora_alpha"] if part == "lora" else config["lorma_alpha"]
    return config["r"], alpha / config["r"] * B @ A


@pytest.mark.parametrize("name", ["relorma", "relora"])
def test_chain_and_merged_are_the_same(name, recipe_file, tmp_path):
    chain = trained(recipe_file, tmp_path, "chain", {"name": name, "every": 4})
    merged = trained(recipe_file, tmp_path, "merged", {"name": name, "every": 4, "keep": "merged"})
    assert scores(chain) == pytest.approx(scores(merged), abs=1e-5)
    losses = [[entry["loss"] for entry in run.metrics() if "loss" in entry] for run in (chain, merged)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert (merged.path / "model").is_dir()
    assert not (merged.path / "adapter").exists()


@pytest.mark.parametrize("name", ["relorma", "relora"])
@pytest.mark.parametrize(("every", "cycles"), [(12, 1), (6, 2), (3, 4)])
def test_rank_of_the_update(name, every, cycles, recipe_file, tmp_path):
    run = trained(recipe_file, tmp_path, "run", {"name": name, "every": every})
    r, delta = update(run)
    assert r == 2 * cycles
    assert torch.linalg.matrix_rank(delta, rtol=1e-5) == 2 * cycles


def test_short_cycles_train_too(recipe_file, tmp_path):
    run = trained(recipe_file, tmp_path, "run", {"name": "relorma", "every": 1})
    r, delta = update(run)
    assert r == 24
    assert torch.linalg.matrix_rank(delta, rtol=1e-5) > 2


def test_finished_cycles_are_not_dropped():
    model = get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(6, 5)), LormaConfig(target_modules=["0"], lorma_dropout=0.5)
    )
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    x = torch.randn(3, 6)
    expected = model.eval()(x)
    extend_chain(model)
    restart(model, seed=1)
    model.train()
    assert torch.allclose(model(x), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["relorma", "relora"])
def test_the_first_cycle_trains(name, recipe_file, tmp_path):
    run = trained(recipe_file, tmp_path, "run", {"name": name, "every": 12})
    assert update(run)[1].norm() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("keep", ["chain", "merged"])
def test_a_run_killed_in_its_second_cycle_ends_the_same(keep, recipe_file, tmp_path):
    method = {"name": "relorma", "every": 4, "keep": keep}
    whole = trained(recipe_file, tmp_path, "whole", method)
    overrides = [*SETTINGS, f"method={json.dumps(method)}", f"output={tmp_path / 'killed'}"]
    run = RunDirectory(tmp_path / "killed")
    process = start_cli("train", tmp_path / "recipe.yaml", *overrides)
    while run.last_step() < 6 and process.poll() is None:
        pass
    process.kill()
    process.communicate()
    assert 6 <= run.last_step() < 12 or run.finished
    if not run.finished:
        train(load_recipe(tmp_path / "recipe.yaml", overrides))
    folder = "adapter/adapter_model.safetensors" if keep == "chain" else "model/model.safetensors"
    one, other = load_file(whole.path / folder), load_file(run.path / folder)
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert torch.allclose(tensor, other[key], atol=1e-6), key


def test_options_of_a_recipe(recipe_file):
    file = recipe_file()
    recipe = load_recipe(file, ["method={name: relorma, every: 7}"])
    assert (recipe.method_name, recipe.method_options.every, recipe.method_options.keep) == ("relorma", 7, "chain")
    assert load_recipe(file, ["method=relorma", "method.every=7"]) == recipe
    assert load_recipe(file, ["method.every=7", "method=relorma"]) == recipe
    assert load_recipe(file, ["method={name: lorma-plus}"]).method == "lorma-plus"
    for override, message in [
        ("method={name: relorma, evry: 7}", "method.evry: method 'relorma' has no such option; .*did you mean 'every'"),
        ("method={name: relorma, every: 0}", "method.every=0: "),
        ("method={name: relorma, inflation: permutation}", "method: keep=chain needs inflation=plus"),
        ("method={name: lorma-plus, every: 7}", "method.every: method 'lorma-plus' has no such option; it has none"),
        ("method.every=7", "method.every: method 'lorma-plus' has no such option"),
        ("method={name: 5}", "method={'name': 5}: allowed are a name, or a name and the method's options"),
        ("method={name: relroma}", "method='relroma' is unknown; .*did you mean 'relorma'"),
    ]:
        with pytest.raises(InputError, match=message):
            load_recipe(file, [override])


def test_a_merged_cycle_needs_full_precision(recipe_file, tmp_path):
    with pytest.raises(InputError, match="method.keep='merged' needs weights in float32"):
        trained(recipe_file, tmp_path, "run", {"name": "relorma", "keep": "merged"}, "model.dtype=bfloat16")


def test_what_a_method_says_of_itself():
    assert set(get_method("relorma").options.model_fields) == {"every", "keep", "prune", "warmup", "inflation"}


@pytest.mark.slow
def test_on_a_base_of_four_bits(tiny_llama, recipe_file, tmp_path):
    pytest.importorskip("bitsandbytes")
    rows = tmp_path / "sums.jsonl"
    rows.write_text("".join(json.dumps({"q": f"what is {a} plus 1 ?", "a": str(a + 1)}) + "\n" for a in range(1, 9)))
    sections = {
        "task": "causal-lm",
        "model": {"name": str(tiny_llama), "quantization": "nf4"},
        "data": {"train": str(rows), "prompt": "q", "completion": "a", "max_length": 32},
        "adapter": {"r": 2, "target_modules": ["q_proj", "v_proj"]},
    }
    recipe = load_recipe(
        recipe_file(**sections),
        ["method={name: relorma, every: 2}", "train.max_steps=6", "train.batch_size=2", f"output={tmp_path / 'nf4'}"],
    )
    run = train(recipe)
    config = json.loads((run.adapter / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"]) == ("LORMA", 6)
    answers = load_predictor(run.path).predict([{"q": "what is 3 plus 1 ?"}], 4)
    assert isinstance(answers[0]["completion"], str)
