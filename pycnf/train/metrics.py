"""metrics.jsonl: one JSON object a line, appended while training, cut back when resuming."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class MetricsFile:
    """Appends lines; ``size`` goes into the checkpoint so that no line is ever written twice."""

    def __init__(self, path: Path, size: int = 0):
        """Opens the file and cuts off what was written after a checkpoint.

        Args:
            path: the file, made if missing.
            size: bytes that the checkpoint knows of.
        """
        path.touch()
        if path.stat().st_size > size:
            os.truncate(path, size)
        self._file = path.open("ab")

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self._file.tell()

    def append(self, row: dict[str, Any]) -> None:
        """Writes one line and hands it to the operating system."""
        self._file.write(json.dumps(row).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a metrics file; a line cut off by a crash is left out."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
