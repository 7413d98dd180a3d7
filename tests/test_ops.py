"""The stepping ops on the CPU: against the reference in f64, bit by bit against torch's rounding.

Step counts hang on rounding, so most f32 results are compared to what PyTorch computes with the
same formula, without tolerance.
"""

import math
import platform
from pathlib import Path

import pytest
import torch

from pycnf import _C, _ops, reference
from pycnf.odeint.tableau import TABLEAUX

F32, F64 = torch.float32, torch.float64
NAN, INF = math.nan, math.inf
DTYPES = pytest.mark.parametrize("dtype", [F32, F64], ids=["f32", "f64"])
FLIPS = pytest.mark.parametrize("flip", [False, True], ids=["straight", "flip"])
# Empty, one, odd, around the kernels' block of 256, and of several partial sums of a norm.
SIZES = pytest.mark.parametrize("size", [0, 1, 3, 8, 255, 256, 257, 1000, 20_003])
ops = torch.ops.pycnf
# The bindings of the inner loop, and the same ops through the dispatcher's general way.
STAGE = pytest.mark.parametrize("rk_stage", [_C.rk_stage, ops.rk_stage], ids=["direct", "op"])
FINISH = pytest.mark.parametrize("rk_finish", [_C.rk_finish, ops.rk_finish], ids=["direct", "op"])

RTOL, ATOL = torch.tensor(1e-3, dtype=F64), torch.tensor(1e-4, dtype=F64)
H = 0.37


@pytest.fixture(autouse=True)
def one_thread():
    """Threads wait for each other on a busy machine; they have a test of their own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def normal(*shape, dtype=F64, seed=0):
    generator = torch.Generator().manual_seed(1000 * seed + sum(shape) + len(shape))
    return torch.randn(*shape, dtype=F64, generator=generator).to(dtype)


class Guarded:
    """A copy of x, `offset` elements into a buffer whose other elements must not change."""

    GUARD = -77.0

    def __init__(self, x, offset=0):
        self.buffer = torch.full((offset + x.numel() + 16,), self.GUARD, dtype=x.dtype)
        self.view = self.buffer[offset : offset + x.numel()].view(x.shape)
        self.rest = torch.cat([self.buffer[:offset], self.buffer[offset + x.numel() :]])
        self.view.copy_(x)
        self.offset = offset

    def check(self):
        after = self.offset + self.view.numel()
        rest = torch.cat([self.buffer[: self.offset], self.buffer[after:]])
        assert torch.equal(rest, self.rest), "written outside of the tensor"


def place(stage, stages, flip):
    """The row of k that holds a stage."""
    return stages - 1 - stage if flip and stage in (0, stages - 1) else stage


def ordered(k, flip):
    """The rows of k in the order of the stages."""
    return k[[place(stage, len(k), flip) for stage in range(len(k))]]


def coefficients(weights, h, dtype):
    return torch.tensor(weights, dtype=dtype) * torch.tensor(h, dtype=dtype)


def torch_sum(k, flip, weights, h):
    """The weighted rows as torchdiffeq adds them: a sum over the last, short axis."""
    rows = ordered(k, flip)[: len(weights)].t().contiguous()
    return torch.sum(rows * coefficients(weights, h, k.dtype), -1)


def assert_same_bits(result, expected):
    """-0 is 0 here: a sum over nothing differs in its sign."""
    assert result.dtype == expected.dtype
    assert result.shape == expected.shape
    nan = expected.isnan()
    assert torch.equal(result.isnan(), nan)
    assert torch.equal(result.masked_fill(nan, 0.0), expected.masked_fill(nan, 0.0))


def assert_bounded(result, eager, exact):
    """In f32, off by at most a small multiple of what PyTorch's own f32 is; in f64, by rounding."""
    if exact.numel() == 0:
        return
    unit = torch.finfo(eager.dtype).eps * exact.abs().max()
    error = (result.double() - exact).abs().max()
    if eager.dtype == F64:
        assert error <= 20 * unit
    else:
        assert error <= 2 * (eager.double() - exact).abs().max() + 2 * unit


# ---- stage combination ---------------------------------------------------------------------------


def check_stage(rk_stage, size, stages, terms, dtype, flip, offset=0, weights=None):
    """`terms` weights, the newest row given as fresh and still NaN in k."""
    weights = normal(terms, seed=4).tolist() if weights is None else weights
    y0, k, fresh = (
        Guarded(normal(*shape, dtype=dtype, seed=seed), offset)
        for seed, shape in enumerate([(size,), (stages, size), (size,)])
    )
    before = [x.view.clone() for x in (y0, k, fresh)]
    k.view[place(terms - 1, stages, flip)] = NAN
    before[1][place(terms - 1, stages, flip)] = before[2]

    out = rk_stage(y0.view, k.view, flip, [fresh.view], weights, H)

    for guarded, values in zip((y0, k, fresh), before):
        guarded.check()
        assert torch.equal(guarded.view, values)
    exact = reference.rk_stage(
        before[0].double(), before[1].double(), flip, [before[2].double()], weights, H
    )
    if dtype == F64:
        used = ordered(before[1], flip)[:terms]
        magnitude = before[0].abs() + coefficients(weights, H, F64).abs() @ used.abs()
        assert ((out - exact).abs() <= 2 * (terms + 1) * 2.3e-16 * magnitude).all()
    eager = reference.rk_stage(before[0], before[1].clone(), flip, [before[2]], weights, H)
    assert_bounded(out, eager, exact)
    return out, before


@STAGE
@DTYPES
@SIZES
@FLIPS
def test_stage(rk_stage, size, dtype, flip):
    check_stage(rk_stage, size, 7, 5, dtype, flip)


@DTYPES
@FLIPS
@pytest.mark.parametrize("stages", range(1, 15))
def test_stage_counts(stages, dtype, flip):
    for terms in range(1, stages + 1):
        check_stage(_C.rk_stage, 37, stages, terms, dtype, flip)


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="torch.sum adds in another order here"
)
@DTYPES
@FLIPS
@pytest.mark.parametrize("size", [1, 5, 600])
def test_stage_rounds_as_torch_sum(dtype, flip, size):
    """Bit by bit for every length of the sum; one order of addition alone would not do."""
    other_order = 0
    for terms in range(1, 15):
        weights = normal(terms, seed=4).tolist()
        y0, k = normal(size, dtype=dtype), normal(14, size, dtype=dtype, seed=1)
        out = _C.rk_stage(y0, k, flip, [], weights, H)
        assert torch.equal(out, y0 + torch_sum(k, flip, weights, H)), terms
        one_by_one = torch.zeros(size, dtype=dtype)
        for row, weight in zip(ordered(k, flip), coefficients(weights, H, dtype)):
            one_by_one = one_by_one + row * weight
        other_order += not torch.equal(out, y0 + one_by_one)
    assert size < 600 or other_order > 0


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="torch.sum adds in another order here"
)
@DTYPES
@pytest.mark.parametrize("name", TABLEAUX)
def test_stages_of_every_method_round_as_torch_sum(name, dtype):
    """With the zero weights that the kernel leaves out."""
    tableau = TABLEAUX[name]
    y0 = normal(300, dtype=dtype)
    k = normal(tableau.stages, 300, dtype=dtype, seed=1)
    for weights in [*tableau.a[1:], tableau.b]:
        out = _C.rk_stage(y0, k, False, [], weights, H)
        assert torch.equal(out, y0 + torch_sum(k, False, weights, H))


@STAGE
@DTYPES
@FLIPS
@pytest.mark.parametrize("name", TABLEAUX)
def test_rows_of_weight_zero_are_not_read(rk_stage, name, dtype, flip):
    """So what they hold, NaN or memory never written, does not matter."""
    tableau = TABLEAUX[name]
    for weights in [*tableau.a[1:], tableau.b]:
        y0 = normal(300, dtype=dtype)
        k = normal(tableau.stages, 300, dtype=dtype, seed=1)
        clean = rk_stage(y0, k, flip, [], weights, H)
        for stage in range(tableau.stages):
            if stage >= len(weights) or weights[stage] == 0:
                k[place(stage, tableau.stages, flip)] = NAN
        assert torch.equal(rk_stage(y0, k, flip, [], weights, H), clean)


def test_a_row_of_weight_zero_is_stored():
    y0, k, fresh = normal(9), torch.full((3, 9), NAN), normal(9)
    k[0] = 1.0
    k = k.double()
    out = _C.rk_stage(y0, k, False, [fresh], [0.5, 0.0], H)
    assert torch.equal(out, y0 + k[0] * (0.5 * H))
    assert torch.equal(k[1], fresh)
    assert k[2].isnan().all()


