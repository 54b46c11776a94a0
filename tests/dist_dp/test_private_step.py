"""What can go wrong around one private step, in a world of one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torchrec import (
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    KeyedJaggedTensor,
    PoolingType,
)
from torchrec.modules.embedding_configs import DataType

from dist_dp import kernels
from dist_dp.distributed import ensure_process_group, rank
from dist_dp.errors import ConfigError, DataError, DistDpError, ModelError, ReleaseError
from dist_dp.private_model import PrivateModel
from dist_dp.sharding import embedding_collections
from tests.dist_dp.clicks import Clicks, random_bags
from tests.dist_dp.gradients import build, pieces
from tests.dist_dp.models import BATCH, DENSE, bags
from tests.dist_dp.worlds import run_world

ROWS = {"f0": 7, "f1": 11}


class Small(nn.Module):
    def __init__(self, width: int = 6, dim: int = 8) -> None:
        super().__init__()
        self.pooled = bags({"a": (7, ["f0"]), "b": (11, ["f1"])}, dim)
        top = nn.Linear(2 * dim + DENSE, width)
        self.top = nn.Sequential(top, nn.ReLU(), nn.Linear(width, 1))

    def forward(self, dense: Tensor, sparse: KeyedJaggedTensor) -> Tensor:
        return self.top(torch.cat([self.pooled(sparse).values(), dense], 1)).squeeze(1)


@pytest.fixture(autouse=True)
def world() -> None:
    ensure_process_group()
    torch.manual_seed(1)


def data(seed: int = 1, weighted: bool = False) -> Clicks:
    g = torch.Generator().manual_seed(seed)
    dense = torch.randn(BATCH, DENSE, generator=g)
    return Clicks(dense, (random_bags(ROWS, BATCH, g, weighted=weighted),), torch.ones(BATCH))


def make(**options: Any) -> tuple[nn.Module, PrivateModel]:
    model = Small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    return model, build(model, optimizer=optimizer, **options)


def state(private: PrivateModel) -> list[Tensor]:
    dense = [p.detach().clone() for p in private.recorder.parameters.values()]
    return [*dense, *(p for _, p in sorted(pieces(private).items()))]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def begin(private: PrivateModel, step: int = 1) -> None:
    private.state.begin(step, BATCH, BATCH)


def loss(model: nn.Module, batch: Clicks) -> Tensor:
    return model(*batch.inputs).square().mean()


@pytest.mark.parametrize("when", ["before the forward", "between forward and backward", "never"])
def test_zero_grad_where_users_put_it(when: str) -> None:
    ends = []
    for place in ("before the forward", when):
        torch.manual_seed(1)
        model, private = make()
        for step in (1, 2):
            begin(private, step)
            if place == "before the forward":
                private.optimizer.zero_grad()
            value = loss(model, data(step))
            if place == "between forward and backward":
                private.optimizer.zero_grad()
            value.backward()
            private.optimizer.step()
        ends.append(state(private))
    assert equal(*ends)


def test_zero_grad_drops_what_a_backward_left() -> None:
    model, private = make()
    begin(private)
    loss(model, data(1)).backward()
    private.optimizer.zero_grad()
    value = loss(model, data(2))  # takes the place of the first, without an error
    value.backward()
    private.optimizer.step()
    torch.manual_seed(1)
    other, wanted = make()
    begin(wanted)
    loss(other, data(2)).backward()
    wanted.optimizer.step()
    assert equal(state(private), state(wanted))


def test_zero_grad_lets_another_forward_take_over() -> None:
    model, private = make()
    begin(private)
    loss(model, data(1))
    private.optimizer.zero_grad()
    loss(model, data(2)).backward()
    private.optimizer.step()
    assert private.mechanism.schedule.step == 1


def test_a_second_forward_is_refused() -> None:
    model, private = make()
    begin(private)
    value = loss(model, data())
    with pytest.raises(ModelError, match="second forward"):
        loss(model, data())
    with torch.no_grad():
        loss(model, data())
    value.backward()
    private.optimizer.step()


@pytest.mark.parametrize("kind", ["table_wise", "row_wise", "column_wise", "data_parallel"])
def test_a_backward_in_evaluation_moves_no_table(kind: str) -> None:
    """A forgotten model.train() must not send unclipped gradients to the fused update."""
    model, private = make(kind=kind, sigma=1.0)
    before = state(private)
    model.eval()
    begin(private)
    value = loss(model, data())
    value.backward()
    assert equal(state(private), before)
    with pytest.raises((DistDpError, ModelError), match=r"training mode|outside its layer"):
        private.optimizer.step()
    assert equal(state(private), before)
    private.optimizer.zero_grad()
    model.train()
    loss(model, data()).backward()
    private.optimizer.step()


def test_a_step_without_forward() -> None:
    _, private = make()
    begin(private)
    with pytest.raises(DistDpError, match=r"model\.train\(\)"):
        private.optimizer.step()


def test_a_batch_of_another_size() -> None:
    model, private = make()
    private.state.begin(1, BATCH - 1, BATCH - 1)
    loss(model, data()).backward()
    with pytest.raises(DistDpError, match=f"saw {BATCH} examples.*gave {BATCH - 1}"):
        private.optimizer.step()


def test_a_gradient_that_is_not_finite() -> None:
    model, private = make()
    before = state(private)
    begin(private)
    batch = data()
    batch.dense[2, 0] = float("nan")
    loss(model, batch).backward()
    with pytest.raises(ModelError, match=r"step 1.*not finite"):
        private.optimizer.step()
    assert equal(state(private), before)


@pytest.mark.parametrize("kind", ["table_wise", "data_parallel"])
def test_a_penalty_on_weights(kind: str) -> None:
    model, private = make(kind=kind)
    for parameters, word in (
        (list(model.top.parameters()), "top"),
        (list(model.pooled.parameters()), "pooled"),
    ):
        begin(private)
        private.state.is_real = torch.ones(BATCH, dtype=torch.bool)
        penalty = sum(p.square().sum() for p in parameters)
        (loss(model, data()) + penalty).backward()
        with pytest.raises(ModelError, match=f"{word}.*weight_decay"):
            private.optimizer.step()
        private.state.is_real = None
        private.optimizer.zero_grad()
        for p in model.parameters():
            p.grad = None


@pytest.mark.parametrize("kind", ["table_wise", "data_parallel"])
def test_weights_that_an_unweighted_collection_ignores(kind: str) -> None:
    model = Small()
    batch = data(weighted=True)
    wanted = model(*batch.inputs).detach()
    private = build(model, kind=kind)
    torch.testing.assert_close(model(*batch.inputs).detach(), wanted)
    private.optimizer.zero_grad()
    model.eval()
    torch.testing.assert_close(model(*batch.inputs), wanted)


@pytest.mark.parametrize("wrong", [-1, 7])
def test_an_id_out_of_range(wrong: int) -> None:
    model, private = make()
    batch = data()
    batch.sparse[0]["f0"].values()[0] = wrong
    begin(private)
    with pytest.raises(DataError, match=rf"'f0' holds the id {wrong}.*'a' of 7 rows"):
        loss(model, batch)


def test_noise_is_owed_before_the_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that breaks half-way leaves tables whose release still holds the step's noise."""
    model, private = make(sigma=1.0)
    begin(private)
    loss(model, data()).backward()
    monkeypatch.setattr(private.cuts[0], "backward", _disk_on_fire)
    before = pieces(private)
    with pytest.raises(OSError, match="fire"):
        private.optimizer.step()
    private.settle()
    after = pieces(private)
    assert all(bool((before[k] != after[k]).all()) for k in before)


