"""Random solves for `test_odeint_property`: what is drawn, and one run of it by either library.

A `Case` holds plain values only, so that a failing example reads as what it is; fields, norms,
grids and events are named functions.
"""

from __future__ import annotations

import math
import re
import traceback
import warnings
from dataclasses import dataclass, field, fields
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import strategies as st
from problems import ADAPTIVE, FIXED, IMPLICIT, as_tuple, flat

from pycnf.odeint.solve import SOLVERS

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
C64, C128 = torch.complex64, torch.complex128
ADAMS = ("explicit_adams", "implicit_adams", "fixed_adams")
ON_GRID = FIXED + ADAMS + IMPLICIT
CALLBACKS = ("callback_step", "callback_accept_step", "callback_reject_step")


@dataclass
class Case:
    """One solve; every argument that is left at its default is not passed."""

    method: str | None
    interface: str = "odeint"
    vector_field: str = "coupled"
    shapes: tuple = ((3,),)
    dtypes: tuple = (F64,)
    tuple_state: bool = False
    layout: str = "contiguous"
    t: Any = (0.0, 1.0)
    t_dtype: torch.dtype = F64
    arguments: dict = field(default_factory=dict)
    event: str | None = None
    callbacks: tuple = ()
    wants: tuple = ()  # of "y0", "t", "parameters", "options"

    def __repr__(self) -> str:
        given = [f"{each.name}={getattr(self, each.name)!r}" for each in fields(self)]
        return f"Case({', '.join(given)})"

    @property
    def options(self) -> dict:
        return self.arguments.get("options") or {}

    @property
    def dtype(self) -> torch.dtype:
        """Of the state, which the parts of a tuple are promoted to."""
        dtype = self.dtypes[0]
        for each in self.dtypes[1:]:
            dtype = torch.promote_types(dtype, each)
        return dtype

    @property
    def descending(self) -> bool:
        return isinstance(self.t, tuple) and len(self.t) > 1 and self.t[0] > self.t[1]

    @property
    def longest_step(self) -> float:
        """Of a method on a grid, at most."""
        size = self.options.get("step_size")
        if not isinstance(self.t, tuple) or not self.t:
            return 0.0
        t = [float(x) for x in self.t]
        span = abs(t[-1] - t[0])
        if torch.is_tensor(size) and size.numel() == 1:
            size = size.item()
        if isinstance(size, int | float):
            return min(size, span)
        if self.options.get("grid_constructor") is ends_only:
            return span
        return max((abs(b - a) for a, b in pairwise(t)), default=0.0)

    @property
    def empty(self) -> bool:
        return all(math.prod(shape) == 0 for shape in self.shapes)

    @property
    def known_method(self) -> str:
        return self.method or "dopri5"


# ---- vector fields: of t, the parts of the state, and three parameters -----------------------


def coupled(t, parts, a):
    total = sum(part.sum() for part in parts)
    return [torch.sin(a[0] * y + a[1] * t) - a[2] * y + 0.05 * total for y in parts]


def decay(t, parts, a):
    return [-a[0] * y for y in parts]


def autonomous(t, parts, a):
    return [torch.sin(a[0] * y) for y in parts]


def of_time(t, parts, a):
    return [torch.cos(a[1] * t) + 0 * y for y in parts]


def discontinuous(t, parts, a):
    return [torch.where(t > 0.4, a[0], -a[1]) * y for y in parts]


def constant(t, parts, a):
    return [torch.ones_like(y) for y in parts]


def zero(t, parts, a):
    return [0 * y for y in parts]


def steep(t, parts, a):
    return [8 * a[1] * torch.cos(6 * t) * torch.sin(y) for y in parts]


def turns_nan(t, parts, a):
    return [torch.where(t.abs() > 0.3, math.nan, -a[0]) * y for y in parts]


def turns_infinite(t, parts, a):
    return [torch.where(t.abs() > 0.3, math.inf, -a[0]) * y for y in parts]


def blows_up(t, parts, a):
    return [3 * y * y + 1 for y in parts]


def raises(t, parts, a):
    if t.abs() > 0.3:
        raise ArithmeticError("the field has had enough")
    return [-a[0] * y for y in parts]


