"""Solves of a flow on a GPU without the host in their loop: an attempt is recorded once, as a CUDA
graph, and replayed; the device accepts, chooses sizes and knows when to end. So is a step of the
discrete gradient, which is replayed for every accepted step, last first.

The numbers are those of `shared.integrate` and of the gradient step by step, by the same formulas
(csrc/core/flow_attempt.h). Whatever goes wrong is left to the solver with the host in its loop,
which says what it is.

On a CPU, where the tests run it, the same work is done as written.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pycnf._build import _C
from pycnf._ops import kernels, time_tensors
from pycnf.nn.divergence import has_forward_mode
from pycnf.nn.layers import LAYERS
from pycnf.odeint.recording import (
    RECORDED_DTYPES,
    Attempts,
    NotCaptured,
    Recorded,
    adaptive_obstacle,
    field_obstacle,
    generators_of,
    hooked,
    module_key,
    new_counters,
    python_state,
    substituted,
)
from pycnf.warn import warn

from .control import AdaptiveControl
from .dynamics import Dynamics, Parts
from .forward import ForwardSystem, Taped
from .parameters import Start, leaves
from .problem import Problem
from .shared import Step
from .solve import filled, replayed_gradient, taped_gradient
from .stats import SolveStats

_FIELD = {name: i for i, name in enumerate(_C.flow_fields)}
# In core/flow_attempt.h: FlowFailure.
_FULL_TAPE = 1
# Accepted steps that a first recording has room for.
_STEPS = 64
# Recorded solves of one flow that are kept.
_KEPT = 8
_DEVICES = ("cuda",)
_MISSING: Any = object()


@dataclass
class Tape:
    """The accepted steps of one solve.

    Attributes:
        z: States at their starts [steps, B * D].
        times: Their t, h and t_next, f64 [steps, 3].
    """

    z: Tensor
    times: Tensor

    def steps(self, shape: torch.Size) -> list[Taped]:
        """The same for the solver with the host in its loop."""
        times = self.times.tolist()
        return [Taped(Step(*each), z.view(shape)) for each, z in zip(times, self.z)]


class Recordings:
    """The recorded solves of one flow, and what it was told of others."""

    def __init__(self) -> None:
        self.kept: OrderedDict[tuple, Recording | None] = OrderedDict()
        self.said: set[str] = set()

    def solve(
        self, problem: Problem, x: Tensor, context: Tensor | None, ends: bool, asked: bool
    ) -> tuple[Tensor, ...] | None:
        """z at the end [B, D] and the extras, differentiable; None where it has to be solved with
        the host in the loop.

        Args:
            problem, x, context: As for `solve`.
            ends: Whether gradients flow to the ends of the interval.
            asked: Recording was asked for, so a warning says why it is not done.
        """
        if x.shape[0] == 0 or not (asked or x.device.type in _DEVICES):
            return None
        parameters = wanted_parameters(problem, x, context)
        taped = parameters is not None
        reason = obstacle(problem, x, taped, ends)
        if reason is None:
            state = python_state(problem.field, x.device)
            watched = torch.is_grad_enabled() and not taped
            key = key_of(problem, x, context, state, taped, watched)
            try:
                return self._solve(key, problem, x, context, parameters, asked)
            except NotCaptured as error:
                reason = self.give_up(key, problem, error)
            finally:
                if new_counters(problem.field, state):
                    self.kept.pop(key, None)  # which it will not have again
        if asked:
            self.say(reason)
        return None

    def give_up(self, key: tuple, problem: Problem, error: NotCaptured) -> str:
        """Remembers that such solves cannot be recorded, and says why."""
        self.kept[key] = None
        return f"{type(problem.field).__name__} cannot be captured ({error})"

    def say(self, reason: str) -> None:
        """Warns, once for each reason."""
        if reason not in self.said:
            self.said.add(reason)
            warn(f"cuda_graph: {reason}; solved without")

    def _solve(
        self,
        key: tuple,
        problem: Problem,
        x: Tensor,
        context: Tensor | None,
        parameters: list[Tensor] | None,
        asked: bool,
    ) -> tuple[Tensor, ...] | None:
        steps = 0 if parameters is None else min(_STEPS, problem.control.max_num_steps)
        recording = self.kept.get(key, _MISSING)
        while True:
            if recording is _MISSING:
                recording = Recording(problem, x, context, steps)
                self.kept[key] = recording
                while len(self.kept) > _KEPT:
                    self.kept.popitem(last=False)
            if recording is None or not recording.lock.acquire(blocking=False):
                return None  # not to be captured, as was said, or at work already
            self.kept.move_to_end(key)
            try:
                outcome = recording.solve(problem, x, context)
            finally:
                recording.lock.release()
            if outcome is not _FULL_TAPE:
                break
            recording, steps = _MISSING, 2 * recording.capacity
        if outcome is None or parameters is None:
            return outcome
        *outputs, tape = outcome
        job = _Job(self, recording, key, problem, tape, parameters, asked)
        return _Replayed.apply(job, tuple(outputs), x, context, *parameters)


def wanted_parameters(problem: Problem, x: Tensor, context: Tensor | None) -> list[Tensor] | None:
    """The field's tensors that need a gradient; None where nothing does."""
    if not torch.is_grad_enabled() or not isinstance(problem.field, nn.Module):
        return None
    found = [p for p in problem.field.parameters() if p.requires_grad]
    wanted = found or x.requires_grad or (context is not None and context.requires_grad)
    return found if wanted else None


