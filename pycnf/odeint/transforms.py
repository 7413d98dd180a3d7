"""Reading tensors from the inside of torch.func's transforms.

Under vmap a tensor stands for a batch and has no value of its own; a solver that must know whether
anything is left to do reads the tensor beneath all wrappers, for the whole batch at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad

_functorch = torch._C._functorch


def transforming() -> bool:
    """Whether a torch.func transform or forward-mode differentiation is at work."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def beneath(x: Tensor) -> tuple[Tensor, list[int]]:
    """The tensor beneath all wrappers, its batch dimensions in front, and the levels of the vmaps
    that these belong to, outermost first.
    """
    levels: list[int] = []
    while _functorch.is_functorch_wrapped_tensor(x):
        inner = _functorch.get_unwrapped(x)
        if _functorch.is_batchedtensor(x):
            inner = inner.movedim(_functorch.maybe_get_bdim(x), 0)
            levels.insert(0, _functorch.maybe_get_level(x))
        x = inner
    return x, levels


@dataclass(frozen=True)
class Element:
    """One element of a batch of solves.

    Attributes:
        sizes: of all batch dimensions, vmap's first, outermost first.
        index: into these.
        levels: of the vmaps.
    """

    sizes: tuple[int, ...]
    index: tuple[int, ...]
    levels: tuple[int, ...]

    def __str__(self) -> str:
        """Where it is, as an addition to a message; nothing if it is the only one."""
        if not self.sizes:
            return ""
        flat = 0
        for size, i in zip(self.sizes, self.index):
            flat = flat * size + i
        return f" (element {flat} of a batch of {math.prod(self.sizes)})"

    def of(self, x: Tensor) -> Tensor:
        """Its part of a tensor with the same leading dimensions and no vmap of its own."""
        inner, levels = beneath(x.detach())
        at = dict(zip(self.levels, self.index))
        return inner[(*(at[level] for level in levels), *self.index[len(self.levels) :])]


def first_true(mask: Tensor) -> Element | None:
    """The first element for which a mask, one value an element, is true."""
    inner, levels = beneath(mask)
    if not inner.any():
        return None
    flat = int(inner.reshape(-1).int().argmax())
    index: list[int] = []
    for size in reversed(inner.shape):
        flat, i = divmod(flat, size)
        index.insert(0, i)
    return Element(tuple(inner.shape), tuple(index), tuple(levels))


def read_flags(flags: Sequence[Tensor]) -> tuple[list[bool], list[bool]]:
    """Whether each of some masks is true anywhere, and everywhere; one read for all of them."""
    inner, levels = beneath(torch.stack(list(flags)))
    rows = inner.movedim(len(levels), 0).reshape(len(flags), -1)
    anywhere, everywhere = torch.stack([rows.any(1), rows.all(1)]).tolist()
    return anywhere, everywhere


def largest(x: Tensor) -> float:
    """The largest value of any element."""
    return beneath(x.detach())[0].max().item()
