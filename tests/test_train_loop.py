"""The training loop: resuming is invisible, and trouble is noticed."""

import io
import json
import math

import numpy as np
import pytest
import torch

from pycnf.data import load
from pycnf.flows import SolveError
from pycnf.train import checkpoint
from pycnf.train.config import choose
from pycnf.train.folder import create
from pycnf.train.interrupt import StopRequest
from pycnf.train.loop import Diverged, Trainer
from pycnf.train.metrics import read
from pycnf.train.model import fitted, restored
from pycnf.train.progress import Progress
from pycnf.train.watch import NfeWatch

SMALL = {"hidden": (8,), "batch": 40, "steps": 11, "evaluate_every": 5, "threads": 1}


@pytest.fixture(autouse=True)
def _threads():
    """Runs set the number of threads; other tests shall not notice."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def source(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, 1))
    np.save(tmp_path / "d.npy", np.hstack([x, x**2 + 0.3 * rng.standard_normal((200, 1))]))
    return str(tmp_path / "d.npy")


def trainer(source, out, warn=lambda text: None, **given):
    data = load(source)
    config = choose(data, {"source": source, **SMALL, **given})
    torch.set_num_threads(config.threads)
    result = Trainer(
        config, data, fitted(config, data), create(out, "d"), Progress(config.steps, True), warn
    )
    result.save()
    return result


def resumed(source, old):
    content = checkpoint.load(old.folder.last)
    data = load(source)
    result = Trainer(
        old.config, data, restored(content), old.folder, Progress(old.config.steps, True), print
    )
    result.load_state(content)
    return result


def run(trainer, until=None):
    """Trains; a stop is requested while step ``until`` is taken, as Ctrl-C would."""
    stop = StopRequest()
    take = trainer._take_step

    def take_step():
        take()
        if trainer.at.step == until:
            stop.signal = 2

    trainer._take_step = take_step
    trainer.run(stop)
    return trainer


def assert_same_run(a, b):
    for which in ("best", "last"):
        one, two = (checkpoint.load(t.folder.checkpoint(which)) for t in (a, b))
        one.get("training", {}).get("counters", {}).pop("seconds", None)
        two.get("training", {}).get("counters", {}).pop("seconds", None)
        # The size of the metrics file depends on how the seconds are written.
        one.get("training", {}).pop("metrics_size", None)
        two.get("training", {}).pop("metrics_size", None)
        assert_equal(one, two)
    rows = [
        [{k: v for k, v in row.items() if k != "seconds"} for row in read(t.folder.metrics)]
        for t in (a, b)
    ]
    assert rows[0] == rows[1]


def assert_equal(a, b):
    """Equal to the last bit, containers and all."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_equal(x, y)
    else:
        assert a == b


@pytest.mark.parametrize("until", [0, 3, 5, 8])
@pytest.mark.parametrize("divergence", ["hutchinson", "exact"])
def test_a_resumed_run_ends_with_the_same_bits(source, tmp_path, until, divergence):
    whole = run(trainer(source, tmp_path / "whole", divergence=divergence))
    parts = trainer(source, tmp_path / "parts", divergence=divergence)
    if until:
        run(parts, until)
        assert parts.at.step == until
    run(resumed(source, parts))
    assert_same_run(whole, parts)


def test_a_run_that_was_killed_resumes_from_its_last_validation(source, tmp_path):
    whole = run(trainer(source, tmp_path / "whole"))
    killed = trainer(source, tmp_path / "killed")
    take = killed._take_step

    def die():
        if killed.at.step == 8:  # lines of the metrics file are newer than last.pt then
            raise MemoryError
        take()

    killed._take_step = die
    with pytest.raises(MemoryError):
        killed.run(StopRequest())
    assert checkpoint.load(killed.folder.last)["step"] == 5
    assert read(killed.folder.metrics)[-1]["step"] == 8
    run(resumed(source, killed))
    assert_same_run(whole, killed)


def test_resuming_needs_no_particular_state_of_the_global_generators(source, tmp_path):
    whole = run(trainer(source, tmp_path / "whole"))
    torch.manual_seed(99)
    np.random.seed(99)
    other = run(trainer(source, tmp_path / "other"))
    assert_same_run(whole, other)


def test_training_improves_on_the_gaussian_it_starts_from(source, tmp_path):
    done = run(trainer(source, tmp_path / "run", steps=150, hidden=(32, 32), lr=0.02))
    best = restored(checkpoint.load(done.folder.best))
    gain = best.log_prob(done.data.test) - best.baseline_log_prob(done.data.test)
    assert gain.mean() > 0.2


def test_metrics_and_best_agree(source, tmp_path):
    done = run(trainer(source, tmp_path / "run"))
    rows = read(done.folder.metrics)
    assert [row["step"] for row in rows] == list(range(1, 12))
    judged = [row for row in rows if "validation_nll" in row]
    assert [row["step"] for row in judged] == [5, 10, 11]
    best = min(judged, key=lambda row: row["validation_nll"])
    content = checkpoint.load(done.folder.best)
    assert (content["step"], content["validation"]) == (best["step"], best["validation_nll"])
    assert "training" not in content
    nll = -restored(content).log_prob(done.data.validation).mean().item()
    assert nll == best["validation_nll"]
    for row in rows:
        assert row["nfe_forward"] >= 7
        assert row["nfe_forward"] == int(row["nfe_forward"])
        assert row["nfe_backward"] == 0  # the stages of so small a flow are kept


def test_metrics_count_the_evaluations_of_an_adjoint(source, tmp_path):
    done = run(trainer(source, tmp_path / "run", gradient="continuous"))
    assert all(row["nfe_backward"] >= 6 for row in read(done.folder.metrics))


