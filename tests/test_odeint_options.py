"""Options, norms, tolerances and callbacks of pycnf.odeint do what they do in torchdiffeq.

Every comparison also checks, on the reference, that the option matters on the chosen problem: an
option that changed nothing would make its test unable to fail.
"""

import functools
import warnings

import pytest
import torch
import torchdiffeq
from problems import (
    ADAPTIVE,
    FIXED,
    FIXED_STAGES,
    METHODS,
    PROBLEMS,
    STAGES,
    TOLERANCE,
    MLPField,
    Recorder,
    assert_close,
    assert_same_calls,
    assert_same_outcome,
    assert_same_run,
    clone_state,
    driven_pendulum,
    flat,
    outcome,
    pulse,
    record,
    solve,
    value_tolerance,
)

import pycnf

F32, F64 = torch.float32, torch.float64
COARSE = {**TOLERANCE[F32], "bosh3": 1e-3, "fehlberg2": 1e-4, "adaptive_heun": 5e-3}
REPRESENTATIVE = ("dopri5", "dopri8", "bosh3", "adaptive_heun")


def both(*arguments, **keywords):
    return solve(pycnf, *arguments, **keywords), solve(torchdiffeq, *arguments, **keywords)


def both_record(*arguments, **keywords):
    return record(pycnf, *arguments, **keywords), record(torchdiffeq, *arguments, **keywords)


def times_of(run):
    return torch.stack(run.times).tolist()


@functools.cache
def default_times(problem, method, tol):
    """When torchdiffeq calls the field without options, to see that an option matters."""
    return times_of(solve(torchdiffeq, problem, method, rtol=tol, atol=tol))


def double(*values):
    return torch.tensor(values, dtype=F64)


# --- adaptive options -------------------------------------------------------------------------

ADAPTIVE_OPTIONS = {
    "first_step": {"first_step": 0.03},
    "first_step as a tensor": {"first_step": double(0.03)[0]},
    "first_step as an f32 tensor": {"first_step": torch.tensor(0.03)},
    "first_step far too large": {"first_step": 50.0},
    "first_step as an int": {"first_step": 1},
    "safety": {"safety": 0.6},
    "ifactor": {"ifactor": 1.3},
    "dfactor": {"dfactor": 0.75},
    "dfactor as a tensor": {"dfactor": double(0.75)[0]},
    "min_step": {"min_step": 0.3},
    "max_step": {"max_step": 0.04},
    "min_step and max_step": {"min_step": 0.02, "max_step": 0.04},
    "step_t": {"step_t": double(0.1, 0.55, 1.0, 2.0)},
    "step_t unsorted, some before t0 and after the end": {"step_t": double(2.0, -1.0, 0.3, 9.0)},
    "jump_t": {"jump_t": double(0.25, 1.3, 2.5)},
    "jump_t as a list": {"jump_t": [0.25, 1.3, 2.5]},
    "step_t and jump_t": {"step_t": double(0.4, 1.9), "jump_t": double(0.8, 1.3)},
    "a norm": {"norm": lambda y: y.abs().max()},
    "a norm of some elements": {"norm": lambda y: y[:2].abs().sum()},
}


@pytest.mark.parametrize("options", ADAPTIVE_OPTIONS.values(), ids=ADAPTIVE_OPTIONS)
@pytest.mark.parametrize("method", ADAPTIVE)
def test_adaptive_options(method, options):
    """The same calls with the option, and on the reference another number of them without it."""
    tol = COARSE[method]
    mine, theirs = both(pulse, method, rtol=tol, atol=tol, options=options)
    assert times_of(theirs) != default_times(pulse, method, tol), "this option does nothing here"
    assert_same_run(mine, theirs, method, "first_step" in options)
    assert not mine.warnings


@pytest.mark.parametrize("method", REPRESENTATIVE)
def test_options_are_not_modified(method):
    """torchdiffeq copies the dict before it adds the norm or negates times."""
    options = {"step_t": double(0.5), "max_step": 1.0}
    before = dict(options)
    field, y0, t = driven_pendulum(F64)
    pycnf.odeint(field, y0, t.flip(0), method=method, rtol=1e-3, atol=1e-3, options=options)
    assert options == before
    assert options["step_t"].tolist() == [0.5]


