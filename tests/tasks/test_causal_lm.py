import copy
import json
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from lorma.errors import InputError
from lorma.tasks import CausalLM, DataSpec, Prepared

Write = Callable[[str, str | bytes], str]
PAIR = {"prompt": "q", "completion": "a"}


def prepare(tokenizer: PreTrainedTokenizerBase, path: str, **fields: object) -> Prepared:
    return CausalLM().prepare(DataSpec.model_validate({"train": path, "eval": path, **fields}), tokenizer)


def jsonl(write: Write, rows: list[dict[str, object]]) -> str:
    return write("a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def learned(tokenizer: PreTrainedTokenizerBase, row: dict[str, list[int]]) -> str:
    return str(tokenizer.decode([label for label in row["labels"] if label != -100]))


def chat(*turns: tuple[str, str]) -> dict[str, object]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


visible = st.text(min_size=1, max_size=30).filter(lambda t: t.strip() != "" and "\x00" not in t)


@pytest.mark.parametrize(("bos", "eos"), [(False, False), (True, False), (True, True)])
@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pairs=st.lists(st.tuples(visible, visible), min_size=1, max_size=4))
def test_exactly_the_prompt_is_masked(
    write: Write, make_tokenizer: Callable[..., Any], bos: bool, eos: bool, pairs: list[tuple[str, str]]
) -> None:
    tokenizer = make_tokenizer(bos, eos)
    made = prepare(tokenizer, jsonl(write, [{"q": q, "a": a} for q, a in pairs]), **PAIR)
    for row, (question, answer) in zip(made.train, pairs, strict=True):
        masked = len(question.encode()) + bos
        assert row["labels"][:masked] == [-100] * masked
        assert row["labels"][masked:] == row["input_ids"][masked:]
        assert row["input_ids"][-1] == tokenizer.eos_token_id
        assert row["input_ids"].count(tokenizer.eos_token_id) == 1
        assert tokenizer.decode(row["input_ids"][masked:-1]) == answer
        prompt = CausalLM().encode([{"q": question}], made.meta, tokenizer)
        assert prompt["input_ids"][0].tolist() == row["input_ids"][:masked]


