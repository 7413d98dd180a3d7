"""Products on tensor cores, run on a host (see host_ops.py, host_build.py): the products alone are
those of rounded operands, and solves are as near to the CPU's in f64 as the precision says.
"""

import copy

import pytest
import torch
from host_build import build_kernels
from host_kernels import HostKernels
from host_ops import DEVICE
from test_cnf_fused import field_of, outcome, points
from test_cnf_fused_host import moved

from pycnf.flows import CNF, cnf, fused
from pycnf.nn import MLP
from pycnf.nn.precision import PRECISIONS

TENSOR = ("tf32", "3xtf32", "bf16")
PRODUCT, TURNED, OUTER = range(3)


@pytest.fixture(scope="session")
def kernels(cuda_host_folder):
    return HostKernels(build_kernels(cuda_host_folder))


def tf32(x):
    """To 10 bits behind the point, to the nearest, of two equally near away from zero."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def parts(x, precision):
    """What an operand is rounded to, in f64; its small part as well, where there is one."""
    if precision == "float32":
        return x.double(), None
    if precision == "bf16":
        return x.bfloat16().double(), None
    large = tf32(x)
    small = tf32(x - large).double() if precision == "3xtf32" else None
    return large.double(), small


def product_of(a, b, precision):
    """a b in f64, of rounded operands."""
    (a, a_small), (b, b_small) = parts(a, precision), parts(b, precision)
    return a @ b if a_small is None else a @ b + a @ b_small + a_small @ b


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("out", "inputs", "count", "threads"),
    [
        (1, 1, 8, 128), (2, 3, 16, 128), (5, 17, 8, 128), (16, 16, 16, 128), (33, 34, 12, 128),
        (31, 2, 64, 256), (64, 65, 32, 128), (47, 9, 128, 256), (70, 37, 128, 256),
        (130, 67, 36, 128),
    ],
)  # fmt: skip
def test_products(kernels, precision, out, inputs, count, threads):
    kernels.seed(out)
    w, x, u = normal(inputs, out, seed=0), normal(inputs, count, seed=1), normal(out, count, seed=2)
    expected = {
        PRODUCT: (product_of(w.T.contiguous(), x, precision), w.T, x),
        TURNED: (product_of(w, u, precision), w, u),
        OUTER: (w + product_of(x, u.T.contiguous(), precision), x, u.T),
    }
    for kind, (right, left_hand, right_hand) in expected.items():
        mine = [w.clone(), x.clone(), u.clone()]
        if kind == TURNED:
            mine[1].fill_(float("nan"))
        if kind == PRODUCT:
            mine[2].fill_(float("nan"))
        kernels.call(
            "check_product", PRECISIONS.index(precision), kind, threads, out, inputs, count,
            *(matrix.data_ptr() for matrix in mine),
        )  # fmt: skip
        got = mine[{PRODUCT: 2, TURNED: 1, OUTER: 0}[kind]].double()
        # Sums are in f32.
        scale = left_hand.double().abs() @ right_hand.double().abs() + 1
        assert ((got - right).abs() <= 1e-6 * scale).all()
        exact = left_hand.double() @ right_hand.double() + (w if kind == OUTER else 0)
        error = ((got - exact).abs() / scale).max()
        assert error <= {"float32": 1e-6, "tf32": 1e-3, "3xtf32": 1e-6, "bf16": 8e-3}[precision]


# ---- solves --------------------------------------------------------------------------------------


@pytest.fixture
def gpu(cuda_host_ops, monkeypatch):
    """Solves of the fused engine are launches, and the CPU is taken for a GPU."""

    def launched(op):
        def call(*arguments):
            return moved(op(*moved(arguments, DEVICE)), "cpu")

        return call

    for name in ("mlp_solve", "mlp_solve_backward"):
        monkeypatch.setattr(fused, name, launched(getattr(cuda_host_ops, name)))
    monkeypatch.setattr(cnf, "GPUS", ("cpu",))
    return cuda_host_ops


def errors(field, x, context=None, probe=None, **settings):
    """By precision, the largest error of results and gradients, relative to each one's size."""
    given = {} if probe is None else {"probe": probe}
    true, counts = outcome(CNF(field, engine="generic", **settings), x, context, **given)
    single = copy.deepcopy(field).float()
    context = None if context is None else context.float()
    given = {name: probe.float() for name in given}
    found = {}
    for precision in PRECISIONS:
        flow = CNF(single, engine="fused", precision=precision, **settings)
        mine, made = outcome(flow, x.float(), context, **given)
        assert flow.stats.engine == "fused"
        assert settings["method"] != "rk4" or made == counts
        found[precision] = max(
            ((a.double() - b).abs().max() / b.abs().max().clamp(min=1)).item()
            for a, b in zip(mine, true, strict=True)
        )
    return found


