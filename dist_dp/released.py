"""A released model on disk: opened, checked, loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dist_dp.errors import ReleaseError
from dist_dp.release import CHUNK_ROWS, FORMAT, FORMAT_VERSION, sha256_of


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
            verify: Check the sha256 of every file.

        Raises:
            ReleaseError: It is not a whole release: a training checkpoint, a half-written
                folder, a changed file.
        """
        folder = Path(folder)
        path = folder / "release.json"
        if (folder / "checkpoint.json").exists():
            raise ReleaseError(
                f"'{folder}' is a training checkpoint, not a released model: its rows are not "
                "settled, so they lack noise, and it holds the run's secret. Keep it private; "
                "finish the run (dist-dp train --resume) or export it to get a release."
            )
        if not path.is_file():
            raise ReleaseError(f"'{folder}' is no released model: it has no release.json")
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ReleaseError(f"'{path}' is damaged: {error}. Export the run again.") from None
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise ReleaseError(f"'{path}' does not describe a release of this package")
        if manifest.get("format_version") != FORMAT_VERSION:
            raise ReleaseError(
                f"'{path}' has format version {manifest.get('format_version')}, this package "
                f"reads {FORMAT_VERSION}; use the package version that wrote it"
            )
        for name, digest in manifest["files"].items():
            file = (folder / name).resolve()
            if not file.is_relative_to(folder.resolve()):
                raise ReleaseError(f"'{path}' names a file outside its folder: {name}")
            if not file.is_file():
                raise ReleaseError(f"'{folder}' lacks {name}; export the run again")
            if verify and sha256_of(file) != digest:
                raise ReleaseError(f"'{file}' was changed since the release; export the run again")
        return cls(folder, manifest)

    def dense(self) -> dict[str, Tensor]:
        """Everything outside the tables, by name."""
        from safetensors.torch import load_file

        result: dict[str, Tensor] = load_file(self.folder / "dense.safetensors")
        return result

    def table(self, table: str) -> Tensor:
        """One table, float32 ``[rows, dim]``.

        Raises:
            ReleaseError: There is no such table, or rows are missing.
        """
        import pyarrow.parquet as pq

        if table not in self.manifest["tables"]:
            raise ReleaseError(
                f"no table '{table}' in '{self.folder}'; it has {sorted(self.manifest['tables'])}"
            )
        info = self.manifest["tables"][table]
        result = torch.full((info["rows"], info["dim"]), float("nan"))
        for path in sorted((self.folder / "tables" / table).glob("*.parquet")):
            file = pq.ParquetFile(path)
            start = int(file.schema_arrow.metadata[b"column_offset"])
            for batch in file.iter_batches(CHUNK_ROWS):
                rows = torch.from_numpy(batch.column("row").to_numpy().copy())
                values = batch.column("embedding").flatten().to_numpy(zero_copy_only=False)
                values = torch.from_numpy(values.copy()).view(len(rows), -1)
                result[rows, start : start + values.shape[1]] = values
        if bool(torch.isnan(result).any()):
            raise ReleaseError(f"table '{table}' in '{self.folder}' is incomplete or holds NaN")
        return result

    def load_into(self, model: nn.Module) -> nn.Module:
        """Loads the release into an unsharded model of the same architecture, in place.

        Raises:
            ReleaseError: The model's names or shapes differ.
        """
        state = self.dense()
        for table, info in self.manifest["tables"].items():
            kind = "embedding_bags" if info["pooled"] else "embeddings"
            state[f"{info['collection']}.{kind}.{info['name']}.weight"] = self.table(table)
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise ReleaseError(f"the release does not fit the model: {error}") from None
        return model


def load_release(folder: str | Path, model: nn.Module) -> nn.Module:
    """Opens a release and loads it into an unsharded model; see :class:`Release`."""
    return Release.open(folder).load_into(model)
