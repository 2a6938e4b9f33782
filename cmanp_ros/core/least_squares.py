"""
The second memory: Bayesian linear regression on fixed functions, as additive sums.

The functions are those of `basis`. The sums do not depend on hyperparameters: those enter in
`solve`, through the spectral density of the covariance (Solin and Saerkkae 2020).
"""

from functools import cache, partial
from itertools import product
from math import inf, lgamma, log, pi
from typing import NamedTuple

import torch
from torch import Tensor

from cmanp_ros.core import basis, extremes, settings
from cmanp_ros.core.config import LeastSquaresConfig
from cmanp_ros.core.lattice import HALF_WIDTH
from cmanp_ros.core.linalg import OVERSAMPLING, cholesky, eliminate, halves, low_rank


class LeastSquaresSums(NamedTuple):
    """
    What is kept of the observations, float64: sums, and a coarse map of where points lay.
    """

    gram: Tensor
    """(batch, num_products): what sum phi phi^T is made of, see `basis.gram`."""
    moment: Tensor
    """(batch, num_functions, dim_y): sum phi y."""
    sum_squares: Tensor
    """(batch, dim_y): sum y^2."""
    count: Tensor
    """(batch,): number of points, less what was forgotten."""
    voxel_count: Tensor
    """(batch, num_voxels): points in each voxel, less what was forgotten."""
    voxel_freshness: Tensor
    """(batch, num_voxels): weight of the newest point of each voxel; 1 if none was forgotten."""
    voxel_extremes: Tensor
    """(batch, num_voxels, slots, dim_x + dim_y + 1): see `extremes.find`."""


class Regression(NamedTuple):
    """
    Posterior of the weights, averaged over hyperparameters by evidence (two moments, exact).
    """

    mean: Tensor
    """(batch, num_functions, dim_y)."""
    quadratic: Tensor
    """(batch, dim_y, num_products): the covariance as `basis.evaluate` takes it."""
    noise_variance: Tensor
    """(batch, dim_y)."""
    summary: Tensor
    """(batch, dim_y, num_summaries): posterior of the hyperparameters, see `posterior`."""
    num_far_off: Tensor
    """(batch,): observations that were left out, see `outliers`, less what was forgotten; each
    counts in one tile."""
    covariance: Tensor | None
    """(batch, dim_y, num_functions, num_functions); None where only marginals are asked for."""


def spectral_density(omega: Tensor, smoothness: float, length: float) -> Tensor:
    """
    Return the spectral density of a Matern kernel of variance 1 (Rasmussen and Williams 4.15).

    :param omega: (num_eigenfunctions, dim_x) angular frequencies.
    :param smoothness: nu; inf is the RBF kernel.
    :return: (num_eigenfunctions,).
    """
    dim, square = omega.shape[-1], omega.square().sum(-1)
    if smoothness == inf:
        return (2 * pi) ** (dim / 2) * length**dim * torch.exp(-0.5 * length**2 * square)
    nu, scale = smoothness, 2 * smoothness / length**2
    constant = dim * log(2) + dim / 2 * log(pi) + lgamma(nu + dim / 2) - lgamma(nu)
    return torch.exp(constant + nu * log(scale) - (nu + dim / 2) * torch.log(scale + square))


LEAST_VARIANCE = 1e-10  # of a weight, relative to the squared amplitude


@cache
def prior_variances(config: LeastSquaresConfig, dim_x: int) -> Tensor:
    """
    Return prior variances of the weights relative to the squared amplitude.

    :return: (num_kernels, num_functions), one row for each smoothness and length of the finer grid
        of `settings`.
    """
    config = settings.finer(config)
    omega, norms = basis.frequencies(config, dim_x), basis.squared_norms(config, dim_x)
    linear = torch.full((dim_x,), max(config.slope_variance, LEAST_VARIANCE), dtype=torch.float64)
    rows = [
        torch.cat([(spectral_density(omega, nu, length) + LEAST_VARIANCE) / norms, linear])
        for nu, length in product(config.smoothnesses, config.lengths)
    ]
    variances = torch.stack(rows)
    variances[:, basis.CONSTANT] += config.offset_variance
    return variances


