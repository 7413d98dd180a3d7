"""Initial value problems and measuring tools shared by the tests of the drop-in solver.

The reference is the installed torchdiffeq. Its release lacks ``tsit5``, which its main branch has,
so that method is added to the reference here from Tsitouras' published coefficients and the facts
known of it: the propagated weights are ``b + error``, the last stage is reused as the next f0.
"""

import math
import warnings
from types import SimpleNamespace

import torch
from torchdiffeq._impl.misc import Perturb
from torchdiffeq._impl.odeint import SOLVERS
from torchdiffeq._impl.rk_common import RKAdaptiveStepsizeODESolver, _ButcherTableau
from torchdiffeq._impl.solvers import FixedGridODESolver

from pycnf.odeint.implicit_grid import IMPLICIT_TABLEAUX

# Function evaluations per attempted step, and tolerances that give tens of steps below.
STAGES = {"dopri5": 6, "dopri8": 13, "tsit5": 6, "bosh3": 3, "fehlberg2": 2, "adaptive_heun": 1}
ADAPTIVE = tuple(STAGES)
FIXED_STAGES = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}
FIXED = tuple(FIXED_STAGES)
METHODS = ADAPTIVE + FIXED
IMPLICIT = tuple(IMPLICIT_TABLEAUX)
TOLERANCE = {
    torch.float64: {
        "dopri5": 1e-7,
        "dopri8": 1e-6,
        "tsit5": 1e-6,
        "bosh3": 1e-5,
        "fehlberg2": 1e-6,
        "adaptive_heun": 1e-3,
    },
    torch.float32: {
        "dopri5": 1e-4,
        "dopri8": 1e-3,
        "tsit5": 1e-4,
        "bosh3": 1e-4,
        "fehlberg2": 1e-5,
        "adaptive_heun": 1e-3,
    },
}

# Tsitouras 2011, "Runge-Kutta pairs of order 5(4) satisfying only the first column simplifying
# assumption": nodes, stages, fifth-order weights, error weights, and b_i(1/2) of the interpolant.
_TSIT5_B = [
    0.09646076681806523,
    0.01,
    0.4798896504144996,
    1.379008574103742,
    -3.290069515436081,
    2.324710524099774,
    0.0,
]
_TSIT5_ERROR = [
    -0.0017800110522257714,
    -0.0008164344596567469,
    0.007880878010261996,
    -0.14471100717326290,
    0.5823571654525552,
    -0.45808210592918695,
    1 / 66,
]


def _double(values):
    return torch.tensor(values, dtype=torch.float64)


def _tsit5_mid():
    x = 0.5
    return [
        -1.0530884977290216
        * x
        * (x - 1.3299890189751412)
        * (x * x - 1.4364028541716351 * x + 0.7139816917074209),
        0.1017 * x * x * (x * x - 2.1966568338249754 * x + 1.2949852507374631),
        2.490627285651252793 * x * x * (x * x - 2.38535645472061657 * x + 1.57803468208092486),
        -16.54810288924490272 * (x - 1.21712927295533244) * (x - 0.61620406037800089) * x * x,
        47.37952196281928122 * (x - 1.203071208372362603) * (x - 0.658047292653547382) * x * x,
        -34.87065786149660974 * (x - 1.2) * (x - 2 / 3) * x * x,
        2.5 * (x - 1) * (x - 0.6) * x * x,
    ]


TSIT5_TABLEAU = _ButcherTableau(
    alpha=_double([0.161, 0.327, 0.9, 0.9800255409045097, 1, 1]),
    beta=[
        _double([0.161]),
        _double([-0.008480655492356988, 0.33548065549235699]),
        _double([2.8971530571054935, -6.359448489975075, 4.362295432869581]),
        _double([5.325864828439257, -11.748883564062828, 7.495539342889836, -0.09249506636175525]),
        _double(
            [
                5.86145544294642,
                -12.92096931784711,
                8.159367898576159,
                -0.071584973281401,
                -0.028269050394068383,
            ]
        ),
        _double(_TSIT5_B[:6]),
    ],
    c_sol=_double([b + e for b, e in zip(_TSIT5_B, _TSIT5_ERROR, strict=True)]),
    c_error=_double(_TSIT5_ERROR),
)
TSIT5_MID = _double(_tsit5_mid())