def _disk_on_fire(*_: Any) -> None:
    raise OSError("fire")


@pytest.mark.parametrize("mechanism", ["lazydp", "dpsgd"])
def test_noise_has_the_stated_size(mechanism: str) -> None:
    """With zero gradients every weight moves by N(0, (lr σ C / B)²) a step, each on its own.

    Level 1e-4 for each test.
    """
    model = Small(width=100, dim=64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    private = build(
        model, mechanism=mechanism, sigma=1.5, clip=0.7, expected=3.0, optimizer=optimizer
    )
    before = state(private)
    steps = 3
    for step in range(1, steps + 1):
        begin(private, step)
        (loss(model, data()) * 0).backward()
        private.optimizer.step()
    private.settle()
    deviation = steps**0.5 * 0.5 * 1.5 * 0.7 / 3.0
    pairs = zip(state(private), before, strict=True)
    moved = [(a - b).flatten() / deviation for a, b in pairs]
    dense = len(private.recorder.parameters)
    for part in (torch.cat(moved[:dense]), torch.cat(moved[dense:])):
        assert part.numel() > 1000
        assert stats.kstest(part.double().numpy(), "norm").pvalue > 1e-4
        assert abs(float(part.square().sum()) - len(part)) < 3.9 * (2 * len(part)) ** 0.5
    rounded = (torch.cat(moved) * 2**18).round()  # no number serves two weights
    assert rounded.unique().numel() > 0.98 * rounded.numel()


def test_buffers_that_move() -> None:
    model, private = make()
    private.check_fixed_unchanged()
    model.register_buffer("mean_click", torch.ones(1))
    with pytest.raises(ModelError, match="'mean_click'"):
        private.check_fixed_unchanged()


def test_sharding_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match=r"'c'.*\['a', 'b'\]"):
        make(kind={"c": "row_wise"})
    with pytest.raises(ConfigError, match=r"'a'.*'diagonal'"):
        make(kind={"a": "diagonal"})
    with pytest.raises(ModelError, match="no torchrec"):
        build(nn.Sequential(nn.Linear(2, 2)))


