"""The private step: norms, clip factors, one communication, noise, update."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn

from dist_dp import kernels
from dist_dp.clipping.recorder import DenseRecorder, DenseSums
from dist_dp.cut import CutEmbeddings
from dist_dp.distributed import all_reduce_sum
from dist_dp.errors import ConfigError, DistDpError, ModelError
from dist_dp.mechanisms.base import Mechanism
from dist_dp.noise_grid import check_spacing
from dist_dp.noise_schedule import NoiseSchedule
from dist_dp.plan import PrivacyPlan
from dist_dp.step_state import StepState
from dist_dp.timing import PhaseTimer

LossReduction = Literal["mean", "sum"]

# Norms are computed in float32; this keeps their rounding from lifting the sensitivity above C.
ROUNDING_MARGIN = 1.0 - 2e-6


@dataclass(frozen=True)
class StepStats:
    """What one step looked like on this rank. Not private: computed before any noise.

    Attributes:
        norms: float ``[real examples on this rank]``, gradient norms before clipping.
        clipped: How many of them were above the clip norm.
        signal_to_noise: ‖clipped sum of dense gradients‖ / (σ C √parameters), all ranks; nan
            without noise.
    """

    norms: Tensor
    clipped: int
    signal_to_noise: float


class PrivateOptimizer(torch.optim.Optimizer):
    """Takes one DP-SGD step on sharded tables and dense layers for each ``step()``.

    Looks like the optimizer it replaces: ``param_groups[0]`` is the tables (its ``lr`` and
    ``weight_decay`` are what the fused update and the noise schedule use), the rest are the
    dense optimizer's groups, so PyTorch's learning-rate schedulers work.

    Guarantee:
        Per-example gradients over *all* trained parameters together are scaled to an l2 norm of
        at most ``plan.max_grad_norm`` and summed, so one record more or less moves the sum by at
        most that (add-or-remove-one); noise of standard deviation ``noise_multiplier *
        max_grad_norm`` is added to every coordinate of the sum, dense layers here and tables by
        the mechanism; the result is divided by the *expected* batch size, since the actual one
        is private. Padding examples count zero. Assumes that the model treats examples one by
        one (see :func:`dist_dp.probe.check_outputs_independent`) and a secret noise key.

        Arithmetic: without ``plan.noise_grid``, floating point is taken for real numbers. With
        it, noised sums of dense gradients, and table rows at a release, are put on fixed grids
        with float64 noise (each number as in real arithmetic, but for a probability below
        2^-49 (1 + 10 deviation / spacing), which ε and δ leave out). What remains is float32
        rounding before that noise, of gradients, sums and rows: about one unit in the last place
        (Casacuberta et al., CCS 2022).

    Args:
        dense: Optimizer over the dense parameters, or None if the model has none.
        table_lr: Initial learning rate of the tables.
        table_weight_decay: Weight decay of the tables (coupled, as in SGD).
        cuts: The cut collections.
        recorder: The dense layers' recorder.
        mechanism: The noise mechanism.
        plan: What the guarantee rests on.
        secret: 32-byte run secret.
        state: Shared with the loader.
        loss_reduction: How the caller reduces per-example losses over the (padded) batch.
        timer: Where to note the time of phases.
    """

    def __init__(
        self,
        *,
        dense: torch.optim.Optimizer | None,
        table_lr: float,
        table_weight_decay: float,
        cuts: list[CutEmbeddings],
        recorder: DenseRecorder,
        mechanism: Mechanism,
        plan: PrivacyPlan,
        secret: bytes,
        state: StepState,
        loss_reduction: LossReduction = "mean",
        timer: PhaseTimer | None = None,
    ) -> None:
        tables: dict[str, Any] = {
            "params": [],
            "lr": table_lr,
            "weight_decay": table_weight_decay,
            "name": "tables",
        }
        super().__init__([tables], {})
        if dense is not None:
            self.param_groups.extend(dense.param_groups)
        self.dense = dense
        self.cuts = cuts
        self.recorder = recorder
        self.mechanism = mechanism
        self.plan = plan
        self.loss_reduction = loss_reduction
        self.timer = timer or PhaseTimer()
        self.last_stats: StepStats | None = None
        # Set by zero_grad after a forward without backward: the next forward replaces it.
        self.superseded = False
        self._state = state
        for cut in cuts:
            cut.learning_rate = self._table_rate
        # One stream for all dense parameters, in the recorder's order.
        self._dense_key = kernels.derive_key(secret, "dense", "parameters")
        self._sums = DenseSums(recorder.parameters)

    @property
    def schedule(self) -> NoiseSchedule:
        """The mechanism's record of steps (of the first group of tables)."""
        return self.mechanism.schedule

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears gradients; a forward whose backward is still to come stays recorded."""
        if self.dense is not None:
            self.dense.zero_grad(set_to_none)
        if self.recorder.has_gradients or any(c.has_gradients for c in self.cuts):
            self.forget()
        else:
            self.superseded = True

    def state_dict(self) -> NoReturn:
        """Refused: without the run's secret and the waiting noise it could not be resumed from.

        Raises:
            DistDpError: Always.
        """
        raise DistDpError(
            "a private optimizer has no state_dict of its own, since dense state, noise and tables "
            "belong together: use dist_dp.checkpoint.save_checkpoint and load_checkpoint"
        )

    def load_state_dict(self, state_dict: Any) -> NoReturn:
        """Refused, as :meth:`state_dict`.

        Raises:
            DistDpError: Always.
        """
        raise DistDpError(
            "a private optimizer does not load a state_dict: use "
            "dist_dp.checkpoint.load_checkpoint, with what save_checkpoint wrote"
        )

    def forget(self) -> None:
        """Drops a forward that was recorded: the next one starts afresh."""
        self.recorder.clear()
        for cut in self.cuts:
            cut.clear()
        self.superseded = False

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Clips, communicates, adds noise and updates, for the batch in flight.

        Every rank calls it once a step.

        Args:
            closure: Not supported (must be None).

        Raises:
            DistDpError: No batch is in flight, or it was not the batch the model saw.
            ModelError: A gradient came by a way that clipping does not see, or is not finite.
        """
        if closure is not None:
            raise DistDpError("a private step takes no closure: one backward a step")
        self._check_grid()
        self.recorder.check_no_stray_gradients()
        for cut in self.cuts:
            cut.check_no_stray_gradients()
        batch = next((c.batch for c in self.cuts if c.batch is not None), None)
        if batch is None:
            raise DistDpError(
                "optimizer.step() without a forward in training mode: call model.train() after an "
                "evaluation, and loss.backward() before optimizer.step()"
            )
        is_real = self._state.take(batch)
        device = self._device()
        is_real = is_real.to(device)
        with self.timer.phase("clip"):
            norms, coefficients = self._coefficients(is_real)
            sums = self._sums
            sums.flat.zero_()
            self.recorder.add_clipped_sums(coefficients, sums)
        with self.timer.phase("communication"):
            all_reduce_sum(sums.flat)
        step = self.schedule.step + 1
        with self.timer.phase("noise"):
            signal_to_noise = self._noise_dense(sums, step)
        tables = self.param_groups[0]
        lr, decay = float(tables["lr"]), float(tables["weight_decay"])
        # The noise is owed before the first gradient is in: should the update fail half-way, a
        # release still settles it.
        self.schedule.advance(
            learning_rate=lr,
            noise_multiplier=self.plan.noise_multiplier or 0.0,
            max_grad_norm=self.plan.max_grad_norm,
            expected_batch_size=self.plan.expected_batch_size,
            weight_decay=decay,
        )
        with self.timer.phase("update"):
            table_lr = self._table_rate()
            per_example = coefficients / self.plan.expected_batch_size
            for cut in self.cuts:
                cut.backward(per_example, table_lr)
            self._update_dense(sums)
        with self.timer.phase("noise"):
            self.mechanism.after_update([s for c in self.cuts for s in c.shards])
        self.forget()
        norms = norms[is_real]
        clipped = int((norms > self.plan.max_grad_norm).sum()) if self.mechanism.private else 0
        self.last_stats = StepStats(norms, clipped, signal_to_noise)

    def _table_rate(self) -> float:
        """The tables' step size; the decay of a step is applied later, with its noise."""
        tables = self.param_groups[0]
        lr = float(tables["lr"])
        return lr / (1.0 - lr * float(tables["weight_decay"]))

    def _device(self) -> torch.device:
        return (
            self.cuts[0].shards[0].weight.device
            if self.cuts and self.cuts[0].shards
            else (self.recorder._anchor.device)
        )

    def _coefficients(self, is_real: Tensor) -> tuple[Tensor, Tensor]:
        """Norms and clip factors, float ``[batch]`` each; both zero for padding."""
        batch = is_real.numel()
        # A mean over the padded batch scaled every gradient by 1/batch.
        unscale = float(batch) if self.loss_reduction == "mean" else 1.0
        mask = is_real.to(torch.float32)
        if not self.mechanism.private:
            return mask, mask * unscale
        squared = self.recorder.squared_norms(batch)
        for cut in self.cuts:
            squared += cut.squared_norms(batch, squared.device)
        norms = squared.sqrt() * unscale * mask
        if not bool(torch.isfinite(norms).all()):
            raise ModelError(
                f"step {self.schedule.step + 1}: the gradient of an example is not finite. The "
                "training diverged (lower the learning rate) or the features hold huge values."
            )
        limit = self.plan.max_grad_norm * ROUNDING_MARGIN
        factors = (limit / norms.clamp_min(limit)).clamp_max(1.0)
        return norms, factors * mask * unscale

    def _check_grid(self) -> None:
        """With a grid, a step's noise must be well above its spacing, and no step without."""
        if self.plan.noise_grid is None:
            return
        step = self.schedule.step
        lr = float(self.param_groups[0]["lr"])
        deviation = lr * self.plan.noise_on_sum / self.plan.expected_batch_size
        if deviation > 0:
            check_spacing(self.plan.noise_grid, deviation, f"at step {step + 1}")
            return
        _, owed = self.schedule.decay_and_scale(torch.zeros(1, dtype=torch.int64), step)
        if float(owed) > 0:
            raise ConfigError(
                f"step {step + 1}: the tables' learning rate is 0 after steps with noise; with "
                "noise.grid the last step of a release must add noise, so let the rate stay above 0"
            )

    def _noise_dense(self, sums: DenseSums, step: int) -> float:
        """Adds the step's noise in place; the ratio of signal to noise before it."""
        if not self.mechanism.private or sums.flat.numel() == 0:
            return float("nan")
        deviation = self.plan.noise_on_sum
        size = float(torch.linalg.vector_norm(sums.flat)) / sums.flat.numel() ** 0.5
        kernels.add_normal(
            sums.flat,
            key=self._dense_key,
            from_step=step - 1,
            to_step=step,
            scale=deviation,
            rounds=self.plan.noise_rounds,
            grid=self.plan.dense_noise_grid,
        )
        return size / deviation if deviation > 0 else float("inf")

    def _update_dense(self, sums: DenseSums) -> None:
        if self.dense is None:
            return
        sums.flat.div_(self.plan.expected_batch_size)
        for name, parameter in self.recorder.parameters.items():
            parameter.grad = sums.by_name[name]
        self.dense.step()
        for parameter in self.recorder.parameters.values():
            parameter.grad = None


def watch_forwards(model: nn.Module, optimizer: PrivateOptimizer) -> None:
    """Refuses a second training forward in one step: it would mix the examples of two batches."""

    def before(module: nn.Module, _args: Any) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        if optimizer.superseded:
            optimizer.forget()
        if any(c.batch is not None for c in optimizer.cuts) or optimizer.recorder.has_calls:
            raise ModelError(
                "a second forward in training mode before optimizer.step(): a private step has "
                "one forward and one backward. Use model.eval() or torch.no_grad() for others, "
                "or optimizer.zero_grad() to drop the first."
            )

    model.register_forward_pre_hook(before)
