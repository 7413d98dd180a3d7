"""The CUDA kernels' logic without a GPU: run on a host, they equal the CPU's ops bit by bit,
whatever the order of threads and blocks; and the stand-in for CUDA catches what it should.

"Equal" is as in tests/test_cuda.py, which runs the same kernels on a GPU.
"""

import importlib
import math

import pytest
import torch
from host_build import build_kernels
from host_kernels import HostKernels
from kernel_cases import (
    ADAPTIVE,
    DTYPES,
    F32,
    F64,
    HALVES,
    NAN,
    OFFSETS,
    SEGMENTS,
    TABLEAUX,
    Guarded,
    assert_norms,
    assert_same_bits,
    bits,
    cuts,
    normal,
)

import pycnf
from pycnf import reference

SIZES = pytest.mark.parametrize("size", [0, 1, 3, 31, 255, 257, 1000, 1024, 1025, 5000])
FLIPS = pytest.mark.parametrize("flip", [False, True])
SEEDS = range(5)


@pytest.fixture(scope="session")
def kernels(cuda_host_folder):
    return HostKernels(build_kernels(cuda_host_folder))


@pytest.fixture
def host(kernels):
    kernels.seed(1)
    kernels.multiprocessors(4)
    kernels.tolerances_on_device, kernels.chunk = False, 0
    return kernels


@pytest.fixture
def ops():
    return torch.ops.pycnf


class Step:
    """A step for the CPU, and a guarded copy for the kernels; the newest row is still to store."""

    def __init__(self, size, dtype, offset=0, stages=7, odd=None):
        """`odd` is the one part with an offset of 1 instead."""
        y0 = normal(size, dtype=dtype)
        self.cpu = {
            "y0": y0,
            "k": normal(stages, size, dtype=dtype, seed=1),
            "fresh": normal(size, dtype=dtype, seed=2),
            "y1": y0 + 0.1 * normal(size, dtype=dtype, seed=3),
            "ratio": torch.full_like(y0, NAN),
        }
        self.guarded = {
            name: Guarded(x, 1 if name == odd else offset) for name, x in self.cpu.items()
        }
        self.host = {name: x.view for name, x in self.guarded.items()}

    def put(self, name, at, value):
        for side in (self.cpu, self.host):
            side[name][at] = value

    def check(self):
        for name, x in self.cpu.items():
            assert_same_bits(self.host[name], x)
            self.guarded[name].check()


def tolerances(kind, size):
    rtol, atol = torch.tensor(1e-3, dtype=F64), torch.tensor(1e-4, dtype=F64)
    if kind in ("each", "mixed"):
        rtol = rtol * (1 + normal(size, dtype=F64, seed=5).abs())
    if kind == "each":
        atol = atol * (1 + normal(size, dtype=F64, seed=6).abs())
    return rtol, atol


# ---- stages --------------------------------------------------------------------------------------


@DTYPES
@SIZES
@OFFSETS
@FLIPS
def test_stage(host, ops, dtype, size, offset, flip):
    step = Step(size, dtype, offset)
    weights, results = TABLEAUX["dopri5"]["a"][5], []
    step.put("k", len(weights) - 1, NAN)  # the newest row unless flipped, which is never the last
    for op, x in ((host, step.host), (ops, step.cpu)):
        results.append(op.rk_stage(x["y0"], x["k"], flip, [x["fresh"]], weights, 0.37))
    assert_same_bits(*results)
    step.check()


@DTYPES
@FLIPS
@pytest.mark.parametrize("method", TABLEAUX)
def test_stage_of_every_method(host, ops, method, flip, dtype):
    """Rows of weight zero are not read: what they hold is no matter."""
    tableau = TABLEAUX[method]
    last = tableau["stages"] - 1
    for row in [*tableau["a"][1:], tableau["b"]]:
        step, results = Step(300, dtype, stages=tableau["stages"]), []
        for stage in range(tableau["stages"]):
            if stage >= len(row) or row[stage] == 0:
                step.put("k", last - stage if flip and stage in (0, last) else stage, NAN)
        for op, x in ((host, step.host), (ops, step.cpu)):
            results.append(op.rk_stage(x["y0"], x["k"], flip, [], row, 0.21))
        assert not results[0].isnan().any()
        assert_same_bits(*results)


def test_stage_of_more_elements_than_a_grid_has_threads(host, ops):
    """16384 blocks of 256 threads, each with one element at a time, go round twice."""
    size = 16384 * 256 + 1000
    y0, row = torch.arange(size + 1, dtype=F32)[1:], torch.ones(1, size)
    result = host.rk_stage(y0, row, False, [], [0.5], 0.3)
    assert_same_bits(result, ops.rk_stage(y0, row, False, [], [0.5], 0.3))


