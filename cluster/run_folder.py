"""The folder of a run: private but for ``release/``."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

from dist_dp.durable import for_the_owner
from dist_dp.errors import ConfigError, DataError
from dist_dp.file_names import safe_name
from dist_dp.limits import read_json

MARK = "config.yaml"


def check_run_name_is_free(runs: Path, name: str | None) -> None:
    """Says so early, before data is converted and workers are started.

    Raises:
        ConfigError: The run folder exists already.
    """
    if name is not None and (runs / name).exists():
        raise _taken(runs / name)


def _taken(folder: Path) -> ConfigError:
    return ConfigError(f"the run folder '{folder}' exists; choose another --name, or remove it")


def create_run_folder(runs: Path, name: str | None, dataset: str) -> Path:
    """Makes the folder of a new run, readable by its owner alone.

    Raises:
        ConfigError: It exists already, or cannot be made.
    """
    # The data set's name is free text for the ledger: "../x" must not become a path.
    name = name or f"{safe_name(dataset)}-{datetime.now():%Y%m%d-%H%M%S}"
    folder = runs / name
    try:
        runs.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700)
    except FileExistsError:
        raise _taken(folder) from None
    except OSError as error:
        raise ConfigError(f"cannot make the run folder '{folder}': {error.strerror}") from None
    return folder.resolve()


def release_of(path: str | Path) -> Path:
    """The release folder that a run folder or a release folder stands for.

    Raises:
        DataError: There is nothing at the path, or the run has no release.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"'{path}' does not exist; give a run folder or a released model")
    if (path / "release.json").exists() or (path / "checkpoint.json").exists():
        return path
    if (path / "release").is_dir():
        return path / "release"
    if (path / MARK).exists():
        raise DataError(
            f"the run '{path}' has no released model: it did not finish. Run it again; its "
            "charge stays in the ledger."
        )
    # Let the release loader say what is wrong with the folder.
    return path


def read_summary(folder: Path) -> dict[str, Any]:
    """The summary of a run.

    Raises:
        DataError: There is none.
    """
    path = folder / "summary.json"
    try:
        summary: dict[str, Any] = read_json(path)
    except (OSError, ValueError) as error:
        raise DataError(f"'{path}' cannot be read: {error}") from None
    return summary


def keep_release(folder: Path) -> None:
    """Moves the release of an interrupted run aside, just before the run writes another."""
    from dist_dp.release_manifest import read_manifest

    release = folder / "release"
    if not release.is_dir():
        return
    manifest = read_manifest(release)
    kept = folder / f"release-step-{manifest['settled_to_step']:06d}"
    if kept.exists():
        raise DataError(f"'{kept}' is in the way of keeping the release before; move it")
    release.rename(kept)


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    """Replaces the summary of a run, whole or not at all."""
    replace(folder / "summary.json", json.dumps(summary, indent=2))


def write_config(folder: Path, config: str) -> None:
    """Replaces the configuration that marks a run's folder, whole or not at all."""
    replace(folder / MARK, config)


def replace(path: Path, text: str) -> None:
    """Writes a file for its owner alone (mode 0600), whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    # Left by a process that died: its rights may be others.
    partial.unlink(missing_ok=True)
    with open(partial, "x", encoding="utf-8", opener=for_the_owner) as file:
        file.write(text)
    partial.rename(path)
