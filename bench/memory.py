"""Peak memory of a training step as accepted steps grow.

Every number is a child process of its own: the largest resident set during the step, so whatever
allocator is used counts, less what was resident just before, inputs ready. The number of steps is
set by the largest step size.

What a discrete gradient cannot do without is the state at the beginning of every accepted step,
B·D numbers; the last column is what a further step costs in units of that.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import pycnf
from bench.harness import OURS, Options, missing
from bench.peers import TorchdiffeqField

_FEATURES, _HIDDEN, _BATCH = 64, (64, 64, 64), 4096
_FORGET = Path("/proc/self/clear_refs")
_STATE_BYTES = 4 * _BATCH * _FEATURES
_KEPT, _TAPE = f"{OURS}, default keep_bytes", f"{OURS}, keep_bytes = 0"
_ADJOINT, _BACKWARD = "torchdiffeq odeint_adjoint", "torchdiffeq odeint + backward"
_STEPS = {  # the graph of more steps would not fit into the memory of a small machine
    _TAPE: (64, 256, 768),
    _KEPT: (64, 256, 768),
    _ADJOINT: (16, 64),
    _BACKWARD: (4, 16),
}


@dataclass
class Peak:
    """Peak memory of one contender with one number of steps; `each` is bytes per further step."""

    case: str
    contender: str
    steps: int
    peak_bytes: int
    each: float | None

    def cells(self) -> dict[str, str]:
        """The columns of the table."""
        per_step = "" if self.each is None else f"{self.each / _STATE_BYTES:.2f}"
        return {
            "case": self.case,
            "solver": self.contender,
            "accepted steps": str(self.steps),
            "peak": f"{self.peak_bytes / 2**20:.0f} MiB",
            "further step, × B·D numbers": per_step,
        }


def _measure(contender: str, steps: int) -> dict[str, int]:
    """In a child process: accepted steps, and bytes that the largest resident set grew by."""
    torch.manual_seed(0)
    field = pycnf.nn.MLP(_FEATURES, _HIDDEN)
    x = torch.randn(_BATCH, _FEATURES)
    probe = torch.randint(0, 2, (_BATCH, _FEATURES)).to(x) * 2 - 1
    sizes = {"first_step": 1 / steps, "max_step": 1 / steps}
    # Threads and the code of the libraries are there before.
    (torch.rand(64, 64, requires_grad=True) @ torch.rand(64, 64)).sum().backward()
    _forget_peak()
    before = _peak_bytes()
    if contender in (_KEPT, _TAPE):
        flow = pycnf.CNF(field, options=sizes, engine="fused")
        if contender == _TAPE:
            flow.keep_bytes = 0
        (-flow.log_prob(x, probe=probe.unsqueeze(0)).mean()).backward()
        accepted = flow.stats.accepted
    else:
        import torchdiffeq

        solve = getattr(torchdiffeq, "odeint_adjoint" if contender == _ADJOINT else "odeint")
        dynamics = TorchdiffeqField(field, probe)
        start, times = (x, torch.zeros(_BATCH)), torch.tensor([1.0, 0.0])
        z, change = solve(
            dynamics, start, times, rtol=1e-5, atol=1e-5, method="dopri5", options=sizes
        )
        accepted = (dynamics.calls - 1) // 6
        (0.5 * z[-1].square().sum(-1) + change[-1]).mean().backward()
    return {"steps": accepted, "peak_bytes": _peak_bytes() - before}


def _forget_peak() -> None:
    """Linux then counts the largest resident set from here, elsewhere it stays that of imports."""
    if _FORGET.exists():
        _FORGET.write_text("5")


def _peak_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def run(options: Options) -> Iterator[Peak | str]:
    """Rows of pycnf with and without kept stages, and of torchdiffeq's two ways."""
    widths = "-".join(str(width) for width in _HIDDEN)
    case = f"training step, D={_FEATURES}, {widths} tanh, B={_BATCH}, dopri5"
    if not options.has(case):
        return
    absent = missing("torchdiffeq", "torchdiffeq")
    if absent is not None:
        yield absent
    for contender, counts in _STEPS.items():
        if absent is not None and contender in (_ADJOINT, _BACKWARD):
            continue
        last = None
        for count in counts:
            command = [sys.executable, "-m", "bench.memory", contender, str(count)]
            child = subprocess.run(command, check=True, capture_output=True, text=True)
            found = json.loads(child.stdout)
            each = None
            if last is not None:
                grown = found["peak_bytes"] - last["peak_bytes"]
                each = grown / (found["steps"] - last["steps"])
            yield Peak(case, contender, found["steps"], found["peak_bytes"], each)
            last = found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="One measurement, for `run` to read.")
    parser.add_argument("contender", choices=_STEPS)
    parser.add_argument("steps", type=int)
    arguments = parser.parse_args()
    print(json.dumps(_measure(arguments.contender, arguments.steps)))
