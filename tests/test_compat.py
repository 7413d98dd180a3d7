"""The stand-in for torchdiffeq: what public code does with its inner modules, done on both."""

import importlib
import inspect
import pickle
import warnings
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torchdiffeq
from problems import IMPLICIT, PROBLEMS, Recorder, assert_close, clone_state, outcome

import pycnf
from pycnf.compat.modules import STAND_INS
from pycnf.odeint import adaptive, fixed_grid, solve

MODULES = (
    *("adjoint", "adaptive_heun", "bosh3", "dopri5", "dopri8", "event_handling", "fehlberg2"),
    *(
        "fixed_adams",
        "scipy_wrapper",
        "fixed_grid",
        "interp",
        "misc",
        "odeint",
        "rk_common",
        "solvers",
    ),
)


def inner(modules):
    """The inner modules by name, and torchdiffeq's four functions."""
    found = {name: modules[f"torchdiffeq._impl.{name}"] for name in MODULES}
    top = modules["torchdiffeq"]
    return SimpleNamespace(**found, top=top, SOLVERS=found["odeint"].SOLVERS)


PEER = inner(
    {
        "torchdiffeq": torchdiffeq,
        **{
            f"torchdiffeq._impl.{name}": importlib.import_module(f"torchdiffeq._impl.{name}")
            for name in MODULES
        },
    }
)
MINE = inner(STAND_INS)
LIBRARIES = (MINE, PEER)


@contextmanager
def registered(library, name, solver):
    """A solver under a name, taken out again in the end."""
    before = library.SOLVERS.get(name)
    library.SOLVERS[name] = solver
    try:
        yield
    finally:
        if before is None:
            del library.SOLVERS[name]
        else:
            library.SOLVERS[name] = before


def close(a, b, dtype=torch.float64):
    assert_close(a, b, *((1e-9, 1e-10) if dtype == torch.float64 else (2e-4, 2e-5)))


def both(run):
    """What a function of the library gives on both."""
    return tuple(run(library) for library in LIBRARIES)


# --- names ------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", MODULES)
def test_every_name_is_the_peers_with_its_arguments(module):
    mine, theirs = getattr(MINE, module), getattr(PEER, module)
    for name in mine.__all__:
        if name in ("Tsit5Solver",):
            continue
        ours, peers = getattr(mine, name), getattr(theirs, name)
        if not inspect.isroutine(peers):
            continue
        given = inspect.signature(peers).parameters
        taken = inspect.signature(ours).parameters
        assert list(taken)[: len(given)] == list(given), name
        for key, parameter in given.items():
            if parameter.default is not None and not callable(parameter.default):
                assert taken[key].default == parameter.default, (name, key)


@pytest.mark.parametrize("module", MODULES)
def test_solver_classes_have_the_peers_constructor_and_bases(module):
    mine, theirs = getattr(MINE, module), getattr(PEER, module)
    for name in mine.__all__:
        peers = getattr(theirs, name, None)
        if not inspect.isclass(peers) or not hasattr(peers, "valid_callbacks"):
            continue
        ours = getattr(mine, name)
        assert list(inspect.signature(ours).parameters) == list(inspect.signature(peers).parameters)
        assert ours.valid_callbacks() == peers.valid_callbacks()
        assert getattr(ours, "order", None) == getattr(peers, "order", None)
        names = [base.__name__ for base in peers.__mro__]
        # Between them stands what methods have in common of which pycnf takes whole solves.
        own = [base.__name__ for base in ours.__mro__ if base.__name__ != "WholeSolveODESolver"]
        assert own == names


def test_tableaux_are_the_peers_to_the_bit():
    tables = {
        "dopri5": ("_DORMAND_PRINCE_SHAMPINE_TABLEAU", "DPS_C_MID"),
        "dopri8": ("_DOPRI8_TABLEAU", "_C_mid"),
        "bosh3": ("_BOGACKI_SHAMPINE_TABLEAU", "_BS_C_MID"),
        "fehlberg2": ("_FEHLBERG2_TABLEAU", "_FE_C_MID"),
        "adaptive_heun": ("_ADAPTIVE_HEUN_TABLEAU", "_AH_C_MID"),
    }
    for module, (table, middle) in tables.items():
        mine, theirs = getattr(MINE, module), getattr(PEER, module)
        assert getattr(mine, table)._fields == getattr(theirs, table)._fields
        for ours, peers in zip(getattr(mine, table), getattr(theirs, table)):
            torch.testing.assert_close(ours, peers, rtol=1e-15, atol=1e-17)
        torch.testing.assert_close(
            getattr(mine, middle), getattr(theirs, middle), rtol=1e-13, atol=1e-16
        )


def test_the_table_has_the_peers_names_and_then_pycnfs():
    # What the peer's release lacks was entered by the tests, at the end.
    added = {"tsit5", *IMPLICIT}
    peers = [name for name in PEER.SOLVERS if name in MINE.SOLVERS and name not in added]
    mine = [name for name in MINE.SOLVERS if name in PEER.SOLVERS and name not in added]
    assert mine == peers
    assert str(MINE.SOLVERS.keys()).startswith("dict_keys(['dopri8', 'dopri5'")
    assert list(MINE.SOLVERS) == list(solve.SOLVERS)
    assert issubclass(MINE.SOLVERS["rk4"], MINE.solvers.FixedGridODESolver)


