"""What a solve of the drop-in took: `last_stats`."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from torch import Tensor

_newest = threading.local()


@dataclass
class SolveStats:
    """Counts of one solve, kept up to date while it runs.

    Attributes:
        method: the solver's name.
        evaluations: calls of the vector field. Where every element of a batch takes its own steps,
            calls for the whole batch.
        accepted, rejected: steps. Where every element takes its own, int64 tensors of the batch's
            shape, 0-dim if elements cannot differ; None where the method does not tell (SciPy's,
            and solver classes of the user's).
        step_sizes: of the accepted steps, in order and positive; the last may reach past the last
            output time. Empty where `accepted` is no number; of a recorded solve (`cuda_graph`) the
            first 16384.
        backward: the same of the solves of the gradient by `odeint_adjoint`, in sum, from the first
            one on. A discrete gradient solves nothing: it counts evaluations alone.
    """

    method: str
    evaluations: int = 0
    accepted: int | Tensor | None = 0
    rejected: int | Tensor | None = 0
    step_sizes: list[float] = field(default_factory=list, repr=False)
    backward: SolveStats | None = None

    def accept(self, size: float) -> None:
        """Counts an accepted step."""
        self.accepted += 1
        self.step_sizes.append(size)

    def for_backward(self) -> SolveStats:
        """The counts that a backward pass adds to."""
        if self.backward is None:
            self.backward = SolveStats(self.method)
        return self.backward

    def add_steps(self, solve: SolveStats) -> None:
        """Adds the steps of another solve, whose evaluations have been counted already."""
        if solve.accepted is None or self.accepted is None:
            self.accepted = self.rejected = None
            return
        self.accepted += solve.accepted
        self.rejected += solve.rejected
        self.step_sizes += solve.step_sizes


def last_stats() -> SolveStats | None:
    """What the newest solve of this thread by `odeint`, `odeint_adjoint`, `odeint_event`,
    `odeint_dense` or `odeint_per_sample` took; None if there was none.

    Every solve has an object of its own, so one that is kept stays what it is. A solve that failed
    leaves what it came to.

    Example:
        >>> import torch, pycnf
        >>> y = pycnf.odeint(lambda t, y: -y, torch.ones(2), torch.tensor([0.0, 1.0]), method="rk4")
        >>> stats = pycnf.last_stats()
        >>> stats.evaluations, stats.accepted, stats.rejected, stats.step_sizes
        (4, 1, 0, [1.0])
    """
    return getattr(_newest, "stats", None)


def publish(stats: SolveStats) -> SolveStats:
    """Makes this the stats of the newest solve."""
    _newest.stats = stats
    return stats
