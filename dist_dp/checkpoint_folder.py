"""Folders of training checkpoints: a checkpoint is whole or it is not there.

::

    HOME/                       of a run (mode 0700)
        save-000007/            the newest checkpoint: always whole
            checkpoint.json     what it is; marked private, sealed with the secret
            secret              the run's key (mode 0600)
            index.json, *.bin   see dist_dp.checkpoint_storage
        .save-000008-TOKEN.partial/   one that is being written, or was when the process died

A checkpoint appears by one rename, after everything in it is on the disk; only then is the one
before removed. So at every moment the highest number is a whole checkpoint, and a process may die
between any two operations.

The seal is a keyed digest of the description. The description holds the digest of the index, and
the index the checksums of all chunks, so none of them, nor the secret, can change unnoticed.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_dp import kernels
from dist_dp.checkpoint_storage import INDEX_FILE, write_private
from dist_dp.durable import sync_folder
from dist_dp.errors import CheckpointError
from dist_dp.fence import GIVEN_UP
from dist_dp.limits import MAX_INDEX_BYTES, read_json, read_whole

FORMAT = "dist-dp-checkpoint"
FORMAT_VERSION = 3
INFO_FILE = "checkpoint.json"
SECRET_FILE = "secret"

_KEYS = ("numbers", "settled", "settings", "run_id", "plan", "index_sha256", "fixed_secret")
REMEDY = "put a copy of the checkpoint back, or start a new run"

_WHOLE = re.compile(r"save-(\d{6,})")
_PARTIAL = re.compile(r"\.(save-\d{6,})(-[0-9a-f]+)?\.partial")


def find_checkpoint(folder: Path) -> Path:
    """The newest checkpoint of a run.

    Args:
        folder: The home of a run's checkpoints, or one of them.

    Raises:
        CheckpointError: There is none.
    """
    if (folder / INFO_FILE).exists():
        return folder
    numbered = _numbered(folder)
    if not numbered:
        raise CheckpointError(
            f"'{folder}' holds no checkpoint; a run saves them with train.checkpoint_every"
        )
    return folder / f"save-{max(numbered):06d}"


def has_checkpoint(home: Path) -> bool:
    """Whether a run can go on from a checkpoint in its home."""
    return bool(_numbered(home))


def read_checkpoint_info(folder: Path) -> dict[str, Any]:
    """The description of a checkpoint, or of the newest one in a home.

    Raises:
        CheckpointError: There is none, or it is of another version, or damaged.
    """
    folder = find_checkpoint(folder)
    path = folder / INFO_FILE
    try:
        info = read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"'{path}' cannot be read: {error}; {REMEDY}") from None
    if not isinstance(info, dict) or info.get("format") != FORMAT:
        raise CheckpointError(f"'{path}' does not describe a checkpoint of this package")
    if info.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"'{path}' has format version {info.get('format_version')}, this package reads "
            f"{FORMAT_VERSION}; go on with the package version that wrote it"
        )
    if missing := [key for key in _KEYS if key not in info]:
        raise CheckpointError(f"'{path}' is damaged: it lacks '{missing[0]}'")
    seal = str(info.get("seal")).encode()
    if not hmac.compare_digest(seal, _seal(info, _secret_in(folder)).encode()):
        raise CheckpointError(
            f"'{path}' or '{SECRET_FILE}' beside it is damaged: one of them was changed since they "
            f"were written; {REMEDY}"
        )
    return info


def check_index(folder: Path, info: Mapping[str, Any]) -> None:
    """Checks the index, and through it every chunk, against the description.

    Raises:
        CheckpointError: It is damaged.
    """
    path = folder / INDEX_FILE
    try:
        index = read_whole(path, MAX_INDEX_BYTES)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"'{path}' cannot be read: {error}; {REMEDY}") from None
    if hashlib.sha256(index).hexdigest() != info["index_sha256"]:
        raise CheckpointError(f"'{path}' is damaged: it was changed since it was written; {REMEDY}")


def read_secret(folder: Path) -> bytes:
    """The secret of the run that a checkpoint belongs to.

    Raises:
        CheckpointError: It cannot be read.
    """
    return _secret_in(find_checkpoint(folder))


def _secret_in(folder: Path) -> bytes:
    """The secret in a checkpoint, whole or partial."""
    try:
        secret = read_whole(folder / SECRET_FILE, most=4096)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"cannot read the secret in '{folder}': {why}") from None
    if len(secret) != 32:
        raise CheckpointError(f"the secret in '{folder}' is damaged")
    return secret


def _seal(info: Mapping[str, Any], secret: bytes) -> str:
    """Keyed digest (hex) of a description without its seal, whatever the order of its entries."""
    content = json.dumps({k: v for k, v in info.items() if k != "seal"}, sort_keys=True)
    key = kernels.derive_key(secret, "checkpoint", "description")
    return hmac.new(key, content.encode(), hashlib.sha256).hexdigest()


def half_written(home: Path) -> list[Path]:
    """Folders of checkpoints that are being written, or were when their process died."""
    if not home.is_dir():
        return []
    return [
        path
        for path in home.iterdir()
        if _PARTIAL.fullmatch(path.name) or path.name.startswith(GIVEN_UP)
    ]


def begin(home: Path, secret: bytes) -> Path:
    """Makes the folder of the next checkpoint, to be filled; rank 0 calls it.

    Its name is taken once, so that nobody can publish what another attempt writes.

    Args:
        home: The run's home of checkpoints; made if missing.
        secret: The run's secret.

    Returns:
        The partial folder.

    Raises:
        OSError: It cannot be written (a full disk); nothing is left of it.
    """
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    number = max(_numbered(home), default=0) + 1
    partial = home / f".save-{number:06d}-{secrets.token_hex(8)}.partial"
    partial.mkdir(mode=0o700)
    try:
        write_private(partial / SECRET_FILE, secret)
    except BaseException:
        # A part of the secret must not stay behind a save that failed.
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return partial


def publish(partial: Path, info: Mapping[str, Any]) -> Path:
    """Makes a checkpoint visible, all at once, then removes the older ones; rank 0 calls it.

    Args:
        partial: The folder, with everything but its description, on the disk.
        info: The description: simple types.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: Its secret cannot be read back.
    """
    index = (partial / INDEX_FILE).read_bytes()
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "note": "PRIVATE: not settled, holds the run's secret. Never publish or serve it.",
        **info,
        "index_sha256": hashlib.sha256(index).hexdigest(),
    }
    # What is sealed is what will be read: JSON has no tuples, and no keys but strings.
    described = json.loads(json.dumps(content))
    described["seal"] = _seal(described, _secret_in(partial))
    write_private(partial / INFO_FILE, json.dumps(described, indent=1).encode())
    sync_folder(partial)
    home = partial.parent
    named = _PARTIAL.fullmatch(partial.name)
    assert named is not None
    whole = home / named[1]
    partial.rename(whole)
    sync_folder(home)
    own = int(whole.name.removeprefix("save-"))
    for number in _numbered(home):
        # Never a later one: it is of an attempt that has taken the place of this.
        if number < own:
            shutil.rmtree(home / f"save-{number:06d}", ignore_errors=True)
    return whole


def _numbered(home: Path) -> list[int]:
    """Numbers of the checkpoints in a home."""
    if not home.is_dir():
        return []
    found = (_WHOLE.fullmatch(path.name) for path in home.iterdir())
    return [int(match[1]) for match in found if match]
