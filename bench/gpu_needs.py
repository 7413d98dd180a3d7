"""Prints what building and testing pycnf with CUDA lacks here, a line each; fails if there is any.

It runs before pycnf is built, so it imports neither pycnf nor the other benchmarks.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

# pyproject.toml's licence is spelled as setuptools reads it from this version on.
_SETUPTOOLS = 77


def lacking() -> Iterator[str]:
    """A line for everything that is not there."""
    for package in ("torch", "numpy", "pytest"):
        if importlib.util.find_spec(package) is None:
            yield f"the Python package {package}"
    try:
        version = importlib.metadata.version("setuptools")
    except importlib.metadata.PackageNotFoundError:
        version = "0"
    if int(version.split(".")[0]) < _SETUPTOOLS:
        found = "none" if version == "0" else version
        yield f"the Python package setuptools, at least {_SETUPTOOLS} (found {found})"
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    for program in ("cmake", "ninja", "g++"):
        if shutil.which(program, path=path) is None:
            yield f"the program {program}"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        yield f"Python.h in {sysconfig.get_path('include')} (python3-dev)"
    yield from _lacking_of_torch()


def _lacking_of_torch() -> Iterator[str]:
    if importlib.util.find_spec("torch") is None:
        return
    import torch
    from torch.utils import cpp_extension

    if torch.version.cuda is None:
        yield f"a torch with CUDA (found {torch.__version__})"
    home = cpp_extension.CUDA_HOME
    if shutil.which("nvcc") is None and not (home and (Path(home) / "bin" / "nvcc").exists()):
        yield "the program nvcc, on PATH or in CUDA_HOME"
    includes = cpp_extension.include_paths()
    headers = any((Path(folder) / "pybind11" / "pybind11.h").exists() for folder in includes)
    if not headers and importlib.util.find_spec("pybind11") is None:
        yield "the Python package pybind11"


if __name__ == "__main__":
    found = list(lacking())
    print("\n".join(found), end="\n" if found else "", file=sys.stderr)
    sys.exit(bool(found))
