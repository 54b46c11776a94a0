"""The Triton kernels against the reference, bit for bit.

Without a GPU they run under Triton's interpreter, whose fused multiply-add is corrected here: it
rounds twice, a processor's once. What a GPU would get is at least compiled and looked at. On a
GPU the same comparisons are made with `pytest -m gpu`; there, too, equal bits are expected.
"""

from __future__ import annotations

import importlib.util
import pickle
import re
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

import numpy as np
import pytest
import torch

from dist_dp.kernels import chacha, gpu, reference
from dist_dp.kernels.request import Update

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)

KEY = bytes(range(7, 39))
HALVES = (torch.bfloat16, torch.float16)
# Of the blocks of column 0 from step 0 to 1 with 8 rounds under KEY, the first 2^22 rows: the one
# with the smallest word that makes a length (56), and the one with the largest (2^32 - 5).
FARTHEST_ROW, NEAREST_ROW = 1091368, 2700622

Twin = Callable[..., Any]


# --- where the kernels run ---------------------------------------------------------------------


def correct_interpreter() -> None:
    """A fused multiply-add rounds once."""
    from triton.runtime import interpreter

    from dist_dp.kernels.portable import fma

    def fused(self: Any, x: Any, y: Any, z: Any) -> Any:
        data = fma(*np.broadcast_arrays(x.data, y.data, z.data))
        return interpreter.TensorHandle(data, z.dtype.scalar)

    interpreter.InterpreterBuilder.create_fma = fused


def leave_as_it_is() -> None:
    pass


def call(packed: bytes) -> bytes:
    function, arguments = pickle.loads(packed)
    return pickle.dumps(function("cpu", *arguments))


@contextmanager
def in_process(start: Callable[[], None], **environment: str) -> Iterator[Twin]:
    """A new process with variables that Triton reads once, when it is imported."""
    spawn = get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=start) as pool:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            pool.submit(leave_as_it_is).result()
        # as bytes: torch would otherwise hand tensors over in shared memory
        yield lambda function, *arguments: pickle.loads(
            pool.submit(call, pickle.dumps((function, arguments))).result()
        )


