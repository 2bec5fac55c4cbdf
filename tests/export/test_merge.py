"""Merged checkpoints: plain transformers models that answer as the adapted ones do."""

import copy
import json
import shutil
import signal
import time

import pytest
import torch
from export_cases import EXACT, assert_same, logits
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

from helpers_cli import cli_process, start_cli
from lorma import InputError, LormaConfig
from lorma.adapters.untrusted import TensorInfo
from lorma.export import Base
from lorma.export.merge import merge
from lorma.export.stream import write_safetensors

PERMUTATION = {"inflation": "permutation", "target_modules": ["query", "dense"]}
MORE = {
    "permutation": ("bert", lambda: LormaConfig(task_type="SEQ_CLS", **PERMUTATION)),
    "permutation-post": ("bert", lambda: LormaConfig(task_type="SEQ_CLS", side="post", **PERMUTATION)),
    "none": ("bert", lambda: LormaConfig(task_type="SEQ_CLS", inflation="none", target_modules=["query"])),
    "dora": ("llama", lambda: LormaConfig(use_dora=True, target_modules=["q_proj", "down_proj"])),
    "dora-post": ("gpt2", lambda: LormaConfig(use_dora=True, side="post", target_modules=["c_attn"])),
    "embedding-tied": ("llama", lambda: LormaConfig(r=4, target_modules=["embed_tokens", "o_proj"])),
    "head-whole": ("gpt2", lambda: LormaConfig(target_modules=["c_fc"], modules_to_save=["lm_head"])),
}
CASES = EXACT | MORE


def base_for(name, folder):
    auto = {"bert": "AutoModelForSequenceClassification", "vit": "AutoModelForImageClassification"}
    return Base(str(folder), auto_model=auto.get(name, "AutoModelForCausalLM"))


@pytest.mark.parametrize("case", CASES)
def test_the_merged_checkpoint_equals_the_adapted_model(case, exported_case, tmp_path):
    name, config = CASES[case]
    folder, model, batch, adapted, adapter = exported_case(name, config())
    done = merge(adapter, tmp_path / "merged", base_for(name, folder))
    assert done.difference is not None
    assert done.difference < 1e-5
    again, report = type(model).from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(report.values()), report
    assert_same(logits(again.eval(), batch), logits(adapted, batch), logits(model, batch))
    assert not list((tmp_path / "merged").glob("adapter*"))
    assert "adapter merged in" in (tmp_path / "merged" / "README.md").read_text()
    files = sorted(path.name for path in (tmp_path / "merged").glob("*.safetensors"))
    if name == "llama":
        index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
        assert sorted(set(index["weight_map"].values())) == files
        assert len(files) == len(list(folder.glob("*.safetensors"))) == done.shards
    else:
        assert files == ["model.safetensors"]
    untied = case in ("tied", "embedding-tied", "head-whole")
    assert getattr(again.config, "tie_word_embeddings", False) is (name != "vit" and not untied)


def test_stacked_experts(tmp_path):
    from export_cases import filled

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 40}
    config = MixtralConfig(
        **sizes, num_attention_heads=2, num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2
    )
    MixtralForCausalLM(config).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    adapted = filled(model, LormaConfig(r=2, target_modules=["q_proj"], target_parameters=targets))
    adapted.save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged", Base(str(tmp_path / "base"), auto_model="AutoModelForCausalLM"))
    batch = {"input_ids": torch.randint(3, 40, (2, 7))}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert_same(logits(again, batch), logits(adapted, batch), logits(model, batch))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_kept(dtype, bases, tmp_path):
    from export_cases import filled

    _, model, _ = bases["llama"]
    half = copy.deepcopy(model).to(dtype)
    half.save_pretrained(tmp_path / "base")
    filled(half, LormaConfig(target_modules=["q_proj", "up_proj"])).save_pretrained(tmp_path / "adapter")
    done = merge(tmp_path / "adapter", tmp_path / "merged", Base(str(tmp_path / "base")))
    assert {tensor.dtype for tensor in load_file(tmp_path / "merged" / "model.safetensors").values()} == {dtype}
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    assert 0 < done.difference < 5e-2


def test_what_is_not_finite_leaves_nothing(exported_case, tmp_path):
    folder, _, _, _, adapter = exported_case(*[f() if callable(f) else f for f in EXACT["pre"]])
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    next(tensor for name, tensor in tensors.items() if name.endswith("lorma_B"))[0, 0] = torch.nan
    save_file(tensors, path)
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        merge(adapter, tmp_path / "merged", base_for("bert", folder))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["adapter"]


