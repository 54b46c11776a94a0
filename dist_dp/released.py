"""A released model on disk: opened, checked, loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dist_dp.errors import ReleaseError
from dist_dp.release import FORMAT, FORMAT_VERSION
from dist_dp.release_files import MANIFEST, sha256_of

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
        files: dict[str, Path] = {}
        for name, facts in manifest["files"].items():
            file = files[name] = (folder / name).resolve()
            if not file.is_relative_to(folder.resolve()):
                raise ReleaseError(f"'{path}' names a file outside its folder: {name}")
            if not file.is_file():
                raise ReleaseError(f"'{folder}' lacks {name}; export the run again")
            if file.stat().st_size != facts["bytes"]:
                raise ReleaseError(
                    f"'{file}' was changed since the release: it has {file.stat().st_size} bytes "
                    f"instead of {facts['bytes']}; export the run again"
                )
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
        """Everything outside the tables, by name."""
        from safetensors.torch import load_file

        result: dict[str, Tensor] = load_file(self.folder / "dense.safetensors")
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
        targets: dict[str, str] = {}
        for table, info in self.manifest["tables"].items():
            kind = "embedding_bags" if info["pooled"] else "embeddings"
            targets[table] = f"{info['collection']}.{kind}.{info['name']}.weight"
        dense = self.dense()
        shapes = {name: tuple(value.shape) for name, value in dense.items()}
        for table, name in targets.items():
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
        if unmade := [name for name in shapes if own[name].is_meta]:
            raise ReleaseError(
                f"the model is on the meta device ({unmade[0]}), so there is nowhere to load the "
                "release to; give it memory first (model.to_empty)"
            )
        model.load_state_dict(dense, strict=False)
        for table, name in targets.items():
            self._read_into(table, own[name])
        return model

    @torch.no_grad()
    def _read_into(self, table: str, target: Tensor) -> None:
        """Fills ``target [rows, dim]``.

        Raises:
            ReleaseError: Rows are missing or there more than once, or a value is NaN.
        """
        filled = torch.zeros(target.shape[0], dtype=torch.int32)
        for rows, column, values in self._pieces(table):
            target[rows.to(target.device), column : column + values.shape[1]] = values.to(
                device=target.device, dtype=target.dtype
            )
            filled[rows] += values.shape[1]
            if bool(torch.isnan(values).any()):
                filled[rows] = -1
        if bool((filled != target.shape[1]).any()):
            raise ReleaseError(f"table '{table}' in '{self.folder}' is incomplete or holds NaN")

    def _pieces(self, table: str) -> Iterator[tuple[Tensor, int, Tensor]]:
        """Global rows int64 ``[n]``, first column, values float32 ``[n, columns]``, mapped."""
        import pyarrow as pa

        for name in self.manifest["files"]:
            if Path(name).parent != Path("tables", table):
                continue
            with pa.memory_map(str(self.folder / name)) as source:
                file = pa.ipc.open_file(source)
                column = int(file.schema.metadata[b"column_offset"])
                for number in range(file.num_record_batches):
                    batch = file.get_batch(number)
                    embedding = batch.column("embedding")
                    values = embedding.flatten().to_numpy(zero_copy_only=True)
                    yield (
                        torch.from_numpy(batch.column("row").to_numpy().copy()),
                        column,
                        _mapped(values).view(batch.num_rows, embedding.type.list_size),
                    )


def _mapped(values: Any) -> Tensor:
    """A tensor over memory that must not be written, without torch's warning about that."""
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(values)


def load_release(folder: str | Path, model: nn.Module) -> nn.Module:
    """Opens a release and loads it into an unsharded model; see :class:`Release`."""
    return Release.open(folder).load_into(model)
