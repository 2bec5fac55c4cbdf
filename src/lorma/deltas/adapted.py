"""An adapter folder put on its base model's structure: real factors, base weights on the meta device.

PEFT itself injects the adapter, so every layer knows its kind, side, rank and slices as in training. Where a base
weight is needed it is put into its layer for as long as it takes (:meth:`Adapted.with_weight`), one layer at a time.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from torch import Tensor, nn

from lorma.adapters.folder import DELTA, read_adapter
from lorma.adapters.kinds import kind_of
from lorma.errors import InputError, one_line
from lorma.models.structure import Base, meta_model
from lorma.models.weights import BaseWeights, LoadedWeights, open_weights
from lorma.tuners.config import AdapterConfig
from lorma.tuners.layer import AdapterLayer
from lorma.tuners.names import PREFIX
from lorma.tuners.tying import plain_path, token_wrappers

NAME = "default"


@dataclass(frozen=True)
class TrainedTokens:
    """Rows of an embedding that an adapter has trained.

    Attributes:
        key: their name in the adapter's file.
        indices: which rows.
        rows: what they are, one for each of ``indices``.
    """

    key: str
    indices: list[int]
    rows: Tensor

    def put_into(self, weight: Tensor) -> Tensor:
        """A copy of ``weight`` with these rows."""
        return weight.index_copy(0, torch.tensor(self.indices), self.rows.to(weight.dtype))


@dataclass(frozen=True)
class Adapted:
    """An adapter and its base model.

    Attributes:
        config: the adapter's configuration.
        base: the base model, with as many labels as the adapter's head has.
        peft_model: the model with the adapter injected; parameters of the base are on the meta device.
        weights: the base model's weights, by their names in the model.
        others: what the adapter's file holds beside the factors, by its names there: trained heads and biases.
        tokens: rows of embeddings that the adapter has trained, by the base model's name of each weight they belong
            to; tied weights that follow an embedding are among them.
        copies: names in the base model of weights of which the adapter's file holds a copy.
        tensors: parameters and saved buffers of the base model (meta), tied ones under each of their names.
        parameter_names: names in the base model of each parameter of ``peft_model``, by ``id``.
    """

    config: Any
    base: Base
    peft_model: Any
    weights: BaseWeights
    others: dict[str, Tensor]
    tokens: dict[str, TrainedTokens]
    copies: set[str]
    tensors: dict[str, Tensor]
    parameter_names: dict[int, str]

    def layers(self) -> list[tuple[str, AdapterLayer]]:
        """The adapted layers, each with its path in the base model."""
        return adapted_layers(self.peft_model, NAME)

    def weight_name(self, layer: AdapterLayer) -> str:
        """Name in the base model of the parameter that a layer adapts."""
        return self.parameter_names[id(getattr(layer.get_base_layer(), layer.weight_name))]

    @contextmanager
    def with_weight(self, layer: AdapterLayer) -> Iterator[Tensor]:
        """While active, a layer holds its real base weight, which is also what is yielded.

        Raises:
            InputError: the checkpoint lacks the weight, or has it in another shape.
        """
        module, attribute = layer.get_base_layer(), layer.weight_name
        empty: Any = getattr(module, attribute)
        name = self.weight_name(layer)
        weight = self.weights.read(name)
        if weight.shape != empty.shape:
            raise InputError(f"the base model's {name} is {tuple(weight.shape)}, not {tuple(empty.shape)}")
        setattr(module, attribute, nn.Parameter(weight, requires_grad=False))
        try:
            yield weight
        finally:
            setattr(module, attribute, empty)


def adapted_layers(model: nn.Module, adapter_name: str) -> list[tuple[str, AdapterLayer]]:
    """The layers of a live model that have this adapter, each with its path in the base model."""
    return [
        (path.removeprefix(PREFIX), module)
        for path, module in model.named_modules()
        if isinstance(module, AdapterLayer) and adapter_name in module.undo
    ]


def open_adapter(folder: Path, base: Base) -> Adapted:
    """Read an adapter folder and put it on the structure of its base model.

    Raises:
        InputError: files that cannot be read, an adapter of another library, or one that does not fit this base.
    """
    config, tensors = read_folder(folder)
    own = own_part(config)
    others = {key: value for key, value in tensors.items() if not own(key)}
    model = meta_model(base, config.task_type)
    labels = _labels(model, others)
    if labels is not None and "num_labels" not in base.model_kwargs:
        base = replace(base, model_kwargs={**base.model_kwargs, "num_labels": labels})
        model = meta_model(base, config.task_type)
    weights = open_weights(base, model)
    embeddings = _embedding_names(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    state = dict(model.state_dict(keep_vars=True))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # On a copy, into which PEFT writes the targets and the place where it found the model.
            peft_model: Any = get_peft_model(model, copy.deepcopy(config), low_cpu_mem_usage=True)
            tuner = type(peft_model.base_model)
            factors = {key: value for key, value in tensors.items() if own(key)}
            # Not PEFT's whole loading, which moves the factors to the base's device, here meta.
            placed = tuner._remap_adapter_state_dict_for_load(peft_model, config, NAME, factors)
            peft_model.load_state_dict(placed, strict=False, assign=True)
    except (ValueError, TypeError, RuntimeError, KeyError, IndexError) as error:
        raise InputError(f"{folder} does not fit the base model: {one_line(error)}") from None
    tokens = _tokens(folder, peft_model, others)
    for trained in tokens.values():
        others.pop(trained.key, None)
    for key, value in others.items():
        place = state.get(plain_name(key))
        if place is not None and place.shape != value.shape:
            resized = plain_name(key) in embeddings and place.shape[1:] == value.shape[1:]
            hint = "; save the resized model and name it (--base)" if resized else ""
            raise InputError(
                f"{folder} does not fit the base model: {plain_name(key)} is {tuple(value.shape)} in the adapter and "
                f"{tuple(place.shape)} in the model{hint}"
            )
    copies = _copies(peft_model, weights, others, embeddings)
    others = {key: value for key, value in others.items() if key not in copies}
    adapted = Adapted(config, base, peft_model.eval(), weights, others, tokens, set(copies.values()), state, names)
    for path, layer in adapted.layers():
        if any(
            getattr(layer, kind)[NAME].is_meta for kind in layer.adapter_layer_names if NAME in getattr(layer, kind)
        ):
            raise InputError(f"{folder} does not fit the base model: it has no weights for {path}")
    if all(adapted.weight_name(layer) in weights for _, layer in adapted.layers()):
        return adapted
    # transformers renames and joins some checkpoints' weights while it loads them.
    return replace(adapted, weights=LoadedWeights(base, type(model)))


def _tokens(folder: Path, model: Any, others: dict[str, Tensor]) -> dict[str, TrainedTokens]:
    """See :attr:`Adapted.tokens`.

    Raises:
        InputError: rows that are missing, or of another width or number than the model wants.
    """
    found: dict[str, TrainedTokens] = {}
    wrappers = token_wrappers(model, NAME)
    paths = {id(wrapper.token_adapter): path for path, wrapper in wrappers}
    for path, wrapper in wrappers:
        layer = wrapper.token_adapter
        key = f"{paths[id(layer.tied_adapter or layer)]}.{DELTA}"
        shape = tuple(layer.trainable_tokens_delta[NAME].shape)
        if key not in others or others[key].shape != shape:
            holds = list(others[key].shape) if key in others else "nothing"
            raise InputError(
                f"{folder} does not fit the base model: {key} should have shape {list(shape)}; the file holds {holds}"
            )
        if layer.tied_adapter is not None:  # of a resized vocabulary PEFT saves the rows a second time
            others.pop(f"{path}.{DELTA}", None)
        indices = list(layer.token_indices[NAME])
        found[f"{plain_path(path).removeprefix(PREFIX)}.weight"] = TrainedTokens(key, indices, others[key])
    return found


def _labels(model: Any, others: dict[str, Tensor]) -> int | None:
    """The number of labels of a trained head that has another one than the model; PEFT's files do not state it."""
    state, stated = model.state_dict(), getattr(model.config, "num_labels", None)
    found = set()
    for key, value in others.items():
        place = state.get(plain_name(key))
        if place is not None and place.ndim and value.ndim and len(place) == stated != len(value):
            found |= {len(value)} if place.shape[1:] == value.shape[1:] else set()
    return found.pop() if len(found) == 1 else None


