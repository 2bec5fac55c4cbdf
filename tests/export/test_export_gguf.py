"""Adapter files for llama.cpp: what they hold, and that llama.cpp makes of them what transformers does."""

import importlib.util
import warnings

import pytest
import torch
from export_cases import filled, logits
from safetensors.torch import load_file

from lorma import InputError, LormaConfig, TLoraConfig
from lorma.adapters.folder import WEIGHTS_NAME
from lorma.export import Base, Truncation, export_gguf, export_lora
from lorma.export.gguf import ARCHITECTURES, pair_rotary_rows
from lorma.export.merge import merge

gguf = pytest.importorskip("gguf")
from tiny_gguf import answers, tiny, to_pairs, write_base  # noqa: E402

needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed; `make llamacpp` builds it"
)
IDS = [1, 5, 9, 33, 60, 7, 7, 12]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
PHI3 = {"qkv_proj": {"splits": [32, 16, 16], "adapt": [0, 2]}, "gate_up_proj": {"splits": [48, 48]}}
GPT2 = {"c_attn": {"splits": [32, 32, 32], "adapt": [0, 2]}}
MIXED = {"q_proj": 1, "layers.1.self_attn.v_proj": 3}
ADAPTERS = {
    "llama": lambda: LormaConfig(r=4, target_modules=ALL, rank_pattern=MIXED),
    "llama-post": lambda: LormaConfig(r=4, target_modules=ALL, side="post", use_rslora=True),
    "llama-tlora": lambda: TLoraConfig(r=4, target_modules=ALL),
    "mistral": lambda: LormaConfig(target_modules=ALL, side="auto"),
    "qwen2": lambda: LormaConfig(target_modules=[*ALL, "lm_head", "embed_tokens"], side="auto"),
    "qwen3": lambda: LormaConfig(target_modules=ALL),
    "gemma": lambda: LormaConfig(target_modules=ALL),
    "gemma2": lambda: LormaConfig(target_modules=ALL),
    "gemma3_text": lambda: LormaConfig(target_modules=ALL),
    "phi": lambda: LormaConfig(target_modules=["q_proj", "k_proj", "dense", "fc1", "fc2"]),
    "phi3": lambda: LormaConfig(r=2, target_modules=["qkv_proj", "gate_up_proj"], fused_projections=PHI3),
    "gpt2": lambda: LormaConfig(r=2, target_modules=["c_attn", "c_fc", "c_proj"], fused_projections=GPT2),
}
TABLED = ("gemma", "gemma2", "gemma3_text", "phi", "gpt2")
"""Models whose GELU llama.cpp looks up in a table of float16."""


@pytest.fixture
def made(tmp_path):
    """``(kind, config)`` → the base's folder, its model, the adapted model, and the adapter's folder."""

    def make(kind, config):
        model = tiny(kind)
        model.save_pretrained(tmp_path / "base")
        adapted = filled(model, config)
        adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
        return tmp_path / "base", model, adapted, tmp_path / "adapter"

    return make


