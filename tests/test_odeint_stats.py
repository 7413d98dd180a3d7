"""`last_stats` counts what a recorder and torchdiffeq's callbacks count."""

import threading

import pytest
import torch
from problems import ADAPTIVE, FIXED, IMPLICIT, PROBLEMS, Recorder, clone_state

import pycnf

F64 = torch.float64
ADAMS = ("explicit_adams", "implicit_adams")


def solve(name, method, dtype=F64, **keywords):
    field, y0, t = PROBLEMS[name](dtype)
    recorder = Recorder(field)
    with torch.no_grad():
        pycnf.odeint(recorder, clone_state(y0), t, method=method, **keywords)
    return recorder, t, pycnf.last_stats()


@pytest.mark.parametrize("name", ["pulse", "driven_pendulum", "lotka_volterra_backwards"])
@pytest.mark.parametrize("method", ADAPTIVE)
def test_adaptive_steps(method, name):
    field, y0, t = PROBLEMS[name](F64)
    seen = {"accept": [], "reject": []}
    recorder = Recorder(field)
    recorder.callback_accept_step = lambda t0, y, dt: seen["accept"].append(dt.item())
    recorder.callback_reject_step = lambda t0, y, dt: seen["reject"].append(dt.item())
    pycnf.odeint(recorder, y0, t, method=method, rtol=1e-4, atol=1e-5)
    stats = pycnf.last_stats()
    assert stats.method == method
    assert stats.evaluations == recorder.nfe
    assert stats.accepted == len(seen["accept"]) > 0
    assert stats.rejected == len(seen["reject"])
    assert stats.step_sizes == seen["accept"]
    assert stats.backward is None


