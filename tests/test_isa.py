"""One kernel source, one object per instruction set: same results, no shared symbols, no torch."""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pycnf

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / f"{sys.implementation.cache_tag}-torch{torch.__version__}"
X86 = platform.machine() in ("x86_64", "AMD64")
# ATEN_CPU_CAPABILITY and what build_info calls it.
SETS = {"default": "baseline", "avx2": "avx2", "avx512": "avx512"}

needs_source = pytest.mark.skipif(not CSRC.is_dir(), reason="installed without its source")
needs_build = pytest.mark.skipif(not BUILD.is_dir(), reason=f"there is no build folder {BUILD}")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


# ---- the same results ----------------------------------------------------------------------------


def machine_has(capability):
    if capability == "default":
        return True
    if not X86:
        return False
    flags = set()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        flags = set(re.search(r"^flags\s*:(.*)$", cpuinfo.read_text(), re.MULTILINE)[1].split())
    return (
        flags
        >= {
            "avx2": {"avx2", "fma"},
            "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "fma"},
        }[capability]
    )


AVAILABLE = [capability for capability in SETS if machine_has(capability)]

# Runs every kernel on states around the block length, and saves what comes out.
PROGRAM = """
import sys
import torch
import pycnf
from pycnf import _C
from pycnf.odeint.tableau import TABLEAUX

ops = torch.ops.pycnf
generator = torch.Generator().manual_seed(0)
tolerance = torch.tensor(1e-3, dtype=torch.float64)
exact, rounded = [], []
for dtype in (torch.float32, torch.float64):
    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)

    for size in (1, 7, 16, 255, 256, 257, 1003, 9001):
        for name in ("dopri5", "tsit5", "dopri8"):
            tableau = TABLEAUX[name]
            y0, y1, fresh = normal(size), normal(size), normal(size)
            k = normal(tableau.stages, size)
            ratio, out = torch.empty_like(y0), torch.empty(3, size, dtype=dtype)
            segments = [0, size // 2 + 1, size // 2 + 1, size]
            each = tolerance * (1 + normal(size).abs().double())
            exact += [_C.rk_stage(y0, k, False, [fresh], row, 0.3) for row in tableau.a[1:]]
            exact.append(
                _C.rk_finish(
                    y0, k, False, [fresh], y1, tableau.b, tableau.e, 0.3, tolerance, tolerance,
                    segments, ratio,
                )
            )
            exact += [y1, ratio.clone(), k]
            exact.append(
                _C.rk_finish(
                    y0, k, True, [], y1, [], tableau.e, 0.3, each, tolerance, segments, ratio
                )
            )
            exact.append(ratio)
            ops.rk_interpolate(y0, y1, k, False, tableau.m, 0.3, [0.1, 0.5, 0.97], out)
            exact.append(out)
            for f1 in (None, fresh):
                exact.append(ops.rk_initial_norms(y0, y1, f1, tolerance, each, segments))
            exact.append(ops.rk_combine(y0, [y1, fresh], [0.3, 0.7], 0.3))
    keys = ops.probe_keys(normal(500, 3))
    exact += [keys, ops.probe_sample(keys, 5, 2, 131, False, dtype)]
    rounded.append(ops.probe_sample(keys, 5, 2, 131, True, dtype))
torch.save((pycnf.build_info()["instruction_set"], exact, rounded), sys.argv[1])
"""


def run(capability, path):
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-c", PROGRAM, str(path)],
        env=environment, check=True, timeout=300, cwd=ROOT,
    )  # fmt: skip
    return torch.load(path)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("isa")
    return {capability: run(capability, folder / capability) for capability in AVAILABLE}


@pytest.mark.parametrize("capability", SETS)
def test_the_environment_chooses(results, capability):
    if capability not in AVAILABLE:
        pytest.skip(f"this machine has no {capability}")
    assert results[capability][0] == SETS[capability]


@pytest.mark.parametrize("capability", [name for name in SETS if name != "default"])
def test_instruction_sets_agree(results, capability):
    """Bit by bit: a sum contracted to a fused multiply-add would show."""
    if capability not in AVAILABLE:
        pytest.skip(f"this machine has no {capability}")
    _, expected, expected_rounded = results["default"]
    _, exact, rounded = results[capability]
    assert len(exact) > 400
    for a, b in zip(expected, exact, strict=True):
        assert a.isfinite().all()
        assert torch.equal(a, b)
    for a, b in zip(expected_rounded, rounded, strict=True):
        tolerance = 4 * torch.finfo(a.dtype).eps
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# Tests of the fused engine, and those that would not see another instruction set.
OF_THE_FUSED_ENGINE = {
    "tests/test_cnf_fused.py": "",
    "tests/test_mlp_ops.py": "not (gradcheck or gradgradcheck or opcheck or bad or third)",
}


@pytest.mark.parametrize("capability", [name for name in AVAILABLE if name != AVAILABLE[-1]])
@pytest.mark.parametrize("tests", OF_THE_FUSED_ENGINE)
def test_the_fused_engine_is_right_on_every_instruction_set(capability, tests):
    """The newest one is this process's own."""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests]
    subprocess.run(
        [*command, "-k", OF_THE_FUSED_ENGINE[tests]],
        env=environment, check=True, timeout=600, cwd=ROOT,
    )  # fmt: skip


