"""Updates in place: values, placement, refusals."""

from __future__ import annotations

import math

import pytest
import torch

from dist_dp import kernels

KEY = kernels.derive_key(bytes(32), "noise", "table")
ROWS, COLUMNS = 300, 37


@pytest.fixture
def table() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        "weight": torch.randn(ROWS, COLUMNS, generator=generator),
        "from_steps": torch.randint(0, 9, (ROWS,), generator=generator, dtype=torch.int32),
        "decay": torch.rand(ROWS, generator=generator, dtype=torch.float64),
        "scale": torch.rand(ROWS, generator=generator, dtype=torch.float64),
    }


def settled(table: dict[str, torch.Tensor]) -> torch.Tensor:
    """The definition, one operation after the other, in float32."""
    z = kernels.normal(KEY, torch.arange(ROWS), table["from_steps"], 9, num_columns=COLUMNS)
    scale = table["scale"].float()
    low = scale.double() < table["scale"]
    scale[low] = torch.nextafter(scale[low], torch.tensor(math.inf))
    return table["weight"] * table["decay"].float()[:, None] + z * scale[:, None]


def test_range_equals_definition(table: dict[str, torch.Tensor]) -> None:
    weight = table["weight"].clone()
    address = weight.data_ptr()
    kernels.settle_range(weight, key=KEY, **rest(table), to_step=9)
    assert torch.equal(weight, settled(table))
    assert weight.data_ptr() == address


def rest(table: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: table[name] for name in ("from_steps", "decay", "scale")}


def test_rows_in_any_order_equal_range(table: dict[str, torch.Tensor]) -> None:
    weight = table["weight"].clone()
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(6))
    for part in order.split(7):
        arguments = {name: value[part] for name, value in rest(table).items()}
        kernels.settle_rows(weight, part.int(), key=KEY, to_step=9, **arguments)
    assert torch.equal(weight, settled(table))


def test_shards_at_unaligned_offsets(table: dict[str, torch.Tensor]) -> None:
    weight = table["weight"].clone()
    for first_row, last_row in ((0, 1), (1, 130), (130, ROWS)):
        for first, last in ((0, 5), (5, 6), (6, 23), (23, COLUMNS)):
            shard = weight[first_row:last_row, first:last]  # strided
            arguments = {name: v[first_row:last_row] for name, v in rest(table).items()}
            kernels.settle_range(
                shard, key=KEY, row_offset=first_row, column_offset=first, to_step=9, **arguments
            )
    assert torch.equal(weight, settled(table))


