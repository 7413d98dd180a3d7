"""pycnf beside torchdiffeq on a GPU: a plain neural ODE, its adjoint, a training step of FFJORD, a
field that is a U-Net, the stepping kernels beside a copy, and how often the host waits.

Contenders of one case are run once and compared before anything is timed. `CAPTURED` is pycnf with
the option `cuda_graph`; where pycnf has no such option, a remark says that it is left out. A case
that fails is reported and the others go on: time on a GPU is dear.

Everything here takes a device and sizes, so that all but the numbers can be tried on a CPU.
"""

from __future__ import annotations

import gc
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor, nn

import pycnf
from bench.accuracy import distance, errors, tight_step
from bench.harness import OURS, Options, Row, interleave, missing, rows_of, time_text
from bench.overhead import Network
from bench.peers import TorchdiffeqStep
from bench.training import OurStep
from pycnf import reference
from pycnf.odeint.tableau import TABLEAUX

CAPTURED, PEER = f"{OURS}, captured", "torchdiffeq"
COPY = "copy_"
_OPTION = "cuda_graph"
_OPTIONS: dict[str, dict] = {OURS: {}, CAPTURED: {_OPTION: True}, PEER: {}}
_TOLERANCES = {"rtol": 1e-5, "atol": 1e-6}
_SYNC = "called a synchronizing CUDA operation"  # torch's words


@dataclass
class Case:
    """Contenders that do the same work.

    Attributes:
        runs: each returns the tensors that are compared.
        compare: facts from the first results; raises if they are not equal enough.
        targets: how many times longer than this contender the peer should take.
        units: of work in a call, one without; about as many in each, so that the targets can be
            those of calls.
    """

    title: str
    runs: dict[str, Callable[[], list[Tensor]]]
    compare: Callable[[dict[str, list[Tensor]]], dict[str, dict]]
    targets: dict[str, float] = field(default_factory=dict)
    units: dict[str, float] | None = None


def measure(
    case: Case, device: torch.device, rounds: int | None = None, seconds: float = 0.2
) -> Iterator[Row | str]:
    """Rows of a case, and a remark on a contender that is left out.

    Raises:
        RuntimeError: the captured contender failed otherwise than by not being there; only after
            the rows of the others.
    """
    found, remarks, failure = first_results(case)
    yield from remarks
    facts = case.compare(found)
    runs = {name: case.runs[name] for name in found}
    times = interleave(runs, rounds or 9, seconds, waiter(device))
    for name in (OURS, CAPTURED):
        if name in times:
            ratio = statistics.median(a / b for a, b in zip(times[PEER], times[name]))
            facts[name][f"{PEER} over it"] = f"{ratio:.2f}"
            if name in case.targets:
                facts[name]["target"] = case.targets[name]
    units = case.units and {name: case.units[name] for name in runs}
    rows = rows_of(case.title, times, facts, units)
    yield from rows
    if failure is not None:
        raise RuntimeError(f"{case.title}: {CAPTURED} failed") from failure


def first_results(
    case: Case,
) -> tuple[dict[str, list[Tensor]], list[str], Exception | None]:
    """What every contender returns; remarks on those left out; how the captured one failed.

    It is missing if an error or a warning names the option.
    """
    found: dict[str, list[Tensor]] = {}
    remarks: list[str] = []
    failure = None
    for name, run in case.runs.items():
        reason = None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                result = run()
            except Exception as error:
                if name != CAPTURED:
                    raise
                reason = f"{type(error).__name__}: {error}"
                if _OPTION not in reason:
                    failure = error
        if name == CAPTURED and reason is None:
            reason = next((str(w.message) for w in caught if _OPTION in str(w.message)), None)
        if reason is None:
            found[name] = result
        else:
            remarks.append(f"{case.title}: without {name} ({reason}).")
    return found, remarks, failure


def waiter(device: torch.device) -> Callable[[], object]:
    """Returns when all of the device's work is done."""
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return lambda: None


