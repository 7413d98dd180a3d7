"""Continuous normalizing flows: densities by solving a differential equation."""

import contextlib
import dataclasses
import difflib
import math
import operator
import sys
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

from pycnf._ops import has_kernels
from pycnf.nn.divergence import VectorField
from pycnf.nn.fusion import why_not_fused
from pycnf.nn.mlp import MLP
from pycnf.nn.precision import PRECISIONS
from pycnf.odeint.arguments import choice
from pycnf.odeint.tableau import TABLEAUX, Tableau
from pycnf.warn import warn

from .captured import Recordings, is_own, is_recordable
from .control import AdaptiveControl, FixedControl
from .distributions import StandardNormal
from .dynamics import REGULARIZERS, check_time_per_sample
from .fused import GPUS, fits_gpu, solve_fused
from .noise import Noise
from .problem import Problem
from .solve import solve
from .stats import SolveStats

CHOICES = {
    "divergence": ("hutchinson", "exact"),
    "noise": ("rademacher", "gaussian"),
    "gradient": ("discrete", "continuous", "seminorm", "autograd"),
    "steps": ("shared", "per-sample"),
    "engine": ("auto", "fused", "generic"),
    "precision": PRECISIONS,
    "method": tuple(TABLEAUX),
}
ADAPTIVE_OPTIONS = ("first_step", "max_step", "safety", "ifactor", "dfactor")
FIXED_OPTIONS = ("step_size", "num_steps")
# Of those that must be more, or less, than any number above 0.
OPTION_BOUNDS = {"safety": (0.0, 1.0), "ifactor": (1.0, math.inf), "dfactor": (0.0, 1.0)}


