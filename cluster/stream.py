"""Training over periods in order of time: one run a period, each from the release before."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_dp.checkpoint_folder import has_checkpoint
from dist_dp.cluster.config import RunConfig
from dist_dp.cluster.finish import checkpoint_folder
from dist_dp.cluster.kept_rows import rows_changed
from dist_dp.cluster.prepare import open_data
from dist_dp.cluster.run_folder import MARK, read_summary
from dist_dp.cluster.run_lock import driving
from dist_dp.cluster.stream_budget import composes, share_budget
from dist_dp.cluster.stream_periods import (
    Period,
    check_disjoint,
    config_of,
    contents_of,
    find_periods,
    run_name,
)
from dist_dp.cluster.stream_state import StreamState
from dist_dp.errors import ConfigError
from dist_dp.figures import round_up
from dist_dp.file_names import safe_name

Fit = Callable[[RunConfig | Path, Mapping[str, Any]], tuple[dict[str, Any], Path]]
"""Trains a run, or goes on with the one in a folder with changed settings; summary and folder."""
Say = Callable[[str], None]


class Stream:
    """Trains and evaluates period by period.

    Guarantee:
        With ``privacy.unit: record`` each record lies in exactly one period, and each period is a
        data set of its own in the ledger (``NAME/PERIOD``) with the whole budget. Removing or
        adding a record changes the training records of one run alone, and what follows
        post-processes that run's release. So everything released by the stream is (ε, δ)-DP with
        the largest ε and δ of any period. What is assumed: that no record is in two periods. Files
        and stores of the same content are refused; a record that is repeated on two days counts as
        two records, and so does a person who comes back.

        With ``privacy.unit: user`` a user may be in every period, so all are charged to one data
        set and compose. Their noise is calibrated before the first, so that all steps of all
        periods together stay within (ε, δ) by the ledger's own accounting.

        Each step is charged before it is taken, as in any run: what holds for one holds here.

    Args:
        config: The configuration, with its section ``stream``.
        fit: Trains one run.
        say: Told what comes next, a line each.
        verbose: Let libraries log.

    Raises:
        ConfigError: The periods cannot be used, or settings do not fit a stream.
    """

    def __init__(
        self, config: RunConfig, fit: Fit, *, say: Say = lambda _: None, verbose: bool = False
    ) -> None:
        if config.stream is None:
            raise ConfigError(
                "stream.periods is missing: give the periods in order of time (--period FILE …)"
            )
        if config.data.path is not None:
            raise ConfigError("data.path: a stream reads stream.periods; remove it (as null)")
        self.config, self._fit, self._say, self._verbose = config, fit, say, verbose
        self.name = config.output.name or safe_name(config.data.name or "stream")
        self.dataset = config.data.name or self.name
        self.folder = Path(config.output.folder) / self.name
        self.periods = find_periods(config.stream.periods)

    def run(self) -> list[dict[str, Any]]:
        """Trains what is not trained yet; each period's result, as in ``stream.json``.

        A period that was finished is not trained again, one that was interrupted goes on from its
        checkpoint. A first Ctrl-C ends the stream after the step in flight, as it does a run.

        Raises:
            DistDpError: A period could not be trained; what is done before stays.
        """
        contents = [contents_of(period) for period in self.periods]
        check_disjoint(self.periods, contents)
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with driving(self.folder):
            state = StreamState(self.folder, self.config, self.name)
            state.take(self.periods, contents)
            self._say("periods: " + ", ".join(period.name for period in self.periods))
            if composes(self.config) and state.share is None:
                state.share = self._share()
            state.write()
            for number in range(len(self.periods)):
                if not self._one(state, number):
                    break
        return state.periods

    def _one(self, state: StreamState, number: int) -> bool:
        """Trains and evaluates one period; whether the stream goes on."""
        period, entry = self.periods[number], state.periods[number]
        folder = self.folder / run_name(self.name, period)
        config = self._config(state, number)
        stopped = False
        if not is_finished(folder):
            self._say(f"period {period.name} ({number + 1} of {len(self.periods)})")
            if has_checkpoint(checkpoint_folder(folder)):
                changes = {"cluster": config.cluster.model_dump(mode="json")}
                done, _ = self._fit(folder, changes)
            else:
                _check_not_begun(folder, period, entry)
                self._check_new_records(state, number, config)
                done, _ = self._fit(config, {})
            stopped = done["status"] == "interrupted"
        summary = read_summary(folder)
        entry.update(
            run=folder.name,
            dataset=summary["dataset"],
            status=summary["status"],
            records=summary["num_records"],
            users=summary["num_users"],
            private=summary["private"],
            unit=summary["unit_of_privacy"],
            epsilon=summary["epsilon"],
            delta=summary["delta"],
            dataset_spent_epsilon=summary.get("dataset_spent_epsilon"),
            started_from=[item["release_sha256"] for item in summary["started_from"]][-1:],
            origins=[item["dataset"] for item in summary["started_from"]],
        )
        if "kept_rows" not in entry:
            before = self._folder_of(number - 1) if number else None
            count, changed = rows_changed(before, folder)
            entry["kept_rows"] = {"rows": count, "changed": changed} if count else None
        state.guarantee = guarantee_of(state.periods)
        state.write()
        if stopped:
            self._say(f"stopped in period {period.name}; the same command goes on")
            return False
        if "next" not in entry and number + 1 < len(self.periods):
            entry["next"] = self._evaluate(state, number)
            state.write()
        return True

    def _config(self, state: StreamState, number: int) -> RunConfig:
        """The run of a period."""
        period = self.periods[number]
        shared = state.share
        config = config_of(
            self.config,
            self.name,
            self.dataset if composes(self.config) else f"{self.dataset}/{period.name}",
            period,
            self.folder,
            **({} if shared is None else shared.privacy(self.config)),
        )
        start = str(self._folder_of(number - 1)) if number else config.train.start_from
        train = config.train.model_copy(update={"start_from": start})
        return config.model_copy(update={"train": train})

    def _folder_of(self, number: int) -> Path:
        return self.folder / run_name(self.name, self.periods[number])

    def _share(self) -> Any:
        """Opens all periods, whose users must be counted, and divides the budget."""
        from dist_dp.user_records import users_of

        configs, units, rows = [], [], []
        for period in self.periods:
            self._say(f"counting the users of {period.name}")
            config = config_of(self.config, self.name, self.dataset, period, self.folder)
            store, schema = open_data(config)
            if store.schema.user is None:
                raise ConfigError(
                    f"privacy.unit 'user' needs to know whose a record is, but '{period.path}' "
                    "names no users: name their column (data.user)"
                )
            configs.append(config)
            units.append(users_of(store.split("train")).num_users)
            rows.append(schema.table_rows())
        return share_budget(self.config, configs, units, rows)

    def _check_new_records(self, state: StreamState, number: int, config: RunConfig) -> None:
        """Refuses a period whose converted records are those of an earlier one.

        The ledger refuses them too, under another data set's name; users have one name.
        """
        self._say(f"reading {self.periods[number].path}")
        store, _ = open_data(config)
        for other in state.periods[:number]:
            if other.get("fingerprint") == store.fingerprint:
                raise ConfigError(
                    f"stream.periods: '{self.periods[number].path}' and '{other['path']}' hold "
                    "the same records; they would be trained on twice for one charge: take one out"
                )
        state.periods[number]["fingerprint"] = store.fingerprint
        state.write()

    def _evaluate(self, state: StreamState, number: int) -> dict[str, Any]:
        """Metrics of a period's release on all records of the next: it has seen none of them."""
        from dist_dp.cluster.serving import evaluate_release

        following = self._config(state, number + 1)
        self._say(f"evaluating {self.periods[number].name} on {self.periods[number + 1].name}")
        store, _ = open_data(following)
        metrics = evaluate_release(
            self._folder_of(number), str(store.path), whole=True, verbose=self._verbose
        )
        known = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        return {"period": self.periods[number + 1].name, **known}


