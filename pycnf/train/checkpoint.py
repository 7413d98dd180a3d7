"""Checkpoints: tensors and plain containers only, so that loading one never runs code.

Layout (a dictionary written by ``torch.save``):

    format      FORMAT                        version     VERSION
    config      Config.to_dict()              data        Dataset.description()
    preprocess, baseline, flow                state_dicts of Preprocess, GaussianBaseline and CNF
    step        optimizer steps taken         validation  validation NLL in nats, or None
    training    the loop's state (last.pt only): optimizer, counters, running means
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..data import InputError
from .files import write_atomically

FORMAT = "pycnf checkpoint"
VERSION = 1
PARTS = ("config", "data", "preprocess", "baseline", "flow", "step")


def save(path: Path, content: dict[str, Any]) -> None:
    """Writes a checkpoint whole or not at all."""
    content = {"format": FORMAT, "version": VERSION, **content}
    write_atomically(path, lambda file: torch.save(content, file))


def load(path: Path) -> dict[str, Any]:
    """Reads a checkpoint.

    Raises:
        InputError: there is none, it is damaged, or another version of pycnf wrote it.
    """
    if path.parent.is_file():
        raise InputError(f"{path.parent} is a file; give the folder of a run, like runs/moons-1.")
    if not path.is_file():
        raise InputError(
            f"There is no checkpoint {path}; give the folder of a run, like runs/moons-1."
        )
    try:
        path.open("rb").close()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises as many types as there are ways to be damaged
        raise InputError(f"{path} is damaged, or is no checkpoint of pycnf.") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{path} is no checkpoint of pycnf.")
    version = content.get("version")
    if version != VERSION:
        raise InputError(
            f"{path} has checkpoint version {version} and this pycnf reads version {VERSION}; "
            "use the pycnf that wrote it, or train again."
        )
    missing = [part for part in PARTS if part not in content]
    if missing:
        raise InputError(f"{path} is damaged: it has no {', '.join(missing)}.")
    return content
