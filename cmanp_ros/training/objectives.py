"""What training maximizes, per target: for maps of one tile, and for worlds of many."""

from collections.abc import Callable
from math import log, pi
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from cmanp_ros.core import CMANP
from cmanp_ros.core.attention import AttentionSums
from cmanp_ros.core.autoregressive import predict_block
from cmanp_ros.core.blending import blend
from cmanp_ros.core.lattice import Cover
from cmanp_ros.core.model import Decoded, Prior
from cmanp_ros.core.world import AT_ONCE, groups
from cmanp_ros.training.processes import Tasks

# One map -----------------------------------------------------------------------------------------


def log_likelihood(model: CMANP, tasks: Tasks, generator=None) -> Tensor:
    """
    Return the expected log-likelihood of each target, (batch, num_target, dim_y).

    The expectation is over the targets given the context and all hyperparameters of the task: its
    gradient is that of the log-likelihood, without the spread of drawn targets.
    """
    found = model.predict(_fold(model, tasks), tasks.x_target)
    variance = tasks.covariance.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    return _expected_log_density(found.mean, found.stddev, tasks.mean, variance)


def evidence_lower_bound(model: CMANP, tasks: Tasks, generator=None) -> Tensor:
    """
    Return the lower bound of the stochastic variant, (batch, num_target, dim_y).

    One sample of the posterior, which sees the targets, less its divergence from the prior.
    """
    state = _fold(model, tasks)
    encoding = model.encoding(state)
    after = model.encoding(model.update(state, tasks.x_target, tasks.y_target)).global_variable
    white = torch.randn(after.loc.shape, generator=generator).to(after.loc)
    sample = after.loc + after.scale * white
    answers = model.decode(encoding.projected, tasks.x_target, None, sample)
    density = Normal(answers.mean, answers.stddev, validate_args=False).log_prob(tasks.y_target)
    divergence = kl_divergence(after, encoding.global_variable).sum(-1)
    return density - divergence[:, None, None] / density[0].numel()


def joint_log_likelihood(model: CMANP, tasks: Tasks, generator=None) -> Tensor:
    """
    Return the expected joint log-likelihood of all targets as one block, per target: (batch, 1).

    :raises ValueError: for more than one output.
    """
    if model.config.dim_y != 1:
        raise ValueError(f'dim_y is {model.config.dim_y}, expected 1 for a joint likelihood')
    distribution = predict_block(model, _fold(model, tasks), tasks.x_target)
    factor = distribution.scale_tril.double()
    residual = tasks.mean - distribution.loc.double().unsqueeze(-1)  # (batch, num_target, 1)
    spread = torch.linalg.cholesky(tasks.covariance)
    scaled = torch.linalg.solve_triangular(factor, torch.cat([residual, spread], -1), upper=False)
    n = residual.shape[1]
    log_determinant = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    total = -0.5 * (n * log(2 * pi) + log_determinant + scaled.square().sum((-2, -1)))
    return total.unsqueeze(-1) / n


OBJECTIVES: dict[str, Callable] = {
    'log_likelihood': log_likelihood,
    'evidence_lower_bound': evidence_lower_bound,
    'joint_log_likelihood': joint_log_likelihood,
}


def _fold(model, tasks):
    return model.update(model.init_state(len(tasks.x)), tasks.x, tasks.y)


def _expected_log_density(mean, stddev, true_mean, true_variance):
    """
    Return the mean log density of N(mean, stddev^2) over N(true_mean, true_variance).
    """
    square = (true_mean - mean).square() + true_variance
    return -0.5 * (log(2 * pi) + square / stddev.square()) - stddev.log()


# Worlds ------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """
    Tiles of several worlds: their points, their targets, and what least squares says; float32.
    """

    point_tile: Tensor
    """(points,): the tile that each point is folded into."""
    point_x: Tensor
    """(points, dim_x) in tile coordinates."""
    point_y: Tensor
    """(points, 1)."""
    pair_tile: Tensor
    """(pairs,): the tile that answers for a target."""
    pair_target: Tensor
    """(pairs,): which target."""
    pair_x: Tensor
    """(pairs, dim_x) in tile coordinates."""
    pair_window: Tensor
    """(pairs,)."""
    pair_level: Tensor
    """(pairs,): level of the tile, of which the last is the coarsest in worlds of few, too."""
    y_target: Tensor
    """(targets, 1)."""
    mean: Tensor
    """(pairs, 1), as the following: the fields of `Prior`."""
    variance: Tensor
    noise_variance: Tensor
    summary: Tensor
    context: Tensor

    @property
    def prior(self) -> Prior:
        """
        Return what least squares says.
        """
        return Prior(*self[-5:])


def world_log_likelihood(model: CMANP, batch: Batch) -> Tensor:
    """
    Return the log-likelihood of each target, with gradients for everything but the regressions.
    """
    y = batch.y_target.double()
    if not len(batch.pair_tile):  # nothing was observed in any of the worlds: no gradients
        nothing = sum(0 * weight.sum() for weight in model.parameters())
        return Normal(0.0, 1.0).log_prob(y) + nothing
    parts, order = [], []
    for tiles, points, mask in groups(batch.point_tile, AT_ONCE):
        own = points[mask]
        tokens = model.embed(batch.point_x[own], batch.point_y[own])
        parts.append(model.encoder.fold(tokens, mask))
        order.append(tiles)
    place = torch.cat(order).argsort()  # every tile has points, once
    sums = AttentionSums(*(torch.cat(part)[place] for part in zip(*parts, strict=True)))
    latents = model.latents(sums)

    has_prior = model.config.least_squares is not None
    found, order = [], []
    for tiles, pairs, mask in groups(batch.pair_tile, AT_ONCE):
        own = pairs[mask]
        prior = Prior(*(part[own] for part in batch.prior)) if has_prior else None
        found.append(
            model.decode([z[tiles] for z in latents], batch.pair_x[own], prior, mask=mask)
        )
        order.append(own)
    place = torch.cat(order).argsort()
    answers = Decoded(*(torch.cat(part)[place] for part in zip(*found, strict=True)))
    cover = Cover(
        batch.pair_target, batch.pair_level[:, None], batch.pair_x, batch.pair_window.double()
    )
    mixture = blend(cover, answers, len(batch.y_target), model.config.num_levels)
    return Normal(mixture.mean, mixture.stddev).log_prob(y)


def soften(log_likelihood):
    """
    Compress what lies far below -10: one target must not decide on a whole step.
    """
    excess = (-10 - log_likelihood).clamp(min=0)
    return log_likelihood + excess - 10 * torch.log1p(excess / 10)
