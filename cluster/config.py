"""The configuration of a run: typed, validated, from YAML with overrides on the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from dist_dp.cluster.yaml_text import read_yaml
from dist_dp.datasets.schema import DataSchema
from dist_dp.errors import ConfigError, LedgerError
from dist_dp.ledger_address import ledger_address
from dist_dp.limits import MAX_CONFIG_BYTES, read_whole
from dist_dp.noise_grid import read_spacing
from dist_dp.plan import Mechanism
from dist_dp.schedules import ScheduleConfig
from dist_dp.sharding import ShardingKind
from dist_dp.sparse_settings import SPARSE_MECHANISMS, SparseSettings


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_values(cls, value: Any, info: ValidationInfo) -> Any:
        # YAML reads `yes` as true, and true would pass for the number 1.
        field = cls.model_fields[info.field_name or ""]
        if isinstance(value, bool) and bool not in (field.annotation, *get_args(field.annotation)):
            raise ValueError(f"must not be true or false (got {value})")
        return value


CHANGEABLE = (
    "cluster",
    "model.sharding",
    "train.checkpoint_every",
    "train.checkpoint_mode",
    "train.look_ahead",
)
"""What may change when a run goes on: where it runs and is saved, not what it computes."""

# Text for people and the ledger: nothing that moves a terminal's cursor.
_ONE_LINE = r"^[^\x00-\x1f\x7f]+$"
Fraction = Annotated[float, Field(ge=0, le=1)]
LayerSize = Annotated[int, Field(ge=1)]


class DataConfig(_Section):
    """Which records, how they are read and split.

    Attributes:
        path: File or folder of the source, or a store that was converted before.
        name: Name of the data set in the privacy ledger; by default the source's file name.
            Runs on the same records must use the same name: they share its budget.
        format: ``auto``, ``criteo``, ``movielens-100k``, ``movielens-1m`` or ``parquet``.
        columns: Label and features; needed for Parquet, else the format's own.
        user: Column with the key of each record's user, for ``privacy.unit: user``; a hash of it is
            stored with the record.
        num_embeddings: Rows by table name.
        max_num_embeddings: Cap on the rows of every hashed table.
        split: Fractions of train, valid and test.
        split_seed: Seed of the split.
        skip_bad_rows: Count bad rows and leave them out, instead of an error.
        store: Folder of the converted data; by default beside the runs.
    """

    path: str | None = None
    name: Annotated[str, Field(min_length=1, max_length=200, pattern=_ONE_LINE)] | None = None
    format: Literal["auto", "criteo", "movielens-100k", "movielens-1m", "parquet"] = "auto"
    columns: DataSchema | None = None
    user: Annotated[str, Field(min_length=1)] | None = None
    num_embeddings: dict[str, Annotated[int, Field(ge=1)]] = {}
    max_num_embeddings: Annotated[int, Field(ge=1)] | None = None
    split: dict[Literal["train", "valid", "test"], Fraction] = {
        "train": 0.8,
        "valid": 0.1,
        "test": 0.1,
    }
    split_seed: Annotated[int, Field(ge=0)] = 0
    skip_bad_rows: bool = False
    store: str | None = None

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if abs(sum(self.split.values()) - 1) > 1e-9 or not self.split.get("train"):
            raise ValueError("split: fractions must sum to 1, with train above 0")
        if self.format == "parquet" and self.columns is None:
            raise ValueError("columns: Parquet has no schema of its own; declare label and sparse")
        if self.user is not None and self.format == "criteo":
            raise ValueError(
                "user: the Criteo layout does not say whose a record is; convert the logs to "
                "Parquet with a column of users, or remove user"
            )
        return self


class ModelConfig(_Section):
    """The model: TorchRec's DLRM, or a factory of your own.

    Attributes:
        name: ``dlrm``, ``dlrm_dcn`` or ``custom``.
        factory: For ``custom``: ``module:function``; called with the data schema and
            ``factory_args``, returns a module with ``forward(dense_features, sparse_features)``
            that gives logits, float ``[batch]`` or ``[batch, 1]``.
        factory_args: Keyword arguments of the factory.
        embedding_dim: Columns of every table.
        dense_arch: Layer sizes of the bottom MLP; the last must be ``embedding_dim``.
        over_arch: Layer sizes of the top MLP; the last must be 1.
        dcn_layers: Cross layers of ``dlrm_dcn``.
        dcn_low_rank_dim: Their rank.
        sharding: One kind for all tables, or a kind by table name (others ``auto``).
    """

    name: Literal["dlrm", "dlrm_dcn", "custom"] = "dlrm"
    factory: str | None = None
    factory_args: dict[str, Any] = {}
    embedding_dim: Annotated[int, Field(ge=4, multiple_of=4)] = 16
    dense_arch: Annotated[tuple[LayerSize, ...], Field(min_length=1)] = (64, 16)
    over_arch: Annotated[tuple[LayerSize, ...], Field(min_length=1)] = (64, 32, 1)
    dcn_layers: Annotated[int, Field(ge=1)] = 3
    dcn_low_rank_dim: Annotated[int, Field(ge=1)] = 32
    sharding: ShardingKind | dict[str, ShardingKind] = "auto"

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if (self.name == "custom") != (self.factory is not None):
            raise ValueError("factory: goes with name 'custom', and name 'custom' needs it")
        if self.name != "custom" and self.dense_arch[-1] != self.embedding_dim:
            raise ValueError(
                f"dense_arch: its last size {self.dense_arch[-1]} must equal embedding_dim "
                f"{self.embedding_dim}"
            )
        if self.name != "custom" and self.over_arch[-1] != 1:
            raise ValueError(f"over_arch: its last size must be 1, not {self.over_arch[-1]}")
        if self.factory is not None and self.factory.count(":") != 1:
            raise ValueError(f"factory: '{self.factory}' is not of the form module:function")
        return self


class BudgetConfig(_Section):
    """The total that a data set may ever spend, over all runs that name it."""

    epsilon: Annotated[float, Field(gt=0)]
    delta: Annotated[float, Field(gt=0, lt=1)]


class PrivacyConfig(_Section):
    """The guarantee.

    Attributes:
        mechanism: ``lazydp``, ``dpsgd`` or ``none``; or, with noise on few rows, ``fest``,
            ``adafest`` or ``adafest+``.
        sparse: What ``fest``, ``adafest`` and ``adafest+`` select rows by; see
            :class:`~dist_dp.sparse_settings.SparseSettings`.
        epsilon: Target ε; the noise is calibrated to it. Or give ``noise_multiplier``.
        unit: What is protected: one ``record``, or one ``user`` with all its records. With users,
            ``train.expected_batch_size``, epochs and δ count users.
        max_records_per_user: Most records of a user in a step, for unit ``user``.
        delta: δ; by default 0.1 / number of units in the training records.
        noise_multiplier: σ, instead of ``epsilon``; the largest of any step.
        max_grad_norm: Clip norm C over all parameters together.
        clip_schedule: Factor of ``max_grad_norm`` by step, as the learning rate's schedule with
            ``base`` 1 (which may be left out); the noise follows, ε does not change.
        noise_multiplier_schedule: Factor of ``noise_multiplier``, given or calibrated, by step,
            likewise with base 1; rounded up to 16 levels. ε is that of what is drawn.
        accountant: ``pld`` (tight) or ``rdp`` (for comparison).
        allow_large_delta: Accept δ ≥ 1 / number of units all the same.
        dataset_budget: Total of the data set, if the ledger does not know it yet; by default
            what this run will spend.
        stop_at_budget: Start although the data set's budget does not allow all steps, and stop
            when it is used up; otherwise such a run is refused.
        ledger: Path of the ledger, or a ``postgresql://`` URL without a password; by default one
            place per user.
        seed: Fixed secret, for tests. It marks the run as not private.
    """

    mechanism: Mechanism = "lazydp"
    sparse: SparseSettings | None = None
    unit: Literal["record", "user"] = "record"
    max_records_per_user: Annotated[int, Field(ge=1)] | None = None
    epsilon: float | None = None
    delta: float | None = None
    noise_multiplier: Annotated[float, Field(gt=0)] | None = None
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    clip_schedule: ScheduleConfig | None = None
    noise_multiplier_schedule: ScheduleConfig | None = None
    accountant: Literal["pld", "rdp"] = "pld"
    allow_large_delta: bool = False
    dataset_budget: BudgetConfig | None = None
    stop_at_budget: bool = False
    ledger: str | None = None
    seed: int | None = None

    @field_validator("clip_schedule", "noise_multiplier_schedule", mode="before")
    @classmethod
    def _factor(cls, value: Any) -> Any:
        return {"base": 1.0, **value} if isinstance(value, dict) else value

    @field_validator("ledger")
    @classmethod
    def _an_address(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                ledger_address(value)
            except LedgerError as error:
                raise ValueError(str(error)) from None
        return value

    @field_validator("epsilon")
    @classmethod
    def _positive(cls, value: float | None) -> float | None:
        if value is not None and value <= 0:
            raise ValueError(f"must be above 0, not {value:g}")
        return value

    @field_validator("delta")
    @classmethod
    def _probability(cls, value: float | None) -> float | None:
        if value is not None and not 0 < value < 1:
            raise ValueError(f"must lie between 0 and 1, not {value:g}")
        return value

    @model_validator(mode="after")
    def _check(self) -> PrivacyConfig:
        if self.unit == "user" and self.max_records_per_user is None:
            raise ValueError(
                "max_records_per_user: is missing; unit 'user' needs the most records that a user "
                "may have in a step"
            )
        if self.unit == "record" and self.max_records_per_user is not None:
            raise ValueError(
                "max_records_per_user: goes with unit 'user'; set unit, or remove it (as null)"
            )
        if self.mechanism == "none":
            if self.epsilon is not None or self.noise_multiplier is not None:
                raise ValueError(
                    "mechanism: 'none' gives no privacy; remove epsilon and noise_multiplier, or "
                    "choose lazydp"
                )
        elif self.epsilon is None and self.noise_multiplier is None:
            raise ValueError("epsilon: is missing; give it (--epsilon), or noise_multiplier")
        elif self.epsilon is not None and self.noise_multiplier is not None:
            raise ValueError(
                "epsilon: is given together with noise_multiplier; remove one of them (as null)"
            )
        return self


class NoiseConfig(_Section):
    """How the noise is drawn and added.

    Attributes:
        grid: Put noised numbers on a fixed grid, so that their low-order bits tell nothing about
            the records: a power of two (``2^-20`` or as a number), ``auto``, or null for no grid.
            See :mod:`dist_dp.noise_grid`.
        rounds: ChaCha rounds of the noise: 20, or 12 for speed. Sampling always uses 20.
    """

    grid: float | Literal["auto"] | None = None
    rounds: Literal[20, 12] = 20

    @field_validator("grid", mode="before")
    @classmethod
    def _spacing(cls, value: Any) -> Any:
        return value if value in (None, "auto") else read_spacing(value)


class TrainConfig(_Section):
    """Steps, batches and optimizers.

    Attributes:
        epochs: Expected passes over the training records; or give ``steps``.
        steps: Number of steps.
        expected_batch_size: Mean Poisson batch, over all workers, in units of privacy (records, or
            users with ``privacy.unit: user``).
        micro_batch_size: Most examples that a worker sees at a time; a batch then comes in parts
            and needs less memory for dense layers, with the same result. By default whole.
        learning_rate: Schedule of the tables; a number is a constant rate.
        dense_learning_rate: Schedule of the dense layers; by default the tables'.
        table_optimizer: ``sgd``; with mechanism ``none`` also ``adagrad``, ``rowwise_adagrad``,
            and with noise on few rows (``adafest``, …) those and ``adam``.
        dense_optimizer: ``sgd``, ``adagrad`` or ``adam``.
        weight_decay: Of tables and dense layers.
        start_from: A run folder or a released model whose weights the run starts with, in place of
            random ones: same tables, layers and sizes. Optimizers start with no state.
        momentum: Of ``sgd``, for the tables and, if they use it too, the dense layers (PyTorch's,
            no dampening, not Nesterov). It keeps 4 bytes more for each number of a table.
        evaluate_every: Steps between evaluations on the valid split; 0 for none.
        log_every: Steps between lines of the metrics table.
        lease_steps: Steps charged to the ledger at a time.
        checkpoint_every: Steps between private checkpoints to resume from; 0 for none. They hold
            the run's secret and are removed when the run is complete.
        checkpoint_mode: ``async`` writes a copy in host memory while training goes on (the bytes
            of the tables once more), ``sync`` stops until the tables themselves are written.
        look_ahead: Send and settle the next batch's rows beside the dense part of this one
            (``lazydp``); on a GPU on a stream of its own. It changes no result.
    """

    epochs: Annotated[float, Field(gt=0)] | None = None
    steps: Annotated[int, Field(ge=1)] | None = None
    expected_batch_size: Annotated[float, Field(gt=0)] = 1024
    micro_batch_size: Annotated[int, Field(ge=1)] | None = None
    learning_rate: ScheduleConfig = ScheduleConfig(base=0.1)
    dense_learning_rate: ScheduleConfig | None = None
    table_optimizer: Literal["sgd", "adagrad", "rowwise_adagrad", "adam"] = "sgd"
    dense_optimizer: Literal["sgd", "adagrad", "adam"] = "sgd"
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    start_from: str | None = None
    evaluate_every: Annotated[int, Field(ge=0)] = 0
    log_every: Annotated[int, Field(ge=1)] = 1
    lease_steps: Annotated[int, Field(ge=1)] = 50
    checkpoint_every: Annotated[int, Field(ge=0)] = 0
    checkpoint_mode: Literal["async", "sync"] = "async"
    look_ahead: bool = False

    @field_validator("learning_rate", "dense_learning_rate", mode="before")
    @classmethod
    def _constant(cls, value: Any) -> Any:
        return {"base": value} if isinstance(value, int | float) else value

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if self.epochs is None and self.steps is None:
            raise ValueError("epochs: is missing; give it, or steps")
        if self.epochs is not None and self.steps is not None:
            raise ValueError("epochs: is given together with steps; remove one of them (as null)")
        if self.weight_decay and self.table_optimizer != "sgd":
            raise ValueError(
                f"weight_decay: not supported with table_optimizer '{self.table_optimizer}'; "
                "use sgd, or 0"
            )
        if self.momentum and self.table_optimizer != "sgd":
            raise ValueError(
                f"momentum: not supported with table_optimizer '{self.table_optimizer}'; "
                "use sgd, or 0"
            )
        if self.learning_rate.base * self.weight_decay >= 1:
            raise ValueError("weight_decay: times the learning rate it must stay below 1")
        return self


class ClusterConfig(_Section):
    """Where it runs.

    Attributes:
        num_workers: Workers; each holds a part of every row-wise table and of the records.
        workers_per_node: Workers of a host, for ``dist-dp plan`` with ``table_row_wise`` or
            ``grid``; by default all. A run asks Ray how many there are.
        address: A running Ray cluster (``auto``, ``ray://…`` or host:port); by default one is
            started on this machine.
        placement: ``spread`` over as many nodes as there are, or ``pack`` on few.
        workers_off_head: No worker on the driver's node, where the ledger and its accountant are
            (for a submitted job, the head of the cluster).
        use_gpu: A GPU for each worker; by default if this machine has that many.
        cpus_per_worker: CPUs that Ray reserves for each worker.
        threads_per_worker: Threads of PyTorch in each worker; by default a fair share.
        min_workers: Go on with as few as so many workers after a loss, until there is room for
            ``num_workers`` again; by default wait for that room. Tables and records are shared out
            anew. With another number of workers a replayed step comes out with other rounding, so
            it is charged again.
        max_failures: How often the run goes on from its last checkpoint after workers were lost
            (-1: always). Needs ``train.checkpoint_every``; without it a loss ends the run.
        hang_timeout_s: Seconds without a step, or in wait of another worker, after which workers
            are ended and started again.
    """

    num_workers: Annotated[int, Field(ge=1)] = 1
    workers_per_node: Annotated[int, Field(ge=1)] | None = None
    address: str | None = None
    placement: Literal["pack", "spread"] = "pack"
    workers_off_head: bool = False
    use_gpu: bool | None = None
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1
    threads_per_worker: Annotated[int, Field(ge=1)] | None = None
    min_workers: Annotated[int, Field(ge=1)] | None = None
    max_failures: Annotated[int, Field(ge=-1)] = 3
    hang_timeout_s: Annotated[float, Field(gt=0)] = 1800.0

    @model_validator(mode="after")
    def _no_more_than_there_are(self) -> ClusterConfig:
        if self.min_workers is not None and self.min_workers > self.num_workers:
            raise ValueError(
                f"min_workers: {self.min_workers} is more than num_workers, {self.num_workers}"
            )
        return self


class OutputConfig(_Section):
    """Where the run's folder goes.

    Attributes:
        folder: Folder of all runs.
        name: Name of the run; by default data set and time.
        tensorboard: Also write TensorBoard events.
        live_metrics: What Ray's metrics (for Prometheus) show: ``ledger``, what the privacy ledger
            tells; ``all``, also losses and times, which are as private as the run folder; or
            ``none`` of the run (the accountant shows budgets all the same).
    """

    folder: str = "runs"
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")] | None = None
    tensorboard: bool = True
    live_metrics: Literal["none", "ledger", "all"] = "ledger"


class StreamConfig(_Section):
    """A stream of runs, one for each period; see :mod:`dist_dp.cluster.stream`.

    Attributes:
        periods: The sources of the periods (as ``data.path``), oldest first; or one pattern
            (``logs/day_*``), whose files are taken in natural order: day_2 before day_10.
    """

    periods: str | tuple[str, ...]


class RunConfig(_Section):
    """Everything about a run."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    privacy: PrivacyConfig
    noise: NoiseConfig = NoiseConfig()
    train: TrainConfig
    cluster: ClusterConfig = ClusterConfig()
    output: OutputConfig = OutputConfig()
    stream: StreamConfig | None = None

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        self._check_mechanism()
        if self.privacy.mechanism == "none" and self.noise.grid is not None:
            raise ValueError(
                "noise.grid: mechanism 'none' adds no noise to put on a grid; remove it, or choose "
                "lazydp"
            )
        most, part = self.privacy.max_records_per_user, self.train.micro_batch_size
        if most is not None and part is not None and part < most:
            raise ValueError(
                f"train.micro_batch_size: {part} is below privacy.max_records_per_user {most}; a "
                "user's records are clipped together, so they come in one part: raise it, or lower "
                "max_records_per_user"
            )
        if self.train.momentum and self.noise.grid is not None:
            raise ValueError("noise.grid: does not go with train.momentum; remove one of them")
        return self

    def _check_mechanism(self) -> None:
        """What goes with the mechanism's way of noising rows."""
        mechanism, optimizer = self.privacy.mechanism, self.train.table_optimizer
        if mechanism in SPARSE_MECHANISMS:
            if self.noise.grid is not None:
                raise ValueError(
                    f"noise.grid: does not go with mechanism '{mechanism}'; remove it, or choose "
                    "lazydp"
                )
            if self.train.look_ahead:
                raise ValueError(
                    f"train.look_ahead: mechanism '{mechanism}' has nothing to settle before a "
                    "lookup; remove it, or choose lazydp"
                )
            return
        if mechanism != "none" and optimizer != "sgd":
            raise ValueError(
                f"train.table_optimizer: mechanism '{mechanism}' cannot serve '{optimizer}', whose "
                "update is not linear in the noise; use sgd for the tables (dense layers may use "
                "any optimizer), or a mechanism with noise on few rows, after which any optimizer "
                "may follow (adafest, fest, adafest+)"
            )
        if optimizer == "adam":
            raise ValueError(
                "train.table_optimizer: 'adam' goes with adafest, fest and adafest+; without "
                "privacy use adagrad, rowwise_adagrad or sgd"
            )
        if self.train.micro_batch_size is not None and optimizer != "sgd":
            raise ValueError(
                f"train.micro_batch_size: not supported with table_optimizer '{optimizer}', "
                "which would take a step for each part of a batch; use sgd, or null"
            )

    def to_yaml(self) -> str:
        """The resolved configuration."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load_config(path: str | Path | None, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """Reads a YAML file and applies overrides.

    Args:
        path: The file; None starts from nothing.
        overrides: Values by dotted key (``privacy.epsilon``); None unsets.

    Returns:
        The validated configuration.

    Raises:
        ConfigError: Unreadable file, unknown key, wrong type, or impossible combination.
    """
    values: Any = {}
    if path is not None:
        try:
            values = read_yaml(read_whole(Path(path), MAX_CONFIG_BYTES)) or {}
        except OSError as error:
            raise ConfigError(f"cannot read the configuration '{path}': {error.strerror}") from None
        except ValueError as error:
            raise ConfigError(f"cannot read the configuration '{path}': {error}") from None
        if not isinstance(values, dict):
            raise ConfigError(f"'{path}' must hold keys and values at its top level")
    for key, value in (overrides or {}).items():
        _put(values, key, value)
    return parse_config(values, source=str(path) if path else "the command line")


def parse_config(values: Mapping[str, Any], source: str = "configuration") -> RunConfig:
    """Validates a configuration of simple types.

    Raises:
        ConfigError: Names the key and the remedy.
    """
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{source}: " + "; ".join(_explain(e) for e in error.errors())) from None
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def parse_overrides(pairs: Sequence[str]) -> dict[str, Any]:
    """``["train.steps=10", …]`` to values by dotted key; values are YAML.

    Raises:
        ConfigError: Not of the form KEY=VALUE.
    """
    result: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {pair}: write KEY=VALUE, for instance train.steps=100")
        try:
            result[key.strip()] = read_yaml(value)
        except ValueError:
            raise ConfigError(f"--set {pair}: the value is no valid YAML") from None
    return result


def _put(values: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for depth, parent in enumerate(parents):
        inner = values.get(parent)
        if depth == 0 and inner is not None and not isinstance(inner, dict):
            raise ConfigError(f"'{parent}' must hold keys and values (got {inner!r})")
        if not isinstance(inner, dict):
            inner = values[parent] = {}
        values = inner
    values[last] = value


def _known_keys(location: Sequence[Any]) -> list[str]:
    """Keys that are allowed beside an unknown one."""
    kind: Any = RunConfig
    for part in location:
        field = getattr(kind, "model_fields", {}).get(part)
        if field is None:
            return []
        kinds = [field.annotation, *get_args(field.annotation)]
        kind = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)
    return list(getattr(kind, "model_fields", {}))


def _explain(error: Any) -> str:
    location = [p for p in error["loc"] if not (isinstance(p, str) and "[" in p)]
    key = ".".join(str(p) for p in location)
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        hint = f"; known keys there: {', '.join(known)}" if known else ""
        return f"unknown key '{key}'{hint}"
    if error["type"] == "missing":
        return f"'{key}' is missing; set it"
    if error["type"] == "value_error":
        # A section's complaint begins with the key inside it, a value's own with what is wrong.
        inside = message.partition(":")[0].partition(".")[0].isidentifier()
        return f"{key}.{message}" if key and inside else f"{key}: {message}" if key else message
    given = error.get("input")
    return f"'{key}': {message[0].lower()}{message[1:]} (got {given!r})"
