"""An adapter as plain LoRA, which PEFT and every LoRA server load without this library.

LoRMA₊ (:func:`lorma.functional.lora_form`), TLoRA and whatever else gives an exact ``lora_form_of`` come out exactly,
with a LoRA scaling of 1 in every layer. Trained heads, tokens and biases are carried over as they are, under the
names that PEFT gives them for every method. Fused projections become one LoRA on the whole projection, as servers want
it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorma.adapters.card import About, write_card
from lorma.adapters.folder import CONFIG_NAME, WEIGHTS_NAME, read_config
from lorma.adapters.untrusted import copy_json
from lorma.deltas.adapted import NAME, Adapted, adapted_layers, open_adapter, own_part
from lorma.deltas.forms import LoraForm, lora_form
from lorma.deltas.truncation import Truncation
from lorma.errors import InputError
from lorma.export.output import ADAPTER, REPORT_FILE
from lorma.files import META_FILE, check_output, write_folder
from lorma.models.structure import Base, served_name
from lorma.tuners.kinds import patterns
from lorma.tuners.names import PREFIX

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer.

    Attributes:
        layer: its path in the base model.
        rank: of its LoRA, before any padding.
        error: relative error ‖ΔW − B'A'‖ / ‖ΔW‖ (Frobenius) of a truncated layer, in float32; None where it is exact.
        change: ‖ΔW‖ / ‖W0‖ of a truncated layer.
    """

    layer: str
    rank: int
    error: float | None
    change: float | None


def export_lora(
    adapter: str | Path,
    output: str | Path,
    *,
    base: Base | None = None,
    dtype: str = "float32",
    uniform_rank: bool = False,
    truncation: Truncation | None = None,
    overwrite: bool = False,
) -> list[LayerReport]:
    """Write an adapter as a PEFT LoRA folder.

    The base model is not loaded: its structure is built on the meta device, and the weight of each adapted layer is
    read when that layer is computed, in float32.

    Args:
        adapter: an adapter folder, or a run directory that holds one.
        output: the folder to write. It appears whole or not at all.
        base: the base model; None takes the one that the adapter's configuration names.
        dtype: of the LoRA's factors, ``"float32"``, ``"float16"`` or ``"bfloat16"``.
        uniform_rank: pad every layer with zeros to the largest rank, for servers that want one.
        truncation: how to approximate layers that have no exact LoRA form; None refuses them.
        overwrite: replace a folder at ``output`` that holds nothing but an adapter.

    Returns: a report for each adapted layer; the same is written to ``export.json`` in the folder.

    Raises:
        InputError: an input that cannot be used, an output that exists, or an adapter that is no LoRA.
    """
    output = Path(output)
    check_dtype(dtype)
    folder = adapter_folder(adapter)
    base = base or base_of(folder)
    check_output(output, overwrite, folder, base.path, kind=ADAPTER)
    adapted = open_adapter(folder, base)
    forms = forms_of(adapted, truncation, DTYPES[dtype])
    names = _module_names(adapted.peft_model)
    trained = {tokens.key: tokens.rows for tokens in adapted.tokens.values()}
    config, state = _as_peft(adapted.config, forms, names, {**adapted.others, **trained}, uniform_rank)
    recorded = config.base_model_name_or_path
    arguments = {"gguf_file": base.gguf_file, "revision": base.revision, **base.load_kwargs}
    config.base_model_name_or_path = served_name(base, recorded)
    about = About(None if config.base_model_name_or_path else recorded, arguments=arguments)
    reports = [LayerReport(form.path, form.rank, form.error, form.change) for form in forms]

    def fill(temporary: Path) -> None:
        temporary.mkdir(parents=True)
        config.save_pretrained(str(temporary))
        save_file(state, temporary / WEIGHTS_NAME, metadata={"format": "pt"})
        content = {
            "method": str(adapted.config.peft_type.value),
            "dtype": dtype,
            "uniform_rank": uniform_rank,
            "exact": all(report.error is None for report in reports),
            "layers": [asdict(report) for report in reports],
        }
        (temporary / REPORT_FILE).write_text(json.dumps(content, indent=2), encoding="utf-8")
        copy_json(folder, META_FILE, temporary)
        write_card(temporary, config, about)

    write_folder(output, fill)
    return reports