class CNF(nn.Module):
    """A continuous normalizing flow (FFJORD, Grathwohl et al. 2019).

    Data x at time t1 flow along dz/dt = f(t, z) back to the base distribution at t0:

        log p(x) = log p_base(z(t0)) + logdet,   logdet = −∫_{t0}^{t1} tr(∂f/∂z) dt.

    Gradients: "discrete" (the exact gradient of the computed numbers, from a tape of accepted
    steps), "continuous" (the adjoint equation, constant memory), "seminorm" (the same, the
    parameters not driving the step size) or "autograd" (through the solver's operations). A
    discrete or autograd gradient can be differentiated again. Gradients flow to x, context, base
    and field; see `flows.parameters` for how a plain callable's parameters are found.

    Args:
        field: f(t, z), or f(t, z, context) where a context is given; t 0-dim, or [B] with steps
            per sample; z [B, D]. Row i of the result must depend on row i of z only.
        divergence: "hutchinson" (random probes) or "exact".
        noise: Of the probes: "rademacher" or "gaussian".
        probes: K, number of probes.
        method: An adaptive method (dopri5 dopri8 tsit5 bosh3 fehlberg2 adaptive_heun) or a fixed
            one (euler midpoint heun2 heun3 rk4).
        rtol, atol: Tolerances of adaptive methods.
        t0, t1: Times of base and data; a tensor that requires a gradient gets one.
        options: For adaptive methods first_step, max_step, safety, ifactor, dfactor; for fixed ones
            step_size or num_steps, one of which must be given.
        max_num_steps: Largest number of attempted steps of an adaptive method.
        gradient: "discrete", "continuous", "seminorm" or "autograd".
        steps: "shared" by the batch or "per-sample"; then "continuous" means "seminorm".
        engine: "fused" runs an `MLP` (`pycnf.nn.fuse` makes one of other modules) in f32 and f64: a
            whole solve in one call into compiled code on the CPU; on a GPU in one launch, where the
            network fits into a multiprocessor's shared memory, or else layer by layer. "generic"
            runs any field; "auto" takes the fused one where it can. `explain()` says which it is
            and why.
        base: Distribution with `log_prob` [B, D] -> [B] and `sample`; None for N(0, I).
        regularizers: Weights of "kinetic", ∫‖f‖² dt, and "jacobian", ∫‖∂f/∂z‖_F² dt (RNODE, Finlay
            et al. 2020), left in `stats.regularizers` by each solve with a logdet. They are
            quadratures outside the error control.
        cuda_graph: On a GPU, records an attempted step once and replays it as a CUDA graph, and so
            for the discrete gradient: no kernel waits for Python. None for fields of `pycnf.nn`
            where that can be done; True for any module that does the same work every time, with a
            warning where it cannot (none where the fused engine runs, which has nothing to record);
            False for never. For steps shared by the batch of adaptive methods in f32 and f64, with
            the discrete gradient or none. Numbers, strings and tensors that are attributes of the
            field or of modules in it may change; all else that it reads from Python is read once,
            at the recording.
        precision: Of the products of the fused engine, in f32 on a GPU: "float32", or "tf32",
            "3xtf32" (near f32) or "bf16" on tensor cores; state, sums and error norm stay f32.
            Layer by layer, "float32" is what `torch.backends.cuda.matmul` says.

    Attributes:
        stats: `SolveStats` of the newest forward; None before.
        keep_bytes: Memory that a discrete gradient may take to keep the stages of a solve, 256 MiB;
            steps beyond are computed again, and with 0 all are: B·D numbers per accepted step.

    Raises:
        TypeError, ValueError: An argument is not as described; the message names it.

    Example:
        >>> flow = CNF(MLP(2))
        >>> loss = -flow.log_prob(torch.randn(512, 2)).mean()
        >>> loss.backward()
        >>> samples = flow.sample(100)
    """

    # What was checked, and the control made of it; see `_control`.
    _checked: tuple[tuple, AdaptiveControl | FixedControl] | None = None
    # A field and divergence, and whether they fit into a GPU; see `_why_by_layers`.
    _fitting: tuple[tuple, bool] | None = None

    def __init__(
        self,
        field: VectorField,
        divergence: str = "hutchinson",
        noise: str = "rademacher",
        probes: int = 1,
        method: str = "dopri5",
        rtol: float = 1e-5,
        atol: float = 1e-5,
        t0: float | Tensor = 0.0,
        t1: float | Tensor = 1.0,
        options: Mapping[str, Any] | None = None,
        max_num_steps: int = 1000,
        gradient: str = "discrete",
        steps: str = "shared",
        engine: str = "auto",
        base: Any = None,
        regularizers: Mapping[str, float] | None = None,
        cuda_graph: bool | None = None,
        precision: str = "float32",
    ) -> None:
        super().__init__()
        if not callable(field) or isinstance(field, type):
            what = f"the class {field.__name__}" if isinstance(field, type) else repr(field)
            raise TypeError(f"field: got {what}, expected a callable f(t, z)")
        for name, value in (("options", options), ("regularizers", regularizers)):
            _check_mapping(name, value)
        if base is not None and not (hasattr(base, "log_prob") and hasattr(base, "sample")):
            raise TypeError(f"base: got {base!r}, expected a distribution: log_prob and sample")
        self.field = field
        self.divergence = divergence
        self.noise = noise
        self.probes = probes
        self.method = method
        self.rtol = rtol
        self.atol = atol
        self._set_time("t0", t0)
        self._set_time("t1", t1)
        self.options = dict(options or {})
        self.max_num_steps = max_num_steps
        self.gradient = gradient
        self.steps = steps
        self.engine = engine
        self.regularizers = dict(regularizers or {})
        self.cuda_graph = cuda_graph
        self.precision = precision
        self.keep_bytes = 1 << 28
        self._control()
        self._times()
        self._takes_fused()
        if base is None:
            base = StandardNormal(_features_of(field))
            like = _tensor_of(field)
            if like is not None:
                base = base.to(like)
        self.base = base
        self.stats: SolveStats | None = None
        self._recordings: Recordings | None = None
        self._warned = False
        self._times_checked = False

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        probe: Tensor | None = None,
        seed: int | None = None,
        keys: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Data to base.

        Args:
            x: Data [B, D], in the field's dtype.
            context: [B, C] or [C], given to the field; None for a field without.
            probe: Probes [K, B, D] to use instead of random ones.
            seed: Of the random probes; None for one draw from torch's generator.
            keys: int64 [B], which choose each sample's probe for a seed; None for a hash of the
                row, so that a sample sees the same probe in any batch.

        Returns:
            z [B, D] and logdet [B] = log|det ∂z/∂x|.

        Raises:
            TypeError, ValueError: An argument is not as described.
            SolveError: The solve cannot go on.
        """
        z, (logdet, *_) = self._flow(x, context, True, probe, seed, keys, inverse=False)
        return z, logdet

    def inverse(
        self,
        z: Tensor,
        context: Tensor | None = None,
        probe: Tensor | None = None,
        seed: int | None = None,
        keys: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Base to data; arguments as `forward`'s.

        Returns:
            x [B, D] and the logdet [B] that `forward` has for this pair (keys are the hash of z
            here: with random probes, give `probe` or `keys` for equal estimates):
            log p(x) = base.log_prob(z) + logdet.
        """
        x, (logdet, *_) = self._flow(z, context, True, probe, seed, keys, inverse=True)
        return x, logdet

    def log_prob(
        self,
        x: Tensor,
        context: Tensor | None = None,
        probe: Tensor | None = None,
        seed: int | None = None,
        keys: Tensor | None = None,
    ) -> Tensor:
        """Log-density [B] of the rows of x; arguments as `forward`'s.

        In eval mode a random estimate says so, once, by a warning: it is unbiased, but its
        exponential is not, and reported likelihoods should be exact.
        """
        self._warn_of_estimate()
        z, logdet = self(x, context, probe, seed, keys)
        return self._base_log_prob(z) + logdet

    @torch.no_grad()
    def sample(self, n: int, context: Tensor | None = None) -> Tensor:
        """Draws samples [n, D], without a gradient; `sample_and_log_prob` has one.

        Args:
            n: Number of samples.
            context: [n, C] or [C].
        """
        return self._flow(self._base_sample(n), context, False, None, None, None, inverse=True)[0]

    def sample_and_log_prob(
        self,
        n: int,
        context: Tensor | None = None,
        probe: Tensor | None = None,
        seed: int | None = None,
        keys: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draws samples [n, D] with their log-densities [n] in one solve, differentiable.

        `n` and `context` as for `sample`, the others as for `forward`.
        """
        self._warn_of_estimate()
        z = self._base_sample(n)
        x, logdet = self.inverse(z, context, probe, seed, keys)
        return x, self._base_log_prob(z) + logdet

    def trajectory(
        self, x: Tensor, times: Sequence[float] | Tensor, context: Tensor | None = None
    ) -> Tensor:
        """Where x, given at t1, is at other times.

        Steps end on the times, so the states are as good as any other result. Differentiable by x,
        context and field.

        Args:
            x: Data [B, D].
            times: Times between t0 and t1, in any order.
            context: As for `forward`.

        Returns:
            States [len(times), B, D].

        Raises:
            ValueError: A time is not between t0 and t1.
        """
        x, context = self._check_input(x, context)
        listed = times.tolist() if hasattr(times, "tolist") else times
        one = isinstance(listed, Sequence) and getattr(times, "ndim", 1) == 1
        if not one or not all(isinstance(t, Tensor) or _is_number(t) for t in listed):
            raise TypeError(f"times: got {times!r}, expected numbers, a sequence or a tensor [T]")
        wanted = [float(time) for time in listed]
        last, first = self._times()
        for time in wanted:
            if not min(first, last) <= time <= max(first, last):
                raise ValueError(
                    f"times: got {time}, expected times between t0 = {last} and t1 = {first}"
                )
        stats = SolveStats()
        control = self._control()
        if isinstance(control, FixedControl) and control.num_steps is not None:
            control = FixedControl(step_size=abs(first - last) / control.num_steps)
        states = {first: x}
        now = first
        for time in sorted(set(wanted) - {first}, key=lambda time: abs(time - first)):
            if isinstance(control, AdaptiveControl) and stats.step_size is not None:
                control = dataclasses.replace(control, first_step=stats.step_size)
            problem = self._problem(now, time, None, 1.0, stats, divergence=False)
            problem.control = control
            (states[time],) = self._solve(problem, states[now], context, None, None)
            now = time
        self.stats = stats
        return (
            torch.stack([states[time] for time in wanted]) if wanted else x.new_empty(0, *x.shape)
        )

    def explain(self) -> str:
        """One sentence: which engine runs this flow, and why."""
        self._control()
        self._times()
        if self._takes_fused():
            gpu = self.field.like.device.type in GPUS
            why = self._why_by_layers()
            how = "a whole solve in one launch" if gpu else "a whole solve in one call"
            if why is not None:
                how = "layer by layer"
            sentence = (
                f"The fused engine ({how} into compiled code): the field is an MLP that it knows, "
                f"on {'a GPU' if gpu else 'the CPU'} in {self.field.dtype}{self._products(gpu)}"
            )
            return f"{sentence}." if why is None else f"{sentence}, and {why}."
        why = "engine='generic' was asked for"
        if self.engine != "generic":
            why = self._why_not_fused()
        sentence = (
            f"The generic engine (compiled Runge-Kutta steps around the field's code): {why}"
            f"{self._products(False)}."
        )
        if not self._is_recorded():
            return sentence
        return f"{sentence[:-1]}; on a GPU its steps are recorded once and replayed as CUDA graphs."

    def _products(self, possible: bool) -> str:
        """What there is to say of the precision."""
        if self.precision == "float32":
            return ""
        if possible and self.field.dtype == torch.float32:
            return f", its products in {self.precision}"
        return f"; precision={self.precision!r} is for float32 on a GPU, and solves raise"

    def _is_recorded(self) -> bool:
        """Whether, on a GPU, solves of this flow are recorded, as far as it says itself."""
        wanted = is_own(self.field) if self.cuda_graph is None else self.cuda_graph
        if not (wanted and self.steps == "shared" and TABLEAUX[self.method].adaptive):
            return False
        return is_recordable(self.field, self.gradient)

    def extra_repr(self) -> str:
        text = (
            f"divergence={self.divergence!r}, method={self.method!r}, rtol={self.rtol}, "
            f"atol={self.atol}, gradient={self.gradient!r}, steps={self.steps!r}"
        )
        if self.cuda_graph is not None:
            text += f", cuda_graph={self.cuda_graph}"
        return text if self.precision == "float32" else f"{text}, precision={self.precision!r}"

    def __getstate__(self) -> dict[str, Any]:
        # The newest solve's statistics may hold its graph, which can be neither copied nor pickled.
        # So do recorded solves, which belong to this flow's tensors.
        return {**self.__dict__, "stats": None, "_recordings": None}

    # ---- arguments -------------------------------------------------------------------------------

    def _set_time(self, name: str, time: float | Tensor) -> None:
        _check_time(name, time)
        if isinstance(time, Tensor) and not isinstance(time, nn.Parameter):
            self.register_buffer(name, time, persistent=False)
        else:
            setattr(self, name, time)

    def _times(self) -> tuple[float, float]:
        """t0 and t1."""
        for name in ("t0", "t1"):
            _check_time(name, getattr(self, name))
        t0, t1 = _value(self.t0), _value(self.t1)
        if not (math.isfinite(t0) and math.isfinite(t1)) or t0 == t1:
            raise ValueError(f"t0, t1: got {t0} and {t1}, expected two different times")
        return t0, t1

    def _control(self) -> AdaptiveControl | FixedControl:
        """The control of this flow's steps.

        Everything that can be set is checked here, where anything was since the last time.
        """
        settings = (
            self.divergence, self.noise, self.probes, self.method, self.rtol, self.atol,
            self.max_num_steps, self.gradient, self.steps, self.engine, self.keep_bytes,
            self.cuda_graph, self.precision,
        )  # fmt: skip
        # Dicts, and what is in them, may change in place.
        lasting = not (self.options or self.regularizers)
        if self._checked is not None and lasting:
            known, control = self._checked
            if all(map(operator.is_, settings, known)):
                return control
        self._check()
        control = self._make_control()
        self._checked = (settings, control) if lasting else None
        return control

    def _check(self) -> None:
        for name in ("options", "regularizers"):
            _check_mapping(name, getattr(self, name))
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if not (isinstance(value, str) and value in choices):
                near = difflib.get_close_matches(str(value), choices, n=1)
                hint = f". Did you mean {near[0]!r}?" if near else ""
                raise ValueError(
                    f"{name}: got {value!r}, expected one of {', '.join(choices)}{hint}"
                )
        for name in ("probes", "max_num_steps"):
            value = getattr(self, name)
            if not _is_whole(value) or not 1 <= value < 2**31:
                raise ValueError(
                    f"{name}: got {value!r}, expected a whole number of at least 1, and below 2^31"
                )
        choice("cuda_graph", self.cuda_graph)
        if not _is_whole(self.keep_bytes) or not 0 <= self.keep_bytes < 2**63:
            raise ValueError(f"keep_bytes: got {self.keep_bytes!r}, expected a number of bytes")
        for name in ("rtol", "atol"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 <= value <= sys.float_info.max:
                raise ValueError(f"{name}: got {value!r}, expected a number of at least 0")
        if float(self.atol) == 0:
            raise ValueError(
                "atol: got 0, expected a number above 0: the log-determinant starts at 0, where no "
                "relative tolerance is met"
            )
        for name, weight in (self.regularizers or {}).items():
            if name not in REGULARIZERS:
                raise ValueError(
                    f"regularizers: got {name!r}, expected any of {', '.join(REGULARIZERS)}"
                )
            if not _is_number(weight) or not abs(weight) <= sys.float_info.max:
                raise ValueError(f"regularizers: got {weight!r} for {name!r}, expected a weight")

    def _takes_fused(self) -> bool:
        """Whether the fused engine runs this flow; ValueError where it is asked for and cannot."""
        if self.engine == "generic":
            return False
        why = self._why_not_fused()
        if why is not None and self.engine == "fused":
            raise ValueError(f"engine: got 'fused', but {why}")
        return why is None

    def _why_not_fused(self) -> str | None:
        """One sentence saying what keeps the fused engine from running this flow, or None."""
        field = self.field
        why = why_not_fused(field)
        if why is not None:
            return why
        if self.gradient == "autograd":
            return "gradient='autograd' goes through the operations of the generic engine"
        if self.gradient == "continuous" and field.context and self.steps == "shared":
            return (
                "gradient='continuous' has the gradient of the context in its error norm, which "
                "the fused engine does not compute while it solves; 'seminorm' has not"
            )
        like = field.like
        served = has_kernels(like.dtype, like.device) and like.device.type in ("cpu", *GPUS)
        if not served or like.dtype not in (torch.float32, torch.float64):
            return (
                "it runs float32 and float64 on the CPU and on GPUs that pycnf was built for, and "
                f"the field is {like.dtype} on {like.device}"
            )
        return None

    def _why_by_layers(self) -> str | None:
        """What keeps a GPU from solving in one launch, so that it goes layer by layer; or None."""
        field = self.field
        if field.like.device.type not in GPUS:
            return None
        if self.gradient != "discrete":
            return f"gradient={self.gradient!r} has none in one launch"
        if any(getattr(time, "requires_grad", False) for time in (self.t0, self.t1)):
            return "t0 and t1 have no gradients in one launch"
        probes = self.probes if self.divergence == "hutchinson" else 0
        own_times = self.steps == "per-sample" and TABLEAUX[self.method].adaptive
        parts = [layer.parts() for layer in field.layers]
        shapes = [(p.weight.shape, p.gate_weight is not None) for p in parts]
        key = (field.like.device, field.like.dtype, shapes, field.time, probes)
        key = (*key, tuple(self.regularizers), own_times)
        if self._fitting is None or self._fitting[0] != key:
            fits = fits_gpu(field, probes, tuple(self.regularizers), own_times)
            self._fitting = (key, fits)
        if not self._fitting[1]:
            return "the network does not fit into a multiprocessor's shared memory"
        return None

    def _make_control(self) -> AdaptiveControl | FixedControl:
        tableau = TABLEAUX[self.method]
        known = ADAPTIVE_OPTIONS if tableau.adaptive else FIXED_OPTIONS
        options = dict(self.options or {})
        for name, value in options.items():
            if name not in known:
                raise ValueError(
                    f"options: got {name!r}, expected any of {', '.join(known)} "
                    f"for method {self.method!r}"
                )
            if name == "num_steps":
                continue
            least, most = OPTION_BOUNDS.get(name, (0.0, math.inf))
            number = isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex()
            options[name] = float(value) if number or _is_number(value) else math.nan
            if not (options[name] > 0 and least <= options[name] <= most):
                expected = "above 0"
                expected += f", at least {least:g}" if least > 0 else ""
                expected += f" and at most {most:g}" if most < math.inf else ""
                raise ValueError(f"options: got {name}={value!r}, expected a number {expected}")
        if tableau.adaptive:
            return AdaptiveControl(
                float(self.rtol), float(self.atol), self.max_num_steps, **options
            )
        if len(options) != 1:
            raise ValueError(
                f"options: got {options}, expected step_size or num_steps for the fixed-step "
                f"method {self.method!r}"
            )
        if "num_steps" in options:
            count = options["num_steps"]
            if not _is_whole(count) or count < 1:
                raise ValueError(
                    f"options: got num_steps={count!r}, expected a whole number of at least 1"
                )
            return FixedControl(num_steps=int(count))
        if options["step_size"] == math.inf:
            raise ValueError("options: got step_size=inf, expected a number above 0")
        return FixedControl(step_size=options["step_size"])

    def _check_input(
        self, x: Tensor, context: Tensor | None, name: str = "x"
    ) -> tuple[Tensor, Tensor | None]:
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: got {type(x).__name__}, expected a tensor [B, D]")
        features = _features_of(self.field)
        if x.dim() != 2 or x.shape[1] == 0 or (features is not None and x.shape[1] != features):
            expected = f"[B, {features or 'D'}]"
            raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected {expected}")
        like = _tensor_of(self.field)
        expected_dtype = x.dtype if like is None else like.dtype
        if not x.is_floating_point() or x.dtype != expected_dtype:
            expected = "a floating dtype" if like is None else f"the field's {like.dtype}"
            raise TypeError(f"{name}: got {x.dtype}, expected {expected}")
        if isinstance(self.field, MLP) and x.device != like.device:
            raise ValueError(
                f"{name}: got a tensor on {x.device}, expected the field's {like.device}"
            )
        if context is not None:
            if not isinstance(context, Tensor):
                raise TypeError(f"context: got {type(context).__name__}, expected a tensor")
            if isinstance(self.field, MLP) and context.device != x.device:
                raise ValueError(
                    f"context: got a tensor on {context.device}, expected {name}'s {x.device}"
                )
            if context.is_floating_point() and context.dtype != x.dtype:
                raise TypeError(f"context: got {context.dtype}, expected {name}'s {x.dtype}")
            if context.dim() != 1 and (context.dim() == 0 or context.shape[0] != x.shape[0]):
                raise ValueError(
                    f"context: got shape {tuple(context.shape)}, expected [C] or [{x.shape[0]}, C]"
                )
        return x, context

    # ---- solving ---------------------------------------------------------------------------------

    def _flow(
        self,
        x: Tensor,
        context: Tensor | None,
        divergence: bool,
        probe: Tensor | None,
        seed: int | None,
        keys: Tensor | None,
        inverse: bool,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Solves in one direction; the state at the end and its extras, and makes the stats."""
        x, context = self._check_input(x, context, "z" if inverse else "x")
        probes = self._probes(x, probe, seed, keys) if divergence else None
        t0, t1 = self._times()
        start, end, sign = (t0, t1, -1.0) if inverse else (t1, t0, 1.0)
        stats = SolveStats()
        problem = self._problem(start, end, probes, sign, stats, divergence)
        ends = (self.t0, self.t1) if inverse else (self.t1, self.t0)
        z, *extras = self._solve(problem, x, context, *ends)
        stats.regularizers = dict(zip(problem.regularizers, extras[1:]))
        self.stats = stats
        return z, tuple(extras)

    def _problem(
        self,
        start: float,
        end: float,
        probes: Tensor | Noise | None,
        sign: float,
        stats: SolveStats,
        divergence: bool,
    ) -> Problem:
        control = self._control()
        tableau: Tableau = TABLEAUX[self.method]
        return Problem(
            field=self.field,
            tableau=tableau,
            control=control,
            start=start,
            end=end,
            divergence=divergence,
            probes=probes,
            sign=sign,
            regularizers=dict(self.regularizers or {}) if divergence else {},
            # Without an error estimate there is nothing to adapt to a sample.
            per_sample=self.steps == "per-sample" and tableau.adaptive,
            gradient=self.gradient,
            precision=self.precision,
            keep_bytes=int(self.keep_bytes),
            stats=stats,
        )

    def _solve(self, problem: Problem, *arguments: Any) -> tuple[Tensor, ...]:
        # A solve chooses its steps by its values, so a compiler has nothing to trace. The decorator
        # would import the compiler with every `import pycnf`.
        if torch.compiler.is_compiling():
            return torch.compiler.disable(self._solve_now)(problem, *arguments)
        return self._solve_now(problem, *arguments)

    def _solve_now(
        self,
        problem: Problem,
        x: Tensor,
        context: Tensor | None,
        start: float | Tensor | None,
        end: float | Tensor | None,
    ) -> tuple[Tensor, ...]:
        start, end = (
            time if isinstance(time, Tensor) and time.requires_grad else None
            for time in (start, end)
        )
        # f32 means f32: autocast would compute the field in half precision behind error control.
        plain = contextlib.nullcontext()
        if torch.is_autocast_enabled(x.device.type):
            plain = torch.autocast(x.device.type, enabled=False)
        with plain:
            if problem.per_sample and not self._times_checked and x.shape[0]:
                check_time_per_sample(problem, x, context)
                self._times_checked = True
            fused = self._takes_fused()
            if self.precision != "float32":
                self._check_precision(fused, x)
            _check_transforms(fused)
            if fused and self._why_by_layers() is None:
                return solve_fused(problem, x, context, start, end)
            if fused:
                problem.compiled, problem.stats.engine = True, "fused"
            if not torch.is_inference_mode_enabled():
                return self._solve_generic(problem, x, context, start, end)
            # A divergence by vector-Jacobian products needs a graph, which inference mode refuses.
            with torch.inference_mode(False), torch.no_grad():
                if problem.probe is not None:
                    problem.probes = problem.probe.clone()
                context = None if context is None else context.clone()
                return self._solve_generic(problem, x.clone(), context, None, None)

    def _check_precision(self, fused: bool, x: Tensor) -> None:
        if fused and x.device.type in GPUS and x.dtype == torch.float32:
            return
        raise ValueError(
            f"precision: got {self.precision!r}, expected 'float32': others are for the fused "
            f"engine in float32 on a GPU, and this is the {'fused' if fused else 'generic'} engine "
            f"in {x.dtype} on {x.device}"
        )

    def _solve_generic(
        self,
        problem: Problem,
        x: Tensor,
        context: Tensor | None,
        start: Tensor | None,
        end: Tensor | None,
    ) -> tuple[Tensor, ...]:
        asked = bool(self.cuda_graph)
        if asked or (self.cuda_graph is None and is_own(self.field)):
            if self._recordings is None:
                self._recordings = Recordings()
            ends = start is not None or end is not None
            outputs = self._recordings.solve(problem, x, context, ends, asked)
            if outputs is not None:
                return outputs
        return solve(problem, x, context, start, end)

    def _probes(
        self, x: Tensor, probe: Tensor | None, seed: int | None, keys: Tensor | None
    ) -> Tensor | Noise | None:
        """The probes of a solve: given, random, or None for the exact divergence."""
        if probe is not None:
            if keys is not None or seed is not None:
                raise ValueError("probe: got seed or keys as well, expected one or the other")
            if self.divergence == "exact":
                raise ValueError("probe: got probes, expected None with divergence='exact'")
            if not isinstance(probe, Tensor):
                raise TypeError(f"probe: got {type(probe).__name__}, expected a tensor [K, B, D]")
            if probe.dim() != 3 or probe.shape[1:] != x.shape or probe.shape[0] == 0:
                raise ValueError(
                    f"probe: got shape {tuple(probe.shape)}, expected [K, {x.shape[0]}, "
                    f"{x.shape[1]}] with K of at least 1"
                )
            if probe.dtype != x.dtype:
                raise TypeError(f"probe: got {probe.dtype}, expected x's {x.dtype}")
            if probe.device != x.device:
                raise ValueError(f"probe: got a tensor on {probe.device}, expected x's {x.device}")
            if probe.requires_grad:
                raise ValueError("probe: requires a gradient, which a solve does not compute")
            return probe
        if keys is None:
            keys = x.detach()
        elif not isinstance(keys, Tensor):
            raise TypeError(f"keys: got {type(keys).__name__}, expected an int64 tensor [B]")
        elif keys.shape != x.shape[:1] or keys.dtype != torch.int64:
            raise ValueError(
                f"keys: got {keys.dtype} of shape {tuple(keys.shape)}, expected int64 "
                f"[{x.shape[0]}]"
            )
        elif keys.device != x.device:
            raise ValueError(f"keys: got a tensor on {keys.device}, expected x's {x.device}")
        if seed is not None and not (_is_whole(seed) and -(2**63) <= seed < 2**64):
            raise ValueError(f"seed: got {seed!r}, expected a whole number of at most 64 bits")
        if self.divergence == "exact":
            return None
        if seed is None:
            # From the CPU generator whatever the device: no synchronization.
            seed = int(torch.empty((), dtype=torch.int64).random_())
        return Noise(keys, seed, int(self.probes), self.noise, x.shape[1], x.dtype)

    # ---- base distribution -----------------------------------------------------------------------

    def _base_log_prob(self, z: Tensor) -> Tensor:
        log_prob = self.base.log_prob(z)
        if log_prob.shape != z.shape[:1]:
            raise ValueError(
                f"base: log_prob returned shape {tuple(log_prob.shape)}, expected [{z.shape[0]}]; "
                "torch.distributions.Independent(base, 1) sums over features"
            )
        return log_prob

    def _base_sample(self, n: int) -> Tensor:
        if not _is_whole(n) or n < 0:
            raise ValueError(f"n: got {n!r}, expected a whole number of at least 0")
        differentiable = torch.is_grad_enabled() and getattr(self.base, "has_rsample", False)
        try:
            z = (self.base.rsample if differentiable else self.base.sample)((n,))
        except ValueError as error:
            raise ValueError(
                "base: cannot be sampled, for the field does not say its number of features; "
                "give base=pycnf.flows.StandardNormal(D)"
            ) from error
        like = _tensor_of(self.field)
        return z if like is None else z.to(like)

    def _warn_of_estimate(self) -> None:
        if self.training or self.divergence == "exact" or self._warned:
            return
        self._warned = True
        warn(
            "log_prob in eval mode is a random estimate (divergence='hutchinson', "
            f"{self.probes} probe{'s' if self.probes > 1 else ''}); set divergence='exact' for "
            "likelihoods to report"
        )


def _check_transforms(fused: bool) -> None:
    """RuntimeError inside of transforms of torch.func that a solve cannot be a part of."""
    if not torch._C._are_functorch_transforms_active():
        return
    kinds = torch._C._functorch.TransformType
    found = {level.key() for level in torch._C._functorch.get_interpreter_stack()}
    served = {kinds.Grad, kinds.Functionalize} if fused else {kinds.Functionalize}
    if others := found - served:
        names = " and ".join(sorted(str(kind).rsplit(".", 1)[-1].lower() for kind in others))
        raise RuntimeError(
            f"CNF: got a transform of torch.func ({names}) around a solve on the "
            f"{'fused' if fused else 'generic'} engine, expected none, or grad, vjp or jacrev of "
            "one on the fused engine"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _check_mapping(name: str, value: Any) -> None:
    if not isinstance(value, Mapping | None):
        raise TypeError(f"{name}: got {value!r}, expected a dict or None")


def _check_time(name: str, time: Any) -> None:
    if isinstance(time, Tensor):
        if time.dim() != 0:
            raise ValueError(f"{name}: got shape {tuple(time.shape)}, expected a 0-dim time")
        if time.is_complex():
            raise TypeError(f"{name}: got {time.dtype}, expected a real number")
    elif not _is_number(time):
        raise TypeError(f"{name}: got {time!r}, expected a number or a 0-dim tensor")


def _value(time: float | Tensor) -> float:
    return float(time.detach() if isinstance(time, Tensor) else time)


def _features_of(field: VectorField) -> int | None:
    """The field's own D, if it says one; `features` may be anything in a user's module."""
    features = getattr(field, "features", None)
    return features if isinstance(features, int) else None


def _tensor_of(field: VectorField) -> Tensor | None:
    """A tensor with the field's dtype and device; None for a callable that has no parameters."""
    if isinstance(field, MLP):
        return field.like
    if isinstance(field, nn.Module):
        for parameter in field.parameters():
            if parameter.is_floating_point():
                return parameter
    return None
