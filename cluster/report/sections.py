"""The sections of the page, each from the summary to HTML; a missing value is an en dash."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from dist_dp.cluster.report.text import (
    DASH,
    INFINITY,
    bound,
    count,
    escape,
    finite,
    fixed,
    milliseconds,
    number,
    share,
    show,
    size,
)

Summary = Mapping[str, Any]


def is_private(summary: Summary) -> bool:
    """Tell whether the run claims a guarantee at all; a summary that does not say so has none."""
    return summary.get("private") is True and summary.get("mechanism") not in (None, "none")


def header(summary: Summary) -> str:
    """Run name, status and the one line of what this run was."""
    status = str(summary.get("status") or "status unknown").replace("_", " ")
    tone = {"completed": "good", "failed": "bad"}.get(status, "mid")
    if "budget" in status:
        tone = "stop"
    facts = [
        ("mechanism", escape(summary.get("mechanism"))),
        ("data set", escape(summary.get("dataset"))),
        ("steps", count(summary.get("steps"))),
        ("workers", count(summary.get("world_size"))),
        ("created", escape(summary.get("created"))),
    ]
    line = "".join(f"<span>{name} <b>{value}</b></span>" for name, value in facts)
    return (
        '<header><p class="kind">Training report</p>'
        f"<h1>{escape(summary.get('run_name'))}"
        f' <span class="status {tone}">{escape(status)}</span></h1>'
        f'<p class="facts">{line}</p></header>'
    )


def warnings(summary: Summary, config_text: str) -> str:
    """What a reader must not miss: no privacy where there is none, and that the page is private."""
    parts = []
    if summary.get("mechanism") == "none":
        parts.append(
            '<div class="alert bad" role="alert"><strong>This run is NOT private.</strong> '
            "It was trained without any privacy mechanism: no clipping, no noise. The model may "
            "reproduce single records of its training data; treat it as those data.</div>"
        )
    elif not is_private(summary):
        parts.append(
            '<div class="alert bad" role="alert"><strong>This run is NOT private.</strong> '
            f"{_why_not_private(summary, config_text)} The figures of privacy on this page say "
            "what the same run would cost otherwise; do not publish its model on their strength."
            "</div>"
        )
    parts.append(
        '<div class="alert mid"><strong>Keep this page private.</strong> Its charts and quality '
        "figures come from unnoised measurements on private data. "
        + (
            "Only the folder <code>release/</code> is covered by the privacy guarantee."
            if is_private(summary)
            else "Only a <code>release/</code> folder of a private run is covered by a guarantee, "
            "and this run has none."
        )
        + "</div>"
    )
    return "".join(parts)


def _why_not_private(summary: Summary, config_text: str) -> str:
    seeded = summary.get("seed") is not None or re.search(
        r"""^[ \t]*["']?\w*seed["']?[ \t]*:[ \t]*["']?-?\d""", config_text, re.MULTILINE
    )
    if seeded:
        return (
            "It was run with a fixed seed: whoever knows the seed can draw the same noise and "
            "subtract it. Fixed seeds are for tests."
        )
    if summary.get("private") is False:
        return "Its summary marks it as not private, as a fixed seed or a forced setting does."
    return "Its summary does not say that it is private."


def key_figures(summary: Summary) -> str:
    """The eight tiles under the header."""
    epsilon, target = number(summary.get("epsilon")), finite(summary.get("target_epsilon"))
    epsilon_note = ""
    if summary.get("mechanism") == "none":
        epsilon_text = INFINITY
    else:
        epsilon_text = bound(epsilon)
        epsilon_note = f"of a budget of {show(target)}" if target is not None else ""
    if not is_private(summary):
        epsilon_note = "no guarantee"
    best = finite(summary.get("best_auc"))
    peak = [v for raw in _list(summary.get("peak_memory_bytes")) if (v := finite(raw)) is not None]
    world = len(peak)
    peak_note = f"smallest of {world} workers {size(min(peak))}" if world > 1 else "one worker"
    calibration = finite(summary.get("calibration"))
    batch = finite(summary.get("expected_batch_size"))
    tiles = [
        ("Privacy loss ε", epsilon_text, epsilon_note),
        ("Failure probability δ", show(summary.get("delta"), 3), _against_units(summary)),
        ("AUC", fixed(summary.get("auc"), 4), f"best possible {best:.4f}" if best else "held out"),
        ("Normalized entropy", fixed(summary.get("normalized_entropy"), 4), "1 = base rate alone"),
        (
            "Log loss",
            fixed(summary.get("log_loss"), 4),
            f"calibration {calibration:.3f}" if calibration is not None else "",
        ),
        (
            "Examples a second",
            count(summary.get("examples_per_second")),
            f"batch of {count(batch)} {_units(summary)} expected" if batch is not None else "",
        ),
        ("Step time", milliseconds(summary.get("step_ms")), "median"),
        ("Peak memory a worker", size(max(peak)) if peak else DASH, peak_note),
    ]
    cells = "".join(
        f'<div class="tile"><dt>{name}</dt><dd>{value}</dd>'
        f'<dd class="sub">{note if value != DASH else ""}</dd></div>'
        for name, value, note in tiles
    )
    return f'<dl class="tiles">{cells}</dl>'


def _units(summary: Summary) -> str:
    return "users" if summary.get("unit_of_privacy") == "user" else "records"


def _against_units(summary: Summary) -> str:
    units = _units(summary)
    delta, n = finite(summary.get("delta")), finite(summary.get(f"num_{units}"))
    if not delta or not n:
        return ""
    if delta * n >= 1:
        return f"not below 1 / {count(n)} {units}"
    return f"= {show(delta * n, 2)} / {count(n)} {units}"


def privacy(summary: Summary) -> str:
    """The privacy statement: text, parameters, budget of the data set, what is not covered."""
    rate = finite(summary.get("sample_rate"))
    rows = [
        ("Mechanism", escape(summary.get("mechanism"))),
        ("Unit of privacy", escape(summary.get("unit_of_privacy"))),
        ("Neighbouring relation", escape(summary.get("neighbouring_relation"))),
        ("Sampling", escape(summary.get("sampling"))),
        ("Noise multiplier σ", _noise_multiplier(summary)),
        ("Clip norm C", show(summary.get("max_grad_norm"), 6)),
        ("Sample rate q", show(rate, 4) + (f" (1 in {show(1 / rate, 3)})" if rate else "")),
        ("Expected batch", f"{count(summary.get('expected_batch_size'))} {_units(summary)}"),
        ("Records", count(summary.get("num_records"))),
        ("Steps", count(summary.get("steps"))),
        ("Accountant", escape(summary.get("accountant"))),
        ("ε of this run", _epsilon_of(summary)),
        ("δ", show(summary.get("delta"), 3)),
        ("Data set in the ledger", escape(summary.get("dataset"))),
        ("ε spent on it by all runs", _spent(summary)),
    ]
    if _units(summary) == "users":
        most = count(summary.get("max_records_per_user"))
        place = [name for name, _ in rows].index("Records")
        users = count(summary.get("num_users"))
        rows[place:place] = [("Users", users), ("Records of a user in a step", f"at most {most}")]
    statement = str(summary.get("privacy_statement") or "").strip()
    paragraphs = (
        "".join(f"<p>{escape(p.strip())}</p>" for p in re.split(r"\n\s*\n", statement))
        if statement
        else "<p>The summary of this run holds no privacy statement.</p>"
    )
    gaps = _list(summary.get("not_covered"))
    items = "".join(f"<li>{escape(gap)}</li>" for gap in gaps) or f"<li>{DASH}</li>"
    covered = f"<h3>What the guarantee does not cover</h3><ul>{items}</ul>"
    if summary.get("mechanism") == "none":
        covered = ""
    return (
        '<section id="privacy"><h2>Privacy statement</h2><div class="card split">'
        f'<div class="prose">{paragraphs}{covered}</div>{definitions(rows)}</div></section>'
    )


def _noise_multiplier(summary: Summary) -> str:
    ends = _list(summary.get("noise_multiplier_range"))
    if len(ends) != 2 or ends[0] == ends[1]:
        return show(summary.get("noise_multiplier"), 6)
    return f"{show(ends[0], 6)} to {show(ends[1], 6)}, by schedule"


def _epsilon_of(summary: Summary) -> str:
    if summary.get("mechanism") == "none":
        return f"{INFINITY} (no guarantee)"
    target = finite(summary.get("target_epsilon"))
    return bound(summary.get("epsilon"), 6) + (f" of {show(target, 6)}" if target else "")


def _spent(summary: Summary) -> str:
    spent = number(summary.get("dataset_spent_epsilon"))
    budget = finite(summary.get("dataset_budget_epsilon"))
    if spent is None or budget is None or budget <= 0:
        return bound(spent) + ("" if spent is None else " (no budget set)")
    part = spent / budget
    if not part >= 0:
        return f"{bound(spent)} of {show(budget)}"
    tone = "bad" if part > 1 else "main"
    return (
        f'{bound(spent)} of {show(budget)}<svg class="meter" viewBox="0 0 100 6" '
        'preserveAspectRatio="none" aria-hidden="true">'
        '<rect class="track" width="100" height="6"/>'
        f'<rect class="fill {tone}" width="{100 * min(part, 1):.1f}" height="6"/></svg>'
        + ("over the budget" if part > 1 else f"{share(part)} used")
    )


def sharding(summary: Summary) -> str:
    """The table of tables: where each lies and how large it is."""
    tables = [entry for entry in _list(summary.get("sharding")) if isinstance(entry, Mapping)]
    if not tables:
        return (
            '<section id="sharding"><h2>Sharding</h2><div class="card"><p class="quiet">'
            "The summary lists no sharded tables.</p></div></section>"
        )
    body = "".join(
        f'<tr><th scope="row">{escape(entry.get("table"))}</th>'
        f'<td class="num">{count(entry.get("rows"))}</td>'
        f'<td class="num">{count(entry.get("dim"))}</td>'
        f"<td>{escape(str(entry.get('kind') or DASH).replace('_', ' '))}</td>"
        f"<td>{_ranks(entry.get('ranks'))}</td>"
        f'<td class="num">{size(entry.get("bytes"))}</td></tr>'
        for entry in tables
    )
    rows = sum(finite(entry.get("rows")) or 0 for entry in tables)
    total = sum(finite(entry.get("bytes")) or 0 for entry in tables)
    noun = "table" if len(tables) == 1 else "tables"
    return (
        '<section id="sharding"><h2>Sharding</h2><div class="card">'
        '<div class="scroll" tabindex="0" role="region" aria-label="Sharding of the tables">'
        "<table><thead><tr>"
        '<th scope="col">table</th><th scope="col" class="num">rows</th>'
        '<th scope="col" class="num">dim</th><th scope="col">sharding</th>'
        '<th scope="col">ranks</th><th scope="col" class="num">size</th></tr></thead>'
        f"<tbody>{body}</tbody><tfoot><tr>"
        f'<th scope="row">{len(tables):,} {noun}</th><td class="num">{count(rows)}</td>'
        f'<td></td><td></td><td></td><td class="num">{size(total)}</td></tr></tfoot></table></div>'
        "</div></section>"
    )


def _ranks(value: Any) -> str:
    ranks = _list(value)
    numbers = [r for r in ranks if isinstance(r, int)]
    if len(numbers) == len(ranks) > 3 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]}{DASH}{numbers[-1]}"
    return escape(", ".join(str(r) for r in ranks))


def setup(summary: Summary) -> str:
    """Optimizers and kernels beside the versions of the software."""
    settings = [
        ("Dense optimizer", escape(summary.get("dense_optimizer"))),
        ("Embedding optimizer", escape(summary.get("embedding_optimizer"))),
        ("Learning rate", show(summary.get("learning_rate"))),
        ("Kernels", escape(summary.get("kernels"))),
        ("Workers", count(summary.get("world_size"))),
        ("Peak memory", _memory(summary)),
    ]
    software = summary.get("software")
    versions = (
        [(escape(name), escape(version)) for name, version in software.items()]
        if isinstance(software, Mapping)
        else []
    )
    return (
        '<section id="software"><h2>Set-up and software</h2><div class="card split even">'
        f"{definitions(settings)}{definitions(versions or [('Software', DASH)])}"
        "</div></section>"
    )


def _memory(summary: Summary) -> str:
    peak = _list(summary.get("peak_memory_bytes"))
    shown = ", ".join(size(value) for value in peak[:16])
    return (shown + (f" and {len(peak) - 16} more" if len(peak) > 16 else "")) or DASH


def configuration(config_text: str | None) -> str:
    """The resolved configuration, folded."""
    content = (
        f'<details class="card"><summary>Show the resolved configuration</summary>'
        f'<pre tabindex="0">{escape(config_text.rstrip())}</pre></details>'
        if config_text and config_text.strip()
        else '<div class="card"><p class="quiet">The run folder holds no config.yaml.</p></div>'
    )
    return f'<section id="configuration"><h2>Configuration</h2>{content}</section>'


def definitions(rows: Sequence[tuple[str, str]]) -> str:
    """A two-column list of names and values; both are HTML already."""
    body = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in rows)
    return f'<dl class="facts-list">{body}</dl>'


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else []
