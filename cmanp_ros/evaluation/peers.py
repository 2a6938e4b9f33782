"""
What else maps a field: methods for one task, and methods for a stream.

`for_windows` and `for_stream` set all of them up. Those for a stream are given, in hindsight, what
fits the whole of it: mean, variance, hyperparameters. On a robot nobody has these beforehand.
"""

import warnings
from collections.abc import Callable
from functools import cache

import numpy as np

from cmanp_ros.core.errors import ConfigError
from cmanp_ros.evaluation.kernels import Kernel, distances, fit
from cmanp_ros.evaluation.local_basis import LocalBasisFilter
from cmanp_ros.evaluation.sparse_gp import OnlineSparseGP, inducing_points
from cmanp_ros.optional import library

__all__ = [
    'KalmanGrid',
    'LocalBasisFilter',
    'LocalGP',
    'NearestValue',
    'OnlineSparseGP',
    'exact_gp',
    'for_stream',
    'for_windows',
    'linear_interpolation',
]

# One task ----------------------------------------------------------------------------------------


def exact_gp(x, y, x_target, noise_variance=(1e-6, 0.1)) -> tuple[np.ndarray, np.ndarray]:
    """
    Predict by an exact GP: Matern-3/2 or -5/2, the best of two starts each by evidence.

    :param noise_variance: least and largest that the fit may choose.
    :return: mean and stddev (n,), noise included.
    """
    process = library('sklearn.gaussian_process', 'the exact GP')
    kernels = library('sklearn.gaussian_process.kernels', 'the exact GP')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # about parameters at their bounds
        fits = [
            process.GaussianProcessRegressor(
                kernels.ConstantKernel(0.5, (1e-3, 1e2)) * kernels.Matern(length, (0.05, 10), nu)
                + kernels.WhiteKernel(1e-3, noise_variance)
            ).fit(x, y)
            for nu in (1.5, 2.5)
            for length in (0.3, 1.0)
        ]
        best = max(fits, key=lambda candidate: candidate.log_marginal_likelihood_value_)
        return best.predict(x_target, return_std=True)