def _copies(model: Any, weights: BaseWeights, others: dict[str, Tensor], embeddings: set[str]) -> dict[str, str]:
    """Copies of base weights, which PEFT saves of adapted or resized embeddings: their names here and in the model.

    An embedding that differs from the base model's, or that is named in ``modules_to_save``, is no copy.

    Raises:
        InputError: such a copy is not the base model's weight, so the adapter was trained on another one.
    """
    own = {own_name(path, layer) for path, layer in adapted_layers(model, NAME)}
    copies = {key: plain_name(key) for key in others if plain_name(key) in own}
    for key, name in copies.items():
        if name in weights and not _equal(weights.read(name), others[key]):
            raise InputError(
                f"the adapter holds a base weight {name} of its own, and it is not the base model's; name the base "
                "model that it was trained on (--base)"
            )
    whole = tuple(f".{name}.weight" for name in model.peft_config[NAME].modules_to_save or ())
    rest = {key: plain_name(key) for key in others.keys() - copies.keys()}
    resized = {key: name for key, name in rest.items() if name in embeddings and not f".{name}".endswith(whole)}
    unchanged = {key for key, name in resized.items() if name in weights and _equal(weights.read(name), others[key])}
    return copies | {key: resized[key] for key in unchanged}


def _embedding_names(model: Any) -> set[str]:
    """The names of a model's input and output embeddings, if it has such; tied ones have several."""
    found = []
    for find in (model.get_input_embeddings, model.get_output_embeddings):
        with suppress(NotImplementedError):  # as of a model of images
            found.append(find())
    ids = {id(module.weight) for module in found if hasattr(module, "weight")}
    return {name for name, tensor in model.state_dict(keep_vars=True).items() if id(tensor) in ids}


