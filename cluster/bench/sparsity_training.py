"""One training run of ``dist-dp bench sparsity``, in this process, and what it came to."""

from __future__ import annotations

import gc
import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_dp.cluster.bench.contenders import FreeLeases
from dist_dp.cluster.bench.sparsity_data import SparsityData
from dist_dp.cluster.config import ModelConfig
from dist_dp.cluster.evaluation import evaluate
from dist_dp.cluster.models import build_model, logits_of
from dist_dp.distributed import ensure_process_group
from dist_dp.loader import PoissonLoader, as_source
from dist_dp.mechanisms import Mechanism, SparseNoise
from dist_dp.mechanisms.exponential import ExponentialSelection
from dist_dp.optimizer_settings import optimizer_settings
from dist_dp.plan import PrivacyPlan
from dist_dp.private_model import PrivateModel, build_private_model
from dist_dp.sampled_selection import SampledSelection
from dist_dp.sampling import PoissonSampler

EVALUATION_BATCH = 16_384


@dataclass(frozen=True)
class Rates:
    """Learning rates of a run, constant over its steps.

    Attributes:
        tables: Of the tables (SGD).
        dense: Of the dense layers (SGD).
    """

    tables: float
    dense: float


@dataclass(frozen=True)
class Trained:
    """What one run came to.

    Attributes:
        auc: On the test records.
        public_auc: On the public ones.
        noised_coordinates: Coordinates of tables that a step noised, in the mean.
        noised_rows: Rows, likewise.
        table_coordinates: Coordinates of all tables.
        dense_coordinates: Of the dense layers, all noised at every step.
        seconds: Of the run, making the tables included.
    """

    auc: float
    public_auc: float
    noised_coordinates: float
    noised_rows: float
    table_coordinates: int
    dense_coordinates: int
    seconds: float


def train(
    data: SparsityData,
    model: ModelConfig,
    plan: PrivacyPlan,
    rates: Rates,
    *,
    seed: int,
    kept: Mapping[str, Tensor] | None = None,
    cost: SampledSelection | None = None,
) -> Trained:
    """Trains a fresh model and evaluates it.

    Nothing here is released or charged: seeds are fixed, so that all mechanisms start from the same
    weights and draw the same batches, and with a known seed noise hides nothing.

    Args:
        data: Records.
        model: The model.
        plan: Mechanism, noise, batch, steps.
        rates: Learning rates.
        seed: Of weights, batches and noise.
        kept: FEST's rows.
        cost: Of a step with exponential selection, in the place of the plan's mechanism.
    """
    start = time.perf_counter()
    ensure_process_group()
    secret = hashlib.sha256(f"dist-dp bench sparsity {seed}".encode()).digest()
    torch.manual_seed(seed)
    module = build_model(model, data.schema)
    settings = optimizer_settings(
        torch.optim.SGD(module.parameters(), lr=rates.dense), table_lr=rates.tables
    )
    private = build_private_model(
        module,
        plan,
        settings,
        secret=secret,
        sharding="table_wise",
        kept=kept,
        # it is made once, from layers that have no statistics of a batch
        probe_first_forward=False,
        substitute=None if cost is None else _exponential(cost, secret),
    )
    rows, coordinates = _steps(private, data, secret)
    quality = {
        name: evaluate(module, part, batch_size=EVALUATION_BATCH, device=private.device)["auc"]
        for name, part in (("test", data.test), ("public", data.public))
    }
    total = sum(s.weight.numel() for s in private.shards)
    dense = sum(p.numel() for p in private.recorder.parameters.values())
    if plan.mechanism in ("lazydp", "dpsgd"):
        # lazydp draws later what DP-SGD draws at every step, for every row
        rows, coordinates = float(sum(s.weight.shape[0] for s in private.shards)), float(total)
    del private, module, settings
    gc.collect()
    return Trained(
        auc=quality["test"],
        public_auc=quality["public"],
        noised_coordinates=coordinates,
        noised_rows=rows,
        table_coordinates=total,
        dense_coordinates=dense,
        seconds=time.perf_counter() - start,
    )


def _exponential(cost: SampledSelection, secret: bytes) -> Callable[[Mechanism], Mechanism]:
    """Puts the comparison's mechanism in the place of AdaFEST."""

    def substitute(planned: Mechanism) -> Mechanism:
        assert isinstance(planned, SparseNoise)
        return ExponentialSelection(
            planned.schedules,
            plan=planned.plan,
            optimizers=planned.optimizers,
            cost=cost,
            seed=secret,
        )

    return substitute


def _steps(private: PrivateModel, data: SparsityData, secret: bytes) -> tuple[float, float]:
    """Takes the plan's steps; mean rows and coordinates that the sparse mechanisms noised."""
    plan, optimizer = private.plan, private.optimizer
    sampler = PoissonSampler(secret, plan.num_units, plan.sample_rate)
    loader = PoissonLoader(
        as_source(data.train), sampler, FreeLeases(), private.state, plan.steps, optimizer.timer
    )
    rows = coordinates = 0
    for batch in loader:
        logits = logits_of(private.model, batch)
        torch.nn.functional.binary_cross_entropy_with_logits(logits, batch.labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        if isinstance(private.mechanism, SparseNoise):
            selection = private.mechanism.last_selection
            assert selection is not None
            rows += selection.rows
            coordinates += selection.coordinates
    return rows / plan.steps, coordinates / plan.steps