def check(found, single=5e-6):
    assert found["float32"] < single, found
    assert found["3xtf32"] < 4 * found["float32"] + 1e-6, found
    # Rounded they are, and no more than that.
    assert 1e-5 < found["tf32"] < 3e-3, found
    assert 1e-4 < found["bf16"] < 3e-2, found


RK4 = {"method": "rk4", "options": {"num_steps": 2}}


@pytest.mark.parametrize("kind", ["hutchinson", "exact"])
@pytest.mark.parametrize(
    ("hidden", "features", "batch"), [((5,), 4, 9), ((33, 34), 5, 19), ((6, 9, 17), 3, 5)]
)
def test_solves(gpu, hidden, features, batch, kind):
    probe = None if kind == "exact" else points(batch, features, seed=4).sign()[None]
    field = field_of(features, hidden)
    check(errors(field, points(batch, features), probe=probe, divergence=kind, **RK4))


def test_several_probes_with_a_context(gpu):
    field = field_of(3, (17, 10), layer="concatsquash", context=2)
    probe = torch.stack([points(9, 3, seed=seed) for seed in (4, 5)])
    check(errors(field, points(9, 3), points(9, 2, seed=2), probe, noise="gaussian", **RK4))


def test_adaptive_steps(gpu):
    probe = points(11, seed=4).sign()[None]
    field = field_of(scale=2.0)
    # Where steps end is a matter of rounding, as far as tolerances allow.
    found = errors(field, points(11), probe=probe, method="dopri5", rtol=1e-5, atol=1e-5)
    check(found, single=1e-4)


@pytest.mark.parametrize("precision", TENSOR)
def test_whatever_the_order_of_threads(gpu, precision):
    field, results = field_of(hidden=(20, 20)).float(), []
    for seed in range(2):
        gpu.seed(seed)
        flow = CNF(field, "exact", precision=precision, **RK4)
        results.append(outcome(flow, points(20).float())[0])
    for mine, other in zip(*results, strict=True):
        assert torch.equal(mine, other)


# ---- arguments -----------------------------------------------------------------------------------


def test_precisions_are_checked():
    with pytest.raises(ValueError, match=r"precision: got 'tf23', expected one of float32, tf32"):
        CNF(MLP(2), precision="tf23")
    flow = CNF(MLP(2))
    flow.precision = "half"
    with pytest.raises(ValueError, match=r"precision: got 'half'"):
        flow(torch.randn(3, 2))


@pytest.mark.parametrize("engine", ["fused", "generic"])
@pytest.mark.parametrize("precision", TENSOR)
def test_the_cpu_has_float32_alone(precision, engine):
    flow = CNF(MLP(2), precision=precision, engine=engine)
    match = (
        rf"precision: got '{precision}', expected 'float32': .* the {engine} engine in .* on cpu"
    )
    with pytest.raises(ValueError, match=match):
        flow(torch.randn(3, 2))


def test_f64_has_float32_alone(gpu):
    flow = CNF(MLP(2).double(), precision="bf16", **RK4)
    with pytest.raises(ValueError, match=r"precision: got 'bf16', .*float64"):
        flow(torch.randn(3, 2, dtype=torch.float64))


def test_ops_of_the_cpu_refuse_a_precision():
    parts = [p for layer in MLP(2, (4,)).layers for p in layer.parts()]
    arguments = (
        None,
        None,
        [],
        None,
        parts,
        "euler",
        [0, 0, 0, 0, 0, 1],
        [1.0, 0.0, 0.0],
        0.0,
        1.0,
        [],
    )
    with pytest.raises(RuntimeError, match="precision 1, expected 0"):
        torch.ops.pycnf.mlp_solve(torch.randn(3, 2), *arguments, [0.0, 1.0], -1)
