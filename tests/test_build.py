"""What was built, and that it says so: versions, flags, threads, schemas, stubs, setup.py."""

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import pycnf
from pycnf import _C, _build, _ops

ROOT = Path(__file__).parent.parent
PACKAGE = Path(pycnf.__file__).parent
BUILD = ROOT / "build" / f"{sys.implementation.cache_tag}-torch{torch.__version__}"

needs_source = pytest.mark.skipif(
    not (ROOT / "csrc").is_dir(), reason="installed without its source"
)


# ---- build_info ----------------------------------------------------------------------------------


def test_build_info():
    info = pycnf.build_info()
    assert set(info) == set(_build.BuildInfo.__annotations__)
    assert info["version"] == pycnf.__version__
    assert info["torch"] == info["torch_compiled_against"] == torch.__version__
    assert info["cuda"] == (torch.version.cuda if _C.with_cuda else None)
    assert info["instruction_set"] in ("baseline", "avx2", "avx512")
    assert info["threads"] == torch.get_num_threads()
    for value in info.values():
        assert value is None or isinstance(value, (str, int))


def test_build_info_follows_the_threads():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert pycnf.build_info()["threads"] == threads + 1
    finally:
        torch.set_num_threads(threads)


# ---- another torch -------------------------------------------------------------------------------


def test_the_same_torch_is_accepted():
    _build.check_torch(("2.13.0+cpu", ""), ("2.13.0+cpu", ""))
    _build.check_torch(("2.11.0", "13.0"), ("2.11.0", "13.0"))


@pytest.mark.parametrize(
    ("compiled", "running", "then", "now"),
    [
        (("2.11.0", ""), ("2.13.0", ""), "torch 2.11.0,", "torch 2.13.0;"),
        (("2.13.0+cpu", ""), ("2.13.0", "13.0"), "torch 2.13.0+cpu,", "2.13.0 with CUDA 13.0;"),
        (("2.11.0", "12.8"), ("2.11.0", "13.0"), "with CUDA 12.8,", "with CUDA 13.0;"),
        (("2.11.0", "13.0"), ("2.11.0", ""), "torch 2.11.0 with CUDA 13.0,", "torch 2.11.0;"),
    ],
)  # fmt: skip
def test_another_torch_is_refused(compiled, running, then, now):
    """One sentence: both versions and the command."""
    with pytest.raises(ImportError) as caught:
        _build.check_torch(compiled, running)
    message = str(caught.value)
    assert message.startswith(f"pycnf was compiled against torch {compiled[0]}")
    assert then in message
    assert f"but this is torch {running[0]}" in message
    assert now in message
    assert message.endswith("pip install --no-build-isolation --force-reinstall --no-deps .")
    assert "\n" not in message


IMPORT_WITH_ANOTHER_TORCH = """
import torch
torch.__version__ = "9.9.9"
import pycnf
"""
IMPORT_WITH_A_BROKEN_MODULE = """
import sys
sys.modules["pycnf._C"] = None
import pycnf
"""


@pytest.mark.parametrize(
    ("program", "parts"),
    [
        (IMPORT_WITH_ANOTHER_TORCH, [f"torch {torch.__version__}", "this is torch 9.9.9"]),
        (IMPORT_WITH_A_BROKEN_MODULE, ["does not load with torch", torch.__version__]),
    ],
    ids=["another torch", "broken"],
)
def test_import_says_what_to_run(program, parts):
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300, cwd=ROOT
    )
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ")
    for part in [*parts, "pip install --no-build-isolation"]:
        assert part in last


# ---- how the kernels were compiled ---------------------------------------------------------------


def compile_commands():
    path = BUILD / "compile_commands.json"
    if not path.exists():
        pytest.skip(f"there is no {path}")
    return json.loads(path.read_text())


def commands_of(part):
    found = [e["command"].split() for e in compile_commands() if part in e["file"]]
    assert found
    return found