def test_plain_text_is_learned_whole(write: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    made = prepare(tokenizer, write("a.csv", "text\nhello\n"))
    assert made.train[0]["labels"] == made.train[0]["input_ids"]
    assert tokenizer.decode(made.train[0]["input_ids"]) == "hello</s>"
    assert (made.meta["format"], made.compute_metrics, made.model_kwargs) == ("text", None, {})


def test_batches_are_padded_on_the_right(write: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.padding_side = "left"
    made = prepare(tokenizer, write("a.csv", "q,a\nab,c\na,b\n"), **PAIR)
    batch = made.collator([made.train[i] for i in range(2)])
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch["labels"][1].tolist()[-1] == -100
    assert batch["labels"][1].tolist()[0] == -100
    prompts = CausalLM().encode([{"q": "ab"}, {"q": "a"}], made.meta, tokenizer)
    assert prompts["attention_mask"].tolist() == [[1, 1], [0, 1]]


def test_rows_without_loss_are_dropped_and_counted(write: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write("a.csv", "q,a\nlong enough,x\nshort,answer\n")
    made = prepare(tokenizer, path, max_length=8, **PAIR)
    assert (made.meta["dropped_train"], made.meta["train_rows"]) == (1, 1)
    assert learned(tokenizer, made.train[0]) == "ans"
    hopeless = write("b.csv", "q,a\nlong enough,x\n")
    with pytest.raises(InputError, match=r"data\.max_length: within 8 tokens no row of data\.eval has anything"):
        prepare(tokenizer, path, eval=hopeless, max_length=8, **PAIR)


def test_only_the_assistant_is_learned(write: Write, chat_tokenizer: PreTrainedTokenizerBase) -> None:
    row = chat(("system", "Be é."), ("user", "Hi"), ("assistant", "\nYo é"), ("user", "So?"), ("assistant", "Bye"))
    made = prepare(chat_tokenizer, jsonl(write, [row]), messages="messages")
    assert learned(chat_tokenizer, made.train[0]) == "\nYo é</s>\nBye</s>\n"
    whole = chat_tokenizer.apply_chat_template(row["messages"], tokenize=True)["input_ids"]
    assert made.train[0]["input_ids"] == whole
    prompt = CausalLM().encode([{"messages": row["messages"][:2]}], made.meta, chat_tokenizer)
    assert chat_tokenizer.decode(prompt["input_ids"][0]) == "<|system|>Be é.</s>\n<|user|>Hi</s>\n<|assistant|>"


def test_a_template_that_rewrites_turns_is_refused(write: Write, chat_tokenizer: PreTrainedTokenizerBase) -> None:
    chat_tokenizer.chat_template = "{% for m in messages %}{{ m.content if loop.last else '-' }}{% endfor %}"
    path = jsonl(write, [chat(("user", "Hi"), ("assistant", "Yo"))])
    with pytest.raises(
        InputError, match=r"data\.messages: .* row 1: the tokenizer's chat template renders message 2 dif"
    ):
        prepare(chat_tokenizer, path, messages="messages")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (chat(("user", "Hi")), r"data\.messages: column 'messages' of data\.train row 1 needs an assistant message"),
        (chat(("assistant", "Hi")), "needs an assistant message after at least one other"),
        (
            chat(("user", "Hi"), ("asistant", "x")),
            r"message 2: role is 'asistant'; allowed: .* did you mean 'assistant'",
        ),
        ({"messages": []}, r"row 1 is \[\]; allowed: a list of messages"),
        ({"messages": "Hi"}, "row 1 is text, not a list of messages"),
        ({"messages": [{"role": "user"}]}, "message 1: content is None; allowed: text"),
    ],
)
def test_unusable_chats(
    write: Write, chat_tokenizer: PreTrainedTokenizerBase, row: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        prepare(chat_tokenizer, jsonl(write, [row]), messages="messages")


def test_template_problems(write: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    path = jsonl(write, [chat(("user", "Hi"), ("assistant", "Yo"))])
    with pytest.raises(InputError, match=r"data\.messages: the tokenizer has no chat template"):
        prepare(tokenizer, path, messages="messages")
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InputError, match="the chat template refuses it: roles must alternate"):
        prepare(tokenizer, path, messages="messages")


def test_fields_of_other_tasks(write: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write("a.csv", "q,a\nx, \n")
    with pytest.raises(InputError, match=r"data\.label: 'a' does not apply to the task 'causal-lm'; allowed: prompt"):
        prepare(tokenizer, path, label="a")
    with pytest.raises(InputError, match=r"data\.completion: column 'a' is empty in data\.train row 1"):
        prepare(tokenizer, path, **PAIR)


TOOL_TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
    "{% for m in messages %}<|{{ m['role'] }}|>{% if think is defined %}[{{ think }}]{% endif %}"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m['content'] }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def call(name: str, **arguments: object) -> dict[str, object]:
    return {"type": "function", "id": "c1", "function": {"name": name, "arguments": arguments}}


def tool_row(content: object = None, **more: object) -> dict[str, object]:
    asked = {"role": "assistant", "content": content, "tool_calls": [call("weather", city="Riga")], **more}
    answer = {"role": "tool", "content": "7 C", "tool_call_id": "c1"}
    return {"messages": [{"role": "user", "content": "Riga?"}, asked, answer, {"role": "assistant", "content": "7"}]}


@pytest.fixture
def tool_tokenizer(chat_tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    chat_tokenizer.chat_template = TOOL_TEMPLATE
    return chat_tokenizer


@pytest.mark.parametrize("content", [None, ""])
def test_tool_calls_are_learned(write: Write, tool_tokenizer: PreTrainedTokenizerBase, content: object) -> None:
    other = tool_row(content)
    other["messages"][1]["tool_calls"] = [call("time", zone="EET", unit=None)]  # type: ignore[index]
    path = jsonl(write, [tool_row(content, reasoning_content="hm"), other])
    made = prepare(tool_tokenizer, path, messages="messages", max_length=400)
    texts = [learned(tool_tokenizer, row) for row in made.train]
    assert texts[0] == '<think>hm</think><call>{"name": "weather", "arguments": {"city": "Riga"}}</call></s>\n7</s>\n'
    assert texts[1] == '<call>{"name": "time", "arguments": {"zone": "EET", "unit": null}}</call></s>\n7</s>\n'


def test_tools_and_variables_come_from_their_columns(write: Write, tool_tokenizer: PreTrainedTokenizerBase) -> None:
    schema = {"name": "weather", "parameters": {"city": {"type": "string"}}}
    row = {**tool_row(), "tools": [schema], "chat_template_kwargs": {"think": "no"}}
    made = prepare(tool_tokenizer, jsonl(write, [row, tool_row()]), messages="messages", max_length=400)
    first, second = (tool_tokenizer.decode(row["input_ids"]) for row in made.train)
    assert first.startswith("<tools>" + json.dumps([schema]) + "</tools><|user|>[no]Riga?")
    assert second.startswith("<|user|>Riga?")
    asked = {**row, "messages": row["messages"][:3]}  # type: ignore[index]
    for tools in (row["tools"], json.dumps(row["tools"])):
        ids = CausalLM().encode([{**asked, "tools": tools}], made.meta, tool_tokenizer)["input_ids"][0]
        assert first.startswith(tool_tokenizer.decode(ids))


def test_tool_calls_from_parquet_have_their_own_keys_only(
    tool_tokenizer: PreTrainedTokenizerBase, tmp_path: Any
) -> None:
    other = tool_row()
    other["messages"][1]["tool_calls"] = [call("time", zone="EET")]  # type: ignore[index]
    pq.write_table(pa.table({"messages": [r["messages"] for r in (tool_row(), other)]}), tmp_path / "a.parquet")
    made = prepare(tool_tokenizer, str(tmp_path / "a.parquet"), messages="messages", max_length=400)
    assert '{"name": "time", "arguments": {"zone": "EET"}}' in learned(tool_tokenizer, made.train[1])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (tool_row(name="Ann"), "row 1, message 2: .* ignores the field 'name' of the role 'assistant'"),
        ({**tool_row(), "documents": [{"text": "x"}]}, "row 1: .* ignores the column 'documents'"),
        ({**tool_row(), "tools": "weather"}, "row 1, column 'tools' is text, not a list of objects"),
        ({**tool_row(), "tools": {"a": 1}}, r"column 'tools' is \{'a': 1\}; allowed: a list of objects"),
        ({**tool_row(), "chat_template_kwargs": {"thin": 1}}, "'thin' is no variable .* did you mean 'think'"),
        (tool_row([{"type": "text", "text": "hm"}]), "message 2: .* does not take a list of parts"),
        (tool_row([{"type": "image"}]), "message 2: content is .* allowed: text, a list of text parts"),
        ({"messages": '[{"role": "user", "content": "\\ud83d"}]'}, r"row 1 holds \\ud83d, which is half a character"),
    ],
)
def test_what_the_template_would_lose_is_refused(
    write: Write, tool_tokenizer: PreTrainedTokenizerBase, row: dict[str, object], message: str
) -> None:
    path = jsonl(write, [row])
    with pytest.raises(InputError, match=message):
        prepare(tool_tokenizer, path, messages="messages")


def test_a_template_without_tool_calls_refuses_them(write: Write, chat_tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(
        InputError, match=r"row 1, message 2: .* ignores the field 'tool_calls' of the role 'assistant'"
    ):
        prepare(chat_tokenizer, jsonl(write, [tool_row()]), messages="messages")
    meta = {"format": "messages", "messages": "messages"}
    with pytest.raises(InputError, match="row to predict, message 2: .* ignores the field 'tool_calls'"):
        CausalLM().encode([tool_row()], meta, chat_tokenizer)


def test_parts_go_to_a_template_that_takes_them(write: Write, chat_tokenizer: PreTrainedTokenizerBase) -> None:
    chat_tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{% for p in m.content %}{{ p.text }}{% endfor %}</s>{% endfor %}"
    )
    row = {
        "messages": [
            {"role": r, "content": [{"type": "text", "text": t}]} for r, t in (("user", "a"), ("assistant", "b"))
        ]
    }
    made = prepare(chat_tokenizer, jsonl(write, [row]), messages="messages")
    assert learned(chat_tokenizer, made.train[0]) == "<|assistant|>b</s>"


def test_a_template_that_leaves_a_role_out_refuses_it(write: Write, chat_tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] in ['user', 'assistant'] %}{{ m['role'] + ' : ' + m['content'] }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}"
    )
    said = [{"role": role, "content": "hi"} for role in ("system", "user", "assistant")]
    path = jsonl(write, [{"messages": said}])
    with pytest.raises(InputError, match="message 1: .* ignores the field 'content' of the role 'system'"):
        prepare(tokenizer, path, messages="messages")