@DTYPES
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("terms", [1, 2, 3, 4, 5, 7, 8, 9, 13, 14])
def test_combine(host, ops, dtype, terms, ordered):
    for size in (1, 6, 1029):
        y = normal(size, dtype=dtype)
        k = [normal(size, dtype=dtype, seed=j) for j in range(terms)]
        weights = [0.0 if j % 5 == 2 else (-1) ** j / (j + 1) for j in range(terms)]
        arguments = (y, k, weights, 0.3, None, ordered)
        result = host.rk_combine(*arguments)
        assert_same_bits(result, ops.rk_combine(*arguments))
        close = {"rtol": 1e-12, "atol": 1e-13} if dtype == F64 else {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(result, reference.rk_combine(*arguments), **close)


# ---- end of step ---------------------------------------------------------------------------------


def check_finish(
    host, ops, step, *, method="dopri5", flip=False, kind="host", segments=None, use_ratio=True
):
    """Runs kernels and CPU op, and compares everything that they return and write."""
    tableau, size = TABLEAUX[method], step.cpu["y0"].numel()
    solution = [] if tableau["solution_is_last_stage"] else tableau["b"]
    segments = [0, size] if segments is None else segments
    tol, results = tolerances(kind, size), []
    host.tolerances_on_device = kind in ("device", "mixed")
    wide = {name: x.to(F64, copy=True) for name, x in step.cpu.items()}
    for op, x in ((host, step.host), (ops, step.cpu), (reference, wide)):
        ratio = x["ratio"] if use_ratio else None
        result = op.rk_finish(
            x["y0"], x["k"], flip, [x["fresh"]], x["y1"], solution, tableau["e"], 0.37, *tol,
            segments, ratio,
        )  # fmt: skip
        results.append(result)
    result, expected, exact = results
    assert_norms(result, expected)
    step.check()
    # The scaled error is a small difference of large terms, hence the wide bound in f32.
    assert_norms(result, exact, 1e-11 if step.cpu["y0"].dtype == F64 else 1e-2)
    return result


@DTYPES
@SIZES
@OFFSETS
@FLIPS
@pytest.mark.parametrize("method", ["dopri5", "tsit5"])
def test_finish(host, ops, dtype, size, offset, flip, method):
    """dopri5 has its solution already, tsit5 sums it."""
    step = Step(size, dtype, offset)
    check_finish(host, ops, step, method=method, flip=flip, use_ratio=offset == 0)


@DTYPES
@pytest.mark.parametrize("odd", ["y0", "k", "fresh", "y1", "ratio", "out"])
@pytest.mark.parametrize("method", ["dopri5", "tsit5"])
def test_every_op_with_one_part_that_is_not_aligned(host, ops, dtype, odd, method):
    step, results = Step(1000, dtype, odd=odd), []
    for op, x in ((host, step.host), (ops, step.cpu)):
        out = Guarded(torch.full((2, 1000), NAN, dtype=dtype), odd == "out").view
        op.rk_interpolate(x["y0"], x["y1"], x["k"], True, [0.5] * 7, 0.1, [0.3, 0.7], out)
        state = op.rk_stage(x["y0"], x["k"], True, [x["fresh"]], [0.5, 0.25], 0.1)
        results.append(torch.stack([*out, state]))
        results.append(op.rk_combine(x["y0"], [x["fresh"], x["y1"]], [0.5, 0.25], 0.1))
    assert_same_bits(results[0], results[2])
    assert_same_bits(results[1], results[3])
    check_finish(host, ops, step, method=method)
    tol, results = tolerances("host", 1000), []
    for op, x in ((host, step.host), (ops, step.cpu)):
        results.append(op.rk_initial_norms(x["y0"], x["fresh"], x["y1"], *tol, [0, 1000]))
    assert_norms(*results)


@DTYPES
@FLIPS
@pytest.mark.parametrize("method", ADAPTIVE)
def test_finish_of_every_method(host, ops, method, flip, dtype):
    step = Step(1030, dtype, stages=TABLEAUX[method]["stages"])
    check_finish(host, ops, step, method=method, flip=flip)


@DTYPES
@OFFSETS
@pytest.mark.parametrize("kind", ["host", "device", "each", "mixed"])
def test_finish_tolerances(host, ops, kind, offset, dtype):
    check_finish(host, ops, Step(2051, dtype, offset), kind=kind)


@DTYPES
@OFFSETS
@pytest.mark.parametrize("name", SEGMENTS)
def test_finish_segments(host, ops, name, offset, dtype):
    segments = SEGMENTS[name](6007)
    result = check_finish(host, ops, Step(6007, dtype, offset), segments=segments)
    assert math.isnan(result[0].item()) == name.startswith("first empty")


@pytest.mark.parametrize("chunk", [21, 64, 1500, 100_000])
@pytest.mark.parametrize("name", SEGMENTS)
def test_finish_with_ranges_of_other_lengths(host, ops, chunk, name):
    """Few ranges that a block goes through more than once, as in a state of millions, and many."""
    host.chunk = chunk
    check_finish(host, ops, Step(6007, F32), segments=SEGMENTS[name](6007))


def test_finish_of_segments_that_a_block_adds_up(host, ops):
    """More than 256 ranges each. A warp has no say in the largest norm."""
    host.chunk = 5
    for seed in SEEDS:
        host.seed(seed)
        check_finish(host, ops, Step(6007, F32), segments=[0, 1400, 1407, 4507])


@pytest.mark.slow
def test_finish_of_more_ranges_than_a_grid_has_blocks(host, ops):
    """Some of the 16384 blocks go round twice, with two warps' sums each."""
    host.chunk = 64
    size = 64 * (16384 + 100)
    check_finish(host, ops, Step(size, F32, offset=1, stages=4), method="bosh3")


@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 1, 2, 4000, 6006])
def test_finish_flags_values_that_are_not_finite(host, ops, at, bad):
    """Also between segments, where the norm does not look."""
    for segments in ([0, 6007], [1, 4000, 4001, 6000]):
        step = Step(6007, F64)
        step.put("y1", at, bad)
        assert check_finish(host, ops, step, segments=segments)[1].item() == 0.0