def test_kernel_flags():
    """Rounding decides step counts: no contraction, and no fast math anywhere."""
    for flags in commands_of("csrc/cpu/kernels_isa.cpp"):
        assert "-ffp-contract=off" in flags
        assert "-std=c++20" in flags
        (include,) = [flag for flag in flags if flag.startswith("-I")]
        assert include.endswith("/csrc")
        assert not any(flag in ("-isystem", "-include") for flag in flags)
        assert not any(flag.startswith("-ffp-contract") for flag in flags if "=off" not in flag)
    for flags in commands_of("csrc/"):
        for flag in flags:
            assert flag not in ("-ffast-math", "-Ofast", "-funsafe-math-optimizations")
            assert flag not in ("-march=native", "-mtune=native")
            assert flag != "-ffinite-math-only"


def test_each_instruction_set_is_compiled_once():
    found = [
        next(flag for flag in flags if flag.startswith("-DPYCNF_ISA="))
        for flags in commands_of("csrc/cpu/kernels_isa.cpp")
    ]
    x86 = any("-DPYCNF_X86" in flags for flags in commands_of("csrc/torch/cpu_kernels.cpp"))
    sets = ["baseline", "avx2", "avx512"] if x86 else ["baseline"]
    assert sorted(found) == sorted(f"-DPYCNF_ISA=cpu_{isa}" for isa in sets)


def test_parallel_code_is_compiled_with_openmp():
    """at::parallel_for runs serially, without a word, in code compiled without it."""
    for flags in commands_of("csrc/torch/ops_cpu.cpp"):
        assert "-fopenmp" in flags


# ---- threads -------------------------------------------------------------------------------------

# The pool of threads starts with the first parallel region. NumPy prepares the state, so that
# region is ours.
COUNT_THREADS = """
import os
import numpy as np
import torch
from pycnf import _C

size = 1_000_000
torch.set_num_threads(3)
y0 = torch.from_numpy(np.ones(size, np.float32))
k = torch.from_numpy(np.ones((3, size), np.float32))
def threads():
    return len(os.listdir("/proc/self/task"))

before = threads()
out = _C.rk_stage(y0, k, False, [], [0.5, 0.25], 0.1)
after = threads()
torch.exp(out)
print(before, after, threads())
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads in /proc")
def test_ops_run_in_parallel_in_torch_s_own_pool():
    """The first op starts torch's pool, and torch then starts no other."""
    if "OpenMP" not in _C.parallel_info():
        pytest.skip("this torch does not run on OpenMP")
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    result = subprocess.run(
        [sys.executable, "-c", COUNT_THREADS],
        capture_output=True, text=True, check=True, timeout=300, cwd=ROOT, env=environment,
    )  # fmt: skip
    before, after, later = map(int, result.stdout.split())
    assert after == before + 2
    assert later == after


def test_parallel_info_is_torch_s():
    assert _C.parallel_info() == torch.__config__.parallel_info()


# ---- one page of schemas -------------------------------------------------------------------------


def registered():
    prefix = "pycnf::"
    names = torch._C._dispatch_get_all_op_names()
    return {name.removeprefix(prefix).split(".")[0] for name in names if name.startswith(prefix)}


@needs_source
def test_every_op_stands_on_the_page_of_schemas():
    page = (ROOT / "csrc" / "torch" / "schema.cpp").read_text()
    assert set(_ops.OPS) == registered()
    text = re.sub(r'"\s*\n\s*"', "", page)  # adjacent strings are one
    schemas = {found.split("(")[0]: found for found in re.findall(r'"(\w+\([^"]*)"', text)}
    assert set(schemas) == registered()
    for name, schema in schemas.items():
        expected = torch._C.parse_schema(f"pycnf::{schema}")
        assert expected == getattr(torch.ops.pycnf, name).default._schema


@pytest.mark.parametrize("name", _ops.OPS)
def test_every_op_has_a_kernel_and_a_fake(name):
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    keys = ("CPU", "CompositeExplicitAutograd")
    assert any(has_kernel(f"pycnf::{name}", key) for key in keys)
    if _C.with_cuda and name not in _ops.WITHOUT_REFERENCE:
        keys = ("CUDA", "BackendSelect", "CompositeExplicitAutograd")
        assert any(has_kernel(f"pycnf::{name}", key) for key in keys)
    entry = torch._library.simple_registry.singleton.find(f"pycnf::{name}")
    assert entry.fake_impl.kernel is not None