def sums(
    config: LeastSquaresConfig, x: Tensor, y: Tensor, mask: Tensor | None = None
) -> LeastSquaresSums:
    """
    Return the sums of one chunk of points.

    :param x: (batch, n, dim_x) in model units.
    :param y: (batch, n, dim_y).
    :param mask: (batch, n) bool: which points are there; None: all.
    """
    y = y.double()
    present = torch.ones_like(y[..., 0]) if mask is None else mask.to(y.dtype)
    gram, moment = basis.sums(config, x, y, present)
    batch, _, dim_x = x.shape
    voxels = torch.zeros(batch, config.voxels_per_axis**dim_x, dtype=y.dtype, device=x.device)
    voxel = _voxel(config, x)
    voxels = voxels.scatter_add(1, voxel, present)
    return LeastSquaresSums(
        gram=gram,
        moment=moment,
        sum_squares=(y.square() * present.unsqueeze(-1)).sum(1),
        count=present.sum(1),
        voxel_count=voxels,
        voxel_freshness=(voxels > 0).to(y.dtype),
        voxel_extremes=extremes.find(config, x, y, voxel, present),
    )


def _voxel(config, x):
    """
    Return the flat index (batch, n) of the voxel of each point; outside [-2, 2] the nearest.
    """
    m = config.voxels_per_axis
    cell = ((x.double() / HALF_WIDTH + 1) * (m / 2)).floor().long().clamp(0, m - 1)
    flat = cell[..., 0]
    for axis in range(1, x.shape[-1]):
        flat = flat * m + cell[..., axis]
    return flat


def empty(config: LeastSquaresConfig, dim_x: int, dim_y: int, batch: int, device=None):
    """
    Return the sums of no points.
    """
    kwargs = {'dtype': torch.float64, 'device': device}
    return LeastSquaresSums(
        gram=torch.zeros(batch, basis.num_products(config, dim_x), **kwargs),
        moment=torch.zeros(batch, basis.num_functions(config, dim_x), dim_y, **kwargs),
        sum_squares=torch.zeros(batch, dim_y, **kwargs),
        count=torch.zeros(batch, **kwargs),
        voxel_count=torch.zeros(batch, config.voxels_per_axis**dim_x, **kwargs),
        voxel_freshness=torch.zeros(batch, config.voxels_per_axis**dim_x, **kwargs),
        voxel_extremes=extremes.empty(config, dim_x, dim_y, batch, device),
    )


def merge(a: LeastSquaresSums, b: LeastSquaresSums) -> LeastSquaresSums:
    """
    Return the sums of both sets of points: addition, and of each voxel the freshest and extremes.
    """
    added = (p + q for p, q in zip(a[:-2], b[:-2], strict=True))
    freshest = torch.maximum(a.voxel_freshness, b.voxel_freshness)
    kept = extremes.merge(a.voxel_extremes, b.voxel_extremes, dim_x_of(a))
    return LeastSquaresSums(*added, voxel_freshness=freshest, voxel_extremes=kept)


def dim_x_of(a: LeastSquaresSums) -> int:
    """
    Return the number of coordinates of the points.
    """
    return a.voxel_extremes.shape[-1] - a.moment.shape[-1] - 1


ROUNDING = 1e-9  # relative, of sums of many millions of points
NEARLY_ZERO = 1e-12  # a function's mean square where all points lie on its zeros, after rounding


