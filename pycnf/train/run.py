"""A run from its command to its pictures: start or resume, train, judge, draw."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..data import Dataset, InputError, bits_per_dim, load
from . import checkpoint, pictures
from .config import Config, choose
from .evaluate import evaluate
from .files import write_json
from .folder import RunFolder, check, create
from .interrupt import StopRequest
from .loop import Diverged, Trainer
from .model import Model, fitted, restored
from .progress import Progress

SPLIT = ("seed", "validation", "test", "columns", "drop")  # what decides which rows are which
CHANGEABLE = ("steps", "patience")  # what --resume may change
NO_PICTURES = (
    "matplotlib is not installed, so no pictures are drawn (pip install matplotlib, then "
    "python -m pycnf evaluate draws them)."
)


def warn(text: str) -> None:
    """Says something on stderr that does not stop the program."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def start(given: Mapping[str, Any], out: Path | None, quiet: bool) -> int:
    """Trains a new flow. Everything is checked before the run's folder is made.

    Args:
        given: the fields of ``Config`` that the user chose, ``source`` among them.
        out: the run's folder, or None for the next free runs/SOURCE-N.
        quiet: print nothing but warnings and errors.

    Returns:
        The exit code: 0, 1 for a run that diverged, 130 after Ctrl-C, 143 after SIGTERM.

    Raises:
        InputError: something given cannot be used.
    """
    check(out)
    # Checks all values before any file is read; the defaults that depend on the data come after.
    first = Config(**{k: v for k, v in given.items() if k != "epochs"})
    data = load(first.source, **{k: getattr(first, k) for k in SPLIT})
    config = choose(data, given)
    torch.set_num_threads(config.threads)
    model = fitted(config, data)
    folder = create(out, data.name)
    for remark in remarks(data):
        warn(remark)
    trainer = _trainer(config, data, model, folder, quiet)
    # A checkpoint from the first moment on: a run interrupted before its first validation resumes.
    trainer.save()
    write_json(folder.config, config.to_dict())
    trainer.progress.say(_introduction(config, data, model, folder))
    return _finish(trainer)


def resume(path: Path, given: Mapping[str, Any], quiet: bool) -> int:
    """Continues a run to the very result that it would have had uninterrupted.

    Args:
        path: the run's folder.
        given: new values for ``CHANGEABLE`` fields; more steps than before train a finished run on.
        quiet: as for ``start``.

    Returns:
        The exit code, as for ``start``.

    Raises:
        InputError: there is nothing to resume, or an option is given that a run keeps for life.
    """
    folder = RunFolder(path)
    content = checkpoint.load(folder.last)
    fixed = [name for name in given if name not in CHANGEABLE]
    if fixed:
        raise InputError(
            f"--{fixed[0].replace('_', '-')} cannot change on --resume; a run keeps its choices, "
            "except --steps and --patience."
        )
    config = Config.from_dict({**content["config"], **given})
    at_step = content["step"]
    if config.steps < at_step:
        raise InputError(f"{path} has taken {at_step} steps already; give --steps a larger number.")
    data = reload(content)
    torch.set_num_threads(config.threads)
    trainer = _trainer(config, data, restored(content), folder, quiet)
    trainer.load_state(content)
    if _trains_on(trainer, given):
        trainer.at.ended = None
        if "patience" in given:
            trainer.at.stale = 0
    write_json(folder.config, config.to_dict())
    trainer.progress.say(
        f"Resuming {path} at step {at_step} of {config.steps}."
        if trainer.at.ended is None
        else f"{path} was trained to its end (step {at_step}); --steps N would train it on."
    )
    return _finish(trainer)


def reload(content: Mapping[str, Any]) -> Dataset:
    """Loads the data of a checkpoint again.

    Raises:
        InputError: they are gone, or no longer the same.
    """
    config, was = Config.from_dict(content["config"]), content["data"]
    source = config.source if was["path"] is None else was["path"]
    data = load(source, **{k: getattr(config, k) for k in SPLIT})
    if data.fingerprint() != was["fingerprint"]:
        raise InputError(
            f"{source} no longer gives the rows that this run was trained on; restore the file, "
            "or train a new run."
            if was["path"]
            else f"{source} gives other rows here than when this run began (another version of "
            "NumPy or scikit-learn); train a new run."
        )
    return data