class Tsit5Solver(RKAdaptiveStepsizeODESolver):
    """torchdiffeq's own stepping with Tsitouras' coefficients."""

    order = 5
    tableau = TSIT5_TABLEAU
    mid = TSIT5_MID


SOLVERS.setdefault("tsit5", Tsit5Solver)


class DenseBroyden(FixedGridODESolver):
    """An implicit method as the peer's main branch steps it: Broyden's method with a dense Jacobian
    from the identity on, solved anew in every iteration, and an absolute bound on the residual.

    The coefficients are pycnf's, which test_odeint_implicit checks by their order conditions.
    """

    def __init__(self, func, y0, max_iters=100, **options):
        super().__init__(func, y0, **options)
        self.max_iters = max_iters

    def _step_func(self, func, t0, dt, t1, y0):
        real = y0.abs().dtype
        f0 = func(t0, y0, perturb=Perturb.NEXT if self.perturb else Perturb.NONE)
        t0, dt, t1 = t0.to(real), dt.to(real), t1.to(real)
        a = torch.tensor(self.method.a, dtype=y0.dtype)
        c = torch.tensor(self.method.c, dtype=real)
        slopes = torch.stack([f0] * len(c))
        for stages in self.method.blocks:
            slopes = self._solve(func, (t0, dt, t1), y0, slopes, list(stages), a, c)
        return torch.tensordot(dt * torch.tensor(self.method.b, dtype=y0.dtype), slopes, 1), f0

    def _solve(self, func, times, y0, slopes, stages, a, c):
        t0, dt, t1 = times

        def residual(slopes):
            parts = []
            for i in stages:
                y = y0 + torch.tensordot(dt * a[i], slopes, 1)
                if c[i] == 1:
                    value = func(t1, y, perturb=Perturb.PREV)
                else:
                    value = func(t0 + c[i] * dt, y)
                parts.append(slopes[i] - value)
            return torch.stack(parts).reshape(-1)

        bound = 1e-6 if y0.abs().dtype == torch.float32 else 1e-8
        r = residual(slopes)
        jacobian = torch.eye(len(r), dtype=r.dtype)
        for _ in range(self.max_iters):
            if torch.linalg.norm(r) < bound:
                return slopes
            step = torch.linalg.solve(jacobian, -r)
            rows = list(slopes.unbind())
            for i, part in zip(stages, step.view(len(stages), *y0.shape)):
                rows[i] = rows[i] + part
            slopes = torch.stack(rows)
            new = residual(slopes)
            change = new - r - jacobian @ step
            jacobian = jacobian + torch.outer(change, step.conj()) / torch.vdot(step, step)
            r = new
        warnings.warn(
            "Functional iteration did not converge. Solution may be incorrect.", stacklevel=2
        )
        return slopes


for _tableau in IMPLICIT_TABLEAUX.values():
    SOLVERS.setdefault(_tableau.name, type(_tableau.name, (DenseBroyden,), {"method": _tableau}))


class Recorder(torch.nn.Module):
    """Calls a vector field and keeps a copy of every (t, y) that the solver gave it.

    Two solvers that agree on this record took the same attempts with the same stages; its length is
    the number of function evaluations.
    """

    def __init__(self, field):
        super().__init__()
        self.field = field
        self.times = []
        self.states = []

    def forward(self, t, y):
        assert len(self.times) < 20_000, "the solve does not come to an end"
        self.times.append(t.detach().clone())
        self.states.append(flat(y).detach().clone())
        return self.field(t, y)

    @property
    def nfe(self):
        return len(self.times)


def flat(state):
    """The state as one vector; what an empty tuple of outputs would break is left to break."""
    if torch.is_tensor(state):
        return state.reshape(-1)
    return torch.cat([part.reshape(-1) for part in state])


