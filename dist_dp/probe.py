"""Checks before training that a model treats the examples of a batch one by one."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from dist_dp.cut import CutEmbeddings
from dist_dp.errors import ModelError


def check_examples_independent(
    model: nn.Module, cuts: list[CutEmbeddings], losses: Callable[[], Tensor]
) -> None:
    """Refuses a model in which one example's loss depends on another example.

    In-batch negatives, batch statistics or attention over the batch dimension make clipping per
    example meaningless: changing one record would change everybody's gradient.

    Args:
        model: The cut model, in training mode.
        cuts: Its collections.
        losses: Runs the model on a batch of at least two examples (generated, not private ones)
            and returns the per-example losses, float ``[batch]``. Every rank calls it.

    Raises:
        ModelError: The first example's loss has a gradient at another example's embeddings.
    """
    values = losses()
    if values.dim() != 1 or values.shape[0] < 2:
        raise ModelError(
            f"the loss has the shape {tuple(values.shape)}; one value per example is needed"
        )
    values[0].backward()
    for cut in cuts:
        for call in cut._calls:
            for piece in call.pieces.values():
                grad = piece.leaf.grad
                if grad is None:
                    continue
                of_first = 1 if piece.lengths is None else int(piece.lengths[0])
                others = grad[of_first:]
                if bool((others != 0).any()):
                    raise ModelError(
                        f"the model mixes the examples of a batch: the loss of one example "
                        f"depends on another's embeddings in collection '{cut.path}' (in-batch "
                        "negatives? batch normalisation?). Clipping per example has no meaning "
                        "then; compute each example's loss from that example alone."
                    )
        cut.clear()
    for module in model.modules():
        module.zero_grad(set_to_none=True)
