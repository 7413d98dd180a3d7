"""Second and higher derivatives through odeint_adjoint.

The discrete gradient's must be those of backpropagation through odeint with the same steps, to
rounding; the continuous adjoint's must be the true ones, to the tolerance.
"""

import functools

import pytest
import torch
from problems import ADAPTIVE, METHODS, Recorder, as_tuple
from test_odeint_adjoint import (
    F64,
    KINDS,
    STOPS,
    Field,
    LiveGraphs,
    Replica,
    assert_same_gradients,
    case,
    grid_with_graph,
    objective,
    tolerances,
)

import pycnf

continuous = pycnf.odeint_adjoint
discrete = functools.partial(pycnf.odeint_adjoint, gradient="discrete")
joined = functools.partial(pycnf.odeint_adjoint, gradient="joined")


def derivatives(solver, kind, orders=2, field=None, **keywords):
    """Gradients of the objective to y0, t and parameters, and of a function of these in turn."""
    standard, y0, t = case(kind)
    field = standard if field is None else field
    start = tuple(part.clone().requires_grad_() for part in as_tuple(y0))
    t = t.clone().requires_grad_()
    ys = solver(field, start if kind == "tuple" else start[0], t, **keywords)
    inputs = [*start, t, field.weight, field.shift]
    value, found = objective(ys), []
    for order in range(orders):
        more = order + 1 < orders
        grads = torch.autograd.grad(value, inputs, create_graph=more)
        found.append([grad.detach() for grad in grads])
        if more:
            value = sum((g * g.detach().cos()).sum() + 0.1 * g.pow(2).sum() for g in grads)
    return found


def forced(method, size=0.25):
    """Options under which the steps are given and depend on nothing."""
    if method in ADAPTIVE:
        return {"first_step": size, "min_step": size, "max_step": size}
    return {"step_size": size}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_discrete(method, kind):
    """Every method, y0, t and parameters and all mixed partials."""
    keywords = {**tolerances(method), "rtol": 1e-3, "atol": 1e-3}
    if method in ADAPTIVE:
        keywords["options"] = {"first_step": 0.2}
    mine = derivatives(discrete, kind, **keywords)
    theirs = derivatives(pycnf.odeint, kind, **keywords)
    assert max(grad.abs().max() for grad in theirs[1]) > 1
    assert_same_gradients(mine[0], theirs[0], 1e-11)
    assert_same_gradients(mine[1], theirs[1], 1e-11)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["dopri5", "tsit5", "heun3"])
def test_discrete_third_order(method, kind):
    keywords = {"method": method, "options": forced(method, 0.6)}
    mine = derivatives(discrete, kind, 3, **keywords)
    assert_same_gradients(mine[2], derivatives(pycnf.odeint, kind, 3, **keywords)[2], 1e-9)


DISCRETE_OPTIONS = {
    **{name: ("bosh3", {"first_step": 0.15, **make()}) for name, make in STOPS.items()},
    "false fsal, jump": ("fehlberg2", {"first_step": 0.15, **STOPS["both"]()}),
    "rejected": ("dopri5", {"first_step": 2.0}),
    "f32 times": ("dopri5", {"first_step": 0.2, "dtype": torch.float32}),
    "cubic": ("rk4", {"step_size": 0.3, "interp": "cubic"}),
    "perturb": ("heun2", {"step_size": 0.13, "perturb": True}),
    "grid_constructor": ("midpoint", {"grid_constructor": grid_with_graph}),
    "implicit": ("radauIIA3", {"step_size": 0.3}),
    "diagonally implicit": ("sdirk2", {"step_size": 0.3}),
}


@pytest.mark.parametrize("kind", ["tuple", "reversed"])
@pytest.mark.parametrize("name", DISCRETE_OPTIONS)
def test_discrete_options(name, kind):
    method, options = DISCRETE_OPTIONS[name]
    keywords = {"method": method, "rtol": 1e-4, "atol": 1e-4, "options": options}
    tolerance = 1e-5 if name == "f32 times" else 1e-10
    mine = derivatives(discrete, kind, **keywords)
    theirs = derivatives(pycnf.odeint, kind, **keywords)
    assert_same_gradients(mine[0], theirs[0], tolerance)
    assert_same_gradients(mine[1], theirs[1], tolerance)


