"""Compiled part of pycnf; importing it registers the ops of `torch.ops.pycnf`."""

from collections.abc import Callable, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor

class TableauDict(TypedDict):
    name: str
    order: int
    stages: int
    adaptive: bool
    solution_is_last_stage: bool
    c: list[float]
    a: list[list[float]]
    b: list[float]
    e: list[float]
    m: list[float]

torch_version: str
torch_cuda: str
with_cuda: bool
attempt_fields: list[str]
report_numbers: int
flow_fields: list[str]
flow_report_numbers: int

class WhileGraph:
    """Recorded attempts as one launch; only where pycnf was built with CUDA."""

    def __init__(self, one_attempt: int, done: Tensor, failure: Tensor) -> None: ...
    def launch(self) -> None: ...

def tableaux() -> list[TableauDict]: ...
def instruction_set() -> str: ...
def parallel_info() -> str: ...
def rk_stage(
    y0: Tensor, k: Tensor, flip: bool, fresh: Sequence[Tensor], weights: Sequence[float], h: float
) -> Tensor: ...
def rk_finish(
    y0: Tensor,
    k: Tensor,
    flip: bool,
    fresh: Sequence[Tensor],
    y1: Tensor,
    solution: Sequence[float],
    error: Sequence[float],
    h: float,
    rtol: Tensor,
    atol: Tensor,
    segments: Sequence[int],
    ratio: Tensor | None,
) -> Tensor: ...
def rk_combine(
    y: Tensor,
    k: Sequence[Tensor],
    weights: Sequence[float],
    h: float,
    h_graph: Tensor | None = None,
    ordered: bool = False,
) -> Tensor: ...
def pull_back(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    create_graph: bool,
) -> list[Tensor | None]: ...
def time_tensors(
    values: Sequence[float], dtype: torch.dtype, device: torch.device
) -> list[Tensor]: ...
def grid_steps(
    func: Callable[[Tensor, Any], Any],
    shapes: Sequence[Sequence[int]] | None,
    y0: Tensor,
    a: Sequence[Sequence[float]],
    b: Sequence[float],
    c: Sequence[float],
    grid: Sequence[float],
    outputs: Sequence[float],
    time_dtype: torch.dtype,
    sign: float,
    ends_on_grid: bool,
    perturb: bool,
    solution: Tensor,
    states: list[Tensor] | None,
) -> tuple[int, Tensor, int, Tensor, Any]: ...