@DTYPES
@pytest.mark.parametrize("part", [0, 1, 2])
def test_finish_takes_nan_as_python_s_max_does(host, ops, part, dtype):
    step = Step(3000, dtype)
    step.put("k", (2, 1000 * part + 17), NAN)
    segments = [0, 1000, 1000, 2000, 2000, 3000]
    result = check_finish(host, ops, step, segments=segments)
    assert math.isnan(result[0].item()) == (part == 0)


@pytest.mark.parametrize("bad", [math.inf, -math.inf])
def test_finish_of_an_infinite_error(host, ops, bad):
    step = Step(3000, F64)
    step.put("k", (2, 1017), bad)
    result = check_finish(host, ops, step, segments=[0, 1000, 1000, 3000])
    assert result.tolist() == [math.inf, 1.0]


def test_finish_wants_sums_of_equal_length(host):
    y0, k = torch.zeros(8), torch.zeros(2, 8)
    tol = torch.tensor(1e-3, dtype=F64)
    with pytest.raises(RuntimeError, match="finish: CUDA error 1"):
        host.rk_finish(y0, k, False, [], y0.clone(), [1.0], [1.0, 2.0], 0.1, tol, tol, [0, 8])


# ---- initial step --------------------------------------------------------------------------------


def check_initial_norms(
    host, ops, dtype, *, size=6007, offset=0, second=True, kind="host", segments=None
):
    segments = [0, size] if segments is None else segments
    tensors = [normal(size, dtype=dtype, seed=seed) for seed in range(3)]
    guarded = [Guarded(x, offset).view for x in tensors]
    if not second:
        tensors[2] = guarded[2] = None
    tol = tolerances(kind, size)
    host.tolerances_on_device = kind in ("device", "mixed")
    result = host.rk_initial_norms(*guarded, *tol, segments)
    assert_norms(result, ops.rk_initial_norms(*tensors, *tol, segments))
    wide = [x if x is None else x.double() for x in tensors]
    exact = reference.rk_initial_norms(*wide, *tol, segments)
    assert_norms(result, exact, 1e-12 if dtype == F64 else 1e-5)


SECOND = pytest.mark.parametrize("second", [False, True])


@DTYPES
@SIZES
@OFFSETS
@SECOND
def test_initial_norms(host, ops, dtype, offset, size, second):
    check_initial_norms(host, ops, dtype, size=size, offset=offset, second=second)


@DTYPES
@SECOND
@pytest.mark.parametrize("kind", ["device", "each", "mixed"])
def test_initial_norms_tolerances(host, ops, dtype, kind, second):
    check_initial_norms(host, ops, dtype, kind=kind, second=second)


@DTYPES
@SECOND
@pytest.mark.parametrize("name", SEGMENTS)
def test_initial_norms_segments(host, ops, dtype, name, second):
    segments = SEGMENTS[name](6007)
    check_initial_norms(host, ops, dtype, offset=1, second=second, segments=segments)


# ---- interpolation -------------------------------------------------------------------------------


def check_interpolate(host, ops, dtype, size, offset, times):
    x = [i / max(1, times - 1) for i in range(times)]
    middle = TABLEAUX["dopri5"]["m"]
    for flip in (False, True):
        step = Step(size, dtype, offset)
        expected = torch.full((times, size), NAN, dtype=dtype)
        exact = expected.to(F64, copy=True)
        result = Guarded(expected, offset)
        wide = {name: x.to(F64, copy=True) for name, x in step.cpu.items()}
        for op, part, out in (
            (host, step.host, result.view),
            (ops, step.cpu, expected),
            (reference, wide, exact),
        ):
            op.rk_interpolate(part["y0"], part["y1"], part["k"], flip, middle, 0.37, x, out)
        assert_same_bits(result.view, expected)
        result.check()
        step.check()
        close = {"rtol": 1e-11, "atol": 1e-12} if dtype == F64 else {"rtol": 1e-4, "atol": 1e-4}
        torch.testing.assert_close(result.view.double(), exact, **close)


@DTYPES
@SIZES
@OFFSETS
@pytest.mark.parametrize("times", [0, 1, 3])
def test_interpolate(host, ops, dtype, size, offset, times):
    check_interpolate(host, ops, dtype, size, offset, times)


@DTYPES
@pytest.mark.parametrize("times", [127, 128, 129, 300])
@pytest.mark.parametrize("size", [5, 64])
def test_interpolate_at_more_times_than_fit_one_launch(host, ops, dtype, size, times):
    check_interpolate(host, ops, dtype, size, 0, times)


# ---- states of 16 bits: computed in f32, and each result rounded once ----------------------------

# 8 is 16 bytes.
HALF_CASES = (
    HALVES,
    pytest.mark.parametrize("size", [0, 1, 3, 31, 257, 1000, 1025, 5000]),
    pytest.mark.parametrize("offset", [0, 1, 4, 8]),
    FLIPS,
)


def half_cases(test):
    for mark in HALF_CASES:
        test = mark(test)
    return test


def floats(step):
    return {name: x.float() for name, x in step.cpu.items()}


@half_cases
def test_stage_of_half_states(host, ops, dtype, size, offset, flip):
    step = Step(size, dtype, offset)
    weights = TABLEAUX["dopri5"]["a"][5]
    step.put("k", len(weights) - 1, NAN)
    x, wide = step.host, floats(step)
    result = host.rk_stage(x["y0"], x["k"], flip, [x["fresh"]], weights, 0.37)
    exact = ops.rk_stage(wide["y0"], wide["k"], flip, [wide["fresh"]], weights, 0.37)
    assert_same_bits(result, exact.to(dtype))
    step.cpu["k"].copy_(wide["k"])
    step.check()