def as_tuple(state):
    return (state,) if torch.is_tensor(state) else state


def clone_state(state):
    """A copy that keeps strides, so that strided initial values stay strided."""
    if torch.is_tensor(state):
        return state.detach().clone(memory_format=torch.preserve_format)
    return tuple(clone_state(part) for part in state)


# --- problems: each returns (field, y0, t) in the given dtype ---------------------------------


def pulse(dtype):
    """Slow decay hit by a narrow bump: the step grows, then is rejected. Depends on time."""
    rates = torch.tensor([0.5, 1.0, 2.0], dtype=dtype)

    def field(t, y):
        return 20 * torch.exp(-(((t - 1.3) / 0.15) ** 2)) - rates * y

    return field, torch.tensor([1.0, 0.5, -0.3], dtype=dtype), torch.linspace(0, 3, 7)


def driven_pendulum(dtype):
    """A tuple state of three shapes, one of them 0-dim, driven in time."""

    def field(t, state):
        angle, rate, work = state
        force = 0.3 * torch.cos(2 * t) - 0.1 * rate
        return rate, force - torch.sin(angle), (force * rate).sum() + 0 * work

    angle = torch.linspace(-1.5, 2.0, 6, dtype=dtype).reshape(2, 3)
    rate = torch.linspace(0.5, -0.5, 6, dtype=dtype).reshape(2, 3)
    return field, (angle, rate, torch.zeros((), dtype=dtype)), torch.linspace(0, 4, 9)


def lotka_volterra_backwards(dtype):
    """Descending times on an uneven grid, predator and prey on a log scale."""

    def field(t, y):
        prey, predator = y.unbind(-1)
        return torch.stack([1.1 - 0.4 * predator.exp(), 0.3 * prey.exp() - 0.6], -1)

    y0 = torch.tensor([[0.4, 0.2], [0.1, -0.3], [1.0, 0.6]], dtype=dtype)
    return field, y0, torch.tensor([3.0, 2.9, 1.7, 0.4, -1.0])


class MLPField(torch.nn.Module):
    """A small network of time and state with fixed weights, as a flow has."""

    def __init__(self, dtype, features=3, hidden=16):
        super().__init__()
        generator = torch.Generator().manual_seed(7)

        def weights(*shape):
            values = torch.randn(*shape, generator=generator, dtype=torch.float64)
            return torch.nn.Parameter((values / shape[-1] ** 0.5).to(dtype))

        self.inner = weights(hidden, features)
        self.gate = weights(hidden, 1)
        self.outer = weights(features, hidden)

    def forward(self, t, y):
        return 2 * torch.tanh(2 * y @ self.inner.T + 3 * t * self.gate[:, 0]) @ self.outer.T


def mlp(dtype):
    values = torch.linspace(-2, 2, 24, dtype=dtype).reshape(8, 3)
    return MLPField(dtype), torch.sin(values * 5), torch.linspace(0, 1, 4)


def long_orbit(dtype):
    """Many steps and many outputs: rounding must not pile up differently."""

    def field(t, y):
        x, v = y
        return torch.stack([v, -torch.sin(x)])

    return field, torch.tensor([1.0, 0.0], dtype=dtype), torch.linspace(0, 30, 101)


def late_start(dtype):
    """Times around 1000, where f32 resolves 6e-5: how t, dt and t1 are rounded shows."""

    def field(t, y):
        return torch.sin(3 * t) * y.flip(0) - 0.2 * y

    return field, torch.tensor([1.0, -2.0], dtype=dtype), torch.linspace(1000.0, 1004.0, 5)


PROBLEMS = {
    problem.__name__: problem
    for problem in (
        pulse,
        driven_pendulum,
        lotka_volterra_backwards,
        mlp,
        long_orbit,
        late_start,
    )
}


# --- running and comparing --------------------------------------------------------------------


def solve(library, problem, method, dtype=torch.float64, t_dtype=torch.float64, **keywords):
    """One solve of a named problem without gradient: outputs, record, and count of callbacks."""
    field, y0, t = problem(dtype)
    return record(library, field, y0, t.to(t_dtype), method=method, **keywords)


