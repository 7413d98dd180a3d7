"""The compiled part: that it loads, that it fits the torch at hand, and what it was built for."""

from __future__ import annotations

from typing import TypedDict

import torch

_REBUILD = (
    "rebuild it against this torch, from pycnf's folder: "
    "pip install --no-build-isolation --force-reinstall --no-deps ."
)


class BuildInfo(TypedDict):
    """What `build_info` tells."""

    version: str
    torch: str
    torch_compiled_against: str
    cuda: str | None
    instruction_set: str
    threads: int


def check_torch(compiled: tuple[str, str], running: tuple[str, str]) -> None:
    """Compares (torch version, its CUDA version or "") at build time and now.

    Raises:
        ImportError: they differ.
    """
    if compiled != running:
        then, now = (
            f"torch {v}" + (f" with CUDA {c}" if c else "") for v, c in (compiled, running)
        )
        raise ImportError(f"pycnf was compiled against {then}, but this is {now}; {_REBUILD}")


_RUNNING = (torch.__version__, torch.version.cuda or "")

try:
    from pycnf import _C
except ImportError as error:
    raise ImportError(
        f"the compiled part of pycnf does not load with torch {_RUNNING[0]} ({error}); {_REBUILD}"
    ) from error

check_torch((_C.torch_version, _C.torch_cuda), _RUNNING)


def build_info() -> BuildInfo:
    """What this copy of pycnf was compiled for and what it uses here.

    `cuda` is the CUDA version of the compiled kernels, None without; `instruction_set` is what the
    CPU kernels run with (the environment variable ATEN_CPU_CAPABILITY = default, avx2 or avx512
    forces one); `threads` is torch's.

    Example:
        >>> import pycnf
        >>> pycnf.build_info()["instruction_set"] in ("baseline", "avx2", "avx512")
        True
    """
    from pycnf import __version__

    return BuildInfo(
        version=__version__,
        torch=torch.__version__,
        torch_compiled_against=_C.torch_version,
        cuda=_C.torch_cuda if _C.with_cuda else None,
        instruction_set=_C.instruction_set(),
        threads=torch.get_num_threads(),
    )
