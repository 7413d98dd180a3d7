"""What is to be solved: one flow, one direction, one batch."""

from dataclasses import dataclass, field, replace

from torch import Tensor

from pycnf.nn.divergence import VectorField
from pycnf.odeint.tableau import Tableau

from .control import AdaptiveControl, FixedControl
from .noise import Noise
from .stats import SolveStats


@dataclass
class Problem:
    """A solve from `start` to `end`.

    The state is z with, where the divergence is wanted, "extras": ℓ with dℓ/dt = sign·div, and a
    quadrature for every regularizer. Extras are zero at the start, and nothing depends on them.

    Attributes:
        field: f(t, z) or f(t, z, context).
        tableau, control: The method and its steps.
        start, end: Times; end < start goes backwards.
        divergence: Whether there are extras.
        probes: [K, B, D], or where they come from; None for the exact divergence.
        sign: Of the divergence in ℓ, so that ℓ is the flow's logdet in either direction.
        regularizers: Weights of "kinetic" and "jacobian".
        per_sample: Every sample takes its own steps.
        gradient: "discrete", "continuous", "seminorm" or "autograd".
        precision: Of the products of matrices of the fused engine on a GPU.
        keep_bytes: How much memory the stages' graphs may take for a discrete gradient; beyond, the
            gradient computes them again, step by step.
        compiled: An `MLP` is evaluated by the compiled ops, where they serve it, and not layer by
            layer in PyTorch: on a GPU a product and a pass over memory for each layer.
        stats: Filled in by the solve.
    """

    field: VectorField
    tableau: Tableau
    control: AdaptiveControl | FixedControl
    start: float
    end: float
    divergence: bool
    probes: Tensor | Noise | None
    sign: float
    regularizers: dict[str, float] = field(default_factory=dict)
    per_sample: bool = False
    gradient: str = "discrete"
    precision: str = "float32"
    keep_bytes: int = 0
    compiled: bool = False
    stats: SolveStats = field(default_factory=SolveStats)

    @property
    def direction(self) -> float:
        return 1.0 if self.end > self.start else -1.0

    @property
    def probe(self) -> Tensor | None:
        """The probes [K, B, D], None for the exact divergence."""
        return self.probes.probe if isinstance(self.probes, Noise) else self.probes

    @property
    def extras(self) -> int:
        """Number of extra states per sample."""
        return 1 + len(self.regularizers) if self.divergence else 0

    def on(self, field: VectorField) -> "Problem":
        """The same problem with another field, its counts going to the same stats."""
        return replace(self, field=field)