def test_some_of_these_reject():
    _, _, stats = solve("pulse", "dopri5", rtol=1e-4, atol=1e-5)
    assert stats.rejected > 0


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("method", [*FIXED, *ADAMS, *IMPLICIT])
def test_steps_on_a_grid(method, dtype):
    recorder, t, stats = solve(
        "lotka_volterra_backwards", method, dtype, options={"step_size": 0.3}
    )
    steps = -(-(t[0] - t[-1]).item() // 0.3)
    assert stats.evaluations == recorder.nfe
    assert (stats.accepted, stats.rejected) == (steps, 0)
    assert stats.step_sizes == pytest.approx([0.3] * int(steps - 1) + [(4.0 % 0.3)], abs=1e-6)


def test_a_field_that_changes_to_a_graph_half_way():
    rate = torch.ones((), dtype=F64, requires_grad=True)
    recorder = Recorder(lambda t, y: -rate * y if t > 0.5 else -y)
    t = torch.linspace(0, 1, 11, dtype=F64)
    pycnf.odeint(recorder, torch.ones(2, dtype=F64), t, method="rk4")
    stats = pycnf.last_stats()
    assert stats.evaluations == recorder.nfe == 40
    assert stats.accepted == len(stats.step_sizes) == 10


def test_events_and_dense_output():
    recorder = Recorder(lambda t, y: torch.ones_like(y))
    y0, t = torch.zeros(1, dtype=F64), torch.tensor([0.0, 1.0], dtype=F64)
    for method, options in (("dopri5", None), ("rk4", {"step_size": 0.25})):
        recorder.times.clear()
        pycnf.odeint(recorder, y0, t, event_fn=lambda t, y: y - 0.7, method=method, options=options)
        stats = pycnf.last_stats()
        assert stats.evaluations == recorder.nfe
        assert sum(stats.step_sizes) >= 0.7
        assert stats.accepted == len(stats.step_sizes)
    recorder.times.clear()
    pycnf.odeint_dense(recorder, y0, 0.0, 1.0)
    assert pycnf.last_stats().evaluations == recorder.nfe
    assert sum(pycnf.last_stats().step_sizes) >= 1


def test_where_nobody_tells():
    recorder, _, stats = solve("pulse", "scipy_solver")
    assert stats.evaluations == recorder.nfe
    assert (stats.accepted, stats.rejected, stats.step_sizes) == (None, None, [])


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_elements_have_their_own(method):
    """The counts of each solve alone; evaluations are those of the batch."""
    rates = torch.tensor([0.5, 4.0, 30.0], dtype=F64)
    t = torch.tensor([0.0, 2.0], dtype=F64)
    options = {"step_size": 0.1} if method == "rk4" else None

    def one(rate, y):
        return pycnf.odeint(
            lambda t, y: torch.cos(rate * t) - rate * y, y, t, method=method, rtol=1e-6,
            options=options,
        )  # fmt: skip

    y0 = torch.ones(3, 2, dtype=F64)
    alone = []
    for rate, y in zip(rates, y0):
        one(rate, y)
        alone.append(pycnf.last_stats())
    torch.func.vmap(one)(rates, y0)
    under_vmap = pycnf.last_stats()
    pycnf.odeint_per_sample(
        lambda t, y: torch.cos(rates * t)[:, None] - rates[:, None] * y, y0, t, method=method,
        rtol=1e-6, options=options,
    )  # fmt: skip
    by_rows = pycnf.last_stats()
    for stats in (under_vmap, by_rows):
        # One number where elements cannot differ.
        assert stats.accepted.expand(3).tolist() == [each.accepted for each in alone]
        assert stats.rejected.expand(3).tolist() == [each.rejected for each in alone]
        assert stats.evaluations >= max(each.evaluations for each in alone)


def test_every_solve_has_its_own_object_and_every_thread_its_newest():
    _, _, first = solve("pulse", "rk4")
    kept = first.evaluations
    _, _, second = solve("pulse", "dopri5")
    assert second is not first
    assert first.evaluations == kept
    found = []
    thread = threading.Thread(target=lambda: found.append(pycnf.last_stats()))
    thread.start()
    thread.join()
    assert found == [None]
    assert pycnf.last_stats() is second


def test_a_solve_that_failed_leaves_what_it_came_to():
    y0, t = torch.ones(1, dtype=F64), torch.tensor([0.0, 10.0], dtype=F64)
    with pytest.raises(AssertionError, match="max_num_steps"):
        pycnf.odeint(lambda t, y: torch.sin(9 * t) * y, y0, t, options={"max_num_steps": 4})
    stats = pycnf.last_stats()
    assert stats.accepted + stats.rejected == 4
    assert stats.evaluations == 2 + 6 * 4


@pytest.mark.parametrize("outputs", [2, 5])
@pytest.mark.parametrize("gradient", ["continuous", "joined"])
def test_backward_solves_are_counted_in_sum(gradient, outputs):
    seen = {"accept": [], "reject": []}
    recorder = Recorder(lambda t, y: torch.sin(3 * t) * y.flip(0) - 0.4 * y)
    recorder.callback_accept_step_adjoint = lambda t, y, dt: seen["accept"].append(dt.item())
    recorder.callback_reject_step_adjoint = lambda t, y, dt: seen["reject"].append(dt.item())
    y0 = torch.tensor([1.0, -2.0], dtype=F64, requires_grad=True)
    t = torch.linspace(0, 4, outputs, dtype=F64)
    y = pycnf.odeint_adjoint(recorder, y0, t, rtol=1e-5, atol=1e-6, gradient=gradient)
    stats = pycnf.last_stats()
    forward = recorder.nfe
    assert (stats.evaluations, stats.backward) == (forward, None)
    y.sum().backward()
    assert pycnf.last_stats() is stats
    assert stats.evaluations == forward
    assert stats.backward.evaluations == recorder.nfe - forward
    assert stats.backward.accepted == len(seen["accept"]) > 0
    assert stats.backward.rejected == len(seen["reject"])
    assert stats.backward.step_sizes == seen["accept"]


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_a_discrete_gradient_evaluates_and_takes_no_steps(method):
    recorder = Recorder(lambda t, y: torch.sin(3 * t) * y.flip(0) - 0.4 * y)
    y0 = torch.tensor([1.0, -2.0], dtype=F64, requires_grad=True)
    t = torch.linspace(0, 4, 5, dtype=F64)
    y = pycnf.odeint_adjoint(recorder, y0, t, method=method, gradient="discrete")
    forward = recorder.nfe
    stats = pycnf.last_stats()
    y.sum().backward()
    assert stats.evaluations == forward
    assert stats.backward.evaluations == recorder.nfe - forward > 0
    assert (stats.backward.accepted, stats.backward.rejected) == (0, 0)
