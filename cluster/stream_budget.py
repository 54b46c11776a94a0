"""The fixed budget of a stream, and what each period has of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dist_dp.cluster.config import RunConfig
from dist_dp.cluster.job import make_plan
from dist_dp.joint_plans import calibrate_together, joint_epsilon, with_noise


@dataclass(frozen=True)
class Share:
    """What every period of a stream for users has in common.

    Attributes:
        epsilon: ε of all periods together, at most the stream's.
        delta: δ of all of them.
        noise_multiplier: σ of every period, the largest of any step.
        units: Users of each period, as planned with.
    """

    epsilon: float
    delta: float
    noise_multiplier: float
    units: tuple[int, ...]

    def privacy(self, config: RunConfig) -> dict[str, Any]:
        """The settings of every period's run, in place of the stream's."""
        budget = config.privacy.dataset_budget
        total = self.epsilon if config.privacy.epsilon is None else config.privacy.epsilon
        return {
            "epsilon": None,
            "noise_multiplier": self.noise_multiplier,
            "delta": self.delta,
            "dataset_budget": budget.model_dump()
            if budget is not None
            else {"epsilon": total, "delta": self.delta},
        }


def composes(config: RunConfig) -> bool:
    """Whether the periods of a stream share one budget, because units come back on other days."""
    return config.privacy.unit == "user" and config.privacy.mechanism != "none"


def share_budget(
    config: RunConfig,
    periods: Sequence[RunConfig],
    units: Sequence[int],
    table_rows: Sequence[Mapping[str, int]],
) -> Share:
    """Plans all periods of a stream for users together, before the first is trained.

    Guarantee:
        A user may be in every period, so what is bounded is the composition of all steps of all
        periods, and of their private choices of rows: by the ledger's own accounting it is at most
        the stream's ε at its δ. The noise is fixed here, from public numbers (how many users each
        period has), so no period's is chosen in the light of another's result. δ, unless given, is
        0.1 / (sum of the periods' users), at most 0.1 / users.

    Args:
        config: The stream's configuration.
        periods: Those of its periods.
        units: How many users each has in its training records.
        table_rows: Rows of each table, by period.

    Raises:
        ConfigError: The budget cannot hold all periods.
    """
    delta = config.privacy.delta
    if delta is None:
        delta = 0.1 / max(1, sum(units))
    given = config.privacy.noise_multiplier
    plans = [
        make_plan(_provisional(period, delta, given or 1.0), count, rows)
        for period, count, rows in zip(periods, units, table_rows, strict=True)
    ]
    sigma = given
    if sigma is None:
        assert config.privacy.epsilon is not None
        sigma = calibrate_together(plans, config.privacy.epsilon, delta)
    spent = joint_epsilon([with_noise(plan, sigma) for plan in plans], delta)
    return Share(spent, delta, sigma, tuple(units))


def _provisional(period: RunConfig, delta: float, sigma: float) -> RunConfig:
    """With some noise, to learn what else of a plan there is; its grid follows from the noise."""
    values = period.model_dump(mode="json")
    values["privacy"] |= {"epsilon": None, "noise_multiplier": sigma, "delta": delta}
    values["noise"] |= {"grid": None}
    return RunConfig.model_validate(values)
