"""The Python of the manual's pages is run, from top to bottom, on tiny models."""

import json
import re
import shutil
import subprocess
import sys

import pytest

from helpers_docs import ROOT, blocks, page, run_python
from lorma.yaml_text import dump_yaml

PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))
ADAPTERS = """
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM
from lorma import LormaConfig
for seed, name in enumerate(["my-adapter", "my-second-adapter"]):
    torch.manual_seed(seed)
    config = LormaConfig(r=4, target_modules=["q_proj", "v_proj"], init_weights=False, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained("my-model"), config).save_pretrained(name)
"""
ON_BASE = """
import lorma
from peft import PeftModel
from transformers import AutoModelForCausalLM
PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("my-model"), {adapter!r})
"""


@pytest.fixture
def workplace(tiny_llama, tmp_path):
    """A folder with what the pages name: a model and conversations."""
    shutil.copytree(tiny_llama, tmp_path / "my-model")
    turns = [
        [{"role": "user", "content": f"what is {i} plus 1 ?"}, {"role": "assistant", "content": f"{i + 1} ."}]
        for i in range(1, 9)
    ]
    lines = [json.dumps({"messages": messages}) for messages in turns]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines))
    return tmp_path


@pytest.mark.slow
def test_from_peft(workplace):
    pytest.importorskip("trl")
    done = run_python("\n".join(blocks(page("docs/from_peft.md"), "python")), workplace)
    assert done.returncode == 0, done.stderr
    for folder in ("my-adapter", "transformers-adapter", "sft-adapter"):
        assert (workplace / folder / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_serving(workplace, cli, monkeypatch):
    monkeypatch.chdir(workplace)
    text = page("docs/serving.md")
    made = run_python(ADAPTERS, workplace)
    assert made.returncode == 0, made.stderr
    commands = [line for block in blocks(text, "") for line in block.splitlines()]
    assert len(commands) == 3
    for command in commands:
        if "gguf" in command:
            pytest.importorskip("gguf")
        name, *arguments = command.split()
        assert name == "lorma"
        done = cli(*arguments)
        assert done.code == 0, done.err
    done = run_python("\n".join(blocks(text, "python")), workplace)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_accelerate_takes_the_page_s_configuration(workplace):
    """Of two CPU processes Accelerate makes DDP, whatever the file says; FSDP2 itself is in test_distributed.py."""
    text = page("docs/many_gpus.md")
    (workplace / "fsdp2.yaml").write_text(blocks(text, "yaml")[0] + "use_cpu: true\n")
    recipe = {
        "task": "causal-lm",
        "model": {"name": "my-model"},
        "data": {"train": "chats.jsonl", "messages": "messages", "max_length": 32, "eval_fraction": 0.25},
        "adapter": {"r": 2, "target_modules": ["q_proj"]},
        "train": {"max_steps": 2, "batch_size": 2},
        "output": "run",
    }
    (workplace / "chats.yaml").write_text(dump_yaml(recipe))
    (command,) = [line for block in blocks(text, "") for line in block.splitlines() if "fsdp2.yaml" in line]
    program, *arguments = command.split()
    assert program == "accelerate"
    code = f"import sys; sys.argv[1:] = {arguments[1:]!r}; from accelerate.commands.launch import main; main()"
    done = run_python(code, workplace)
    assert done.returncode == 0, done.stderr
    assert "2 processes" in (workplace / "run" / "summary.json").read_text()
    loaded = run_python(ON_BASE.format(adapter="run/adapter"), workplace)
    assert loaded.returncode == 0, loaded.stderr


@pytest.mark.slow
def test_the_page_of_speeds_says_what_its_results_say(tmp_path):
    shutil.copytree(ROOT / "docs" / "results", tmp_path / "results")
    folders = ["--results", str(tmp_path / "results" / "speed"), "--figures", str(tmp_path / "figures")]
    command = [sys.executable, "-m", "benchmarks.page", *folders, "-o", str(tmp_path / "speed.md")]
    subprocess.run(command, cwd=ROOT, check=True, timeout=600)
    assert (tmp_path / "speed.md").read_text(encoding="utf-8") == page("docs/speed.md")


@pytest.mark.parametrize("name", PAGES)
def test_linked_files_exist(name):
    for target in re.findall(r"\]\(([^)#]+)", page(name)):
        assert target.startswith("https://") or ((ROOT / name).parent / target).exists(), target
