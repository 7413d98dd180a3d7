"""FFJORD's training step in the peers, each as its users write it, on the weights of a pycnf field.

The state is a tuple (z, log-density change), the layers are concatsquash. Every step is called
without arguments and returns the mean negative log-likelihood and its gradients to all weights, in
the order of `field.parameters()`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import torch
from torch import Tensor, nn

import pycnf

Step = Callable[[], list[Tensor]]


class TorchdiffeqField(nn.Module):
    """(z, logdet) -> (f, -εᵀ ∂f/∂z ε), the divergence as a vector-Jacobian product."""

    def __init__(self, field: pycnf.nn.MLP, probe: Tensor) -> None:
        super().__init__()
        self.field, self.probe, self.calls = field, probe, 0
        self.activation = {"tanh": torch.tanh, "softplus": nn.functional.softplus}[
            field.activation.name
        ]

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
                    a = self.activation(a)
            (vjp,) = torch.autograd.grad(a, z, self.probe, create_graph=True)
        return a, -(vjp * self.probe).sum(-1)


class TorchdiffeqStep:
    """A step by torchdiffeq's `odeint_adjoint`, or its `odeint` and autograd; `calls` counts the
    evaluations of the newest.
    """

    def __init__(
        self, field: pycnf.nn.MLP, x: Tensor, probe: Tensor, tolerance: float, adjoint: bool
    ) -> None:
        import torchdiffeq

        self.solve = torchdiffeq.odeint_adjoint if adjoint else torchdiffeq.odeint
        self.field, self.x, self.tolerance = TorchdiffeqField(field, probe), x, tolerance

    @property
    def calls(self) -> int:
        return self.field.calls

    def __call__(self) -> list[Tensor]:
        self.field.calls = 0
        start = (self.x, self.x.new_zeros(self.x.shape[0]))
        times = self.x.new_tensor([1.0, 0.0])
        z, change = self.solve(
            self.field, start, times, rtol=self.tolerance, atol=self.tolerance, method="dopri5"
        )
        log_base = -0.5 * (z[-1] ** 2).sum(-1) - 0.5 * self.x.shape[1] * math.log(2 * math.pi)
        loss = -(log_base - change[-1]).mean()
        return [loss.detach(), *torch.autograd.grad(loss, list(self.field.parameters()))]


class DiffraxStep:
    """A step by jitted diffrax: default step control, checkpointed adjoint, the divergence as a
    Jacobian-vector product in forward mode.

    A call is what is timed, and waits for its results, which stay jax's; `results` are the newest's
    as torch's, `accepted` and `rejected` its steps. It runs where x is.
    """

    def __init__(self, field: pycnf.nn.MLP, x: Tensor, probe: Tensor, tolerance: float) -> None:
        jax = _import_jax(x.device.type)
        import diffrax
        from jax import numpy as jnp

        activation = {"tanh": jnp.tanh, "softplus": jax.nn.softplus}[field.activation.name]

        def value(layers, t, a):
            for i, layer in enumerate(layers):
                gate = jax.nn.sigmoid(layer["gate_weight"] * t + layer["gate_bias"])
                a = (a @ layer["weight"].T + layer["bias"]) * gate + layer["shift_weight"] * t
                if i + 1 < len(layers):
                    a = activation(a)
            return a

        def dynamics(t, state, arguments):
            layers, probe = arguments
            f, jvp = jax.jvp(lambda z: value(layers, t, z), (state[0],), (probe,))
            return f, -(jvp * probe).sum(-1)

        def loss(layers, x, probe):
            solution = diffrax.diffeqsolve(
                diffrax.ODETerm(dynamics),
                diffrax.Dopri5(),
                t0=1.0,
                t1=0.0,
                dt0=None,
                y0=(x, jnp.zeros(x.shape[0])),
                args=(layers, probe),
                stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance),
                adjoint=diffrax.RecursiveCheckpointAdjoint(),
            )
            z, change = solution.ys
            log_base = -0.5 * (z[-1] ** 2).sum(-1) - 0.5 * x.shape[1] * math.log(2 * math.pi)
            return -(log_base - change[-1]).mean(), solution.stats

        self.jax, self.names = jax, [name for name, _ in field.layers[0].named_parameters()]
        self.layers = [
            {name: jnp.asarray(w.detach().cpu().numpy()) for name, w in layer.named_parameters()}
            for layer in field.layers
        ]
        self.x, self.probe = jnp.asarray(x.cpu().numpy()), jnp.asarray(probe.cpu().numpy())
        self.step = jax.jit(jax.value_and_grad(loss, has_aux=True))

    def __call__(self) -> None:
        self.newest = self.jax.block_until_ready(self.step(self.layers, self.x, self.probe))

    @property
    def results(self) -> list[Tensor]:
        (loss, _), gradients = self.newest
        flat = [loss, *(layer[name] for layer in gradients for name in self.names)]
        return [torch.from_numpy(self.jax.device_get(value).copy()) for value in flat]

    @property
    def accepted(self) -> int:
        return int(self.newest[0][1]["num_accepted_steps"])

    @property
    def rejected(self) -> int:
        return int(self.newest[0][1]["num_rejected_steps"])


def _import_jax(device: str):
    """jax in single precision: on a GPU without TF32 and with no memory taken in advance, on the
    CPU with as many threads as torch has.
    """
    for name in ("NPROC", "PJRT_NPROC"):  # read when jax makes its threads
        os.environ[name] = str(torch.get_num_threads())
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    import jax

    jax.config.update("jax_platforms", device)
    jax.config.update("jax_enable_x64", False)
    jax.config.update("jax_default_matmul_precision", "highest")
    return jax
