"""The periods of a stream: which, in which order, and that no two have records in common."""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_dp.cluster.config import RunConfig, parse_config
from dist_dp.datasets.manifest import MANIFEST_NAME, identify_file, load_manifest
from dist_dp.errors import ConfigError, DataError

_PLACE = "{period}"
# What MovieLens keeps beside its ratings.
_NO_RECORDS = frozenset(
    ("README", "movies.dat", "users.dat", "u.genre", "u.info", "u.item", "u.occupation", "u.user")
)


@dataclass(frozen=True)
class Period:
    """One period of a stream.

    Attributes:
        name: Short name, from the source's: part of the run's and the data set's.
        path: Its source, absolute.
    """

    name: str
    path: str


def find_periods(given: str | Sequence[str]) -> list[Period]:
    """The periods that a configuration names, oldest first.

    Args:
        given: Sources in order of time, or one pattern whose files are put into natural order.

    Raises:
        ConfigError: There is none, one does not exist, or two have one name or one source.
    """
    if isinstance(given, str):
        paths = sorted(glob.glob(given), key=natural_order)
        if not paths:
            raise ConfigError(
                f"stream.periods: nothing is at '{given}'; give sources in order of time, or a "
                "pattern for them"
            )
    else:
        paths = list(given)
    if not paths:
        raise ConfigError("stream.periods: is empty; give the sources in order of time")
    periods: list[Period] = []
    for path in paths:
        if not Path(path).exists():
            raise ConfigError(f"stream.periods: '{path}' does not exist; give a file or folder")
        period = Period(_name_of(path), str(Path(path).resolve()))
        for other in periods:
            if other.path == period.path:
                raise ConfigError(
                    f"stream.periods: '{path}' is there twice; its records would be trained on "
                    "twice for one charge: take one out"
                )
            if other.name == period.name:
                raise ConfigError(
                    f"stream.periods: '{other.path}' and '{path}' would both be called "
                    f"'{period.name}'; rename one, for instance by its day"
                )
        periods.append(period)
    return periods


def natural_order(text: str) -> list[tuple[int, int, str]]:
    """A key that sorts numbers by value: day_2 before day_10."""
    parts = re.split(r"(\d+)", text)
    return [(0, int(p), p) if p.isdecimal() else (1, 0, p) for p in parts if p]


def _name_of(path: str) -> str:
    """``day_3`` for ``day_3.tsv.gz``, letters, digits, dots, dashes and underscores."""
    name = Path(path).resolve().name
    while (suffix := Path(name).suffix)[1:].isalpha():
        name = name.removesuffix(suffix)
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "period"


def contents_of(period: Period) -> list[str]:
    """What the files of a period hold, whatever they are called: a hash of size and samples each.

    Of a converted store the fingerprint of its records stands for all of it.

    Raises:
        DataError: They cannot be read.
    """
    path = Path(period.path)
    if (path / MANIFEST_NAME).is_file():
        return [f"records:{load_manifest(path).fingerprint}"]
    # Files that a reader passes over (hidden ones, sums, notes) may be alike from day to day.
    files = [path] if path.is_file() else [p for p in path.rglob("*") if _holds_records(p)]
    try:
        found = [identify_file(file) for file in sorted(files)]
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); check the path") from None
    return [f"{file.size}:{file.sampled_sha256}" for file in found if file.size]


def _holds_records(path: Path) -> bool:
    hidden = path.name.startswith((".", "_")) or path.name in _NO_RECORDS
    return path.is_file() and not hidden and path.suffix.lower() not in (".md", ".json", ".crc")


def check_disjoint(periods: Sequence[Period], contents: Sequence[Sequence[str]]) -> None:
    """Refuses periods of which two have a file of the same content.

    Raises:
        ConfigError: It names both.
    """
    owner: dict[str, Period] = {}
    for period, files in zip(periods, contents, strict=True):
        for content in set(files):
            other = owner.setdefault(content, period)
            if other is not period:
                raise ConfigError(
                    f"stream.periods: '{other.path}' and '{period.path}' hold the same records; "
                    "they would be trained on twice for one charge: take one out"
                )


def config_of(
    config: RunConfig, stream: str, dataset: str, period: Period, folder: Path, **privacy: Any
) -> RunConfig:
    """The configuration of a period's run, but for what it starts from.

    Args:
        config: The stream's.
        stream: Its name.
        dataset: Name of the data set that the run is charged to.
        period: The period.
        folder: The stream's folder.
        **privacy: Settings of the section that are other than the stream's.

    Raises:
        ConfigError: One store is to hold all periods.
    """
    values = config.model_dump(mode="json")
    values["stream"] = None
    store = values["data"]["store"]
    if store is not None:
        if _PLACE not in store:
            raise ConfigError(
                f"data.store: '{store}' cannot hold every period; write {_PLACE} into it, or leave "
                "it out"
            )
        store = store.replace(_PLACE, period.name)
    values["data"] |= {"path": period.path, "name": dataset, "store": store}
    values["output"] |= {"folder": str(folder), "name": run_name(stream, period)}
    sparse = values["privacy"]["sparse"]
    if sparse is not None and sparse["frequencies"] is not None:
        sparse["frequencies"] = sparse["frequencies"].replace(_PLACE, period.name)
    values["privacy"] |= privacy
    return parse_config(values, source=f"period '{period.name}'")


def run_name(stream: str, period: Period) -> str:
    """Name of a period's run: with the stream's, since a ledger knows a run by its name alone."""
    return f"{stream}-{period.name}"
