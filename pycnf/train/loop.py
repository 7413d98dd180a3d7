"""The training loop.

Every random number of step k is drawn from (seed, k) alone (``pycnf.data.stream``), so the loop's
state is its counters, the weights and the optimizer's moments, and a run that is resumed takes the
very steps that it would have taken.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..data import Dataset, stream
from ..flows import SolveError
from . import checkpoint
from .config import Config
from .folder import RunFolder
from .interrupt import StopRequest
from .metrics import MetricsFile
from .model import Model, gist
from .progress import Progress
from .watch import NfeWatch

WARMUP = 50  # steps
METRICS_PER_VALIDATION = 5
# A validation costs (1 + D) network rows per row; more than this many would slow training down.
VALIDATION_WORK = 400_000


class Diverged(RuntimeError):
    """The loss or its gradient stopped being a number; the text says where and what may help."""


@dataclass
class Counters:
    """Where a run stands.

    Attributes:
        step: optimizer steps taken.
        best: lowest validation NLL so far, nats; infinity before the first.
        best_step: when that was.
        stale: validations since.
        latest: newest validation NLL.
        seconds: time spent training, all sittings together.
        ended: why the run is over ("steps", "patience"), or None.
    """

    step: int = 0
    best: float = math.inf
    best_step: int = 0
    stale: int = 0
    latest: float | None = None
    seconds: float = 0.0
    ended: str | None = None


class Trainer:
    """One run: a model, its data and the folder that both are kept in."""

    def __init__(
        self,
        config: Config,
        data: Dataset,
        model: Model,
        folder: RunFolder,
        progress: Progress,
        warn: Callable[[str], None],
        shown: Callable[[float], float] = lambda nll: nll,
    ):
        """Sets up a run at step 0.

        Args:
            config: its choices.
            data: what it trains on.
            model: with fitted preprocessing.
            folder: an existing folder.
            progress: told of every step.
            warn: told of trouble that does not stop the run.
            shown: turns nats into the unit that people are shown (bits/dim for pixels).
        """
        self.config, self.data, self.model, self.folder = config, data, model, folder
        self.progress, self.warn, self.shown = progress, warn, shown
        self.at = Counters()
        self.watch = NfeWatch()
        self.optimizer = torch.optim.AdamW(
            model.flow.parameters(), lr=config.lr, weight_decay=config.weight_decay
        )
        self._metrics: MetricsFile | None = None
        self._metrics_size = 0
        # Sums of (loss, NFE forward, NFE backward, gradient norm) since the last metrics line.
        self._sums = [0.0, 0.0, 0.0, 0.0]
        self._summed = 0
        self._epoch: tuple[int, Tensor, Tensor] | None = None
        self._description = data.description()

        rows = max(1, VALIDATION_WORK // (1 + data.features))
        self._validation = data.validation[:rows]

    # ---- state -----------------------------------------------------------------------------

    def save(self, best: bool = False) -> None:
        """Writes last.pt, or best.pt, which has no use for the loop's state."""
        content: dict[str, Any] = {
            "config": self.config.to_dict(),
            "data": self._description,
            "step": self.at.step,
            "validation": self.at.latest,
            **self.model.state(),
        }
        if not best:
            content["training"] = {
                "counters": asdict(self.at),
                "optimizer": self.optimizer.state_dict(),
                "watch": self.watch.state(),
                "sums": list(self._sums),
                "summed": self._summed,
                "metrics_size": self._metrics_size,
            }
        checkpoint.save(self.folder.best if best else self.folder.last, content)

    def load_state(self, content: dict[str, Any]) -> None:
        """Takes up the run where last.pt left it."""
        training = content["training"]
        self.model.load_state(content)
        self.at = Counters(**training["counters"])
        self.optimizer.load_state_dict(training["optimizer"])
        self.watch.load_state(training["watch"])
        self._sums, self._summed = list(training["sums"]), training["summed"]
        self._metrics_size = training["metrics_size"]

    # ---- training --------------------------------------------------------------------------

    def run(self, stop: StopRequest) -> None:
        """Trains until the steps are done, patience is exhausted or a stop is requested.

        Whatever ends it, last.pt and best.pt are whole; ``self.at.ended`` says why, and is None
        after a stop request.

        Raises:
            Diverged: the loss stopped being a number.
        """
        self._metrics = MetricsFile(self.folder.metrics, self._metrics_size)
        began = time.monotonic() - self.at.seconds
        try:
            while self.at.ended is None and stop.signal is None:
                self._take_step()
                self.at.seconds = time.monotonic() - began
                last = self.at.step == self.config.steps
                if self.at.step % self.config.evaluate_every == 0 or last:
                    self._validate(last)
                elif self.at.step % self._metrics_every == 0:
                    self._write_metrics({})
            if stop.signal is not None:
                self.save()
        finally:
            self._metrics.close()
            self.progress.clear()

    @property
    def _metrics_every(self) -> int:
        return max(1, self.config.evaluate_every // METRICS_PER_VALIDATION)

    def _batch(self) -> tuple[Tensor, Tensor]:
        """The rows of the coming step as the flow sees them, and their log|det| (both [B, ...])."""
        size = self.config.batch
        # The rows that do not fill a batch wait for another epoch's order.
        per_epoch = self.data.training_rows // size
        epoch, place = divmod(self.at.step, per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            rows = self.data.epoch(epoch)
            order = stream(self.config.seed, "order", epoch).permutation(len(rows))
            y, logdet = self.model.preprocess(rows[order])
            self._epoch = (epoch, y.to(self.model.dtype), logdet)
        _, y, logdet = self._epoch
        part = slice(place * size, (place + 1) * size)
        return y[part], logdet[part]

    def _learning_rate(self) -> float:
        """Linear warm-up, then half a cosine down to zero at the last step."""
        step, steps = self.at.step, self.config.steps
        warm = min(1.0, (step + 1) / min(WARMUP, steps))
        return self.config.lr * warm * 0.5 * (1 + math.cos(math.pi * step / steps))

    def _take_step(self) -> None:
        flow = self.model.flow
        y, logdet = self._batch()
        seed = int(stream(self.config.seed, "probe", self.at.step).integers(2**62))
        self.optimizer.zero_grad(set_to_none=True)
        try:
            loss = -flow.log_prob(y, seed=seed).mean()
            loss.backward()
        except SolveError as error:
            raise Diverged(self._trouble(f"the solver gave up ({gist(error)})")) from error
        stats = flow.stats
        norm = torch.nn.utils.clip_grad_norm_(flow.parameters(), self.config.clip)
        if not torch.isfinite(loss):
            raise Diverged(self._trouble("the loss stopped being a number"))
        if not torch.isfinite(norm):
            raise Diverged(self._trouble("the gradient stopped being a number"))
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate()
        self.optimizer.step()
        self.at.step += 1

        nll = loss.item() - logdet.mean().item()
        for i, value in enumerate((nll, stats.nfe_forward, stats.nfe_backward, norm.item())):
            self._sums[i] += value
        self._summed += 1
        warning = self.watch.add(stats.nfe_forward)
        if warning is not None:
            self.progress.clear()
            self.warn(warning)
        loss_shown, forward, backward, _ = self._means()
        latest = None if self.at.latest is None else self.shown(self.at.latest)
        self.progress.step(self.at.step, self.shown(loss_shown), latest, forward, backward)

    def _trouble(self, what: str) -> str:
        kept = (
            f"the best checkpoint (step {self.at.best_step}) is kept in {self.folder.best}"
            if math.isfinite(self.at.best)
            else "there is no good checkpoint yet"
        )
        return (
            f"At step {self.at.step + 1} {what}; {kept}. Try a lower --lr than "
            f"{self.config.lr:g}, or tighter --rtol and --atol."
        )

    def _means(self) -> tuple[float, ...]:
        return tuple(value / max(1, self._summed) for value in self._sums)

    def _write_metrics(self, more: dict[str, Any]) -> None:
        assert self._metrics is not None
        loss, forward, backward, norm = self._means()
        row = {
            "step": self.at.step,
            "loss": loss,
            "nfe_forward": forward,
            "nfe_backward": backward,
            "gradient_norm": norm,
            "lr": self.optimizer.param_groups[0]["lr"],
            "seconds": round(self.at.seconds, 3),
            **more,
        }
        self._metrics.append(row)
        self._metrics_size = self._metrics.size
        self._sums, self._summed = [0.0, 0.0, 0.0, 0.0], 0

    def _validate(self, last: bool) -> None:
        try:
            nll = -self.model.log_prob(self._validation).mean().item()
        except SolveError as error:
            raise Diverged(self._trouble(f"validation failed ({gist(error)})")) from error
        if not math.isfinite(nll):
            raise Diverged(self._trouble("the validation likelihood stopped being a number"))
        loss, forward, backward, _ = self._means()
        at = self.at
        at.latest = nll
        better = nll < at.best
        if better:
            at.best, at.best_step, at.stale = nll, at.step, 0
        else:
            at.stale += 1
        if last:
            at.ended = "steps"
        elif self.config.patience and at.stale >= self.config.patience:
            at.ended = "patience"
        self._write_metrics({"validation_nll": nll, "best": better})
        if better:
            self.save(best=True)
        # After best.pt: if we are killed in between, resuming from last.pt makes the same best.pt.
        self.save()
        self.progress.validation(at.step, self.shown(loss), self.shown(nll), forward, backward)
        self.progress.pause()
