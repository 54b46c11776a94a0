"""Uses of a released model: evaluate, predict, export."""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from dist_dp.cluster import quiet
from dist_dp.cluster.config import ModelConfig, load_config
from dist_dp.cluster.run_folder import MARK, release_of
from dist_dp.datasets.schema import DataSchema
from dist_dp.errors import DataError, ReleaseError
from dist_dp.release_files import MANIFEST
from dist_dp.release_manifest import DENSE_FILE
from dist_dp.released import Release

_COUNTS = ("examples", "skipped_rows")


@contextmanager
def _records(
    schema: DataSchema, data: str, skip_bad_rows: bool, format_name: str, whole: bool = False
) -> Iterator[tuple[Any, int]]:
    """Records in the training format, or a store's held-out split; and bad rows left out.

    With ``whole`` all splits of a store, in a list.
    """
    from dist_dp.datasets.convert import convert
    from dist_dp.datasets.store import ArrowStore

    if (Path(data) / "manifest.json").is_file():
        store = ArrowStore.open(data, verify=True, schema=schema)
        if whole:
            filled = [store.split(name) for name, of in store.manifest.splits.items() if of.rows]
            yield filled, sum(store.manifest.skipped_rows.values())
            return
        held_out = [name for name in ("test", "valid", "all") if name in store.split_names()]
        if not held_out:
            raise DataError(f"'{data}' has no test or valid split to evaluate on; give records")
        yield store.split(held_out[0]), 0
        return
    with tempfile.TemporaryDirectory(prefix="dist-dp-") as folder:
        destination = Path(folder) / "store"
        manifest = convert(
            data,
            destination,
            format=format_name,
            schema=schema,
            split=None,
            skip_bad_rows=skip_bad_rows,
        )
        store = ArrowStore.open(destination, schema=schema)
        yield store.split("all"), sum(manifest.skipped_rows.values())


def load_model(run: str | Path) -> tuple[torch.nn.Module, DataSchema]:
    """Loads a released model that was trained from the command line, unsharded.

    Args:
        run: Run folder, or a released model.

    Returns:
        The model in evaluation mode, and the schema of its data.

    Raises:
        ReleaseError: It is no release, names a factory that the run's configuration does not,
            claims other sizes than it holds, or was made by the Python API from a model that this
            package cannot build (use ``dist_dp.released.load_release`` with the model then).
    """
    from pydantic import ValidationError

    from dist_dp.cluster.models import build_model

    release = Release.open(release_of(run))
    info = release.manifest.get("model")
    if not info:
        raise ReleaseError(
            f"'{release.folder}' does not say how its model is built (it was made by the Python "
            "API): use dist_dp.released.load_release(folder, model) with your model"
        )
    try:
        schema = DataSchema.model_validate(info["columns"])
        config = ModelConfig.model_validate(info["model"])
    except (ValidationError, KeyError) as error:
        raise ReleaseError(
            f"'{release.folder / MANIFEST}' does not say how its model is built: "
            f"{' '.join(str(error).split())[:300]}. Export the run again."
        ) from None
    if config.name == "custom":
        _check_factory(Path(run), release, config)
    else:
        _check_sizes(release, config, schema)
    model = build_model(config, schema, meta_tables=False)
    _allocate(model)
    release.load_into(model)
    return model.eval(), schema


def _check_factory(run: Path, release: Release, config: ModelConfig) -> None:
    """A release names a factory, and calling it runs code: the user must have named it too.

    A run's own configuration did, so a run folder will do; a release alone may be anybody's.
    """
    place = run / MARK
    named = load_config(place).model if place.is_file() else None
    if named is None or (named.factory, named.factory_args) != (
        config.factory,
        config.factory_args,
    ):
        raise ReleaseError(
            f"'{release.folder}' says that its model is built by {config.factory!r}, which would "
            "be run: give the run's own folder, or, if you know the release, call "
            "dist_dp.released.load_release(folder, model) with a model that you have built"
        )


