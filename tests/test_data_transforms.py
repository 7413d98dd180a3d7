"""Preprocessing is invertible, and its log-determinant is that of its Jacobian."""

import math

import pytest
import scipy.stats
import torch

from pycnf.data import GaussianBaseline, InputError, Logit, Preprocess, Standardize, Whiten


def cube(n=200, features=3, seed=0):
    """Correlated points in the unit cube."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, features, generator=generator, dtype=torch.float64)
    mix = torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.5, 0.0], [-0.3, 0.2, 0.7]], dtype=torch.float64)
    return torch.sigmoid(z @ mix[:features, :features].T)


@pytest.mark.parametrize("scaling", ["standardize", "whiten"])
@pytest.mark.parametrize("logit", [False, True])
def test_logdet_is_that_of_the_jacobian_and_inverse_inverts(scaling, logit):
    x = cube()
    preprocess = Preprocess(3, scaling, logit).fit(x, "abc")
    y, logdet = preprocess(x)
    jacobian = torch.autograd.functional.jacobian(lambda x: preprocess(x)[0].sum(0), x[:5])
    expected = torch.linalg.slogdet(jacobian.movedim(1, 0)).logabsdet
    torch.testing.assert_close(logdet[:5], expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(preprocess.inverse(y), x, rtol=1e-12, atol=1e-12)


def test_standardized_rows_have_mean_zero_and_deviation_one():
    y, _ = Standardize(3).fit(cube(), "abc")(cube())
    torch.testing.assert_close(y.mean(0), torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(y.std(0), torch.ones(3, dtype=torch.float64))


def test_whitened_rows_have_unit_covariance_whatever_their_units():
    x = cube() * torch.tensor([1e-6, 1.0, 1e6], dtype=torch.float64)
    whiten = Whiten(3).fit(x, "abc")
    y, _ = whiten(x)
    torch.testing.assert_close(torch.cov(y.T), torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(whiten.matrix, whiten.matrix.T)


def test_logit_maps_the_ends_of_the_unit_interval_to_finite_values():
    y, logdet = Logit()(torch.tensor([[0.0], [0.5], [1.0]], dtype=torch.float64))
    torch.testing.assert_close(
        y, torch.tensor([[-math.log(99)], [0.0], [math.log(99)]], dtype=torch.float64)
    )
    assert torch.isfinite(logdet).all()


def test_state_dict_carries_the_scaling():
    x = cube()
    fitted = Preprocess(3, "whiten", True).fit(x, "abc")
    copy = Preprocess(3, "whiten", True)
    copy.load_state_dict(fitted.state_dict())
    assert torch.equal(copy(x)[0], fitted(x)[0])


def test_a_column_without_spread_is_named():
    x = cube()
    x[:, 1] = 0.1  # the mean of many 0.1 is not quite 0.1
    with pytest.raises(InputError, match="Column 'b' is constant"):
        Standardize(3).fit(x, "abc")


def test_numbers_beyond_double_precision_are_named():
    x = cube() * torch.tensor([1.0, 1.0, 1e300], dtype=torch.float64)
    with pytest.raises(InputError, match="Column 'c' holds numbers too large"):
        Standardize(3).fit(x, "abc")


def test_whitening_refuses_dependent_columns():
    x = cube()
    x[:, 2] = x[:, 0] + 2 * x[:, 1]
    with pytest.raises(InputError, match="linearly independent"):
        Whiten(3).fit(x, "abc")


@pytest.mark.parametrize("features", [1, 3])
def test_baseline_is_the_maximum_likelihood_gaussian(features):
    y = cube(features=features)
    baseline = GaussianBaseline(features).fit(y)
    covariance = (y - y.mean(0)).T @ (y - y.mean(0)) / len(y)
    expected = scipy.stats.multivariate_normal(y.mean(0).numpy(), covariance.numpy()).logpdf(y)
    torch.testing.assert_close(baseline.log_prob(y), torch.from_numpy(expected))


def test_baseline_is_undefined_where_rows_do_not_span_the_columns():
    assert not GaussianBaseline(3).fit(cube(n=3)).defined
    assert GaussianBaseline(3).fit(cube(n=5)).defined
