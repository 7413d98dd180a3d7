"""A training step of FFJORD on a GPU: pycnf as it comes, beside torchdiffeq's `odeint_adjoint` and
jitted diffrax, on the fields of `training` with three sizes of batches.

A contender that fails, or whose loss is another, is said to have failed, and the others go on. A
peer that would take too long for its row, by its time with a smaller batch, is left out; so are all
peers, before any case is, once `--seconds` are nearly over.

Everything here takes a device and sizes, so that all but the numbers can be tried on a CPU.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import pycnf
from bench.accuracy import distance
from bench.cuda import absent, waiter
from bench.flops import step_flops
from bench.harness import OURS, Options, Row, interleave, missing, rows_of
from bench.peers import DiffraxStep, TorchdiffeqStep
from bench.training import SHAPES, OurStep

PEER, DIFFRAX = "torchdiffeq odeint_adjoint", "diffrax, jitted"
PRECISIONS = ("tf32", "3xtf32", "bf16")
_METHOD, _TOLERANCE = "dopri5", 1e-5
# What losses may differ by, of a number of about 1 to 100: all take steps of their own.
_BOUNDS = {f"{OURS}, tf32": 1e-2, f"{OURS}, bf16": 5e-2}
_BOUND = 5e-5
_DEVICE = torch.device("cuda")
_LIMIT = 20.0  # seconds for a row of a peer, and for the rounds of a case
_FOR_PEERS = 0.75  # of all seconds


@dataclass(frozen=True)
class Case:
    """A field and a batch; `target`: how many times longer than pycnf torchdiffeq should take."""

    name: str
    features: int
    hidden: tuple[int, ...]
    activation: str
    batch: int
    target: float | None = None

    @property
    def title(self) -> str:
        widths = "-".join(map(str, self.hidden))
        return (
            f"FFJORD training step, {self.name}, D={self.features}, {widths} {self.activation}, "
            f"B={self.batch}"
        )


_TARGETS = {("toy", 1024): 200, ("POWER", 10_000): 60, ("HEPMASS", 10_000): 8}
_TARGETS["MINIBOONE", 1000] = 4


def cases() -> list[Case]:
    """Those with a target first, then by size: what comes last may be cut off."""
    found = []
    for batch in (1000, 10_000, 100_000):
        for shape in SHAPES:
            size = 1024 if (shape[0], batch) == ("toy", 1000) else batch
            found.append(Case(*shape, size, _TARGETS.get((shape[0], size))))
    return sorted(found, key=lambda case: case.target is None)


def precisions(device: torch.device) -> dict[str, dict]:
    """The contenders on tensor cores, which only a GPU has."""
    if device.type != "cuda":
        return {}
    return {f"{OURS}, {name}": {"precision": name} for name in PRECISIONS}


def inputs(case: Case, device: torch.device) -> tuple[pycnf.nn.MLP, Tensor, Tensor]:
    """The field, rows and their probe."""
    torch.manual_seed(0)
    field = pycnf.nn.MLP(case.features, case.hidden, activation=case.activation)
    x = torch.randn(case.batch, case.features)
    probe = torch.randint(0, 2, x.shape).to(x) * 2 - 1
    return field.to(device), x.to(device), probe.to(device)


def makers(case: Case, device: torch.device) -> dict[str, Callable[[], Callable]]:
    """What makes a step of each contender."""
    field, x, probe = inputs(case, device)
    made: dict[str, Callable[[], Callable]] = {OURS: lambda: OurStep(field, x, probe)}
    for name, options in precisions(device).items():
        made[name] = lambda options=options: OurStep(field, x, probe, **options)
    if missing("torchdiffeq", "") is None:
        made[PEER] = lambda: TorchdiffeqStep(field, x, probe, _TOLERANCE, adjoint=True)
    # Compiling takes longer than all else, hence only where there is a target.
    if case.target is not None and missing("diffrax", "") is None:
        made[DIFFRAX] = lambda: DiffraxStep(field, x, probe, _TOLERANCE)
    return made


def first_line(error: BaseException) -> str:
    """What an error is, in a line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