@HALVES
@FLIPS
@pytest.mark.parametrize("method", TABLEAUX)
def test_stage_of_half_states_of_every_method(host, ops, method, flip, dtype):
    tableau = TABLEAUX[method]
    for row in [*tableau["a"][1:], tableau["b"]]:
        step = Step(300, dtype, stages=tableau["stages"])
        x, wide = step.host, floats(step)
        result = host.rk_stage(x["y0"], x["k"], flip, [], row, 0.21)
        exact = ops.rk_stage(wide["y0"], wide["k"], flip, [], row, 0.21)
        assert_same_bits(result, exact.to(dtype))


@HALVES
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("terms", [1, 4, 9, 14])
def test_combine_half_states(host, ops, dtype, terms, ordered):
    for size in (1, 6, 1029):
        y = normal(size, dtype=dtype)
        k = [normal(size, dtype=dtype, seed=j) for j in range(terms)]
        weights = [0.0 if j % 5 == 2 else (-1) ** j / (j + 1) for j in range(terms)]
        result = host.rk_combine(y, k, weights, 0.3, None, ordered)
        wide = [row.float() for row in k]
        exact = ops.rk_combine(y.float(), wide, weights, 0.3, None, ordered)
        assert_same_bits(result, exact.to(dtype))


def check_finish_of_half_states(
    host, ops, step, *, method="dopri5", flip=False, kind="host", segments=None
):
    """The solution that the error is scaled by is the rounded one."""
    tableau, size = TABLEAUX[method], step.cpu["y0"].numel()
    dtype = step.cpu["y0"].dtype
    solution = [] if tableau["solution_is_last_stage"] else tableau["b"]
    segments = [0, size] if segments is None else segments
    tol = tolerances(kind, size)
    host.tolerances_on_device = kind in ("device", "mixed")
    x, wide = step.host, floats(step)
    result = host.rk_finish(
        x["y0"], x["k"], flip, [x["fresh"]], x["y1"], solution, tableau["e"], 0.37, *tol,
        segments, x["ratio"],
    )  # fmt: skip
    start = (wide["y0"], wide["k"], flip, [wide["fresh"]])
    if solution:
        wide["y1"] = ops.rk_stage(*start, solution, 0.37).to(dtype).float()
    expected = ops.rk_finish(
        *start, wide["y1"], [], tableau["e"], 0.37, *tol, segments, wide["ratio"]
    )
    assert_norms(result, expected)
    for name, part in wide.items():
        step.cpu[name].copy_(part)
    step.check()
    return result


@half_cases
@pytest.mark.parametrize("method", ["dopri5", "tsit5"])
def test_finish_of_half_states(host, ops, dtype, size, offset, flip, method):
    check_finish_of_half_states(host, ops, Step(size, dtype, offset), method=method, flip=flip)


@HALVES
@pytest.mark.parametrize("offset", [0, 1, 8])
@pytest.mark.parametrize("kind", ["device", "each", "mixed"])
def test_finish_of_half_states_tolerances(host, ops, kind, offset, dtype):
    check_finish_of_half_states(host, ops, Step(2051, dtype, offset), kind=kind)


@HALVES
@pytest.mark.parametrize("offset", [0, 1, 8])
@pytest.mark.parametrize("name", SEGMENTS)
def test_finish_of_half_states_segments(host, ops, name, offset, dtype):
    segments = SEGMENTS[name](6007)
    step = Step(6007, dtype, offset)
    check_finish_of_half_states(host, ops, step, method="tsit5", segments=segments)


@HALVES
@pytest.mark.parametrize("odd", ["y0", "k", "fresh", "y1", "ratio"])
@pytest.mark.parametrize("method", ["dopri5", "tsit5"])
def test_half_states_with_one_part_that_is_not_aligned(host, ops, dtype, odd, method):
    check_finish_of_half_states(host, ops, Step(1000, dtype, odd=odd), method=method)


@HALVES
def test_half_states_that_are_not_finite(host, ops, dtype):
    """What a row has of infinities and NaN goes through."""
    for bad in (NAN, math.inf, -math.inf):
        for at in (0, 3, 999):
            step = Step(1000, dtype)
            step.put("y1", at, bad)
            assert check_finish_of_half_states(host, ops, step)[1].item() == 0.0
            step = Step(1000, dtype)
            step.put("k", (2, at), bad)
            step.put("fresh", at, bad)
            check_finish_of_half_states(host, ops, step, method="tsit5", segments=[0, 1, 1, 1000])


@HALVES
@pytest.mark.parametrize("offset", [0, 1])
def test_half_states_overflow_to_infinity_where_they_are_stored(host, dtype, offset):
    """A sum that f32 holds is flagged all the same; one that only rounds down is not."""
    largest = torch.finfo(dtype).max
    below = torch.nextafter(torch.tensor(largest, dtype=dtype), torch.zeros((), dtype=dtype))
    spacing = largest - below.item()
    for excess, finite in ((0.25, True), (0.75, False)):
        y0 = Guarded(torch.full((40,), largest, dtype=dtype), offset).view
        k = Guarded(torch.full((1, 40), spacing, dtype=dtype), offset).view
        expected = torch.full_like(y0, largest if finite else math.inf)
        assert_same_bits(host.rk_stage(y0, k, False, [], [excess], 1.0), expected)
        y1, tol = torch.empty_like(y0), torch.tensor(1e-3, dtype=F64)
        norm, flag = host.rk_finish(
            y0, k, False, [], y1, [excess], [1e-3], 1.0, tol, tol, [0, 40]
        ).tolist()
        assert_same_bits(y1, expected)
        assert flag == finite and (norm > 0) == finite


