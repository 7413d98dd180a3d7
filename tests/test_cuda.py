"""The CUDA ops: equal to the reference, to the CPU kernels bit by bit, and free of host syncs.

Rounding decides step counts, so "equal" between CPU and CUDA means the same bits wherever the
arithmetic is +, -, *, / and sqrt.
"""

import copy
import functools
import importlib
import itertools
import math
import warnings

import field_cases
import fused_cases
import kernel_cases
import pytest
import torch
from field_cases import KINDS, LAYERS, Case
from kernel_cases import (
    ADAPTIVE,
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    HALVES,
    NAN,
    OFFSETS,
    SEGMENTS,
    TABLEAUX,
    assert_norms,
    assert_same_bits,
    normal,
)
from test_cnf_fused import field_of, outcome, points

import pycnf
from bench import cuda_forward
from pycnf import _C, _ops, reference

pytestmark = pytest.mark.cuda
if not _C.with_cuda:
    pytest.skip("pycnf was built without CUDA", allow_module_level=True)
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

DEVICE = "cuda"
# Empty, single, around a group of 4, around a block's range of 1024, several ranges.
SIZES = pytest.mark.parametrize("size", [0, 1, 3, 4, 7, 128, 1023, 1024, 1025, 4100, 33333])


@pytest.fixture
def ops():
    return torch.ops.pycnf


Guarded = functools.partial(kernel_cases.Guarded, device=DEVICE)


def step(size, stages, dtype, offset=0, seed=0):
    """y0, k with its newest row still NaN, and that row, on the CPU and guarded on the device."""
    y0 = normal(size, dtype=dtype, seed=seed)
    k = normal(stages, size, dtype=dtype, seed=seed + 1)
    fresh = normal(size, dtype=dtype, seed=seed + 2)
    return (y0, k, fresh), tuple(Guarded(x, offset) for x in (y0, k, fresh))


def assert_bounded(result, eager, exact):
    """f64: equal to rounding. f32: off by a small multiple of what PyTorch's own f32 is off by."""
    if exact.numel() == 0:
        return
    if eager.dtype == F64:
        torch.testing.assert_close(result.cpu(), exact, rtol=1e-12, atol=1e-13)
        return
    unit = torch.finfo(eager.dtype).eps * exact.abs().max()
    error = (result.cpu().double() - exact).abs().max()
    assert error <= 2 * (eager.double() - exact).abs().max() + 2 * unit


def tolerances(kind, size, dtype, seed=5):
    """rtol, atol on the CPU and on the device."""
    rtol, atol = torch.tensor(1e-3, dtype=F64), torch.tensor(1e-4, dtype=F64)
    if kind in ("each", "mixed"):
        rtol = rtol * (1 + normal(size, dtype=F64, seed=seed).abs())
    if kind == "each":
        atol = atol * (1 + normal(size, dtype=F64, seed=seed + 1).abs())
    on_device = [x if kind == "host" and x.dim() == 0 else x.to(DEVICE) for x in (rtol, atol)]
    return (rtol, atol), on_device


# ---- stage combination ---------------------------------------------------------------------------


@DTYPES
@SIZES
@OFFSETS
@pytest.mark.parametrize("flip", [False, True])
def test_stage(ops, dtype, size, offset, flip):
    (y0, k, fresh), device = step(size, 7, dtype, offset)
    weights, h = TABLEAUX["dopri5"]["a"][5], 0.37
    stored = 4
    k[stored] = NAN
    device[1].view[stored] = NAN
    on_device = ops.rk_stage(device[0].view, device[1].view, flip, [device[2].view], weights, h)
    exact_k = k.double()
    exact = reference.rk_stage(y0.double(), exact_k, flip, [fresh.double()], weights, h)
    eager = reference.rk_stage(y0, k.clone(), flip, [fresh], weights, h)
    on_cpu = torch.ops.pycnf.rk_stage(y0, k, flip, [fresh], weights, h)
    assert_same_bits(on_device, on_cpu)
    assert_same_bits(device[1].view, k)
    for x in device:
        x.check()
    assert_same_bits(device[2].view, fresh)
    assert_bounded(on_device, eager, exact)


@DTYPES
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("method", TABLEAUX)
def test_stage_of_every_method(ops, method, flip, dtype):
    """Every row of every tableau. Rows of weight zero are not read: what they hold is no matter."""
    tableau = TABLEAUX[method]
    size, h = 520, 0.21
    for row in [*tableau["a"][1:], tableau["b"]]:
        (y0, k, _), device = step(size, tableau["stages"], dtype)
        for stage in range(tableau["stages"]):
            if stage >= len(row) or row[stage] == 0:
                last = tableau["stages"] - 1
                place = last - stage if flip and stage in (0, last) else stage
                k[place] = NAN
                device[1].view[place] = NAN
        on_cpu = torch.ops.pycnf.rk_stage(y0, k, flip, [], row, h)
        on_device = ops.rk_stage(device[0].view, device[1].view, flip, [], row, h)
        assert not on_device.isnan().any()
        assert_same_bits(on_device, on_cpu)


@DTYPES
def test_stage_stores_what_the_kernel_cannot(ops, dtype):
    """Parts of a tuple, another dtype, a strided tensor: copied first."""
    parts = [normal(5, 3, dtype=dtype), normal(3, 5, dtype=dtype).t(), normal(1, dtype=F64)]
    (y0, k, _), device = step(31, 4, dtype)
    weights = [0.5, 0.25, 0.125]
    on_cpu = torch.ops.pycnf.rk_stage(y0, k, False, parts, weights, 0.1)
    on_device = [part.to(DEVICE) for part in parts]
    out = ops.rk_stage(device[0].view, device[1].view, False, on_device, weights, 0.1)
    assert_same_bits(out, on_cpu)
    assert_same_bits(device[1].view, k)


@DTYPES
def test_stage_keeps_the_state_s_shape(ops, dtype):
    y0 = normal(3, 5, 2, dtype=dtype).to(DEVICE)
    k = torch.zeros(4, 30, dtype=dtype, device=DEVICE)
    out = ops.rk_stage(y0, k, False, [y0], [1.0], 0.5)
    assert out.shape == y0.shape
    assert_same_bits(out, y0.cpu() * 1.5)


# ---- end of step ---------------------------------------------------------------------------------


def check_finish(ops, case, device, weights, flip, tol, segments, use_ratio=True, h=0.37):
    """Runs the op on the device and the CPU, and compares everything it returns and writes."""
    y0, k, fresh, y1 = case
    y0_, k_, fresh_, y1_ = (x.view for x in device)
    solution, error = weights
    (rtol, atol), (rtol_, atol_) = tol
    ratio = torch.full_like(y0, NAN) if use_ratio else None
    ratio_ = Guarded(torch.full_like(y0, NAN), device[0].offset) if use_ratio else None
    exact_y1, exact_k = y1.double(), k.double()
    exact = reference.rk_finish(
        y0.double(), exact_k, flip, [fresh.double()], exact_y1, solution, error, h,
        rtol, atol, segments,
    )  # fmt: skip
    on_cpu = torch.ops.pycnf.rk_finish(
        y0, k, flip, [fresh], y1, solution, error, h, rtol, atol, segments, ratio
    )
    on_device = ops.rk_finish(
        y0_, k_, flip, [fresh_], y1_, solution, error, h, rtol_, atol_, segments,
        ratio_.view if use_ratio else None,
    )  # fmt: skip
    assert on_device.device.type == DEVICE
    assert_norms(on_device, on_cpu)
    # The scaled error is a small difference of large terms, hence the wide bound in f32.
    torch.testing.assert_close(
        on_device.cpu(),
        exact,
        rtol=1e-11 if y0.dtype == F64 else 1e-3,
        atol=0.0,
        equal_nan=True,
    )
    assert_same_bits(k_, k)
    assert_same_bits(y1_, y1)
    for x in device:
        x.check()
    if use_ratio:
        assert_same_bits(ratio_.view, ratio)
        ratio_.check()
    return on_device


