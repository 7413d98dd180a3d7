"""gradient="joined": the continuous adjoint by one solve through all output times.

Its truth is the true gradient, its measure the evaluations of the backward solves that start anew
at every output time.
"""

import functools
import importlib
import itertools

import pytest
import torch
from problems import ADAPTIVE, FIXED, STAGES, Recorder, as_tuple
from test_odeint_adjoint import (
    F32,
    F64,
    KINDS,
    adjoint_node,
    assert_same_gradients,
    case,
    gradients,
    objective,
    tolerances,
)

import pycnf

continuous = pycnf.odeint_adjoint
joined = functools.partial(pycnf.odeint_adjoint, gradient="joined")


@functools.cache
def truth(kind):
    return gradients(pycnf.odeint, *case(kind), method="dopri5", rtol=1e-11, atol=1e-11).grads


def error(grads, true):
    """The largest of the relative errors, an unused parameter's aside."""
    return max(
        float((a - b).abs().max() / b.abs().max()) for a, b in zip(grads, true) if b is not None
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ADAPTIVE)
def test_as_accurate_as_continuous(method, kind):
    """To y0, t and parameters; and it solves less."""
    mine = gradients(joined, *case(kind), **tolerances(method))
    theirs = gradients(continuous, *case(kind), **tolerances(method))
    assert mine.grads[-1].tolist() == [0.0] * 4
    assert error(mine.grads, truth(kind)) < 2 * error(theirs.grads, truth(kind)) + 1e-6
    assert mine.backward < theirs.backward
    assert torch.equal(as_tuple(mine.ys)[0], as_tuple(theirs.ys)[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["dopri5", "dopri8", "tsit5"])
def test_converges_to_the_gradient(method, kind):
    tight = {"rtol": 1e-10, "atol": 1e-10}
    mine = gradients(joined, *case(kind), method=method, **tight)
    assert_same_gradients(mine.grads[:-1], truth(kind)[:-1], 1e-6)


def spread(count):
    return torch.linspace(0.1, 1.2, count, dtype=F64)


@pytest.mark.parametrize("time_grad", [False, True])
@pytest.mark.parametrize("method", ADAPTIVE)
def test_backward_evaluations(method, time_grad):
    """As many as `continuous` for one interval, fewer for several."""
    field, y0, _ = case("tensor")
    counts = {}
    for outputs in (2, 11, 41):
        keywords = {**tolerances(method), "time_grad": time_grad}
        counts[outputs] = [
            gradients(solver, field, y0, spread(outputs), **keywords).backward
            for solver in (joined, continuous)
        ]
    assert counts[2][0] == counts[2][1]
    assert counts[11][0] < 0.92 * counts[11][1]
    assert counts[41][0] < 0.92 * counts[41][1]


def backward_record(field, y0, t, pick, **keywords):
    """Times of the backward evaluations, its attempts and the gradients, of pick(outputs)."""
    recorder = Recorder(field)
    attempts = []
    recorder.callback_step_adjoint = lambda t0, state, dt: attempts.append((float(t0), float(dt)))
    start = tuple(part.clone().requires_grad_() for part in as_tuple(y0))
    ys = joined(recorder, start if isinstance(y0, tuple) else start[0], t, **keywords)
    forward = recorder.nfe
    grads = torch.autograd.grad(
        sum(pick(part) for part in as_tuple(ys)), [*start, *field.parameters()]
    )
    return recorder.times[forward:], attempts, grads


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ADAPTIVE)
def test_one_start_and_one_evaluation_a_stop(method, kind):
    """The first step size is chosen once; at an output time the field is evaluated there, exactly,
    and the step size goes on.
    """
    field, y0, t = case(kind)
    times, attempts, _ = backward_record(
        field, y0, t, lambda ys: ys.pow(2).sum(), **tolerances(method)
    )
    assert len(times) == 2 + STAGES[method] * len(attempts) + len(t) - 2
    for output in t[1:]:
        assert output in times
    # The size wished for at the first attempt from a stop is no less than the one before the clip.
    stops = {round(-float(s) if kind == "reversed" else float(s), 9) for s in t[1:-1]}
    for (_, wish), (start, next_wish) in itertools.pairwise(attempts):
        if round(start, 9) in stops:
            stops.remove(round(start, 9))
            assert next_wish >= 0.999 * wish
    assert not stops


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ADAPTIVE)
def test_outputs_without_a_cotangent_cost_nothing(method, kind):
    """A loss of one output, with a hundred others around it: the solve of that one interval."""
    field, y0, t = case(kind)
    t = torch.linspace(float(t[0]), float(t[-1]), 101, dtype=F64)
    many = backward_record(field, y0, t, lambda ys: ys[60].pow(2).sum(), **tolerances(method))
    two = backward_record(
        field, y0, t[[0, 60]], lambda ys: ys[1].pow(2).sum(), **tolerances(method)
    )
    assert len(many[0]) == len(two[0])
    assert_same_gradients(many[2], two[2], 1e-9 if method != "dopri8" else 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_no_cotangent_at_all(kind):
    """Of the first output, which is y0, or of none: no evaluation, and the right zeros."""
    field, y0, t = case(kind)
    times, _, grads = backward_record(field, y0, t, lambda ys: 3 * ys[0].sum(), rtol=0.1, atol=0.1)
    assert len(times) == 0
    for part, grad in zip(as_tuple(y0), grads):
        assert torch.equal(grad, torch.full_like(part, 3.0))
    assert all(grad.abs().sum() == 0 for grad in grads[len(as_tuple(y0)) :])
    times, _, grads = backward_record(field, y0, t, lambda ys: 0 * ys.sum(), rtol=0.1, atol=0.1)
    assert len(times) == 0
    assert all(grad.abs().sum() == 0 for grad in grads)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", FIXED)
def test_on_a_fixed_grid_it_is_continuous(method, kind):
    keywords = {"method": method, "options": {"step_size": 0.1}}
    mine = gradients(joined, *case(kind), **keywords)
    theirs = gradients(continuous, *case(kind), **keywords)
    assert all(torch.equal(a, b) for a, b in zip(mine.grads, theirs.grads))
    assert mine.backward == theirs.backward


def test_a_fixed_backward_method_after_an_adaptive_one():
    keywords = {"adjoint_method": "rk4", "adjoint_options": {"step_size": 0.1}}
    mine = gradients(joined, *case("tensor"), **tolerances("dopri5"), **keywords)
    theirs = gradients(continuous, *case("tensor"), **tolerances("dopri5"), **keywords)
    assert all(torch.equal(a, b) for a, b in zip(mine.grads, theirs.grads))
    other = {"adjoint_method": "dopri8", "adjoint_options": {}}
    mine = gradients(joined, *case("tensor"), **tolerances("rk4"), **other)
    theirs = gradients(continuous, *case("tensor"), **tolerances("rk4"), **other)
    assert mine.backward < theirs.backward
    assert_same_gradients(mine.grads, theirs.grads, 1e-3)


@pytest.mark.parametrize("size", [0.05, 0.25, 0.3])
@pytest.mark.parametrize("method", ["dopri5", "bosh3", "adaptive_heun"])
def test_forced_steps_that_end_on_or_beyond_outputs(method, size):
    """Whether its own size, a clip or rounding ends a step at an output time, the cotangent enters
    once. Outputs are a quarter apart, so that 0.05 and 0.25 meet them and the others do not.
    """
    rate = torch.tensor(0.7, dtype=F64, requires_grad=True)
    y0 = torch.tensor([1.0, -2.0], dtype=F64, requires_grad=True)
    t = torch.linspace(0, 1, 5, dtype=F64)
    ys = joined(
        lambda t, y: -rate * y,
        y0,
        t,
        method=method,
        rtol=1e-9,
        atol=1e-9,
        options={"first_step": 0.01},
        adjoint_options={"first_step": size, "max_step": size, "min_step": size},
        adjoint_params=(rate,),
    )
    grads = torch.autograd.grad(ys.sum(), (y0, rate))
    decay = torch.exp(-0.7 * t)
    true = [decay.sum().expand(2), -(t * decay).sum() * y0.detach().sum()]
    order = {"dopri5": 5, "bosh3": 3, "adaptive_heun": 2}[method]
    assert_same_gradients(grads, true, 3 * size**order)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stop", ["step_t", "jump_t"])
def test_stops_of_the_user(stop, kind):
    """Between, and at the very time of an output."""
    at = torch.tensor([0.2, 0.35, 0.8, -0.2, -0.35, -0.8], dtype=F64)
    keywords = {**tolerances("dopri5"), "adjoint_options": {stop: at}}
    mine = gradients(joined, *case(kind), **keywords)
    assert error(mine.grads, truth(kind)) < 1e-4


def test_a_kicked_field_with_its_jumps_told():
    """A field that is discontinuous where an output is: each side is evaluated on its side."""
    weight = torch.tensor(0.6, dtype=F64, requires_grad=True)

    def field(t, y):
        return weight * y if t < 0.5 else -weight * y

    t = torch.tensor([0.0, 0.5, 1.0], dtype=F64)
    y0 = torch.tensor([1.3], dtype=F64, requires_grad=True)
    jump = {"jump_t": torch.tensor([0.5], dtype=F64)}
    ys = joined(field, y0, t, rtol=1e-9, atol=1e-9, options=jump, adjoint_params=(weight,))
    grads = torch.autograd.grad(ys[1:].sum(), (y0, weight))
    # y(1/2) = y0 exp(w/2), y(1) = y0.
    growth = torch.exp(0.5 * weight.detach())
    true = [1 + growth.expand(1), 1.3 * 0.5 * growth]
    assert_same_gradients(grads, true, 1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", ["seminorm", "custom"])
def test_norms(norm, kind):
    """adjoint_options["norm"], given and replaced between the passes."""
    calls = []

    def largest(parts):
        calls.append(tuple(part.shape for part in parts))
        return max(part.abs().max() for part in parts)

    options = {"norm": "seminorm" if norm == "seminorm" else largest}
    mine = gradients(joined, *case(kind), **tolerances("bosh3"), adjoint_options=options)
    default = gradients(joined, *case(kind), **tolerances("bosh3"))
    assert mine.backward != default.backward
    assert error(mine.grads, truth(kind)) < 2e-2
    state = [(2, 3), ()] if kind == "tuple" else [(2, 3)]
    expected = tuple(map(torch.Size, [(), *state, *state, (3, 3), (3,), (4,)]))
    assert set(calls) == (set() if norm == "seminorm" else {expected})

    field, y0, t = case(kind)
    recorder = Recorder(field)
    ys = joined(recorder, y0, t, **tolerances("bosh3"), adjoint_options=options)
    node = adjoint_node(ys)
    given, seen = node.adjoint_options["norm"], []
    node.adjoint_options["norm"] = lambda parts: seen.append(1) or 100 * given(parts)
    forward = recorder.nfe
    objective(ys).backward()
    assert recorder.nfe - forward > 1.5 * mine.backward
    assert seen


def test_max_num_steps_is_counted_between_outputs():
    """As for `continuous`, not over the whole solve."""
    field, y0, _ = case("tensor")
    t = spread(11)

    def run(limit):
        return gradients(
            joined, field, y0, t, **tolerances("bosh3"), adjoint_options={"max_num_steps": limit}
        )

    steps = gradients(joined, field, y0, t, **tolerances("bosh3")).backward // STAGES["bosh3"]
    assert steps > 24
    run(20)
    with pytest.raises(AssertionError, match="max_num_steps exceeded"):
        run(2)


@pytest.mark.parametrize("time_dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, F32, torch.complex128], ids=str)
def test_other_dtypes(dtype, time_dtype):
    def run(solver, dtype):
        y0 = torch.tensor([0.5, -1.0, 0.2]).to(dtype).requires_grad_()
        rate = torch.tensor(0.8).to(dtype).requires_grad_()
        t = torch.tensor([0.0, 0.3, 0.5, 1.0], dtype=time_dtype, requires_grad=True)
        ys = solver(
            lambda t, y: torch.sin(rate * y) * (1 + t) * (1 + 0.5j if dtype.is_complex else 1),
            y0,
            t,
            rtol=1e-2 if dtype == torch.bfloat16 else 1e-6,
            atol=1e-2 if dtype == torch.bfloat16 else 1e-6,
            **({} if solver is pycnf.odeint else {"adjoint_params": (rate,)}),
        )
        return [g.to(torch.complex128) for g in torch.autograd.grad(objective(ys), (y0, rate, t))]

    tolerance = 0.1 if dtype == torch.bfloat16 else 1e-4
    exact = F64 if dtype == torch.bfloat16 else dtype
    for solver in (joined, continuous):
        assert_same_gradients(run(solver, dtype), run(pycnf.odeint, exact), tolerance)


def test_times_that_round_to_one():
    """Two outputs nearer than the dtype of time resolves: both cotangents enter."""
    weight = torch.tensor(0.6, dtype=F64, requires_grad=True)
    y0 = torch.tensor([1.3], dtype=F64, requires_grad=True)
    t = torch.tensor([0.0, 0.4, 0.4 + 1e-10, 1.0, 1.0 + 1e-10], dtype=F64)
    keywords = {"rtol": 1e-6, "atol": 1e-6, "options": {"dtype": torch.float32}}
    ys = joined(lambda t, y: weight * y, y0, t, adjoint_params=(weight,), **keywords)
    grads = torch.autograd.grad(ys.sum(), (y0, weight))
    growth = torch.exp(0.6 * t)
    assert_same_gradients(grads, [growth.sum()[None], 1.3 * (t * growth).sum()], 1e-4)


def test_a_cotangent_that_is_nan_is_an_error_not_a_gradient():
    field, y0, t = case("tensor")
    ys = joined(field, y0, t, rtol=1e-3, atol=1e-3)
    grad = torch.ones_like(ys)
    grad[1, 0, 0] = float("nan")
    with pytest.raises(AssertionError, match="non-finite values in state"):
        torch.autograd.grad(ys, field.weight, grad)


def test_differentiated_again_it_is_continuous():
    def run(solver):
        field, y0, t = case("tensor")
        y0.requires_grad_()
        ys = solver(field, y0, t, rtol=1e-4, atol=1e-4)
        (grad,) = torch.autograd.grad(objective(ys), y0, create_graph=True)
        return grad, *torch.autograd.grad(grad.pow(2).sum(), [y0, field.weight])

    mine, theirs = run(joined), run(continuous)
    assert torch.equal(mine[0], theirs[0])
    assert_same_gradients(mine[1:], theirs[1:], 1e-3)


def test_other_names_are_refused():
    field, y0, t = case("tensor")
    with pytest.raises(ValueError, match=r'"continuous", "joined" or "discrete", got \'adjoint\''):
        pycnf.odeint_adjoint(field, y0, t, gradient="adjoint")


def test_a_backward_solver_of_the_user_is_continuous():
    """Which methods can be joined is asked of pycnf's own; a registered class goes interval by
    interval."""
    library = importlib.import_module("pycnf.compat.torchdiffeq._impl.fixed_grid")
    solvers = importlib.import_module("pycnf.compat.torchdiffeq._impl.odeint").SOLVERS

    class Mine(library.Midpoint):
        pass

    keywords = {"adjoint_method": "mine", "adjoint_options": {"step_size": 0.05}}
    solvers["mine"] = Mine
    try:
        a = gradients(joined, *case("tensor"), **keywords)
        b = gradients(continuous, *case("tensor"), **keywords)
    finally:
        del solvers["mine"]
    assert_same_gradients(a.grads, b.grads, 0.0)