@HALVES
def test_half_states_round_to_the_nearest_and_to_even(host, dtype):
    """Every number of 16 bits, and what lies a quarter, a half and three quarters to the next."""
    numbers = torch.arange(2**16).to(torch.uint16).view(dtype)
    numbers = numbers[numbers.isfinite()]
    y0, change = numbers, torch.nextafter(numbers, torch.full_like(numbers, math.inf)) - numbers
    change = torch.where(change.isfinite(), change, 0)
    for part in (0.25, 0.5, 0.75):
        result = host.rk_stage(y0, change[None], False, [], [part], 1.0)
        assert_same_bits(result, (y0.float() + part * change.float()).to(dtype))


@HALVES
@SECOND
@pytest.mark.parametrize("offset", [0, 1, 8])
@pytest.mark.parametrize("size", [1, 3, 31, 1000, 5000])
def test_initial_norms_of_half_states(host, ops, dtype, offset, size, second):
    tensors = [normal(size, dtype=dtype, seed=seed) for seed in range(3)]
    guarded = [Guarded(x, offset).view for x in tensors]
    wide = [x.float() for x in tensors]
    if not second:
        wide[2] = guarded[2] = None
    for kind in ("host", "device", "each"):
        host.tolerances_on_device = kind == "device"
        for segments in ([0, size], cuts(size, 5)):
            tol = tolerances(kind, size)
            result = host.rk_initial_norms(*guarded, *tol, segments)
            assert_norms(result, ops.rk_initial_norms(*wide, *tol, segments))


def check_interpolate_of_half_states(host, ops, dtype, size, offset, flip, times):
    x, middle = [i / max(1, times - 1) for i in range(times)], TABLEAUX["dopri5"]["m"]
    step = Step(size, dtype, offset)
    part, wide = step.host, floats(step)
    exact = torch.full((times, size), NAN)
    result = Guarded(exact.to(dtype), offset)
    host.rk_interpolate(part["y0"], part["y1"], part["k"], flip, middle, 0.37, x, result.view)
    ops.rk_interpolate(wide["y0"], wide["y1"], wide["k"], flip, middle, 0.37, x, exact)
    assert_same_bits(result.view, exact.to(dtype))
    result.check()
    step.check()


@half_cases
@pytest.mark.parametrize("times", [1, 3])
def test_interpolate_half_states(host, ops, dtype, size, offset, flip, times):
    check_interpolate_of_half_states(host, ops, dtype, size, offset, flip, times)


@HALVES
@pytest.mark.parametrize("size", [5, 64])
def test_interpolate_half_states_at_more_times_than_fit_one_launch(host, ops, dtype, size):
    check_interpolate_of_half_states(host, ops, dtype, size, 0, True, 129)


# ---- values, pieces, probes ----------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("count", [0, 1, 6, 128, 129, 300])
def test_time_tensors(host, ops, count, dtype):
    values = [(-1) ** i / (3 + i) for i in range(count)]
    expected = ops.time_tensors(values, dtype, torch.device("cpu"))
    assert [t.item() for t in host.time_tensors(values, dtype)] == [t.item() for t in expected]


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 200])
def test_store_pieces(host, count):
    """A piece is begin, end, and two numbers of 32 bits: three of 64."""
    pieces = torch.randint(2**62, (count, 3))
    table = Guarded(torch.zeros_like(pieces))
    host.call("store_pieces", pieces.data_ptr(), count, table.view.data_ptr())
    assert torch.equal(table.view, pieces)
    table.check()


@DTYPES
@pytest.mark.parametrize("shape", [(0, 3), (4, 0), (1, 1), (7, 3), (300, 2), (33, 5, 4), (9,)])
def test_keys(host, ops, dtype, shape):
    x = normal(*shape, dtype=dtype)
    if x.numel():
        x.view(-1)[0] = -0.0
    keys = host.probe_keys(x)
    assert torch.equal(keys, ops.probe_keys(x))
    assert torch.equal(keys, reference.probe_keys(x))


BATCHES = pytest.mark.parametrize(("probes", "batch"), [(0, 3), (1, 0), (1, 5), (3, 70)])


@DTYPES
@BATCHES
@pytest.mark.parametrize("features", [0, 1, 2, 3, 4, 5, 31, 127, 128, 129, 300])
def test_rademacher(host, ops, dtype, features, probes, batch):
    keys = ops.probe_keys(normal(batch, 2, dtype=dtype))
    arguments = (keys, -5, probes, features, False, dtype)
    result = host.probe_sample(*arguments)
    assert torch.equal(result, ops.probe_sample(*arguments))
    assert torch.equal(result, reference.probe_sample(*arguments))


@DTYPES
@BATCHES
@pytest.mark.parametrize("features", [0, 1, 2, 3, 4, 5, 31, 129])
def test_gaussian(host, ops, dtype, features, probes, batch):
    keys = ops.probe_keys(normal(batch, 2, dtype=dtype))
    arguments = (keys, 2**40 + 1, probes, features, True, dtype)
    result = host.probe_sample(*arguments)
    close = {"rtol": 1e-13, "atol": 1e-14} if dtype == F64 else {"rtol": 2e-6, "atol": 2e-6}
    for other in (ops, reference):
        torch.testing.assert_close(result, other.probe_sample(*arguments), **close)


# ---- the order of threads ------------------------------------------------------------------------


