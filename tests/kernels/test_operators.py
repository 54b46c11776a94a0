"""The kernels inside torch.compile, under fake tensors and beside autograd."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dist_dp import kernels
from dist_dp.kernels.operators import key_tensor

KEY = kernels.derive_key(bytes(32), "noise", "table")
ROWS = torch.tensor([4, 0, 7])
STEPS = torch.zeros(3, dtype=torch.int32)
DECAY, SCALE = torch.full((3,), 0.5), torch.tensor([1.0, 0.25, 3.0], dtype=torch.float64)


def expected(weight: torch.Tensor, to_step: int = 3) -> torch.Tensor:
    copy = weight.detach().clone()
    kernels.settle_rows(
        copy, ROWS, key=KEY, from_steps=STEPS, to_step=to_step, decay=DECAY, scale=SCALE
    )
    return copy


@pytest.mark.parametrize("name", ["settle_rows", "settle_range", "normal"])
def test_opcheck(name: str) -> None:
    """torch's own checks: schema, aliasing, fake kernel, autograd registration."""
    key = key_tensor(KEY)
    weight = torch.randn(3, 20)
    arguments = {
        "settle_rows": (weight, torch.tensor([2, 0, 1]), key, STEPS, DECAY, SCALE, 3),
        "settle_range": (weight, key, STEPS, DECAY, SCALE, 3),
        "normal": (key, ROWS, STEPS, 3, 5, 20),
    }[name]
    torch.library.opcheck(getattr(torch.ops.dist_dp, name), arguments)


def test_compiled_graph_gives_the_same_numbers() -> None:
    """One graph, no break; several steps without one compilation each."""
    compiled = 0

    def count(graph: torch.fx.GraphModule, _inputs: object) -> object:
        nonlocal compiled
        compiled += 1
        return graph.forward

    @torch.compile(backend=count, fullgraph=True)
    def step(weight: torch.Tensor, key: torch.Tensor, to_step: int) -> torch.Tensor:
        torch.ops.dist_dp.settle_rows(weight, ROWS, key, STEPS, DECAY, SCALE, to_step)
        return weight.sum(1)

    key = key_tensor(KEY)
    for to_step in (3, 4, 5, 6, 7):
        weight = torch.randn(9, 20)
        wanted = expected(weight, to_step)
        sums = step(weight, key, to_step)
        assert torch.equal(weight, wanted)
        assert torch.equal(sums, wanted.sum(1))
    assert compiled <= 2  # once, and once more when the step turns out to change


def test_functionalised_backend() -> None:
    """aot_eager rewrites updates in place; the caller's tensor must still change."""

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(weight: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        before = weight.clone()
        torch.ops.dist_dp.settle_rows(weight, ROWS, key, STEPS, DECAY, SCALE, 3)
        return weight - before

    weight = torch.randn(9, 20)
    wanted, before = expected(weight), weight.clone()
    change = step(weight, key_tensor(KEY))
    assert torch.equal(weight, wanted)
    assert torch.equal(change, wanted - before)


def test_the_plain_functions_leave_the_graph() -> None:
    """The key given as bytes must not become a constant of compiled code."""
    seen: list[str] = []

    def look(graph: torch.fx.GraphModule, _inputs: object) -> object:
        seen.append(graph.code)
        return graph.forward

    @torch.compile(backend=look)
    def step(weight: torch.Tensor) -> torch.Tensor:
        doubled = weight * 2
        kernels.settle_rows(
            doubled, ROWS, key=KEY, from_steps=STEPS, to_step=3, decay=DECAY, scale=SCALE
        )
        return doubled + 1

    weight = torch.randn(9, 20)
    assert torch.equal(step(weight), expected(weight * 2) + 1)
    assert seen and not any("settle" in code for code in seen)


def test_fake_tensors() -> None:
    with FakeTensorMode():
        weight = torch.empty(9, 20)
        key = torch.empty(32, dtype=torch.uint8)
        rows, steps, ones = torch.empty(3).long(), torch.empty(3).int(), torch.empty(3)
        torch.ops.dist_dp.settle_rows(weight, rows, key, steps, ones, ones, 3)
        made = torch.ops.dist_dp.normal(key, rows, steps, 3, 0, 20)
    assert made.shape == (3, 20) and made.dtype == torch.float32


def test_autograd_notices_the_update() -> None:
    for update in (
        lambda w: torch.ops.dist_dp.settle_rows(w, ROWS, key_tensor(KEY), STEPS, DECAY, SCALE, 3),
        lambda w: kernels.settle_rows(
            w, ROWS, key=KEY, from_steps=STEPS, to_step=3, decay=DECAY, scale=SCALE
        ),
    ):
        weight = torch.randn(9, 20, requires_grad=True)
        loss = (weight * weight).sum()
        with torch.no_grad():
            update(weight)
        with pytest.raises(RuntimeError, match="inplace"):
            loss.backward()


def test_refusals() -> None:
    with pytest.raises(ValueError, match="key: uint8"):
        torch.ops.dist_dp.normal(torch.zeros(16, dtype=torch.uint8), ROWS, STEPS, 3, 0, 20)
    with pytest.raises(ValueError, match="rows: row 4 occurs"):
        torch.ops.dist_dp.settle_rows(
            torch.zeros(9, 2), torch.tensor([4, 0, 4]), key_tensor(KEY), STEPS, DECAY, SCALE, 3
        )
