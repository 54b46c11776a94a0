"""One batch, one step: anything else would make the accounting wrong."""

from __future__ import annotations

import pytest
import torch

from dist_dp.errors import DistDpError
from dist_dp.step_state import StepState


def test_one_step_a_batch() -> None:
    state = StepState()
    with pytest.raises(DistDpError, match="without a new batch"):
        state.take(4)
    state.begin(1, 3, 4)
    assert (state.step, state.batch_size) == (1, 3)
    with pytest.raises(DistDpError, match="batch of step 1 was drawn but never stepped"):
        state.begin(2, 1, 1)
    assert torch.equal(state.take(4), torch.tensor([True, True, True, False]))
    with pytest.raises(DistDpError, match="without a new batch"):
        state.take(4)


def test_an_empty_batch_is_a_step() -> None:
    state = StepState()
    state.begin(1, 0, 1)
    assert not state.take(1).any()


def test_the_model_must_see_the_whole_batch() -> None:
    state = StepState()
    state.begin(1, 3, 4)
    with pytest.raises(DistDpError, match="saw 3 examples, the private loader gave 4"):
        state.take(3)
    state.take(4)  # the refusal used nothing up