def everything(host, dtype, size=5000):
    """What every kernel returns and writes, of one case."""
    x = Step(size, dtype, offset=1).host
    dopri5, tol, segments = TABLEAUX["dopri5"], tolerances("host", size), cuts(size, 100)
    out = torch.full((3, size), NAN, dtype=dtype)
    host.chunk = 19
    keys = host.probe_keys(x["y0"].view(-1, 5))
    results = [
        host.rk_stage(x["y0"], x["k"], False, [x["fresh"]], dopri5["a"][3], 0.2),
        host.rk_finish(
            x["y0"], x["k"], True, [x["fresh"]], x["y1"], dopri5["b"], dopri5["e"], 0.2, *tol,
            segments, x["ratio"],
        ),
        host.rk_initial_norms(x["y0"], x["fresh"], x["y1"], *tol, segments),
        host.rk_initial_norms(x["y0"], x["fresh"], None, *tol, [0, size]),
        keys.to(F64),
        host.probe_sample(keys, 3, 2, 5, False, dtype),
        host.probe_sample(keys, 3, 2, 5, True, dtype),
        torch.stack(host.time_tensors([0.1, 0.2], dtype)),
    ]  # fmt: skip
    host.rk_interpolate(x["y0"], x["y1"], x["k"], False, dopri5["m"], 0.2, [0.1, 0.5, 0.9], out)
    return [*results, out, *x.values()]


@DTYPES
def test_every_order_gives_the_same_bits(host, dtype):
    first = None
    for seed in SEEDS:
        host.seed(seed)
        results = everything(host, dtype)
        first = first or results
        for a, b in zip(first, results):
            assert_same_bits(a, b)


def order_of_threads(host):
    order = torch.full((5 * 96,), -1, dtype=torch.int32)
    count = torch.zeros(1, dtype=torch.int32)
    host.call("check_order", count.data_ptr(), order.data_ptr())
    return order.view(5, 96)


def test_orders_come_from_the_seed(host):
    """Block after block, each with its threads in an order of its own."""
    orders = []
    for seed in (1, 2, 1):
        host.seed(seed)
        orders.append(order_of_threads(host))
    first, second, again = orders
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert not torch.equal(first, order_of_threads(host))
    for order in orders:
        blocks, threads = order // 96, order % 96
        assert (blocks == blocks[:, :1]).all()
        assert torch.equal(blocks[:, 0].sort().values, torch.arange(5, dtype=torch.int32))
        assert (threads.sort(1).values == torch.arange(96)).all()
        assert not torch.equal(threads[0], threads[1])
    assert len({tuple(order[:, 0].tolist()) for order in orders}) == 2


# ---- what the stand-in catches -------------------------------------------------------------------

# Of check_next_thread, by their number in checks.cu.
FAULTS = [
    "none", "no barrier", "barrier of some", "shuffle of some", "reads from outside", "unwritten",
    "behind", "before", "not aligned",
]  # fmt: skip


def next_thread(host, fault):
    out = torch.full((5, 96), NAN, dtype=F64)
    host.call("check_next_thread", FAULTS.index(fault), out.data_ptr())
    return out


NEXT = 2.0 * ((torch.arange(96, dtype=F64) + 1) % 96).expand(5, 96)


def test_a_right_kernel_is_right_in_every_order(host):
    for seed in SEEDS:
        host.seed(seed)
        assert torch.equal(next_thread(host, "none"), NEXT)


def test_a_missing_barrier_shows(host):
    results = []
    for seed in SEEDS:
        host.seed(seed)
        results.append(next_thread(host, "no barrier"))
        assert not torch.equal(results[-1], NEXT)
    assert not torch.equal(bits(results[0]), bits(results[1]))


def test_shared_memory_that_nobody_wrote_is_nan(host):
    nan = next_thread(host, "unwritten").isnan()
    assert nan[:, 6].all() and nan.sum() == 5


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("barrier of some", r"do not come: 95 wait at a barrier, 1 have returned in block \d"),
        ("shuffle of some", r"do not come: 93 wait for lanes of their warp, 3 have returned"),
        ("reads from outside", "a lane reads from a lane that takes no part"),
        ("behind", r"block \d has written outside of its shared memory"),
        ("before", r"block \d has written outside of its shared memory"),
        ("not aligned", "an access to memory that is not aligned for it"),
    ],
)
def test_faults_are_reported(host, fault, message):
    for seed in SEEDS:
        host.seed(seed)
        with pytest.raises(RuntimeError, match=f"CUDA error 719: .*{message}"):
            next_thread(host, fault)
        assert torch.equal(next_thread(host, "none"), NEXT)