def test_the_functions_are_pycnfs():
    top = MINE.top
    assert top.odeint is pycnf.odeint is MINE.odeint.odeint
    assert top.odeint_adjoint is pycnf.odeint_adjoint is MINE.adjoint.odeint_adjoint
    assert STAND_INS["torchdiffeq._impl"].odeint is pycnf.odeint
    assert top.__version__ == torchdiffeq.__version__
    assert "pycnf" in top.__doc__ and "pycnf" in top.__file__


def test_public_names_of_pycnf_serve_as_torchdiffeqs():
    public = [name for name in vars(torchdiffeq) if name.startswith("odeint")]
    for name in public:
        ours = inspect.signature(getattr(pycnf, name)).parameters
        for key, given in inspect.signature(getattr(torchdiffeq, name)).parameters.items():
            assert key in ours and ours[key].kind == given.kind


def test_missing_names_say_what_there_is():
    misc = MINE.misc
    with pytest.raises(AttributeError, match=r"pycnf stands in.*_flatten'; it has.*_rms_norm"):
        _ = misc._flatten
    assert not hasattr(misc, "_flatten")
    assert getattr(misc, "_flatten", None) is None
    with pytest.raises(ImportError, match=r"pycnf stands in.*_flatten'; it has.*_rms_norm"):
        from pycnf.compat.torchdiffeq._impl.misc import _flatten  # noqa: F401


# --- functions --------------------------------------------------------------------------------


def field(t, y):
    return torch.sin(3 * t) * y.flip(0) - 0.3 * y


def perturbed(library, func=field):
    return library.misc._PerturbFunc(func)


def state(dtype=torch.float64):
    return torch.tensor([1.0, -2.0, 0.5], dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 1e-7])
@pytest.mark.parametrize("norm", ["_rms_norm", "_linf_norm"])
def test_first_step_size(dtype, scale, norm):
    def run(library):
        return library.misc._select_initial_step(
            perturbed(library), torch.tensor(0.5, dtype=torch.float64), scale * state(dtype), 4,
            1e-5, 1e-7, getattr(library.misc, norm),
        )  # fmt: skip

    close(*both(run), dtype)


@pytest.mark.parametrize("ratio", [0.0, 1e-4, 0.7, 1.0, 2.0, 1e9])
def test_next_step_size(ratio):
    numbers = [torch.tensor(x, dtype=torch.float64) for x in (0.1, ratio, 0.9, 10.0, 0.2)]
    close(*both(lambda library: library.misc._optimal_step_size(*numbers, 5)))


def test_error_ratio_norms_and_small_checks():
    y = state()
    misc = [library.misc for library in LIBRARIES]
    close(*(m._compute_error_ratio(y / 9, 1e-3, 1e-4, y, 2 * y, m._rms_norm) for m in misc))
    close(*(m._mixed_norm((y, y[:1] * 3)) for m in misc))
    assert [m._mixed_norm(()) for m in misc] == [0.0, 0.0]
    assert [m._zero_norm(y) for m in misc] == [0.0, 0.0]
    shapes = [torch.Size([2]), torch.Size([]), torch.Size([1, 2])]
    flat = torch.arange(10.0).reshape(2, 5)
    close(*(m._flat_to_shape(flat, (2,), shapes) for m in misc))
    close(*(m._flat_to_shape(flat[0], (), shapes) for m in misc))
    assert [bool(m._decreasing(-y.sort().values)) for m in misc] == [True, True]
    for check, bad in (
        ("_assert_increasing", y),
        ("_assert_one_dimensional", y[None]),
        ("_assert_floating", torch.arange(3)),
    ):
        ours, peers = (outcome(partial(getattr(m, check), "t", bad)) for m in misc)
        assert ours == peers and isinstance(ours, tuple)
    for m in misc:
        with pytest.warns(UserWarning, match=r"Recorder: Unexpected arguments \{'a': 1\}"):
            m._handle_unused_kwargs(Recorder(field), {"a": 1})


def test_interpolant():
    y = state()
    values = (y, 2 * y, 1.4 * y, y - 1, y + 1, torch.tensor(0.3, dtype=torch.float64))
    fits = both(lambda library: library.interp._interp_fit(*values))
    for ours, peers in zip(*fits, strict=True):
        close(ours, peers)
    t = torch.tensor([0.2, 0.31, 0.5], dtype=torch.float64)
    close(*both(lambda library: library.interp._interp_evaluate(fits[0], t[0], t[2], t[1])))
    close(*both(lambda library: library.interp._interp_evaluate(fits[0], t[0], t[2], t[2])))
    ours, peers = both(
        lambda library: outcome(lambda: library.interp._interp_evaluate(fits[0], t[0], t[1], t[2]))
    )
    assert ours == peers


@pytest.mark.parametrize("perturb", [False, True])
@pytest.mark.parametrize("name", ["rk4_step_func", "rk4_alt_step_func", "rk3", "rk2"])
def test_step_functions(name, perturb):
    tables = {
        "rk3": [[0, 0, 0, 0], [0.3, 0.3, 0, 0], [0.6, 0.2, 0.4, 0], [0, 0.25, 0.1, 0.65]],
        "rk2": [[0, 0, 0], [0.7, 0.7, 0], [0, 0.4, 0.6]],
    }
    t0, t1 = torch.tensor([0.3, 0.5], dtype=torch.float64)

    def run(library):
        func = Recorder(field)
        keywords = {"perturb": perturb}
        step = name
        if name in tables:
            step, keywords = f"{name}_step_func", {**keywords, "butcher_tableu": tables[name]}
        wrapped = perturbed(library, func)
        dy = getattr(library.rk_common, step)(wrapped, t0, t1 - t0, t1, state(), **keywords)
        return torch.cat([torch.stack(func.times), dy])

    ours, peers = both(run)
    assert torch.equal(ours, peers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128])
