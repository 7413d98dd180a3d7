"""Writing rows of numbers for other programs to read."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..data import InputError
from .files import write_atomically

TABLES = (".csv", ".npy", ".pt")


def check_new(path: Path, suffixes: Sequence[str]) -> None:
    """Raises InputError unless a new file of a known kind can be made at ``path``."""
    if path.suffix.lower() not in suffixes:
        raise InputError(f"{path}: give --out a name that ends in {', '.join(suffixes)}.")
    if path.exists():
        raise InputError(f"{path} exists already; give --out another name.")
    if not path.parent.is_dir():
        raise InputError(f"There is no folder {path.parent} to write {path.name} into.")


def write_rows(path: Path, columns: Sequence[str], rows: Tensor, whole: bool = False) -> None:
    """Writes rows [N, D] as .csv (with a header), .npy or .pt; ``whole`` numbers as int64.

    Raises:
        InputError: the file cannot be written.
    """
    rows = rows.long() if whole else rows
    try:
        if path.suffix.lower() == ".csv":
            write_atomically(path, lambda file: file.write(_csv(columns, rows)))
        elif path.suffix.lower() == ".npy":
            write_atomically(path, lambda file: np.save(file, rows.numpy()))
        else:
            write_atomically(path, lambda file: torch.save(rows, file))
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}).") from error


def _csv(columns: Sequence[str], rows: Tensor) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    # repr's 17 digits would only suggest an accuracy that a solve to 1e-5 does not have.
    number = "{:d}" if rows.dtype is torch.int64 else "{:.9g}"
    writer.writerows([number.format(value) for value in row] for row in rows.tolist())
    return text.getvalue().encode()
