"""One evaluation of a field: value, value and divergence with one probe, and the reverse of that
with what the forward pass kept, in GFLOP/s beside torch's own matrix product at equal precision.

Counted are products only, with P the number of weights and B rows: 2PB for a value, twice that with
the divergence's one tangent, and twice that again for the reverse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from bench.flops import weights
from bench.harness import OURS, Options, Row, interleave, rows_of
from pycnf import _ops
from pycnf.nn import MLP
from pycnf.nn.field_gradients import PROBES
from pycnf.nn.field_ops import field_arguments

_BATCH = 1024
# D, hidden widths, activation.
_FIELDS = (
    (2, (64, 64, 64), "tanh"),
    (6, (60, 60, 60), "tanh"),
    (8, (160, 160, 160), "tanh"),
    (21, (210, 210), "softplus"),
    (43, (860, 860), "softplus"),
)
# Rows, columns, inner dimension of torch's products.
_PRODUCTS = ((_BATCH, 64, 64), (1024, 1024, 1024))


def run(options: Options) -> Iterator[Row]:
    """Rows of every field in both precisions, on one thread and on all."""
    threads = torch.get_num_threads()
    try:
        for count in dict.fromkeys((1, threads)):
            torch.set_num_threads(count)
            for dtype in (torch.float32, torch.float64):
                for features, hidden, activation in _FIELDS:
                    case = (
                        f"D={features}, {'-'.join(map(str, hidden))} {activation}, B={_BATCH}, "
                        f"f{dtype.itemsize * 8}, {count} thread{'s' * (count > 1)}"
                    )
                    if options.has(case):
                        field = MLP(features, hidden, activation=activation).to(dtype)
                        yield from _rows(case, field, options.rounds)
    finally:
        torch.set_num_threads(threads)


def _rows(case: str, field: MLP, rounds: int | None) -> list[Row]:
    work = {**_evaluations(field), **_products(field.dtype)}
    times = interleave({name: call for name, (call, _) in work.items()}, rounds or 9, seconds=0.03)
    # A unit of work is a GFLOP: its time is the reciprocal of a speed.
    gflop = {name: flops / 1e9 for name, (_, flops) in work.items()}
    rows = rows_of(case, times, {name: {} for name in work}, gflop)
    for row in rows:
        row.facts = {"GFLOP/s": round(1 / row.seconds, 1)}
        if row.contender == OURS:
            row.facts["is"] = "value and divergence"
    return rows


def _evaluations(field: MLP) -> dict[str, tuple[Callable[[], object], float]]:
    """Calls of the ops and their FLOPs."""
    generator = torch.Generator().manual_seed(0)
    t = torch.tensor(0.3, dtype=field.dtype)
    z = torch.randn(_BATCH, field.features, dtype=field.dtype, generator=generator)
    probe = torch.randn(1, *z.shape, generator=generator).sign().to(z)
    _, parameters, plain = field_arguments(field, z, None)
    parameters = [x if x is None else x.detach() for x in parameters]
    arguments = (t, z, probe, None, parameters, [*plain[:2], PROBES, 0, 0], None, 0, 0, False)
    value, divergence, kept = _ops.mlp_value_divergence(*arguments, True)
    bars = torch.ones_like(value), torch.ones_like(divergence)
    total, _ = weights(field)
    flops = 2.0 * total * _BATCH
    return {
        f"{OURS}, value": (
            lambda: _ops.mlp_value(t, z, None, parameters, plain, False),
            flops,
        ),
        OURS: (lambda: _ops.mlp_value_divergence(*arguments, False), 2 * flops),
        f"{OURS}, reverse": (
            lambda: _ops.mlp_value_divergence_backward(*bars, *arguments, kept, True),
            4 * flops,
        ),
    }


def _products(dtype: torch.dtype) -> dict[str, tuple[Callable[[], object], float]]:
    """torch.mm, and its FLOPs."""
    made = {}
    for rows, columns, inner in _PRODUCTS:
        a, b = torch.rand(rows, inner, dtype=dtype), torch.rand(inner, columns, dtype=dtype)
        out = torch.empty(rows, columns, dtype=dtype)
        made[f"torch.mm {rows}×{columns}×{inner}"] = (
            lambda a=a, b=b, out=out: torch.mm(a, b, out=out),
            2.0 * rows * columns * inner,
        )
    return made
