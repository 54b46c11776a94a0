"""The commands that make data; heavy imports happen inside."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dist_dp.cluster.readable_errors import readable_errors


@readable_errors
def convert(
    source: Annotated[Path, typer.Argument(help="File or folder of raw records.")],
    to: Annotated[Path, typer.Option("--to", help="Folder of the store to create.")],
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="YAML file; see examples/.")
    ] = None,
    format_name: Annotated[str, typer.Option("--format", help="Format of the source.")] = "auto",
    skip_bad_rows: Annotated[
        bool, typer.Option("--skip-bad-rows", help="Count bad rows and leave them out.")
    ] = False,
    max_bad_rows: Annotated[
        int | None, typer.Option(min=0, help="The same, but more than so many are an error.")
    ] = None,
    distributed: Annotated[
        bool, typer.Option("--distributed", help="On all CPUs of a Ray cluster, resumably.")
    ] = False,
    address: Annotated[
        str | None, typer.Option(help="Running Ray cluster; by default one is started here.")
    ] = None,
    part_mebibytes: Annotated[
        int, typer.Option("--part-mib", min=1, help="MiB of a text file converted at a time.")
    ] = 256,
) -> None:
    """Convert raw records to memory-mapped Arrow, once."""
    from dist_dp.cluster.config import DataConfig, load_config
    from dist_dp.cluster.console import skipped_text
    from dist_dp.errors import ConfigError

    if address is not None and not distributed:
        raise ConfigError("--address goes with --distributed; give both, or neither")
    data = load_config(config).data if config else DataConfig()
    options: dict[str, Any] = {
        "format": format_name if format_name != "auto" else data.format,
        "schema": data.columns,
        "split": {name: share for name, share in data.split.items() if share > 0},
        "split_seed": data.split_seed,
        "skip_bad_rows": skip_bad_rows or data.skip_bad_rows or max_bad_rows is not None,
        "max_bad_rows": max_bad_rows,
        "user": data.user,
    }
    if distributed:
        from dist_dp.cluster.ingest import convert_distributed

        manifest = convert_distributed(
            source,
            to,
            address=address,
            part_bytes=part_mebibytes << 20,
            watch=_say_parts,
            **options,
        )
    else:
        from dist_dp.datasets.convert import convert as convert_data

        manifest = convert_data(source, to, **options)
    rows = ", ".join(f"{name} {info.rows:,}" for name, info in manifest.splits.items())
    print(f"{to}: {rows}")
    if manifest.skipped_rows:
        print(f"left out: {skipped_text(manifest.skipped_rows)}")


@readable_errors
def generate(
    out: Annotated[
        Path, typer.Argument(help="File to write: TSV in Criteo's layout, or .parquet.")
    ],
    records: Annotated[int, typer.Option(min=1, help="Number of records.")] = 100_000,
    seed: Annotated[int, typer.Option(help="Seed of records and truth.")] = 0,
    users: Annotated[
        int, typer.Option(min=0, help="Users whose the records are, for a .parquet file.")
    ] = 0,
) -> None:
    """Generate click logs with a planted truth whose best AUC is known."""
    from dist_dp.datasets.synthetic import write_criteo_like
    from dist_dp.errors import DataError

    for path in (out, Path(f"{out}.truth.json")):
        if path.exists():
            raise DataError(f"'{path}' exists; choose another file, or remove it first")
    truth = write_criteo_like(out, records, seed=seed, num_users=users)
    print(
        f"{out}: {records:,} records, click rate {truth['click_rate']:.3f}, best possible AUC "
        f"{truth['best_auc']:.4f}"
    )


def _say_parts(whole: int, count: int) -> None:
    """A line that rewrites itself on a terminal; elsewhere what was there, and the end."""
    import sys

    if sys.stderr.isatty():
        end = "\n" if whole == count else ""
        print(f"\r{whole} of {count} parts", end=end, file=sys.stderr, flush=True)
    elif whole == count:
        print(f"{count} parts …", file=sys.stderr)
