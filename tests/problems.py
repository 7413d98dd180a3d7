"""Initial value problems and measuring tools shared by the tests of the drop-in solver.

The reference is the installed torchdiffeq; methods that only its main branch has are added to it by
`bench.torchdiffeq_main`.
"""

import math
import warnings
from types import SimpleNamespace

import torch

from bench.torchdiffeq_main import add_methods
from pycnf.odeint.implicit_grid import IMPLICIT_TABLEAUX

add_methods()

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
