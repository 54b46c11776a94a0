"""The only way a model leaves the system: every row settled, then written, then renamed whole.

A release is a folder::

    release.json          what it is, by whom it may be loaded, size and sha256 of every file
    MODEL_CARD.md         the privacy statement
    dense.safetensors     everything outside the tables
    tables/TABLE/*.arrow    columns ``row`` (int64) and ``embedding`` (fixed-size list of float)

:mod:`dist_dp.release_tables` streams the tables, :mod:`dist_dp.release_files` makes the folder
appear; here is the order of the steps, and what the release says about itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from dist_dp import release_files as files
from dist_dp.distributed import all_gather_objects, all_together, rank
from dist_dp.errors import ReleaseError
from dist_dp.limits import parse_json
from dist_dp.model_card import model_card
from dist_dp.origins import origins_statement
from dist_dp.release_files import FileFacts
from dist_dp.release_progress import Report
from dist_dp.release_tables import write_tables

if TYPE_CHECKING:
    from dist_dp.engine import PrivacyEngine
    from dist_dp.events import PrivacyEvent
    from dist_dp.private_model import PrivateModel

FORMAT = "dist-dp-release"
FORMAT_VERSION = 2


def write_release(
    engine: PrivacyEngine,
    destination: Path,
    *,
    model_info: dict[str, Any] | None = None,
    facts: dict[str, Any] | None = None,
    progress: Report | None = None,
) -> Path:
    """Settles and writes a model; every rank calls it, with no other work on the model meanwhile.

    Memory beyond the model is O(chunk): see :mod:`dist_dp.release_tables`.

    Args:
        engine: The engine that trained the model.
        destination: Folder to create, on storage that all ranks share.
        model_info: How to build the model again (for ``dist-dp evaluate``), of simple types.
        facts: More for the model card, of simple types.
        progress: Called on every rank with the bytes of table values it has written and will have
            written; at the end they are equal.

    Returns:
        The folder.

    Raises:
        ReleaseError: The folder exists, the mechanism is not the plan's, the last step failed, or
            writing did (a full disk); nothing is left of it.

    Guarantee:
        Every row of every shard is settled to the last finished step before its first byte is
        written, and buffers that moved with the private data are refused, so the folder holds
        only what the noise covers. A folder under the final name is always whole, and in the ledger
        before it can be loaded: a process that dies before leaves a partial folder that does not
        load, is for its owner alone, and is removed by the next release of that name. What is in
        it is not counted as released: do not publish it.
    """
    from safetensors.torch import save

    parts = engine.parts
    all_together(
        lambda: files.begin(destination) if rank() == 0 else None,
        ReleaseError,
        "prepare the release",
    )
    partial = files.partial_folder(destination)
    written: dict[str, FileFacts] = {}
    recorded = False
    try:
        all_together(parts.state.check_nothing_failed, ReleaseError, "check the last step")
        all_together(parts.check_mechanism, ReleaseError, "check the mechanism")
        all_together(parts.check_fixed_unchanged, ReleaseError, "check the model")
        all_together(
            lambda: written.update(write_tables(parts, partial, progress)),
            ReleaseError,
            "write the tables of the release",
        )
        for of_a_rank in all_gather_objects(written):
            written.update(of_a_rank)

        def finish() -> None:
            nonlocal recorded
            if rank() == 0:
                privacy = _privacy(engine)
                card = model_card(privacy, destination.name, facts or {})
                contents = {
                    "dense.safetensors": save(_dense_state(parts)),
                    "MODEL_CARD.md": card.encode(),
                }
                for path, content in contents.items():
                    written[path] = files.write_file(partial / path, content)
                manifest = _manifest(parts, privacy, written, model_info)
                files.make_ready(destination, json.dumps(manifest, indent=2).encode())
                # Before the release can be seen, so that no resumed run draws other noise for it.
                recorded = True
                if engine.accountant is not None:
                    engine.accountant.record_release(engine.run_id, parts.mechanism.schedule.step)
                files.publish(destination)

        all_together(finish, ReleaseError, "finish the release")
    except BaseException:
        # Not by a rank that lost rank 0: the ledger may hold the release, which
        # `publish_recorded` then looks for. What stays is removed by the next release.
        if rank() == 0 and not recorded:
            files.discard(destination)
        raise
    return destination


def publish_recorded(destination: Path, accountant: Any, run_id: str) -> bool:
    """Makes a release appear that is in the ledger but whose process died just then.

    The ledger holds a release before it can be seen, and a run does not go on from before a
    release that the ledger holds, so such a release must not stay out of reach.

    Args:
        destination: Where it was to be.
        accountant: Of the run's ledger.
        run_id: The run's name there.

    Returns:
        Whether there was one.
    """
    content = None if destination.exists() else files.ready_manifest(destination)
    try:
        privacy = parse_json(content or "{}").get("privacy", {})
    except ValueError:  # cut off in the middle, so the ledger does not hold it
        return False
    if privacy.get("run_id") != run_id or accountant.released_step(run_id) != privacy["steps"]:
        return False
    files.publish(destination)
    return True


def dense_tensors(parts: PrivateModel) -> dict[str, Tensor]:
    """Everything outside the tables that a release holds, by name; live."""
    prefixes = tuple(f"{cut.path}." for cut in parts.cuts)
    named = [*parts.model.named_parameters(), *parts.model.named_buffers()]
    passing = {
        f"{path}.{name}" if path else name
        for path, module in parts.model.named_modules()
        for name in module._non_persistent_buffers_set
    }
    return {n: t.detach() for n, t in named if not n.startswith(prefixes) and n not in passing}


def _dense_state(parts: PrivateModel) -> dict[str, Tensor]:
    return {n: t.cpu().contiguous().clone() for n, t in dense_tensors(parts).items()}


def _privacy(engine: PrivacyEngine) -> dict[str, Any]:
    """What a release says about its privacy."""
    plan = engine.parts.plan
    charged = engine.charged_events()
    return {
        "private": plan.is_private and not engine.secret_is_given,
        "fixed_secret": engine.secret_is_given,
        "epsilon": plan.epsilon(charged) if plan.is_private else None,
        "delta": plan.delta if plan.is_private else None,
        "steps": engine.parts.mechanism.schedule.step,
        "steps_charged": engine.steps_charged(),
        "noise_multiplier_range": list(plan.noise_multiplier_range()),
        "plan": plan.model_dump(),
        "statement": privacy_statement(engine, charged),
        "not_covered": list(plan.not_covered()),
        "dataset": engine.dataset,
        "run_id": engine.run_id,
        "started_from": engine.started_from,
    }


def _manifest(
    parts: PrivateModel,
    privacy: dict[str, Any],
    written: Mapping[str, FileFacts],
    model_info: dict[str, Any] | None,
) -> dict[str, Any]:
    """The content of ``release.json``."""
    configs = {
        cut.table_id(c.name): {
            "rows": c.num_embeddings,
            "dim": c.embedding_dim,
            "collection": cut.path,
            "name": c.name,
            "pooled": cut.pooled,
        }
        for cut in parts.cuts
        for c in cut.configs
    }
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "settled_to_step": privacy["steps"],
        "tables": configs,
        "model": model_info,
        "privacy": privacy,
        "files": {path: asdict(written[path]) for path in sorted(written)},
    }


def privacy_statement(engine: PrivacyEngine, charged: Mapping[PrivacyEvent, int] | None) -> str:
    """The plan's statement for the steps charged, or what takes its place with a given secret.

    With what the release that the run was started from adds.
    """
    return _own_statement(engine, charged) + origins_statement(engine.started_from, engine.dataset)


def _own_statement(engine: PrivacyEngine, charged: Mapping[PrivacyEvent, int] | None) -> str:
    if engine.secret_is_given and engine.parts.plan.is_private:
        return (
            "This model is not private: its noise came from a fixed secret, which is for tests. "
            + engine.parts.plan.statement(charged).replace(
                "This model is", "With a secret of its own it would be", 1
            )
        )
    return engine.parts.plan.statement(charged)
