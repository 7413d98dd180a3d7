"""Products on tensor cores, run on a host (see host_ops.py, host_build.py): the products alone equal
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


@pytest.mark.parametrize("precision", fused.PRECISIONS)
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
            "check_product", fused.PRECISIONS.index(precision), kind, threads, out, inputs, count,
            *(matrix.data_ptr() for matrix in mine),
        )  # fmt: skip
        got = mine[{PRODUCT: 2, TURNED: 1, OUTER: 0}[kind]].double()
        # Sums are in f32.
        scale = left_hand.double().abs() @ right_hand.double().abs() + 1
        assert ((got - right).abs() <= 1e-6 * scale).all()
        exact = left_hand.double() @ right_hand.double() + (w if kind == OUTER else 0)
        error = ((got - exact).abs() / scale).max()
        assert error <= {"float32": 1e-6, "tf32": 1e-3, "3xtf32": 1e-6, "bf16": 8e-3}[precision]