def test_the_loss_is_a_likelihood_in_the_units_of_the_data(tmp_path):
    """Rescaling a column by c shifts every loss by log c and changes nothing else."""
    rows = np.random.default_rng(0).standard_normal((200, 2))
    losses = []
    for name, scale in (("a", 1.0), ("b", 1024.0)):  # a power of two: the same bits standardized
        np.save(tmp_path / f"{name}.npy", rows * np.array([scale, 1.0]))
        done = run(trainer(str(tmp_path / f"{name}.npy"), tmp_path / name))
        losses.append([row["loss"] for row in read(done.folder.metrics)])
    np.testing.assert_allclose(np.array(losses[1]) - losses[0], math.log(1024), rtol=1e-9)


def test_patience_ends_a_run(source, tmp_path):
    run_ = trainer(source, tmp_path / "run", steps=400, evaluate_every=1, patience=3)
    nll = iter([3.0, 2.0, 2.5, 2.1, 2.2, 1.0])
    run_.model.log_prob = lambda x: torch.full((len(x),), -next(nll))
    run(run_)
    assert (run_.at.step, run_.at.best_step, run_.at.ended) == (5, 2, "patience")
    assert checkpoint.load(run_.folder.best)["step"] == 2


def test_without_patience_a_run_takes_all_its_steps(source, tmp_path):
    run_ = trainer(source, tmp_path / "run", steps=8, evaluate_every=1, patience=0)
    nll = iter(range(100))
    run_.model.log_prob = lambda x: torch.full((len(x),), -float(next(nll)))
    run(run_)
    assert (run_.at.step, run_.at.best_step, run_.at.ended) == (8, 1, "steps")


@pytest.mark.parametrize("what", ["loss", "gradient", "solver", "validation"])
def test_a_run_that_diverges_stops_and_keeps_what_was_good(source, tmp_path, what):
    run_ = trainer(source, tmp_path / "run")
    parameter = next(run_.model.flow.parameters())
    log_prob = run_.model.flow.log_prob

    def spoiled(y, seed):
        if run_.at.step < 7:
            return log_prob(y, seed=seed)
        if what == "solver":
            raise SolveError("the step size became 0")
        if what == "loss":
            return log_prob(y, seed=seed) * math.nan
        return log_prob(y, seed=seed) + (parameter.sum() - parameter.sum().detach()).sqrt()

    if what == "validation":
        run_.model.log_prob = lambda x: torch.full(
            (len(x),), -1.0 if run_.at.step < 7 else math.nan
        )
    else:
        run_.model.flow.log_prob = spoiled
    words = {
        "loss": "At step 8 the loss stopped being a number",
        "gradient": "At step 8 the gradient stopped being a number",
        "solver": r"At step 8 the solver gave up \(the step size became 0\)",
        "validation": "the validation likelihood stopped being a number",
    }
    with pytest.raises(Diverged, match=words[what] + r"; the best checkpoint \(step 5\) is kept"):
        run(run_)
    for which in ("best", "last"):
        kept = checkpoint.load(run_.folder.checkpoint(which))
        assert kept["step"] == 5
        assert all(torch.isfinite(v).all() for v in kept["flow"].values())


def test_growing_nfe_warn_once():
    watch = NfeWatch()
    said = [watch.add(nfe) for nfe in [20] * 30 + [199] * 30 + [200] * 60]
    told = [i for i, text in enumerate(said) if text is not None]
    assert len(told) == 1
    assert 60 <= told[0] < 120
    assert "took 20" in said[told[0]]


def test_the_nfe_watch_resumes():
    whole, parts = NfeWatch(), NfeWatch()
    series = [20] * 25 + [300] * 40
    expected = [whole.add(nfe) for nfe in series]
    found = []
    for nfe in series:
        found.append(parts.add(nfe))
        state = json.loads(json.dumps(parts.state()))
        parts = NfeWatch()
        parts.load_state(state)
    assert found == expected
    assert sum(text is not None for text in found) == 1


def test_the_warning_reaches_the_user(source, tmp_path):
    said = []
    run_ = trainer(source, tmp_path / "run", warn=said.append, steps=60)
    real = run_.watch.add
    run_.watch.add = lambda nfe: real(nfe if run_.at.step <= 20 else 50 * nfe)
    run(run_)
    assert len(said) == 1
    assert "function evaluations" in said[0]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_sees_one_live_line():
    stream = Terminal()
    progress = Progress(100, stream=stream)
    progress.step(1, 2.5, None, 20, 18)
    progress._drawn = -math.inf
    progress.step(2, 2.4, 3.25, 21, 19)
    progress.validation(2, 2.4, 3.25, 21, 19)
    text = stream.getvalue()
    assert "\n" not in text
    last = text.split("\r\x1b[K")[-1]
    for part in ("2/100", "loss 2.400", "val 3.250", "NFE 21/19", "steps/s", "left"):
        assert part in last
    progress.say("done")
    assert stream.getvalue().endswith("\r\x1b[Kdone\n")


def test_elsewhere_a_line_a_validation_and_not_too_many():
    stream = io.StringIO()
    progress = Progress(1000, stream=stream)
    for step in range(1, 1001):
        progress.step(step, 2.5, 3.0, 20, 18)
        progress.validation(step, 2.5, 3.0, 20, 18)
    lines = stream.getvalue().splitlines()
    assert 15 <= len(lines) <= 21
    assert lines[-1].startswith("1000/1000")
    assert "\r" not in stream.getvalue()


def test_quiet_is_quiet():
    stream = Terminal()
    progress = Progress(10, quiet=True, stream=stream)
    progress.step(1, 2.5, 3.0, 20, 18)
    progress.validation(1, 2.5, 3.0, 20, 18)
    progress.say("done")
    assert stream.getvalue() == ""
