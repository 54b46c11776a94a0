"""The driver: prepares data and plan, runs the workers under Ray Train, writes the report."""

from __future__ import annotations

import contextlib
import secrets
import shutil
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dist_dp.account import check_whole_run_fits
from dist_dp.cluster.accountant import start_accountant
from dist_dp.cluster.config import CHANGEABLE, ClusterConfig, RunConfig, load_config
from dist_dp.cluster.faults import Watchdog
from dist_dp.cluster.finish import checkpoint_folder
from dist_dp.cluster.head import Head, HeadLostError
from dist_dp.cluster.job import Job
from dist_dp.cluster.metrics_log import METRICS_FILE
from dist_dp.cluster.monitor import start_monitor
from dist_dp.cluster.placement import scaling
from dist_dp.cluster.prepare import Prepared, prepare
from dist_dp.cluster.quiet import environment
from dist_dp.cluster.ray_session import ray_session
from dist_dp.cluster.run_folder import (
    MARK,
    check_run_name_is_free,
    create_run_folder,
    read_summary,
    release_of,
    write_config,
    write_summary,
)
from dist_dp.cluster.run_lock import driving
from dist_dp.errors import ConfigError, DistDpError, StaleAttemptError
from dist_dp.kernels import SlowKernelsWarning
from dist_dp.ledger_address import LedgerAddress, default_ledger, ledger_address
from dist_dp.plan import PrivacyPlan
from dist_dp.selection_forecast import DenseSelectionWarning, forecast_selection, warn_if_dense

Watcher = Callable[[dict[str, Any]], None]
STOPPING = "stopping after this step (Ctrl-C again aborts)"


