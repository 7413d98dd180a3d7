"""The CUDA ops without a GPU: csrc/torch's C++ between op and kernel, run on a host.

Their results are the CPU's, as in tests/test_cuda.py, which calls the same ops on a GPU; what the
kernels make of every shape and order is shown in tests/test_cuda_host.py.
"""

import ctypes
import importlib
import math
import re

import pytest
import torch
from host_build import CSRC
from host_ops import DEVICE
from kernel_cases import (
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    NAN,
    SEGMENTS,
    TABLEAUX,
    Guarded,
    assert_norms,
    assert_same_bits,
    normal,
)

import pycnf
from pycnf import _C

cpu = torch.ops.pycnf
# Empty, single, odd, more than a block's range.
SIZES = pytest.mark.parametrize("size", [0, 1, 7, 257, 1025])
OFFSETS = pytest.mark.parametrize("offset", [0, 1])
FLIPS = pytest.mark.parametrize("flip", [False, True])
KINDS = pytest.mark.parametrize("kind", ["host", "device", "each", "mixed"])
ANY = pytest.mark.parametrize("dtype", [F32, F64, F16, BF16], ids=["f32", "f64", "f16", "bf16"])
DOPRI5 = TABLEAUX["dopri5"]


@pytest.fixture
def ops(cuda_host_ops):
    return cuda_host_ops


def moved(x):
    """To the device, with its strides and through lists."""
    if isinstance(x, (list, tuple)):
        return type(x)(map(moved, x))
    if not isinstance(x, torch.Tensor):
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=DEVICE).copy_(x)


class Step:
    """A step for the CPU's op, and a guarded copy on the device.

    States of 16 bits are computed in f32 and rounded once, so the CPU's has their values in f32.
    """

    def __init__(self, size, dtype, offset=0, stages=7):
        y0 = normal(size, dtype=dtype)
        parts = {
            "y0": y0,
            "k": normal(stages, size, dtype=dtype, seed=1),
            "fresh": normal(size, dtype=dtype, seed=2),
            "y1": y0 + 0.1 * normal(size, dtype=dtype, seed=3),
            "ratio": torch.full_like(y0, NAN),
        }
        self.dtype = dtype
        self.guarded = {name: Guarded(x, offset, DEVICE) for name, x in parts.items()}
        self.device = {name: x.view for name, x in self.guarded.items()}
        self.cpu = {name: x.float() if x.element_size() == 2 else x for name, x in parts.items()}

    def check(self):
        for name, x in self.cpu.items():
            assert_same_bits(self.device[name], x.to(self.dtype))
            self.guarded[name].check()


def tolerances(kind, size):
    """rtol, atol on the CPU and as the device gets them."""
    rtol, atol = torch.tensor(1e-3, dtype=F64), torch.tensor(1e-4, dtype=F64)
    if kind in ("each", "mixed"):
        rtol = rtol * (1 + normal(size, dtype=F64, seed=5).abs())
    if kind == "each":
        atol = atol * (1 + normal(size, dtype=F64, seed=6).abs())
    return (rtol, atol), (rtol, atol) if kind == "host" else moved((rtol, atol))


# ---- what is in it -------------------------------------------------------------------------------


def test_every_op_of_the_sources_is_there(ops):
    text = "".join(path.read_text() for path in (CSRC / "torch").glob("*_cuda.cpp"))
    names = set(re.findall(r'm\.impl\("(\w+)"', text))
    assert {"rk_stage", "flow_advance", "time_tensors"} <= names
    mine = "pycnf_cuda_host::"
    registered = {
        name.removeprefix(mine)
        for key in ("PrivateUse1", "BackendSelect")
        for name in torch._C._dispatch_get_registrations_for_dispatch_key(key)
        if name.startswith(mine)
    }
    assert registered == names


def test_memory_of_the_device(ops):
    """It begins as NaN and is not the CPU's; writes around it are seen."""
    x = torch.empty(5, device=DEVICE)
    assert x.device == DEVICE and not x.is_cpu and x.data_ptr() % 512 == 0
    assert x.isnan().all()
    broken = ops.broken_guards()
    for at in (x.data_ptr() - 1, x.data_ptr() + 20):
        byte = ctypes.c_ubyte.from_address(at)
        byte.value ^= 1
        assert ops.broken_guards() == broken + 1
        byte.value ^= 1
    assert ops.broken_guards() == broken


