"""A released model on disk: opened, checked, loaded."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dist_dp.arrow_file import ArrowFile
from dist_dp.errors import ReleaseError
from dist_dp.release_files import MANIFEST, sha256_of
from dist_dp.release_manifest import DENSE_FILE, read_manifest

_AT_A_TIME = 4
"""Files whose sha256 is computed side by side."""


@dataclass(frozen=True)
class Release:
    """A released model on disk, checked.

    Attributes:
        folder: Where it is.
        manifest: The content of ``release.json``.
    """

    folder: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, folder: str | Path, *, verify: bool = True) -> Release:
        """Opens a release.

        Args:
            folder: The folder.
            verify: Check the sha256 of every file, which reads all of it. The sizes are checked
                anyway, so a file that was cut off never passes.

        Raises:
            ReleaseError: It is not a whole release: a training checkpoint, a half-written
                folder, a changed file.
        """
        folder = Path(folder)
        path = folder / MANIFEST
        if (folder / "checkpoint.json").exists():
            raise ReleaseError(
                f"'{folder}' is a training checkpoint, not a released model: its rows are not "
                "settled, so they lack noise, and it holds the run's secret. Keep it private; "
                "finish the run (dist-dp train --resume) or export it to get a release."
            )
        if not path.is_file():
            raise ReleaseError(f"'{folder}' is no released model: it has no release.json")
        manifest = read_manifest(folder)
        files = {name: folder / name for name in manifest["files"]}
        if verify:
            with ThreadPoolExecutor(_AT_A_TIME) as threads:
                digests = threads.map(sha256_of, files.values())
                for (name, file), digest in zip(files.items(), digests, strict=True):
                    if digest != manifest["files"][name]["sha256"]:
                        raise ReleaseError(
                            f"'{file}' was changed since the release; export the run again"
                        )
        return cls(folder, manifest)

    def dense(self) -> dict[str, Tensor]:
        """Everything outside the tables, by name.

        Raises:
            ReleaseError: The file is damaged.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self.folder / DENSE_FILE
        try:
            result: dict[str, Tensor] = load_file(path)
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise ReleaseError(f"'{path}' is damaged: {error}. Export the run again.") from None
        return result

    def table(self, table: str) -> Tensor:
        """One table, float32 ``[rows, dim]``.

        Raises:
            ReleaseError: There is no such table, or rows are missing.
        """
        if table not in self.manifest["tables"]:
            raise ReleaseError(
                f"no table '{table}' in '{self.folder}'; it has {sorted(self.manifest['tables'])}"
            )
        info = self.manifest["tables"][table]
        result = torch.empty(info["rows"], info["dim"])
        self._read_into(table, result)
        return result

    def load_into(self, model: nn.Module) -> nn.Module:
        """Loads the release into an unsharded model of the same architecture, in place.

        Tables go chunk by chunk into the model's own memory; there is no second copy of one.

        Raises:
            ReleaseError: The model's names or shapes differ (nothing is loaded then), or rows are
                missing (the model is of no use then).
        """
        own = model.state_dict()
        dense = self.dense()
        shapes = self.check_fits(model, dense)
        if unmade := [name for name in shapes if own[name].is_meta]:
            raise ReleaseError(
                f"the model is on the meta device ({unmade[0]}), so there is nowhere to load the "
                "release to; give it memory first (model.to_empty)"
            )
        model.load_state_dict(dense, strict=False)
        for table, name in self._targets().items():
            self._read_into(table, own[name])
        return model

    def _targets(self) -> dict[str, str]:
        """The name of each table's weight in the model."""
        targets: dict[str, str] = {}
        for table, info in self.manifest["tables"].items():
            kind = "embedding_bags" if info["pooled"] else "embeddings"
            targets[table] = f"{info['collection']}.{kind}.{info['name']}.weight"
        return targets

    def check_fits(
        self, model: nn.Module, dense: dict[str, Tensor] | None = None
    ) -> dict[str, tuple[int, ...]]:
        """Compares names and shapes with a model's, which may be on the meta device.

        Args:
            model: The model.
            dense: What :meth:`dense` gave, if it was read before.

        Returns:
            The shape of each tensor of the release, by its name in the model.

        Raises:
            ReleaseError: They differ.
        """
        own = model.state_dict()
        dense = self.dense() if dense is None else dense
        shapes = {name: tuple(value.shape) for name, value in dense.items()}
        for table, name in self._targets().items():
            info = self.manifest["tables"][table]
            shapes[name] = (info["rows"], info["dim"])
        own_shapes = {name: tuple(value.shape) for name, value in own.items()}
        differing = sorted(
            n for n in shapes.keys() | own_shapes.keys() if shapes.get(n) != own_shapes.get(n)
        )
        if differing:
            listed = ", ".join(
                f"{n} (model {own_shapes.get(n, 'without')}, release {shapes.get(n, 'without')})"
                for n in differing[:4]
            )
            raise ReleaseError(
                f"the release does not fit the model, {len(differing)} tensors differ: {listed}"
            )
        return shapes

    @torch.no_grad()
    def _read_into(self, table: str, target: Tensor) -> None:
        """Fills ``target [rows, dim]``.

        Raises:
            ReleaseError: Rows are missing or there more than once, or a value is NaN.
        """
        filled = torch.zeros(target.shape[0], dtype=torch.int32)
        for rows, column, values in self.pieces(table):
            target[rows.to(target.device), column : column + values.shape[1]] = values.to(
                device=target.device, dtype=target.dtype
            )
            filled[rows] += values.shape[1]
            if bool(torch.isnan(values).any()):
                filled[rows] = -1
        if bool((filled != target.shape[1]).any()):
            raise ReleaseError(f"table '{table}' in '{self.folder}' is incomplete or holds NaN")

    def pieces(self, table: str) -> Iterator[tuple[Tensor, int, Tensor]]:
        """A table in pieces, mapped.

        Each is global rows int64 ``[n]``, first column, values float32 ``[n, columns]``.

        Raises:
            ReleaseError: A file is damaged, or holds rows or columns that the table has not.
        """
        info = self.manifest["tables"][table]
        for name in self.manifest["files"]:
            if Path(name).parent != Path("tables", table):
                continue
            try:
                yield from _pieces_in(self.folder / name, info["rows"], info["dim"])
            except ValueError as error:
                raise ReleaseError(
                    f"'{self.folder / name}' is damaged: {error}. Export the run again."
                ) from None