def test_a_base_without_the_head_that_the_adapter_lacks(bases, tmp_path):
    from export_cases import filled

    folder, model, _ = bases["bert"]
    filled(model, LormaConfig(target_modules=["query"])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(InputError, match="neither the base model nor the adapter has a weight for classifier"):
        merge(tmp_path / "adapter", tmp_path / "merged", base_for("bert", folder))


def test_writing_tensor_by_tensor(tmp_path):
    tensors = {
        "a": torch.randn(3, 4).T,
        "b": torch.tensor(7),
        "c": torch.zeros(0, 3),
        "d": torch.ones(5, dtype=torch.bfloat16),
        "e": torch.tensor([True, False]),
    }
    infos = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    write_safetensors(tmp_path / "file", infos, iter(tensors.items()))
    again = load_file(tmp_path / "file")
    assert list(again) == list(tensors)
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
    for wrong in ({"a": tensors["a"].T}, {"b": tensors["b"]}, {}):
        with pytest.raises(ValueError, match="announced"):
            write_safetensors(tmp_path / "file", {"a": infos["a"]}, iter(wrong.items()))


def test_the_command(recipe_file, tmp_path, cli):
    assert cli("train", recipe_file()).code == 0
    merged = tmp_path / "merged"
    done = cli("merge", tmp_path / "run", "-o", merged)
    assert (done.code, done.err) == (0, "")
    assert "outputs on a prompt differ from the adapted model's by" in done.out
    assert AutoTokenizer.from_pretrained(merged)("the film")["input_ids"]
    texts = ("--text", "the film was great", "--text", "the plot is dull")
    assert cli("predict", merged, *texts).out == cli("predict", tmp_path / "run", *texts).out
    again = cli("merge", tmp_path / "run", "-o", merged)
    assert again.code == 2
    assert "--overwrite" in again.err
    assert cli("merge", tmp_path / "run", "-o", merged, "--overwrite", "--no-verify").code == 0
    (merged / "notes.md").write_text("mine")
    for output, name in ((merged, "notes.md"), (tmp_path / "run" / "adapter", "adapter_config.json")):
        done = cli("merge", tmp_path / "run", "-o", output, "--overwrite")
        assert done.code == 2
        assert f"holds other files than those of a model ('{name}')" in done.err
    assert (merged / "notes.md").read_text() == "mine"
    assert cli("merge", tmp_path / "nothing", "-o", tmp_path / "m").code == 2


@pytest.mark.parametrize("trained", [True, False], ids=["by-lorma", "by-peft"])
def test_a_base_that_is_not_there(trained, exported_case, tmp_path, cli):
    _, _, _, _, adapter = exported_case("llama", LormaConfig(target_modules=["q_proj"]))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/gone/base"}))
    if trained:
        data = {"task": "causal-lm", "format": "text", "text": "text", "labels": None, "max_length": 8}
        meta = {"model": {"name": "/gone/base"}, "data": data}
        (adapter / "lorma_task.json").write_text(json.dumps(meta))
    key = "model.name" if trained else "base_model_name_or_path"
    done = cli("merge", adapter, "-o", tmp_path / "merged")
    assert done.code == 2
    assert f"{adapter}: {key}='/gone/base' is neither an alias" in done.err
    assert "name the base model with --base" in done.err
    done = cli("merge", adapter, "-o", tmp_path / "merged", "--base", "/gone/other.gguf")
    assert (done.code, "--base='/gone/other.gguf' is neither an alias" in done.err) == (2, True)


@pytest.mark.slow
def test_a_kill_leaves_nothing_that_looks_finished(tmp_path):
    from export_cases import filled
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "vocab_size": 4000}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=8))
    model.save_pretrained(tmp_path / "base", max_shard_size="20MB")
    filled(model, LormaConfig(target_modules="all-linear")).save_pretrained(tmp_path / "adapter")
    merged = tmp_path / "merged"
    arguments = ("merge", tmp_path / "adapter", "-o", merged, "--base", tmp_path / "base")
    killed = 0
    for shards in (1, 3, 6):
        process = start_cli(*arguments)
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if len(list(tmp_path.glob(".merged.*.tmp/new/*.safetensors"))) >= shards:
                break
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
        assert not merged.exists()
        for left in tmp_path.glob(".merged.*.tmp"):
            shutil.rmtree(left)
    assert killed == 3
    done = cli_process(*arguments)
    assert done.code == 0, done.err
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["adapter", "base", "merged"]
    assert len(AutoModelForCausalLM.from_pretrained(merged).model.layers) == 8
    assert isinstance(model, nn.Module)
