"""Every choice of a training run, with defaults for each kind of source."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..data import Dataset, InputError, nearest
from ..nn import ACTIVATIONS, LAYERS

ADAPTIVE = ("dopri5", "dopri8", "tsit5", "bosh3", "fehlberg2", "adaptive_heun")
FIXED = ("euler", "midpoint", "heun2", "heun3", "rk4")
CHOICES: dict[str, tuple[str, ...]] = {
    "preprocess": ("standardize", "whiten"),
    "layer": tuple(LAYERS),
    "activation": tuple(ACTIVATIONS),
    "divergence": ("hutchinson", "exact"),
    "method": ADAPTIVE + FIXED,
    "gradient": ("discrete", "continuous", "seminorm", "autograd"),
    "dtype": ("float32", "float64"),
}

SMALLEST_BATCH = 32
EASY_TOYS = ("8gaussians", "moons", "circles")
# Numbers in the widest layer of a batch below which threads cost more than they bring: on two cores
# shared with other programs, a second thread made steps of small flows 3 to 20 times slower.
THREADED_WORK = 2**19
MOST_THREADS = 256


@dataclass(frozen=True)
class Config:
    """A run's choices; the command line's options bear the same names.

    Attributes:
        source: toy name, "digits" or path.
        seed: of weights, split, order, noise and probes.
        validation, test: parts of the rows held out (files and digits).
        columns, drop: columns of a file to keep and to leave out.
        preprocess: "standardize" (column by column) or "whiten" (full covariance).
        hidden, layer, activation: of ``pycnf.nn.MLP``.
        time: "t", or "fourier:F" for F Fourier features of t.
        divergence, probes: while training; validation and test use the exact divergence.
        method, step_size, rtol, atol, gradient: of ``pycnf.CNF`` while training; ``step_size`` is
            for the fixed-step methods.
        dtype: "float32" or "float64".
        batch: rows per step.
        lr: peak learning rate; warmed up over 50 steps, then decayed to zero along a cosine.
        weight_decay: decoupled (AdamW).
        clip: largest norm of the gradient.
        steps: optimizer steps.
        evaluate_every: steps between validations.
        patience: validations without improvement after which training stops; 0 never stops.
        threads: CPU threads; by default 1, from THREADED_WORK on as many as PyTorch takes.
    """

    source: str
    seed: int = 0
    validation: float = 0.1
    test: float = 0.1
    columns: tuple[str, ...] | None = None
    drop: tuple[str, ...] | None = None
    preprocess: str = "standardize"
    hidden: tuple[int, ...] = (64, 64, 64)
    layer: str = "concatsquash"
    activation: str = "tanh"
    time: str = "t"
    divergence: str = "hutchinson"
    probes: int = 1
    method: str = "dopri5"
    step_size: float = 0.1
    rtol: float = 1e-4
    atol: float = 1e-4
    gradient: str = "discrete"
    dtype: str = "float32"
    batch: int = 256
    lr: float = 5e-3
    weight_decay: float = 0.0
    clip: float = 10.0
    steps: int = 2000
    evaluate_every: int = 50
    patience: int = 20
    threads: int = 1

    def __post_init__(self) -> None:
        """Raises InputError for the first value that makes no sense."""
        for name, known in CHOICES.items():
            value = getattr(self, name)
            if value not in known:
                raise InputError(
                    f"Unknown {option(name)} '{value}'{nearest(value, known)}; "
                    f"choose from {', '.join(known)}."
                )
        positive = (
            *("probes", "step_size", "rtol", "atol", "batch", "lr", "clip", "steps"),
            *("evaluate_every", "threads"),
        )
        for name in positive:
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise InputError(f"{option(name)} must be greater than 0, and {value:g} is not.")
        for name in ("seed", "patience", "weight_decay"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise InputError(f"{option(name)} must be 0 or more, and {value:g} is not.")
        for name, most in (("seed", 2**63 - 1), ("threads", MOST_THREADS)):
            value = getattr(self, name)
            if value > most:
                raise InputError(f"{option(name)} must be at most {most}, and {value} is not.")
        for name in ("validation", "test"):
            value = getattr(self, name)
            if not 0 < value < 0.5:
                raise InputError(
                    f"{option(name)} is a part of the rows between 0 and 0.5, and {value:g} is not."
                )
        if not self.hidden or min(self.hidden) < 1:
            raise InputError(
                "--hidden wants the widths of the hidden layers, whole numbers above 0, "
                "for instance --hidden 64,64,64."
            )
        self.time_features()

    def time_features(self) -> str | tuple[str, int]:
        """Returns ``time`` as ``pycnf.nn.MLP`` takes it."""
        if self.time == "t":
            return "t"
        kind, _, number = self.time.partition(":")
        if kind != "fourier" or not number.isdecimal() or int(number) < 2 or int(number) % 2:
            raise InputError(
                "--time is 't' or 'fourier:F' with an even number F of features, for instance "
                f"fourier:6; '{self.time}' is neither."
            )
        return "fourier", int(number)

    def solver_options(self) -> dict[str, float] | None:
        """Returns ``options`` as ``pycnf.CNF`` takes it."""
        return {"step_size": self.step_size} if self.method in FIXED else None

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values only, fit for JSON."""
        plain = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Config:
        """Undoes ``to_dict``.

        Raises:
            InputError: another version of pycnf made the values.
        """
        unknown = set(values) - {field.name for field in dataclasses.fields(Config)}
        if unknown:
            raise InputError(
                f"The run's configuration has {', '.join(sorted(unknown))}, which this pycnf does "
                "not know; use the pycnf that wrote it."
            )
        return Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def option(name: str) -> str:
    """The command line's spelling of a field of ``Config``."""
    return "--" + name.replace("_", "-")


