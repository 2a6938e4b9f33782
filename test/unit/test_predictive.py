"""Densities and samples against torch.distributions."""

import dataclasses

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal

from cmanp_ros.core import PredictiveDistribution

BATCH, N, DIM_Y = 2, 5, 3


@pytest.fixture
def marginal():
    shape = (BATCH, N, DIM_Y)
    mean, stddev = torch.randn(shape), 0.1 + torch.rand(shape)
    return PredictiveDistribution(mean.double(), stddev.double())


@pytest.fixture
def joint(marginal):
    root = torch.randn(BATCH, DIM_Y, N, N, dtype=torch.float64)
    covariance = root @ root.mT + 0.1 * torch.eye(N)
    stddev = covariance.diagonal(dim1=-2, dim2=-1).sqrt().mT
    return PredictiveDistribution(marginal.mean, stddev, covariance)


def observations():
    return torch.randn(BATCH, N, DIM_Y, dtype=torch.float64)


def test_marginal_log_prob_equals_the_normal(marginal):
    y = observations()
    expected = Normal(marginal.mean, marginal.stddev).log_prob(y)
    torch.testing.assert_close(marginal.log_prob(y), expected)


def test_joint_log_prob_equals_the_multivariate_normal(joint):
    y = observations()
    expected = MultivariateNormal(joint.mean.mT, joint.covariance).log_prob(y.mT)
    assert expected.shape == (BATCH, DIM_Y)
    torch.testing.assert_close(joint.log_prob(y), expected)


def test_joint_log_prob_of_independent_targets_is_the_sum_of_the_marginal_ones(marginal):
    covariance = torch.diag_embed(marginal.stddev.square().mT)
    joint = PredictiveDistribution(marginal.mean, marginal.stddev, covariance)
    y = observations()
    torch.testing.assert_close(joint.log_prob(y), marginal.log_prob(y).sum(1))


@pytest.mark.parametrize('kind', ['marginal', 'joint'])
def test_samples_have_the_moments_of_the_distribution(kind, request):
    distribution, count = request.getfixturevalue(kind), 40_009
    samples = distribution.sample(count, torch.Generator().manual_seed(7))
    assert samples.shape == (count, BATCH, N, DIM_Y)
    covariance = distribution.covariance
    if covariance is None:
        covariance = torch.diag_embed(distribution.stddev.square().mT)
    for row in range(BATCH):
        for output in range(DIM_Y):
            drawn, stddev = samples[:, row, :, output], distribution.stddev[row, :, output]
            error = (drawn.mean(0) - distribution.mean[row, :, output]) / stddev
            assert error.abs().max() < 5 / count**0.5
            error = (drawn.mT.cov() - covariance[row, output]) / stddev / stddev.unsqueeze(-1)
            assert error.abs().max() < 8 / count**0.5


@pytest.mark.parametrize('kind', ['marginal', 'joint'])
def test_samples_follow_the_generator(kind, request):
    distribution = request.getfixturevalue(kind)
    first, again, other = (
        distribution.sample(3, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_samples_have_the_precision_of_the_mean(marginal):
    single = PredictiveDistribution(marginal.mean.float(), marginal.stddev.float())
    assert single.sample(2).dtype == single.log_prob(observations().float()).dtype == torch.float32


def test_log_prob_carries_gradients(joint):
    mean = joint.mean.clone().requires_grad_()
    covariance = joint.covariance.clone().requires_grad_()
    distribution = PredictiveDistribution(mean, joint.stddev, covariance)
    distribution.log_prob(observations()).sum().backward()
    assert mean.grad.abs().min() > 0 and covariance.grad.isfinite().all()


def test_distributions_are_frozen(marginal):
    with pytest.raises(dataclasses.FrozenInstanceError):
        marginal.mean = None
