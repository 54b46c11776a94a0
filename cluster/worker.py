"""What runs in every worker: build, train, evaluate, release. Rank 0 keeps the books."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dist_dp import kernels
from dist_dp.checkpoint import CheckpointWriter
from dist_dp.checkpoint_folder import has_checkpoint
from dist_dp.cluster import quiet
from dist_dp.cluster.accountant import AccountantClient
from dist_dp.cluster.config import CHANGEABLE, RunConfig, TrainConfig
from dist_dp.cluster.faults import ended_for_good
from dist_dp.cluster.finish import checkpoint_folder, finish, finished_before, trail_file
from dist_dp.cluster.job import Job
from dist_dp.distributed import all_gather_cat, all_reduce_max, broadcast_object, rank
from dist_dp.fence import Fence, FencedAccountant
from dist_dp.mechanisms.sparse import SparseNoise
from dist_dp.patience import PatientAccountant
from dist_dp.schedules import learning_rate_at


def train_worker(values: dict[str, Any]) -> None:
    """Ray Train's entry: one call per worker."""
    job = Job(**values)
    quiet.apply(job.verbose)
    from dist_dp._builds import check_builds

    config = job.run_config
    device = _device(config)
    check_builds(need_cuda=device.type == "cuda")
    threads = config.cluster.threads_per_worker
    if threads:
        torch.set_num_threads(threads)
    with ended_for_good(job.run_name, Path(job.run_folder)) as (link, fence, is_over):
        if is_over:
            return
        accountant = None
        if fence is not None:
            patient = PatientAccountant(AccountantClient(job.ledger), link.say)
            accountant = FencedAccountant(patient, fence)
        if not finished_before(job, accountant):
            Run(job, config, device, accountant, fence).train()


def _device(config: RunConfig) -> torch.device:
    import ray.train.torch

    device: torch.device = ray.train.torch.get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device if config.cluster.use_gpu is not False else torch.device("cpu")


