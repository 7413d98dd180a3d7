"""What the tests of the CUDA kernels have in common, on a GPU and on a host."""

import itertools

import pytest
import torch

from pycnf import _C

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
DTYPES = pytest.mark.parametrize("dtype", [F32, F64], ids=["f32", "f64"])
HALVES = pytest.mark.parametrize("dtype", [F16, BF16], ids=["f16", "bf16"])
# Elements by which a view misses its allocation's alignment; 2 is 16 bytes in f64 only.
OFFSETS = pytest.mark.parametrize("offset", [0, 1, 2])
TABLEAUX = {tableau["name"]: tableau for tableau in _C.tableaux()}
ADAPTIVE = [name for name, tableau in TABLEAUX.items() if tableau["adaptive"]]
NAN = float("nan")


def normal(*shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, dtype=F64, generator=generator).to(dtype)


class Guarded:
    """A copy, `offset` elements into an allocation whose rest must not change."""

    GUARD = -77.0

    def __init__(self, x, offset=0, device="cpu"):
        self.offset, self.size = offset, x.numel()
        count = offset + self.size + 16
        self.buffer = torch.full((count,), self.GUARD, dtype=x.dtype, device=device)
        self.view = self.buffer[offset : offset + self.size].view(x.shape)
        self.view.copy_(x)

    def check(self):
        rest = torch.cat([self.buffer[: self.offset], self.buffer[self.offset + self.size :]])
        assert (rest == self.GUARD).all(), "written outside of the tensor"


def bits(x):
    """A NaN is a NaN, and -0 is 0: sums over no rows differ in their sign."""
    x = torch.where(x.isnan(), NAN, x + 0.0)
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def assert_same_bits(result, expected):
    result = result.cpu()
    assert result.dtype == expected.dtype and result.shape == expected.shape
    assert torch.equal(bits(result), bits(expected))


def assert_norms(result, expected, rtol=1e-14):
    """Norms sum in another order than on the CPU, in f64; flags are flags."""
    torch.testing.assert_close(result.cpu(), expected, rtol=rtol, atol=0.0, equal_nan=True)


def cuts(size, parts):
    """Adjacent segments of many lengths, some shorter than a group of 4."""
    borders = sorted({0, size, *((i * i * 7 + 3 * i) % size for i in range(1, parts))})
    return [at for pair in itertools.pairwise(borders) for at in pair]


SEGMENTS = {
    "none": lambda n: [],
    "all": lambda n: [0, n],
    "two": lambda n: [0, n // 3, n // 3, n],
    "gaps": lambda n: [1, 5, 7, n // 2, n // 2 + 3, n - 2],
    "adjoint": lambda n: [0, 1, 1, n // 3, n // 3, n // 2 + 1, n // 2 + 1, n],
    "many": lambda n: cuts(n, 60),
    "many, through a table": lambda n: cuts(n, 400),
    "first empty": lambda n: [0, 0, 0, n],
    "first empty, behind a gap": lambda n: [5, 5, 5, n],
    "later empty": lambda n: [0, 9, 9, 9, 9, n],
}
