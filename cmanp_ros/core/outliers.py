"""
Readings that are far off: which they are, and regressions of tiles without them.

They are among the extremes that a tile keeps (`extremes`). Which of these are far off is decided
anew each time a tile is solved, from all that is known then. Nothing is thrown away, so order and
batches do not matter.
"""

from math import inf, log

import torch
from torch import Tensor
from torch.distributions import StudentT

from cmanp_ros.core import basis, extremes, least_squares
from cmanp_ros.core.config import LeastSquaresConfig
from cmanp_ros.core.extremes import Candidates
from cmanp_ros.core.least_squares import LeastSquaresSums, Regression

WIDER = 10.0  # noise of readings that are far off, in units of that of others
LIKELY = 0.1  # to be far off; less is not
ENOUGH = 40  # points that count, for readings that are far off to be told from others
RESOLVED = 0.1  # log length of a tile over the shortest, at least
PROMISING = 0.12  # share of the noise variance that they explain at first, at least
ROUNDS = 3  # after a first one: each shows more readings that are far off
SETTLED = 1.1  # times the readings of the round before, at most, in the last
UNEXPLAINED = 0.8  # of the noise variance, at most, where readings are left out
REAL = 0.1  # chance that what is left out is real after all
COUNTED = 0.5  # likely to be far off


def solve(config: LeastSquaresConfig, variances: Tensor, a: LeastSquaresSums) -> Regression:
    """
    Solve the regression of each tile on its own: its own evidence, the default amplitude prior.
    """
    scale = least_squares.default_scale(config, len(a.count), a.moment.shape[-1], a.moment.device)
    weight = least_squares.weights(config, variances, a, scale)
    return posterior(config, variances, a, scale, weight)


def posterior(
    config: LeastSquaresConfig,
    variances: Tensor,
    a: LeastSquaresSums,
    scale: Tensor,
    weight: Tensor,
    nearest: Tensor | None = None,
) -> Regression:
    """
    Do as `least_squares.posterior`, without readings that are far off where these can be told.

    :param nearest: (batch,) half width of the part of a tile that is its own, where no other
        tile's center is nearer: what is left out there is counted. None: all of it is.
    """
    found = least_squares.posterior(config, variances, a, scale, weight)
    if config.outlier_share:
        nearest = a.count.new_full(a.count.shape, inf) if nearest is None else nearest
        _leave_out(config, variances, a, scale, nearest, found)
    return found


def _leave_out(config, variances, a, scale, nearest, found):
    """
    Solve tiles again without readings that are far off, where these explain the noise.

    Few points cannot tell. Where the shortest length is not short enough, or what is left is about
    as noisy, there is detail that a tile cannot resolve: its peaks are not blunders.

    :param found: `Regression` on all that was observed, of which some tiles are changed.
    """
    honesty = least_squares.honesty(config, a)  # as the voxels, it stays what it is
    may_tell = (a.count * honesty > ENOUGH) & _is_resolved(config, found)
    tiles = may_tell.nonzero()[:, 0]
    if not len(tiles):
        return
    everything, now, honesty = some_of(a, tiles), some_of(found, tiles), honesty[tiles]
    readings = extremes.candidates(everything.voxel_extremes, least_squares.dim_x_of(a))
    chance, explained = _far_off(config, everything, honesty, readings, now, readings.weight)
    some = (explained > PROMISING).any(1).nonzero()[:, 0]
    if not len(some):
        return
    tiles, chance, honesty = tiles[some], chance[some], honesty[some]
    scale, nearest = scale[tiles], nearest[tiles].view(-1, 1, 1)
    everything, readings = some_of(everything, some), some_of(readings, some)
    noise = now.noise_variance[some]
    own = least_squares.without(config, everything, readings, readings.weight * chance)
    weight = least_squares.weights(config, variances, own, scale)
    likely = torch.zeros_like(weight).scatter_(1, weight.argmax(1, keepdim=True), 1.0)
    for _ in range(ROUNDS):
        now, before = least_squares.posterior(config, variances, own, scale, likely), chance
        left = readings.weight * (1 - before)
        chance, _ = _far_off(config, own, honesty, readings, now, left)
        own = least_squares.without(config, everything, readings, readings.weight * chance)
    weight = least_squares.weights(config, variances, own, scale)
    now = least_squares.posterior(config, variances, own, scale, weight)
    is_settled = (readings.weight * (chance - SETTLED * before)).sum(1) < 0
    explains = (now.noise_variance < UNEXPLAINED * noise).any(1) & is_settled
    is_own = ((readings.x >= -nearest) & (readings.x < nearest)).all(-1)
    is_far_off = (chance > COUNTED) & is_own
    now = now._replace(num_far_off=(is_far_off * readings.weight).sum(1))
    whole = least_squares.posterior(config, variances, everything, scale, weight)
    for all_tiles, part in zip(found, _mixed(config, now, whole), strict=True):
        all_tiles[tiles[explains]] = part[explains]


