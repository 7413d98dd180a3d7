"""What can be tried of the GPU benchmarks without a GPU: every case on tiny sizes on the CPU, so
that the first run on a GPU finds no typing mistakes, and what is said where there is none.
"""

import importlib
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from bench import cuda, gpu_needs, gpu_report
from bench.__main__ import _BENCHMARKS
from bench.harness import OURS, Options, Row, interleave, report

pytest.importorskip("torchdiffeq")

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
CASES = {
    "neural ODE": lambda: cuda.neural_ode(CPU, batch=8),
    "adjoint": lambda: cuda.neural_ode_adjoint(CPU, batch=8),
    "FFJORD": lambda: cuda.ffjord(CPU, batch=16),
    "U-Net": lambda: cuda.image_flow(CPU, batch=1, size=8, width=8, steps=2),
    "attempted step": lambda: cuda.attempted_step(CPU, short=1.0, long=3.0),
}
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def measured(name):
    """A case, its rows by contender, and its remarks."""
    case = CASES[name]()
    items = list(cuda.measure(case, CPU, rounds=1, seconds=0.0))
    rows = {item.contender: item for item in items if isinstance(item, Row)}
    return case, rows, [item for item in items if isinstance(item, str)]


@pytest.mark.parametrize("name", CASES)
def test_case(name, monkeypatch):
    """The captured contender is served: on a CPU recorded work is done as written."""
    for module in ("odeint.recording", "flows.captured"):
        monkeypatch.setattr(importlib.import_module(f"pycnf.{module}"), "_DEVICES", ("cpu",))
    case, rows, remarks = measured(name)
    assert remarks == []
    assert set(rows) == {OURS, cuda.CAPTURED, cuda.PEER}
    for contender in (OURS, cuda.CAPTURED):
        facts = rows[contender].facts
        assert float(facts["torchdiffeq over it"]) > 0
        assert facts.get("target") == case.targets.get(contender)
    json.dumps([row.facts for row in rows.values()])


@pytest.mark.parametrize("name", ["neural ODE", "FFJORD"])
def test_the_option_is_there_or_said_to_be_missing(name):
    _, rows, remarks = measured(name)
    assert {OURS, cuda.PEER} <= set(rows)
    assert (cuda.CAPTURED in rows) == (remarks == [])
    assert all(f"without {cuda.CAPTURED}" in remark for remark in remarks)


def contenders(captured):
    results = {OURS: [torch.ones(3)], cuda.PEER: [torch.ones(3)]}
    runs = {name: lambda name=name: results[name] for name in results}
    return cuda.Case(
        "case", {**runs, cuda.CAPTURED: captured}, cuda.close_to_peer(1e-5, lambda name: {})
    )


@pytest.mark.parametrize("how", ["warning", "error"])
def test_a_missing_option_is_a_remark(how):
    def captured():
        text = "dopri5: Unexpected arguments {'cuda_graph': True}"
        if how == "error":
            raise ValueError(text)
        warnings.warn(text, stacklevel=1)
        return [torch.ones(3)]

    found, remarks, failure = cuda.first_results(contenders(captured))
    assert list(found) == [OURS, cuda.PEER]
    assert failure is None
    assert len(remarks) == 1 and "Unexpected arguments" in remarks[0]


def test_a_failing_capture_fails_behind_the_other_rows():
    def captured():
        raise RuntimeError("no such stream")

    items = cuda.measure(contenders(captured), CPU, 1, 0.0)
    assert "no such stream" in next(items)
    assert [next(items).contender, next(items).contender] == [OURS, cuda.PEER]
    with pytest.raises(RuntimeError, match=f"{cuda.CAPTURED} failed"):
        next(items)


@pytest.mark.parametrize("value", [1.001, float("nan")])
def test_unequal_results_are_refused(value):
    with pytest.raises(RuntimeError, match=f"{cuda.CAPTURED} differs"):
        list(cuda.measure(contenders(lambda: [torch.full((3,), value)]), CPU, 1, 0.0))


def test_kernels():
    size = 1001
    for kernel in cuda.kernels(CPU, size):
        ours, copied = cuda.kernel_rows(kernel, CPU, size, rounds=1, seconds=0.0)
        assert (ours.contender, copied.contender) == (OURS, cuda.COPY)
        assert ours.facts["target"] == "80 %"


def test_bytes_of_a_kernel():
    """dopri5's sixth stage sums five rows of six: it reads y0 and those, writes two."""
    kernels = cuda.kernels(CPU, 10)
    rows = [kernel.bytes / 40 for kernel in kernels]
    assert [kernel.title for kernel in kernels[:2]] == [
        "rk_stage, dopri5's stage 3",
        "rk_stage, dopri5's stage 7",
    ]
    # Stage 7 and the error lack the second row; the error of dopri5 reads the solution.
    assert rows == [5, 8, 9, 10]


