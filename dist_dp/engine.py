"""Makes an existing TorchRec model and loader private, in three lines.

Example:
    engine = PrivacyEngine(dataset="clicks-2026")
    model, optimizer, loader = engine.make_private_with_epsilon(
        module=model, optimizer=optimizer, data_loader=loader,
        target_epsilon=8.0, target_delta=1e-7, epochs=3, max_grad_norm=1.0,
    )
    for dense, sparse, labels in loader:      # the loop stays as it was
        loss = criterion(model(dense, sparse), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    engine.release("released_model")
"""

from __future__ import annotations

import hashlib
import math
import secrets
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from dist_dp import kernels
from dist_dp.account import open_account
from dist_dp.checkpoint import (
    CheckpointWriter,
    load_checkpoint,
    read_checkpoint_info,
    read_secret,
)
from dist_dp.distributed import broadcast_object, ensure_process_group, rank
from dist_dp.errors import ConfigError, DistDpError
from dist_dp.events import PrivacyEvent
from dist_dp.fence import Fence
from dist_dp.leases import StepLeases
from dist_dp.ledger_address import default_ledger, ledger_address
from dist_dp.ledger_entry import Position
from dist_dp.loader import PoissonLoader, as_source
from dist_dp.look_ahead import FeaturesOf, LookAhead
from dist_dp.mechanisms import SparseNoise, mechanism_class
from dist_dp.optimizer import LossReduction, PrivateOptimizer
from dist_dp.optimizer_settings import optimizer_settings, rates_of
from dist_dp.plan import Mechanism as MechanismName
from dist_dp.plan import PrivacyPlan
from dist_dp.private_model import PrivateModel, build_private_model
from dist_dp.release_progress import Report, progress_callback
from dist_dp.row_choice import choose_rows
from dist_dp.row_counts import tables_of
from dist_dp.sampling import PoissonSampler
from dist_dp.schedules import ScheduleConfig
from dist_dp.sharding import ShardingKind, TableOptimizer
from dist_dp.sparse_settings import SparseSettings
from dist_dp.start_weights import load_start
from dist_dp.timing import PhaseTimer
from dist_dp.trail import StepTrail
from dist_dp.user_records import UserRecords, users_of
from dist_dp.user_sampling import UserSampler


