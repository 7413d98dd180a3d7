"""Interleaved measurements, the machine they were made on, tables and JSON.

Contenders of one case run in turn, round after round, in one process, so that a machine whose speed
drifts is as unkind to all of them. What is reported is the median of the rounds, their spread, and
the median of the ratios round by round.
"""

from __future__ import annotations

import gc
import importlib.metadata
import importlib.util
import json
import math
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

import pycnf

OURS = "pycnf"
PEERS = ("torchdiffeq", "diffrax", "jax", "zuko")
# A call this long, in seconds, is not repeated unmeasured before each of its measurements.
_LONG = 1.0


@dataclass(frozen=True)
class Options:
    """What the command line asks of every benchmark: which cases, how many rounds of each, and how
    many seconds there are for all of it, which a benchmark need not heed.
    """

    only: str = ""
    rounds: int | None = None
    seconds: float = math.inf

    def has(self, case: str) -> bool:
        return self.only.lower() in case.lower()


@dataclass
class Row:
    """One contender in one case.

    `seconds` is the median time of a unit of work (a step, say), `low` and `high` the fastest and
    slowest round, `ratio` how many times longer than pycnf it takes (median over rounds; None where
    pycnf was not measured); `facts` what must stand beside a ratio.
    """

    case: str
    contender: str
    seconds: float
    low: float
    high: float
    ratio: float | None
    facts: dict[str, float | int | str] = field(default_factory=dict)

    def cells(self) -> dict[str, str]:
        """The columns of the table."""
        return {
            "case": self.case,
            "solver": self.contender,
            "median": time_text(self.seconds),
            "fastest – slowest": f"{time_text(self.low)} – {time_text(self.high)}",
            "× pycnf's time": "" if self.ratio is None else f"{self.ratio:.2f}",
            "beside it": ", ".join(f"{key} {value}" for key, value in self.facts.items()),
        }


def interleave(
    contenders: dict[str, Callable[[], object]],
    rounds: int,
    seconds: float = 0.2,
    wait: Callable[[], object] = lambda: None,
    limit: float = math.inf,
) -> dict[str, list[float]]:
    """Seconds that a call of each contender takes, round by round.

    Behind the first, no round begins after `limit` seconds.

    A round calls each contender often enough to fill about `seconds`, at least once. One unmeasured
    call each goes first, and another before each measurement of a short one: the caches are then
    its own, and the threads of the contender before have gone to sleep.

    `wait` returns when everything that was queued is done: the clock of a GPU's work is read behind
    it, once for all calls of a round, so that calls may overlap as they do in use.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    lengths = {}
    begin = time.perf_counter()
    for name, run in contenders.items():
        lengths[name] = max(_time(run, 1, wait), 1e-9)
        if lengths[name] < _LONG:
            lengths[name] = max(_time(run, 1, wait), 1e-9)
    for done in range(rounds):
        if done > 0 and time.perf_counter() - begin > limit:
            break
        for name, run in contenders.items():
            if lengths[name] < _LONG:
                run()
            calls = max(1, int(seconds / lengths[name]))
            times[name].append(_time(run, calls, wait))
    return times


def _time(run: Callable[[], object], calls: int, wait: Callable[[], object]) -> float:
    gc.collect()
    gc.disable()
    try:
        wait()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        wait()
        return (time.perf_counter() - start) / calls
    finally:
        gc.enable()


def rows_of(
    case: str,
    times: dict[str, list[float]],
    facts: dict[str, dict],
    units: dict[str, float] | None = None,
) -> list[Row]:
    """Rows of what `interleave` measured; `units` says how many units of work a call does, one
    without.
    """
    units = units or dict.fromkeys(times, 1.0)
    each = {name: [t / units[name] for t in values] for name, values in times.items()}
    return [
        Row(
            case,
            name,
            statistics.median(values),
            min(values),
            max(values),
            statistics.median(t / ours for t, ours in zip(values, each[OURS]))
            if OURS in each
            else None,
            facts[name],
        )
        for name, values in each.items()
    ]


def missing(package: str, what: str) -> str | None:
    """A sentence saying that an optional peer is not there, and what is left out; None if it is."""
    if importlib.util.find_spec(package) is not None:
        return None
    return f"{package} is not installed, so {what} is left out; `make bench` installs it."


def machine() -> dict[str, str | int]:
    """What the numbers were measured on, and the versions that were measured."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), cpu)
    info = pycnf.build_info()
    return {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "instruction_set": info["instruction_set"],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pycnf": info["version"],
        **_gpu(),
        **{
            name: importlib.metadata.version(name)
            for name in PEERS
            if importlib.util.find_spec(name) is not None
        },
    }


def _gpu() -> dict[str, str]:
    """The GPU that torch uses, its driver and CUDA; empty without one."""
    if not torch.cuda.is_available():
        return {}
    return {
        "gpu": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "driver": program_output(
            "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
        ),
    }


def program_output(program: str, *arguments: str) -> str:
    """The last line that a program prints, or why there is none."""
    if shutil.which(program) is None:
        return f"{program} not found"
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    return lines[-1] if done.returncode == 0 and lines else f"{program} failed"


def time_text(seconds: float) -> str:
    """A time in the unit that suits it."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def table(rows: Iterable) -> Iterator[str]:
    """The lines of a Markdown table of what the rows' `cells` say."""
    for i, row in enumerate(rows):
        cells = row.cells()
        if i == 0:
            yield f"| {' | '.join(cells)} |"
            yield "|---" * len(cells) + "|"
        yield f"| {' | '.join(cells.values())} |"


def report(title: str, found: Iterable, folder: Path | None) -> None:
    """Prints rows as they are measured, and after them what is no row but a remark.

    With a folder also writes title.json there, again after each row, so that what was measured
    outlives a case that fails.
    """
    content = {"title": title, "machine": machine(), "rows": [], "remarks": []}
    print(f"\n## {title}\n\n{', '.join(f'{k} {v}' for k, v in content['machine'].items())}\n")

    def rows() -> Iterator:
        for item in found:
            if isinstance(item, str):
                content["remarks"].append(item)
            else:
                content["rows"].append(asdict(item))
                yield item
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"{title}.json").write_text(json.dumps(content, indent=1) + "\n")

    for line in table(rows()):
        print(line, flush=True)
    for remark in content["remarks"]:
        print(f"\n{remark}", flush=True)
