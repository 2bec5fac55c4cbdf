"""Two gloo processes on CPU: DDP and FSDP2 train as one process does, and what they save loads at any world size."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import is_factor
from peft import PeftModel
from torch.testing import assert_close
from workers import EVERY, adapted, build, factors, load_checkpoint, outputs, tokens, train, trained_part

pytestmark = [
    pytest.mark.slow,
    # What torch says when a distributed checkpoint is read or written by one process alone, which is the test.
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
]
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def alone(name, mode, **changes):
    """The same training in one process, on the whole batch."""
    model = adapted(name, mode, base=build(name, layers=2), **changes)
    losses = train(model, tokens(rows=4))
    assert losses[-1] < (1 if mode == "tlora" else 0.995) * losses[0]  # TLoRA's five numbers a layer move less
    return model, losses


@pytest.mark.parametrize("mode", EVERY)
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_ddp(two_processes, name, mode):
    model, losses = alone(name, mode)
    (first_losses, first, sent), (second_losses, second, _) = two_processes("ddp", name=name, mode=mode)
    assert sent == [], "buffers that are the same everywhere are sent at each forward"
    assert first_losses == second_losses
    assert_close(first_losses, losses, **CLOSE)
    assert_close(first, second, atol=0, rtol=0)
    assert_close(first, factors(model), **CLOSE)


WHOLE = [(name, mode) for name in ("bert", "llama") for mode in EVERY]


@pytest.mark.parametrize(
    ("name", "mode"), [*WHOLE, ("mixtral", "plus-pre"), ("mixtral", "permutation-post"), ("mixtral", "tlora")]
)
def test_fsdp2(two_processes, name, mode, tmp_path):
    """Base and adapter are cut in two, rank 3 unevenly; five steps, saved in two ways, reloaded in one process."""
    model, losses = alone(name, mode, r=3)
    results = two_processes("fsdp", name=name, mode=mode, folder=tmp_path, r=3)
    with torch.no_grad():
        expected = outputs(model, tokens(rows=4))
    for found_losses, sharded, full, got in results:
        assert set(sharded) == set(full)
        assert any(key.endswith(("base_layer.weight", "base_layer.gate_up_proj")) for key in sharded)
        assert_close(found_losses, losses, **CLOSE)
        assert_close(got, expected, **CLOSE)
    for key, shape in results[0][2].items():
        assert sum(sharded[key][0] for _, sharded, _, _ in results) == shape[0]
        if shape[0] > 1:  # not a single number, such as TLoRA's scale
            assert all(sharded[key][0] < shape[0] for _, sharded, _, _ in results)

    with torch.no_grad():
        reloaded = PeftModel.from_pretrained(build(name, layers=2), tmp_path / "adapter").eval()
        assert_close(outputs(reloaded, tokens(rows=4)), expected, **CLOSE)
        assert_close(factors(reloaded), factors(model), **CLOSE)
        resumed = adapted(name, mode, base=build(name, layers=2), seed=9, r=3)
        load_checkpoint(resumed, tmp_path / "checkpoint", no_dist=True)
        assert_close(outputs(resumed, tokens(rows=4)), expected, **CLOSE)


@pytest.mark.parametrize(
    ("name", "mode"), [("bert", "plus-post"), ("llama", "permutation-pre"), ("llama", "dora-pre"), ("llama", "tlora")]
)
def test_a_checkpoint_of_one_process_loads_into_two(two_processes, name, mode, tmp_path):
    model, _ = alone(name, mode)
    assert all(is_factor(key) for key in trained_part(model))
    dcp.save({"model": trained_part(model)}, checkpoint_id=tmp_path, no_dist=True)
    with torch.no_grad():
        expected = outputs(model, tokens(rows=4))
    for got in two_processes("resume", name=name, mode=mode, folder=tmp_path):
        assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize("mode", EVERY)
def test_fsdp2_with_every_linear_layer_a_group_of_its_own(two_processes, mode):
    """Weight *and bias* of a base layer are whole only while it runs."""
    _, losses = alone("bert", mode)
    for found_losses, sharded, full, _ in two_processes("fsdp", name="bert", mode=mode, finest=True):
        assert set(sharded) == set(full)
        assert_close(found_losses, losses, **CLOSE)


@pytest.mark.parametrize("mode", EVERY)
def test_fsdp2_with_gradient_checkpointing(two_processes, mode):
    _, losses = alone("llama", mode)
    for found_losses, *_ in two_processes("fsdp", name="llama", mode=mode, checkpointing=True):
        assert_close(found_losses, losses, **CLOSE)


@pytest.mark.parametrize("autocast", [True, False], ids=["adapter-fp32", "adapter-bf16"])
@pytest.mark.parametrize("mode", ["plus-pre", "permutation-post", "dora-pre", "tlora"])
def test_fsdp2_with_a_bfloat16_base(two_processes, mode, autocast, tmp_path):
    """FSDP2 wants one dtype of the *trained* parameters of a group: float32 factors beside a bfloat16 base will do."""
    arguments = {"name": "llama", "mode": mode, "autocast": autocast}
    losses = train(adapted(base=build("llama", layers=2).bfloat16(), **arguments), tokens(rows=4))
    results = two_processes("fsdp", folder=tmp_path, dtype=torch.bfloat16, **arguments)
    for found_losses, _, _, got in results:
        assert got.dtype == torch.bfloat16
        assert_close(found_losses, losses, atol=0, rtol=2e-2)
    base = build("llama", layers=2).bfloat16()
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter", autocast_adapter_dtype=autocast).eval()
    assert {factor.dtype for factor in factors(loaded).values()} == {torch.float32 if autocast else torch.bfloat16}
    with torch.no_grad():
        assert_close(outputs(loaded, tokens(rows=4)), results[0][3], rtol=2e-2, atol=5e-2)


def test_fsdp2_refuses_two_dtypes_of_trained_parameters(two_processes):
    """Biases in bfloat16 beside factors in float32; ``autocast_adapter_dtype=False`` is the way around."""
    for error in two_processes("mixed_training_dtypes"):
        assert "FSDP expects uniform original parameter dtype" in error
    for losses, *_ in two_processes(
        "fsdp", name="bert", mode="plus-pre", dtype=torch.bfloat16, autocast=False, bias="all"
    ):
        assert losses[-1] < losses[0]


@pytest.mark.parametrize("mode", [mode for mode in EVERY if not mode.startswith("dora")])
def test_an_adapter_for_a_sharded_model(two_processes, mode):
    """No rank holds a base weight, and none is asked for: the factors start without one."""
    with torch.no_grad():
        expected = outputs(adapted("llama", mode, base=build("llama", layers=2)))
    for got in two_processes("adapt_sharded", name="llama", mode=mode):
        assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize("mode", ["plus-pre", "permutation-post", "tlora"])
def test_a_sharded_model_is_merged_or_left_as_it_was(two_processes, mode):
    for _, unchanged in two_processes("merge_sharded", name="llama", mode=mode):
        assert unchanged