def test_exchanges_of_a_warp(host):
    out = torch.full((12, 32), -7, dtype=torch.int32)
    host.call("check_exchanges", out.data_ptr())
    votes = sum(1 << lane for lane in range(0, 32, 3))
    votes -= (votes >> 31) << 32
    lanes = range(32)
    expected = [
        [5 for _ in lanes],
        [lane // 8 * 8 + (lane + 9) % 8 for lane in lanes],
        [lane + 3 if lane + 3 < 32 else lane for lane in lanes],
        [lane + 3 if lane % 8 + 3 < 8 else lane for lane in lanes],
        [lane - 3 if lane >= 3 else lane for lane in lanes],
        [lane - 3 if lane % 8 >= 3 else lane for lane in lanes],
        [lane ^ 5 for lane in lanes],
        [lane ^ 9 if lane // 8 % 2 == 1 else lane for lane in lanes],
        [votes for _ in lanes],
        [1 for _ in lanes],
        [0 for _ in lanes],
        [-1 if lane % 2 == 0 else min(lane + 2, 31) for lane in lanes],
    ]
    assert out.tolist() == expected


# Ways to let the blocks of a launch run together.
TOGETHER, NO_BARRIER, BARRIER_OF_SOME, NOT_COOPERATIVE, SPINS, STUCK = range(6)


def run_grid(host, how, blocks=7):
    squares, out = torch.full((2, blocks), NAN, dtype=F64)
    counter = torch.zeros(1, dtype=torch.int32)
    host.call("check_grid", how, blocks, *(x.data_ptr() for x in (counter, squares, out)))
    return out


@pytest.mark.parametrize("how", [TOGETHER, SPINS])
def test_blocks_of_a_cooperative_launch_run_together(host, how):
    """They wait for each other at the grid's barrier, or each in a loop of its own."""
    for seed in SEEDS:
        host.seed(seed)
        assert run_grid(host, how).tolist() == [2.0 * sum(b * b for b in range(7))] * 7


def test_a_missing_grid_barrier_shows(host):
    results = []
    for seed in SEEDS:
        host.seed(seed)
        results.append(bits(run_grid(host, NO_BARRIER)))
    assert not all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (BARRIER_OF_SOME, "do not come: 416 wait at the grid's barrier, 32 have returned"),
        (NOT_COOPERATIVE, "a grid barrier, but the launch is not cooperative"),
        (STUCK, "wait in a loop for what nobody will write"),
    ],
)
def test_faults_of_a_grid_are_reported(host, how, message):
    with pytest.raises(RuntimeError, match=f"CUDA error 719: .*{message}"):
        run_grid(host, how)


@pytest.mark.parametrize(
    ("blocks", "threads", "shared", "code"),
    [(0, 32, 0, 9), (1, 0, 0, 9), (1, 1025, 0, 9), (1, 32, 48 * 1024 + 1, 1)],
)
def test_launches_that_a_gpu_refuses(host, blocks, threads, shared, code):
    host.call("check_launch", 1, 1024, 48 * 1024)
    with pytest.raises(RuntimeError, match=f"CUDA error {code}:"):
        host.call("check_launch", blocks, threads, shared)
    with pytest.raises(RuntimeError, match="CUDA error 720:"):
        run_grid(host, TOGETHER, blocks=1000)


# cuda_runtime_api.h's numbers.
SHARED, WARP, PROCESSORS, SHARED_OPTIN, COOPERATIVE = 8, 10, 16, 97, 95


def attribute(host, number, device=0):
    value = torch.zeros(1, dtype=torch.int32)
    host.call("check_attribute", number, device, value.data_ptr())
    return value.item()


def test_attributes_of_the_device(host):
    assert attribute(host, SHARED) == 48 << 10
    assert attribute(host, SHARED_OPTIN) == 227 << 10
    assert attribute(host, WARP) == 32
    assert attribute(host, COOPERATIVE) == 1
    assert attribute(host, PROCESSORS) == 4
    host.multiprocessors(7)
    assert attribute(host, PROCESSORS) == 7
    with pytest.raises(RuntimeError, match="CUDA error 1:"):
        attribute(host, 1000)
    with pytest.raises(RuntimeError, match="CUDA error 101:"):
        attribute(host, WARP, device=1)


def run_tiles(host, tiles, width, threads=64, asks_for=None):
    """What a cooperative launch of as many blocks as run together makes of tiles of numbers."""
    asks_for = 8 * width if asks_for is None else asks_for
    numbers = normal(tiles, width, dtype=F64)
    sums, taken = torch.full((tiles,), NAN, dtype=F64), torch.full((tiles,), -1, dtype=torch.int32)
    out, blocks = torch.full((1000,), NAN, dtype=F64), torch.zeros(1, dtype=torch.int32)
    tensors = (numbers, sums, taken, out, blocks)
    host.call("check_tiles", tiles, width, threads, asks_for, *(x.data_ptr() for x in tensors))
    out, blocks = out[~out.isnan()], blocks.item()
    torch.testing.assert_close(sums, numbers.sum(1))
    torch.testing.assert_close(out, sums.sum().expand(blocks))
    assert taken.tolist() == [tile % blocks for tile in range(tiles)]
    return blocks


@pytest.mark.parametrize(
    ("width", "threads", "held"),
    [
        (29056, 64, 1),  # 227 KiB
        (14400, 64, 2),  # 112.5 KiB, and 1 KiB that the system takes of each
        (14465, 64, 1),
        (6144, 1024, 2),  # 2048 threads
        (6144, 100, 4),
        (10, 32, 32),
    ],
)
def test_blocks_that_stay_go_through_more_tiles_than_they_are(host, width, threads, held):
    for seed, processors in ((1, 4), (2, 1), (3, 3)):
        host.seed(seed)
        host.multiprocessors(processors)
        assert run_tiles(host, held * processors + 3, width, threads) == held * processors
        assert run_tiles(host, 3, width, threads) == held * processors


def test_shared_memory_beyond_48_kib_is_to_be_asked_for(host):
    for width in (10, 6300):
        with pytest.raises(RuntimeError, match="CUDA error 1: more shared memory than the kernel"):
            run_tiles(host, 9, width, asks_for=8 * width - 1)
        run_tiles(host, 9, width)
    with pytest.raises(RuntimeError, match="CUDA error 1:"):
        run_tiles(host, 9, 29057)
    host.call("check_launch", 1, 32, 48 << 10)
    with pytest.raises(RuntimeError, match="CUDA error 1:"):
        host.call("check_launch", 1, 32, (48 << 10) + 1)


# ---- whole solves whose steps the kernels choose -------------------------------------------------


