"""How a checkpoint's tensors lie on disk: raw numbers in a file a rank, and one JSON index.

::

    index.json          name, dtype and shape of every tensor; file, place and CRC-32 of each chunk
    tensors-RANK.bin    the chunks that a rank wrote, back to back

Storage for torch.distributed.checkpoint. Its own would pickle; here nothing is unpickled, so a
file can at worst be refused. Every file is on the disk (fsync) before it is named in the index.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from dist_dp.checkpoint_tensors import box_of
from dist_dp.durable import for_the_owner
from dist_dp.errors import CheckpointError
from dist_dp.file_names import why_not_inside
from dist_dp.limits import MAX_INDEX_BYTES, read_json

INDEX_FILE = "index.json"


def write_private(path: Path, content: bytes) -> None:
    """Writes a new file that only its owner may read, and waits until it is on the disk."""
    with open(path, "xb", opener=for_the_owner) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


class TensorWriter(StorageWriter):
    """Writes this rank's chunks; rank 0 then the index.

    Args:
        folder: An existing folder on storage that all ranks share.
        rank: This process's rank.
        finish: Called on rank 0 once everything is written, the index too.
    """

    def __init__(self, folder: Path, rank: int, finish: Callable[[], None]) -> None:
        self.folder = folder
        self.rank = rank
        self._finish = finish

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept between saves."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to prepare: the folder exists."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """As they are."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes the chunks back to back; a rank without any writes no file."""
        results: list[WriteResult] = []
        if plan.items:
            name = f"tensors-{self.rank:05d}.bin"
            with open(self.folder / name, "xb", opener=for_the_owner) as file:
                start = 0
                for item in plan.items:
                    tensor = planner.resolve_data(item)
                    assert isinstance(tensor, Tensor)
                    content = _bytes_of(tensor)
                    size = len(content)
                    place = {"file": name, "start": start, "crc32": zlib.crc32(content)}
                    file.write(content)
                    start += size
                    results.append(WriteResult(item.index, size, place))
                file.flush()
                os.fsync(file.fileno())
        written: Future[list[WriteResult]] = Future()
        written.set_result(results)
        return written

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Writes the index."""
        places = {result.index: result.storage_data for each in results for result in each}
        tensors: dict[str, Any] = {}
        for name, tensor in metadata.state_dict_metadata.items():
            assert isinstance(tensor, TensorStorageMetadata)
            tensors[name] = {
                "dtype": str(tensor.properties.dtype).removeprefix("torch."),
                "shape": list(tensor.size),
                "chunks": [],
            }
        for index, place in places.items():
            tensor = metadata.state_dict_metadata[index.fqn]
            assert isinstance(tensor, TensorStorageMetadata)
            chunk = tensor.chunks[index.index or 0]
            described = {"offsets": list(chunk.offsets), "sizes": list(chunk.sizes), **place}
            tensors[index.fqn]["chunks"].append(described)
        write_private(self.folder / INDEX_FILE, json.dumps({"tensors": tensors}).encode())
        self._finish()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """False: this storage is always named explicitly."""
        return False


class TensorReader(StorageReader):
    """Reads what :class:`TensorWriter` wrote, a chunk at a time.

    Args:
        folder: The folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._places: dict[tuple[str, int], dict[str, Any]] = {}
        self._chunks: dict[tuple[str, int], tuple[torch.dtype, tuple[int, ...]]] = {}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept between loads."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index.

        Raises:
            CheckpointError: It cannot be read.
        """
        path = self.folder / INDEX_FILE
        try:
            tensors = read_json(path, MAX_INDEX_BYTES)["tensors"]
            metadata = Metadata({name: self._describe(name, t) for name, t in tensors.items()})
            self._check_places()
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"'{path}' is damaged: {error!r}") from None
        return metadata

    def _describe(self, name: str, described: dict[str, Any]) -> TensorStorageMetadata:
        dtype = getattr(torch, described["dtype"])
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"no dtype: {dtype}")
        shape = _sizes(described["shape"])
        chunks = []
        for number, chunk in enumerate(described["chunks"]):
            sizes, offsets = _sizes(chunk["sizes"]), _sizes(chunk["offsets"])
            if not len(sizes) == len(offsets) == len(shape) or any(
                o + n > whole for o, n, whole in zip(offsets, sizes, shape, strict=True)
            ):
                raise ValueError(f"a chunk of '{name}' lies outside it")
            chunks.append(ChunkStorageMetadata(offsets, sizes))
            self._places[name, number] = chunk
            self._chunks[name, number] = (dtype, tuple(sizes))
        if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(shape):
            raise ValueError(f"the chunks of '{name}' are not the whole of it")
        return TensorStorageMetadata(TensorProperties(dtype=dtype), shape, chunks)

    def _check_places(self) -> None:
        """Every chunk lies in its file, and all together are no more than the files."""
        sizes: dict[str, int] = {}
        left: dict[str, int] = {}
        for key, place in self._places.items():
            dtype, shape = self._chunks[key]
            name, (start,) = place["file"], _sizes([place["start"]])
            if name not in sizes:
                why = why_not_inside(self.folder, name)
                if why is not None:
                    raise ValueError(f"it names the file {name!r}, which {why}")
                if not (self.folder / name).is_file():
                    raise ValueError(f"'{name}' is missing")
                sizes[name] = left[name] = (self.folder / name).stat().st_size
            held = math.prod(shape) * dtype.itemsize
            left[name] -= held
            if left[name] < 0 or start + held > sizes[name]:
                raise CheckpointError(
                    f"'{self.folder / name}' is damaged: it is shorter than the index says (tensor "
                    f"'{key[0]}'): put a copy of the checkpoint back, or start a new run"
                )

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing to prepare."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """As they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fills every piece; each chunk is read once and checked.

        Raises:
            CheckpointError: A chunk is cut off or damaged.
        """
        wanted: dict[tuple[str, int], list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            assert item.storage_index.index is not None
            wanted[item.storage_index.fqn, item.storage_index.index].append(item)
        for chunk, items in wanted.items():
            values = self._read(chunk)
            for item in items:
                target = planner.resolve_tensor(item)
                target.copy_(box_of(values, item.storage_offsets, item.lengths))
                planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read(self, chunk: tuple[str, int]) -> Tensor:
        place = self._places[chunk]
        dtype, shape = self._chunks[chunk]
        path = self.folder / place["file"]
        raw = torch.empty(math.prod(shape) * dtype.itemsize, dtype=torch.uint8)
        content = raw.numpy().data
        with open(path, "rb") as file:
            file.seek(place["start"])
            count = file.readinto(content)
        if count != raw.numel() or zlib.crc32(content) != place["crc32"]:
            raise CheckpointError(
                f"'{path}' is damaged at byte {place['start']} (tensor '{chunk[0]}'): put a copy "
                "of the checkpoint back, or start a new run"
            )
        return raw.view(dtype).view(shape)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """False: this storage is always named explicitly."""
        return False


def _sizes(values: Any) -> torch.Size:
    """Sizes as they are saved; raises ValueError for what is no list of them."""
    if not isinstance(values, list) or not all(type(n) is int and 0 <= n < 2**63 for n in values):
        raise ValueError(f"no sizes: {str(values)[:100]}")
    return torch.Size(values)


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data