def record(library, field, y0, t, **keywords):
    """Solves with ``library.odeint``: outputs, the field's record, attempts, warnings."""
    recorder = Recorder(field)
    steps = {"step": 0, "accept_step": 0, "reject_step": 0}

    def counter(name):
        def count(t0, y, dt):
            steps[name] += 1

        return count

    if keywords.get("method") not in FIXED:
        for name in steps:
            setattr(recorder, f"callback_{name}", counter(name))
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ys = library.odeint(recorder, clone_state(y0), t, **keywords)
    return SimpleNamespace(
        ys=ys,
        nfe=recorder.nfe,
        times=recorder.times,
        states=recorder.states,
        attempts=steps["step"],
        accepted=steps["accept_step"],
        rejected=steps["reject_step"],
        warnings=[str(w.message) for w in caught],
    )


def assert_close(mine, theirs, rtol, atol):
    """Same structure, dtype, shape and values; NaN equals NaN."""
    assert type(mine) is type(theirs)
    assert torch.is_tensor(mine) or len(mine) == len(theirs)
    for a, b in zip(as_tuple(mine), as_tuple(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, equal_nan=True)


def assert_same_calls(mine, theirs, rtol=1e-9, atol=1e-9):
    """The two solvers called the field equally often, at the same times, with the same states."""
    assert mine.nfe == theirs.nfe
    assert (mine.attempts, mine.rejected) == (theirs.attempts, theirs.rejected)
    assert [t.dtype for t in mine.times] == [t.dtype for t in theirs.times]
    assert [t.shape for t in mine.times] == [t.shape for t in theirs.times]
    if theirs.nfe:
        assert_close(torch.stack(mine.times), torch.stack(theirs.times), rtol, atol)
        assert_close(torch.stack(mine.states), torch.stack(theirs.states), rtol, atol)


def assert_same_run(mine, theirs, method, first_step=False):
    """The same f64 solve: equal counts, the same calls, the same outputs.

    The calls up to the first attempt, and every call of a fixed method, must agree to rounding.
    Later ones follow step sizes computed from error estimates: dopri8's first estimates are
    rounding themselves (order 8, small first steps); a few ulp there become 1e-3 of a step.
    """
    assert_same_calls(mine, theirs, *((2e-3, 2e-3) if method == "dopri8" else (1e-6, 1e-6)))
    strict = theirs.nfe if method in FIXED else 2 - first_step + STAGES.get(method, 6)
    assert_close(mine.times[:strict], theirs.times[:strict], 1e-12, 1e-12)
    assert_close(mine.states[:strict], theirs.states[:strict], 1e-11, 1e-11)
    assert_close(mine.ys, theirs.ys, *value_tolerance(method))


def value_tolerance(method):
    """rtol and atol of f64 outputs; dopri8's carry the noise of its steps (see above)."""
    return (2e-6, 2e-6) if method == "dopri8" else (1e-9, 1e-10)


def assert_similar_effort(mine, theirs, method):
    """Counts within two attempts or 3 %: the measure where rounding decides."""
    stages = {**STAGES, **FIXED_STAGES}[method]
    allowed = max(2 * stages, math.ceil(0.03 * theirs.nfe))
    assert abs(mine.nfe - theirs.nfe) <= allowed, (mine.nfe, theirs.nfe)


def outcome(call):
    """What a call does: its result, or the type and text of what it raises."""
    try:
        return call()
    except Exception as error:
        return type(error), str(error)


def raised(result):
    """Whether a result of ``outcome`` is an error."""
    return isinstance(result, tuple) and len(result) > 0 and isinstance(result[0], type)


def assert_same_outcome(mine, theirs, rtol=1e-9, atol=1e-10):
    """Both raised the same error with the same text, or both returned the same values."""
    assert raised(mine) == raised(theirs), (mine, theirs)
    if raised(theirs):
        assert mine == theirs
    else:
        assert_close(mine, theirs, rtol, atol)
