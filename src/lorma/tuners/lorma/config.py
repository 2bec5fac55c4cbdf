"""The configuration of a LoRMA adapter."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft.config import PeftConfig

from lorma.functional.multiplier import INFLATIONS
from lorma.tuners import validation as check
from lorma.tuners.adapter_file import check_adapter_folder
from lorma.tuners.lorma.fused import FusedProjection
from lorma.tuners.merge import UNDO_CHOICES
from lorma.tuners.registration import extend_peft_type

PEFT_TYPE = extend_peft_type("LORMA")
SIDE_CHOICES = ("pre", "post", "auto")
BIAS_CHOICES = ("none", "all", "lorma_only")


@dataclass
class LormaConfig(PeftConfig):
    """LoRMA: a frozen weight multiplied by a trainable, rank-inflated low-rank matrix (arXiv 2506.07621).

    ``W = I(BA)·W0`` on side ``pre``, ``W = W0·I(BA)`` on side ``post``, with A (r × n), B (n × r), n the width of the
    multiplied side and ``s = lorma_alpha / r``. Adds ``2·r·n`` trainable numbers to each adapted layer. The start of
    training is the identity: outputs equal the base model's.

    Args:
        r: rank of A and B.
        lorma_alpha: numerator of the scaling s.
        lorma_dropout: probability of zeroing an input of the *update*, in [0, 1).
        inflation: ``"plus"`` multiplies by ``I + s·BA`` (eq. 8); ``"permutation"`` by ``s·Iπ(BA)``, row i of BA rotated
            right by i (eq. 7); ``"none"`` by ``s·BA`` (eq. 6), the ablation of the paper's Table 6.
        side: ``"pre"`` multiplies the output side of W0, ``"post"`` the input side; ``"auto"`` takes the narrower one
            of each layer (``pre`` on a tie) and so spends the fewest parameters.
        use_rslora: scale by ``lorma_alpha / sqrt(r)`` (rank-stabilised).
        use_dora: DoRMA. Every row of the multiplied weight is rescaled to a trained magnitude (DoRA, arXiv 2402.09353),
            whose start is the row's own norm. For ``inflation="plus"`` on either side. The norms are the one thing
            that reads the base weight in a forward pass.
        target_modules: names (matched at the end of a module's path), a regular expression, or ``"all-linear"``;
            None takes PEFT's choice for LoRA on this architecture.
        exclude_modules: names or a regular expression to leave out.
        fan_in_fan_out: accepted as in PEFT's LoRA; which way a layer stores its weight is read off its kind.
        bias: which biases train: ``"none"``, ``"all"`` or ``"lorma_only"`` (those of adapted layers).
        modules_to_save: further modules that are trained and saved whole.
        init_weights: False starts from random A and B, which is *not* the identity; for tests.
        layers_to_transform, layers_pattern: restrict the adaptation to layers by index, as in PEFT's LoRA.
        rank_pattern, alpha_pattern: other r or lorma_alpha for modules by name or regular expression.
        target_parameters: names of bare 2-D or 3-D parameters, such as ``"experts.gate_up_proj"``; each expert has its
            own multiplier.
        fused_projections: for layers that hold several projections on top of each other, how wide the slices are and
            which are adapted: ``{"c_attn": {"splits": [768, 768, 768], "adapt": [0, 2]}}`` adapts query and value of
            GPT-2. ``adapt`` left out means every slice. Keys are names or regular expressions, as in ``rank_pattern``.
        undo: how a merge is taken back: ``"snapshot"`` (bit for bit, from a copy), ``"inverse"`` (algebraically, with a
            bound on the error; refused for badly conditioned multipliers) or ``"refuse"``. ``merge`` may say otherwise.

    Raises:
        TypeError, ValueError: naming the argument, its value and what is allowed.
    """

    r: int = field(default=8, metadata={"help": "Rank of A and B."})
    lorma_alpha: float = field(default=8, metadata={"help": "Numerator of the scaling alpha / r."})
    lorma_dropout: float = field(default=0.0, metadata={"help": "Dropout on the input of the update."})
    inflation: str = field(default="plus", metadata={"help": "'plus', 'permutation' or 'none'."})
    side: str = field(default="pre", metadata={"help": "'pre', 'post' or 'auto' (the narrower side of each layer)."})
    use_rslora: bool = field(default=False, metadata={"help": "Scale by alpha / sqrt(r) instead of alpha / r."})
    use_dora: bool = field(default=False, metadata={"help": "DoRMA: also train the magnitude of every row."})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Module names, a regular expression, or 'all-linear'."}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Module names or a regular expression to leave out."}
    )
    fan_in_fan_out: bool = field(default=False, metadata={"help": "As in PEFT's LoRA; read off the kind of layer."})
    bias: str = field(default="none", metadata={"help": "'none', 'all' or 'lorma_only'."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules that are trained and saved whole."}
    )
    init_weights: bool = field(default=True, metadata={"help": "False: random start (not the identity)."})
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the layers to adapt."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the ModuleList that layers_to_transform counts in."}
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Other ranks for modules by name or regular expression."}
    )
    alpha_pattern: dict[str, float] = field(
        default_factory=dict, metadata={"help": "Other alphas for modules by name or regular expression."}
    )
    target_parameters: list[str] | None = field(
        default=None, metadata={"help": "Names of bare parameters to adapt, such as stacked expert weights."}
    )
    fused_projections: dict[str, Any] | None = field(
        default=None, metadata={"help": "Widths of the slices of fused projections, and which of them to adapt."}
    )
    undo: str = field(default="snapshot", metadata={"help": "'snapshot', 'inverse' or 'refuse': undoing a merge."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        check.check_rank("r", self.r)
        check.check_alpha("lorma_alpha", self.lorma_alpha)
        check.check_dropout("lorma_dropout", self.lorma_dropout)
        check.check_choice("inflation", self.inflation, INFLATIONS)
        check.check_choice("side", self.side, SIDE_CHOICES)
        check.check_choice("bias", self.bias, BIAS_CHOICES)
        check.check_choice("undo", self.undo, UNDO_CHOICES)
        for name in ("use_rslora", "use_dora", "fan_in_fan_out", "init_weights"):
            check.check_bool(name, getattr(self, name))
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            check.check_names(name, getattr(self, name))
            check.check_regex(name, getattr(self, name))
        for name in ("modules_to_save", "target_parameters"):
            check.check_names(name, getattr(self, name), pattern=False)
        self._check_layers()
        self.rank_pattern = self.rank_pattern or {}
        self.alpha_pattern = self.alpha_pattern or {}
        check.check_pattern("rank_pattern", self.rank_pattern, check.check_rank)
        check.check_pattern("alpha_pattern", self.alpha_pattern, check.check_alpha)
        self._check_fused()
        if self.use_dora and self.inflation != "plus":
            raise ValueError(
                f"use_dora=True needs inflation='plus', not {self.inflation!r}: only there have the norms of the "
                "multiplied weight a closed form"
            )
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, (list, tuple)) else value)

    def _check_fused(self) -> None:
        fused = self.fused_projections
        if fused is None:
            return
        if not isinstance(fused, dict):
            raise TypeError(f"fused_projections={fused!r} must be a dict from module names to how they are cut")
        for name, value in fused.items():
            check.check_regex("key of fused_projections", name)
            FusedProjection.parse(name, value)
        if fused and self.use_dora:
            raise ValueError("use_dora=True is not supported with fused_projections")

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

    def scaling(self, r: int, alpha: float) -> float:
        """The scalar s of a layer of rank ``r``: ``alpha / r``, or ``alpha / sqrt(r)`` with ``use_rslora``."""
        return alpha / math.sqrt(r) if self.use_rslora else alpha / r

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """Read ``adapter_config.json`` of a folder or hub repository.

        A local folder's ``adapter_model.safetensors`` is looked at as well, so that a truncated or foreign file is
        refused before a model is touched.

        Raises:
            TypeError, ValueError: for values that are not allowed, or a weights file that is not a LoRMA adapter's.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if isinstance(config, cls):
            check_adapter_folder(Path(pretrained_model_name_or_path, subfolder or ""))
        return config
