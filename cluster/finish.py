"""The end of a run: evaluate, settle, release, close the account; whole even if workers die in it.

Once the ledger holds a release, no attempt may train on from before it. So what is left to do then
(the summary, the account, the secret) is written down before, and done by the next attempt if this
one dies.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_dp.checkpoint_folder import half_written
from dist_dp.cluster.run_folder import keep_release, replace, write_summary
from dist_dp.distributed import barrier, broadcast_object, rank
from dist_dp.errors import CheckpointError
from dist_dp.fence import take_away
from dist_dp.limits import read_json
from dist_dp.release import publish_recorded
from dist_dp.release_files import partial_folder

if TYPE_CHECKING:
    from dist_dp.cluster.job import Job
    from dist_dp.cluster.worker import Run

RELEASE = "release"


def private_folder(run_folder: Path) -> Path:
    """What of a run is as secret as its records: checkpoints, the trail, what is under way."""
    return run_folder / "private"


def checkpoint_folder(run_folder: Path) -> Path:
    """Where a run keeps its private checkpoints."""
    return private_folder(run_folder) / "checkpoint"


def trail_file(run_folder: Path) -> Path:
    """Where a run notes what its steps looked like; see :mod:`dist_dp.trail`."""
    return private_folder(run_folder) / "trail"


def attempts_folder(run_folder: Path) -> Path:
    """Where a run numbers its attempts; see :mod:`dist_dp.fence`."""
    return private_folder(run_folder) / "attempts"


def _pending_file(run_folder: Path) -> Path:
    return private_folder(run_folder) / "ending.json"


def _read_pending(run_folder: Path) -> dict[str, Any]:
    ending = read_json(_pending_file(run_folder))
    if not isinstance(ending, dict) or not {"summary", "step", "close_as"} <= ending.keys():
        raise ValueError("it is not how a run ends")
    return ending


def finish(run: Run) -> None:
    """Ends a run; every rank calls it."""
    from dist_dp.cluster.summary import make_summary

    failure = _finish_checkpoints(run)
    run.push({"phase": "evaluating"})
    split = "test" if len(run.evaluable("test")) else "valid"
    metrics = run.evaluate(split) if run.evaluable(split) else {}
    run.push({"phase": "settling and releasing"})
    summary = make_summary(run, metrics, split if metrics else None)
    if failure is not None:
        summary["checkpoint_failure"] = failure
    keep = run.status == "interrupted" and bool(run.config.train.checkpoint_every)
    if keep:
        # Settled first, and saved before the release can be seen: the run goes on from exactly
        # the rows that are released.
        run.engine.parts.settle()
        run.save_checkpoint()
    if run.checkpoints is not None:
        run.checkpoints.close()
    facts = summary.pop("card_facts")
    summary["release"] = RELEASE
    if rank() == 0:
        if run.engine.fence is not None:
            run.engine.fence.check()
        keep_release(run.folder)
        private_folder(run.folder).mkdir(mode=0o700, exist_ok=True)
        ending = {
            "summary": summary,
            "step": run.engine.parts.mechanism.schedule.step,
            "close_as": None if keep else run.status,
        }
        replace(_pending_file(run.folder), json.dumps(ending))
    barrier()
    run.engine.release(
        run.folder / RELEASE,
        model_info={
            "model": run.config.model.model_dump(mode="json"),
            # Whoever scores records with the model need not say whose they are.
            "columns": {**run.job.columns, "user": None},
        },
        facts=facts,
        progress=run.report_release,
    )
    if rank() == 0:
        _conclude(run.folder, run.job.run_name, run.engine.accountant)
    barrier()


def finished_before(job: Job, accountant: Any) -> bool:
    """Whether an earlier attempt has released the model: what it left undone is done then.

    Every rank calls it, before anything else. What an earlier attempt has half-written is taken
    from it, since it may be alive (:mod:`dist_dp.fence`).

    Args:
        job: The run.
        accountant: Rank 0's.
    """
    folder = Path(job.run_folder)

    def look() -> bool:
        take_away(half_written(checkpoint_folder(folder)))
        known = accountant.knows_run(job.run_name)
        if not known or not publish_recorded(folder / RELEASE, accountant, job.run_name):
            take_away([partial_folder(folder / RELEASE)])
        try:
            ending = _read_pending(folder)
        except (OSError, ValueError):
            return False
        if not known:
            return False
        if accountant.released_step(job.run_name) != ending["step"]:
            return False
        if not (folder / RELEASE).is_dir():
            return False
        _conclude(folder, job.run_name, accountant)
        return True

    return bool(broadcast_object(look() if rank() == 0 else None))


def _conclude(folder: Path, run_name: str, accountant: Any) -> None:
    """Rank 0, once the release can be seen. May be done again from the start."""
    ending = _read_pending(folder)
    write_summary(folder, ending["summary"])
    if ending["close_as"] is None:
        _pending_file(folder).unlink()
        return
    if accountant.run_status(run_name) == "open":
        accountant.close_run(run_name, ending["close_as"])
    # The secret is of no more use, and dangerous to keep.
    shutil.rmtree(private_folder(folder), ignore_errors=True)


def _finish_checkpoints(run: Run) -> str | None:
    """Waits for the one in flight; says why it failed, since a finished model needs it not."""
    try:
        if run.checkpoints is not None:
            run.checkpoints.wait()
    except CheckpointError as error:
        run.push({"phase": f"going on without the last checkpoint: {error}"})
        return str(error)
    return None
