"""TLoRA: its configuration and counts, several adapters, merging, and training that goes on where it stopped."""

import copy
import math

import pytest
import torch
from datasets import Dataset
from helpers import TARGETS, load, randomise, tlora
from peft import get_peft_model
from safetensors.torch import load_file
from test_counts import ROBERTA_LARGE, trainable
from torch import nn
from torch.testing import assert_close
from transformers import RobertaConfig, RobertaForSequenceClassification, Trainer, TrainingArguments

from lorma import TLoraConfig
from lorma.functional import draw_projections, tri_matrix_delta

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def x():
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(3))


# Configuration and counts


@pytest.mark.parametrize(
    ("argument", "value", "error", "message"),
    [
        ("r", 0, ValueError, "r=0 must be an int of at least 1"),
        ("r", 2.5, TypeError, "r=2.5 must be an int of at least 1, not float"),
        ("r", True, TypeError, "r=True must be an int"),
        ("tlora_dropout", 1.0, ValueError, r"tlora_dropout=1.0 must lie in \[0, 1\)"),
        ("tlora_dropout", math.nan, ValueError, r"tlora_dropout=nan must lie in \[0, 1\)"),
        ("tlora_dropout", "0", TypeError, r"tlora_dropout='0' must be a number in \[0, 1\), not str"),
        ("seed", -1, ValueError, "seed=-1 must be an int from 0"),
        ("seed", 1.5, TypeError, "seed=1.5 must be an int from 0, not float"),
        ("seed", True, TypeError, "seed=True must be an int from 0, not bool"),
        ("seed", None, TypeError, "seed=None must be an int from 0, not NoneType"),
        ("save_projection", 1, TypeError, "save_projection=1 must be true or false, not int"),
        ("bias", "lorma_only", ValueError, "bias='lorma_only' is not allowed; choose one of none, all, tlora_only"),
        ("undo", "copy", ValueError, "undo='copy' is not allowed; choose one of snapshot, inverse, refuse"),
        ("init_weights", 1, TypeError, "init_weights=1 must be true or false"),
        ("fan_in_fan_out", 1, TypeError, "fan_in_fan_out=1 must be true or false"),
        ("target_modules", ["q", 3], TypeError, "target_modules must be .*; it holds 3"),
        ("exclude_modules", "*", ValueError, r"exclude_modules='\*' is not a regular expression"),
        ("modules_to_save", "head", TypeError, "modules_to_save='head' must be a list of strings"),
        ("target_parameters", "experts.w", TypeError, "target_parameters='experts.w' must be a list of strings"),
        ("layers_to_transform", "1", TypeError, "layers_to_transform='1' must be a layer index"),
        ("rank_pattern", {"q": 0}, ValueError, r"rank_pattern\['q'\]=0 must be an int of at least 1"),
    ],
)
def test_bad_values_are_named(argument, value, error, message):
    with pytest.raises(error, match=message):
        TLoraConfig(**{argument: value})


@pytest.mark.parametrize(("r", "count"), [(8, 3_120), (16, 12_336), (32, 49_200)])
def test_the_papers_counts_on_roberta_large(r, count):
    assert trainable(ROBERTA_LARGE, TLoraConfig(r=r)) == count


def test_the_file_for_roberta_large_is_small(tmp_path):
    """All 24 layers in their width, query and value, r = 32; a small vocabulary and feed-forward layer beside them."""
    shape = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 8}
    config = RobertaConfig(vocab_size=40, max_position_embeddings=16, **shape)
    with torch.device("meta"):
        empty = RobertaForSequenceClassification(config)
    model = get_peft_model(empty.to_empty(device="cpu"), TLoraConfig(r=32))
    assert model.get_nb_trainable_parameters()[0] == 49_200
    model.save_pretrained(tmp_path)
    assert (tmp_path / WEIGHTS).stat().st_size <= 210_000


# Several adapters