# ---- steps ---------------------------------------------------------------------------------------


@ANY
@SIZES
@OFFSETS
@FLIPS
def test_stage(ops, dtype, size, offset, flip):
    step, results = Step(size, dtype, offset), []
    for op, x in ((ops, step.device), (cpu, step.cpu)):
        out = op.rk_stage(x["y0"], x["k"], flip, [x["fresh"]], DOPRI5["a"][5], 0.37)
        results.append(out)
    assert results[0].device == DEVICE
    assert_same_bits(results[0], results[1].to(dtype))
    step.check()


@DTYPES
@pytest.mark.parametrize("parts", ["one", "many", "none"])
def test_stage_stores_what_the_kernel_cannot(ops, dtype, parts):
    """Parts of a tuple, another dtype, a strided tensor, a tensor on the CPU: copied first."""
    y0, k = normal(3, 7, dtype=dtype), normal(4, 21, dtype=dtype)
    fresh = {
        "one": [normal(21, dtype=F64 if dtype == F32 else F32)],
        "many": [normal(5, 3, dtype=dtype).t(), normal(1, dtype=F64), normal(5, dtype=F32)],
        "none": [],
    }[parts]
    for on_host in (False, True):
        y0_, k_ = moved((y0, k))
        result = ops.rk_stage(y0_, k_, True, fresh if on_host else moved(fresh), [0.5, 2.0], 0.1)
        expected_k = k.clone()
        expected = cpu.rk_stage(y0, expected_k, True, fresh, [0.5, 2.0], 0.1)
        assert result.shape == (3, 7)
        assert_same_bits(result, expected)
        assert_same_bits(k_, expected_k)


@ANY
@SIZES
@pytest.mark.parametrize("ordered", [False, True])
def test_combine(ops, dtype, size, ordered):
    y, *k = (normal(size, 2, dtype=dtype, seed=j) for j in range(6))
    k[2] = normal(2, size, dtype=dtype, seed=9).t()
    weights = [0.5, 0.0, -2.0, 1.25, 0.3]
    wide = [x.float() if dtype in (F16, BF16) else x for x in (y, *k)]
    expected = cpu.rk_combine(wide[0], wide[1:], weights, 0.3, None, ordered)
    result = ops.rk_combine(moved(y), moved(k), weights, 0.3, None, ordered)
    assert result.shape == (size, 2)
    assert_same_bits(result, expected.to(dtype))
    h = torch.tensor([0.3], dtype=dtype)
    if dtype in (F32, F64):
        on_device = ops.attempt_combine(moved(y), moved(k), weights, moved(h))
        assert_same_bits(on_device, cpu.attempt_combine(y, k, weights, h))


def check_finish(ops, step, *, method="dopri5", flip=False, kind="host", segments=None):
    tableau, size = TABLEAUX[method], step.cpu["y0"].numel()
    solution = [] if tableau["solution_is_last_stage"] else tableau["b"]
    segments = [0, size] if segments is None else segments
    tol, tol_ = tolerances(kind, size)

    def run(op, x, solution, tol):
        return op.rk_finish(
            x["y0"], x["k"], flip, [x["fresh"]], x["y1"], solution, tableau["e"], 0.37, *tol,
            segments, x["ratio"],
        )  # fmt: skip

    result = run(ops, step.device, solution, tol_)
    x = step.cpu
    if solution and step.dtype in (F16, BF16):
        # The solution that the error is scaled by is the rounded one.
        x["y1"] = cpu.rk_stage(x["y0"], x["k"], flip, [x["fresh"]], solution, 0.37)
        x["y1"], solution = x["y1"].to(step.dtype).float(), []
    expected = run(cpu, x, solution, tol)
    assert result.device == DEVICE
    assert_norms(result, expected)
    step.check()
    return result.tolist()


@ANY
@SIZES
@OFFSETS
@FLIPS
@pytest.mark.parametrize("method", ["dopri5", "tsit5"])
def test_finish(ops, dtype, size, offset, flip, method):
    """dopri5 has its solution already, tsit5 sums it."""
    check_finish(ops, Step(size, dtype, offset), method=method, flip=flip)


