"""torch.compile takes whole models as one graph, adapters are swapped without compiling again, merged models export."""

import copy
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.testing import assert_close
from workers import EVERY, MODES, adapted, build, config, gradients, outputs, tokens

from lorma import hotswap_adapter, prepare_for_hotswap

WHOLE = [(name, mode) for name in ("bert", "llama", "channels") for mode in EVERY]
WHOLE += [
    (name, mode) for name in ("gpt2", "mixtral") for mode in ("plus-pre", "plus-post", "permutation-post", "tlora")
]
never_again = torch._dynamo.config.patch(error_on_recompile=True)
"""Compiling a second time is an error."""
inductor_warnings = pytest.mark.filterwarnings(
    # torch/utils/mkldnn.py, imported by inductor, uses what torch itself has deprecated.
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning",
)


def cases(pairs):
    return pytest.mark.parametrize(("name", "mode"), pairs, ids=["-".join(pair) for pair in pairs])


def step(model, ids, called=None):
    """Outputs and gradients of one forward and backward pass."""
    model.zero_grad(set_to_none=True)
    got = outputs(model if called is None else called, ids)
    got.square().mean().backward()
    return got.detach(), {name: gradient.clone() for name, gradient in gradients(model).items()}


@cases(WHOLE)
def test_a_whole_model_is_one_graph(name, mode):
    """No graph break, and the outputs and gradients of eager."""
    model = adapted(name, mode)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager" if mode == "plus-pre" else "eager")
    assert_close(step(model, tokens(), compiled), step(model, tokens()))


@cases([("bert", "plus-pre"), ("gpt2", "plus-post"), ("channels", "permutation-pre"), ("llama", "tlora")])
@never_again
@torch.no_grad()
def test_new_data_is_no_reason_to_compile_again(name, mode):
    model = adapted(name, mode)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for seed in (2, 3, 4):
        assert_close(outputs(compiled, tokens(seed=seed)), outputs(model, tokens(seed=seed)))


@cases([("channels", "dora-post"), ("gpt2", "permutation-pre"), ("mixtral", "plus-post"), ("mixtral", "tlora")])
def test_dynamo_explains_no_graph_break(name, mode):
    explained = torch._dynamo.explain(adapted(name, mode))(input_ids=tokens())
    assert (explained.graph_count, explained.graph_break_count, explained.break_reasons) == (1, 0, [])


@pytest.mark.slow
@inductor_warnings
@cases([("bert", "permutation-pre"), ("bert", "tlora")])
def test_inductor(name, mode):
    model = adapted(name, mode)
    compiled = torch.compile(model, fullgraph=True)
    assert_close(step(model, tokens(), compiled), step(model, tokens()))


@pytest.mark.parametrize("mode", ["plus-pre", "plus-post", "tlora"])
@never_again
def test_a_layer_compiled_alone_is_compiled_once(mode):
    """Regional compilation: the layer's input is the graph's input, another tensor at each call."""
    layer = adapted("llama", mode).base_model.model.model.layers[0].self_attn.q_proj
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    for _ in range(3):
        x = torch.randn(2, 32)
        assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("modes", [("plus-pre", "permutation-post"), ("tlora", "tlora")])
@never_again
def test_several_adapters_with_dropout_in_training(modes):
    model = adapted("bert", modes[0], dropout=0.5)
    model.add_adapter("second", config("bert", modes[1], dropout=0.3, init_weights=False))
    model.base_model.set_adapter(["default", "second"])
    model.train()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.manual_seed(5)
    expected = step(model, tokens())
    torch.manual_seed(5)
    assert_close(step(model, tokens(), compiled), expected)
    with torch.no_grad():
        assert not torch.equal(outputs(model), outputs(model))