@DTYPES
@pytest.mark.parametrize("weights", [[0.0], [0.0] * 9])
def test_stage_of_zero_weights_is_the_state(dtype, weights):
    y0 = normal(300, dtype=dtype)
    assert torch.equal(
        _C.rk_stage(y0, torch.full((9, 300), NAN, dtype=dtype), False, [], weights, H), y0
    )


@DTYPES
@pytest.mark.parametrize("offset", [1, 2, 3, 5])
@pytest.mark.parametrize("size", [257, 33_001])
def test_stage_of_misaligned_tensors(size, dtype, offset):
    aligned, _ = check_stage(_C.rk_stage, size, 7, 6, dtype, False)
    out, _ = check_stage(_C.rk_stage, size, 7, 6, dtype, False, offset)
    assert torch.equal(out, aligned)


@STAGE
@DTYPES
def test_stage_keeps_the_state_s_shape(rk_stage, dtype):
    y0 = normal(3, 5, 2, dtype=dtype)
    k = torch.zeros(4, 30, dtype=dtype)
    out = rk_stage(y0, k, False, [2 * y0], [0.5], 0.5)
    assert torch.equal(out, y0 + 0.25 * (2 * y0))
    scalar = rk_stage(y0[0, 0, 0].clone(), torch.ones(1, 1, dtype=dtype), False, [], [2.0], 0.5)
    assert scalar.shape == ()
    assert scalar == y0[0, 0, 0] + 1


FRESH = {
    "one tensor": lambda x: [x],
    "its shape does not matter": lambda x: [x.view(3, 8)],
    "parts of a tuple": lambda x: [x[:10].view(5, 2), x[10:11].view(()), x[11:11], x[11:]],
    "another dtype": lambda x: [x.to(F64 if x.dtype == F32 else F32)],
    "parts of other dtypes": lambda x: [x[:7].half(), x[7:9].to(torch.int32), x[9:].double()],
    "every second element": lambda x: [x.repeat_interleave(2)[::2]],
    "transposed": lambda x: [x.view(4, 6).t().contiguous().t()],
    "expanded": lambda x: [x[:1].expand(24)],
    "negated lazily": lambda x: [torch._neg_view(-x)],
    "transposed part": lambda x: [x[:20].view(4, 5).t().contiguous().t(), x[20:]],
    "misaligned": lambda x: [torch.cat([x[:1], x])[1:]],
    "requires grad": lambda x: [x.clone().requires_grad_()],
    "parts that require grad": lambda x: [p.clone().requires_grad_() for p in x.split(9)],
    "another dtype that requires grad": lambda x: [x.double().half().requires_grad_()],
}


def fresh_case(kind, dtype):
    """What the field returned, and the row that is to be stored; every dtype holds the values."""
    parts = FRESH[kind]((normal(24, seed=2) * 8).round().to(dtype))
    return parts, torch.cat([part.detach().reshape(-1).to(dtype) for part in parts])


@STAGE
@DTYPES
@FLIPS
@pytest.mark.parametrize("kind", FRESH)
def test_fresh(rk_stage, kind, dtype, flip):
    parts, row = fresh_case(kind, dtype)
    y0, k = normal(24, dtype=dtype), normal(4, 24, dtype=dtype, seed=1)
    stored = k.clone()
    stored[place(3, 4, flip)] = row
    out = rk_stage(y0, k, flip, parts, [0.1, 0.2, 0.3, 0.4], H)
    assert torch.equal(k, stored)
    assert torch.equal(out, rk_stage(y0, stored, flip, [], [0.1, 0.2, 0.3, 0.4], H))
    # A row in a graph would keep every step of a solve alive.
    assert not k.requires_grad
    assert not out.requires_grad


def test_fresh_may_be_its_own_row():
    y0, k = normal(300), normal(3, 300, seed=1)
    expected = _C.rk_stage(y0, k.clone(), False, [], [0.1, 0.2], H)
    assert torch.equal(_C.rk_stage(y0, k, False, [k[1]], [0.1, 0.2], H), expected)


def test_an_empty_list_stores_nothing():
    y0, k = normal(300), normal(3, 300, seed=1)
    before = k.clone()
    _C.rk_stage(y0, k, False, [], [0.1, 0.2], H)
    assert torch.equal(k, before)


# ---- end of step ---------------------------------------------------------------------------------


def each(size, seed):
    """One tolerance per value."""
    return 1e-4 * (1 + normal(size, seed=seed).abs())


TOLERANCES = {
    "numbers": lambda n: (RTOL, ATOL),
    "rtol each": lambda n: (each(n, 5), ATOL),
    "atol each": lambda n: (RTOL, each(n, 6)),
    "both each": lambda n: (each(n, 5), each(n, 6)),
    "no rtol": lambda n: (torch.zeros((), dtype=F64), ATOL),
}


def scaled(value, size, rtol, atol):
    """The scaled error in the kernels' rounding: f64 as soon as one tolerance has an axis."""
    numbers = [x.to(value.dtype) if x.dim() == 0 else x.reshape(value.shape) for x in (rtol, atol)]
    if rtol.dim() == atol.dim() == 0:
        return value / (numbers[1] + numbers[0] * size)
    wide = value.double() / (numbers[1].double() + numbers[0].double() * size.double())
    return wide.to(value.dtype)


def rms(x):
    """In f64; NaN of nothing."""
    return (x.double().square().sum() / x.numel()).sqrt().item() if x.numel() else NAN


def largest_rms(x, segments):
    """As Python's max, which keeps a NaN that comes first and passes over others."""
    return max([rms(x.flatten()[a:b]) for a, b in zip(segments[::2], segments[1::2])] or [0.0])


def finish_case(size, stages, dtype, offset=0):
    y0, k, fresh, y1 = (
        normal(*shape, dtype=dtype, seed=seed)
        for seed, shape in enumerate([(size,), (stages, size), (size,), (size,)])
    )
    y1 = y0 + 0.1 * y1
    return [Guarded(x, offset) for x in (y0, k, fresh, y1)]


def check_finish(
    rk_finish, size, dtype, flip, solution, error, tolerances=(RTOL, ATOL), segments=None, offset=0
):
    """Everything that the op returns and writes; the newest row comes as fresh."""
    segments = [0, size] if segments is None else segments
    stages = len(error)
    case = finish_case(size, stages, dtype, offset)
    y0, k, fresh, y1 = (x.view for x in case)
    ratio = Guarded(torch.full_like(y0, NAN), offset)
    stored = k.clone()
    stored[place(stages - 1, stages, flip)] = fresh
    k[place(stages - 1, stages, flip)] = NAN
    expected_y1 = _C.rk_stage(y0, stored, flip, [], solution, H) if solution else y1.clone()
    if solution:
        y1.fill_(NAN)
    exact = [x.double() for x in (y0, stored, expected_y1)]
    exact_ratio = torch.empty_like(exact[0])

    result = rk_finish(
        y0, k, flip, [fresh], y1, solution, error, H, *tolerances, segments, ratio.view
    )

    for guarded in (*case, ratio):
        guarded.check()
    assert torch.equal(k, stored)
    assert_same_bits(y1, expected_y1)
    estimate = _C.rk_stage(torch.zeros_like(y0), stored, flip, [], error, H)
    size_ = torch.max(y0.abs(), y1.abs())
    assert_same_bits(ratio.view, scaled(estimate, size_, *tolerances))
    norm, flag = result.tolist()
    assert result.dtype == F64
    assert norm == pytest.approx(largest_rms(ratio.view, segments), rel=1e-13, nan_ok=True)
    assert flag == 1.0

    # And against the reference, in f64 and in eager f32.
    fresh64 = [fresh.double()]
    exact_norm = reference.rk_finish(
        exact[0], exact[1], flip, fresh64, exact[2], solution, error, H, *tolerances, segments,
        exact_ratio,
    )  # fmt: skip
    eager_ratio = torch.empty_like(y0)
    eager_norm = reference.rk_finish(
        y0, stored, flip, [fresh], expected_y1, solution, error, H, *tolerances, segments,
        eager_ratio,
    )  # fmt: skip
    assert_bounded(ratio.view, eager_ratio, exact_ratio)
    if dtype == F64:
        assert norm == pytest.approx(exact_norm[0].item(), rel=1e-12, nan_ok=True)
    elif not math.isnan(norm):
        error_of_eager = abs(eager_norm[0] - exact_norm[0])
        assert abs(norm - exact_norm[0]) <= 2 * error_of_eager + 2e-7 * exact_norm[0]
    return result


@FINISH
@DTYPES
@SIZES
@FLIPS
@pytest.mark.parametrize("writes_solution", [False, True])
def test_finish(rk_finish, size, dtype, flip, writes_solution):
    """Written out as tsit5 does it, or there already as in dopri5."""
    tableau = TABLEAUX["tsit5"]
    solution = tableau.b if writes_solution else []
    check_finish(rk_finish, size, dtype, flip, solution, tableau.e)


