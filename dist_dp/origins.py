"""The releases that a model was started from, and what that means for its guarantee."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dist_dp.errors import ReleaseError
from dist_dp.figures import round_up
from dist_dp.limits import MAX_JSON_BYTES, read_whole
from dist_dp.release_files import MANIFEST

_Name = Annotated[str, Field(min_length=1, max_length=400, pattern=r"^[^\x00-\x1f\x7f]+$")]


class Origin(BaseModel):
    """A release that a run was started from, or one that this was started from in its turn.

    Attributes:
        run_id: Its run.
        dataset: Name of its data set in the ledger.
        unit: Its unit of privacy, ``record`` or ``user``.
        private: Whether it has a guarantee.
        epsilon: Its ε, for its own data set alone.
        delta: Its δ.
        release_sha256: Of its ``release.json``, which holds the sha256 of every other file.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    run_id: _Name
    dataset: _Name
    unit: Annotated[str, Field(pattern="^(record|user)$")]
    private: bool
    epsilon: Annotated[float, Field(ge=0)] | None
    delta: Annotated[float, Field(gt=0, lt=1)] | None
    release_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


def origins_of(folder: Path, privacy: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a run depends on that starts from a release: the oldest first, the release last.

    Args:
        folder: The release.
        privacy: The ``privacy`` part of its manifest.

    Returns:
        Each as an :class:`Origin` in simple types.

    Raises:
        ReleaseError: The manifest does not say whose records the release depends on.
    """
    content = read_whole(folder / MANIFEST, MAX_JSON_BYTES)
    try:
        own = Origin(
            run_id=privacy["run_id"],
            dataset=privacy["dataset"],
            unit=privacy["plan"]["unit"],
            private=privacy["private"],
            epsilon=privacy["epsilon"],
            delta=privacy["delta"],
            release_sha256=hashlib.sha256(content).hexdigest(),
        )
        before = [Origin.model_validate(item) for item in privacy.get("started_from", [])]
    except (KeyError, TypeError, AttributeError, ValidationError) as error:
        raise ReleaseError(
            f"'{folder / MANIFEST}' does not say which records the release depends on "
            f"({' '.join(str(error).split())[:200]}); start from another release, or export the "
            "run again"
        ) from None
    return [item.model_dump() for item in (*before, own)]


def origins_statement(origins: Sequence[Mapping[str, Any]], dataset: str) -> str:
    """What a statement adds for a model that was started from a release; empty for others.

    Args:
        origins: What :func:`origins_of` gave.
        dataset: Name of the model's own data set.
    """
    if not origins:
        return ""
    last = origins[-1]
    listed = "; ".join(
        f"'{item['dataset']}', trained on by run '{item['run_id']}', {_guarantee(item)}"
        for item in origins
    )
    text = (
        f" The model was started from the release of run '{last['run_id']}' (its release.json has "
        f"sha256 {last['release_sha256']}), so what is said above holds for the records of "
        f"'{dataset}' in this run alone, and the model depends on earlier records too: {listed}. "
        "To the records of a data set that this run did not read it did nothing but "
        "post-processing, so for them holds what is named there. Whoever has "
        "records in several of these data sets has the composition of their guarantees, at most "
        "the sum of their ε and of their δ."
    )
    if any(item["dataset"] == dataset for item in origins):
        text += (
            f" Runs on one data set compose: what all runs on '{dataset}' cost together is what "
            "the ledger says that it has spent."
        )
    return text


def _guarantee(item: Mapping[str, Any]) -> str:
    if not item["private"] or item["epsilon"] is None:
        return "without a guarantee"
    delta = "" if item["delta"] is None else f" and δ = {item['delta']:g}"
    return f"ε = {round_up(item['epsilon'])}{delta} for each {item['unit']}"
