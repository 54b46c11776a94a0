"""What one forward of a cut collection leaves behind, and what goes back to the rows' owners."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Piece:
    """One tensor of a collection's output: attached to the sharded graph, and cut from it.

    Attributes:
        attached: Float, the end of TorchRec's graph: ``[batch, columns of all keys]`` for pooled
            output, ``[ids, dim]`` for a sequence.
        lengths: int64 ``[batch]`` for a sequence, the ids of each example; None for pooled output.
        leaf: The same values, where the dense model's graph begins.
    """

    attached: Tensor
    lengths: Tensor | None
    leaf: Tensor = field(init=False)

    def __post_init__(self) -> None:
        """Cuts."""
        self.leaf = self.attached.detach().requires_grad_()

    def scale(self, coefficients: Tensor) -> Tensor:
        """The leaf's gradient times each example's coefficient, in the gradient's memory."""
        grad = self.leaf.grad
        if grad is None:
            return torch.zeros_like(self.leaf)
        if self.lengths is not None:
            coefficients = torch.repeat_interleave(
                coefficients, self.lengths, output_size=grad.shape[0]
            )
        return grad.mul_(coefficients.unsqueeze(1))


@dataclass
class LookupCall:
    """One forward of a collection.

    Attributes:
        features: What was looked up.
        pieces: The output's pieces by key ("" for all keys together).
        dims: Width of each key, in order; empty for a sequence.
    """

    features: Any
    pieces: dict[str, Piece]
    dims: dict[str, int]


class WayBack:
    """The scaled gradients of a call, until its step's update, and their way to the owners.

    The looked-up values are free by now: the memory kept is that of the gradients, float
    ``[batch, columns]``, and of the ids.

    Args:
        call: The call; its leaves' gradients are scaled in place.
        coefficients: float ``[batch]``.
    """

    def __init__(self, call: LookupCall, coefficients: Tensor) -> None:
        pieces = call.pieces.values()
        self.edges = [torch.autograd.graph.get_gradient_edge(p.attached) for p in pieces]
        self.gradients = [piece.scale(coefficients) for piece in pieces]
        self._keys = list(call.pieces)
        self._dims = call.dims

    def take_rates(self, rates: dict[str, float]) -> None:
        """Multiplies the gradients by the learning rates, by name of the output."""
        for key, gradient in zip(self._keys, self.gradients, strict=True):
            by_key = [rates[key]] if key else [rates[name] for name in self._dims]
            if len(set(by_key)) == 1:
                gradient.mul_(by_key[0])
                continue
            widths = torch.tensor(list(self._dims.values()))
            gradient.mul_(torch.tensor(by_key).repeat_interleave(widths).to(gradient.device))

    def send(self) -> None:
        """Takes the gradients back, where they update the rows: a collective."""
        torch.autograd.backward(self.edges, self.gradients)
