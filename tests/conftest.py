"""Tiny base models on disk, data files, and a way to call the command line."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# One thread a worker: tests run side by side, and threads that wait for each other's cores cost more than they give.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["COLUMNS"] = "200"

settings.register_profile("lorma", deadline=None, derandomize=True)
settings.load_profile("lorma")

WORDS = """
    a an the film movie plot cast good bad fine dull bright slow great poor is was and not very so what is one plus
    two three four five six equals question answer user assistant system : . , ? + = 1 2 3 4 5 6 7 8 9
""".split()
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' : ' + m['content'] + ' <eos> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}"
)


def _save_tokenizer(folder: Path) -> int:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "<unk>"]
    vocabulary = {word: i for i, word in enumerate([*special, *dict.fromkeys(WORDS)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=64
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    return len(vocabulary)


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory):
    """A BERT of two thin layers with random weights, saved like any other model."""
    folder = tmp_path_factory.mktemp("tiny-bert")
    save_tiny_bert(folder)
    return folder


def save_tiny_bert(folder: Path) -> None:
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    size = _save_tokenizer(folder)
    config = BertConfig(
        vocab_size=size, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48
    )
    BertModel(config).save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    """A Llama of two thin layers with random weights and a chat template."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny-llama")
    torch.manual_seed(0)
    size = _save_tokenizer(folder)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def reviews(tmp_path):
    """Sixty labelled sentences in a CSV file."""
    rows = [
        f"the {noun} was {word},{label}" for word, label in (("great", "good"), ("dull", "bad")) for noun in WORDS[3:33]
    ]
    path = tmp_path / "reviews.csv"
    path.write_text("text,label\n" + "\n".join(rows) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def recipe_file(tmp_path, tiny_bert, reviews):
    """Writes a recipe that trains in a second; keyword arguments replace whole sections or values."""

    def write(name="recipe.yaml", **changes):
        from lorma.yaml_text import dump_yaml

        content = {
            "task": "classification",
            "model": {"name": str(tiny_bert)},
            "data": {"train": str(reviews), "max_length": 16},
            "method": "lorma-plus",
            "adapter": {"r": 2},
            "train": {"epochs": 1, "batch_size": 8, "learning_rate": 0.01},
            "output": str(tmp_path / "run"),
        }
        content.update(changes)
        path = tmp_path / name
        path.write_text(dump_yaml(content), encoding="utf-8")
        return path

    return write


@pytest.fixture
def cli(capsys, monkeypatch):
    """Calls ``lorma`` in this process: ``cli("train", recipe)`` → exit code, output, errors."""
    from helpers_cli import run_cli

    return lambda *arguments: run_cli(capsys, monkeypatch, *arguments)


@pytest.fixture
def read_json():
    return lambda path: json.loads(Path(path).read_text(encoding="utf-8"))
