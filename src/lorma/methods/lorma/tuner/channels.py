"""Layers that map channels to channels: the base layer is a black box, and what goes in or comes out is multiplied.

pre: ``out = I(BA)·(base(x) − bias) + bias``; post: ``out = base(I(BA)·x)``. Neither reads the base weight, so any layer
that computes a linear map will do, whatever holds its weight. Only the update is added, ``out = base(x) + (I(BA) −
I)·dropout(y)``: at the start of training plus adds exact zeros, and in low precision a small update is not rounded
into a large weight.

Several active adapters act in the order in which they were activated, the first on W0 first. For post that means the
*last* one meets the input first: W0·M₁·M₂·x.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from lorma import functional, kernels
from lorma.functional.multiplier import Inflation
from lorma.methods.lorma.tuner.layer import LormaLayer
from lorma.tuners.calling import CallingLayer
from lorma.tuners.devices import full_tensor, onloaded
from lorma.tuners.plain import drops
from lorma.tuners.row_groups import Group, Routes, divide


class ChannelLayer(CallingLayer, LormaLayer):
    """Every layer whose input and output have a channel dimension."""

    # One adapter for the whole batch, with nothing between it and the base layer

    def _is_plain(self, name: str, x: Tensor) -> bool:
        """Whether an adapter is one multiplier, at hand, and no more: no DoRA, slices, groups, dropout or ``none``."""
        held = self._modules  # looked up once: this is called for every token that is generated
        if type(x) is not Tensor or name in self.fused or name in cast(Any, held["lorma_magnitude_vector"]):
            return False
        dropout = held["lorma_dropout"]._modules[name]  # type: ignore[union-attr]
        special = drops(dropout) or self.inflation[name] == "none" or self.blocks > 1
        return not special and not held["lorma_A"]._modules[name].weight.is_meta  # type: ignore[union-attr]

    def _forward_alone(self, x: Tensor, name: str, *args: Any, **kwargs: Any) -> Tensor:
        if self._acts_on_inputs(name):
            return self.base_layer(self._multiplied(x, name), *args, **kwargs)
        result = self.base_layer(x, *args, **kwargs)
        with onloaded((self.get_base_layer(),)):
            bias = getattr(self.get_base_layer(), "bias", None)
            return self._multiplied(result, name, None if bias is None else full_tensor(bias))

    def _multiplied(self, x: Tensor, name: str, bias: Tensor | None = None) -> Tensor:
        (A, B), s, inflation = self._factors(name), self.scaling[name], self.inflation[name]
        out = self._channels_back(kernels.multiply(self._channels_last(x), A, B, s, inflation, bias))
        return out.contiguous() if x.is_contiguous() else out

    def _factors(self, name: str) -> tuple[Tensor, Tensor]:
        """A and B of what activations are multiplied by."""
        held = cast(Any, self._modules)
        return held["lorma_A"]._modules[name].weight, held["lorma_B"]._modules[name].weight

    def _channels_last(self, x: Tensor) -> Tensor:
        return x

    def _channels_back(self, x: Tensor) -> Tensor:
        return x

    # A mixed batch: for each row its own adapter

    def _forward_mixed(self, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        def kind_of(name: str) -> tuple[bool, Inflation, int] | None:
            if not self._is_plain(name, x):
                return None
            return self._acts_on_inputs(name), self.inflation[name], len(self.lorma_A[name])

        routes, groups = divide(adapter_names, self.undo, kind_of, x.device)
        for group in groups:
            if group.on_inputs:
                x = self._multiplied_rows(x, group)
        result = self._call_base(x, routes, *args, **kwargs)
        with onloaded((self.get_base_layer(),)):
            result = self._multiply_outputs(result, routes)
            for group in groups:
                if not group.on_inputs:
                    result = self._multiplied_rows(result, group, getattr(self.get_base_layer(), "bias", None))
        return result

    def _multiplied_rows(self, x: Tensor, group: Group, bias: Tensor | None = None) -> Tensor:
        """Each row of a group multiplied by its own adapter: in one batched product, or one adapter after another."""
        bias = None if bias is None else full_tensor(bias)
        part = x.index_select(0, group.rows)
        channels = self._channels_last(part)
        factors = [self._factors(name) for name in group.names]
        shape = len(part), len(factors), channels.shape[1:-1].numel()
        if len(factors) > 1 and kernels.rows_belong_together(*shape, factors[0][0], group.inflation):
            A = torch.stack([a for a, _ in factors])
            B = torch.stack([b * self.scaling[name] for (_, b), name in zip(factors, group.names, strict=True)])
            which = torch.arange(len(factors)).repeat_interleave(torch.tensor(group.counts)).to(x.device)
            tokens = channels.reshape(len(part), -1, channels.shape[-1])
            product = kernels.multiply_rows(tokens, A, B, which, group.inflation, bias).view(channels.shape)
            return x.index_copy(0, group.rows, self._channels_back(product))
        pieces = zip(part.split(group.counts), group.names, strict=True)
        return x.index_copy(0, group.rows, torch.cat([self._multiplied(piece, name, bias) for piece, name in pieces]))

    def _forward_several(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        result = self._call_base(x, [(None, names)], *args, **kwargs)
        with onloaded((self.get_base_layer(),)):
            return self._multiply_outputs(result, [(None, names)])

    # Where an adapter acts

    def _acts_on_inputs(self, adapter_name: str) -> bool:
        return self.side[adapter_name] == "post"

    def _call_base(self, x: Tensor, routes: Routes, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer on multiplied inputs."""
        steps = [(rows, name) for rows, names in routes for name in reversed(names) if self._acts_on_inputs(name)]
        if any(name in self.fused for _, name in steps):
            self._check_fused_order(routes)
            return self._call_fused_base(x, steps, *args, **kwargs)
        for rows, name in steps:
            x = self._multiplied_input(x, rows, name, *self._parts(name)[0][1:])
        return self.base_layer(x, *args, **kwargs)

    def _check_fused_order(self, routes: Routes) -> None:
        for _, names in routes:
            whole = None
            for name in names:
                if name not in self.fused and not self._acts_on_inputs(name):
                    whole = name
                elif name in self.fused and self._acts_on_inputs(name) and whole is not None:
                    raise ValueError(
                        f"on {self.layer_name}, adapter {name!r} multiplies the inputs of single slices and cannot act "
                        f"after {whole!r}, which multiplies all outputs together; activate {name!r} first"
                    )

    def _call_fused_base(self, x: Tensor, steps: list[tuple[Tensor | None, str]], *args: Any, **kwargs: Any) -> Tensor:
        """The base layer once for each input that some slice has; an input is known by the steps that led to it."""
        cut = next(self.fused[name] for _, name in steps if name in self.fused)
        inputs: dict[tuple[tuple[int, int], ...], Tensor] = {(): x}
        paths: list[tuple[tuple[int, int], ...]] = [()] * len(cut.splits)
        for number, (rows, name) in enumerate(steps):
            parts = self._parts(name)
            adapt = self.fused[name].adapt if name in self.fused else range(len(paths))
            for position, index in enumerate(adapt):
                part = position if name in self.fused else 0
                path = (*paths[index], (number, part))
                if path not in inputs:
                    inputs[path] = self._multiplied_input(inputs[paths[index]], rows, name, *parts[part][1:])
                paths[index] = path
        outputs = {path: self.base_layer(inputs[path], *args, **kwargs) for path in dict.fromkeys(paths)}
        return torch.cat([outputs[path][..., cut.rows(i)] for i, path in enumerate(paths)], dim=-1)

    def _multiplied_input(self, x: Tensor, rows: Tensor | None, name: str, A: Tensor, B: Tensor) -> Tensor:
        part = x if rows is None else x.index_select(0, rows)
        part = (part + self._update(part, name, A, B)).to(x.dtype)
        return part if rows is None else x.index_copy(0, rows, part)

    def _multiply_outputs(self, result: Tensor, routes: Routes) -> Tensor:
        dtype = result.dtype
        bias = self._bias()
        for rows, names in routes:
            names = [n for n in names if not self._acts_on_inputs(n) or n in self.lorma_magnitude_vector]
            if not names:
                continue
            out = result if rows is None else result.index_select(0, rows)
            y = out if bias is None else out - bias
            for position, name in enumerate(names):
                update = self._output_update(y, name)
                out = out + update
                if position + 1 < len(names):
                    y = y + update
            result = out if rows is None else result.index_copy(0, rows, out.to(dtype))
        return result.to(dtype)

    def _output_update(self, y: Tensor, name: str) -> Tensor:
        """What one adapter adds to the layer's output without its bias."""
        update = None if self._acts_on_inputs(name) else self.multiplier_update(y, name)
        if name not in self.lorma_magnitude_vector:
            return cast(Tensor, update)
        factor = self._along_channels(self.magnitude_factor(name))
        rescaled = (factor - 1) * y
        return rescaled if update is None else rescaled + factor * update

    def multiplier_update(self, y: Tensor, adapter_name: str) -> Tensor:
        """``(I(BA) − I)·dropout(y)`` in the dtype of the adapter; zero in slices that are not adapted."""
        parts = self._parts(adapter_name)
        if adapter_name not in self.fused:
            return self._update(y, adapter_name, *parts[0][1:])
        slices = list(y.split(self.fused[adapter_name].splits, dim=-1))
        updates = dict(zip(self.fused[adapter_name].adapt, parts, strict=True))
        return torch.cat(
            [
                self._update(piece, adapter_name, *updates[i][1:])
                if i in updates
                else torch.zeros_like(piece, dtype=self.lorma_A[adapter_name].dtype)
                for i, piece in enumerate(slices)
            ],
            dim=-1,
        )

    def _update(self, x: Tensor, name: str, A: Tensor, B: Tensor) -> Tensor:
        x = self.lorma_dropout[name](self._cast_input_dtype(x, A.dtype))
        return functional.multiplier_update(x, A, B, self.scaling[name], self.inflation[name])

    def _bias(self) -> Tensor | None:
        bias = getattr(self.get_base_layer(), "bias", None)
        return None if bias is None else self._along_channels(full_tensor(bias))

    def _along_channels(self, vector: Tensor) -> Tensor:
        """A vector over output channels, shaped to be added to an output."""
        return vector

    def train(self, mode: bool = True) -> Any:
        """As every module's; DoRA's kept norms are dropped, so that weights written past autograd are seen."""
        self._norms.clear()
        return super().train(mode)
