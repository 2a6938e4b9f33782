"""A sparse Gaussian process over a stream: Gaussian information about inducing values."""

import numpy as np

from cmanp_ros.evaluation.kernels import Kernel, distances
from cmanp_ros.optional import library

JITTER = 1e-8  # [variance of the field]


class OnlineSparseGP:
    """
    FITC (Snelson and Ghahramani 2006) with fixed inducing points, folded batch by batch.

    The values at the inducing points are Gaussian; each observation adds information of rank one
    about them. What they leave open at the place of an observation counts as its own noise. In
    which order observations come makes no difference.
    """

    def __init__(self, kernel: Kernel, inducing, value_offset: float = 0.0):
        """
        Start with the prior.

        :param inducing: (m, 2) a few hundred; `inducing_points` spreads them over a survey.
        :param value_offset: mean of the field.
        """
        self._linalg = library('scipy.linalg', 'the sparse GP')
        self._kernel, self._inducing, self._offset = kernel, np.asarray(inducing), value_offset
        covariance = kernel(distances(self._inducing, self._inducing))
        covariance[np.diag_indices(len(covariance))] += JITTER * kernel.scale**2
        self._factor = np.linalg.cholesky(covariance)
        # In coordinates in which the prior is standard normal.
        self._precision = np.eye(len(covariance))
        self._information = np.zeros(len(covariance))
        self._posterior = None

    def observe(self, x, y):
        """Fold observations."""
        basis, open_variance = self._basis(x)  # (m, n), (n,)
        weighted = basis / (open_variance + self._kernel.noise**2)
        self._precision += weighted @ basis.T
        self._information += weighted @ (np.ravel(y) - self._offset)
        self._posterior = None

    def predict(self, x) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and stddev, the noise included."""
        if self._posterior is None:
            factor = np.linalg.cholesky(self._precision)
            self._posterior = factor, self._linalg.cho_solve((factor, True), self._information)
        factor, weights = self._posterior
        basis, open_variance = self._basis(x)
        known = self._linalg.solve_triangular(factor, basis, lower=True)
        variance = open_variance + (known**2).sum(0) + self._kernel.noise**2
        return self._offset + weights @ basis, np.sqrt(variance)

    def _basis(self, x):
        cross = self._kernel(distances(self._inducing, np.asarray(x)))
        basis = self._linalg.solve_triangular(self._factor, cross, lower=True)
        return basis, np.maximum(self._kernel.scale**2 - (basis**2).sum(0), 0)


def inducing_points(x, num: int, seed: int = 0) -> np.ndarray:
    """
    Spread inducing points where a survey goes: centers of its clusters (k-means).

    :param x: (n, 2) locations of the whole stream; some of them suffice.
    :return: (num, 2).
    """
    vq = library('scipy.cluster.vq', 'spreading inducing points')
    rng = np.random.default_rng(seed)
    return vq.kmeans2(x, num, minit='++', seed=rng, missing='warn')[0]
