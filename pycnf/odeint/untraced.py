"""Solvers in code that is compiled by torch.compile."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def untraced(solve: Callable) -> Callable:
    """A solver that compilers leave alone: it chooses its steps by its values, so there is nothing
    to trace. One graph break, where tracing would break at every step.
    """

    @functools.wraps(solve)
    def run(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            # As a decorator of its own it would import the compiler with every `import pycnf`.
            return torch.compiler.disable(solve)(*args, **kwargs)
        return solve(*args, **kwargs)

    return run