def finish_case(size, dtype, offset=0, stages=7, seed=0):
    (y0, k, fresh), device = step(size, stages, dtype, offset, seed)
    y1 = y0 + 0.1 * normal(size, dtype=dtype, seed=seed + 3)
    return (y0, k, fresh, y1), (*device, Guarded(y1, offset))


@DTYPES
@SIZES
@OFFSETS
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("method", ["dopri5", "tsit5"])
def test_finish(ops, dtype, size, offset, flip, method):
    """dopri5 has its solution already, tsit5 sums it."""
    tableau = TABLEAUX[method]
    solution = [] if tableau["solution_is_last_stage"] else tableau["b"]
    case, device = finish_case(size, dtype, offset)
    tol = tolerances("host", size, dtype)
    check_finish(ops, case, device, (solution, tableau["e"]), flip, tol, [0, size], offset == 0)


@DTYPES
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("method", [name for name, t in TABLEAUX.items() if t["adaptive"]])
def test_finish_of_every_method(ops, method, flip, dtype):
    tableau = TABLEAUX[method]
    for solution in ([], tableau["b"]):
        case, device = finish_case(1030, dtype, stages=tableau["stages"])
        tol = tolerances("host", 1030, dtype)
        check_finish(ops, case, device, (solution, tableau["e"]), flip, tol, [0, 1030])


@DTYPES
@OFFSETS
@pytest.mark.parametrize("kind", ["host", "device", "each", "mixed"])
def test_finish_tolerances(ops, kind, offset, dtype):
    case, device = finish_case(2051, dtype, offset)
    tol = tolerances(kind, 2051, dtype)
    check_finish(ops, case, device, ([], TABLEAUX["dopri5"]["e"]), False, tol, [0, 2051])


def test_finish_reads_numbers_on_host_and_device_alike(ops):
    """0-dim tolerances on the device are read there, rounded to the state's dtype as elsewhere."""
    results = []
    for kind in ("host", "device"):
        case, device = finish_case(999, F32)
        tol = tolerances(kind, 999, F32)
        error = TABLEAUX["dopri5"]["e"]
        results.append(check_finish(ops, case, device, ([], error), False, tol, [0, 999]))
    assert torch.equal(*results)


@DTYPES
@OFFSETS
@pytest.mark.parametrize("name", SEGMENTS)
def test_finish_segments(ops, name, offset, dtype):
    size = 6007
    segments = SEGMENTS[name](size)
    case, device = finish_case(size, dtype, offset)
    tol = tolerances("host", size, dtype)
    error = TABLEAUX["dopri5"]["e"]
    result = check_finish(ops, case, device, ([], error), False, tol, segments)
    assert math.isnan(result[0].item()) == name.startswith("first empty")


@pytest.mark.parametrize("size", [300_000, 600_001])
@pytest.mark.parametrize("name", ["all", "two", "adjoint"])
def test_finish_of_long_segments(ops, name, size):
    """Segments whose ranges a whole block adds up."""
    case, device = finish_case(size, F32)
    tol = tolerances("host", size, F32)
    error = TABLEAUX["bosh3"]["e"]
    check_finish(ops, case, device, ([], error), False, tol, SEGMENTS[name](size))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["all", "gaps", "many, through a table"])
def test_finish_of_a_state_with_large_ranges(ops, name):
    """More elements than 8192 ranges of 1024, and more ranges than blocks in flight."""
    size = 20_000_003
    case, device = finish_case(size, F32, stages=4)
    tol = tolerances("host", size, F32)
    error = TABLEAUX["bosh3"]["e"]
    check_finish(ops, case, device, ([], error), False, tol, SEGMENTS[name](size))


@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 1, 2, 4000, 6006])
def test_finish_flags_values_that_are_not_finite(ops, at, bad):
    """Also between segments, where the norm does not look."""
    size = 6007
    error = TABLEAUX["dopri5"]["e"]
    for segments in ([0, size], [1, 4000, 4001, 6000]):
        case, device = finish_case(size, F64)
        case[3][at] = bad
        device[3].view[at] = bad
        tol = tolerances("host", size, F64)
        result = check_finish(ops, case, device, ([], error), False, tol, segments)
        assert result[1].item() == 0.0


@pytest.mark.parametrize("part", [0, 1, 2])
def test_finish_takes_nan_as_python_s_max_does(ops, part):
    size = 3000
    segments = [0, 1000, 1000, 2000, 2000, 3000]
    case, device = finish_case(size, F64)
    case[1][2, 1000 * part + 17] = NAN
    device[1].view[2, 1000 * part + 17] = NAN
    tol = tolerances("host", size, F64)
    error = TABLEAUX["dopri5"]["e"]
    result = check_finish(ops, case, device, ([], error), False, tol, segments)
    assert math.isnan(result[0].item()) == (part == 0)


def test_finish_wants_sums_of_equal_length(ops):
    (y0, k, _, y1), _ = finish_case(8, F64)
    y0, k, y1 = (x.to(DEVICE) for x in (y0, k, y1))
    tol = torch.tensor(1e-3, dtype=F64)
    with pytest.raises(RuntimeError, match="solution must be empty or as long as error"):
        ops.rk_finish(y0, k, False, [], y1, [1.0], [1.0, 2.0], 0.1, tol, tol, [0, 8])


# ---- interpolation -------------------------------------------------------------------------------


@DTYPES
@SIZES
@OFFSETS
@pytest.mark.parametrize("times", [0, 1, 3])
def test_interpolate(ops, dtype, size, offset, times):
    check_interpolate(ops, dtype, size, offset, times)


@DTYPES
@pytest.mark.parametrize("times", [127, 128, 129, 300])
@pytest.mark.parametrize("size", [5, 64])
def test_interpolate_at_more_times_than_fit_one_launch(ops, dtype, size, times):
    check_interpolate(ops, dtype, size, 0, times)


def check_interpolate(ops, dtype, size, offset, times):
    h = 0.37
    case, device = finish_case(size, dtype, offset)
    x = [i / max(1, times - 1) for i in range(times)]
    middle = TABLEAUX["dopri5"]["m"]
    for flip in (False, True):
        y0, k, _, y1 = case
        y0_, k_, _, y1_ = (part.view for part in device)
        on_cpu, eager = torch.full((2, times, size), NAN, dtype=dtype)
        exact = torch.full((times, size), NAN, dtype=F64)
        on_device = Guarded(on_cpu, offset)
        ops.rk_interpolate(y0_, y1_, k_, flip, middle, h, x, on_device.view)
        torch.ops.pycnf.rk_interpolate(y0, y1, k, flip, middle, h, x, on_cpu)
        reference.rk_interpolate(y0, y1, k, flip, middle, h, x, eager)
        wide = (part.double() for part in (y0, y1, k))
        reference.rk_interpolate(*wide, flip, middle, h, x, exact)
        assert_same_bits(on_device.view, on_cpu)
        on_device.check()
        assert_bounded(on_device.view, eager, exact)


# ---- initial step --------------------------------------------------------------------------------


@DTYPES
@OFFSETS
@pytest.mark.parametrize("size", [0, 1, 5, 1025, 6007])
@pytest.mark.parametrize("kind", ["host", "device", "each", "mixed"])
@pytest.mark.parametrize("second", [False, True])
def test_initial_norms(ops, dtype, offset, size, kind, second):
    tensors = [normal(size, dtype=dtype, seed=seed) for seed in range(3)]
    on_device = [Guarded(x, offset).view for x in tensors]
    if not second:
        tensors[2] = on_device[2] = None
    (rtol, atol), (rtol_, atol_) = tolerances(kind, size, dtype)
    for name in ("all", "many", "many, through a table") if size > 5 else ("all",):
        segments = SEGMENTS[name](size)
        exact = reference.rk_initial_norms(
            *(x if x is None else x.double() for x in tensors), rtol, atol, segments
        )
        on_cpu = torch.ops.pycnf.rk_initial_norms(*tensors, rtol, atol, segments)
        result = ops.rk_initial_norms(*on_device, rtol_, atol_, segments)
        assert_norms(result, on_cpu)
        torch.testing.assert_close(
            result.cpu(), exact, rtol=1e-12 if dtype == F64 else 1e-5, atol=0.0, equal_nan=True
        )


