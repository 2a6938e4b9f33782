"""
One answer from many tiles: how the levels compare at a target, and the mixture of all answers.

Everything is continuous in the target, because a tile counts by its window, which is zero at its
border: there are no seams.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from cmanp_ros.core.lattice import Cover
from cmanp_ros.core.model import Decoded

RELUCTANCE = 8  # of the prior to come in where the coarsest tiles thin out


class Mixture(NamedTuple):
    """What all tiles say at each target."""

    mean: Tensor
    """(n, dim_y)."""
    stddev: Tensor
    """(n, dim_y), of an observation: disagreement of the tiles included."""
    weight: Tensor
    """(pairs, dim_y): share of each tile in the answer."""
    prior_weight: Tensor
    """(n, dim_y): share of the prior, 1 where no tile is."""


def compare(cover: Cover, mean: Tensor, stddev: Tensor, num_targets, num_levels) -> Tensor:
    """
    Tell each tile what the tiles of every level say at the target.

    :param mean: (pairs, dim_y) of the regressions; `stddev` alike, of an observation.
    :return: (pairs, dim_y, num_context): the tile's own level, and for each level how much of it
        has data here, how far its mean is from the tile's own in units of that stddev, and how
        much larger its stddev is. Offset and scale of the field cancel.
    """
    index, level = cover.index, cover.key[:, 0]
    log_stddev = stddev.log()
    features = [(2 * level / max(num_levels - 1, 1) - 1).to(mean)[:, None].expand_as(mean)]
    for other in range(num_levels):
        window = torch.where(level == other, cover.window, 0.0).unsqueeze(-1)
        values = torch.cat([window, window * mean, window * log_stddev], -1)
        total = values.new_zeros(num_targets, values.shape[-1]).index_add_(0, index, values)
        share, means, logs = total[index].split([1, mean.shape[-1], mean.shape[-1]], -1)
        features += [
            share.expand_as(mean),
            ((means - share * mean) / stddev).asinh(),
            logs - share * log_stddev,
        ]
    return torch.stack(features, -1)


def blend(cover: Cover, answers: Decoded, num_targets, num_levels) -> Mixture:
    """
    Mix the answers of tiles, (pairs, dim_y) each, with the prior of mean 0 and stddev 1.

    The weight of a tile is its window times the weight that it gives itself, and times how much of
    the target its level covers: where data end, a level goes before its last window does, or the
    step would be seen. Where the coarsest tiles around a target are missing the prior comes in,
    slowly.

    The mean is mixed with weights that give finer tiles a head start, `Decoded.head_start`; the
    stddev is about that mean, and has the disagreement of the tiles by the weights without it.
    """
    index = cover.index
    shape = (num_targets, answers.mean.shape[-1])
    rows = index.unsqueeze(-1).expand_as(answers.mean)
    largest = answers.mean.new_full(shape, -torch.inf)
    largest = largest.scatter_reduce(0, rows, answers.log_weight.detach(), 'amax')
    place = index * num_levels + cover.key[:, 0]
    of_level = cover.window.new_zeros(num_targets * num_levels).index_add_(0, place, cover.window)
    window = cover.window * of_level[place].clamp(max=1)
    weight = window.unsqueeze(-1) * (answers.log_weight - largest[index]).exp()
    coarse = torch.where(cover.key[:, 0] == num_levels - 1, cover.window, 0.0)
    seen = coarse.new_zeros(num_targets).index_add_(0, index, coarse).clamp(max=1)
    prior = ((1 - seen) ** RELUCTANCE).unsqueeze(-1).expand(shape)

    def sum_over_tiles(values):
        return values.new_zeros(shape).index_add(0, index, values)

    # Windows share what they cover of a target; what they do not cover belongs to the prior.
    covered = cover.window.new_zeros(num_targets).index_add_(0, index, cover.window).unsqueeze(-1)
    total = covered + prior

    def shares(weight):
        return weight * (covered / total / sum_over_tiles(weight))[index]

    ahead = shares(weight * answers.head_start.exp())
    weight, prior = shares(weight), prior / total
    mean = sum_over_tiles(ahead * answers.mean)
    spread = answers.stddev.square() + (answers.mean - mean[index]).square()
    variance = sum_over_tiles(weight * spread) + prior * (1 + mean.square())
    return Mixture(mean, variance.sqrt(), weight, prior)