class Training:
    """The rows of all cases, and how long a contender took with a smaller batch.

    Args:
        seconds: For all cases.
        limit: For a row of a peer, and for the rounds of a case.
        spell: Of a contender's calls in a round.
    """

    def __init__(
        self,
        device: torch.device,
        rounds: int | None = None,
        seconds: float = float("inf"),
        limit: float = _LIMIT,
        spell: float = 0.2,
    ) -> None:
        self.device, self.wait, self.rounds = device, waiter(device), rounds
        self.seconds, self.limit, self.spell = seconds, limit, spell
        self.begin = time.monotonic()
        self.known: dict[tuple[str, str], tuple[int, float]] = {}
        self.failures: list[str] = []

    def rows(self, case: Case) -> Iterator[Row | str]:
        """The rows of a case, and remarks on contenders that have none."""
        if self._elapsed() > self.seconds:
            yield f"{case.title}: left out, the time was over."
            return
        steps, found, once, facts = {}, {}, {}, {}
        for name, make in makers(case, self.device).items():
            reason = self._too_long(case, name)
            if reason is not None:
                yield f"{case.title}: without {name}, {reason}."
                continue
            try:
                steps[name], found[name], once[name], facts[name] = self._first(case, make)
            except Exception as error:
                yield self._failed(case, name, first_line(error))
                self.free()
                continue
            self.known[case.name, name] = case.batch, once[name]
        compared = PEER if PEER in found else OURS
        for name in list(found):
            reason = self._difference(found, name, compared, facts)
            if reason is not None:
                yield self._failed(case, name, reason)
                del steps[name], found[name]
        times = yield from self._times(case, steps, once)
        rows = rows_of(case.title, times, facts)
        for row in rows:
            if row.contender in steps and isinstance(steps[row.contender], OurStep):
                self._add_rate(case, steps[row.contender], row)
        by_name = {row.contender: row for row in rows}
        if OURS in by_name:
            if PEER in by_name:
                by_name[OURS].facts[f"{PEER} over it"] = f"{by_name[PEER].ratio:.1f}"
            if case.target is not None:
                by_name[OURS].facts["target"] = case.target
        yield from rows

    def _elapsed(self) -> float:
        return time.monotonic() - self.begin

    def _too_long(self, case: Case, name: str) -> str | None:
        """Why a peer is left out."""
        if name not in (PEER, DIFFRAX):
            return None
        left = _FOR_PEERS * self.seconds - self._elapsed()
        batch, took = self.known.get((case.name, name), (case.batch, 0.0))
        # What it takes at most; that of a small batch is that of its launches.
        predicted = took * max(1.0, case.batch / batch)
        if left <= 0 or 2 * predicted > left:
            return "there is no time left for it"
        if predicted > self.limit:
            return f"it may take {predicted:.0f} s"
        return None

    def _first(self, case: Case, make: Callable) -> tuple[Callable, list[Tensor], float, dict]:
        """A step; its first results, how long they took, and what is known from them."""
        on_gpu = self.device.type == "cuda"
        before = 0
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
        step = make()
        self.wait()
        begin = time.perf_counter()
        results = step()
        self.wait()
        took = time.perf_counter() - begin
        facts: dict = {}
        if isinstance(step, DiffraxStep):
            results = step.results
            facts["steps"] = f"{step.accepted} + {step.rejected} rejected"
        elif isinstance(step, TorchdiffeqStep):
            facts["nfe"] = step.calls
        else:
            stats = step.flow.stats
            facts["engine"] = stats.engine
            if "layer by layer" in step.flow.explain():
                facts["engine"] += ", layer by layer"
            facts["steps"] = f"{stats.accepted} + {stats.rejected} rejected"
            facts["nfe"] = f"{stats.nfe_forward} + {stats.nfe_backward}"
        if on_gpu and not isinstance(step, DiffraxStep):  # whose memory is not torch's
            peak = torch.cuda.max_memory_allocated(self.device) - before
            facts["peak memory"] = f"{peak / 2**20:.0f} MiB"
        return step, [each.detach().cpu() for each in results], took, facts

    def _difference(self, found: dict, name: str, compared: str, facts: dict) -> str | None:
        """Why a contender does not count; what it differs by goes to its facts."""
        if compared not in found:
            return None
        mine, other = found[name], found[compared]
        facts[name]["loss"] = f"{mine[0].item():.6g}"
        off = abs(mine[0] - other[0]).item() / max(1.0, abs(other[0]).item())
        gradient = distance(mine[1:], other[1:])
        facts[name]["gradient differs by"] = f"{gradient:.1e}"
        bound = _BOUNDS.get(name, _BOUND)
        if off <= bound and gradient < float("inf"):
            facts[name]["loss differs by"] = f"{off:.1e}"
            return None
        return f"its loss is {mine[0].item():.6g}, that of {compared} {other[0].item():.6g}"

    def _times(self, case: Case, steps: dict, once: dict) -> Iterator[str]:
        """Interleaved times of those that are fast enough, the first time of the others."""
        slow = {name for name in steps if name in (PEER, DIFFRAX) and once[name] > self.limit / 4}
        slow.discard(DIFFRAX)  # its first time is that of compiling
        rounds = self.rounds or (3 if case.target is None else 5)
        runs = {name: step for name, step in steps.items() if name not in slow}
        while True:
            try:
                times = interleave(
                    {name: self._named(name, run) for name, run in runs.items()},
                    rounds, self.spell, self.wait, self.limit,
                )  # fmt: skip
                break
            except _Failed as error:
                yield self._failed(case, error.name, first_line(error.__cause__))
                del runs[error.name], steps[error.name]
                self.free()
        for name, values in times.items():
            self.known[case.name, name] = case.batch, min(values)
        if slow:
            yield f"{case.title}: of {', '.join(slow)} the time of one call, the first."
        return {**times, **{name: [once[name]] for name in slow}}

    def _named(self, name: str, run: Callable) -> Callable:
        """A call whose errors say whose they are."""

        def call() -> None:
            try:
                run()
            except Exception as error:
                raise _Failed(name) from error

        return call

    def _failed(self, case: Case, name: str, reason: str) -> str:
        self.failures.append(f"{case.title}: {name} failed ({reason})")
        return f"{self.failures[-1]}."

    def _add_rate(self, case: Case, step: OurStep, row: Row) -> None:
        flops = step_flops(step.flow.field, case.batch, 1, _METHOD, step.flow.stats)
        row.facts["GFLOP"] = f"{flops / 1e9:.3g}"
        row.facts["GFLOP/s"] = f"{flops / row.seconds / 1e9:.0f}"

    def free(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


class _Failed(Exception):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


def run(options: Options) -> Iterator[Row | str]:
    """Rows of every case.

    Raises:
        RuntimeError: Contenders failed; after the others.
    """
    reason = absent()
    if reason is not None:
        yield reason
        return
    yield from remarks()
    training = Training(_DEVICE, options.rounds, options.seconds)
    for case in cases():
        if not options.has(case.title):
            continue
        try:
            yield from training.rows(case)
        except Exception as error:
            training.failures.append(f"{case.title} failed ({first_line(error)})")
            yield f"{training.failures[-1]}."
        training.free()
    if training.failures:
        raise RuntimeError("; ".join(training.failures))


def remarks() -> Iterator[str]:
    """What is not there to be measured."""
    for package, name in (("torchdiffeq", PEER), ("diffrax", DIFFRAX)):
        remark = missing(package, name)
        if remark is not None:
            yield remark
