"""The compiled loop of the explicit fixed-grid methods hands a step over, whole or half done, as
soon as a field returns something else than plain values; torchdiffeq is the judge of what comes
out.
"""

import pytest
import torch
import torchdiffeq
from problems import FIXED, Recorder, assert_close, clone_state

import pycnf

F64 = torch.float64
T = torch.linspace(0.0, 2.0, 9, dtype=F64)


class From(torch.nn.Module):
    """Decay that behaves otherwise from its n-th call on."""

    def __init__(self, call, otherwise):
        super().__init__()
        self.rate = torch.nn.Parameter(torch.tensor(0.7, dtype=F64))
        self.call, self.otherwise, self.calls = call, otherwise, 0

    def forward(self, t, y):
        self.calls += 1
        plain = torch.sin(t) - 0.7 * y
        return self.otherwise(self, t, y) if self.calls > self.call else plain.detach()


OTHERWISE = {
    "graph": lambda field, t, y: torch.sin(t) - field.rate * y,
    "half": lambda field, t, y: (-0.7 * y).float(),
    "broadcast": lambda field, t, y: torch.full_like(y[:1], 0.3),
    "strided": lambda field, t, y: (-0.7 * torch.stack([y, y], -1))[..., 0],
    "expanded": lambda field, t, y: t.expand(y.shape),
    "view of the state": lambda field, t, y: y.view_as(y),
}


@pytest.mark.parametrize("method", FIXED)
@pytest.mark.parametrize("otherwise", OTHERWISE)
@pytest.mark.parametrize("call", [0, 1, 2, 3, 7, 16])
def test_a_field_that_changes_its_ways(method, otherwise, call):
    results = []
    for library in (pycnf, torchdiffeq):
        field = From(call, OTHERWISE[otherwise])
        y = library.odeint(field, torch.tensor([1.0, -2.0, 0.5], dtype=F64), T, method=method)
        results.append((field.calls, y.detach(), y.requires_grad))
        if y.requires_grad:
            y[-1].sum().backward()
            results[-1] += (field.rate.grad,)
    assert results[0][0] == results[1][0]
    assert results[0][2] == results[1][2]
    tolerance = 1e-7 if otherwise == "half" else 1e-12
    assert_close(results[0][1], results[1][1], tolerance, tolerance)
    if results[1][2]:
        assert_close(results[0][3], results[1][3], 1e-10, 1e-10)


@pytest.mark.parametrize("container", [tuple, list, lambda parts: (part for part in parts)])
@pytest.mark.parametrize("method", FIXED)
def test_tuple_states_in_any_container(container, method):
    def field(t, y):
        return container([torch.cos(t) * y[1][:2].reshape(1, 2), -y[0].sum() + 0 * y[1]])

    y0 = (torch.tensor([[0.3, 0.2]], dtype=F64), torch.tensor([1.0, 2.0, 3.0], dtype=F64))
    mine, theirs = (
        library.odeint(Recorder(field), clone_state(y0), T.flip(0), method=method)
        for library in (pycnf, torchdiffeq)
    )
    assert_close(mine, theirs, 1e-12, 1e-12)


@pytest.mark.parametrize("method", FIXED)
def test_a_field_that_asks_for_gradients_of_the_state_it_is_given(method):
    """As the likelihood code of flow matching libraries does."""

    def field(t, y):
        with torch.enable_grad():
            y.requires_grad_()
            (slope,) = torch.autograd.grad((-0.5 * y * y * (1 + t)).sum(), y)
        return slope.detach()

    results = []
    for library in (pycnf, torchdiffeq):
        y = library.odeint(field, torch.tensor([1.0, -2.0], dtype=F64), T, method=method)
        results.append((y.detach(), y.requires_grad))
    assert results[0][1] == results[1][1]
    assert_close(results[0][0], results[1][0], 1e-12, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("t_dtype", [torch.float32, F64])
@pytest.mark.parametrize("perturb", [False, True])
@pytest.mark.parametrize("method", FIXED)
def test_times_and_states_given_to_the_field(method, perturb, t_dtype, dtype):
    """A step size that fits neither the output times nor their dtype."""
    t = torch.tensor([1000.0, 1000.31, 1000.7, 1003.1], dtype=t_dtype)
    y0 = torch.tensor([0.5, -1.0, 2.0], dtype=dtype)
    options = {"step_size": 0.13, "perturb": perturb}
    records, solutions = [], []
    for library in (pycnf, torchdiffeq):
        field = Recorder(lambda t, y: torch.sin(3 * t) * y.flip(0) - 0.2 * y)
        solutions.append(library.odeint(field, y0.clone(), t, method=method, options=options))
        records.append(field)
    mine, theirs = records
    assert mine.nfe == theirs.nfe
    assert torch.equal(torch.stack(mine.times), torch.stack(theirs.times))
    tolerance = 1e-12 if dtype == F64 else 2e-5
    assert_close(solutions[0], solutions[1], tolerance, tolerance)


def test_an_exception_of_the_field_comes_through_as_it_was():
    class Mine(Exception):
        pass

    def field(t, y):
        if t > 1:
            raise Mine("from the field")
        return -y

    with pytest.raises(Mine, match="from the field"):
        pycnf.odeint(field, torch.ones(2), T.float(), method="rk4")
