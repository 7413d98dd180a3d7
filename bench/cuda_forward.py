"""Forward solves of a flow on a GPU, in GFLOP/s beside what the GPU can do in f32: fused
multiply-adds (ffma.cu) and torch.mm without TF32, the fastest of some sizes. And what is launched,
and how often the host waits, in such a solve.

A solve that fails is said to have failed, and the others go on. Everything here takes a device and
sizes, so that all but the numbers can be tried on a CPU.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.utils import cpp_extension

import pycnf
from bench.cuda import absent, sync_count, waiter
from bench.cuda_training import Case, first_line, inputs, precisions
from bench.flops import solve_flops
from bench.harness import OURS, Options, Row, interleave, rows_of
from bench.training import SHAPES

FFMA, CUBLAS = "fused multiply-adds", "torch.mm"
SIZES = (2048, 4096, 8192, 16384)
_SOURCE = Path(__file__).parent / "ffma.cu"
_DEVICE = torch.device("cuda")
_METHOD, _TOLERANCE = "dopri5", 1e-5
# Of narrow fields, and of those whose rows alone keep a GPU busy.
_BATCH, _BATCH_OF_WIDE, _WIDE = 100_000, 10_000, 256
# Of the rate of fused multiply-adds where a solve is one launch, of torch.mm's where it is not.
_ONE_LAUNCH, _LAYERS = (FFMA, 50), (CUBLAS, 75)
_LIMIT = 3.0  # seconds of rounds


def ffma_rate() -> float:
    """GFLOP/s of fused multiply-adds in f32.

    Raises:
        RuntimeError: It could not be measured.
    """
    home = cpp_extension.CUDA_HOME
    nvcc = shutil.which("nvcc") or (home and str(Path(home) / "bin" / "nvcc"))
    if not nvcc:
        raise RuntimeError("there is no nvcc")
    major, minor = torch.cuda.get_device_capability()
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder) / "ffma")
        _run(nvcc, "-O3", f"-arch=sm_{major}{minor}", str(_SOURCE), "-o", program)
        return float(_run(program))


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(str(error)) from error
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]}: {done.stderr.strip()}")
    return done.stdout


def product_rates(device: torch.device, sizes: Iterable[int]) -> list[Row]:
    """Square products by torch.mm in f32, a row each."""
    rows = []
    for size in sizes:
        a, b, out = torch.rand(3, size, size).to(device)
        run = partial(torch.mm, a, b, out=out)
        name = f"{CUBLAS} {size}×{size}×{size}, f32"
        times = interleave({CUBLAS: run}, 5, 0.05, waiter(device))
        row = rows_of(name, times, {CUBLAS: {}})[0]
        row.facts["GFLOP/s"] = f"{2e-9 * size**3 / row.seconds:.0f}"
        rows.append(row)
    return rows


def rate(row: Row) -> float:
    """GFLOP/s of a row that says so."""
    return float(row.facts["GFLOP/s"])


def solves(
    case: Case, device: torch.device, options: dict
) -> dict[str, tuple[pycnf.CNF, int, Callable[[], Tensor]]]:
    """Forward solves by what they are: the flow, how many probes it has, and a call."""
    field, x, probe = inputs(case, device)
    flow = pycnf.CNF(field, method=_METHOD, rtol=_TOLERANCE, atol=_TOLERANCE, **options)

    @torch.no_grad()
    def value() -> Tensor:
        return flow.trajectory(x, [0.0])

    @torch.no_grad()
    def divergence() -> Tensor:
        return flow(x, probe=probe.unsqueeze(0))[1]

    return {"without divergence": (flow, 0, value), "with divergence": (flow, 1, divergence)}


def rows(
    case: Case,
    device: torch.device,
    rates: dict[str, float],
    rounds: int | None = None,
) -> Iterator[Row | str]:
    """A case's rows: without and with divergence, in every precision that there is."""
    for name, options in {OURS: {}, **precisions(device)}.items():
        try:
            for kind, (flow, probes, run) in solves(case, device, options).items():
                facts = _facts(run, flow, device)
                title = f"forward, {kind}, {case.title.partition(', ')[2]}"
                times = interleave({name: run}, rounds or 5, 0.1, waiter(device), _LIMIT)
                row = rows_of(title, times, {name: facts})[0]
                gflop = solve_flops(flow.field, case.batch, probes, _METHOD, flow.stats) / 1e9
                facts |= {"GFLOP": f"{gflop:.3g}", "GFLOP/s": f"{gflop / row.seconds:.0f}"}
                for what, each in rates.items():
                    facts[f"of {what}'s rate"] = f"{100 * gflop / row.seconds / each:.0f} %"
                if name == OURS:
                    what, target = _ONE_LAUNCH if in_one_launch(flow) else _LAYERS
                    facts["target"] = f"{target} % of {what}'s rate"
                yield row
        except Exception as error:
            yield f"{case.title}: {name} failed ({first_line(error)})."


def _facts(run: Callable, flow: pycnf.CNF, device: torch.device) -> dict:
    """What is launched by a call, and how often the host waits."""
    for _ in range(3):  # what is recorded is recorded by then
        run()
    names = launches(run, device)
    stats = flow.stats
    facts = {
        "engine": stats.engine,
        "steps": f"{stats.accepted} + {stats.rejected} rejected",
        "nfe": stats.nfe_forward,
        "launches": len(names) if names else "not seen",
        "of pycnf's kernels": sum("pycnf" in name for name in names) if names else "not seen",
        "syncs": sync_count(run, device),
        "syncs wanted": 0,
    }
    if in_one_launch(flow):
        facts["launches wanted"] = 1
    return facts


def in_one_launch(flow: pycnf.CNF) -> bool:
    """Whether the whole solve is one call into compiled code."""
    return "a whole solve in one" in flow.explain()


def launches(run: Callable[[], object], device: torch.device) -> list[str]:
    """Names of the kernels that a call launches; none where the profiler sees none."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    waiter(device)()
    with torch.profiler.profile(activities=activities) as profiler:
        run()
        waiter(device)()
    return kernel_names(profiler.events())


def kernel_names(events: Iterable) -> list[str]:
    """Of a profile's events those that are kernels: on the GPU, and neither copy nor fill."""
    return [
        event.name
        for event in events
        if event.device_type == DeviceType.CUDA and not event.name.startswith(("Memcpy", "Memset"))
    ]


def run(options: Options) -> Iterator[Row | str]:
    """Rows of the rates, then of every field.

    Raises:
        RuntimeError: Solves failed; after those that did not.
    """
    reason = absent()
    if reason is not None:
        yield reason
        return
    torch.backends.cuda.matmul.allow_tf32 = False
    products = product_rates(_DEVICE, SIZES)
    yield from products
    rates = {CUBLAS: max(map(rate, products))}
    try:
        rates[FFMA] = ffma_rate()
        yield (
            f"{FFMA}: {rates[FFMA]:.0f} GFLOP/s, eight chains in each of 2048 threads a "
            f"multiprocessor, from registers, the fastest of 20 launches (ffma.cu); {CUBLAS}: the "
            "best of the sizes above, TF32 off."
        )
    except Exception as error:
        yield f"The rate of {FFMA} is unknown ({first_line(error)})."
    failed = []
    for shape in SHAPES:
        case = Case(*shape, _BATCH if max(shape[2]) <= _WIDE else _BATCH_OF_WIDE)
        if not options.has(case.title):
            continue
        for item in rows(case, _DEVICE, rates, options.rounds):
            if isinstance(item, str):
                failed.append(item)
            yield item
        torch.cuda.empty_cache()
    if failed:
        raise RuntimeError(" ".join(failed))