@ANY
@KINDS
def test_finish_tolerances(ops, dtype, kind):
    check_finish(ops, Step(2051, dtype), kind=kind)


@ANY
@pytest.mark.parametrize("name", SEGMENTS)
def test_finish_segments(ops, dtype, name):
    norm, _ = check_finish(ops, Step(2051, dtype, 1), segments=SEGMENTS[name](2051))
    assert math.isnan(norm) == name.startswith("first empty")


@pytest.mark.parametrize("count", [63, 64, 65, 130])
def test_finish_of_as_many_pieces_as_fit_an_argument(ops, count):
    """Beyond, they go through a table in the device's memory."""
    segments = [at for i in range(count) for at in (3 * i, 3 * i + 3)]
    check_finish(ops, Step(3 * count, F64), segments=segments)


def test_finish_flags_what_is_not_finite(ops):
    step = Step(300, F32)
    for x in (step.cpu, step.device):
        x["y1"][299] = math.inf
    assert check_finish(ops, step)[1] == 0.0


@ANY
@KINDS
@pytest.mark.parametrize("second", [False, True])
def test_initial_norms(ops, dtype, kind, second):
    for size, name in ((0, "all"), (1, "all"), (1025, "adjoint"), (1025, "many, through a table")):
        tensors = [normal(size, dtype=dtype, seed=seed) for seed in range(3)]
        if not second:
            tensors[2] = None
        tol, tol_ = tolerances(kind, size)
        segments = SEGMENTS[name](size)
        wide = [x.float() if x is not None and x.element_size() == 2 else x for x in tensors]
        result = ops.rk_initial_norms(*moved(tensors), *tol_, segments)
        assert result.device == DEVICE
        assert_norms(result, cpu.rk_initial_norms(*wide, *tol, segments))


@ANY
@SIZES
@FLIPS
@pytest.mark.parametrize("times", [0, 1, 3, 129])
def test_interpolate(ops, dtype, size, flip, times):
    x = [i / max(1, times - 1) for i in range(times)]
    step = Step(size, dtype, offset=1)
    results = [torch.full((times, size), NAN, dtype=y["y0"].dtype) for y in (step.device, step.cpu)]
    guarded = Guarded(results[0], 1, DEVICE)
    for op, part, out in ((ops, step.device, guarded.view), (cpu, step.cpu, results[1])):
        op.rk_interpolate(part["y0"], part["y1"], part["k"], flip, DOPRI5["m"], 0.37, x, out)
    assert_same_bits(guarded.view, results[1].to(dtype))
    guarded.check()
    step.check()


# ---- steps that the device chooses ---------------------------------------------------------------


@DTYPES
@SIZES
@KINDS
def test_attempts(ops, dtype, size, kind):
    """Of a step size in the device's memory, here the second of two."""
    step, results = Step(size, dtype, offset=1), []
    h = torch.tensor([NAN, 0.37], dtype=dtype)
    tols, tableau = tolerances(kind, size), TABLEAUX["tsit5"]
    for op, x, h_, tol in ((ops, step.device, moved(h), tols[1]), (cpu, step.cpu, h, tols[0])):
        state = op.attempt_stage(x["y0"], x["k"], [x["fresh"]], tableau["a"][3], h_[1:])
        norms = op.attempt_finish(
            x["y0"], x["k"], [x["fresh"]], x["y1"], tableau["b"], tableau["e"], h_[1:], *tol,
            [0, size],
        )  # fmt: skip
        results.append((state, norms))
    assert_same_bits(results[0][0], results[1][0])
    assert_norms(results[0][1], results[1][1])
    step.check()


class Plans:
    """The same plan on the CPU and the device; the report is the host's on both."""

    def __init__(self, *tensors):
        self.cpu = list(tensors)
        self.device = [*moved(list(tensors[:-1])), tensors[-1].clone()]

    def check(self):
        for a, b in zip(self.device, self.cpu):
            assert_same_bits(a, b)


TIMES = pytest.mark.parametrize(
    ("dtype", "time"), [(F32, F32), (F32, F64), (F64, F64)], ids=["f32", "f32 in f64", "f64"]
)