def _pieces_in(path: Path, rows: int, dim: int) -> Iterator[tuple[Tensor, int, Tensor]]:
    """The pieces in a file of a table ``[rows, dim]``; raises ValueError if it is damaged."""
    import pyarrow as pa

    file = ArrowFile(path)
    given = (file.schema.metadata or {}).get(b"column_offset", b"")
    column = int(given) if given.isdigit() and len(given) < 10 else -1
    width = getattr(file.schema.field(1).type, "list_size", 0) if len(file.schema) == 2 else 0
    stored = pa.schema([("row", pa.int64()), ("embedding", pa.list_(pa.float32(), width))])
    if width < 1 or not file.schema.equals(stored):
        raise ValueError("its columns are not those of a released table")
    if not 0 <= column <= dim - width:
        raise ValueError(f"its columns {column} to {column + width} are not all in [0, {dim})")
    for batch in file.batches():
        numbers, embedding = batch.columns
        if numbers.null_count or embedding.null_count or embedding.values.null_count:
            raise ValueError("it lacks values")
        at = numbers.to_numpy()
        if len(at) and not 0 <= at.min() <= at.max() < rows:
            raise ValueError(f"its rows {at.min()} to {at.max()} are not all in [0, {rows})")
        values = embedding.flatten().to_numpy(zero_copy_only=True)
        yield torch.from_numpy(at.copy()), column, _mapped(values).view(len(at), width)


def _mapped(values: Any) -> Tensor:
    """A tensor over memory that must not be written, without torch's warning about that."""
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(values)


def load_release(folder: str | Path, model: nn.Module) -> nn.Module:
    """Opens a release and loads it into an unsharded model; see :class:`Release`."""
    return Release.open(folder).load_into(model)
