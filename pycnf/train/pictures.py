"""The pictures of a run: data beside samples beside density, digit grids, pair panels, curves.

Matplotlib is optional: ``available()`` says whether pictures can be drawn. Figures are made without
pyplot, so nothing here touches the global state of a program that uses matplotlib itself.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..data import LEVELS, SHAPE, Dataset, bits_per_dim, quantize
from ..flows import SolveError
from . import metrics
from .files import write_atomically
from .folder import RunFolder
from .model import Model, gist

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT, LINE = "#22303c", "#8a97a3", "#e1e6eb"
DATA, MODEL = "#2a6f97", "#d1495b"
DENSITY = "magma"
SHOWN = 5000  # points of a scatter plot
GRID = 240  # density pixels along a side
FRAMES = 6
PANEL_COLUMNS = 5
SAMPLE_SEED = 20_240_917  # any fixed number, so that pictures of two checkpoints compare


def available() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw_all(
    model: Model, data: Dataset, folder: RunFolder, warn: Callable[[str], None]
) -> list[Path]:
    """Draws every picture that suits the data; returns their paths, the most telling first.

    A flow that trained badly may have no solution far from its data; ``warn`` is then told of the
    picture that is missing.
    """
    folder.pictures.mkdir(exist_ok=True)
    n = 100 if data.kind == "digits" else SHOWN
    plane = data.features == 2
    figures: dict[str, Callable[[], Figure]] = {
        "density" if plane else "samples": lambda: sample_figure(
            model, data, model.sample(n, SAMPLE_SEED)
        )
    }
    if plane:
        figures["flow"] = lambda: flow_panels(model, data)
    rows = metrics.read(folder.metrics)
    if rows:
        figures["curves"] = lambda: curves(rows, data)
    paths = []
    for name, draw in figures.items():
        path = folder.pictures / f"{name}.png"
        try:
            save(draw(), path)
        except SolveError as error:
            warn(f"{path} is not drawn: {gist(error)}.")
        else:
            paths.append(path)
    return paths


def sample_figure(model: Model, data: Dataset, drawn: Tensor) -> Figure:
    """Samples [N, D] beside data, as suits the data: digits, a plane, or pairs of columns."""
    if data.kind == "digits":
        return digit_grids(quantize(data.test), quantize(drawn))
    real = torch.cat([data.test, data.validation, data.epoch(0)])[:SHOWN]
    if data.features == 1:
        return line_panel(model, data, real, drawn)
    if data.features == 2:
        return density_panels(model, data, real, drawn[:SHOWN])
    return pair_panel(data.columns, real, drawn, data.name)


def save(figure: Figure, path: Path) -> None:
    """Writes a figure as PNG, whole or not at all."""
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=150))


# ---- two-dimensional densities -----------------------------------------------------------------


def density_panels(model: Model, data: Dataset, real: Tensor, drawn: Tensor) -> Figure:
    """Data, samples and log-density side by side, on the same axes."""
    figure = _figure(12.6, 4.6)
    (x0, x1), (y0, y1) = _window(real, square=data.kind == "toy")
    axes = figure.subplots(1, 3, sharex=True, sharey=True)
    for ax, points, colour, title in (
        (axes[0], real, DATA, "data"),
        (axes[1], drawn, MODEL, "samples of the flow"),
    ):
        ax.scatter(*points.T.numpy(), s=2.2, c=colour, alpha=0.45, linewidths=0, rasterized=True)
        _title(ax, title)
    xs = torch.linspace(x0, x1, GRID, dtype=torch.float64)
    ys = torch.linspace(y0, y1, GRID, dtype=torch.float64)
    grid = torch.cartesian_prod(xs, ys)
    log_prob = model.log_prob(grid).reshape(GRID, GRID).T.numpy()
    image = axes[2].imshow(
        log_prob,
        origin="lower",
        extent=(x0, x1, y0, y1),
        aspect="auto",
        cmap=DENSITY,
        vmin=log_prob.max() - 9,
        interpolation="bilinear",
    )
    _title(axes[2], "log-density, nats")
    bar = figure.colorbar(image, ax=axes[2], fraction=0.046, pad=0.03, extend="min")
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=FAINT, labelsize=8, length=0)
    for ax in axes:
        ax.set(xlim=(x0, x1), ylim=(y0, y1), box_aspect=1)
        ax.set_xlabel(data.columns[0], color=INK)
    axes[0].set_ylabel(data.columns[1], color=INK)
    figure.suptitle(data.name, color=INK, fontsize=15, fontweight="bold")
    return figure


def flow_panels(model: Model, data: Dataset) -> Figure:
    """How the base density becomes the data: the same points at several times of the flow."""
    frames = model.frames(60_000, FRAMES, SAMPLE_SEED)
    figure = _figure(2.3 * FRAMES, 2.75)
    axes = figure.subplots(1, FRAMES)
    side = 3.2  # of both the base N(0, I) and the standardized data nearly everything is within
    for i, (ax, points) in enumerate(zip(axes, frames)):
        counts = torch.histogramdd(
            points.cpu(), bins=[110, 110], range=[-side, side, -side, side]
        ).hist
        ax.imshow(counts.T.sqrt().numpy(), origin="lower", cmap=DENSITY, interpolation="bicubic")
        ax.set(xticks=[], yticks=[])
        _title(ax, f"t = {i / (FRAMES - 1):g}")
    figure.suptitle(f"from noise to {data.name}", color=INK, fontsize=13, fontweight="bold")
    return figure


def line_panel(model: Model, data: Dataset, real: Tensor, drawn: Tensor) -> Figure:
    """One column: histograms of data and samples under the flow's density."""
    figure = _figure(7.0, 4.2)
    ax = figure.subplots()
    limits = _limits(real[:, 0])
    for points, colour, label in ((real, DATA, "data"), (drawn, MODEL, "samples of the flow")):
        ax.hist(
            points[:, 0].numpy(),
            bins=48,
            range=limits,
            density=True,
            color=colour,
            alpha=0.35,
            label=label,
        )
    x = torch.linspace(*limits, 4 * GRID, dtype=torch.float64)
    ax.plot(
        x.numpy(),
        model.log_prob(x[:, None]).exp().numpy(),
        color=INK,
        lw=1.8,
        label="density of the flow",
    )
    ax.set_xlabel(data.columns[0], color=INK)
    ax.set(xlim=limits, yticks=[])
    ax.legend(frameon=False, labelcolor=INK)
    _title(ax, "")
    figure.suptitle(data.name, color=INK, fontsize=15, fontweight="bold")
    return figure