@DTYPES
@FLIPS
@pytest.mark.parametrize("stages", range(1, 15))
def test_finish_stage_counts(stages, dtype, flip):
    solution, error = normal(stages, seed=7).tolist(), normal(stages, seed=8).tolist()
    for weights in ([], solution):
        check_finish(_C.rk_finish, 37, dtype, flip, weights, error)


@DTYPES
@pytest.mark.parametrize("kind", TOLERANCES)
@pytest.mark.parametrize("size", [1, 300, 20_000])
def test_finish_tolerances(kind, dtype, size):
    error = TABLEAUX["dopri5"].e
    check_finish(_C.rk_finish, size, dtype, False, [], error, TOLERANCES[kind](size))


@DTYPES
@pytest.mark.parametrize("kind", ["rtol each", "atol each", "both each"])
def test_tolerances_may_have_the_state_s_shape(kind, dtype):
    rtol, atol = TOLERANCES[kind](24)
    shaped = [x.view(4, 6) if x.dim() else x for x in (rtol, atol)]
    y0, y1 = normal(4, 6, dtype=dtype), normal(4, 6, dtype=dtype, seed=1)
    k, error = normal(3, 24, dtype=dtype, seed=2), [0.1, -0.3, 0.2]
    flat = _C.rk_finish(y0, k, False, [], y1, [], error, H, rtol, atol, [0, 24], None)
    assert torch.equal(
        _C.rk_finish(y0, k, False, [], y1, [], error, H, *shaped, [0, 24], None), flat
    )
    exact = reference.rk_finish(
        y0.double(), k.double(), False, [], y1.double(), [], error, H, *shaped, [0, 24]
    )
    torch.testing.assert_close(flat, exact, rtol=1e-5 if dtype == F32 else 1e-13, atol=0.0)


@DTYPES
@pytest.mark.parametrize("offset", [1, 2, 3, 5])
@pytest.mark.parametrize("size", [257, 20_001])
def test_finish_of_misaligned_tensors(size, dtype, offset):
    tableau = TABLEAUX["tsit5"]
    case = (_C.rk_finish, size, dtype, False, tableau.b, tableau.e)
    assert torch.equal(check_finish(*case, offset=offset), check_finish(*case))


