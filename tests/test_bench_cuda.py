"""What can be tried of the GPU benchmarks without a GPU: every case on tiny sizes on the CPU, so
that the first run on a GPU finds no typing mistakes, and what is said where there is none.
"""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType
from torch.utils import cpp_extension

import pycnf
from bench import cuda, cuda_forward, cuda_training, gpu_needs, gpu_report
from bench.__main__ import _BENCHMARKS
from bench.flops import solve_flops, step_flops
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


# ---- training steps ------------------------------------------------------------------------------

TRAINED = cuda_training.Case("toy", 2, (8, 8), "tanh", 16, target=200)


class Fake:
    """A contender that returns a loss, or raises from a call on."""

    def __init__(self, loss, fails_at=99):
        self.loss, self.fails_at, self.calls = loss, fails_at, 0
        stats = SimpleNamespace(
            engine="fused", accepted=2, rejected=1, nfe_forward=20, nfe_backward=0
        )
        self.flow = SimpleNamespace(stats=stats, explain=lambda: "")

    def __call__(self):
        self.calls += 1
        if self.calls >= self.fails_at:
            raise ValueError("no room\nand more")
        return [torch.tensor(self.loss), torch.ones(3)]


def trained(monkeypatch, contenders=None, case=TRAINED, **settings):
    """Rows by contender, remarks, and the object that made them."""
    if contenders is not None:
        makers = {name: lambda step=step: step for name, step in contenders.items()}
        monkeypatch.setattr(cuda_training, "makers", lambda case, device: makers)
    training = cuda_training.Training(CPU, rounds=1, spell=0.0, **settings)
    items = list(training.rows(case))
    rows = {item.contender: item for item in items if isinstance(item, Row)}
    json.dumps([row.facts for row in rows.values()])
    return rows, [item for item in items if isinstance(item, str)], training


def only_torch(monkeypatch):
    monkeypatch.setattr(cuda_training, "missing", lambda package, _: package == "diffrax" or None)


def test_training(monkeypatch):
    only_torch(monkeypatch)
    rows, remarks, training = trained(monkeypatch)
    assert remarks == training.failures == []
    assert list(rows) == [OURS, cuda_training.PEER]
    facts = rows[OURS].facts
    assert facts["engine"] == "fused" and facts["target"] == 200
    assert float(facts["loss differs by"]) < 5e-5
    assert float(facts["gradient differs by"]) < 1e-2
    assert float(facts["GFLOP"]) > 0
    assert float(facts[f"{cuda_training.PEER} over it"]) > 1
    assert rows[cuda_training.PEER].facts["nfe"] > 20


@pytest.mark.slow
def test_training_beside_diffrax(monkeypatch):
    pytest.importorskip("diffrax")
    rows, remarks, _ = trained(monkeypatch)
    assert remarks == []
    assert float(rows[cuda_training.DIFFRAX].facts["loss differs by"]) < 5e-5


def test_precisions_are_contenders_where_there_are_any(monkeypatch):
    only_torch(monkeypatch)

    class Flow(pycnf.CNF):
        def __init__(self, *arguments, precision="f32", **options):
            super().__init__(*arguments, **options)
            if precision == "bf16":
                raise ValueError("precision: got 'bf16'")

    monkeypatch.setattr(pycnf, "CNF", Flow)
    assert cuda_training.precisions(CPU) == {}
    precisions = cuda_training.precisions(torch.device("cuda"))
    monkeypatch.setattr(cuda_training, "precisions", lambda device: precisions)
    rows, remarks, _ = trained(monkeypatch)
    assert {f"{OURS}, tf32", f"{OURS}, 3xtf32"} < set(rows)
    assert [remark.partition(": ")[2] for remark in remarks] == [
        "pycnf, bf16 failed (ValueError: precision: got 'bf16')."
    ]


@pytest.mark.parametrize("at", [1, 3])
@pytest.mark.parametrize("name", [OURS, cuda_training.PEER])
def test_a_failing_contender_is_said_and_the_others_have_their_rows(monkeypatch, name, at):
    """At its first call, and amid the rounds."""
    contenders = {each: Fake(1.0) for each in (OURS, cuda_training.PEER)}
    contenders[name] = Fake(1.0, at)
    rows, remarks, training = trained(monkeypatch, contenders)
    (other,) = rows
    assert other != name
    assert rows[other].ratio == (1.0 if other == OURS else None)
    rows[other].cells()
    assert [remark.partition(": ")[2] for remark in remarks] == [
        f"{name} failed (ValueError: no room)."
    ]
    assert len(training.failures) == 1