@pytest.mark.parametrize("module", ["dopri5", "dopri8", "fehlberg2", "adaptive_heun"])
def test_runge_kutta_step(module, dtype):
    def run(library):
        solver = next(v for v in vars(getattr(library, module)).values() if hasattr(v, "mid"))
        table = solver.tableau
        table = library.rk_common._ButcherTableau(
            table.alpha.to(dtype), [b.to(dtype) for b in table.beta],
            table.c_sol.to(dtype), table.c_error.to(dtype),
        )  # fmt: skip
        t0, t1 = torch.tensor([0.3, 0.5], dtype=torch.float64)
        func, y0 = perturbed(library), state(dtype)
        f0 = func(t0, y0)
        return library.rk_common._runge_kutta_step(func, y0, f0, t0, t1 - t0, t1, tableau=table)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for ours, peers in zip(*both(run), strict=True):
            close(ours, peers, dtype if dtype == torch.float32 else torch.float64)


@pytest.mark.parametrize("side", ["NONE", "PREV", "NEXT"])
def test_perturbed_time_keeps_its_gradient(side):
    for start in (0.0, 0.7, -3.0, 1e17):

        def run(library, start=start):
            t = torch.tensor(start, dtype=torch.float64, requires_grad=True)
            func = library.misc._PerturbFunc(lambda t, y: t * y)
            y = func(t, state(torch.float32), perturb=getattr(library.misc.Perturb, side)).sum()
            return torch.stack([y.detach(), torch.autograd.grad(y, t)[0].float()])

        ours, peers = both(run)
        assert torch.equal(ours, peers)
    ours, peers = both(lambda library: outcome(lambda: perturbed(library)(0.1, state(), perturb=1)))
    assert ours == peers


def test_events():
    def run(library):
        handling = library.event_handling
        y0, times = state(), torch.tensor([0.2, 0.9], dtype=torch.float64)
        combined = handling.combine_event_functions(
            lambda t, y: torch.stack([t - 0.75, y[0] - 9]), times[0], y0
        )
        sign = torch.sign(combined(times[0], y0))
        return torch.cat(
            [
                x.reshape(-1)
                for x in handling.find_event(lambda t: y0 * t, sign, *times, combined, 1e-9)
            ]
        )

    close(*both(run))


# --- checked arguments, and solvers made by hand ----------------------------------------------


def checked(library, problem, dtype, method, **options):
    """A problem after `_check_inputs`, with the record of its field."""
    func, y0, t = PROBLEMS[problem](dtype)
    recorder = Recorder(func)
    found = library.misc._check_inputs(
        recorder, clone_state(y0), t.double(), 1e-5, 1e-6, method, options, None, library.SOLVERS
    )
    return recorder, found


@pytest.mark.parametrize("problem", ["pulse", "driven_pendulum", "lotka_volterra_backwards"])
def test_checked_arguments(problem):
    def run(library):
        recorder, found = checked(library, problem, torch.float64, "rk4", interp="cubic")
        shapes, func, y0, t, rtol, atol, method, options, event_fn, reversed_ = found
        assert event_fn is None
        value = func(t[1], y0, perturb=library.misc.Perturb.NEXT)
        numbers = torch.cat(
            [value.reshape(-1), y0.reshape(-1), t, options.pop("norm")(3 * y0)[None]]
        )
        return (
            numbers,
            torch.stack(recorder.times),
            (shapes, rtol, atol, method, options, reversed_),
        )

    ours, peers = both(run)
    close(ours[0], peers[0])
    assert torch.equal(ours[1], peers[1])
    assert ours[2] == peers[2]


def test_checked_callbacks_and_event_function():
    def run(library):
        func, y0, t = PROBLEMS["driven_pendulum"](torch.float64)
        seen = []
        recorder = Recorder(func)
        recorder.callback_step = lambda t, y, dt: seen.append((float(t), len(y), float(dt)))
        recorder.callback_step_adjoint = len
        found = library.misc._check_inputs(
            recorder, y0, t[:2].double().flip(0), (1e-3,) * 3, 1e-6, None, None,
            lambda t, y: y[0].sum() - t, library.SOLVERS,
        )  # fmt: skip
        wrapped, flat, s, event_fn = found[1], found[2], found[3], found[8]
        wrapped.callback_step(s[0], flat, s[1] - s[0])
        wrapped.callback_accept_step(s[0], flat, s[1])
        assert wrapped.callback_step_adjoint is len
        return seen, found[4].tolist(), float(event_fn(s[1], flat)), found[9]

    ours, peers = both(run)
    assert ours == peers
    assert ours[3] is True


def test_wrong_arguments_get_the_peers_errors():
    y0, t = state(), torch.tensor([0.0, 1.0])
    for arguments in (
        (field, [y0], t, 1e-3, 1e-3, None, None, None),
        (field, y0, t, 1e-3, 1e-3, None, None, lambda t, y: y),
        (field, y0, torch.tensor([0, 1]), 1e-3, 1e-3, None, None, None),
        (field, y0, torch.tensor([0.0, 1.0, 0.5]), 1e-3, 1e-3, None, None, None),
        (field, y0, torch.tensor([0.0, 1.0, 2.0]), 1e-3, 1e-3, None, None, lambda t, y: y),
        (field, (y0, y0), t, (1e-3,), 1e-3, None, None, None),
    ):
        ours, peers = both(
            lambda library, given=arguments: outcome(
                lambda: library.misc._check_inputs(*given, library.SOLVERS)[:1]
            )
        )
        assert ours == peers