# ---- stubs and types -----------------------------------------------------------------------------


def stub():
    return ast.parse((PACKAGE / "_C.pyi").read_text())


def stub_functions():
    return {node.name: node for node in stub().body if isinstance(node, ast.FunctionDef)}


def stub_classes():
    return {node.name: node for node in stub().body if isinstance(node, ast.ClassDef)}


def parameters(function):
    arguments = function.args
    assert not arguments.kwonlyargs
    assert not arguments.posonlyargs
    optional = len(arguments.defaults)
    names = [argument.arg for argument in arguments.args]
    return names, names[len(names) - optional :]


def test_the_stub_names_what_the_module_has():
    values = [node.target.id for node in stub().body if isinstance(node, ast.AnnAssign)]
    public = {name for name in dir(_C) if not name.startswith("__")}
    # A type of annotations, and what is there with CUDA only.
    absent = {"TableauDict"} if _C.with_cuda else {"TableauDict", "WhileGraph"}
    assert {*stub_functions(), *stub_classes(), *values} - absent == public
    for name in values:
        node = next(n for n in stub().body if isinstance(n, ast.AnnAssign) and n.target.id == name)
        assert type(getattr(_C, name)).__name__ == ast.unparse(node.annotation).split("[")[0]


def test_the_stub_s_parameters_are_the_module_s():
    """Names, order and which may be left out, as pybind11's own signatures have them."""
    for name, function in stub_functions().items():
        signature = getattr(_C, name).__doc__.strip().splitlines()[0]
        inside = signature[len(name) + 1 : signature.rindex(") ->")]
        tree = ast.parse(f"def {name}({inside}): ...").body[0]
        assert parameters(tree) == parameters(function), name


def test_the_stub_s_tableau_is_the_module_s():
    node = stub_classes()["TableauDict"]
    fields = {item.target.id: ast.unparse(item.annotation) for item in node.body}
    for tableau in _C.tableaux():
        assert list(tableau) == list(fields)
        for name, annotation in fields.items():
            assert type(tableau[name]).__name__ == annotation.split("[")[0]


def test_the_package_is_typed():
    assert (PACKAGE / "py.typed").exists()
    assert (PACKAGE / "_C.pyi").exists()


@needs_source
def test_every_file_is_shipped(tmp_path):
    """A wheel's Python part: every module, the marker and the stub."""
    pytest.importorskip("setuptools")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    no_binaries = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "pycnf", tmp_path / "pycnf", ignore=no_binaries)
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_py", "--build-lib", "lib"],
        check=True, cwd=tmp_path, timeout=300, capture_output=True,
    )  # fmt: skip
    expected = {p.relative_to(tmp_path) for p in (tmp_path / "pycnf").rglob("*") if p.is_file()}
    shipped = {
        p.relative_to(tmp_path / "lib") for p in (tmp_path / "lib").rglob("*") if p.is_file()
    }
    assert {Path("pycnf/py.typed"), Path("pycnf/_C.pyi"), Path("pycnf/_ops.py")} <= shipped
    assert shipped == expected


# ---- setup.py ------------------------------------------------------------------------------------