def is_possible(
    config: LeastSquaresConfig, a: LeastSquaresSums, num_observations: Tensor, largest: float
) -> Tensor:
    """
    Return whether observations can have given these sums, (batch,) bool; if so, `solve` works.

    No product of functions exceeds 1 in a tile, and the inner products of all functions and values
    among each other are a positive semidefinite matrix.

    :param num_observations: (batch,), points ever folded.
    :param largest: absolute value in model units that no observation exceeds.
    """
    more, count, gram = 1 + ROUNDING, a.count, _gram(config, a)
    weight, dim_x = a.voxel_extremes[..., -1], dim_x_of(a)
    voxel = _voxel(config, a.voxel_extremes[..., :dim_x].flatten(1, 2)).view(weight.shape)
    own_voxel = voxel == torch.arange(weight.shape[1], device=voxel.device).unsqueeze(1)
    found = extremes.candidates(a.voxel_extremes, dim_x)
    rest = without(config, a, found, found.weight)
    seen, in_voxels = num_observations.to(count), a.voxel_count.sum(1)
    constant = gram[:, basis.CONSTANT, basis.CONSTANT]
    is_present = (a.voxel_freshness > 0) == (a.voxel_count > 0)
    holds = [
        (count >= 0) & (count <= more * seen),
        (constant - count).abs() <= ROUNDING * count,
        (in_voxels - count).abs() <= ROUNDING * count,
        (is_present & (a.voxel_count >= 0) & (a.voxel_freshness <= 1)).all(1),
        (a.voxel_count <= more * seen.unsqueeze(1) * a.voxel_freshness).all(1),
        (a.gram.abs() <= more * count.unsqueeze(1)).all(1),
        (a.sum_squares <= more * largest**2 * count.unsqueeze(1)).all(1),
        ((weight >= 0) & (weight <= a.voxel_freshness.unsqueeze(-1))).flatten(1).all(1),
        (found.y.abs() <= largest).flatten(1).all(1),
        (own_voxel | (weight == 0)).flatten(1).all(1),
    ]
    products = (_inner_products(config, part) for part in (a, rest))
    for whole, left in zip(*products, strict=True):
        least = (NEARLY_ZERO * count.unsqueeze(1)).clamp(min=torch.finfo(whole.dtype).tiny)
        size = (whole.diagonal(dim1=-2, dim2=-1) + least).clamp(min=least).sqrt()
        for inner in (whole, left):  # whatever is left out of it later
            cosine = inner / size.unsqueeze(-1) / size.unsqueeze(-2)
            cosine.diagonal(dim1=-2, dim2=-1).add_(ROUNDING + least / size.square())
            holds.append(torch.linalg.cholesky_ex(cosine).info == 0)
    return torch.stack(holds).all(0)


def _inner_products(config, a):
    """
    Return those of functions and values among each other, (batch, n + 1, n + 1) for each output.
    """
    gram = _gram(config, a)
    for moment, square in zip(a.moment.unbind(-1), a.sum_squares.unbind(-1), strict=True):
        below = torch.cat([moment, square.unsqueeze(-1)], -1).unsqueeze(1)
        yield torch.cat([torch.cat([gram, moment.unsqueeze(-1)], -1), below], 1)


def forget(a: LeastSquaresSums, factor: float) -> LeastSquaresSums:
    """
    Weight every point folded so far by `factor` in (0, 1].
    """
    kept = extremes.forget(a.voxel_extremes, factor)
    return LeastSquaresSums(*(part * factor for part in a[:-1]), voxel_extremes=kept)


NUM_SUMMARIES = 9
LOG_AMPLITUDE, LOG_COUNT, LOG_HONESTY, SEEN = 5, 6, 7, 8  # where some of them stand
CELLS_PER_AXIS = 5  # of a tile, each seen or not: a pass of a track fills about a third of them
MATRICES_AT_ONCE = 40  # that are factorized together: they fit in caches
FEW = (24, 40)  # points of a tile: their covariance is factorized, not all weights'
DISMISSED = 15.0  # in log evidence, under the best: settings beside it are not looked at
FAR_MORE = 8.0  # times the median number of points in a voxel
FORGOTTEN = 1e-6  # weight of its newest point, below which a tile goes back to the prior


class Evidence(NamedTuple):
    """
    What the sums alone say about every setting of the grid of hyperparameters; float64.
    """

    residual: Tensor
    """(batch, settings, dim_y): half the squares left unexplained, over squared noise."""
    log_determinant: Tensor
    """(batch, settings)."""
    count: Tensor
    """(batch,): points that count as independent."""


def evidence(config: LeastSquaresConfig, variances: Tensor, a: LeastSquaresSums) -> Evidence:
    """
    Solve the regression for settings of the grid that are likely; the amplitude is left open.

    Conjugate normal-inverse-gamma model (Bishop 2006, 3.3): w ~ N(0, a^2 S),
    y ~ N(phi w, a^2 r^2), a^2 ~ InvGamma(shape, scale). The sums are scaled by `honesty` before.

    Many points leave few settings, so not all are solved: a search begins with some of the grid,
    and goes on beside those that are likely, and beside the best one of each smoothness. The
    others go on as steeply as those before them, at least `DISMISSED` below the best of all.

    :param variances: (num_kernels, num_functions) of `prior_variances`.
    """
    gram, moment, sum_squares, count, *_ = _honest_sums(config, a)
    of_each = variances.to(gram.device).unflatten(0, (len(config.smoothnesses), -1))
    variances = of_each[:, :: config.refinement].flatten(0, 1)
    residual = gram.new_empty(len(gram), settings.num_settings(config), moment.shape[-1])
    found = Evidence(residual, gram.new_empty(residual.shape[:2]), count)
    for tiles, *factors in _systems(a, gram, moment):
        known = sum_squares[tiles], count[tiles]
        if factors:
            part = _evidence_of_few(config, variances, *factors, *known)
        else:
            part = _search(config, variances, gram[tiles], moment[tiles], *known)
        for whole, own in zip(found, part, strict=True):
            whole[tiles] = own
    return found


