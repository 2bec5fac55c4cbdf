"""What ``lorma doctor`` finds out about an adapter without its base model."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch
from helpers import adapted
from peft import LoraConfig, get_peft_model
from rich.text import Text
from safetensors.torch import load_file, save_file

from lorma import LormaConfig, TLoraConfig
from lorma.export.doctor import WIDEST, environment, examine
from tuners.conftest import Mlp


@pytest.fixture
def mlp():
    torch.manual_seed(0)
    return Mlp()


def test_the_environment_names_versions_and_devices():
    found = environment()
    assert {"lorma", "python", "torch", "transformers", "peft", "accelerate", "cpu", "quantised bases"} <= set(found)
    assert found["torch"] == torch.__version__
    assert "missing" not in found.values()


@pytest.mark.parametrize(
    ("config", "method", "lora"),
    [
        ({}, "LoRMA, inflation=plus, side=pre", "yes, exactly"),
        ({"side": "post"}, "LoRMA, inflation=plus, side=post", "yes, exactly"),
        ({"use_dora": True}, "LoRMA, inflation=plus, side=pre with DoRA (DoRMA)", "no: use_dora rescales"),
        ({"inflation": "permutation"}, "LoRMA, inflation=permutation, side=pre", "no: with inflation='permutation'"),
        ({"inflation": "none"}, "LoRMA, inflation=none, side=pre", "no: with inflation='none'"),
    ],
)
def test_healthy_adapters(config, method, lora, mlp, tmp_path):
    model = adapted(mlp, r=2, rank_pattern={"conv": 3}, modules_to_save=["head"], **config)
    model.save_pretrained(tmp_path)
    health = examine(tmp_path)
    assert (health.method, health.faults) == (method, [])
    assert health.lora.startswith(lora)
    assert [(layer.name, layer.rank) for layer in health.layers] == [("conv", 3), ("gate", 2), ("up", 2)]
    assert {layer.dtype for layer in health.layers} == {"float32"}
    assert health.layers[2].shapes[0] == (2, 6 if config.get("side") == "post" else 10)
    assert set(health.others) >= {"head.bias", "head.weight"}
    if config.get("inflation", "plus") == "plus":
        layer = model.base_model.model.up
        A, B, s = (layer.lorma_A["default"].double(), layer.lorma_B["default"].double(), layer.scaling["default"])
        expected = torch.linalg.cond(torch.eye(A.shape[1]) + s * (B @ A)).item()
        assert health.layers[2].condition == pytest.approx(expected)


@pytest.mark.parametrize("config", [LoraConfig(r=3, target_modules=["up"]), TLoraConfig(r=3, target_modules=["up"])])
def test_adapters_of_other_methods(config, mlp, tmp_path):
    get_peft_model(mlp, config).save_pretrained(tmp_path)
    health = examine(tmp_path)
    assert health.layers[0].name.startswith("up")
    assert health.layers[0].rank == 3
    assert health.faults == []


def damage(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def nan(tensors):
    tensors["base_model.model.up.lorma_B"][0, 0] = torch.nan


def infinite_head(tensors):
    tensors["base_model.model.head.bias"][0] = torch.inf


def singular(tensors):
    A = tensors["base_model.model.up.lorma_A"].zero_()
    B = tensors["base_model.model.up.lorma_B"].zero_()
    A[0, 0], B[0, 0] = 1, -1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (nan, "up holds NaN or infinity"),
        (infinite_head, "head.bias holds NaN or infinity"),
        (singular, "the multiplier of up is singular (condition number inf)"),
    ],
)
def test_broken_adapters_exit_with_1(change, message, mlp, tmp_path, cli):
    adapted(mlp, r=2, lorma_alpha=2, modules_to_save=["head"]).save_pretrained(tmp_path)
    assert cli("doctor", tmp_path).code == 0
    damage(tmp_path, change)
    found = cli("doctor", tmp_path)
    assert found.code == 1
    assert f"broken: {message}" in found.out


def test_how_a_product_is_split_does_not_matter(mlp, tmp_path):
    adapted(mlp, r=2).save_pretrained(tmp_path)
    before = examine(tmp_path)

    def split(tensors):
        tensors["base_model.model.up.lorma_A"][0] *= 1e7
        tensors["base_model.model.up.lorma_B"][:, 0] /= 1e7

    damage(tmp_path, split)
    after = examine(tmp_path)
    assert after.faults == []
    assert [layer.condition for layer in after.layers] == pytest.approx([layer.condition for layer in before.layers])


def test_a_rank_far_above_the_width_is_refused_before_anything_is_made(tmp_path, cli):
    write_factors(tmp_path, 40_000, 1)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 400_000
    found = cli("doctor", tmp_path)
    assert found.code == 2
    assert "a rank of 40000 may be at most its other dimension, 1, or 4096" in found.err


def test_the_smaller_decomposition_is_made_and_none_that_is_too_large(tmp_path):
    for r, n, known in ((4096, 2, True), (2, 4096, True), (WIDEST, 2 * WIDEST, False)):
        write_factors(tmp_path, r, n)
        start = time.monotonic()
        condition = examine(tmp_path).layers[0].condition
        assert (condition is not None) is known
        assert time.monotonic() - start < 5


def write_factors(folder, r, n):
    generator = torch.Generator().manual_seed(0)
    name = "base_model.model.q.lorma_"
    A, B = (0.01 * torch.randn(shape, generator=generator) for shape in ((r, n), (n, r)))
    save_file({f"{name}A": A, f"{name}B": B}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORMA", "r": r, "target_modules": ["q"]}))


def test_a_terminal_that_knows_only_ascii(mlp, tmp_path):
    adapted(mlp, r=2).save_pretrained(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "lorma", "doctor", str(tmp_path)],
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "2 ? 10" in done.stdout
    assert done.stdout.rstrip().endswith("healthy")


def test_layer_names_are_whole_on_a_narrow_terminal_and_in_a_pipe(tiny_bert, tmp_path, cli, monkeypatch):
    from transformers import AutoModel

    get_peft_model(AutoModel.from_pretrained(tiny_bert), LormaConfig(target_modules=["query"])).save_pretrained(
        tmp_path
    )
    piped = cli("doctor", tmp_path).out.splitlines()
    assert "encoder.layer.1.attention.self.query\t8\t8 × 32, 32 × 8\tfloat32\tyes\t1" in piped
    assert piped[-1] == "healthy"
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "80")
    shown = [Text.from_ansi(line).plain.strip() for line in cli("doctor", tmp_path).out.splitlines()]
    assert "layers  names begin with encoder.layer." in shown
    (line,) = [line for line in shown if line.startswith("1.attention.self.query ")]
    assert line.split() == "1.attention.self.query 8 8 × 32, 32 × 8 float32 yes 1".split()
    assert shown[-1] == "healthy"


def test_exit_codes(tmp_path, cli):
    alone = cli("doctor")
    assert alone.code == 0
    assert "transformers" in alone.out
    assert (", 1 thread used" in alone.out) is (torch.get_num_threads() == 1)
    wrong = cli("doctor", tmp_path / "nothing")
    assert wrong.code == 2
    assert len(wrong.err.strip().splitlines()) == 1


def test_a_run_directory(recipe_file, tmp_path, cli):
    assert cli("train", recipe_file()).code == 0
    found = cli("doctor", tmp_path / "run")
    assert found.code == 0
    assert "healthy" in found.out