def remarks(data: Dataset) -> list[str]:
    """What a user should know about their table before training on it."""
    if data.kind != "table":
        return []
    rows = data.epoch(0)
    found = []
    few = [
        name
        for name, column in zip(data.columns, rows.T)
        if len(column.unique()) <= max(2, min(20, len(rows) // 10))
    ]
    if few:
        found.append(
            f"column{'s' * (len(few) > 1)} {', '.join(repr(n) for n in few[:5])}"
            f"{' and more' * (len(few) > 5)} take{'s' * (len(few) == 1)} only a few values; a "
            "density can grow there without bound, so consider --drop."
        )
    if data.features > 1:
        correlation = torch.corrcoef(rows.T).abs().fill_diagonal_(0)
        if correlation.max() > 1 - 1e-9:
            i, j = divmod(int(correlation.argmax()), data.features)
            found.append(
                f"columns '{data.columns[i]}' and '{data.columns[j]}' are copies of each other up "
                "to scale; consider --drop for one of them."
            )
    return found


def _trainer(
    config: Config, data: Dataset, model: Model, folder: RunFolder, quiet: bool
) -> Trainer:
    def bits(nll: float) -> float:
        return bits_per_dim(torch.tensor(-nll, dtype=torch.float64), data.features).item()

    progress = Progress(config.steps, quiet)
    shown = {"shown": bits} if data.kind == "digits" else {}
    return Trainer(config, data, model, folder, progress, warn, **shown)


def _trains_on(trainer: Trainer, given: Mapping[str, Any]) -> bool:
    """Whether a run that has ended is to go on."""
    ended, at = trainer.at.ended, trainer.at
    if ended == "steps":
        return trainer.config.steps > at.step
    if ended == "patience":
        return bool(given) and at.step < trainer.config.steps
    return False


def _introduction(config: Config, data: Dataset, model: Model, folder: RunFolder) -> str:
    parameters = sum(p.numel() for p in model.flow.parameters())
    hidden = "-".join(map(str, config.hidden))
    unit = "bits/dim" if data.kind == "digits" else "nats a row"
    rows = (
        f"{data.training_rows} training rows" if data.kind != "toy" else "fresh points every epoch"
    )
    return (
        f"{data.name}: {data.features} columns, {rows}, {len(data.validation)} validation and "
        f"{len(data.test)} test rows\n"
        f"flow: {config.layer} {hidden} {config.activation}, {parameters:,} parameters, "
        f"{config.divergence} divergence, {config.method} at {config.rtol:g}\n"
        f"into {folder.path}; loss and validation in {unit}; Ctrl-C saves"
    )


def _finish(trainer: Trainer) -> int:
    """Trains to the end, then judges and draws."""
    folder, progress = trainer.folder, trainer.progress
    code = 0
    with StopRequest() as stop:
        try:
            trainer.run(stop)
        except Diverged as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            code = 1
        except KeyboardInterrupt:  # asked twice: what was saved last stands
            pass
    if stop.signal is not None:
        print(
            f"Stopped; saved at step {checkpoint.load(folder.last)['step']} of "
            f"{trainer.config.steps}. To continue:\n"
            f"  python -m pycnf train --resume {shlex.quote(str(folder.path))}",
            file=sys.stderr,
        )
        return 128 + stop.signal
    if trainer.at.ended == "patience":
        progress.say(f"Stopped early: no better validation since step {trainer.at.best_step}.")
    if folder.best.exists():
        try:
            show(folder, progress.say)
        except KeyboardInterrupt:
            print(
                "Interrupted; the training is done and saved. To judge it and draw the pictures:\n"
                f"  python -m pycnf evaluate {shlex.quote(str(folder.path))}",
                file=sys.stderr,
            )
            return 130
        progress.say(f"Samples:\n  python -m pycnf sample {shlex.quote(str(folder.path))}")
    return code


def show(folder: RunFolder, say: Callable[[str], None], which: str = "best") -> None:
    """Judges a checkpoint by the test rows, draws the pictures and writes both into the folder.

    Args:
        folder: of the run.
        say: told the result, for people.
        which: "best" or "last".

    Raises:
        InputError: the checkpoint or its data are gone or damaged.
    """
    content = checkpoint.load(folder.checkpoint(which))
    data, model = reload(content), restored(content)
    result = evaluate(model, data.test, data.training_rows, data.kind == "digits")
    about = {"checkpoint": which, "step": content["step"], "split": "test"}
    write_json(folder.evaluation, {**about, **result.to_dict()})
    say(
        f"\nTest log-likelihood of {folder.checkpoint(which)} (step {content['step']}), "
        f"{result.rows} rows:\n{result.text()}\n"
    )
    if not pictures.available():
        warn(NO_PICTURES)
        return
    say("Pictures:")
    for path in pictures.draw_all(model, data, folder, warn):
        say(f"  {path}")


def load_model(path: str | Path, which: str = "best") -> Model:
    """Returns the trained model of a run folder, for use in Python.

    Args:
        path: the folder.
        which: "best" or "last" checkpoint.

    Raises:
        InputError: there is no such checkpoint, or it cannot be read.

    Example:
        >>> model = load_model("runs/8gaussians-1")
        >>> model.log_prob(model.sample(5, seed=0)).shape
        torch.Size([5])
    """
    return restored(checkpoint.load(RunFolder(Path(path)).checkpoint(which)))
