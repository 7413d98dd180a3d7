"""Sources: what is split, what is drawn afresh, and what a run recognises them by."""

import math

import numpy as np
import pytest
import torch

from pycnf.data import SOURCES, InputError, bits_per_dim, load, quantize
from pycnf.data.digits import dequantize


@pytest.fixture
def table(tmp_path):
    rows = np.random.default_rng(0).standard_normal((100, 3))
    np.save(tmp_path / "data.npy", rows)
    return tmp_path / "data.npy", rows


def test_a_table_is_split_into_parts_that_share_no_row_and_lose_none(table):
    path, rows = table
    data = load(str(path), validation=0.2, test=0.1)
    parts = [data.epoch(0), data.validation, data.test]
    assert [len(part) for part in parts] == [70, 20, 10]
    together = torch.cat(parts).numpy()
    np.testing.assert_array_equal(np.sort(together, axis=0), np.sort(rows, axis=0))
    assert torch.equal(data.epoch(0), data.epoch(5))
    assert (data.kind, data.features, data.training_rows) == ("table", 3, 70)


def test_the_split_depends_on_the_seed_alone(table):
    path, _ = table
    assert load(str(path), seed=1).fingerprint() == load(str(path), seed=1).fingerprint()
    assert load(str(path), seed=1).fingerprint() != load(str(path), seed=2).fingerprint()


def test_the_fingerprint_notices_one_changed_number(table):
    path, rows = table
    before = load(str(path)).fingerprint()
    rows[50, 1] += 1e-12
    np.save(path, rows)
    assert load(str(path)).fingerprint() != before


@pytest.mark.parametrize("name", [s for s in SOURCES if s != "digits"])
def test_toys_are_drawn_afresh_every_epoch(name):
    data = load(name)
    assert data.epoch(0).shape == (data.training_rows, 2)
    assert torch.equal(data.epoch(3), data.epoch(3))
    draws = [data.epoch(0), data.epoch(1), data.validation, data.test]
    assert len(torch.cat(draws).unique(dim=0)) == sum(map(len, draws))


def test_digits_are_the_same_images_with_fresh_noise():
    pytest.importorskip("sklearn")
    data = load("digits")
    first, second = data.epoch(0), data.epoch(1)
    assert first.shape == (data.training_rows, 64)
    assert len(first) + len(data.validation) + len(data.test) == 1797
    assert torch.equal(quantize(first), quantize(second))
    assert not torch.isin(first, second).any()


def test_dequantized_levels_fill_their_cells_and_come_back():
    levels = np.repeat(np.arange(17.0)[:, None], 4000, axis=1)
    x = dequantize(levels, np.random.default_rng(0))
    assert torch.equal(quantize(x), torch.from_numpy(levels))
    inside = x * 17 - torch.from_numpy(levels)
    torch.testing.assert_close(
        inside.mean(1), torch.full((17,), 0.5, dtype=torch.float64), atol=0.03, rtol=0
    )
    assert quantize(torch.tensor([-0.1, 1.0, 1.3])).tolist() == [0, 16, 16]


def test_bits_per_dim_of_known_densities():
    # Uniform on the cube: every level costs log2(17) bits.
    assert bits_per_dim(torch.zeros(1), 64).item() == pytest.approx(math.log2(17))
    # All mass in one cell: the density there is 17^D and nothing is left to say.
    one_cell = torch.tensor([64 * math.log(17)], dtype=torch.float64)
    assert bits_per_dim(one_cell, 64).item() == pytest.approx(0, abs=1e-12)


def test_unknown_sources_are_answered_with_the_nearest():
    with pytest.raises(InputError, match=r"Unknown source 'pinwhel' \(did you mean pinwheel\?\)"):
        load("pinwhel")
    with pytest.raises(InputError, match=r"There is no file nothing\.csv"):
        load("nothing.csv")
    with pytest.raises(InputError, match="--columns and --drop are for files"):
        load("moons", drop=["x"])


def test_too_few_rows_to_split(tmp_path):
    np.save(tmp_path / "d.npy", np.array([[1.0], [2.0], [3.0]]))
    with pytest.raises(InputError, match="has 3 rows, too few to split"):
        load(str(tmp_path / "d.npy"))
