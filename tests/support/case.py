"""One case: a kind of layer with an inflation and a side, and what is needed to examine it."""

from contextlib import contextmanager
from dataclasses import dataclass
from warnings import catch_warnings, filterwarnings

import torch
from peft import get_peft_model
from torch import nn
from torch.func import functional_call

from lorma import LormaConfig
from support import plain
from support.kinds import QUANTISED_SIZE, Kind

INFLATIONS = ("plus", "permutation", "none")
SIDES = ("pre", "post", "auto")
ADDITIONALLY = "Already following adapters were merged"
"""PEFT's warning when one adapter is merged after another."""
STD = 0.15
"""Spread of random factors: far from the identity, and well conditioned."""


class Model(nn.Module):
    """A model of one layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


@dataclass(frozen=True)
class Case:
    kind: Kind
    inflation: str
    side: str

    marker = "lorma_A"
    """What every adapter layer has."""
    dropout_name = "lorma_dropout"
    starts_exactly = property(lambda self: self.inflation == "plus")
    ordered = True
    """Whether it matters which adapter acts first."""

    # Models

    def base(self, dtype=None) -> nn.Module:
        """The base model, the same at each call."""
        torch.manual_seed(0)
        return Model(self.kind.make(dtype or self.kind.dtype)).requires_grad_(False)

    def config(self, **options) -> LormaConfig:
        options = {"r": 2, "lorma_alpha": 3, **self.kind.targets, **options}
        return LormaConfig(inflation=self.inflation, side=self.side, **options)

    def started(self, base=None, **options):
        """A model with an adapter as training starts."""
        torch.manual_seed(1)
        return get_peft_model(self.base() if base is None else base, self.config(**options))

    def adapted(self, base=None, **options):
        """A model with an adapter of random factors."""
        return randomise(self.started(base, **options))

    def with_two(self, r=3, **options):
        """Adapters ``default`` and ``second``."""
        model = self.adapted(**options)
        model.add_adapter("second", self.config(r=r, **options))
        return randomise(model, "second", seed=5)

    def x(self, dtype=None):
        generator = torch.Generator().manual_seed(2)
        if self.kind.vocabulary:
            return torch.randint(0, self.kind.vocabulary, self.kind.x, generator=generator)
        return torch.randn(self.kind.x, generator=generator).to(dtype or self.kind.dtype)

    # The plain definition: an adapter is a list of (A, B, s) or (A, B, s, magnitude), one for each multiplied weight

    def plain_model(self) -> nn.Module:
        """The base model in floating point: a quantised layer is replaced by what it stands for."""
        base = self.base()
        if self.kind.read is not None:
            linear = nn.Linear(*QUANTISED_SIZE[::-1], dtype=self.kind.dtype)
            linear.weight = nn.Parameter(self.kind.read(base.layer), requires_grad=False)
            linear.bias = base.layer.bias
            base.layer = linear
        return base

    def plain_weights(self, *adapters):
        """The weights multiplied by each of ``adapters`` in turn, by name."""
        base = dict(self.plain_model().named_parameters())
        weights = {f"layer.{part.weight}": base[f"layer.{part.weight}"] for part in self.kind.parts}
        for adapter in adapters:
            for (name, W), part, factors in zip(weights.items(), self.kind.parts, adapter, strict=True):
                weights[name] = self._multiplied(W, part, *factors)
        return weights

    def _multiplied(self, W, part, A, B, s, magnitude=None):
        side = part.acting_side(self.side)
        Ms = plain.multipliers(A, B, s, self.inflation, part.widths(side))
        W = part.multiply(W, Ms, side)
        return W if magnitude is None else plain.rescaled(W, magnitude, part.out_axis)

    def plain_output(self, x, *adapters):
        """Output of the plain model with the weights multiplied."""
        return functional_call(self.plain_model(), self.plain_weights(*adapters), (x,))

    # Looking into a model

    def layers(self, model) -> list:
        """The LoRMA layers, one for each multiplied weight."""
        found = [module for module in model.modules() if self.marker in dict(module.named_children())]
        assert len(found) == len(self.kind.parts)
        return found

    def adapter(self, model, name="default"):
        """An adapter of a model."""
        adapter = []
        for layer, part in zip(self.layers(model), self.kind.parts, strict=True):
            assert layer.side[name] == part.acting_side(self.side)
            factors = (layer.lorma_A[name], layer.lorma_B[name], float(layer.scaling[name]))
            held = layer.lorma_magnitude_vector
            adapter.append((*factors, held[name]) if name in held else factors)
        return adapter

    def weight(self, model):
        """The numbers of all multiplied weights in one vector, dequantised."""
        return torch.cat([self._numbers(layer).flatten() for layer in self.layers(model)])

    def _numbers(self, layer):
        base = layer.get_base_layer()
        stored = getattr(base, layer.weight_name)
        return stored.detach() if type(stored) is nn.Parameter else self.kind.read(base)

    @property
    def quantized(self) -> str | None:
        """How features that merge, but are not about how, merge into this kind."""
        return None if self.kind.read is None else "dequantize"

    @property
    def eval_tolerance(self) -> float:
        return self.kind.eval_tolerance or self.kind.tolerance

    def same_settings(self, loaded, model) -> bool:
        """Whether two models' adapters are set alike."""
        return loaded.peft_config["default"].inflation == self.inflation and (
            [layer.scaling for layer in self.layers(loaded)] == [layer.scaling for layer in self.layers(model)]
        )

    def parameters(self) -> int:
        """How many numbers an adapter trains."""
        widths = [part.widths(part.acting_side(self.side)) for part in self.kind.parts]
        return 2 * 2 * sum(map(sum, widths))

    def check_close(self, got, expected, tolerance=None):
        error = distance(got, expected)
        assert error <= (tolerance or self.kind.tolerance), f"relative distance {error:.3g}"

    def check_all_close(self, got, expected, tolerance=None):
        for mine, theirs in zip(got, expected, strict=True):
            self.check_close(mine, theirs, tolerance)

    def check_differs(self, got, other):
        assert distance(got, other) > 1e-3


def distance(got, expected) -> float:
    """‖got − expected‖ / ‖expected‖."""
    assert got.shape == expected.shape
    got, expected = got.detach().double(), expected.detach().double()
    assert torch.isfinite(got).all()
    return ((got - expected).norm() / expected.norm().clamp_min(1e-300)).item()


def randomise(model, adapter="default", seed=3):
    """Add noise to A, B and the magnitude of one adapter."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ("lorma_" in name or "tlora_" in name) and f".{adapter}." in name:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * STD
            parameter.data.add_(noise.to(parameter.dtype))
    return model


def trained(adapter):
    """The tensors of an adapter, without its scalings."""
    return [tensor for factors in adapter for tensor in factors if isinstance(tensor, torch.Tensor)]


def flat(weights):
    """The numbers of several weights, by name, in one vector."""
    return torch.cat([W.flatten() for W in weights.values()])


def scaled(adapter, weight):
    """An adapter with its scalings times ``weight``."""
    return [(A, B, weight * s) for A, B, s in adapter]


def gradients(output, *inputs):
    """Gradients for a fixed gradient of the output."""
    seed = torch.randn(output.shape, generator=torch.Generator().manual_seed(4)).to(output.dtype)
    return torch.autograd.grad(output, inputs, seed)


@contextmanager
def quiet(*messages):
    """Without the warnings that PEFT gives for what is done here on purpose."""
    with catch_warnings():
        for message in messages:
            filterwarnings("ignore", message=message)
        yield
