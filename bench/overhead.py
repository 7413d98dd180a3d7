"""What a solver takes beside the vector field: every method on a trivial field, the adjoint of a
plain neural ODE, and many output times.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch

import pycnf
from bench.harness import OURS, Options, Row, interleave, missing, rows_of

_PEER = "torchdiffeq"
_TOLERANCES = {"rtol": 1e-5, "atol": 1e-6}
# (evaluations before the first attempt, evaluations per attempt); an implicit method's depend on
# its iterations, so its attempts are the steps of its grid.
_ADAPTIVE = {
    "dopri5": (2, 6),
    "dopri8": (2, 13),
    "tsit5": (2, 6),
    "bosh3": (2, 3),
    "fehlberg2": (2, 2),
    "adaptive_heun": (2, 1),
}
_EXPLICIT = ("euler", "midpoint", "heun2", "heun3", "rk4", "explicit_adams", "implicit_adams")
_IMPLICIT = (
    *("implicit_euler", "implicit_midpoint", "trapezoid", "radauIIA3", "gl4", "radauIIA5"),
    *("gl6", "sdirk2", "trbdf2"),
)
_STEPS = 100


class Decay:
    """dy/dt = -y, counting its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return -y


@dataclass
class _Case:
    """A solve to be timed per attempted step."""

    method: str
    shape: tuple[int, ...]
    end: float
    steps: int = _STEPS

    @property
    def name(self) -> str:
        rows = "×".join(map(str, self.shape))
        once = ", one step" if self.steps == 1 else ""
        return f"{self.method} {rows} f32{once}"

    @property
    def options(self) -> dict | None:
        return None if self.method in _ADAPTIVE else {"step_size": self.end / self.steps}

    def attempts(self, calls: int) -> float:
        if self.method not in _ADAPTIVE:
            return self.steps
        before, each = _ADAPTIVE[self.method]
        return (calls - before) / each


_CASES = (
    *(_Case(method, (64, 2), 100.0) for method in _ADAPTIVE),
    _Case("dopri5", (512, 64), 100.0),
    _Case("dopri5", (4096, 64), 10.0),
    *(_Case(method, (64, 2), 10.0) for method in _EXPLICIT),
    _Case("rk4", (4096, 64), 10.0),
    _Case("euler", (64, 2), 0.1, steps=1),
    _Case("rk4", (64, 2), 0.1, steps=1),
    *(_Case(method, (2,), 10.0) for method in _IMPLICIT),
    *(_Case(method, (64, 2), 10.0, steps=10) for method in _IMPLICIT),
)


def _solvers() -> dict[str, Callable]:
    import torchdiffeq

    from bench.torchdiffeq_main import add_methods

    add_methods()
    return {OURS: pycnf.odeint, _PEER: torchdiffeq.odeint}


