"""Quality on held-out records: AUC, log-loss, normalized entropy, calibration."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dist_dp.cluster.models import logits_of
from dist_dp.distributed import all_gather_cat, rank, world_size


def metrics_of(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Computes the metrics of a set of predictions.

    Args:
        logits: float ``[examples]``.
        labels: float ``[examples]``, 0 or 1.

    Returns:
        ``auc`` (exact, ties count half), ``log_loss`` (nats), ``normalized_entropy`` (log-loss
        over the entropy of the click rate; He et al., ADKDD 2014), ``calibration`` (predicted
        over observed clicks), ``examples``. A metric that the labels leave undefined is nan.
    """
    from torchmetrics.functional.classification import binary_auroc

    count = labels.numel()
    clicks = float(labels.sum())
    both = 0 < clicks < count
    loss = float(
        nn.functional.binary_cross_entropy_with_logits(logits.double(), labels.double())
        if count
        else math.nan
    )
    entropy = math.nan
    if both:
        p = clicks / count
        entropy = -(p * math.log(p) + (1 - p) * math.log(1 - p))
    predicted = float(torch.sigmoid(logits.double()).sum())
    return {
        "auc": float(binary_auroc(logits.double(), labels.long())) if both else math.nan,
        "log_loss": loss,
        "normalized_entropy": loss / entropy if both else math.nan,
        "calibration": predicted / clicks if clicks else math.nan,
        "examples": float(count),
    }


def _slices(dataset: Any, batch_size: int) -> Iterator[Any]:
    """This rank's records in batches; every rank gets the same number of equal-sized batches."""
    size = max(1, batch_size // world_size())
    total = len(dataset)
    first = total * rank() // world_size()
    last = total * (rank() + 1) // world_size()
    longest = -(-total // world_size())
    for start in range(0, max(1, longest), size):
        indices = np.arange(min(first + start, last), min(first + start + size, last))
        yield dataset.batch(indices.astype(np.int64), padded_size=size)


@torch.no_grad()
def evaluate(
    model: nn.Module, dataset: Any | list[Any], *, batch_size: int, device: torch.device
) -> dict[str, float]:
    """Evaluates a model on a data set; in training every rank calls it.

    Reading a table settles the rows that are read, so the metrics are those of the model with
    its noise.

    Args:
        model: The model.
        dataset: A :class:`dist_dp.datasets.ClickDataset`, or a list of several as if they were
            one.
        batch_size: Examples at a time, over all ranks.
        device: Where the model is.

    Returns:
        See :func:`metrics_of`; the same on every rank.
    """
    was_training = model.training
    model.eval()
    logits: list[Tensor] = []
    labels: list[Tensor] = []
    parts = dataset if isinstance(dataset, list) else [dataset]
    for batch in (batch for part in parts for batch in _slices(part, batch_size)):
        batch = batch.to(device)
        values = logits_of(model, batch).float()
        logits.append(values[batch.is_real])
        labels.append(batch.labels[batch.is_real])
    model.train(was_training)
    return metrics_of(
        all_gather_cat(torch.cat(logits)).cpu(), all_gather_cat(torch.cat(labels)).cpu()
    )