def guarantee_of(periods: Sequence[Mapping[str, Any]]) -> str:
    """The guarantee of everything that a stream has released, in plain English.

    Args:
        periods: What each has reached; those that were not trained yet have no ``epsilon``.
    """
    done = [entry for entry in periods if "epsilon" in entry]
    if not done or not all(entry["private"] for entry in done):
        return "The stream is not private: a period was trained without a guarantee."
    delta = max(entry["delta"] for entry in done)
    older = "".join(
        f" The first period began from a release trained on data set '{name}', of whose records "
        "this says nothing: see the models' cards."
        for name in done[0].get("origins", [])[:1]
    )
    released = f"Everything released for {len(done)} of {len(periods)} periods"
    if done[0]["unit"] == "user":
        spent = done[-1]["dataset_spent_epsilon"]
        return (
            f"{released} is, taken together, (ε, δ)-differentially private with ε = "
            f"{round_up(spent)} and δ = {delta:g} for each user, with all records in all periods: "
            f"that is what data set '{done[0]['dataset']}' has spent in the ledger.{older}"
        )
    epsilon = max(entry["epsilon"] for entry in done)
    return (
        f"{released} is, taken together, (ε, δ)-differentially private with ε = "
        f"{round_up(epsilon)} and δ = {delta:g} for each record, provided that each is in one "
        f"period alone; a record that is repeated in another counts as two.{older}"
    )


def is_finished(folder: Path) -> bool:
    """Whether a run has released its model and will not go on."""
    released = (folder / "release" / "release.json").is_file()
    summed_up = (folder / "summary.json").is_file()
    return released and summed_up and not has_checkpoint(checkpoint_folder(folder))


def _check_not_begun(folder: Path, period: Period, entry: Mapping[str, Any]) -> None:
    if "run" in entry and not folder.exists():
        raise ConfigError(
            f"period '{period.name}' was trained, but its run '{folder}' is gone; it is not "
            "trained again: put the folder back, or begin another stream (output.name, data.name)"
        )
    if (folder / MARK).exists():
        raise ConfigError(
            f"period '{period.name}' was begun in '{folder}' and has no checkpoint to go on from; "
            "what it was charged stays charged, so it is not trained again. Begin another stream "
            "(output.name, data.name) with room in its budget (dist-dp budget set), and set "
            "train.checkpoint_every"
        )
