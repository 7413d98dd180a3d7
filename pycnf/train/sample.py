"""Using a trained flow from the command line: drawing rows, and judging the user's rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ..data import InputError, Table, quantize, read_table
from . import checkpoint, export, pictures
from .evaluate import evaluate
from .folder import RunFolder
from .model import restored
from .run import reload


def sample(path: Path, number: int, out: Path | None, seed: int, which: str) -> Path:
    """Writes samples to a file that does not exist yet; returns its path.

    Args:
        path: the run folder.
        number: how many samples.
        out: .csv, .npy, .pt, or .png for a picture beside the data; None for a free name in the
            run folder.
        seed: of the samples.
        which: "best" or "last" checkpoint.

    Raises:
        InputError: an argument makes no sense, or a file cannot be read or written.
    """
    if number < 1:
        raise InputError(f"--number must be at least 1, and {number} is not.")
    if seed < 0:
        raise InputError(f"--seed must be 0 or more, and {seed} is not.")
    folder = RunFolder(path)
    content = checkpoint.load(folder.checkpoint(which))
    out = folder.free_name("samples", ".csv") if out is None else out
    export.check_new(out, (*export.TABLES, ".png"))
    picture = out.suffix.lower() == ".png"
    if picture and not pictures.available():
        raise InputError("Pictures need matplotlib: pip install matplotlib.")
    data = reload(content) if picture else None
    model = restored(content)
    rows = model.sample(number, seed)
    if data is not None:
        pictures.save(pictures.sample_figure(model, data, rows), out)
        return out
    pixels = content["data"]["kind"] == "digits"
    rows = quantize(rows) if pixels else rows
    export.write_rows(out, content["data"]["columns"], rows, whole=pixels)
    return out


def score(path: Path, file: Path, out: Path | None, which: str) -> str:
    """Judges the rows of a file; returns a text for people.

    Args:
        path: the run folder.
        file: .csv, .npy or .pt with the columns that the flow was trained on.
        out: where to write log p(x) of each row, or None.
        which: "best" or "last" checkpoint.

    Raises:
        InputError: the rows do not fit the flow, or a file cannot be read or written.
    """
    content = checkpoint.load(RunFolder(path).checkpoint(which))
    about = content["data"]
    if about["kind"] == "digits":
        raise InputError("--data is for tables; a flow of digits is judged by its test images.")
    if out is not None:
        export.check_new(out, export.TABLES)
    rows = torch.from_numpy(_matching(file, about["columns"]).values)
    result = evaluate(restored(content), rows, about["training_rows"], pixels=False)
    if out is not None:
        export.write_rows(out, ["log_prob"], result.log_prob[:, None])
    written = "" if out is None else f"\nlog p(x) of each row: {out}"
    return f"Log-likelihood of {file}, {result.rows} rows:\n{result.text()}{written}"


def _matching(file: Path, columns: Sequence[str]) -> Table:
    """Reads the columns of these names; where one side has no names, all columns as they stand."""
    try:
        return read_table(file, columns, constant=True)
    except InputError as by_name:
        try:
            table = read_table(file, constant=True)
        except InputError:
            raise by_name from None
        numbered = tuple(f"column {i + 1}" for i in range(len(columns)))
        nameless = numbered in (table.columns, tuple(columns)) or columns == ["x", "y"]
        if len(table.columns) != len(columns) or not nameless:
            raise
        return table