def test_this_process_uses_what_torch_uses():
    capability = torch.backends.cpu.get_cpu_capability()
    expected = {"AVX512": "avx512", "AVX2": "avx2"}.get(capability, "baseline")
    assert pycnf.build_info()["instruction_set"] == expected


# ---- the objects ---------------------------------------------------------------------------------


def symbols(*files):
    """(type, name) of every symbol."""
    lines = subprocess.run(
        ["nm", "--format=posix", *map(str, files)], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    return [(fields[1], fields[0]) for fields in map(str.split, lines) if len(fields) > 1]


# Of each source: the table that it defines, and the name of a kernel.
SOURCES = {
    "kernels_isa": ("8kKernels", "interpolate"),
    "mlp_isa": ("11kMlpKernels", "attempt_step"),
}
each_source = pytest.mark.parametrize("source", SOURCES)


def kernel_object(isa, source):
    (found,) = (BUILD / "CMakeFiles" / f"kernels_{isa}.dir").rglob(f"{source}.cpp.o")
    return found


def check_symbols(found, isa, source):
    """A weak or unique definition could be the copy that the linker keeps for every machine."""
    defined = [(kind, name) for kind, name in found if kind not in "Uwv"]
    shared = [name for kind, name in defined if kind in "WVu"]
    assert not shared
    assert [name for kind, name in defined if kind.isupper()] == [
        f"_ZN5pycnf{mangled(isa)}{SOURCES[source][0]}E"
    ]
    # What is left to the linker is C, never a C++ function that another object might define.
    assert not [name for kind, name in found if kind == "U" and name.startswith("_Z")]
    kernels = [name for _, name in defined if SOURCES[source][1] in name]
    assert len(kernels) >= 2, "these are not the kernels"


def mangled(isa):
    return f"{len('cpu_' + isa)}cpu_{isa}"


@needs_build
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
@pytest.mark.parametrize("isa", SETS.values() if X86 else ["baseline"])
@each_source
def test_kernel_objects_share_no_symbols(isa, source):
    check_symbols(symbols(kernel_object(isa, source)), isa, source)


@needs_build
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
@pytest.mark.skipif(not X86, reason="x86 objects")
@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
@pytest.mark.parametrize(("isa", "register"), [("avx2", "%ymm"), ("avx512", "%zmm")])
@each_source
def test_kernel_objects_use_their_registers(isa, register, source):
    """The wide registers appear in their object, and in none below it."""
    order = list(SETS.values())
    for other in order:
        code = subprocess.run(
            ["objdump", "-d", "--no-show-raw-insn", str(kernel_object(other, source))],
            check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
        assert (register in code) == (order.index(other) >= order.index(isa)), other


# ---- the walls -----------------------------------------------------------------------------------

# What a folder may include beside the standard library.
ALLOWED = {"core": {"core"}, "cpu": {"core", "cpu"}, "cuda": {"core", "cuda"}}


@needs_source
@pytest.mark.parametrize("folder", ALLOWED)
def test_sources_include_no_torch(folder):
    files = [
        path for path in (CSRC / folder).iterdir() if path.suffix in (".h", ".cuh", ".cpp", ".cu")
    ]
    assert files
    for path in files:
        text = path.read_text()
        for quoted in re.findall(r'#\s*include\s*"([^"]+)"', text):
            assert quoted.split("/")[0] in ALLOWED[folder], f"{path.name} includes {quoted}"
            assert (CSRC / quoted).exists()
        for system in re.findall(r"#\s*include\s*<([^>]+)>", text):
            assert not re.match(r"(torch|ATen|c10|pybind11)\b|Python\.h", system), path.name
        assert not re.search(r"\b(at|c10|torch)::", re.sub(r"//.*", "", text)), path.name


def compile_kernels(tmp_path, source, *flags, isa="baseline"):
    """As the build does for one set, without an include path but ours."""
    target = tmp_path / f"{isa}.o"
    command = [
        "g++", "-std=c++20", f"-I{CSRC}", f"-DPYCNF_ISA=cpu_{isa}", "-Wall", "-Wextra", "-Werror",
        "-Wno-psabi", *flags, "-c", str(CSRC / "cpu" / f"{source}.cpp"), "-o", str(target),
    ]  # fmt: skip
    subprocess.run(command, check=True, timeout=300)
    return target


@needs_source
@needs_compiler
@each_source
def test_kernels_compile_without_torch(tmp_path, source):
    target = compile_kernels(tmp_path, source, "-O1")
    if shutil.which("nm"):
        check_symbols(symbols(target), "baseline", source)


@needs_source
@needs_compiler
@pytest.mark.parametrize(
    "header",
    # activation.h is for the namespaces that have what it asks for.
    sorted({path.name for path in (CSRC / "core").glob("*.h")} - {"activation.h"}),
)
def test_core_headers_stand_alone(header):
    command = ["g++", "-std=c++20", f"-I{CSRC}", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
    # Formulas with internal linkage may go unused in a file of their own.
    command += ["-Wno-unused-function", "-x", "c++", "-"]
    subprocess.run(command, input=f'#include "core/{header}"\n', text=True, check=True, timeout=120)