def test_syncs_are_counted():
    def run():
        for text in (cuda._SYNC, "something else", cuda._SYNC):
            warnings.warn(text, stacklevel=1)

    assert cuda.sync_count(run, CPU) == 2


def test_the_clock_is_read_behind_the_device():
    calls = []
    interleave({OURS: lambda: calls.append("run")}, 1, 0.0, lambda: calls.append("wait"))
    assert calls[-4:] == ["run", "wait", "run", "wait"]


@no_gpu
def test_without_a_gpu_one_line_and_no_rows(tmp_path, capsys):
    items = list(cuda.run(Options()))
    assert items == ["torch sees no GPU here, so the benchmarks on one are left out."]
    report("cuda", items, tmp_path)
    assert capsys.readouterr().out.endswith(f"\n\n{items[0]}\n")
    assert json.loads((tmp_path / "cuda.json").read_text())["rows"] == []


def test_the_benchmark_is_known_by_name():
    assert "cuda" in _BENCHMARKS


# ---- gpu.sh --------------------------------------------------------------------------------------


def gpu_sh(folder, cwd, **environment):
    return subprocess.run(
        ["bash", ROOT / "bench" / "gpu.sh", *folder],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **environment},
        check=False,
    )


def test_script_is_bash():
    subprocess.run(["bash", "-n", ROOT / "bench" / "gpu.sh"], check=True)


@no_gpu
def test_script_stops_without_a_gpu(tmp_path):
    out = tmp_path / "out"
    done = gpu_sh([out], tmp_path, PYTHON=sys.executable)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "no GPU" in done.stderr and sys.executable in done.stderr
    assert not out.exists()


def test_script_wants_a_folder(tmp_path):
    done = gpu_sh([], tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: ")


def test_script_says_what_is_missing(tmp_path, monkeypatch):
    """Without a PATH there are no compilers."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    lines = list(gpu_needs.lacking())
    assert "the program g++" in lines
    assert "the program nvcc, on PATH or in CUDA_HOME" in lines


FAKE_PYTHON = """#!/bin/bash
case "$*" in
  *is_available* | "-m bench.gpu_needs" | "-m bench cuda "*) ;;
  *get_device_capability*) echo 9.0 ;;
  "setup.py "*) echo built for $TORCH_CUDA_ARCH_LIST with PYCNF_CUDA=$PYCNF_CUDA; exit $BUILD ;;
  "-m bench.gpu_report "*) exec {python} "$@" ;;
  "-m pytest "*)
    echo "FAILED tests/test_x.py::test_y - no"
    echo "1 failed, 2 passed in 3.00s"
    exit 1 ;;
esac
"""


@pytest.fixture
def fake_python(tmp_path):
    """A Python with a GPU, whose tests fail."""
    path = tmp_path / "fake" / "python3"
    path.parent.mkdir()
    path.write_text(FAKE_PYTHON.replace("{python}", sys.executable))
    path.chmod(0o755)
    return str(path)


def test_script_goes_on_behind_failing_tests(tmp_path, fake_python):
    done = gpu_sh(
        ["out"], tmp_path, PYTHON=fake_python, BUILD="0", COMMIT="abc-dirty",
        TORCH_CUDA_ARCH_LIST="",
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    out = tmp_path / "out"
    assert "built for 9.0 with PYCNF_CUDA=1" in (out / "build.log").read_text()
    run = json.loads((out / "gpu.json").read_text())
    states = {part["part"]: part["state"] for part in run["parts"]}
    assert (states["build"], states["tests"], states["cuda"]) == ("done", "failed (1)", "done")
    assert (run["commit"], run["dirty"]) == ("abc", True)
    assert run["tests"] == "1 failed, 2 passed in 3.00s"
    assert run["failures"] == ["FAILED tests/test_x.py::test_y - no"]
    assert "Commit abc, with changes" in (out / "gpu.md").read_text()


def test_script_stops_where_the_build_fails(tmp_path, fake_python):
    done = gpu_sh(["out"], tmp_path, PYTHON=fake_python, BUILD="3")
    assert done.returncode == 1
    assert "built for" in done.stderr
    assert not (tmp_path / "out" / "tests.log").exists()


def test_report_has_the_rows(tmp_path, monkeypatch):
    monkeypatch.setenv("COMMIT", "abc")
    row = Row("a case", OURS, 1e-3, 1e-3, 2e-3, 1.0, {"target": 5})
    report("cuda", [row, "A remark."], tmp_path)
    gpu_report.write(tmp_path)
    lines = (tmp_path / "gpu.md").read_text().splitlines()
    assert any(line.startswith("| a case | pycnf | 1 ms |") for line in lines)
    assert lines[-1] == "A remark."
    run = json.loads((tmp_path / "gpu.json").read_text())
    assert run["rows"][0]["facts"] == {"target": 5}
    assert (run["tests"], run["memcheck"], run["parts"]) == ("no summary", "no summary", [])
