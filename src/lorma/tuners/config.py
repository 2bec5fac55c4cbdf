"""What the configurations of all adapters have in common: which modules are adapted, and checks of every field."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from peft import LoraConfig
from peft.config import PeftConfig
from peft.utils import PeftType

from lorma.adapters import validation as check
from lorma.adapters.card import write_card
from lorma.adapters.folder import CONFIG_NAME, WEIGHTS_NAME, check_weights, read_config
from lorma.adapters.untrusted import read_header
from lorma.errors import did_you_mean
from lorma.tuners.merge import UNDO_CHOICES

LORAS_FIELDS = {"lora_bias": "bias", "init_lora_weights": "init_weights"}
"""Fields of LoRA whose names here are not LoRA's with the method's name in place of ``lora``."""


class _NamedFields(type):
    """Configurations that answer a name they do not have with the nearest one that they have."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        known = [entry.name for entry in fields(cls) if entry.init]  # type: ignore[arg-type]
        for name in kwargs:
            if name not in known:
                # PEFT drops fields of later versions from files by these words.
                hint = _nearest(cls, name, known)
                raise TypeError(f"{cls.__name__} got an unexpected keyword argument {name!r}{hint}")
        return super().__call__(*args, **kwargs)


def _nearest(cls: Any, name: str, known: list[str]) -> str:
    method = str(cls.kind_of_peft.value).lower()
    own = [other for other in (name.replace("lora", method), LORAS_FIELDS.get(name)) if other in known]
    if own:
        return f"; did you mean {own[0]!r}?"
    loras = {entry.name for entry in fields(LoraConfig)}
    return f": {method} has nothing like this field of LoRA" if name in loras else did_you_mean(name, known)


@dataclass
class AdapterConfig(PeftConfig, metaclass=_NamedFields):
    """The fields that every method has; see the method's own class for the rest.

    Args:
        target_modules: names (matched at the end of a module's path), a regular expression, or ``"all-linear"``;
            None takes PEFT's choice for LoRA on this architecture.
        exclude_modules: names or a regular expression to leave out.
        fan_in_fan_out: accepted as in PEFT's LoRA; which way a layer stores its weight is read off its kind.
        bias: which biases train: ``"none"``, ``"all"`` or ``"<method>_only"`` (those of adapted layers).
        modules_to_save: further modules that are trained and saved whole.
        trainable_token_indices: rows of an embedding that are trained and saved whole: token numbers of the model's
            input embedding, or a dict from names of embeddings to such lists. Weights tied to it follow.
        ensure_weight_tying: train embeddings that the model ties as one, where ``modules_to_save`` or
            ``target_modules`` name one of them; without it they come apart.
        init_weights: False starts from random factors, which is *not* the base model; for tests.
        layers_to_transform, layers_pattern: restrict the adaptation to layers by index, as in PEFT's LoRA.
        rank_pattern: other r for modules by name or regular expression.
        target_parameters: names of bare parameters, such as stacked expert weights.
        undo: how a merge is taken back: ``"snapshot"`` (bit for bit, from a copy), ``"inverse"`` (algebraically, with a
            bound on the error; refused for badly conditioned multipliers) or ``"refuse"``. ``merge`` may say otherwise.

    Raises:
        TypeError, ValueError: naming the argument, its value and what is allowed.
    """

    r: int = field(default=8, metadata={"help": "Rank."})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Module names, a regular expression, or 'all-linear'."}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Module names or a regular expression to leave out."}
    )
    fan_in_fan_out: bool = field(default=False, metadata={"help": "As in PEFT's LoRA; read off the kind of layer."})
    bias: str = field(default="none", metadata={"help": "'none', 'all' or '<method>_only'."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules that are trained and saved whole."}
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Tokens whose embeddings are trained: a list, or lists by name of embedding."}
    )
    ensure_weight_tying: bool = field(
        default=False, metadata={"help": "Train tied embeddings as one, in modules_to_save or target_modules."}
    )
    init_weights: bool = field(default=True, metadata={"help": "False: random start (not the base model)."})
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the layers to adapt."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the ModuleList that layers_to_transform counts in."}
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Other ranks for modules by name or regular expression."}
    )
    target_parameters: list[str] | None = field(
        default=None, metadata={"help": "Names of bare parameters to adapt, such as stacked expert weights."}
    )
    undo: str = field(default="snapshot", metadata={"help": "'snapshot', 'inverse' or 'refuse': undoing a merge."})

    kind_of_peft: ClassVar[PeftType]
    """The method's member of ``PeftType``."""
    weight_names: ClassVar[tuple[str, ...]] = ()
    """Names that the weights of this method's adapters have in a file."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = self.kind_of_peft
        check.check_rank("r", self.r)
        check.check_choice("bias", self.bias, ("none", "all", f"{self.peft_type.lower()}_only"))
        check.check_choice("undo", self.undo, UNDO_CHOICES)
        for name in ("fan_in_fan_out", "init_weights", "ensure_weight_tying"):
            check.check_bool(name, getattr(self, name))
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            check.check_names(name, getattr(self, name))
            check.check_regex(name, getattr(self, name))
        for name in ("modules_to_save", "target_parameters"):
            check.check_names(name, getattr(self, name), pattern=False)
        check.check_tokens("trainable_token_indices", self.trainable_token_indices)
        self.modules_to_tie: set[str] | None = None
        self.target_modules_to_tie: set[str] | None = None
        self._check_layers()
        self.rank_pattern = self.rank_pattern or {}
        check.check_pattern("rank_pattern", self.rank_pattern, check.check_rank)
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, (list, tuple)) else value)

    def _check_layers(self) -> None:
        layers = self.layers_to_transform
        indices = layers if isinstance(layers, (list, tuple)) else [] if layers is None else [layers]
        for index in indices:
            if isinstance(index, bool) or not isinstance(index, int) or index < 0:
                raise TypeError(f"layers_to_transform={layers!r} must be a layer index or a list of them (ints from 0)")
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(f"`{name}` cannot be used when `target_modules` is a str.")
        if self.layers_pattern and not indices:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write ``adapter_config.json``, and the model card beside it; see :mod:`lorma.adapters.card`."""
        super().save_pretrained(save_directory, **kwargs)
        write_card(Path(save_directory), self)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """Read ``adapter_config.json`` of a folder or hub repository.

        A local folder's ``adapter_model.safetensors`` is looked at as well, so that a truncated or foreign file, or
        one of other ranks, is refused before a model is touched; see :mod:`lorma.adapters.folder`.

        Raises:
            TypeError, ValueError: for values that are not allowed, or weights that do not belong to them.
        """
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        if (folder / CONFIG_NAME).is_file():
            read_config(folder)
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if isinstance(config, cls) and (folder / WEIGHTS_NAME).is_file():
            check_weights(folder, config, read_header(folder, WEIGHTS_NAME))
        return config
