"""The fused engine's tests for a GPU: on one (test_cuda.py), and its kernels on a host
(test_cnf_fused_host.py).

Who runs them has a fixture `pair`: from a field on the CPU and settings the flow that is tested and
the one that says what is right; and `close`, to which relative difference.
"""

import math

import pytest
import torch
from test_cnf_fused import FIXED, METHODS, assert_same, field_of, outcome, points

from pycnf.flows import SolveError
from pycnf.nn import ACTIVATIONS


def regularized(flow, x, **keywords):
    """A loss with regularizers, and its gradients."""
    x = x.to(flow.field.like).requires_grad_()
    loss = flow.log_prob(x, **keywords).sum()
    loss = loss + sum((i + 1) * r.sum() for i, r in enumerate(flow.stats.regularizers.values()))
    return [loss, *torch.autograd.grad(loss, [x, *flow.field.parameters()])]


def twice(flow, x, **keywords):
    """Gradients, and those of their squares."""
    x = x.to(flow.field.like).requires_grad_()
    inputs = [x, *flow.field.parameters()]
    z, logdet = flow(x, **keywords)
    loss = z.square().sum() + logdet.exp().sum()
    first = torch.autograd.grad(loss, inputs, create_graph=True)
    return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), inputs)]


class FusedCases:
    close = 1e-11

    def same(self, flows, *arguments, loose=1, **keywords):
        return assert_same(flows, *arguments, rtol=loose * self.close, **keywords)

    def near(self, flows, values, *arguments, **keywords):
        """What a function of flows returns."""
        found = [values(flow, *arguments, **keywords) for flow in flows]
        for mine, other in zip(*found, strict=True):
            scale = max(1.0, other.abs().max().item())
            torch.testing.assert_close(mine.cpu(), other, rtol=self.close, atol=self.close * scale)

    @pytest.mark.parametrize("method", METHODS)
    def test_adaptive_methods(self, pair, method):
        flows = pair(field_of(scale=3.0), method=method, rtol=1e-4, atol=1e-4)
        self.same(flows, points(37), seed=3)

    @pytest.mark.parametrize("method", FIXED)
    def test_fixed_methods(self, pair, method):
        self.same(pair(field_of(), method=method, options={"num_steps": 3}), points(5), seed=3)

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_activations(self, pair, activation):
        field = field_of(activation=activation)
        far = 1 if activation == "square" else 3  # a quadratic field leaves for infinity
        self.same(pair(field, method="rk4", options={"num_steps": 2}), points(9) * far, seed=3)

    @pytest.mark.parametrize("context", [0, 3])
    @pytest.mark.parametrize("time", ["t", ("fourier", 4)])
    @pytest.mark.parametrize("layer", ["ignore", "concat", "concat_v2", "squash", "concatsquash"])
    @pytest.mark.parametrize("kind", ["hutchinson", "exact"])
    def test_layers(self, pair, layer, time, context, kind):
        field = field_of(layer=layer, time=time, context=context)
        flows = pair(field, method="rk4", options={"num_steps": 2}, divergence=kind)
        given = points(6, context, seed=2) if context else None
        self.same(flows, points(6), given, **({"seed": 3} if kind == "hutchinson" else {}))

    @pytest.mark.parametrize("kind", ["hutchinson", "exact"])
    @pytest.mark.parametrize(
        ("hidden", "features"),
        [
            ((), 3), ((1,), 1), ((5,), 4), ((7, 3), 2), ((33, 34), 5), ((6, 9, 8), 3),
            ((4, 5, 4, 3), 2),
        ],
    )  # fmt: skip
    def test_shapes(self, pair, hidden, features, kind):
        field = field_of(features, hidden)
        flows = pair(field, method="heun3", options={"num_steps": 2}, divergence=kind)
        self.same(flows, points(5, features), **({"seed": 3} if kind == "hutchinson" else {}))

    @pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
    @pytest.mark.parametrize("probes", [1, 2, 5])
    def test_probes(self, pair, probes, noise):
        flows = pair(field_of(), method="bosh3", rtol=1e-2, atol=1e-2, probes=probes, noise=noise)
        self.same(flows, points(11), seed=3)

    @pytest.mark.parametrize("steps", ["shared", "per-sample"])
    @pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
    @pytest.mark.parametrize("features", [1, 6, 130])
    def test_probes_of_many_features_by_keys(self, pair, features, noise, steps):
        settings = {"method": "bosh3", "rtol": 1e-2, "atol": 1e-2, "steps": steps}
        flows = pair(field_of(features, (4,)), noise=noise, probes=2, **settings)
        keys = torch.tensor([5, -(2**63), 2**63 - 1, 5, 0])
        self.same(flows, points(5, features), seed=2**64 - 1, keys=keys)

    @pytest.mark.parametrize("inverse", [False, True])
    @pytest.mark.parametrize("batch", [1, 7, 8, 9, 65, 200])
    def test_batches(self, pair, batch, inverse):
        flows = pair(field_of(scale=2.0), rtol=1e-3, atol=1e-3)
        self.same(flows, points(batch), inverse=inverse, seed=3)

    @pytest.mark.parametrize("names", [("kinetic",), ("jacobian",), ("kinetic", "jacobian")])
    @pytest.mark.parametrize("kind", ["hutchinson", "exact"])
    def test_regularizers(self, pair, names, kind):
        weights = {name: 0.5 + i for i, name in enumerate(names)}
        flows = pair(field_of(), rtol=1e-2, atol=1e-2, divergence=kind, regularizers=weights)
        keywords = {"seed": 3} if kind == "hutchinson" else {}
        self.near(flows, regularized, points(9), **keywords)

    @pytest.mark.parametrize("kind", [{"divergence": "exact"}, {"probes": 1}, {"probes": 3}])
    @pytest.mark.parametrize("method", METHODS)
    def test_steps_per_sample(self, pair, method, kind):
        field = field_of(scale=3.0, layer="concat_v2" if method == "tsit5" else "concatsquash")
        settings = {"method": method, "rtol": 1e-3, "atol": 1e-3, "steps": "per-sample", **kind}
        keywords = {} if "divergence" in kind else {"seed": 3}
        # The rounding of an estimate of the error moves sizes of steps.
        self.same(pair(field, **settings), points(37), loose=100, **keywords)

    @pytest.mark.parametrize("context", [0, 3])
    @pytest.mark.parametrize("time", ["t", ("fourier", 4)])
    @pytest.mark.parametrize("layer", ["ignore", "concat", "concat_v2", "squash", "concatsquash"])
    def test_steps_per_sample_of_all_layers(self, pair, layer, time, context):
        field = field_of(layer=layer, time=time, context=context, hidden=(9, 12))
        settings = {"method": "bosh3", "rtol": 1e-2, "atol": 1e-2, "steps": "per-sample"}
        given = points(6, context, seed=2) if context else None
        weights = {"kinetic": 0.3, "jacobian": 0.2}
        self.same(pair(field, **settings), points(6), given, seed=3)
        self.same(pair(field, regularizers=weights, **settings), points(6), given, seed=3)

    def test_many_steps_per_sample_outgrow_the_tape(self, pair):
        flows = pair(field_of(), steps="per-sample", method="bosh3", rtol=1e-8, atol=1e-8)
        assert self.same(flows, points(3), loose=100, seed=3)[0] > 16

    def test_second_derivatives(self, pair):
        self.near(pair(field_of(hidden=(5, 4)), rtol=1e-3, atol=1e-3), twice, points(4), seed=1)

    def test_a_hard_solve_with_rejections(self, pair):
        settings = {"rtol": 1e-5, "atol": 1e-5, "options": {"first_step": 0.9}}
        flows = pair(field_of(scale=6.0), **settings)
        counts = self.same(flows, points(16) * 2, seed=3, loose=100)
        assert counts[2] > 0

    def test_float32(self, pair):
        field = field_of(hidden=(16, 16, 16)).float()
        found = [outcome(f, points(30).float(), seed=3) for f in pair(field, rtol=1e-3, atol=1e-3)]
        (mine, counts), (other, expected) = found
        assert counts == expected
        for a, b in zip(mine, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)

    def test_the_same_bits_every_time(self, pair):
        flow, _ = pair(field_of(hidden=(9, 12), scale=2.0), rtol=1e-2, atol=1e-2)
        first, _ = outcome(flow, points(65), seed=3)
        again, _ = outcome(flow, points(65), seed=3)
        assert all(map(torch.equal, first, again))

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (lambda flow, x: setattr(flow, "max_num_steps", 2), "max_num_steps"),
            (lambda flow, x: x[3, 0].fill_(math.nan), "the state is not finite at the start"),
            (lambda flow, x: x[3].fill_(1e200), "the field is not finite at the start"),
        ],
        ids=["steps", "state", "field"],
    )
    def test_errors(self, pair, change, says):
        messages = []
        for flow in pair(field_of(activation="square", scale=2.0), rtol=1e-9, atol=1e-9):
            x = points(20)
            change(flow, x)
            with pytest.raises(SolveError, match=says) as error:
                flow(x.to(flow.field.like), seed=1)
            messages.append(str(error.value))
        assert messages[0] == messages[1]
