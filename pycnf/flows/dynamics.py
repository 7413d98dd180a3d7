"""The field with its extras (divergence, regularizers), evaluated and counted."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from pycnf.nn.compiled_field import CompiledField
from pycnf.nn.divergence import (
    contract,
    has_forward_mode,
    mlp_value_and_divergence,
    mlp_value_divergence_and_norm,
    value_and_divergence,
    value_divergence_and_norm,
)
from pycnf.nn.field_ops import serves, time_of
from pycnf.nn.layers import Affine

from .problem import Problem

Parts = tuple[Tensor, ...]
Field = Callable[[Tensor], Parts]
REGULARIZERS = ("kinetic", "jacobian")

# Layers of all stages of a step are made together unless their weights exceed this many numbers.
WEIGHTS_AT_ONCE = 1 << 22


@torch.no_grad()
def check_time_per_sample(problem: Problem, x: Tensor, context: Tensor | None) -> None:
    """Finds out, at the start of a solve, whether a field means what it should by times [B].

    A field like t * z broadcasts them along the features, without a word where B equals D.

    Raises:
        ValueError: the field cannot take a time per sample, or gives other values then.
    """
    field = problem.field
    if has_forward_mode(field):
        return
    arguments = (x,) if context is None else (x, context)
    shared = torch.tensor(problem.start, dtype=x.dtype, device=x.device)
    try:
        expected = field(shared, *arguments)
    except Exception:
        return  # the solve says what is wrong
    moved = shared.expand(x.shape[0]).clone()
    try:
        got = field(moved, *arguments)
        moved[-1] += 1  # must not be felt by the others
        other = field(moved, *arguments)
    except RuntimeError as error:
        raise ValueError(
            "field: steps='per-sample' calls it with a time per sample, t [B], and it failed "
            f"({error}); t.unsqueeze(-1), where t has a dimension, broadcasts against z [B, D]"
        ) from error
    close = torch.allclose(expected, got, rtol=1e-3, atol=1e-5, equal_nan=True)
    alone = torch.allclose(got[:-1], other[:-1], rtol=1e-3, atol=1e-5, equal_nan=True)
    if not (close and alone):
        raise ValueError(
            "field: steps='per-sample' calls it with a time per sample, t [B], and a sample's "
            "value depends on another's time; t.unsqueeze(-1) broadcasts against z [B, D]"
        )


class Dynamics:
    """Right-hand side of a problem: (f, sign·div, regularizers), or (f,) where no more is needed.

    Args:
        problem: The solve.

    Attributes:
        evaluations: How often the field has been evaluated.
        full: For every stage, whether its extras have a weight in the solution or in the error;
            where they have none (dopri5's second stage) no divergence is needed.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.forward_mode = has_forward_mode(problem.field)
        self.compiled = problem.compiled and self.forward_mode
        self.evaluations = 0
        tableau = problem.tableau
        self.full = [weight != 0 for weight in tableau.b]
        if tableau.adaptive:
            self.full = [full or e != 0 for full, e in zip(self.full, tableau.e)]
            # The first stage also starts the solve; the last may be the first of the next step.
            self.full[0] = True
            self.full[-1] = self.full[-1] or tableau.solution_is_last_stage
        self._jacobian = "jacobian" in problem.regularizers

    def at(
        self, times: Tensor, z: Tensor, context: Tensor | None, full: Sequence[bool]
    ) -> list[Field]:
        """The right-hand side at S times shared by the batch, as functions of the state.

        Args:
            times: [S], in z's dtype.
            z: A state [B, D].
            context: What the field is given, or None.
            full: For every time, whether the extras are wanted as well.
        """
        probe = self.problem.probe
        if compiled := self._compiled(times, z, context, probe):
            return [
                lambda z, t=t, full=full: self._evaluate_compiled(compiled, t, z, probe, full)
                for t, full in zip(times.unbind(), full)
            ]
        if not self.forward_mode or times.shape[0] == 1 or not self._fits(times.shape[0]):
            return [
                lambda z, t=t, full=full: self.evaluate(t, z, context, probe, full)
                for t, full in zip(times.unbind(), full)
            ]
        many = self.problem.field.affines_at(times, z, context)
        return [
            lambda z, affines=affines, full=full: self._evaluate_mlp(affines, z, probe, full)
            for affines, full in zip(many, full)
        ]

    def evaluate(
        self, t: Tensor, z: Tensor, context: Tensor | None, probe: Tensor | None, full: bool
    ) -> Parts:
        """The right-hand side at one time, 0-dim or [B]."""
        field = self.problem.field
        if compiled := self._compiled(t, z, context, probe):
            return self._evaluate_compiled(compiled, time_of(t, z), z, probe, full)
        if self.forward_mode:
            return self._evaluate_mlp(field.affines(t, z, context), z, probe, full)
        self.evaluations += 1
        if full and self.problem.divergence:
            function = value_divergence_and_norm if self._jacobian else value_and_divergence
            parts = function(field, t, z, probe, context)
        else:
            parts = (field(t, z) if context is None else field(t, z, context),)
        if not isinstance(parts[0], Tensor):
            raise TypeError(f"field: returned {type(parts[0]).__name__}, expected a tensor like z")
        if parts[0].shape != z.shape:
            raise ValueError(
                f"field: returned shape {tuple(parts[0].shape)}, expected z's {tuple(z.shape)}"
            )
        if parts[0].dtype != z.dtype:
            raise TypeError(f"field: returned {parts[0].dtype}, expected z's {z.dtype}")
        return self._weigh(*parts)

    def _compiled(
        self, t: Tensor, z: Tensor, context: Tensor | None, probe: Tensor | None
    ) -> CompiledField | None:
        """The field by the compiled ops, where that is wanted and they serve it."""
        field = self.problem.field
        if not (self.compiled and serves(field, t, z, probe, context)):
            return None
        return CompiledField(field, z, context, self.problem.precision)

    def _evaluate_compiled(
        self, field: CompiledField, t: Tensor, z: Tensor, probe: Tensor | None, full: bool
    ) -> Parts:
        self.evaluations += 1
        if not (full and self.problem.divergence):
            return (field.value(t, z),)
        if self._jacobian:
            return self._weigh(*contract(*field.value_and_images(t, z, probe), probe))
        return self._weigh(*field.value_and_divergence(t, z, probe))

    def _evaluate_mlp(
        self, affines: list[Affine], z: Tensor, probe: Tensor | None, full: bool
    ) -> Parts:
        self.evaluations += 1
        field = self.problem.field
        if not (full and self.problem.divergence):
            return (field.value_at(affines, z),)
        function = mlp_value_divergence_and_norm if self._jacobian else mlp_value_and_divergence
        return self._weigh(*function(affines, field.activation, z, probe))

    def _weigh(
        self, value: Tensor, divergence: Tensor | None = None, norm: Tensor | None = None
    ) -> Parts:
        """From what was evaluated to the derivatives of z, ℓ and the regularizers' quadratures."""
        if divergence is None:
            return (value,)
        problem = self.problem
        parts = [value, divergence if problem.sign > 0 else -divergence]
        for name, weight in problem.regularizers.items():
            integrand = value.square().sum(-1) if name == "kinetic" else norm
            parts.append(integrand * (weight * problem.direction))
        return tuple(parts)

    def _fits(self, count: int) -> bool:
        field = self.problem.field
        widths = (field.features, *field.hidden, field.features)
        return count * sum(a * b for a, b in pairwise(widths)) <= WEIGHTS_AT_ONCE
