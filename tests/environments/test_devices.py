"""Adapters without memory, models spread over devices and disk, base weights that are never read, mixed models."""

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from helpers import is_factor
from peft import LoraConfig, PeftModel, get_peft_model
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM
from workers import EVERY, adapted, build, config, gradients, outputs, tokens

NOT_DORA = [mode for mode in EVERY if not mode.startswith("dora")]
EVERY_KIND = [(name, mode) for name in ("llama", "channels") for mode in EVERY]
EVERY_KIND += [(name, mode) for name in ("gpt2", "mixtral") for mode in NOT_DORA]


def cases(pairs):
    return pytest.mark.parametrize(("name", "mode"), pairs, ids=["-".join(pair) for pair in pairs])


# Adapters without memory


@cases(EVERY_KIND)
@torch.no_grad()
def test_low_cpu_mem_usage(name, mode, tmp_path):
    """Factors (and magnitudes) are made without memory and take the tensors of the file; nothing stays behind."""
    saved = adapted(name, mode)
    expected = outputs(saved)
    saved.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(build(name), tmp_path, low_cpu_mem_usage=True).eval()
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert_close(outputs(model), expected)
    model.load_adapter(tmp_path, adapter_name="second", low_cpu_mem_usage=True)
    model.set_adapter("second")
    assert_close(outputs(model), expected)
    loaded = dict(model.named_parameters())
    for key, parameter in saved.named_parameters():
        assert_close(loaded[key].data, parameter.data, rtol=0, atol=0)
        assert loaded[key].dtype == parameter.dtype


@cases([("llama", mode) for mode in EVERY] + [("channels", "plus-pre"), ("mixtral", "plus-pre"), ("gpt2", "plus-pre")])
@torch.no_grad()
def test_factors_without_memory_are_no_adapter(name, mode):
    """Made for loading and not loaded: an error, not numbers out of memory that nobody has written."""
    model = get_peft_model(build(name), config(name, mode), low_cpu_mem_usage=True).eval()
    assert all(parameter.is_meta for key, parameter in model.named_parameters() if is_factor(key))
    with pytest.raises((RuntimeError, ValueError), match="meta"):
        outputs(model)


@cases(EVERY_KIND)
def test_a_whole_model_without_memory(name, mode):
    """Names, shapes and trainable numbers of the real one, without a byte."""
    with torch.device("meta"):
        model = get_peft_model(build(name), config(name, mode))
    real = adapted(name, mode)
    assert all(tensor.is_meta for tensor in model.parameters())
    assert model.get_nb_trainable_parameters() == real.get_nb_trainable_parameters()
    described = {key: (p.shape, p.dtype, p.requires_grad) for key, p in model.named_parameters()}
    assert described == {key: (p.shape, p.dtype, p.requires_grad) for key, p in real.named_parameters()}
    layers = model.base_model._layers()
    if mode == "tlora":
        assert model.get_nb_trainable_parameters()[0] == (2 * 2 + 1) * len(layers) > 0
    else:
        per_layer = [layer.lorma_A["default"].numel() + layer.lorma_B["default"].numel() for layer in layers]
        widths = [layer._width(layer.side["default"], layer.fused.get("default")) for layer in layers]
        assert per_layer == [2 * 2 * width for width in widths]
    if name in ("llama", "channels"):  # the others' own forward asks for values
        assert outputs(model, tokens().to("meta")).is_meta


# Models spread over devices

SPREAD = {
    "bert": {
        "bert.embeddings": "cpu",
        "bert.encoder.layer.0": "cpu",
        "bert.encoder.layer.1": "disk",
        "bert.pooler": "disk",
        "dropout": "cpu",
        "classifier": "cpu",
    },
    "llama": {
        "model.embed_tokens": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "disk",
    },
}
SPREAD_CASES = [(name, mode) for name in SPREAD for mode in EVERY]


def check_merging(model, expected):
    """Merged, unmerged and unloaded, the model computes what it did."""
    for change in (model.merge_adapter, model.unmerge_adapter):
        change()
        assert_close(outputs(model), expected, atol=1e-5, rtol=1e-5)
    assert_close(outputs(model.merge_and_unload()), expected, atol=1e-5, rtol=1e-5)


