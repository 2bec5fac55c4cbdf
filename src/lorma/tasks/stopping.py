"""Which tokens end an answer of a language model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUESTION, ANSWER = "Is it?", "It is."


def stop_token_ids(
    tokenizer: PreTrainedTokenizerBase, generation_config: Any, recorded: Iterable[str] = ()
) -> list[int]:
    """Tokens that end an answer, by whichever of three sources names them, each once.

    They are the tokenizer's end-of-sequence token, those of the generation configuration, and the token that ends a
    turn in the chat template. The three may disagree: base models that are tuned on chats often do.

    Args:
        generation_config: of the base model; None where it has none.
        recorded: further tokens, as they are written beside trained weights; those that the tokenizer does not have
            are left out.
    """
    published = getattr(generation_config, "eos_token_id", None)
    vocabulary = tokenizer.get_vocab()
    found = [
        tokenizer.eos_token_id,
        *(published if isinstance(published, list) else [published]),
        turn_end(tokenizer),
        *(vocabulary.get(token) for token in recorded),
    ]
    return list(dict.fromkeys(token for token in found if token is not None))


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that the chat template writes behind what the assistant says; None where it writes none."""
    if not tokenizer.chat_template:
        return None
    messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception:  # a template is a program, and one that is not used need not run
        return None
    if ANSWER not in text:  # a template of parts, say
        return None
    rest = text.rpartition(ANSWER)[2]
    ends = {rest.find(token.content): number for number, token in tokenizer.added_tokens_decoder.items()}
    first = min((place for place in ends if place >= 0), default=None)
    return None if first is None else ends[first]
