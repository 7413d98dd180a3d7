"""An adaptive solve whose state jumps at given times, and which goes on with its step size.

The step sequence is that of `adaptive`, but for the stops: a step ends exactly on the next of them,
and what the controller had wished for before it was cut short is not forgotten.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pycnf.odeint.adaptive import AdaptiveSolver, Step
from pycnf.odeint.problem import Problem
from pycnf.odeint.tableau import Tableau

_NAME = "jump"


class JoinedSolver(AdaptiveSolver):
    """One solve; see the module.

    Args:
        stops: ascending times s after the start, with an index each.
        jump: (index, state) -> None; edits the flat state at a stop in place.
        jumped: (index, state, slope) -> None; the same once the slope after the jump is known, for
            edits that the field does not depend on.
    """

    one_loop = False

    def __init__(
        self,
        problem: Problem,
        tableau: Tableau,
        name: str,
        *,
        stops: Sequence[tuple[float, int]],
        jump: Callable[[int, Tensor], None],
        jumped: Callable[[int, Tensor, Tensor], None] | None,
        **options: Any,
    ) -> None:
        super().__init__(problem, tableau, name, **options)
        self.jumps = [(self.round(s), index) for s, index in stops]
        self.jump, self.jumped = jump, jumped

    def sort_stops(self) -> None:
        super().sort_stops()
        self._land(self.round_state(self.s))

    def attempt(self) -> Step | None:
        wished = self.ds
        step = super().attempt()
        if step is not None and step.stop == _NAME and math.isfinite(wished):
            self.ds = min(max(self.ds, wished), self.limits.max_step)
        return step

    def advance(self, step: Step) -> None:
        super().advance(step)
        # A user's jump_t at the same time has set the far side of it.
        self._land(self.f_time if step.stop == "jump_t" else self.round_state(self.s))

    def _land(self, f_time: float) -> None:
        """Makes the jumps of the stops that are reached, whatever ended the step there: a clip,
        another stop at the same time, or its own size; f is taken anew at f_time.
        """
        reached = [index for s, index in self.jumps if s <= self.s]
        del self.jumps[: len(reached)]
        self.stops[_NAME], self.next_stop[_NAME] = [s for s, _ in self.jumps], 0
        if not reached:
            return
        self.taken = 0
        for index in reached:
            self.jump(index, self.y)
        self.finite = bool(torch.isfinite(self.y).all())
        self._evaluate_start(f_time)
        if self.jumped is not None:
            for index in reached:
                self.jumped(index, self.y, self.rows.row(0))
