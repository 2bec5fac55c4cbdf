"""Base models that are saved or tied in unusual ways, and what else lies in their folders."""

import json
from types import SimpleNamespace

import pytest
import torch
import transformers as t
from export_cases import assert_same, filled, logits
from safetensors.torch import load_file, save_file

from lorma import InputError, LormaConfig
from lorma.export import Base, Truncation, export_lora
from lorma.export.merge import merge
from lorma.export.verify import _image
from lorma.methods.bottleneck.tuner import BottleneckConfig

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
MASKED = {
    "bert": lambda: t.BertConfig(**SMALL),
    "roberta": lambda: t.RobertaConfig(**SMALL),
    "albert": lambda: t.AlbertConfig(**SMALL, embedding_size=16),
}
BATCH = {"input_ids": torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(0))}


@pytest.fixture
def saved(tmp_path):
    """``(auto class, configuration)`` → the base that was saved as such a model, and the model."""

    def save(auto, config):
        torch.manual_seed(0)
        model = getattr(t, auto).from_config(config)
        for parameter in model.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(tmp_path / "base")
        return Base(str(tmp_path / "base"), auto_model=auto), getattr(t, auto).from_pretrained(tmp_path / "base").eval()

    return save


@pytest.fixture
def merged(tmp_path):
    """``(base, model, adapter's configuration)`` → the adapted model, what was done, and the folder."""

    def make(base, model, config, **options):
        adapted = filled(model, config)
        adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
        return adapted, merge(tmp_path / "adapter", tmp_path / "merged", base, **options), tmp_path / "merged"

    return make


@pytest.mark.parametrize("kind", MASKED)
def test_trained_biases_of_a_masked_language_model_leave_its_weights_tied(kind, saved, merged):
    base, model = saved("AutoModelForMaskedLM", MASKED[kind]())
    adapted, done, folder = merged(base, model, LormaConfig(r=2, target_modules=["query"], bias="all"))
    assert done.difference < 1e-5
    again, report = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert again.config.tie_word_embeddings is True
    assert_same(logits(again.eval(), BATCH), logits(adapted, BATCH), logits(model, BATCH))


def test_where_one_tied_weight_comes_apart_all_are_written(saved, merged):
    base, model = saved("AutoModelForMaskedLM", MASKED["bert"]())
    adapted, _, folder = merged(base, model, LormaConfig(r=2, target_modules=["word_embeddings", "query"]))
    again, report = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert again.config.tie_word_embeddings is False
    assert {"cls.predictions.bias", "cls.predictions.decoder.bias"} <= load_file(folder / "model.safetensors").keys()
    assert_same(logits(again.eval(), BATCH), logits(adapted, BATCH), logits(model, BATCH))


@pytest.fixture
def resnet(tmp_path):
    """A ResNet without a head, whose last tensor counts batches, and its model with one of three labels."""
    torch.manual_seed(0)
    config = t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    t.ResNetModel(config).save_pretrained(tmp_path / "base")
    assert not hasattr(config, "image_size")
    auto = "AutoModelForImageClassification"
    model = t.AutoModelForImageClassification.from_pretrained(tmp_path / "base", num_labels=3).eval()
    return Base(str(tmp_path / "base"), auto_model=auto, model_kwargs={"num_labels": 3}), model


def test_a_new_head_is_not_of_the_type_of_a_counter(resnet, merged):
    base, model = resnet
    config = LormaConfig(r=2, target_modules=["convolution"], modules_to_save=["classifier"])
    adapted, done, folder = merged(base, model, config)
    assert done.difference < 1e-5
    held = load_file(folder / "model.safetensors")
    assert torch.int64 in {tensor.dtype for tensor in held.values()}
    assert held["classifier.1.weight"].dtype == torch.float32
    trained = adapted.base_model.model.classifier.modules_to_save["default"]
    assert torch.equal(held["classifier.1.weight"], trained[1].weight)


CLIP = {
    "text_config": {**SMALL, "projection_dim": 16},
    "vision_config": {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "image_size": 16,
        "patch_size": 8,
    },
}


def test_a_model_of_text_and_images_is_given_both(saved, merged):
    base, model = saved("AutoModel", t.CLIPConfig(**CLIP))
    _, done, _ = merged(base, model, LormaConfig(r=2, target_modules=["q_proj"]))
    assert done.difference < 1e-5
    assert done.note == ""


@pytest.mark.parametrize(
    ("config", "size"),
    [
        ({"image_size": 16}, (3, 16, 16)),
        ({"image_size": [16, 24], "num_channels": 1}, (1, 16, 24)),
        ({"image_size": {"height": 16}}, (3, 224, 224)),
        ({}, (3, 224, 224)),
    ],
)
def test_the_image_that_a_model_is_given(config, size):
    assert _image(SimpleNamespace(**config))["pixel_values"].shape == (1, *size)


def test_a_model_that_wants_other_inputs_is_merged_and_not_verified(saved, merged):
    config = t.VideoMAEConfig(
        **{key: value for key, value in SMALL.items() if key != "vocab_size"},
        image_size=16,
        patch_size=8,
        num_frames=2,
        num_labels=3,
    )
    base, model = saved("AutoModelForVideoClassification", config)
    _, done, folder = merged(base, model, LormaConfig(r=2, target_modules=["q_proj", "query"]))
    assert done.difference is None
    assert done.note.startswith("not verified: the adapted model cannot be run on pixel_values (")
    assert "\n" not in done.note
    assert (folder / "model.safetensors").is_file()