def _mixed(config, a, b):
    """
    Return two moments of two regressions: what was left out in `a` may be real, as `b` takes it.
    """

    def mean_of(p, q):
        return (1 - REAL) * p + REAL * q

    apart = (a.mean - b.mean).mT
    apart = REAL * (1 - REAL) * apart.unsqueeze(3) * apart.unsqueeze(2)
    covariance = mean_of(a.covariance, b.covariance) + apart
    return a._replace(
        mean=mean_of(a.mean, b.mean),
        quadratic=basis.quadratic(config, covariance.flatten(0, 1)).view_as(a.quadratic),
        noise_variance=mean_of(a.noise_variance, b.noise_variance),
        covariance=covariance,
    )


def _is_resolved(config, regression):
    """
    Return which tiles, (batch,) bool, would not take a shorter length if there were one.
    """
    if len(config.lengths) == 1:
        return torch.ones_like(regression.summary[:, 0, 0], dtype=torch.bool)
    return regression.summary[..., 0].amin(1) > log(min(config.lengths)) + RESOLVED


def _far_off(config, a, honesty, readings, regression, weight):
    """
    Return how likely readings (batch, n) are far off, and which share of the noise that explains.

    :param honesty: (batch,), see `least_squares.honesty`.
    :param weight: (batch, n) of the readings in the sums.
    :return: (batch, n), and (batch, dim_y).
    """
    noise = regression.noise_variance
    mean, variance = least_squares.predict(config, regression, readings.x)
    weight, count = weight * honesty.unsqueeze(1), a.count * honesty
    chance = probability(config, readings, mean, variance, noise, weight, count)
    chance = chance * _is_resolved(config, regression).unsqueeze(1)
    residual = (readings.y - mean).square() * (chance * weight).unsqueeze(-1)
    return chance, residual.sum(1) / (noise * count.unsqueeze(1))


def some_of(parts: tuple[Tensor, ...], tiles: Tensor) -> tuple[Tensor, ...]:
    """
    Return the same of some tiles, (n,): a tuple of the same kind.

    :param parts: tensors (tiles, ...), with names or without.
    """
    return getattr(type(parts), '_make', tuple)(part[tiles] for part in parts)


def probability(
    config: LeastSquaresConfig,
    found: Candidates,
    mean: Tensor,
    variance: Tensor,
    noise_variance: Tensor,
    weight: Tensor,
    count: Tensor,
) -> Tensor:
    """
    Return how likely each candidate is far off, (batch, n), from a regression on all others.

    Residuals of leaving one out follow from those of the regression (Cook and Weisberg 1982, 2.2);
    over their spread they have a Student-t distribution, wider for a share of all readings.

    :param mean: (batch, n, dim_y) of the regression at the candidates, and `variance`.
    :param noise_variance: (batch, dim_y).
    :param weight: (batch, n) of the candidates in the regression.
    :param count: (batch,) of the points that count in it.
    """
    there, noise = found.weight > 0, noise_variance.unsqueeze(1)
    leverage = (weight.unsqueeze(-1) * variance / noise).clamp(max=1 - 1e-6)
    residual, spread = (found.y - mean) / (1 - leverage), noise + variance / (1 - leverage)
    free = torch.where(there.unsqueeze(-1), 1 - leverage, 0.0).sum(1, keepdim=True)
    free = free * (count / there.sum(1).clamp(min=1))[:, None, None]
    freedom = 2 * config.amplitude_shape + free
    square = residual.square() / spread
    z = (square * (freedom - 1) / (freedom - square).clamp(min=1)).sqrt()  # not in its own spread
    wider = (1 + (WIDER**2 - 1) * noise / spread).sqrt()
    student = StudentT(freedom - 1, validate_args=False)
    ratio = student.log_prob(z / wider) - wider.log() - student.log_prob(z)
    share = config.outlier_share
    chance = torch.sigmoid(log(share / (1 - share)) + ratio.sum(-1))
    return torch.where(there & (chance > LIKELY), chance, 0.0)