def returns_f64(t, parts, a):
    return [(-a[0] * y).to(C128 if y.is_complex() else F64) for y in parts]


def returns_f32(t, parts, a):
    return [(-a[0] * y).to(C64 if y.is_complex() else F32) for y in parts]


def returns_bf16(t, parts, a):
    return [(-a[0] * y).to(C64 if y.is_complex() else BF16) for y in parts]


def returns_input(t, parts, a):
    return list(parts)


def returns_view(t, parts, a):
    return [(-a[0] * y)[None].expand(2, *y.shape)[1] for y in parts]


def edits_input(t, parts, a):
    with torch.no_grad():
        return [y.mul_(-0.5) for y in parts]


def without_graph(t, parts, a):
    return [-a[0].detach() * y.detach() * (1 + t.detach()) for y in parts]


def under_no_grad(t, parts, a):
    with torch.no_grad():
        return [-a[0] * y for y in parts]


def broadcasts(t, parts, a):
    return [0.5 * a[0] * (1 + t) for _ in parts]


def of_another_size(t, parts, a):
    return [torch.ones(7, dtype=y.dtype) for y in parts]


SMOOTH = (coupled, decay, autonomous, of_time, discontinuous, constant, zero, steep)
CASTS = (returns_f64, returns_f32, returns_bf16)
ODD = (
    turns_nan, turns_infinite, blows_up, raises, *CASTS, returns_input, returns_view, edits_input,
    without_graph, under_no_grad, broadcasts, of_another_size,
)  # fmt: skip
FIELDS = {each.__name__: each for each in SMOOTH + ODD}


class Stopped(Exception):
    """The work of an example is bounded: the field has been called often enough."""


class Field(torch.nn.Module):
    """A field of FIELDS that records its calls, and callbacks that record theirs."""

    def __init__(self, case: Case, limit: int):
        super().__init__()
        real = case.dtype.to_real() if case.dtype.is_complex else case.dtype
        self.a = torch.nn.Parameter(torch.tensor([0.7, 1.3, 0.4]).to(real))
        self.idle = torch.nn.Parameter(torch.ones(2).to(real))
        if "parameters" not in case.wants:
            self.requires_grad_(False)
        self.function, self.tuple_state, self.limit = (
            FIELDS[case.vector_field],
            case.tuple_state,
            limit,
        )
        self.times, self.states, self.notes = [], [], []
        for name in case.callbacks:
            setattr(self, name, self.note(name))

    def forward(self, t, y):
        if len(self.times) >= self.limit:
            raise Stopped
        self.times.append(t.detach().clone())
        self.states.append(flat(y).detach().clone())
        parts = self.function(t, as_tuple(y), self.a)
        return tuple(parts) if self.tuple_state else parts[0]

    def note(self, name):
        def callback(t, y, dt):
            self.notes.append(
                (name, t.detach().clone(), flat(y).detach().clone(), dt.detach().clone())
            )

        return callback


# ---- norms, grids, events ----------------------------------------------------------------------


def largest(y):
    return max(part.abs().max() for part in as_tuple(y))


def mean_of_all(y):
    return torch.cat([part.reshape(-1).abs() for part in as_tuple(y)]).mean()


def python_number(y):
    return torch.tensor(float(largest(y)))


def always_zero(y):
    return torch.zeros(())


def halves(func, y0, t):
    return torch.cat([torch.stack([t[:-1], 0.5 * (t[:-1] + t[1:])], 1).reshape(-1), t[-1:]])


def asks_field(func, y0, t):
    func(t[0], y0)
    return t


def ends_only(func, y0, t):
    return torch.stack([t[0], t[-1]])


def misses_end(func, y0, t):
    return t + 0.1


def at_half(t, y):
    return (t - 0.5).abs() - 0.25


def sum_of_state(t, y):
    return sum(part.real.sum() for part in as_tuple(y)) - 1.5


def vector(t, y):
    return torch.stack([t - 0.8, as_tuple(y)[0].real.sum() - 2.0, t + 0.7])


