"""Models that mix the examples of a batch are found before training."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from dist_dp.distributed import ensure_process_group
from dist_dp.errors import ModelError
from dist_dp.probe import check_losses_independent, check_outputs_independent
from tests.dist_dp.gradients import build
from tests.dist_dp.placement import model, records


def pooled_negatives(whole: nn.Module, logits: Tensor) -> Tensor:
    """In-batch negatives: each example's loss against all scores of the batch."""
    return logits.logsumexp(0) - logits


MIXING: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "in-batch negatives": pooled_negatives,
    "centred": lambda _, logits: (logits - logits.mean()).square(),
    "centred, cut from the graph": lambda _, logits: (logits - logits.mean().detach()).square(),
    "the neighbour": lambda _, logits: (logits - logits.roll(-1)).square(),
    "the loss of the batch's size": lambda _, logits: logits.square() / logits.abs().max().detach(),
}


@pytest.mark.parametrize("case", [*MIXING, "each alone"])
def test_losses(case: str) -> None:
    ensure_process_group()
    whole = model(meta=False)
    private = build(whole)
    data = records()

    def losses(seeds: Sequence[int]) -> Tensor:
        private.optimizer.forget()
        batch = data.select([seed % len(data) for seed in seeds])
        logits = whole(*batch.inputs)
        return MIXING[case](whole, logits) if case in MIXING else logits.square()

    if case in MIXING:
        with pytest.raises(ModelError, match="mixes the examples"):
            check_losses_independent(private.cuts, losses)
        return
    check_losses_independent(private.cuts, losses)
    # The probe leaves nothing behind: training starts at once.
    private.optimizer.forget()
    private.state.begin(1, 4, 4)
    whole(*data.select([0, 1, 2, 3]).inputs).mean().backward()
    private.optimizer.step()


class Mixing(nn.Module):
    def __init__(self, inner: nn.Module, how: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.how = inner, how

    def forward(self, *inputs: object) -> Tensor:
        return self.how(self.inner(*inputs))


@pytest.mark.parametrize("mixes", [True, False])
def test_outputs_on_the_first_training_batch(mixes: bool) -> None:
    ensure_process_group()
    whole = Mixing(model(meta=False), lambda v: v - v.mean(0).detach() if mixes else v)
    build(whole)
    inputs = records().select([0, 1, 2, 3]).inputs
    if mixes:
        with pytest.raises(ModelError, match="mixes the examples"):
            whole(*inputs)
    else:
        whole(*inputs)


def test_outputs_sees_dense_inputs_too() -> None:
    class Standardised(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x - x.mean(0)).sum(1)

    with pytest.raises(ModelError, match="output changes"):
        check_outputs_independent(Standardised(), [torch.randn(5, 3)], {})
    check_outputs_independent(nn.Linear(3, 1), [torch.randn(5, 3)], {})


def test_one_value_an_example_is_needed() -> None:
    for shape in ((), (1,), (2, 2)):
        with pytest.raises(ModelError, match="one value per example"):
            check_losses_independent([], lambda _, s=shape: torch.ones(s))
