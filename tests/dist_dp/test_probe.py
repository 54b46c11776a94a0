"""Models that mix the examples of a batch are found before training."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dist_dp.distributed import ensure_process_group
from dist_dp.errors import ModelError
from dist_dp.probe import check_examples_independent
from tests.dist_dp.gradients import build
from tests.dist_dp.placement import model, records


def pooled_negatives(whole: nn.Module, logits: Tensor) -> Tensor:
    """In-batch negatives: each example's loss against all scores of the batch."""
    return logits.logsumexp(0) - logits


MIXING: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "in-batch negatives": pooled_negatives,
    "centred": lambda _, logits: (logits - logits.mean()).square(),
    "the neighbour": lambda _, logits: (logits - logits.roll(-1)).square(),
}


@pytest.mark.parametrize("case", [*MIXING, "each alone"])
def test_probe(case: str) -> None:
    ensure_process_group()
    whole = model(meta=False)
    private = build(whole)
    batch = records().select([0, 1, 2, 3])

    def losses() -> Tensor:
        logits = whole(*batch.inputs)
        return MIXING[case](whole, logits) if case in MIXING else logits.square()

    if case in MIXING:
        with pytest.raises(ModelError, match=r"mixes the examples.*'(pooled|sequence)'"):
            check_examples_independent(whole, private.cuts, losses)
        return
    check_examples_independent(whole, private.cuts, losses)
    # The probe leaves nothing behind: training starts at once.
    private.state.begin(1, 4, 4)
    private.optimizer.zero_grad()
    whole(*batch.inputs).mean().backward()
    private.optimizer.step()


def test_one_value_an_example_is_needed() -> None:
    for shape in ((), (1,), (2, 2)):
        with pytest.raises(ModelError, match="one value per example"):
            check_examples_independent(nn.Linear(1, 1), [], lambda s=shape: torch.ones(s))
