"""TLoRA's files: A and C come out the same wherever they are drawn, or the file is refused."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from helpers import TARGETS, load, randomise, tlora
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from lorma import TLoraConfig

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def x():
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(3))


# The same A and C everywhere

DRAW = """
import sys, torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import nn
import lorma
torch.set_default_dtype(getattr(torch, sys.argv[3]))
base = nn.Sequential(nn.Linear(300, 500), nn.Linear(500, 300)).to(getattr(torch, sys.argv[4]))
model = PeftModel.from_pretrained(base, sys.argv[1], low_cpu_mem_usage=sys.argv[5] == "meta")
assert torch.get_num_threads() == int(sys.argv[6])
drawn = {name: buffer for name, buffer in model.named_buffers() if "tlora_" in name}
assert {buffer.dtype for name, buffer in drawn.items() if "checksum" not in name} == {
    torch.promote_types(torch.float32, getattr(torch, sys.argv[4]))
}
save_file({name: b if "checksum" in name else b.float() for name, b in drawn.items()}, sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("default", "base", "memory", "threads"),
    [
        ("float32", "float32", "real", 2),
        ("bfloat16", "bfloat16", "meta", 1),
        ("float64", "float32", "meta", 2),
        ("float32", "float64", "real", 1),
    ],
)
def test_another_process_draws_the_same(default, base, memory, threads, tmp_path):
    model = get_peft_model(
        nn.Sequential(nn.Linear(300, 500), nn.Linear(500, 300)), TLoraConfig(target_modules=["0", "1"], r=24, seed=3)
    )
    model.save_pretrained(tmp_path)
    found = tmp_path / "found.safetensors"
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    arguments = [str(tmp_path), str(found), default, base, memory, str(threads)]
    subprocess.run([sys.executable, "-c", DRAW, *arguments], check=True, env=environment, capture_output=True)
    found = load_file(found)
    mine = {name: buffer for name, buffer in model.named_buffers() if "tlora_" in name}
    assert set(found) == set(mine)
    assert all(torch.equal(found[name], mine[name]) for name in mine)


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_saving_and_loading(dtype, autocast, quick, mlp, x, tmp_path):
    base = copy.deepcopy(mlp).to(dtype)
    model = get_peft_model(
        copy.deepcopy(base), TLoraConfig(target_modules=TARGETS, r=4), autocast_adapter_dtype=autocast
    )
    randomise(model.eval())
    model.save_pretrained(tmp_path)
    assert sorted({name.rpartition(".")[2] for name in load_file(tmp_path / WEIGHTS)}) == [
        "tlora_B",
        "tlora_checksum",
        "tlora_scale",
    ]
    loaded = load(base, tmp_path, autocast_adapter_dtype=autocast, low_cpu_mem_usage=quick)
    found, expected = dict(loaded.named_buffers()), dict(model.named_buffers())
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) and found[name].dtype == expected[name].dtype for name in found)
    assert torch.equal(loaded(x.to(dtype)), model(x.to(dtype)))


def test_a_model_cast_after_the_fact_reads_its_own_file(mlp, x, tmp_path):
    """A and C are rounded when a model is cast, and PEFT widens what is left; checkpoints are still its own."""
    model = tlora(mlp)
    exact = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    expected = model(x.bfloat16())
    for _ in range(2):
        model.load_adapter(tmp_path, "default")
        assert_close(model(x.bfloat16()), expected, rtol=2e-2, atol=2e-2)
    assert all(torch.equal(buffer, exact[name]) for name, buffer in model.named_buffers())


# Files that do not fit