class Swing(torch.nn.Module):
    def forward(self, t, y):
        return torch.sin(3 * t) * y.roll(1, -1) - 0.5 * y


SOLVES = {
    "two times": ([0.0, 1.0], {}),
    "descending": ([1.0, 0.9, -1.0], {"step_t": torch.tensor([0.5, 0.25])}),
    "many outputs a step": ([0.0, *torch.linspace(0.5, 0.6, 7).tolist(), 2.0], {}),
    "a first step": ([0.0, 1.0], {"first_step": 0.01, "max_step": 0.3}),
    "time in float32": ([0.0, 1.0, 1.5], {"dtype": F32}),
}


@pytest.mark.parametrize("case", SOLVES)
@pytest.mark.parametrize("size", [3, 1025])
@DTYPES
@pytest.mark.parametrize("method", ADAPTIVE)
def test_solves(host, monkeypatch, method, dtype, size, case):
    """As the solver's on the CPU, in as many steps; the same bits for every order of threads."""
    replay = importlib.import_module("pycnf.odeint.replay")
    recording = importlib.import_module("pycnf.odeint.recording")
    monkeypatch.setattr(recording, "_DEVICES", ("cpu",))
    monkeypatch.setattr(replay, "kernels", lambda y: host)
    times, options = SOLVES[case]
    y0, t = normal(size, dtype=dtype), torch.tensor(times, dtype=dtype)
    field = Swing()

    def solve(**more):
        with torch.no_grad():
            ys = pycnf.odeint(
                field, y0, t, method=method, rtol=1e-3, atol=1e-4, options={**options, **more}
            )
        stats = pycnf.last_stats()
        return ys, (stats.evaluations, stats.accepted, stats.rejected, stats.step_sizes)

    expected, counts = solve()
    mine, own = solve(cuda_graph=True)
    # The sums of a norm are in another order, so that step sizes differ in their last bits.
    assert own[:3] == counts[:3]
    close = 1e-10 if dtype == F64 and options.get("dtype") is None else 1e-5
    assert torch.allclose(mine, expected, rtol=close, atol=close)
    host.seed(2)
    again, _ = solve(cuda_graph=True)
    assert_same_bits(again, mine)


@pytest.mark.parametrize("batch", [3, 64])
@DTYPES
@pytest.mark.parametrize("method", ["dopri5", "tsit5", "bosh3"])
def test_flows(host, monkeypatch, method, dtype, batch):
    """A flow's solves and gradients as on the CPU, in as many steps."""
    captured = importlib.import_module("pycnf.flows.captured")
    monkeypatch.setattr(captured, "_DEVICES", ("cpu",))
    monkeypatch.setattr(captured, "_STEPS", 2)
    torch.manual_seed(0)
    field = pycnf.nn.MLP(2, (8, 8), context=1).to(dtype)
    with torch.no_grad():
        for parameter in field.parameters():
            parameter *= 2
    x, context = normal(batch, 2, dtype=dtype), normal(batch, 1, dtype=dtype, seed=1)

    def train(graph):
        flow = pycnf.CNF(
            field, method=method, engine="generic", cuda_graph=graph, rtol=1e-4, atol=1e-4,
            regularizers={"kinetic": 0.1},
        )  # fmt: skip
        leaf = x.clone().requires_grad_()
        density = flow.log_prob(leaf, context, seed=1)
        stats = flow.stats
        loss = (stats.regularizers["kinetic"] - density).mean()
        gradients = torch.autograd.grad(loss, [leaf, *field.parameters()])
        if graph:
            assert [type(each) for each in flow._recordings.kept.values()] == [captured.Recording]
        return [density.detach(), *gradients], (stats.nfe_forward, stats.accepted, stats.rejected)

    expected, counts = train(False)
    assert counts[1] > 2
    monkeypatch.setattr(captured, "kernels", lambda y: host)
    mine, own = train(True)
    assert own == counts
    close = 1e-9 if dtype == F64 else 1e-4
    for a, b in zip(mine, expected):
        torch.testing.assert_close(a, b, rtol=close, atol=close)
    host.seed(2)
    for a, b in zip(train(True)[0], mine):
        assert_same_bits(a, b)


# ---- whole solves of half states by the kernels --------------------------------------------------


@HALVES
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("method", ["dopri5", "tsit5", "bosh3", "dopri8", "rk4", "midpoint"])
def test_solves_of_half_states(host, monkeypatch, method, reverse, dtype):
    """They agree with the solution in float64 to half precision."""
    stepper = importlib.import_module("pycnf.odeint.stepper")
    y0, eps = normal(1025, dtype=dtype), torch.finfo(dtype).eps
    times = torch.linspace(1.0, -0.5, 13) if reverse else torch.linspace(0.0, 1.5, 13)
    tol = {"rtol": eps, "atol": eps} if method in ADAPTIVE else {}
    exact = pycnf.odeint(Swing(), y0.double(), times.double(), rtol=1e-10, atol=1e-10)
    seen = []

    def field(t, y):
        seen.append((t.dtype, y.dtype))
        return Swing()(t, y)

    monkeypatch.setattr(stepper, "kernels", lambda y: host)
    with torch.no_grad():
        ys = pycnf.odeint(field, y0, times, method=method, **tol)
    assert ys.dtype == dtype
    assert set(seen) == {(dtype, dtype)}
    assert torch.equal(ys[0], y0)
    error = (ys.double() - exact).abs().max() / exact.abs().max()
    assert error < (4 if method in ("dopri8", "rk4") else 16) * eps
