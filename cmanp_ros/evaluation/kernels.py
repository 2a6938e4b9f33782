"""Stationary covariances and their hyperparameters, for synthetic fields and for the peers."""

from dataclasses import dataclass
from math import inf, log, pi, sqrt

import numpy as np

from cmanp_ros.core.errors import ConfigError, InputError
from cmanp_ros.optional import library

SMALLEST_NOISE = 1e-3  # [scale] keeps matrices positive definite where points repeat


@dataclass(frozen=True)
class Kernel:
    """A stationary covariance, and the noise of observations."""

    nu: float
    """Smoothness: 0.5, 1.5 or 2.5 (Matern), inf (RBF)."""
    length: float
    scale: float
    """Standard deviation of the field."""
    noise: float
    """Standard deviation of what an observation adds."""
    support: float | None = None
    """Distance from which on the covariance is exactly zero; None: it never is."""

    def __call__(self, distance) -> np.ndarray:
        """Return the covariance of the field at that distance."""
        covariance = self.scale**2 * correlation(self.nu, distance / self.length)
        return covariance if self.support is None else covariance * taper(distance / self.support)


def correlation(nu: float, r) -> np.ndarray:
    """
    Return the correlation at distance r [lengths].

    :raises ConfigError: for a smoothness that has no closed form here.
    """
    if nu == inf:
        return np.exp(-0.5 * np.square(r))
    r = sqrt(2 * nu) * r
    polynomials = {0.5: 1.0, 1.5: 1 + r, 2.5: 1 + r + r * r / 3}
    if nu not in polynomials:
        raise ConfigError(f'smoothness {nu}: expected one of {[*polynomials, inf]}')
    return polynomials[nu] * np.exp(-r)


def taper(r) -> np.ndarray:
    """
    Return a correlation that is zero from r = 1 on (Wendland 1995, phi_3,1).

    Times another covariance it makes a third (Furrer, Genton and Nychka 2006).
    """
    return np.maximum(1 - r, 0) ** 4 * (4 * r + 1)


def distances(a, b) -> np.ndarray:
    """
    Return all distances between points, (..., n, 2) and (..., m, 2) -> (..., n, m).
    """
    square = 0.0
    for k in range(a.shape[-1]):
        square = square + (a[..., :, None, k] - b[..., None, :, k]) ** 2
    return np.sqrt(square)


def fit(x, y, nus=(1.5, 2.5), support_lengths: float | None = None) -> Kernel:
    """
    Choose hyperparameters by the evidence of an exact GP: the best smoothness, of two starts each.

    The scale is profiled out: given the others, its best value is known in closed form.

    :param x: (n, 2), about a thousand at most.
    :param y: (n,), deviations from the mean of the field.
    :param support_lengths: [lengths] taper the covariance to zero there; None: do not.
    :raises InputError: for less than three points, or values that are all the same.
    """
    if len(x) < 3 or not np.std(y) > 0:
        raise InputError(f'{len(x)} points of stddev {np.std(y)}: expected three that differ')
    optimize = library('scipy.optimize', 'fitting hyperparameters')
    between = distances(x, x)
    extent = between.max()

    def profiled(parameters, nu):
        """Return the negative log evidence, and the best scale."""
        length, ratio = np.exp(parameters)
        if not (1e-4 * extent < length < 10 * extent and SMALLEST_NOISE < ratio < 30):
            return inf, 1.0
        matrix = correlation(nu, between / length)
        if support_lengths is not None:
            matrix *= taper(between / (support_lengths * length))
        matrix[np.diag_indices(len(x))] += ratio**2
        try:
            factor = np.linalg.cholesky(matrix)
        except np.linalg.LinAlgError:
            return inf, 1.0
        scale = sqrt(np.mean(np.linalg.solve(factor, y) ** 2))
        evidence = -np.log(np.diag(factor)).sum() - len(x) * (
            log(scale) + 0.5 * log(2 * pi * np.e)
        )
        return -evidence, scale

    found = []
    for nu in nus:
        for share in (0.03, 0.2):
            best = optimize.minimize(
                lambda parameters, nu=nu: profiled(parameters, nu)[0],
                np.log([share * extent, 0.1]),
                method='Nelder-Mead',
                options={'xatol': 0.02, 'fatol': 0.02, 'maxfev': 100},
            )
            found.append((best.fun, nu, best.x))
    _, nu, parameters = min(found, key=lambda candidate: candidate[0])
    length, ratio = np.exp(parameters).tolist()
    scale = profiled(parameters, nu)[1]
    support = None if support_lengths is None else support_lengths * length
    return Kernel(nu, length, scale, ratio * scale, support)
