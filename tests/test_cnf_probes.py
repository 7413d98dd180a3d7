"""Which probe a sample sees: its own, whatever the batch, the order or the process."""

import pytest
import torch
from fields import mlp, points

from pycnf._ops import probe_keys, probe_sample
from pycnf.flows import CNF

GRID = {"method": "rk4", "options": {"num_steps": 3}}


@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
@pytest.mark.parametrize("probes", [1, 3])
def test_a_sample_sees_its_probe_in_any_batch_and_order(noise, probes):
    flow = CNF(mlp(features=3), noise=noise, probes=probes, **GRID)
    x = points(9, 3)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        together = flow.log_prob(x, seed=7)
        shuffled = flow.log_prob(x[order], seed=7)
        halves = torch.cat([flow.log_prob(part, seed=7) for part in x.split(4)])
        other = flow.log_prob(x, seed=8)
    torch.testing.assert_close(shuffled, together[order], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(halves, together, rtol=1e-12, atol=1e-13)
    assert (other - together).abs().max() > 1e-3


def test_the_probe_is_the_ops():
    flow = CNF(mlp(), noise="gaussian", probes=2, **GRID)
    x = points()
    probe = probe_sample(probe_keys(x), 5, 2, 2, noise="gaussian", dtype=x.dtype)
    assert torch.equal(flow.log_prob(x, seed=5), flow.log_prob(x, probe=probe))
    keys = torch.arange(7)
    probe = probe_sample(keys, 5, 2, 2, noise="gaussian", dtype=x.dtype)
    assert torch.equal(flow.log_prob(x, seed=5, keys=keys), flow.log_prob(x, probe=probe))
    assert torch.equal(flow.inverse(x, seed=5, keys=keys)[1], flow.inverse(x, probe=probe)[1])


def test_keys_separate_equal_rows():
    flow = CNF(mlp(), noise="gaussian", **GRID)
    x = points(1).expand(5, 2).contiguous()
    assert flow.log_prob(x, seed=1).std() < 1e-12
    assert flow.log_prob(x, seed=1, keys=torch.arange(5)).std() > 1e-3


def test_seeds_come_from_torchs_generator_one_draw_per_solve():
    x = points()
    flow, exact = CNF(mlp()), CNF(mlp(), divergence="exact")
    torch.manual_seed(3)
    first, second = flow.log_prob(x), flow.log_prob(x)
    state = torch.get_rng_state()
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(flow.log_prob(x), first)
    torch.empty((), dtype=torch.int64).random_()
    assert torch.equal(torch.get_rng_state(), state)
    exact.log_prob(x)
    flow.log_prob(x, seed=1)
    assert torch.equal(torch.get_rng_state(), state)  # nothing is drawn


def test_the_probe_is_fixed_over_a_solve():
    """A new one at each evaluation would make the right-hand side rough and the steps many."""
    flow, exact = CNF(mlp(features=2)), CNF(mlp(features=2), divergence="exact")
    flow(points(), seed=1), exact(points())
    assert flow.stats.nfe_forward < 2 * exact.stats.nfe_forward


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"probe": torch.ones(7, 2).double()}, ValueError, r"probe: got shape \(7, 2\)"),
        ({"probe": torch.ones(0, 7, 2).double()}, ValueError, "K of at least 1"),
        ({"probe": torch.ones(1, 7, 2)}, TypeError, "probe: got torch.float32"),
        ({"probe": torch.ones(1, 7, 2).double(), "seed": 1}, ValueError, "one or the other"),
        ({"probe": torch.ones(1, 7, 2).double().requires_grad_()}, ValueError, "requires a grad"),
        ({"keys": torch.arange(6)}, ValueError, r"keys: got torch.int64 of shape \(6,\)"),
        ({"keys": torch.arange(7.0)}, ValueError, "keys: got torch.float32"),
    ],
)
def test_bad_probes(arguments, error, says):
    with pytest.raises(error, match=says):
        CNF(mlp())(points(), **arguments)


def test_probes_for_an_exact_divergence():
    with pytest.raises(ValueError, match="expected None with divergence='exact'"):
        CNF(mlp(), divergence="exact")(points(), probe=torch.ones(1, 7, 2).double())