# ---- rk_combine ----------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("terms", [1, 2, 3, 4, 5, 7, 8, 9, 13, 14])
@pytest.mark.parametrize("size", [0, 1, 6, 1029])
def test_combine(ops, dtype, terms, size):
    y = normal(size, dtype=dtype)
    k = [normal(size, dtype=dtype, seed=j) for j in range(terms)]
    weights = [0.0 if j % 5 == 2 else (-1) ** j / (j + 1) for j in range(terms)]
    on_cpu = torch.ops.pycnf.rk_combine(y, k, weights, 0.3)
    result = ops.rk_combine(y.to(DEVICE), [row.to(DEVICE) for row in k], weights, 0.3)
    assert_same_bits(result, on_cpu)
    exact = reference.rk_combine(y.double(), [row.double() for row in k], weights, 0.3)
    eager = reference.rk_combine(y, k, weights, 0.3)
    assert_bounded(result, eager, exact)


def test_combine_of_strided_tensors(ops):
    y = normal(6, 5, dtype=F64)
    k = [normal(5, 6, dtype=F64, seed=1).t(), normal(6, 10, dtype=F64, seed=2)[:, ::2]]
    result = ops.rk_combine(y.t().to(DEVICE).t(), [x.to(DEVICE) for x in k], [0.5, -2.0], 0.3)
    assert_same_bits(result, torch.ops.pycnf.rk_combine(y, k, [0.5, -2.0], 0.3))