@pytest.fixture(scope="module", params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def twin(request: pytest.FixtureRequest) -> Iterator[Twin]:
    """Calls a function of this module with a device and arguments where the kernels can run."""
    if request.param == "interpreter":
        with in_process(correct_interpreter, TRITON_INTERPRET="1") as twin:
            yield twin
    else:
        assert gpu.why_not(torch.device("cuda")) is None
        yield lambda function, *arguments: function("cuda", *arguments)


def words(device: str, counters: torch.Tensor, rounds: int) -> torch.Tensor:
    return gpu.blocks(KEY, counters.to(device), rounds).cpu()


def normals(device: str, rows: torch.Tensor, steps: torch.Tensor, *arguments: int) -> torch.Tensor:
    return gpu.normals(KEY, rows.to(device), steps.to(device), *arguments).cpu()


def memory_of(weight: torch.Tensor) -> torch.Tensor:
    """All the memory that a view belongs to, also between and around its rows."""
    return weight.as_strided((weight.untyped_storage().nbytes() // weight.itemsize,), (1,), 0)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def settled(
    device: str, update: Update, settle: Callable[[Update], None] = gpu.settle
) -> torch.Tensor:
    """The bits of all of the weight's memory after an update of a copy on `device`."""
    moved: dict[str, Any] = {
        name: value.to(device)
        for name, value in vars(update).items()
        if isinstance(value, torch.Tensor)
    }
    weight, memory = update.weight, memory_of(update.weight).to(device, copy=True)
    moved["weight"] = memory.as_strided(weight.shape, weight.stride(), weight.storage_offset())
    settle(replace(update, **moved))
    return bits(memory.cpu())


# --- words and normals -------------------------------------------------------------------------


@pytest.mark.parametrize("rounds", chacha.ROUNDS)
def test_words(twin: Twin, rounds: int) -> None:
    counters = np.random.default_rng(3).integers(0, 2**32, (4, 1500), dtype=np.uint32)
    expected = chacha.blocks(KEY, counters, rounds).view(np.int32)
    for given in (counters.astype(np.int64), counters.view(np.int32)):
        assert np.array_equal(twin(words, torch.from_numpy(given), rounds).numpy(), expected)


def test_no_words(twin: Twin) -> None:
    assert twin(words, torch.empty((4, 0), dtype=torch.int64), 20).shape == (16, 0)


def assert_normals(twin: Twin, rows: torch.Tensor, steps: torch.Tensor, *arguments: int) -> None:
    expected = reference.normals(KEY, rows.long().numpy(), steps.long().numpy(), *arguments)
    made = twin(normals, rows, steps, *arguments).numpy()
    assert made.dtype == np.float32 and made.shape == expected.shape
    assert np.array_equal(made.view(np.int32), expected.view(np.int32))


@pytest.mark.parametrize(
    ("offset", "columns"), [(0, 1), (3, 5), (16, 16), (5, 37), (11, 130), (2**17 - 9, 9)]
)
def test_normals_at_any_columns(twin: Twin, offset: int, columns: int) -> None:
    rows = torch.from_numpy(np.random.default_rng(4).integers(0, 2**48, 70))
    rows[0], rows[1] = 0, 2**48 - 1
    steps = torch.arange(70, dtype=torch.int32) % 5
    assert_normals(twin, rows, steps, 2**31 - 1, offset, columns, 12)


def test_normals_of_small_types_and_one_step(twin: Twin) -> None:
    rows = torch.arange(90, dtype=torch.int32)[::3]
    assert_normals(twin, rows, torch.tensor([2**31 - 2]).expand(30), 2**31 - 1, 0, 20, 8)


def test_normals_of_far_tails(twin: Twin) -> None:
    """Words below 2^20 take 32 bits more; about one in 512 blocks has one."""
    rows = torch.arange(4096)
    rows[100], rows[200] = FARTHEST_ROW, NEAREST_ROW
    steps = torch.zeros(4096, dtype=torch.int64)
    counters = reference.inputs(rows.numpy(), 0, 1, steps.numpy(), 1)
    lengths = chacha.blocks(KEY, counters, 8)[0::2]
    assert (lengths < 1 << 20).sum() >= 5
    assert lengths[:, 100].min() == 56 and lengths[:, 200].max() == 2**32 - 5
    assert_normals(twin, rows, steps, 1, 0, 16, 8)


def test_no_normals(twin: Twin) -> None:
    none, one = torch.empty(0, dtype=torch.int64), torch.ones(1, dtype=torch.int64)
    assert twin(normals, none, none, 1, 0, 16, 20).shape == (0, 16)
    assert twin(normals, one, one, 2, 0, 0, 20).shape == (1, 0)


def test_uncorrected_interpreter() -> None:
    """What the module's docstring says of an interpreter that rounds twice."""
    rows = torch.arange(2**40, 2**40 + 1000)
    steps = torch.zeros_like(rows)
    expected = reference.normals(KEY, rows.numpy(), steps.numpy(), 1, 0, 16, 8).view(np.int32)
    with in_process(leave_as_it_is, TRITON_INTERPRET="1") as twin:
        made = twin(normals, rows, steps, 1, 0, 16, 8).numpy().view(np.int32)
        assert 0 < np.abs(made - expected).max() <= 3


# --- updates -----------------------------------------------------------------------------------


def make_update(
    columns: int = 37, *, dtype: torch.dtype = torch.float32, listed: bool = True, **other: Any
) -> Update:
    """A random update of 200 rows out of 240, some of them without noise, with strided rows."""
    generator = torch.Generator().manual_seed(columns)
    memory = torch.randn(241, columns + 3, generator=generator).to(dtype)
    scale = torch.rand(200, generator=generator, dtype=torch.float64)
    scale[::9] = 0.0
    made = Update(
        weight=memory[1:, 2 : 2 + columns],
        rows=torch.randperm(240, generator=generator)[:200] if listed else None,
        first_row=0 if listed else 17,
        count=200,
        key=KEY,
        row_offset=2**40,
        column_offset=5,
        from_steps=torch.randint(0, 9, (200,), generator=generator, dtype=torch.int32),
        to_step=9,
        decay=torch.rand(200, generator=generator, dtype=torch.float64),
        scale=scale,
        rounds=8,
        stochastic=False,
        grid=0.0,
    )
    return replace(made, **other)


def assert_settles(twin: Twin, update: Update) -> None:
    expected = settled("cpu", update, reference.settle)
    assert torch.equal(twin(settled, update), expected)
    assert not torch.equal(expected, bits(memory_of(update.weight)))


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize(
    ("dtype", "other"),
    [
        (torch.float32, {}),
        (torch.float32, {"rounds": 20}),
        (torch.float32, {"grid": 2.0**-10}),
        (torch.bfloat16, {"stochastic": False}),
        (torch.bfloat16, {"stochastic": True}),
        (torch.float16, {"stochastic": False}),
        (torch.float16, {"stochastic": True}),
    ],
)
def test_settle(twin: Twin, dtype: torch.dtype, listed: bool, other: dict[str, Any]) -> None:
    assert_settles(twin, make_update(dtype=dtype, listed=listed, **other))


@pytest.mark.parametrize(
    ("offset", "columns"), [(0, 1), (0, 5), (32, 16), (0, 64), (7, 130), (2**17 - 37, 37)]
)
def test_settle_any_columns(twin: Twin, offset: int, columns: int) -> None:
    assert_settles(twin, make_update(columns, column_offset=offset))


def test_settle_aligned_rows(twin: Twin) -> None:
    """Nothing in the way of wide accesses."""
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.randn(240, 64).to(dtype)
        assert_settles(twin, make_update(64, weight=weight, column_offset=0, stochastic=True))


def test_settle_strided_columns(twin: Twin) -> None:
    for dtype in (torch.float32, torch.float16):
        update = make_update(weight=torch.randn(37, 500).to(dtype).T[::2])
        assert update.weight.stride() == (2, 500)
        assert_settles(twin, update)


def test_settle_small_types_and_one_number_for_all(twin: Twin) -> None:
    update = make_update(decay=torch.tensor([0.5]).expand(200))
    assert update.rows is not None
    update = replace(
        update,
        rows=torch.stack([update.rows.int()] * 2, 1)[:, 0],
        from_steps=torch.tensor([3]).expand(200),
        scale=torch.tensor([0.1], dtype=torch.float64).expand(200),
    )
    assert update.rows is not None and update.rows.stride() == (2,)
    assert_settles(twin, update)


def test_scale_goes_up(twin: Twin) -> None:
    """A scale between two float32 numbers becomes the larger one."""
    scale = torch.full((200,), 1.0 + 2.0**-40, dtype=torch.float64)
    weight = torch.zeros(240, 37)
    made = twin(settled, make_update(weight=weight, scale=scale, listed=False))
    larger = torch.full((200,), 1.0 + 2.0**-23)
    assert torch.equal(made, twin(settled, make_update(weight=weight, scale=larger, listed=False)))


@pytest.mark.parametrize(
    ("dtype", "grid"), [(torch.float32, 0.0), (torch.float32, 0.5), (torch.bfloat16, 0.0)]
)
def test_without_noise_rows_only_decay(twin: Twin, dtype: torch.dtype, grid: float) -> None:
    """Also -0, which adding a zero would turn into 0, and halves: to nearest, not at random."""
    weight = torch.randn(240, 37).to(dtype)
    weight[:, ::5] = -0.0
    scale = torch.zeros(200)
    assert_settles(twin, make_update(weight=weight, scale=scale, grid=grid, stochastic=True))
    scale[::20] = 1.0
    assert_settles(twin, make_update(weight=weight, scale=scale, grid=grid, stochastic=True))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_extreme_weights(twin: Twin, dtype: torch.dtype) -> None:
    """Subnormal results, overflow to infinity, and infinity itself."""
    info = torch.finfo(dtype)
    weight = torch.randn(240, 37).to(dtype) * info.tiny
    weight[::3] = info.max
    weight[1::3, ::4] = -torch.inf
    scale = torch.full((200,), info.tiny, dtype=torch.float64)
    scale[::2] = info.max / 64.0
    decay = torch.rand(200)
    decay[::2] = 1.0
    for stochastic in (True, False):
        assert_settles(
            twin, make_update(weight=weight, scale=scale, decay=decay, stochastic=stochastic)
        )


def test_grid_keeps_its_limit(twin: Twin) -> None:
    weight = torch.randn(240, 37) * 2.0**15
    assert_settles(twin, make_update(weight=weight, grid=2.0**-10, decay=torch.ones(200)))


def test_settle_nothing(twin: Twin) -> None:
    none = torch.zeros(0)
    for empty in (
        make_update(
            rows=torch.zeros(0, dtype=torch.int64), count=0, decay=none, scale=none,
            from_steps=torch.zeros(0, dtype=torch.int64),
        ),
        make_update(weight=torch.randn(240, 5)[:, :0]),
    ):  # fmt: skip
        assert torch.equal(twin(settled, empty), bits(memory_of(empty.weight)))


def settles_last_rows(
    device: str, count: int, shape: tuple[int, int], stride: tuple[int, int]
) -> bool:
    """Whether the last rows of a huge table of zeros become what those of a small one become."""
    memory = torch.zeros(shape[0] * shape[1], dtype=torch.bfloat16, device=device)
    weight = memory.as_strided(shape, stride)
    first = shape[0] - count
    small = torch.zeros(count, shape[1], dtype=torch.bfloat16)
    update = make_update(weight=small, listed=False, first_row=0, count=count)
    moved: dict[str, Any] = {
        name: value.to(device)
        for name, value in vars(update).items()
        if isinstance(value, torch.Tensor)
    }
    moved["weight"] = weight
    gpu.settle(replace(update, first_row=first, row_offset=update.row_offset - first, **moved))
    reference.settle(update)
    equal = torch.equal(bits(weight[first:].cpu().contiguous()), bits(small))
    return equal and int(memory.count_nonzero()) == int(small.count_nonzero())


@pytest.mark.gpu
def test_more_elements_than_32_bits_count() -> None:
    """Tables of 4.3 GB, row by row and column by column."""
    assert settles_last_rows("cuda", 200, (2**22 + 200, 512), (512, 1))
    assert settles_last_rows("cuda", 20, (16400, 131060), (1, 16400))


# --- what a GPU would get ----------------------------------------------------------------------


class AnyGpu:
    """A driver that names a GPU to compile for and has none to run on."""

    capability = 90

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0


def start_compiler() -> None:
    import triton

    triton.runtime.driver.set_active(AnyGpu())


def compiled(device: str, capability: int, updates: list[Update]) -> list[tuple[int, str]]:
    """For each update the number of kernels compiled so far, and the one used: PTX."""
    from dist_dp.kernels import gpu_kernels

    AnyGpu.capability = capability
    kernel, results = gpu_kernels.settle_kernel, []
    launch = kernel.run

    def compile_only(*arguments: Any, **options: Any) -> None:
        made = launch(*arguments, **{**options, "warmup": True})
        results.append((len(kernel.device_caches[capability][0]), made.asm["ptx"]))

    kernel.run = compile_only
    try:
        for update in updates:
            gpu.settle(update)
    finally:
        kernel.run = launch
    return results


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Twin]:
    cache = str(tmp_path_factory.mktemp("triton"))
    with in_process(start_compiler, TRITON_INTERPRET="0", TRITON_CACHE_DIR=cache) as compiler:
        yield compiler


def operations(ptx: str) -> Counter[str]:
    """How often each instruction on floating-point numbers occurs."""
    return Counter(re.findall(r"^\s*(?:@\S+ )?(\w[\w.]*\.f(?:32|64))\s", ptx, re.MULTILINE))


@pytest.mark.parametrize("capability", [80, 90])
def test_each_operation_is_rounded(compiler: Twin, capability: int) -> None:
    """Fused multiply-adds are those of the transform, 18 a pair; nothing is approximated."""
    updates = [
        make_update(),
        make_update(64, weight=torch.randn(240, 64), column_offset=0, listed=False),
        make_update(dtype=torch.bfloat16, stochastic=True),
        make_update(dtype=torch.float16, stochastic=True),
    ]
    for update, (_, ptx) in zip(updates, compiler(compiled, capability, updates), strict=True):
        found = operations(ptx)
        assert found["fma.rn.f32"] == 8 * 18
        # the update's own: two products and a sum for each of a thread's 16 numbers
        assert found["mul.rn.f32"] >= 2 * 16 and found["add.rn.f32"] >= 16
        assert found["sqrt.rn.f32"] == 8
        # a product or sum without .rn may be contracted; .ftz would lose subnormal numbers
        assert not any(re.match(r"(mul|add|sub|fma)\.(?!rn)", name) for name in found)
        assert not any(re.search(r"approx|full|ftz", name) for name in found)
        assert not found["fma.rn.f64"]
        aligned = update.weight.stride() == (64, 1)
        assert len(re.findall(r"st\.global\.v4", ptx)) == (4 if aligned else 0)


def test_grid_is_rounded(compiler: Twin) -> None:
    ((_, ptx),) = compiler(compiled, 90, [make_update(grid=0.5)])
    found = operations(ptx)
    assert found["sqrt.rn.f64"] == 8 and found["mul.rn.f64"] and found["div.rn.f64"]
    assert not any(re.match(r"fma|(mul|add|sub|div|sqrt)\.(?!rn)", name) for name in found)


def test_one_kernel_for_all_steps_and_keys(compiler: Twin) -> None:
    """Nor for other rows, offsets and alignments of the columns of numbers."""
    first = make_update(48, column_offset=16, listed=False)
    numbers = torch.rand(201, dtype=torch.float64)[1:]
    others = [
        replace(first, to_step=16, key=bytes(32), row_offset=0),
        replace(first, to_step=1, from_steps=torch.zeros(1, dtype=torch.int32).expand(200)),
        replace(first, first_row=1, count=1, column_offset=160),
        replace(first, first_row=32, row_offset=2**48 - 240, decay=numbers, scale=numbers),
    ]
    made = compiler(compiled, 86, [first, *others])
    assert [number for number, _ in made] == [1] * 5
    assert len({ptx for _, ptx in made}) == 1


def test_why_not() -> None:
    assert gpu.why_not(torch.device("cpu")) == "the CPU has kernels of its own"
    assert "not a CUDA device" in str(gpu.why_not(torch.device("meta")))
    if not torch.cuda.is_available():
        assert "CUDA device" in str(gpu.why_not(torch.device("cuda")))
