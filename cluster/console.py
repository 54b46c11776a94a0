"""What a person sees while a run goes on: one live line, then the result."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.filesize import decimal
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dist_dp.cluster.config import RunConfig
from dist_dp.cluster.last_words import LastWords
from dist_dp.figures import round_up


class ProgressLine:
    """Renders progress as one line: step, loss, ε of ε, examples/s, time left.

    A release, which may write for long, has a bar.
    """

    def __init__(self, console: Console) -> None:
        self._live = Live(Text(""), console=console, refresh_per_second=5, transient=True)
        self._terminal = console.is_terminal
        self._console = console
        self._target: float | None = None
        self._first: tuple[float, int] | None = None
        self._phase = ""

    def __enter__(self) -> ProgressLine:
        """Starts the line."""
        if self._terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Takes the line away."""
        if self._terminal:
            self._live.stop()

    def __call__(self, progress: dict[str, Any]) -> None:
        """Shows the latest progress."""
        if not progress:
            return
        if "plan" in progress:
            self._target = progress["plan"].target_epsilon
        if "notice" in progress:
            self._console.print(progress["notice"], markup=False)
            return
        phase = progress.get("phase", "")
        if not self._terminal:
            # In a log file: one line a phase is enough.
            if phase != self._phase:
                self._console.print(f"{phase} …")
                self._phase = phase
            return
        self._live.update(self.shown(progress))

    def shown(self, progress: dict[str, Any]) -> RenderableType:
        """What a terminal shows."""
        line = Text(self.line(progress), no_wrap=True, overflow="ellipsis")
        if progress.get("phase") == "training" or "release_bytes" not in progress:
            return line
        done, total = progress["released_bytes"], progress["release_bytes"]
        grid = Table.grid(padding=(0, 2))
        bar = ProgressBar(total=total, completed=done, width=40)
        grid.add_row(line, bar, f"{done / total:.0%} of {decimal(total)}")
        return grid

    def line(self, progress: dict[str, Any]) -> str:
        """The text of the line."""
        if progress.get("phase") != "training":
            return f"{progress.get('phase', '')} …"
        step, steps = progress["step"], progress["steps"]
        now = time.monotonic()
        if self._first is None:
            self._first = (now, step)
        began, first = self._first
        left = "–"
        if step > first:
            left = _clock((now - began) / (step - first) * (steps - step))
        epsilon = progress["epsilon"]
        privacy = "not private"
        if math.isfinite(epsilon):
            privacy = f"ε ≤ {round_up(epsilon, 3)}"
            if self._target:
                privacy += f" of {self._target:g}"
        parts = [
            f"step {step}/{steps}",
            f"loss {progress['loss']:.4f}",
            privacy,
            f"{progress['examples_per_second']:,.0f} examples/s",
            f"{left} left",
        ]
        return "  ".join(parts)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def watched_fit(
    run: RunConfig | Path, changes: Mapping[str, Any] | None = None, *, verbose: bool = False
) -> tuple[dict[str, Any], Path]:
    """Trains with a live line.

    Args:
        run: What to train, or the folder of a run to go on with.
        changes: Settings of a run that goes on that are other than before.
        verbose: Let libraries log.

    Returns:
        The summary and the run folder.
    """
    from dist_dp.cluster.trainer import Trainer

    with LastWords() as words, ProgressLine(Console(stderr=True)) as line:

        def watch(progress: dict[str, Any]) -> None:
            if trainer.run_folder is not None:
                words.are(_ended_unasked(trainer.run_folder))
            line(progress)

        if isinstance(run, RunConfig):
            trainer = Trainer(run, verbose=verbose, watch=watch)
        else:
            trainer = Trainer.resumed(run, changes, verbose=verbose, watch=watch)
        summary = trainer.fit()
    assert trainer.run_folder is not None
    return summary, trainer.run_folder


def _ended_unasked(folder: Path) -> str:
    return (
        "error: this process was ended before it could say why: by Ray, if the head of the cluster "
        "or its own node is gone, or by the system. What was leased stays charged; if there is a "
        f"checkpoint, go on from it: dist-dp train --resume {folder}"
    )


def print_summary(summary: dict[str, Any], folder: Path) -> None:
    """Prints a run's result and where to find it."""
    console = Console()

    def number(key: str, form: str) -> str:
        value = summary.get(key)
        return "–" if value is None else format(value, form)

    def bound(key: str) -> str:
        value = summary.get(key)
        return "–" if value is None else round_up(float(value))

    table = Table.grid(padding=(0, 2))
    if summary["private"]:
        unit = summary.get("unit_of_privacy", "record")
        table.add_row(
            "privacy",
            f"ε = {bound('epsilon')}, δ = {number('delta', 'g')} for each {unit}",
        )
        table.add_row(
            "budget",
            f"data set '{summary['dataset']}' has spent ε = "
            f"{bound('dataset_spent_epsilon')} of {number('dataset_budget_epsilon', 'g')}",
        )
    else:
        why = "fixed seed" if summary.get("fixed_seed") else f"mechanism {summary['mechanism']}"
        table.add_row("privacy", f"[bold red]NOT PRIVATE[/] ({why})")
    best = f" (best possible {summary['best_auc']:.4f})" if summary.get("best_auc") else ""
    table.add_row(
        "quality",
        f"AUC {number('auc', '.4f')}{best}, normalized entropy "
        f"{number('normalized_entropy', '.4f')}, log-loss {number('log_loss', '.4f')}",
    )
    table.add_row("noise", summary["kernels"])
    table.add_row(
        "speed",
        f"{number('examples_per_second', ',.0f')} examples/s, {number('step_ms', '.1f')} ms a "
        f"step, {summary['world_size']} worker(s)",
    )
    table.add_row("steps", f"{summary['steps']} of {summary['planned_steps']}, {summary['status']}")
    if summary.get("skipped_rows"):
        table.add_row("left out", skipped_text(summary["skipped_rows"]))
    if summary.get("budget_refusal"):
        table.add_row("stopped", summary["budget_refusal"])
    shown = _relative(folder)
    table.add_row("run", f"{shown}  (private; report.html is the page to read)")
    covered = "covered by the guarantee" if summary["private"] else "no guarantee"
    table.add_row("model", f"{shown / 'release'}  ({covered})")
    console.print(table)


def skipped_text(skipped: dict[str, int]) -> str:
    """Bad rows by reason, for a person."""
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in skipped.items())
    return f"{sum(skipped.values()):,} bad rows ({reasons})"


def _relative(folder: Path) -> Path:
    try:
        return folder.relative_to(Path.cwd())
    except ValueError:
        return folder
