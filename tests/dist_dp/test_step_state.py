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
    state.finish()
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


def test_nothing_follows_a_step_that_was_not_finished() -> None:
    state = StepState()
    state.check_nothing_failed()
    state.begin(1, 3, 4)
    state.take(4)
    for next_one in (lambda: state.begin(2, 1, 1), lambda: state.take(4)):
        with pytest.raises(DistDpError, match=r"step 1 failed in optimizer\.step"):
            next_one()
    with pytest.raises(DistDpError, match="Resume from the last"):
        state.check_nothing_failed()