METHODS = ["dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun", "euler", "midpoint", "heun2"]
METHODS += ["heun3", "rk4", "explicit_adams", "implicit_adams", "scipy_solver"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("problem", ["pulse", "driven_pendulum", "lotka_volterra_backwards"])
@pytest.mark.parametrize("method", METHODS)
def test_solvers_made_by_hand(method, problem, dtype):
    def run(library):
        recorder, found = checked(library, problem, dtype, method)
        func, y0, t, rtol, atol, _, options = found[1:8]
        ys = library.SOLVERS[method](func=func, y0=y0, rtol=rtol, atol=atol, **options).integrate(t)
        return ys, len(recorder.times)

    (ours, mine_calls), (peers, their_calls) = both(run)
    if dtype == torch.float64:
        assert mine_calls == their_calls
        assert_close(ours, peers, *((2e-6, 2e-6) if method == "dopri8" else (1e-9, 1e-10)))
    else:
        assert abs(mine_calls - their_calls) <= max(26, 0.03 * their_calls)
        assert_close(ours, peers, 1e-3, 1e-4)


def test_a_solver_made_by_hand_runs_compiled_and_keeps_its_gradient(monkeypatch):
    def run(library):
        y0 = state().requires_grad_()
        solver = library.dopri5.Dopri5Solver(
            func=library.odeint._check_inputs(field, y0, torch.tensor([0.0, 1.0]), 1e-6, 1e-6,
                                              None, None, None, library.SOLVERS)[1]
            if library is PEER else perturbed(library),
            y0=y0, rtol=1e-6, atol=1e-6, norm=library.misc._rms_norm,
        )  # fmt: skip
        ys = solver.integrate(torch.tensor([0.0, 1.0], dtype=torch.float64))
        return torch.cat([ys[-1].detach(), *torch.autograd.grad(ys[-1].sum(), y0)])

    used = spy(monkeypatch, adaptive.AdaptiveSolver)
    close(*both(run))
    assert len(used) == 1


def spy(monkeypatch, solver):
    """The names under which pycnf's solver is constructed from now on."""
    used = []
    construct = solver.__init__

    def counted(self, problem, tableau, name, *rest, **keywords):
        used.append(name)
        construct(self, problem, tableau, name, *rest, **keywords)

    monkeypatch.setattr(solver, "__init__", counted)
    return used


def test_strided_states_and_descending_times_by_hand():
    y0 = torch.arange(12.0, dtype=torch.float64).reshape(3, 4).T
    t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)

    def solver(library, name):
        func = library.misc._check_inputs(
            lambda t, y: -y * t, y0, t, 1e-6, 1e-6, None, None, None, library.SOLVERS
        )[1]
        return library.SOLVERS[name](
            func=func, y0=y0, rtol=1e-6, atol=1e-6, norm=library.misc._rms_norm
        )

    for name in ("dopri5", "rk4"):
        close(*both(lambda library, name=name: solver(library, name).integrate(t)))
    with pytest.raises(AssertionError, match="strictly increasing"):
        solver(MINE, "dopri5").integrate(t.flip(0))


@pytest.mark.parametrize("module", ["dopri5", "bosh3", "dopri8", "fehlberg2"])
def test_single_steps_are_the_peers(module):
    """A driver that takes a number of steps, whatever the time, as samplers of energies do."""

    def run(library):
        cls = next(v for v in vars(getattr(library, module)).values() if hasattr(v, "mid"))
        recorder, found = checked(library, "pulse", torch.float64, None)
        t = torch.tensor([0.0], dtype=torch.float64)
        solver = cls(
            func=found[1], y0=found[2], rtol=1e-5, atol=1e-6, norm=library.misc._rms_norm,
            jump_t=[1.0], step_t=torch.tensor([0.1, 0.2], dtype=torch.float64),
        )  # fmt: skip
        solver._before_integrate(t)
        rows = []
        for _ in range(25):
            solver.rk_state = solver._adaptive_step(solver.rk_state)
            now = solver.rk_state
            numbers = [*now.interp_coeff, now.y1, now.f1, *(x[None] for x in now[2:5])]
            rows.append(torch.cat(numbers))
        target = solver.rk_state.t1 * 1.0001
        return torch.stack(rows), solver._advance(target), torch.stack(recorder.times)

    for ours, peers in zip(*both(run), strict=True):
        assert_close(ours, peers, 1e-6, 1e-6)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("bosh3", {}),
        ("rk4", {"step_size": 0.05}),
        ("euler", {"step_size": 0.05, "interp": "cubic"}),
    ],
)
def test_events_of_solvers_made_by_hand(method, options):
    def run(library):
        _, found = checked(library, "pulse", torch.float64, method, **options)
        solver = library.SOLVERS[method](
            func=found[1], y0=found[2], rtol=found[4], atol=found[5], **found[7]
        )
        event_t, ys = solver.integrate_until_event(found[3][0], lambda t, y: y[0] - 1.5)
        return torch.cat([event_t.reshape(-1), ys.reshape(-1)])

    close(*both(run))


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("method", ["mine", "dopri5", "rk4"])
@pytest.mark.parametrize("own", ["ralston", "cash_karp", "watching"])
def test_events_of_own_solvers(own, method, descending):
    make, options = OWN[own]

    def run(library):
        found = []
        with registered(library, "mine", make(library)):
            for name in ("odeint", "odeint_adjoint"):
                y0 = torch.tensor([1.0, 0.5], dtype=torch.float64, requires_grad=True)
                t0 = torch.tensor(0.3, dtype=torch.float64)
                keywords = {} if name == "odeint" else {"adjoint_params": ()}
                event_t, (ys, work) = library.top.odeint_event(
                    lambda t, s: (torch.cos(t) * s[0], s[0].sum()), (y0, t0 * 0), t0,
                    event_fn=lambda t, s: torch.stack([s[1].abs() - 1.2, s[0][0] - 9]),
                    reverse_time=descending, odeint_interface=getattr(library.top, name),
                    method=method, options={"step_size": 0.05} if method == "rk4" else (
                        options if method == "mine" else {}), rtol=1e-7, atol=1e-8, **keywords,
                )  # fmt: skip
                (grad,) = torch.autograd.grad(event_t + ys[-1].sum(), y0)
                found += [event_t.detach(), ys.detach(), work.detach(), grad]
        return found

    for ours, peers in zip(*both(run), strict=True):
        assert_close(ours, peers, 1e-6, 1e-7)