def choose(data: Dataset, given: Mapping[str, Any]) -> Config:
    """Completes the user's choices with defaults that suit the data.

    Args:
        data: the loaded source.
        given: fields of ``Config`` that the user chose; ``epochs`` may stand for ``steps``.

    Raises:
        InputError: a value makes no sense, or a batch is larger than the training rows.
    """
    given = dict(given)
    epochs = given.pop("epochs", None)
    if "probes" in given and given.setdefault("divergence", "hutchinson") == "exact":
        raise InputError("--probes is for --divergence hutchinson; the exact one has none.")
    values = {**_defaults(data), **given}
    batch = values["batch"]
    if batch > data.training_rows:
        least = "the smallest batch" if "batch" not in given else "a batch"
        raise InputError(
            f"{given['source']} leaves {data.training_rows} training rows, fewer than {least} of "
            f"{batch}; give more rows or a smaller --batch."
        )
    if epochs is not None:
        if "steps" in given:
            raise InputError("Give --steps or --epochs, not both.")
        if not (epochs > 0 and math.isfinite(epochs)):
            raise InputError(f"--epochs must be greater than 0, and {epochs:g} is not.")
        values["steps"] = max(1, round(epochs * (data.training_rows // max(1, batch))))
    if batch * max(values.get("hidden", Config.hidden), default=0) >= THREADED_WORK:
        values.setdefault("threads", torch.get_num_threads())
    values.setdefault("evaluate_every", max(1, min(100, values["steps"] // 40)))
    return Config(**values)


def _defaults(data: Dataset) -> dict[str, Any]:
    """What serves each kind of source well within a few minutes on two cores (measured).

    Training solves to 1e-3: the discrete gradient is exact at any tolerance, and flows trained at
    1e-4 were no better when judged at 1e-5. Two hidden layers have an exact divergence in closed
    form, at the cost of one Hutchinson probe in any number of columns.
    """
    common = {"divergence": "exact", "rtol": 1e-3, "atol": 1e-3}
    if data.kind == "toy":
        steps = 1200 if data.name in EASY_TOYS else 2500
        return {**common, "batch": 256, "lr": 1e-2, "steps": steps}
    if data.kind == "digits":
        return {
            **common,
            "preprocess": "whiten",
            "hidden": (128, 128),
            "activation": "softplus",
            "batch": 128,
            "lr": 1e-2,
            "weight_decay": 0.6,
            "steps": 3000,
            "evaluate_every": 100,
            "patience": 10,
        }
    # A quarter of the rows, so that an epoch has some steps; a power of two for no deeper reason.
    quarter = 2 ** max(0, (data.training_rows // 4).bit_length() - 1)
    return {
        **common,
        "hidden": (64, 64) if data.features <= 16 else (128, 128),
        "batch": min(512, max(SMALLEST_BATCH, quarter)),
        "lr": 5e-3,
        # The fewer rows, the sooner a flow learns them by heart.
        "weight_decay": min(2.0, 100 / data.training_rows),
        "steps": 2500,
    }