# ---- tables ------------------------------------------------------------------------------------


def pair_panel(columns: Sequence[str], real: Tensor, drawn: Tensor, name: str) -> Figure:
    """Marginals on the diagonal, pairs of columns below (data) and above it (samples)."""
    n = min(PANEL_COLUMNS, len(columns))
    figure = _figure(2.1 * n + 0.6, 2.1 * n + 1.0)
    axes = figure.subplots(n, n, squeeze=False)
    limits = [_limits(real[:, i]) for i in range(n)]
    for row in range(n):
        for column in range(n):
            ax = axes[row, column]
            if row == column:
                for points, colour, label in (
                    (real, DATA, "data (below)"),
                    (drawn, MODEL, "samples (above)"),
                ):
                    ax.hist(
                        points[:, row].numpy(),
                        bins=32,
                        range=limits[row],
                        density=True,
                        color=colour,
                        alpha=0.45,
                        label=label,
                    )
                ax.set_yticks([])
            else:
                points, colour = (real, DATA) if row > column else (drawn, MODEL)
                points = points[: max(len(real), 500)]
                ax.scatter(
                    points[:, column].numpy(),
                    points[:, row].numpy(),
                    s=5,
                    c=colour,
                    alpha=0.45,
                    linewidths=0,
                    rasterized=True,
                )
                ax.set_ylim(limits[row])
            ax.set_xlim(limits[column])
            ax.set_box_aspect(1)
            if row < n - 1:
                ax.set_xticklabels([])
            else:
                ax.set_xlabel(_short(columns[column]), color=INK, fontsize=9)
            if column > 0 or row == 0:
                ax.set_yticklabels([])
            if column == 0:
                ax.set_ylabel(_short(columns[row]), color=INK, fontsize=9)
            ax.locator_params(nbins=3)
            ax.tick_params(colors=FAINT, labelsize=8, length=0)
            for spine in ax.spines.values():
                spine.set_color(LINE)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper right", frameon=False, labelcolor=INK, ncols=2)
    some = f" (first {n} of {len(columns)} columns)" if len(columns) > n else ""
    figure.suptitle(f"{name}{some}", x=0.02, ha="left", color=INK, fontsize=13, fontweight="bold")
    return figure


# ---- digits ------------------------------------------------------------------------------------


def digit_grids(real: Tensor, drawn: Tensor) -> Figure:
    """A hundred test images beside a hundred samples."""
    figure = _figure(10.4, 5.6)
    for ax, levels, title, colour in zip(
        figure.subplots(1, 2), (real, drawn), ("data", "samples of the flow"), (DATA, MODEL)
    ):
        ax.imshow(
            _mosaic(levels).numpy(), cmap="gray_r", vmin=0, vmax=LEVELS - 1, interpolation="nearest"
        )
        ax.set(xticks=[], yticks=[])
        for spine in ax.spines.values():
            spine.set_visible(False)
        ax.set_title(title, color=colour, fontsize=13)
    return figure


