"""What a trained flow is worth: exact log-likelihood, beside the best Gaussian's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..data import BITS_PER_DIM, BITS_PER_DIM_WHERE, bits_per_dim
from .model import EXACT_METHOD, EXACT_TOLERANCE, Model


@dataclass(frozen=True)
class Evaluation:
    """Likelihoods of one set of rows.

    Attributes:
        rows: how many.
        features: D.
        log_prob: the flow's log p(x) of each row [rows], nats, float64.
        gaussian: the baseline's [rows], or None where no full-covariance Gaussian can be fitted.
        gaussian_rows: training rows that the baseline was fitted to.
        nfe: function evaluations of the last solve.
        pixels: whether bits per dimension make sense.
    """

    rows: int
    features: int
    log_prob: Tensor
    gaussian: Tensor | None
    gaussian_rows: int
    nfe: int
    pixels: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain values for evaluation.json."""
        result: dict[str, Any] = {
            "rows": self.rows,
            "log_likelihood": self.log_prob.mean().item(),
            "standard_error": _standard_error(self.log_prob),
            "gaussian_log_likelihood": None,
            "divergence": "exact",
            "method": EXACT_METHOD,
            "rtol": EXACT_TOLERANCE,
            "atol": EXACT_TOLERANCE,
            "nfe": self.nfe,
        }
        if self.gaussian is not None:
            result["gaussian_log_likelihood"] = self.gaussian.mean().item()
        if self.pixels:
            result["bits_per_dim"] = bits_per_dim(self.log_prob, self.features).mean().item()
            if self.gaussian is not None:
                bits = bits_per_dim(self.gaussian, self.features).mean().item()
                result["gaussian_bits_per_dim"] = bits
            result["bits_per_dim_formula"] = f"{BITS_PER_DIM}, {BITS_PER_DIM_WHERE}"
        return result

    def text(self) -> str:
        """A small table for people."""
        lines = [
            f"  flow      {self._row(self.log_prob)}",
            f"            exact divergence, {EXACT_METHOD}, tolerance {EXACT_TOLERANCE:g}, "
            f"{self.nfe} function evaluations",
        ]
        if self.gaussian is None:
            lines.append("  Gaussian  none: the training rows' covariance is singular")
        else:
            lines.append(f"  Gaussian  {self._row(self.gaussian)}")
            lines.append(
                f"            full covariance, fitted to the same {self.gaussian_rows} training "
                "rows" + (" and pixel noise, in the same logit space" if self.pixels else "")
            )
            gain = self.log_prob - self.gaussian
            lines.append(
                f"  gain      {gain.mean():.4f} ± {_standard_error(gain):.4f} nats a row (paired)"
            )
        if self.pixels:
            lines += ["", f"  {BITS_PER_DIM}", f"  where {BITS_PER_DIM_WHERE}."]
        return "\n".join(lines)

    def _row(self, log_prob: Tensor) -> str:
        text = f"{log_prob.mean():.4f} ± {_standard_error(log_prob):.4f} nats a row"
        if self.pixels:
            bits = bits_per_dim(log_prob, self.features)
            text = f"{bits.mean():.4f} ± {_standard_error(bits):.4f} bits/dim   {text}"
        return text


def evaluate(model: Model, rows: Tensor, training_rows: int, pixels: bool) -> Evaluation:
    """Judges a model by rows it was not trained on.

    Args:
        model: trained.
        rows: [N, D] in the user's units, float64.
        training_rows: how many the model and the Gaussian baseline were fitted to.
        pixels: whether to report bits per dimension.
    """
    log_prob = model.log_prob(rows)
    return Evaluation(
        rows=len(rows),
        features=model.features,
        log_prob=log_prob,
        gaussian=model.baseline_log_prob(rows) if model.baseline.defined else None,
        gaussian_rows=training_rows,
        nfe=model.exact.stats.nfe_forward,
        pixels=pixels,
    )


def _standard_error(values: Tensor) -> float:
    return (values.std() / len(values) ** 0.5).item() if len(values) > 1 else float("nan")