@TIMES
@pytest.mark.parametrize("size", [1, 257])
def test_a_solve_by_attempts(ops, dtype, time, size):
    """Whatever the norms, accepted or rejected: plan, state, rows and solution are the CPU's."""
    outputs = torch.tensor([0.05, 0.1, 0.11, 0.5, 2.0], dtype=F64)
    fields = torch.zeros(len(_C.attempt_fields), dtype=F64)
    for name, value in (("start", 0.0), ("finite", 1.0)):
        fields[_C.attempt_fields.index(name)] = value
    plans = Plans(
        fields,
        torch.zeros(7, dtype=dtype), torch.zeros(2, dtype=dtype), outputs,
        torch.tensor([0.3], dtype=F64), torch.zeros(_C.report_numbers + 4, dtype=F64),
    )  # fmt: skip
    rule = ([0.9, 10.0, 0.2, 0.0, math.inf, 100.0, 5.0, 1.0, 1.0], DOPRI5["c"])
    solutions = [torch.full((5, size), NAN, dtype=dtype, device=at) for at in (DEVICE, "cpu")]
    step = Step(size, dtype, offset=1)
    sides = ((ops, plans.device, step.device), (cpu, plans.cpu, step.cpu))

    def control(moment, norms):
        for op, plan, _ in sides:
            norms_ = norms if norms is None or op is cpu else moved(norms)
            op.attempt_control(plan, norms_, moment, *rule, time)
        plans.check()

    control("begin", torch.tensor([0.5, 2.0], dtype=F64))
    control("first_step", torch.tensor([3.0, 2.0], dtype=F64))
    for error in (0.1, 3.0, 0.5, 1e-4, 0.3, 20.0, 0.9, 1e-6, 0.2, 0.0, 0.1):
        control("decide", torch.tensor([error, 1.0], dtype=F64))
        for (op, plan, x), solution in zip(sides, solutions):
            op.attempt_advance(plan, x["y0"], x["y1"], x["k"], DOPRI5["m"], solution, time)
        assert_same_bits(*solutions)
        step.check()
        for x in (step.device, step.cpu):
            x["y1"].mul_(-1.5)
            x["k"].mul_(0.75)
    accepted = plans.cpu[-1][3].item()
    assert accepted >= 3 and plans.cpu[-1][0].item() > accepted
    assert not solutions[1][:3].isnan().any()


@DTYPES
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("size", [1, 257])
def test_a_flow_by_attempts(ops, dtype, size, steps):
    """Also with a tape that is full at last, or none, and read again."""
    fields = torch.zeros(len(_C.flow_fields), dtype=F64)
    given = {"t": 1.0, "end": 0.0, "length": 1.0, "direction": -1.0, "finite": 1.0}
    for name, value in given.items():
        fields[_C.flow_fields.index(name)] = value
    plans = Plans(
        fields,
        torch.zeros(7, dtype=dtype), torch.zeros(1, dtype=dtype),
        torch.zeros(steps, 3, dtype=F64), torch.zeros(_C.flow_report_numbers, dtype=F64),
    )  # fmt: skip
    rule = ([math.inf, 0.9, 10.0, 0.2, 100.0, 5.0], DOPRI5["c"])
    kept = max(1, size // 2)
    tapes = [torch.full((steps, kept), NAN, dtype=dtype, device=at) for at in (DEVICE, "cpu")]
    step = Step(size, dtype, offset=1)
    sides = ((ops, plans.device, step.device), (cpu, plans.cpu, step.cpu))

    def control(moment, norms=None):
        for op, plan, _ in sides:
            norms_ = norms if norms is None or op is cpu else moved(norms)
            op.flow_control(plan, norms_, moment, *rule)
        plans.check()

    control("begin", torch.tensor([0.5, 2.0], dtype=F64))
    control("first_step", torch.tensor([3.0, 2.0], dtype=F64))
    for error in (0.1, 3.0, 0.5, 0.9, 0.7):
        control("decide", torch.tensor([error, 1.0], dtype=F64))
        for (op, plan, x), tape in zip(sides, tapes):
            op.flow_advance(plan, x["y0"], x["y1"], x["k"], tape)
        assert_same_bits(*tapes)
        step.check()
        for x in (step.device, step.cpu):
            x["y1"].mul_(-1.5)
            x["k"].mul_(0.75)
    if steps:
        assert not tapes[1].isnan().any()
        control("recall")
        control("recall")


# ---- values and probes ---------------------------------------------------------------------------


@ANY
@pytest.mark.parametrize("count", [0, 1, 129])
@pytest.mark.parametrize("device", [DEVICE, torch.device("cpu")], ids=["device", "cpu"])
def test_time_tensors(ops, dtype, count, device):
    """An op without tensors finds its device by its argument."""
    values = [(-1) ** i / (3 + i) for i in range(count)]
    times = ops.time_tensors(values, dtype, device)
    expected = cpu.time_tensors(values, dtype, torch.device("cpu"))
    assert len(times) == count
    assert all(t.device == device and t.dtype == dtype and t.dim() == 0 for t in times)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(times, expected))


