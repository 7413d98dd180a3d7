"""Floating-point operations of a training step, and the rate of this machine's sgemm.

A multiplication and an addition count as two. Counted are the matrix products that a step cannot do
without; activations, gates and sums are not.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch

import pycnf
from pycnf.odeint.tableau import TABLEAUX

# (rows, columns, inner): of narrow layers, and one that any BLAS runs at its full speed.
SGEMM_SHAPES = ((1024, 64, 64), (2048, 1024, 1024))


def sgemm(rows: int, columns: int, inner: int) -> tuple[str, Callable[[], object], float]:
    """A single-precision product by torch's BLAS on torch's threads.

    Returns:
        Its name, a call that does it often enough to take a millisecond or more, and the FLOPs of
        such a call.
    """
    a, b, out = torch.rand(rows, inner), torch.rand(inner, columns), torch.empty(rows, columns)
    flops = 2.0 * rows * columns * inner
    calls = max(1, round(3e8 / flops))

    def product() -> None:
        for _ in range(calls):
            torch.mm(a, b, out=out)

    return f"sgemm {rows}×{columns}×{inner}", product, calls * flops


def weights(field: pycnf.nn.MLP) -> tuple[int, int]:
    """P, the weights of all layers (without time's), and those of the first."""
    widths = (field.features, *field.hidden, field.features)
    sizes = [n_in * n_out for n_in, n_out in itertools.pairwise(widths)]
    return sum(sizes), sizes[0]


def step_flops(
    field: pycnf.nn.MLP, batch: int, probes: int, method: str, stats: pycnf.flows.SolveStats
) -> float:
    """FLOPs of an adaptive solve with Hutchinson probes and of its discrete gradient.

    An evaluation multiplies batch rows by all weights, and with divergence `probes` times as many
    tangent rows by all but the first layer's: there the tangents W1 ε are constants of a solve, and
    so is the factor ε of their weight gradient, so each is one product for the whole solve. The
    reverse of an evaluation is two such products. Stages that neither the solution nor the error
    uses need no divergence. A stage that is not kept is evaluated once more
    (`stats.nfe_backward`).
    """
    value, tangent, constant = _products(field, batch, probes)
    used, plain = _stages(method)
    again = stats.nfe_backward / used  # accepted steps whose stages were not kept
    forward = stats.nfe_backward * (value + tangent) - again * plain * tangent
    reverse = stats.accepted * (used * 2 * value + (used - plain) * 2 * tangent)
    return solve_flops(field, batch, probes, method, stats) + forward + reverse + constant


def solve_flops(
    field: pycnf.nn.MLP, batch: int, probes: int, method: str, stats: pycnf.flows.SolveStats
) -> float:
    """FLOPs of such a solve alone; without divergence, where there are no probes."""
    value, tangent, constant = _products(field, batch, probes)
    _, plain = _stages(method)
    attempts = stats.accepted + stats.rejected
    return stats.nfe_forward * (value + tangent) - attempts * plain * tangent + constant


def _products(field: pycnf.nn.MLP, batch: int, probes: int) -> tuple[float, float, float]:
    """FLOPs of a value, of its tangents behind the first layer, and of those in it."""
    total, first = weights(field)
    rows = 2.0 * batch
    return rows * total, rows * (total - first) * probes, rows * first * probes


def _stages(method: str) -> tuple[int, int]:
    """How many stages an accepted step uses, and how many of them without divergence."""
    tableau = TABLEAUX[method]
    used = tableau.stages_in_use
    return used, sum(b == 0 and e == 0 for b, e in zip(tableau.b[:used], tableau.e[:used]))