def test_adapters_with_seeds_ranks_and_layers_of_their_own(mlp, x, tmp_path):
    """Each file has the checksum of its adapter alone, wherever in the model that lies."""
    configs = {
        "default": {"target_modules": ["up", "gate"], "seed": 1, "r": 2},
        "default2": {"target_modules": ["gate", "conv"], "seed": 2, "r": 5},
        "late": {"target_modules": ["conv"], "seed": 1, "r": 3, "rank_pattern": {"conv": 1}},
        "kept": {"target_modules": ["head", "up"], "seed": 4, "r": 3, "save_projection": True},
    }
    alone = {name: tlora(mlp, **config) for name, config in configs.items()}
    model = get_peft_model(copy.deepcopy(mlp), TLoraConfig(**configs["default"]))
    for name in list(configs)[1:]:
        model.add_adapter(name, TLoraConfig(**configs[name]))
    for name in configs:
        randomise(model, name)
    model.eval().save_pretrained(tmp_path)
    loaded = None
    for name in configs:
        folder = tmp_path if name == "default" else tmp_path / name
        alone[name].save_pretrained(tmp_path / "alone" / name)
        found, expected = load_file(folder / WEIGHTS), load_file(tmp_path / "alone" / name / WEIGHTS)
        assert set(found) == set(expected)
        assert all(torch.equal(found[key], expected[key]) for key in found)
        if loaded is None:
            loaded = load(mlp, folder, adapter_name=name)
        else:
            loaded.load_adapter(folder, name)
        for other in (model, loaded):
            other.set_adapter(name)
            assert torch.equal(other(x), alone[name](x))
    model.set_adapter("default2")
    model.delete_adapter("default")
    assert not any(".default." in name for name, _ in model.named_buffers())
    model.save_pretrained(tmp_path / "after")
    assert torch.equal(load(mlp, tmp_path / "after" / "default2")(x), alone["default2"](x))


def test_a_compiled_model_draws_what_the_plain_one_draws(mlp):
    models = copy.deepcopy(mlp), torch.compile(copy.deepcopy(mlp), backend="eager")
    plain, compiled = (get_peft_model(model, TLoraConfig(target_modules=TARGETS)) for model in models)
    layers = plain.base_model._layers(), compiled.base_model._layers()
    for one, other in zip(*layers, strict=True):
        assert one.layer_name != other.layer_name
        assert torch.equal(one.tlora_A["default"], other.tlora_A["default"])


def test_adapters_of_one_seed_share_what_they_draw(mlp):
    model = tlora(mlp)
    model.add_adapter("same", TLoraConfig(target_modules=TARGETS, r=4, seed=7))
    model.add_adapter("other", TLoraConfig(target_modules=TARGETS, r=4, seed=8))
    up, gate = model.base_model.model.up, model.base_model.model.gate
    assert torch.equal(up.tlora_A["default"], up.tlora_A["same"])
    assert not torch.equal(up.tlora_A["default"], up.tlora_A["other"])
    assert not torch.equal(up.tlora_C["default"], gate.tlora_C["default"])


def test_an_adapter_replaced_by_one_of_another_seed_has_its_checksum(mlp, x, tmp_path):
    model = tlora(mlp)
    model.add_adapter("second", TLoraConfig(target_modules=TARGETS, r=4, seed=1))
    model.delete_adapter("second")
    model.add_adapter("second", TLoraConfig(target_modules=["conv"], r=2, seed=9))
    randomise(model, "second")
    model.set_adapter("second")
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    assert torch.equal(load(mlp, tmp_path / "second")(x), model(x))


def test_a_file_of_another_seed_is_not_put_over_an_adapter(mlp, tmp_path):
    """The adapter keeps the matrices of its own seed, which the file does not belong to."""
    tlora(mlp, seed=8).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="A and C of up come out otherwise"):
        tlora(mlp).load_adapter(tmp_path, "default")


# Which layers, which biases, which further modules


def test_ranks_by_pattern(bert, tmp_path):
    config = {"target_modules": ["query", "value"], "rank_pattern": {"layer.1.*query": 2}, "layers_to_transform": None}
    model = tlora(bert, **config)
    ranks = {name: layer.r["default"] for name, layer in model.named_modules() if hasattr(layer, "tlora_B")}
    assert sorted(ranks.values()) == [2, 4, 4, 4]
    assert model.get_nb_trainable_parameters()[0] == 3 * 17 + 5
    model.save_pretrained(tmp_path)
    ids = torch.arange(8)[None]
    assert torch.equal(load(bert, tmp_path)(ids).logits, model(ids).logits)