@DTYPES
@pytest.mark.parametrize("shape", [(0, 3), (4, 0), (1, 1), (33, 5, 4), (9,)])
def test_keys(ops, dtype, shape):
    x = normal(*shape, dtype=dtype)
    assert torch.equal(ops.probe_keys(moved(x)).cpu(), cpu.probe_keys(x))
    strided = normal(*shape, 2, dtype=dtype)[..., 0]
    assert torch.equal(ops.probe_keys(moved(strided)).cpu(), cpu.probe_keys(strided))


@DTYPES
@pytest.mark.parametrize(
    ("probes", "batch", "features"), [(0, 3, 2), (1, 0, 2), (1, 5, 0), (3, 7, 129)]
)
@pytest.mark.parametrize("gaussian", [False, True])
def test_probes(ops, dtype, probes, batch, features, gaussian):
    keys = torch.arange(2 * batch) * 7 - 11
    arguments = (-5, probes, features, gaussian, dtype)
    result = ops.probe_sample(moved(keys[::2]), *arguments)
    expected = cpu.probe_sample(keys[::2], *arguments)
    assert result.device == DEVICE and result.shape == (probes, batch, features)
    close = {"rtol": 1e-13, "atol": 1e-14} if dtype == F64 else {"rtol": 2e-6, "atol": 2e-6}
    torch.testing.assert_close(
        result.cpu(), expected, **(close if gaussian else {"rtol": 0, "atol": 0})
    )


# ---- as on a GPU ---------------------------------------------------------------------------------


def every_op(ops, dtype, kind="host"):
    """What each op returns and writes; and how often one would have waited for a GPU."""
    size = 1200
    step = Step(size, dtype, offset=1)
    _, tol = tolerances(kind, size)
    segments, h = SEGMENTS["many, through a table"](size), torch.tensor([0.2], dtype=dtype)
    x, h, out = step.device, moved(h), torch.empty(3, size, dtype=dtype, device=DEVICE)
    y0, k, fresh, y1 = (x[name] for name in ("y0", "k", "fresh", "y1"))
    before = ops.waits()
    results = [
        ops.rk_stage(y0, k, False, [fresh], DOPRI5["a"][3], 0.2),
        ops.rk_finish(
            y0, k, True, [fresh], y1, DOPRI5["b"], DOPRI5["e"], 0.2, *tol, segments, x["ratio"]
        ),
        ops.rk_combine(y0, [fresh, y1], [0.5, 0.25], 0.2),
        ops.rk_initial_norms(y0, fresh, y1, *tol, segments),
    ]  # fmt: skip
    ops.rk_interpolate(y0, y1, k, False, DOPRI5["m"], 0.2, [0.1, 0.5, 0.9], out)
    if dtype in (F32, F64):
        keys = ops.probe_keys(y0.view(-1, 5))
        results += [
            keys,
            ops.probe_sample(keys, 3, 2, 5, False, dtype),
            ops.probe_sample(keys, 3, 2, 5, True, dtype),
            ops.attempt_stage(y0, k, [fresh], DOPRI5["a"][3], h),
            ops.attempt_finish(y0, k, [], y1, DOPRI5["b"], DOPRI5["e"], h, *tol, segments),
            ops.attempt_combine(y0, [fresh, y1], [0.5, 0.25], h),
        ]
    results += ops.time_tensors([0.1, 0.2], F32, DEVICE)
    waits = ops.waits() - before
    return [part.cpu() for part in (*results, out, *x.values())], waits


