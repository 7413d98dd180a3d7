"""Numbers from comma-separated text: delimiter and header are found, bad cells are named."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from .errors import InputError

# Tried in this order: a comma inside a semicolon file is a decimal comma.
DELIMITERS = ("\t", ";", "|", ",", " ")
MISSING = frozenset({"", "na", "n/a", "nan", "null", "none", "?", "-"})


def read_csv(path: Path) -> tuple[list[str], Callable[[Sequence[int]], np.ndarray]]:
    """Reads a text file of numbers.

    Returns:
        The column names, and a function that turns chosen columns (indices) into float64 [N, D].
        The cells of other columns may hold anything.

    Raises:
        InputError: not text, no rows, or rows of different lengths; the function raises it for a
            cell that is no number.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text; save it as CSV with UTF-8 encoding."
        ) from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    if "\0" in text:
        raise InputError(f"{path} holds binary data, not text; save it as CSV.")
    text = _without_comments(text)
    sample = [line for line in text.splitlines()[:40] if line.strip()]
    if not sample:
        raise InputError(f"{path} is empty.")
    delimiter = _delimiter(sample)
    rows, lines = [], []
    try:
        for line, row in _split(text, delimiter):
            if any(cell.strip() for cell in row):
                rows.append(row)
                lines.append(line)
    except csv.Error as error:
        raise InputError(f"{path} cannot be read as CSV: {error}.") from error

    names = [f"column {i + 1}" for i in range(len(rows[0]))]
    if any(not _is_number(cell) and cell.strip().lower() not in MISSING for cell in rows[0]):
        names = _unique([cell.strip() or name for cell, name in zip(rows[0], names, strict=True)])
        rows, lines = rows[1:], lines[1:]
        if not rows:
            raise InputError(f"{path} holds a header and no rows.")
    for i, row in enumerate(rows):
        if len(row) != len(names):
            raise InputError(
                f"{path}: row {i + 1} (line {lines[i]}) has {len(row)} cells and there are "
                f"{len(names)} columns."
            )

    def numbers(keep: Sequence[int]) -> np.ndarray:
        try:
            return np.array([[float(row[j]) for j in keep] for row in rows], dtype=np.float64)
        except ValueError:
            raise _bad_cell(path, rows, lines, names, keep) from None

    return names, numbers


def _without_comments(text: str) -> str:
    """Drops comment lines at the top, but keeps a header that is one (as numpy.savetxt writes)."""
    while text.startswith("#"):
        first, _, rest = text.partition("\n")
        second = rest.partition("\n")[0]
        alike = [d for d in DELIMITERS if 0 < first.count(d) == second.count(d)]
        if not second.startswith("#") and (alike or not any(d in second for d in DELIMITERS[:-1])):
            return text.removeprefix("#").lstrip(" ")
        text = rest
    return text


def _bad_cell(
    path: Path,
    rows: list[list[str]],
    lines: list[int],
    names: list[str],
    keep: Sequence[int],
) -> InputError:
    for i, row in enumerate(rows):
        for j in keep:
            if _is_number(row[j]):
                continue
            cell, where = (
                row[j].strip(),
                f"{path}: row {i + 1} (line {lines[i]}), column '{names[j]}'",
            )
            if cell.lower() in MISSING:
                what = f"holds '{cell}'" if cell else "is empty"
                return InputError(
                    f"{where} {what}; fill in or remove the row, or leave the column out with "
                    f"--drop '{names[j]}'."
                )
            if _is_number(cell.replace(",", ".", 1)):
                return InputError(f"{where} holds '{cell}'; write decimals with a point.")
            shown = cell if len(cell) <= 40 else cell[:37] + "..."
            return InputError(
                f"{where} holds the text '{shown}', not a number; leave the column out with "
                f"--drop '{names[j]}'."
            )
    raise AssertionError("every cell is a number")


def _delimiter(sample: list[str]) -> str:
    """The delimiter that splits every line alike, or else turns most cells into numbers."""
    best, best_score = ",", (-1.0, -1.0)
    for delimiter in DELIMITERS:
        try:
            rows = [row for _, row in _split("\n".join(sample), delimiter)]
        except csv.Error:
            continue
        widths = [len(row) for row in rows]
        if max(widths) < 2:
            continue
        # These three appear in numbers and names so seldom that one per line settles it.
        if delimiter in "\t;|" and min(widths) == max(widths):
            return delimiter
        cells = [cell for row in rows[1:] or rows for cell in row]
        score = (sum(map(_is_number, cells)) / len(cells), statistics.median(widths))
        if score > best_score:
            best, best_score = delimiter, score
    return best


def _split(text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yields (line number, cells)."""
    if delimiter == " ":  # any run of blanks
        for number, line in enumerate(text.splitlines(), 1):
            yield number, line.split()
        return
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    for row in reader:
        yield reader.line_num, row


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _unique(names: list[str]) -> list[str]:
    """Tells columns of the same name apart: a, a -> a, a.2."""
    seen: dict[str, int] = {}
    result = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        result.append(name if seen[name] == 1 else f"{name}.{seen[name]}")
    return result