@pytest.fixture
def setup_py(monkeypatch):
    """setup.py as a module, without running setup."""
    setuptools = pytest.importorskip("setuptools")
    if not (ROOT / "setup.py").exists():
        pytest.skip("installed without its source")
    calls = []
    monkeypatch.setattr(setuptools, "setup", lambda **keywords: calls.append(keywords))
    spec = importlib.util.spec_from_file_location("pycnf_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (keywords,) = calls
    assert [extension.name for extension in keywords["ext_modules"]] == ["pycnf._C"]
    return module


def fake_torch(cuda):
    return SimpleNamespace(__version__="2.99", version=SimpleNamespace(cuda=cuda))


@pytest.fixture
def nvcc(tmp_path, monkeypatch):
    """A folder that looks like CUDA's, and no nvcc elsewhere."""
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    program = tmp_path / "cuda" / "bin" / "nvcc"
    program.parent.mkdir(parents=True)
    program.touch(mode=0o755)
    return SimpleNamespace(CUDA_HOME=str(tmp_path / "cuda"))


NO_NVCC = SimpleNamespace(CUDA_HOME=None)


@pytest.mark.parametrize("wish", [None, "", "0", "1"])
def test_cuda_is_built_where_torch_and_nvcc_have_it(setup_py, nvcc, monkeypatch, wish):
    if wish is None:
        monkeypatch.delenv("PYCNF_CUDA", raising=False)
    else:
        monkeypatch.setenv("PYCNF_CUDA", wish)
    assert setup_py.wants_cuda(fake_torch("13.0"), nvcc) == (wish != "0")


@pytest.mark.parametrize("has_nvcc", [True, False])
@pytest.mark.parametrize("cuda", ["13.0", None])
def test_cuda_is_left_out_elsewhere(setup_py, nvcc, monkeypatch, cuda, has_nvcc):
    monkeypatch.delenv("PYCNF_CUDA", raising=False)
    found = setup_py.wants_cuda(fake_torch(cuda), nvcc if has_nvcc else NO_NVCC)
    assert found == (cuda is not None and has_nvcc)


def test_nvcc_is_found_on_the_path(setup_py, nvcc, monkeypatch):
    assert setup_py.find_nvcc(NO_NVCC) is None
    folder = Path(nvcc.CUDA_HOME) / "bin"
    monkeypatch.setenv("PATH", str(folder))
    assert setup_py.find_nvcc(NO_NVCC) == str(folder / "nvcc")
    # A CUDA_HOME that holds none does not hide it.
    assert setup_py.find_nvcc(SimpleNamespace(CUDA_HOME="/nowhere")) == str(folder / "nvcc")


@pytest.mark.parametrize("wish", ["2", "yes", "on"])
def test_pycnf_cuda_must_be_0_or_1(setup_py, nvcc, monkeypatch, wish):
    monkeypatch.setenv("PYCNF_CUDA", wish)
    with pytest.raises(SystemExit, match=f"PYCNF_CUDA must be 0 or 1, got '{wish}'"):
        setup_py.wants_cuda(fake_torch("13.0"), nvcc)


def test_pycnf_cuda_1_needs_torch_with_cuda(setup_py, nvcc, monkeypatch):
    monkeypatch.setenv("PYCNF_CUDA", "1")
    with pytest.raises(SystemExit, match=r"PYCNF_CUDA=1, but torch 2\.99 was built without CUDA"):
        setup_py.wants_cuda(fake_torch(None), nvcc)


def test_pycnf_cuda_1_needs_nvcc(setup_py, nvcc, monkeypatch):
    monkeypatch.setenv("PYCNF_CUDA", "1")
    with pytest.raises(SystemExit, match="nvcc was not found; set CUDA_HOME"):
        setup_py.wants_cuda(fake_torch("13.0"), NO_NVCC)


@pytest.mark.parametrize(
    ("wish", "expected"),
    [
        (None, "80-real;90"),
        ("9.0", "90-real"),
        ("9.0+PTX", "90"),
        ("8.0 9.0", "80-real;90-real"),
        ("8.0;8.6;9.0+PTX", "80-real;86-real;90"),
        ("9.0a", "90a-real"),
        ("10.0 12.0+PTX", "100-real;120"),
    ],
)
def test_cuda_architectures(setup_py, monkeypatch, wish, expected):
    """CMake builds machine code and PTX for a bare number, machine code alone for -real."""
    if wish is None:
        monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    else:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wish)
    assert setup_py.cuda_architectures() == expected


def test_missing_programs_are_named(setup_py, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="pycnf needs no-such-program to build: pip install no-su"):
        setup_py.find_program("no-such-program")


def test_pybind11_comes_from_torch_where_torch_has_it(setup_py, tmp_path):
    (tmp_path / "pybind11").mkdir()
    (tmp_path / "pybind11" / "pybind11.h").touch()
    assert setup_py.pybind11_include(["/nowhere", str(tmp_path)]) == str(tmp_path)


def test_a_missing_torch_is_named(setup_py, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit, match="torch must be there first"):
        setup_py.import_torch()
