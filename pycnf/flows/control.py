"""Step-size policy of the flows: where steps begin and end.

Times and step sizes are Python floats, f64 whatever the state's dtype. A step h is signed: negative
for a solve that goes backwards in time.
"""

import math
from dataclasses import dataclass

from pycnf.odeint.tableau import Tableau

# A step that would end within this fraction of what is left goes to the end.
CLOSE = 1e-10


@dataclass(frozen=True)
class AdaptiveControl:
    """Integral controller of an adaptive method, with the constants of torchdiffeq.

    Attributes:
        rtol, atol: Tolerances.
        max_num_steps: Largest number of attempts, rejected ones included.
        first_step: Size of the first step; None for Hairer's choice.
        max_step: Largest step.
        safety, ifactor, dfactor: h grows by safety·err^(−1/order), within [dfactor, ifactor].
    """

    rtol: float
    atol: float
    max_num_steps: int = 1000
    first_step: float | None = None
    max_step: float = math.inf
    safety: float = 0.9
    ifactor: float = 10.0
    dfactor: float = 0.2

    def factor(self, error: float, order: int) -> float:
        """What the next attempt's step is of this one's, given this one's error norm."""
        if not math.isfinite(error):
            return self.dfactor
        if error == 0:
            return self.ifactor
        least = 1.0 if error < 1 else self.dfactor
        return min(self.ifactor, max(self.safety * error ** (-1 / order), least))


def trial_step(d0: float, d1: float, length: float) -> float:
    """Hairer's h0, from the norms of the state and of its derivative; within the interval.

    Source: Hairer, Nørsett & Wanner, Solving Ordinary Differential Equations I, II.4.
    """
    h0 = 1e-6 if d0 < 1e-5 or d1 < 1e-5 else 0.01 * d0 / d1
    return min(h0, length)


def initial_step(h0: float, d1: float, d2: float, order: int, length: float) -> float:
    """Hairer's first step, from the norms of the first and (approximately) second derivative."""
    if d1 <= 1e-15 and d2 <= 1e-15:
        h1 = max(1e-6, h0 * 1e-3)
    else:
        h1 = (0.01 / max(d1, d2)) ** (1 / order)
    return min(100 * h0, h1, length)


@dataclass(frozen=True)
class FixedControl:
    """Grid of a fixed-step method: exactly one of the two is given.

    Attributes:
        step_size: Length of every step but the last, which ends on the end.
        num_steps: Number of equal steps.
    """

    step_size: float | None = None
    num_steps: int | None = None

    def grid(self, start: float, end: float) -> list[float]:
        """Times of the grid, from start to end, both included."""
        if self.num_steps is not None:
            count, step = self.num_steps, (end - start) / self.num_steps
        else:
            count = max(1, math.ceil(abs(end - start) / self.step_size * (1 - CLOSE)))
            step = math.copysign(self.step_size, end - start)
        return [start + i * step for i in range(count)] + [end]


def stage_times(tableau: Tableau, t: float, h: float, t_next: float) -> list[float]:
    """Time of every stage; those at the end of the step are the time the step ends on, exactly."""
    return [t_next if c == 1 else t + c * h for c in tableau.c]
