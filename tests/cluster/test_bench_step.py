"""``dist-dp bench step``: what its JSON holds, that its floor is untouched, and its arithmetic."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_dp.cluster.bench.contenders import Sample
from dist_dp.cluster.bench.field import Field, line_up
from dist_dp.cluster.bench.memory import peak_bytes, reset_peak
from dist_dp.cluster.bench.results import BESIDE, CRITICAL_PHASES, summarise
from dist_dp.cluster.bench.rounds import Measured, Turn, measure
from dist_dp.cluster.bench.settings import LEASE_STEPS, MECHANISMS, StepSettings
from dist_dp.errors import ReleaseError
from dist_dp.timing import PhaseTimer
from tests.cluster.small import run
from tests.dist_dp.worlds import run_world

TINY = StepSettings(
    rows=(50, 7, 300), dim=8, bottom=(12, 8), top=(10, 1), batch=20, pooling=2, records=400,
    rounds=2, steps=2, warmup=1, at_step=30, slow_seconds=60.0,
)  # fmt: skip
OPTIONS = (
    "--tables 3 --rows 400 --dim 8 --batch 20 --pooling 2 --records 400 --rounds 2 --steps 2 "
    "--warmup 1 --release-every 100 --false-positives 3 --kept-rows 50 "
    f"--mechanisms {','.join(MECHANISMS)}"
)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("bench") / "step.json"
    done = run("bench", "step", *OPTIONS.split(), "--json", path)
    assert done.exit_code == 0, done.output + repr(done.exception)
    for name in MECHANISMS:
        assert name in done.stdout
    assert "release, lazydp" in done.stdout and "over 100 steps" in done.stdout
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def test_every_mechanism_has_its_figures(result: dict[str, Any]) -> None:
    assert [r["mechanism"] for r in result["results"]] == list(MECHANISMS)
    for row in result["results"]:
        assert row["step_ms_low"] <= row["step_ms"] <= row["step_ms_high"]
        assert row["ratio_to_none_low"] <= row["ratio_to_none"] <= row["ratio_to_none_high"]
        assert row["examples_per_second"] == pytest.approx(20e3 / row["step_ms"])
        assert set(row["phases_ms"]) == {*CRITICAL_PHASES, *BESIDE}
        assert all(ms >= 0 for ms in row["phases_ms"].values())
        for phase in ("forward", "backward", "embedding_update", "dense_update", "sampling"):
            assert row["phases_ms"][phase] > 0, (row["mechanism"], phase)
        assert row["peak_memory_bytes"] > 4 * 3 * 400 * 8
        assert row["rounds"] == 2 and row["steps_a_round"] == 2


def test_what_privacy_alone_does_takes_no_time_without_it(result: dict[str, Any]) -> None:
    rows = {r["mechanism"]: r for r in result["results"]}
    for phase in ("ledger", "settle", "clip", "noise"):
        assert rows["none"]["phases_ms"][phase] == 0.0
        assert rows["lazydp"]["phases_ms"][phase] > 0
    assert rows["none"]["ratio_to_none"] == 1.0 and rows["none"]["release"] is None


def test_state_and_release_are_stated(result: dict[str, Any]) -> None:
    rows = {r["mechanism"]: r for r in result["results"]}
    history = 4 * 3 * 400
    assert [rows[m]["state_bytes"] for m in MECHANISMS] == [0, history, 0, 0, history, 0, 0, 0]
    release = rows["lazydp"]["release"]
    assert release["spread_over_steps"] == 100
    assert release["ms_a_step"] == pytest.approx(release["settle_ms"] / 100)


def test_settings_and_machine_are_stated(result: dict[str, Any]) -> None:
    settings, machine = result["settings"], result["machine"]
    assert (settings["tables"], settings["rows"], settings["batch"]) == (3, 400, 20)
    assert settings["table_bytes"] == 4 * 8 * 3 * 400 and settings["sharding"] == "table_wise"
    assert machine["cores"] >= 1 and machine["memory_bytes"] > 2**28
    assert machine["torch"] == torch.__version__ and machine["kernels"]


def test_look_ahead_settles_beside_the_backward(tmp_path: Path) -> None:
    path = tmp_path / "step.json"
    options = (*OPTIONS.split(), "--mechanisms", "lazydp", "--no-release", "--look-ahead")
    done = run("bench", "step", *options, "--json", path)
    assert done.exit_code == 0, done.output + repr(done.exception)
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["settings"]["look_ahead"]
    assert found["results"][1]["phases_ms"]["communication"] > 0  # the ids sent ahead


# --- the arithmetic ---


def turns(*steps_ms: list[float], ledger: float = 0.0) -> list[Turn]:
    return [
        Turn(number, [Sample(1e-3 * ms, 20, 20, {"ledger": ledger}) for ms in steps])
        for number, steps in enumerate(steps_ms)
    ]


def test_ratios_are_taken_within_each_round() -> None:
    """A machine that slows down for a while must not move them."""
    none = Measured("none", turns=turns([8, 10, 90], [40, 40, 44], [10, 10, 10]))
    lazy = Measured("lazydp", turns=turns([12.5, 12.5, 12.5], [50, 50, 50], [20, 12.5, 12.5]))
    found = {r["mechanism"]: r for r in summarise([none, lazy], TINY, {})}
    assert found["lazydp"]["ratio_to_none"] == pytest.approx(0.8)
    assert found["lazydp"]["ratio_to_none_low"] == pytest.approx(0.8)
    assert found["lazydp"]["ratio_to_none_high"] == pytest.approx(0.8)
    assert found["none"]["step_ms"] == pytest.approx(10)
    assert found["lazydp"]["step_ms_by_round"] == pytest.approx({"0": 12.5, "1": 50, "2": 12.5})


def test_a_slow_mechanism_is_compared_in_the_rounds_it_took_part_in() -> None:
    none = Measured("none", turns=turns([10], [20], [500]))
    slow = Measured("dpsgd", turns=turns([100], [200]))
    found = summarise([none, slow], TINY, {})[1]
    assert found["ratio_to_none_low"] == found["ratio_to_none_high"] == pytest.approx(0.1)


def test_lazydp_is_compared_with_each_of_the_others_too() -> None:
    none = Measured("none", turns=turns([10], [20], [500]))
    lazy = Measured("lazydp", turns=turns([20], [25], [500]))
    slow = Measured("dpsgd", turns=turns([100], [200]))
    speedups = [r["lazydp_speedup"] for r in summarise([none, lazy, slow], TINY, {})]
    assert speedups == pytest.approx([0.8, 1.0, 6.5])


def test_a_lease_is_spread_over_the_steps_it_covers() -> None:
    none = Measured("none", turns=turns([10.0]))
    lazy = Measured("lazydp", turns=turns([10.0 + 25, 10.0 + 25], ledger=25.0), leases_ms=[25, 25])
    found = summarise([none, lazy], TINY, {})[1]
    assert found["step_ms"] == pytest.approx(10 + 25 / LEASE_STEPS)
    assert found["phases_ms"]["ledger"] == pytest.approx(25 / LEASE_STEPS)


@dataclass
class Logged:
    """A contender whose steps take as long as they say, noted in a log shared with others."""

    name: str
    seconds: float
    log: list[str]
    timer: PhaseTimer = field(default_factory=PhaseTimer)
    state_bytes: int = 0

    def activate(self) -> None:
        self.log.append(f"{self.name}:")

    def step(self) -> Sample:
        self.log.append(self.name)
        return Sample(self.seconds, 1, 1, {"ledger": 0.0})

    def close(self) -> None:
        pass


def test_turns_rotate_and_slow_ones_take_fewer_steps() -> None:
    log: list[str] = []
    settings = TINY.changed(rounds=4, steps=2, warmup=1, slow_seconds=1.0)
    contenders = [Logged("a", 0.1, log), Logged("b", 0.1, log), Logged("c", 2.0, log)]
    contenders.append(Logged("d", 9.0, log))
    found = measure(contenders, settings, lambda _: log.clear() if "round 1" in _ else None)
    assert [(m.rounds, m.steps, m.warmup) for m in found] == [(4, 2, 1)] * 2 + [
        (3, 1, 0),
        (2, 1, 0),
    ]
    assert [len(m.turns) for m in found] == [4, 4, 3, 2]
    assert [len(t.samples) for t in found[0].turns] == [2, 2, 2, 2]


def test_the_order_of_turns() -> None:
    said: list[str] = []
    log: list[str] = []
    contenders = [Logged(name, 0.1, log) for name in "abc"]
    measure(contenders, TINY.changed(rounds=3, slow_seconds=1.0), said.append)
    order = [s.partition(": ")[2] for s in said if s.startswith("round")]
    assert order == list("abcbcacab")


def test_peak_memory_sees_what_was_freed_and_forgets_it_when_reset() -> None:
    if not reset_peak():
        pytest.skip("this system cannot reset the high-water mark")
    start = peak_bytes()
    block = torch.ones(25_000_000)
    del block
    assert peak_bytes() - start > 90e6
    assert reset_peak() and peak_bytes() - start < 50e6


# --- the contenders ---


@pytest.fixture(scope="module")
def lined_up(tmp_path_factory: pytest.TempPathFactory) -> Field:
    from dist_dp.distributed import ensure_process_group

    ensure_process_group()
    return line_up(TINY, tmp_path_factory.mktemp("field"))


def test_nothing_of_ours_takes_part_in_a_plain_step(lined_up: Field) -> None:
    plain, lazy = lined_up.contenders[:2]
    parts = lined_up.engine.parts
    # The one that would settle rows is still in the optimizer.
    lazy.activate()
    assert lazy.name == "lazydp" and parts.mechanism.schedule.step == TINY.at_step
    plain.activate()
    history = [s.last_step.clone() for s in parts.shards]
    dense = {n: p.detach().clone() for n, p in parts.recorder.parameters.items()}
    tables = [s.weight.clone() for s in parts.shards]
    plain.step()
    assert not parts.recorder.has_calls and parts.cuts[0].batch is None
    assert all(torch.equal(a, s.last_step) for a, s in zip(history, parts.shards, strict=True))
    assert all(torch.equal(a, parts.recorder.parameters[n]) for n, a in dense.items())
    assert any(not torch.equal(a, s.weight) for a, s in zip(tables, parts.shards, strict=True))


def test_private_steps_are_charged_and_counted(lined_up: Field) -> None:
    for contender in lined_up.contenders[1:]:
        contender.activate()
        mechanism = lined_up.engine.parts.optimizer.mechanism
        assert mechanism.name == contender.name and mechanism.schedule.step >= TINY.at_step
        before = mechanism.schedule.step
        contender.step()
        contender.step()
        assert mechanism.schedule.step == before + 2
        charged = lined_up.engine.accountant.run_steps(f"bench-{contender.name}")
        assert charged >= mechanism.schedule.step - TINY.at_step


def test_every_contender_draws_the_same_batches(tmp_path: Path) -> None:
    field_ = line_up(TINY.changed(mechanisms=("lazydp", "eana")), tmp_path)
    counts = []
    for contender in field_.contenders:
        contender.activate()
        counts.append([contender.step().examples for _ in range(4)])
    field_.close()
    assert counts[0] == counts[1] == counts[2] and len(set(counts[0])) > 1


def test_what_a_comparison_trained_cannot_be_released(lined_up: Field, tmp_path: Path) -> None:
    eana = next(c for c in lined_up.contenders if c.name == "eana")
    eana.activate()
    with pytest.raises(ReleaseError, match="eana"):
        lined_up.engine.release(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


# --- the floor ---


def plain_run(steps: int) -> dict[str, Any]:
    """Plain steps, and the same steps by PyTorch alone on whole tables; on every rank."""
    import tempfile

    from dist_dp.distributed import rank, world_size

    settings = TINY.changed(mechanisms=("none",), workers=world_size(), sharding="row_wise")
    with tempfile.TemporaryDirectory() as folder:
        found = line_up(settings, Path(folder))
        plain: Any = found.contenders[0]
        shards = found.engine.parts.shards
        start = {s.table: (s.row_offset, s.weight.clone()) for s in shards}
        dense = [p.detach().clone() for p in plain._dense]
        plain.activate()
        batches = []
        kept = plain._batches

        def noting() -> Any:
            for batch in kept:
                batches.append(batch)
                yield batch

        plain._batches = noting()
        sizes = [plain.step().examples for _ in range(steps)]
        end = {s.table: (s.row_offset, s.weight.clone()) for s in shards}
        kept.close()
    return {
        "rank": rank(),
        "start": start,
        "end": end,
        "dense_start": dense,
        "dense_end": [p.detach().clone() for p in plain._dense],
        "batches": [
            (b.dense_features, b.sparse_features.values(), b.sparse_features.lengths(), b.labels)
            for b in batches
        ],
        "sizes": sizes,
    }


def reference(ranks: list[dict[str, Any]]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The same steps with embedding_bag on whole tables and one optimizer."""
    from dist_dp.cluster.bench.contenders import LEARNING_RATE
    from dist_dp.cluster.bench.model import build_models, dense_parameters

    names = [f"dlrm.sparse_arch.embedding_bag_collection.t{i}" for i in range(len(TINY.rows))]
    tables = [whole(ranks, "start", n) for n in names]
    for table in tables:
        table.requires_grad_()
    _, twin = build_models(TINY)
    dense = dense_parameters(twin)
    with torch.no_grad():
        for parameter, value in zip(dense, ranks[0]["dense_start"], strict=True):
            parameter.copy_(value)
    sgd = torch.optim.SGD([*dense, *tables], lr=LEARNING_RATE)
    for step in range(len(ranks[0]["batches"])):
        losses = []
        for found in ranks:
            features, values, lengths, labels = found["batches"][step]
            size = len(labels)
            bags, start = [], 0
            for table, counts in zip(tables, lengths.split(size), strict=True):
                ids = values[start : start + int(counts.sum())]
                start += len(ids)
                offsets = torch.cumsum(counts, 0) - counts
                bags.append(
                    torch.nn.functional.embedding_bag(ids, table, offsets.long(), mode="sum")
                )
            hidden = twin.dlrm.dense_arch(features)
            crossed = twin.dlrm.inter_arch(hidden, torch.stack(bags, 1))
            logits = twin.dlrm.over_arch(crossed).squeeze(1)
            losses.append(torch.nn.functional.binary_cross_entropy_with_logits(logits, labels))
        sgd.zero_grad()
        torch.stack(losses).mean().backward()
        sgd.step()
    return [p.detach() for p in dense], [t.detach() for t in tables]