def test_ranges_and_chunks(table: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dist_dp.kernels.reference._CHUNK", 5 * COLUMNS)
    weight = table["weight"].clone()
    kernels.settle_range(weight, key=KEY, **rest(table), to_step=9, last_row=113)
    short = {name: v[113:] for name, v in rest(table).items()}
    kernels.settle_range(weight, key=KEY, **short, to_step=9, first_row=113)
    assert torch.equal(weight, settled(table))
    listed = table["weight"].clone()
    kernels.settle_rows(listed, torch.arange(ROWS), key=KEY, **rest(table), to_step=9)
    assert torch.equal(listed, weight)


def test_independent_of_threads(table: dict[str, torch.Tensor]) -> None:
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            weight = table["weight"].clone()
            kernels.settle_range(weight, key=KEY, **rest(table), to_step=9)
            assert torch.equal(weight, settled(table))
    finally:
        torch.set_num_threads(before)


def test_numbers_for_all_rows(table: dict[str, torch.Tensor]) -> None:
    weight = table["weight"].clone()
    kernels.settle_range(weight, key=KEY, from_steps=8, to_step=9, decay=0.5, scale=2.0)
    z = kernels.normal(KEY, torch.arange(ROWS), 8, 9, num_columns=COLUMNS)
    assert torch.equal(weight, table["weight"] * 0.5 + z * 2.0)


def test_rows_without_noise_draw_nothing(table: dict[str, torch.Tensor]) -> None:
    table["from_steps"][::3] = 9
    table["scale"][::3] = 0.0
    expected = settled(table | {"from_steps": table["from_steps"].clamp(max=8)})
    weight = table["weight"].clone()
    kernels.settle_range(weight, key=KEY, **rest(table), to_step=9)
    assert torch.equal(weight, expected)


def test_scale_is_never_rounded_down() -> None:
    weight = torch.zeros(1, 8)
    scale = 1.0 + 2.0**-40
    kernels.settle_range(weight, key=KEY, from_steps=0, to_step=1, decay=1.0, scale=scale)
    z = kernels.normal(KEY, torch.tensor([0]), 0, 1, num_columns=8)
    assert torch.equal(weight, z * (1.0 + 2.0**-23))


def test_empty_and_parameters() -> None:
    none = torch.empty(0, dtype=torch.int64)
    weight = torch.nn.Parameter(torch.ones(4, 3))
    kernels.settle_rows(weight, none, key=KEY, from_steps=none, to_step=1, decay=1.0, scale=1.0)
    assert torch.equal(weight, torch.ones(4, 3))
    kernels.settle_range(
        torch.empty(0, 3), key=KEY, from_steps=none, to_step=1, decay=1.0, scale=1.0
    )
    kernels.settle_rows(weight, torch.tensor([2]), key=KEY, from_steps=0, to_step=1, decay=1.0,
                        scale=1.0)  # fmt: skip
    assert (weight[2] != 1).all() and (weight[[0, 1, 3]] == 1).all()


def test_autograd_notices_the_update() -> None:
    weight = torch.ones(4, 3, requires_grad=True)
    loss = (weight * weight).sum()
    kernels.settle_range(weight, key=KEY, from_steps=0, to_step=1, decay=1.0, scale=1.0)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


def test_add_normal() -> None:
    for shape in ((), (7,), (300, 1000), (3, 5, 2)):
        tensor = torch.ones(shape)
        kernels.add_normal(tensor, key=KEY, from_step=2, to_step=3, scale=0.5)
        assert torch.equal(tensor, 1.0 + kernels.normal_like(KEY, shape, 2, 3) * 0.5)
    strided = torch.ones(40, 30).t()
    kernels.add_normal(strided, key=KEY, from_step=2, to_step=3, scale=0.5)
    assert torch.equal(strided, 1.0 + kernels.normal_like(KEY, (30, 40), 2, 3) * 0.5)
    kernels.add_normal(strided, key=KEY, from_step=3, to_step=3, scale=0.0)
    with pytest.raises(ValueError, match="scale"):
        kernels.add_normal(strided, key=KEY, from_step=2, to_step=3, scale=-1.0)
    with pytest.raises(TypeError, match="tensor"):
        kernels.add_normal(strided.double(), key=KEY, from_step=2, to_step=3, scale=1.0)


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, "rows: row 1 occurs", {"rows": torch.tensor([1, 0, 1])}),
        (IndexError, "rows: row 4", {"rows": torch.tensor([0, 4, 1])}),
        (IndexError, "rows: row -1", {"rows": torch.tensor([0, -1, 1])}),
        (ValueError, "decay: shape", {"decay": torch.ones(4)}),
        (ValueError, "scale: shape", {"scale": torch.ones(3, 1)}),
        (TypeError, "scale: dtype", {"scale": torch.ones(3, dtype=torch.int64)}),
        (TypeError, "scale: a number", {"scale": "1"}),
        (ValueError, "scale: nan", {"scale": torch.tensor([1.0, math.nan, 1.0])}),
        (ValueError, "scale: -1", {"scale": torch.tensor([1.0, -1.0, 1.0])}),
        (ValueError, "scale: -1", {"scale": -1.0}),
        (ValueError, "scale: nan", {"scale": math.nan}),
        (ValueError, "decay: nan", {"decay": torch.tensor([1.0, math.nan, 1.0])}),
        (ValueError, "scale: not finite", {"scale": torch.tensor([1.0, math.inf, 1.0])}),
        (ValueError, "scale: not finite", {"scale": torch.full((3,), 1e39, dtype=torch.float64)}),
        (ValueError, "from_steps: step 6", {"from_steps": torch.tensor([0, 6, 0])}),
        (ValueError, "from_steps: noise", {"from_steps": torch.tensor([0, 5, 0])}),
        (ValueError, "from_steps: 3 entries", {"from_steps": torch.tensor([0])}),
        (ValueError, "row_offset", {"row_offset": 2**48 - 3}),
        (ValueError, "column_offset", {"column_offset": 16 * 2**13 - 1}),
        (TypeError, "weight: dtype", {"weight": torch.ones(4, 2, dtype=torch.float64)}),
        (ValueError, "weight: two", {"weight": torch.ones(4)}),
        (ValueError, "weight: elements of this view", {"weight": torch.ones(1, 2).expand(4, 2)}),
        (TypeError, "weight: a strided", {"weight": torch.ones(4, 2).to_sparse()}),
        (TypeError, "weight: a tensor", {"weight": None}),
    ],
)
def test_refusals(error: type[Exception], message: str, change: dict[str, object]) -> None:
    weight = torch.ones(4, 2)
    arguments: dict[str, object] = {
        "weight": weight, "rows": torch.tensor([2, 0, 1]), "key": KEY, "to_step": 5,
        "from_steps": torch.zeros(3, dtype=torch.int32), "decay": torch.ones(3),
        "scale": torch.ones(3),
    }  # fmt: skip
    with pytest.raises(error, match=message):
        kernels.settle_rows(**(arguments | change))  # type: ignore[arg-type]
    assert torch.equal(weight, torch.ones(4, 2))


def test_range_refusals() -> None:
    weight = torch.ones(4, 2)
    for change, argument in (
        ({"first_row": 3, "last_row": 2}, "first_row"),
        ({"last_row": 5}, "last_row"),
        ({"scale": torch.ones(3)}, "scale"),
        ({"key": b""}, "key"),
    ):
        arguments = {"key": KEY, "from_steps": 0, "to_step": 1, "decay": 1.0, "scale": 1.0}
        with pytest.raises(ValueError, match=argument):
            kernels.settle_range(weight, **(arguments | change))  # type: ignore[arg-type]
    assert torch.equal(weight, torch.ones(4, 2))


@pytest.mark.gpu
def test_same_bits_on_a_gpu(table: dict[str, torch.Tensor]) -> None:
    on_device = {name: value.cuda() for name, value in table.items()}
    kernels.settle_range(on_device["weight"], key=KEY, **rest(on_device), to_step=9)
    assert torch.equal(on_device["weight"].cpu(), settled(table))
    rows = torch.arange(0, ROWS, 2, device="cuda")
    arguments = {name: value[rows] for name, value in rest(on_device).items()}
    weight = table["weight"].cuda()
    kernels.settle_rows(weight, rows, key=KEY, to_step=9, **arguments)
    assert torch.equal(weight.cpu()[::2], settled(table)[::2])
    with pytest.raises(ValueError, match="rows: is on cpu"):
        kernels.settle_rows(weight, rows.cpu(), key=KEY, to_step=9, **arguments)