def is_own(field: Any) -> bool:
    """Whether a field is pycnf's own, so that it is known that it can be captured."""
    return has_forward_mode(field) and all(type(each) in LAYERS.values() for each in field.layers)


def is_recordable(field: Any, gradient: str) -> bool:
    """Whether a flow's solves could be replayed on a GPU, as far as its field and gradient go."""
    if not isinstance(field, nn.Module) or hooked(field) is not None:
        return False
    if gradient != "discrete" and torch.is_grad_enabled():
        return False
    floating = (p.dtype for p in field.parameters() if p.is_floating_point())
    return next(floating, torch.float32) in RECORDED_DTYPES


def obstacle(problem: Problem, x: Tensor, taped: bool, ends: bool) -> str | None:
    """Why a solve cannot be replayed, None if it can.

    Args:
        problem, x: As for `solve`.
        taped: Whether a gradient is wanted.
        ends: Whether it flows to the ends of the interval.
    """
    field = problem.field
    if x.device.type not in _DEVICES:
        return f"the state is on {x.device}, not on a GPU"
    if (reason := adaptive_obstacle(x)) is not None:
        return reason
    if problem.per_sample:
        return "steps='per-sample' regroups the samples after every attempt"
    if not isinstance(problem.control, AdaptiveControl):
        return f"method {problem.tableau.name!r} has fixed steps"
    if (reason := field_obstacle(field, "the field", x)) is not None:
        return reason
    if ends and torch.is_grad_enabled():
        return "gradients flow to t0 or t1"
    if taped and problem.gradient != "discrete":
        return f"gradient={problem.gradient!r} needs the host; 'discrete' does not"
    if any(getattr(module, "_is_replica", False) for module in field.modules()):
        return "the field is a replica of nn.DataParallel, made anew for every solve"
    if torch._C._are_functorch_transforms_active():
        return "torch.func transforms the solve"
    return None


def key_of(
    problem: Problem, x: Tensor, context: Tensor | None, state: dict, taped: bool, watched: bool
) -> tuple:
    """What a recorded solve depends on, but for the numbers that it reads from memory.

    Args:
        state: The field's `python_state`.
        taped: Whether a gradient is wanted.
        watched: Whether one would be, were there tensors that are not known.
    """
    field, control = problem.field, problem.control
    given = control.first_step is not None
    return (
        id(field),  # which a recording keeps
        module_key(field, state, x.device),
        (x.shape, x.dtype, x.device),
        None if context is None else (context.shape, context.dtype, context.requires_grad),
        None if problem.probe is None else problem.probe.shape,
        problem.tableau.name,
        (problem.compiled, problem.precision),
        dataclasses.replace(control, first_step=1.0 if given else None),
        (problem.direction, problem.sign, problem.divergence),
        tuple(problem.regularizers.items()),
        # Its leaves stand in for parameters, and not for others in the same memory.
        taped and tuple(id(p) for p in field.parameters() if p.requires_grad),
        watched,
    )


