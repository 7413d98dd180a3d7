"""Choices of a run: defaults that suit the data, and a sentence for what makes no sense."""

import numpy as np
import pytest
import torch

from pycnf.data import InputError, load
from pycnf.train.config import CHOICES, Config, choose


@pytest.fixture
def table(tmp_path):
    np.save(tmp_path / "d.npy", np.random.default_rng(0).standard_normal((250, 4)))
    return load(str(tmp_path / "d.npy"))


def test_a_config_comes_back_from_its_dictionary():
    config = Config("d.csv", hidden=(7,), drop=("a", "b"), time="fourier:4")
    assert Config.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("method", "dopri6", "Unknown --method 'dopri6' (did you mean dopri"),
        ("layer", "concatsquish", "did you mean concatsquash"),
        ("activation", "tahn", "did you mean tanh"),
        ("gradient", "discreet", "did you mean discrete"),
        ("dtype", "float16", "choose from float32, float64"),
        ("preprocess", "whitening", "did you mean whiten"),
        ("divergence", "hutchison", "did you mean hutchinson"),
        ("lr", 0.0, "--lr must be greater than 0, and 0 is not"),
        ("lr", float("nan"), "--lr must be greater than 0, and nan is not"),
        ("rtol", float("inf"), "--rtol must be greater than 0"),
        ("batch", 0, "--batch must be greater than 0"),
        ("steps", -5, "--steps must be greater than 0, and -5 is not"),
        ("step_size", 0.0, "--step-size must be greater than 0"),
        ("seed", -1, "--seed must be 0 or more"),
        ("patience", -1, "--patience must be 0 or more"),
        ("weight_decay", -0.1, "--weight-decay must be 0 or more"),
        ("test", 0.5, "--test is a part of the rows between 0 and 0.5"),
        ("validation", 0.0, "--validation is a part of the rows"),
        ("hidden", (), "--hidden wants the widths"),
        ("hidden", (64, 0), "--hidden wants the widths"),
        ("time", "fourier", "'fourier' is neither"),
        ("time", "fourier:3", "even number"),
    ],
)
def test_values_that_make_no_sense_are_named(field, value, words):
    with pytest.raises(InputError) as caught:
        Config("moons", **{field: value})
    assert words in str(caught.value)


def test_every_choice_is_accepted_by_the_flow():
    from pycnf.flows import CNF
    from pycnf.nn import MLP

    for method in CHOICES["method"]:
        options = Config("moons", method=method, step_size=0.25).solver_options()
        flow = CNF(MLP(2, (4,)), method=method, options=options)
        flow.log_prob(torch.zeros(3, 2))
        if options is not None:  # four steps, as --step-size 0.25 says
            assert flow.stats.accepted == 4
    for name in ("divergence", "gradient"):
        for value in CHOICES[name]:
            CNF(MLP(2, (4,)), **{name: value})
    for value in CHOICES["layer"]:
        MLP(2, (4,), layer=value)
    for value in CHOICES["activation"]:
        MLP(2, (4,), activation=value)


def test_what_the_user_gives_comes_before_the_defaults(table):
    config = choose(table, {"source": "d.npy", "batch": 50, "lr": 0.5})
    assert (config.batch, config.lr) == (50, 0.5)
    assert choose(table, {"source": "d.npy"}).batch == 32  # of 200 training rows


def test_epochs_are_turned_into_steps(table):
    assert choose(table, {"source": "d.npy", "batch": 50, "epochs": 2.5}).steps == 10
    with pytest.raises(InputError, match="not both"):
        choose(table, {"source": "d.npy", "epochs": 1.0, "steps": 3})
    with pytest.raises(InputError, match="--epochs must be greater than 0"):
        choose(table, {"source": "d.npy", "epochs": float("nan")})


def test_a_batch_larger_than_the_training_rows_is_refused(table):
    with pytest.raises(InputError, match="200 training rows, fewer than a batch of 201"):
        choose(table, {"source": "d.npy", "batch": 201})
    assert choose(table, {"source": "d.npy", "batch": 200}).batch == 200


def test_fewer_rows_than_the_smallest_batch_are_refused(tmp_path):
    np.save(tmp_path / "d.npy", np.random.default_rng(0).standard_normal((30, 2)))
    data = load(str(tmp_path / "d.npy"))
    with pytest.raises(InputError, match="24 training rows, fewer than the smallest batch of 32"):
        choose(data, {"source": "d.npy"})
