"""A thin driver: finds torch, CUDA and Ninja, and lets CMake do the rest (see CMakeLists.txt).

Environment: PYCNF_CUDA=0|1 forces the CUDA part off or on, TORCH_CUDA_ARCH_LIST chooses its
targets, DEBUG=1 builds with debug information, CMAKE_ARGS is passed on.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def find_program(name: str) -> str:
    """The program from this environment (pip installs cmake and ninja there), else from PATH."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    found = shutil.which(name, path=path)
    if found is None:
        raise SystemExit(f"pycnf needs {name} to build: pip install {name}")
    return found


def import_torch():
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        raise SystemExit(
            "pycnf compiles against the torch it will run with, so torch must be there first: "
            "install torch, then pip install --no-build-isolation ."
        ) from error
    return torch, cpp_extension


def wants_cuda(torch, cpp_extension) -> bool:
    """PYCNF_CUDA decides; otherwise CUDA is built when torch has it and nvcc is found."""
    wish = os.environ.get("PYCNF_CUDA", "")
    if wish not in ("", "0", "1"):
        raise SystemExit(f"PYCNF_CUDA must be 0 or 1, got {wish!r}")
    if wish == "0":
        return False
    nvcc = find_nvcc(cpp_extension)
    if wish == "1" and torch.version.cuda is None:
        raise SystemExit(f"PYCNF_CUDA=1, but torch {torch.__version__} was built without CUDA")
    if wish == "1" and nvcc is None:
        raise SystemExit("PYCNF_CUDA=1, but nvcc was not found; set CUDA_HOME")
    return torch.version.cuda is not None and nvcc is not None


def find_nvcc(cpp_extension) -> str | None:
    home = cpp_extension.CUDA_HOME
    if home and (Path(home) / "bin" / "nvcc").exists():
        return str(Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc")


def cuda_architectures() -> str:
    """TORCH_CUDA_ARCH_LIST in CMake's spelling; by default the GPU generations that torch itself
    serves.
    """
    wish = os.environ.get("TORCH_CUDA_ARCH_LIST", "8.0 9.0+PTX")
    result = []
    for arch in wish.replace(";", " ").split():
        number, _, suffix = arch.partition("+")
        number = number.replace(".", "")
        result.append(number if suffix == "PTX" else f"{number}-real")
    return ";".join(result)


def pybind11_include(torch_includes: list[str]) -> str:
    """torch's own pybind11 first: a copy with other internals cannot exchange torch's types."""
    for folder in torch_includes:
        if (Path(folder) / "pybind11" / "pybind11.h").exists():
            return folder
    try:
        import pybind11
    except ImportError:
        raise SystemExit("pycnf needs pybind11 to build: pip install pybind11") from None
    return pybind11.get_include()


class CMakeBuild(build_ext):
    """Configures and builds with CMake and Ninja; the build folder is kept, so the next build is
    incremental.
    """

    def build_extension(self, ext: Extension) -> None:
        torch, cpp_extension = import_torch()
        cuda = wants_cuda(torch, cpp_extension)
        includes = cpp_extension.include_paths()
        target = Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        build = ROOT / "build" / f"{sys.implementation.cache_tag}-torch{torch.__version__}"
        build.mkdir(parents=True, exist_ok=True)
        debug = os.environ.get("DEBUG", "0") not in ("", "0")
        cmake = find_program("cmake")
        configure = [
            cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={find_program('ninja')}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if debug else 'Release'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DPYCNF_TORCH_INCLUDE={';'.join(includes)}",
            f"-DPYCNF_TORCH_LIB={';'.join(cpp_extension.library_paths())}",
            f"-DPYCNF_PYBIND11_INCLUDE={pybind11_include(includes)}",
            f"-DPYCNF_TORCH_VERSION={torch.__version__}",
            f"-DPYCNF_TORCH_CUDA={torch.version.cuda or ''}",
            f"-DPYCNF_WITH_CUDA={'ON' if cuda else 'OFF'}",
        ]  # fmt: skip
        if cuda:
            configure += [
                f"-DCMAKE_CUDA_COMPILER={find_nvcc(cpp_extension)}",
                f"-DPYCNF_CUDA_ARCHITECTURES={cuda_architectures()}",
            ]
        configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(build)], check=True)
        target.mkdir(parents=True, exist_ok=True)
        subprocess.run([cmake, "--install", str(build), "--prefix", str(target)], check=True)


setup(
    ext_modules=[Extension("pycnf._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    # An editable install as a path: with setuptools' finder, which comes last, a program run beside
    # the clone would take the clone's own folder, named pycnf too, for the package.
    options={"editable_wheel": {"mode": "compat"}},
)
