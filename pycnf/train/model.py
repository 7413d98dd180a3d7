"""A flow together with its preprocessing: a density in the user's units."""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Dataset, GaussianBaseline, InputError, Preprocess
from ..flows import CNF, SolveError
from ..nn import MLP
from .config import Config

# Likelihoods that are reported must not depend on how training was made cheap.
EXACT_METHOD = "dopri5"
EXACT_TOLERANCE = 1e-5
EXACT_MAX_STEPS = 10_000
# Rows x (1 + unit tangents) that go through the network together; keeps evaluation in the caches.
ROWS_AT_ONCE = 32_768


def require_memory(option: str, nbytes: int) -> None:
    """Raises InputError for what cannot fit into this machine's memory."""
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if nbytes > there:
        raise InputError(
            f"{option} asks for {nbytes / 1e9:.3g} GB and this machine has {there / 1e9:.3g} GB; "
            "give a smaller one."
        )


class Model(nn.Module):
    """One network seen as two flows: the one that trains and the one that is reported.

    Attributes:
        preprocess: data to what the flow sees, float64.
        baseline: the Gaussian to beat, float64.
        flow: as configured for training.
        exact: the same network with the exact divergence, dopri5 and tolerance 1e-5.
    """

    def __init__(self, config: Config, features: int, logit: bool):
        """Makes the model with its initial weights, which depend on ``config.seed`` alone.

        Raises:
            InputError: the choices do not go together.
        """
        super().__init__()
        widths = (features, *config.hidden, features)
        # Weights with their gradient and the optimizer's two copies, and a batch with its tangent,
        # both with gradients.
        weights = sum(a * b for a, b in pairwise(widths))
        require_memory("--hidden", 4 * 4 * (weights + config.batch * sum(widths)))
        self.dtype = getattr(torch, config.dtype)
        self.preprocess = Preprocess(features, config.preprocess, logit)
        self.baseline = GaussianBaseline(features)
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed)
                field = MLP(
                    features,
                    config.hidden,
                    layer=config.layer,
                    activation=config.activation,
                    time=config.time_features(),
                ).to(self.dtype)
            self.flow = CNF(
                field,
                divergence=config.divergence,
                probes=config.probes,
                method=config.method,
                rtol=config.rtol,
                atol=config.atol,
                options=config.solver_options(),
                gradient=config.gradient,
            )
        except (TypeError, ValueError) as error:
            reason = str(error).rstrip(".")
            raise InputError(f"These options do not go together ({reason}).") from error
        # A plain attribute, not a submodule: its parameters are the field's, saved once.
        exact = CNF(
            field,
            divergence="exact",
            method=EXACT_METHOD,
            rtol=EXACT_TOLERANCE,
            atol=EXACT_TOLERANCE,
            max_num_steps=EXACT_MAX_STEPS,
            base=self.flow.base,
        )
        self.__dict__["exact"] = exact

    @property
    def features(self) -> int:
        return self.flow.field.features

    @torch.no_grad()
    def log_prob(self, x: Tensor) -> Tensor:
        """Returns log p(x) [N] in nats, float64, with the exact divergence.

        Args:
            x: rows in the user's units [N, D], float64.
        """
        y, logdet = self.preprocess(x)
        rows = max(1, ROWS_AT_ONCE // (1 + self.features))
        parts = [self.exact.log_prob(part.to(self.dtype)).double() for part in y.split(rows)]
        return torch.cat(parts) + logdet

    def baseline_log_prob(self, x: Tensor) -> Tensor:
        """The Gaussian's log p(x) [N], for the same rows as ``log_prob``."""
        y, logdet = self.preprocess(x)
        return self.baseline.log_prob(y) + logdet

    @torch.no_grad()
    def sample(self, n: int, seed: int) -> Tensor:
        """Returns n samples [n, D] in the user's units, float64, the same for the same seed."""
        require_memory("--number", 4 * 8 * n * self.features)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            sizes = [min(ROWS_AT_ONCE, n - i) for i in range(0, n, ROWS_AT_ONCE)]
            y = torch.cat([self.exact.sample(size) for size in sizes])
        return self.preprocess.inverse(y.double())

    @torch.no_grad()
    def frames(self, n: int, count: int, seed: int) -> Tensor:
        """Returns n points at ``count`` even times of the flow, base first, [count, n, D].

        These are in the flow's own (preprocessed) units, in which base and data are of one size.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            y = self.exact.sample(n)
        times = torch.linspace(self.exact.t0, self.exact.t1, count, dtype=torch.float64)
        return self.exact.trajectory(y, times).double()

    def state(self) -> dict[str, Any]:
        """The model's part of a checkpoint."""
        return {
            "preprocess": self.preprocess.state_dict(),
            "baseline": self.baseline.state_dict(),
            "flow": self.flow.state_dict(),
        }

    def load_state(self, checkpoint: Mapping[str, Any]) -> None:
        """Undoes ``state``."""
        for name in ("preprocess", "baseline", "flow"):
            try:
                getattr(self, name).load_state_dict(checkpoint[name])
            except (RuntimeError, TypeError) as error:
                raise InputError(f"The checkpoint is damaged: its {name} does not fit.") from error


def fitted(config: Config, data: Dataset) -> Model:
    """Returns an untrained model; preprocessing and baseline are fitted to the training rows.

    Raises:
        InputError: a column has no spread, or the options do not go together.
    """
    model = Model(config, data.features, logit=data.kind == "digits")
    rows = data.fitting_rows()
    y, _ = model.preprocess.fit(rows, data.columns)(rows)
    model.baseline.fit(y)
    return model


def restored(checkpoint: Mapping[str, Any]) -> Model:
    """Returns the model of a checkpoint; needs no data."""
    config, data = Config.from_dict(checkpoint["config"]), checkpoint["data"]
    model = Model(config, len(data["columns"]), logit=data["kind"] == "digits")
    model.load_state(checkpoint)
    return model


def gist(error: SolveError) -> str:
    """What stopped a solve and where, without the advice, which is for programmers."""
    return str(error).split("; ")[0].splitlines()[0].rstrip(".")