class Trainer:
    """Trains a model as a configuration says.

    Example:
        config = load_config("examples/criteo_dlrm.yaml", {"data.path": "train.tsv"})
        summary = Trainer(config).fit()

    Args:
        config: The configuration.
        verbose: Let libraries log.
        watch: Called about five times a second with the latest progress, and once with what is
            to be read (``notice``): a loss of workers, a ledger that is away.
        resume: Folder of an unfinished run to go on with; see :meth:`resumed`.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        verbose: bool = False,
        watch: Watcher | None = None,
        resume: Path | None = None,
    ) -> None:
        self.config = config
        self.resume = resume
        self.verbose = verbose
        self.watch = watch or (lambda progress: None)
        self.run_folder: Path | None = None
        self._owner = secrets.token_hex(16)

    @classmethod
    def resumed(
        cls, folder: str | Path, changes: Mapping[str, Any] | None = None, **options: Any
    ) -> Trainer:
        """A trainer that goes on with a run from its last checkpoint.

        Args:
            folder: The run folder.
            changes: Settings by dotted key that are other than before: of the cluster, the
                sharding and the checkpoints.
            **options: See the class.

        Raises:
            CheckpointError: The run has no checkpoint (``train.checkpoint_every``).
            ConfigError: Another setting is among the changes.
        """
        from dist_dp.checkpoint import read_checkpoint_info

        for key in changes or {}:
            if not any(f"{key}.".startswith(f"{allowed}.") for allowed in CHANGEABLE):
                raise ConfigError(
                    f"'{key}' cannot be changed for a run that goes on, only "
                    f"{', '.join(CHANGEABLE)}; start a new run instead"
                )
        folder = Path(folder).resolve()
        read_checkpoint_info(checkpoint_folder(folder))
        return cls(load_config(folder / MARK, changes), resume=folder, **options)

    def fit(self) -> dict[str, Any]:
        """Runs to the end (or the end of the budget, or a first Ctrl-C).

        Returns:
            The summary, also in the run folder.

        Raises:
            DistDpError: The run could not be done; the message says why.
        """
        with contextlib.ExitStack() as held:
            return self._fit(held)

    def _fit(self, held: contextlib.ExitStack) -> dict[str, Any]:
        from dist_dp.checkpoint import read_checkpoint_info

        output = self.config.output
        if self.config.stream is not None:
            raise ConfigError(
                "stream: is set, and this is one run; train all periods with dist-dp stream, or "
                "take the section out"
            )
        if self.resume is None:
            check_run_name_is_free(Path(output.folder), output.name)
            self.config = _with_start(self.config)
        else:
            held.enter_context(driving(self.resume))
            read_checkpoint_info(checkpoint_folder(self.resume))  # whoever was here may have ended
        self.watch({"phase": "reading the data"})
        prepared = prepare(self.config)
        _warn_if_dense(self.config, prepared)
        self.watch({"phase": "starting Ray", "plan": prepared.plan})
        with ray_session(self.config.cluster, self.verbose):
            self.config = _choose_device(self.config)
            given = self.config.privacy.ledger
            ledger = ledger_address(given) if given else default_ledger()
            accountant = start_accountant(ledger)
            self._check_budget(accountant, prepared)
            if self.resume is not None:
                folder = self.resume
            else:
                _check_account_is_free(accountant, output.name)
                folder = create_run_folder(Path(output.folder), output.name, prepared.dataset)
                held.enter_context(driving(folder))
            self.run_folder = folder
            try:
                write_config(folder, self.config.to_yaml())
                if self.resume is not None:
                    from dist_dp.release import publish_recorded

                    publish_recorded(folder / "release", accountant, folder.name)
                self._run(self._job(folder, prepared, ledger))
            except BaseException as error:
                self._note_failure(folder, accountant, error)
                raise
            finally:
                shutil.rmtree(folder / ".ray", ignore_errors=True)
        from dist_dp.cluster.report import write_report

        summary = read_summary(folder)
        self.watch({"phase": "writing the report"})
        if summary["epsilon"] is not None:
            curve = epsilon_by_step(prepared.plan, int(summary["steps"]))
            summary["epsilon_by_step"] = curve
            write_summary(folder, summary)
        write_report(folder)
        return summary

    def _check_budget(self, accountant: Any, prepared: Prepared) -> None:
        """Refuses early what the workers would refuse once they are up."""
        known = {budget.name for budget in accountant.datasets()}
        whole = self.resume is None and not self.config.privacy.stop_at_budget
        if whole and prepared.plan.mechanism != "none" and prepared.dataset in known:
            check_whole_run_fits(accountant, prepared.dataset, prepared.plan)

    def _job(self, folder: Path, prepared: Prepared, ledger: LedgerAddress) -> Job:
        return Job(
            run_name=folder.name,
            run_folder=str(folder),
            store=str(prepared.store.path.resolve()),
            dataset=prepared.dataset,
            ledger=str(ledger),
            config=self.config.model_dump(mode="json"),
            columns=prepared.schema.model_dump(mode="json"),
            plan=prepared.plan.model_dump(),
            owner=self._owner,
            resume=self.resume is not None,
            verbose=self.verbose,
        )

    def _note_failure(self, folder: Path, accountant: Any, error: BaseException) -> None:
        """A run that never took a step leaves no folder; another one keeps what it has."""
        from dist_dp.checkpoint_folder import has_checkpoint

        if isinstance(error, StaleAttemptError):
            return  # All of it is the other attempt's.
        # Without the head nobody is there to close the account.
        unreachable = isinstance(error, HeadLostError)
        aborted = isinstance(error, KeyboardInterrupt)
        metrics = folder / METRICS_FILE
        # The first line names the columns.
        began = metrics.exists() and len(metrics.read_text(encoding="utf-8").splitlines()) > 1
        began = began or self.resume is not None
        resumable = began and has_checkpoint(checkpoint_folder(folder))
        if began:
            text = "aborted by Ctrl-C" if aborted else f"{type(error).__name__}: {error}"
            with contextlib.suppress(OSError):  # a full disk must not hide the reason
                (folder / "error.txt").write_text(text + "\n", encoding="utf-8")
        else:
            shutil.rmtree(folder, ignore_errors=True)
        if resumable or unreachable:
            return  # The account stays open.
        with contextlib.suppress(DistDpError):
            # Not that of a run of the same name in another folder.
            if self.resume is not None or accountant.run_owner(folder.name) == self._owner:
                accountant.close_run(folder.name, "aborted" if aborted else "failed")

    def _run(self, job: Job) -> None:
        """One Ray Train run, watched; Ctrl-C once asks the workers to stop."""
        import ray

        from dist_dp.cluster.worker import train_worker

        monitor = start_monitor(job.run_name)
        done = threading.Event()
        stopping = threading.Event()

        def poll() -> None:
            announced = said = False
            told = 0
            while not done.wait(0.2):
                try:
                    progress, notices = ray.get(monitor.news.remote(), timeout=5)
                except ray.exceptions.GetTimeoutError:
                    continue  # A busy machine; the workers are still there.
                except ray.exceptions.RayError:
                    return
                for text in notices[told:]:
                    self.watch({"notice": text})
                told = len(notices)
                if not said and "kernels" in progress:
                    said = True
                    self.watch({"phase": f"noise kernels: {progress['kernels']}"})
                    _warn(progress["slow_kernels"])
                # Said at least once, even if the workers are past training by now.
                if stopping.is_set() and not (announced and progress.get("phase") != "training"):
                    progress, announced = {"phase": STOPPING}, True
                self.watch(progress)

        watcher = threading.Thread(target=poll, daemon=True)
        watcher.start()
        watchdog = Watchdog(
            monitor, self.config.cluster.hang_timeout_s, lambda text: self.watch({"notice": text})
        )
        try:
            try:
                with _stop_on_interrupt(monitor, stopping):
                    fit_workers(train_worker, job.to_dict(), self.config.cluster, job, self.verbose)
            except DistDpError as error:
                # What a worker said of itself says more than that the group is gone.
                with contextlib.suppress(ray.exceptions.RayError):
                    for failure in ray.get(monitor.failure.remote(), timeout=10):
                        raise readable(failure) from error
                raise
            for failure in ray.get(monitor.failure.remote()):
                raise readable(failure)
        finally:
            done.set()
            watchdog.close()
            watcher.join(timeout=5)
            with contextlib.suppress(ray.exceptions.RayError):
                ray.kill(monitor)


def _with_start(config: RunConfig) -> RunConfig:
    """With the release to start from as every node finds it; says early if there is none."""
    from dist_dp.released import Release

    if config.train.start_from is None:
        return config
    folder = release_of(config.train.start_from).resolve()
    Release.open(folder, verify=False)  # the workers compare its hashes
    train = config.train.model_copy(update={"start_from": str(folder)})
    return config.model_copy(update={"train": train})


def _check_account_is_free(accountant: Any, name: str | None) -> None:
    """Says before the workers start what they would say once they are up."""
    if name is not None and accountant.knows_run(name):
        raise ConfigError(
            f"run '{name}' is in the ledger already, from another folder or a folder that was "
            "removed: choose another --name"
        )


def _warn(reasons: list[str]) -> None:
    """Says that noise is slow somewhere, whatever else is kept quiet."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", SlowKernelsWarning)
        for reason in reasons:
            warnings.warn(reason, SlowKernelsWarning, stacklevel=2)


