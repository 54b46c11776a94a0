"""The witness: an older copy of a ledger is whole in itself, and refused all the same."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import shutil
import stat
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest

from dist_dp.errors import LedgerError
from dist_dp.ledger import Ledger, LocalAccountant
from dist_dp.ledger_entry import LedgerDamageError, Position
from dist_dp.ledger_witness import Witness
from tests.dist_dp.ledgers import filled

ID = "0" * 32


def files(path: Path) -> list[Path]:
    return [path, Path(f"{path}-wal"), Path(f"{path}-shm"), Path(f"{path}.witness")]


def save(path: Path, folder: Path) -> None:
    folder.mkdir()
    for file in files(path):
        if file.exists():
            shutil.copy(file, folder)


def restore(path: Path, folder: Path, *, witness: bool = False) -> None:
    for file in files(path):
        if file.suffix != ".witness" or witness:
            file.unlink(missing_ok=True)
            if (folder / file.name).exists():
                shutil.copy(folder / file.name, file)


# --- the file ---------------------------------------------------------------------------------


def at(seq: int, name: str = ID) -> Position:
    return Position(name, seq, f"{seq:064x}")


def test_the_witness_never_goes_back(tmp_path: Path) -> None:
    witness = Witness(tmp_path / "new" / "w")
    assert witness.read() is None
    witness.begin(at(0))
    assert stat.S_IMODE(witness.path.stat().st_mode) == 0o600
    witness.begin(at(9))  # there is one
    assert witness.read() == at(0)
    for seq, left in ((3, 3), (2, 3), (4, 4), (4, 4), (100, 100), (1, 100)):
        witness.advance(at(seq))
        assert witness.read() == at(left)
    witness.replace(at(1))
    assert witness.read() == at(1)
    assert os.listdir(witness.path.parent) == ["w"]


@pytest.mark.parametrize("cut", [0, 1, 100, 511])
def test_a_slot_cut_short_leaves_the_other(tmp_path: Path, cut: int) -> None:
    """As by a process or a machine that died while it wrote: slots are written in turn."""
    witness = Witness(tmp_path / "w")
    witness.begin(at(0))
    for seq in range(1, 6):
        before = witness.path.read_bytes()
        witness.advance(at(seq))
        after = witness.path.read_bytes()
        changed = [n for n in (0, 1) if before[512 * n :][:512] != after[512 * n :][:512]]
        assert len(changed) == 1
        start = 512 * changed[0]
        torn = after[start : start + cut] + b"\0" * (512 - cut)
        witness.path.write_bytes(after[:start] + torn + after[start + 512 :])
        assert witness.read() == at(seq - 1)
        witness.path.write_bytes(after)
    witness.path.write_bytes(b"\0" * 1024)
    for call in (witness.read, lambda: witness.advance(at(7))):
        with pytest.raises(LedgerDamageError, match=r"witness .* is damaged.*--adopt"):
            call()


def _advance(path: Path, first: int) -> None:
    for seq in range(first, 300, 4):
        Witness(path).advance(at(seq))


def test_writers_at_once_leave_the_latest(tmp_path: Path) -> None:
    witness = Witness(tmp_path / "w")
    witness.begin(at(0))
    context = multiprocessing.get_context("forkserver")
    writers = [context.Process(target=_advance, args=(witness.path, n)) for n in range(4)]
    for writer in writers:
        writer.start()
    last = 0
    while any(writer.is_alive() for writer in writers):
        seen = witness.read()
        assert seen is not None and seen.seq >= last, "it went back, or was unreadable"
        last = seen.seq
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert witness.read() == at(299)


def test_a_writer_waits_for_the_one_before(tmp_path: Path) -> None:
    """Else both would write the same slot, and the later position could be lost."""
    witness = Witness(tmp_path / "w")
    witness.begin(at(0))
    with witness.path.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        writer = threading.Thread(target=witness.advance, args=(at(1),))
        writer.start()
        writer.join(0.1)
        assert writer.is_alive() and witness.read() == at(0)
    writer.join()
    assert witness.read() == at(1)


# --- ledgers ----------------------------------------------------------------------------------


def test_a_restored_older_copy_is_refused(tmp_path: Path) -> None:
    ledger = filled(tmp_path / "ledger.db")
    save(ledger.path, tmp_path / "with-log")
    ledger.close()
    save(ledger.path, tmp_path / "closed")
    ledger.reserve("a", 60, 10)
    ledger.close()
    save(ledger.path, tmp_path / "newest")
    for older in ("with-log", "closed"):
        restore(ledger.path, tmp_path / older)
        with pytest.raises(LedgerDamageError, match="ends at entry 8, and entry 9 was seen") as e:
            Ledger(ledger.path)
        assert "restore the newest back-up" in str(e.value) and "--adopt" in str(e.value)
    restore(ledger.path, tmp_path / "newest")
    assert Ledger(ledger.path).run_steps("a") == 57


def test_a_rolled_back_ledger_that_grew_again_is_refused(tmp_path: Path) -> None:
    """Longer than before, but not through the entry that was seen."""
    ledger = filled(tmp_path / "ledger.db")
    ledger.close()
    save(ledger.path, tmp_path / "older")
    ledger.reserve("a", 60, 10)
    ledger.close()
    kept = ledger._store.witness.path.read_bytes()
    restore(ledger.path, tmp_path / "older", witness=True)
    other = Ledger(ledger.path)
    for step in range(3):
        other.reserve("a", 70 + step, 1)
    other.close()
    ledger._store.witness.path.write_bytes(kept)
    with pytest.raises(LedgerDamageError, match="its entry 9 is another one"):
        Ledger(ledger.path)


def test_whoever_has_it_open_notices_a_roll_back_too(tmp_path: Path) -> None:
    ledger = filled(tmp_path / "ledger.db")
    ledger.close()
    save(ledger.path, tmp_path / "older")
    ledger.reserve("a", 60, 10)
    ledger.close()
    # The same file with an older content, and the witness of then.
    for name in (ledger.path.name, f"{ledger.path.name}.witness"):
        (tmp_path / name).write_bytes((tmp_path / "older" / name).read_bytes())
    with pytest.raises(LedgerError, match="lost entries"):
        ledger.reserve("a", 70, 10)


def test_a_copy_put_in_its_place_while_in_use_is_refused(tmp_path: Path) -> None:
    ledger = filled(tmp_path / "ledger.db")
    ledger.close()
    save(ledger.path, tmp_path / "older")
    ledger.reserve("a", 60, 10)
    os.replace(tmp_path / "older" / ledger.path.name, ledger.path)
    for call in (lambda: ledger.run_steps("a"), lambda: ledger.reserve("a", 70, 10)):
        with pytest.raises(LedgerError, match="replaced while in use"):
            call()


def test_a_copy_written_over_it_while_in_use_loses_nothing(tmp_path: Path) -> None:
    """What is in the write-ahead log still counts then: all of it, or nobody is served."""
    ledger = filled(tmp_path / "ledger.db")
    ledger.close()
    save(ledger.path, tmp_path / "older")
    ledger.reserve("a", 60, 10)
    ledger.path.write_bytes((tmp_path / "older" / ledger.path.name).read_bytes())
    for charged in (57, 58, 59):
        try:
            assert ledger.run_steps("a") == charged
            assert Ledger(ledger.path).run_steps("a") == charged
            ledger.reserve("a", 70, 1)
        except LedgerError as error:
            assert "back-up" in str(error)


def test_a_ledger_without_its_witness_is_refused(tmp_path: Path) -> None:
    ledger = filled(tmp_path / "ledger.db")
    witness = ledger._store.witness.path
    witness.unlink()
    for call in (lambda: ledger.reserve("a", 60, 1), lambda: Ledger(ledger.path)):
        with pytest.raises(LedgerDamageError, match=r"witness .* is missing.*--adopt"):
            call()
    # A new one has nothing to lose, and gets its witness when it is opened.
    new = Ledger(tmp_path / "new.db")
    new._store.witness.path.unlink()
    assert Ledger(new.path).position().seq == 0
    assert new._store.witness.path.exists()


def test_a_ledger_moves_with_its_witness(tmp_path: Path) -> None:
    ledger = filled(tmp_path / "ledger.db")
    ledger.close()
    there = tmp_path / "there"
    there.mkdir()
    for file in files(ledger.path):
        if file.exists():
            file.rename(there / file.name)
    assert Ledger(there / "ledger.db").run_steps("a") == 47


def test_a_deleted_ledger_does_not_come_back_empty(tmp_path: Path) -> None:
    ledger = filled(tmp_path / "ledger.db")
    ledger.close()
    ledger.path.unlink()
    with pytest.raises(LedgerError, match=r"is gone, and .*witness says that it held 8 entries"):
        Ledger(ledger.path)
    assert not ledger.path.exists()


def test_the_witness_of_another_ledger_vouches_for_nothing(tmp_path: Path) -> None:
    ledger, other = filled(tmp_path / "ledger.db"), filled(tmp_path / "other.db", 2)
    shutil.copy(other._store.witness.path, ledger._store.witness.path)
    with pytest.raises(LedgerDamageError, match="another one than its witness"):
        Ledger(ledger.path)


def test_a_process_that_died_before_it_wrote_the_witness_does_no_harm(tmp_path: Path) -> None:
    ledger = filled(tmp_path / "ledger.db")
    kept = ledger._store.witness.path.read_bytes()
    ledger.reserve("a", 60, 10)
    ledger._store.witness.path.write_bytes(kept)
    again = Ledger(ledger.path)
    assert again.run_steps("a") == 57
    again.reserve("a", 70, 1)
    assert again._store.witness.read() == again.position() == ledger.position()


def test_a_ledger_is_adopted_for_a_reason(tmp_path: Path) -> None:
    ledger = filled(tmp_path / "ledger.db")
    ledger.close()
    save(ledger.path, tmp_path / "older")
    ledger.reserve("a", 60, 10)
    ledger.close()
    seen = ledger.position().to_json()
    ledger.close()
    restore(ledger.path, tmp_path / "older")
    with pytest.raises(LedgerError, match="for a reason"):
        Ledger(ledger.path, adopt=" ")
    adopted = Ledger(ledger.path, adopt="the disk was lost")
    last = adopted.history()[-1]
    assert (last.kind, last.dataset, last.seq) == ("ledger_adopted", "", 9)
    assert last.details == {"reason": "the disk was lost", "witness": seen}
    again = Ledger(ledger.path)
    assert again.run_steps("a") == 47 and again.reserve("a", 60, 5).steps == 5
    assert all(entry.dataset == "clicks" for entry in again.history("clicks"))
    # Damage is not adopted.
    for opened in (adopted, again):
        opened.close()
    content = bytearray(ledger.path.read_bytes())
    place = content.index(b'"reason":"the disk')
    content[place + 11] ^= 1
    ledger.path.write_bytes(content)
    with pytest.raises(LedgerDamageError, match="entry 9"):
        Ledger(ledger.path, adopt="anyway")
    with pytest.raises(LedgerError, match="no ledger at"):
        Ledger(tmp_path / "none.db", adopt="nothing there")


def test_a_position_noted_elsewhere_is_checked(tmp_path: Path) -> None:
    """What a checkpoint holds sees a roll-back even where the witness was rolled back too."""
    ledger = filled(tmp_path / "ledger.db")
    ledger.close()
    save(ledger.path, tmp_path / "older")
    accountant = LocalAccountant(ledger)
    early = accountant.position()
    ledger.reserve("a", 60, 10)
    late = ledger.position()
    assert late == Position.from_json(late.to_json()) and late.seq == early.seq + 1
    for position in (early, late, Position.beginning(late.ledger_id)):
        accountant.check_contains(position)
    ledger.close()
    restore(ledger.path, tmp_path / "older", witness=True)
    old = Ledger(ledger.path)
    old.check_contains(early)
    with pytest.raises(LedgerDamageError, match="entry 9 was seen"):
        old.check_contains(late)
    old.reserve("a", 200, 3)
    with pytest.raises(LedgerDamageError, match="entry 9 is another one"):
        old.check_contains(late)
    with pytest.raises(LedgerDamageError, match="another one than"):
        old.check_contains(Position(ID, 3, early.hash))
    for wrong in ({}, {**late.to_json(), "seq": -1}, {**late.to_json(), "hash": None}):
        with pytest.raises(LedgerError, match="no position"):
            Position.from_json(wrong)


def test_a_witness_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    ledger = filled(tmp_path / "ledger.db")
    ledger._store.witness.path.unlink()
    ledger._store.witness.path.mkdir()
    with pytest.raises(LedgerError, match=r"witness .* cannot be used"):
        ledger.reserve("a", 60, 1)


def _as_nobody(path: Path, pipe: Any) -> None:
    os.setgid(65534)
    os.setuid(65534)
    for call in (lambda: Ledger(path), lambda: Ledger(path.with_name("new.db"))):
        try:
            call()
            pipe.send("done")
        except LedgerError as error:
            pipe.send(str(error))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
def test_a_ledger_that_may_not_be_written_is_said() -> None:
    """Without a line of it changed, and without another one begun."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        ledger = filled(folder / "ledger.db")
        ledger.close()
        for file in folder.iterdir():
            os.chown(file, 65534, 65534)
            file.chmod(0o400)
        folder.chmod(0o555)
        context = multiprocessing.get_context("forkserver")
        ours, theirs = context.Pipe()
        child = context.Process(target=_as_nobody, args=(ledger.path, theirs))
        child.start()
        said = [ours.recv(), ours.recv()]
        child.join()
        assert "make the file and its folder writable" in said[0]
        assert "choose a place on a local disk where you may write" in said[1]
        assert {file.name for file in folder.iterdir()} == {"ledger.db", "ledger.db.witness"}
