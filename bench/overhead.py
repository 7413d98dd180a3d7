"""Solver overhead per attempted step: the vector field is trivial, what is timed is the solver."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import pycnf
from bench.harness import OURS, Options, Row, interleave, missing, rows_of


class _Decay:
    """dy/dt = -y, counting its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return -y


# (method, evaluations before the first step, evaluations per attempt)
_METHODS = {"dopri5": (2, 6), "rk4": (0, 4)}
_CASES = (
    ("dopri5", (64, 2), 100.0),
    ("dopri5", (512, 64), 100.0),
    ("dopri5", (4096, 64), 10.0),
    ("rk4", (64, 2), 10.0),
)


@torch.no_grad()
def _rows(
    case: str, method: str, shape: tuple[int, int], end: float, rounds: int | None
) -> list[Row]:
    import torchdiffeq

    y0 = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.0, end])
    options = {"step_size": end / 100} if method == "rk4" else None
    solvers = {OURS: pycnf.odeint, "torchdiffeq": torchdiffeq.odeint}

    def solve(name: str, field: _Decay) -> torch.Tensor:
        return solvers[name](field, y0, t, rtol=1e-5, atol=1e-6, method=method, options=options)

    before, each = _METHODS[method]
    results, units, facts = {}, {}, {}
    for name in solvers:
        field = _Decay()
        results[name] = solve(name, field)[-1]
        units[name] = (field.calls - before) / each
        facts[name] = {"nfe": field.calls}
    difference = (results[OURS] - results["torchdiffeq"]).abs().max().item()
    for name in solvers:
        facts[name]["largest difference"] = f"{difference:.1e}"
    runs = {name: lambda name=name: solve(name, _Decay()) for name in solvers}
    return rows_of(case, interleave(runs, rounds or 9, seconds=0.25), facts, units)


def run(options: Options) -> Iterator[Row | str]:
    """Rows for dopri5 at three sizes and rk4 at the smallest."""
    remark = missing("torchdiffeq", "the only peer of this benchmark")
    if remark is not None:
        yield remark
        return
    for method, shape, end in _CASES:
        case = f"{method} {shape[0]}×{shape[1]} f32"
        if options.has(case):
            yield from _rows(case, method, shape, end, options.rounds)