def never(t, y):
    return t * 0 + 1


def zero_at_start(t, y):
    return t * 0


EVENTS = {each.__name__: each for each in (at_half, sum_of_state, vector, never, zero_at_start)}


# ---- running -------------------------------------------------------------------------------------


def initial_state(case: Case):
    """The state, the same in every call, and its parts as leaves that may want a gradient."""
    leaves = []
    for i, (shape, dtype) in enumerate(zip(case.shapes, case.dtypes)):
        numel = math.prod(shape)
        values = torch.sin(torch.arange(2 * numel, dtype=F64) * 1.7 + i) + 0.3
        if dtype.is_complex:
            values = torch.complex(values, values.flip(0) * 0.5)
        values = values.to(dtype)
        if case.layout == "strided":
            leaf = (
                values[::2].reshape(shape).mT.contiguous().mT
                if len(shape) > 1
                else (values[::2].view(shape))
            )
        elif case.layout == "expanded" and numel:
            leaf = values[0].expand(shape)
        else:
            leaf = values[:numel].reshape(shape)
        leaves.append(leaf.requires_grad_("y0" in case.wants))
    return (tuple(leaves) if case.tuple_state else leaves[0]), leaves


def initial_times(case: Case):
    if not isinstance(case.t, tuple):
        return case.t
    t = torch.tensor(case.t, dtype=F64).to(case.t_dtype)
    return t.requires_grad_("t" in case.wants) if t.is_floating_point() else t