def test_dense_output_is_pycnfs():
    assert MINE.top.odeint_dense is pycnf.odeint_dense is MINE.odeint.odeint_dense
    assert MINE.top.odeint_event is pycnf.odeint_event is MINE.odeint.odeint_event
    y0, t = state(), torch.tensor([0.0, 2.0], dtype=torch.float64)
    dense = both(lambda library: library.top.odeint_dense(field, y0, *t, rtol=1e-6))
    close(*(solution(t[1] * 0.37) for solution in dense))


# --- classes of the user's ------------------------------------------------------------------------


def shooting_ralston(library):
    """A fixed-grid method of one's own."""
    Perturb = library.misc.Perturb

    class Ralston(library.solvers.FixedGridODESolver):
        order = 2

        def _step_func(self, func, t0, dt, t1, y0):
            f0 = func(t0, y0, perturb=Perturb.NEXT if self.perturb else Perturb.NONE)
            f1 = func(t0 + 2 / 3 * dt, y0 + 2 / 3 * dt * f0)
            return dt * (f0 / 4 + 3 / 4 * f1), f0

    return Ralston


def cash_karp(library):
    """An adaptive method of one's own, by its tableau only."""

    def numbers(*values):
        return torch.tensor(values, dtype=torch.float64)

    class CashKarp(library.rk_common.RKAdaptiveStepsizeODESolver):
        order = 5
        tableau = library.rk_common._ButcherTableau(
            alpha=numbers(1 / 5, 3 / 10, 3 / 5, 1, 7 / 8),
            beta=[
                numbers(1 / 5),
                numbers(3 / 40, 9 / 40),
                numbers(3 / 10, -9 / 10, 6 / 5),
                numbers(-11 / 54, 5 / 2, -70 / 27, 35 / 27),
                numbers(1631 / 55296, 175 / 512, 575 / 13824, 44275 / 110592, 253 / 4096),
            ],
            c_sol=numbers(37 / 378, 0, 250 / 621, 125 / 594, 0, 512 / 1771),
            c_error=numbers(
                37 / 378 - 2825 / 27648, 0, 250 / 621 - 18575 / 48384,
                125 / 594 - 13525 / 55296, -277 / 14336, 512 / 1771 - 1 / 4,
            ),
        )  # fmt: skip
        mid = numbers(0.1, 0, 0.2, 0.15, 0, 0.05)

    return CashKarp


def foreign(library):
    """A solver that shares nothing with torchdiffeq's but the protocol."""

    class Foreign:
        def __init__(self, func, y0, rtol, atol, substeps=3, norm=None, **unused):
            library.misc._handle_unused_kwargs(self, unused)
            self.func, self.y0, self.substeps = func, y0, substeps

        @classmethod
        def valid_callbacks(cls):
            return {"callback_step"}

        def integrate(self, t):
            ys = [self.y0]
            for t0, t1 in pairwise(t):
                y, h = ys[-1], (t1 - t0) / self.substeps
                for i in range(self.substeps):
                    self.func.callback_step(t0 + i * h, y, h)
                    y = y + h * self.func(t0 + i * h, y)
                ys.append(y.to(self.y0.dtype))
            return torch.stack(ys)

    return Foreign


def clamped_euler(library):
    """A subclass of a method of the library that replaces its loop."""

    class ClampedEuler(library.fixed_grid.Euler):
        def __init__(self, func, y0, ceiling=1.2, **keywords):
            super().__init__(func=func, y0=y0, **keywords)
            self.ceiling = ceiling

        def integrate(self, t):
            grid = self.grid_constructor(self.func, self.y0, t)
            ys, y0 = [self.y0], self.y0
            for t0, t1 in pairwise(grid):
                dy, _ = self._step_func(self.func, t0, t1 - t0, t1, y0)
                y1 = (y0 + dy).clamp(max=self.ceiling)
                while len(ys) < len(t) and t1 >= t[len(ys)]:
                    ys.append(self._linear_interp(t0, t1, y0, y1, t[len(ys)]))
                y0 = y1
            return torch.stack(ys)

    return ClampedEuler


def watching_dopri5(library):
    """A subclass that replaces how it advances, and looks at every step."""

    class Watching(library.dopri5.Dopri5Solver):
        seen = ()

        def _advance(self, next_t):
            while next_t > self.rk_state.t1:
                self.rk_state = self._adaptive_step(self.rk_state)
                type(self).seen += (float(self.rk_state.t1),)
            state = self.rk_state
            return library.interp._interp_evaluate(state.interp_coeff, state.t0, state.t1, next_t)

    return Watching


