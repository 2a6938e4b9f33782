"""Scores of predictions, with standard errors over tasks."""

from statistics import NormalDist

import torch
from torch import Tensor


def rmse(mean: Tensor, y: Tensor) -> Tensor:
    """
    Return the root mean squared error of each task, (batch,).
    """
    return (mean - y).square().flatten(1).mean(1).sqrt()


def coverage(mean: Tensor, stddev: Tensor, y: Tensor, probability: float) -> Tensor:
    """
    Return the share of y inside the central interval of that probability, (batch,).
    """
    z = NormalDist().inv_cdf(0.5 + probability / 2)
    return ((y - mean).abs() <= z * stddev).double().flatten(1).mean(1)


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """
    Return the mean over tasks (batch,) and its standard error.
    """
    return values.mean().item(), (values.std() / len(values) ** 0.5).item()


def log_likelihood(mean: Tensor, stddev: Tensor, y: Tensor) -> Tensor:
    """
    Return the mean log density of the targets of each task [nat], (batch,).
    """
    return torch.distributions.Normal(mean, stddev).log_prob(y).flatten(1).mean(1)