def rewrite(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def reconfigure(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def checksum_of(tensors):
    (name,) = (name for name in tensors if name.endswith("tlora_checksum"))
    return name


def change_byte(position):
    def change(tensors):
        tensors[checksum_of(tensors)][position] += 1

    return lambda folder: rewrite(folder, change)


def replace(make):
    def change(tensors):
        name = checksum_of(tensors)
        tensors[name] = make(tensors[name])

    return lambda folder: rewrite(folder, change)


MISSING = "must hold one tlora_checksum of 11 bytes for its 3 adapted layers"
REFUSED = {
    "another seed": (lambda f: reconfigure(f, seed=8), "A and C of up come out otherwise.*another seed"),
    "the second layer's byte": (change_byte(9), "A and C of gate come out otherwise"),
    "a byte of the whole": (change_byte(0), "A and C of a layer come out otherwise"),
    "no checksum": (lambda f: rewrite(f, lambda t: t.pop(checksum_of(t))), MISSING),
    "one layer too few": (replace(lambda found: found[:-1].clone()), MISSING),
    "another type": (replace(lambda found: found.to(torch.int64)), MISSING),
    "another shape": (replace(lambda found: found[None].clone()), MISSING),
    "projections promised": (
        lambda f: reconfigure(f, save_projection=True),
        "hold 0 fixed matrices tlora_A and tlora_C for 3 adapted layers.*save_projection=True: it needs 6",
    ),
}


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("reason", REFUSED)
def test_files_whose_matrices_cannot_be_drawn_again_are_refused(reason, quick, mlp, tmp_path):
    tlora(mlp).save_pretrained(tmp_path)
    change, message = REFUSED[reason]
    change(tmp_path)
    with pytest.raises(ValueError, match=message):
        load(mlp, tmp_path, low_cpu_mem_usage=quick)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda f: reconfigure(f, save_projection=False),
            "hold 6 .*save_projection=False: it needs none",
        ),
        (
            lambda f: rewrite(f, lambda t: t.pop("base_model.model.gate.tlora_C")),
            "hold 5 fixed matrices.*save_projection=True: it needs 6",
        ),
    ],
)
def test_projections_in_the_file_must_be_all_or_none(change, message, mlp, tmp_path):
    tlora(mlp, save_projection=True).save_pretrained(tmp_path)
    change(tmp_path)
    with pytest.raises(ValueError, match=message):
        load(mlp, tmp_path)


@pytest.mark.parametrize("quick", [False, True])
def test_saved_projections_win_over_the_seed(quick, mlp, x, tmp_path):
    model = tlora(mlp, save_projection=True)
    model.save_pretrained(tmp_path)
    held = {name.rpartition(".")[2] for name in load_file(tmp_path / WEIGHTS)}
    assert held == {"tlora_A", "tlora_B", "tlora_C", "tlora_scale"}
    reconfigure(tmp_path, seed=8)
    loaded = load(mlp, tmp_path, low_cpu_mem_usage=quick)
    assert torch.equal(loaded(x), model(x))
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(load(mlp, tmp_path / "again")(x), model(x))
    assert not torch.equal(tlora(mlp, seed=8)(x), model(x))


# A state dict loaded without PEFT


def two_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6))


def noisy(seed=0):
    model = get_peft_model(two_layers(), TLoraConfig(r=2, seed=seed, target_modules=["0", "1"]))
    randomise(model)
    return model


def test_matrices_without_memory_are_drawn_when_a_state_dict_is_loaded(x):
    model = noisy()
    state, expected = model.state_dict(), model(x)
    for assign in (True, False):
        with torch.device("meta"):
            empty = get_peft_model(two_layers(), TLoraConfig(r=2, target_modules=["0", "1"]))
        if not assign:
            empty.to_empty(device="cpu")
        empty.load_state_dict(state, assign=assign)
        assert_close(empty(x), expected, atol=0, rtol=0)


def test_a_state_dict_of_another_seed_is_refused():
    with pytest.raises(ValueError, match="the fixed matrices A and C of 0 come out otherwise"):
        noisy(seed=1).load_state_dict(noisy().state_dict())


def test_rounded_matrices_are_drawn_again_when_a_state_dict_is_loaded(x):
    model = noisy()
    state, expected = copy.deepcopy(model.state_dict()), model(x)
    rounded = model.bfloat16().float()
    rounded.load_state_dict(state)
    assert_close(rounded(x), expected, atol=0, rtol=0)
