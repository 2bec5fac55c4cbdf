"""The configuration of a LoRMA adapter."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from lorma.adapters import validation as check
from lorma.functional.multiplier import INFLATIONS
from lorma.methods.lorma.tuner.fused import FusedProjection
from lorma.tuners.config import AdapterConfig
from lorma.tuners.registration import extend_peft_type

SIDE_CHOICES = ("pre", "post", "auto")


@dataclass
class LormaConfig(AdapterConfig):
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
        alpha_pattern: other lorma_alpha for modules by name or regular expression.
        target_parameters: names of bare 2-D or 3-D parameters, such as ``"experts.gate_up_proj"``; each expert has its
            own multiplier.
        fused_projections: for layers that hold several projections on top of each other, how wide the slices are and
            which are adapted: ``{"c_attn": {"splits": [768, 768, 768], "adapt": [0, 2]}}`` adapts query and value of
            GPT-2. ``adapt`` left out means every slice. Keys are names or regular expressions, as in ``rank_pattern``.
        The rest: as in :class:`lorma.tuners.config.AdapterConfig`.

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
    alpha_pattern: dict[str, float] = field(
        default_factory=dict, metadata={"help": "Other alphas for modules by name or regular expression."}
    )
    fused_projections: dict[str, Any] | None = field(
        default=None, metadata={"help": "Widths of the slices of fused projections, and which of them to adapt."}
    )

    kind_of_peft: ClassVar = extend_peft_type("LORMA")
    weight_names: ClassVar = ("lorma_A", "lorma_B")

    def __post_init__(self) -> None:
        super().__post_init__()
        check.check_alpha("lorma_alpha", self.lorma_alpha)
        check.check_dropout("lorma_dropout", self.lorma_dropout)
        check.check_choice("inflation", self.inflation, INFLATIONS)
        check.check_choice("side", self.side, SIDE_CHOICES)
        for name in ("use_rslora", "use_dora"):
            check.check_bool(name, getattr(self, name))
        self.alpha_pattern = self.alpha_pattern or {}
        check.check_pattern("alpha_pattern", self.alpha_pattern, check.check_alpha)
        self._check_fused()
        if self.use_dora and self.inflation != "plus":
            raise ValueError(
                f"use_dora=True needs inflation='plus', not {self.inflation!r}: only there have the norms of the "
                "multiplied weight a closed form"
            )

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

    def scaling(self, r: int, alpha: float) -> float:
        """The scalar s of a layer of rank ``r``: ``alpha / r``, or ``alpha / sqrt(r)`` with ``use_rslora``."""
        return alpha / math.sqrt(r) if self.use_rslora else alpha / r
