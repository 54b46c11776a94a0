"""A run's secret is in its private checkpoint alone, and the run's folder is its owner's alone."""

from __future__ import annotations

import base64
import contextlib
import logging
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from dist_dp import kernels
from dist_dp.checkpoint import find_checkpoint, read_secret
from dist_dp.cluster.config import parse_config
from dist_dp.cluster.finish import checkpoint_folder
from dist_dp.cluster.trainer import Trainer
from dist_dp.errors import CheckpointError
from tests.cluster.ray_memory import holding
from tests.cluster.small import small

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@dataclass
class Watched:
    """A run under a umask of 0 on both sides, and what was seen of it on the way.

    Attributes:
        home: Where everything of it lies.
        folder: The run folder.
        secrets: What was read from its checkpoints.
        modes: Rights of the run folder, and of what was in ``private``, by name.
        output: What it printed and logged.
    """

    home: Path
    folder: Path
    secrets: set[bytes] = field(default_factory=set)
    modes: dict[str, set[int]] = field(default_factory=dict)
    output: str = ""

    def look(self) -> None:
        """Notes rights, and the secret if there is a checkpoint by now."""
        if not self.folder.exists():
            return
        below = [self.folder, *self.folder.glob("private"), *self.folder.glob("private/**/*")]
        for path in below:
            try:
                mode = path.stat().st_mode
            except FileNotFoundError:
                continue  # Checkpoints come and go.
            kind = "folder" if stat.S_ISDIR(mode) else path.name
            self.modes.setdefault(kind, set()).add(stat.S_IMODE(mode))
        with contextlib.suppress(CheckpointError, OSError):
            self.secrets.add(read_secret(find_checkpoint(checkpoint_folder(self.folder))))


@pytest.fixture(scope="module")
def watched(
    tmp_path_factory: pytest.TempPathFactory, clicks: Path, ray_local: None
) -> Iterator[Watched]:
    home = tmp_path_factory.mktemp("watched")
    values = small(
        home,
        clicks,
        model={"name": "custom", "factory": "tests.cluster.factories:unmasked"},
        train={"steps": 12, "checkpoint_every": 2, "checkpoint_mode": "sync"},
        output={"name": "secretive"},
    )
    seen = Watched(home, home / "runs" / "secretive")

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.output += self.format(record) + "\n"

    handler, root = Kept(), logging.getLogger()
    level, mask = root.level, os.umask(0)
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    try:

        def watch(progress: dict[str, Any]) -> None:
            seen.output += f"{progress}\n"
            seen.look()

        summary = Trainer(parse_config(values), watch=watch).fit()
        seen.output += repr(summary)
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
        os.umask(mask)
    yield seen


def forms(secret: bytes) -> tuple[bytes, ...]:
    """How the secret, or a key from it, may be written."""
    keys = [secret, kernels.derive_key(secret, "dense", "parameters")]
    return tuple(
        form
        for key in keys
        for form in (key, key.hex().encode(), base64.b64encode(key), repr(key).encode())
    )


def test_the_secret_is_in_no_file_and_no_output(watched: Watched) -> None:
    (secret,) = watched.secrets
    assert not (watched.folder / "private").exists()
    files = [path for path in watched.home.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"summary.json", "report.html", "metrics.csv", "config.yaml", "release.json"} <= names
    for path in files:
        content = path.read_bytes()
        assert not any(form in content for form in forms(secret)), path
    assert len(watched.output) > 100
    assert not any(form in watched.output.encode() for form in forms(secret))


def test_ray_holds_no_secret(watched: Watched) -> None:
    import ray

    (secret,) = watched.secrets
    for form in forms(secret):
        assert holding(form) == []
    # And it would be seen: an object's content is in the store, an actor's argument at the head.
    mark = os.urandom(32)
    kept = ray.put(mark * 100_000)
    assert "object store" in holding(mark)
    del kept

    class Holder:
        def __init__(self, value: bytes) -> None:
            self.value = value

        def ready(self) -> bool:
            return True

    mark = os.urandom(32)
    holder = ray.remote(Holder).options(num_cpus=0).remote(mark)
    assert ray.get(holder.ready.remote())
    assert "memory of gcs_server" in holding(mark)
    ray.kill(holder)


def test_what_is_private_is_its_owner_s_alone(watched: Watched) -> None:
    assert watched.modes.pop("folder") == {0o700}
    assert {"secret", "checkpoint.json", "index.json", "trail"} <= watched.modes.keys()
    assert set().union(*watched.modes.values()) == {0o600}
    for name in ("summary.json", "config.yaml"):
        assert stat.S_IMODE((watched.folder / name).stat().st_mode) == 0o600
    assert stat.S_IMODE(watched.folder.stat().st_mode) == 0o700
