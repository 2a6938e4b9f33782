"""Scores against numpy, scipy and what they mean."""

import numpy as np
import pytest
import scipy.stats
import torch
from sklearn.metrics import root_mean_squared_error

from cmanp_ros.core.metrics import coverage, log_likelihood, mean_and_error, rmse

BATCH, N, DIM_Y = 3, 7, 2
SHAPE = (BATCH, N, DIM_Y)


@pytest.fixture
def scored():
    """Return mean, stddev and y."""
    mean, stddev = torch.randn(SHAPE).double(), 0.1 + torch.rand(SHAPE).double()
    return mean, stddev, mean + stddev * torch.randn(SHAPE)


def test_rmse_is_one_number_for_each_task(scored):
    mean, _, y = scored
    expected = [
        root_mean_squared_error(y[row].flatten(), mean[row].flatten()) for row in range(BATCH)
    ]
    np.testing.assert_allclose(rmse(mean, y), expected)
    assert (rmse(y, y) == 0).all()


def test_log_likelihood_is_the_mean_log_density_of_each_task(scored):
    mean, stddev, y = scored
    expected = scipy.stats.norm.logpdf(y, mean, stddev).mean((1, 2))
    np.testing.assert_allclose(log_likelihood(mean, stddev, y), expected)


@pytest.mark.parametrize('probability', [0.5, 0.9, 0.95])
def test_coverage_is_the_share_inside_the_central_interval(scored, probability):
    mean, stddev, y = scored
    low, high = scipy.stats.norm.interval(probability, mean, stddev)
    expected = ((y.numpy() >= low) & (y.numpy() <= high)).mean((1, 2))
    np.testing.assert_allclose(coverage(mean, stddev, y, probability), expected)


@pytest.mark.parametrize('probability', [0.5, 0.9])
def test_coverage_of_the_true_distribution_is_its_probability(probability):
    mean, stddev = torch.zeros(1, 40_009, 1), torch.full((1, 40_009, 1), 3.0)
    y = mean + stddev * torch.randn(mean.shape)
    assert abs(coverage(mean, stddev, y, probability).item() - probability) < 0.01


def test_mean_and_error_are_those_of_a_sample():
    values = torch.randn(13, dtype=torch.float64)
    mean, error = mean_and_error(values)
    assert isinstance(mean, float) and isinstance(error, float)
    np.testing.assert_allclose([mean, error], [values.mean(), scipy.stats.sem(values)])
