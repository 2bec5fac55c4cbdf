"""Chat rows: checking them and finding, in what the chat template makes of them, the assistant's part.

The template is rendered once for the whole conversation and once up to each end of an assistant turn. When every
shorter rendering is the beginning of the whole one, the assistant's characters are known exactly; tokenising the
whole rendering once then gives the very tokens the model sees in use, and a token belongs to the assistant when its
first character does. Templates that rewrite earlier turns (some drop earlier "thinking") fail this test and are
refused: a wrong mask would train the model on the user's words without anybody noticing.

Everything in a message and in the columns of :data:`TEMPLATE_COLUMNS` goes to the template as it stands in the data.
What the template does not write would be missing from training without anybody noticing, so that is refused as well:
a field of a role counts as written when the conversation up to its message reads differently without it.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lorma.errors import InputError, did_you_mean, one_line
from lorma.tasks.files import half_character

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedTokenizerBase

ROLES = ("system", "user", "assistant", "tool")
TEMPLATE_COLUMNS = {"tools": list, "documents": list, "chat_template_kwargs": dict}
"""Columns that belong to a conversation, as in TRL: what the assistant may call, what it may cite, and variables of
the template by name (``enable_thinking``, …)."""
IDENTITIES = ("id", "tool_call_id")
"""Fields that only tie a tool's answer to its call; a template need not write them."""
_GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
"""transformers' own statement, which plain jinja does not know."""
Message = dict[str, Any]
Span = tuple[int, int]


def check_messages(value: object, place: str) -> list[Message]:
    """``value`` as a list of messages with all their fields; a JSON text of such a list will do.

    Each has a ``role`` and ``content``: text, or a list of parts ``{"type": "text", "text"}``. Content may be null or
    absent in a message with ``tool_calls``, and is null then. Other fields that are null are left out, at any depth
    where Arrow put them.

    Raises:
        InputError: beginning with ``place``, what is wrong with it.
    """
    value = _unpacked(value, place, "a list of messages")
    if not isinstance(value, list) or not value:
        raise InputError(f"{place} is {value!r}; allowed: a list of messages with role and content")
    messages: list[Message] = []
    for number, message in enumerate(value, start=1):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ROLES:
            hint = did_you_mean(role, ROLES) if isinstance(role, str) else ""
            raise InputError(f"{place}, message {number}: role is {role!r}; allowed: {', '.join(ROLES)}{hint}")
        content = message.get("content")
        if not isinstance(content, str) and not _text_parts(content) and not (content is None and _calls(message)):
            raise InputError(
                f"{place}, message {number}: content is {content!r}; allowed: text, a list of text parts, or nothing "
                "beside tool_calls"
            )
        fields = {name: item for name, item in message.items() if item is not None}
        messages.append({"role": role, "content": content, **fields})
    return messages


def _text_parts(content: object) -> bool:
    return (
        isinstance(content, list)
        and bool(content)
        and all(isinstance(part, dict) and part.get("type") == "text" for part in content)
        and all(isinstance(part.get("text"), str) for part in content)
    )


def _calls(message: Mapping[str, Any]) -> bool:
    return message["role"] == "assistant" and bool(message.get("tool_calls"))


