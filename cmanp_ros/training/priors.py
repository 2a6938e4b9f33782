"""
The field prior of the default model: tasks drawn from Gaussian processes on [-2, 2]^dim_x.

Kernel RBF or Matern-5/2, length log-uniform in [0.25, 1.5], scale uniform in [0.3, 1), noise
log-uniform in [0.02, 0.2]; half of the tasks have contexts along a random walk.
"""

from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor

HALF_WIDTH = 2.0


class Task(NamedTuple):
    """
    A batch of tasks; all float64, in model units.
    """

    x_context: Tensor
    """(batch, num_context, dim_x)."""
    y_context: Tensor
    """(batch, num_context, 1)."""
    x_target: Tensor
    """(batch, num_target, dim_x)."""
    y_target: Tensor
    """(batch, num_target, 1): observations, noise included."""


class Hyperparameters(NamedTuple):
    """
    What generated each task, (batch,) each.
    """

    matern: Tensor
    """bool: Matern-5/2 rather than RBF."""
    length: Tensor
    scale: Tensor
    noise: Tensor


def _uniform(generator, size, low, high):
    return low + (high - low) * torch.rand(size, dtype=torch.float64, generator=generator)


def _log_uniform(generator, size, low, high):
    return _uniform(generator, size, torch.tensor(low).log(), torch.tensor(high).log()).exp()


def hyperparameters(generator, batch) -> Hyperparameters:
    """
    Draw hyperparameters of the field prior.
    """
    return Hyperparameters(
        matern=torch.rand(batch, generator=generator) < 0.5,
        length=_log_uniform(generator, batch, 0.25, 1.5),
        scale=_uniform(generator, batch, 0.3, 1.0),
        noise=_log_uniform(generator, batch, 0.02, 0.2),
    )


def locations(generator, batch, num_context, num_target, dim_x):
    """
    Draw context and target locations; every second task has a random-walk context.

    :return: (batch, num_context, dim_x) and (batch, num_target, dim_x).
    """
    x = _uniform(generator, (batch, num_context + num_target, dim_x), -HALF_WIDTH, HALF_WIDTH)
    context, target = x[:, :num_context], x[:, num_context:]
    if num_context:
        step = 0.15 * torch.randn(
            batch, num_context, dim_x, dtype=torch.float64, generator=generator
        )
        step[:, 0] = context[:, 0]
        walk = _reflect(step.cumsum(1))
        is_walk = torch.arange(batch) % 2 == 1
        context = torch.where(is_walk[:, None, None], walk, context)
    return context, target


def _reflect(x):
    """
    Fold the line into [-2, 2] by reflection at both ends.
    """
    period = 4 * HALF_WIDTH
    x = (x + HALF_WIDTH) % period
    return torch.minimum(x, period - x) - HALF_WIDTH


def kernel(h: Hyperparameters, a: Tensor, b: Tensor) -> Tensor:
    """
    Return the covariance of the noiseless field between a (batch, n, d) and b (batch, m, d).
    """
    r = torch.cdist(a, b, compute_mode='donot_use_mm_for_euclid_dist') / h.length[:, None, None]
    matern = (1 + sqrt(5) * r + 5 / 3 * r.square()) * torch.exp(-sqrt(5) * r)
    correlation = torch.where(h.matern[:, None, None], matern, torch.exp(-0.5 * r.square()))
    return h.scale.square()[:, None, None] * correlation


def gp_predict(h: Hyperparameters, x_context, y_context, x_target):
    """
    Predict with the exact GP that knows the hyperparameters.

    :return: mean and stddev of an observation, (batch, num_target, 1).
    """
    eye = torch.eye(x_context.shape[1], dtype=torch.float64)
    noise2 = h.noise.square()[:, None, None]
    factor = torch.linalg.cholesky(kernel(h, x_context, x_context) + noise2 * eye)
    cross = torch.linalg.solve_triangular(factor, kernel(h, x_context, x_target), upper=False)
    mean = cross.mT @ torch.linalg.solve_triangular(factor, y_context, upper=False)
    variance = h.scale.square()[:, None] - cross.square().sum(1)  # (batch, num_target)
    return mean, (variance.unsqueeze(-1) + noise2).sqrt()


def exact_tasks(generator, batch, num_context, num_target, dim_x=2):
    """
    Draw tasks exactly (one Cholesky factorization a task): for evaluation.

    :return: tasks and their hyperparameters.
    """
    h = hyperparameters(generator, batch)
    context, target = locations(generator, batch, num_context, num_target, dim_x)
    x = torch.cat([context, target], 1)
    covariance = kernel(h, x, x) + 1e-8 * torch.eye(x.shape[1], dtype=torch.float64)
    white = torch.randn(batch, x.shape[1], 1, dtype=torch.float64, generator=generator)
    field = torch.linalg.cholesky(covariance) @ white
    noise = torch.randn(field.shape, dtype=torch.float64, generator=generator)
    y = field + h.noise[:, None, None] * noise
    return Task(context, y[:, :num_context], target, y[:, num_context:]), h


# Tasks for training: the field prior, and wider ones around it -----------------------------------