def _systems(a, gram, moment):
    """
    Yield tiles to be solved together: those of few points in as many equations, others in all.

    :return: numbers of tiles (t,); and for those of few points R (t, m, num_functions) with
        gram = R^T R, and z (t, m, dim_y) with moment = R^T z, see `low_rank`.
    """
    others = torch.ones_like(a.count, dtype=torch.bool)
    for few in FEW:
        some = (others & (a.count <= few)).nonzero()[:, 0]
        if len(some) and gram.shape[-1] > few + OVERSAMPLING:
            *factors, holds = low_rank(gram[some], moment[some], few)
            others[some] = ~holds
            yield some[holds], *(part[holds] for part in factors)
    if others.any():
        yield (others.nonzero()[:, 0],)


def _search(config, variances, gram, moment, sum_squares, count):
    """
    Return the evidence of tiles (t, ...), solved for settings that are likely.
    """
    batch, _, k = moment.shape
    ridge = _ridge(config, variances)
    constant = -ridge.log().sum(1) / 2  # half the log determinant of S / r^2
    shape, beside = (batch, len(ridge)), settings.beside(config).to(gram.device)
    explained, half_log = gram.new_zeros(*shape, k), gram.new_zeros(shape)
    is_new = settings.first(config).to(gram.device).expand(shape)
    is_solved, parts = torch.zeros_like(is_new), halves(gram, moment)
    scale = default_scale(config, batch, k, gram.device)
    while is_new.any():
        for some in is_new.nonzero().split(MATRICES_AT_ONCE):
            tile, setting = some.T
            solved, log_of_solved = eliminate(parts, tile, ridge[setting])
            explained[tile, setting] = solved
            half_log[tile, setting] = log_of_solved + constant[setting]
        is_solved = is_solved | is_new
        found = _evidence_of(config, explained, half_log, sum_squares, count)
        logs = log_evidence(config, found, scale).masked_fill(~is_solved.unsqueeze(-1), -inf)
        is_likely = logs > logs.amax(1, keepdim=True) - DISMISSED
        each = logs.unflatten(1, (len(config.smoothnesses), -1))
        is_best = (each == each.amax(2, keepdim=True)).flatten(1, 2)  # of its smoothness
        around = (is_likely | is_best).any(-1).to(beside)
        is_new = (around @ beside > 0) & ~is_solved
    best = logs.argmax(1, keepdim=True)  # (t, 1, dim_y)
    residual = found.residual.gather(1, best)
    log_determinant = found.log_determinant.gather(1, best[:, 0]).amax(1, keepdim=True)
    log_determinant = log_determinant + _below(config, logs, is_solved)
    return found._replace(
        residual=torch.where(is_solved.unsqueeze(-1), found.residual, residual),
        log_determinant=torch.where(is_solved, found.log_determinant, log_determinant),
    )


def _below(config, logs, is_solved):
    """
    Return how far settings are below the best one, (t, settings), also those that are not solved.

    These go on as steeply as the two before them along an axis of the grid, and are at least
    `DISMISSED` below: a spline over steps would see likely settings where none are.

    :param logs: (t, settings, dim_y) where solved, (t, settings).
    """
    axes = len(config.smoothnesses), len(config.lengths), len(config.noise_ratios)
    below = (logs.amax(1, keepdim=True) - logs).amin(-1).unflatten(1, axes)
    is_known = is_solved.unflatten(1, axes)
    while not is_known.all():
        ahead = torch.zeros_like(below)
        for axis in (2, 3):
            for turned in (lambda part: part, partial(torch.flip, dims=(axis,))):
                found = turned(_ahead(turned(below), turned(is_known), axis))
                ahead = torch.maximum(ahead, found)
        is_new = ~is_known & (ahead > 0)
        if not is_new.any():  # grids of few settings
            ahead, is_new = torch.full_like(below, DISMISSED), ~is_known
        below, is_known = torch.where(is_new, ahead, below), is_known | is_new
    return below.flatten(1)