def _mosaic(levels: Tensor, side: int = 10, gap: int = 2) -> Tensor:
    """Lays images [N, 64] out in a square with gaps of paper between them."""
    height, width = SHAPE
    page = torch.zeros(side * (height + gap) + gap, side * (width + gap) + gap)
    for i, image in enumerate(levels[: side * side]):
        top, left = (n * (s + gap) + gap for n, s in zip(divmod(i, side), SHAPE))
        page[top : top + height, left : left + width] = image.reshape(SHAPE)
    return page


# ---- the run itself ----------------------------------------------------------------------------


def curves(rows: list[dict[str, Any]], data: Dataset) -> Figure:
    """Loss and number of function evaluations over the run."""
    figure = _figure(10.4, 3.8)
    left, right = figure.subplots(1, 2)
    judged = [row for row in rows if "validation_nll" in row]
    steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
    tried, values = [row["step"] for row in judged], [row["validation_nll"] for row in judged]
    unit = "negative log-likelihood, nats a row"
    if data.kind == "digits":
        unit = "bits per dimension"
        losses, values = (
            bits_per_dim(-torch.tensor(nll, dtype=torch.float64), data.features).tolist()
            for nll in (losses, values)
        )
    left.plot(steps, losses, color=FAINT, lw=1, label="training")
    if values:
        left.plot(tried, values, color=MODEL, lw=1.8, label="validation")
        best = min(values)
        where = tried[values.index(best)]
        left.plot(where, best, "o", color=MODEL, ms=6, clip_on=False, label=f"best {best:.3f}")
    _zoom(left, losses, values)
    _title(left, unit)
    right.plot(steps, [row["nfe_forward"] for row in rows], color=DATA, lw=1.8, label="forward")
    backward = [row["nfe_backward"] for row in rows]
    if any(backward):  # none where the forward solve's stages were kept
        right.plot(steps, backward, color=MODEL, lw=1.8, label="backward")
    right.set_ylim(bottom=0)
    right.locator_params(axis="y", integer=True)
    _title(right, "function evaluations a solve")
    for ax in (left, right):
        ax.set_xlabel("step", color=INK)
        ax.set_xlim(0, steps[-1])
        ax.grid(axis="y", color=LINE, lw=0.8)
        ax.set_axisbelow(True)
        ax.legend(frameon=False, labelcolor=INK)
    figure.suptitle(data.name, color=INK, fontsize=13, fontweight="bold")
    return figure


# ---- common ------------------------------------------------------------------------------------


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained", facecolor="white")
    figure.get_layout_engine().set(h_pad=0.09, w_pad=0.07)
    FigureCanvasAgg(figure)
    return figure


def _title(ax: Axes, text: str) -> None:
    ax.set_title(text, color=INK, fontsize=11)
    ax.tick_params(colors=FAINT, labelsize=8, length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)


def _limits(values: Tensor) -> tuple[float, float]:
    """Nearly all of the values with some air around them; a few outliers fall outside."""
    low, high = torch.quantile(values, torch.tensor([0.002, 0.998], dtype=values.dtype)).tolist()
    air = 0.08 * (high - low)
    return low - air, high + air


def _window(points: Tensor, square: bool) -> tuple[tuple[float, float], tuple[float, float]]:
    """Axis limits for two columns; the same scale for both where they share a unit."""
    x, y = _limits(points[:, 0]), _limits(points[:, 1])
    if not square:
        return x, y
    half = max(x[1] - x[0], y[1] - y[0]) / 2
    (cx, cy) = (sum(x) / 2, sum(y) / 2)
    return (cx - half, cx + half), (cy - half, cy + half)


def _zoom(ax: Axes, losses: list[float], judged: list[float]) -> None:
    """Cuts off the steep beginning, and a late rise of validation, which would flatten the rest."""
    values = torch.tensor(losses, dtype=torch.float64)
    if len(values) < 10 or not torch.isfinite(values).all() or not judged:
        return
    low = min(values.min().item(), min(judged))
    high = values[len(values) // 20 :].max().item()
    high = max(high, min(judged) + 0.3 * (high - low))
    air = 0.08 * (high - low)
    ax.set_ylim(low - air, high + air)


def _short(name: str) -> str:
    return name if len(name) <= 18 else name[:17] + "…"
