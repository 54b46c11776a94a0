"""What a benchmark measures: the model, the batch, the mechanisms, and how often."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from dist_dp.errors import ConfigError

MECHANISMS = ("none", "lazydp", "dpsgd", "dpsgd-torch", "eana", "fest", "adafest", "adafest+")
"""What can be measured; ``none`` is plain TorchRec and always measured, as the floor."""

DEFAULT_MECHANISMS = MECHANISMS[:5]
"""What is measured where nothing is said: every row's noise, in its several forms."""

SKEWS: dict[str, float] = {"uniform": 0.0, "low": 0.6, "medium": 0.9, "high": 1.2}
"""Exponent s of the rows' popularity by name: the r-th most read row is read ∝ r^-s."""

SHARDINGS = ("table_wise", "row_wise", "column_wise", "table_row_wise", "grid")

LEASE_STEPS = 50
"""Steps that a run charges to the ledger at a time (``train.lease_steps``)."""


@dataclass(frozen=True)
class StepSettings:
    """Settings of ``dist-dp bench step``, of simple types; they go to the JSON file as they are.

    Attributes:
        mechanisms: Names from :data:`MECHANISMS`; ``none`` comes first.
        rows: Rows of each table.
        dim: Columns of every table.
        dense_features: Width of the dense input.
        bottom: Output sizes of the bottom MLP's layers; the last is ``dim``.
        top: Output sizes of the top MLP's layers; the last is 1.
        batch: Expected examples of a step over all workers.
        pooling: Ids in each bag.
        skew: Name from :data:`SKEWS`.
        records: Records that batches are drawn from.
        workers: Processes.
        sharding: Kind for every table, or None for the default; see :attr:`kind`.
        rounds: Turns of every mechanism.
        steps: Timed steps of a turn.
        warmup: Untimed steps at the start of a turn.
        at_step: Steps that the run is taken to have behind it: the history table then holds
            steps drawn uniformly from that range.
        slow_seconds: A mechanism whose step takes longer gets one step a turn, no warm-up, and
            at most ``slow_rounds`` turns (two if its step takes over five times as long).
        slow_rounds: Turns of a slow mechanism.
        release: Time the settling of all rows that a release begins with.
        release_every: Steps over which the release's cost is spread.
        preset: Name of the preset that the settings began from.
        look_ahead: ``lazydp`` settles the next batch's rows beside the backward of this one.
        false_positives: Rows a step that ``adafest`` noises although no example touches them.
        kept_rows: Rows of a table that ``fest`` trains, its most popular ones.
    """

    mechanisms: tuple[str, ...] = DEFAULT_MECHANISMS
    rows: tuple[int, ...] = (900_000,) * 26
    dim: int = 128
    dense_features: int = 13
    bottom: tuple[int, ...] = (512, 256, 128)
    top: tuple[int, ...] = (1024, 1024, 512, 256, 1)
    batch: int = 2048
    pooling: int = 1
    skew: str = "uniform"
    records: int = 1_000_000
    workers: int = 1
    sharding: str | None = None
    rounds: int = 5
    steps: int = 10
    warmup: int = 2
    at_step: int = 10_000
    slow_seconds: float = 3.0
    slow_rounds: int = 3
    release: bool = True
    release_every: int = 10_000
    preset: str = ""
    look_ahead: bool = False
    false_positives: float = 1000.0
    kept_rows: int = 10_000

    def __post_init__(self) -> None:
        """Puts ``none`` first and refuses what cannot be measured.

        Raises:
            ConfigError: A value is unknown or out of range; the message names the option.
        """
        names = tuple(dict.fromkeys(("none", *self.mechanisms)))
        object.__setattr__(self, "mechanisms", names)
        _choose("--mechanisms", names, MECHANISMS)
        _choose("--skew", (self.skew,), tuple(SKEWS))
        _choose("--sharding", (self.kind,), SHARDINGS)
        counts = ("dim", "batch", "pooling", "records", "workers", "rounds", "steps", "slow_rounds")
        for name in (*counts, "release_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')}: give 1 or more")
        if not self.rows or min(self.rows) < 1:
            raise ConfigError("--tables and --rows: give one table of one row, or more")
        if self.warmup < 0 or self.at_step < 0:
            raise ConfigError("--warmup and --at-step: give 0 or more")
        if self.batch > self.records:
            raise ConfigError(
                f"--batch {self.batch} of --records {self.records}: more than all records cannot "
                "be drawn; give more records"
            )

    @property
    def kind(self) -> str:
        """Sharding kind of every table: as given, or table_wise on one worker, row_wise on more."""
        return self.sharding or ("table_wise" if self.workers == 1 else "row_wise")

    @property
    def table_bytes(self) -> int:
        """Bytes of all tables' weights."""
        return 4 * self.dim * sum(self.rows)

    @property
    def sample_rate(self) -> float:
        """Probability with which a step draws each record."""
        return self.batch / self.records

    def changed(self, **options: Any) -> StepSettings:
        """These settings with some options replaced; those that are None stay."""
        given = {name: value for name, value in options.items() if value is not None}
        return replace(self, **given)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; equal tables are written as one number and a count."""
        result = asdict(self)
        result["mechanisms"] = list(self.mechanisms)
        result["sharding"] = self.kind
        result["tables"] = len(self.rows)
        same = len(set(self.rows)) == 1
        result["rows"] = self.rows[0] if same else list(self.rows)
        result["table_bytes"] = self.table_bytes
        result["lease_steps"] = LEASE_STEPS
        result["skew_exponent"] = SKEWS[self.skew]
        return result


def _choose(option: str, given: tuple[str, ...], known: tuple[str, ...]) -> None:
    for name in given:
        if name not in known:
            raise ConfigError(f"{option}: '{name}' is unknown; choose from {', '.join(known)}")
