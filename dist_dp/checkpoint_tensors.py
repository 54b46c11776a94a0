"""Tensors of a checkpoint by their global names: what torch.distributed.checkpoint is told.

A tensor is known by a name and a shape that no sharding changes. Each rank holds *pieces* of it:
boxes at some offset. Saving cuts pieces into chunks and writes each once; loading reads whatever
part of a chunk lies in a piece straight into it, so any sharding can load what any other saved.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from dist_dp.errors import CheckpointError

CHUNK_BYTES = 32 << 20
"""Chunks are about this large: the memory that loading takes, and what one checksum covers."""


@dataclass(frozen=True)
class Piece:
    """A box of a global tensor that this rank holds.

    Attributes:
        size: Shape of the global tensor.
        offsets: Where the box begins in it.
        tensor: The box: live, or a copy in host memory. Contiguous.
    """

    size: tuple[int, ...]
    offsets: tuple[int, ...]
    tensor: Tensor

    @classmethod
    def whole(cls, tensor: Tensor) -> Piece:
        """A piece that is the whole tensor, as of everything that every rank holds alike."""
        return cls(tuple(tensor.shape), (0,) * tensor.dim(), tensor)

    def copied(self) -> Piece:
        """The same piece with its values now, in host memory."""
        return replace(self, tensor=self.tensor.detach().to("cpu", copy=True))

    def chunks(self, limit: int) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """Parts of at most ``limit`` bytes (one row at least), with their global offsets."""
        tensor = self.tensor.detach()
        if tensor.numel() == 0:
            return
        if tensor.dim() == 0:
            yield (), tensor
            return
        rows = max(1, limit // (tensor.element_size() * tensor[0].numel()))
        for first in range(0, tensor.shape[0], rows):
            offsets = (self.offsets[0] + first, *self.offsets[1:])
            yield offsets, tensor[first : first + rows]


Pieces = Mapping[str, Sequence[Piece]]
"""This rank's pieces by the name of the tensor."""


class PieceSavePlanner(DefaultSavePlanner):
    """Plans to write pieces, each box once: what several ranks hold alike, the lowest writes."""

    def __init__(self) -> None:
        super().__init__(
            flatten_state_dict=False, flatten_sharded_tensors=False, dedup_save_to_lowest_rank=True
        )
        self._parts: dict[MetadataIndex, Tensor] = {}

    def create_local_plan(self) -> SavePlan:
        """Every chunk of every piece here."""
        self._parts = {}
        items: list[WriteItem] = []
        for name, pieces in self.state_dict.items():
            for piece in pieces:
                for offsets, part in piece.chunks(CHUNK_BYTES):
                    index = MetadataIndex(name, offsets)
                    if index in self._parts:
                        continue  # The history of a table is the same for all its column shards.
                    self._parts[index] = part
                    items.append(
                        WriteItem(
                            index=index,
                            type=WriteItemType.SHARD,
                            tensor_data=TensorWriteData(
                                chunk=ChunkStorageMetadata(torch.Size(offsets), part.shape),
                                properties=TensorProperties(dtype=part.dtype),
                                size=torch.Size(piece.size),
                            ),
                        )
                    )
        self.plan = SavePlan(items)
        return self.plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Each chunk on one rank; torch checks that no two overlap, this that none is missing.

        Raises:
            CheckpointError: The chunks of all ranks do not make up a tensor.
        """
        plans, metadata = super().create_global_plan(all_plans)
        for name, tensor in metadata.state_dict_metadata.items():
            assert isinstance(tensor, TensorStorageMetadata)
            held = sum(math.prod(chunk.sizes) for chunk in tensor.chunks)
            if held != math.prod(tensor.size):
                raise CheckpointError(
                    f"'{name}': the workers hold {held} of its {math.prod(tensor.size)} numbers"
                )
        return plans, metadata

    def lookup_object(self, index: MetadataIndex) -> Any:
        """The chunk itself."""
        return self._parts[index]


class PieceLoadPlanner(LoadPlanner):
    """Plans to fill live pieces in place.

    Raises (when planning):
        CheckpointError: The checkpoint lacks a tensor, has it in another shape or dtype, or does
            not cover every number of a piece.
    """

    def __init__(self) -> None:
        self._pieces: Pieces = {}
        self._metadata = Metadata({})

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Takes the pieces and what the checkpoint holds."""
        assert metadata is not None
        self._pieces = {
            name: [piece for piece in pieces if piece.tensor.numel()]
            for name, pieces in state_dict.items()
        }
        self._metadata = metadata

    def create_local_plan(self) -> LoadPlan:
        """Reads for every overlap of a saved chunk with a piece here."""
        items: list[ReadItem] = []
        for name, pieces in self._pieces.items():
            if not pieces:
                continue  # It is empty here; nothing was written of an empty tensor.
            saved = self._metadata.state_dict_metadata.get(name)
            if not isinstance(saved, TensorStorageMetadata):
                raise CheckpointError(f"it lacks '{name}', which this model has")
            for number, piece in enumerate(pieces):
                _check_same(name, saved, piece)
                box = ChunkStorageMetadata(torch.Size(piece.offsets), piece.tensor.shape)
                reads = [
                    replace(read, dest_index=MetadataIndex(name, piece.offsets, number))
                    for read in create_read_items_for_chunk_list(name, saved, [box])
                ]
                covered = sum(math.prod(read.lengths) for read in reads)
                if covered != piece.tensor.numel():
                    raise CheckpointError(
                        f"it holds {covered} of the {piece.tensor.numel()} numbers of '{name}' "
                        f"that belong at {tuple(piece.offsets)}"
                    )
                items += reads
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """As they are: every rank reads for itself."""
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        """As it is."""
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Never: only tensors are in a checkpoint, and nothing is unpickled.

        Raises:
            CheckpointError: Always.
        """
        raise CheckpointError(f"'{read_item.storage_index.fqn}' is no tensor")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """The part of a live piece that a read fills."""
        number = read_item.dest_index.index
        assert number is not None
        piece = self._pieces[read_item.dest_index.fqn][number]
        return box_of(piece.tensor.detach(), read_item.dest_offsets, read_item.lengths)

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing: it was filled in place."""


def box_of(tensor: Tensor, offsets: Sequence[int], lengths: Sequence[int]) -> Tensor:
    """A view of a box of a tensor."""
    return tensor[tuple(slice(o, o + n) for o, n in zip(offsets, lengths, strict=True))]


def _check_same(name: str, saved: TensorStorageMetadata, piece: Piece) -> None:
    for what, before, now in (
        ("shape", tuple(saved.size), tuple(piece.size)),
        ("dtype", saved.properties.dtype, piece.tensor.dtype),
    ):
        if before != now:
            raise CheckpointError(f"'{name}' was saved with {what} {before}, not {now}")
