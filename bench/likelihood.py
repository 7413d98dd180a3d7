"""The exact log-likelihood and its gradients: no random probe, the whole trace of the Jacobian.

zuko's continuous flow, with its Fourier time features and its tolerances, and the same field with
the same weights in pycnf; beside them pycnf's estimate with one Hutchinson probe, which is what
most people settle for. Loss and gradients are compared first, with a tight solve in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import pycnf
from bench.accuracy import errors, tight_step
from bench.harness import OURS, Options, Row, interleave, missing, rows_of

_FEATURES, _HIDDEN, _BATCH = 21, (64, 64), 512
_FREQUENCIES, _ATOL, _RTOL = 3, 1e-6, 1e-5  # zuko's defaults
_ZUKO = "zuko, exact"
_PROBE = f"{OURS}, one Hutchinson probe"
_GENERIC = f"{OURS}, generic engine"
_ACTIVATIONS = {"elu": nn.ELU, "tanh": nn.Tanh}  # zuko's default first
# Of the solve that all are compared with: steps across the kinks of elu'' have a low order.
_TIGHT = {"elu": 1e-8, "tanh": 1e-10}
_LARGEST_ERROR = 1e-2  # of a gradient; more means that the fields are not the same


def _field(activation: str) -> pycnf.nn.MLP:
    """zuko's field: time features beside x in the first layer, no time in the others."""
    return pycnf.nn.MLP(
        _FEATURES,
        _HIDDEN,
        layer=("concat", *["ignore"] * len(_HIDDEN)),
        activation=activation,
        time=("fourier", 2 * _FREQUENCIES),
    )


def _flow(field: pycnf.nn.MLP, divergence: str, engine: str) -> pycnf.CNF:
    # zuko has its data at time 0 and the base at time 1.
    return pycnf.CNF(
        field, divergence=divergence, rtol=_RTOL, atol=_ATOL, t0=1.0, t1=0.0, engine=engine
    )


def _zuko_flow(field: pycnf.nn.MLP):
    import zuko

    flow = zuko.flows.CNF(
        _FEATURES,
        hidden_features=_HIDDEN,
        freqs=_FREQUENCIES,
        activation=_ACTIVATIONS[field.activation.name],
        atol=_ATOL,
        rtol=_RTOL,
        exact=True,
    )
    with torch.no_grad():
        for own, given in zip(flow.parameters(), field.parameters(), strict=True):
            own.copy_(given)
    return flow


def _rows(activation: str, case: str, rounds: int | None) -> list[Row]:
    torch.manual_seed(0)
    field = _field(activation)
    x = torch.randn(_BATCH, _FEATURES)
    probe = torch.randint(0, 2, (1, *x.shape)).to(x) * 2 - 1
    flows = {
        OURS: _flow(field, "exact", "fused"),
        _PROBE: _flow(field, "hutchinson", "fused"),
        _GENERIC: _flow(field, "exact", "generic"),
    }
    calls = [0]

    def count(*_) -> None:
        calls[0] += 1

    def step(log_prob: Callable[[Tensor], Tensor], parameters: list[Tensor]) -> list[Tensor]:
        loss = -log_prob(x).mean()
        return [loss.detach(), *torch.autograd.grad(loss, parameters)]

    steps = {
        OURS: lambda: step(flows[OURS].log_prob, list(field.parameters())),
        _PROBE: lambda: step(
            lambda x: flows[_PROBE].log_prob(x, probe=probe), list(field.parameters())
        ),
        _GENERIC: lambda: step(flows[_GENERIC].log_prob, list(field.parameters())),
    }
    if missing("zuko", "") is None:
        zuko_flow = _zuko_flow(field)
        steps[_ZUKO] = lambda: step(lambda x: zuko_flow().log_prob(x), list(zuko_flow.parameters()))
        counting = zuko_flow.transform.ode.register_forward_hook(count)

    tight = {"t0": 1.0, "t1": 0.0, "tolerance": _TIGHT[activation]}
    exact = tight_step(field, x, None, **tight)
    estimate = tight_step(field, x, probe, **tight)
    facts: dict[str, dict] = {}
    for name, run in steps.items():
        found = run()
        if name in flows:
            stats = flows[name].stats
            facts[name] = {
                "steps": f"{stats.accepted} + {stats.rejected} rejected",
                "nfe": f"{stats.nfe_forward} + {stats.nfe_backward}",
            }
        else:
            facts[name] = {"nfe": calls[0]}
            counting.remove()
        facts[name].update(errors(found, estimate if name == _PROBE else exact))
        if float(facts[name]["gradient error"]) > _LARGEST_ERROR:
            raise RuntimeError(f"{case}: {name} is far from the truth: {facts[name]}")
    return rows_of(case, interleave(steps, rounds or 9), facts)


def run(options: Options) -> Iterator[Row | str]:
    """Rows of zuko and pycnf for zuko's activation, ELU, and for tanh."""
    remark = missing("zuko", "the only peer of this benchmark")
    if remark is not None:
        yield remark
    widths = "-".join(str(width) for width in _HIDDEN)
    for activation in _ACTIVATIONS:
        case = f"exact log-likelihood, D={_FEATURES}, {widths} {activation}, B={_BATCH}"
        if options.has(case):
            yield from _rows(activation, case, options.rounds)