OWN = {
    "ralston": (shooting_ralston, {"step_size": 0.07}),
    "ralston_cubic": (shooting_ralston, {"step_size": 0.3, "interp": "cubic", "perturb": True}),
    "cash_karp": (cash_karp, {}),
    "cash_karp_options": (cash_karp, {"max_step": 0.1, "safety": 0.8, "dtype": torch.float32}),
    "foreign": (foreign, {"substeps": 2}),
    "clamped": (clamped_euler, {"step_size": 0.1, "ceiling": 0.9}),
    "watching": (watching_dopri5, {}),
    "grid": (
        shooting_ralston,
        {"grid_constructor": lambda f, y, t: torch.linspace(t[0].item(), t[-1].item(), 9).to(t)},
    ),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("problem", ["pulse", "driven_pendulum", "lotka_volterra_backwards"])
@pytest.mark.parametrize("own", OWN)
def test_own_solvers_run_through_odeint(own, problem, dtype):
    make, options = OWN[own]

    def run(library):
        func, y0, t = PROBLEMS[problem](dtype)
        recorder, steps = Recorder(func), []
        recorder.callback_step = lambda t, y, dt: steps.append((float(t), float(dt)))
        with registered(library, "mine", make(library)):
            ys = library.top.odeint(
                recorder, clone_state(y0), t.double(), rtol=1e-5, atol=1e-6, method="mine",
                options=options,
            )  # fmt: skip
        return ys, len(recorder.times), torch.tensor(steps, dtype=torch.float64)

    ours, peers = both(run)
    if dtype == torch.float64:
        assert ours[1] == peers[1]
        # The times of a step control in f32 follow its rounding.
        loose = "dtype" in options
        assert_close(ours[0], peers[0], *((1e-5, 1e-6) if loose else (1e-9, 1e-10)))
        assert_close(ours[2], peers[2], *((1e-3, 1e-4) if loose else (1e-6, 1e-6)))
    else:
        assert abs(ours[1] - peers[1]) <= max(26, 0.03 * peers[1])
        assert_close(ours[0], peers[0], 1e-3, 1e-4)


@pytest.mark.parametrize("problem", ["mlp"])
@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("own", ["ralston", "cash_karp", "foreign", "watching"])
def test_own_solvers_have_the_peers_gradients(own, descending, problem):
    make, options = OWN[own]

    def gradients(library, solver, adjoint):
        func, y0, t = PROBLEMS[problem](torch.float64)
        t = t.double().flip(0) if descending else t.double()
        y0.requires_grad_()
        ys = solver(func, y0, t, rtol=1e-6, atol=1e-7, method="mine", options=options, **adjoint)
        return torch.autograd.grad(ys.pow(2).sum(), [y0, *func.parameters()])

    for name, adjoint in (
        ("odeint", {}),
        ("odeint_adjoint", {}),
        ("odeint_adjoint", {"adjoint_method": "dopri5", "adjoint_options": {"norm": "seminorm"}}),
    ):

        def run(library, name=name, adjoint=adjoint):
            with registered(library, "mine", make(library)):
                return gradients(library, getattr(library.top, name), adjoint)

        for ours, peers in zip(*both(run), strict=True):
            assert_close(ours, peers, 1e-7, 1e-8)


def test_an_own_tableau_runs_on_pycnfs_stepper(monkeypatch):
    used = spy(monkeypatch, adaptive.AdaptiveSolver)
    func, y0, t = PROBLEMS["pulse"](torch.float64)
    with registered(MINE, "mine", cash_karp(MINE)):
        pycnf.odeint(func, y0, t, method="mine")
    assert used == ["CashKarp"]
    with registered(MINE, "mine", type("Mine", (MINE.fixed_grid.RK4,), {})):
        used = spy(monkeypatch, fixed_grid.FixedGridSolver)
        pycnf.odeint(func, y0, t, method="mine")
    assert used == ["Mine"]
    with registered(MINE, "mine", watching_dopri5(MINE)):
        pycnf.odeint(func, y0, t, method="mine")
        assert used == ["Mine"] and len(MINE.SOLVERS["mine"].seen) > 5


def test_exact_gradients_of_own_solvers():
    func, y0, t = PROBLEMS["mlp"](torch.float64)
    t = t.double()
    y0.requires_grad_()
    found = []
    for name, make in (("ck", cash_karp), ("rk", lambda library: library.fixed_grid.RK4)):
        options = {"first_step": 0.05} if name == "ck" else {}
        with registered(MINE, name, make(MINE)):
            for gradient in (
                lambda **k: pycnf.odeint(func, y0, t, **k),
                lambda **k: pycnf.odeint_adjoint(func, y0, t, gradient="discrete", **k),
            ):
                ys = gradient(method=name, options=options)
                found.append(torch.autograd.grad(ys.pow(2).sum(), y0)[0])
    close(*found[:2])
    close(*found[2:])
    with (
        registered(MINE, "mine", shooting_ralston(MINE)),
        pytest.raises(ValueError, match=r'"mine" takes steps of its own.*"continuous"'),
    ):
        pycnf.odeint_adjoint(func, y0, t, method="mine", gradient="discrete")


def test_an_own_norm_and_field_of_a_subclass_are_used():
    def run(library):
        class Doubled(library.dopri5.Dopri5Solver):
            def __init__(self, func, y0, **keywords):
                super().__init__(lambda t, y, **side: 2 * func(t, y, **side), y0, **keywords)
                self.func.callback_step = self.func.callback_accept_step = func.callback_step
                self.func.callback_reject_step = func.callback_step

        class Largest(library.dopri5.Dopri5Solver):
            def __init__(self, func, y0, **keywords):
                super().__init__(func, y0, **keywords)
                self.norm = library.misc._linf_norm

        found = []
        for solver in (Doubled, Largest):
            recorder = Recorder(PROBLEMS["driven_pendulum"](torch.float64)[0])
            _, y0, t = PROBLEMS["driven_pendulum"](torch.float64)
            with registered(library, "mine", solver):
                ys = library.top.odeint(recorder, y0, t.double(), rtol=1e-4, method="mine")
            found += [*ys, torch.tensor(len(recorder.times))]
        return found

    for ours, peers in zip(*both(run), strict=True):
        close(ours, peers)


def test_the_table_is_a_dict_that_odeint_sees():
    solvers, cls = MINE.SOLVERS, shooting_ralston(MINE)
    before = dict(solvers)
    func, y0, t = PROBLEMS["pulse"](torch.float64)

    def known(name):
        return name in solve.SOLVERS and name in solvers

    solvers.update({"a": cls}, b=cls)
    solvers |= {"c": cls}
    assert solvers is MINE.SOLVERS
    assert solvers.setdefault("d", cls) is cls and solvers.setdefault("a", 1) is cls
    assert all(known(name) for name in "abcd")
    assert solvers.pop("a") is cls and solvers.pop("a", None) is None
    del solvers["b"]
    assert solvers.popitem()[1] is cls and solvers.popitem()[1] is cls
    assert dict(solvers) == before and isinstance(solvers, dict)
    assert list(solve.SOLVERS) == list(before)
    assert type(solvers | {"e": cls}) is dict and not known("e")
    with pytest.raises(ValueError, match='Invalid method "a"'):
        pycnf.odeint(func, y0, t, method="a")
    with registered(MINE, "rk4", cls):
        replaced = pycnf.odeint(func, y0, t, method="rk4")
    assert isinstance(solve.SOLVERS["rk4"], solve.Method)
    original = pycnf.odeint(func, y0, t, method="rk4")
    assert not torch.allclose(replaced, original, rtol=1e-4)
    with registered(MINE, "mine", cls):
        assert torch.equal(replaced, pycnf.odeint(func, y0, t, method="mine"))


def test_wrong_options_of_own_solvers_warn_and_callbacks_are_checked():
    def run(library):
        func, y0, t = PROBLEMS["pulse"](torch.float64)
        recorder = Recorder(func)
        recorder.callback_accept_step = print
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for make in (shooting_ralston, cash_karp, foreign):
                with registered(library, "mine", make(library)):
                    library.top.odeint(
                        Recorder(func) if make is cash_karp else recorder, y0, t, rtol=1e-3,
                        method="mine", options={"nix": 3},
                    )  # fmt: skip
        return [str(w.message) for w in caught]

    ours, peers = both(run)
    assert ours == peers and len(ours) == 5


# --- replaced parts -------------------------------------------------------------------------------


def steps_taken(library, method="dopri5"):
    func, y0, t = PROBLEMS["pulse"](torch.float64)
    recorder = Recorder(func)
    library.top.odeint(recorder, y0, t.double(), rtol=1e-5, method=method)
    return len(recorder.times)


def test_replaced_methods_are_called_and_then_put_back(monkeypatch):
    def run(library):
        calls = []
        original = library.dopri5.Dopri5Solver._adaptive_step

        def logged(self, state):
            calls.append(float(state.t1))
            return original(self, state)

        with monkeypatch.context() as patch:
            patch.setattr(library.dopri5.Dopri5Solver, "_adaptive_step", logged)
            taken = steps_taken(library)
        return len(calls), taken

    ours, peers = both(run)
    assert ours == peers and ours[0] > 10
    assert isinstance(solve.SOLVERS["dopri5"], solve.Method)

    def fixed(library):
        with monkeypatch.context() as patch:
            patch.setattr(
                library.fixed_grid.Euler, "_step_func", lambda self, f, t0, dt, t1, y: (dt * y, y)
            )
            return library.top.odeint(field, state(), torch.tensor([0.0, 1.0]), method="euler")

    ours, peers = both(fixed)
    close(ours, peers)
    assert torch.equal(ours[1], 2 * ours[0])


def test_replaced_functions_and_constants_are_used(monkeypatch):
    def run(library):
        calls = []
        original = library.rk_common._optimal_step_size
        with monkeypatch.context() as patch:
            patch.setattr(
                library.rk_common,
                "_optimal_step_size",
                lambda *a, **k: calls.append(1) or original(*a, **k) * 0.7,
            )
            taken = steps_taken(library)
        with monkeypatch.context() as patch:
            patch.setattr(library.dopri5.Dopri5Solver, "order", 3)
            other = steps_taken(library)
        return len(calls), taken, other, steps_taken(library)

    ours, peers = both(run)
    assert ours == peers and len(set(ours)) == 4
    assert all(isinstance(method, solve.Method) for method in solve.SOLVERS.values())


def test_replaced_methods_of_an_instance_are_used():
    def run(library):
        _, found = checked(library, "pulse", torch.float64, None)
        calls = []
        for cls, name in (
            (library.dopri5.Dopri5Solver, "_interp_fit"),
            (library.fixed_grid.RK4, "_step_func"),
        ):
            solver = cls(
                func=found[1], y0=found[2], rtol=1e-5, atol=1e-6, norm=library.misc._rms_norm
            ) if name == "_interp_fit" else cls(found[1], found[2], atol=0)  # fmt: skip
            original = getattr(solver, name)
            setattr(solver, name, lambda *a, call=original: calls.append(1) or call(*a))
            solver.integrate(found[3])
        return len(calls)

    ours, peers = both(run)
    assert ours == peers > 10


def test_an_own_driver_of_the_adjoint_method():
    """Code that copies odeint_adjoint's body and subclasses its autograd function."""

    def run(library):
        adjoint = library.adjoint

        class Ends(adjoint.OdeintAdjointMethod):
            used = 0

            @staticmethod
            def forward(ctx, *arguments):
                Ends.used += 1
                return adjoint.OdeintAdjointMethod.forward(ctx, *arguments)

        grads = []
        for norm, problem, times in (
            ({}, "mlp", True),
            ({"norm": "seminorm"}, "mlp", False),
            ({"norm": lambda parts: max(p.abs().max() for p in parts if p.numel())}, "mlp", True),
        ):
            func, y0, t = PROBLEMS[problem](torch.float64)
            t = t.double().requires_grad_(times)
            y0 = (y0.requires_grad_(), y0.detach()[:, 0].sum())
            pair = pair_of(func)
            shapes, wrapped, flat, s, rtol, atol, method, options, event, _ = (
                library.misc._check_inputs(
                    pair, y0, t.flip(0), 1e-6, 1e-7, None, None, None, library.SOLVERS
                )
            )
            backward = dict(norm)
            adjoint.handle_adjoint_norm_(backward, shapes, options["norm"])
            params = adjoint.find_parameters(func)
            assert isinstance(params, list)
            ys = Ends.apply(
                shapes, wrapped, flat, s, rtol, atol, method, options, event, 1e-6, 1e-7, "dopri5",
                backward, times, *params,
            )  # fmt: skip
            parts = library.misc._flat_to_shape(ys, (len(s),), shapes)
            wanted = [y0[0], *params, *([t] if times else [])]
            grads += torch.autograd.grad(sum(p.pow(2).sum() for p in parts), wanted)
        assert Ends.used == 3
        return grads

    for ours, peers in zip(*both(run), strict=True):
        assert_close(ours, peers, 1e-6, 1e-7)


def pair_of(func):
    class Pair(torch.nn.Module):
        def forward(self, t, parts):
            slope = func(t, parts[0])
            return slope, slope.pow(2).sum()

    return Pair()


def test_an_own_driver_of_the_adjoint_method_up_to_an_event():
    def run(library):
        func, y0, t = PROBLEMS["mlp"](torch.float64)
        y0.requires_grad_()
        t = t[:2].double().requires_grad_()
        _, wrapped, flat, s, rtol, atol, method, options, event, _ = library.misc._check_inputs(
            func,
            y0,
            t,
            1e-6,
            1e-7,
            None,
            None,
            lambda t, y: t - 0.4 + y[0, 0] / 100,
            library.SOLVERS,
        )
        params = library.adjoint.find_parameters(func)
        event_t, ys = library.adjoint.OdeintAdjointMethod.apply(
            None, wrapped, flat, s, rtol, atol, method, options, event, 1e-6, 1e-7, "dopri5", {},
            True, *params,
        )  # fmt: skip
        return [event_t.detach(), *torch.autograd.grad(ys.pow(2).sum(), [y0, t, *params])]

    for ours, peers in zip(*both(run), strict=True):
        assert_close(ours, peers, 1e-6, 1e-7)


def test_the_adjoint_method_is_not_differentiated_twice():
    y0 = state().requires_grad_()
    _, func, flat, t, *_ = MINE.misc._check_inputs(
        lambda t, y: y**2, y0, torch.tensor([0.0, 0.1]), 1e-6, 1e-6, None, None, None, MINE.SOLVERS
    )
    ys = MINE.adjoint.OdeintAdjointMethod.apply(
        None, func, flat, t, 1e-6, 1e-6, "dopri5", {}, None, 1e-6, 1e-6, "dopri5", {}, False
    )
    (grad,) = torch.autograd.grad(ys[-1].sum(), y0, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        grad.sum().backward()


def test_norms_of_the_stand_in_stay_compiled(monkeypatch):
    func, y0, t = PROBLEMS["pulse"](torch.float64)
    slow = []
    original = adaptive.AdaptiveSolver._initial_step_by_tensors
    monkeypatch.setattr(
        adaptive.AdaptiveSolver,
        "_initial_step_by_tensors",
        lambda self, f0: slow.append(1) or original(self, f0),
    )
    options = [{"norm": norm} for norm in (MINE.misc._rms_norm, MINE.misc._linf_norm)]
    with torch.no_grad():
        expected = pycnf.odeint(func, y0, t)
        ours = pycnf.odeint(func, y0, t, method="dopri5", options=options[0])
        assert torch.equal(ours, expected) and not slow
        pycnf.odeint(func, y0, t, method="dopri5", options=options[1])
        assert slow


def test_pickles():
    for thing in (MINE.top.odeint, MINE.dopri5.Dopri5Solver, MINE.misc.Perturb.NEXT):
        assert pickle.loads(pickle.dumps(thing)) is thing
    assert pickle.loads(pickle.dumps(MINE.misc._rms_norm))(state()) == MINE.misc._rms_norm(state())