def untouched(model: nn.Module) -> bool:
    return all(type(m) is EmbeddingBagCollection for m in embedding_collections(model).values())


def test_a_frozen_table() -> None:
    model = Small()
    model.pooled.embedding_bags["b"].weight.requires_grad_(False)
    with pytest.raises(ModelError, match=r"'pooled\.b' is frozen.*unfreeze.*buffer"):
        build(model)
    assert untouched(model) and len(embedding_collections(model)) == 1


@pytest.mark.parametrize("kind", ["table_wise", "row_wise"])
def test_a_mean_of_weighted_bags(kind: str) -> None:
    """Unsharded, PyTorch refuses it at the lookup; sharded, nobody would."""
    tables = {"a": (7, ["f0"]), "b": (11, ["f1"])}
    model = Small()
    model.pooled = bags(tables, 8, {"b": PoolingType.MEAN}, weighted=True)
    (features,) = data(weighted=True).sparse
    with pytest.raises(NotImplementedError, match="per_sample_weights"):
        model.pooled(features)
    with pytest.raises(
        ModelError, match=r"'pooled\.b' takes the mean of weighted.*PoolingType.SUM"
    ):
        build(model, kind=kind)
    assert untouched(model)
    model.pooled = bags(tables, 8, weighted=True)
    build(model, kind=kind)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_table_in_half_precision(device: str) -> None:
    model = Small()
    table = EmbeddingBagConfig(
        name="h", num_embeddings=5, embedding_dim=8, feature_names=["f2"], data_type=DataType.FP16
    )
    model.other = EmbeddingBagCollection(tables=[table], device=torch.device(device))
    private = build(model)
    (half,) = [s for s in private.shards if s.table == "other.h"]
    assert half.weight.dtype == torch.float16
    # Without it an update would be rounded before its noise.
    assert half.low is not None and all(s.low is None for s in private.shards if s is not half)


def test_a_collection_whose_weights_were_halved() -> None:
    model = Small()
    model.pooled.half()
    with pytest.raises(ModelError, match=r"'pooled\.a' .*FP32 and weights of torch.float16"):
        build(model)


def test_a_collection_in_two_places() -> None:
    model = Small()
    model.again = nn.ModuleDict({"inner": model.pooled})
    with pytest.raises(ModelError, match=r"'pooled'.*'again\.inner'.*once and call it twice"):
        build(model)
    assert untouched(model)


