"""What a source of data looks like to the training loop, whatever it comes from."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import digits
from .errors import InputError, nearest
from .streams import stream
from .table import READERS, read_table
from .toys import TOYS

SOURCES = (*TOYS, "digits")

TOY_EPOCH = 8192  # points that one "epoch" of a toy draws
TOY_VALIDATION = 2048
TOY_TEST = 10_000
# Dequantizations that the pixels' mean and covariance are averaged over: with one, the noise of the
# noise would cost the whitening and the Gaussian baseline a part of their accuracy.
DIGIT_DRAWS = 16


@dataclass(frozen=True)
class Dataset:
    """Rows to train on and rows to judge by, in the user's units, float64.

    Attributes:
        name: short name, fit for a folder's name and a picture's title.
        kind: "toy", "digits" or "table".
        columns: one name per feature.
        epoch: gives the training rows [N, D] of an epoch: always the same rows for a table, fresh
            dequantization noise for digits, fresh points for a toy.
        validation: rows [N_val, D] that choose the best checkpoint.
        test: rows [N_test, D] that nothing is chosen by.
        training_rows: N.
        path: the user's file, or None.
    """

    name: str
    kind: str
    columns: tuple[str, ...]
    epoch: Callable[[int], Tensor]
    validation: Tensor
    test: Tensor
    training_rows: int
    path: Path | None = None

    @property
    def features(self) -> int:
        return len(self.columns)

    def fitting_rows(self) -> Tensor:
        """The training rows that the scaling and the Gaussian baseline are fitted to."""
        if self.kind == "digits":
            return torch.cat([self.epoch(i) for i in range(DIGIT_DRAWS)])
        return self.epoch(0)

    def description(self) -> dict[str, Any]:
        """What a checkpoint says about its data, in plain values."""
        return {
            "name": self.name,
            "kind": self.kind,
            "columns": list(self.columns),
            "training_rows": self.training_rows,
            "path": None if self.path is None else str(self.path),
            "fingerprint": self.fingerprint(),
        }

    def fingerprint(self) -> str:
        """A hash by which a run notices that its data are no longer the same."""
        digest = hashlib.sha256()
        for rows in (self.epoch(0), self.validation, self.test):
            digest.update(repr(tuple(rows.shape)).encode())
            digest.update(rows.numpy().tobytes())
        return digest.hexdigest()


def load(
    source: str,
    *,
    seed: int = 0,
    validation: float = 0.1,
    test: float = 0.1,
    columns: Sequence[str] | None = None,
    drop: Sequence[str] | None = None,
) -> Dataset:
    """Loads a toy, the digits or a user's file, split into training, validation and test rows.

    Args:
        source: one of ``SOURCES`` or the path of a .csv, .npy or .pt file.
        seed: of the split, the toys' points and the dequantization noise.
        validation: part of the rows held out to choose the best checkpoint (not for toys).
        test: part of the rows held out to be judged by (not for toys).
        columns: columns of a file to keep, by name or 1-based number.
        drop: columns of a file to leave out.

    Raises:
        InputError: the source is unknown or what it holds cannot be trained on.
    """
    if source in SOURCES and (columns is not None or drop is not None):
        raise InputError(f"--columns and --drop are for files; {source} has fixed columns.")
    if source in TOYS:
        return _toy(source, seed)
    if source == "digits":
        return _digits(seed, validation, test)
    path = Path(source).expanduser()
    if not (path.suffix.lower() in READERS or path.exists()):
        folder = path.parent
        files = [str(folder / p.name) for p in folder.iterdir()] if folder.is_dir() else []
        known = [*SOURCES, *(name for name in files if name.endswith(READERS))]
        raise InputError(
            f"Unknown source '{source}'{nearest(source, known)}; give one of "
            f"{', '.join(SOURCES)}, or a .csv, .npy or .pt file."
        )
    return _table(path, seed, validation, test, columns, drop)


def _toy(name: str, seed: int) -> Dataset:
    def draw(n: int, purpose: str, index: int = 0) -> Tensor:
        return torch.from_numpy(TOYS[name](n, stream(seed, f"{name} {purpose}", index)))

    return Dataset(
        name=name,
        kind="toy",
        columns=("x", "y"),
        epoch=lambda index: draw(TOY_EPOCH, "training", index),
        validation=draw(TOY_VALIDATION, "validation"),
        test=draw(TOY_TEST, "test"),
        training_rows=TOY_EPOCH,
    )


def _digits(seed: int, validation: float, test: float) -> Dataset:
    levels = digits.load_levels()
    train, val, held = _split(len(levels), seed, validation, test, "digits")
    return Dataset(
        name="digits",
        kind="digits",
        columns=tuple(f"pixel {i // 8 + 1},{i % 8 + 1}" for i in range(levels.shape[1])),
        epoch=lambda index: digits.dequantize(levels[train], stream(seed, "pixel noise", index)),
        validation=digits.dequantize(levels[val], stream(seed, "validation pixel noise")),
        test=digits.dequantize(levels[held], stream(seed, "test pixel noise")),
        training_rows=len(train),
    )


def _table(
    path: Path,
    seed: int,
    validation: float,
    test: float,
    columns: Sequence[str] | None,
    drop: Sequence[str] | None,
) -> Dataset:
    table = read_table(path, columns, drop)
    train, val, held = _split(len(table.values), seed, validation, test, str(path))
    rows = torch.from_numpy(table.values)
    training = rows[train]
    return Dataset(
        name=path.stem,
        kind="table",
        columns=table.columns,
        epoch=lambda index: training,
        validation=rows[val],
        test=rows[held],
        training_rows=len(train),
        path=path.resolve(),
    )


def _split(
    n: int, seed: int, validation: float, test: float, name: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the row numbers of the three parts."""
    n_val, n_test = math.ceil(n * validation), math.ceil(n * test)
    if n - n_val - n_test < 2:
        raise InputError(
            f"{name} has {n} row{'s' * (n > 1)}, too few to split into training, validation and "
            "test rows."
        )
    order = stream(seed, "split").permutation(n)
    return order[n_val + n_test :], order[:n_val], order[n_val : n_val + n_test]
