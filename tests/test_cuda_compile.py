"""The CUDA sources compile, on machines without a GPU and, as far as g++ can tell, without nvcc.

Nothing here runs them; tests/test_cuda_host.py, tests/test_cuda_ops_host.py and, on a GPU,
tests/test_cuda.py do.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
STEPPING = [source for source in SOURCES if source.name.startswith("rk_")]
TARGETS = ("80", "90")
TENSOR = ("mlp_tf32", "mlp_3xtf32", "mlp_bf16")
TORCH = ROOT / "csrc" / "torch"
TORCH_SOURCES = [*sorted(TORCH.glob("*_cuda.cpp")), TORCH / "while_graph.cpp"]

by_name = pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)


def find_nvcc():
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def find_cuda_include():
    """The folder of the toolkit's headers: beside nvcc, or as pip installs it."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    if nvcc := find_nvcc():
        homes.append(str(Path(nvcc).resolve().parents[1]))
    folders = [Path(home) / "include" for home in homes if home]
    for site in map(Path, sys.path):
        folders += [*site.glob("nvidia/cu*/include"), site / "nvidia" / "cuda_runtime" / "include"]
    return next((folder for folder in folders if (folder / "cuda_runtime_api.h").exists()), None)


def run(command):
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def nvcc():
    path = find_nvcc()
    if path is None:
        pytest.skip("needs nvcc")
    return path


def codes(source):
    """For which targets a source is compiled, to PTX ("compute") or to the end ("sm").

    Those of whole solves take half a minute each. On tensor cores they differ in their products
    alone, which are the same on all targets.
    """
    if not source.name.startswith("mlp_"):
        return [(target, "sm") for target in TARGETS]
    ptx = (TARGETS[0], "compute")
    return [ptx] if source.stem in TENSOR else [ptx, (TARGETS[1], "sm")]


@pytest.fixture(scope="module")
def compiled(nvcc, tmp_path_factory):
    """What compiling each source gave, for all targets; two at a time."""
    folder = tmp_path_factory.mktemp("cuda")
    warnings = ["-Werror", "all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror", "-Xptxas=-v"]

    def compile_one(source):
        targets = [f"-gencode=arch=compute_{t},code={kind}_{t}" for t, kind in codes(source)]
        command = [nvcc, "-c", "-std=c++20", *targets, *warnings, f"-I{ROOT / 'csrc'}", source]
        return run([*command, "-o", folder / f"{source.stem}.o"])

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(SOURCES, pool.map(compile_one, SOURCES)))


def test_there_are_sources():
    assert len(SOURCES) >= 6
    assert len(STEPPING) >= 4


@by_name
def test_compiles_without_torch_and_without_warnings(compiled, source):
    """The only include path is csrc, so no kernel depends on torch."""
    result = compiled[source]
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    "source", [s for s in SOURCES if s.stem not in TENSOR], ids=lambda source: source.name
)
def test_no_kernel_spills_registers(compiled, source):
    report = compiled[source].stderr
    kernels = re.findall(r"Compiling entry function '(\w+)' for 'sm_(\d+)'", report)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert {target for _, target in kernels} == {t for t, kind in codes(source) if kind == "sm"}
    assert len(spills) >= len(kernels)
    assert set(spills) == {("0", "0")}, report


def fused_products(nvcc, source, *flags):
    """How many fused multiply-adds nvcc forms for a source, not counting those of CUDA's pow."""
    result = run(
        [nvcc, "-ptx", "-std=c++20", "-arch=sm_90", *flags, f"-I{ROOT / 'csrc'}", source, "-o", "-"]
    )
    assert result.returncode == 0, result.stderr
    assert re.search(r"\b(mul|fma)\.rn\.f", result.stdout)
    ours = re.sub(r"\.func [^{}]*\b__internal_\w+\(.*?\n}", "", result.stdout, flags=re.DOTALL)
    return len(re.findall(r"\bfma\.r", ours))


def test_steps_round_as_on_the_cpu(nvcc):
    """With CMake's flag, products and sums of the stepping kernels stay apart, else they fuse."""
    cmake = (ROOT / "CMakeLists.txt").read_text()
    assert re.search(r"file\(GLOB (\w+) CONFIGURE_DEPENDS csrc/cuda/rk_\*\.cu\)", cmake)
    assert re.search(r"PROPERTIES COMPILE_OPTIONS -fmad=false", cmake)
    with ThreadPoolExecutor(2) as pool:
        counts = pool.map(lambda source: fused_products(nvcc, source, "-fmad=false"), STEPPING)
        assert list(counts) == [0] * len(STEPPING)
    assert fused_products(nvcc, STEPPING[0]) > 0


def syntax_check(source, tmp_path):
    """g++'s opinion of a source that includes torch's CUDA headers."""
    gxx = shutil.which(os.environ.get("CXX", "g++"))
    toolkit = find_cuda_include()
    if gxx is None:
        pytest.skip("needs g++")
    if toolkit is None:
        pytest.skip("needs the CUDA toolkit's headers")
    # torch generates this header when it is built with CUDA; a CPU build ships all others.
    standin = tmp_path / "c10" / "cuda" / "impl" / "cuda_cmake_macros.h"
    standin.parent.mkdir(parents=True)
    standin.touch()
    python = sysconfig.get_path("include")
    system = [tmp_path, *cpp_extension.include_paths(), python, toolkit]
    return run(
        [
            gxx, "-fsyntax-only", "-std=c++20", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}",
            *(flag for folder in system for flag in ("-isystem", folder)), source,
        ]
    )  # fmt: skip


@pytest.mark.parametrize("source", TORCH_SOURCES, ids=lambda source: source.name)
def test_torch_sources_pass_a_syntax_check(source, tmp_path):
    result = syntax_check(source, tmp_path)
    assert result.returncode == 0, result.stderr


def test_the_syntax_check_can_fail(tmp_path):
    wrong = tmp_path / "wrong.cpp"
    wrong.write_text('#include "cuda/kernels.h"\nint x = pycnf::launch_stage<float>(1);\n')
    result = syntax_check(wrong, tmp_path / "headers")
    assert result.returncode != 0
    assert "launch_stage" in result.stderr
