"""Where a solve runs and what becomes of its result: threads, worker processes, copies, pickles."""

import copy
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torchdiffeq
from problems import MLPField, as_tuple, assert_close, flat, record

import pycnf

F64 = torch.float64
T = torch.linspace(0, 1, 21, dtype=F64)
METHODS = ("dopri5", "adaptive_heun", "rk4", "implicit_adams", "trapezoid")


def initial(seed):
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(seed), dtype=F64)


def gradients(solver, seed, method):
    """Solution and gradients of a training step on a field of its own."""
    field, y0 = MLPField(F64), initial(seed).requires_grad_()
    ys = solver(field, y0, T, rtol=1e-4, atol=1e-4, method=method)
    ys[-1].pow(2).sum().backward()
    return ys.detach(), y0.grad, *(p.grad for p in field.parameters())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("solver", [pycnf.odeint, pycnf.odeint_adjoint])
def test_solves_in_several_threads_at_once(solver, method):
    """The same bits as one after the other: buffers of a solve are its own."""
    alone = [gradients(solver, seed, method) for seed in range(8)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(lambda seed: gradients(solver, seed, method), range(8)))
    finally:
        sys.setswitchinterval(interval)
    for mine, expected in zip(together, alone, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, expected, strict=True))


def test_no_grad_in_one_thread_leaves_the_others_alone():
    with ThreadPoolExecutor(1) as pool, torch.no_grad():
        loss, *_ = pool.submit(gradients, pycnf.odeint, 0, "dopri5").result()
        without = pycnf.odeint(MLPField(F64), initial(0), T, rtol=1e-4, atol=1e-4)
    assert not without.requires_grad
    assert_close(loss, without, 1e-9, 1e-10)


class Solved(torch.utils.data.Dataset):
    """Samples that are solutions, as simulators make them in the loader's workers."""

    def __len__(self):
        return 3

    def __getitem__(self, seed):
        return pycnf.odeint(MLPField(F64), initial(seed), T, rtol=1e-4, atol=1e-4).detach()


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has both ways to start a worker")
def test_solves_in_the_workers_of_a_loader(start):
    dataset = Solved()
    alone = [dataset[i] for i in range(3)]
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=None, num_workers=1, multiprocessing_context=start, timeout=120
    )
    assert all(torch.equal(a, b) for a, b in zip(loader, alone, strict=True))


def pair(t, state):
    return -state[0] * (1 + t), torch.cos(t) + 0 * state[1]


@pytest.mark.parametrize(
    "twin", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
@pytest.mark.parametrize("tuple_state", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_copies_and_pickles_of_a_solution(method, tuple_state, twin):
    """A solution is as independent of the solve, and as large in a pickle, as torchdiffeq's."""
    y0 = (initial(0), initial(1)[0]) if tuple_state else initial(0)
    field = pair if tuple_state else MLPField(F64)
    mine, theirs = (
        record(library, field, y0, T, rtol=1e-3, atol=1e-3, method=method).ys
        for library in (pycnf, torchdiffeq)
    )
    assert_close(twin(mine), theirs, 1e-6, 1e-6)
    for a, b in zip(as_tuple(mine), as_tuple(theirs), strict=True):
        assert (a.stride(), a.is_leaf) == (b.stride(), b.is_leaf)
        assert a.untyped_storage().nbytes() == b.untyped_storage().nbytes()
    again = twin(mine)
    if twin is not copy.copy:
        with torch.no_grad():
            for part in as_tuple(mine):
                part.zero_()
        assert not torch.equal(flat(again), flat(mine))


def test_pickled_and_copied_fields_solve_the_same():
    field = MLPField(F64)
    ys = pycnf.odeint_adjoint(field, initial(0), T, rtol=1e-4, atol=1e-4)
    for twin in (copy.deepcopy(field), pickle.loads(pickle.dumps(field))):
        assert torch.equal(pycnf.odeint_adjoint(twin, initial(0), T, rtol=1e-4, atol=1e-4), ys)
