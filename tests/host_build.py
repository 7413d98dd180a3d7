"""Builds csrc/cuda, and the ops that csrc/torch has for it, as plain C++ for a host: what
tests/cuda_host/cuda_runtime.h and tests/cuda_host/ops tell.
"""

import contextlib
import hashlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
CSRC, SHIM = ROOT / "csrc", ROOT / "tests" / "cuda_host"
OPS = SHIM / "ops"
# Rounded as on the GPU: -ffp-contract=off is nvcc's -fmad=false. Groups of elements are read and
# written in ways that C++ leaves undefined and nvcc does not. The shim has what a sanitizer calls,
# so its library is not linked. The kernels' ending is not C++'s, hence "-x".
KERNEL_FLAGS = [
    "-std=c++20", "-O2", "-ffp-contract=off", "-fno-strict-aliasing", "-fPIC",
    "-fsanitize=alignment", f"-I{SHIM}", f"-I{CSRC}", "-x", "c++",
]  # fmt: skip


def find_compiler():
    return shutil.which(os.environ.get("CXX", "g++"))


def run(*command):
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"this does not compile for a host: {command}\n{result.stderr}")
    return result.stdout


def digest(*parts):
    state = hashlib.sha256()
    for part in parts:
        content = part.read_bytes() if isinstance(part, Path) else str(part).encode()
        state.update(b"%d " % len(content) + content)
    return state.hexdigest()[:16]


@contextlib.contextmanager
def locked(folder):
    """One process at a time: others wait, and then find what the first has left."""
    import fcntl

    with open(folder / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Builder:
    """Keeps what it compiles in a folder, by a hash of what it is made of."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.compiler = find_compiler()
        headers = [*CSRC.rglob("*.h"), *CSRC.rglob("*.cuh"), *SHIM.rglob("*.h")]
        version = run(self.compiler, "--version")
        self.common = digest(version, torch.__version__, *sorted(headers))

    def _name(self, path, key):
        return self.folder / f"{path.relative_to(ROOT).as_posix().replace('/', '-')}-{key}.o"

    def _compile(self, job):
        source, flags = job
        result = self._name(source, digest(self.common, source.read_bytes(), *flags))
        if not result.exists():
            for other in self.folder.glob(self._name(source, "*").name):
                other.unlink()
            # Nobody finds half a file, even if this process ends here.
            unfinished = result.with_suffix(".part")
            run(self.compiler, *flags, "-c", source, "-o", unfinished)
            unfinished.rename(result)
        return result

    def library(self, name, jobs, *flags):
        """The path of a shared library of pairs (source, flags)."""
        with locked(self.folder):
            with ThreadPoolExecutor(2) as pool:
                objects = list(pool.map(self._compile, jobs))
            result = self.folder / f"{name}-{digest(*sorted(objects), *flags)}.so"
            if not result.exists():
                for other in self.folder.glob(f"{name}-*.so"):
                    other.unlink()
                unfinished = result.with_suffix(".part")
                run(self.compiler, "-shared", *objects, *flags, "-o", unfinished)
                unfinished.rename(result)
            return result


def kernel_sources():
    """The kernels and what they run on."""
    sources = set((CSRC / "cuda").glob("*.cu"))
    # All of it is the runtime's: there are no graphs here.
    sources.remove(CSRC / "cuda" / "while_graph.cu")
    return [*sorted(sources), SHIM / "fiber.cpp", SHIM / "grid.cpp"]


def build_kernels(folder):
    """The kernels with functions of C to call them by."""
    sources = [*kernel_sources(), *SHIM.glob("*.cu"), SHIM / "entry.cpp"]
    jobs = [(source, KERNEL_FLAGS) for source in sources]
    return Builder(folder).library("kernels", jobs)


def build_ops(folder):
    """The kernels with csrc/torch's ops for them, as torch.ops.pycnf_cuda_host."""
    from torch.utils import cpp_extension

    # Most of the time goes to torch's headers, and little to these sources.
    flags = ["-std=c++20", "-O1", "-fPIC", f"-I{OPS}", f"-I{SHIM}", f"-I{CSRC}"]
    # So few that the tangents of small cases take turns.
    flags.append("-DPYCNF_TANGENT_NUMBERS=4000")
    flags += [f"-isystem{path}" for path in cpp_extension.include_paths()]
    ops = [*sorted((CSRC / "torch").glob("*_cuda.cpp")), CSRC / "torch" / "schema.cpp"]
    # The slowest first.
    jobs = [
        *((source, [*flags, "-include", "standin.h"]) for source in ops),
        (OPS / "device.cpp", flags),
        *((source, KERNEL_FLAGS) for source in kernel_sources()),
    ]
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
    # Its functions have the names of those in pycnf._C, which is there too.
    own = ["-Wl,-Bsymbolic"]
    return Builder(folder).library("ops", jobs, *own, *libraries, "-lc10", "-ltorch_cpu")