def test_single_layers_saved_modules_and_biases(bert, tmp_path):
    config = {"target_modules": ["query", "value"], "bias": "tlora_only"}
    model = tlora(bert, layers_to_transform=[1], modules_to_save=["classifier"], **config)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("layer.1." in name or "classifier" in name for name in trained)
    biases = {name for name in trained if name.endswith("base_layer.bias")}
    assert len(biases) == 2
    assert any("classifier.modules_to_save.default.weight" in name for name in trained)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in biases or "modules_to_save" in name:
                parameter.add_(0.5)
    model.save_pretrained(tmp_path)
    ids = torch.arange(8)[None]
    assert torch.equal(load(bert, tmp_path)(ids).logits, model(ids).logits)


# Merging


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_subtracted_update_stays_within_the_reported_bound(dtype, mlp):
    base = copy.deepcopy(mlp).to(dtype)
    model = tlora(base, undo="inverse")
    randomise(model, std=2.0, seed=2)
    apart = {}
    for _ in range(20):
        for report in model.merge_adapter():
            W = getattr(base, report.layer).weight.double()
            layer = getattr(model.base_model.model, report.layer)
            A, C = draw_projections(7, report.layer, *layer.matrix_shape, 4)
            B, scale = layer.tlora_B["default"].detach(), layer.tlora_scale["default"].detach()
            delta = tri_matrix_delta(A.double(), B.double(), C.double(), scale.double())
            expected = W + (delta.T if report.layer == "conv" else delta)
            merged = layer.base_layer.weight.double()
            assert report.condition == 1
            assert report.error_bound > 0
            apart[report.layer] = (merged - expected).norm().item()
            assert apart[report.layer] <= report.error_bound
        for report in model.unmerge_adapter():
            W = getattr(base, report.layer).weight.double()
            layer = getattr(model.base_model.model, report.layer)
            assert (layer.base_layer.weight.double() - W).norm() <= report.error_bound
            assert report.error_bound <= 41 * torch.finfo(dtype).eps * (W.norm() + 20)
    assert set(apart) == set(TARGETS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_that_scale_what_they_look_up(dtype):
    """Gemma multiplies its embeddings by √width, rounded to the weight's dtype; so is the update."""
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    torch.manual_seed(0)
    base = nn.Sequential(Gemma3TextScaledWordEmbedding(9, 6, 0, embed_scale=6**0.5))
    base[0].weight.data = base[0].weight.data.to(dtype)
    model = tlora(base, target_modules=["0"])
    randomise(model, std=1.0, seed=4)
    ids = torch.arange(9)[None]
    layer = model.base_model.model[0]
    A, C = draw_projections(7, "0", 6, 9, 4)
    B, scale = layer.tlora_B["default"], layer.tlora_scale["default"]
    update = torch.tensor(6**0.5).to(dtype).float() * (A @ (scale * B) @ C)[None]
    assert update.norm() > 0.05 * base(ids).norm()
    assert_close(layer._update(ids, *layer._matrices("default")), update)
    close = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
    assert_close(model(ids), (base(ids).float() + update).to(dtype), **close)
    assert_close(model.merge_and_unload()(ids), (base(ids).float() + update).to(dtype), **close)


# Training goes on where it stopped


def arguments(folder, steps):
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        save_steps=2,
        per_device_train_batch_size=2,
        learning_rate=0.05,
        lr_scheduler_type="constant",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


@pytest.mark.parametrize("save_projection", [False, True])
def test_the_trainer_resumes(save_projection, bert, tmp_path):
    rows = [{"input_ids": [1 + i, 2, 3, 4], "attention_mask": [1] * 4, "labels": i % 2} for i in range(8)]
    results = []
    for resumed in (False, True):
        config = TLoraConfig(r=4, target_modules=["query", "value"], save_projection=save_projection)
        model = get_peft_model(copy.deepcopy(bert), config)
        trainer = Trainer(model=model, args=arguments(tmp_path, 4), train_dataset=Dataset.from_list(rows))
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if resumed else None)
        results.append({name: p.detach().clone() for name, p in model.named_parameters() if "tlora_" in name})
    assert_close(results[1], results[0], rtol=0, atol=0)
    assert any(p.norm() > 0 for name, p in results[0].items() if "tlora_B" in name)
