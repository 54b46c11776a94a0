"""From a configuration to a store, a schema and a plan: what happens before any worker starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_dp.cluster.config import RunConfig
from dist_dp.cluster.job import VERIFY_BELOW_BYTES, make_plan
from dist_dp.datasets.convert import convert
from dist_dp.datasets.schema import DataSchema
from dist_dp.datasets.store import ArrowStore
from dist_dp.errors import ConfigError, DataError
from dist_dp.plan import PrivacyPlan
from dist_dp.user_records import users_of


@dataclass(frozen=True)
class Prepared:
    """What a run starts from.

    Attributes:
        store: The converted data.
        schema: Features with this run's table sizes.
        dataset: Name in the ledger.
        plan: The calibrated privacy plan.
        records_per_unit: Mean number of records that take part in a step for each unit drawn.
    """

    store: ArrowStore
    schema: DataSchema
    dataset: str
    plan: PrivacyPlan
    records_per_unit: float = 1.0


def prepare(config: RunConfig, *, progress: bool = True) -> Prepared:
    """Converts the data if need be, and plans.

    Args:
        config: The configuration; ``data.path`` must be set.
        progress: Show progress bars.

    Raises:
        ConfigError: Something does not fit together.
        DataError: The data cannot be used.
    """
    store, schema = open_data(config, progress=progress)
    records = len(store.split("train")) if "train" in store.split_names() else 0
    if records == 0:
        raise DataError(
            f"{store.path}: the train split is empty; give more data, or another data.split"
        )
    _check_sharding(config, schema)
    dataset = config.data.name or _stem(config)
    if config.privacy.unit == "record":
        return Prepared(store, schema, dataset, make_plan(config, records, schema.table_rows()))
    if store.schema.user is None:
        raise ConfigError(
            f"privacy.unit 'user' needs to know whose a record is, but {store.path} was converted "
            "without users: name their column (data.user; in MovieLens it is user_id)"
        )
    users = users_of(store.split("train"))
    most = config.privacy.max_records_per_user
    assert most is not None
    plan = make_plan(config, users.num_users, schema.table_rows())
    return Prepared(store, schema, dataset, plan, users.mean_records(most))


def open_data(config: RunConfig, *, progress: bool = True) -> tuple[ArrowStore, DataSchema]:
    """Opens ``data.path``, converting it once, with the table sizes of the configuration."""
    data = config.data
    if data.path is None:
        raise ConfigError("data.path is missing: give --data FILE, or set it in the configuration")
    source = Path(data.path)
    sizes: dict[str, Any] = {
        "overrides": data.num_embeddings,
        "maximum": data.max_num_embeddings,
    }
    if (source / "manifest.json").is_file():
        schema = ArrowStore.open(source).schema.with_num_embeddings(**sizes)
        if data.user is not None:
            schema = schema.with_user(data.user)
        return _verified(source, schema), schema
    destination = Path(data.store) if data.store else _default_store(config, source)
    # Others may read the folder of the runs, but not the records.
    destination.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    options: dict[str, Any] = {
        "format": data.format,
        "schema": data.columns,
        "user": data.user,
        "split": {name: share for name, share in data.split.items() if share > 0},
        "split_seed": data.split_seed,
        "skip_bad_rows": data.skip_bad_rows,
        "progress": progress,
    }
    try:
        manifest = convert(source, destination, **options)
    except DataError:
        # A store of our own choosing that no longer fits (the source changed) is made anew.
        if data.store is not None or not destination.exists():
            raise
        manifest = convert(source, destination, overwrite=True, **options)
    schema = manifest.data_schema.with_num_embeddings(**sizes)
    return _verified(destination, schema), schema


def _verified(path: Path, schema: DataSchema) -> ArrowStore:
    """Opens a store; one that is small enough to read whole is compared with its checksums."""
    store = ArrowStore.open(path, schema=schema)
    if store.num_bytes < VERIFY_BELOW_BYTES:
        store = ArrowStore.open(path, verify=True, schema=schema)
    return store


def _check_sharding(config: RunConfig, schema: DataSchema) -> None:
    """Table names of our own models are known before any worker starts; a factory's are not."""
    sharding = config.model.sharding
    if isinstance(sharding, str) or config.model.name == "custom":
        return
    known = schema.table_rows()
    unknown = sorted(set(sharding) - set(known))
    if unknown:
        raise ConfigError(
            f"model.sharding: no table '{unknown[0]}'; the tables are {', '.join(known)}"
        )


def _stem(config: RunConfig) -> str:
    assert config.data.path is not None
    return Path(config.data.path).resolve().name.split(".")[0] or "data"


def _default_store(config: RunConfig, source: Path) -> Path:
    """One folder for each way of reading one source, so that none is in another's way."""
    import hashlib
    import json

    how = config.data.model_dump(
        mode="json", include={"format", "columns", "split", "split_seed", "skip_bad_rows"}
    )
    # A schema that names no user is written as it was before schemas could: its store stays.
    if how["columns"] is not None and how["columns"]["user"] is None:
        del how["columns"]["user"]
    if config.data.user is not None:
        how["user"] = config.data.user
    text = json.dumps([str(source.resolve()), how], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:10]
    return Path(config.output.folder) / ".data" / f"{_stem(config)}-{digest}"
