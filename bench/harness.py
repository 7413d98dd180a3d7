"""Interleaved measurements, the machine they were made on, tables and JSON.

Contenders of one case run in turn, round after round, in one process, so that a machine whose speed
drifts is as unkind to all of them. What is reported is the median of the rounds, their spread, and
the median of the ratios round by round.
"""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch.utils.benchmark import Timer

import pycnf

OURS = "pycnf"


@dataclass
class Row:
    """One contender in one case.

    `seconds` is the median time of a unit of work (a step, say), `low` and `high` the fastest and
    slowest round, `ratio` how many times longer than pycnf it takes (median over rounds); `facts`
    what must stand beside a ratio.
    """

    case: str
    contender: str
    seconds: float
    low: float
    high: float
    ratio: float
    facts: dict[str, float | int | str] = field(default_factory=dict)


def measure(
    case: str,
    contenders: dict[str, Callable[[], None]],
    units: dict[str, float],
    facts: dict[str, dict],
    rounds: int = 9,
    seconds: float = 0.25,
) -> list[Row]:
    """Time every contender; `units` says how many units of work one call does, OURS must be among
    them.

    A round calls each contender often enough to fill about `seconds`; one unmeasured call each goes
    first.
    """
    timers = {
        name: Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
        for name, run in contenders.items()
    }
    calls = {}
    for name, timer in timers.items():
        timer.timeit(1)
        calls[name] = max(1, int(seconds / max(timer.timeit(1).mean, 1e-9)))
    times: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(rounds):
        for name, timer in timers.items():
            times[name].append(timer.timeit(calls[name]).mean / units[name])
    rows = []
    for name, values in times.items():
        ratio = statistics.median(t / ours for t, ours in zip(values, times[OURS]))
        rows.append(
            Row(case, name, statistics.median(values), min(values), max(values), ratio, facts[name])
        )
    return rows


def machine() -> dict[str, str | int]:
    """What the numbers were measured on."""
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
        "torch": torch.__version__,
        "pycnf": info["version"],
        "python": platform.python_version(),
    }


def time_text(seconds: float) -> str:
    """A time in the unit that suits it."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| case | solver | median | fastest – slowest | × pycnf's time | beside it |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        facts = ", ".join(f"{key} {value}" for key, value in row.facts.items())
        spread = f"{time_text(row.low)} – {time_text(row.high)}"
        lines.append(
            f"| {row.case} | {row.contender} | {time_text(row.seconds)} | {spread} | "
            f"{row.ratio:.2f} | {facts} |"
        )
    return "\n".join(lines)


def report(title: str, rows: list[Row], folder: Path | None) -> None:
    """Prints the table; with a folder also writes title.json there."""
    where = machine()
    print(f"\n## {title}\n\n{', '.join(f'{k} {v}' for k, v in where.items())}\n\n{table(rows)}")
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        content = {"title": title, "machine": where, "rows": [asdict(row) for row in rows]}
        (folder / f"{title}.json").write_text(json.dumps(content, indent=1) + "\n")