def test_combine_gradients(ops):
    y = normal(4, 3, dtype=F64).to(DEVICE).requires_grad_()
    k = [normal(4, 3, dtype=F64, seed=j).to(DEVICE).requires_grad_() for j in (1, 2, 3)]
    h = torch.tensor(0.3, dtype=F64, device=DEVICE, requires_grad=True)

    def combined(y, h, *k):
        return ops.rk_combine(y, list(k), [0.5, 0.0, -2.0], 0.3, h)

    # h's number comes by value, so its gradient is checked against the reference's instead.
    assert torch.autograd.gradcheck(lambda y, *k: combined(y, h.detach(), *k), (y, *k))
    inputs = (y, h, *k)
    mine = torch.autograd.grad(combined(*inputs).sin().sum(), inputs)
    theirs = reference.rk_combine(y, k, [0.5, 0.0, -2.0], 0.3, h)
    for a, b in zip(mine, torch.autograd.grad(theirs.sin().sum(), inputs)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


# ---- states of 16 bits: computed in f32, and each result rounded once ----------------------------

# 8 is 16 bytes.
HALF_OFFSETS = pytest.mark.parametrize("offset", [0, 1, 4, 8])


@HALVES
@SIZES
@HALF_OFFSETS
@pytest.mark.parametrize("flip", [False, True])
def test_stage_of_half_states(ops, dtype, size, offset, flip):
    (y0, k, fresh), device = step(size, 7, dtype, offset)
    weights = TABLEAUX["dopri5"]["a"][5]
    result = ops.rk_stage(device[0].view, device[1].view, flip, [device[2].view], weights, 0.37)
    wide = k.float()
    exact = ops.rk_stage(y0.float(), wide, flip, [fresh.float()], weights, 0.37)
    assert_same_bits(result, exact.to(dtype))
    assert_same_bits(device[1].view, wide.to(dtype))
    for x in device:
        x.check()


@HALVES
@SIZES
@HALF_OFFSETS
@pytest.mark.parametrize("kind", ["host", "device", "each"])
@pytest.mark.parametrize("method", ["dopri5", "tsit5"])
def test_finish_of_half_states(ops, dtype, size, offset, kind, method):
    """The solution that the error is scaled by is the rounded one."""
    tableau = TABLEAUX[method]
    solution = [] if tableau["solution_is_last_stage"] else tableau["b"]
    (y0, k, fresh, y1), device = finish_case(size, dtype, offset)
    y0_, k_, fresh_, y1_ = (x.view for x in device)
    ratio_ = Guarded(torch.full_like(y0, NAN), offset)
    tol, tol_ = tolerances(kind, size, dtype)
    segments = [0, size // 3, size // 3, size] if size > 3 else [0, size]
    result = ops.rk_finish(
        y0_, k_, True, [fresh_], y1_, solution, tableau["e"], 0.37, *tol_, segments, ratio_.view
    )
    y0, k, fresh, y1 = (x.float() for x in (y0, k, fresh, y1))
    if solution:
        y1 = ops.rk_stage(y0, k, True, [fresh], solution, 0.37).to(dtype).float()
    ratio = torch.full_like(y0, NAN)
    expected = ops.rk_finish(
        y0, k, True, [fresh], y1, [], tableau["e"], 0.37, *tol, segments, ratio
    )
    assert_norms(result, expected)
    for x, wide in zip((*device, ratio_), (y0, k, fresh, y1, ratio)):
        assert_same_bits(x.view, wide.to(dtype))
        x.check()


@HALVES
def test_half_states_overflow_to_infinity_where_they_are_stored(ops, dtype):
    y0 = torch.full((40,), torch.finfo(dtype).max, dtype=dtype, device=DEVICE)
    y1, tol = torch.empty_like(y0), torch.tensor(1e-3, dtype=F64)
    result = ops.rk_finish(
        y0, y0[None].clone(), False, [], y1, [0.25], [1e-3], 1.0, tol, tol, [0, 40]
    )
    assert y1.isinf().all()
    assert result[1].item() == 0.0


@HALVES
@HALF_OFFSETS
@pytest.mark.parametrize("size", [1, 31, 1025, 6007])
@pytest.mark.parametrize("second", [False, True])
def test_initial_norms_of_half_states(ops, dtype, offset, size, second):
    tensors = [normal(size, dtype=dtype, seed=seed) for seed in range(3)]
    on_device, wide = [Guarded(x, offset).view for x in tensors], [x.float() for x in tensors]
    if not second:
        on_device[2] = wide[2] = None
    tol, tol_ = tolerances("host", size, dtype)
    result = ops.rk_initial_norms(*on_device, *tol_, [0, size])
    assert_norms(result, ops.rk_initial_norms(*wide, *tol, [0, size]))


@HALVES
@SIZES
@HALF_OFFSETS
@pytest.mark.parametrize("times", [1, 3, 129])
def test_interpolate_half_states(ops, dtype, size, offset, times):
    (y0, k, _, y1), device = finish_case(size, dtype, offset)
    x, middle = [i / max(1, times - 1) for i in range(times)], TABLEAUX["dopri5"]["m"]
    exact = torch.full((times, size), NAN)
    out = Guarded(exact.to(dtype), offset)
    y0_, k_, _, y1_ = (part.view for part in device)
    ops.rk_interpolate(y0_, y1_, k_, False, middle, 0.37, x, out.view)
    ops.rk_interpolate(y0.float(), y1.float(), k.float(), False, middle, 0.37, x, exact)
    assert_same_bits(out.view, exact.to(dtype))
    out.check()


@HALVES
@pytest.mark.parametrize("ordered", [False, True])
def test_combine_half_states(ops, dtype, ordered):
    y, *k = (normal(1029, dtype=dtype, seed=j) for j in range(10))
    weights = [(-1) ** j / (j + 1) for j in range(9)]
    k_ = [row.to(DEVICE) for row in k]
    result = ops.rk_combine(y.to(DEVICE), k_, weights, 0.3, None, ordered)
    wide = [row.float() for row in k]
    exact = ops.rk_combine(y.float(), wide, weights, 0.3, None, ordered)
    assert_same_bits(result, exact.to(dtype))


@HALVES
def test_combine_gradients_of_half_states(ops, dtype):
    y, *k = (normal(4, 3, dtype=dtype, seed=j).to(DEVICE).requires_grad_() for j in range(3))
    h = torch.tensor(0.25, dtype=dtype, device=DEVICE, requires_grad=True)
    inputs = (y, h, *k)
    mine = torch.autograd.grad(ops.rk_combine(y, k, [0.5, -2.0], 0.25, h).sum(), inputs)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    theirs = reference.rk_combine(wide[0], wide[2:], [0.5, -2.0], 0.25, wide[1])
    for a, b in zip(mine, torch.autograd.grad(theirs.sum(), wide)):
        assert a.dtype == dtype
        close = 8 * torch.finfo(dtype).eps
        torch.testing.assert_close(a.double(), b, rtol=close, atol=8 * close)


@HALVES
def test_probes_of_half_states(dtype):
    """They have no kernels."""
    x = normal(5, 3, dtype=dtype)
    keys = _ops.probe_keys(x.to(DEVICE))
    assert torch.equal(keys.cpu(), reference.probe_keys(x))
    probes = _ops.probe_sample(keys, 3, 2, 3, noise="rademacher", dtype=dtype)
    assert torch.equal(probes.cpu(), reference.probe_sample(keys.cpu(), 3, 2, 3, False, dtype))


# ---- probes --------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("shape", [(0, 3), (4, 0), (1, 1), (7, 3), (300, 2), (33, 5, 4), (9,)])
def test_keys(ops, dtype, shape):
    x = normal(*shape, dtype=dtype)
    if x.numel():
        x.view(-1)[0] = -0.0
    keys = ops.probe_keys(x.to(DEVICE))
    assert torch.equal(keys.cpu(), torch.ops.pycnf.probe_keys(x))
    assert torch.equal(keys.cpu(), reference.probe_keys(x))


@DTYPES
@pytest.mark.parametrize("features", [0, 1, 2, 3, 4, 5, 31, 127, 128, 129, 300])
@pytest.mark.parametrize(("probes", "batch"), [(0, 3), (1, 0), (1, 5), (3, 70)])
def test_rademacher(ops, dtype, features, probes, batch):
    keys = torch.ops.pycnf.probe_keys(normal(batch, 2, dtype=dtype))
    arguments = (-5, probes, features, False, dtype)
    result = ops.probe_sample(keys.to(DEVICE), *arguments).cpu()
    assert torch.equal(result, torch.ops.pycnf.probe_sample(keys, *arguments))
    assert torch.equal(result, reference.probe_sample(keys, *arguments))


@DTYPES
@pytest.mark.parametrize("features", [0, 1, 2, 3, 4, 5, 31, 129])
@pytest.mark.parametrize(("probes", "batch"), [(0, 3), (1, 0), (1, 5), (3, 70)])
def test_gaussian(ops, dtype, features, probes, batch):
    keys = torch.ops.pycnf.probe_keys(normal(batch, 2, dtype=dtype))
    arguments = (2**40 + 1, probes, features, True, dtype)
    result = ops.probe_sample(keys.to(DEVICE), *arguments).cpu()
    rtol, atol = (1e-13, 1e-14) if dtype == F64 else (2e-6, 2e-6)
    for other in (torch.ops.pycnf, reference):
        expected = other.probe_sample(keys, *arguments)
        torch.testing.assert_close(result, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", [F32, F64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [0, 1, 6, 128, 300])
def test_time_tensors(ops, count, dtype):
    values = [(-1) ** i / (3 + i) for i in range(count)]
    times = ops.time_tensors(values, dtype, torch.device(DEVICE))
    expected = torch.ops.pycnf.time_tensors(values, dtype, torch.device("cpu"))
    assert [t.shape for t in times] == [torch.Size([])] * count
    assert all(t.device.type == DEVICE and t.dtype == dtype for t in times)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(times, expected))


# ---- as a citizen of CUDA ------------------------------------------------------------------------


def every_op(ops, case, tol, segments, x, out):
    """One call of each op; tensors on the device."""
    y0, k, fresh, y1 = case
    dopri5 = TABLEAUX["dopri5"]
    keys = ops.probe_keys(y0.view(-1, 1))
    return [
        ops.rk_stage(y0, k, False, [fresh], dopri5["a"][3], 0.2),
        ops.rk_finish(y0, k, False, [fresh], y1, dopri5["b"], dopri5["e"], 0.2, *tol, segments),
        ops.rk_interpolate(y0, y1, k, False, dopri5["m"], 0.2, x, out),
        out,
        ops.rk_initial_norms(y0, fresh, None, *tol, segments),
        ops.rk_combine(y0, [fresh, y1], [0.5, 0.25], 0.2),
        keys,
        ops.probe_sample(keys, 3, 2, 5, False, F32),
        ops.probe_sample(keys, 3, 2, 5, True, F32),
        torch.stack(ops.time_tensors([0.1, 0.2], F32, y0.device)),
    ]


def every_op_case(size=6000):
    _, device = finish_case(size, F32)
    x = [i / 200 for i in range(200)]
    out = torch.full((len(x), size), NAN, device=DEVICE)
    return [part.view for part in device], x, out


@pytest.mark.parametrize("kind", ["host", "device", "each"])
def test_no_op_waits_for_the_gpu(ops, kind):
    case, x, out = every_op_case()
    _, tol = tolerances(kind, 6000, F32)
    segments = SEGMENTS["many, through a table"](6000)
    every_op(ops, case, tol, segments, x, out)  # modules load lazily
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        every_op(ops, case, tol, segments, x, out)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_same_bits_every_time(ops):
    case, x, out = every_op_case(40_000)
    _, tol = tolerances("host", 40_000, F32)
    segments = SEGMENTS["adjoint"](40_000)
    first = every_op(ops, case, tol, segments, x, out)
    first[3] = out.clone()
    for _ in range(5):
        for a, b in zip(first, every_op(ops, case, tol, segments, x, out)):
            assert a is b is None or torch.equal(a, b)


def test_current_stream_is_used(ops):
    """Work queued on a side stream is ordered after what that stream is busy with."""
    case, x, out = every_op_case()
    _, tol = tolerances("host", 6000, F32)
    expected = every_op(ops, case, tol, [0, 6000], x, out)
    expected[3] = out.clone()
    spoiled = [part.clone().fill_(NAN) for part in case]
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        for target, part in zip(spoiled, case):
            target.copy_(part)
        result = every_op(ops, spoiled, tol, [0, 6000], x, out)
    side.synchronize()
    for a, b in zip(expected, result):
        assert a is b is None or torch.equal(a, b)


def test_ops_can_be_captured(ops):
    """Arguments travel by value, so a replay needs nothing that was the host's."""
    case, x, out = every_op_case()
    _, tol = tolerances("device", 6000, F32)
    segments = SEGMENTS["many, through a table"](6000)
    every_op(ops, case, tol, segments, x, out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = every_op(ops, case, tol, segments, x, out)
    case[0].mul_(1.5)
    graph.replay()
    torch.cuda.synchronize()
    replayed = [None if part is None else part.clone() for part in captured]
    for a, b in zip(replayed, every_op(ops, case, tol, segments, x, out)):
        assert a is b is None or torch.equal(a, b)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_state_s_device_is_used(ops):
    case, x, out = every_op_case()
    _, tol = tolerances("host", 6000, F32)
    expected = every_op(ops, case, tol, [0, 6000], x, out)
    other = torch.device("cuda", 1)
    moved = [part.to(other) for part in case]
    result = every_op(ops, moved, tol, [0, 6000], x, out.to(other))
    for a, b in zip(expected, result):
        assert a is b is None or (b.device == other and torch.equal(a.cpu(), b.cpu()))


def test_mixed_devices_are_refused(ops):
    y0, k = torch.zeros(4), torch.zeros(2, 4)
    with pytest.raises(RuntimeError, match="k must have y0's dtype and device"):
        ops.rk_stage(y0.to(DEVICE), k, False, [], [1.0], 0.1)
    with pytest.raises(RuntimeError, match="y0 must be on the GPU"):
        ops.rk_stage(y0, k.to(DEVICE), False, [], [1.0], 0.1)
    k, tol = k.to(DEVICE), torch.tensor([1e-3], dtype=F64)
    y0 = y0.to(DEVICE)
    with pytest.raises(RuntimeError, match="rtol must be 0-dim or have one value per value"):
        ops.rk_finish(y0, k, False, [], y0.clone(), [], [1.0], 0.1, tol, tol, [0, 4])


def test_opcheck():
    case, x, out = every_op_case(24)
    y0, k, fresh, y1 = case
    tol = torch.tensor(1e-3, dtype=F64)
    ratio = torch.empty_like(y0)
    keys = torch.arange(3, device=DEVICE)
    ops = torch.ops.pycnf
    for op, arguments in [
        (ops.rk_stage, (y0, k, False, [fresh], [0.5, 0.25], 0.1)),
        (ops.rk_finish, (y0, k, True, [fresh], y1, [], [0.5] * 7, 0.1, tol, tol, [0, 24], ratio)),
        (ops.rk_interpolate, (y0, y1, k, False, [0.5] * 7, 0.1, x, out)),
        (ops.rk_initial_norms, (y0, fresh, None, tol, tol, [0, 24])),
        (ops.rk_combine, (y0, [fresh], [0.5], 0.1)),
        (ops.probe_keys, (y0.view(8, 3),)),
        (ops.probe_sample, (keys, 3, 2, 5, True, F32)),
    ]:
        torch.library.opcheck(op.default, arguments)


# ---- the field, for a network of any width -------------------------------------------------------


@pytest.mark.parametrize("hidden", [(), (1,), (5,), (5, 4), (128, 64), (33, 64, 130)], ids=str)
@pytest.mark.parametrize("features", [1, 3, 16])
def test_field(ops, features, hidden):
    for batch, count in [(1, 1), (1, 3), (7, 1), (300, 3)]:
        field_cases.compare(ops, Case(features, hidden, batch, count), DEVICE)


def test_field_of_many_samples(ops):
    for hidden in [(36,), (128, 128), (64, 64, 64)]:
        case = Case(2, hidden, 5000, 1)
        field_cases.compare(ops, case, DEVICE, KINDS, 1e-11)


@pytest.mark.parametrize("activation", pycnf.nn.ACTIVATIONS)
def test_field_by_activation(ops, activation):
    for hidden in [(5,), (8, 4), (5, 4, 6)]:
        field_cases.compare(ops, Case(hidden=hidden, activation=activation), DEVICE)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("time", ["t", ("fourier", 6)], ids=["t", "fourier"])
@pytest.mark.parametrize("own", [False, True], ids=["shared-t", "t-per-sample"])
def test_field_by_layer(ops, layer, time, own):
    for batch, hidden in itertools.product((1, 19), [(), (4,), (5, 4), (5, 4, 6)]):
        case = Case(3, hidden, batch, 2, own, 2, layer=layer, time=time)
        field_cases.compare(ops, case, DEVICE)
    turned = Case(hidden=(8, 8), own=own, turned=True, layer=layer, time=time)
    field_cases.compare(ops, turned, DEVICE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ["tanh", "softplus", "gelu", "sin"])
@pytest.mark.parametrize("hidden", [(300, 300), (300, 301, 300)], ids=str)
def test_field_in_float32(ops, kind, activation, hidden):
    """As near the truth as the CPU's: TF32 is not used unasked."""
    assert not torch.backends.cuda.matmul.allow_tf32
    case = Case(6, hidden, 200, 1, context=2, dtype=F32, activation=activation)

    places = (("cpu", F64), ("cpu", F32), (DEVICE, F32))
    truth, theirs, mine = (field_cases.outcome(ops, case, kind, *place) for place in places)
    for exact, a, b in zip(truth, mine, theirs, strict=True):
        assert (a - exact).norm() <= 4 * (b - exact).norm() + 1e-6 * exact.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_precisions_of_the_field(ops, kind):
    settings = {"hidden": (300, 301, 300), "batch": 64}
    found = field_cases.errors_by_precision(ops, DEVICE, kind, **settings)
    assert found["float32"] < 1e-5, found
    assert found["3xtf32"] < 4 * found["float32"] + 2e-6, found
    assert 1e-5 < found["tf32"] < 1e-2, found
    assert 1e-4 < found["bf16"] < 1e-1, found


def field_calls(case, t):
    """Calls of every op of the field at a time on the device, to be made again and again."""
    calls, ops = [], torch.ops.pycnf
    for kind in (*KINDS, "vjp"):
        name, (_, *others) = case.forward(kind)
        forward = functools.partial(getattr(ops, name), t, *field_cases.moved(others, DEVICE))
        if kind == "vjp":
            calls.append(forward)
            continue
        calls.append(functools.partial(forward, True))
        *results, kept = forward(True)
        bars = [torch.ones_like(x) for x in results] + [None] * (kind == "value")
        name, (_, *others) = case.backward(kind)
        others = field_cases.moved(others, DEVICE)
        calls.append(functools.partial(getattr(ops, name), *bars, t, *others, kept, True))
    return calls


def call_all(calls):
    """All tensors that calls return."""
    found = []
    for call in calls:
        for result in call():
            found += result if isinstance(result, (list, tuple)) else [result]
    return found


FIELDS = pytest.mark.parametrize(
    "settings",
    [
        {"hidden": (128, 128)},
        {"hidden": (128, 128, 128), "time": ("fourier", 4)},
        {"hidden": (128,), "own": True, "layer": "concat"},
    ],
    ids=["two layers", "fourier", "t-per-sample"],
)


@FIELDS
def test_no_op_of_the_field_waits_for_the_gpu(settings):
    case = Case(3, batch=200, context=2, **settings)
    calls = field_calls(case, case.t.to(DEVICE))
    call_all(calls)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call_all(calls)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@FIELDS
def test_the_field_gives_the_same_bits_every_time(settings):
    case = Case(3, batch=200, context=2, **settings)
    calls = field_calls(case, case.t.to(DEVICE))
    first = [x.clone() for x in call_all(calls)]
    for _ in range(3):
        for a, b in zip(first, call_all(calls), strict=True):
            assert torch.equal(a, b)


@FIELDS
def test_the_field_can_be_captured(settings):
    """Time is read where it is, so a replay is at the time that is there then."""
    case = Case(3, batch=200, context=2, **settings)
    t = case.t.to(DEVICE)
    calls = field_calls(case, t)
    first = [x.clone() for x in call_all(calls)]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call_all(calls)
    t += 0.25
    graph.replay()
    torch.cuda.synchronize()
    replayed = [x.clone() for x in captured]
    for a, b in zip(replayed, call_all(calls), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert not all(torch.equal(a, b) for a, b in zip(replayed, first))


@pytest.mark.parametrize("kind", [*KINDS, "vjp"])
def test_opcheck_of_the_field(kind):
    """Fakes have the sizes of what is kept on a GPU."""
    case = Case(context=2, time=("fourier", 4))
    name, arguments = case.forward(kind)
    arguments = list(field_cases.moved(arguments, DEVICE))
    for x in (*arguments[:2], *next(a for a in arguments if isinstance(a, list))):
        if isinstance(x, torch.Tensor):
            x.requires_grad_()
    op = getattr(torch.ops.pycnf, name).default
    torch.library.opcheck(op, (*arguments, *([] if kind == "vjp" else [True])))


@pytest.mark.parametrize("regularizers", [{}, {"kinetic": 0.1}, {"kinetic": 0.1, "jacobian": 0.1}])
@pytest.mark.parametrize("divergence", ["hutchinson", "exact"])
@pytest.mark.parametrize("hidden", [(512, 512), (160, 160, 160)], ids=len)
def test_recorded_flows_of_a_wide_network(hidden, divergence, regularizers):
    """By the ops as by its layers in PyTorch."""
    torch.manual_seed(0)
    field = pycnf.nn.MLP(2, hidden).double().to(DEVICE)
    options = {"divergence": divergence, "regularizers": regularizers}
    found = []
    for engine in ("fused", "generic"):
        flow = pycnf.CNF(field, cuda_graph=True, engine=engine, **options)
        for seed in range(3):
            found.append(train_flow(flow, normal(65, 2, dtype=F64, seed=seed).to(DEVICE), seed))
        assert flow.stats.engine == engine
        assert None not in flow._recordings.kept.values()
    for (mine, own), (expected, counts) in zip(found[:3], found[3:]):
        assert own == counts
        for a, b in zip(mine, expected):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


# ---- whole solves --------------------------------------------------------------------------------

FIXED = [name for name, tableau in TABLEAUX.items() if not tableau["adaptive"]]


class Predation(torch.nn.Module):
    """Lotka-Volterra; products and sums only, so that CPU and GPU evaluate it to the same bits."""

    def __init__(self, dtype):
        super().__init__()
        self.rates = torch.nn.Parameter(torch.tensor([1.5, 1.0, 3.0, 0.7], dtype=dtype))
        self.times = []

    def forward(self, t, y):
        self.times.append(t.detach().cpu())
        a, b, c, d = self.rates
        prey, predator = y[..., 0], y[..., 1]
        return torch.stack([prey * a - prey * predator * b, prey * predator * d - predator * c], -1)


def solve(device, method, dtype, solver="odeint", reverse=False, **keywords):
    field = Predation(dtype).to(device)
    y0 = (1 + normal(37, 2, dtype=dtype).abs()).to(device).requires_grad_()
    t = torch.linspace(0, 2, 9 if method in ADAPTIVE else 33, dtype=dtype, device=device)
    t = t.flip(0) if reverse else t
    tol = {}
    if method in ADAPTIVE:
        # With a gradient PyTorch's own operations choose a first step, each device's to its own
        # rounding.
        tol = {"rtol": 1e-5, "atol": 1e-6, "options": {"first_step": 0.05}}
    ys = getattr(pycnf, solver)(field, y0, t, method=method, **tol, **keywords)
    gradients = torch.autograd.grad(ys[-1].pow(2).sum(), [y0, field.rates])
    return ys.detach().cpu(), torch.stack(field.times), [g.cpu() for g in gradients]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [F32, F64], ids=["f32", "f64"])
@pytest.mark.parametrize("method", ADAPTIVE + FIXED)
def test_odeint_takes_the_steps_it_takes_on_the_cpu(method, dtype, reverse):
    """The field is evaluated at the same times, and everything but the gradients' sums agrees."""
    ys, times, gradients = solve(DEVICE, method, dtype, reverse=reverse)
    ys_cpu, times_cpu, gradients_cpu = solve("cpu", method, dtype, reverse=reverse)
    rtol, atol = (1e-10, 1e-12) if dtype == F64 else (1e-4, 1e-5)
    # The norm of an error, itself a small difference, has its sums in another order.
    torch.testing.assert_close(times, times_cpu, rtol=1e-4 if dtype == F32 else 1e-6, atol=0.0)
    torch.testing.assert_close(ys, ys_cpu, rtol=rtol, atol=atol)
    for a, b in zip(gradients, gradients_cpu):
        torch.testing.assert_close(a, b, rtol=10 * rtol, atol=10 * atol * b.abs().max().item())


def adjoint_solve(device, method, gradient):
    return solve(device, method, F64, "odeint_adjoint", gradient=gradient)


@pytest.mark.parametrize("gradient", ["continuous", "discrete"])
@pytest.mark.parametrize("method", ["dopri5", "tsit5", "rk4"])
def test_odeint_adjoint(method, gradient):
    """The adjoint's state has a segment for each parameter, and an odd size."""
    ys, times, gradients = adjoint_solve(DEVICE, method, gradient)
    ys_cpu, times_cpu, gradients_cpu = adjoint_solve("cpu", method, gradient)
    assert len(times) == len(times_cpu)
    torch.testing.assert_close(ys, ys_cpu, rtol=1e-10, atol=1e-12)
    for a, b in zip(gradients, gradients_cpu):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9 * b.abs().max().item())


def test_odeint_of_a_tuple():
    def field(t, state):
        y, _ = state
        return -y * y + t, y.sum(-1)

    results = []
    for device in (DEVICE, "cpu"):
        y0 = normal(11, 3, dtype=F64).abs().to(device)
        state = (y0, torch.zeros_like(y0[:, 0]))
        t = torch.tensor([0.0, 0.5, 1.7], dtype=F64, device=device)
        results.append([part.cpu() for part in pycnf.odeint(field, state, t, rtol=1e-6, atol=1e-8)])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@torch.no_grad()  # with a gradient the first step is chosen by many operations, each read back
def test_at_most_one_sync_an_attempt():
    """Counted as warnings of PyTorch's own sync detector."""
    size = []

    def field(t, y):
        size.append(y.numel())
        return -y

    y0 = torch.ones(64, 2, device=DEVICE)
    t = torch.tensor([0.0, 1.0])
    pycnf.odeint(field, y0, t, rtol=1e-6, atol=1e-6)
    size.clear()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            pycnf.odeint(field, y0, t, rtol=1e-6, atol=1e-6)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    syncs = [w for w in caught if "synchroniz" in str(w.message).lower()]
    attempts = (len(size) - 2) // 6
    # Beyond one an attempt: the initial step's norms, the times, the first state's check.
    assert len(syncs) <= attempts + 6


@HALVES
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("method", ["dopri5", "tsit5", "dopri8", "rk4"])
def test_solves_of_half_states(method, reverse, dtype):
    """They agree with the solution in float64 to half precision."""

    def field(t, y):
        return torch.sin(3 * t) * y.roll(1, -1) - 0.5 * y

    y0, eps = normal(1025, dtype=dtype), torch.finfo(dtype).eps
    times = torch.linspace(1.0, -0.5, 13) if reverse else torch.linspace(0.0, 1.5, 13)
    tol = {} if method == "rk4" else {"rtol": eps, "atol": eps}
    with torch.no_grad():
        ys = pycnf.odeint(field, y0.to(DEVICE), times.to(DEVICE), method=method, **tol)
    exact = pycnf.odeint(field, y0.double(), times.double(), rtol=1e-10, atol=1e-10)
    assert ys.dtype == dtype
    error = (ys.cpu().double() - exact).abs().max() / exact.abs().max()
    assert error < 16 * eps


@HALVES
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_gradients_of_half_states(method, dtype):
    # The choice of a first step with a graph is PyTorch's, whose squares of f16 are infinite.
    def gradient(dtype, device, method, **tol):
        y0 = normal(65, dtype=dtype).to(device).requires_grad_()
        t = torch.tensor([0.0, 0.5, 1.0], device=device)
        ys = pycnf.odeint(lambda t, y: torch.sin(y) - t * y, y0, t, method=method, **tol)
        return torch.autograd.grad(ys[-1].sum(), y0)[0].cpu().double()

    eps = torch.finfo(dtype).eps
    options = {"first_step" if method == "dopri5" else "step_size": 0.1}
    tol = {"rtol": eps, "atol": eps, "options": options}
    mine = gradient(dtype, DEVICE, method, **tol)
    exact = gradient(F64, "cpu", "dopri5", rtol=1e-8, atol=1e-8)
    assert (mine - exact).abs().max() < 64 * eps


def test_compiled_ops_serve_the_gpu():
    for dtype in (F16, BF16, F32, F64):
        assert _ops.has_kernels(dtype, torch.device(DEVICE))
    assert not _ops.has_kernels(torch.complex64, torch.device(DEVICE))


# ---- solves without the host in their loop -------------------------------------------------------


class Swing(torch.nn.Module):
    def __init__(self, dtype=F64):
        super().__init__()
        self.inner = torch.nn.Parameter(normal(3, 8, dtype=dtype).to(DEVICE))
        self.outer = torch.nn.Parameter(normal(8, 3, dtype=dtype, seed=1).to(DEVICE) / 3)

    def forward(self, t, y):
        return torch.tanh(y @ self.inner) @ self.outer * torch.cos(3 * t) - 0.3 * y


def recorded_solve(field, y0, t, graph, **keywords):
    options = {**keywords.pop("options", {}), **({"cuda_graph": True} if graph else {})}
    with torch.no_grad():
        ys = pycnf.odeint(field, y0, t, options=options, **keywords)
    stats = pycnf.last_stats()
    return ys, (stats.evaluations, stats.accepted, stats.rejected, stats.step_sizes)


@pytest.mark.parametrize("times", [(0.0, 1.0), (0.0, 0.01, 0.02, 1.0, 2.0), (1.0, 0.9, -1.0)])
@pytest.mark.parametrize("method", [*ADAPTIVE, "rk4", "euler"])
@DTYPES
def test_recorded_solves(dtype, method, times):
    """As with the host in the loop: done as written, recorded, replayed, and as one launch."""
    t = torch.tensor(times, dtype=dtype, device=DEVICE)
    field, y0 = Swing(dtype), normal(5, 3, dtype=dtype).to(DEVICE)
    keywords = {"method": method, "rtol": 1e-4, "atol": 1e-5}
    if method in ("rk4", "euler"):
        keywords["options"] = {"step_size": 0.13}
    expected, counts = recorded_solve(field, y0, t, False, **keywords)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for shift in (0.0, 0.5, 0.0, 0.0, 0.0):
            ys, mine = recorded_solve(field, y0 + shift, t, True, **keywords)
    assert mine[:3] == counts[:3]
    close = 1e-4
    if dtype == F64:
        # pow of a norm that is next to nothing: dopri8's error of a short interval.
        close = 1e-8 if method == "dopri8" else 1e-10
    torch.testing.assert_close(ys, expected, rtol=close, atol=close)


def test_recorded_adjoint():
    field, t = Swing(), torch.linspace(0, 2, 4, dtype=F64, device=DEVICE)

    def gradients(**options):
        y0 = normal(5, 3, dtype=F64).to(DEVICE).requires_grad_()
        ys = pycnf.odeint_adjoint(field, y0, t, rtol=1e-6, atol=1e-8, options=options)
        return torch.autograd.grad(ys.square().sum(), (y0, *field.parameters()))

    expected = gradients()
    for _ in range(4):
        for a, b in zip(gradients(cuda_graph=True), expected):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_a_recorded_solve_waits_for_nothing(method):
    field, t = Swing(), torch.linspace(0, 2, 4, dtype=F64, device=DEVICE)
    y0 = normal(5, 3, dtype=F64).to(DEVICE)
    for _ in range(4):
        recorded_solve(field, y0, t, True, method=method)
    torch.cuda.set_sync_debug_mode("error")
    try:
        recorded_solve(field, y0, t, True, method=method)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_recorded_solves_see_new_values_of_parameters():
    field, t = Swing(), torch.linspace(0, 2, 4, dtype=F64, device=DEVICE)
    y0 = normal(5, 3, dtype=F64).to(DEVICE)
    for i in range(5):
        with torch.no_grad():
            field.outer.mul_(1.1)
        if i == 3:
            field.outer = torch.nn.Parameter(field.outer.detach().clone())
        expected, _ = recorded_solve(field, y0, t, False)
        ys, _ = recorded_solve(field, y0, t, True)
        torch.testing.assert_close(ys, expected, rtol=1e-10, atol=1e-12)


def test_random_fields_stay_random():
    class Noisy(Swing):
        def forward(self, t, y):
            return super().forward(t, y) + 1e-3 * torch.randn_like(y)

    field, t = Noisy(), torch.tensor([0.0, 1.0], dtype=F64, device=DEVICE)
    y0 = normal(5, 3, dtype=F64).to(DEVICE)
    results = [
        recorded_solve(field, y0, t, True, rtol=0.1, atol=0.1)[0][-1].clone() for _ in range(5)
    ]
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(results))


def test_a_field_that_cannot_be_captured():
    class Reading(Swing):
        def forward(self, t, y):
            return super().forward(t, y) * (1.0 if float(t) < 100 else 2.0)

    field, t = Reading(), torch.linspace(0, 2, 4, dtype=F64, device=DEVICE)
    y0 = normal(5, 3, dtype=F64).to(DEVICE)
    expected, _ = recorded_solve(field, y0, t, False)
    with pytest.warns(UserWarning, match="^cuda_graph: Reading cannot be captured"):
        first, _ = recorded_solve(field, y0, t, True)
    torch.testing.assert_close(first, expected)
    again, _ = recorded_solve(field, y0, t, True)
    torch.testing.assert_close(again, expected)
    torch.testing.assert_close((y0 + y0).cpu(), 2 * y0.cpu())


def test_recorded_solves_fail_as_others_do():
    class Blows(torch.nn.Module):
        def forward(self, t, y):
            return y * y

    field, t = Blows(), torch.tensor([0.0, 5.0], dtype=F64, device=DEVICE)
    for _ in range(4):
        with pytest.raises(AssertionError, match="underflow in dt"):
            recorded_solve(field, torch.ones(2, dtype=F64, device=DEVICE), t, True)


def test_recorded_solves_on_several_streams():
    field, t = Swing(), torch.linspace(0, 2, 4, dtype=F64, device=DEVICE)
    y0 = normal(5, 3, dtype=F64).to(DEVICE)
    expected, _ = recorded_solve(field, y0, t, False)
    for _ in range(3):
        for stream in (torch.cuda.Stream(), torch.cuda.current_stream()):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                ys, _ = recorded_solve(field, y0, t, True)
            torch.cuda.current_stream().wait_stream(stream)
            torch.testing.assert_close(ys, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_recorded_solves_on_the_second_gpu():
    field = Swing().to("cuda:1")
    t = torch.linspace(0, 2, 4, dtype=F64, device="cuda:1")
    y0 = normal(5, 3, dtype=F64).to("cuda:1")
    expected, _ = recorded_solve(field, y0, t, False)
    for _ in range(4):
        ys, _ = recorded_solve(field, y0, t, True)
    torch.testing.assert_close(ys, expected, rtol=1e-10, atol=1e-12)


def test_a_solve_on_a_grid_within_a_graph_of_the_user_s():
    field, t = Swing(), torch.linspace(0, 2, 4, dtype=F64, device=DEVICE)
    y0 = normal(5, 3, dtype=F64).to(DEVICE)

    def solve():
        with torch.no_grad():
            return pycnf.odeint(field, y0, t, method="rk4", options={"step_size": 0.2})

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = solve().clone()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ys = solve()
    graph.replay()
    torch.testing.assert_close(ys, expected)
    y0.mul_(2)
    graph.replay()
    torch.testing.assert_close(ys, solve())


def test_an_adaptive_solve_within_a_graph_of_the_user_s_is_refused():
    field, t = Swing(), torch.tensor([0.0, 1.0], dtype=F64, device=DEVICE)
    y0 = normal(5, 3, dtype=F64).to(DEVICE)
    recorded_solve(field, y0, t, False)
    with (
        pytest.raises(RuntimeError, match=r"cannot be captured by torch\.cuda\.graph"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        recorded_solve(field, y0, t, False)


# ---- flows without the host in their loop --------------------------------------------------------


class Network(torch.nn.Module):
    """A user's field, which the divergence is taken of by vector-Jacobian products."""

    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(2, 8, dtype=F64, device=DEVICE)
        self.outer = torch.nn.Linear(8, 2, dtype=F64, device=DEVICE)

    def forward(self, t, z):
        return 2 * self.outer(torch.tanh(2 * self.inner(z) + t)) * torch.cos(5 * t)


def train_flow(flow, x, seed=1):
    """Density, gradients and counts of a training step."""
    x = x.clone().requires_grad_()
    density = flow.log_prob(x, seed=seed)
    stats = flow.stats
    loss = (sum(stats.regularizers.values()) - density).mean()
    gradients = torch.autograd.grad(loss, [x, *flow.field.parameters()])
    counts = (stats.nfe_forward, stats.accepted, stats.rejected)
    return [density.detach(), *gradients], counts


def fields_of_flows():
    torch.manual_seed(0)
    return pycnf.nn.MLP(2, (8, 8)).double().to(DEVICE), Network()


@pytest.mark.parametrize("divergence", ["hutchinson", "exact"])
@pytest.mark.parametrize("method", ["dopri5", "tsit5"])
@pytest.mark.parametrize("kind", [0, 1], ids=["own", "module"])
def test_recorded_flows(kind, method, divergence):
    """As with the host in the loop: done as written, recorded, and replayed."""
    options = {"method": method, "divergence": divergence, "regularizers": {"kinetic": 0.1}}
    options["engine"] = "generic"  # a narrow network has a launch of its own
    field = fields_of_flows()[kind]
    host, device = (pycnf.CNF(field, cuda_graph=graph, **options) for graph in (False, True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(4):
            x = normal(33, 2, dtype=F64, seed=seed).to(DEVICE)
            mine, own = train_flow(device, x, seed)
            expected, counts = train_flow(host, x, seed)
            assert own == counts
            for a, b in zip(mine, expected):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    assert None not in device._recordings.kept.values()


def test_recorded_flows_in_training():
    """By loss.backward(), which runs in another thread, and with steps of an optimizer."""
    trained = []
    for graph in (False, True):
        flow = pycnf.CNF(fields_of_flows()[0], engine="generic", cuda_graph=graph)
        optimizer = torch.optim.Adam(flow.parameters(), 1e-2)
        for seed in range(6):
            optimizer.zero_grad()
            x = normal(33, 2, dtype=F64, seed=seed).to(DEVICE)
            (-flow.log_prob(x, seed=seed).mean()).backward()
            optimizer.step()
        trained.append(list(flow.parameters()))
    for a, b in zip(*trained):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_a_recorded_training_step_waits_for_nothing():
    flow = pycnf.CNF(fields_of_flows()[0], engine="generic")
    x = normal(33, 2, dtype=F64).to(DEVICE)
    for _ in range(4):
        train_flow(flow, x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        train_flow(flow, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_flow_that_draws_cannot_be_recorded():
    class Noisy(Network):
        def forward(self, t, z):
            return torch.nn.functional.dropout(super().forward(t, z), 1e-9)

    flow, x = pycnf.CNF(Noisy(), cuda_graph=True), normal(33, 2, dtype=F64).to(DEVICE)
    with pytest.warns(UserWarning, match="it draws random numbers"):
        # The first solve may end before a replay shows it.
        [train_flow(flow, x) for _ in range(3)]


# ---- solves of narrow networks, a launch each ----------------------------------------------------


@pytest.fixture
def pair():
    """The fused engine on the GPU and on the CPU."""

    def flows(field, **settings):
        fields = (copy.deepcopy(field).to(DEVICE), field)
        return [pycnf.CNF(each, engine="fused", **settings) for each in fields]

    return flows


class TestFused(fused_cases.FusedCases):
    close = 1e-10

    @pytest.mark.parametrize("dtype", [F32, F64], ids=["f32", "f64"])
    def test_a_large_batch(self, pair, dtype):
        flows = pair(field_of(hidden=(64, 64, 64), scale=2.0).to(dtype))
        if dtype == F64:
            self.same(flows, points(5000), seed=3)
            return
        (mine, _), (other, _) = (outcome(flow, points(5000).float(), seed=3) for flow in flows)
        for a, b in zip(mine, other, strict=True):
            assert (a - b).norm() <= 1e-3 * b.norm() + 1e-6

    def test_a_tape_that_grows(self, pair):
        """A thousand steps of such a state are more than is made room for at first, which is 64."""
        flows = pair(field_of(), options={"max_step": 0.01})
        _, accepted, _ = self.same(flows, points(3000), seed=3)
        assert accepted >= 100

    def test_nothing_waits_for_the_gpu(self, pair):
        flow, _ = pair(field_of(hidden=(64, 64, 64)))
        x = points(300).to(DEVICE)
        for _ in range(2):
            train_flow(flow, x)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            _, counts = train_flow(flow, x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert flow.stats.engine == "fused" and counts[1] > 0

    def test_launches(self, pair):
        """Of pycnf's kernels one for a solve, which draws its probes, and one for its gradient."""
        flow, _ = pair(field_of(hidden=(64, 64, 64)))
        x = points(300).to(DEVICE).requires_grad_()

        def launched(work):
            work()
            names = cuda_forward.launches(work, torch.device(DEVICE))
            if not names:
                pytest.skip("the profiler sees no kernels here")
            return [name for name in names if "mlp_" in name or "pycnf" in name]

        with torch.no_grad():
            (solve,) = launched(lambda: flow(x, seed=3))
        assert "mlp_solve_kernel" in solve
        names = launched(lambda: flow(x, seed=3)[1].sum().backward())
        assert len(names) == 2 and "mlp_gradient_kernel" in names[1]

    @pytest.mark.parametrize("name", ["x", "probe", "context"])
    def test_what_is_on_the_cpu_is_named(self, pair, name):
        flow, _ = pair(field_of(context=2))
        given = {"x": points(3), "context": points(3, 2), "probe": points(3).unsqueeze(0)}
        given = {key: each if key == name else each.to(DEVICE) for key, each in given.items()}
        with pytest.raises(ValueError, match=f"^{name}: got a tensor on cpu, expected"):
            flow(**given)


# ---- attempts as they are written, for compute-sanitizer -----------------------------------------


@pytest.fixture
def as_written(monkeypatch):
    """Nothing is captured: every kernel of an attempt is a launch of its own."""
    recording = importlib.import_module("pycnf.odeint.recording")
    monkeypatch.setattr(recording.Recorded, "__call__", lambda self: self.work())


@DTYPES
@pytest.mark.parametrize("method", ["dopri5", "tsit5"])
def test_attempts_as_written(as_written, method, dtype):
    t = torch.tensor([0.0, 0.01, 0.02, 1.0], dtype=dtype, device=DEVICE)
    field, y0 = Swing(dtype), normal(347, 3, dtype=dtype).to(DEVICE)
    keywords = {"method": method, "rtol": 1e-3, "atol": 1e-4}
    expected, counts = recorded_solve(field, y0, t, False, **keywords)
    ys, mine = recorded_solve(field, y0, t, True, **keywords)
    assert mine[:3] == counts[:3]
    close = 1e-8 if dtype == F64 else 1e-4
    torch.testing.assert_close(ys, expected, rtol=close, atol=close)


@pytest.mark.parametrize("method", ["dopri5", "tsit5"])
def test_flows_as_written(as_written, method):
    options = {"method": method, "rtol": 1e-3, "atol": 1e-3, "engine": "generic"}
    x, found = normal(347, 2, dtype=F64).to(DEVICE), []
    for graph in (False, True):
        flow = pycnf.CNF(fields_of_flows()[0], cuda_graph=graph, **options)
        found.append(train_flow(flow, x))
    (expected, counts), (mine, own) = found
    assert own == counts
    for a, b in zip(mine, expected):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
