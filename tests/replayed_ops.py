"""A stand-in for CUDA graphs on a CPU: work is done as written, then written down operation by
operation, and from then on these operations are repeated on the memory that they had.
"""

import importlib
from typing import ClassVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pycnf import reference

recording = importlib.import_module("pycnf.odeint.recording")
explicit_grid = importlib.import_module("pycnf.odeint.explicit_grid")
PLACES = ("pycnf.odeint.replay", "pycnf.odeint.grid_replay", "pycnf.flows.captured")


class _Listening(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        results = operation(*args, **(kwargs or {}))
        self.operations.append((operation, args, kwargs or {}, results))
        return results


class Recorded:
    """Stands in for `pycnf.odeint.recording.Recorded`; `count` says how often which was done."""

    count: ClassVar = {"written": 0, "recorded": 0, "replayed": 0}

    def __init__(self, work, device):
        self.work, self.warm = work, False
        self.operations = self.graph = self.random = None

    def __call__(self):
        if not self.warm:
            self.count["written"] += 1
            self.work()
            self.warm = True
        elif self.operations is None:
            self.count["recorded"] += 1
            listening = _Listening()
            try:
                with listening:
                    self.work()
            except RuntimeError as error:
                raise recording.NotCaptured(str(error).partition("\n")[0]) from error
            self.operations = listening.operations
        else:
            self.count["replayed"] += 1
            self._replay()

    @torch.no_grad()
    def _replay(self):
        for operation, args, kwargs, results in self.operations:
            again = operation(*args, **kwargs)
            for place, value in zip(tree_leaves(results), tree_leaves(again)):
                if isinstance(place, torch.Tensor) and place.data_ptr() != value.data_ptr():
                    place.detach().copy_(value)


def combine(y0, k, weights, h, h_graph=None):
    return reference.rk_combine(y0, k, weights, h)


def stand_in(monkeypatch):
    """Has solves recorded on the CPU; returns the counts."""
    for place in PLACES:
        monkeypatch.setattr(importlib.import_module(place), "Recorded", Recorded)
    for place in ("pycnf.odeint.recording", "pycnf.flows.captured"):
        monkeypatch.setattr(importlib.import_module(place), "_DEVICES", ("cpu", "cuda"))
    # The loop of a grid, and its op, are called past the dispatcher, where nothing is written down.
    monkeypatch.setattr(explicit_grid, "has_kernels", lambda dtype, device: False)
    monkeypatch.setattr(explicit_grid, "combine", combine)
    Recorded.count = dict.fromkeys(Recorded.count, 0)
    return Recorded.count
