"""The folder of one run: what is in it, and how it comes to be."""

from __future__ import annotations

import contextlib
import itertools
import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from ..data import InputError

RUNS = Path("runs")


@dataclass(frozen=True)
class RunFolder:
    """Names of the files of a run.

    Attributes:
        path: the folder, as the user would type it.
    """

    path: Path

    @property
    def config(self) -> Path:
        """The run's choices, for people; checkpoints hold their own copy."""
        return self.path / "config.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def last(self) -> Path:
        """The checkpoint to resume from."""
        return self.path / "last.pt"

    @property
    def best(self) -> Path:
        """The checkpoint with the lowest validation NLL."""
        return self.path / "best.pt"

    def checkpoint(self, which: str) -> Path:
        """Returns the path of the "best" or the "last" checkpoint."""
        return {"best": self.best, "last": self.last}[which]

    @property
    def evaluation(self) -> Path:
        """Likelihoods of the best checkpoint."""
        return self.path / "evaluation.json"

    @property
    def pictures(self) -> Path:
        """Folder of the pictures."""
        return self.path / "pictures"

    def free_name(self, stem: str, suffix: str) -> Path:
        """Returns stem.suffix, or stem-2.suffix, ...: the first that is not taken."""
        path, number = self.path / f"{stem}{suffix}", 1
        while path.exists():
            number += 1
            path = self.path / f"{stem}-{number}{suffix}"
        return path


def check(out: Path | None) -> None:
    """Finds out whether a run's folder can be made, and makes nothing.

    Args:
        out: as for ``create``.

    Raises:
        InputError: it holds something already, or cannot be written to.
    """
    if out is not None and str(out) == ".":
        raise InputError("--out wants the name of a new folder.")
    place = (RUNS if out is None else out).absolute()
    if out is not None and place.exists():
        if not place.is_dir():
            raise InputError(f"{out} is a file; give --out a folder.")
        folder = RunFolder(out)
        if folder.last.exists() or folder.config.exists():
            raise InputError(
                f"{out} holds a run already; continue it with --resume {shlex.quote(str(out))}, or "
                "give another --out."
            )
        if any(out.iterdir()):
            raise InputError(f"{out} is not empty; give --out a new folder.")
    while not place.exists():
        place = place.parent
    if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
        raise InputError(f"{place} is no folder that can be written to; give another --out.")


def create(out: Path | None, name: str) -> RunFolder:
    """Makes the folder of a new run.

    Args:
        out: where the user wants it; None takes runs/NAME-1, or the next free number.
        name: the source's short name.

    Raises:
        InputError: it holds something already, or cannot be written to.
    """
    check(out)
    try:
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            return RunFolder(out)
        RUNS.mkdir(exist_ok=True)
        for number in itertools.count(1):
            # mkdir decides who gets a number, so two runs started together do not collide.
            with contextlib.suppress(FileExistsError):
                (RUNS / f"{name}-{number}").mkdir()
                return RunFolder(RUNS / f"{name}-{number}")
    except OSError as error:
        raise InputError(
            f"The run's folder cannot be made ({error.strerror}); give another --out."
        ) from error
    raise AssertionError("numbers do not end")
