"""What a method of fine-tuning is, and where methods are entered and looked up, those of other packages among them.

Everything that is particular to a method is said by its :class:`Method`; other parts ask it and never its name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import ValidationError

from lorma.errors import InputError, did_you_mean
from lorma.schema import Section

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import Tensor
    from torch.optim import Optimizer

    from lorma.schema import AdapterSpec, TrainSpec

GROUP = "lorma.methods"
"""The entry-point group in which other packages name their methods."""

Build = Callable[..., "PeftConfig"]


class Options(Section):
    """What a recipe can say about a method besides its name; of a method without options there is nothing to say."""


@dataclass(frozen=True)
class Context:
    """What a hook is given: the model as it is trained, its optimizer and schedule, and how far training is.

    ``step`` counts the optimizer steps that are done; the step that a hook comes before or after is not among them.
    """

    model: Any
    optimizer: Any
    scheduler: Any
    step: int
    max_steps: int
    skipped: bool = False
    """Whether the optimizer has left the step out because gradients overflowed (float16)."""


class Hooks:
    """What a method does while it trains. One object a run; what it must remember is in ``state_dict``.

    ``state_dict`` goes into every checkpoint, and ``load_state_dict`` is called once the model has the weights of the
    checkpoint and before its optimizer has its state, so that a killed run goes on to the same result.
    """

    restores_weights: ClassVar[bool] = False
    """Whether ``load_state_dict`` brings back the adapter's weights as well, instead of PEFT."""
    earlier_state_file: ClassVar[str | None] = None
    """What a checkpoint of an earlier version calls the file of ``state_dict``."""

    def __init__(self, options: Any) -> None:
        self.options = options

    @property
    def saves_model(self) -> bool:
        """Whether ``finish`` returns a model without an adapter."""
        return False

    def prepare(self, model: Any) -> None:
        """The adapter is on the model and nothing is written: refuse what is not possible (``InputError``)."""

    def start(self, context: Context) -> None:
        """Before the first step, and before the first one after a resumption."""

    def before_step(self, context: Context) -> None:
        """Gradients are there and clipped; the optimizer has not moved."""

    def after_step(self, context: Context) -> None:
        """The optimizer has moved; gradients are still there."""

    def finish(self, context: Context) -> Any:
        """After the last step: the model that the run saves, with its adapter or whole."""
        return context.model

    def state_dict(self, model: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors, and values that JSON can hold, without which training cannot go on."""
        return {}, {}

    def load_state_dict(self, model: Any, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Take up what ``state_dict`` gave."""


@dataclass(frozen=True)
class Method:
    """A way to fine-tune.

    Attributes:
        name: what recipes and tables call it.
        equation: the adapted weight.
        parameters: trainable numbers for one d × k weight.
        source: where it was published.
        build: from the adapter section of a recipe and PEFT's task type (and the method's options, where it has any)
            to a PEFT configuration; None trains the model itself.
        options: what a recipe can say about the method, with types and defaults.
        knob: what the recipe's ``adapter.r`` becomes; None if the method has no such knob.
        own_targets: whether the method chooses its modules itself where the recipe names none. Otherwise they are
            those of LoRA for the architecture, so that methods that are compared adapt the same weights.
        prepare: changes the model once the adapter is on it, given the model, the adapter section and the task type.
        optimizer: the optimizer for the model and the train section, instead of AdamW.
        hooks: what it does while it trains.
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
    hooks: type[Hooks] = Hooks
    options: type[Options] = Options

    def read_options(self, given: dict[str, Any]) -> Options:
        """The options of a recipe, checked, with defaults for the others.

        Raises:
            InputError: an option that there is not, with the nearest one, or a value that is not allowed.
        """
        allowed = list(self.options.model_fields)
        for key in given:
            if key not in allowed:
                known = f"its options: {', '.join(allowed)}{did_you_mean(key, allowed)}" if allowed else "it has none"
                raise InputError(f"method.{key}: method {self.name!r} has no such option; {known}")
        try:
            return self.options.model_validate(given)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            if first["type"] == "missing":
                raise InputError(f"method.{key} is missing: method {self.name!r} needs it") from None
            reason = first["msg"].removeprefix("Value error, ")
            raise InputError(f"method.{key}={first['input']!r}: {reason}" if key else f"method: {reason}") from None

    def configure(self, adapter: AdapterSpec, task_type: str | None, options: Options) -> PeftConfig:
        """The PEFT configuration of a method that has one; a model that PEFT has no task for has None."""
        assert self.build is not None
        further = (options,) if self.options is not Options else ()
        return self.build(adapter, task_type, *further)


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
