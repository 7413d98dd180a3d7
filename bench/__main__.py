"""`python -m bench [overhead] [ffjord] [--out FOLDER]`: all benchmarks, or those named."""

from __future__ import annotations

import argparse
from pathlib import Path

from bench import ffjord, overhead
from bench.harness import report

_BENCHMARKS = {"overhead": overhead.run, "ffjord": ffjord.run}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"any of {', '.join(_BENCHMARKS)}; default: all")
    parser.add_argument("--out", type=Path, help="folder for one JSON file a benchmark")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(_BENCHMARKS)
    if unknown:
        parser.error(
            f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(_BENCHMARKS)}"
        )
    for name in arguments.names or _BENCHMARKS:
        report(name, _BENCHMARKS[name](), arguments.out)


if __name__ == "__main__":
    main()