@ANY
def test_every_order_of_threads_gives_the_same_bits(ops, dtype):
    first, _ = every_op(ops, dtype)
    for seed in range(2, 5):
        ops.seed(seed)
        for a, b in zip(first, every_op(ops, dtype)[0]):
            assert_same_bits(a.double(), b.double())


@ANY
@KINDS
def test_no_op_waits_for_the_device(ops, dtype, kind):
    assert every_op(ops, dtype, kind)[1] == 0


def test_waits_are_seen(ops):
    x, before = torch.zeros(3).to(DEVICE), ops.waits()
    x.clone()
    assert ops.waits() == before
    x.cpu()
    x.sum()
    assert ops.waits() > before + 1


# ---- what is refused -----------------------------------------------------------------------------

Y, K = torch.arange(1.0, 7.0), torch.arange(18.0).view(3, 6) / 8
E3, TOL = [0.1, -0.2, 0.1], torch.tensor(1e-3, dtype=F64)
KEYS = torch.arange(5)
ATTEMPT = [torch.zeros(n, dtype=F64) for n in (len(_C.attempt_fields), 3, 2, 2, 0)]
REPORT = torch.zeros(_C.report_numbers + 2, dtype=F64)
RULE = ([0.9, 10.0, 0.2, 0.0, math.inf, 100.0, 5.0, 1.0, 1.0], [0.0, 0.5, 1.0])
FLOW = [torch.zeros(n, dtype=F64) for n in (len(_C.flow_fields), 3, 1)] + [
    torch.zeros(2, 3, dtype=F64)
]
FLOW_REPORT = torch.zeros(_C.flow_report_numbers, dtype=F64)
FLOW_RULE = ([math.inf, 0.9, 10.0, 0.2, 100.0, 5.0], [0.0, 0.5, 1.0])
NORMS = torch.tensor([0.5, 1.0], dtype=F64)

# For each op a good call; tensors in it are on the device, but for reports.
CALLS = {
    "rk_stage": (Y, K, False, [Y], [0.5, 0.25], 0.1),
    "rk_finish": (Y, K, False, [Y], -Y, E3, E3, 0.1, TOL, TOL, [0, 6], None),
    "rk_interpolate": (Y, -Y, K, False, E3, 0.1, [0.0, 0.4], torch.zeros(2, 6)),
    "rk_initial_norms": (Y, -Y, Y, TOL, TOL, [0, 6]),
    "rk_combine": (Y, [K[0], K[1]], [0.5, -1.0], 0.1),
    "attempt_stage": (Y, K, [Y], [0.5, 0.25], torch.tensor([0.1])),
    "attempt_finish": (Y, K, [Y], -Y, E3, E3, torch.tensor([0.1]), TOL, TOL, [0, 6]),
    "attempt_combine": (Y, [K[0]], [0.5], torch.tensor([0.1])),
    "attempt_control": (ATTEMPT, NORMS, "decide", *RULE, F64),
    "attempt_advance": (
        ATTEMPT, Y.double(), -Y.double(), K.double(), E3, torch.zeros(2, 6, dtype=F64), F64,
    ),
    "flow_control": (FLOW, NORMS, "decide", *FLOW_RULE),
    "flow_advance": (FLOW, Y.double(), -Y.double(), K.double(), torch.zeros(2, 4, dtype=F64)),
    "probe_keys": (K,),
    "probe_sample": (KEYS, 3, 2, 5, False, F32),
}  # fmt: skip

