"""`python -m bench [names] [--only TEXT] [--rounds N] [--seconds S] [--out FOLDER]`: all
benchmarks, or those named.
"""

from __future__ import annotations

import argparse
import importlib
import math
from pathlib import Path

from bench.harness import Options, report

_BENCHMARKS = (
    "field",
    "overhead",
    "training",
    "likelihood",
    "memory",
    "cuda",
    "cuda_training",
    "cuda_forward",
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"any of {', '.join(_BENCHMARKS)}; default: all")
    parser.add_argument("--only", default="", help="only cases that have this text in their name")
    parser.add_argument("--rounds", type=int, help="rounds of every case, for a quick look")
    parser.add_argument(
        "--seconds", type=float, default=math.inf,
        help="for cuda_training: cases that would begin later are left out, and before them peers",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="folder for one JSON file a benchmark")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(_BENCHMARKS)
    if unknown:
        parser.error(
            f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(_BENCHMARKS)}"
        )
    if arguments.rounds is not None and arguments.rounds < 1:
        parser.error(f"--rounds: got {arguments.rounds}, expected at least 1")
    options = Options(arguments.only, arguments.rounds, arguments.seconds)
    for name in arguments.names or _BENCHMARKS:
        benchmark = importlib.import_module(f"bench.{name}")
        report(name, benchmark.run(options), arguments.out)


if __name__ == "__main__":
    main()