def _equal(one: Tensor, two: Tensor) -> bool:
    """Whether two weights are the same in the coarser of their types: a base may be loaded in another than its own."""
    coarser = max((one.dtype, two.dtype), key=lambda dtype: torch.finfo(dtype).eps)
    return torch.equal(one.to(coarser), two.to(coarser))


def own_name(path: str, layer: AdapterLayer) -> str:
    """The base model's name of the weight that a layer adapts; of a tied weight the layer's own one."""
    return f"{path.replace('.base_layer', '')}.{layer.weight_name}"


def plain_name(key: str) -> str:
    """The name in the base model of a head or bias in an adapter file, without PEFT's wrappers."""
    plain = key.removeprefix(PREFIX).replace(".token_adapter.base_layer.", ".")
    return plain.replace(".base_layer.", ".").replace(".modules_to_save.", ".")


def own_part(config: Any) -> Callable[[str], bool]:
    """Whether a tensor of an adapter file, by its name, belongs to the method itself; heads and biases do not."""
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING[config.peft_type]
    return lambda name: any(part.startswith(prefix) for part in name.split("."))


def read_folder(folder: Path) -> tuple[Any, dict[str, Tensor]]:
    """Configuration and tensors of an adapter folder of one of this library's methods.

    Raises:
        InputError: as :func:`open_adapter`.
    """
    file = read_adapter(folder)
    if not isinstance(file.config, AdapterConfig):
        raise InputError(
            f"{folder} holds an adapter of PEFT's {file.method}; only those of lorma's methods are exported"
        )
    kind = kind_of(file.config)
    if not kind.linear:
        raise InputError(
            f"{folder} is a {kind.title(file.config)} adapter, which is not linear: it can be neither exported nor "
            "merged"
        )
    file.config.inference_mode = True
    return file.config, {name: file.read(name) for name in file.tensors}
