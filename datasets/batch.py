"""One batch of click records, in the shape that TorchRec models take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torchrec import KeyedJaggedTensor


@dataclass
class ClickBatch:
    """A batch of B examples; the last ones may be padding.

    Padding lets ranks with unequal (Poisson) batches agree on one size: such an example has
    empty bags, zero dense features and label 0, and must get weight 0.

    Attributes:
        dense_features: float32 [B, number of dense features].
        sparse_features: KeyedJaggedTensor with the features in schema order, int64 values,
            int32 lengths; float32 weights only if some feature of the schema has a weight
            column (then ones for the others).
        labels: float32 [B], 0 or 1.
        is_real: bool [B], False for padding.
    """

    dense_features: torch.Tensor
    sparse_features: KeyedJaggedTensor
    labels: torch.Tensor
    is_real: torch.Tensor

    def __len__(self) -> int:
        """B, padding included."""
        return int(self.labels.shape[0])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> ClickBatch:
        """A copy on ``device``."""
        import torch

        device = torch.device(device)
        return ClickBatch(
            self.dense_features.to(device, non_blocking=non_blocking),
            self.sparse_features.to(device, non_blocking=non_blocking),
            self.labels.to(device, non_blocking=non_blocking),
            self.is_real.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> ClickBatch:
        """A copy in pinned memory, for asynchronous copies to a CUDA device."""
        return ClickBatch(
            self.dense_features.pin_memory(),
            self.sparse_features.pin_memory(),
            self.labels.pin_memory(),
            self.is_real.pin_memory(),
        )

    def record_stream(self, stream: torch.cuda.streams.Stream) -> None:
        """Tells the allocator that ``stream`` uses the batch (TorchRec's pipelines call it)."""
        self.dense_features.record_stream(stream)
        self.sparse_features.record_stream(stream)
        self.labels.record_stream(stream)
        self.is_real.record_stream(stream)