def tensors(path):
    return {t.name: torch.tensor(t.data.copy()) for t in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("uniform", [False, True])
def test_the_file_holds_the_update_in_llama_cpps_order(uniform, made, tmp_path):
    folder, _, adapted, adapter = made("llama", ADAPTERS["llama"]())
    path = tmp_path / "adapter.gguf"
    reports = export_gguf(adapter, path, base=Base(str(folder)), uniform_rank=uniform)
    fields = {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}
    assert fields["general.type"] == "adapter"
    assert fields["general.architecture"] == "llama"
    assert fields["adapter.type"] == "lora"
    alpha = fields["adapter.lora.alpha"]
    assert alpha == 4
    held = tensors(path)
    assert len(held) == 2 * len(reports) == 24
    layers = adapted.base_model.model.model.layers
    for index, layer in enumerate(layers):
        for name, module, heads in (
            ("attn_q", layer.self_attn.q_proj, 4),
            ("attn_k", layer.self_attn.k_proj, 2),
            ("attn_v", layer.self_attn.v_proj, None),
            ("ffn_down", layer.mlp.down_proj, None),
        ):
            down, up = held[f"blk.{index}.{name}.weight.lora_a"], held[f"blk.{index}.{name}.weight.lora_b"]
            assert (len(down) == 4) or not uniform
            expected = module.get_delta_weight("default").detach()
            expected = expected if heads is None else to_pairs(expected, heads)
            torch.testing.assert_close(alpha / len(down) * up @ down, expected, rtol=1e-5, atol=1e-6)


def test_rotary_rows_are_paired_within_their_heads():
    rows = torch.arange(2 * 6)[:, None]
    assert pair_rotary_rows(rows, 2).flatten().tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert torch.equal(pair_rotary_rows(rows, 2), to_pairs(rows, 2))


@pytest.mark.parametrize(("dtype", "kind"), [("float16", 1), ("bfloat16", 30)])
def test_half_precision(dtype, kind, made, tmp_path):
    folder, _, _, adapter = made("llama", LormaConfig(r=2, target_modules=["q_proj"]))
    export_gguf(adapter, tmp_path / "a.gguf", base=Base(str(folder)), dtype=dtype)
    assert {int(t.tensor_type) for t in gguf.GGUFReader(tmp_path / "a.gguf").tensors} == {kind}


@pytest.mark.parametrize(
    ("kind", "config", "reason"),
    [
        ("llama", LormaConfig(target_modules=["q_proj"], inflation="permutation"), "full rank"),
        ("llama", LormaConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]), "trained modules or biases"),
        ("gemma", LormaConfig(target_modules=["embed_tokens"]), "ties its embeddings"),
    ],
    ids=["permutation", "head", "tied"],
)
def test_what_such_a_file_cannot_hold_is_refused(kind, config, reason, made, tmp_path):
    folder, _, _, adapter = made(kind, config)
    with pytest.raises(InputError, match=reason):
        export_gguf(adapter, tmp_path / "a.gguf", base=Base(str(folder)))
    assert list(tmp_path.glob("*.gguf")) == []
    assert list(tmp_path.glob(".*")) == []


@pytest.mark.parametrize("kind", ["llama", "gemma"], ids=["apart", "tied"])
def test_unchanged_copies_of_resized_embeddings_are_left_out(kind, tmp_path):
    """PEFT writes both embeddings of a resized model into the adapter's file; nobody has trained them."""
    original = tiny(kind)
    original.save_pretrained(tmp_path / "original")
    resized = type(original).from_pretrained(tmp_path / "original")
    resized.resize_token_embeddings(72, mean_resizing=False)
    resized.save_pretrained(tmp_path / "resized")
    adapted = filled(resized, LormaConfig(r=2, target_modules=["q_proj"]))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Setting `save_embedding_layers` to `True`")
        adapted.save_pretrained(tmp_path / "adapter")
    assert any(name.endswith("embed_tokens.weight") for name in load_file(tmp_path / "adapter" / WEIGHTS_NAME))
    base, name = Base(str(tmp_path / "resized")), tmp_path / "a.gguf"
    export_gguf(tmp_path / "adapter", name, base=base)
    assert {tensor.rpartition(".")[0] for tensor in tensors(name)} == {f"blk.{i}.attn_q.weight" for i in (0, 1)}
    export_lora(tmp_path / "adapter", tmp_path / "lora", base=base)
    assert all(".q_proj." in key for key in load_file(tmp_path / "lora" / WEIGHTS_NAME))
    with pytest.raises(InputError, match=r"is \(72, 32\) in the adapter .*; save the resized model and name it"):
        export_gguf(tmp_path / "adapter", tmp_path / "b.gguf", base=Base(str(tmp_path / "original")))
    changed = type(resized).from_pretrained(tmp_path / "resized")
    changed.get_input_embeddings().weight.data[70] += 1
    changed.save_pretrained(tmp_path / "changed")
    with pytest.raises(InputError, match="trained modules or biases"):
        export_gguf(tmp_path / "adapter", tmp_path / "c.gguf", base=Base(str(tmp_path / "changed")))