@torch.no_grad()
def export_lora_state_dict(
    model: Any, adapter_name: str = "default", *, dtype: torch.dtype | None = None
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """A live model's adapter as plain LoRA: what a sampler needs after each update of the weights.

    Computes ``A·W0`` (``W0·B`` on side post) for every layer and nothing else. The tensors are copies on the layers'
    devices, so that training may go on.

    Args:
        model: a PeftModel, or a model with an adapter of ``model.add_adapter``.
        adapter_name: which adapter.
        dtype: of the LoRA's factors; None leaves them in the precision they are computed in, at least float32.

    Returns: a configuration and a state dict as ``adapter_config.json`` and ``adapter_model.safetensors`` hold them.

    Raises:
        InputError: the model has no such adapter, or it is no LoRA.
    """
    if adapter_name not in getattr(model, "peft_config", {}):
        raise InputError(f"adapter_name={adapter_name!r}: the model has no such adapter")
    layers = adapted_layers(model, adapter_name)
    if not layers:
        raise InputError(f"adapter_name={adapter_name!r} is no adapter of one of lorma's methods")
    forms = []
    for path, layer in layers:
        form = lora_form(path, layer, adapter_name, layer.original_weight())
        forms.append(_cast(form, dtype or form.down.dtype))
    kept = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    own = own_part(model.peft_config[adapter_name])
    others = {
        PREFIX + key.removeprefix(PREFIX): tensor.detach().clone() for key, tensor in kept.items() if not own(key)
    }
    return _as_peft(model.peft_config[adapter_name], forms, _module_names(model), others, False)


def forms_of(adapted: Adapted, truncation: Truncation | None, dtype: torch.dtype) -> list[LoraForm]:
    """The LoRA of every layer of an adapter folder, one base weight at a time.

    Raises:
        InputError: a layer has no LoRA form, or one that ``dtype`` cannot hold.
    """
    forms = []
    with torch.no_grad():
        for path, layer in adapted.layers():
            with adapted.with_weight(layer) as weight:
                forms.append(_cast(lora_form(path, layer, NAME, weight, truncation), dtype))
    return forms


def adapter_folder(path: str | Path) -> Path:
    """The adapter folder that ``path`` is, or that the run directory ``path`` holds.

    Raises:
        InputError: it is neither.
    """
    folder = Path(path).expanduser()
    for candidate in (folder, folder / "adapter"):
        if (candidate / CONFIG_NAME).is_file():
            return candidate
    raise InputError(f"{str(path)!r} is neither an adapter folder nor a run directory: it has no {CONFIG_NAME}")


def base_of(folder: Path) -> Base:
    """The base model that an adapter's configuration names.

    Raises:
        InputError: it names none.
    """
    config: Any = read_config(folder)
    if not config.base_model_name_or_path:
        raise InputError(f"{folder / CONFIG_NAME} names no base model; name it (--base)")
    return Base(config.base_model_name_or_path, revision=config.revision)


def check_dtype(dtype: str) -> None:
    """Refuse a precision that is not offered (``InputError``)."""
    if dtype not in DTYPES:
        raise InputError(f"dtype={dtype!r} must be {', '.join(DTYPES)}")


def _cast(form: LoraForm, dtype: torch.dtype) -> LoraForm:
    down, up = (t.to(dtype, copy=True) for t in (form.down, form.up))
    if not (torch.isfinite(down).all() and torch.isfinite(up).all()):
        raise InputError(
            f"{form.path} cannot be exported in {str(dtype).removeprefix('torch.')}: it would not be finite"
        )
    return LoraForm(form.path, form.module, down, up, form.error, form.change)


def _module_names(model: nn.Module) -> set[str]:
    return {name.removeprefix(PREFIX).replace(".base_layer", "") for name, _ in model.named_modules()}


def _as_peft(
    source: Any, forms: Sequence[LoraForm], names: set[str], others: dict[str, Tensor], uniform_rank: bool
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Configuration and state dict of PEFT's LoRA for these layers."""
    largest = max(form.rank for form in forms)
    if uniform_rank:
        forms = [form.padded(largest) for form in forms]
    ranks = {form.path: form.rank for form in forms}
    config = LoraConfig(
        task_type=source.task_type,
        base_model_name_or_path=source.base_model_name_or_path,
        revision=source.revision,
        inference_mode=True,
        r=largest,
        lora_alpha=largest,
        **patterns("rank_pattern", ranks),
        **patterns("alpha_pattern", ranks),
        target_modules=_targets([form.path for form in forms], names),
        fan_in_fan_out=any(isinstance(form.module, Conv1D) for form in forms),
        bias="lora_only" if source.bias.endswith("_only") else source.bias,
        modules_to_save=sorted(set(source.modules_to_save or ())) or None,
        trainable_token_indices=source.trainable_token_indices,
        ensure_weight_tying=source.ensure_weight_tying,
    )
    state = {
        f"{PREFIX}{form.path}.{name}": tensor.contiguous() for form in forms for name, tensor in form.named().items()
    }
    return config, {**state, **others}


def _targets(paths: Iterable[str], names: set[str]) -> list[str] | str:
    """Names that select exactly these modules: the short ones, else the whole ones, else a regular expression."""
    wanted = set(paths)
    for targets in ({path.rpartition(".")[2] for path in wanted}, wanted):
        ends = tuple(f".{target}" for target in targets)
        if {name for name in names if name in targets or name.endswith(ends)} == wanted:
            return sorted(targets)
    return "|".join(re.escape(path) for path in sorted(wanted))