SEGMENTS = {
    "none": lambda n: [],
    "all": lambda n: [0, n],
    "two": lambda n: [0, n // 3, n // 3, n],
    "gaps": lambda n: [1, 5, 7, n // 2, n // 2 + 3, n - 2],
    "first element": lambda n: [0, 1],
    "last element": lambda n: [n - 1, n],
    "adjoint": lambda n: [0, 1, 1, n // 3, n // 3, n // 2 + 1, n // 2 + 1, n],
    "seminorm": lambda n: [0, 1, 1, n // 3, n // 3, n // 2],
    "one per value": lambda n: [i // 2 + i % 2 for i in range(2 * min(n, 300))],
    "first empty": lambda n: [0, 0, 0, n],
    "first empty, behind a gap": lambda n: [5, 5, 5, n],
    "later empty": lambda n: [0, 9, 9, 9, 9, n],
    "all empty": lambda n: [4, 4, n, n],
}


@FINISH
@DTYPES
@pytest.mark.parametrize("name", SEGMENTS)
@pytest.mark.parametrize("size", [40, 20_011])
def test_finish_segments(rk_finish, name, dtype, size):
    segments = SEGMENTS[name](size)
    result = check_finish(
        rk_finish, size, dtype, False, [], TABLEAUX["dopri5"].e, segments=segments
    )
    assert math.isnan(result[0]) == name.startswith(("first empty", "all empty"))
    assert (result[0] == 0.0) == (name == "none")


def test_the_largest_segment_decides():
    """Wherever it lies, and not a mean over all."""
    y0 = torch.zeros(6000, dtype=F64)
    one = torch.ones((), dtype=F64)
    for begin, end in [(0, 10), (10, 3000), (3000, 6000)]:
        k = torch.full((1, 6000), 0.5, dtype=F64)
        k[0, begin:end] = 3.0
        segments = [0, 10, 10, 3000, 3000, 6000]
        result = _C.rk_finish(y0, k, False, [], y0, [], [1.0], 1.0, 0 * one, one, segments, None)
        assert result[0] == pytest.approx(3.0, rel=1e-15)


@DTYPES
def test_an_empty_state(dtype):
    """The RMS of nothing is NaN, as torch.mean has it; no value is not finite."""
    y, k = torch.empty(0, dtype=dtype), torch.empty(2, 0, dtype=dtype)
    norm, flag = _C.rk_finish(
        y, k, False, [y], y, [], [1.0, 1.0], H, RTOL, ATOL, [0, 0], None
    ).tolist()
    assert math.isnan(norm)
    assert flag == 1.0
    norms = ops.rk_initial_norms(y, y, None, RTOL, ATOL, [0, 0])
    assert norms.isnan().all()


@DTYPES
@FLIPS
@pytest.mark.parametrize("kind", FRESH)
def test_finish_stores_fresh(kind, dtype, flip):
    parts, row = fresh_case(kind, dtype)
    y0, y1, k = normal(24, dtype=dtype), normal(24, dtype=dtype), normal(3, 24, dtype=dtype, seed=1)
    stored = k.clone()
    stored[place(2, 3, flip)] = row
    arguments = (y1, [], [0.1, 0.2, 0.3], H, RTOL, ATOL, [0, 24], None)
    result = _C.rk_finish(y0, k, flip, parts, *arguments)
    assert torch.equal(k, stored)
    assert torch.equal(result, _C.rk_finish(y0, stored, flip, [], *arguments))
    assert not k.requires_grad


@DTYPES
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("at", [0, 8, 255, 256, 5999])
def test_a_solution_that_is_not_finite_is_flagged(value, at, dtype):
    """Also where no segment looks."""
    y0, k = normal(6000, dtype=dtype), torch.ones(1, 6000, dtype=dtype)
    y1 = y0.clone()
    y1[at] = value
    for segments in ([0, 6000], [1000, 2000], []):
        result = _C.rk_finish(y0, k, False, [], y1, [], [0.1], H, RTOL, ATOL, segments, None)
        exact = reference.rk_finish(y0, k, False, [], y1, [], [0.1], H, RTOL, ATOL, segments)
        assert result[1] == exact[1] == 0.0
        torch.testing.assert_close(result, exact, rtol=1e-5, atol=0.0, equal_nan=True)


@DTYPES
def test_a_summed_solution_that_is_not_finite_is_flagged(dtype):
    y0, k, y1 = torch.zeros(600, dtype=dtype), torch.zeros(2, 600, dtype=dtype), torch.zeros(600)
    k[1, 300] = INF
    arguments = (y1.to(dtype), [0.0, 1.0], [1.0, 0.0], H, RTOL, ATOL, [0, 600], None)
    assert _C.rk_finish(y0, k, False, [], *arguments).tolist() == [0.0, 0.0]


@DTYPES
def test_a_large_solution_is_finite(dtype):
    """And an error estimate that is not finite shows in the norm alone."""
    y0 = torch.full((600,), torch.finfo(dtype).max, dtype=dtype)
    k = torch.zeros(1, 600, dtype=dtype)
    call = (y0, [], [1.0], H, RTOL, ATOL, [0, 600], None)
    assert _C.rk_finish(-y0, k, False, [], *call).tolist() == [0.0, 1.0]
    k[0, 7] = NAN
    norm, flag = _C.rk_finish(y0, k, False, [], *call).tolist()
    assert math.isnan(norm)
    assert flag == 1.0


@DTYPES
def test_scale_is_the_larger_magnitude(dtype):
    """NaN if either is NaN, as torch.max; the sign does not matter."""
    y0 = torch.tensor([1.0, -3.0, 2.0, NAN, 1.0, -0.0], dtype=dtype)
    y1 = torch.tensor([-2.0, 1.0, -2.0, 1.0, NAN, 0.0], dtype=dtype)
    ratio = torch.empty_like(y0)
    one, zero = torch.ones((), dtype=F64), torch.zeros((), dtype=F64)
    k = torch.full((1, 6), 6.0, dtype=dtype)
    _C.rk_finish(y0, k, False, [], y1, [], [1.0], 1.0, one, zero, [0, 6], ratio)
    assert_same_bits(ratio, torch.tensor([3.0, 2.0, 3.0, NAN, NAN, INF], dtype=dtype))


@DTYPES
def test_ratio_may_be_left_out(dtype):
    case = finish_case(3000, 7, dtype)
    y0, k, fresh, y1 = (x.view for x in case)
    error = TABLEAUX["dopri5"].e
    arguments = (y0, k, False, [fresh], y1, [], error, H, RTOL, ATOL, [0, 3000])
    ratio = torch.full_like(y0, NAN)
    without = _C.rk_finish(*arguments, None)
    assert torch.equal(without, _C.rk_finish(*arguments, ratio))
    assert torch.equal(without, ops.rk_finish(*arguments))
    assert ratio.isfinite().all()


# ---- interpolation -------------------------------------------------------------------------------

POINTS = [0.0, 1.0, 0.5, *(i / 37 for i in range(38)), 1e-9, 1 - 1e-9]


@DTYPES
@SIZES
@FLIPS
def test_interpolate(size, dtype, flip):
    x = POINTS if size < 1000 else POINTS[:3]
    tableau = TABLEAUX["dopri5"]
    y0, y1 = (Guarded(normal(size, dtype=dtype, seed=seed)) for seed in (0, 1))
    k = Guarded(normal(7, size, dtype=dtype, seed=2))
    before = [guarded.view.clone() for guarded in (y0, y1, k)]
    out = Guarded(torch.full((len(x), size), NAN, dtype=dtype))
    ops.rk_interpolate(y0.view, y1.view, k.view, flip, tableau.m, H, x, out.view)
    for guarded, values in zip((y0, y1, k), before):
        guarded.check()
        assert torch.equal(guarded.view, values)
    out.check()
    exact = torch.empty(len(x), size, dtype=F64)
    eager = torch.empty(len(x), size, dtype=dtype)
    reference.rk_interpolate(*(v.double() for v in before), flip, tableau.m, H, x, exact)
    reference.rk_interpolate(*before, flip, tableau.m, H, x, eager)
    assert_bounded(out.view, eager, exact)
    if dtype == F64:
        torch.testing.assert_close(out.view, exact, rtol=1e-12, atol=1e-13)
    assert torch.equal(out.view[0], before[0])
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out.view[1], before[1], rtol=0.0, atol=500 * eps)


def test_interpolant_of_a_quartic_is_that_quartic():
    """Both ends, both slopes and the middle determine it."""
    c = normal(5, 50)
    h = 0.8

    def value(t):
        return c[0] + t * (c[1] + t * (c[2] + t * (c[3] + t * c[4])))

    def slope(t):
        return c[1] + t * (2 * c[2] + t * (3 * c[3] + t * 4 * c[4]))

    # Row 1 with weight 2 leads from y0 to the middle.
    k = torch.stack([slope(0.0), (value(h / 2) - value(0.0)) / (2 * h), slope(h)])
    out = torch.empty(len(POINTS), 50, dtype=F64)
    ops.rk_interpolate(value(0.0), value(h), k, False, [0.0, 2.0, 0.0], h, POINTS, out)
    expected = torch.stack([value(x * h) for x in POINTS])
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-13)


@DTYPES
@FLIPS
def test_interpolate_every_method(dtype, flip):
    for tableau in TABLEAUX.values():
        if not tableau.adaptive:
            continue
        y0, y1 = normal(40, dtype=dtype), normal(40, dtype=dtype, seed=1)
        k = normal(tableau.stages, 40, dtype=dtype, seed=2)
        out, exact = torch.empty(3, 40, dtype=dtype), torch.empty(3, 40, dtype=F64)
        x = [0.25, 0.5, 0.9]
        doubles = (y0.double(), y1.double(), k.double())
        reference.rk_interpolate(*doubles, flip, tableau.m, H, x, exact)
        # First and last row are slopes; others of weight zero are not read.
        for stage in range(1, tableau.stages - 1):
            if tableau.m[stage] == 0:
                k[stage] = NAN
        ops.rk_interpolate(y0, y1, k, flip, tableau.m, H, x, out)
        torch.testing.assert_close(out.double(), exact, rtol=0.0, atol=300 * torch.finfo(dtype).eps)


def test_interpolate_rounds_as_the_reference():
    """Same formula, same order: bit by bit where the middle is the same number."""
    y0, y1 = normal(300, dtype=F32), normal(300, dtype=F32, seed=1)
    k = normal(2, 300, dtype=F32, seed=2)
    outs = [torch.empty(len(POINTS), 300) for _ in range(2)]
    for op, out in zip((ops.rk_interpolate, reference.rk_interpolate), outs):
        op(y0, y1, k, False, [0.5, 0.0], H, POINTS, out)
    assert torch.equal(*outs)


@pytest.mark.parametrize("shape", [(2, 24), (2, 4, 6), (48,)])
def test_interpolate_writes_any_shape(shape):
    y0, y1, k = normal(4, 6), normal(4, 6, seed=1), normal(2, 24, seed=2)
    out = torch.empty(shape, dtype=F64)
    ops.rk_interpolate(y0, y1, k, False, [0.5], H, [0.0, 1.0], out)
    torch.testing.assert_close(out.view(2, 4, 6), torch.stack([y0, y1]), rtol=1e-12, atol=1e-13)


def test_interpolate_at_no_point():
    y, k = normal(9), normal(2, 9)
    ops.rk_interpolate(y, y, k, False, [0.5], H, [], torch.empty(0, 9, dtype=F64))


# ---- initial step --------------------------------------------------------------------------------


@DTYPES
@SIZES
@pytest.mark.parametrize("with_f1", [False, True])
def test_initial_norms(size, dtype, with_f1):
    y0, f0, f1 = (normal(size, dtype=dtype, seed=seed) for seed in range(3))
    f1 = f1 if with_f1 else None
    segments = [0, size]
    norms = ops.rk_initial_norms(y0, f0, f1, RTOL, ATOL, segments)
    assert norms.dtype == F64
    assert norms.shape == (2,)
    values = [f1 - f0] * 2 if with_f1 else [y0, f0]
    expected = [largest_rms(scaled(v, y0.abs(), RTOL, ATOL), segments) for v in values]
    assert norms.tolist() == pytest.approx(expected, rel=1e-13, nan_ok=True)
    doubles = [None if x is None else x.double() for x in (y0, f0, f1)]
    exact = reference.rk_initial_norms(*doubles, RTOL, ATOL, segments)
    tolerance = 1e-6 if dtype == F32 else 1e-13
    torch.testing.assert_close(norms, exact, rtol=tolerance, atol=0.0, equal_nan=True)


@DTYPES
@pytest.mark.parametrize("name", SEGMENTS)
@pytest.mark.parametrize("kind", TOLERANCES)
def test_initial_norms_of_segments(name, kind, dtype):
    size = 9001
    y0, f0, f1 = (normal(size, dtype=dtype, seed=seed) for seed in range(3))
    rtol, atol = TOLERANCES[kind](size)
    segments = SEGMENTS[name](size)
    for values, change in [((y0, f0), None), ((f1 - f0,) * 2, f1)]:
        norms = ops.rk_initial_norms(y0, f0, change, rtol, atol, segments).tolist()
        expected = [largest_rms(scaled(v, y0.abs(), rtol, atol), segments) for v in values]
        assert norms == pytest.approx(expected, rel=1e-13, nan_ok=True)
        doubles = [None if x is None else x.double() for x in (y0, f0, change)]
        exact = reference.rk_initial_norms(*doubles, rtol, atol, segments).tolist()
        tolerance = 1e-6 if dtype == F32 else 1e-13
        assert norms == pytest.approx(exact, rel=tolerance, nan_ok=True)


@DTYPES
@pytest.mark.parametrize("offset", [1, 3])
def test_initial_norms_of_misaligned_tensors(offset, dtype):
    parts = [normal(1001, dtype=dtype, seed=seed) for seed in range(3)]
    moved = [Guarded(x, offset).view for x in parts]
    segments = [0, 500, 501, 1001]
    for last in (2, 3):
        a = [*parts[:last], *[None] * (3 - last)]
        b = [*moved[:last], *[None] * (3 - last)]
        norms = ops.rk_initial_norms(*a, RTOL, ATOL, segments)
        assert torch.equal(ops.rk_initial_norms(*b, RTOL, ATOL, segments), norms)


def test_initial_norms_ignore_signs_and_carry_nan():
    y0, f0 = normal(300), normal(300, seed=1)
    norms = ops.rk_initial_norms(y0, f0, None, RTOL, ATOL, [0, 300])
    assert torch.equal(ops.rk_initial_norms(-y0, -f0, None, RTOL, ATOL, [0, 300]), norms)
    f0[299] = NAN
    with_nan = ops.rk_initial_norms(y0, f0, None, RTOL, ATOL, [0, 300])
    assert with_nan[0] == norms[0]
    assert with_nan[1].isnan()


# ---- threads -------------------------------------------------------------------------------------


def everything(size, dtype):
    """One call of each op on a state that several threads share."""
    y0, k, fresh, y1 = (x.view for x in finish_case(size, 7, dtype))
    tableau = TABLEAUX["tsit5"]
    ratio, out = torch.empty_like(y0), torch.empty(3, size, dtype=dtype)
    segments = [0, 1, 1, size // 3, size // 3 + 5, size]
    stage = _C.rk_stage(y0, k, False, [fresh], tableau.a[6], H)
    norm = _C.rk_finish(
        y0, k, True, [fresh], y1, tableau.b, tableau.e, H, RTOL, ATOL, segments, ratio
    )
    ops.rk_interpolate(y0, y1, k, False, tableau.m, H, [0.1, 0.5, 0.9], out)
    initial = ops.rk_initial_norms(y0, fresh, None, RTOL, ATOL, segments)
    combined = ops.rk_combine(y0, [fresh, y1], [0.3, 0.4], H)
    return [stage, norm, ratio, y1, k, out, initial, combined]


@DTYPES
def test_threads_do_not_matter(dtype):
    """Neither to the norms: partial sums are cut by size, not by thread."""
    alone = everything(200_003, dtype)
    for count in (2, 3, 4):
        torch.set_num_threads(count)
        for a, b in zip(alone, everything(200_003, dtype)):
            assert torch.equal(a, b)


# ---- rk_combine ----------------------------------------------------------------------------------


@pytest.mark.parametrize("served", [ops, reference], ids=["op", "reference"])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("terms", range(1, 13))
def test_ordered_sums_add_in_order(terms, dtype, served):
    """Bit by bit the sum of a loop, whose order matters for these values."""
    generator = torch.Generator().manual_seed(terms)
    rows = torch.randn(terms, 35, generator=generator, dtype=dtype)
    rows = [row * 10.0 ** (j % 5) for j, row in enumerate(rows)]
    weights = torch.randn(terms, generator=generator, dtype=dtype).tolist()
    start = torch.randn(35, generator=generator, dtype=dtype)
    total = 0
    for weight, row in zip(weights, rows):
        total = total + weight * row
    assert torch.equal(served.rk_combine(start, rows, weights, 1.0, None, True), start + total)
    if terms > 5:
        others = served.rk_combine(start, rows[::-1], weights[::-1], 1.0, None, True)
        assert not torch.equal(others, start + total), "any order would do"


@DTYPES
@SIZES
def test_combine(size, dtype):
    y, k = normal(size, dtype=dtype), list(normal(5, size, dtype=dtype, seed=1))
    weights = [0.3, 0.0, -1.2, 0.5, 2.0]
    out = ops.rk_combine(y, k, weights, H)
    assert torch.equal(out, _C.rk_stage(y, torch.stack(k), False, [], weights, H))
    assert torch.equal(ops.rk_combine(y, k, weights, H, torch.tensor(H, dtype=dtype)), out)
    exact = reference.rk_combine(y.double(), [row.double() for row in k], weights, H)
    assert_bounded(out, reference.rk_combine(y, k, weights, H), exact)
    if dtype == F64:
        torch.testing.assert_close(out, exact, rtol=1e-14, atol=1e-14)


@DTYPES
@pytest.mark.parametrize("terms", range(1, 15))
def test_combine_counts(terms, dtype):
    """As the reference rounds, bit by bit, which is a sum over the last axis."""
    y, k = normal(40, dtype=dtype), list(normal(terms, 40, dtype=dtype, seed=1))
    weights = normal(terms, seed=2).tolist()
    out = ops.rk_combine(y, k, weights, H)
    torch.testing.assert_close(
        out, reference.rk_combine(y, k, weights, H), rtol=0.0, atol=20 * torch.finfo(dtype).eps
    )
    assert torch.equal(out, _C.rk_stage(y, torch.stack(k), False, [], weights, H))


def test_combine_serves_strided_tensors():
    """And rows of another shape, as the reference does."""
    y, k = normal(6, 4).t(), [normal(4, 6, seed=1), normal(6, 4, seed=2).t(), normal(24, seed=3)]
    weights = [0.3, -0.4, 0.5]
    out = ops.rk_combine(y, k, weights, H)
    assert out.is_contiguous()
    assert torch.equal(out, reference.rk_combine(y, k, weights, H))


COMBINE = {
    "one row": (1, [0.7], False),
    "rows": (3, [0.7, -0.2, 1.1], False),
    "zero weights": (4, [0.7, 0.0, 1.1, 0.0], False),
    "all weights zero": (2, [0.0, 0.0], False),
    "h": (3, [0.7, -0.2, 1.1], True),
    "h, zero weights": (4, [0.0, 0.7, 0.0, 1.1], True),
    "h, all weights zero": (2, [0.0, 0.0], True),
    "fourteen": (14, [0.1 * j - 0.65 for j in range(14)], True),
}


def combine_case(name, needed):
    """Tensors y, *k and perhaps h, those in `needed` requiring grad, and the op as a function."""
    terms, weights, has_h = COMBINE[name]
    tensors = [normal(2, 3), *normal(terms, 2, 3, seed=1)]
    if has_h:
        tensors.append(torch.tensor(H, dtype=F64))
    tensors = [x.clone().requires_grad_(needed(i)) for i, x in enumerate(tensors)]

    def combine(op, tensors):
        return op(tensors[0], tensors[1 : terms + 1], weights, H, *tensors[terms + 1 :])

    return tensors, combine


NEEDED = {
    "all": lambda i: True,
    "y": lambda i: i == 0,
    "first row": lambda i: i == 1,
    "all but y": lambda i: i > 0,
    "every second": lambda i: i % 2 == 1,
}


@pytest.mark.parametrize("needed", NEEDED)
@pytest.mark.parametrize("name", COMBINE)
def test_combine_gradients(name, needed):
    tensors, combine = combine_case(name, NEEDED[needed])
    inputs = [x for x in tensors if x.requires_grad]

    def function(*inputs):
        rest = iter(inputs)
        return combine(ops.rk_combine, [next(rest) if x.requires_grad else x for x in tensors])

    # The forward pass takes h from the number, so that numerical differences see none of h.
    smooth = [x for x in inputs if x.dim() > 0]
    if smooth and len(smooth) == len(inputs):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)
    seed = normal(2, 3, seed=9)
    results = [
        torch.autograd.grad(combine(op, tensors), inputs, seed)
        for op in (ops.rk_combine, reference.rk_combine)
    ]
    for mine, theirs in zip(*results):
        torch.testing.assert_close(mine, theirs, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("name", [name for name, case in COMBINE.items() if case[2]])
def test_combine_gradients_to_h(name):
    """gradcheck with the number following the tensor, as `h_graph` is to equal h."""
    tensors, _ = combine_case(name, lambda i: True)
    weights = COMBINE[name][1]

    def function(h, y, *k):
        return ops.rk_combine(y, k, weights, h.item(), h)

    arguments = (tensors[-1], *tensors[:-1])
    assert torch.autograd.gradcheck(function, arguments)
    assert torch.autograd.gradgradcheck(function, arguments)


def test_combine_higher_derivatives():
    """d/dh d/dk of sum(out^3), against the reference with its own graph."""
    tensors, combine = combine_case("h, zero weights", lambda i: True)
    results = []
    for op in (ops.rk_combine, reference.rk_combine):
        first = torch.autograd.grad(combine(op, tensors).pow(3).sum(), tensors, create_graph=True)
        total = sum(g.square().sum() for g in first)
        results.append(torch.autograd.grad(total, tensors))
    for mine, theirs in zip(*results):
        assert theirs.abs().max() > 0 or mine.abs().max() == 0
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)


def test_combine_zero_weights_do_not_spread_nan():
    h = torch.tensor(H, dtype=F64, requires_grad=True)
    y, good = normal(4).requires_grad_(), normal(4, seed=1).requires_grad_()
    bad = torch.full((4,), NAN, dtype=F64, requires_grad=True)
    out = ops.rk_combine(y, [good, bad], [0.5, 0.0], H, h)
    to_h, to_good, to_bad = torch.autograd.grad(out.sum(), [h, good, bad])
    assert out.isfinite().all()
    torch.testing.assert_close(to_h, 0.5 * good.detach().sum())
    assert torch.equal(to_good, torch.full((4,), 0.5 * H, dtype=F64))
    assert torch.equal(to_bad, torch.zeros(4, dtype=F64))


@pytest.mark.parametrize("has_h", [False, True])
def test_combine_gradients_have_the_shapes_of_their_tensors(has_h):
    """Rows flat where y is a column: a product of the two must not broadcast."""
    y = normal(5, 1).requires_grad_()
    k = [normal(5, seed=1).requires_grad_(), normal(1, 5, seed=2).requires_grad_()]
    h = [torch.tensor(H, dtype=F64, requires_grad=True)] if has_h else []
    results = [
        torch.autograd.grad(op(y, k, [0.5, 2.0], H, *h).pow(2).sum(), [y, *k, *h])
        for op in (ops.rk_combine, reference.rk_combine)
    ]
    for mine, theirs in zip(*results):
        assert mine.shape == theirs.shape
        torch.testing.assert_close(mine, theirs, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_combine_takes_h_in_f64(dtype):
    """Times are often f64 where the state is f32."""
    h = torch.tensor(H, dtype=F64, requires_grad=True)
    y, k = normal(4, dtype=dtype), normal(4, dtype=dtype, seed=1).requires_grad_()
    out = ops.rk_combine(y, [k], [2.0], H, h)
    to_h, to_k = torch.autograd.grad(out.sum(), [h, k])
    assert (out.dtype, to_h.dtype, to_k.dtype) == (dtype, F64, dtype)
    torch.testing.assert_close(to_h, 2.0 * k.detach().double().sum(), rtol=1e-6, atol=1e-6)


def test_combine_keeps_no_rows_without_h():
    """The gradient is linear in them, so the graph need not hold a step's derivatives."""
    y, k = normal(4).requires_grad_(), normal(4, seed=1).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x), lambda x: x):
        ops.rk_combine(y, [k], [2.0], H)
        assert not saved
        ops.rk_combine(y, [k], [2.0], H, torch.tensor(H, dtype=F64, requires_grad=True))
    assert len(saved) == 2


# ---- time tensors --------------------------------------------------------------------------------


@pytest.mark.parametrize("time_tensors", [_C.time_tensors, ops.time_tensors], ids=["direct", "op"])
@pytest.mark.parametrize("dtype", [F32, F64, torch.float16, torch.bfloat16])
def test_time_tensors(time_tensors, dtype):
    values = [0.0, 1.0, -1 / 3, 1e-5, 6e4, 1 + 2.0**-11 + 2.0**-30, 0.1 + 2.0**-26, INF, NAN]
    times = time_tensors(values, dtype, torch.device("cpu"))
    for time, value in zip(times, values, strict=True):
        assert time.shape == ()
        assert_same_bits(time, torch.tensor(value, dtype=dtype))
    times[0].fill_(5.0)  # a field may write to its time
    assert times[1] == 1.0
    assert time_tensors([], dtype, torch.device("cpu")) == []


def test_time_tensors_equal_the_reference():
    values = normal(50).tolist()
    for dtype in (F32, F64):
        pair = zip(
            _C.time_tensors(values, dtype, torch.device("cpu")),
            reference.time_tensors(values, dtype, torch.device("cpu")),
            strict=True,
        )
        for a, b in pair:
            assert_same_bits(a, b)


def test_time_tensors_on_another_device():
    (time,) = _C.time_tensors([1.0], F32, torch.device("meta"))
    assert (time.device.type, time.dtype, time.shape) == ("meta", F32, ())
    with pytest.raises(RuntimeError, match="not implemented for 'Long'"):
        _C.time_tensors([1.0], torch.int64, torch.device("cpu"))


# ---- dtypes without a kernel ---------------------------------------------------------------------

OTHERS = [torch.float16, torch.bfloat16, torch.complex64, torch.complex128]


def test_which_states_have_kernels():
    cpu = torch.device("cpu")
    assert _ops.has_kernels(F32, cpu)
    assert _ops.has_kernels(F64, cpu)
    assert not _ops.has_kernels(F32, torch.device("meta"))
    for dtype in OTHERS:
        assert _ops.kernels(torch.zeros(1, dtype=dtype)) is reference
    for name in set(_ops.OPS) - set(_ops.WITHOUT_REFERENCE):
        assert callable(getattr(reference, name))
        assert callable(getattr(_ops.kernels(torch.zeros(1)), name))


def other_case(dtype, size=50):
    """A step in a dtype without a kernel: values, and the same in the widest dtype."""
    wide = torch.complex128 if dtype.is_complex else F64
    imaginary = 1j if dtype.is_complex else 0.0
    values = [
        (normal(*shape, seed=seed) + imaginary * normal(*shape, seed=seed + 10)).to(dtype)
        for seed, shape in enumerate([(size,), (7, size), (size,)])
    ]
    values.append((values[0] + 0.1 * values[2]).to(dtype))
    return values, [x.to(wide) for x in values]


def unit_of(dtype):
    return torch.finfo(dtype.to_real() if dtype.is_complex else dtype).eps


# As in torchdiffeq, norms are computed in the state's dtype, so squares must fit: in f16, 255^2.
COARSE = torch.tensor(0.1, dtype=F64)


@pytest.mark.parametrize("dtype", OTHERS)
@FLIPS
def test_stage_without_a_kernel(dtype, flip):
    (y0, k, fresh, _), (wide0, wide_k, wide_fresh, _) = other_case(dtype)
    weights = TABLEAUX["dopri5"].a[6]
    k[5] = NAN
    out = _ops.kernels(y0).rk_stage(y0, k, flip, [fresh], weights, H)
    wide_k[5] = wide_fresh
    rows = ordered(wide_k, flip)[:6]
    exact = wide0 + (rows * coefficients(weights, H, F64)[:, None]).sum(0)
    assert out.dtype == dtype
    assert torch.equal(k[5], fresh)
    assert (out - exact).abs().max() < 20 * unit_of(dtype)


@pytest.mark.parametrize("dtype", OTHERS)
def test_finish_without_a_kernel(dtype):
    (y0, k, fresh, y1), (wide0, wide_k, wide_fresh, _) = other_case(dtype)
    tableau = TABLEAUX["tsit5"]
    wide_k[6] = wide_fresh
    step = coefficients(tableau.b, H, F64)[:, None]
    exact1 = wide0 + (wide_k * step).sum(0)
    scale = COARSE + COARSE * torch.max(wide0.abs(), exact1.abs())
    scaled_ = (wide_k * coefficients(tableau.e, H, F64)[:, None]).sum(0) / scale
    exact = torch.stack([part.abs().square().mean().sqrt() for part in scaled_.split(20)]).max()
    ratio = torch.empty_like(y0)
    segments = [0, 20, 20, 40, 40, 50]
    rk_finish = _ops.kernels(y0).rk_finish
    arguments = (tableau.b, tableau.e, H, COARSE, COARSE, segments, ratio)
    norm, flag = rk_finish(y0, k, False, [fresh], y1, *arguments).tolist()
    assert flag == 1.0
    assert (y1 - exact1).abs().max() < 20 * unit_of(dtype)
    assert norm == pytest.approx(exact.item(), rel=40 * unit_of(dtype))
    assert ratio.abs().max().item() == pytest.approx(
        scaled_.abs().max().item(), rel=100 * unit_of(dtype)
    )


@pytest.mark.parametrize("dtype", OTHERS)
def test_the_rest_without_a_kernel(dtype):
    (y0, k, fresh, y1), (wide0, _, wide_fresh, wide1) = other_case(dtype)
    tableau = TABLEAUX["dopri5"]
    served = _ops.kernels(y0)
    eps = unit_of(dtype)

    norms = served.rk_initial_norms(y0, fresh, None, COARSE, COARSE, [0, 50])
    scale = COARSE + COARSE * wide0.abs()
    exact = [(v / scale).abs().square().mean().sqrt().item() for v in (wide0, wide_fresh)]
    assert norms.tolist() == pytest.approx(exact, rel=20 * eps)

    out = torch.empty(2, 50, dtype=dtype)
    served.rk_interpolate(y0, y1, k, False, tableau.m, H, [0.0, 1.0], out)
    assert torch.equal(out[0], y0)
    assert (out[1] - wide1).abs().max() < 400 * eps

    combined = served.rk_combine(y0, [fresh, y1], [0.5, 2.0], H)
    assert (combined - (wide0 + H * (0.5 * wide_fresh + 2.0 * wide1))).abs().max() < 20 * eps


def test_finish_without_a_kernel_flags():
    y0 = torch.ones(5, dtype=torch.bfloat16)
    y1 = y0.clone()
    y1[3] = INF
    k = torch.ones(1, 5, dtype=torch.bfloat16)
    result = reference.rk_finish(y0, k, False, [], y1, [], [1.0], H, RTOL, ATOL, [0, 2])
    assert result[1] == 0.0


# ---- wrong arguments -----------------------------------------------------------------------------

Y = normal(6, dtype=F32)
K = normal(3, 6, dtype=F32)
E3 = [0.1, 0.2, 0.3]


def stage(y0=Y, k=K, fresh=(), weights=(1.0,)):
    return ops.rk_stage(y0, k, False, list(fresh), list(weights), H)


def finish(
    y0=Y,
    k=K,
    y1=Y,
    fresh=(),
    solution=(),
    error=E3,
    rtol=RTOL,
    atol=ATOL,
    segments=(0, 6),
    ratio=None,
):
    return ops.rk_finish(
        y0, k, False, list(fresh), y1.clone(), list(solution), error, H, rtol, atol, list(segments),
        ratio,
    )  # fmt: skip


def interpolate(y0=Y, y1=Y, k=K, middle=(0.5,), x=(0.5,), out=None):
    out = torch.empty(1, 6) if out is None else out
    ops.rk_interpolate(y0, y1, k, False, list(middle), H, list(x), out)


def initial(y0=Y, f0=Y, f1=None, rtol=RTOL, atol=ATOL, segments=(0, 6)):
    return ops.rk_initial_norms(y0, f0, f1, rtol, atol, list(segments))


def combine(y=Y, k=(Y,), weights=(1.0,)):
    return ops.rk_combine(y, list(k), list(weights), H)


STRIDED = normal(12, dtype=F32)[::2]
SCHEMA_OF_SEGMENTS = r"segments must be ascending within the state of 6 values"
WRONG = {
    "stage, strided y0": (stage, {"y0": STRIDED}, r"y0 must be contiguous, got strides \[2\]"),
    "stage, transposed y0": (
        stage, {"y0": normal(2, 3, dtype=F32).t()}, r"y0 must be contiguous, got strides \[1, 3\]",
    ),
    "stage, strided k": (stage, {"k": K.t().contiguous().t()}, "k must be contiguous"),
    "stage, one axis": (stage, {"k": K[0]}, r"k must be \[stages, 6\]"),
    "stage, three axes": (stage, {"k": K.view(3, 2, 3)}, r"k must be \[stages, 6\].*\[3, 2, 3\]"),
    "stage, other size": (stage, {"k": K[:, :5].clone()}, r"k must be \[stages, 6\].*\[3, 5\]"),
    "stage, no rows": (stage, {"k": K[:0]}, r"k must be \[stages, 6\] with 1 to 14 stages"),
    "stage, 15 rows": (stage, {"k": torch.zeros(15, 6)}, r"k must .* with 1 to 14 stages"),
    "stage, k's dtype": (stage, {"k": K.double()}, "k must have y0's dtype and device"),
    "stage, half": (stage, {"y0": Y.half(), "k": K.half()}, "rk_stage.*not implemented for 'Half'"),
    "stage, no weights": (stage, {"weights": []}, "weights must not be empty"),
    "stage, many weights": (stage, {"weights": [1.0] * 4}, "got 4 weights for 3 stages"),
    "stage, short fresh": (stage, {"fresh": [Y[:5]]}, "expected 6, got 5"),
    "stage, long fresh": (stage, {"fresh": [Y, Y[:1]]}, "expected 6, got 7"),
    "finish, strided y0": (finish, {"y0": STRIDED}, "y0 must be contiguous"),
    "finish, y1's size": (finish, {"y1": Y[:5]}, "y1 must have the 6 values"),
    "finish, y1's dtype": (finish, {"y1": Y.double()}, "y1 must have .* dtype and device of y0"),
    "finish, no rows": (finish, {"k": K[:0], "error": []}, r"k must .* with 1 to 14 stages"),
    "finish, no rows but fresh": (
        finish, {"k": K[:0], "error": [], "fresh": [Y]}, r"k must .* with 1 to 14 stages",
    ),
    "finish, lengths": (
        finish, {"solution": [1.0, 2.0]}, "solution must be empty or as long as error, got 2 and 3",
    ),
    "finish, many weights": (finish, {"error": [1.0] * 4}, "got 4 weights for 3 stages"),
    "finish, short fresh": (finish, {"fresh": [Y[:5]]}, "expected 6, got 5"),
    "finish, rtol in f32": (finish, {"rtol": RTOL.float()}, "rtol must be float64, got Float"),
    "finish, atol in f32": (finish, {"atol": ATOL.float()}, "atol must be float64, got Float"),
    "finish, rtol's size": (finish, {"rtol": RTOL.expand(5).clone()}, "rtol must be 0-dim or"),
    "finish, atol's size": (finish, {"atol": ATOL.view(1)}, "atol must be 0-dim or have one value"),
    "finish, strided atol": (finish, {"atol": ATOL.expand(6)}, "atol must .*contiguous"),
    "finish, odd segments": (finish, {"segments": [0]}, r"segments must be pairs \(begin, end\)"),
    "finish, segment beyond": (finish, {"segments": [0, 7]}, SCHEMA_OF_SEGMENTS),
    "finish, segment before": (finish, {"segments": [-1, 6]}, SCHEMA_OF_SEGMENTS),
    "finish, segment reversed": (finish, {"segments": [4, 2]}, SCHEMA_OF_SEGMENTS),
    "finish, overlapping": (finish, {"segments": [0, 4, 3, 6]}, SCHEMA_OF_SEGMENTS),
    "finish, not ascending": (finish, {"segments": [3, 6, 0, 3]}, SCHEMA_OF_SEGMENTS),
    "finish, ratio's size": (finish, {"ratio": torch.empty(5)}, "ratio must have the 6 values"),
    "finish, ratio strided": (finish, {"ratio": STRIDED}, "ratio must be contiguous"),
    "interpolate, strided y0": (interpolate, {"y0": STRIDED}, "y0 must be contiguous"),
    "interpolate, y1's dtype": (interpolate, {"y1": Y.double()}, "y1 must have the 6 values"),
    "interpolate, no rows": (interpolate, {"k": K[:0]}, r"k must .* with 1 to 14 stages"),
    "interpolate, weights": (interpolate, {"middle": [0.1] * 4}, "got 4 weights for 3 stages"),
    "interpolate, out's size": (
        interpolate, {"out": torch.empty(2, 6)}, "out must hold 1 states of 6 values",
    ),
    "interpolate, out's dtype": (
        interpolate, {"out": torch.empty(1, 6, dtype=F64)}, "out must hold 1 states.*of Double",
    ),
    "interpolate, strided out": (
        interpolate, {"out": torch.empty(6, 2).t(), "x": [0, 1]}, "out must be contiguous",
    ),
    "initial, strided y0": (initial, {"y0": STRIDED}, "y0 must be contiguous"),
    "initial, f0's dtype": (initial, {"f0": Y.double()}, "f0 must have the 6 values"),
    "initial, strided f0": (initial, {"f0": STRIDED}, "f0 must be contiguous"),
    "initial, f1's size": (initial, {"f1": Y[:5]}, "f1 must have the 6 values"),
    "initial, rtol in f32": (initial, {"rtol": RTOL.float()}, "rtol must be float64"),
    "initial, segment beyond": (initial, {"segments": [0, 7]}, SCHEMA_OF_SEGMENTS),
    "combine, lengths": (
        combine, {"weights": [1.0, 2.0]}, "k and weights must have the same length.*got 1 and 2",
    ),
    "combine, nothing": (combine, {"k": [], "weights": []}, "same length, 1 to 14; got 0 and 0"),
    "combine, 15 rows": (combine, {"k": [Y] * 15, "weights": [1.0] * 15}, "1 to 14; got 15 and 15"),
    "combine, k's size": (combine, {"k": [Y[:5]]}, "k must have the 6 values"),
    "combine, k's dtype": (combine, {"k": [Y.double()]}, "k must have .*dtype and device of y0"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name):
    function, arguments, message = WRONG[name]
    function()  # the same call is fine without them
    with pytest.raises(RuntimeError, match=message):
        function(**arguments)


def test_a_refused_call_writes_nothing():
    k, y1 = K.clone(), Y.clone()
    with pytest.raises(RuntimeError, match="rtol must be float64"):
        ops.rk_finish(Y, k, False, [Y, Y[:0]], y1, E3, E3, H, RTOL.float(), ATOL, [0, 6], None)
    assert torch.equal(k, K)
    assert torch.equal(y1, Y)


def test_wrong_types_are_type_errors():
    with pytest.raises(TypeError, match="rk_stage"):
        _C.rk_stage(Y, K, False, [Y], "weights", H)
    with pytest.raises(TypeError, match="rk_finish"):
        _C.rk_finish(Y, K, False, [], Y, [], E3, H, 1e-3, ATOL, [0, 6], None)


def test_bindings_take_the_schema_s_names():
    """Compiled, dispatched and reference ops are called alike."""
    for rk_stage in (_C.rk_stage, ops.rk_stage, reference.rk_stage):
        out = rk_stage(y0=Y, k=K, flip=False, fresh=[], weights=[1.0], h=0.5)
        assert torch.equal(out, Y + 0.5 * K[0])
    for rk_finish in (_C.rk_finish, ops.rk_finish, reference.rk_finish):
        result = rk_finish(
            y0=Y, k=K, flip=False, fresh=[], y1=Y.clone(), solution=[], error=E3, h=H, rtol=RTOL,
            atol=ATOL, segments=[0, 6], ratio=None,
        )  # fmt: skip
        assert result[1] == 1.0
    cpu = torch.device("cpu")
    for time_tensors in (_C.time_tensors, ops.time_tensors, reference.time_tensors):
        assert time_tensors(values=[2.0], dtype=F32, device=cpu)[0] == 2.0


# ---- torch.library.opcheck -----------------------------------------------------------------------

KEYS = torch.arange(5) * 7 - 11
X = torch.linspace(-1, 1, 6).view(3, 2)
NET = [torch.eye(2), torch.ones(2), torch.ones(2), torch.zeros(2), None] * 2
# Exact divergence: by unit vectors for steps per sample, whose last layer has a gate here.
MLP_SETTINGS, SAMPLES_SETTINGS = (
    (None, [], None, NET, method, [0, 0, divergence, 0, 0], [1.0, 0.0, 0.0])
    for method, divergence in (("rk4", 3), ("dopri5", 2))
)
DRAWN_SETTINGS = (X, [5, 2, 1], None, NET, "rk4", [0, 0, 1, 0, 0], [1.0, 0.0, 0.0])
GRID, CONTROL = [1.0, 0.4, 0.0], [1e-3, 1e-3, 0.0, 1.0, 0.9, 10.0, 0.2, 100.0]
TAPE = ops.mlp_solve(X, None, *MLP_SETTINGS, 1.0, 0.0, [], GRID, 0)[3:]
SAMPLES_TAPE = ops.mlp_samples(X, None, *SAMPLES_SETTINGS, 1.0, 0.0, CONTROL, True)[3:]
BARS = (X, X[:, 0].unsqueeze(0))
E6 = torch.linspace(0.1, 0.7, 6, dtype=F64)
ATTEMPT = [torch.zeros(size, dtype=F64) for size in (len(_C.attempt_fields), 3, 2, 2, 0)]
ATTEMPT += [torch.zeros(_C.report_numbers + 2, dtype=F64)]
RULE = ([0.9, 10.0, 0.2, 0.0, math.inf, 100.0, 5.0, 1.0, 1.0], [0.0, 0.5, 1.0])
FLOW = [torch.zeros(size, dtype=F64) for size in (len(_C.flow_fields), 3, 1)]
FLOW += [torch.zeros(2, 3, dtype=F64), torch.zeros(_C.flow_report_numbers, dtype=F64)]
FLOW_RULE = ([math.inf, 0.9, 10.0, 0.2, 100.0, 5.0], [0.0, 0.5, 1.0])
OPCHECK = {
    "rk_stage": (ops.rk_stage, (Y, K, False, [Y], [0.5, 0.25], H)),
    "rk_stage, stored": (ops.rk_stage, (Y.double(), K.double(), True, [], E3, H)),
    "rk_stage, parts": (ops.rk_stage, (Y.view(2, 3), K, True, [Y[:2].double(), Y[2:]], E3, H)),
    "rk_finish": (ops.rk_finish, (Y, K, False, [Y], -Y, [], E3, H, RTOL, ATOL, [0, 6])),
    "rk_finish, all": (
        ops.rk_finish,
        (Y.double(), K.double(), True, [Y.double()], torch.empty(6, dtype=F64).fill_(2), E3, E3, H,
         each(6, 1), each(6, 2), [0, 2, 3, 6], torch.zeros(6, dtype=F64)),
    ),
    "rk_interpolate": (
        ops.rk_interpolate, (Y, -Y, K, False, [0.2, 0.1, 0.2], H, [0.0, 0.4], torch.zeros(2, 6)),
    ),
    "rk_interpolate, shaped": (
        ops.rk_interpolate,
        (Y.view(2, 3), -Y.view(2, 3), K, True, [0.5], H, [0.4], torch.zeros(1, 2, 3)),
    ),
    "rk_initial_norms": (ops.rk_initial_norms, (Y, -Y, None, RTOL, ATOL, [0, 6])),
    "rk_initial_norms, f1": (
        ops.rk_initial_norms,
        (Y.double(), -Y.double(), K[0].double(), each(6, 1), ATOL, [0, 2, 2, 5]),
    ),
    "rk_combine": (ops.rk_combine, (Y, [K[0], K[1]], [0.5, -1.0], H)),
    "rk_combine, ordered": (
        ops.rk_combine, (Y.double().requires_grad_(), [K[0].double()], [0.5], H, None, True),
    ),
    "rk_combine, gradients": (
        ops.rk_combine,
        (Y.clone().requires_grad_(), [K[0].clone().requires_grad_(), K[1]], [0.5, 0.0], H),
    ),
    "rk_combine, h": (
        ops.rk_combine,
        (Y.double().view(2, 3).t(), [K[0].double().view(3, 2).requires_grad_()], [0.5], H,
         torch.tensor(H, dtype=F64, requires_grad=True)),
    ),
    "attempt_control": (
        ops.attempt_control, (ATTEMPT, torch.tensor([0.5, 1.0], dtype=F64), "decide", *RULE, F64),
    ),
    "attempt_control, begin": (
        ops.attempt_control, (ATTEMPT, torch.tensor([0.5, 1.0], dtype=F64), "begin", *RULE, F64),
    ),
    "attempt_control, given": (ops.attempt_control, (ATTEMPT, None, "first_step", *RULE, F64)),
    "attempt_advance": (
        ops.attempt_advance,
        (ATTEMPT, Y.double(), -Y.double(), K.double(), E3, torch.zeros(2, 6, dtype=F64), F64),
    ),
    "attempt_stage": (ops.attempt_stage, (Y, K, [Y], [0.5, 0.25], torch.tensor([H]))),
    "attempt_finish": (
        ops.attempt_finish,
        (Y, K, [Y], -Y, [], E3, torch.tensor([H]), RTOL, ATOL, [0, 6]),
    ),
    "attempt_combine": (
        ops.attempt_combine, (Y.view(2, 3), [K[0].view(2, 3)], [0.5], torch.tensor([H])),
    ),
    "flow_control": (
        ops.flow_control, (FLOW, torch.tensor([0.5, 1.0], dtype=F64), "decide", *FLOW_RULE),
    ),
    "flow_control, recall": (ops.flow_control, (FLOW, None, "recall", *FLOW_RULE)),
    "flow_advance": (
        ops.flow_advance,
        (FLOW, Y.double(), -Y.double(), K.double(), torch.zeros(2, 4, dtype=F64)),
    ),
    "broyden_step": (ops.broyden_step, (Y, [])),
    "broyden_step, two": (ops.broyden_step, (Y.double(), [E6, E6.flip(0)])),
    "time_tensors": (ops.time_tensors, ([0.1, 0.2], F32, torch.device("cpu"))),
    "time_tensors, half": (ops.time_tensors, ([0.1], torch.float16, torch.device("cpu"))),
    "probe_keys": (ops.probe_keys, (K,)),
    "probe_keys, strided": (ops.probe_keys, (K.double().t(),)),
    "probe_keys, deep": (ops.probe_keys, (K.view(3, 2, 3),)),
    "probe_sample": (ops.probe_sample, (KEYS, 3, 2, 5, False, F32)),
    "mlp_solve": (ops.mlp_solve, (X, None, *MLP_SETTINGS, 1.0, 0.0, [], GRID, -1)),
    "mlp_solve, probes drawn": (
        ops.mlp_solve, (X, None, *DRAWN_SETTINGS, 1.0, 0.0, [], GRID, -1),
    ),
    "mlp_solve_backward": (
        ops.mlp_solve_backward, (*BARS, None, *MLP_SETTINGS, *TAPE, True),
    ),
    "mlp_adjoint": (
        ops.mlp_adjoint, (X, *BARS, None, *MLP_SETTINGS, 0.0, 1.0, [], GRID[::-1], []),
    ),
    "mlp_samples": (ops.mlp_samples, (X, None, *SAMPLES_SETTINGS, 1.0, 0.0, CONTROL, False)),
    "mlp_samples_backward": (
        ops.mlp_samples_backward, (*BARS, None, *SAMPLES_SETTINGS, *SAMPLES_TAPE, True),
    ),
    "mlp_samples_adjoint": (
        ops.mlp_samples_adjoint, (X, *BARS, None, *SAMPLES_SETTINGS, 0.0, 1.0, CONTROL),
    ),
    "probe_sample, gaussian": (ops.probe_sample, (KEYS[::2], -3, 1, 3, True, F64)),
}  # fmt: skip


def test_every_op_is_checked():
    elsewhere = {name for name in _ops.OPS if name.startswith(("mlp_value", "mlp_vjp"))}
    without_tensors = {"mlp_solve_fits"}
    assert {name.split(",")[0] for name in OPCHECK} == set(_ops.OPS) - elsewhere - without_tensors
    text = Path(__file__).with_name("test_mlp_ops.py").read_text()
    assert all(f"_ops.{name}" in text for name in elsewhere)


@pytest.mark.parametrize("name", OPCHECK)
def test_opcheck(name):
    op, arguments = OPCHECK[name]
    results = torch.library.opcheck(op.default, arguments)
    assert set(results.values()) == {"SUCCESS"}
    assert len(results) >= 4
