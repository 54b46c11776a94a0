"""Checks that a model treats the examples of a batch one by one.

In-batch negatives, batch statistics or attention over the batch dimension make clipping per example
meaningless: changing one record would change everybody's gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dist_dp.cut import CutEmbeddings
from dist_dp.errors import ModelError

TOLERANCE = 1e-4
"""Of two results for one example in different company; rounding alone stays far below."""

REMEDY = (
    "(in-batch negatives? statistics over the batch?). Clipping per example has no meaning then; "
    "compute each example's loss from that example alone."
)


def check_losses_independent(
    cuts: list[CutEmbeddings], losses: Callable[[Sequence[int]], Tensor], size: int = 4
) -> None:
    """Refuses a model in which one example's loss depends on another example.

    Each example is run in two batches whose other examples differ in everything (features, ids, bag
    lengths, labels): its loss must be the same. And its loss must have no gradient at the others'
    embeddings.

    Args:
        cuts: The model's collections; the model is in training mode.
        losses: Makes a batch of generated examples, one for each of the given seeds (the same seed
            gives the same example), runs the model, and returns the per-example losses, float
            ``[batch]``. Every rank calls it.
        size: Examples in a batch.

    Raises:
        ModelError: An example's loss depends on its company.
    """
    company = list(range(1, size + 1))
    alone = losses(company).detach()
    if alone.shape != (size,) or size < 2:
        raise ModelError(
            f"the loss has the shape {tuple(alone.shape)}; one value per example is needed"
        )
    for position in (0, size - 1):
        _clear(cuts)
        others = [100 + 10 * position + i for i in range(size)]
        others[position] = company[position]
        values = losses(others)
        _compare(alone[position], values[position].detach(), "loss")
        values[position].backward()
        for cut in cuts:
            _no_gradient_elsewhere(cut, position)
    _clear(cuts)


def _no_gradient_elsewhere(cut: CutEmbeddings, position: int) -> None:
    for call in cut.calls:
        for piece in call.pieces.values():
            grad = piece.leaf.grad
            if grad is None:
                continue
            start, stop = position, position + 1
            if piece.lengths is not None:
                start = int(piece.lengths[:position].sum())
                stop = start + int(piece.lengths[position])
            if bool((grad[:start] != 0).any()) or bool((grad[stop:] != 0).any()):
                raise ModelError(
                    "the model mixes the examples of a batch: the loss of one example depends on "
                    f"another's embeddings in collection '{cut.path}' {REMEDY}"
                )


def _compare(one: Tensor, other: Tensor, what: str) -> None:
    if not torch.allclose(one, other, rtol=TOLERANCE, atol=TOLERANCE * 1e-1, equal_nan=True):
        raise ModelError(
            f"the model mixes the examples of a batch: an example's {what} changes with the other "
            f"examples {REMEDY}"
        )


def _clear(cuts: list[CutEmbeddings]) -> None:
    for cut in cuts:
        cut.clear()


@torch.no_grad()
def check_outputs_independent(
    model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]
) -> None:
    """Refuses a model whose output for one example depends on another, on a batch at hand.

    Runs the model, in evaluation mode, on the batch and on one in which all other examples are
    replaced by copies of the second one; the first example's output must not change. It sees what
    ``forward`` returns, not what a loss makes of it. Every rank calls it.

    Args:
        model: The cut model.
        args: Positional inputs of a forward: tensors with the example first, KeyedJaggedTensors, or
            anything else (left as it is).
        kwargs: Keyword inputs, likewise. Batches below 3 examples have nothing to compare.

    Raises:
        ModelError: The first example's output changes.
    """
    batch = next((n for n in map(_size, [*args, *kwargs.values()]) if n is not None), 0)
    if batch < 3:
        return
    rows = [0, *[1] * (batch - 1)]
    was_training = model.training
    model.eval()
    try:
        one = model(*args, **kwargs)
        other = model(
            *(_take(a, rows) for a in args), **{k: _take(v, rows) for k, v in kwargs.items()}
        )
    finally:
        model.train(was_training)
    for first, second in zip(_tensors(one), _tensors(other), strict=False):
        if first.shape == second.shape and first.dim() and first.shape[0] == batch:
            _compare(first[0], second[0], "output")


def _size(value: Any) -> int | None:
    """Examples of an input, None if it has none."""
    from torchrec import KeyedJaggedTensor

    if isinstance(value, KeyedJaggedTensor):
        return int(value.stride())
    return value.shape[0] if isinstance(value, Tensor) and value.dim() else None


def _take(value: Any, rows: list[int]) -> Any:
    """The given examples of an input."""
    from torchrec import KeyedJaggedTensor

    if isinstance(value, Tensor):
        return value[rows] if value.dim() and value.shape[0] == len(rows) else value
    if not isinstance(value, KeyedJaggedTensor):
        return value
    values, lengths, weights = [], [], []
    for key in value.keys():  # noqa: SIM118 - not a dict
        bag = value[key]
        offsets = bag.offsets().tolist()
        spans = [slice(offsets[r], offsets[r + 1]) for r in rows]
        values.append(torch.cat([bag.values()[s] for s in spans]))
        lengths.append(bag.lengths()[rows])
        if value.weights_or_none() is not None:
            weights.append(torch.cat([bag.weights()[s] for s in spans]))
    return KeyedJaggedTensor(
        keys=value.keys(),
        values=torch.cat(values),
        lengths=torch.cat(lengths),
        weights=torch.cat(weights) if weights else None,
    )


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [t for v in value for t in _tensors(v)]
    return []