def test_other_outputs_and_architectures_are_refused(exported_case, tmp_path):
    folder, _, _, _, adapter = exported_case("bert", LormaConfig(target_modules=["query"]))
    with pytest.raises(InputError, match="must end in .gguf"):
        export_gguf(adapter, tmp_path / "a", base=Base(str(folder)))
    with pytest.raises(InputError, match="a bert model cannot be exported to gguf; supported: llama, mistral"):
        export_gguf(
            adapter, tmp_path / "a.gguf", base=Base(str(folder), auto_model="AutoModelForSequenceClassification")
        )


def test_an_adapter_file_is_no_base_model(made, tmp_path):
    folder, _, _, adapter = made("llama", LormaConfig(r=2, target_modules=["q_proj"]))
    export_gguf(adapter, tmp_path / "lora.gguf", base=Base(str(folder)))
    base = Base(str(tmp_path), gguf_file="lora.gguf")
    for export in (export_lora, merge):
        with pytest.raises(InputError, match="lora.gguf is a GGUF file of the type 'adapter', not a model"):
            export(adapter, tmp_path / "out", base=base)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("cut", [0, 3, 20, 30, 60])
def test_a_base_file_that_ends_early_is_refused(cut, made, tmp_path):
    _, model, _, adapter = made("llama", LormaConfig(r=2, target_modules=["q_proj"]))
    write_base(tmp_path / "base.gguf", model, "llama")
    whole = (tmp_path / "base.gguf").read_bytes()
    (tmp_path / "base.gguf").write_bytes(whole[:cut])
    with pytest.raises(InputError, match="cannot be read"):
        merge(adapter, tmp_path / "out", base=Base(str(tmp_path), gguf_file="base.gguf"))


@needs_llama_cpp
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("case", ADAPTERS)
def test_llama_cpp_gives_what_transformers_gives(case, made, tmp_path):
    kind = case.partition("-")[0]
    folder, model, adapted, adapter = made(kind, ADAPTERS[case]())
    write_base(tmp_path / "base.gguf", model, ARCHITECTURES[kind])
    export_gguf(adapter, tmp_path / "adapter.gguf", base=Base(str(folder)))
    batch = {"input_ids": torch.tensor([IDS])}
    expected, before = logits(adapted, batch)[0], logits(model, batch)[0]
    size, tolerance = expected.abs().max(), 2e-3 if kind in TABLED else 2e-5
    assert (expected - before).abs().max() > 20 * tolerance * size
    assert (answers(tmp_path / "base.gguf", IDS) - before).abs().max() <= tolerance * size
    assert (answers(tmp_path / "base.gguf", IDS, tmp_path / "adapter.gguf") - expected).abs().max() <= tolerance * size


@needs_llama_cpp
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_llama_cpp_reads_half_precision_and_truncated_updates(made, tmp_path):
    config = LormaConfig(r=2, inflation="permutation", target_modules=["q_proj", "v_proj"])
    folder, model, adapted, adapter = made("llama", config)
    write_base(tmp_path / "base.gguf", model, "llama")
    expected = logits(adapted, {"input_ids": torch.tensor([IDS])})[0]
    for dtype, tolerance in (("float32", 2e-5), ("float16", 3e-3), ("bfloat16", 3e-2)):
        path = tmp_path / f"{dtype}.gguf"
        export_gguf(adapter, path, base=Base(str(folder)), dtype=dtype, truncation=Truncation(32))
        found = answers(tmp_path / "base.gguf", IDS, path)
        assert (found - expected).abs().max() <= tolerance * expected.abs().max()
