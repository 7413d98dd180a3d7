"""The user's own numbers: a .csv, .npy or .pt file becomes a float64 table with named columns.

Everything that can be wrong with such a file is found here, before anything is written, and said in
one sentence that names the row and the column. Rows are counted from 1 without the header line.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .csvfile import read_csv
from .errors import InputError, nearest

READERS = (".csv", ".tsv", ".txt", ".npy", ".pt", ".pth")


@dataclass(frozen=True)
class Table:
    """Rows of numbers. ``values``: float64 [N, D]; ``columns``: D names."""

    values: np.ndarray
    columns: tuple[str, ...]


def read_table(
    path: Path,
    columns: Sequence[str] | None = None,
    drop: Sequence[str] | None = None,
    constant: bool = False,
) -> Table:
    """Reads a file of numbers.

    Args:
        path: a .csv (.tsv, .txt), .npy or .pt (.pth) file.
        columns: names or 1-based numbers of the columns to keep, in this order; None keeps all.
        drop: names or numbers of the columns to leave out.
        constant: whether a column may hold one value only (rows to judge: yes, to train on: no).

    Returns:
        The table, every value finite.

    Raises:
        InputError: the file is missing, unreadable, or holds something other than finite numbers.
    """
    _check_file(path)
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv", ".txt"):
        names, cells = read_csv(path)
        keep = _selection(path, names, columns, drop)
        values = cells(keep)
    else:
        array = _read_npy(path) if suffix == ".npy" else _read_pt(path)
        names = [f"column {i + 1}" for i in range(array.shape[1])]
        keep = _selection(path, names, columns, drop)
        values = array[:, keep]
    names = [names[i] for i in keep]
    _check_finite(path, values)
    for name, column in zip(names, values.T, strict=True):
        if not constant and column.min() == column.max():
            raise InputError(
                f"{path}: column '{name}' is constant ({column[0]:g} in all {len(column)} rows), "
                f"so it has no density; leave it out with --drop '{name}'."
            )
    return Table(np.ascontiguousarray(values), tuple(names))


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise InputError(f"{path} is a folder; give a {', '.join(READERS)} file.")
    if not path.exists():
        folder = path.parent
        beside = [p.name for p in folder.iterdir()] if folder.is_dir() else []
        close = difflib.get_close_matches(path.name, beside, n=1)
        hint = f" (did you mean {folder / close[0]}?)" if close else ""
        raise InputError(f"There is no file {path}{hint}.")
    if path.suffix.lower() not in READERS:
        raise InputError(
            f"{path}: pycnf reads {', '.join(READERS)} files; save the numbers as one of these."
        )
    try:
        with path.open("rb") as file:
            empty = not file.read(1)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    if empty:
        raise InputError(f"{path} is empty.")


def _read_npy(path: Path) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False)
    except Exception as error:  # np.load raises half a dozen types for damaged files
        if "Object arrays" in str(error):
            raise InputError(
                f"{path} holds Python objects; save a plain array of numbers with numpy.save."
            ) from error
        raise InputError(f"{path} is damaged or was not written by numpy.save.") from error
    if not isinstance(array, np.ndarray):
        raise InputError(f"{path} holds several arrays (npz); save the one you want as .npy.")
    return _as_float64(path, array)


def _read_pt(path: Path) -> np.ndarray:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about the kinds that are refused below
            tensor = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises as many types as there are ways to be damaged
        if "Unsupported global" in str(error):
            raise InputError(
                f"{path} holds Python objects, which pycnf does not unpickle for your safety; "
                "save the tensor alone: torch.save(tensor, path)."
            ) from error
        raise InputError(f"{path} is damaged or was not written by torch.save.") from error
    if isinstance(tensor, dict):
        names = ", ".join(repr(k) for k in list(tensor)[:5])
        raise InputError(
            f"{path} holds a dictionary (keys {names}); save one tensor alone: "
            "torch.save(tensor, path)."
        )
    if not isinstance(tensor, torch.Tensor):
        raise InputError(f"{path} holds a {type(tensor).__name__}; save one tensor of numbers.")
    if tensor.layout is not torch.strided or tensor.is_quantized:
        raise InputError(f"{path} holds a sparse or quantized tensor; save tensor.to_dense().")
    tensor = tensor.detach()
    if tensor.dtype in (torch.bfloat16, torch.float16):  # NumPy has no bfloat16
        tensor = tensor.float()
    try:
        array = tensor.resolve_conj().resolve_neg().numpy()
    except (TypeError, RuntimeError) as error:
        raise InputError(f"{path} holds {tensor.dtype}; save it as torch.float32.") from error
    return _as_float64(path, array)


def _as_float64(path: Path, array: np.ndarray) -> np.ndarray:
    """Checks shape and dtype of an array from a binary file."""
    if array.ndim == 1 and array.dtype.names is None:
        raise InputError(
            f"{path} holds a one-dimensional array of shape {array.shape}; rows and columns are "
            "wanted: save array.reshape(-1, 1) for one column."
        )
    if array.dtype.kind == "c":
        raise InputError(
            f"{path} holds complex numbers ({array.dtype}); save real and imaginary parts as "
            "columns of their own."
        )
    if array.dtype.kind not in "iuf":
        raise InputError(f"{path} holds {array.dtype} values; save an array of numbers.")
    if array.ndim != 2:
        raise InputError(
            f"{path} holds an array of shape {array.shape}; two dimensions are wanted, "
            "rows and columns."
        )
    if 0 in array.shape:
        raise InputError(f"{path} holds an array of shape {array.shape}: there are no numbers.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        values = array.astype(np.float64)
    if array.dtype.kind in "iu":
        # Beyond 2^53 neighbouring whole numbers fall together in double precision.
        rows, found = np.nonzero(np.abs(values) > 2.0**53)
        if len(rows):
            raise InputError(
                f"{path}: row {rows[0] + 1}, column {found[0] + 1} holds the whole number "
                f"{array[rows[0], found[0]]}, too large for double precision; rescale the column."
            )
    return values


def _selection(
    path: Path, names: list[str], columns: Sequence[str] | None, drop: Sequence[str] | None
) -> list[int]:
    """Returns the indices of the columns to keep."""

    def index(word: str) -> int:
        if word in names:
            return names.index(word)
        if word.isdecimal() and 1 <= int(word) <= len(names):
            return int(word) - 1
        have = "" if nearest(word, names) else f"; it has {_list(names)}"
        raise InputError(f"{path} has no column '{word}'{nearest(word, names)}{have}.")

    keep = list(range(len(names))) if columns is None else [index(word) for word in columns]
    if len(set(keep)) < len(keep):
        raise InputError("--columns names a column twice.")
    dropped = {index(word) for word in drop or ()}
    keep = [i for i in keep if i not in dropped]
    if not keep:
        raise InputError(f"{path}: no column is left to train on.")
    return keep


def _check_finite(path: Path, values: np.ndarray) -> None:
    bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if len(bad):
        rows = _list([str(i + 1) for i in bad])
        raise InputError(
            f"{path}: NaN or infinity in row{'s' * (len(bad) > 1)} {rows}; "
            "remove or fill in these rows."
        )


def _list(words: Sequence[str], most: int = 6) -> str:
    """Joins words as in a sentence, the first few of many."""
    if len(words) > most:
        return f"{', '.join(words[:most])} and {len(words) - most} more"
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
