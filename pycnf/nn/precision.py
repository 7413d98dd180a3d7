"""What the factors of products of matrices are rounded to, in float32 on a GPU."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

# In the order of Precision in csrc/core/mlp_solve.h.
PRECISIONS = ("float32", "tf32", "3xtf32", "bf16")


def precision_of(kind: Sequence[int]) -> str:
    """That of the ops' `kind`."""
    return PRECISIONS[kind[5]] if len(kind) > 5 else PRECISIONS[0]


def products_of_torch(precision: str) -> AbstractContextManager[None]:
    """While it is open, torch's products on a GPU are in TF32, if a precision is made of these.

    The setting is torch's, and the whole process's.
    """
    return _products_in_tf32() if "tf32" in precision else nullcontext()


@contextmanager
def _products_in_tf32() -> Iterator[None]:
    settings = torch.backends.cuda.matmul
    # torch before 2.9 has an older setting, which later ones do not take beside the newer.
    newer = getattr(settings, "fp32_precision", None) is not None
    name, wanted = ("fp32_precision", "tf32") if newer else ("allow_tf32", True)
    before = getattr(settings, name)
    setattr(settings, name, wanted)
    try:
        yield
    finally:
        setattr(settings, name, before)
