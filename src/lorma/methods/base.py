"""Where methods are entered and looked up, those of other packages among them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorma.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch.optim import Optimizer
    from transformers import TrainerCallback

    from lorma.schema import AdapterSpec, TrainSpec

GROUP = "lorma.methods"
"""The entry-point group in which other packages name their methods."""

Build = Callable[["AdapterSpec", str], "PeftConfig"]


@dataclass(frozen=True)
class Method:
    """A way to fine-tune.

    Attributes:
        name: what recipes and tables call it.
        equation: the adapted weight.
        parameters: trainable numbers for one d × k weight.
        source: where it was published.
        build: from the adapter section of a recipe and PEFT's task type to a PEFT configuration; None trains the
            model itself.
        knob: what the recipe's ``adapter.r`` becomes; None if the method has no such knob.
        own_targets: whether the method chooses its modules itself where the recipe names none. Otherwise they are
            those of LoRA for the architecture, so that methods that are compared adapt the same weights.
        prepare: changes the model once the adapter is on it, given the model, the adapter section and the task type.
        optimizer: the optimizer for the model and the train section, instead of AdamW.
        callback: a Trainer callback for the model.
        restore: loads a checkpoint folder into the model where PEFT's own loading does not bring everything back.
    """

    name: str
    equation: str
    parameters: str
    source: str
    build: Build | None
    knob: str | None = "r"
    own_targets: bool = False
    prepare: Callable[[Any, AdapterSpec, str], None] | None = None
    optimizer: Callable[[Any, TrainSpec], Optimizer] | None = None
    callback: Callable[[Any], TrainerCallback] | None = None
    restore: Callable[[Any, Path], None] | None = None


_METHODS: dict[str, Method] = {}


def register(method: Method) -> Method:
    """Enter a method.

    Raises:
        ValueError: another one has this name.
    """
    known = _METHODS.get(method.name)
    if known is not None and not _same_place(known, method):
        raise ValueError(f"the method {method.name!r} is registered already")
    _METHODS[method.name] = method
    return method


def register_method(
    name: str, *, equation: str, parameters: str, source: str, **parts: Any
) -> Callable[[Build], Build]:
    """Decorate a function ``(adapter, task_type) -> PeftConfig`` to enter it as a method.

    Args:
        name, equation, parameters, source, parts: the attributes of :class:`Method`.

    Raises:
        ValueError: another method has this name.
        TypeError: a part that there is not.
    """

    def enter(build: Build) -> Build:
        register(Method(name, equation, parameters, source, build, **parts))
        return build

    return enter


def get_method(name: str) -> Method:
    """The method called ``name``, of this package or of another one.

    Raises:
        InputError: there is none (the message lists them and the nearest), or the package that names it is broken.
    """
    if name not in _METHODS:
        for plugin in _plugins():
            if plugin.name == name:
                _load(plugin)
    if name not in _METHODS:
        names = method_names()
        raise InputError(f"method={name!r} is unknown; allowed: {', '.join(names)}{did_you_mean(name, names)}")
    return _METHODS[name]


def method_names() -> list[str]:
    """Names of all methods; those of other packages, which are not loaded for this, come last."""
    return list(dict.fromkeys([*_METHODS, *(plugin.name for plugin in _plugins())]))


def all_methods() -> list[Method]:
    """All methods, those of other packages last.

    Raises:
        InputError: a package that names one is broken.
    """
    return [get_method(name) for name in method_names()]


def _plugins() -> list[EntryPoint]:
    return sorted(entry_points(group=GROUP), key=lambda plugin: plugin.name)


def _load(plugin: EntryPoint) -> None:
    package = plugin.dist.name if plugin.dist else "an unknown package"
    try:
        plugin.load()
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise InputError(f"method={plugin.name!r} of {package} ({plugin.value}) cannot be loaded: {reason}") from error
    if plugin.name not in _METHODS:
        raise InputError(
            f"method={plugin.name!r} of {package}: loading {plugin.value} registered no method of this name"
        )


def _same_place(one: Method, other: Method) -> bool:
    """Whether two methods come from the same line of a module, which then was imported a second time."""

    def place(method: Method) -> tuple[str, str] | None:
        return (method.build.__module__, method.build.__qualname__) if method.build else None

    return place(one) is not None and place(one) == place(other)
