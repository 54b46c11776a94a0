"""``stream.json``: what a stream has done, so that it goes on and repeats nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dist_dp.cluster.config import RunConfig
from dist_dp.cluster.run_folder import replace
from dist_dp.cluster.stream_budget import Share
from dist_dp.cluster.stream_periods import Period
from dist_dp.cluster.worker import settings_to_keep
from dist_dp.errors import ConfigError, DataError
from dist_dp.limits import read_json

STATE_FILE = "stream.json"
_FORMAT = 1


class StreamState:
    """What is known of a stream's periods, on disk after every change.

    Guarantee:
        A stream goes on with the settings, the periods and the records that it began with, or not
        at all: no period is left out, put in before one that is trained, or trained again. New
        periods may follow the last one, but where all share one budget, which was divided among
        the periods that were planned.

    Args:
        folder: The stream's folder.
        config: The configuration that it is now called with.
        name: The stream's name.

    Attributes:
        periods: By period, in order: ``name``, ``path``, ``contents``, and what was reached.
        share: How periods share one budget, once that is known.
        guarantee: That of what is released so far.
    """

    def __init__(self, folder: Path, config: RunConfig, name: str) -> None:
        self.path = folder / STATE_FILE
        self._settings = _settings(config)
        self._name = name
        self.periods: list[dict[str, Any]] = []
        self.share: Share | None = None
        self.guarantee: str | None = None
        self.began = self.path.exists()
        if self.began:
            self._read()

    def _read(self) -> None:
        try:
            content = read_json(self.path)
            if content["format"] != _FORMAT:
                raise ValueError(f"its format is {content['format']!r}, not {_FORMAT}")
            saved, self.periods = dict(content["settings"]), list(content["periods"])
            share = content["share"]
            if share is not None:
                self.share = Share(**{**share, "units": tuple(share["units"])})
            for entry in self.periods:
                entry["name"], entry["contents"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"'{self.path}' cannot be read ({error}); restore it, or begin another stream "
                "(output.name)"
            ) from None
        for section, values in self._settings.items():
            for key in sorted(values.keys() | saved.get(section, {}).keys()):
                if values.get(key) != saved.get(section, {}).get(key):
                    raise ConfigError(
                        f"{section}.{key}: a stream goes on with the settings that it began with, "
                        f"and '{self.path}' says {saved.get(section, {}).get(key)!r}; use those, "
                        "or begin another stream (output.name)"
                    )

    def take(self, periods: Sequence[Period], contents: Sequence[Sequence[str]]) -> None:
        """Notes the periods, or compares them with those that the stream began with.

        Raises:
            ConfigError: They do not continue them.
        """
        names = [period.name for period in periods]
        known = [entry["name"] for entry in self.periods]
        if names[: len(known)] != known:
            place = next(i for i, old in enumerate(known) if i >= len(names) or names[i] != old)
            now = f"'{names[place]}'" if place < len(names) else "nothing"
            raise ConfigError(
                f"stream.periods: the stream in '{self.path.parent}' has '{known[place]}' as "
                f"period {place + 1}, and now {now} is there; periods may only be added after the "
                "last: give them as they were, or begin another stream (output.name)"
            )
        if self.share is not None and len(names) > len(known):
            raise ConfigError(
                f"stream.periods: '{names[len(known)]}' is new, but the budget was divided among "
                f"the {len(known)} periods that were planned; take it out, or begin another "
                "stream (output.name)"
            )
        for number, (period, content) in enumerate(zip(periods, contents, strict=True)):
            if number >= len(known):
                self.periods.append({"name": period.name, "contents": list(content)})
            entry = self.periods[number]
            if entry["contents"] != list(content):
                raise ConfigError(
                    f"stream.periods: '{period.path}' holds other records than when the stream "
                    "began; put the file back, or begin another stream (output.name)"
                )
            entry["path"] = period.path

    def write(self) -> None:
        """Puts it on disk, for the owner alone, whole or not at all."""
        share = None if self.share is None else dict(vars(self.share))
        content = {
            "format": _FORMAT,
            "stream": self._name,
            "settings": self._settings,
            "share": share,
            "guarantee": self.guarantee,
            "metrics": "computed on records of people without noise; no guarantee covers them",
            "periods": self.periods,
        }
        replace(self.path, json.dumps(content, indent=2))


def _settings(config: RunConfig) -> dict[str, Any]:
    """All that bears on the model and the guarantee, by section; the periods are apart."""
    kept = settings_to_keep(config.model_dump(mode="json"))
    kept["data"].pop("path")
    return kept
