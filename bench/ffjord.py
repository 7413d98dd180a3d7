"""One FFJORD training step: loss and all gradients of a small concatsquash flow, at equal weights
and probe.

The peers get FFJORD as its users write it: plain modules, the divergence as a vector-Jacobian
product with the probe, the state a tuple (z, log-density change). All are compared with a solve at
1e-10 in float64 through torchdiffeq.
"""

from __future__ import annotations

import torch
import torchdiffeq
from torch import Tensor, nn

import pycnf
from bench.harness import OURS, Row, measure

_FEATURES, _HIDDEN, _TOLERANCE = 2, (64, 64, 64), 1e-5
_BATCHES = (64, 512)
_GENERIC = f"{OURS}, generic engine"


class _FfjordField(nn.Module):
    """(z, logdet) -> (f, -εᵀ ∂f/∂z ε) on the weights of a pycnf field."""

    def __init__(self, field: pycnf.nn.MLP, probe: Tensor) -> None:
        super().__init__()
        self.field, self.probe, self.calls = field, probe, 0

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        self.calls += 1
        with torch.enable_grad():
            z = state[0].requires_grad_(True)
            a = z
            for i, layer in enumerate(self.field.layers):
                gate = torch.sigmoid(layer.gate_weight * t + layer.gate_bias)
                a = nn.functional.linear(a, layer.weight, layer.bias) * gate
                a = a + layer.shift_weight * t
                if i + 1 < len(self.field.layers):
                    a = torch.tanh(a)
            (vjp,) = torch.autograd.grad(a, z, self.probe, create_graph=True)
        return a, -(vjp * self.probe).sum(-1)


def _torchdiffeq_loss(solve, field: _FfjordField, x: Tensor, tolerance: float) -> Tensor:
    """Mean negative log-likelihood; data at t = 1, base at t = 0."""
    times = torch.tensor([1.0, 0.0], dtype=x.dtype)
    start = (x, torch.zeros(x.shape[0], dtype=x.dtype))
    z, change = solve(field, start, times, rtol=tolerance, atol=tolerance, method="dopri5")
    log_base = -0.5 * (z[-1] ** 2).sum(-1) - 0.5 * _FEATURES * torch.log(torch.tensor(2 * torch.pi))
    return -(log_base - change[-1]).mean()


def _gradients(loss: Tensor, field: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(field.parameters())))


def _distance(found: list[Tensor], truth: list[Tensor]) -> float:
    """Relative distance of two lists of tensors in the Euclidean norm."""
    difference = sum((a.double() - b).square().sum() for a, b in zip(found, truth)) ** 0.5
    return float(difference / sum(b.square().sum() for b in truth) ** 0.5)


def run() -> list[Row]:
    """Rows of pycnf.CNF (discrete gradient, both engines) and torchdiffeq's two ways."""
    return [row for batch in _BATCHES for row in _rows(batch)]


def _rows(batch: int) -> list[Row]:
    torch.manual_seed(0)
    field = pycnf.nn.MLP(_FEATURES, _HIDDEN, layer="concatsquash", activation="tanh")
    x = torch.randn(batch, _FEATURES)
    probe = torch.randint(0, 2, (1, batch, _FEATURES)).to(x) * 2 - 1

    exact = pycnf.nn.MLP(_FEATURES, _HIDDEN, layer="concatsquash", activation="tanh").double()
    exact.load_state_dict({k: v.double() for k, v in field.state_dict().items()})
    tight = _FfjordField(exact, probe[0].double())
    true_loss = _torchdiffeq_loss(torchdiffeq.odeint, tight, x.double(), 1e-10)
    truth = [true_loss.detach(), *_gradients(true_loss, tight.field)]

    flows = {
        name: pycnf.CNF(field, rtol=_TOLERANCE, atol=_TOLERANCE, engine=engine)
        for name, engine in ((OURS, "fused"), (_GENERIC, "generic"))
    }
    plain = _FfjordField(field, probe[0])

    def ours(flow: pycnf.CNF) -> list[Tensor]:
        loss = -flow.log_prob(x, probe=probe).mean()
        return [loss.detach(), *_gradients(loss, field)]

    def theirs(solve) -> list[Tensor]:
        loss = _torchdiffeq_loss(solve, plain, x, _TOLERANCE)
        return [loss.detach(), *_gradients(loss, field)]

    contenders = {
        **{name: lambda flow=flow: ours(flow) for name, flow in flows.items()},
        "torchdiffeq odeint_adjoint": lambda: theirs(torchdiffeq.odeint_adjoint),
        "torchdiffeq odeint + backward": lambda: theirs(torchdiffeq.odeint),
    }
    facts = {}
    for name, contender in contenders.items():
        plain.calls = 0
        found = contender()
        if name in flows:
            nfe = f"{flows[name].stats.nfe_forward} + {flows[name].stats.nfe_backward}"
        else:
            nfe = str(plain.calls)
        facts[name] = {
            "nfe": nfe,
            "loss": f"{found[0].item():.7f}",
            "loss error": f"{_distance(found[:1], truth[:1]):.1e}",
            "gradient error": f"{_distance(found[1:], truth[1:]):.1e}",
        }
    case = f"FFJORD step, D={_FEATURES}, 64-64-64 concatsquash, B={batch}, dopri5 1e-5"
    return measure(case, contenders, dict.fromkeys(contenders, 1.0), facts, rounds=9, seconds=0.0)
