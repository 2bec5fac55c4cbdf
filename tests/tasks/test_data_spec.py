import pytest
from pydantic import ValidationError

from lorma.errors import InputError
from lorma.tasks import TASKS, DataSpec, get_task


def test_labels_are_spelled_as_in_the_data() -> None:
    assert DataSpec(train="x.csv", labels=[0, 1.0, True, "maybe "]).labels == ["0", "1", "true", "maybe"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"trian": "x"}, "Extra inputs"),
        ({"eval_fraction": 1.0}, "less than 1"),
        ({"labels": ["a"]}, "at least 2"),
        ({"labels": ["a", "b", "a"]}, "'a' is listed twice"),
        ({"labels": ["a", None]}, "a class name is empty"),
        ({"labels": ["a", 0.5]}, "0.5 cannot name a class"),
        ({"column_names": ["a", "a"]}, "'a' is listed twice"),
        ({"prompt": "question"}, "prompt needs completion"),
        ({"completion": "answer"}, "completion needs prompt"),
        ({"text": "t", "messages": "m"}, "text and messages exclude each other"),
        ({"text": "a", "label": "a"}, "text and label are both the column 'a'; give each a column of its own"),
        ({"text": "a", "text_pair": "a"}, "text and text_pair are both the column 'a'"),
        ({"text_pair": "a", "label": "a"}, "text_pair and label are both the column 'a'"),
        ({"prompt": "a", "completion": "a"}, "prompt and completion are both the column 'a'"),
        ({"max_length": 1}, "greater than or equal to 8"),
        ({"train": ""}, "at least 1 character"),
    ],
)
def test_bad_sections(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DataSpec.model_validate({"train": "x.csv", **fields})


def test_get_task_knows_every_name() -> None:
    assert [get_task(name).name for name in TASKS] == ["classification", "regression", "causal-lm"]
    with pytest.raises(InputError, match=r"task: 'clasification' is unknown; .* did you mean 'classification'\?"):
        get_task("clasification")