def close_to_peer(
    bound: float, more: Callable[[str], dict]
) -> Callable[[dict[str, list[Tensor]]], dict[str, dict]]:
    """Compares each tensor with torchdiffeq's; `more` are further facts of a contender."""

    def compare(found: dict[str, list[Tensor]]) -> dict[str, dict]:
        facts = {}
        for name, tensors in found.items():
            worst = max(distance([a], [b]) for a, b in zip(tensors, found[PEER]))
            if not worst <= bound:
                raise RuntimeError(f"{name} differs from {PEER} by {worst:.1e}")
            facts[name] = {**more(name), "differs by": f"{worst:.1e}"}
        return facts

    return compare


# ---- neural ODEs ---------------------------------------------------------------------------------


def neural_ode(device: torch.device, batch: int = 1024) -> Case:
    """The forward pass, without a graph."""
    return _network_case(device, batch, adjoint=False)


def neural_ode_adjoint(device: torch.device, batch: int = 1024) -> Case:
    """Forward and backward by `odeint_adjoint`."""
    return _network_case(device, batch, adjoint=True)


def _network_case(device: torch.device, batch: int, adjoint: bool) -> Case:
    torch.manual_seed(0)
    network = Network(16, 64).to(device)
    y0 = torch.randn(batch, 16).to(device)
    t = torch.tensor([0.0, 1.0], device=device)
    solvers = _solvers("odeint_adjoint" if adjoint else "odeint")
    nfe: dict[str, int] = {}

    def solve(name: str, y: Tensor) -> Tensor:
        # A replayed graph does not call the field, so pycnf counts for itself.
        network.calls = 0
        options = _OPTIONS[name]
        out = solvers[name](network, y, t, method="dopri5", options=options, **_TOLERANCES)
        nfe[name] = network.calls if name == PEER else pycnf.last_stats().evaluations
        return out[-1]

    def forward(name: str) -> list[Tensor]:
        with torch.no_grad():
            return [solve(name, y0)]

    def train(name: str) -> list[Tensor]:
        x = y0.clone().requires_grad_()
        loss = solve(name, x).square().mean()
        return list(torch.autograd.grad(loss, (x, *network.parameters())))

    run = train if adjoint else forward
    what = "odeint_adjoint, forward and backward" if adjoint else "odeint, forward"
    return Case(
        f"{what}, dopri5, 16-64-64-64-16 tanh, B={batch}",
        {name: lambda name=name: run(name) for name in _OPTIONS},
        # At equal steps rounding is all. But rounding may flip a step, and then it is tolerances:
        # atol, beside cotangents of 1e-4, is a hundredth.
        close_to_peer(1e-2 if adjoint else 1e-4, lambda name: {"nfe forward": nfe[name]}),
        {OURS: 3, CAPTURED: 8} if adjoint else {OURS: 5, CAPTURED: 15},
    )


def _solvers(function: str) -> dict[str, Callable]:
    import torchdiffeq

    ours, theirs = getattr(pycnf, function), getattr(torchdiffeq, function)
    return {OURS: ours, CAPTURED: ours, PEER: theirs}


def ffjord(device: torch.device, batch: int = 1024) -> Case:
    """A training step of the generic engine beside `odeint_adjoint`."""
    torch.manual_seed(0)
    mlp = pycnf.nn.MLP(2, (64, 64, 64)).to(device)
    x = torch.randn(batch, 2).to(device)
    probe = (torch.randint(0, 2, (batch, 2)) * 2 - 1).to(x)
    captured = _OPTIONS[CAPTURED].get(_OPTION, False)
    makers = {
        OURS: lambda: OurStep(mlp, x, probe, "generic", cuda_graph=False),
        CAPTURED: lambda: OurStep(mlp, x, probe, "generic", cuda_graph=captured),
        PEER: lambda: TorchdiffeqStep(mlp, x, probe, 1e-5, adjoint=True),
    }
    steps: dict[str, OurStep | TorchdiffeqStep] = {}

    def run(name: str) -> list[Tensor]:
        if name not in steps:
            steps[name] = makers[name]()
        return steps[name]()

    def compare(found: dict[str, list[Tensor]]) -> dict[str, dict]:
        truth = tight_step(mlp, x, probe.unsqueeze(0))
        facts = {name: errors(tensors, truth) for name, tensors in found.items()}
        allowed = float(facts[PEER]["gradient error"])
        for name in found:
            if not float(facts[name]["gradient error"]) <= allowed:
                raise RuntimeError(f"{name} is farther from the truth than {PEER}: {facts}")
            if name == PEER:
                facts[name]["nfe"] = steps[name].calls
            else:
                stats = steps[name].flow.stats
                facts[name]["steps"] = f"{stats.accepted} + {stats.rejected} rejected"
        return facts

    return Case(
        f"FFJORD training step, dopri5, D=2, 64-64-64 concatsquash tanh, B={batch}",
        {name: lambda name=name: run(name) for name in makers},
        compare,
        {CAPTURED: 8},
    )


