"""Compiled part of pycnf; importing it registers the ops of `torch.ops.pycnf`."""

from typing import TypedDict

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

def tableaux() -> list[TableauDict]: ...
def instruction_set() -> str: ...
def parallel_info() -> str: ...