class Run:
    """One worker's side of a run.

    Args:
        job: What the driver handed over.
        config: Its configuration.
        device: Where this worker computes.
        accountant: Rank 0's.
        fence: Rank 0's attempt.
    """

    def __init__(
        self,
        job: Job,
        config: RunConfig,
        device: torch.device,
        accountant: Any,
        fence: Fence | None,
    ) -> None:
        from dist_dp.cluster.live_metrics import start_run_metrics
        from dist_dp.cluster.metrics_log import MetricsLog
        from dist_dp.cluster.models import build_model
        from dist_dp.cluster.monitor import MonitorLink
        from dist_dp.cluster.summary import say_kernels
        from dist_dp.engine import PrivacyEngine
        from dist_dp.sharding import TableOptimizer

        self.job, self.config, self.device = job, config, device
        self.folder = Path(job.run_folder)
        self.checkpoint = checkpoint_folder(self.folder)
        # After a loss of workers too: Ray Train starts them again with the same job.
        self.goes_on = broadcast_object(job.resume or has_checkpoint(self.checkpoint))
        self.store = job.open_store()
        self.train_set = self.store.split("train")
        seed = config.privacy.seed
        if seed is not None:
            torch.manual_seed(seed)
        model = build_model(config.model, job.schema)
        privacy = config.privacy
        self.engine = PrivacyEngine(
            dataset=job.dataset,
            mechanism=privacy.mechanism,
            sparse=privacy.sparse,
            sharding=config.model.sharding,
            accountant=accountant,
            run_id=job.run_name,
            secret=None if seed is None else fixed_secret(seed),
            resume_from=self.checkpoint if self.goes_on else None,
            trail=trail_file(self.folder) if config.train.checkpoint_every else None,
            fence=fence,
            owner=job.owner,
            device=device,
            settings=settings_to_keep(job.config),
        )
        budget = privacy.dataset_budget
        self.model, self.optimizer, self.loader = self.engine.make_private_from_plan(
            job.privacy_plan,
            module=model,
            optimizer=_dense_optimizer(config.train, model),
            data_loader=self.train_set,
            lease_steps=config.train.lease_steps,
            micro_batch_size=config.train.micro_batch_size,
            table_optimizer=TableOptimizer(
                config.train.table_optimizer, momentum=config.train.momentum
            ),
            table_lr=config.train.learning_rate.base,
            budget=(budget.epsilon, budget.delta) if budget else None,
            fingerprint=self.train_set.fingerprint,
            stop_at_budget=privacy.stop_at_budget,
            look_ahead=config.train.look_ahead,
        )
        self.checkpoints: CheckpointWriter | None = None
        if config.train.checkpoint_every:
            background = config.train.checkpoint_mode == "async"
            self.checkpoints = CheckpointWriter(self.engine, self.checkpoint, background=background)
        self.timer = self.engine.timer
        self.status = "completed"
        self.log = None
        self.link = None
        if rank() == 0:
            self.link = MonitorLink(job.run_name)
            self.log = MetricsLog(self.folder, tensorboard=config.output.tensorboard)
        self.note_step = start_run_metrics(
            config.output.live_metrics, job.run_name, self.loader.steps
        )
        self.kernels = say_kernels(device)
        if self.link is not None and self.engine.mechanism_class.private:
            self.link.push(self.kernels)
        self.began = time.perf_counter()
        self.step_seconds: list[float] = []
        self.phases: list[dict[str, float]] = []
        self.examples = 0

    def train(self) -> None:
        """Trains, then evaluates, settles and releases."""
        self._probe()
        if self.checkpoints is not None and not self.goes_on and self.config.cluster.max_failures:
            # So that a loss of workers before the next one costs no budget.
            self.save_checkpoint()
        try:
            self._loop()
        finally:
            if self.log is not None:
                self.log.close()
        if self.loader.leases.refusal is not None:
            self.status = "stopped_at_budget"
        finish(self)

    def _probe(self) -> None:
        """Generated examples, not private ones, show whether the model mixes a batch."""
        from dist_dp.cluster.models import logits_of
        from dist_dp.cluster.probe_batch import random_batch
        from dist_dp.probe import check_losses_independent

        # A resumed run was probed before, and reading rows now would settle them at another step.
        if not self.engine.mechanism_class.private or self.goes_on:
            return

        def losses(seeds: Sequence[int]) -> torch.Tensor:
            self.optimizer.forget()
            batch = random_batch(self.job.schema, seeds).to(self.device)
            return _per_example_loss(logits_of(self.model, batch), batch.labels)

        check_losses_independent(self.engine.parts.cuts, losses)
        self.optimizer.forget()
        self.timer.take()

    def _loop(self) -> None:
        from dist_dp.cluster.models import logits_of

        train = self.config.train
        last = time.perf_counter()
        seen: list[torch.Tensor] = []
        for batch in self.loader:
            step = self.loader.steps_drawn
            self._set_learning_rates(step)
            with self.timer.phase("data"):
                batch = batch.to(self.device)
            with self.timer.phase("forward"):
                logits = logits_of(self.model, batch)
                losses = _per_example_loss(logits, batch.labels)
                loss = losses.mean()
            with self.timer.phase("backward"):
                loss.backward()
            self.optimizer.step()
            seen.append(losses.detach()[batch.is_real])
            if self.optimizer.is_accumulating:
                continue
            before = time.perf_counter()
            due = train.evaluate_every and step % train.evaluate_every == 0
            valid = self.evaluate("valid") if due else {}
            evaluating = time.perf_counter() - before
            row, stop = self._statistics(step, torch.cat(seen), bool(valid))
            seen.clear()
            now = time.perf_counter()
            elapsed, last = now - last - evaluating, now
            self.step_seconds.append(elapsed)
            if valid and row:
                row |= {"valid_auc": valid["auc"], "valid_log_loss": valid["log_loss"]}
            self._report(step, row, elapsed)
            every = train.checkpoint_every
            if every and step % every == 0 and not stop:
                with self.timer.paused():
                    self.save_checkpoint()
                last = time.perf_counter()
            if stop:
                self.status = "interrupted"
                self.loader.stop()

    def save_checkpoint(self) -> None:
        """Saves the state between two steps."""
        assert self.checkpoints is not None
        self.checkpoints.save()

    def _set_learning_rates(self, step: int) -> None:
        train = self.config.train
        tables = learning_rate_at(train.learning_rate, step)
        dense = learning_rate_at(train.dense_learning_rate or train.learning_rate, step)
        for group in self.optimizer.param_groups:
            group["lr"] = tables if "tables" in group else dense

    def _statistics(
        self, step: int, losses: torch.Tensor, evaluated: bool
    ) -> tuple[dict[str, float], bool]:
        """Loss, norms and clip fraction over all ranks, and whether to stop."""
        stats = self.optimizer.last_stats
        assert stats is not None
        row: dict[str, float] = {}
        stop = self.link is not None and self.link.stop_requested
        failed = self.checkpoints is not None and self.checkpoints.failed
        with self.timer.phase("communication"):
            flags = torch.tensor([float(stop), float(failed)], device=self.device)
            stop, failed = (bool(flag) for flag in all_reduce_max(flags).tolist())
            if failed and self.checkpoints is not None:
                self.checkpoints.wait()  # Raises, on every rank.
            every = self.config.train.log_every
            if step % every == 0 or step == self.loader.steps or evaluated:
                gathered = all_gather_cat(losses).cpu()
                norms = all_gather_cat(stats.norms).cpu()
                row = self._row(gathered, norms, stats.signal_to_noise)
        return row, stop

    def _row(self, losses: torch.Tensor, norms: torch.Tensor, snr: float) -> dict[str, float]:
        private = self.engine.mechanism_class.private
        row = {
            "loss": float(losses.mean()) if losses.numel() else float("nan"),
            "batch_size": float(losses.numel()),
            "epsilon": self.loader.leases.epsilon_charged if private else float("inf"),
            "learning_rate": float(self.optimizer.param_groups[0]["lr"]),
        }
        mechanism = self.engine.parts.mechanism
        if isinstance(mechanism, SparseNoise) and mechanism.last_selection is not None:
            row["noised_rows"] = float(mechanism.last_selection.rows)
        if private and norms.numel():
            limit = self.engine.parts.plan.max_grad_norm_at(self.loader.steps_drawn)
            row["clip_fraction"] = float((norms > limit).float().mean())
            row["signal_to_noise"] = snr
            levels = torch.tensor([0.1, 0.5, 0.9, 0.99])
            for name, value in zip(
                ("p10", "p50", "p90", "p99"), torch.quantile(norms, levels).tolist(), strict=True
            ):
                row[f"grad_norm_{name}"] = value
        return row

    def _report(self, step: int, row: dict[str, float], seconds: float) -> None:
        phases = self.timer.take()
        # Settling happens inside the forward pass.
        phases["forward"] = phases.get("forward", 0.0) + phases.get("settle", 0.0)
        self.phases.append(phases)
        self.note_step(step, self.loader.leases.charged_until, row, seconds)
        if not row:
            self.push({})
            return
        self.examples += int(row["batch_size"])
        speed = row["batch_size"] / seconds if seconds > 0 else 0.0
        row |= {"step": step, "step_ms": 1e3 * seconds, "examples_per_second": speed}
        row |= {f"{name}_ms": value for name, value in phases.items()}
        if self.log is not None:
            self.log.write(row)
        self.push(
            {
                "phase": "training",
                "step": step,
                "steps": self.loader.steps,
                "loss": row["loss"],
                "epsilon": row["epsilon"],
                "examples_per_second": speed,
                "valid_auc": row.get("valid_auc"),
            }
        )

    def push(self, progress: dict[str, Any]) -> None:
        """Tells the run's monitor, from rank 0; nothing says that it is still there."""
        if self.link is not None:
            self.link.push(progress)

    def evaluate(self, split: str) -> dict[str, float]:
        """Metrics on a split; none if it is empty."""
        from dist_dp.cluster.evaluation import evaluate

        if split not in self.store.split_names() or len(self.store.split(split)) == 0:
            return {}
        with self.timer.paused():
            dataset = self.store.split(split)
            return evaluate(self.model, dataset, batch_size=8192, device=self.device)

    def report_release(self, done: int, total: int) -> None:
        """Rank 0's share of the tables stands for all ranks': they write at the same time."""
        if self.link is not None and total:
            share = {"released_bytes": done, "release_bytes": total}
            self.link.push({"phase": "settling and releasing", **share})

    def evaluable(self, split: str) -> Any:
        """The records of a split, none if there is no such split."""
        return self.store.split(split) if split in self.store.split_names() else []