# (op, the argument that is bad, what it is)
BAD = [
    ("rk_stage", 0, Y[::2]),
    ("rk_stage", 0, Y.to(torch.int32)),
    ("rk_stage", 0, torch.arange(12.0)[::2]),
    ("rk_stage", 1, K[:, :5]),
    ("rk_stage", 1, K.double()),
    ("rk_stage", 1, K[0]),
    ("rk_stage", 1, torch.zeros(100, 6)),
    ("rk_stage", 3, [Y[:5]]),
    ("rk_stage", 4, []),
    ("rk_stage", 4, [1.0] * 4),
    ("rk_finish", 0, Y.double()),
    ("rk_finish", 3, [Y, Y]),
    ("rk_finish", 4, Y[:5]),
    ("rk_finish", 5, E3[:2]),
    ("rk_finish", 6, [1.0] * 4),
    ("rk_finish", 8, TOL.float()),
    ("rk_finish", 9, torch.ones(5, dtype=F64)),
    ("rk_finish", 10, [0, 7]),
    ("rk_finish", 10, [0, 2, 1, 6]),
    ("rk_finish", 10, [0, 2, 3]),
    ("rk_finish", 11, Y.double()),
    ("rk_interpolate", 1, Y[:5]),
    ("rk_interpolate", 7, torch.zeros(3, 6)),
    ("rk_interpolate", 7, torch.zeros(6, 2).t()),
    ("rk_interpolate", 7, torch.zeros(2, 6, dtype=F64)),
    ("rk_initial_norms", 1, Y.double()),
    ("rk_initial_norms", 2, Y[:5]),
    ("rk_initial_norms", 4, TOL.float()),
    ("rk_initial_norms", 5, [3]),
    ("rk_combine", 1, []),
    ("rk_combine", 1, [K[0], K[1].double()]),
    ("rk_combine", 2, [0.5]),
    ("attempt_stage", 4, torch.tensor([0.1], dtype=F64)),
    ("attempt_stage", 4, torch.zeros(0)),
    ("attempt_stage", 3, []),
    ("attempt_finish", 6, torch.tensor([0.1], dtype=F64)),
    ("attempt_finish", 3, Y[:5]),
    ("attempt_combine", 1, []),
    ("attempt_combine", 3, torch.tensor([0.1], dtype=F64)),
    ("attempt_control", 0, ATTEMPT[:4]),
    ("attempt_control", 0, [ATTEMPT[0][:-1], *ATTEMPT[1:]]),
    ("attempt_control", 0, [ATTEMPT[0].float(), *ATTEMPT[1:]]),
    ("attempt_control", 1, None),
    ("attempt_control", 1, NORMS.float()),
    ("attempt_control", 1, NORMS[:1]),
    ("attempt_control", 2, "recall"),
    ("attempt_control", 3, [1.0]),
    ("attempt_control", 4, [0.5]),
    ("attempt_control", 5, F32),
    ("attempt_advance", 1, Y),
    ("attempt_advance", 2, Y.double()[:5]),
    ("attempt_advance", 3, K),
    ("attempt_advance", 5, torch.zeros(3, 6, dtype=F64)),
    ("flow_control", 0, FLOW[:3]),
    ("flow_control", 1, None),
    ("flow_control", 1, NORMS.float()),
    ("flow_control", 2, "middle"),
    ("flow_control", 3, [1.0]),
    ("flow_control", 4, []),
    ("flow_advance", 2, Y),
    ("flow_advance", 4, torch.zeros(3, 4, dtype=F64)),
    ("flow_advance", 4, torch.zeros(2, 7, dtype=F64)),
    ("probe_keys", 0, torch.tensor(1.0)),
    ("probe_keys", 0, KEYS),
    ("probe_sample", 0, KEYS.int()),
    ("probe_sample", 0, KEYS.view(1, 5)),
    ("probe_sample", 2, -1),
    ("probe_sample", 3, -1),
    ("probe_sample", 5, torch.int32),
]  # fmt: skip


def reports(name, arguments):
    """A plan's last tensor is a report in the host's memory."""
    if not name.endswith(("control", "advance")):
        return arguments
    report = REPORT if name.startswith("attempt") else FLOW_REPORT
    return ([*arguments[0], report.clone()], *arguments[1:])


def copies(x):
    if isinstance(x, (list, tuple)):
        return type(x)(map(copies, x))
    return x.clone() if isinstance(x, torch.Tensor) else x


def test_every_op_has_a_good_call(ops):
    """But for the one without tensors."""
    text = (CSRC / "torch" / "ops_cuda.cpp").read_text()
    assert {*CALLS, "time_tensors"} == set(re.findall(r'm\.impl\("(\w+)"', text))


@pytest.mark.parametrize("name", CALLS)
def test_good_calls(ops, name):
    results = []
    for op, move in ((ops, moved), (cpu, copies)):
        results.append(getattr(op, name)(*reports(name, move(CALLS[name]))))
    if results[1] is None:
        assert results[0] is None
    else:
        torch.testing.assert_close(results[0].cpu(), results[1])