@pytest.mark.parametrize("loss", [1.001, float("nan")])
def test_another_loss_is_a_failure(monkeypatch, loss):
    contenders = {OURS: Fake(loss), cuda_training.PEER: Fake(1.0), f"{OURS}, tf32": Fake(1.001)}
    rows, remarks, _ = trained(monkeypatch, contenders)
    assert set(rows) == {f"{OURS}, tf32", cuda_training.PEER}
    assert f"{OURS} failed (its loss is" in remarks[0]


def test_peers_that_would_take_too_long_are_left_out(monkeypatch):
    contenders = {OURS: Fake(1.0), cuda_training.PEER: Fake(1.0)}
    case = replace(TRAINED, batch=16_000)
    training = trained(monkeypatch, contenders)[2]
    training.known = {("toy", cuda_training.PEER): (16, 0.1)}
    items = list(training.rows(case))
    assert items[0].endswith("without torchdiffeq odeint_adjoint, it may take 100 s.")
    assert [item.contender for item in items[1:]] == [OURS]
    # With most of the time gone there are no peers, and behind its end nothing.
    training.known, training.seconds = {}, 100.0
    training.begin -= 80
    assert "no time left" in next(training.rows(case))
    training.begin -= 30
    assert [*training.rows(case)] == [f"{case.title}: left out, the time was over."]


def test_a_slow_peer_has_the_time_of_one_call(monkeypatch):
    contenders = {OURS: Fake(1.0), cuda_training.PEER: Fake(1.0)}
    rows, remarks, _ = trained(monkeypatch, contenders, limit=0.0)
    assert contenders[cuda_training.PEER].calls == 1
    assert cuda_training.PEER in rows
    assert "the time of one call" in remarks[0]


def test_training_cases():
    """Six shapes of three sizes, those with a target first."""
    cases = cuda_training.cases()
    assert len({case.title for case in cases}) == 18
    found = {(case.name, case.batch): case.target for case in cases[:4]}
    assert found == {
        ("toy", 1024): 200, ("POWER", 10_000): 60, ("HEPMASS", 10_000): 8, ("MINIBOONE", 1000): 4,
    }  # fmt: skip
    assert all(case.target is None for case in cases[4:])


# ---- forward solves ------------------------------------------------------------------------------


def test_forward(monkeypatch):
    rates = {cuda_forward.FFMA: 1e3, cuda_forward.CUBLAS: 2e3}
    rows = list(cuda_forward.rows(TRAINED, CPU, rates, rounds=1))
    assert [row.case.split(", ")[1] for row in rows] == ["without divergence", "with divergence"]
    gflop = [float(row.facts["GFLOP"]) for row in rows]
    # 16 rows, 96 weights, 80 of them behind the first layer.
    value = 2e-9 * 16 * 96 * rows[0].facts["nfe"]
    assert gflop[0] == pytest.approx(value, rel=0.01)
    assert gflop[1] < 2 * value * rows[1].facts["nfe"] / rows[0].facts["nfe"]
    for row in rows:
        assert row.facts["target"] == "50 % of fused multiply-adds's rate"
        assert row.facts["syncs"] == 0 and row.facts["launches"] == "not seen"
    monkeypatch.setattr(cuda_forward, "solves", lambda *arguments: 1 / 0)
    (remark,) = cuda_forward.rows(TRAINED, CPU, rates)
    assert remark.endswith("pycnf failed (ZeroDivisionError: division by zero).")


def test_flops_of_a_step_are_those_of_its_solve_and_more():
    field = pycnf.nn.MLP(2, (8, 8))
    stats = SimpleNamespace(accepted=1, rejected=0, nfe_forward=8, nfe_backward=0)
    value, tangent, constant = 2 * 16 * 96, 2 * 16 * 80, 2 * 16 * 16
    solve = solve_flops(field, 16, 1, "dopri5", stats)
    assert solve == 8 * value + 7 * tangent + constant  # dopri5's second stage has no divergence
    assert solve_flops(field, 16, 0, "dopri5", stats) == 8 * value
    step = step_flops(field, 16, 1, "dopri5", stats)
    assert step == solve + 2 * (6 * value + 5 * tangent) + constant


def test_product_rates():
    (row,) = cuda_forward.product_rates(CPU, [64])
    assert cuda_forward.rate(row) > 0


def test_kernels_among_what_a_profiler_saw():
    gpu, cpu = DeviceType.CUDA, DeviceType.CPU
    names = [
        (gpu, "mlp_solve_kernel"), (cpu, "aten::add"), (gpu, "Memset (Device)"),
        (gpu, "Memcpy DtoD (Device -> Device)"), (gpu, "add_kernel"),
    ]  # fmt: skip
    events = [SimpleNamespace(device_type=device, name=name) for device, name in names]
    assert cuda_forward.kernel_names(events) == ["mlp_solve_kernel", "add_kernel"]
    assert cuda_forward.launches(lambda: torch.ones(2) + 1, CPU) == []


