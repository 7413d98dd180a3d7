"""`python -m bench.gpu_report FOLDER`: from what gpu.sh left in a folder, gpu.json (everything) and
gpu.md (the table).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

from torch.utils import cpp_extension

from bench.harness import Row, machine, program_output, table

_ROOT = Path(__file__).parents[1]
_BENCHMARKS = ("cuda_forward", "cuda_training", "cuda")
_SUMMARIES = {
    "tests": re.compile(r"\d+ (passed|failed|errors?|skipped|deselected)\b.* in "),
    "memcheck": re.compile(r"ERROR SUMMARY: "),
}


def content(folder: Path) -> dict:
    """All that is known of a run."""
    rows, remarks = [], []
    for name in _BENCHMARKS:
        path = folder / f"{name}.json"
        if not path.exists():
            remarks.append(f"No row of {name}.")
            continue
        measured = json.loads(path.read_text())
        rows += measured["rows"]
        remarks += measured["remarks"]
    commit, dirty = checkout()
    home = Path(cpp_extension.CUDA_HOME or "")
    nvcc = home / "bin" / "nvcc"
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit,
        "dirty": dirty,
        "machine": {
            **machine(),
            "cores": os.cpu_count(),
            "nvcc": program_output(str(nvcc) if nvcc.exists() else "nvcc", "--version"),
            "architectures": os.environ.get("TORCH_CUDA_ARCH_LIST", ""),
        },
        "parts": parts(folder),
        **{name: summary(folder, name) for name in _SUMMARIES},
        "failures": failures(folder),
        "rows": rows,
        "remarks": remarks,
    }


def checkout() -> tuple[str, bool | None]:
    """The commit, and whether files differ from it (None: unknown). COMMIT says so where there is
    no repository, a changed one by "-dirty" at its end.
    """
    given = os.environ.get("COMMIT")
    if given:
        return given.removesuffix("-dirty"), given.endswith("-dirty")
    try:
        head, status = (
            subprocess.run(
                ["git", "-C", str(_ROOT), *command], capture_output=True, text=True, check=True
            ).stdout.strip()
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown", None
    return head, bool(status)


def parts(folder: Path) -> list[dict[str, str | int]]:
    """The parts of the run in their order: how each ended, and its seconds."""
    path = folder / "parts.tsv"
    lines = path.read_text().splitlines() if path.exists() else []
    split = (line.split("\t") for line in lines)
    return [{"part": name, "state": state, "seconds": int(took)} for name, state, took in split]


def summary(folder: Path, part: str) -> str:
    """The last line of a part's log that sums it up."""
    found = [line for line in _log(folder, part) if _SUMMARIES[part].search(line)]
    return found[-1].strip("= ") if found else "no summary"


def failures(folder: Path) -> list[str]:
    """What pytest lists as failed."""
    return [line for line in _log(folder, "tests") if line.startswith(("FAILED ", "ERROR "))]


def _log(folder: Path, part: str) -> list[str]:
    path = folder / f"{part}.log"
    return path.read_text(errors="replace").splitlines() if path.exists() else []


def markdown(run: dict) -> Iterator[str]:
    """The lines of gpu.md."""
    machine_ = run["machine"]
    state = {True: ", with changes", False: "", None: ", perhaps with changes"}[run["dirty"]]
    yield f"# pycnf on {machine_.get('gpu', 'no GPU')}"
    yield ""
    yield f"Commit {run['commit']}{state}; {run['date']}."
    yield ""
    yield ", ".join(f"{key} {value}" for key, value in machine_.items() if key != "gpu")
    yield ""
    ends = (f"{part['part']} {part['state']} ({part['seconds']} s)" for part in run["parts"])
    yield f"Parts: {', '.join(ends)}. Tests: {run['tests']}. Memory: {run['memcheck']}."
    for line in run["failures"]:
        yield f"- {line}"
    yield ""
    yield from table(Row(**row) for row in run["rows"])
    for remark in run["remarks"]:
        yield ""
        yield remark


def write(folder: Path) -> None:
    """Writes gpu.json and gpu.md beside the logs."""
    run = content(folder)
    (folder / "gpu.json").write_text(json.dumps(run, indent=1) + "\n")
    (folder / "gpu.md").write_text("\n".join(markdown(run)) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    write(arguments.folder)
    print((arguments.folder / "gpu.md").read_text())
