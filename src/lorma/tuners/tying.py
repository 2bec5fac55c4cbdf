"""Trained tokens, and embeddings that a model ties: what PEFT wraps beside the adapted layers, checked beforehand.

PEFT itself puts rows of an embedding (``trainable_token_indices``) or whole copies (``modules_to_save``) around the
modules that they replace. What it would find out in the middle, or in a forward pass, is refused here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper, _get_input_embeddings_name
from torch import nn

from lorma.tuners.targets import near_modules


def plain_path(path: str) -> str:
    """A module's path in the base model, whatever PEFT has put around it."""
    for part in (".token_adapter", ".original_module", ".base_layer"):
        path = path.replace(part, "")
    return path


def token_modules(model: nn.Module, config: Any) -> dict[str, tuple[nn.Module, list[int]]]:
    """The modules whose rows ``trainable_token_indices`` names, by path, each with the numbers of its rows.

    Raises:
        ValueError: a name that no module has.
    """
    wanted = config.trainable_token_indices
    if wanted is None:
        return {}
    if not isinstance(wanted, dict):
        wanted = {_get_input_embeddings_name(model, "embed_tokens"): wanted}
    found: dict[str, tuple[nn.Module, list[int]]] = {}
    for name, rows in wanted.items():
        paths = {path: module for path, module in model.named_modules() if _is_plain(path) and path.endswith(name)}
        if not paths:
            raise ValueError(
                f"trainable_token_indices names {name!r}, which this model does not have; {near_modules(model, [name])}"
            )
        found |= {path: (inner_module(module), list(rows)) for path, module in paths.items()}
    return found


def inner_module(module: nn.Module) -> nn.Module:
    """The base model's module inside the wrappers of PEFT that train parts or copies of it."""
    while isinstance(module, AuxiliaryTrainingWrapper):
        module = module.original_module
    return module


def check_tokens_fit(model: nn.Module, config: Any, tied: Iterable[str], is_target: Callable[[str], object]) -> None:
    """Refuse tokens that cannot be trained in this model.

    Args:
        tied: paths of modules that are tied to the input embedding.
        is_target: whether the adapter is on the module of a path.

    Raises:
        ValueError: naming the token or the module.
    """
    modules = token_modules(model, config)
    if not modules:
        return
    name = "trainable_token_indices"
    for path, (module, rows) in modules.items():
        weight: Any = getattr(module, "weight", None)
        if not isinstance(module, (nn.Embedding, nn.Linear)) or not weight.is_floating_point():
            raise ValueError(f"{name} names {path}, a {type(module).__name__}; rows are trained of nn.Embedding only")
        if max(rows) >= len(weight):
            raise ValueError(f"{name} holds {max(rows)}; allowed for {path}: 0 to {len(weight) - 1}")
    follows = set(tied) if _get_input_embeddings_name(model) in modules else set()
    whole = tuple(config.modules_to_save or ())
    for path in {*modules, *follows}:
        if is_target(path) or (whole and path.endswith(whole)):
            what = "target_modules" if is_target(path) else "modules_to_save"
            why = "" if path in modules else ", which is tied to the embedding"
            raise ValueError(
                f"{name} and {what} both train {path}{why}; one adapter cannot do both, so leave it out of one of them"
            )
    check_no_bias(model, {*modules, *follows}, name)


def tied_modules(model: nn.Module, found: Iterable[str]) -> list[str]:
    """Paths in the base model of the modules that are tied to its input embedding.

    Args:
        found: those that PEFT finds, which are none where a trained copy stands for the embedding.
    """
    paths = {plain_path(path) for path in found}
    tying = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
    keys = getattr(model, "_tied_weights_keys", None)
    if tying and isinstance(keys, dict) and (source := _get_input_embeddings_name(model)):
        weight = f"{plain_path(source)}.weight"
        paths |= {tied.removesuffix(".weight") for tied, own in keys.items() if own == weight}
    return sorted(paths)


def check_no_bias(model: nn.Module, paths: Iterable[str], name: str) -> None:
    """Refuse output layers with a bias, which PEFT's wrappers of tied weights leave out (``ValueError``)."""
    for path in sorted(paths):
        module = inner_module(model.get_submodule(path))
        if getattr(module, "bias", None) is not None:
            raise ValueError(f"{name}: {path} is tied to the embedding and has a bias, which PEFT would leave out")


def token_wrappers(model: nn.Module, adapter_name: str) -> list[tuple[str, TrainableTokensWrapper]]:
    """Modules of an adapted model of which an adapter trains rows, tied ones included, by their path."""
    return [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, TrainableTokensWrapper) and adapter_name in module.token_adapter.token_indices
    ]


def _is_plain(path: str) -> bool:
    return bool(path) and plain_path(path) == path and ".modules_to_save" not in path
