"""Explicit Runge-Kutta methods; the numbers stand in csrc/core/tableau.h."""

from __future__ import annotations

from dataclasses import dataclass

from pycnf._build import _C


@dataclass(frozen=True)
class Tableau:
    """One method: kᵢ = f(t0 + cᵢ h, y0 + h Σ aᵢⱼ kⱼ), y1 = y0 + h Σ bⱼ kⱼ.

    Attributes:
        order: of the solution that is propagated (as torchdiffeq counts it for step control).
        stages: number of kᵢ; an adaptive step evaluates stages - 1 of them, the first is reused.
        adaptive: has an error estimate h Σ eⱼ kⱼ and mid-point weights m for interpolation.
        solution_is_last_stage: y1 is the state of the last stage, so the last kᵢ is f(t1, y1).
    """

    name: str
    order: int
    stages: int
    adaptive: bool
    solution_is_last_stage: bool
    c: list[float]
    a: list[list[float]]
    b: list[float]
    e: list[float]
    m: list[float]

    @property
    def transient_stages(self) -> frozenset[int]:
        """Stages that only later stages of the step use: in dopri5 the second, in dopri8 the second
        to the fifth.
        """
        weights = zip(self.b, self.e, self.m)
        return frozenset(i for i, each in enumerate(weights) if self.adaptive and not any(each))

    @property
    def stages_in_use(self) -> int:
        """Stages whose state enters the solution; a first-same-as-last method's last does not."""
        return 1 + max(i for i, weight in enumerate(self.b) if weight != 0)


TABLEAUX: dict[str, Tableau] = {entry["name"]: Tableau(**entry) for entry in _C.tableaux()}