@torch.no_grad()
def _step_rows(case: _Case, rounds: int | None) -> list[Row]:
    y0 = torch.rand(case.shape, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.0, case.end])
    solvers = _solvers()

    def solve(name: str, field: Decay) -> torch.Tensor:
        return solvers[name](field, y0, t, method=case.method, options=case.options, **_TOLERANCES)

    results, units, facts = {}, {}, {}
    for name in solvers:
        field = Decay()
        results[name] = solve(name, field)[-1]
        units[name] = case.attempts(field.calls)
        facts[name] = {"nfe": field.calls}
    difference = (results[OURS] - results[_PEER]).abs().max().item()
    # What the field itself takes, on both sides: the rest is the solver's.
    times = interleave(
        {
            **{name: lambda name=name: solve(name, Decay()) for name in solvers},
            "the field": lambda: _evaluate(y0, facts[OURS]["nfe"]),
        },
        rounds or 9,
        seconds=0.1,
    )
    field_times = times.pop("the field")
    rows = rows_of(case.name, times, facts, units)
    own = {
        name: sorted(
            (a - f * facts[name]["nfe"] / facts[OURS]["nfe"]) / units[name]
            for a, f in zip(times[name], field_times)
        )[len(field_times) // 2]
        for name in solvers
    }
    for row in rows:
        facts[row.contender]["without the field"] = f"{1e6 * own[row.contender]:.3g} us"
        facts[row.contender]["largest difference"] = f"{difference:.1e}"
    facts[_PEER]["overhead over pycnf's"] = f"{own[_PEER] / own[OURS]:.1f}"
    return rows


def _evaluate(y: torch.Tensor, calls: int) -> None:
    field, t = Decay(), torch.zeros(())
    for _ in range(calls):
        field(t, y)


class Network(torch.nn.Module):
    """A field of tanh layers that takes no time."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        sizes = (features, hidden, hidden, hidden, features)
        layers = []
        for i, (a, b) in enumerate(pairwise(sizes)):
            layers += [torch.nn.Linear(a, b)] + [torch.nn.Tanh()] * (i < 3)
        self.layers = torch.nn.Sequential(*layers)
        self.calls = 0

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.layers(y)


def _adjoint_rows(outputs: int, rounds: int | None) -> list[Row]:
    """Forward and backward of a plain neural ODE by `odeint_adjoint`."""
    import torchdiffeq

    torch.manual_seed(0)
    field = Network(16, 64)
    y0 = torch.randn(256, 16)
    t = torch.linspace(0.0, 1.0, outputs)
    solvers = {OURS: pycnf.odeint_adjoint, _PEER: torchdiffeq.odeint_adjoint}

    def train(name: str) -> list[torch.Tensor]:
        x = y0.clone().requires_grad_()
        y = solvers[name](field, x, t, method="dopri5", **_TOLERANCES)
        return torch.autograd.grad(y.square().mean(), (x, *field.parameters()))

    results, facts = {}, {}
    for name in solvers:
        field.calls = 0
        results[name] = train(name)
        facts[name] = {"nfe": field.calls}
    worst = max(((a - b).norm() / b.norm()).item() for a, b in zip(results[OURS], results[_PEER]))
    for name in solvers:
        facts[name]["gradients differ by"] = f"{worst:.1e}"
    runs = {name: lambda name=name: train(name) for name in solvers}
    case = f"odeint_adjoint, forward and backward, 16-64-64-64-16, B=256, {outputs} outputs"
    return rows_of(case, interleave(runs, rounds or 9, seconds=0.3), facts)


@torch.no_grad()
def _output_rows(rounds: int | None) -> list[Row]:
    """1000 output times beside 2."""
    import torchdiffeq

    torch.manual_seed(0)
    field = Network(2, 64)
    y0 = torch.randn(64, 2)
    few, many = torch.linspace(0.0, 10.0, 2), torch.linspace(0.0, 10.0, 1000)

    def solve(odeint: Callable, t: torch.Tensor) -> torch.Tensor:
        return odeint(field, y0, t, method="dopri5", **_TOLERANCES)

    difference = (solve(pycnf.odeint, many) - solve(torchdiffeq.odeint, many)).abs().max().item()
    runs = {
        OURS: lambda: solve(pycnf.odeint, few),
        "pycnf, 1000 outputs": lambda: solve(pycnf.odeint, many),
        "torchdiffeq, 2 outputs": lambda: solve(torchdiffeq.odeint, few),
        "torchdiffeq, 1000 outputs": lambda: solve(torchdiffeq.odeint, many),
    }
    facts = {name: {"largest difference": f"{difference:.1e}"} for name in runs}
    case = "dopri5, 2-64-64-64-2, B=64, 2 outputs"
    return rows_of(case, interleave(runs, rounds or 9, seconds=0.2), facts)


def run(options: Options) -> Iterator[Row | str]:
    """Rows for every method, then for the adjoint and for many outputs."""
    remark = missing("torchdiffeq", "the only peer of this benchmark")
    if remark is not None:
        yield remark
        return
    # Unconverged iterations of an implicit method are the field's matter, not this benchmark's.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for case in _CASES:
            if options.has(case.name):
                yield from _step_rows(case, options.rounds)
        for outputs in (2, 11):
            if options.has("odeint_adjoint"):
                yield from _adjoint_rows(outputs, options.rounds)
        if options.has("outputs"):
            yield from _output_rows(options.rounds)
    yield (
        "Of torchdiffeq 0.2.5, tsit5 and the implicit methods are its main branch's, rewritten in "
        "its own frame (torchdiffeq_main.py)."
    )
