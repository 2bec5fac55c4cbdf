"""How many tokens a base model has positions for, read off its configuration."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

NAMES = ("max_position_embeddings", "max_seq_len")
"""What configurations call it; transformers maps other names, such as GPT-2's ``n_positions``, to the first."""


def position_limit(config: Any, pad_token_id: int | None, trust_remote_code: bool = False) -> int | None:
    """The tokens of the longest sequence that a model of this configuration takes; None where nothing limits it.

    Learned positions end where their table does. Models of RoBERTa's kind number positions from behind the padding
    token's id, so a table of 514 rows holds 512 tokens. Rotary positions have no table; what the configuration says,
    stretched by its scaling, is what the model was made for. DeBERTa's relative positions have no end.

    Args:
        config: of the whole model.
        pad_token_id: the tokenizer's, which the model is loaded with.
    """
    text = config.get_text_config()
    stated = next((value for name in NAMES if _is_count(value := getattr(text, name, None))), None)
    if stated is None or getattr(text, "position_biased_input", None) is False:
        return None
    rotary = getattr(text, "rope_parameters", None)
    if rotary:
        kinds = rotary.values() if all(isinstance(value, dict) for value in rotary.values()) else [rotary]
        return max(stated, *_stretched(kinds, stated))
    return stated - _unused_rows(config, stated, pad_token_id, trust_remote_code)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and value > 0


def _stretched(kinds: Iterable[dict[str, Any]], stated: int) -> list[int]:
    """Positions after rotary scaling, for each kind of layer."""
    return [
        int((kind.get("original_max_position_embeddings") or stated) * (kind.get("factor") or 1.0)) for kind in kinds
    ]


def _unused_rows(config: Any, rows: int, pad_token_id: int | None, trust_remote_code: bool) -> int:
    """Rows of the table of positions that no token gets, as the model itself builds it, without memory."""
    import torch
    from transformers import AutoModel

    config = copy.deepcopy(config)
    if pad_token_id is not None:
        config.get_text_config().pad_token_id = pad_token_id
    try:
        with torch.device("meta"):
            model = AutoModel.from_config(config, trust_remote_code=trust_remote_code)
    except (ValueError, TypeError, ImportError, AttributeError, ArithmeticError, RuntimeError):
        return 0  # loading the model says what is wrong with it
    tables = [
        module
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Embedding) and "position" in path.rpartition(".")[2]
    ]
    return max((m.padding_idx + 1 for m in tables if m.num_embeddings == rows and m.padding_idx is not None), default=0)
