"""Named settings: the experiments of LazyDP (arXiv 2404.08847) at a scale that fits."""

from __future__ import annotations

from dataclasses import replace

from dist_dp.cluster.bench.settings import StepSettings
from dist_dp.errors import ConfigError

MLPERF_ROWS = (
    *(39_884_406, 39_043, 17_289, 7_420, 20_263, 3, 7_120, 1_543, 63, 38_532_951, 2_953_546),
    *(403_346, 10, 2_208, 11_938, 155, 4, 976, 14, 39_979_771, 25_641_295, 39_664_984),
    *(585_935, 12_972, 108, 36),
)
"""Rows of the 26 tables of MLPerf's DLRM on Criteo Terabyte: 96 GB at 128 columns."""

MLPERF_SHARE = 8
"""The large tables are cut to this part of their rows: 12 GB in place of 96."""

SMALL_TABLE = 100_000
"""Tables up to so many rows stay whole."""


def mlperf_rows(share: int = MLPERF_SHARE) -> tuple[int, ...]:
    """MLPerf's tables with the large ones cut."""
    return tuple(r if r <= SMALL_TABLE else max(SMALL_TABLE, r // share) for r in MLPERF_ROWS)


def _presets() -> dict[str, tuple[StepSettings, str]]:
    mlperf = StepSettings(rows=mlperf_rows())
    found: dict[str, tuple[StepSettings, str]] = {
        "default": (StepSettings(), "MLPerf's layers, 26 equal tables of 900,000 x 128 (12 GB)"),
    }
    about = f"MLPerf DLRM, the 96 GB of tables cut to {mlperf.table_bytes / 1e9:.1f} GB"
    for batch in (1024, 2048, 4096):
        found[f"mlperf-b{batch}"] = (replace(mlperf, batch=batch), f"{about}, batch {batch}")
    for pooling in (10, 20, 30):
        found[f"mlperf-pooling{pooling}"] = (
            replace(mlperf, pooling=pooling),
            f"{about}, batch 2048, {pooling} ids in each bag",
        )
    for skew in ("low", "medium", "high"):
        found[f"mlperf-skew-{skew}"] = (
            replace(mlperf, skew=skew),
            f"{about}, batch 2048, {skew} skew of row popularity",
        )
    # Layers, tables and pooling of RMC1-3 as the paper's artefact sets them; it takes the number
    # of rows from the memory there is, and so do we (about 5 GB).
    rmc = replace(StepSettings(), dim=32, bottom=(256, 128, 32), top=(512, 128, 1))
    found["rmc1"] = (
        replace(rmc, rows=(4_000_000,) * 10, top=(256, 64, 1), pooling=80),
        "RMC1: 10 tables of 4,000,000 x 32, 80 ids in each bag",
    )
    found["rmc2"] = (
        replace(rmc, rows=(1_000_000,) * 40, pooling=80),
        "RMC2: 40 tables of 1,000,000 x 32, 80 ids in each bag",
    )
    found["rmc3"] = (
        replace(rmc, rows=(4_000_000,) * 10, bottom=(2560, 512, 32), pooling=20),
        "RMC3: 10 tables of 4,000,000 x 32, 20 ids in each bag, wide bottom layers",
    )
    return {name: (replace(s, preset=name), text) for name, (s, text) in found.items()}


PRESETS = _presets()
"""Settings and a description by name."""


def chosen(
    preset: str | None, *, tables: int | None, rows: int | None, dim: int | None
) -> StepSettings:
    """A preset's settings with other tables, if any are asked for.

    Args:
        preset: Its name; by default ``default``.
        tables: Number of equal tables, in place of the preset's.
        rows: Rows of each of them.
        dim: Columns; the bottom MLP ends at as many.

    Raises:
        ConfigError: No preset has that name.
    """
    name = preset or "default"
    if name not in PRESETS:
        raise ConfigError(f"--preset: '{name}' is unknown; choose from {', '.join(PRESETS)}")
    settings = PRESETS[name][0]
    if tables is not None or rows is not None:
        if len(set(settings.rows)) != 1 and (tables is None or rows is None):
            raise ConfigError(
                f"--preset {name} has tables of several sizes: give --tables and --rows together"
            )
        count = tables or len(settings.rows)
        settings = replace(settings, rows=(rows or settings.rows[0],) * count)
    if dim is not None:
        settings = replace(settings, dim=dim, bottom=(*settings.bottom[:-1], dim))
    return settings


def show() -> None:
    """Prints the presets."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=False)
    for name, (_, text) in PRESETS.items():
        table.add_row(name, text)
    Console(width=120).print(table)