def test_a_program_that_fails_is_an_error():
    with pytest.raises(RuntimeError, match="boo"):
        cuda_forward._run("bash", "-c", "echo boo >&2; exit 3")
    with pytest.raises(RuntimeError):
        cuda_forward._run("/no/such/program")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_the_multiply_adds_compile(tmp_path):
    cuda_forward._run(
        "nvcc", "-O3", "-arch=sm_90", "-c", str(cuda_forward._SOURCE), "-o", str(tmp_path / "o")
    )


@pytest.mark.parametrize("benchmark", [cuda_forward, cuda_training])
def test_all_of_it(monkeypatch, benchmark):
    """As on a GPU, with two small fields; a case that fails leaves the other its rows."""
    only_torch(monkeypatch)
    shapes = [("small", 2, (8, 8), "tanh"), ("bad", 2, (8, 8), "no such")]
    for module in (cuda_forward, cuda_training):
        monkeypatch.setattr(module, "absent", lambda: None)
        monkeypatch.setattr(module, "_DEVICE", CPU)
        monkeypatch.setattr(module, "SHAPES", shapes)
    monkeypatch.setattr(cuda_forward, "SIZES", [16, 32])
    monkeypatch.setattr(cuda_forward, "_BATCH", 16)
    cases = [cuda_training.Case(*shape, 16) for shape in shapes]
    monkeypatch.setattr(cuda_training, "cases", lambda: cases)
    items = benchmark.run(Options(rounds=1))
    found = []
    with pytest.raises(RuntimeError, match="bad"):
        found.extend(items)
    rows = [item for item in found if isinstance(item, Row)]
    remarks = [item for item in found if isinstance(item, str)]
    assert any("small" in row.case for row in rows)
    assert any("bad" in remark and "failed" in remark for remark in remarks)
    if not torch.cuda.is_available() and benchmark is cuda_forward:
        assert any("The rate of fused multiply-adds is unknown" in remark for remark in remarks)


# ---- without a GPU -------------------------------------------------------------------------------


@no_gpu
@pytest.mark.parametrize("benchmark", [cuda_forward, cuda_training])
def test_without_a_gpu_there_is_a_reason(benchmark):
    (reason,) = benchmark.run(Options())
    assert reason.startswith("torch sees no GPU here")


@no_gpu
def test_without_a_gpu_one_line_and_no_rows(tmp_path, capsys):
    items = list(cuda.run(Options()))
    assert items == ["torch sees no GPU here, so the benchmarks on one are left out."]
    report("cuda", items, tmp_path)
    assert capsys.readouterr().out.endswith(f"\n\n{items[0]}\n")
    assert json.loads((tmp_path / "cuda.json").read_text())["rows"] == []


def test_the_benchmark_is_known_by_name():
    assert {"cuda", "cuda_forward", "cuda_training"} <= set(_BENCHMARKS)
    assert set(gpu_report._BENCHMARKS) <= set(_BENCHMARKS)


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
  *is_available* | "-m bench.gpu_needs" | "-m bench cuda "* | "-m bench cuda_forward "*) ;;
  "-m bench cuda_training "*) echo "$@" ;;
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
    memcheck = states.pop("memcheck")
    assert memcheck in ("failed (1)", "no compute-sanitizer")
    assert states == {
        "build": "done", "tests": "failed (1)", "cuda_forward": "done", "cuda_training": "done",
        "cuda": "done",
    }  # fmt: skip
    # What the build and the tests have left is there for the others.
    told = re.search(r"--seconds (\d+) --out", (out / "cuda_training.log").read_text())
    assert 350 < int(told[1]) <= 500 - 60 - 45 - 10
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
    report("cuda_training", [replace(row, ratio=None)], tmp_path)
    report("cuda", [row, "A remark."], tmp_path)
    gpu_report.write(tmp_path)
    lines = (tmp_path / "gpu.md").read_text().splitlines()
    assert any(line.startswith("| a case | pycnf | 1 ms |") for line in lines)
    assert lines[-1] == "A remark."
    run = json.loads((tmp_path / "gpu.json").read_text())
    assert len(run["rows"]) == 2
    assert run["rows"][1]["facts"] == {"target": 5}
    assert run["remarks"] == ["No row of cuda_forward.", "A remark."]
    assert (run["tests"], run["memcheck"], run["parts"]) == ("no summary", "no summary", [])