@never_again
@torch.no_grad()
def test_eager_and_compiled_evaluations_may_alternate():
    """DoRMA keeps the norms of an eager evaluation; a compiled one must not depend on whether there are any."""
    model = adapted("bert", "dora-pre")
    expected = outputs(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_close(outputs(compiled), expected)
    assert_close(outputs(compiled), expected)
    assert_close(outputs(model), expected)
    assert_close(outputs(compiled), expected)


# Hot-swapping


def saved(folder, name, mode, **changes):
    """A folder with an adapter of other factors, and the outputs of that adapter."""
    model = adapted(name, mode, seed=7, **changes)
    model.save_pretrained(folder)
    with torch.no_grad():
        return outputs(PeftModel.from_pretrained(build(name), folder).eval())


@cases(
    [("bert", mode) for mode in MODES] + [("gpt2", "plus-post"), ("mixtral", "permutation-pre"), ("llama", "dora-pre")]
)
@never_again
@torch.no_grad()
def test_hotswap_to_a_smaller_rank_and_another_alpha(name, mode, tmp_path):
    small = saved(tmp_path / "small", name, mode, r=3, lorma_alpha=9)
    large = saved(tmp_path / "large", name, mode, r=6, lorma_alpha=2, use_rslora=True)
    model = adapted(name, mode)
    before = outputs(adapted(name, mode))
    prepare_for_hotswap(model, target_rank=6)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_close(outputs(compiled), before)
    for folder, expected in (("small", small), ("large", large), ("small", small)):
        hotswap_adapter(compiled, tmp_path / folder)
        assert_close(outputs(compiled), expected)
        assert (expected - before).norm() > 1e-2 * before.norm()
    model.merge_adapter()
    assert_close(outputs(model), small, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@inductor_warnings
@never_again
@torch.no_grad()
def test_hotswap_under_inductor(tmp_path):
    expected = saved(tmp_path, "llama", "plus-pre", r=1, lorma_alpha=5)
    model = adapted("llama", "plus-pre")
    prepare_for_hotswap(model, target_rank=4)
    compiled = torch.compile(model, fullgraph=True)
    outputs(compiled)
    hotswap_adapter(compiled, tmp_path)
    assert_close(outputs(compiled), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_swapped_adapter_is_saved_as_it_computes(tmp_path):
    """Same rank, so nothing was padded: the configuration must then say the alpha that was swapped in."""
    expected = saved(tmp_path / "other", "bert", "plus-pre", lorma_alpha=9)
    model = adapted("bert", "plus-pre")
    hotswap_adapter(model, tmp_path / "other")
    assert_close(outputs(model), expected)
    model.save_pretrained(tmp_path / "again")
    assert_close(outputs(PeftModel.from_pretrained(build("bert"), tmp_path / "again").eval()), expected)


def lora(folder):
    get_peft_model(build("bert"), LoraConfig(target_modules=["query"])).save_pretrained(folder)


def truncated(folder):
    saved(folder, "bert", "plus-pre")
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


REFUSED = {
    "inflation": (lambda folder: saved(folder, "bert", "permutation-pre"), "different inflation cannot be swapped"),
    "side": (lambda folder: saved(folder, "bert", "plus-post"), "different side cannot be swapped"),
    "dora": (lambda folder: saved(folder, "bert", "dora-pre"), "different use_dora cannot be swapped"),
    "rank": (
        lambda folder: saved(folder, "bert", "plus-pre", r=5),
        r"shape \(5, 32\), but there is room for \(4, 32\)",
    ),
    "more layers": (
        lambda folder: saved(folder, "bert", "plus-pre", target_modules=["query", "value", "key"]),
        r"holds bert.*key.lorma_[AB], which the loaded adapter does not have",
    ),
    "fewer layers": (
        lambda folder: saved(folder, "bert", "plus-pre", target_modules=["query"]),
        "the adapter to swap in lacks bert.*value.lorma_A",
    ),
    "lora": (lora, "holds a PeftType.LORA adapter; only LoRMA adapters can be swapped in here"),
    "truncated": (truncated, "is truncated or not a safetensors file"),
}


@pytest.mark.parametrize("reason", REFUSED)
@torch.no_grad()
def test_a_refused_swap_changes_nothing(reason, tmp_path):
    write, message = REFUSED[reason]
    write(tmp_path)
    model = adapted("bert", "plus-pre")
    prepare_for_hotswap(model, target_rank=4)
    before, expected = copy.deepcopy(model.state_dict()), outputs(model)
    with pytest.raises(ValueError, match=message):
        hotswap_adapter(model, tmp_path)
    assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    assert torch.equal(outputs(model), expected)


@torch.no_grad()
def test_merged_missing_and_unknown_adapters_are_not_swapped(tmp_path):
    saved(tmp_path, "bert", "plus-pre")
    model = adapted("bert", "plus-pre")
    with pytest.raises(ValueError, match="Adapter other does not exist; there are default"):
        hotswap_adapter(model, tmp_path, adapter_name="other")
    model.merge_adapter()
    merged = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="adapter 'default' is merged; call unmerge_adapter before swapping"):
        hotswap_adapter(model, tmp_path)
    assert_close(dict(model.state_dict()), dict(merged), rtol=0, atol=0)
    shutil.rmtree(tmp_path)
    with pytest.raises(ValueError, match=f"Can't find 'adapter_config.json' at '{tmp_path}'"):
        hotswap_adapter(model, tmp_path)


def test_preparing_comes_before_compiling_and_after_loading():
    model = adapted("bert", "plus-pre")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="call prepare_for_hotswap before torch.compile, not after"):
        prepare_for_hotswap(torch.compile(model, backend="eager"), target_rank=4)
    with pytest.raises(ValueError, match=r"target_rank=1 is below the rank 2 of 'default' on bert\..*\.query"):
        prepare_for_hotswap(model, target_rank=1)
    assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    with pytest.raises(ValueError, match="the model has no LoRMA layers; load the first adapter before"):
        prepare_for_hotswap(build("bert"))
    model.compile(backend="eager")
    with pytest.raises(ValueError, match="call prepare_for_hotswap before torch.compile, not after"):
        prepare_for_hotswap(model, target_rank=4)


def test_preparing_after_a_part_was_compiled():
    """Regional compilation, as transformers and diffusers offer it."""
    model = adapted("bert", "plus-pre")
    model.base_model.model.bert.encoder.layer[0].compile(backend="eager")
    with pytest.raises(ValueError, match="call prepare_for_hotswap before torch.compile, not after"):
        prepare_for_hotswap(model, target_rank=4)


# Exporting


@cases([("bert", "dora-pre"), ("llama", "permutation-post"), ("channels", "plus-post"), ("bert", "tlora")])
@torch.no_grad()
def test_a_merged_model_exports(name, mode):
    model = adapted(name, mode)
    expected = outputs(model)
    merged = model.merge_and_unload()
    kwargs = {"input_ids": tokens()} if name == "channels" else {"input_ids": tokens(), "use_cache": False}
    exported = torch.export.export(merged, (), kwargs).module()(**kwargs)
    assert_close(exported if name == "channels" else exported.logits, expected, atol=1e-5, rtol=1e-4)