def fresh(value: Any) -> Any:
    """A copy of tensors in a value."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    if isinstance(value, dict):
        return {k: fresh(v) for k, v in value.items()}
    return value


def objective(results):
    """A nonlinear function of every value, or None if it has no graph."""
    total = 0.0
    for part in results:
        weights = torch.linspace(0.5, 2.0, part.numel(), dtype=F64).reshape(part.shape)
        real = part.real if part.is_complex() else part
        total = total + (weights.to(real.dtype) * (real + 0.3 * (part.abs() ** 2))).sum()
    return total


def attempt(call):
    """A result and None, or None and the exception."""
    try:
        return call(), None
    except Exception as error:
        return None, error


def deliberate(error: Exception) -> bool:
    """Whether the library, or the case's own functions, raise this by a statement of theirs: not
    what PyTorch happens to say about arguments that nobody looked at.
    """
    line = traceback.extract_tb(error.__traceback__)[-1].line or ""
    statement = "assert" if isinstance(error, AssertionError) else "raise"
    return line.lstrip().startswith((statement, "raise"))


def named(text: str) -> str:
    """A text without what differs between any two runs of it, or is known to differ here."""
    # The stand-ins for torchdiffeq's implicit methods are classes of another name.
    for method in IMPLICIT:
        if text.startswith(f"{method}: "):
            text = SOLVERS[method].label + text[len(method) :]
    # torchdiffeq wraps the grid_constructor before it finds it unknown.
    text = re.sub(r"<function \S+ at 0x[0-9a-f]+>", "<function>", text)
    text = re.sub(r",\s+grad_fn=<\w+>+", "", text)
    text = re.sub(r"\d\.\d{6,}(?:e[+-]\d+)?", lambda number: f"{float(number[0]):.4g}", text)
    # The methods that only torchdiffeq's main branch has stand elsewhere in the list.
    return re.sub(r"Must be one of {.*}\.", "Must be one of ...", text)


def run(library, case: Case, limit: int) -> SimpleNamespace:
    """Solves and differentiates: results, what the field and callbacks saw, warnings, errors."""
    func = Field(case, limit)
    y0, leaves = initial_state(case)
    t = initial_times(case)
    arguments = fresh(case.arguments)
    if case.method is not None:
        arguments["method"] = case.method
    if case.event is not None:
        arguments["event_fn"] = EVENTS[case.event]
    if case.interface == "odeint_event":
        arguments["reverse_time"] = case.t[0] > case.t[-1]
        t = t.detach()[0].requires_grad_(t.requires_grad)
    inputs = [x for x in leaves if x.requires_grad]
    if isinstance(t, torch.Tensor) and t.requires_grad:
        inputs.append(t)
    inputs += [p for p in func.parameters() if p.requires_grad]
    inputs += [
        value for value in (arguments.get("options") or {}).values()
        if isinstance(value, torch.Tensor) and value.requires_grad
    ]  # fmt: skip
    forward, grads, backward_error = None, None, None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result, error = attempt(lambda: getattr(library, case.interface)(func, y0, t, **arguments))
        forward = len(func.times)
        results = []
        if error is None:
            results = list(as_tuple(result))
            if case.event is not None:
                results = [result[0], *as_tuple(result[1])]
            differentiable = any(part.requires_grad for part in results)
            if differentiable:
                grads, backward_error = attempt(
                    lambda: torch.autograd.grad(objective(results), inputs, allow_unused=True)
                )
    return SimpleNamespace(
        results=results,
        is_tuple=isinstance(result, tuple),
        requires_grad=[part.requires_grad for part in results],
        error=error,
        forward=forward,
        nfe=len(func.times),
        times=func.times,
        states=func.states,
        notes=func.notes,
        grads=grads,
        backward_error=backward_error,
        warnings=[
            (w.category.__name__, named(str(w.message)))
            for w in caught
            if "Triggered internally" not in str(w.message)  # PyTorch's own, once a process
        ],
    )


# ---- what is drawn -------------------------------------------------------------------------------


def _tensor(*values, dtype=F64):
    return torch.tensor(values if len(values) > 1 else values[0], dtype=dtype)


ADAPTIVE_OPTIONS = {
    "first_step": [None, 0.05, 0.4, 2.0, _tensor(0.03), _tensor(0.03, dtype=F32), 1],
    "safety": [0.5, 0.95, _tensor(0.8), 1.5],
    "ifactor": [1.3, 3, 20.0, 1.0],
    "dfactor": [0.05, 0.7, 1.0, _tensor(0.4)],
    "min_step": [0.0, 1e-3, 0.05, 0.5],
    "max_step": [0.05, 0.3, math.inf, _tensor(0.2)],
    "step_t": [
        None,
        [0.1, 0.35],
        _tensor(0.3, 0.1, 0.8),
        _tensor(-5.0, 0.25),
        [],
        (0.5,),
        _tensor(0.25, 0.5, dtype=F32),
    ],
    "jump_t": [None, [0.4], _tensor(0.4, 0.6), _tensor(9.0, 0.2), [], _tensor(0.45, dtype=F32)],
    "max_num_steps": [0, 1, 4, 20, 1000],
    "dtype": [F32, F64],
    "norm": [largest, mean_of_all, python_number, always_zero],
}
GRID_OPTIONS = {
    "step_size": [None, 0.05, 0.11, 0.3, 5.0, _tensor(0.13), _tensor(0.2, dtype=F32)],
    "grid_constructor": [None, halves, asks_field, ends_only],
    "interp": ["linear", "cubic"],
    "perturb": [True, False],
    "norm": [largest],
}
ADAMS_OPTIONS = {"max_order": [1, 3, 4, 5, 7.9, 12], "max_iters": [1, 2, 4, 10]}
IMPLICIT_OPTIONS = {"max_iters": [0, 1, 3, 100]}
SCIPY_OPTIONS = {
    "solver": ["LSODA", "RK45", "RK23", "DOP853", "Radau", "BDF"],
    "min_step": [0, 0.01],
    "max_step": [math.inf, 0.2, 0.5],
    "eps": [1e-3],
    "grid_points": [[0.5]],
    "norm": [largest],
}
FOREIGN_OPTIONS = {
    "nonsense": [1], "eps": [1e-3], "grid_points": [[0.5]], "solver": ["RK45"], "interp": ["cubic"],
    "step_size": [0.1], "perturb": [True], "max_iters": [3], "max_order": [5], "safety": [0.8],
    "first_step": [0.1], "dtype": [F32], "step_t": [_tensor(0.3)], "max_num_steps": [3],
    "grid_constructor": [halves],
}  # fmt: skip
WRONG_OPTIONS = {
    "first_step": [0.0, -0.1, math.nan, math.inf, "x", _tensor(0.1, 0.2), 1e-30],
    "safety": [0.0, -1.0, math.nan, None, "x"],
    "ifactor": [0.5, 0.0, -1.0, math.nan, math.inf, None],
    "dfactor": [0.0, 2.0, -1.0, math.nan, "x"],
    "min_step": [-1.0, math.nan, math.inf, None, 2.0],
    "max_step": [0.0, -1.0, math.nan, None, 1e-20],
    "step_t": [_tensor(0.3, 0.3), 0.3, _tensor(math.nan, 0.3), [[0.1], [0.2]], "x"],
    "jump_t": [_tensor(0.4, 0.4, 0.1), 0.4, _tensor(math.nan), "x"],
    "max_num_steps": [-1, 2.5, None, "x", 2**31],
    "dtype": [torch.int64, BF16, C64, None, "x"],
    "norm": [None, "x", 3],
    "step_size": [0.0, -0.1, math.nan, math.inf, "x", _tensor(0.1, 0.2)],
    "grid_constructor": [misses_end, 3, lambda func, y0, t: t[:1], lambda func, y0, t: t.tolist()],
    "interp": ["quintic", None, 3],
    "perturb": ["x", None, 2],
    "max_order": [0, -1, 13, None, "x", 4.5],
    "max_iters": [0, -1, None, "x", 2.5],
    "solver": ["RK99", None, 3],
    "eps": [None],
}


def options_of(method: str) -> dict[str, list]:
    """The keys of a method and their values."""
    if method in ADAPTIVE:
        return ADAPTIVE_OPTIONS
    if method == "scipy_solver":
        return SCIPY_OPTIONS
    own = ADAMS_OPTIONS if method in ADAMS else IMPLICIT_OPTIONS if method in IMPLICIT else {}
    return {**GRID_OPTIONS, **own}


@st.composite
def options_for(draw, method: str, at_most: int = 3):
    """Options of a method, now and then with one that it does not know."""
    table = options_of(method)
    keys = draw(st.lists(st.sampled_from(sorted(table)), unique=True, max_size=at_most))
    options = {key: draw(st.sampled_from(table[key])) for key in keys}
    if draw(st.integers(0, 5)) == 0:
        foreign = sorted(set(FOREIGN_OPTIONS) - set(table))
        key = draw(st.sampled_from(foreign))
        options[key] = draw(st.sampled_from(FOREIGN_OPTIONS[key]))
    return options or draw(st.sampled_from([None, {}]))


@st.composite
def times(draw, longest: float = 1.5):
    """Ascending or descending: 1, 2 or many; even, uneven, or clustered."""
    start = draw(st.sampled_from([0.0, -0.5, 0.25, 3.0]))
    span = draw(st.sampled_from([0.2, 0.7, 1.0, longest]))
    kind = draw(st.sampled_from(["two", "two", "even", "uneven", "clustered", "one", "many"]))
    if kind == "one":
        return (start,)
    inner = {
        "two": [],
        "even": [0.25, 0.5, 0.75],
        "uneven": draw(st.lists(st.integers(1, 99).map(lambda x: x / 100), max_size=4)),
        "clustered": [0.5, 0.5 + 1e-3, 0.5 + 2e-3, 0.999],
        "many": [x / 21 for x in range(1, 21)],
    }[kind]
    values = [start, *(start + span * x for x in sorted(set(inner))), start + span]
    return tuple(values[::-1] if draw(st.booleans()) else values)


SHAPES = ((3,), (), (1,), (2, 3), (4, 1), (2, 1, 2))


@st.composite
def tolerances(draw, case_shapes, tuple_state, smallest):
    """rtol and atol: numbers, tensors, or one value a part."""
    arguments = {}
    for name in ("rtol", "atol"):
        value = draw(
            st.sampled_from([1e-2, 1e-3, 1e-4, 1e-5, 1e-6]).filter(lambda x: x >= smallest)
        )
        kind = draw(st.sampled_from(["number"] * 4 + ["0-dim", "parts", "full", "list"]))
        if kind == "0-dim" and not tuple_state:
            value = torch.tensor(value, dtype=draw(st.sampled_from([F32, F64])))
        elif kind == "full" and not tuple_state:
            value = torch.full(case_shapes[0], value, dtype=F64)
        elif kind == "list" and not tuple_state:
            value = [value]
        elif kind in ("parts", "list") and tuple_state:
            value = [value * (i + 1) for i in range(len(case_shapes))]
            value = tuple(value) if kind == "parts" else value
        arguments[name] = value
    return arguments


def smallest_tolerance(method: str, dtype: torch.dtype) -> float:
    """Below, an example takes more steps than it may, or rounding decides on them."""
    low = {"adaptive_heun": 1e-3, "fehlberg2": 1e-4, "bosh3": 1e-4}.get(method, 1e-6)
    if dtype in (F16, BF16):
        return 1e-2
    return max(low, 1e-4) if dtype in (F32, C64) else low


@st.composite
def cases(
    draw, method, *, interface="odeint", wants=(), dtypes=(F64,), field_names=None, event=False
):
    """A solve by a method; `wants` as in Case.

    Args:
        dtypes: for the state; C128 comes with F64, C64 with F32.
    """
    dtype = draw(st.sampled_from(dtypes))
    count = draw(st.sampled_from([0, 0, 0, 2, 3]))  # parts; 0 for a tensor state
    shapes = tuple(draw(st.sampled_from(SHAPES)) for _ in range(max(count, 1)))
    if draw(st.integers(0, 12)) == 0:
        shapes = (*shapes[:-1], (0, 2))
    mixed = [dtype]
    if dtype in (F64, C128):
        mixed += [F32, BF16]
    if dtype == C128:
        mixed += [F64, C64]
    state_dtypes = (dtype, *(draw(st.sampled_from(mixed)) for _ in shapes[1:]))
    # The sine of a complex number grows beyond all bounds, and long steps in a steep field multiply
    # the roundings of half precision by as much as the solution.
    gentle = dtype.is_complex or dtype in (F16, BF16)
    smooth = [each.__name__ for each in SMOOTH if not (gentle and each is steep)]
    names = field_names or smooth
    arguments = draw(tolerances(shapes, count > 0, smallest_tolerance(method or "dopri5", dtype)))
    options = draw(options_for(method or "dopri5"))
    if options is not None:
        arguments["options"] = options
    if wants and dtype not in (F16, BF16) and draw(st.integers(0, 5)) == 0:
        name = "first_step" if (method or "dopri5") in ADAPTIVE else "step_size"
        arguments["options"] = {**(options or {}), name: torch.tensor(0.1, requires_grad=True)}
        arguments["options"].pop("grid_constructor", None)
    callbacks = draw(st.sampled_from([(), (), CALLBACKS[:1], CALLBACKS]))
    t_dtypes = [F64, F64, F32] if dtype in (F64, C128) else [F64, F32]
    return Case(
        method=method,
        interface=interface,
        vector_field=draw(st.sampled_from(names)),
        shapes=shapes,
        dtypes=state_dtypes,
        tuple_state=count > 0,
        layout=draw(st.sampled_from(["contiguous", "contiguous", "strided", "expanded"])),
        t=draw(times()),
        t_dtype=draw(st.sampled_from(t_dtypes)),
        arguments=arguments,
        event=draw(st.sampled_from(sorted(EVENTS))) if event else None,
        callbacks=callbacks,
        wants=wants,
    )


@st.composite
def adjoint_cases(draw, method, dtypes=(F64,)):
    """odeint_adjoint with some of its own arguments, differentiated."""
    wants = draw(
        st.sampled_from([("y0", "t", "parameters"), ("y0", "parameters"), ("t",), ("parameters",)])
    )
    case = draw(cases(method, interface="odeint_adjoint", wants=wants, dtypes=dtypes))
    keys = ["rtol", "atol", "method", "options", "norm", "params"]
    for key in draw(st.lists(st.sampled_from(keys), unique=True, max_size=3)):
        if key in ("rtol", "atol"):
            case.arguments[f"adjoint_{key}"] = draw(st.sampled_from([1e-2, 1e-3]))
        elif key == "method":
            other = draw(st.sampled_from(["dopri5", "bosh3", "rk4", "euler", "implicit_midpoint"]))
            case.arguments["adjoint_method"] = other
            if draw(st.integers(0, 3)):
                case.arguments["adjoint_options"] = draw(options_for(other)) or {}
        elif key == "options":
            other = case.arguments.get("adjoint_method") or case.known_method
            case.arguments["adjoint_options"] = draw(options_for(other)) or {}
        elif key == "params":
            case.arguments["adjoint_params"] = ()
        else:
            norm = draw(st.sampled_from(["seminorm", largest]))
            given = case.arguments.get("adjoint_options") or {}
            case.arguments["adjoint_options"] = {**given, "norm": norm}
    return case


@st.composite
def event_cases(draw, method, dtypes=(F64,)):
    """A solve up to an event by one of the three functions, perhaps differentiated."""
    interface = draw(st.sampled_from(["odeint", "odeint_adjoint", "odeint_event"]))
    wants = draw(st.sampled_from([(), ("y0",), ("y0", "parameters"), ("y0", "t", "parameters")]))
    case = draw(cases(method, interface=interface, wants=wants, dtypes=dtypes, event=True))
    if method in ON_GRID and (case.options.get("step_size") == 5.0 or draw(st.integers(0, 5))):
        steps = (
            [0.05, 0.11, 0.3, _tensor(0.13)]
            if method not in IMPLICIT
            else [_tensor(0.05), _tensor(0.13), _tensor(0.3)]
        )
        step = draw(st.sampled_from(steps))
        given = {k: v for k, v in case.options.items() if k != "grid_constructor"}
        case.arguments["options"] = {**given, "step_size": step}
    if interface == "odeint_event" or draw(st.integers(0, 5)):
        case.t = (case.t[0], case.t[-1] if len(case.t) > 1 else case.t[0] + 1)
    return case


WRONG_TIMES = {
    "a list": [0.0, 1.0],
    "a number": 1.0,
    "none": None,
    "no times": (),
    "repeated": (0.0, 0.5, 0.5, 1.0),
    "not monotone": (0.0, 0.6, 0.5),
    "down and up": (1.0, 0.0, 0.5),
    "all equal": (1.0, 1.0),
    "starts with nan": (math.nan, 1.0),
    "ends with nan": (0.0, math.nan),
    "infinite": (0.0, math.inf),
    "2-D": torch.zeros(2, 2),
    "0-D": torch.tensor(1.0),
}
WRONG_TOLERANCES = [
    (1e-3,) * 5, [], torch.ones(5), torch.tensor(1e-3, requires_grad=True), "x", None, -1e-3, 0.0,
    math.nan, math.inf, torch.tensor([1e-3], dtype=F32),
]  # fmt: skip


@st.composite
def wrong_cases(draw, method, wants=()):
    """A solve with one argument, or two, that nobody should pass."""
    case = draw(cases(method, wants=wants))
    case.arguments["rtol"] = case.arguments["atol"] = 1e-3
    for _ in range(draw(st.sampled_from([1, 1, 1, 2]))):
        kind = draw(
            st.sampled_from(["option", "option", "option", "t", "t_dtype", "tol", "method"])
        )
        if kind == "option":
            own = set(options_of(method or "dopri5")) & set(WRONG_OPTIONS)
            key = draw(st.sampled_from(sorted(own)))
            case.arguments["options"] = {
                **case.options, key: draw(st.sampled_from(WRONG_OPTIONS[key]))
            }  # fmt: skip
        elif kind == "t":
            case.t = WRONG_TIMES[draw(st.sampled_from(sorted(WRONG_TIMES)))]
        elif kind == "t_dtype":
            case.t_dtype = draw(st.sampled_from([torch.int64, torch.bool, C64, F16, BF16]))
        elif kind == "tol":
            name = draw(st.sampled_from(["rtol", "atol"]))
            case.arguments[name] = draw(st.sampled_from(WRONG_TOLERANCES))
        else:
            case.method = draw(st.sampled_from(["dopri", "Euler", "", "adams", 5]))
    return case