NUM_FEATURES = 1024  # random Fourier features of a training field: cheap, close to Gaussian


def training_tasks(generator, batch, num_context, num_target, dim_x=2) -> Task:
    """
    Draw tasks for training: half from the field prior, half from what robots meet beside it.

    The other half has more lengths, scales and smoothnesses (rough fields that no basis resolves
    among them), dense tracks, offsets, trends, step edges, noise that varies over the map,
    outliers in the context, and half-seen maps.
    """
    h = hyperparameters(generator, batch)
    wide = torch.arange(batch) % 4 >= 2  # both halves have uniform and random-walk contexts
    smoothness = torch.where(h.matern, 2.5, torch.inf)
    choice = torch.tensor([0.5, 1.5, 2.5, torch.inf])
    other = choice[torch.randint(0, 4, (batch,), generator=generator)]
    smoothness = torch.where(wide, other, smoothness)
    length = torch.where(wide, _log_uniform(generator, batch, 0.1, 2.0), h.length)
    scale = torch.where(wide, _log_uniform(generator, batch, 0.1, 1.5), h.scale)
    noise = torch.where(wide, scale * _log_uniform(generator, batch, 0.005, 0.5), h.noise)

    context, target = locations(generator, batch, num_context, num_target, dim_x)
    on_track = wide & (torch.rand(batch, generator=generator) < 0.5)
    context = torch.where(on_track[:, None, None], _track(generator, context), context)
    half_seen = wide & (torch.rand(batch, generator=generator) < 0.3)
    seen = torch.cat([-1 - context[..., :1].abs() / 2, context[..., 1:]], -1)
    context = torch.where(half_seen[:, None, None], seen, context)
    x = torch.cat([context, target], 1)
    field = scale[:, None, None] * _random_field(generator, x, smoothness, length)

    def some(probability):
        return (wide & (torch.rand(batch, generator=generator) < probability))[:, None, None]

    direction = torch.randn(batch, dim_x, 1, dtype=torch.float64, generator=generator)
    side = x @ direction - _uniform(generator, (batch, 1, 1), -1, 1)
    size = torch.randn(batch, 1, 1, dtype=torch.float64, generator=generator)
    field = field + torch.where(some(0.5), 0.5 * size, 0.0)  # offset
    field = field + torch.where(some(0.2), 0.3 * size * side, 0.0)  # trend
    field = field + torch.where(some(0.2), size * scale[:, None, None] * side.sign(), 0.0)  # edge
    uneven = (1.15 * torch.tanh(side)).exp()  # tenfold from end to end
    noise = noise[:, None, None] * torch.where(some(0.25), uneven, 1.0)
    white = torch.randn(field.shape, dtype=torch.float64, generator=generator)
    y = field + noise * white
    wrong = torch.rand(y.shape, generator=generator) < 0.05
    wrong[:, num_context:] = False  # readings that went wrong; the answer is still the field
    y = torch.where(wrong & some(0.25), field + 8 * noise * white.sign(), y)
    return Task(context, y[:, :num_context], target, y[:, num_context:])


def _track(generator, start):
    """
    Return readings along winding tracks with a footprint, shaped like `start` (batch, n, dim_x).
    """
    batch, n, dim_x = start.shape
    if n == 0:
        return start
    turn = torch.randn(start.shape, dtype=torch.float64, generator=generator)
    turn[:, 1:] *= 0.15
    heading = turn.cumsum(1)
    heading = heading / heading.norm(dim=-1, keepdim=True)
    length = _log_uniform(generator, (batch, 1, 1), 1.0, 40.0)  # of the whole track
    path = _reflect(start[:, :1] + (heading * length / n).cumsum(1))
    footprint = _log_uniform(generator, (batch, 1, 1), 0.01, 0.2)
    scatter = torch.randn(start.shape, dtype=torch.float64, generator=generator)
    return _reflect(path + footprint * scatter)


def _random_field(generator, x, smoothness, length):
    """
    Return fields of unit variance at x (batch, n, dim_x) by spectral sampling, (batch, n, 1).
    """
    batch, _, dim_x = x.shape
    shape = (batch, dim_x, NUM_FEATURES)
    omega = torch.randn(shape, dtype=torch.float64, generator=generator)
    dof = torch.where(smoothness.isinf(), 1.0, 2 * smoothness).double()
    # A Matern spectrum is a Student t with 2 nu degrees of freedom: normal over root chi-square.
    normal = torch.randn(batch, 5, NUM_FEATURES, dtype=torch.float64, generator=generator)
    used = torch.arange(5)[:, None] < dof[:, None, None]
    chi2 = (normal.square() * used).sum(1, keepdim=True)
    heavy = omega * (dof[:, None, None] / chi2).sqrt()
    omega = torch.where(smoothness.isinf()[:, None, None], omega, heavy) / length[:, None, None]
    phase = (
        2 * torch.pi * torch.rand(batch, 1, NUM_FEATURES, dtype=torch.float64, generator=generator)
    )
    weight = torch.randn(batch, NUM_FEATURES, 1, dtype=torch.float64, generator=generator)
    return sqrt(2 / NUM_FEATURES) * torch.cos(x @ omega + phase) @ weight
