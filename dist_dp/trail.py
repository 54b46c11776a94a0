"""What each step of a run looked like, in a few bytes: a replay can be told from a new draw.

After a crash a run goes on from its last checkpoint and takes again the steps since. If they come
out as they did before, bit for bit, they are the same draws and nothing new; if not, they are a
second result of the same records and must be charged again.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import struct
from pathlib import Path

import torch
from torch import Tensor

from dist_dp.durable import sync_folder
from dist_dp.errors import CheckpointError
from dist_dp.limits import MAX_TRAIL_BYTES, read_whole

_RECORD = struct.Struct("<I12s")
_NUMBERS = 4096
_WRITER = 0  # in place of a step: who wrote what follows
_OWED, _PAID = 0xFFFFFFFF, 0xFFFFFFFE  # likewise: steps to be charged again, and that they were
_STRETCH = struct.Struct("<II4x")
_BOOT = Path("/proc/sys/kernel/random/boot_id")


def digest_of(noised_sums: Tensor) -> bytes:
    """Twelve bytes that change, all but surely, if anything in the step or before it differs.

    A step's dense gradients depend on every record of its batch and, through them, on every row
    that they read; so a few thousand of them tell whether the step went another way, to the last
    bit. Rows that were updated otherwise and never read since are not seen.

    Args:
        noised_sums: float32 ``[P]``, the step's clipped sums of dense gradients with their noise,
            the same on every rank.

    Returns:
        12 bytes; empty where there are no dense parameters, which says nothing.
    """
    if noised_sums.numel() == 0:
        return b""
    some = noised_sums.detach()[:: max(1, noised_sums.numel() // _NUMBERS)]
    data = some.to("cpu", torch.float32).contiguous().numpy().tobytes()
    return hashlib.blake2b(data, digest_size=12).digest()


class StepTrail:
    """The digests of a run's steps, in order, in a file that outlives the process.

    Steps are noted by plain writes, which survive the death of the process, not of the machine.
    So the trail says which machine wrote it, since when it has been up, and ``is_whole`` whether
    that is this one: otherwise more steps may have been taken than it knows.

    One that is opened is replaced by a copy of it: whoever had it open before writes into a file
    without a name, so an attempt that was given up (`dist_dp.fence`) adds nothing.

    Args:
        path: The file; made if missing (mode 0600). A record cut short is left out.

    Raises:
        CheckpointError: It cannot be written, or is far too large.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            content = read_whole(path, MAX_TRAIL_BYTES) if path.exists() else b""
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"'{path}' is no trail of a run ({error}): remove it (the steps since the last "
                "checkpoint are charged again)"
            ) from None
        self._digests: dict[int, bytes] = {}
        self.owed: tuple[int, int] | None = None
        self.is_whole = True
        writer = b""
        whole = len(content) // _RECORD.size
        for number in range(whole):
            step, digest = _RECORD.unpack_from(content, number * _RECORD.size)
            if step == _WRITER:
                writer = digest
            elif step == _OWED:
                self.owed = _STRETCH.unpack(digest)
            elif step == _PAID:
                self.owed = None
            else:
                self._set(step, digest)
        content = content[: whole * _RECORD.size]
        if writer != _this_boot():
            self.is_whole = whole == 0
            content += _RECORD.pack(_WRITER, _this_boot())
        self._size = 0
        aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
        self._file = os.open(aside, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            self._append(content)
            os.fsync(self._file)
            aside.rename(path)
        except BaseException:
            self.close()
            aside.unlink(missing_ok=True)
            raise
        # A trail without the name of its writer would be taken for one of a run without steps.
        sync_folder(path.parent)

    def last_step_after(self, done: int) -> int:
        """The last step up to which every step after ``done`` is known; ``done`` if none is."""
        step = done
        while step + 1 in self._digests:
            step += 1
        return step

    def agrees(self, step: int, digest: bytes) -> bool:
        """Whether a step came out as it is known; False if it is not known."""
        return digest != b"" and self._digests.get(step) == digest

    def note(self, step: int, digest: bytes) -> None:
        """Writes down how a step came out; what is known of later steps is forgotten."""
        if digest == b"" or self.agrees(step, digest):
            return
        self._set(step, digest)
        self._write(step, digest)

    def note_owed(self, first: int, last: int) -> None:
        """Writes down that steps ``first .. last`` came out otherwise and are to be charged again.

        Before it is done: whoever goes on after a crash in between finds it in ``owed``.
        """
        self.owed = (first, last)
        self._write(_OWED, _STRETCH.pack(first, last))

    def note_paid(self) -> None:
        """Writes down that nothing is owed any more."""
        self.owed = None
        self._write(_PAID, bytes(_STRETCH.size))

    def _write(self, step: int, digest: bytes) -> None:
        self._append(_RECORD.pack(step, digest))

    def _append(self, content: bytes) -> None:
        try:
            # Once more from where a full disk cut it off, and then with the reason.
            written = 0
            while written < len(content):
                written += os.pwrite(self._file, content[written:], self._size + written)
        except OSError as error:
            raise CheckpointError(
                f"cannot write the trail '{self.path}' ({error.strerror}): free some space, then "
                "go on with --resume"
            ) from error
        self._size += written

    def _set(self, step: int, digest: bytes) -> None:
        if step in self._digests:
            # Written a second time: the run went another way from here.
            self._digests = {s: d for s, d in self._digests.items() if s < step}
        self._digests[step] = digest

    def close(self) -> None:
        """Closes the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _this_boot() -> bytes:
    """12 bytes that are others on every machine, and after each start of it."""
    try:
        name = _BOOT.read_bytes()
    except OSError:
        name = secrets.token_bytes(16)  # unknown: never the same
    return hashlib.blake2b(name, digest_size=12).digest()