def _unpacked(value: object, place: str, kind: str) -> Any:
    """``value``, parsed where it is JSON text, without the empty places that Arrow adds where it is not."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise InputError(f"{place} is text, not {kind}") from error
        if half := half_character(value):
            raise InputError(f"{place} holds {half}, which is half a character, so no Unicode text")
        return value
    return _without_nulls(value)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


@dataclass
class ChatTemplate:
    """A tokenizer's chat template, and which fields it has been seen to write.

    Raises:
        InputError: on construction, the tokenizer has none.
    """

    tokenizer: PreTrainedTokenizerBase
    _written: set[tuple[str, str]] = field(default_factory=set)

    def __post_init__(self) -> None:
        if not self.tokenizer.chat_template:
            raise InputError(
                "data.messages: the tokenizer has no chat template; use a chat model or prompt + completion"
            )

    def conversation(self, row: Mapping[str, Any], column: str, place: str) -> Conversation:
        """The conversation in ``column`` of a row, with what the row's :data:`TEMPLATE_COLUMNS` add to it.

        Raises:
            InputError: beginning with ``place``, messages or columns that cannot be used, or that the template ignores.
        """
        messages = check_messages(row.get(column), place)
        extras: dict[str, Any] = {}
        for name, kind in TEMPLATE_COLUMNS.items():
            value = None if name == column else row.get(name)
            if value is None or value == "":
                continue
            allowed = "a list of objects" if kind is list else "an object"
            spot = f"{place}, column {name!r}"
            value = _unpacked(value, spot, allowed)
            if not isinstance(value, kind) or (kind is list and not all(isinstance(item, dict) for item in value)):
                raise InputError(f"{spot} is {value!r}; allowed: {allowed}")
            if kind is dict:
                extras.update(self._variables(value, extras, spot))
            elif value:
                extras[name] = value
        chat = Conversation(self, messages, extras, place)
        chat.settle_contents()
        self._check_written(chat)
        return chat

    def _variables(self, values: dict[str, Any], extras: dict[str, Any], place: str) -> dict[str, Any]:
        from jinja2 import Environment, meta
        from jinja2.exceptions import TemplateError

        template = self.tokenizer.get_chat_template(tools=extras.get("tools"))
        try:
            known = meta.find_undeclared_variables(
                Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_GENERATION.sub("", template))
            )
        except TemplateError:
            known = set(values)
        known -= {"messages", "add_generation_prompt", "tools", "documents"}
        for name in values:
            if name not in known:
                raise InputError(
                    f"{place}: {name!r} is no variable of the tokenizer's chat template{did_you_mean(name, known)}"
                )
        return values

    def _check_written(self, chat: Conversation) -> None:
        """Refuse a field that the template ignores. One look for each field of each role, as soon as it has a value."""
        for name in ("tools", "documents"):
            if name in chat.extras and ("", name) not in self._written:
                rest = {key: value for key, value in chat.extras.items() if key != name}
                if not _differ(chat, Conversation(self, chat.messages, rest, chat.place)):
                    raise InputError(
                        f"{chat.place}: the tokenizer's chat template ignores the column {name!r}, so the model would "
                        "never see it; remove or rename the column, or use a model whose template writes it"
                    )
                self._written.add(("", name))
        for number, message in enumerate(chat.messages, start=1):
            for name, value in message.items():
                kind = (message["role"], name)
                if name in ("role", *IDENTITIES) or value in (None, "", [], {}) or kind in self._written:
                    continue
                if isinstance(value, str) and not value.strip():
                    continue
                until = chat.messages[:number]
                without = {key: item for key, item in message.items() if key != name}
                if name == "content":
                    without["content"] = ""
                shorter = Conversation(self, [*until[:-1], without], chat.extras, chat.place)
                if not _differ(Conversation(self, until, chat.extras, chat.place), shorter):
                    raise InputError(
                        f"{chat.place}, message {number}: the tokenizer's chat template ignores the field {name!r} of "
                        f"the role {message['role']!r}, so the model would never see it; remove the field, or use a "
                        "model whose template writes it"
                    )
                self._written.add(kind)


def _differ(full: Conversation, shorter: Conversation) -> bool:
    """Whether two conversations are written differently; what the template cannot do without is written, too."""
    try:
        text = full.render()
    except InputError:
        return True  # the whole conversation tells what is wrong with it
    try:
        return text != shorter.render()
    except InputError:
        return True


@dataclass
class Conversation:
    """Messages and what else the template gets; ``place`` is what errors call it."""

    template: ChatTemplate
    messages: list[Message]
    extras: dict[str, Any]
    place: str

    def render(self, until: int | None = None, generation: bool = False) -> str:
        """The first ``until`` messages as the template writes them, with ``generation`` up to the assistant's turn.

        Raises:
            InputError: the template refuses them.
        """
        from jinja2.exceptions import TemplateError

        try:
            text = self.template.tokenizer.apply_chat_template(
                self.messages[:until], tokenize=False, add_generation_prompt=generation, **self.extras
            )
        except (TemplateError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise InputError(f"{self.place}: the chat template refuses it: {one_line(error)}") from error
        assert isinstance(text, str)
        return text

    def settle_contents(self) -> None:
        """Give the template the content it takes where a message with tool calls has none, and check lists of parts.

        No content is null where the template has a case for it, and empty text where it would write ``None``.

        Raises:
            InputError: the template writes a list of parts as code.
        """
        absent = [number for number, message in enumerate(self.messages) if message["content"] is None]
        if absent:
            filled = [{**message, "content": ""} if i in absent else message for i, message in enumerate(self.messages)]
            empty = Conversation(self.template, filled, self.extras, self.place)
            try:
                as_null = self.render()
                takes_null = as_null.count("None") <= empty.render().count("None")
            except InputError:
                takes_null = False
            if not takes_null:
                self.messages = filled
        for number, message in enumerate(self.messages, start=1):
            if isinstance(message["content"], list):
                text = self.render(number)
                if any(form(message["content"]) in text for form in (str, json.dumps)):
                    raise InputError(
                        f"{self.place}, message {number}: the tokenizer's chat template does not take a list of parts "
                        "as content; allowed: text"
                    )

    def assistant_spans(self) -> tuple[str, list[Span]]:
        """The rendered conversation and the [start, end) characters of what the assistant says, end marks included.

        Raises:
            InputError: no assistant turn, nothing before the first one, or a template that is not prefix-stable.
        """
        whole = self.render()
        turns = [index for index, message in enumerate(self.messages) if message["role"] == "assistant"]
        if not turns or turns[0] == 0:
            raise InputError(f"{self.place} needs an assistant message after at least one other")
        spans = []
        for turn in turns:
            before, after = self.render(turn, generation=True), self.render(turn + 1)
            if not (whole.startswith(after) and after.startswith(before)):
                raise InputError(
                    f"{self.place}: the tokenizer's chat template renders message {turn + 1} differently inside the "
                    "whole conversation, so its tokens cannot be told apart; use prompt + completion"
                )
            spans.append((len(before), len(after)))
        return whole, spans

    def prompt(self) -> str:
        """What the assistant is to answer: all up to its turn. Turns of the assistant at the end are left out.

        Raises:
            InputError: nothing is left to answer.
        """
        until = len(self.messages)
        while until and self.messages[until - 1]["role"] == "assistant":
            until -= 1
        if not until:
            raise InputError(f"{self.place} has no turn to answer")
        return self.render(until, generation=True)


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