def test_generation_settings_of_an_older_checkpoint(saved, merged, tmp_path):
    config = t.BartConfig(
        vocab_size=64,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        decoder_start_token_id=2,
    )
    saved("AutoModelForSeq2SeqLM", config)
    folder = tmp_path / "base"
    (folder / "generation_config.json").unlink()
    old = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(old | {"num_beams": 4, "max_length": 50, "temperature": 0.5}))
    model = t.AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    assert model.generation_config.num_beams == 4
    base = Base(str(folder), auto_model="AutoModelForSeq2SeqLM")
    _, _, written = merged(base, model, LormaConfig(r=2, target_modules=["q_proj"]))
    again = t.AutoModelForSeq2SeqLM.from_pretrained(written).generation_config
    assert (again.num_beams, again.max_length, again.decoder_start_token_id) == (4, 50, 2)


def test_what_tokenizers_and_processors_need_is_taken_over(saved, merged, tmp_path):
    base, model = saved("AutoModelForMaskedLM", MASKED["bert"]())
    templates = tmp_path / "base" / "additional_chat_templates"
    templates.mkdir()
    (templates / "tool_use.jinja").write_text("{{ messages }}")
    names = """spm.model source.spm target.spm sentencepiece.model bpe.codes tekken.json
        video_preprocessor_config.json LICENSE""".split()
    for name in names:
        (tmp_path / "base" / name).write_text(name)
    (tmp_path / "base" / "modeling_own.py").write_text("")
    _, _, folder = merged(base, model, LormaConfig(r=2, target_modules=["query"]), verify=False)
    assert {name: (folder / name).read_text() for name in names} == {name: name for name in names}
    assert (folder / "additional_chat_templates" / "tool_use.jinja").read_text() == "{{ messages }}"
    assert not (folder / "modeling_own.py").exists()


@pytest.mark.parametrize("headed", [False, True], ids=["no-head", "head-of-two"])
def test_the_number_of_labels_is_that_of_the_trained_head(headed, tmp_path):
    torch.manual_seed(0)
    auto = t.AutoModelForSequenceClassification
    (auto if headed else t.AutoModel).from_config(t.BertConfig(**SMALL)).save_pretrained(tmp_path / "base")
    model = auto.from_pretrained(tmp_path / "base", num_labels=3, ignore_mismatched_sizes=True).eval()
    adapted = filled(model, LormaConfig(r=2, task_type="SEQ_CLS", target_modules=["query", "value"]))
    adapted.save_pretrained(tmp_path / "adapter")
    done = merge(tmp_path / "adapter", tmp_path / "merged", Base(str(tmp_path / "base")))
    assert done.difference < 1e-5
    again = auto.from_pretrained(tmp_path / "merged").eval()
    assert again.config.num_labels == 3
    assert_same(logits(again, BATCH), logits(adapted, BATCH), logits(model, BATCH))
    export_lora(tmp_path / "adapter", tmp_path / "lora", base=Base(str(tmp_path / "base")))
    assert len(load_file(tmp_path / "lora" / "adapter_model.safetensors")["base_model.model.classifier.bias"]) == 3
    named = Base(str(tmp_path / "base"), model_kwargs={"num_labels": 4})
    with pytest.raises(InputError, match=r"classifier.bias is \(3,\) in the adapter and \(4,\) in the model"):
        export_lora(tmp_path / "adapter", tmp_path / "lora", base=named, overwrite=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_embedding_adapted_on_a_base_that_was_loaded_in_half_precision(dtype, bases, tmp_path):
    folder, _, _ = bases["llama"]
    half = t.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    filled(half, LormaConfig(r=2, target_modules=["embed_tokens", "q_proj"])).save_pretrained(
        tmp_path / "adapter", save_embedding_layers=True
    )
    copy = "base_model.model.model.embed_tokens.base_layer.weight"
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert tensors[copy].dtype == dtype
    base = Base(str(folder), auto_model="AutoModelForCausalLM")
    assert merge(tmp_path / "adapter", tmp_path / "merged", base).difference < 1e-4
    export_lora(tmp_path / "adapter", tmp_path / "lora", base=base)
    tensors[copy][3, 5] *= 1.02
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(InputError, match="it is not the base model's"):
        merge(tmp_path / "adapter", tmp_path / "other", base)


def test_bottleneck_adapters_are_refused_at_once(bases, tmp_path):
    folder, model, _ = bases["llama"]
    filled(model, BottleneckConfig(task_type="CAUSAL_LM", target_modules=["down_proj"])).save_pretrained(
        tmp_path / "adapter"
    )
    base = Base(str(folder))
    for options in ({}, {"truncation": Truncation(4)}):
        with pytest.raises(InputError, match="not linear: it can be neither exported nor merged"):
            export_lora(tmp_path / "adapter", tmp_path / "out", base=base, **options)
    with pytest.raises(InputError, match="not linear: it can be neither exported nor merged"):
        merge(tmp_path / "adapter", tmp_path / "out", base)
    assert [entry.name for entry in tmp_path.iterdir()] == ["adapter"]