@cases(SPREAD_CASES)
@torch.no_grad()
def test_a_device_map_of_one_device(name, mode):
    model = adapted(name, mode, base=build(name, layers=2))
    expected = outputs(model)
    model = dispatch_model(model, {"": "cpu"}, force_hooks=True)
    assert_close(outputs(model), expected, atol=1e-5, rtol=1e-5)
    check_merging(model, expected)


@cases(SPREAD_CASES)
@pytest.mark.parametrize("where", ["disk", "cpu"])
@torch.no_grad()
def test_offloaded(name, mode, where, tmp_path):
    """Parts of the model, adapters among them, lie elsewhere and are fetched for their turn."""
    model = adapted(name, mode, base=build(name, layers=2))
    expected = outputs(model)
    if where == "disk":
        places = {f"base_model.model.{key}": place for key, place in SPREAD[name].items()}
        model = dispatch_model(model, places, offload_dir=tmp_path)
    else:
        cpu_offload(model, execution_device=torch.device("cpu"))
    assert_close(outputs(model), expected)
    check_merging(model, expected)


@pytest.mark.parametrize("mode", EVERY)
@torch.no_grad()
def test_merging_while_offloaded(mode, tmp_path):
    """PEFT brings each layer back for merging; this much does not depend on the forward pass."""
    model = adapted("bert", mode, base=build("bert", layers=2))
    expected = outputs(model)
    model = dispatch_model(model, {f"base_model.model.{k}": v for k, v in SPREAD["bert"].items()}, offload_dir=tmp_path)
    model.merge_adapter()
    assert_close(outputs(model), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", EVERY)
@pytest.mark.parametrize("name", SPREAD)
@torch.no_grad()
def test_an_adapter_for_an_offloaded_model(name, mode):
    """The base weights have no memory between their turns; that is no reason for the factors to have none."""
    expected = outputs(adapted(name, mode))
    base = build(name)
    cpu_offload(base, execution_device=torch.device("cpu"))
    model = adapted(name, mode, base=base)
    assert not any(parameter.is_meta for key, parameter in model.named_parameters() if is_factor(key))
    assert_close(outputs(model), expected)


@torch.no_grad()
def test_an_adapter_is_not_loaded_into_a_base_on_disk(tmp_path):
    """PEFT names the weights that it puts beside those on disk in LoRA's way; they would not be found again."""
    build("llama", layers=2).save_pretrained(tmp_path / "base")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted("llama", "plus-pre", base=plain).save_pretrained(tmp_path / "adapter")
    places = {"offload_folder": tmp_path / "off", "device_map": SPREAD["llama"]}
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", **places)
    places = {f"base_model.model.{key}": place for key, place in SPREAD["llama"].items()}
    with pytest.raises(ValueError, match="lies partly on disk.*then call accelerate's dispatch_model"):
        PeftModel.from_pretrained(base, tmp_path / "adapter", device_map=places, offload_dir=tmp_path / "off")


# Nothing reads the base weight


class Watch(TorchDispatchMode):
    """Notes every operation on the memory of a base weight outside the base layer's own forward."""

    ALIASES = ("aten.detach", "aten.alias", "aten.view")
    """Handing a tensor on is no reading; ``state_dict()`` does it with every parameter."""

    def __init__(self, model):
        super().__init__()
        self.weights = {}
        self.reads = []
        self.inside = 0
        for name, module in model.named_modules():
            if getattr(module, "weight", None) is not None:
                self.weights[module.weight.untyped_storage().data_ptr()] = name
                module.register_forward_pre_hook(self.enter)
                module.register_forward_hook(self.leave)

    def enter(self, *args):
        self.inside += 1

    def leave(self, *args):
        self.inside -= 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not self.inside and not str(func).startswith(self.ALIASES):
            for leaf in torch.utils._pytree.tree_leaves((args, kwargs)):
                if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().data_ptr() in self.weights:
                    self.reads.append((str(func), self.weights[leaf.untyped_storage().data_ptr()]))
        return func(*args, **(kwargs or {}))


@cases([(name, mode) for name in ("llama", "bert", "gpt2", "channels") for mode in NOT_DORA])
def test_nothing_reads_the_base_weight(name, mode, tmp_path):
    """Not at the start, in a forward pass, or in saving and loading. Backward: only the base layer's own."""
    base = build(name)
    with Watch(base) as watch:
        model = get_peft_model(base, config(name, mode, dropout=0.1)).train()
        loss = outputs(model).square().mean()
        model.save_pretrained(tmp_path)
        model.load_adapter(tmp_path, adapter_name="second")
        model.set_adapter("second")
        outputs(model.eval())
    assert watch.reads == []
    assert watch.inside == 0
    model.set_adapter("default")
    loss.backward()
    assert all(torch.isfinite(gradient).all() for gradient in gradients(model).values())


@pytest.mark.parametrize("name", ["llama", "channels"])
def test_the_watch_sees_who_does_read(name):
    """DoRMA's norms are the stated exception, and merging has to."""
    base = build(name)
    with Watch(base) as watch:
        model = get_peft_model(base, config(name, "dora-pre"))
    at_start = set(watch.reads)
    watch.reads.clear()
    with watch:
        outputs(model.eval())
    assert {where for _, where in at_start} == {where for _, where in watch.reads}
    assert len({where for _, where in at_start}) == len(model.base_model._layers())
    base = build(name)
    watch = Watch(base)
    model = get_peft_model(base, config(name, "plus-pre"))
    with watch:
        model.merge_adapter()
    assert watch.reads


@pytest.mark.parametrize("mode", NOT_DORA)
def test_backward_keeps_no_copy_of_the_base_weight(mode):
    """What autograd keeps for a layer: of the base weight's memory only the weight itself."""
    base = build("llama")
    model = adapted("llama", mode, base=base)
    layer = model.base_model._layers()[0]
    weight, kept = layer.get_base_layer().weight, []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(torch.randn(2, 32, requires_grad=True)).sum().backward()
    same = [
        saved for saved in kept if saved.numel() == weight.numel() and torch.equal(saved.flatten(), weight.flatten())
    ]
    assert all(tensor.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr() for tensor in same)


# Other methods in the same model


def test_mixed_models_are_refused():
    """PEFT keeps the methods of its mixed models in a fixed list; the error names ours, and nothing is changed."""
    base = build("bert")
    expected = outputs(base)
    with pytest.raises(ValueError, match="`peft_type` 'LORMA' is not compatible with the `PeftMixedModel`. Compatible"):
        get_peft_model(base, config("bert", "plus-pre"), mixed=True)
    assert torch.equal(outputs(base), expected)
    mixed = get_peft_model(base, LoraConfig(target_modules=["key"], init_lora_weights=False), mixed=True).eval()
    expected = outputs(mixed)
    before = [name for name, _ in mixed.named_parameters()]
    with pytest.raises(ValueError, match="'LORMA' is not compatible with the `PeftMixedModel`"):
        mixed.add_adapter("multiplied", config("bert", "plus-pre"))
    assert [name for name, _ in mixed.named_parameters()] == before
    assert list(mixed.peft_config) == ["default"]
    assert torch.equal(outputs(mixed), expected)


def test_a_lora_beside_lorma_is_refused():
    model = adapted("bert", "plus-pre")
    expected = outputs(model)
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types. Found PeftType.LORMA and"):
        model.add_adapter("added", LoraConfig(target_modules=["key"]))
    assert list(model.peft_config) == ["default"]
    assert torch.equal(outputs(model), expected)


def test_lora_and_lorma_one_after_the_other():
    """What takes the place of a mixed model: one is merged, the other put on top, on other layers or the same."""
    base = get_peft_model(build("bert"), LoraConfig(target_modules=["key"], init_lora_weights=False)).eval()
    with torch.no_grad():
        lora = outputs(base)
        model = adapted("bert", "permutation-post", base=base.merge_and_unload())
        both = outputs(model)
        assert not torch.allclose(both, lora, atol=1e-3)
        with model.disable_adapter():
            assert_close(outputs(model), lora, atol=1e-5, rtol=1e-5)
        assert_close(outputs(model.merge_and_unload()), both, atol=1e-5, rtol=1e-5)
