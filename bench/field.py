"""One evaluation of a field: value, value and divergence with one probe, and the reverse of that
with what the forward pass kept, in GFLOP/s beside torch's own matrix product at equal precision.

Counted are products only, with P the number of weights: 2PB for a value, twice that with the
divergence's one tangent, and twice that again for the reverse.
"""

from __future__ import annotations

import torch

from bench.harness import OURS, Row, measure
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
_LARGE = 1024  # rows and columns of the large product


def run() -> list[Row]:
    """Rows of every field in both precisions, on one thread and on all."""
    threads = torch.get_num_threads()
    rows = []
    try:
        for count in dict.fromkeys((1, threads)):
            torch.set_num_threads(count)
            for dtype in (torch.float32, torch.float64):
                for field in _FIELDS:
                    rows += _rows(*field, dtype, count)
    finally:
        torch.set_num_threads(threads)
    return rows


def _rows(
    features: int, hidden: tuple[int, ...], activation: str, dtype: torch.dtype, threads: int
) -> list[Row]:
    torch.manual_seed(0)
    field = MLP(features, hidden, layer="concatsquash", activation=activation).to(dtype)
    t, z = torch.tensor(0.3, dtype=dtype), torch.randn(_BATCH, features, dtype=dtype)
    probe = torch.randint(0, 2, (1, _BATCH, features)).to(z) * 2 - 1
    _, parameters, kind = field_arguments(field, z, None)
    parameters = [x if x is None else x.detach() for x in parameters]
    of_divergence = [*kind[:2], PROBES, 0, 0]
    draw = (None, 0, 0, False)
    value, divergence, kept = _ops.mlp_value_divergence(
        t, z, probe, None, parameters, of_divergence, *draw, True
    )
    bars = torch.randn_like(value), torch.randn_like(divergence)
    small = torch.randn(_BATCH, 64, dtype=dtype), torch.randn(64, 64, dtype=dtype)
    large = torch.randn(_LARGE, _LARGE, dtype=dtype), torch.randn(_LARGE, _LARGE, dtype=dtype)

    def value_only() -> tuple:
        return _ops.mlp_value(t, z, None, parameters, kind, False)

    def with_divergence() -> tuple:
        return _ops.mlp_value_divergence(t, z, probe, None, parameters, of_divergence, *draw, False)

    def reverse() -> tuple:
        return _ops.mlp_value_divergence_backward(
            *bars, t, z, probe, None, parameters, of_divergence, *draw, kept, True
        )

    weights = sum(layer.in_features * layer.out_features for layer in field.layers)
    once = 2 * weights * _BATCH
    # What the harness calls OURS is what the ratios are of; one of them has to be.
    work = {
        f"{OURS} value": (value_only, once),
        OURS: (with_divergence, 2 * once),
        f"{OURS} reverse": (reverse, 4 * once),
        f"torch.mm {_BATCH}x64x64": (lambda: torch.mm(*small), 2 * _BATCH * 64 * 64),
        f"torch.mm {_LARGE}x{_LARGE}x{_LARGE}": (lambda: torch.mm(*large), 2 * _LARGE**3),
    }
    shape = "-".join(map(str, hidden))
    case = (
        f"field D={features}, {shape} concatsquash {activation}, B={_BATCH}, "
        f"{str(dtype).removeprefix('torch.')}, {threads} thread{'s' * (threads > 1)}"
    )
    # A unit of work is a GFLOP, so that its time is the reciprocal of a speed.
    facts = {name: {} for name in work}
    rows = measure(
        case,
        {name: function for name, (function, _) in work.items()},
        {name: flops / 1e9 for name, (_, flops) in work.items()},
        facts,
        rounds=7,
        seconds=0.05,
    )
    for row in rows:
        row.facts = {
            "GFLOP/s": round(1 / row.seconds, 1),
            "GFLOP a call": round(work[row.contender][1] / 1e9, 4),
        }
        if row.contender == OURS:
            row.facts["is"] = "value and divergence"
    return rows