def settings_to_keep(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that a resumed run must share: all but where and how often it is saved.

    Workers, sharding and checkpoints bear neither on the guarantee nor, but for the order of
    sums, on the model.
    """
    kept = {k: dict(config[k]) for k in ("data", "model", "privacy", "noise", "train")}
    for key in CHANGEABLE:
        section, _, name = key.partition(".")
        if section in kept:
            kept[section].pop(name, None)
    return kept


def fixed_secret(seed: int) -> bytes:
    """A secret from a seed, for tests; a run with one is marked as not private."""
    return kernels.derive_key(bytes(32), "fixed-seed", str(seed))


def _per_example_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")


def _dense_optimizer(train: TrainConfig, model: torch.nn.Module) -> torch.optim.Optimizer:
    kinds: dict[str, Any] = {
        "sgd": torch.optim.SGD,
        "adagrad": torch.optim.Adagrad,
        "adam": torch.optim.Adam,
    }
    base = (train.dense_learning_rate or train.learning_rate).base
    momentum = {"momentum": train.momentum} if train.dense_optimizer == "sgd" else {}
    optimizer: torch.optim.Optimizer = kinds[train.dense_optimizer](
        model.parameters(), lr=base, weight_decay=train.weight_decay, **momentum
    )
    return optimizer