@pytest.mark.parametrize("y_dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("method", ADAPTIVE)
def test_time_dtype_option(method, y_dtype):
    """dtype=float32 keeps times in f32 (but never below y's dtype): callbacks see which."""

    def run(library):
        seen = set()

        def field(t, y):
            return torch.cos(3 * t) * y

        class Field:
            def __call__(self, t, y):
                return field(t, y)

            def callback_step(self, t0, y0, dt):
                seen.add((t0.dtype, dt.dtype))

        y0, t = torch.tensor([1.0, -0.5], dtype=y_dtype), torch.linspace(0, 2, 5, dtype=F64)
        options = {"dtype": torch.float32}
        keywords = {"method": method, "rtol": 1e-3, "atol": 1e-3, "options": options}
        return library.odeint(Field(), y0, t, **keywords), seen

    (mine, my_types), (theirs, their_types) = run(pycnf), run(torchdiffeq)
    assert my_types == their_types == {(y_dtype, y_dtype)}
    small = value_tolerance(method) if y_dtype == F64 else (1e-3, 2e-3)
    assert_close(mine, theirs, *small)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("method", ADAPTIVE)
def test_max_num_steps_is_per_output_interval(method, reverse):
    """Counted anew for each output; the message has the count twice; no message one step later."""
    field, y0, _ = pulse(F64)
    t = double(3.0, 1.5, 0.0) if reverse else double(0.0, 1.5, 3.0)
    if reverse:
        y0 = y0 * 0.01
    tol = max(TOLERANCE[F64][method], 1e-4)

    keywords = {"method": method, "rtol": tol, "atol": tol}

    def run(library, limit):
        options = {"max_num_steps": limit}
        return outcome(lambda: library.odeint(field, y0, t, options=options, **keywords))

    first = record(torchdiffeq, field, y0, t[:2], **keywords).attempts
    second = record(torchdiffeq, field, y0, t, **keywords).attempts - first
    limit = max(first, second)
    assert second > 1, "a total limit would pass as well"
    assert_close(run(pycnf, limit), run(torchdiffeq, limit), *value_tolerance(method))
    text = f"max_num_steps exceeded ({limit - 1}>={limit - 1})"
    assert run(pycnf, limit - 1) == run(torchdiffeq, limit - 1) == (AssertionError, text)


@pytest.mark.parametrize("method", ADAPTIVE)
def test_zero_max_num_steps(method):
    field, y0, t = pulse(F64)
    for library in (torchdiffeq, pycnf):
        with pytest.raises(AssertionError, match=r"^max_num_steps exceeded \(0>=0\)$"):
            library.odeint(field, y0, t, method=method, options={"max_num_steps": 0})


# --- prescribed times -------------------------------------------------------------------------


def saw(t, y):
    """Piecewise in time, with jumps at 0.5 and 1.25."""
    kick = 3.0 * (t >= 0.5) - 5.0 * (t >= 1.25)
    return kick - y


@pytest.mark.parametrize("name", ["step_t", "jump_t"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("method", ADAPTIVE)
def test_prescribed_times_of_a_piecewise_field(method, reverse, name):
    """Tensors are negated for descending time; jump_t costs one more evaluation per jump passed."""
    t = double(0.0, 0.2, 0.5, 1.0, 1.25, 2.0)
    t = t.flip(0) if reverse else t
    y0 = double(0.5, -1.0)
    keywords = {"method": method, "rtol": 1e-4, "atol": 1e-4}
    options = {name: double(1.25, 0.5)}
    mine, theirs = both_record(saw, y0, t, options=options, **keywords)
    assert theirs.nfe == 2 + STAGES[method] * theirs.attempts + (2 if name == "jump_t" else 0)
    assert_same_run(mine, theirs, method)
    if name == "jump_t":
        after = torch.nextafter(double(-0.5 if reverse else 0.5), double(9.0))
        assert (-after if reverse else after)[0] in mine.times


@pytest.mark.parametrize("name", ["step_t", "jump_t"])
@pytest.mark.parametrize("method", REPRESENTATIVE)
def test_lists_are_not_negated(method, name):
    """A list of times is left as it is for descending t (so it lies outside), unlike a tensor."""
    t, y0 = double(2.0, 1.0, 0.0), double(0.5, -1.0)
    keywords = {"method": method, "rtol": 1e-4, "atol": 1e-4}
    mine, theirs = both_record(saw, y0, t, options={name: [-0.5, -1.25]}, **keywords)
    as_tensor = record(torchdiffeq, saw, y0, t, options={name: double(0.5, 1.25)}, **keywords)
    assert times_of(theirs) == times_of(as_tensor)
    assert_same_run(mine, theirs, method)
    mine, theirs = both_record(saw, y0, t, options={name: [0.5, 1.25]}, **keywords)
    assert times_of(theirs) != times_of(as_tensor)
    assert_same_run(mine, theirs, method)


@pytest.mark.parametrize("name", ["step_t", "jump_t"])
@pytest.mark.parametrize("method", ADAPTIVE)
def test_step_that_lands_exactly_stalls_the_list(method, name):
    """A step that ends on a prescribed time by itself never advances the index; later ones drop."""
    h = 0.25
    options = {"first_step": h, "max_step": h, "min_step": h, name: double(0.5, 0.6, 0.8)}
    y0, t = double(1.0), double(0.0, 1.1)
    mine, theirs = both_record(saw, y0, t, method=method, options=options)
    without = record(torchdiffeq, saw, y0, t, method=method, options={**options, name: double()})
    assert times_of(theirs) == times_of(without), "the reference honoured the later times"
    assert torch.equal(torch.stack(mine.times), torch.stack(theirs.times))
    assert_close(mine.ys, theirs.ys, 1e-12, 1e-12)


@pytest.mark.parametrize("method", REPRESENTATIVE)
def test_prescribed_times_at_the_ends(method):
    """Times equal to t[0] and t[-1], and before t[0]."""
    y0, t = double(1.0, -1.0), double(0.5, 1.0, 2.0)
    for name in ("step_t", "jump_t"):
        for values in (double(0.5, 2.0), double(0.5), double(2.0), double(0.1), double(0.1, 0.7)):
            keywords = {"method": method, "rtol": 1e-3, "atol": 1e-3, "options": {name: values}}
            mine, theirs = both_record(saw, y0, t, **keywords)
            assert_same_run(mine, theirs, method)


@pytest.mark.parametrize("method", REPRESENTATIVE)
def test_step_t_and_jump_t_in_one_step(method):
    """Both lie within one step: jump_t is looked at after step_t clipped the step."""
    y0, t = double(1.0, -1.0), double(0.0, 2.0)
    for step_t, jump_t in ((0.7, 0.6), (0.6, 0.7)):
        options = {"first_step": 1.0, "step_t": double(step_t), "jump_t": double(jump_t)}
        mine, theirs = both_record(saw, y0, t, method=method, rtol=0.1, atol=0.1, options=options)
        assert_same_run(mine, theirs, method, first_step=True)


@pytest.mark.parametrize("method", REPRESENTATIVE)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_prescribed_times_in_f32(method, reverse, dtype):
    """Prescribed times given in f32 are cast to the time dtype; the state's f32 rounds t1."""
    y0, t = torch.tensor([1.0, -1.0]), double(0.0, 2.0)
    t = t.flip(0) if reverse else t
    options = {"first_step": 0.3, "max_step": 0.3, "min_step": 0.01}
    options["jump_t"] = torch.tensor([0.5, 1.25], dtype=dtype)
    options["step_t"] = torch.tensor([0.1, 1.7], dtype=dtype)
    mine, theirs = both_record(saw, y0, t, method=method, rtol=1.0, atol=1.0, options=options)
    assert_same_calls(mine, theirs, 1e-5, 1e-5)
    assert_close(mine.ys, theirs.ys, 1e-5, 1e-5)


# --- norms ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ADAPTIVE)
def test_norm_of_a_tuple_state_sees_the_tuple(method):
    """The norm gets the state's structure; the default is the largest of the parts' RMS."""

    def run(library, options):
        return solve(library, driven_pendulum, method, rtol=1e-4, atol=1e-4, options=options)

    def biggest(state):
        assert isinstance(state, tuple)
        assert [part.shape for part in state] == [(2, 3), (2, 3), ()]
        return max(part.abs().max() for part in state)

    mine, theirs = run(pycnf, {"norm": biggest}), run(torchdiffeq, {"norm": biggest})
    default = run(torchdiffeq, None)
    assert times_of(theirs) != times_of(default)
    assert_same_run(mine, theirs, method)

    def mixed(state):
        return max(part.abs().pow(2).mean().sqrt() for part in state)

    explicit = run(pycnf, {"norm": mixed})
    assert_same_run(run(pycnf, None), explicit, method)


@pytest.mark.parametrize("method", REPRESENTATIVE)
def test_default_norms_differ(method):
    """Tensor: RMS over all. Tuple: largest RMS, so a wide quiet part dilutes no small loud one."""

    def field(t, y):
        return torch.cat([torch.sin(9 * t) * y[:1], torch.zeros(99, dtype=F64)])

    def parts(t, state):
        return torch.sin(9 * t) * state[0], torch.zeros(99, dtype=F64)

    y0, t = torch.ones(100, dtype=F64), double(0.0, 2.0)
    keywords = {"method": method, "rtol": 1e-4, "atol": 1e-4}
    tensor = both_record(field, y0, t, **keywords)
    pair = both_record(parts, (y0[:1], y0[1:]), t, **keywords)
    assert tensor[1].nfe != pair[1].nfe
    assert_same_run(*tensor, method)
    assert_same_run(*pair, method)


@pytest.mark.parametrize("tuple_state", [False, True])
@pytest.mark.parametrize("method", REPRESENTATIVE)
def test_norm_calls(method, tuple_state):
    """The norm is called three times for the first step and once an attempt."""

    def run(library):
        seen = []

        def norm(y):
            seen.append(flat(y).clone())
            return flat(y).abs().max()

        field = (lambda t, y: (-y[0], torch.cos(t) * y[1])) if tuple_state else (lambda t, y: -y)
        y0 = (double(1.0, 2.0), double(0.5)) if tuple_state else double(1.0, 2.0)
        options = {"norm": norm}
        keywords = {"method": method, "rtol": 1e-3, "atol": 1e-3, "options": options}
        run = record(library, field, y0, double(0.0, 2.0), **keywords)
        return run, seen

    (mine, my_calls), (theirs, their_calls) = run(pycnf), run(torchdiffeq)
    assert len(their_calls) == 3 + theirs.attempts
    assert len(my_calls) == len(their_calls)
    assert_close(my_calls[:4], their_calls[:4], 1e-6, 1e-9)
    assert_same_run(mine, theirs, method)


@pytest.mark.parametrize("tolerance", [1e-3, [1e-3], double(1e-3)[0], double(1e-3)[None]], ids=str)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    "state", [lambda: torch.tensor(1.0), lambda: torch.ones(1), lambda: torch.ones(2, 3)], ids="012"
)
@pytest.mark.parametrize("method", ["dopri5", "adaptive_heun"])
def test_what_a_norm_is_given(method, state, grad, tolerance):
    """Its argument has the shape and dtype to which the state and the tolerances promote."""

    def run(library):
        seen = []

        def norm(y):
            seen.append((y.shape, y.dtype))
            return y.abs().max()

        y0, t = state().requires_grad_(grad), torch.tensor([0.0, 1.0])
        keywords = {"method": method, "rtol": tolerance, "atol": tolerance}
        return outcome(
            lambda: library.odeint(
                lambda t, y: y, y0, t, options={"norm": norm}, **keywords
            ).detach()
        ), seen

    (mine, my_types), (theirs, their_types) = run(pycnf), run(torchdiffeq)
    assert my_types[:4] == their_types[:4]
    assert set(my_types) == set(their_types)
    assert_same_outcome(mine, theirs, 1e-4, 1e-4)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("method", REPRESENTATIVE)
def test_norm_and_first_step_of_one_element(method, grad):
    """A norm that keeps a dimension, a first step that is no 0-dim tensor."""
    cases = ({"norm": lambda y: y.abs().amax(0, keepdim=True)}, {"first_step": double(0.1)})

    def run(library, options):
        y0 = double(1.0, -0.5).requires_grad_(grad)
        keywords = {"method": method, "rtol": 1e-3, "atol": 1e-3, "options": options}
        ys = library.odeint(saw, y0, double(0.0, 0.4), **keywords)
        return (ys.detach(), *(torch.autograd.grad(ys[-1].sum(), y0) if grad else ()))

    for options in cases:
        assert_close(run(pycnf, options), run(torchdiffeq, options), *value_tolerance(method))


@pytest.mark.parametrize("method", FIXED)
def test_fixed_methods_ignore_a_norm(method):
    def norm(y):
        raise AssertionError("a fixed method has no use for a norm")

    for problem in (pulse, driven_pendulum):
        mine, theirs = both(problem, method, options={"norm": norm})
        assert not theirs.warnings
        assert not mine.warnings
        assert_same_run(mine, theirs, method)


# --- tolerances -------------------------------------------------------------------------------

TENSOR_TOLERANCES = {
    "0-dim tensor": lambda: double(1e-4)[0],
    "0-dim f32 tensor": lambda: torch.tensor(1e-4),
    "per element": lambda: double(1e-2, 1e-5, 1e-4),
    "one element, 2-d": lambda: double(1e-4)[None],
    "int": lambda: 1,
    "zero": lambda: 0.0,
}


@pytest.mark.parametrize("which", ["rtol", "atol"])
@pytest.mark.parametrize("kind", TENSOR_TOLERANCES)
@pytest.mark.parametrize("method", REPRESENTATIVE)
def test_tolerances_of_a_tensor_state(method, kind, which):
    keywords = {"rtol": 1e-3, "atol": 1e-3, which: TENSOR_TOLERANCES[kind]()}
    mine, theirs = both(pulse, method, **keywords)
    assert times_of(theirs) != default_times(pulse, method, 1e-3)
    assert_same_run(mine, theirs, method)


TUPLE_TOLERANCES = {
    "tuple": lambda: (1e-2, 1e-5, 1e-4),
    "list": lambda: [1e-2, 1e-5, 1e-4],
    "1-d tensor": lambda: double(1e-2, 1e-5, 1e-4),
    "tuple of tensors": lambda: (double(1e-2)[0], double(1e-5), torch.tensor(1e-4)),
    "generator": lambda: (tol for tol in (1e-2, 1e-5, 1e-4)),
    "0-dim tensor": lambda: double(1e-5)[0],
}


@pytest.mark.parametrize("which", ["rtol", "atol"])
@pytest.mark.parametrize("kind", TUPLE_TOLERANCES)
@pytest.mark.parametrize("method", ["dopri5", "bosh3"])
def test_tolerances_of_a_tuple_state(method, kind, which):
    mine, theirs = (
        solve(library, driven_pendulum, method, **{"rtol": 1e-3, "atol": 1e-3, which: make()})
        for library in (pycnf, torchdiffeq)
        for make in [TUPLE_TOLERANCES[kind]]
    )
    assert times_of(theirs) != default_times(driven_pendulum, method, 1e-3)
    assert_same_run(mine, theirs, method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(3,), (2, 3), ()])
def test_one_element_list_for_a_tensor_state(method, shape):
    """SiT passes atol=[a], rtol=[r] with a tensor: it broadcasts as a tensor of one element."""
    y0 = torch.linspace(0.5, 1.5, max(1, torch.Size(shape).numel()), dtype=F64).reshape(shape)
    t = double(0.0, 0.5, 1.0)
    keywords = {"method": method, "rtol": [1e-4], "atol": [1e-4]}
    mine = outcome(lambda: pycnf.odeint(saw, y0, t, **keywords))
    theirs = outcome(lambda: torchdiffeq.odeint(saw, y0, t, **keywords))
    assert_same_outcome(mine, theirs, *value_tolerance(method))


@pytest.mark.parametrize("method", ["dopri5", "bosh3"])
def test_tolerance_of_the_state_s_own_shape(method):
    y0 = torch.linspace(0.5, 1.5, 6, dtype=F64).reshape(2, 3)
    atol = torch.logspace(-2, -7, 6, dtype=F64).reshape(2, 3)
    for atol_ in (atol, atol.T.contiguous().T, atol[:1], atol[:, :1]):
        keywords = {"method": method, "rtol": 1e-4, "atol": atol_}
        mine, theirs = both_record(saw, y0, double(0.0, 1.0), **keywords)
        assert_same_run(mine, theirs, method)


# --- fixed grids ------------------------------------------------------------------------------


def bent_grid(t):
    x = torch.linspace(0, 1, 12, dtype=t.dtype) ** 2
    grid = t[0] + x * (t[-1] - t[0])
    grid[-1] = t[-1]
    return grid


FIXED_OPTIONS = {
    "step_size": {"step_size": 0.1},
    "step_size that does not divide": {"step_size": 0.37},
    "step_size longer than the interval": {"step_size": 7.0},
    "step_size as a tensor": {"step_size": double(0.11)[0]},
    "step_size, cubic": {"step_size": 0.37, "interp": "cubic"},
    "cubic on the grid of outputs": {"interp": "cubic"},
    "perturb": {"step_size": 0.25, "perturb": True},
    "perturb as another truth": {"step_size": 0.25, "perturb": "yes"},
    "perturb, cubic": {"step_size": 0.3, "perturb": True, "interp": "cubic"},
    "grid_constructor": {"grid_constructor": lambda f, y, t: bent_grid(t)},
}


@pytest.mark.parametrize("t_dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("options", FIXED_OPTIONS.values(), ids=FIXED_OPTIONS)
@pytest.mark.parametrize("method", FIXED)
def test_fixed_options(method, options, reverse, dtype, t_dtype):
    """The same calls at the same times, to the last bit of the time: ascending and descending."""
    t = torch.tensor([0.0, 0.3, 1.0, 1.1, 2.05], dtype=t_dtype)
    t = t.flip(0) if reverse else t
    y0 = torch.tensor([[1.0, -0.5]], dtype=dtype)

    def field(t, y):
        return torch.cos(3 * t) * y + t

    mine, theirs = both_record(field, y0, t, method=method, options=options)
    default = record(torchdiffeq, field, y0, t, method=method)
    assert times_of(theirs) != times_of(default), "this option does nothing here"
    assert torch.equal(torch.stack(mine.times), torch.stack(theirs.times))
    tolerance = (1e-12, 1e-12) if dtype == F64 else (1e-5, 1e-5)
    assert_same_calls(mine, theirs, *tolerance)
    assert_close(mine.ys, theirs.ys, *tolerance)


@pytest.mark.parametrize("method", FIXED)
def test_cubic_costs_one_evaluation_per_output(method):
    field, y0, t = PROBLEMS["pulse"](F64)
    options = {"step_size": 0.5, "interp": "cubic"}
    mine, theirs = both_record(field, y0, t.double(), method=method, options=options)
    assert theirs.nfe == FIXED_STAGES[method] * 6 + len(t) - 1
    assert_same_run(mine, theirs, method)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("method", FIXED)
def test_grid_constructor_arguments(method, reverse):
    """It gets f, the (flat) y0 and the user's times, descending ones un-negated; f is callable."""

    def run(library, tuple_state):
        seen = []

        def grid(f, y0, t):
            f0 = f(t[0], y0)
            seen.append((y0.clone(), t.clone(), f0.clone()))
            middle = (t[:-1] + t[1:]) / 2
            return torch.cat([t, middle]).sort(descending=reverse).values

        def field(t, y):
            return (-y[0] * t, y[1] + t) if tuple_state else -y * t

        y0 = (double(1.0, 2.0), double(0.5)) if tuple_state else double(1.0, 2.0)
        t = double(1.0, 0.4, 0.1) if reverse else double(0.1, 0.4, 1.0)
        ys = library.odeint(field, y0, t, method=method, options={"grid_constructor": grid})
        return ys, seen

    for tuple_state in (False, True):
        mine, my_calls = run(pycnf, tuple_state)
        theirs, their_calls = run(torchdiffeq, tuple_state)
        assert len(my_calls) == len(their_calls) == 1
        assert_close(my_calls[0], their_calls[0], 0.0, 0.0)
        assert_close(mine, theirs, 1e-12, 1e-12)


@pytest.mark.parametrize("method", FIXED)
def test_many_outputs_in_one_step(method):
    """Several outputs inside a step, on its ends, and a step without any: linear and cubic."""
    field, y0, _ = PROBLEMS["mlp"](F64)
    t = double(0.0, 0.05, 0.1, 0.2, 0.25, 0.26, 0.27, 0.9, 1.0)
    for interp in ("linear", "cubic"):
        options = {"step_size": 0.25, "interp": interp}
        mine, theirs = both_record(field, y0, t, method=method, options=options)
        assert_same_run(mine, theirs, method)


@pytest.mark.parametrize("method", FIXED)
@pytest.mark.parametrize("t_dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_times_of_a_fixed_grid(method, t_dtype):
    """F5-TTS passes t in the model's dtype, on an uneven grid."""
    t = torch.linspace(0, 1, 9) ** 2
    y0 = torch.linspace(-1, 1, 6).to(t_dtype)

    def field(t, y):
        return y * torch.cos(3 * t) + t

    for dtype in (t_dtype, F32):
        mine, theirs = both_record(field, y0.to(dtype), t.to(t_dtype), method=method)
        eps = torch.finfo(t_dtype if dtype == t_dtype else F32).eps
        assert_same_calls(mine, theirs, 8 * eps, 8 * eps)
        assert_close(mine.ys, theirs.ys, 8 * eps, 8 * eps)


# --- unknown options --------------------------------------------------------------------------

CLASS_NAMES = {
    "dopri5": "Dopri5Solver",
    "dopri8": "Dopri8Solver",
    "tsit5": "Tsit5Solver",
    "bosh3": "Bosh3Solver",
    "fehlberg2": "Fehlberg2",
    "adaptive_heun": "AdaptiveHeunSolver",
    "euler": "Euler",
    "midpoint": "Midpoint",
    "heun2": "Heun2",
    "heun3": "Heun3",
    "rk4": "RK4",
}


@pytest.mark.parametrize("method", METHODS)
def test_unknown_options_warn(method):
    """Never an error; the text has the solver's class name and the dict of what it did not know."""
    unknown = {"foo": 1, "step_size": 0.5} if method in ADAPTIVE else {"foo": 1, "first_step": 0.5}
    mine, theirs = both(pulse, method, rtol=1e-3, atol=1e-3, options=dict(unknown))
    text = f"{CLASS_NAMES[method]}: Unexpected arguments {unknown}"
    assert theirs.warnings == [text]
    assert mine.warnings == [text]
    assert_same_run(mine, theirs, method)


@pytest.mark.parametrize("method", METHODS)
def test_unknown_option_is_a_user_warning(method):
    field, y0, t = pulse(F64)
    with pytest.warns(UserWarning, match="Unexpected arguments {'foo': 1}"):
        pycnf.odeint(field, y0, t, method=method, rtol=1e-2, atol=1e-2, options={"foo": 1})


@pytest.mark.parametrize("method", FIXED)
def test_dtype_option_of_a_fixed_method_only_warns(method):
    """Seen in public code: options={'dtype': torch.float32} passed to every method."""
    options = {"dtype": torch.float32}
    mine, theirs = both(pulse, method, options=options)
    assert mine.warnings == theirs.warnings != []
    assert_same_run(mine, theirs, method)


def test_no_warning_without_cause():
    for method in METHODS:
        for problem in (pulse, driven_pendulum):
            mine = solve(pycnf, problem, method, rtol=1e-2, atol=1e-2)
            assert mine.warnings == []


# --- callbacks --------------------------------------------------------------------------------

CALLBACKS = ("callback_step", "callback_accept_step", "callback_reject_step")


class WithCallbacks:
    """A field that logs each callback: name, t0, state and dt, with their types."""

    def __init__(self, field, names=CALLBACKS, edit=None):
        self.field, self.log, self.edit = field, [], edit
        for name in names:
            setattr(self, name, lambda t0, y0, dt, name=name: self.called(name, t0, y0, dt))

    def __call__(self, t, y):
        return self.field(t, y)

    def called(self, name, t0, y0, dt):
        assert torch.is_tensor(t0)
        assert torch.is_tensor(dt)
        assert t0.shape == dt.shape == ()
        self.log.append((name, t0.clone(), clone_state(y0), dt.clone()))
        if self.edit is not None:
            self.edit(name, t0, y0, dt)
        return "ignored"


def assert_same_log(mine, theirs, tolerance):
    assert [entry[0] for entry in mine] == [entry[0] for entry in theirs]
    for (_, t0, y0, dt), (_, t0_, y0_, dt_) in zip(mine, theirs):
        assert_close(t0, t0_, tolerance, tolerance)
        assert_close(y0, y0_, tolerance, tolerance)
        assert_close(dt, dt_, tolerance, tolerance)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("problem", [pulse, driven_pendulum], ids=["tensor", "tuple"])
@pytest.mark.parametrize("method", METHODS)
def test_callbacks(method, problem, reverse):
    """The same calls in the same order: t0 un-negated, dt positive, the state in its structure."""
    names = CALLBACKS if method in ADAPTIVE else CALLBACKS[:1]

    def run(library):
        field, y0, t = problem(F64)
        watched = WithCallbacks(field, names)
        t = t.flip(0) / 3 if reverse else t
        tol = {**TOLERANCE[F32], "dopri8": 1e-6}.get(method, 1e-4)
        ys = library.odeint(watched, y0, t, method=method, rtol=tol, atol=tol)
        return ys, watched.log

    (mine, my_log), (theirs, their_log) = run(pycnf), run(torchdiffeq)
    assert_same_log(my_log, their_log, 1e-3 if method == "dopri8" else 1e-7)
    assert all(dt > 0 for *_, dt in my_log)
    if method in ADAPTIVE and not reverse:
        assert {entry[0] for entry in their_log} == set(CALLBACKS)
    assert_close(mine, theirs, *value_tolerance(method))


@pytest.mark.parametrize("name", CALLBACKS)
@pytest.mark.parametrize("method", REPRESENTATIVE)
def test_one_callback_alone(method, name):
    def run(library):
        field, y0, t = pulse(F64)
        watched = WithCallbacks(field, (name,))
        library.odeint(watched, y0, t, method=method, rtol=1e-4, atol=1e-4)
        return watched.log

    mine, theirs = run(pycnf), run(torchdiffeq)
    assert {entry[0] for entry in theirs} == {name}
    assert_same_log(mine, theirs, 1e-3 if method == "dopri8" else 1e-7)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("tuple_state", [False, True])
@pytest.mark.parametrize(
    ("method", "name"),
    [*((method, name) for method in ADAPTIVE for name in CALLBACKS)]
    + [(method, CALLBACKS[0]) for method in FIXED],
)
def test_callbacks_edit_the_state_in_place(method, name, tuple_state, reverse):
    """The state in a callback is live: tumour models project it there. On the first step of a
    tensor state it is the caller's own y0, which the edit reaches too."""

    def run(library):
        def edit(name_, t0, y0, dt):
            if name_ == name:
                (y0[0] if tuple_state else y0).mul_(0.9)

        def field(t, y):
            bump = 20 * torch.exp(-(((t - 1.0) / 0.2) ** 2))
            return (bump - y[0], y[0].sum() - y[1]) if tuple_state else bump - y

        y0 = double(1.0, -0.5, 2.0)
        watched = WithCallbacks(field, CALLBACKS if method in ADAPTIVE else CALLBACKS[:1], edit)
        t = torch.linspace(0, 2, 9, dtype=F64)
        t = t.flip(0) if reverse else t
        state = (y0, torch.zeros((), dtype=F64)) if tuple_state else y0
        with torch.no_grad():
            tol = COARSE.get(method, 1e-3)
            ys = library.odeint(watched, state, t, method=method, rtol=tol, atol=tol)
        return ys, y0, watched.log

    (mine, my_y0, my_log), (theirs, their_y0, their_log) = run(pycnf), run(torchdiffeq)
    assert name in {entry[0] for entry in their_log}
    assert_same_log(my_log, their_log, 1e-3 if method == "dopri8" else 1e-6)
    assert_close(my_y0, their_y0, 1e-12, 1e-12)
    # The edit makes the stale f0 wrong, and the step after it a matter of rounding.
    assert_close(mine, theirs, 1e-6, 1e-6 if method != "dopri8" else 1e-5)


@pytest.mark.parametrize("name", CALLBACKS)
@pytest.mark.parametrize("method", ADAPTIVE)
def test_callbacks_edit_the_step_in_place(method, name):
    """dt is live as well: halving it in callback_step halves the step that is taken."""

    def run(library):
        def edit(name_, t0, y0, dt):
            if name_ == name:
                dt.mul_(0.5)

        field, y0, t = pulse(F64)
        watched = WithCallbacks(field, CALLBACKS, edit)
        with torch.no_grad():
            ys = library.odeint(watched, y0, t, method=method, rtol=1e-3, atol=1e-3)
        return ys, watched.log

    (mine, my_log), (theirs, their_log) = run(pycnf), run(torchdiffeq)
    assert_same_log(my_log, their_log, 1e-3 if method == "dopri8" else 1e-6)
    assert_close(mine, theirs, 1e-6, 1e-6 if method != "dopri8" else 1e-5)


@pytest.mark.parametrize("method", FIXED)
def test_callbacks_edit_the_step_of_a_fixed_method(method):
    def run(library):
        def edit(name, t0, y0, dt):
            dt.mul_(0.5)

        field, y0, t = pulse(F64)
        watched = WithCallbacks(field, CALLBACKS[:1], edit)
        with torch.no_grad():
            return library.odeint(watched, y0, t.double(), method=method), watched.log

    (mine, my_log), (theirs, their_log) = run(pycnf), run(torchdiffeq)
    assert_same_log(my_log, their_log, 1e-12)
    assert_close(mine, theirs, 1e-12, 1e-12)


@pytest.mark.parametrize("method", FIXED)
def test_unsupported_callbacks_warn(method):
    def run(library, names):
        field, y0, t = pulse(F64)
        watched = WithCallbacks(field, names)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            library.odeint(watched, y0, t, method=method)
        return [str(w.message) for w in caught], [entry[0] for entry in watched.log]

    accept = ("callback_accept_step",)
    text = f"Solver '{method}' does not support callbacks {{'callback_accept_step'}}"
    assert run(torchdiffeq, accept) == run(pycnf, accept) == ([text], [])
    mine, theirs = run(pycnf, CALLBACKS), run(torchdiffeq, CALLBACKS)
    assert mine[1] == theirs[1] == ["callback_step"] * 6
    # The two names come from a set, in either order.
    options = [
        f"Solver '{method}' does not support callbacks {{'{a}', '{b}'}}"
        for a, b in (CALLBACKS[1:], CALLBACKS[:0:-1])
    ]
    assert mine[0][0] in options
    assert len(mine[0]) == 1


def test_callbacks_on_a_module():
    """nn.Modules define them as methods; the null callback of torchdiffeq is not one of theirs."""

    class Field(MLPField):
        def __init__(self):
            super().__init__(F64)
            self.steps = 0

        def callback_step(self, t0, y0, dt):
            self.steps += 1

    counts = []
    for library in (pycnf, torchdiffeq):
        field = Field()
        _, y0, t = PROBLEMS["mlp"](F64)
        library.odeint(field, y0, t, rtol=1e-4, atol=1e-4)
        counts.append(field.steps)
    assert counts[0] == counts[1] > 3


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_exceptions_of_callbacks_pass_through(method):
    class Stop(Exception):
        pass

    def edit(name, t0, y0, dt):
        if t0 > 0.5:
            raise Stop

    field, y0, t = pulse(F64)
    for library in (pycnf, torchdiffeq):
        with pytest.raises(Stop):
            library.odeint(WithCallbacks(field, CALLBACKS[:1], edit), y0, t, method=method)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("tuple_state", [False, True])
def test_field_of_a_grid_constructor(tuple_state, reverse):
    """It is called like the solver's: with a time in the state's dtype."""

    def run(library):
        slopes = []

        def grid(func, y0, t):
            slopes.append(func(t[0], y0))
            return t

        recorder = Recorder(lambda t, y: (-(1 + t) * y[0],) if tuple_state else -(1 + t) * y)
        y0 = torch.tensor([1.0, 2.0])
        t = double(1.0, 0.5) if reverse else double(0.5, 1.0)
        options = {"grid_constructor": grid}
        library.odeint(recorder, (y0,) if tuple_state else y0, t, method="euler", options=options)
        return recorder.times, slopes

    mine, theirs = run(pycnf), run(torchdiffeq)
    assert {time.dtype for time in theirs[0]} == {F32}
    for a, b in zip(mine, theirs, strict=True):
        assert_close(tuple(a), tuple(b), 1e-6, 1e-6)


@pytest.mark.parametrize("method", ["euler", "rk4", "explicit_adams", "implicit_midpoint"])
def test_perturb_by_anything_true(method):
    field, y0, t = lambda t, y: -y * t, double(1.0, 2.0), double(0.0, 0.3, 1.0)
    mine, theirs = both_record(field, y0, t, method=method, options={"perturb": "yes"})
    assert theirs.times[0] > 0
    assert_close(tuple(mine.times), tuple(theirs.times), 0.0, 1e-15)
    assert_close(mine.ys, theirs.ys, 1e-9, 1e-9)


@pytest.mark.parametrize("method", ["rk4", "explicit_adams"])
def test_infinite_step_starts_at_its_start(method):
    """The first slope of a step of any size is taken where it starts."""
    t = double(0.5, float("inf"))
    mine, theirs = both_record(lambda t, y: -y, double(1.0, 2.0), t, method=method)
    assert mine.times[0] == theirs.times[0] == 0.5
    assert mine.nfe == theirs.nfe


def test_complex_state_with_a_norm_warns_of_nothing():
    """PyTorch warns where a complex number is cast to a real one."""
    y0 = torch.tensor([1 + 0.5j, -0.3j], dtype=torch.complex128)
    options = {"norm": lambda y: y.abs().max()}
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pycnf.odeint(lambda t, y: 1j * y, y0, double(0.0, 1.0), rtol=1e-3, options=options)
    finally:
        torch.set_warn_always(always)


@pytest.mark.parametrize("tolerance", [[1e-3], torch.tensor(1e-3, dtype=F64)])
def test_number_as_a_state_with_times_of_its_dtype(tolerance):
    """Nothing is then in float64, so the field sees none."""
    keywords = {"rtol": tolerance, "atol": tolerance, "options": {"dtype": F32}}
    y0, t = torch.tensor(1.0), torch.tensor([0.0, 1.0])
    mine, theirs = both_record(lambda t, y: -y, y0, t, method="adaptive_heun", **keywords)
    assert {time.dtype for time in theirs.times} == {time.dtype for time in mine.times} == {F32}
    assert mine.nfe == theirs.nfe
