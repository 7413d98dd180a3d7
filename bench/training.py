"""A full training step of FFJORD: mean negative log-likelihood and all its gradients.

Concatsquash fields of the sizes that the literature uses for these sets, on rows drawn from N(0, I)
(the cost of a step is a matter of sizes and of the field, not of the data), one Rademacher probe,
dopri5, tolerance 1e-5, float32. The hard variants have their weights multiplied, so that the
solve takes many steps and rejects some.

Before anything is timed, loss and gradients of all contenders are compared with one solve at 1e-10
in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import pycnf
from bench.accuracy import errors, tight_step
from bench.flops import SGEMM_SHAPES, sgemm, step_flops
from bench.harness import OURS, Options, Row, interleave, missing, rows_of
from bench.peers import DiffraxStep, TorchdiffeqStep

_METHOD, _TOLERANCE = "dopri5", 1e-5
_GENERIC = f"{OURS}, generic engine"
_ADJOINT, _BACKWARD = "torchdiffeq odeint_adjoint", "torchdiffeq odeint + backward"
_DIFFRAX = "diffrax, jitted"
_HARD_ACCEPTED, _HARD_REJECTED = 10, 1  # at least
_SLACK = 1.25  # of errors of the same steps but for the last, which torchdiffeq takes past the end


@dataclass(frozen=True)
class _Case:
    """One field and batch; `scale` multiplies its weights, `without` stay away for a reason,
    `tight` is the tolerance of the solve that all are compared with.
    """

    name: str
    features: int
    hidden: tuple[int, ...]
    activation: str
    batch: int
    scale: float = 1.0
    rounds: int = 9
    tight: float = 1e-10
    without: tuple[str, ...] = ()
    reason: str = ""

    @property
    def title(self) -> str:
        widths = "-".join(str(width) for width in self.hidden)
        hard = f", hard (weights ×{self.scale:g})" if self.scale != 1 else ""
        return f"{self.name}, D={self.features}, {widths} {self.activation}, B={self.batch}{hard}"


_SLOW = "to keep the run short and its memory small"
_TOY = ("toy", 2, (64, 64, 64), "tanh")
_POWER = ("POWER", 6, (60, 60, 60), "tanh")
_GAS = ("GAS", 8, (160, 160, 160), "tanh")
_HEPMASS = ("HEPMASS", 21, (210, 210), "softplus")
_MINIBOONE = ("MINIBOONE", 43, (860, 860), "softplus")
_BSDS300 = ("BSDS300", 63, (1260, 1260, 1260), "softplus")
SHAPES = (_TOY, _POWER, _GAS, _HEPMASS, _MINIBOONE, _BSDS300)
_CASES = (
    _Case(*_TOY, 512),
    _Case(*_TOY, 64),
    _Case(*_TOY, 512, scale=8),
    _Case(*_TOY, 64, scale=8),
    _Case(*_POWER, 1000),
    _Case(*_POWER, 1000, scale=8),
    _Case(*_GAS, 1000),
    _Case(*_GAS, 1000, scale=8, rounds=5),
    _Case(*_HEPMASS, 1000),
    _Case(*_HEPMASS, 1000, scale=6, rounds=5),
    _Case(*_MINIBOONE, 1000, rounds=5),
    _Case(*_MINIBOONE, 1000, scale=6, rounds=3, without=(_DIFFRAX,), reason=_SLOW),
    _Case(*_BSDS300, 1000, rounds=3, without=(_GENERIC, _BACKWARD, _DIFFRAX), reason=_SLOW),
    _Case(
        *_BSDS300,
        100,
        scale=6,
        rounds=3,
        tight=1e-8,
        without=(_GENERIC, _DIFFRAX),
        reason=_SLOW,
    ),
)


class OurStep:
    """A step by `pycnf.CNF`."""

    def __init__(
        self,
        field: pycnf.nn.MLP,
        x: Tensor,
        probe: Tensor,
        engine: str = "auto",
        **options: Any,
    ) -> None:
        self.flow = pycnf.CNF(
            field,
            method=_METHOD,
            rtol=_TOLERANCE,
            atol=_TOLERANCE,
            engine=engine,
            **options,
        )
        self.x, self.probe = x, probe.unsqueeze(0)

    def __call__(self) -> list[Tensor]:
        loss = -self.flow.log_prob(self.x, probe=self.probe).mean()
        return [loss.detach(), *torch.autograd.grad(loss, list(self.flow.parameters()))]


def _contenders(case: _Case, field: pycnf.nn.MLP, x: Tensor, probe: Tensor) -> dict[str, Callable]:
    makers = {
        OURS: lambda: OurStep(field, x, probe, "fused"),
        _GENERIC: lambda: OurStep(field, x, probe, "generic"),
        _ADJOINT: lambda: TorchdiffeqStep(field, x, probe, _TOLERANCE, adjoint=True),
        _BACKWARD: lambda: TorchdiffeqStep(field, x, probe, _TOLERANCE, adjoint=False),
        _DIFFRAX: lambda: DiffraxStep(field, x, probe, _TOLERANCE),
    }
    absent = set(case.without)
    for name, package in ((_ADJOINT, "torchdiffeq"), (_BACKWARD, "torchdiffeq")):
        if missing(package, name) is not None:
            absent.add(name)
    if missing("diffrax", "") is not None:
        absent.add(_DIFFRAX)
    return {name: make() for name, make in makers.items() if name not in absent}


def _check(case: _Case, contenders: dict[str, Callable], truth: list[Tensor]) -> dict[str, dict]:
    """Facts of every contender: steps or evaluations, and errors.

    Raises:
        RuntimeError: A gradient of pycnf is farther from the truth than torchdiffeq's, or a hard
            case is not hard.
    """
    facts: dict[str, dict] = {}
    for name, step in contenders.items():
        found = step()
        if isinstance(step, TorchdiffeqStep):
            facts[name] = {"nfe": step.calls}
        elif isinstance(step, DiffraxStep):
            found = step.results
            facts[name] = {"steps": f"{step.accepted} + {step.rejected} rejected"}
        else:
            stats = step.flow.stats
            facts[name] = {
                "steps": f"{stats.accepted} + {stats.rejected} rejected",
                "nfe": f"{stats.nfe_forward} + {stats.nfe_backward}",
            }
            if case.scale != 1 and (
                stats.accepted < _HARD_ACCEPTED or stats.rejected < _HARD_REJECTED
            ):
                raise RuntimeError(f"{case.title}: not hard, {name} takes {facts[name]['steps']}")
        facts[name].update(errors(found, truth))
    # The error of a hard solve's gradient is that of its steps, which are the same for all that
    # differentiate their own; the adjoint equation is solved with steps of its own.
    peers = (_BACKWARD,) if case.scale != 1 else (_ADJOINT, _BACKWARD)
    theirs = [float(facts[name]["gradient error"]) for name in peers if name in facts]
    allowed = min(theirs, default=1.0) * (_SLACK if case.scale != 1 else 1.0)
    for name in (OURS, _GENERIC):
        if name in facts and float(facts[name]["gradient error"]) > allowed:
            raise RuntimeError(f"{case.title}: {name} is farther from the truth: {facts}")
    return facts


def _rows(case: _Case, rounds: int | None) -> Iterator[Row | str]:
    torch.manual_seed(0)
    field = pycnf.nn.MLP(case.features, case.hidden, activation=case.activation)
    with torch.no_grad():
        for layer in field.layers:
            layer.weight.mul_(case.scale)
    x = torch.randn(case.batch, case.features)
    probe = torch.randint(0, 2, (case.batch, case.features)).to(x) * 2 - 1

    contenders = _contenders(case, field, x, probe)
    facts = _check(case, contenders, tight_step(field, x, probe.unsqueeze(0), tolerance=case.tight))
    products = [sgemm(*shape) for shape in SGEMM_SHAPES]
    times = interleave(
        {**contenders, **{name: product for name, product, _ in products}},
        rounds or case.rounds,
    )
    # The rates of the rounds' medians; the faster one is what our step is held against.
    rates = {}
    for name, _, flops in products:
        rates[name] = flops / sorted(times.pop(name))[len(times[OURS]) // 2]
    flops = step_flops(field, case.batch, 1, _METHOD, contenders[OURS].flow.stats)
    rows = rows_of(case.title, times, facts)
    ours = next(row for row in rows if row.contender == OURS)
    ours.facts |= {
        "GFLOP": f"{flops / 1e9:.3g}",
        "GFLOP/s": f"{flops / ours.seconds / 1e9:.1f}",
        **{f"{name} GFLOP/s": f"{rate / 1e9:.1f}" for name, rate in rates.items()},
        "× its FLOPs at sgemm rate": f"{ours.seconds * max(rates.values()) / flops:.2f}",
    }
    yield from rows
    if case.without:
        yield f"{case.title}: without {', '.join(case.without)}, {case.reason}."


def run(options: Options) -> Iterator[Row | str]:
    """Rows of `pycnf.CNF` (discrete gradient, both engines), torchdiffeq's two ways and diffrax."""
    for package, what in (("torchdiffeq", "torchdiffeq"), ("diffrax", "diffrax")):
        remark = missing(package, what)
        if remark is not None:
            yield remark
    for case in _CASES:
        if options.has(case.title):
            yield from _rows(case, options.rounds)
