"""The low-rank cross network of TorchRec's DLRM-DCN, clipped without per-example gradients.

Layer l computes x_{l+1} = x_0 ∘ (W_l (V_l x_l) + b_l) + x_l (Wang et al., "DCN V2", WWW 2021). Each
of its parameters enters by a matrix product, so with g = δ_{l+1} ∘ x_0 the gradients are the outer
products g vᵀ (for W, with v = V x_l), (Wᵀ g) x_lᵀ (for V) and g (for b): norms are products of
norms. x_l is computed again from the layer's input.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_dp.clipping.dense_rules import Record, VmapRule


class LowRankCrossRule(VmapRule):
    """See the module; a network called more than once in a step is left to :class:`VmapRule`."""

    def _layers(self, net: Any, record: Record) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """For each layer, last to first: its number, (x_l, V x_l) and g, float ``[batch, ·]``."""
        (x0,), delta = record
        inputs = [x0]
        middles = []
        for v, w, b in zip(net.V_kernels, net.W_kernels, net.bias, strict=True):
            middles.append(functional.linear(inputs[-1], v))
            inputs.append(x0 * (functional.linear(middles[-1], w) + b) + inputs[-1])
        for number in reversed(range(len(middles))):
            g = delta * x0
            yield number, inputs[number], middles[number], g
            delta = delta + g @ net.W_kernels[number] @ net.V_kernels[number]

    @torch.no_grad()
    def squared_norms(self, layer: nn.Module, records: Sequence[Record]) -> Tensor:
        """See the module."""
        if len(records) > 1 or not _all_trained(layer):
            return super().squared_norms(layer, records)
        net: Any = layer
        total = torch.zeros(records[0][1].shape[0], device=records[0][1].device)
        for number, x, middle, g in self._layers(net, records[0]):
            g2 = g.square().sum(1)
            back = (g @ net.W_kernels[number]).square().sum(1)
            total += g2 * (middle.square().sum(1) + 1.0) + back * x.square().sum(1)
        return total

    @torch.no_grad()
    def clipped_sums(
        self, layer: nn.Module, records: Sequence[Record], coefficients: Tensor
    ) -> dict[str, Tensor]:
        """See the module."""
        if len(records) > 1 or not _all_trained(layer):
            return super().clipped_sums(layer, records, coefficients)
        net: Any = layer
        sums: dict[str, Tensor] = {}
        for number, x, middle, g in self._layers(net, records[0]):
            scaled = g * coefficients.unsqueeze(1)
            sums[f"W_kernels.{number}"] = scaled.t() @ middle
            sums[f"V_kernels.{number}"] = (scaled @ net.W_kernels[number]).t() @ x
            sums[f"bias.{number}"] = scaled.sum(0)
        return sums


def _all_trained(layer: nn.Module) -> bool:
    return all(p.requires_grad for p in layer.parameters())
