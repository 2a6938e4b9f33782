"""
A terrain map of local basis functions in an information filter.

After Viset, Helmons and Kok, "Spatially scalable recursive estimation of Gaussian process terrain
maps using local basis functions" (arXiv 2210.09168), written from the idea: basis functions of
finite support on an unbounded grid; an observation touches the few whose support it lies in; a
query solves for those around it only. So neither costs more as the map grows.
"""

from math import floor, sqrt

import numpy as np

from cmanp_ros.core.errors import ConfigError
from cmanp_ros.evaluation.kernels import Kernel, distances
from cmanp_ros.optional import library

JITTER = 1e-8  # [variance of the field]


class LocalBasisFilter:
    """
    Basis functions are the covariances with grid points; their weights are what is filtered.

    The prior precision of the weights is the covariance between the grid points. Here the kernel
    is tapered to finite support, which keeps it a covariance. The information of the observations
    is a sparse matrix, stored by rows: for each grid point the entries of the grid points near
    enough to share an observation with it.
    """

    def __init__(
        self,
        kernel: Kernel,
        spacing: float,
        margin: int = 2,
        value_offset: float = 0.0,
        open_variance: bool = True,
    ):
        """
        Start with the prior.

        :param kernel: with finite support.
        :param spacing: of the grid, a fraction of the support.
        :param margin: [spacing] by which the local problem is larger than those basis functions
            whose support reaches into the queried cell.
        :param value_offset: mean of the field.
        :param open_variance: let what the grid cannot represent count as noise of observations
            too, as in FITC; without, they are taken for more exact than they are.
        :raises ConfigError: for a kernel without finite support.
        """
        if kernel.support is None or not spacing > 0:
            raise ConfigError(
                f'support {kernel.support} and spacing {spacing}: expected positive numbers'
            )
        self._linalg = library('scipy.linalg', 'the local basis filter')
        self._kernel, self._spacing, self._offset = kernel, spacing, value_offset
        self._open_variance = open_variance
        # [spacing] from the middle of a cell to those whose support reaches into the cell.
        reach = kernel.support / spacing + sqrt(0.5)
        self._local = _disc(reach + margin)  # (s, 2) the local problem
        self._touched = _disc(reach)  # (t, 2)
        self._band = 2 * floor(reach)  # two basis functions of one point are at most so far apart

        between = distances(self._local * spacing, self._local * spacing)
        self._prior = kernel(between)
        self._prior[np.diag_indices(len(self._prior))] += JITTER * kernel.scale**2
        self._prior_factor = np.linalg.cholesky(self._prior)
        # Where the entries of the local problem are in the rows: pairs within the band.
        offsets = self._local[None] - self._local[:, None]  # (s, s, 2)
        self._in_band = (np.abs(offsets) <= self._band).all(-1)
        self._column = self._columns(offsets)

        self._rows = {}  # grid point -> row
        self._precision = np.zeros((64, (2 * self._band + 1) ** 2))
        self._information = np.zeros(64)

    @property
    def num_functions(self) -> int:
        """Basis functions that any observation touched."""
        return len(self._rows)

    def observe(self, x, y):
        """Fold observations."""
        for cell, part in self._by_cell(x):
            offset = x[part] - cell * self._spacing  # (n, 2) from the grid point
            noise = np.full(len(part), self._kernel.noise**2)
            if self._open_variance:
                noise += self._unresolved(self._basis(self._local, offset))[1]
            basis = self._basis(self._touched, offset)  # (t, n)
            weighted = basis / noise
            rows = self._rows_of(cell + self._touched)
            columns = self._columns(self._touched[None] - self._touched[:, None])
            self._precision[rows[:, None], columns] += weighted @ basis.T
            self._information[rows] += weighted @ (y[part] - self._offset)

    def predict(self, x) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and stddev, the noise included."""
        mean, variance = np.full(len(x), self._offset), np.empty(len(x))
        for cell, part in self._by_cell(x):
            basis = self._basis(self._local, x[part] - cell * self._spacing)  # (s, n)
            resolved, unresolved = self._unresolved(basis)
            rows = np.array([self._rows.get(tuple(p), -1) for p in (cell + self._local).tolist()])
            seen = rows >= 0
            if seen.any():
                gathered = self._precision[rows[:, None], self._column]  # (s, s)
                gathered = np.where(self._in_band & seen[:, None] & seen, gathered, 0)
                factor = self._linalg.cho_factor(self._prior + gathered, lower=True)
                information = np.where(seen, self._information[rows], 0)
                mean[part] += basis.T @ self._linalg.cho_solve(factor, information)
                resolved = (basis * self._linalg.cho_solve(factor, basis)).sum(0)
            variance[part] = resolved + unresolved
        return mean, np.sqrt(variance + self._kernel.noise**2)

    def _by_cell(self, x):
        """Yield (nearest grid point, numbers of the points that have it)."""
        cells, cell_of = np.unique(
            np.rint(x / self._spacing).astype(int), axis=0, return_inverse=True
        )
        cell_of = cell_of.reshape(-1)
        for number, cell in enumerate(cells):
            yield cell, np.flatnonzero(cell_of == number)

    def _basis(self, grid, offset):
        return self._kernel(distances(grid * self._spacing, offset))

    def _unresolved(self, basis):
        """Return prior variances (n,): of what the grid represents, and of what it leaves open."""
        white = self._linalg.solve_triangular(self._prior_factor, basis, lower=True)
        resolved = (white**2).sum(0)
        return resolved, np.maximum(self._kernel.scale**2 - resolved, 0)

    def _columns(self, offsets):
        clipped = np.clip(offsets, -self._band, self._band) + self._band
        return clipped[..., 0] * (2 * self._band + 1) + clipped[..., 1]

    def _rows_of(self, points):
        """Return the rows of grid points, new ones where there are none."""
        rows = [self._rows.setdefault(tuple(p), len(self._rows)) for p in points.tolist()]
        while len(self._rows) > len(self._information):
            self._precision = np.concatenate([self._precision, np.zeros_like(self._precision)])
            self._information = np.concatenate(
                [self._information, np.zeros_like(self._information)]
            )
        return np.array(rows)


def _disc(radius):
    """Return the grid points up to so far from the origin, (n, 2)."""
    axis = np.arange(-floor(radius), floor(radius) + 1)
    square = np.stack(np.meshgrid(axis, axis, indexing='ij'), -1).reshape(-1, 2)
    return square[np.linalg.norm(square, axis=1) <= radius]
