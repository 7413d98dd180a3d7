"""The command line as people meet it: help, runs, and one sentence for every mistake."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from pycnf.cli import main
from pycnf.train import checkpoint, load_model

TINY = ["--hidden", "8", "--steps", "4", "--threads", "1"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """Every test runs in a folder of its own, and leaves the number of threads as it was."""
    monkeypatch.chdir(tmp_path)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def wine():
    """A small table with names, a text column and two clusters."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((90, 3)) * [1, 10, 0.1] + rng.integers(2, size=(90, 1)) * 3
    lines = [",".join(f"{v:.6g}" for v in row) + ",red" for row in rows]
    with open("wine.csv", "w") as file:
        file.write("\n".join(["acid,sugar,ash,kind", *lines]) + "\n")
    return rows


def refused(capsys, *arguments):
    """Runs a command that must fail; returns its sentence."""
    before = sorted(os.walk("."))
    assert main([str(a) for a in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert sorted(os.walk(".")) == before, "something was written"
    return captured.err.removeprefix("error: ").strip()


def read_json(path):
    return json.loads(Path(path).read_text())


# ---- help --------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_the_overview_names_every_command(capsys, arguments):
    assert main(arguments) == 0
    text = capsys.readouterr().out
    for command in ("train", "sample", "evaluate"):
        assert f"python -m pycnf {command}" in text


@pytest.mark.parametrize("command", ["train", "sample", "evaluate"])
def test_every_command_has_help_that_fits_a_terminal(capsys, command):
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert f"python -m pycnf {command}" in text
    assert max(map(len, text.splitlines())) <= 100


def test_help_of_train_states_the_formula_of_bits_per_dimension(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "-(log p(y) + log|dy/dx|) / (D ln 2) + log2(17)" in text
    assert "x = (v + u)/17" in text


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("pycnf 0.")


# ---- mistakes ----------------------------------------------------------------------------------

MISTAKES = {
    "command": (["trian", "moons"], "Unknown command 'trian' (did you mean train?)"),
    "no-command": (["moons"], "'moons' is no command; write python -m pycnf train moons."),
    "no-source": (["train"], "Give a SOURCE to train on"),
    "source": (["train", "8gausians"], "Unknown source '8gausians' (did you mean 8gaussians"),
    "missing-file": (["train", "data.csv"], "There is no file data.csv"),
    "option": (["train", "moons", "--hiden", "8"], "Unknown option --hiden (did you mean --hidden"),
    "no-abbreviations": (["train", "moons", "--hid", "8"], "Unknown option --hid "),
    "two-sources": (["train", "moons", "rings"], "'rings' is one argument too many"),
    "no-value": (["train", "moons", "--lr"], "--lr: expected one argument"),
    "number": (["train", "moons", "--lr", "fast"], "--lr: 'fast' is not a number"),
    "whole-number": (["train", "moons", "--steps", "1.5"], "'1.5' is not a whole number"),
    "widths": (["train", "moons", "--hidden", "64,wide"], "--hidden: 'wide' is not a whole number"),
    "method": (["train", "moons", "--method", "dopri4"], "Unknown --method 'dopri4' (did you mean"),
    "negative": (["train", "moons", "--lr", "-1"], "--lr must be greater than 0, and -1 is not"),
    "layer-and-time": (
        ["train", "moons", "--layer", "hyper", "--time", "fourier:4"],
        "These options do not go together",
    ),
    "batch": (["train", "moons", "--batch", "10000"], "fewer than a batch of 10000"),
    "folder": (["train", "moons", "--out", "/dev/null/run"], "no folder that can be written to"),
    "resume-nothing": (["train", "--resume", "nowhere"], "There is no checkpoint nowhere/last.pt"),
    "resume-and-source": (["train", "moons", "--resume", "nowhere"], "give neither again"),
    "sample-nothing": (["sample", "nowhere"], "There is no checkpoint nowhere/best.pt"),
    "sample-what": (["sample"], "The following arguments are required: DIR"),
    "evaluate-nothing": (["evaluate", "nowhere"], "There is no checkpoint nowhere/best.pt"),
    "checkpoint": (["evaluate", "x", "--checkpoint", "worst"], "'worst' is neither best nor last"),
    "scores-of-what": (["evaluate", "x", "--out", "a.csv"], "--out writes the scores of --data"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_gets_one_sentence_and_leaves_nothing_behind(capsys, case):
    arguments, words = MISTAKES[case]
    sentence = refused(capsys, *arguments)
    assert words in sentence
    assert sentence.endswith((".", ")"))


def test_bad_rows_are_refused_before_a_folder_is_made(capsys, wine):
    assert "column 'kind' holds the text 'red'" in refused(capsys, "train", "wine.csv")
    with open("wine.csv", "a") as file:
        file.write("nan,1,2,red\n")
    assert "NaN or infinity in row 91" in refused(capsys, "train", "wine.csv", "--drop", "kind")
    np.save("few.npy", np.random.default_rng(0).standard_normal((20, 2)))
    assert "16 training rows, fewer than the smallest" in refused(capsys, "train", "few.npy")


def test_a_column_constant_in_the_training_rows_only_is_named(capsys):
    rows = np.random.default_rng(0).standard_normal((200, 2))
    rows[:, 1] = 0
    rows[7, 1] = 1  # with this seed row 8 is not among the training rows
    np.save("d.npy", rows)
    seeds = [s for s in range(40) if 7 in _held_out(200, s)]
    sentence = refused(capsys, "train", "d.npy", "--seed", seeds[0])
    assert "'column 2' is constant in the training rows" in sentence


def _held_out(n, seed):
    from pycnf.data import stream

    return stream(seed, "split").permutation(n)[: n // 5]


def test_optional_extras_are_asked_for_by_name(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert "pip install scikit-learn" in refused(capsys, "train", "digits")


# ---- runs --------------------------------------------------------------------------------------


def test_train_sample_evaluate_a_table(capsys, wine):
    assert main(["train", "wine.csv", "--drop", "kind", *TINY]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    for words in ("runs/wine-1", "exact divergence", "Gaussian", "pictures/samples.png"):
        assert words in captured.out
    files = {path for path in os.listdir("runs/wine-1") if not path.startswith(".")}
    assert files == {
        *("config.json", "metrics.jsonl", "best.pt", "last.pt", "evaluation.json", "pictures")
    }
    config = read_json("runs/wine-1/config.json")
    assert (config["hidden"], config["drop"], config["steps"]) == ([8], ["kind"], 4)

    assert main(["sample", "runs/wine-1", "-n", "50"]) == 0
    assert capsys.readouterr().out == "runs/wine-1/samples.csv\n"
    assert Path("runs/wine-1/samples.csv").read_text().splitlines()[0] == "acid,sugar,ash"
    samples = np.loadtxt("runs/wine-1/samples.csv", delimiter=",", skiprows=1)
    assert samples.shape == (50, 3)
    # In the data's own units, which differ a hundredfold: the flow began as nearly their Gaussian.
    np.testing.assert_allclose(samples.std(0), wine.std(0), rtol=0.5)

    assert main(["evaluate", "runs/wine-1"]) == 0
    report = read_json("runs/wine-1/evaluation.json")
    assert (report["rows"], report["divergence"], report["split"]) == (9, "exact", "test")
    assert np.isfinite([report["log_likelihood"], report["gaussian_log_likelihood"]]).all()
    assert f"{report['log_likelihood']:.4f}" in capsys.readouterr().out


def test_samples_and_scores_in_every_format(capsys, wine):
    main(["train", "wine.csv", "--drop", "kind", "--out", "run", *TINY, "--quiet"])
    assert capsys.readouterr().out == ""
    main(["sample", "run", "-n", "7", "--seed", "3", "--out", "s.npy"])
    main(["sample", "run", "-n", "7", "--seed", "3", "--out", "s.pt"])
    main(["sample", "run", "-n", "7", "--seed", "4", "--out", "other.npy"])
    assert capsys.readouterr().out == "s.npy\ns.pt\nother.npy\n"
    expected = load_model("run").sample(7, seed=3)
    assert torch.equal(torch.load("s.pt"), expected)
    np.testing.assert_array_equal(np.load("s.npy"), expected.numpy())
    assert not np.isin(np.load("other.npy"), expected.numpy()).any()
    assert "s.npy exists already" in refused(capsys, "sample", "run", "--out", "s.npy")
    assert ".csv, .npy, .pt, .png" in refused(capsys, "sample", "run", "--out", "s.txt")
    assert "There is no folder no" in refused(capsys, "sample", "run", "--out", "no/s.csv")
    assert "--number must be" in refused(capsys, "sample", "run", "-n", "0")

    # By name from a table in another order, with a column more.
    rows = np.loadtxt("wine.csv", delimiter=",", skiprows=1, usecols=(0, 1, 2))
    with open("new.csv", "w") as file:
        file.write("ash,extra,acid,sugar\n")
        file.writelines(f"{c},9,{a},{b}\n" for a, b, c in rows)
    assert main(["evaluate", "run", "--data", "new.csv", "--out", "scores.csv"]) == 0
    text = capsys.readouterr().out
    scores = np.loadtxt("scores.csv", skiprows=1)
    log_prob = load_model("run").log_prob(torch.from_numpy(rows))
    np.testing.assert_allclose(scores, log_prob.numpy(), rtol=1e-6)
    assert f"{log_prob.mean():.4f}" in text
    # By position from an array, which has no names.
    np.save("new.npy", rows[:1])
    assert main(["evaluate", "run", "--data", "new.npy"]) == 0
    assert f"{log_prob[0]:.4f}" in capsys.readouterr().out
    with open("renamed.csv", "w") as file:
        file.write("a,b,c\n1,2,3\n")
    assert "no column 'acid'" in refused(capsys, "evaluate", "run", "--data", "renamed.csv")
    np.save("wide.npy", np.ones((2, 4)))
    assert "no column 'acid'" in refused(capsys, "evaluate", "run", "--data", "wide.npy")


def test_resume_finishes_trains_on_and_refuses_other_choices(capsys, wine):
    main(["train", "wine.csv", "--drop", "kind", "--out", "run", *TINY])
    capsys.readouterr()
    assert main(["train", "--resume", "run"]) == 0
    assert "trained to its end (step 4); --steps N would train it on" in capsys.readouterr().out
    assert main(["train", "--resume", "run", "--steps", "6"]) == 0
    assert "Resuming run at step 4 of 6" in capsys.readouterr().out
    assert checkpoint.load(Path("run/last.pt"))["step"] == 6
    assert read_json("run/config.json")["steps"] == 6
    assert "--lr cannot change" in refused(capsys, "train", "--resume", "run", "--lr", "0.1")
    assert "taken 6 steps" in refused(capsys, "train", "--resume", "run", "--steps", "5")
    sentence = refused(capsys, "train", "wine.csv", "--drop", "kind", "--out", "run")
    assert "--resume run" in sentence
    with open("wine.csv", "a") as file:
        file.write("1,2,3,red\n")
    assert "no longer gives the rows" in refused(capsys, "train", "--resume", "run")
    os.remove("wine.csv")
    assert "There is no file" in refused(capsys, "evaluate", "run")
    assert main(["sample", "run", "-n", "3"]) == 0  # needs no data


def test_what_cannot_fit_or_cannot_be_a_name_is_refused(capsys, wine):
    assert "--threads must be at most" in refused(capsys, "train", "moons", "--threads", "100000")
    assert "--seed must be at most" in refused(capsys, "train", "moons", "--seed", "9" * 30)
    assert "this machine has" in refused(capsys, "train", "moons", "--hidden", "100000000")
    assert "too long" in refused(capsys, "train", "moons", "--out", "a" * 300)
    assert "new folder" in refused(capsys, "train", "moons", "--out", "")
    assert "did you mean wine.csv?" in refused(capsys, "train", "wine.cvs")
    assert "--probes is for" in refused(
        capsys, "train", "moons", "--probes", "2", "--divergence", "exact"
    )
    assert "'-8' is not" not in refused(capsys, "train", "moons", "--hidden", "8,-8")
    main(["train", "wine.csv", "--drop", "kind", "--out", "run", *TINY, "--quiet"])
    assert "this machine has" in refused(capsys, "sample", "run", "-n", "9" * 17)
    assert "run/best.pt is a file" in refused(capsys, "sample", "run/best.pt")
    content = torch.load("run/best.pt", weights_only=True)
    torch.save({**content, "config": {**content["config"], "newer": 1}}, "run/best.pt")
    assert "newer, which this pycnf does not know" in refused(capsys, "sample", "run")
    torch.save({**content, "flow": {}}, "run/best.pt")
    assert "its flow does not fit" in refused(capsys, "sample", "run")


def test_damaged_and_foreign_checkpoints(capsys, wine):
    main(["train", "wine.csv", "--drop", "kind", "--out", "run", *TINY, "--quiet"])
    content = torch.load("run/best.pt", weights_only=True)
    torch.save({**content, "version": 99}, "run/best.pt")
    assert "checkpoint version 99" in refused(capsys, "sample", "run")
    with open("run/last.pt", "r+b") as file:
        file.truncate(1000)
    assert "is damaged" in refused(capsys, "train", "--resume", "run")


def test_a_run_without_matplotlib_trains_and_says_once_that_it_draws_nothing(
    capsys, monkeypatch, wine
):
    monkeypatch.setattr("pycnf.train.pictures.available", lambda: False)
    assert main(["train", "wine.csv", "--drop", "kind", "--out", "run", *TINY]) == 0
    assert capsys.readouterr().err.count("pip install matplotlib") == 1
    assert not os.path.exists("run/pictures")
    assert os.path.exists("run/evaluation.json")
    assert "need matplotlib" in refused(capsys, "sample", "run", "--out", "s.png")


def test_a_run_that_diverges_exits_with_1_and_keeps_the_best(capsys, monkeypatch):
    step, calls = torch.optim.AdamW.step, []

    def step_that_jumps_once(self, *args, **kwargs):
        calls.append(step(self, *args, **kwargs))
        if len(calls) == 3:
            for group in self.param_groups:
                for weight in group["params"]:
                    weight.data.mul_(1e4)

    monkeypatch.setattr(torch.optim.AdamW, "step", step_that_jumps_once)
    # A quadratic field has solutions that blow up in finite time.
    arguments = ["--activation", "square", "--lr", "0.01", "--steps", "6", "--evaluate-every", "1"]
    assert main(["train", "moons", "--out", "run", "--hidden", "8", *arguments]) == 1
    error = capsys.readouterr().err
    assert "error: At step" in error
    assert "is kept in run/best.pt" in error
    assert "Try a lower --lr than 0.01" in error
    kept = checkpoint.load(Path("run/best.pt"))
    assert 1 <= kept["step"] <= 2
    assert all(torch.isfinite(value).all() for value in kept["flow"].values())
    assert read_json("run/evaluation.json")["step"] == kept["step"]


def test_remarks_on_tables_that_are_no_densities(capsys):
    rows = np.random.default_rng(0).standard_normal((100, 3))
    rows[:, 1] = rows[:, 0] * 2
    rows[:, 2] = rows[:, 2] > 0
    np.save("d.npy", rows)
    assert main(["train", "d.npy", *TINY]) == 0
    captured = capsys.readouterr()
    assert "column 'column 3' takes only a few values" in captured.err
    assert "'column 1' and 'column 2' are copies of each other" in captured.err
    assert "none: the training rows' covariance is singular" in captured.out


def test_ctrl_c_saves_and_prints_the_command_that_resumes():
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "pycnf", "train", "moons", "--out", "a run"),
            *("--steps", "100000", "--evaluate-every", "1000", "--batch", "32"),
            *("--hidden", "8", "--threads", "1"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        for _ in range(600):
            if os.path.exists("a run/metrics.jsonl"):
                break
            time.sleep(0.05)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, error
    assert "Traceback" not in error
    assert error.splitlines()[-1].strip() == "python -m pycnf train --resume 'a run'"
    step = torch.load("a run/last.pt", weights_only=True)["step"]
    assert step > 0
    assert f"saved at step {step} of 100000" in error
    assert not [name for name in os.listdir("a run") if name.endswith(".partial")]


# ---- pictures ----------------------------------------------------------------------------------


def png_size(path):
    header = Path(path).read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(header[16:20], "big"), int.from_bytes(header[20:24], "big")


def test_pictures_of_a_plane_a_line_and_digits(capsys):
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    assert main(["train", "rings", "--out", "plane", *TINY]) == 0
    assert set(os.listdir("plane/pictures")) == {"density.png", "flow.png", "curves.png"}
    width, height = png_size("plane/pictures/density.png")
    assert width > 2 * height  # three square panels in a row

    np.save("line.npy", np.random.default_rng(0).standard_normal((200, 1)) ** 3)
    assert main(["train", "line.npy", "--out", "line", *TINY]) == 0
    assert set(os.listdir("line/pictures")) == {"samples.png", "curves.png"}

    assert main(["train", "digits", "--out", "digits", *TINY]) == 0
    text = capsys.readouterr().out
    assert "bits/dim = -(log p(y) + log|dy/dx|) / (D ln 2) + log2(17)" in text
    report = read_json("digits/evaluation.json")
    # Four steps from the initial weights: close to the Gaussian, which is known for this split.
    assert report["gaussian_bits_per_dim"] == pytest.approx(2.28, abs=0.02)
    assert report["bits_per_dim"] == pytest.approx(2.34, abs=0.1)
    assert main(["sample", "digits", "-n", "5"]) == 0
    levels = np.loadtxt("digits/samples.csv", delimiter=",", skiprows=1, usecols=range(64))
    assert set(levels.ravel()) <= set(range(17))
    assert main(["sample", "digits", "-n", "100", "--out", "d.png"]) == 0
    assert png_size("d.png")[0] > 1000
