"""Model cards: written with the adapter, kept up to date, and a person's own words left alone."""

import pytest
import torch
from helpers import TARGETS, adapted
from huggingface_hub import ModelCard
from peft import get_peft_model

from lorma import LormaConfig, TLoraConfig
from lorma.adapters.kinds import kind_of


@pytest.mark.parametrize(
    ("config", "title", "equation", "exact"),
    [
        (LormaConfig(), "LoRMA", "(I + s·BA)·W0", True),
        (LormaConfig(side="post"), "LoRMA", "W0·(I + s·BA)", True),
        (LormaConfig(side="auto"), "LoRMA", "on the narrower side", True),
        (LormaConfig(inflation="permutation"), "LoRMA", "s·Iπ(BA)·W0", False),
        (LormaConfig(inflation="none"), "LoRMA", "`W = s·BA·W0`", False),
        (LormaConfig(use_dora=True), "DoRMA", "rescaled to a trained magnitude", False),
        (TLoraConfig(), "TLoRA", "W0 + α·(A·B·C)ᵀ", True),
    ],
)
def test_the_card_says_what_the_adapter_is(config, title, equation, exact, mlp, tmp_path):
    config.target_modules = {"up", "gate"}
    get_peft_model(mlp, config).save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert f"# {title} adapter for the base model" in text
    assert equation in text
    assert "More Information Needed" not in text
    assert "| layers | `gate, up` |" in text
    assert "import lorma, peft, transformers" in text
    assert ("lorma export THIS_FOLDER --format lora" in text) is exact is (kind_of(config).not_lora(config) is None)
    assert "lorma merge THIS_FOLDER" in text
    assert "### Framework versions" in text
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "peft"
    assert {"lorma", title.lower()} <= set(card.data.tags)
    assert kind_of(config).equation(config) in card.text


def test_saving_again_updates_the_card(mlp, tmp_path):
    adapted(mlp, r=2).save_pretrained(tmp_path)
    first = (tmp_path / "README.md").read_text()
    adapted(mlp, r=2).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == first
    adapted(mlp, r=3, rank_pattern={"up": 2}).save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "| rank | 3 (others by layer) |" in text
    assert "| rank | 2 |" not in text
    assert text.count("## Without lorma") == 1


def test_what_a_person_wrote_stays(mlp, tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n\nAll about it.\n")
    adapted(mlp).save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert "# Mine" in card.text
    assert "## Without lorma" not in card.text
    assert card.data.license == "mit"
    path = tmp_path / "second"
    adapted(mlp).save_pretrained(path)
    path.joinpath("README.md").write_text(path.joinpath("README.md").read_text() + "\n## My remarks\n\nGood.\n")
    adapted(mlp, r=3).save_pretrained(path)
    text = path.joinpath("README.md").read_text()
    assert "## My remarks" in text
    assert "| rank | 3 |" in text


def test_several_adapters_and_a_configuration_alone(mlp, tmp_path):
    model = adapted(mlp)
    model.add_adapter("second", LormaConfig(r=5, target_modules=TARGETS))
    model.save_pretrained(tmp_path)
    assert "| rank | 8 |" in (tmp_path / "README.md").read_text()
    assert "| rank | 5 |" in (tmp_path / "second" / "README.md").read_text()
    LormaConfig(r=4).save_pretrained(tmp_path / "alone")
    assert "| rank | 4 |" in (tmp_path / "alone" / "README.md").read_text()


def test_the_code_on_the_card_loads_the_adapter(tmp_path):
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    BertForSequenceClassification(BertConfig(vocab_size=30, **sizes)).save_pretrained(tmp_path / "base")
    base = BertForSequenceClassification.from_pretrained(tmp_path / "base")
    model = adapted(base, target_modules=["query"], task_type="SEQ_CLS")
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    code = (tmp_path / "adapter" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert str(tmp_path / "base") in code
    names = {}
    exec(code.replace("THIS_FOLDER", str(tmp_path / "adapter")), names)
    ids = torch.arange(5)[None]
    torch.testing.assert_close(names["model"].eval()(ids).logits, model(ids).logits)


def code_of(card):
    """The Python on a card."""
    return [block.split("```")[0] for block in card.read_text().split("```python\n")[1:]]


@pytest.mark.parametrize("task", ["three classes", "regression"])
@pytest.mark.parametrize("method", ["lorma-plus", "lora"])
def test_the_code_on_a_runs_card_has_as_many_outputs(task, method, recipe_file, tmp_path, cli):
    rows = [
        f"the {word} film,{value}" for word, value in zip(["great", "dull", "fine"] * 8, [0, 1, 2] * 8, strict=True)
    ]
    data = tmp_path / "rows.csv"
    data.write_text("\n".join(["text,label", *rows]) + "\n")
    name = "regression" if task == "regression" else "classification"
    done = cli("train", recipe_file(task=name, data={"train": str(data), "max_length": 8}, method=method))
    assert done.code == 0, done.err
    adapter, lora = tmp_path / "run" / "adapter", tmp_path / "lora"
    blocks = code_of(adapter / "README.md")
    if method == "lorma-plus":
        assert cli("export", adapter, "-o", lora).code == 0
        blocks += code_of(lora / "README.md")
        assert "import lorma" not in blocks[-1]
    assert len(blocks) == (3 if method == "lorma-plus" else 1)
    answers = []
    for block, folder in zip(blocks, (adapter, adapter, lora), strict=False):
        names = {}
        exec(block.replace("THIS_FOLDER", str(folder)).replace("LORA_FOLDER", str(lora)), names)
        answers.append(names["model"].eval()(torch.arange(5)[None]).logits)
    assert answers[0].shape == (1, 1 if task == "regression" else 3)
    for answer in answers[1:]:
        torch.testing.assert_close(answer, answers[0], rtol=1e-4, atol=1e-5)
    assert ModelCard.load(adapter / "README.md").data.base_model is None


def test_the_card_claims_no_folder_as_the_name_on_the_hub(mlp, tmp_path):
    for name, claimed in (("organisation/model", True), ("gpt2", True), (str(tmp_path), False), ("/gone/base", False)):
        config = LormaConfig(target_modules=TARGETS, base_model_name_or_path=name)
        config.save_pretrained(tmp_path / "adapter")
        card = ModelCard.load(tmp_path / "adapter" / "README.md")
        assert card.data.base_model == (name if claimed else None)
        assert f"from_pretrained({name!r})" in card.text


def test_a_run_adds_its_recipe_and_metrics(recipe_file, tmp_path, cli, read_json):
    assert cli("train", recipe_file()).code == 0
    text = (tmp_path / "run" / "adapter" / "README.md").read_text()
    accuracy = read_json(tmp_path / "run" / "summary.json")["final_metrics"]["accuracy"]
    assert f"| accuracy | {accuracy:.6g} |" in text
    assert "method: lorma-plus" in text
    assert "train: reviews.csv" in text
    assert "output:" not in text
