"""The model card (``README.md``) of an adapter folder: what the adapter is and how it is used.

PEFT writes a card with nothing in it but empty headings. What is written here replaces that, and what was written here
before; a card that somebody has written is left alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from lorma.adapters.kinds import kind_of
from lorma.adapters.untrusted import read_header

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


NAMELESS = """
## On a server

`adapter_config.json` names no base model: only lorma knows `{}` by that name, and servers cannot load it. Export the
adapter again with `--base` and the model that the server loads; the LoRA is then made for its weights. Or let
`lorma merge` write base and adapter as one ordinary checkpoint.
"""
HEAD = re.compile(r"(^|\.)(classifier|score)(\.out_proj)?\.weight$")
"""The last layer of a head with one row a label, in the file of an adapter with a trained head."""


@dataclass(frozen=True)
class About:
    """What is known of an adapter beside its configuration.

    Attributes:
        alias: the name of a base model that only lorma knows by that name.
        quantization: of the base model (``model.quantization`` of a recipe).
        arguments: of the base model's ``from_pretrained``; see :func:`base_code`.
        text: Markdown about how it was trained, for the end of the card.
    """

    alias: str | None = None
    quantization: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    text: str = ""


def write_card(folder: Path, config: Any, about: About | None = None) -> None:
    """Fill the card of an adapter folder, or write one.

    Args:
        folder: the adapter folder, with its weights.
        config: the adapter's configuration.
        about: what else is known.
    """
    about = about or About()
    path, name = folder / NAME, None if about.alias else config.base_model_name_or_path
    base = name if on_hub(name) else None
    data: Any = ModelCardData(library_name="peft", base_model=base)
    content = path.read_text(encoding="utf-8") if path.is_file() else ""
    card = ModelCard(content) if content else ModelCard(f"---\n{data.to_yaml()}\n---\n")
    body = f"{BEGIN}\n{adapter_text(config, about, labels_of(folder, config))}{about.text}{END}\n"
    if not content or EMPTY in card.text:
        versions = card.text.partition("### Framework versions")
        card.text = body + ("\n" + "".join(versions[1:]) if versions[1] else "")
    elif OWN.search(card.text):
        card.text = OWN.sub(lambda _: body.rstrip("\n"), card.text)
    else:
        return
    method, tags = kind_of(config).title(config), set(card.data.get("tags") or ())
    card.data["base_model"] = base
    if base is None:  # PEFT claims whatever name the model has
        tags = {tag for tag in tags if not tag.startswith("base_model:")}
    card.data["tags"] = sorted({*tags, method.lower(), "lorma"})
    card.save(path)


def on_hub(name: str | None) -> bool:
    """Whether ``name`` can be a name on the hub: it is no folder here, and does not look like one elsewhere."""
    return bool(name) and str(name).count("/") <= 1 and str(name)[0] not in "./~" and not Path(str(name)).exists()


def labels_of(folder: Path, config: Any) -> int | None:
    """How many labels the trained head in an adapter folder has; None where there is none."""
    if not config.modules_to_save or not (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        return None
    header = read_header(folder, SAFETENSORS_WEIGHTS_NAME)
    rows = {info.shape[0] for name, info in header.items() if HEAD.search(name) and len(info.shape) == 2}
    return rows.pop() if len(rows) == 1 else None


def base_code(auto_model: str, path: str, arguments: Mapping[str, Any], *, own: bool = True) -> str:
    """The expression that loads a base model; arguments that are None or transformers' default are left out.

    Args:
        own: whether lorma may be used, which makes a model from a GGUF file one that can be trained further.
    """
    defaults: dict[str, Any] = {"dtype": "float32", "trust_remote_code": False, "ignore_mismatched_sizes": False}
    keys = (
        "gguf_file",
        "num_labels",
        "pad_token_id",
        "ignore_mismatched_sizes",
        "revision",
        "dtype",
        "trust_remote_code",
    )
    given = [f"{key}={arguments[key]!r}" for key in keys if arguments.get(key) not in (None, defaults.get(key))]
    packed = arguments.get("gguf_file") is not None
    if packed:
        given.append("quantization_config=transformers.GgufConfig(dequantize=True)")
    code = f"transformers.{auto_model}.from_pretrained({', '.join([repr(path), *given])})"
    return f"lorma.prepare_gguf_for_training({code})" if packed and own else code


def use_code(base: str, folder: str, imports: str = "lorma, peft, transformers") -> list[str]:
    """Lines that put the adapter in ``folder`` on the base model that the expression ``base`` loads."""
    return [f"import {imports}", f"base = {base}", f"model = peft.PeftModel.from_pretrained(base, {folder!r})"]


def predictor_code(folder: str) -> list[str]:
    """Lines that load what `lorma train` has trained where transformers alone cannot load the base model."""
    return ["from lorma.training.inference import load_predictor", f"model = load_predictor({folder!r}).model"]


def rank_of(config: Any) -> str:
    """The rank in words; empty for a method without one, or that gives layers ranks of their own (AdaLoRA)."""
    patterns = getattr(config, "rank_pattern", None)
    if hasattr(config, "target_r") or not getattr(config, "r", 0):
        return ""
    return f"{config.r}{' (others by layer)' if patterns else ''}"


def _tokens_of(config: Any) -> str:
    wanted = getattr(config, "trainable_token_indices", None)
    lists = wanted if isinstance(wanted, dict) else {"": wanted} if wanted else {}
    return ", ".join(f"{len(rows)} of `{name}`" if name else str(len(rows)) for name, rows in lists.items())


def adapter_text(config: Any, about: About, labels: int | None) -> str:
    """What the adapter is and how to use it, in Markdown."""
    kind = kind_of(config)
    title = kind.title(config)
    base = about.alias or config.base_model_name_or_path or "the base model"
    shown = f"`{base}`" + f", {about.quantization}" * bool(about.quantization)
    targets = config.target_modules
    names = targets if isinstance(targets, str) else ", ".join(sorted(targets or ()))
    if len(names) > 300:
        names = f"{names[:300]}…"
    rows = {
        "base model": f"{shown} (a name of lorma's)" if about.alias else shown,
        "adapted weight": kind.equation(config) or title,
        "rank": rank_of(config),
        "layers": f"`{names}`" if names else "",
        "trained whole": ", ".join(f"`{name}`" for name in sorted(config.modules_to_save or ())),
        "trained tokens": _tokens_of(config),
    }
    table = "\n".join(f"| {name} | {value.replace('|', chr(92) + '|')} |" for name, value in rows.items() if value)
    task = str(getattr(config.task_type, "value", config.task_type))
    own = {"num_labels": labels, "revision": about.arguments.get("revision") or getattr(config, "revision", None)}
    given, auto_model = {**about.arguments, **own}, AUTO_CLASSES.get(task, "AutoModel")
    load = base_code(auto_model, base, given, own=False)
    if about.alias or about.quantization:
        use, where = predictor_code("THIS_FOLDER"), "this folder"
    else:
        foreign = type(config).__module__.startswith("peft.")
        imports = "peft, transformers" if foreign else "lorma, peft, transformers"
        loading = base_code(auto_model, base, given, own=not foreign)
        use, where = use_code(loading, "THIS_FOLDER", imports), "this folder, or its name on the hub"
    without = ""
    if kind.equation(config):
        without = _without_lorma(config, about, base, load)
    elif about.alias and not config.base_model_name_or_path:
        without = NAMELESS.format(base)
    return (
        f"# {title} adapter for {base}\n\n| | |\n|---|---|\n{table}\n\n## Use\n\n"
        f"{_python(use)}\n`THIS_FOLDER` is {where}.\n{without}"
    )


def _without_lorma(config: Any, about: About, base: str, load: str) -> str:
    """How the adapter is used where lorma is not installed."""
    file = about.arguments.get("gguf_file")
    chosen = f" --base {f'{base}/{file}' if file else base}" if about.quantization else ""
    merge = f"lorma merge THIS_FOLDER{chosen} -o MERGED_FOLDER"
    if kind_of(config).not_lora(config):
        return (
            "\n## Without lorma\n\n"
            f"Merged into the base model it is an ordinary checkpoint:\n\n```\n{merge}\n```\n\n"
            "As plain LoRA it exists only approximately: "
            f"`lorma export THIS_FOLDER{chosen} --truncate-energy 0.99 -o FOLDER`.\n"
        )
    if about.alias:
        python = (
            f"Only lorma knows `{base}` by that name. For a server, give the same command `--base` and the model that "
            "the server loads; the LoRA is then made for its weights.\n"
        )
    else:
        python = _python(use_code(load, "LORA_FOLDER", "peft, transformers"))
    return (
        "\n## Without lorma\n\nThe same model as plain LoRA, for PEFT without lorma and for servers that read LoRA:\n\n"
        f"```\nlorma export THIS_FOLDER --format lora{chosen} -o LORA_FOLDER\n```\n\n{python}\n"
        f"Or merged into the base model, as an ordinary checkpoint: `{merge}`.\n"
    )


def _python(lines: list[str]) -> str:
    return "\n".join(["```python", lines[0], "", *lines[1:], "```", ""])


def merged_card(config: Any, base_name: str | None) -> str:
    """The card of a checkpoint into which an adapter is merged.

    Args:
        base_name: the name under which others load the base model; None where there is none.
    """
    base, kind = config.base_model_name_or_path, kind_of(config)
    title = kind.title(config)
    claimed = base_name if on_hub(base_name) else None
    data: Any = ModelCardData(library_name="transformers", base_model=claimed, tags=["lorma", "merged"])
    task = str(getattr(config.task_type, "value", config.task_type))
    return (
        f"---\n{data.to_yaml()}\n---\n{BEGIN}\n"
        f"# {base or 'A base model'} with a {title} adapter merged in\n\n"
        f"{kind.equation(config) or title}, rank {config.r}. The weights hold the product; nothing but "
        f"transformers is needed:\n\n```python\nimport transformers\n\n"
        f'model = transformers.{AUTO_CLASSES.get(task, "AutoModel")}.from_pretrained("THIS_FOLDER")\n```\n{END}\n'
    )