def _check_sizes(release: Release, config: ModelConfig, schema: DataSchema) -> None:
    """The model has the shapes of the release's files, before any memory is taken for it."""
    # Before the meta device: what torchrec computes when it is first imported, it must compute.
    import torchrec  # noqa: F401

    from dist_dp.cluster.models import build_model

    dense = release.dense()
    layers = len(config.dense_arch) + len(config.over_arch)
    if config.name == "dlrm_dcn":
        layers += config.dcn_layers
    if layers > len(dense):
        raise ReleaseError(
            f"'{release.folder / MANIFEST}' claims {layers} layers, and {DENSE_FILE} holds "
            f"{len(dense)} tensors; export the run again"
        )
    try:
        with torch.device("meta"):
            model = build_model(config, schema)
    except (RuntimeError, ValueError, TypeError, OverflowError) as error:
        raise ReleaseError(
            f"'{release.folder / MANIFEST}' describes a model that cannot be built "
            f"({' '.join(str(error).split())[:300]}); export the run again"
        ) from None
    release.check_fits(model, dense)


def _allocate(model: torch.nn.Module) -> None:
    """Gives memory to what a factory left on the meta device; the release has its values."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                empty = torch.empty_like(parameter, device="cpu")
                module._parameters[name] = torch.nn.Parameter(empty, parameter.requires_grad)


def evaluate_release(
    run: str | Path,
    data: str,
    *,
    batch_size: int = 8192,
    skip_bad_rows: bool = False,
    format_name: str = "auto",
    verbose: bool = False,
    whole: bool = False,
) -> dict[str, float]:
    """Evaluates a released model on records; see :func:`dist_dp.cluster.evaluation.metrics_of`.

    Args:
        run: Run folder, or a released model.
        data: Records in the training format, or a converted store.
        batch_size: Examples at a time.
        skip_bad_rows: Leave bad rows out and count them.
        format_name: Format of the records.
        verbose: Let libraries log.
        whole: Take every record of a store, not its held-out split: for one that the model has
            seen nothing of.
    """
    quiet.apply(verbose)
    from dist_dp.cluster.evaluation import evaluate

    model, schema = load_model(run)
    with _records(schema, data, skip_bad_rows, format_name, whole) as (dataset, skipped):
        metrics = evaluate(model, dataset, batch_size=batch_size, device=torch.device("cpu"))
    return {**metrics, "skipped_rows": float(skipped)} if skipped else metrics


@torch.no_grad()
def predict_release(
    run: str | Path,
    data: str,
    out: Path,
    *,
    batch_size: int = 8192,
    format_name: str = "auto",
    verbose: bool = False,
) -> int:
    """Writes the predicted probability of every record to a Parquet file, in their order.

    Returns:
        Number of predictions.

    Raises:
        DataError: The file exists, or the records cannot be read.
        ReleaseError: It is no release.
    """
    if out.exists():
        raise DataError(f"'{out}' exists; choose another file for --out, or remove it first")
    import pyarrow as pa
    import pyarrow.parquet as pq

    from dist_dp.cluster.models import logits_of

    quiet.apply(verbose)
    model, schema = load_model(run)
    layout = pa.schema([("probability", pa.float32())])
    partial = out.with_name(f".{out.name}.partial")
    try:
        with _records(schema, data, False, format_name) as (dataset, _):
            with pq.ParquetWriter(partial, layout) as writer:
                for start in range(0, len(dataset), batch_size):
                    end = min(len(dataset), start + batch_size)
                    batch = dataset.batch(np.arange(start, end, dtype=np.int64))
                    probability = torch.sigmoid(logits_of(model, batch))
                    writer.write_table(pa.table([pa.array(probability.numpy())], schema=layout))
            partial.rename(out)
            return len(dataset)
    finally:
        partial.unlink(missing_ok=True)


def export_release(run: str | Path, to: Path) -> Path:
    """Copies a release, checked, under a temporary name first.

    Raises:
        ReleaseError: The destination exists, the release is damaged, or the disk is full.
    """
    release = Release.open(release_of(run))
    if to.exists():
        raise ReleaseError(f"'{to}' exists; choose another folder or remove it first")
    partial = to.with_name(f".{to.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        for name in [*release.manifest["files"], "release.json"]:
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(release.folder / name, partial / name)
        Release.open(partial)
        partial.rename(to)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        if error.errno == errno.ENOSPC:
            raise ReleaseError(
                f"could not export to '{to}': the disk is full. Nothing was left there; free some "
                "space, or export to another place."
            ) from error
        raise ReleaseError(f"could not export to '{to}': {error}") from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return to


def print_metrics(metrics: dict[str, float]) -> None:
    """Prints metrics for a person."""
    table = Table.grid(padding=(0, 2))
    for name, value in metrics.items():
        text = f"{value:,.0f}" if name in _COUNTS else f"{value:.5f}"
        table.add_row(name.replace("_", " "), text)
    Console().print(table)