TIGHT = {
    "dopri5": {"rtol": 1e-9, "atol": 1e-9},
    "dopri8": {"rtol": 1e-10, "atol": 1e-10},
    "tsit5": {"rtol": 1e-8, "atol": 1e-8},
    "rk4": {"options": {"step_size": 0.01}},
}


@functools.cache
def truth(kind):
    return derivatives(pycnf.odeint, kind, method="dopri5", rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", TIGHT)
def test_continuous(method, kind):
    mine = derivatives(continuous, kind, method=method, **TIGHT[method])
    assert_same_gradients(mine[0], truth(kind)[0], 1e-6)
    assert_same_gradients(mine[1], truth(kind)[1], 5e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_continuous_converges(kind):
    """The error of the second derivative falls with the tolerance: it is no approximation of
    another kind.
    """

    def error(tolerance):
        mine = derivatives(continuous, kind, method="dopri5", rtol=tolerance, atol=tolerance)
        return max(
            float((a - b).abs().max() / b.abs().max()) for a, b in zip(mine[1], truth(kind)[1])
        )

    assert error(1e-8) < 1e-2 * error(1e-4)


@pytest.mark.parametrize("solver", [continuous, discrete], ids=["continuous", "discrete"])
def test_third_and_fourth_order(solver):
    """Against the solution's own derivatives, y' = -w y^2."""

    def orders(solve):
        w, y0 = (torch.tensor(x, dtype=F64, requires_grad=True) for x in (0.8, 1.5))
        value = solve(w, y0)
        found = []
        for _ in range(4):
            grads = torch.autograd.grad(value, [w, y0], create_graph=True)
            found += [grad.detach() for grad in grads]
            value = grads[0] + 2 * grads[1]
        return found

    def numerical(w, y0):
        t = torch.tensor([0.2, 1.0], dtype=F64)
        keywords = {"method": "dopri5", "rtol": 1e-7, "atol": 1e-7, "adjoint_params": (w,)}
        return solver(lambda t, y: -w * y * y, y0, t, **keywords)[-1]

    mine, truth = orders(numerical), orders(lambda w, y0: y0 / (1 + 0.8 * w * y0))
    assert_same_gradients(mine, truth, 1e-3)


def largest(parts):
    return max(part.abs().max() for part in parts)


CONTINUOUS_OPTIONS = {
    "seminorm": {"adjoint_options": {"norm": "seminorm"}},
    "norm": {"adjoint_options": {"norm": largest}},
    "state norm": {"options": {"norm": lambda y: 2 * largest(as_tuple(y))}},
    "backward method": {"adjoint_method": "dopri8", "adjoint_options": {}},
    "jump_t": {"options": {"jump_t": torch.tensor([0.5], dtype=F64)}},
    "grid": {
        "adjoint_method": "rk4",
        "adjoint_options": {
            "grid_constructor": lambda f, y0, t: torch.linspace(
                float(t[0]), float(t[-1]), 20, dtype=F64
            )
        },
    },
}


@pytest.mark.parametrize("kind", ["tuple", "reversed"])
@pytest.mark.parametrize("name", CONTINUOUS_OPTIONS)
def test_continuous_options(name, kind):
    keywords = {"rtol": 1e-7, "atol": 1e-7, **CONTINUOUS_OPTIONS[name]}
    mine = derivatives(continuous, kind, **keywords)
    assert_same_gradients(mine[1], truth(kind)[1], 1e-4)


def test_tolerances_for_each_part_of_the_adjoint_state():
    """(t, y, adj_y, *params), where each part has its own; the adjoint's adjoint has these."""

    def run(adjoint):
        keywords = {"rtol": 1e-8, "atol": 1e-8, "adjoint_rtol": adjoint, "adjoint_atol": adjoint}
        return derivatives(continuous, "tensor", method="dopri5", **keywords)[1]

    def error(found):
        return max(
            float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, truth("tensor")[1])
        )

    assert_same_gradients(run([1e-5] * 6), run(1e-5), 1e-9)
    state_only = run([1e-2, 1e-9, 1e-9, 1e-2, 1e-2, 1e-2])
    assert error(state_only) < 1e-2 * error(run(1e-2))


@pytest.mark.parametrize("solver", [continuous, discrete], ids=["continuous", "discrete"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_the_first_derivative_is_the_same_number(method, kind, solver):
    """create_graph does not change it, to the last bit, nor what it costs."""

    def run(create_graph):
        field, y0, t = case(kind)
        recorder = Recorder(field)
        start = tuple(part.clone().requires_grad_() for part in as_tuple(y0))
        t = t.clone().requires_grad_()
        ys = solver(recorder, start if kind == "tuple" else start[0], t, **tolerances(method))
        inputs = [*start, t, *field.parameters()]
        grads = torch.autograd.grad(objective(ys), inputs, create_graph=create_graph)
        return grads, recorder.nfe

    (with_graph, cost), (plain, plain_cost) = run(True), run(False)
    assert all(torch.equal(a, b) for a, b in zip(with_graph, plain))
    assert cost == plain_cost


@pytest.mark.parametrize("solver", [continuous, discrete], ids=["continuous", "discrete"])
@pytest.mark.parametrize("kind", ["ascending", "descending"])
@pytest.mark.parametrize("method", ["dopri5", "tsit5", "rk4"])
def test_gradgradcheck(method, kind, solver):
    """Against finite differences of the first derivative, that to the cotangents among them."""
    keywords = {"method": method, "options": forced(method, 0.3 if solver is discrete else 0.02)}

    def solve(y0, t, weight):
        return solver(
            lambda t, y: torch.sin(weight * y + t), y0, t, adjoint_params=(weight,), **keywords
        )

    times = [0.1, 0.5, 0.95]
    inputs = [
        torch.tensor([0.4, -0.9], dtype=F64),
        torch.tensor(times if kind == "ascending" else times[::-1], dtype=F64),
        torch.tensor(1.3, dtype=F64),
    ]
    inputs = [x.requires_grad_() for x in inputs]
    atol = 1e-5 if solver is discrete else 1e-4
    assert torch.autograd.gradgradcheck(solve, inputs, atol=atol, fast_mode=True)


@pytest.mark.parametrize("solver", [continuous, discrete], ids=["continuous", "discrete"])
def test_hessian_vector_product(solver):
    """torch.autograd.functional, over y0 and a parameter together."""
    t = torch.tensor([0.0, 0.4, 1.0], dtype=F64)

    def loss(solve):
        def value(y0, rate):
            def field(t, y):
                return torch.sin(rate * y) + t

            params = {} if solve is pycnf.odeint else {"adjoint_params": (rate,)}
            ys = solve(field, y0, t, method="rk4", options={"step_size": 0.1}, **params)
            return objective(ys)

        return value

    inputs = (torch.tensor([0.4, -0.9], dtype=F64), torch.tensor(1.3, dtype=F64))
    vectors = (torch.tensor([1.0, -2.0], dtype=F64), torch.tensor(0.5, dtype=F64))
    tolerance = 1e-10 if solver is discrete else 1e-3
    for product in (torch.autograd.functional.hvp, torch.autograd.functional.vhp):
        _, mine = product(loss(solver), inputs, vectors)
        _, theirs = product(loss(pycnf.odeint), inputs, vectors)
        assert_same_gradients(mine, theirs, tolerance)
    mine = torch.autograd.functional.hessian(loss(solver), inputs)
    theirs = torch.autograd.functional.hessian(loss(pycnf.odeint), inputs)
    for a, b in zip(mine, theirs):
        assert_same_gradients(a, b, tolerance)


@pytest.mark.parametrize("solver", [continuous, joined, discrete])
def test_gradient_penalty(solver):
    """Trained on the norm of an input gradient by .backward(), as regularizers are."""

    def run(solve):
        field, y0, t = case("tensor")
        y0.requires_grad_()
        ys = solve(field, y0, t, method="dopri5", rtol=1e-8, atol=1e-8)
        (grad,) = torch.autograd.grad(ys[-1].pow(2).sum(), y0, create_graph=True)
        (grad.pow(2).sum() + ys[-1].sum()).backward()
        return [y0.grad, field.weight.grad, field.shift.grad]

    assert_same_gradients(run(solver), run(pycnf.odeint), 1e-5)


@pytest.mark.parametrize("solver", [continuous, joined, discrete])
def test_a_cotangent_of_zero_has_a_derivative(solver):
    """At a minimum the first derivative vanishes and the second does not."""

    def run(solve):
        field, y0, t = case("tensor")
        y0.requires_grad_()
        ys = solve(field, y0, t, method="dopri5", rtol=1e-8, atol=1e-8)
        (grad,) = torch.autograd.grad((ys - ys.detach()).pow(2).sum(), y0, create_graph=True)
        assert grad.abs().max() == 0
        return torch.autograd.grad(grad.sum(), [y0, field.weight])

    theirs = run(pycnf.odeint)
    assert theirs[0].abs().max() > 1
    assert_same_gradients(run(solver), theirs, 1e-5)


@pytest.mark.parametrize(
    ("solver", "method", "tolerance"),
    [
        (continuous, "dopri5", 1e-5),
        (discrete, "dopri5", 1e-10),
        (discrete, "adaptive_heun", 1e-10),
        (discrete, "rk4", 1e-10),
    ],
)
def test_y0_and_t_that_depend_on_the_parameters(solver, method, tolerance):
    """An encoder shares its weights with the field: a partial derivative must not count its path
    twice.
    """

    def run(solve):
        field = Field()
        y0 = torch.tanh(case("tensor")[1] @ field.weight)
        t = case("tensor")[2] + field.shift.sum()
        options = {} if solver is continuous else forced(method, 0.2)
        ys = solve(field, y0, t, method=method, rtol=1e-8, atol=1e-8, options=options)
        inputs = [field.weight, field.shift]
        grads = torch.autograd.grad(objective(ys), inputs, create_graph=True)
        penalty = sum(g.pow(2).sum() for g in grads)
        return [g.detach() for g in grads], torch.autograd.grad(penalty, inputs)

    mine, theirs = run(solver), run(pycnf.odeint)
    assert_same_gradients(mine[0], theirs[0], tolerance)
    assert_same_gradients(mine[1], theirs[1], tolerance)


@pytest.mark.parametrize("solver", [continuous, discrete], ids=["continuous", "discrete"])
def test_data_parallel_replica(solver):
    """Its parameters are inner nodes of the graph, and lead on to the module's own."""

    def run(solve):
        weight = torch.tensor([0.5, 1.5], dtype=F64, requires_grad=True)
        y0, t = torch.tensor([1.0, 2.0], dtype=F64), torch.linspace(0, 1, 3, dtype=F64)
        ys = solve(Replica(weight.exp()), y0, t, method="rk4", options={"step_size": 0.05})
        (grad,) = torch.autograd.grad(objective(ys), weight, create_graph=True)
        return torch.autograd.grad(grad.pow(2).sum(), weight)

    assert_same_gradients(run(solver), run(pycnf.odeint), 1e-5)


@pytest.mark.parametrize("solver", [continuous, discrete], ids=["continuous", "discrete"])
@pytest.mark.parametrize("kind", KINDS)
def test_fields_that_are_hardly_nonlinear(kind, solver):
    """Derivatives that are constants, or that exist for one part of the state only."""

    class Linear(Field):
        def forward(self, t, state):
            if kind == "tuple":
                y, cost = state
                return y @ self.weight, 0 * cost + self.shift.sum()
            return state @ self.weight + self.shift

    def run(solve):
        found = derivatives(solve, kind, field=Linear(), method="dopri5", rtol=1e-8, atol=1e-8)
        return found[0] + found[1]

    assert_same_gradients(run(solver), run(pycnf.odeint), 1e-5)


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_states_that_a_callback_edits(method):
    """The discrete gradient goes by the numbers of the solve, edits included, at every order."""

    def run(create_graph):
        field, y0, t = case("tensor")
        field.callback_step = lambda t0, y, dt: y.mul_(0.9)
        ys = discrete(field, y0, t, method=method, options=forced(method))
        inputs = [field.weight, field.shift]
        grads = torch.autograd.grad(objective(ys), inputs, create_graph=create_graph)
        if not create_graph:
            return grads
        torch.manual_seed(0)
        vectors = [torch.randn_like(x) for x in inputs]
        product = sum((v * g).sum() for v, g in zip(vectors, grads))
        return grads, torch.autograd.grad(product, inputs), vectors

    def nudged(sign, vectors, size=1e-6):
        field, y0, t = case("tensor")
        field.callback_step = lambda t0, y, dt: y.mul_(0.9)
        with torch.no_grad():
            for parameter, vector in zip((field.weight, field.shift), vectors):
                parameter += sign * size * vector
        ys = discrete(field, y0, t, method=method, options=forced(method))
        return torch.autograd.grad(objective(ys), [field.weight, field.shift])

    grads, products, vectors = run(True)
    assert all(torch.equal(a, b) for a, b in zip(grads, run(False)))
    assert all(torch.isfinite(p).all() for p in products)
    # What an edit does is no part of any derivative, so differences are near, not equal.
    ahead, behind = nudged(1, vectors), nudged(-1, vectors)
    for product, a, b in zip(products, ahead, behind):
        difference = (a - b) / 2e-6
        assert (product - difference).abs().max() < 0.5 * difference.abs().max()


@pytest.mark.parametrize("solver", [continuous, discrete], ids=["continuous", "discrete"])
@pytest.mark.parametrize("method", ["dopri5", "tsit5", "rk4"])
def test_a_gradient_with_a_graph_keeps_no_evaluations(method, solver):
    """Between the passes no evaluation's graph is alive, and in the second backward of the discrete
    gradient those of one step at a time.
    """
    graphs = LiveGraphs()

    class Watched(Field):
        def forward(self, t, y):
            return super().forward(t, graphs.mark(y))

    _, y0, t = case("tensor")
    field = Watched()
    ys = solver(field, y0, t, method=method, options=forced(method, 0.05))
    grads = torch.autograd.grad(objective(ys), [field.weight], create_graph=True)
    # Constants come off a last output's graph of its own: one evaluation at most for each output.
    assert graphs.alive <= len(t)
    graphs.peak = 0
    grads[0].pow(2).sum().backward()
    assert 0 < graphs.peak <= 40
    del ys, grads
    assert graphs.alive == 0


@pytest.mark.parametrize("solver", [continuous, discrete], ids=["continuous", "discrete"])
def test_parameters_changed_between_the_backward_passes(solver):
    field, y0, t = case("tensor")
    ys = solver(field, y0, t, rtol=1e-3, atol=1e-3)
    (grad,) = torch.autograd.grad(objective(ys), field.weight, create_graph=True)
    with torch.no_grad():
        field.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        grad.sum().backward()


def test_y0_edited_between_the_passes():
    """The discrete gradient's steps start from a y0 of their own."""

    def run(edit):
        field, y0, t = case("tensor")
        base = y0.clone().requires_grad_()
        y0 = base * 1.0
        ys = discrete(field, y0, t, method="rk4")
        if edit:
            y0.data.fill_(17.0)
        grads = torch.autograd.grad(objective(ys), [base, field.weight], create_graph=True)
        return torch.autograd.grad(grads[0].sum() + grads[1].sum(), [base, field.weight])

    assert_same_gradients(run(True), run(False), 1e-15)
