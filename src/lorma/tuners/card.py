"""The model card (``README.md``) of an adapter folder: what the adapter is and how it is used.

PEFT writes a card with nothing in it but empty headings. What is written here replaces that, and what was written here
before; a card that somebody has written is left alone.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

NAME = "README.md"
EMPTY = "# Model Card for Model ID"
"""How PEFT's card begins."""
BEGIN, END = "<!-- written by lorma -->", "<!-- end of what lorma wrote -->"
OWN = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}


def write_card(folder: Path, config: Any, training: str = "") -> None:
    """Fill the card of an adapter folder, or write one.

    Args:
        folder: the adapter folder.
        config: the adapter's configuration.
        training: Markdown about how it was trained, for the end.
    """
    path = folder / NAME
    data: Any = ModelCardData(library_name="peft", base_model=config.base_model_name_or_path or None)
    content = path.read_text(encoding="utf-8") if path.is_file() else ""
    card = ModelCard(content) if content else ModelCard(f"---\n{data.to_yaml()}\n---\n")
    body = f"{BEGIN}\n{adapter_text(config)}{training}{END}\n"
    if not content or EMPTY in card.text:
        versions = card.text.partition("### Framework versions")
        card.text = body + ("\n" + "".join(versions[1:]) if versions[1] else "")
    elif OWN.search(card.text):
        card.text = OWN.sub(lambda _: body.rstrip("\n"), card.text)
    else:
        return
    method = method_of(config)
    card.data["tags"] = sorted({*(card.data.get("tags") or ()), method.lower(), "lorma"})
    card.save(path)


def method_of(config: Any) -> str:
    """``"LoRMA"``, ``"DoRMA"``, ``"TLoRA"``, ``"LoRA"`` or ``"DoRA"``; the name in PEFT of another method."""
    name = str(getattr(config.peft_type, "value", config.peft_type))
    if getattr(config, "use_dora", False):
        name = {"LORMA": "DoRMA", "LORA": "DoRA"}.get(name, name)
    return {"LORMA": "LoRMA", "TLORA": "TLoRA", "LORA": "LoRA"}.get(name, name)


def rank_of(config: Any) -> str:
    """The rank in words; empty for a method without one, or that gives layers ranks of their own (AdaLoRA)."""
    patterns = getattr(config, "rank_pattern", None)
    if hasattr(config, "target_r") or not getattr(config, "r", 0):
        return ""
    return f"{config.r}{' (others by layer)' if patterns else ''}"


def equation_of(config: Any) -> str:
    """The adapted weight, with its source; empty for a method that is not known here."""
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind == "TLORA":
        return "`W = W0 + α·(A·B·C)ᵀ` with A and C fixed and random, B and α trained (TLoRA, arXiv 2504.18735)"
    if kind != "LORMA":
        return ""
    multiplier = {"plus": "(I + s·BA)", "permutation": "s·Iπ(BA)", "none": "s·BA"}[config.inflation]
    product = f"W0·{multiplier}" if config.side == "post" else f"{multiplier}·W0"
    where = ", on the narrower side of each layer" if config.side == "auto" else ""
    rows = ", each row rescaled to a trained magnitude (DoRA, arXiv 2402.09353)" if config.use_dora else ""
    return f"`W = {product}`{where} with A and B trained{rows} (LoRMA, arXiv 2506.07621)"


def is_lora(config: Any) -> bool:
    """Whether adapters of this configuration are plain LoRAs in other words."""
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    return kind == "TLORA" or (kind == "LORMA" and config.inflation == "plus" and not config.use_dora)


def adapter_text(config: Any) -> str:
    """What the adapter is and how to use it, in Markdown."""
    base = config.base_model_name_or_path or "the base model"
    task = str(getattr(config.task_type, "value", config.task_type))
    targets = config.target_modules
    names = targets if isinstance(targets, str) else ", ".join(sorted(targets or ()))
    if len(names) > 300:
        names = f"{names[:300]}…"
    rows = {
        "base model": f"`{base}`",
        "adapted weight": equation_of(config) or method_of(config),
        "rank": rank_of(config),
        "layers": f"`{names}`" if names else "",
        "trained whole": ", ".join(f"`{name}`" for name in sorted(config.modules_to_save or ())),
    }
    table = "\n".join(f"| {name} | {value.replace('|', chr(92) + '|')} |" for name, value in rows.items() if value)
    load = f"transformers.{AUTO_CLASSES.get(task, 'AutoModel')}.from_pretrained({base!r})"
    if not equation_of(config):
        without = ""
    elif is_lora(config):
        without = (
            "## Without lorma\n\n"
            "The same model as plain LoRA, for PEFT without lorma and for servers that read LoRA:\n\n"
            "```\nlorma export THIS_FOLDER --format lora -o LORA_FOLDER\n```\n\n"
            f"```python\nimport peft, transformers\n\nbase = {load}\n"
            'model = peft.PeftModel.from_pretrained(base, "LORA_FOLDER")\n```\n\n'
            "Or merged into the base model, as an ordinary checkpoint: `lorma merge THIS_FOLDER -o MERGED_FOLDER`.\n"
        )
    else:
        without = (
            "## Without lorma\n\n"
            "Merged into the base model it is an ordinary checkpoint:\n\n"
            "```\nlorma merge THIS_FOLDER -o MERGED_FOLDER\n```\n\n"
            "As plain LoRA it exists only approximately: `lorma export THIS_FOLDER --truncate-energy 0.99 -o FOLDER`.\n"
        )
    return (
        f"# {method_of(config)} adapter for {base}\n\n| | |\n|---|---|\n{table}\n\n## Use\n\n"
        f"```python\nimport lorma, peft, transformers\n\nbase = {load}\n"
        'model = peft.PeftModel.from_pretrained(base, "THIS_FOLDER")\n```\n\n'
        f"`THIS_FOLDER` is this folder, or its name on the hub.\n\n{without}"
    )


def merged_card(config: Any) -> str:
    """The card of a checkpoint into which an adapter is merged."""
    base = config.base_model_name_or_path
    data: Any = ModelCardData(library_name="transformers", base_model=base or None, tags=["lorma", "merged"])
    task = str(getattr(config.task_type, "value", config.task_type))
    return (
        f"---\n{data.to_yaml()}\n---\n{BEGIN}\n"
        f"# {base or 'A base model'} with a {method_of(config)} adapter merged in\n\n"
        f"{equation_of(config) or method_of(config)}, rank {config.r}. The weights hold the product; nothing but "
        f"transformers is needed:\n\n```python\nimport transformers\n\n"
        f'model = transformers.{AUTO_CLASSES.get(task, "AutoModel")}.from_pretrained("THIS_FOLDER")\n```\n{END}\n'
    )