def linear_interpolation(x, y, x_target, folds: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """
    Interpolate between triangles of observations; outside of them, the nearest one counts.

    :param folds: the stddev is one number, the root mean square error at observations that are
        left out, a tenth of them at a time. So noise is included.
    :return: mean and stddev (n,).
    """
    fold = np.random.default_rng(0).permutation(len(x)) % folds
    errors = [
        y[fold == k] - interpolate(x[fold != k], y[fold != k], x[fold == k]) for k in range(folds)
    ]
    stddev = np.sqrt(np.mean(np.concatenate(errors) ** 2))
    return interpolate(x, y, x_target), np.full(len(x_target), max(stddev, 1e-9))


def interpolate(x, y, x_target) -> np.ndarray:
    """
    Return values between triangles of observations, (n,); outside of them, the nearest one.
    """
    methods = library('scipy.interpolate', 'linear interpolation')
    inside = methods.LinearNDInterpolator(x, y)(x_target)
    return np.where(np.isnan(inside), methods.NearestNDInterpolator(x, y)(x_target), inside)


# A stream ----------------------------------------------------------------------------------------


class PointIndex:
    """
    The nearest among points that become more: a large KD-tree, and a small one for the newest.

    The small one is built anew each time, the large one when a tenth as many have come since.
    """

    def __init__(self):
        self._spatial = library('scipy.spatial', 'the search for the nearest')
        self.x = np.empty((0, 2))
        self._trees = []  # (first point, tree)
        self._built = 0

    def add(self, x):
        """Add points (n, 2); they count on from those before."""
        self.x = np.concatenate([self.x, x])
        if len(self.x) - self._built > max(1000, self._built // 10):
            self._trees = [(0, self._spatial.cKDTree(self.x))]
            self._built = len(self.x)
        elif len(self.x) > self._built:
            self._trees[bool(self._built) :] = [
                (self._built, self._spatial.cKDTree(self.x[self._built :]))
            ]

    def query(self, x, num: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """
        Find the nearest points.

        :return: their distance and number, (n, min(num, points there are)), nearest first.
        """
        found = [(tree.query(x, range(1, num + 1)), first) for first, tree in self._trees]
        distance = np.concatenate([d for (d, _), _ in found], axis=1)
        number = np.concatenate([i + first for (_, i), first in found], axis=1)
        order = np.argsort(distance, axis=1, kind='stable')[:, : min(num, len(self.x))]
        return np.take_along_axis(distance, order, 1), np.take_along_axis(number, order, 1)


class NearestValue:
    """
    The nearest value, with the spread that the nearest ones had at this distance so far.

    Each batch is compared with its nearest before it is added. Its squared errors are averaged
    by distance, in bins of a factor of two, each together with `PRIOR_COUNT` times the result of
    the next farther bin, and the farthest with that of the variance of all values. So a distance
    never seen has the spread of the next farther one.
    """

    PRIOR_COUNT = 5.0
    NUM_BINS = 64  # 2**-32 to 2**31 [units of x]

    def __init__(self, value_offset: float = 0.0, value_scale: float = 1.0):
        """
        Start with nothing.

        :param value_offset: prediction as long as nothing is known, with stddev value_scale.
        """
        self._index, self._values = PointIndex(), np.empty(0)
        self._offset, self._scale = value_offset, value_scale
        self._squares, self._counts = np.zeros((2, self.NUM_BINS))

    def observe(self, x, y):
        """Add observations."""
        if len(self._values):
            distance, mean = self._nearest(x)
            bins = self._bin(distance)
            np.add.at(self._squares, bins, (y - mean) ** 2)
            np.add.at(self._counts, bins, 1)
        self._index.add(x)
        self._values = np.concatenate([self._values, y])

    def predict(self, x) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and stddev."""
        if not len(self._values):
            return np.full(len(x), self._offset), np.full(len(x), self._scale)
        distance, mean = self._nearest(x)
        return mean, np.sqrt(self._variances())[self._bin(distance)]

    def _variances(self):
        variance = self._values.var() if len(self._values) > 1 else self._scale**2
        variance = max(variance, (1e-6 * self._scale) ** 2)
        variances = np.empty(self.NUM_BINS)
        for k in reversed(range(self.NUM_BINS)):
            total = self._squares[k] + self.PRIOR_COUNT * variance
            variances[k] = variance = total / (self._counts[k] + self.PRIOR_COUNT)
        return variances

    def _nearest(self, x):
        distance, number = self._index.query(x)
        return distance[:, 0], self._values[number[:, 0]]

    def _bin(self, distance):
        with np.errstate(divide='ignore'):
            level = np.floor(np.log2(distance)) + self.NUM_BINS // 2
        return np.clip(level, 0, self.NUM_BINS - 1).astype(int)


class KalmanGrid:
    """
    Square cells, each with a scalar Kalman filter of a constant; no cell knows its neighbors.

    A cell begins with the running mean and variance of all observations in the batches before.
    """

    def __init__(
        self, cell_size: float, noise: float, value_offset: float = 0.0, value_scale: float = 1.0
    ):
        """
        Start with nothing.

        :param cell_size: [units of x].
        :param noise: standard deviation of observations about the value of their cell.
        :param value_offset: mean as long as nothing is known, with stddev value_scale.
        """
        if not (cell_size > 0 and noise > 0):
            raise ConfigError(
                f'cell_size {cell_size} and noise {noise}: expected positive numbers'
            )
        self._cell_size, self._noise = cell_size, noise
        self._offset, self._scale = value_offset, value_scale
        self._cells = {}  # (i, j) -> mean and variance
        self._count, self._sum, self._square = 0, 0.0, 0.0

    def observe(self, x, y):
        """Fold observations, one after the other."""
        prior = self._prior()
        for cell, value in zip(self._cell(x), np.ravel(y).tolist(), strict=True):
            mean, variance = self._cells.get(cell, prior)
            gain = variance / (variance + self._noise**2)
            self._cells[cell] = mean + gain * (value - mean), (1 - gain) * variance
        deviation = np.ravel(y) - self._offset
        self._count += len(deviation)
        self._sum += deviation.sum()
        self._square += (deviation**2).sum()

    def predict(self, x) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and stddev, the noise included."""
        prior = self._prior()
        state = np.array([self._cells.get(cell, prior) for cell in self._cell(x)]).reshape(-1, 2)
        return state[:, 0], np.sqrt(state[:, 1] + self._noise**2)

    def _cell(self, x):
        return map(tuple, np.floor(np.asarray(x) / self._cell_size).astype(int).tolist())

    def _prior(self):
        if self._count < 2:
            return self._offset, self._scale**2
        mean = self._sum / self._count
        variance = max(self._square / self._count - mean**2, (1e-6 * self._scale) ** 2)
        return self._offset + mean, variance


class LocalGP:
    """A GP on the observations nearest to each target; it keeps all of them."""

    AT_ONCE = 256  # targets

    def __init__(self, kernel: Kernel, value_offset: float = 0.0, num_neighbors: int = 64):
        """
        Start with nothing.

        :param value_offset: mean of the field.
        """
        self._kernel, self._offset, self._num = kernel, value_offset, num_neighbors
        self._index, self._values = PointIndex(), np.empty(0)

    def observe(self, x, y):
        """Add observations."""
        self._index.add(x)
        self._values = np.concatenate([self._values, y])

    def predict(self, x) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and stddev, the noise included."""
        prior = self._kernel.scale**2 + self._kernel.noise**2
        mean, variance = np.full(len(x), self._offset), np.full(len(x), prior)
        for start in range(0, len(x) if len(self._values) else 0, self.AT_ONCE):
            part = slice(start, start + self.AT_ONCE)
            near, number = self._index.query(x[part], self._num)  # (n, k)
            between = distances(self._index.x[number], self._index.x[number])  # (n, k, k)
            covariance = self._kernel(between) + self._kernel.noise**2 * np.eye(near.shape[1])
            cross = self._kernel(near)[..., None]  # (n, k, 1)
            weights = np.linalg.solve(covariance, cross)[..., 0]  # (n, k)
            mean[part] += (weights * (self._values[number] - self._offset)).sum(1)
            variance[part] -= (weights * cross[..., 0]).sum(1)
        return mean, np.sqrt(np.maximum(variance, self._kernel.noise**2))


# All of them -------------------------------------------------------------------------------------


def for_windows() -> dict[str, Callable]:
    """
    Return name -> function of one task, for what needs no setting.
    """
    return {'exact GP': exact_gp, 'linear interpolation': linear_interpolation}


def for_stream(
    x, y, cell_size: float = 20.0, num_fit: int = 1000, num_inducing: int = 512, seed: int = 0
) -> dict[str, Callable]:
    """
    Return name -> function that makes an empty map, set up in hindsight.

    Hyperparameters are fitted to a thinned sample when they are first needed, in a minute.

    :param x: (n, 2) the whole stream.
    :param y: (n,).
    :param cell_size: of the Kalman grid. Of 5, 10, 20, 40 and 80 km, 20 had the highest
        log-likelihood on the soundings of `tracks`.
    :param num_fit: points to fit to, drawn from all of them.
    :param num_inducing: points of the sparse GP.
    """
    offset, scale = float(np.mean(y)), float(np.std(y))
    drawn = np.random.default_rng(seed).permutation(len(x))

    @cache
    def kernel(support_lengths=None):
        sample = drawn[:num_fit]
        return fit(x[sample], y[sample] - offset, support_lengths=support_lengths)

    @cache
    def inducing():
        return inducing_points(x[drawn[: 20 * num_inducing]], num_inducing, seed)

    def local_basis_filter():
        local = kernel(support_lengths=2.0)
        return LocalBasisFilter(local, spacing=local.support / 12, value_offset=offset)

    return {
        'nearest value': lambda: NearestValue(offset, scale),
        'Kalman grid': lambda: KalmanGrid(
            cell_size, spread_in_cells(x, y, cell_size), offset, scale
        ),
        'local GP': lambda: LocalGP(kernel(), offset),
        'sparse GP': lambda: OnlineSparseGP(kernel(), inducing(), offset),
        'local basis filter': local_basis_filter,
    }


def spread_in_cells(x, y, cell_size: float) -> float:
    """
    Return the standard deviation of values about the mean of their cell, pooled.
    """
    cells = np.floor(np.asarray(x) / cell_size).astype(int)
    _, cell = np.unique(cells, axis=0, return_inverse=True)
    cell = cell.reshape(-1)
    count = np.bincount(cell)
    mean = np.bincount(cell, y) / count
    freedom = len(y) - len(count)
    return float(np.sqrt(np.sum((y - mean[cell]) ** 2) / freedom)) if freedom else float(np.std(y))