def _ahead(below, is_known, axis):
    """
    Return how far below settings are on the line through the next two on an axis; 0: unknown.
    """
    found, size = torch.zeros_like(below), below.shape[axis] - 2
    if size > 0:
        (one, two), known = (
            [part.narrow(axis, i, size) for i in (1, 2)] for part in (below, is_known)
        )
        line = (2 * one - two).clamp(min=DISMISSED)
        found.narrow(axis, 0, size).copy_(torch.where(known[0] & known[1], line, 0.0))
    return found


def _evidence_of_few(config, variances, rows, right, sum_squares, count):
    """
    Return the evidence of tiles given by their factors, see `_systems`.
    """
    noise2, num = _noise2(config, rows), settings.num_settings(config)
    batch, size, k = right.shape
    explained, half_log = rows.new_empty(batch, num, k), rows.new_empty(batch, num)
    for some in torch.arange(batch).split(max(1, MATRICES_AT_ONCE // num)):
        own, value = rows[some].unsqueeze(1), right[some].unsqueeze(1)
        inner = ((own * variances.unsqueeze(1)) @ own.mT).flatten(0, 1)
        value = value.expand(-1, len(variances), -1, -1).flatten(0, 1)
        which = torch.arange(len(inner), device=rows.device).repeat_interleave(len(noise2))
        ridge = noise2.repeat(len(inner))
        solved, log_of_solved = eliminate(
            halves(inner, value), which, ridge.unsqueeze(1).expand(-1, size)
        )
        log_of_solved = log_of_solved - size / 2 * ridge.log()
        half_log[some] = log_of_solved.view(-1, num)
        left = (ridge.unsqueeze(1) * solved).view(-1, num, k)
        explained[some] = right[some].square().sum(1, keepdim=True) - left
    return _evidence_of(config, explained, half_log, sum_squares, count)


def _evidence_of(config, explained, half_log, sum_squares, count):
    """
    Return the evidence by the squares explained (t, settings, dim_y).

    :param half_log: (t, settings), half the log determinant over that of the noise alone.
    """
    noise2 = _noise2_of_settings(config, explained)
    left = (sum_squares.unsqueeze(1) - explained) / noise2.unsqueeze(-1)
    log_determinant = half_log + noise2.log() * (count / 2).unsqueeze(1)
    return Evidence(left.clamp(min=0) / 2, log_determinant, count)


def _noise2(config, like):
    """
    Return the squared noise ratios, (noises,).
    """
    return like.new_tensor(config.noise_ratios).square()


def _noise2_of_settings(config, like):
    """
    Return the squared noise ratio of every setting, (settings,).
    """
    noise2 = _noise2(config, like)
    return noise2.repeat(settings.num_settings(config) // len(noise2))


def _ridge(config, variances):
    """
    Return what the prior of the weights adds to the gram matrix, (settings, functions).
    """
    return (_noise2(config, variances).unsqueeze(1) / variances.unsqueeze(1)).flatten(0, 1)


def _factor(matrix, ridge):
    """
    Return the Cholesky factor of matrices (batch, n, n), which it changes, plus ridge (batch, n).
    """
    matrix.diagonal(dim1=1, dim2=2).add_(ridge)
    return cholesky(matrix)


def default_scale(config: LeastSquaresConfig, batch: int, dim_y: int, device=None) -> Tensor:
    """
    Return the prior scale of the squared amplitude that the configuration gives, (batch, dim_y).
    """
    return torch.full((batch, dim_y), config.amplitude_scale, dtype=torch.float64, device=device)


def log_evidence(config: LeastSquaresConfig, e: Evidence, scale: Tensor) -> Tensor:
    """
    Return the log evidence of every setting of the grid, (batch, settings, dim_y).

    The amplitude is integrated out, or follows from the noise where that is known.

    :param scale: (batch, dim_y) of the amplitude's inverse-gamma prior.
    """
    if config.noise_stddev is not None:
        known = _amplitudes(config, e, scale)
        occam = e.log_determinant.unsqueeze(-1) + e.count[:, None, None] / 2 * known.log()
        return -e.residual / known - occam
    shape = (config.amplitude_shape + e.count / 2)[:, None, None]
    return -shape * (scale.unsqueeze(1) + e.residual).log() - e.log_determinant.unsqueeze(-1)


def amplitude(config: LeastSquaresConfig, e: Evidence, scale: Tensor, weight: Tensor) -> Tensor:
    """
    Return the posterior mean of the squared amplitude, (batch, dim_y).

    :param weight: (batch, settings, dim_y), as `settings.weigh` gives them.
    """
    amplitudes = settings.interpolated(config, _amplitudes(config, e, scale).log()).exp()
    return (weight * amplitudes).sum(1)


def _amplitudes(config, e, scale):
    """
    Return `_amplitude` of every setting of the grid, (batch, settings, dim_y).
    """
    noise2 = _noise2_of_settings(config, e.residual)
    return _amplitude(config, noise2, e.residual, e.count.unsqueeze(1), scale.unsqueeze(1))


def _amplitude(config, noise2, residual, count, scale):
    """
    Return the posterior mean of the squared amplitude, or what follows from a known noise.

    :param noise2: (...) of a setting, as `count`.
    :param residual: (..., dim_y) as in `Evidence`; `scale` (..., dim_y) of the prior.
    """
    if config.noise_stddev is not None:
        return (config.noise_stddev**2 / noise2).unsqueeze(-1).expand_as(residual)
    shape = (config.amplitude_shape + count / 2).unsqueeze(-1)
    return (scale + residual) / (shape - 1)


def posterior(
    config: LeastSquaresConfig,
    variances: Tensor,
    a: LeastSquaresSums,
    scale: Tensor,
    weight: Tensor,
) -> Regression:
    """
    Average the regression over settings, in two exact moments of the weights.

    :param scale: (batch, dim_y) of the amplitude's inverse-gamma prior.
    :param weight: (batch, settings, dim_y) as `settings.weigh` gives them, by the evidence of the
        tile alone or with others.
    :return: posterior of the weights; `summary` holds the posterior means of log length, log
        noise ratio, 1 / smoothness, the spread of the first two, log amplitude over its prior (of
        the settings that are averaged), log(1 + effective count), log(effective count / count),
        and the share of the tile that was seen.
    """
    config = settings.finer(config)
    gram, moment, sum_squares, count, center, counted = _honest_sums(config, a)
    variances, noise2_of = variances.to(gram.device), _noise2_of_settings(config, gram)
    ridge = _ridge(config, variances)
    variance_of = variances.repeat_interleave(len(config.noise_ratios), 0)

    share = averaged(config, weight)
    w, noise = moment.new_zeros(*weight.shape[:2], *moment.shape[1:]), torch.zeros_like(scale)
    amplitude2 = torch.zeros_like(scale)
    covariance = gram.new_zeros(len(gram), weight.shape[-1], *gram.shape[1:])
    for tiles, *factors in _systems(a, gram, moment):
        for some in (share[tiles] > 0).any(-1).nonzero().split(MATRICES_AT_ONCE):
            place, setting = some.T
            tile, noise2 = tiles[place], noise2_of[setting]
            if factors:
                rows, right = (part[place] for part in factors)
                own = _invert_few(rows, right, variance_of[setting], noise2)
            else:
                own = _invert(gram[tile], moment[tile], ridge[setting], noise2)
            own_covariance, w[tile, setting] = own
            left = sum_squares[tile] - (own[1] * moment[tile]).sum(1)
            residual = left.clamp(min=0) / (2 * noise2.unsqueeze(-1))
            scaled = _amplitude(config, noise2, residual, count[tile], scale[tile])
            scaled = scaled * share[tile, setting]
            amplitude2.index_add_(0, tile, scaled)
            noise.index_add_(0, tile, scaled * noise2.unsqueeze(-1))
            for output, size in enumerate(scaled.unbind(-1)):
                covariance[:, output].index_add_(0, tile, own_covariance * size[:, None, None])
    most = min(config.num_averaged * share.shape[-1], share.shape[1])
    kept = share.amax(-1).topk(most, dim=1).indices  # no tile averages more, whatever is beside it
    share, w = share.take_along_dim(kept[..., None], 1), w.take_along_dim(kept[..., None, None], 1)
    mean = torch.einsum('bso,bsfo->bfo', share, w)
    spread = (w - mean.unsqueeze(1)) * share.sqrt().unsqueeze(2)
    spread = spread.permute(0, 3, 1, 2)  # the settings disagree: that is uncertainty too
    covariance += spread.mT @ spread

    mean[:, basis.CONSTANT] += center

    grid = settings.coordinates(config).to(gram.device)  # (settings, 3)
    moments = torch.einsum('bso,sp->bop', weight, torch.cat([grid, grid.square()], -1))
    center, square = moments.chunk(2, -1)
    known = torch.stack([torch.log1p(count), counted.log(), _seen(config, a)], -1)
    relative = amplitude2 * (config.amplitude_shape - 1) / scale
    summary = torch.cat(
        [
            center,
            (square - center.square()).clamp(min=0).sqrt()[..., :2],
            0.5 * relative.log().unsqueeze(-1),
            known.unsqueeze(1).expand(-1, weight.shape[-1], -1),
        ],
        -1,
    )
    quadratic = basis.quadratic(config, covariance.flatten(0, 1)).unflatten(0, scale.shape)
    return Regression(mean, quadratic, noise, summary, torch.zeros_like(count), covariance)


def weights(
    config: LeastSquaresConfig, variances: Tensor, a: LeastSquaresSums, scale: Tensor
) -> Tensor:
    """
    Return the weights of all settings (batch, settings, dim_y) by each tile's own evidence.

    :param scale: (batch, dim_y) of the amplitude's inverse-gamma prior.
    """
    logs = log_evidence(config, evidence(config, variances, a), scale)
    return settings.weigh(config, logs)


def without(
    config: LeastSquaresConfig, a: LeastSquaresSums, readings: extremes.Candidates, weight: Tensor
) -> LeastSquaresSums:
    """
    Return the sums less readings that they hold; voxels stay as they are.

    :param weight: (batch, n), how much of each reading.
    """
    gram, moment = basis.sums(config, readings.x, readings.y, weight)
    squares = (readings.y.square() * weight.unsqueeze(-1)).sum(1)
    return a._replace(
        gram=a.gram - gram,
        moment=a.moment - moment,
        sum_squares=a.sum_squares - squares,
        count=a.count - weight.sum(1),
    )


def _invert(gram, moment, ridge, noise2):
    """
    Return covariances of the weights (batch, n, n), n functions, and means (batch, n, dim_y).

    In units of the squared amplitude, as all here.

    :param ridge: (batch, n), see `_ridge`; `noise2` (batch,).
    """
    inverse = torch.cholesky_inverse(_factor(gram, ridge))
    mean = inverse @ moment
    return inverse.mul_(noise2[:, None, None]), mean


def _invert_few(rows, right, variance, noise2):
    """
    Return the same of sums given by their factors, see `_systems`.

    :param variance: (batch, n), prior of the weights.
    """
    across = rows * variance.unsqueeze(1)
    factor = _factor(across @ rows.mT, noise2.unsqueeze(1))
    solved = torch.linalg.solve_triangular(factor, torch.cat([across, right], -1), upper=False)
    half, right = solved.split([rows.shape[-1], right.shape[-1]], -1)
    covariance = half.mT @ half
    covariance.neg_().diagonal(dim1=1, dim2=2).add_(variance)
    return covariance, half.mT @ right


def averaged(config: LeastSquaresConfig, weight: Tensor) -> Tensor:
    """
    Return the share (batch, settings, dim_y) of each setting in the average; of most it is 0.

    Averaged are the most likely ones for each output, as many as have `averaged_weight`.
    """
    share, kept = settings.most_likely(config, weight)
    share = torch.where(share.cumsum(1) - share < config.averaged_weight, share, 0.0)
    return torch.zeros_like(weight).scatter_(1, kept, share / share.sum(1, keepdim=True))


def _honest_sums(config, a):
    """
    Return gram, moment, sum of squares and count of the points that count as independent.

    Values are taken relative to their mean: an offset of the field costs nothing, up to some 1e4
    times the relief, beyond which rounding shows. The mean of what is forgotten goes back to 0,
    after 20 to 30 half-lives.

    :return: these, the mean (batch, dim_y), and the share of the points that counts (batch,).
    """
    share = honesty(config, a)
    gram = _gram(config, a)
    center = a.moment[:, basis.CONSTANT] / a.count.clamp(min=1e-300).unsqueeze(-1)
    if not config.offset_variance:  # the mean is known to be 0
        center = torch.zeros_like(center)
    freshest = a.voxel_freshness.amax(1, keepdim=True)  # 1 where nothing was forgotten
    center = center * (freshest / FORGOTTEN).clamp(max=1)
    moment = a.moment - gram[:, :, basis.CONSTANT].unsqueeze(-1) * center.unsqueeze(1)
    about = a.moment[:, basis.CONSTANT] + moment[:, basis.CONSTANT]  # the latter is 0 but for that
    sum_squares = (a.sum_squares - center * about).clamp(min=0)
    return (
        gram * share[:, None, None],
        moment * share[:, None, None],
        sum_squares * share[:, None],
        a.count * share,
        center,
        share,
    )


def _gram(config, a):
    """
    Return sum phi phi^T, (batch, num_functions, num_functions).
    """
    return basis.gram(config, dim_x_of(a), a.gram)


def honesty(config: LeastSquaresConfig, a: LeastSquaresSums) -> Tensor:
    """
    Return the share of the points that counts as independent, (batch,).

    What the basis cannot resolve is correlated within a voxel: where robots drive in dense tracks,
    only some `points_per_voxel` of each voxel tell anything new. A voxel with far more points than
    the median has no say beyond it: a parked robot takes no weight from what was seen elsewhere.
    """
    occupied, enough = a.voxel_count > 0, config.points_per_voxel
    points = torch.where(occupied, a.voxel_count / a.voxel_freshness, torch.nan)
    limit = FAR_MORE * points.nanmedian(-1, keepdim=True).values.clamp(min=enough)
    share = points.clamp(max=enough).nansum(-1) / torch.minimum(points, limit).nansum(-1)
    return torch.where(occupied.any(-1), share, 1.0)


def largest_count(config: LeastSquaresConfig, dim_x: int) -> float:
    """
    Return how many points of a tile count at most, see `honesty`: all voxels are full then.
    """
    return config.points_per_voxel * config.voxels_per_axis**dim_x


def _seen(config, a):
    """
    Return the share of the tile that was seen, (batch,): of cells, each as fresh as its voxels.
    """
    m, dim_x = config.voxels_per_axis, dim_x_of(a)
    cells = min(m, CELLS_PER_AXIS)
    middle = torch.arange(m, device=a.count.device) + 0.5
    along = (middle * cells / m).long()
    cell = along
    for _ in range(dim_x - 1):
        cell = (cell.unsqueeze(-1) * cells + along).flatten()
    fresh = a.voxel_freshness.new_zeros(len(a.count), cells**dim_x)
    fresh = fresh.scatter_reduce(1, cell.expand_as(a.voxel_freshness), a.voxel_freshness, 'amax')
    return fresh.mean(1)


def predict(config: LeastSquaresConfig, regression: Regression, x: Tensor):
    """
    Predict the field, without observation noise.

    :param x: (batch, n, dim_x) in model units.
    :return: mean and variance, both (batch, n, dim_y) float64.
    """
    mean, variance = basis.evaluate(config, x, regression.mean, regression.quadratic)
    return mean, variance.clamp(min=1e-12)


def joint_covariance(config: LeastSquaresConfig, regression: Regression, x: Tensor) -> Tensor:
    """
    Return the covariance of the field between all points, (batch, dim_y, n, n).
    """
    phi = basis.functions(config, x).unsqueeze(1)
    return phi @ regression.covariance @ phi.mT


def sample_weights(regression: Regression, num_samples: int, generator=None) -> Tensor:
    """
    Draw weights, (batch, num_samples, num_functions, dim_y): each is a whole sampled field.

    Memory does not depend on the number of points at which the fields are evaluated.
    """
    batch, size, dim_y = regression.mean.shape
    value, vector = torch.linalg.eigh(regression.covariance)  # semidefinite: no Cholesky factor
    # The symmetric root: that of the factors alone may turn around with the last bit.
    root = (vector * value.clamp(min=0).sqrt().unsqueeze(-2)) @ vector.mT
    noise = torch.randn(
        batch, dim_y, size, num_samples, dtype=root.dtype, device=root.device, generator=generator
    )
    return regression.mean.unsqueeze(1) + (root @ noise).permute(0, 3, 2, 1)
