"""The model card that goes with every release: what is guaranteed, and what is not."""

from __future__ import annotations

from typing import Any

from dist_dp.figures import round_up
from dist_dp.noise_grid import spacing_text


def model_card(privacy: dict[str, Any], name: str, facts: dict[str, Any]) -> str:
    """Writes the card.

    Args:
        privacy: The ``privacy`` part of ``release.json``.
        name: Name of the release.
        facts: Further lines (metrics, software), label to value.

    Returns:
        Markdown.
    """
    plan = privacy["plan"]
    lines = [f"# Model card: {name}", "", "## Privacy", "", privacy["statement"], ""]
    if plan["mechanism"] != "none":
        lines += [
            "| | |",
            "| --- | --- |",
            "| ε | ∞ |"
            if privacy["epsilon"] is None
            else f"| ε | {round_up(privacy['epsilon'], 5)} |",
            f"| δ | {plan['delta']:g} |" if plan["delta"] is not None else "| δ | not set |",
            f"| unit of privacy | one {plan['unit']} |",
            *_users(plan),
            "| neighbouring relation | data sets that differ by adding or removing one "
            f"{plan['unit']} |",
            f"| mechanism | {plan['mechanism']} |",
            f"| noise multiplier σ | {_noise(privacy)} |",
            f"| clip norm C | {plan['max_grad_norm']:g} for each {plan['unit']}, over all tables "
            "and layers together |",
            f"| noise grid | {_grid(plan)} |",
            f"| sampling | {plan['sampling']}, of {plan['unit']}s, rate "
            f"{plan['expected_batch_size'] / _units(plan):.6g} |",
            f"| steps | {privacy['steps']} of {plan['steps']} planned, "
            f"{privacy['steps_charged']} charged |",
            f"| accountant | {plan['accountant'].upper()} (dp_accounting) |",
            f"| data set in the ledger | {privacy['dataset']}, run {privacy['run_id']} |",
            "",
            "The guarantee does **not** cover:",
            "",
            *(f"- {item};" for item in privacy["not_covered"]),
            "",
        ]
    if facts:
        lines += ["## Facts", "", "| | |", "| --- | --- |"]
        lines += [f"| {k} | {v} |" for k, v in facts.items()]
        lines.append("")
    lines += [
        "## Files",
        "",
        "`dense.safetensors` holds everything outside the tables; `tables/NAME/*.arrow` hold the "
        "embedding tables (Arrow IPC, also known as Feather; columns `row` and `embedding`); "
        "`release.json` names every file with its size and sha256. Load with "
        "`dist_dp.released.load_release(folder, model)`.",
        "",
    ]
    return "\n".join(lines)


def _units(plan: dict[str, Any]) -> int:
    return int(plan["num_users"] if plan["unit"] == "user" else plan["num_records"])


def _users(plan: dict[str, Any]) -> list[str]:
    if plan["unit"] != "user":
        return []
    return [
        f"| users | {plan['num_users']:,} |",
        f"| records of a user in a step | at most {plan['max_records_per_user']:,} |",
    ]


def _noise(privacy: dict[str, Any]) -> str:
    least, greatest = privacy["noise_multiplier_range"]
    if privacy["plan"]["noise_multiplier_schedule"] is None:
        return f"{greatest:.6g}"
    return f"{least:.6g} to {greatest:.6g}, by a schedule of the step fixed in advance"


def _grid(plan: dict[str, Any]) -> str:
    if plan["noise_grid"] is None:
        return "none"
    return f"table weights are multiples of {spacing_text(plan['noise_grid'])}"