def test_a_parent_in_two_places_serves_both() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = self.second = nn.ModuleDict({"pooled": Small().pooled})

    model = Twice()
    (cut,) = build(model).cuts
    assert model.first["pooled"] is model.second["pooled"] is cut


def test_the_state_goes_through_checkpoints_only() -> None:
    _, private = make()
    with pytest.raises(DistDpError, match=r"dist_dp\.checkpoint\.save_checkpoint"):
        private.optimizer.state_dict()
    with pytest.raises(DistDpError, match=r"dist_dp\.checkpoint\.load_checkpoint"):
        private.optimizer.load_state_dict({"state": {}, "param_groups": []})
    assert private.optimizer.dense is not None
    assert private.optimizer.param_groups[1] is private.optimizer.dense.param_groups[0]


@pytest.mark.parametrize("mechanism", ["lazydp", "dpsgd"])
def test_a_settling_cut_short_is_never_forgotten(
    mechanism: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows were marked before they got their noise: whatever settles next must not hide it."""
    model, private = make(mechanism=mechanism)

    def interrupt(*_args: Any, **_options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(kernels.TableSet, "settle", interrupt)
        patched.setattr(kernels, "settle_range", interrupt)
        with pytest.raises(KeyboardInterrupt):
            for step in (1, 2):
                begin(private, step)
                loss(model, data(step)).backward()
                private.optimizer.step()
    assert any(shard.settling for shard in private.shards)
    if mechanism == "lazydp":
        private.optimizer.zero_grad()
        for mode in (model.train, model.eval):
            mode()
            with pytest.raises(ReleaseError, match="cut short"):
                model(*data(2).inputs)
    with pytest.raises(DistDpError, match="cut short"):
        private.settle()


def bad_on_rank_0() -> str:
    model, private = make()
    private.state.begin(1, BATCH, BATCH)
    value = loss(model, data(1 + rank())) * (float("nan") if rank() == 0 else 1.0)
    value.backward()
    try:
        private.optimizer.step()
    except ModelError as error:
        return str(error)
    return "went on"


def test_a_gradient_that_is_not_finite_stops_every_rank() -> None:
    """The rank that saw it must not leave the others waiting for its sums."""
    for found in run_world(bad_on_rank_0, 2):
        assert f"step 1: the gradient of an example is not finite ({BATCH} in all)" in found


class Sometimes(Small):
    """A layer that takes part in some calls only."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(DENSE, 1)
        self.takes_part = True

    def forward(self, dense: Tensor, sparse: KeyedJaggedTensor) -> Tensor:
        out = super().forward(dense, sparse)
        return out + self.extra(dense).squeeze(1) if self.takes_part else out


def sometimes(calls: list[list[bool]], sigma: float = 0.0) -> list[Tensor]:
    """How the layer's weight moves in each step; a step's parts say whether it takes part."""
    torch.manual_seed(1)
    model = Sometimes()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    private = build(model, optimizer=optimizer, clip=1e4, sigma=sigma)
    moves = []
    for step, parts in enumerate(calls, start=1):
        before = model.extra.weight.detach().clone()
        for part, model.takes_part in enumerate(parts):
            last = part == len(parts) - 1
            private.state.begin(step, BATCH, BATCH, part=part, is_last=last)
            loss(model, data(part)).backward()
            private.optimizer.step()
        moves.append(model.extra.weight.detach() - before)
    return moves


def test_a_layer_that_takes_no_part_moves_by_its_noise_alone() -> None:
    """Planted: its sums are left as the last step made them."""
    first, none, again = sometimes([[True], [False], [True]])
    assert first.any() and again.any() and not none.any()
    assert sometimes([[True], [False]], sigma=1e-4)[1].all()


def test_a_layer_may_take_part_in_some_micro_batches() -> None:
    both, late, early, none = (
        sometimes([[True, True], step])[1]
        for step in ([True, True], [False, True], [True, False], [False, False])
    )
    assert late.any() and early.any() and not none.any()
    torch.testing.assert_close(late + early, both, rtol=1e-5, atol=1e-7)
