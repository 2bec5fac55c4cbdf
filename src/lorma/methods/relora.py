"""Cycles of low rank that add up to a high one: ReLoRA (arXiv 2307.05695), and ReLoRMA, the same with products.

Every ``every`` optimizer steps a cycle ends: what was learnt is kept, A and B start anew, and the optimizer forgets
most of what it knew of them (``prune``, the share of the smallest moments set to zero). In the next steps the learning
rate rises to the schedule's (``warmup``). ReLoRMA's cycles multiply: ``W = (I + s·B_T·A_T)···(I + s·B_1·A_1)·W0``.

* ``keep: chain``: finished cycles stay a frozen adapter beside the base weight, and the run saves one ordinary adapter
  of rank cycles·r (exactly: :func:`lorma.functional.compose_all`; a sum for ReLoRA). The base weight is never touched,
  so it may be quantised, and undoing a merge is exact.
* ``keep: merged``: finished cycles go into the base weight, and the run saves a model. In float32 only: in bfloat16 a
  small update would be rounded away.

Not as in the published code: there, A and B both start at zero, and the first cycle trains nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from lorma.errors import InputError
from lorma.methods.base import Context, Hooks, Options, register_method
from lorma.methods.lorma import lorma_config
from lorma.methods.peft import lora_config

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import Tensor

    from lorma.schema import AdapterSpec


TRAINED = "trained/"


class CycleOptions(Options):
    """When a cycle ends, and what is kept of it."""

    every: int = Field(default=100, ge=1, description="optimizer steps of a cycle")
    keep: Literal["chain", "merged"] = Field(default="chain", description="finished cycles, as an adapter or in W0")
    prune: float = Field(default=0.9, ge=0, le=1, description="share of A's and B's moments that a new cycle forgets")
    warmup: int = Field(
        default=5, ge=0, description="steps in which the learning rate rises in a new cycle (fewer than every)"
    )


class MultipliedCycleOptions(CycleOptions):
    """As :class:`CycleOptions`, with the inflation of the cycles' multipliers."""

    inflation: Literal["plus", "permutation"] = Field(default="plus", description="of each cycle's multiplier")

    @model_validator(mode="after")
    def _chains_are_plus(self) -> MultipliedCycleOptions:
        if self.keep == "chain" and self.inflation != "plus":
            raise ValueError("keep=chain needs inflation=plus, the only one closed under products; take keep=merged")
        return self


class Cycles(Hooks):
    """Ends cycles; remembers how many there were and what they have left.

    It brings the trained weights back itself: PEFT's file would not know the chain.
    """

    restores_weights = True

    def __init__(self, options: CycleOptions) -> None:
        super().__init__(options)
        self.cycles = 0

    @property
    def merged(self) -> bool:
        """Whether finished cycles go into the base weight."""
        return bool(self.options.keep == "merged")

    @property
    def saves_model(self) -> bool:
        return self.merged

    def prepare(self, model: Any) -> None:
        import torch

        from lorma.tuners.surgery import adapted_layers, has_chain_form

        for path, layer in adapted_layers(model):
            if not self.merged:
                if not has_chain_form(layer):
                    raise InputError(
                        f"method.keep='chain' is not possible on {path}, which is no linear layer; leave it out of "
                        "adapter.target_modules, or take keep=merged"
                    )
                continue
            weight = getattr(layer.get_base_layer(), "weight", None)
            names = [name for name, other in model.named_parameters(remove_duplicate=False) if other is weight]
            if len(names) > 1:
                raise InputError(f"method.keep='merged' would change {' and '.join(names)}, which are one weight")
            dtype = getattr(weight, "dtype", None)
            if dtype not in (torch.float32, torch.float64):
                raise InputError(
                    f"method.keep='merged' needs weights in float32, and {path} is in {dtype}: a small update would be "
                    "rounded away; take keep=chain, or model.dtype=float32"
                )

    def before_step(self, context: Context) -> None:
        done = context.step - self.cycles * self.options.every
        warmup = min(self.options.warmup, self.options.every - 1)
        if self.cycles and done < warmup:
            rates = context.scheduler.get_last_lr()
            for group, rate in zip(context.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * (done + 1) / (warmup + 1)

    def after_step(self, context: Context) -> None:
        from lorma.tuners.surgery import adapter_pairs, extend_chain, fold, prune_moments, restart

        step = context.step + 1
        if step % self.options.every or step == context.max_steps:
            return
        import torch

        (fold if self.merged else extend_chain)(context.model)
        self.cycles += 1
        restart(context.model, seed=torch.initial_seed() + self.cycles)
        factors = [factor for _, A, B in adapter_pairs(context.model) for factor in (A, B)]
        prune_moments(context.optimizer, factors, self.options.prune)

    def finish(self, context: Context) -> Any:
        from lorma.tuners.surgery import close_chain

        if self.merged:
            return context.model.merge_and_unload()
        close_chain(context.model)
        return context.model

    def state_dict(self, model: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
        from lorma.tuners.surgery import adapted_layers, chain_tensors

        if self.merged:
            kept = {path: layer.get_base_layer().weight.detach() for path, layer in adapted_layers(model)}
        else:
            kept = chain_tensors(model)
        trained = {f"{TRAINED}{path}": p.detach() for path, p in model.named_parameters() if p.requires_grad}
        return kept | trained, {"cycles": self.cycles}

    def load_state_dict(self, model: Any, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        from lorma.tuners.surgery import adapted_layers, load_chain

        self.cycles = values["cycles"]
        if self.merged:
            for path, layer in adapted_layers(model):
                layer.get_base_layer().weight.data.copy_(tensors[path])
        else:
            load_chain(model, tensors)
        for path, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.data.copy_(tensors[f"{TRAINED}{path}"])


@register_method(
    "relorma",
    equation="∏(I + s·BₜAₜ)·W0",
    parameters="2·r·d a cycle",
    source="ReLoRA, arXiv 2307.05695",
    knob="r of a cycle",
    hooks=Cycles,
    options=MultipliedCycleOptions,
)
def relorma(adapter: AdapterSpec, task_type: str, options: MultipliedCycleOptions) -> PeftConfig:
    """LoRMA in cycles."""
    return lorma_config(adapter, task_type, inflation=options.inflation)


@register_method(
    "relora",
    equation="W0 + Σ s·BₜAₜ",
    parameters="r·(d + k) a cycle",
    source="ReLoRA, arXiv 2307.05695",
    knob="r of a cycle",
    hooks=Cycles,
    options=CycleOptions,
)
def relora(adapter: AdapterSpec, task_type: str, options: CycleOptions) -> PeftConfig:
    """LoRA in cycles."""
    return lora_config(adapter, task_type)
