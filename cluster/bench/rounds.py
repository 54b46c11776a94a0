"""Turns in rotating order, so that whatever drifts on the machine meets all contenders alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from dist_dp.cluster.bench.contenders import Contender, Sample
from dist_dp.cluster.bench.memory import peak_bytes, reset_peak
from dist_dp.cluster.bench.settings import StepSettings
from dist_dp.distributed import all_reduce_max, all_reduce_sum, barrier

VERY_SLOW = 5
"""A step this many times slower than a slow one gets two turns."""


@dataclass
class Turn:
    """The timed steps of one contender in one round."""

    round: int
    samples: list[Sample]


@dataclass
class Measured:
    """What was measured of one contender.

    Attributes:
        name: The mechanism.
        rounds: Turns planned for it.
        steps: Timed steps of a turn.
        warmup: Untimed steps before them.
        slow: Whether it gets fewer steps.
        turns: The turns taken.
        leases_ms: Milliseconds that each lease from the ledger took.
        beside_ms: Milliseconds a step that other threads worked for it, by name.
        peak_bytes: Highest resident memory of all ranks together, others' state taken out.
        state_bytes: What it keeps between steps, all ranks together.
    """

    name: str
    rounds: int = 0
    steps: int = 0
    warmup: int = 0
    slow: bool = False
    turns: list[Turn] = field(default_factory=list)
    leases_ms: list[float] = field(default_factory=list)
    beside_ms: dict[str, float] = field(default_factory=dict)
    peak_bytes: int = 0
    state_bytes: int = 0


def measure(
    contenders: Sequence[Contender], settings: StepSettings, say: Callable[[str], None]
) -> list[Measured]:
    """Warms up, measures memory, then takes the turns; every rank calls it.

    Args:
        contenders: Who takes part.
        settings: How often.
        say: Told what is going on.
    """
    found = [_first_step(c, settings, say) for c in contenders]
    # Only now, when every contender has imported and allocated what it needs once.
    for contender, mine in zip(contenders, found, strict=True):
        if not mine.slow:
            say(f"memory: {contender.name}")
            mine.peak_bytes = _peak_of(contender, contenders, steps=2)
    for number in range(settings.rounds):
        order = [(i + number) % len(contenders) for i in range(len(contenders))]
        for i in order:
            if number < found[i].rounds:
                say(f"round {number + 1} of {settings.rounds}: {contenders[i].name}")
                if found[i].slow and number == 0:
                    reset_peak()
                found[i].turns.append(_turn(contenders[i], found[i], number))
                if found[i].slow and number == 0:
                    found[i].peak_bytes = _without_others(contenders[i], contenders)
    return found


def _first_step(
    contender: Contender, settings: StepSettings, say: Callable[[str], None]
) -> Measured:
    """The first step makes what is kept, and tells how slow the others will be."""
    say(f"first step: {contender.name}")
    result = Measured(contender.name, settings.rounds, settings.steps, settings.warmup)
    contender.activate()
    barrier()
    seconds = _own_seconds(contender.step())
    if settings.slow_seconds <= seconds < VERY_SLOW * settings.slow_seconds:
        # Slow the first time only?
        seconds = _own_seconds(contender.step())
    state = all_reduce_sum(torch.tensor([contender.state_bytes], dtype=torch.int64))
    result.state_bytes = int(state)
    result.slow = seconds >= settings.slow_seconds
    if result.slow:
        very = seconds >= VERY_SLOW * settings.slow_seconds
        result.rounds = min(settings.rounds, 2 if very else settings.slow_rounds)
        result.steps, result.warmup = 1, 0
    return result


def _peak_of(contender: Contender, contenders: Sequence[Contender], steps: int) -> int:
    contender.activate()
    reset_peak()
    barrier()
    for _ in range(steps):
        contender.step()
    return _without_others(contender, contenders)


def _without_others(contender: Contender, contenders: Sequence[Contender]) -> int:
    """The highest resident memory of all ranks, less what other contenders keep meanwhile."""
    others = sum(c.state_bytes for c in contenders if c is not contender)
    return int(all_reduce_sum(torch.tensor([peak_bytes() - others], dtype=torch.int64)))


def _own_seconds(sample: Sample) -> float:
    """A step without its lease, of the slowest rank, so that all ranks plan alike.

    The first lease composes the run's ε for all its leases; it says nothing about later ones.
    """
    own = sample.seconds - 1e-3 * sample.phases_ms.get("ledger", 0.0)
    return float(all_reduce_max(torch.tensor([own], dtype=torch.float64)))


def _turn(contender: Contender, result: Measured, number: int) -> Turn:
    contender.activate()
    barrier()
    warm = [contender.step() for _ in range(result.warmup)]
    contender.timer.take_background()
    samples = [contender.step() for _ in range(result.steps)]
    beside = contender.timer.take_background()
    for name, value in beside.items():
        # the mean over all turns, kept as a running sum until the results are made
        result.beside_ms[name] = result.beside_ms.get(name, 0.0) + value / result.steps
    if not result.slow and contender.name != "none":
        # As many steps as a lease has, so one of them took one.
        result.leases_ms.append(sum(s.phases_ms["ledger"] for s in (*warm, *samples)))
    return Turn(number, samples)
