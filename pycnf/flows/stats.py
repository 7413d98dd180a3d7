"""What a solve cost."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class SolveStats:
    """Counts of one solve; every forward makes its own object, and its backward completes it.

    Attributes:
        nfe_forward: Evaluations of the field until the result was there, rejected steps included;
            with steps per sample, of the sample that took most (on the fused engine) or of any.
        nfe_backward: Evaluations of the field during the gradient; 0 until then, and where the
            gradient evaluates nothing: `gradient="autograd"`, and "discrete" with its stages kept.
        accepted: Accepted steps; with steps per sample, of the sample that took most.
        rejected: Rejected attempts; with steps per sample, of the sample that had most.
        engine: "fused" or "generic".
        step_size: What the controller would have tried next; None with steps per sample.
        regularizers: For each name the weighted integral of every sample [B], differentiable:
            `loss = (-log_prob + sum(stats.regularizers.values())).mean()`.
    """

    nfe_forward: int = 0
    nfe_backward: int = 0
    accepted: int = 0
    rejected: int = 0
    engine: str = "generic"
    step_size: float | None = None
    regularizers: dict[str, Tensor] = field(default_factory=dict)