def _warn_if_dense(config: RunConfig, prepared: Prepared) -> None:
    """Says that a selection of rows selects nearly all: what workers say of it nobody hears."""
    if config.model.factory is not None:
        return  # its tables are known to the workers alone
    sizes = {
        table: (rows, config.model.embedding_dim)
        for table, rows in prepared.schema.table_rows().items()
    }
    with contextlib.suppress(ConfigError), warnings.catch_warnings():
        warnings.simplefilter("always", DenseSelectionWarning)
        warn_if_dense(forecast_selection(prepared.plan, sizes, {}))


def epsilon_by_step(plan: PrivacyPlan, steps: int, points: int = 10) -> list[list[float]]:
    """Exact ε after some of the steps, closer together at the start, where ε rises fastest."""
    chosen = {max(1, round(steps * (i / points) ** 2)) for i in range(1, points + 1)}
    return [[float(s), plan.epsilon(plan.events(s))] for s in sorted(chosen) if s <= steps]


def fit_workers(
    loop: Callable[[dict[str, Any]], None],
    values: dict[str, Any],
    cluster: ClusterConfig,
    job: Job,
    verbose: bool,
) -> None:
    """Runs a function on every worker under Ray Train.

    Raises:
        DistDpError: A worker failed; the message is the worker's own.
    """
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    # Without checkpoints there is nothing to go on from.
    goes_on = job.run_config.train.checkpoint_every > 0
    trainer = TorchTrainer(
        loop,
        train_loop_config=values,
        torch_config=TorchConfig(
            backend="nccl" if cluster.use_gpu else "gloo",
            timeout_s=max(1, round(cluster.hang_timeout_s)),
        ),
        scaling_config=ScalingConfig(**scaling(cluster)),
        run_config=RunConfig(
            name=job.run_name,
            storage_path=str(Path(job.run_folder) / ".ray"),
            failure_config=FailureConfig(max_failures=cluster.max_failures if goes_on else 0),
            worker_runtime_env={"env_vars": environment(verbose)},
        ),
    )
    try:
        address = str(ray.get_runtime_context().gcs_address)
        Head(address, Path(job.run_folder)).while_there(trainer.fit)
    except Exception as error:
        raise readable(error) from error


def _choose_device(config: RunConfig) -> RunConfig:
    """Fills in ``cluster.use_gpu`` by what the cluster has."""
    cluster = config.cluster
    if cluster.use_gpu is not None:
        return config
    import ray

    enough = ray.cluster_resources().get("GPU", 0) >= cluster.num_workers
    chosen = cluster.model_copy(update={"use_gpu": enough})
    return config.model_copy(update={"cluster": chosen})


def readable(error: BaseException) -> DistDpError:
    """The message a user needs out of Ray's nested errors.

    Our own errors are searched first, over all workers: the others of a group often fail only
    because one did.
    """
    causes = list(_causes(error))
    for cause in causes:
        if isinstance(cause, DistDpError):
            return cause
    inner = next((c for c in reversed(causes) if not _is_rays(c)), causes[-1])
    message = " ".join(str(inner).split())
    if len(message) > 300:
        message = message[:300] + " …"
    return DistDpError(
        f"a worker failed: {type(inner).__name__}: {message} (--verbose shows the workers' logs)"
    )


def _is_rays(error: BaseException) -> bool:
    return type(error).__module__.startswith("ray")


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        current = waiting.pop(0)
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        waiting += [current.__cause__, getattr(current, "cause", None)]
        failures = getattr(current, "worker_failures", None)
        if isinstance(failures, dict):
            waiting += [f for f in failures.values() if isinstance(f, BaseException)]


@contextmanager
def _stop_on_interrupt(monitor: Any, stopping: threading.Event) -> Iterator[None]:
    """First Ctrl-C: stop after the step in flight and release; second: abort."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def on_interrupt(_signal: int, _frame: Any) -> None:
        if stopping.is_set():
            signal.signal(signal.SIGINT, before)
            raise KeyboardInterrupt
        stopping.set()
        monitor.request_stop.remote()

    signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