class PrivacyEngine:
    """Couples sampling, clipping, noise and accounting for one run.

    Guarantee:
        What :meth:`release` writes is (ε, δ)-DP with respect to adding or removing one record of
        ``data_loader``'s data set, or all records of one user (``max_records_per_user``), at the ε
        of the steps in :meth:`charged_events`, and the ledger was charged at least that before each
        step. See :class:`PrivateOptimizer` for what it assumes.

    Args:
        dataset: Name of the data set in the ledger; runs that name it share its budget.
        mechanism: ``lazydp`` (default), ``dpsgd`` or ``none``; or, with noise on few rows,
            ``fest``, ``adafest`` or ``adafest+``.
        sparse: What the mechanisms with noise on few rows select them by.
        sharding: One kind for all tables or a kind by table name; ``auto`` asks TorchRec's
            planner.
        accountant: Rank 0's accountant; by default the ledger at ``ledger``, in this process.
        ledger: Path of the ledger, or a ``postgresql://`` URL; see
            :func:`~dist_dp.ledger_address.default_ledger`.
        run_id: The run's name in the ledger; by default a new one.
        resume_from: A training checkpoint of this run to go on from, or the folder that
            :func:`dist_dp.checkpoint.save_checkpoint` was given. Workers and sharding may be
            others than before.
        start_from: A release whose weights the run starts with; see
            :func:`dist_dp.start_weights.load_start`. A run that goes on from a checkpoint has the
            checkpoint's, and needs the release no more.
        trail: File in which the run notes what each step looked like, beside its checkpoints, so
            that after a crash a replay that comes out the same is not charged again; see
            :mod:`dist_dp.trail`. Without it every replayed step is charged again.
        fence: Rank 0's attempt at the run, where another one may take its place.
        owner: Tells the run from others of its name, in all its attempts; by default the place of
            the trail does.
        secret: 32-byte secret for reproducible tests. Leave it out: the operating system makes
            one. A given secret marks the run as not private.
        device: Where tables and dense layers live; by default where the model is.
        settings: Further settings (of simple types) that a resumed run must share.
        noise_grid: Put noised numbers on a fixed grid: a power of two, ``auto``, or None; see
            :mod:`dist_dp.noise_grid`. ``auto`` takes the tables' learning rate for constant.
        noise_rounds: ChaCha rounds of the noise, 20 or 12.

    Warns:
        SlowKernelsWarning: The slow reference would make the noise; names the remedy.
    """

    def __init__(
        self,
        *,
        dataset: str,
        mechanism: str = "lazydp",
        sparse: SparseSettings | None = None,
        sharding: ShardingKind | Mapping[str, ShardingKind] = "auto",
        accountant: Any = None,
        ledger: str | Path | None = None,
        run_id: str | None = None,
        resume_from: str | Path | None = None,
        start_from: str | Path | None = None,
        trail: str | Path | None = None,
        fence: Fence | None = None,
        owner: str | None = None,
        secret: bytes | None = None,
        device: torch.device | str | None = None,
        settings: Mapping[str, Any] | None = None,
        noise_grid: float | str | None = None,
        noise_rounds: Literal[20, 12] = 20,
    ) -> None:
        self.dataset = dataset
        self.mechanism_class = mechanism_class(mechanism)
        self.sparse = sparse
        self.sharding = sharding
        self.run_id = run_id
        self.settings = dict(settings or {})
        self.secret_is_given = secret is not None
        self.resume_from = Path(resume_from) if resume_from else None
        self.start_from = Path(start_from) if start_from else None
        # What the model depends on beside its own records; see dist_dp.origins.
        self.started_from: list[dict[str, Any]] = []
        self.trail = Path(trail) if trail else None
        self.fence = fence
        place = str(self.trail.resolve()) if self.trail else ""
        self._owner = owner or hashlib.sha256(place.encode()).hexdigest()[:32]
        self.device = None if device is None else torch.device(device)
        self.noise_grid = noise_grid
        self.noise_rounds = noise_rounds
        self.timer = PhaseTimer(self.device)
        self._secret = secret
        self.accountant = accountant
        self._ledger = ledger_address(ledger) if ledger else default_ledger()
        self._parts: PrivateModel | None = None
        self._loader: PoissonLoader | None = None
        # Mean records of a unit in a step: 1, or what users have.
        self.records_per_unit = 1.0
        # Set by a writer in the background: a release waits for what is in flight.
        self.checkpoints: CheckpointWriter | None = None
        # Without a device the model's is not known yet, unless there is only one kind.
        if self.mechanism_class.private and (self.device or not torch.cuda.is_available()):
            kernels.warn_if_slow(self.device or "cpu")

    @property
    def parts(self) -> PrivateModel:
        """The private model's parts.

        Raises:
            DistDpError: ``make_private`` was not called yet.
        """
        if self._parts is None:
            raise DistDpError("call make_private or make_private_with_epsilon first")
        return self._parts

    def make_private_with_epsilon(
        self,
        *,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        data_loader: Any,
        target_epsilon: float,
        target_delta: float,
        max_grad_norm: float,
        epochs: float | None = None,
        steps: int | None = None,
        expected_batch_size: float | None = None,
        clip_schedule: ScheduleConfig | None = None,
        noise_multiplier_schedule: ScheduleConfig | None = None,
        max_records_per_user: int | None = None,
        users: Any = None,
        **options: Any,
    ) -> tuple[nn.Module, PrivateOptimizer, PoissonLoader]:
        """As :meth:`make_private`, with the noise calibrated to (ε, δ) over the planned steps."""
        whose = _users(data_loader, max_records_per_user, users)
        plan = self._plan(
            module,
            data_loader,
            None,
            max_grad_norm,
            target_delta,
            epochs,
            steps,
            expected_batch_size,
            clip_schedule,
            noise_multiplier_schedule,
            max_records_per_user,
            whose,
        ).calibrate(target_epsilon, target_delta)
        plan = self._with_grid(plan, module, optimizer, options)
        return self.make_private_from_plan(
            plan,
            module=module,
            optimizer=optimizer,
            data_loader=data_loader,
            users=whose,
            **options,
        )

    def make_private(
        self,
        *,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        data_loader: Any,
        noise_multiplier: float,
        max_grad_norm: float,
        target_delta: float | None = None,
        epochs: float | None = None,
        steps: int | None = None,
        expected_batch_size: float | None = None,
        clip_schedule: ScheduleConfig | None = None,
        noise_multiplier_schedule: ScheduleConfig | None = None,
        max_records_per_user: int | None = None,
        users: Any = None,
        **options: Any,
    ) -> tuple[nn.Module, PrivateOptimizer, PoissonLoader]:
        """Shards the model, cuts it at its tables, and couples it to a private loader.

        Args:
            module: A model with TorchRec collections inside; it is changed in place.
            optimizer: Over ``module.parameters()``; its kind and settings are taken for the dense
                layers, its learning rate, weight decay and momentum for the tables too. With
                several parameter groups each table and layer follows its own.
            data_loader: A torch DataLoader over a map-style data set (its ``batch_size`` becomes
                the expected batch size over all ranks), or a data set of ``dist_dp.datasets``.
            noise_multiplier: σ, the largest of any step.
            max_grad_norm: C, the clip norm over all parameters together.
            target_delta: δ at which ε is stated; by default 0.1 / number of records.
            epochs: Planned passes; or give ``steps``.
            steps: Planned steps.
            expected_batch_size: Mean Poisson batch over all ranks.
            clip_schedule: Factor of ``max_grad_norm`` by step; see :class:`PrivacyPlan`.
            noise_multiplier_schedule: Factor of ``noise_multiplier`` by step; likewise.
            max_records_per_user: Protect users and not records: most records of a user in a step.
                Expected batch size, epochs and δ count users then.
            users: Whose the records are, one integer for each record of the data set; by default
                those that a data set of ``dist_dp.datasets`` was converted with.
            **options: ``loss_reduction`` (``mean`` over the batch or ``sum``), ``lease_steps``,
                ``micro_batch_size`` (most examples a rank sees at a time),
                ``table_optimizer`` (a :class:`~dist_dp.sharding.TableOptimizer`), ``look_ahead``,
                ``budget`` (total ``(ε, δ)`` of the data set if it is new in the ledger).

        Returns:
            The private model, optimizer and loader.

        Raises:
            ConfigError: Something does not fit together; the message names it.
            ModelError: A layer has no clipping rule.
            BudgetError: The data set's budget does not allow the run.
        """
        whose = _users(data_loader, max_records_per_user, users)
        plan = self._plan(
            module,
            data_loader,
            noise_multiplier,
            max_grad_norm,
            target_delta,
            epochs,
            steps,
            expected_batch_size,
            clip_schedule,
            noise_multiplier_schedule,
            max_records_per_user,
            whose,
        )
        plan = self._with_grid(plan, module, optimizer, options)
        return self.make_private_from_plan(
            plan,
            module=module,
            optimizer=optimizer,
            data_loader=data_loader,
            users=whose,
            **options,
        )

    def _plan(
        self,
        module: nn.Module,
        data_loader: Any,
        noise_multiplier: float | None,
        max_grad_norm: float,
        delta: float | None,
        epochs: float | None,
        steps: int | None,
        expected_batch_size: float | None,
        clip_schedule: ScheduleConfig | None,
        noise_multiplier_schedule: ScheduleConfig | None,
        max_records_per_user: int | None,
        users: UserRecords | None,
    ) -> PrivacyPlan:
        units = len(as_source(data_loader)) if users is None else users.num_users
        size = expected_batch_size or getattr(data_loader, "batch_size", None)
        if size is None:
            raise ConfigError("expected_batch_size is missing: the data_loader has no batch_size")
        if (epochs is None) == (steps is None):
            raise ConfigError("give either epochs or steps")
        plan = PrivacyPlan(
            mechanism=cast("MechanismName", self.mechanism_class.name),
            noise_multiplier=None if self.mechanism_class.name == "none" else noise_multiplier,
            max_grad_norm=max_grad_norm,
            unit="record" if users is None else "user",
            num_records=units if users is None else None,
            num_users=None if users is None else units,
            max_records_per_user=max_records_per_user,
            expected_batch_size=size,
            steps=steps if steps is not None else math.ceil((epochs or 0) * units / size),
            delta=delta if delta is not None else 0.1 / max(1, units),
            noise_rounds=self.noise_rounds,
            clip_schedule=clip_schedule,
            noise_multiplier_schedule=noise_multiplier_schedule,
            sparse=self.sparse,
        )
        return plan.with_choice({t.table: t.num_rows for t in tables_of(module)})

    def _with_grid(
        self,
        plan: PrivacyPlan,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        options: Mapping[str, Any],
    ) -> PrivacyPlan:
        """The plan with its noise grid resolved, for constant learning rates of the tables."""
        if self.noise_grid is None:
            return plan
        settings = optimizer_settings(
            optimizer, options.get("table_optimizer"), options.get("table_lr")
        )
        unit = plan.noise_on_sum / plan.expected_batch_size
        least, most = rates_of(settings.table_groups(module))
        return plan.with_noise_grid(self.noise_grid, least * unit, most * unit)

    def make_private_from_plan(
        self,
        plan: PrivacyPlan,
        *,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        data_loader: Any,
        loss_reduction: LossReduction = "mean",
        lease_steps: int = 50,
        table_optimizer: TableOptimizer | None = None,
        table_lr: float | None = None,
        micro_batch_size: int | None = None,
        budget: tuple[float, float] | None = None,
        fingerprint: str | None = None,
        stop_at_budget: bool = False,
        look_ahead: bool | FeaturesOf = False,
        features_of: FeaturesOf | None = None,
        users: Any = None,
    ) -> tuple[nn.Module, PrivateOptimizer, PoissonLoader]:
        """As :meth:`make_private`, from a plan made elsewhere (the trainer's way).

        Args:
            plan: The plan; its number of records, or of users, must be the data's.
            module: See :meth:`make_private`.
            optimizer: See :meth:`make_private`.
            data_loader: See :meth:`make_private`.
            loss_reduction: See :meth:`make_private`.
            lease_steps: Steps charged to the ledger at a time.
            table_optimizer: Fused optimizer of the tables; by default the kind of ``optimizer``.
            table_lr: Learning rate of the tables; by default the optimizer's.
            micro_batch_size: Most examples that a rank sees at a time: a step's batch then comes
                in several parts (see :class:`PoissonLoader`), with the same result up to the
                order of sums. For tables with SGD.
            budget: Total (ε, δ) of the data set if the ledger does not know it; by default what
                this run will spend.
            fingerprint: Identifies the records in the ledger.
            stop_at_budget: Start although the data set's budget does not allow all planned steps,
                and stop when it is used up; otherwise such a run is refused at once.
            look_ahead: Send and settle the next batch beside the dense part of this one; a function
                says which features of a batch each collection gets. See
                :mod:`dist_dp.look_ahead`.
            features_of: Says which features of a batch each collection gets, for the private choice
                of rows, where a batch does not tell; see :mod:`dist_dp.batch_features`.
            users: With a plan for users, see :meth:`make_private`.

        Returns:
            The private model, optimizer and loader.
        """
        source = as_source(data_loader)
        whose = _users(data_loader, plan.max_records_per_user, users)
        units = len(source) if whose is None else whose.num_users
        if units != plan.num_units:
            raise ConfigError(
                f"the plan was made for {plan.num_units} {plan.unit}s, the data has {units}"
            )
        most = plan.max_records_per_user or 1
        self.records_per_unit = 1.0 if whose is None else whose.mean_records(most)
        if micro_batch_size is not None and 1 <= micro_batch_size < most:
            raise ConfigError(
                f"micro_batch_size {micro_batch_size} is below max_records_per_user {most}: a "
                "user's records are clipped together, so they come in one part; raise "
                "micro_batch_size, or lower max_records_per_user"
            )
        settings = optimizer_settings(optimizer, table_optimizer, table_lr)
        self.mechanism_class.check_optimizer(settings.tables.kind)
        takes_updates = self.mechanism_class.takes_updates
        if micro_batch_size is not None and settings.tables.kind != "sgd" and not takes_updates:
            raise ConfigError(
                f"micro_batch_size {micro_batch_size} does not go with the table optimizer "
                f"'{settings.tables.kind}', which would take a step for each part of a batch: use "
                "sgd for the tables, or leave out micro_batch_size"
            )
        ensure_process_group()
        secret = self._agree_on_secret()
        tables = tables_of(module)
        if plan.sparse is not None and plan.sparse.choice is None:
            plan = plan.with_choice({t.table: t.num_rows for t in tables})
        self._parts = build_private_model(
            module,
            plan,
            settings,
            secret=secret,
            sharding=self.sharding,
            loss_reduction=loss_reduction,
            device=self.device,
            timer=self.timer,
            # A resumed run was probed before; reading rows now would settle them at another step.
            probe_first_forward=self.resume_from is None,
            records_per_unit=self.records_per_unit,
        )
        if self.mechanism_class.private:
            kernels.warn_if_slow(self._parts.device)
        # The run's account is opened last: a model that cannot be trained costs no budget.
        self.run_id = broadcast_object(self.run_id or f"run-{uuid.uuid4().hex[:12]}")
        resumed_at = None
        if self.resume_from is not None:
            resumed_at = load_checkpoint(self, self.resume_from)
        elif self.start_from is not None:
            self.started_from = load_start(self._parts, self.start_from)
        parts = self._parts
        mechanism = parts.mechanism
        chooses = isinstance(mechanism, SparseNoise) and not mechanism.has_chosen

        def choose() -> None:
            assert isinstance(mechanism, SparseNoise)
            kept = choose_rows(
                plan,
                tables,
                source,
                users=whose,
                features_of=features_of,
                secret=secret,
                run_id=self.run_id or "",
                accountant=self.accountant,
                device=parts.device,
            )
            mechanism.keep(kept, parts.shards)

        if chooses and plan.sparse is not None and plan.sparse.frequencies is not None:
            choose()  # by a file, which may be wrong; nothing is charged
        restarted = self.trail is not None and broadcast_object(self.trail.exists())
        if self.trail is not None and rank() == 0 and not restarted:
            # Before the account: an attempt that dies in between is known for one that began.
            StepTrail(self.trail).close()
        self.accountant = open_account(
            self.accountant,
            self._ledger,
            plan,
            dataset=self.dataset,
            run_id=self.run_id,
            budget=budget,
            fingerprint=fingerprint,
            stop_at_budget=stop_at_budget,
            resumed_at=resumed_at,
            restarted=restarted,
            owner=self._owner,
            position=self._saved_position(),
        )
        # A run that goes on has the rows that it chose.
        if isinstance(mechanism, SparseNoise) and not mechanism.has_chosen:
            choose()
        done = resumed_at[0] if resumed_at else 0
        leases = StepLeases(
            self.accountant,
            self.run_id,
            plan.steps,
            lease_steps,
            done=done,
            trail=self.trail,
            fence=self.fence,
        )
        if self.mechanism_class.private:
            self._parts.optimizer.on_noised_sums = leases.confirm
        loader = PoissonLoader(
            source,
            PoissonSampler(secret, units, plan.sample_rate)
            if whose is None
            else UserSampler(secret, whose, plan.sample_rate, most),
            leases,
            self._parts.state,
            plan.steps,
            self.timer,
            done,
            micro_batch_size,
        )
        self._loader = loader
        if look_ahead:
            given = None if look_ahead is True else look_ahead
            LookAhead(module, self._parts.optimizer, loader, given)
        return module, self._parts.optimizer, loader

    def _saved_position(self) -> Position | None:
        """Where the ledger was when the checkpoint was saved that the run goes on from."""
        if self.resume_from is None:
            return None
        saved = read_checkpoint_info(self.resume_from)["ledger"]
        return None if saved is None else Position.from_json(saved)

    @property
    def secret(self) -> bytes:
        """The run's secret, for its checkpoint.

        Raises:
            DistDpError: ``make_private`` was not called yet.
        """
        if self._secret is None or self._parts is None:
            raise DistDpError("call make_private or make_private_with_epsilon first")
        return self._secret

    def steps_charged(self) -> int:
        """Steps that the release must answer for: those in it, or more if the ledger says more.

        After a crash, steps that were run again count again; rank 0 alone knows the ledger.
        """
        events = self.charged_events()
        if events is None:
            return self.parts.mechanism.schedule.step
        setup = self.parts.plan.step_costs().setup
        return sum(n for event, n in events.items() if event not in setup)

    def charged_events(self) -> dict[PrivacyEvent, int] | None:
        """The steps of :meth:`steps_charged` by event; None with mechanism ``none``.

        Guarantee:
            Every step in the release counts at its own event, and every step that the ledger
            charged once more (a replay) at that of its number.
        """
        plan, steps = self.parts.plan, self.parts.mechanism.schedule.step
        if plan.mechanism == "none":
            return None
        taken = plan.events(steps)
        if self.accountant is None or self.run_id is None or not plan.is_private:
            return taken
        charged: dict[PrivacyEvent, int] = self.accountant.run_charges(self.run_id)
        return {e: max(taken.get(e, 0), charged.get(e, 0)) for e in taken.keys() | charged.keys()}

    def release(
        self, destination: str | Path, *, progress: bool | Report = False, **details: Any
    ) -> Path:
        """Settles every row and writes the model; the only way to get one out.

        Args:
            destination: Folder to create; it must not exist.
            progress: Show a progress bar if a person watches a terminal (rank 0's share), or a
                function to call with this rank's bytes written and bytes to write.
            **details: Passed to :func:`dist_dp.release.write_release`.

        Returns:
            The folder.

        Raises:
            CheckpointError: A checkpoint in flight could not be written; a second call releases.
            ReleaseError: See :func:`dist_dp.release.write_release`.
        """
        from dist_dp.release import write_release

        if self.checkpoints is not None:
            self.checkpoints.wait()
        if self._loader is not None:
            # A loop that was left early still holds a lease; give back what never began.
            self._loader.leases.close(self._loader.steps_drawn)
        with progress_callback(progress) as report:
            return write_release(self, Path(destination), progress=report, **details)

    def _agree_on_secret(self) -> bytes:
        """Rank 0's secret, on every rank."""
        secret = self._secret
        if self.resume_from is not None:
            self.secret_is_given = bool(read_checkpoint_info(self.resume_from)["fixed_secret"])
            secret = read_secret(self.resume_from) if rank() == 0 else None
        if secret is None and rank() == 0:
            secret = secrets.token_bytes(32)
        self._secret = broadcast_object(secret)
        assert self._secret is not None
        return self._secret


def _users(data: Any, most: int | None, users: Any) -> UserRecords | None:
    """Whose the records are; None where the unit of privacy is a record."""
    if most is not None:
        return users_of(data, users)
    if users is not None:
        raise ConfigError(
            "users is given without max_records_per_user: give both to protect users, or neither "
            "to protect records"
        )
    return None