# ---- a field of hundreds of kernels --------------------------------------------------------------


class _Block(nn.Module):
    """Two normalized convolutions with a shift by the time in between, and a way around them."""

    def __init__(self, before: int, after: int, time: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, before), nn.GroupNorm(8, after)
        self.conv1 = nn.Conv2d(before, after, 3, padding=1)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1)
        self.shift = nn.Linear(time, after)
        self.around = nn.Identity() if before == after else nn.Conv2d(before, after, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(nn.functional.silu(self.norm1(x)))
        h = h + self.shift(time)[:, None, None]
        h = self.conv2(nn.functional.silu(self.norm2(h)))
        return self.around(x) + h


class UNet(nn.Module):
    """f(t, y) of images [B, 3, H, H], H a multiple of 4, as flows of images have it."""

    def __init__(self, width: int = 32, blocks: int = 3, time: int = 64) -> None:
        super().__init__()
        widths = (width, 2 * width, 4 * width)
        self.register_buffer("frequencies", torch.logspace(0, 3, time // 2))
        self.time = nn.Sequential(nn.Linear(time, time), nn.SiLU(), nn.Linear(time, time))
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        channels = width
        for level in widths:
            sizes = [channels, *[level] * blocks]
            self.down.append(nn.ModuleList(_Block(a, b, time) for a, b in pairwise(sizes)))
            channels = level
        for level in reversed(widths):
            sizes = [channels + level, *[level] * blocks]
            self.up.append(nn.ModuleList(_Block(a, b, time) for a, b in pairwise(sizes)))
            channels = level
        self.last = nn.Sequential(
            nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, 3, 3, padding=1)
        )

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        angles = t * self.frequencies
        time = self.time(torch.cat([angles.sin(), angles.cos()]))
        h, kept = self.first(y), []
        for level, blocks in enumerate(self.down):
            h = nn.functional.avg_pool2d(h, 2) if level > 0 else h
            for block in blocks:
                h = block(h, time)
            kept.append(h)
        for level, blocks in enumerate(self.up):
            h = nn.functional.interpolate(h, scale_factor=2.0) if level > 0 else h
            h = torch.cat([h, kept.pop()], 1)
            for block in blocks:
                h = block(h, time)
        return self.last(h)


def image_flow(
    device: torch.device, batch: int = 64, size: int = 32, width: int = 32, steps: int = 10
) -> Case:
    """`rk4`, so that all take the same evaluations whatever the convolutions round to."""
    torch.manual_seed(0)
    network = UNet(width).to(device)
    y0 = torch.randn(batch, 3, size, size).to(device)
    t = torch.tensor([0.0, 1.0], device=device)
    solvers = _solvers("odeint")

    def solve(name: str) -> list[Tensor]:
        options = {"step_size": 1 / steps, **_OPTIONS[name]}
        with torch.no_grad():
            return [solvers[name](network, y0, t, method="rk4", options=options)[-1]]

    return Case(
        f"odeint, forward, rk4 of {steps} steps, U-Net, B={batch}, 3×{size}×{size}",
        {name: lambda name=name: solve(name) for name in _OPTIONS},
        close_to_peer(1e-3, lambda name: {"nfe": 4 * steps}),  # convolutions may be in TF32
        # 1.3 is for a field that is bound by its launches, which the small batch's is.
        {OURS: 1, CAPTURED: 1.3 if batch < 64 else 1},
    )


# ---- how often the host waits --------------------------------------------------------------------


class Decay(nn.Module):
    """dy/dt = -y, counting its calls; a module, since `cuda_graph` serves nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        return -y


def attempted_step(device: torch.device, short: float = 10.0, long: float = 100.0) -> Case:
    """A step beside a field that does next to nothing, and its synchronizing calls.

    Those of a step are what a longer solve has more of: a solve's own (its times, the initial step)
    are in both.
    """
    y0 = torch.rand(64, 2, generator=torch.Generator().manual_seed(0)).to(device)
    times = {end: torch.tensor([0.0, end], device=device) for end in (short, long)}
    solvers = _solvers("odeint")
    fields = {name: Decay() for name in _OPTIONS}
    units: dict[str, float] = {}

    @torch.no_grad()
    def solve(name: str, end: float) -> tuple[Tensor, int]:
        """The solution and its attempted steps."""
        decay, options = fields[name], _OPTIONS[name]
        decay.calls = 0
        y = solvers[name](decay, y0, times[end], method="dopri5", options=options, **_TOLERANCES)
        if name == PEER:
            return y[-1], (decay.calls - 2) // 6  # two evaluations before the first, six each
        stats = pycnf.last_stats()
        return y[-1], stats.accepted + stats.rejected

    def run(name: str) -> list[Tensor]:
        y, units[name] = solve(name, long)
        return [y + 1]  # next to 0, a relative difference says little

    def facts(name: str) -> dict:
        attempts, syncs = {}, {}
        for end in times:
            attempts[end] = solve(name, end)[1]  # what happens once, happens here
            syncs[end] = sync_count(lambda end=end: solve(name, end), device)
        each = (syncs[long] - syncs[short]) / (attempts[long] - attempts[short])
        wanted = {OURS: "at most 1", CAPTURED: "0"}
        return {
            "attempts": attempts[long],
            "syncs an attempt": f"{each:.2f}",
            **({"syncs wanted": wanted[name]} if name in wanted else {}),
            "syncs beside them": f"{syncs[long] - each * attempts[long]:.0f}",
        }

    return Case(
        "an attempted step, dopri5, dy/dt = -y, 64×2",
        {name: lambda name=name: run(name) for name in _OPTIONS},
        close_to_peer(1e-5, facts),
        units=units,
    )


def sync_count(run: Callable[[], object], device: torch.device) -> int:
    """Synchronizing calls, counted as the warnings of torch's own detector."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    return sum(_SYNC in str(warning.message) for warning in caught)


# ---- kernels beside a copy -----------------------------------------------------------------------


@dataclass
class Kernel:
    """An op on a state; `bytes` is the least that it must move."""

    title: str
    run: Callable[[], Tensor]
    bytes: int
    truth: Callable[[], Tensor]
    bound: float


def bytes_moved(size: int, *sums: Sequence[float]) -> int:
    """Bytes that the end of a stage or step moves at least, in float32.

    Read once: y0, and every row with a weight in any of the sums, the newest of them in `fresh`.
    Written once: the next state and the newest row. The end of a step without a sum for its
    solution reads that instead of writing it. The norm's partial sums are a thousandth of a row.
    """
    rows = sum(any(weights) for weights in zip(*sums))
    return 4 * size * (1 + rows + 1 + 1)


def kernels(device: torch.device, size: int = 1 << 26) -> list[Kernel]:
    """rk_stage and rk_finish on a state of `size` values, by default 256 MiB in float32."""
    torch.manual_seed(0)
    dopri5, tsit5 = TABLEAUX["dopri5"], TABLEAUX["tsit5"]
    y0, fresh = torch.randn(2, size, device=device)
    y1 = y0 + 0.1
    k = torch.randn(dopri5.stages, size, device=device)
    h, tolerance = 0.1, torch.tensor(1e-3, dtype=torch.float64)
    ops = torch.ops.pycnf

    def stage(number: int) -> Kernel:
        weights = dopri5.a[number]
        return Kernel(
            f"rk_stage, dopri5's stage {number + 1}",
            lambda: ops.rk_stage(y0, k, False, [fresh], weights, h),
            bytes_moved(size, weights),
            lambda: reference.rk_stage(
                y0.double(), k.double(), False, [fresh.double()], weights, h
            ),
            1e-6,
        )

    def finish(tableau_name: str, solution: list[float], error: list[float]) -> Kernel:
        ends = ([fresh], y1, solution, error, h, tolerance, tolerance, [0, size])
        return Kernel(
            f"rk_finish, {tableau_name}",
            lambda: ops.rk_finish(y0, k, False, *ends),
            bytes_moved(size, *(sums for sums in (solution, error) if sums)),
            lambda: reference.rk_finish(
                y0.double(), k.double(), False, [fresh.double()], y1.double(), *ends[2:]
            ),
            1e-4,
        )

    return [
        stage(2),
        stage(dopri5.stages - 1),
        finish("dopri5", [], dopri5.e),
        finish("tsit5", tsit5.b, tsit5.e),
    ]


def kernel_rows(
    kernel: Kernel,
    device: torch.device,
    size: int = 1 << 26,
    rounds: int | None = None,
    seconds: float = 0.1,
) -> list[Row]:
    """Time per GB of an op and of a copy of the state, which reads and writes it."""
    difference = distance([kernel.run()], [kernel.truth()])
    if not difference <= kernel.bound:
        raise RuntimeError(f"{kernel.title} is off by {difference:.1e}")
    source, target = torch.randn(size, device=device), torch.empty(size, device=device)
    amounts = {OURS: kernel.bytes / 1e9, COPY: 2 * 4 * size / 1e9}
    times = interleave(
        {OURS: kernel.run, COPY: lambda: target.copy_(source)},
        rounds or 9,
        seconds,
        waiter(device),
    )
    case = f"a GB of {kernel.title}, state of {4 * size / 2**20:.3g} MiB, f32"
    rows = rows_of(case, times, {OURS: {}, COPY: {}}, amounts)
    for row in rows:
        row.facts |= {
            "a call": time_text(row.seconds * amounts[row.contender]),
            "GB/s": f"{1 / row.seconds:.0f}",
        }
    ours, copied = rows
    ours.facts |= {
        "of the copy's rate": f"{100 * copied.ratio:.0f} %",
        "target": "80 %",
        "off by": f"{difference:.1e}",
    }
    return rows


# ---- all of it -----------------------------------------------------------------------------------

_CASES: dict[str, Callable[[torch.device], Case]] = {
    "odeint, forward": neural_ode,
    "odeint_adjoint, forward and backward": neural_ode_adjoint,
    "FFJORD": ffjord,
    "U-Net, B=64": image_flow,
    "U-Net, B=4": lambda device: image_flow(device, batch=4),
    "attempted step": attempted_step,
}


def absent() -> str | None:
    """Why nothing can be measured here, in a sentence; None if it can."""
    if not torch.cuda.is_available():
        return "torch sees no GPU here, so the benchmarks on one are left out."
    if pycnf.build_info()["cuda"] is None:
        return "pycnf was built without CUDA, so the benchmarks on a GPU are left out."
    return None


def run(options: Options) -> Iterator[Row | str]:
    """Rows of every case, and of the kernels.

    Raises:
        RuntimeError: cases failed; after those that did not.
    """
    reason = absent()
    if reason is not None:
        yield reason
        return
    remark = missing(PEER, "all but the kernels")
    if remark is not None:
        yield remark
    failures = []
    for name, rows in _works(torch.device("cuda"), options.rounds).items():
        if not options.has(name):
            continue
        try:
            yield from rows()
        except Exception as error:
            cause = f" ({error.__cause__!r})" if error.__cause__ else ""
            failures.append(f"{name}: {error!r}{cause}")
            yield f"Failed: {failures[-1]}"
        gc.collect()
        torch.cuda.empty_cache()
    if failures:
        raise RuntimeError("; ".join(failures))


def _works(
    device: torch.device, rounds: int | None
) -> dict[str, Callable[[], Iterator[Row | str]]]:
    """What gives the rows of each name that `--only` chooses from."""
    works: dict[str, Callable] = {}
    if missing(PEER, "") is None:
        for name, make in _CASES.items():
            works[name] = lambda make=make: measure(make(device), device, rounds)
    works["kernels"] = lambda: _kernel_rows(device, rounds)
    return works


def _kernel_rows(device: torch.device, rounds: int | None) -> Iterator[Row]:
    for kernel in kernels(device):
        yield from kernel_rows(kernel, device, rounds=rounds)
