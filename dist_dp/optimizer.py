"""The private step: norms, clip factors, one communication, noise, update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn

from dist_dp import kernels
from dist_dp.clipping.recorder import DenseRecorder, DenseSums
from dist_dp.clipping.user_groups import UserGroups
from dist_dp.cut import CutEmbeddings
from dist_dp.distributed import all_reduce_sum
from dist_dp.errors import ConfigError, DistDpError, ModelError
from dist_dp.mechanisms.base import Mechanism, Schedule
from dist_dp.mechanisms.sparse import SparseNoise
from dist_dp.momentum_schedule import MomentumSchedule
from dist_dp.noise_grid import check_spacing
from dist_dp.noise_schedule import NoiseSchedule, check_step
from dist_dp.optimizer_settings import TableGroup
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
        norms: float ``[units on this rank]``, gradient norms before clipping: of each real example,
            or of each user.
        clipped: How many of them were above the clip norm.
        signal_to_noise: ‖clipped sum of dense gradients‖ / (σ C √parameters), all ranks; nan
            without noise.
    """

    norms: Tensor
    clipped: int
    signal_to_noise: float


class PrivateOptimizer(torch.optim.Optimizer):
    """Takes one DP-SGD step on sharded tables and dense layers for each ``step()``.

    Looks like the optimizer it replaces: the first of ``param_groups`` are the groups of tables
    (named ``tables``, ``tables.1``, …; their ``lr`` and ``weight_decay`` are what updates and noise
    schedules use), the rest are the dense optimizer's, so PyTorch's learning-rate schedulers work.

    Guarantee:
        The gradient of each unit (a record, or a user with all its records in the step), over *all*
        trained parameters together, is scaled to an l2 norm of at most the step's clip norm C and
        summed, so one unit more or less moves the sum by at most C (add-or-remove-one); noise of
        standard deviation σC, with the step's noise multiplier σ, is added to every coordinate of
        the sum, dense layers here and tables by the mechanism; the result is divided by the
        *expected* number of units, since the actual one is private.
        Padding examples count zero. Assumes that the model treats examples one by one (see
        :func:`dist_dp.probe.check_outputs_independent`) and a secret noise key.

        Arithmetic: without ``plan.noise_grid``, floating point is taken for real numbers. With
        it, noised sums of dense gradients, and table rows at a release, are put on fixed grids
        with float64 noise (each number as in real arithmetic, but for a probability below
        2^-49 (1 + 10 deviation / spacing), which ε and δ leave out). What remains is float32
        rounding before that noise, of gradients, sums and rows: about one unit in the last place
        (Casacuberta et al., CCS 2022).

    Args:
        dense: Optimizer over the dense parameters, or None if the model has none.
        tables: The groups of tables, as the mechanism's schedules and the shards number them.
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
        tables: Sequence[TableGroup],
        cuts: list[CutEmbeddings],
        recorder: DenseRecorder,
        mechanism: Mechanism,
        plan: PrivacyPlan,
        secret: bytes,
        state: StepState,
        loss_reduction: LossReduction = "mean",
        timer: PhaseTimer | None = None,
    ) -> None:
        groups: list[dict[str, Any]] = [
            {
                "params": [],
                "lr": group.lr,
                "weight_decay": group.weight_decay,
                "momentum": group.momentum,
                "name": f"tables.{number}" if number else "tables",
                "tables": group.tables,
            }
            for number, group in enumerate(tables)
        ]
        super().__init__(groups, {})
        self._table_groups = self.param_groups[:]
        self._momenta = [group.momentum for group in tables]
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
        # The step's settings, once the schedules hold it; None before.
        self._recorded: list[tuple[float, float]] | None = None
        # Called at the end of a step's update: what runs beside it must be over by then.
        self.before_step_ends: list[Callable[[], None]] = []
        # Called with each step's number and its dense sums, noised; see `dist_dp.trail`.
        self.on_noised_sums: Callable[[int, Tensor], None] | None = None
        self._state = state
        self._norms: list[Tensor] = []
        for cut in cuts:
            cut.learning_rate = lambda: self._table_rates()[0]
        # One stream for all dense parameters, in the recorder's order.
        self._dense_key = kernels.derive_key(secret, "dense", "parameters")
        self._sums = DenseSums(recorder.parameters)

    @property
    def schedule(self) -> Schedule:
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

        Every rank calls it once a batch. For a micro-batch that is not its step's last it clips
        and adds up, and that is all: noise, communication, update and the schedules' next step
        come once, with the last one. Until then each micro-batch costs the memory of its tables'
        output gradients (4 bytes for each example and column) and of its ids; dense activations
        are those of one micro-batch.

        Args:
            closure: Not supported (must be None).

        Raises:
            DistDpError: No batch is in flight, or it was not the batch the model saw.
            ModelError: A gradient came by a way that clipping does not see, or is not finite: the
                run is over then (:class:`~dist_dp.step_state.StepState`).
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
        part = self._state.part
        device = self.device
        is_real = is_real.to(device)
        users = self._users_in_flight(device)
        if isinstance(self.mechanism, SparseNoise):
            with self.timer.phase("select"):
                self.mechanism.contribute(self.cuts, is_real, users)
        with self.timer.phase("clip"):
            norms, coefficients = self._coefficients(is_real, users)
            sums = self._sums
            if part == 0:
                sums.empty()
                self._norms.clear()
            sums.faults += (~torch.isfinite(norms)).sum()
            self.recorder.add_clipped_sums(coefficients, sums)
            self._norms.append(norms[is_real] if users is None else norms[: users.num_users])
        per_example = coefficients / self.plan.expected_batch_size
        if self.is_accumulating:
            with self.timer.phase("clip"):
                for cut in self.cuts:
                    cut.hold(per_example)
            self.forget()
            self._state.finish()
            return
        with self.timer.phase("communication"):
            all_reduce_sum(sums.shared)
        self._refuse_faults(sums)
        step = self.step_in_flight
        with self.timer.phase("noise"):
            signal_to_noise = self._noise_dense(sums, step)
            if self.on_noised_sums is not None:
                self.on_noised_sums(step, sums.flat)
        if isinstance(self.mechanism, SparseNoise):
            with self.timer.phase("select"):
                rates = [(float(g["lr"]), float(g["weight_decay"])) for g in self._table_groups]
                self.mechanism.select(self.cuts, step, rates)
        # The noise is owed before the first gradient is in: should the update fail half-way, a
        # release still settles it.
        self.record_step()
        self._recorded = None
        with self.timer.phase("update"):
            for cut in self.cuts:
                cut.backward(per_example, self._table_rates())
            self._update_dense(sums)
        with self.timer.phase("noise"):
            self.mechanism.after_update([s for c in self.cuts for s in c.shards])
        for finish in self.before_step_ends:
            finish()
        self.forget()
        self._state.finish()
        norms = torch.cat(self._norms)
        limit = self.plan.max_grad_norm_at(step)
        clipped = int((norms > limit).sum()) if self.mechanism.private else 0
        self.last_stats = StepStats(norms, clipped, signal_to_noise)

    @property
    def is_accumulating(self) -> bool:
        """Whether the batch drawn last is a micro-batch that others of its step will follow.

        After ``step()`` it says whether that only clipped and added up: nothing was updated then,
        and ``last_stats`` are still those of the step before.
        """
        return not self._state.is_last

    def record_step(self) -> None:
        """Records the step in flight in the schedules, once; look-ahead does so before its update.

        Raises:
            ConfigError: It was recorded with another learning rate or weight decay, or the
                momentum of tables has changed.
        """
        momenta = [g["momentum"] for g in self._table_groups]
        if momenta != self._momenta:
            raise ConfigError(
                f"step {self.step_in_flight}: the tables' momentum changed from {self._momenta} "
                f"to {momenta}; waiting noise merges for one momentum only, so it stays as the "
                "run began (remove the scheduler that moves it)"
            )
        settings = [(float(g["lr"]), float(g["weight_decay"])) for g in self._table_groups]
        if self._recorded is None:
            noise = {
                "noise_multiplier": self.plan.gradient_multiplier_at(self.step_in_flight),
                "max_grad_norm": self.plan.max_grad_norm_at(self.step_in_flight),
                "expected_batch_size": self.plan.expected_batch_size,
            }
            # All or none: the groups' schedules stay at the same step.
            for lr, decay in settings:
                check_step(self.schedule.step + 1, lr, weight_decay=decay, **noise)
            for schedule, (lr, decay) in zip(self.mechanism.schedules, settings, strict=True):
                schedule.advance(lr, weight_decay=decay, **noise)
            self._recorded = settings
        elif self._recorded != settings:
            raise ConfigError(
                f"step {self.schedule.step}: the tables' learning rate or weight decay changed "
                f"from {self._recorded} to {settings} between the forward and optimizer.step(), "
                "but look_ahead has drawn noise for it; call schedulers after optimizer.step()"
            )

    def check_between_steps(self) -> None:
        """Refuses to save or publish while look-ahead has drawn noise for a step that is not over.

        Its gradient would come later under noise that the published rows hold already.

        Raises:
            DistDpError: A forward was made under ``look_ahead`` and no step since.
        """
        if self._recorded is not None:
            raise DistDpError(
                f"step {self.schedule.step} is not over: look_ahead has settled rows to it, and "
                "its gradient is still to come. Save or release after optimizer.step()"
            )

    @property
    def step_in_flight(self) -> int:
        """Number of the step whose gradient comes next."""
        return self.schedule.step + (self._recorded is None)

    def _table_rates(self) -> list[float]:
        """What the gradient of each group of tables is scaled by.

        The step size (the decay of a step is applied later, with its noise); with momentum, what
        puts it into the momentum before the step's transition is applied. A mechanism that updates
        the tables itself knows the rates.
        """
        if self.mechanism.takes_updates:
            return [1.0] * len(self._table_groups)
        return [
            1.0 / schedule.momentum
            if isinstance(schedule, MomentumSchedule)
            else float(g["lr"]) / (1.0 - float(g["lr"]) * float(g["weight_decay"]))
            for schedule, g in zip(self.mechanism.schedules, self._table_groups, strict=True)
        ]

    @property
    def device(self) -> torch.device:
        """Where the tables are."""
        return (
            self.cuts[0].shards[0].weight.device
            if self.cuts and self.cuts[0].shards
            else (self.recorder._anchor.device)
        )

    def _users_in_flight(self, device: torch.device) -> UserGroups | None:
        """Whose the examples in flight are; None where the unit of privacy is a record."""
        users = self._state.users
        if (users is not None) != (self.plan.unit == "user"):
            raise DistDpError(
                f"the plan protects one {self.plan.unit}, but the batch of step {self._state.step} "
                f"{'does not say' if users is None else 'says'} whose its records are: draw it "
                "from the private loader that make_private returned with this optimizer"
            )
        return None if users is None else users.to(device)

    def _coefficients(self, is_real: Tensor, users: UserGroups | None) -> tuple[Tensor, Tensor]:
        """Norms, float ``[units]``, and the clip factor of each example, float ``[batch]``.

        Padding counts as units of one example; their factor is zero.

        Guarantee:
            A unit's gradient is that of all its examples in the step, and they have one factor.
        """
        batch = is_real.numel()
        # A mean over the padded batch scaled every gradient by 1/batch.
        unscale = float(batch) if self.loss_reduction == "mean" else 1.0
        mask = is_real.to(torch.float32)
        if not self.mechanism.private:
            return mask, mask * unscale
        limit = self.plan.max_grad_norm_at(self.step_in_flight) * ROUNDING_MARGIN
        if users is None or users.one_each:
            norms = self._squared_norms(batch).sqrt() * unscale * mask
        else:
            norms = self._squared_norms_of_users(users).sqrt() * unscale
        factors = (limit / norms.clamp_min(limit)).clamp_max(1.0)
        if users is not None:
            factors = users.spread(factors)
        return norms, factors * mask * unscale

    def _squared_norms(self, batch: int) -> Tensor:
        """Of each example's gradient, float ``[batch]``."""
        squared = torch.zeros(batch, device=self.device)
        for cut in self.cuts:
            squared += cut.squared_norms(batch, squared.device)
        # Last, for what the norms read is in the cache when the sums read it, the other way round.
        return squared.add_(self.recorder.squared_norms(batch))

    def _squared_norms_of_users(self, users: UserGroups) -> Tensor:
        """Of each user's gradient, float ``[units]``."""
        squared = torch.zeros(users.num_units, device=self.device)
        for cut in self.cuts:
            squared += cut.squared_norms_of_users(users, squared.device)
        return squared.add_(self.recorder.squared_norms_of_users(users))

    def _refuse_faults(self, sums: DenseSums) -> None:
        """Refuses gradients that are not finite: on every rank, so that none waits for another."""
        if self.mechanism.private and bool(sums.faults > 0):
            one = "a user" if self.plan.unit == "user" else "an example"
            raise ModelError(
                f"step {self.step_in_flight}: the gradient of {one} is not finite "
                f"({int(sums.faults)} in all). The training diverged (lower the learning rate) or "
                "the features hold huge values."
            )

    def _check_grid(self) -> None:
        """With a grid, a step's noise must be well above its spacing, and no step without."""
        if self.plan.noise_grid is None:
            return
        step = self.schedule.step
        for schedule, group in zip(self.mechanism.schedules, self._table_groups, strict=True):
            deviation = float(group["lr"]) * self.plan.noise_on_sum / self.plan.expected_batch_size
            if deviation > 0:
                check_spacing(self.plan.noise_grid, deviation, f"at step {step + 1}")
                continue
            assert isinstance(schedule, NoiseSchedule)  # with momentum there is no grid
            _, owed = schedule.decay_and_scale(torch.zeros(1, dtype=torch.int64), step)
            if float(owed) > 0:
                raise ConfigError(
                    f"step {step + 1}: {group['name']}: the learning rate is 0 after steps with "
                    "noise; with noise.grid the last step of a release must add noise, so let the "
                    "rate stay above 0"
                )

    def _noise_dense(self, sums: DenseSums, step: int) -> float:
        """Adds the step's noise in place; the ratio of signal to noise before it."""
        if not self.mechanism.private or sums.flat.numel() == 0:
            return float("nan")
        deviation = self.plan.noise_on_sum_at(step)
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
