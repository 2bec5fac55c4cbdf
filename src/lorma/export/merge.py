"""A full checkpoint with an adapter merged into it, written tensor by tensor.

The base model is never loaded to be merged: its structure is on the meta device, and each weight is read, changed by
its layer's own ``merge`` if it is adapted, written and forgotten. Shards are those of the base checkpoint. At the end
the adapted model and the written one are loaded, one after the other, and must answer the same.

Weights that are tied in the base model come apart when only one of them is changed; both are written then, and the
configuration says so.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig

from lorma.adapters.card import merged_card
from lorma.adapters.untrusted import TensorInfo, copy_json
from lorma.deltas.adapted import NAME, Adapted, open_adapter, own_name, plain_name
from lorma.errors import InputError
from lorma.export.output import COPIED, GENERATION_FILE, MODEL, SHARD_FILE, TEMPLATES
from lorma.export.stream import CODES, write_safetensors
from lorma.export.verify import check_same, load_adapted_outputs
from lorma.files import META_FILE, check_output, write_folder
from lorma.models.structure import Base, served_name
from lorma.models.weights import INDEX_FILE, SINGLE_FILE, LoadedWeights, SafetensorsWeights, base_file

SHARD_BYTES = 5 * 10**9
"""Size of a shard where the base checkpoint gives none."""
ORIGINAL = ".original_module."
"""In the name of a bias of which PEFT has also saved the trained copy (``bias="all"``)."""


@dataclass(frozen=True)
class Merged:
    """What a merge has written.

    Attributes:
        folder: the checkpoint.
        tensors: how many it holds, and ``changed`` of them by the adapter.
        bytes: of all tensors.
        shards: number of files.
        difference: ``‖merged − adapted‖ / ‖adapted‖`` of the outputs on a prompt; None if it was not verified.
        note: why not, if so.
    """

    folder: Path
    tensors: int
    changed: int
    bytes: int
    shards: int
    difference: float | None
    note: str = ""


def merge(adapter: Path, output: Path, base: Base, *, verify: bool = True) -> Merged:
    """Write the base model with an adapter merged into it, as ``transformers`` loads it.

    The folder appears whole or not at all. It also holds the tokenizer, the generation settings and, for an adapter
    that ``lorma train`` made, the description of its task, so that ``lorma predict`` reads it.

    Args:
        adapter: the adapter folder.
        output: folder to write; one that exists is replaced if it holds nothing but a model.
        base: its base model, in full precision.
        verify: load the adapted and the written model and compare their outputs.

    Raises:
        InputError: an adapter or a base model that cannot be read, or that do not fit each other, or an output that
            cannot be written or holds anything else.
        ValueError: a merged weight is not finite, or the written model answers otherwise than the adapted one.
    """
    check_output(output, True, adapter, base.path, kind=MODEL)
    adapted = _with_all_weights(open_adapter(adapter, base))
    plan = Plan(adapted)
    counted: list[int] = []
    compared: float | None = None
    note = "not verified: not asked for"

    def fill(folder: Path) -> None:
        nonlocal compared, note
        folder.mkdir(parents=True)
        _write_rest(adapted, plan, adapter, folder)  # first, as it is quick and may fail
        counted.append(_write_weights(plan, folder))
        if verify:
            expected = load_adapted_outputs(adapted, adapter)
            compared = check_same(expected, type(adapted.peft_model.get_base_model()), folder)
            note = f"not verified: {expected.reason}" if expected.reason else ""

    write_folder(output, fill)
    size = sum(file.stat().st_size for file in output.glob("*.safetensors"))
    return Merged(output, len(plan.infos), plan.changed, size, counted[0], compared, note)


class Plan:
    """What is written under which name, where it comes from, and into which file.

    Attributes:
        layers: the adapted layer of each weight that one changes, by the weight's name in the model.
        others: weights that the adapter brings whole, by name.
        infos: shapes and dtypes of all that is written, in order.
        untied: whether weights that are one in the base model are two here.
    """

    def __init__(self, adapted: Adapted) -> None:
        self.adapted = adapted
        self.layers = {own_name(path, layer): layer for path, layer in adapted.layers()}
        self.others = {plain_name(key): tensor for key, tensor in adapted.others.items() if ORIGINAL not in key}
        groups = _groups(adapted)
        self.untied = any(self._comes_apart(group) for group in groups)
        dtype = torch.float32  # of a head that the checkpoint lacks: that of the number before it
        self.infos: dict[str, TensorInfo] = {}
        for group in groups:
            for name in group if self.untied else group[:1]:  # the configuration unties all of them or none
                kind = dtype
                if name in adapted.weights:
                    shape, kind = adapted.weights.info(name)
                    dtype = kind if kind.is_floating_point else dtype
                if name in self.others:
                    shape = tuple(self.others[name].shape)  # a new head may have other labels than the base's
                elif name not in adapted.weights:
                    raise InputError(
                        f"neither the base model nor the adapter has a weight for {name}; it cannot be written"
                    )
                self.infos[name] = TensorInfo(tuple(shape), kind)
        unknown = sorted(self.others.keys() - {name for group in groups for name in group})
        if unknown:
            raise InputError(f"the adapter holds {unknown[0]}, which the base model does not have")
        strange = {str(info.dtype) for info in self.infos.values() if info.dtype not in CODES}
        if strange:
            raise InputError(
                f"the base model holds weights of type {', '.join(sorted(strange))}; they cannot be merged"
            )

    def _comes_apart(self, group: list[str]) -> bool:
        """Whether the weights of these names are one in the base model and differ in the merged one."""
        trained = {name: self.adapted.tokens[name].key for name in group if name in self.adapted.tokens}
        if len(group) > 1 and trained:
            return len(trained) < len(group) or len(set(trained.values())) > 1
        if len(group) == 1 or not any(name in self.layers or name in self.others for name in group):
            return False
        layers = [self.layers.get(name) for name in group]
        if all(
            layer is not None and (layer is layers[0] or layers[0] in layer.twins.get(NAME, ())) for layer in layers
        ):
            return False
        first = self.others.get(group[0])
        return first is None or any(
            name not in self.others or not torch.equal(first, self.others[name]) for name in group
        )

    def files(self) -> dict[str, list[str]]:
        """Names of what goes into which file, sharded as the base checkpoint is."""
        shards: dict[str, list[str]] = {}
        weights, size, number = self.adapted.weights, 0, 0
        for name, (shape, dtype) in self.infos.items():
            if isinstance(weights, SafetensorsWeights) and name in weights:
                shard = weights.shards[weights.checkpoint_names[name]]
            elif isinstance(weights, SafetensorsWeights) and shards:
                shard = next(reversed(shards))
            else:
                size += torch.Size(shape).numel() * dtype.itemsize
                if size > SHARD_BYTES:
                    size, number = 0, number + 1
                shard = str(number)
            shards.setdefault(shard, []).append(name)
        if len(shards) == 1:
            return {SINGLE_FILE: next(iter(shards.values()))}
        total = len(shards)
        return {SHARD_FILE.format(i, total): names for i, names in enumerate(shards.values(), start=1)}

    def tensors(self, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        """What is written under each name, one at a time.

        Raises:
            ValueError: it is not finite.
        """
        for name in names:
            tensor = self._tensor(name).to(self.infos[name].dtype)
            if self._is_changed(name) and not torch.isfinite(tensor).all():
                raise ValueError(f"the merged {name} holds NaN or infinity; the adapter seems to be broken")
            yield name, tensor

    @property
    def changed(self) -> int:
        """How many weights the adapter changes."""
        return sum(self._is_changed(name) for name in self.infos)

    def _is_changed(self, name: str) -> bool:
        return name in self.layers or name in self.others or name in self.adapted.tokens

    @torch.no_grad()
    def _tensor(self, name: str) -> Tensor:
        if name in self.adapted.tokens:
            return self.adapted.tokens[name].put_into(self.adapted.weights.read(name))
        if name in self.others:
            return self.others[name]
        if name not in self.layers:
            return self.adapted.weights.read(name)
        layer = self.layers[name]
        with self.adapted.with_weight(layer):
            layer.merge(safe_merge=True, adapter_names=[NAME], undo="refuse")
            merged: Tensor = getattr(layer.get_base_layer(), layer.weight_name).detach()
        return merged


def _groups(adapted: Adapted) -> list[list[str]]:
    """Names in the base model of everything that is saved, those of one tied weight together."""
    groups: dict[int, list[str]] = {}
    for name, tensor in adapted.tensors.items():
        groups.setdefault(id(tensor), []).append(name)
    return list(groups.values())


def _with_all_weights(adapted: Adapted) -> Adapted:
    """Read whole what transformers renames while it loads; otherwise weights would seem to be missing."""
    brought = {plain_name(key) for key in adapted.others}
    needed = [group[0] for group in _groups(adapted) if group[0] not in brought]
    if isinstance(adapted.weights, SafetensorsWeights) and any(name not in adapted.weights for name in needed):
        return replace(adapted, weights=LoadedWeights(adapted.base, type(adapted.peft_model.get_base_model())))
    return adapted


def _write_weights(plan: Plan, folder: Path) -> int:
    files, total = plan.files(), 0
    for file, names in files.items():
        infos = {name: plan.infos[name] for name in names}
        total += write_safetensors(folder / file, infos, plan.tensors(names))
    if len(files) > 1:
        places = {name: file for file, names in files.items() for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2), encoding="utf-8")
    return len(files)


def _write_rest(adapted: Adapted, plan: Plan, adapter: Path, folder: Path) -> None:
    base = adapted.base
    model = adapted.peft_model.get_base_model()
    config: Any = model.config
    config.architectures = [type(model).__name__]
    config.dtype = next(info.dtype for info in plan.infos.values() if info.dtype.is_floating_point)
    if plan.untied:
        config.tie_word_embeddings = False
    if hasattr(config, "quantization_config"):  # a GGUF file's, which is unpacked here
        del config.quantization_config
    config.save_pretrained(folder)
    if not base.gguf_file:
        _copy_files(base, folder)
    tokenizer = None
    if base.gguf_file or base.pad_token or base.stop_tokens:
        tokenizer = _settle_tokenizer(base, folder)
    if model.can_generate() and not (folder / GENERATION_FILE).exists():
        _generation_settings(adapted).to_json_file(folder / GENERATION_FILE)
    if model.can_generate() and base.stop_tokens:
        _write_stops(base, tokenizer, folder / GENERATION_FILE)
    copy_json(adapter, META_FILE, folder)
    card = merged_card(adapted.config, served_name(base, adapted.config.base_model_name_or_path))
    (folder / "README.md").write_text(card, encoding="utf-8")


def _copy_files(base: Base, folder: Path) -> None:
    """Take over what is no weight: by name, and the chat templates that lie in a folder (or the hub's cache)."""
    for name in COPIED:
        found = base_file(base, name, optional=True)
        if found is not None:
            shutil.copyfile(found, folder / name)
    for template in sorted((base_file(base, "config.json").parent / TEMPLATES).glob("*.jinja")):
        (folder / TEMPLATES).mkdir(exist_ok=True)
        shutil.copyfile(template, folder / TEMPLATES / template.name)


def _settle_tokenizer(base: Base, folder: Path) -> Any:
    """The base model's tokenizer, with the padding token of training; written where it is not copied as it is."""
    tokenizer: Any = AutoTokenizer.from_pretrained(base.path, **base.hub_kwargs())
    settled = tokenizer.pad_token is None and base.pad_token in tokenizer.get_vocab()
    if settled:
        tokenizer.pad_token = base.pad_token
    if settled or base.gguf_file:
        tokenizer.save_pretrained(folder)
    return tokenizer


def _generation_settings(adapted: Adapted) -> Any:
    """Those of a GGUF file, or of an older checkpoint, which keeps them in its config.json."""
    if adapted.base.gguf_file and isinstance(adapted.weights, LoadedWeights):
        return adapted.weights.model.generation_config
    base = adapted.base
    return GenerationConfig.from_pretrained(
        base.path, config_file_name="config.json", revision=base.revision or "main", _from_model_config=True
    )


def _write_stops(base: Base, tokenizer: Any, file: Path) -> None:
    """Add what training taught the model to stop at to its generation settings; everything else stays as it is."""
    vocabulary = tokenizer.get_vocab()
    settings = json.loads(file.read_text(encoding="utf-8"))
    own = settings.get("eos_token_id")
    ids = [*(own if isinstance(own, list) else [own]), *(vocabulary.get(token) for token in base.stop_tokens)]
    known = list(dict.fromkeys(number for number in ids if number is not None))
    if known:
        settings["eos_token_id"] = known if len(known) > 1 else known[0]
        settings.pop("_from_model_config", None)
        file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