def whole(ranks: list[dict[str, Any]], when: str, table: str) -> torch.Tensor:
    pieces = sorted((r[when][table] for r in ranks), key=lambda piece: piece[0])
    return torch.cat([weight for _, weight in pieces])


@pytest.mark.parametrize("workers", [1, 2])
def test_the_floor_is_ordinary_training(workers: int) -> None:
    """Plain TorchRec on shards takes the steps that PyTorch alone takes on whole tables."""
    ranks = run_world(plain_run, workers, 4)
    dense, tables = reference(ranks)
    for found in ranks:
        for mine, theirs in zip(found["dense_end"], dense, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    for i, table in enumerate(tables):
        name = f"dlrm.sparse_arch.embedding_bag_collection.t{i}"
        torch.testing.assert_close(whole(ranks, "end", name), table, rtol=1e-6, atol=1e-7)
        moved = (whole(ranks, "end", name) - whole(ranks, "start", name)).abs().max()
        assert moved > 1e-5, "the steps were too small to tell"
    if workers == 2:
        assert any(a != b for a, b in zip(ranks[0]["sizes"], ranks[1]["sizes"], strict=True))


@pytest.mark.slow
def test_two_workers_measure_together(tmp_path: Path) -> None:
    path = tmp_path / "two.json"
    options = ["--workers", "2", "--mechanisms", "lazydp,eana", "--json", path]
    done = run("bench", "step", *OPTIONS.split(), *options)
    assert done.exit_code == 0, done.output + repr(done.exception)
    found = json.loads(path.read_text(encoding="utf-8"))
    rows = {r["mechanism"]: r for r in found["results"]}
    assert found["settings"]["sharding"] == "row_wise" and found["settings"]["workers"] == 2
    assert rows["lazydp"]["state_bytes"] == 4 * 3 * 400, "over both workers"
    for row in rows.values():
        assert row["phases_ms"]["communication"] > 0
        assert row["examples_a_step"] < row["padded_examples_a_step"] + 1