class Recording:
    """One solve in memory of its own, to be repeated from other states and at other times.

    Args:
        problem, x, context: Of the first such solve; nothing is kept but the field and settings.
        capacity: How many accepted steps the gradient's tape has room for; 0 for no gradient.

    Raises:
        NotCaptured: The field computes with tensors that no gradient would reach.
    """

    def __init__(self, problem: Problem, x: Tensor, context: Tensor | None, capacity: int) -> None:
        self.lock = threading.Lock()
        self.capacity = capacity
        device, tableau, control = x.device, problem.tableau, problem.control
        self.tableau = tableau
        self.probe = None if problem.probe is None else static_like(problem.probe)
        self.context = None if context is None else static_like(context)
        self.problem = replace(problem, probes=self.probe, stats=SolveStats())
        self.dynamics = Dynamics(self.problem)
        self.ops: Any = kernels(x)

        def numbers(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.y = x.new_empty(x.numel() + problem.extras * x.shape[0])
        self.z = self.y[: x.numel()].view(x.shape)
        self.system = ForwardSystem(self.dynamics, self.z, self.context, None)
        self.k = x.new_empty(tableau.stages, self.y.numel())
        self.times, self.h = x.new_zeros(tableau.stages), x.new_zeros(1)
        self.attempt = numbers(len(_FIELD))
        self.tape = Tape(x.new_empty(capacity, x.numel()), numbers(capacity, 3))
        self.report = torch.zeros(
            _C.flow_report_numbers, dtype=torch.float64, pin_memory=device.type == "cuda"
        )
        self.plan = [self.attempt, self.times, self.h, self.tape.times, self.report]
        self.rule = [
            *(control.max_step, control.safety, control.ifactor, control.dfactor),
            *(float(control.max_num_steps), float(tableau.order)),
        ]
        self.given_first_step = control.first_step is not None
        self.tolerances = [
            torch.tensor(each, dtype=torch.float64) for each in (control.rtol, control.atol)
        ]
        self.begin = Recorded(self._begin, device)
        self.step = Recorded(self._attempt, device)
        self.step.generators = generators_of(problem.field, device)
        done, failure = (self.attempt[_FIELD[name]] for name in ("done", "failure"))
        self.attempts = Attempts(self.step, self.report, done, failure)
        self.parameters: list[Tensor] = []
        self.need_context = False
        if capacity:
            self._prepare_gradient(context)
        if torch.is_grad_enabled() and not self.dynamics.forward_mode:
            self._check_leaves()

    # ---- forward: what is recorded ---------------------------------------------------------------

    def _control(self, moment: str, norms: Tensor | None = None) -> None:
        self.ops.flow_control(self.plan, norms, moment, self.rule, self.tableau.c)

    def _field(self, time: Tensor, y: Tensor) -> list[Tensor]:
        """The first stage's right-hand side at a time [1], for the stepper."""
        (field,) = self.dynamics.at(time, self.z, self.context, self.dynamics.full[:1])
        return self.system.parts(field(self.system.split(y)[0]))

    def _store(self, stage: int, parts: Sequence[Tensor]) -> None:
        pieces = self.k[stage].split([part.numel() for part in parts])
        for piece, part in zip(pieces, parts):
            piece.view(part.shape).copy_(part)

    def _begin(self) -> None:
        """Evaluates the field at the start and chooses the first step."""
        ops, y, time = self.ops, self.y, self.times[:1]
        y[self.z.numel() :].zero_()
        time.copy_(self.attempt[:1])
        self._store(0, self._field(time, y))
        finite = torch.isfinite(y).all() & torch.isfinite(self.k[0]).all()
        self.attempt[_FIELD["finite"]].copy_(finite)
        if self.given_first_step:
            self._control("first_step")
            return
        norms = self.system.segments
        self._control("begin", ops.rk_initial_norms(y, self.k[0], None, *self.tolerances, norms))
        trial = ops.attempt_stage(y, self.k, [], [1.0], self.h)
        self._store(1, self._field(time, trial))
        self._control(
            "first_step",
            ops.rk_initial_norms(y, self.k[0], self.k[1], *self.tolerances, norms),
        )

    def _attempt(self) -> None:
        ops, tableau, y, h = self.ops, self.tableau, self.y, self.h
        if not tableau.solution_is_last_stage:
            # After a rejection it is there already, which only the device knows.
            self._store(0, self._field(self.times[:1], y))
        fields = self.dynamics.at(self.times[1:], self.z, self.context, self.dynamics.full[1:])
        state: Tensor = y
        fresh: Sequence[Tensor] = []
        for i, field in enumerate(fields, 1):
            state = ops.attempt_stage(y, self.k, fresh, tableau.a[i], h)
            fresh = self.system.parts(field(self.system.split(state)[0]))
        solution = [] if tableau.solution_is_last_stage else tableau.b
        y1 = torch.empty_like(y) if solution else state
        norms = ops.attempt_finish(
            y, self.k, fresh, y1, solution, tableau.e, h, *self.tolerances, self.system.segments
        )
        self._control("decide", norms)
        ops.flow_advance(self.plan, y, y1, self.k, self.tape.z)

    # ---- forward: a solve ------------------------------------------------------------------------

    @torch.no_grad()
    def solve(self, problem: Problem, x: Tensor, context: Tensor | None) -> Any:
        """z at the end, the extras and, where there is room for one, the tape; None where the solve
        failed, _FULL_TAPE where there was too little room.
        """
        start, end = problem.start, problem.end
        numbers = dict.fromkeys(_FIELD, 0.0)
        numbers.update(
            t=start, size=problem.control.first_step or 0.0, end=end, length=abs(end - start),
            direction=math.copysign(1.0, end - start),
        )  # fmt: skip
        stacked = time_tensors(list(numbers.values()), torch.float64, x.device)
        self.attempt.copy_(torch.stack(stacked))
        self._load(problem, context)
        self.z.copy_(x)
        self.report.zero_()
        self.begin()
        attempts, _, failure, accepted, size = self.attempts.run()
        if self.capacity and self.step.random:
            raise NotCaptured("it draws random numbers, and would draw others for the gradient")
        if failure:
            return _FULL_TAPE if failure == _FULL_TAPE else None
        self._count(problem.stats, int(attempts), int(accepted), size)
        outputs = tuple(part.clone() for part in self.system.split(self.y))
        if not self.capacity:
            return outputs
        count = int(accepted)
        return *outputs, Tape(self.tape.z[:count].clone(), self.tape.times[:count].clone())

    def _load(self, problem: Problem, context: Tensor | None) -> None:
        if self.probe is not None:
            self.probe.copy_(problem.probe)
        if self.context is not None:
            self.context.copy_(context)

    def _count(self, stats: SolveStats, attempts: int, accepted: int, size: float) -> None:
        """Counts what the solver with the host in its loop would have evaluated."""
        again = 0 if self.tableau.solution_is_last_stage else accepted - 1
        before = 1 if self.given_first_step else 2
        stats.nfe_forward += before + attempts * (self.tableau.stages - 1) + again
        stats.accepted += accepted
        stats.rejected += attempts - accepted
        stats.step_size = size

    # ---- gradient: what is recorded --------------------------------------------------------------

    def _prepare_gradient(self, context: Tensor | None) -> None:
        field, used = self.problem.field, self.tableau.stages_in_use
        self.parameters = [p for p in field.parameters() if p.requires_grad]
        self.need_context = context is not None and context.requires_grad
        held = ([self.context] if self.need_context else []) + self.parameters
        self.totals = [torch.zeros_like(each) for each in held]
        # By whether the cotangents of the extras are there: the recorded work, and which totals it
        # adds to.
        self.reverses: dict[bool, Recorded] = {}
        self.reached: dict[bool, list[bool]] = {}
        for seen in (False, True):
            work = functools.partial(self._reverse, seen)
            self.reverses[seen] = Recorded(work, self.y.device)
            self.reached[seen] = [False] * len(held)
        self.bars = [torch.zeros_like(part) for part in self.system.split(self.y)]
        # What every stage's derivative is multiplied by, in each stage's state and in the solution.
        rows = [[*row, *[0.0] * used][:used] for row in (*self.tableau.a[:used], self.tableau.b)]
        self.weights = torch.tensor(rows, dtype=torch.float64, device=self.y.device)

    def _leaves(self) -> tuple[Tensor | None, list[Tensor]]:
        """The context and the parameters as leaves of their own: nothing outside a recording has
        nodes of a graph, and so streams, in common with it.
        """
        context = self.context
        if self.need_context:
            context = context.detach().requires_grad_()
        return context, [p.detach().requires_grad_() for p in self.parameters]

    def _check_leaves(self) -> None:
        context, twins = self._leaves()
        z = torch.zeros_like(self.z).requires_grad_()
        time = torch.full((), self.problem.start, dtype=z.dtype, device=z.device)
        known = {id(each) for each in (z, context, *twins)}
        if self.probe is not None:
            self.probe.zero_()
        if self.context is not None:
            self.context.zero_()
        with torch.enable_grad(), self._substituted(twins):
            parts = self.dynamics.evaluate(time, z, context, self.probe, self.dynamics.full[0])
        if any(id(leaf) not in known for part in parts for leaf in leaves(part)):
            raise NotCaptured("it computes with tensors that are none of its parameters")

    def _substituted(self, twins: list[Tensor]) -> Any:
        originals = {id(p): twin for p, twin in zip(self.parameters, twins)}
        return substituted(self.problem.field, originals)

    def _reverse(self, seen: bool) -> None:
        """The tape's next step from its end again, with a graph, and its vector-Jacobian product.

        Args:
            seen: Whether there are cotangents of the extras.
        """
        tableau = self.tableau
        used, weights = tableau.stages_in_use, tableau.b
        self._control("recall")
        index = self.attempt[_FIELD["recalled"]].long().reshape(1)
        z = self.tape.z.index_select(0, index).view_as(self.z)
        h = self.attempt[_FIELD["h"]]
        factors = [row.unbind() for row in (self.weights * h).to(z.dtype).unbind()]
        bars = self.bars if seen else self.bars[:1]
        context, twins = self._leaves()
        others = ([context] if self.need_context else []) + twins
        with torch.enable_grad(), self._substituted(twins):
            z.requires_grad_()
            full = [seen and weight != 0 for weight in weights[:used]]
            fields = self.dynamics.at(self.times[:used], z, context, full)
            stages: list[Parts] = []
            for i, field in enumerate(fields):
                zi = self._sum(z, stages, 0, tableau.a[i], factors[i]) if i else z
                stages.append(field(zi))
            outputs = [
                self._sum(state, stages, part, weights, factors[-1])
                for part, state in enumerate((z, *map(torch.zeros_like, bars[1:])))
            ]
        pairs = [(output, bar) for output, bar in zip(outputs, bars) if output.requires_grad]
        zstep, *gradients = torch.autograd.grad(
            [output for output, _ in pairs],
            [z, *others],
            [bar for _, bar in pairs],
            allow_unused=True,
        )
        bars[0].copy_(zstep)
        for i, (total, gradient) in enumerate(zip(self.totals, gradients)):
            if gradient is not None:
                total.add_(gradient)
                self.reached[seen][i] = True

    def _sum(
        self,
        state: Tensor,
        stages: list[Parts],
        part: int,
        weights: Sequence[float],
        factors: Sequence[Tensor],
    ) -> Tensor:
        """As `forward.weighted_sum`, with the step in memory where the state is."""
        terms = [
            (stage[part], weight, factor)
            for stage, weight, factor in zip(stages, weights, factors)
            if weight != 0
        ]
        if not terms:
            return state
        rows, numbers, multipliers = zip(*terms)
        return _Combine.apply(self.ops, list(numbers), self.h, multipliers, state, *rows)

    # ---- gradient: of a solve --------------------------------------------------------------------

    @torch.no_grad()
    def gradient(
        self,
        problem: Problem,
        tape: Tape,
        context: Tensor | None,
        cotangents: Sequence[Tensor | None],
    ) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:
        """Gradients of x, the context and the parameters."""
        self._load(problem, context)
        count = len(tape.z)
        self.tape.z[:count].copy_(tape.z)
        self.tape.times[:count].copy_(tape.times)
        self.attempt[_FIELD["recalled"]].fill_(float(count))
        zbar, extrabars = filled(self.z, cotangents)
        for mine, bar in zip(self.bars, (zbar, *extrabars)):
            mine.copy_(bar)
        for total in self.totals:
            total.zero_()
        seen = bool(extrabars)
        reverse = self.reverses[seen]
        for _ in range(count):
            reverse()
        problem.stats.nfe_backward += count * self.tableau.stages_in_use
        totals = [
            total.clone() if reached else None
            for total, reached in zip(self.totals, self.reached[seen])
        ]
        context_bar = totals.pop(0) if self.need_context else None
        return self.bars[0].clone(), context_bar, totals


def static_like(x: Tensor) -> Tensor:
    """Memory for other tensors like this one."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


class _Combine(torch.autograd.Function):
    """y + h Σ wⱼ kⱼ with h in memory where the state is; not to be differentiated again.

    Backwards, kⱼ is multiplied by wⱼ h, rounded once.
    """

    @staticmethod
    def forward(ctx: Any, ops, weights, h, factors, y, *rows):
        ctx.factors = factors
        return ops.attempt_combine(y, rows, weights, h)

    @staticmethod
    def backward(ctx: Any, bar: Tensor):
        needs = ctx.needs_input_grad[5:]
        rows = [bar * factor if need else None for factor, need in zip(ctx.factors, needs)]
        return None, None, None, None, bar, *rows


@dataclass
class _Job:
    """What the gradient of a solve begins with."""

    recordings: Recordings
    recording: Recording
    key: tuple
    problem: Problem
    tape: Tape
    parameters: list[Tensor]
    asked: bool

    def gradient(
        self, x: Tensor, context: Tensor | None, cotangents: Sequence[Tensor | None]
    ) -> tuple[Tensor, Tensor | None, list[Tensor | None]] | None:
        """None where it has to be computed with the host in the loop."""
        recording = self.recording
        state = python_state(self.problem.field, x.device)
        unchanged = self.key == key_of(self.problem, x, context, state, True, False)
        if not unchanged or self.recordings.kept.get(self.key, recording) is None:
            return None
        if not recording.lock.acquire(blocking=False):
            return None
        try:
            return recording.gradient(self.problem, self.tape, context, cotangents)
        except NotCaptured as error:
            reason = self.recordings.give_up(self.key, self.problem, error)
            if self.asked:
                self.recordings.say(reason)
            return None
        finally:
            recording.lock.release()
            new_counters(self.problem.field, state)


class _Replayed(torch.autograd.Function):
    """As `solve`'s discrete gradient, replayed."""

    @staticmethod
    def forward(ctx: Any, job: _Job, outputs, x, context, *tensors):
        ctx.job = job
        # The field computes with its own tensors. Saved as well, so that a change in place between
        # forward and backward (an optimizer's step) is an error and no wrong gradient.
        ctx.save_for_backward(x, context, *tensors)
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None):
        x, context, *_ = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            gradients = _gradients(ctx, x, context, cotangents)
        return None, None, *gradients


def _gradients(
    ctx: Any, x: Tensor, context: Tensor | None, cotangents: Sequence[Tensor | None]
) -> list[Tensor | None]:
    job: _Job = ctx.job
    needs = ctx.needs_input_grad[2:]
    if not torch.is_grad_enabled():
        found = job.gradient(x, context, cotangents)
        if found is not None:
            xbar, context_bar, totals = found
            return [xbar if needs[0] else None, context_bar if needs[1] else None, *totals]
    dynamics = Dynamics(job.problem)
    tape = job.tape.steps(x.shape)
    needs = [*needs[:2], False, False, *needs[2:]]
    if torch.is_grad_enabled():
        inputs = [x, context, None, None, *job.parameters]
        gradients = replayed_gradient(dynamics, tape, inputs, needs, cotangents)
    else:
        if context is not None:
            context = context.detach().requires_grad_(context.requires_grad)
        start = Start(x, context, None, 0, job.parameters)
        gradients = taped_gradient(dynamics, tape, start, needs, x, cotangents)
    job.problem.stats.nfe_backward += dynamics.evaluations
    return [*gradients[:2], *gradients[4:]]
