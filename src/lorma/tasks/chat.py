"""Chat rows: checking them and finding, in what the chat template makes of them, the assistant's part.

The template is rendered once for the whole conversation and once up to each end of an assistant turn. When every
shorter rendering is the beginning of the whole one, the assistant's characters are known exactly; tokenising the
whole rendering once then gives the very tokens the model sees in use, and a token belongs to the assistant when its
first character does. Templates that rewrite earlier turns (some drop earlier "thinking") fail this test and are
refused: a wrong mask would train the model on the user's words without anybody noticing.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from lorma.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = ("system", "user", "assistant", "tool")
Span = tuple[int, int]


def check_messages(value: object, place: str) -> list[dict[str, str]]:
    """``value`` as a list of ``{"role", "content"}``; a JSON text of such a list will do.

    Raises:
        InputError: beginning with ``place``, what is wrong with it.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise InputError(f"{place} is text, not a list of messages") from error
    if not isinstance(value, list) or not value:
        raise InputError(f"{place} is {value!r}; allowed: a list of messages with role and content")
    for number, message in enumerate(value, start=1):
        role = message.get("role") if isinstance(message, dict) else None
        content = message.get("content") if isinstance(message, dict) else None
        if role not in ROLES:
            hint = did_you_mean(role, ROLES) if isinstance(role, str) else ""
            raise InputError(f"{place}, message {number}: role is {role!r}; allowed: {', '.join(ROLES)}{hint}")
        if not isinstance(content, str):
            raise InputError(f"{place}, message {number}: content is {content!r}; allowed: text")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def render(
    messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, place: str, generation: bool = False
) -> str:
    """The conversation as the tokenizer's chat template writes it, with ``generation`` up to the assistant's turn."""
    from jinja2.exceptions import TemplateError

    if not tokenizer.chat_template:
        raise InputError("data.messages: the tokenizer has no chat template; use a chat model or prompt + completion")
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)
    except (TemplateError, ValueError) as error:
        raise InputError(f"{place}: the chat template refuses it: {str(error).splitlines()[0]}") from error
    assert isinstance(text, str)
    return text


def assistant_spans(
    messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, place: str
) -> tuple[str, list[Span]]:
    """The rendered conversation and the [start, end) characters of what the assistant says, end marks included.

    Raises:
        InputError: no assistant turn, nothing before the first one, or a template that is not prefix-stable.
    """
    whole = render(messages, tokenizer, place)
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns or turns[0] == 0:
        raise InputError(f"{place} needs an assistant message after at least one other")
    spans = []
    for turn in turns:
        before = render(messages[:turn], tokenizer, place, generation=True)
        after = render(messages[: turn + 1], tokenizer, place)
        if not (whole.startswith(after) and after.startswith(before)):
            raise InputError(
                f"{place}: the tokenizer's chat template renders message {turn + 1} differently inside the whole "
                "conversation, so its tokens cannot be told apart; use prompt + completion"
            )
        spans.append((len(before), len(after)))
    return whole, spans


def encode_chats(
    texts: list[str], spans: list[list[Span]], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of rendered conversations, and labels: the same ids inside ``spans``, −100 outside."""
    if not tokenizer.is_fast:
        raise InputError("data.messages: needs a fast tokenizer, one that reports the characters of each token")
    batch: dict[str, Any] = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    labels = [
        [token if any(a <= start < b for a, b in own) else -100 for token, (start, _) in zip(ids, offsets, strict=True)]
        for ids, offsets, own in zip(batch["input_ids"], batch["offset_mapping"], spans, strict=True)
    ]
    return batch["input_ids"], labels