@pytest.mark.parametrize(("name", "at", "bad"), BAD, ids=lambda x: x if isinstance(x, str) else "")
def test_bad_arguments(ops, name, at, bad):
    """Refused in the CPU's words."""
    arguments = list(CALLS[name])
    arguments[at] = bad
    messages = []
    for op, move in ((ops, moved), (cpu, lambda x: x)):
        with pytest.raises(RuntimeError) as caught:
            getattr(op, name)(*reports(name, tuple(map(move, arguments))))
        messages.append(str(caught.value).replace(str(DEVICE), "cpu").splitlines()[0])
    assert re.sub(r'"\w+"', '""', messages[0]) == re.sub(r'"\w+"', '""', messages[1])


TENSORS = [
    (name, at) for name, arguments in CALLS.items() for at, each in enumerate(arguments)
    if isinstance(each, torch.Tensor) and not name.startswith("probe")
]  # fmt: skip


@pytest.mark.parametrize(("name", "at"), TENSORS)
def test_a_tensor_on_the_cpu_is_refused(ops, name, at):
    """But for tolerances that are numbers."""
    arguments = [*moved(CALLS[name])]
    arguments[at] = CALLS[name][at].clone()
    call = getattr(ops, name)
    if arguments[at].dim() == 0:
        result = call(*reports(name, tuple(arguments)))
        assert_norms(result, getattr(cpu, name)(*copies(CALLS[name])))
        return
    argument = call.default._schema.arguments[at].name
    told = f"^{argument} must be on the GPU" if argument in ("y0", "y", "norms") else r"\bmust "
    with pytest.raises(RuntimeError, match=told):
        call(*reports(name, tuple(arguments)))


@pytest.mark.parametrize("name", ["rk_combine", "attempt_combine"])
def test_rows_on_the_cpu_are_refused(ops, name):
    arguments = list(moved(CALLS[name]))
    arguments[1][-1] = CALLS[name][1][-1]
    with pytest.raises(RuntimeError, match=r"^k must have the 6 values, dtype and device of y0"):
        getattr(ops, name)(*arguments)


@pytest.mark.parametrize(
    "name", ["attempt_control", "attempt_advance", "flow_control", "flow_advance"]
)
def test_a_plan_is_on_one_device(ops, name):
    good = reports(name, moved(CALLS[name]))
    for at, part in enumerate(good[0]):
        plan = list(good[0])
        plan[at] = part.cpu() if part.device == DEVICE else part.to(DEVICE)
        with pytest.raises(RuntimeError, match="must be on "):
            getattr(ops, name)(plan, *good[1:])


# ---- whole solves --------------------------------------------------------------------------------


class Swing(torch.nn.Module):
    def forward(self, t, y):
        return torch.sin(3 * t) * y.roll(1, -1) - 0.5 * y


@pytest.mark.parametrize(
    ("method", "record"),
    [("dopri5", False), ("dopri5", True), ("bosh3", True), ("dopri8", False), ("rk4", False)],
)
@DTYPES
def test_solves(ops, monkeypatch, method, dtype, record):
    """On the device as on the CPU, in as many steps."""
    recording = importlib.import_module("pycnf.odeint.recording")
    monkeypatch.setattr(recording, "_DEVICES", (DEVICE.type,))
    for name in ("stepper", "replay"):
        module = importlib.import_module(f"pycnf.odeint.{name}")
        monkeypatch.setattr(module, "kernels", lambda y: ops if y.device == DEVICE else cpu)
    y0, t = normal(41, dtype=dtype), torch.linspace(0.0, 1.0, 6, dtype=dtype)

    def solve(y0, t, **more):
        options = {"options": more} if more else {}
        with torch.no_grad():
            ys = pycnf.odeint(Swing(), y0, t, method=method, rtol=1e-3, atol=1e-4, **options)
        stats = pycnf.last_stats()
        return ys, (stats.evaluations, stats.accepted, stats.rejected)

    expected, counts = solve(y0, t)
    mine, own = solve(moved(y0), moved(t), **({"cuda_graph": True} if record else {}))
    assert mine.device == DEVICE and own == counts
    close = 1e-10 if dtype == F64 else 1e-5
    torch.testing.assert_close(mine.cpu(), expected, rtol=close, atol=close)
