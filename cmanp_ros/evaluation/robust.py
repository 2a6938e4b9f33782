"""
Synthetic fields on [-2, 2]^2 on which the assumptions of a Gaussian process fail.

- 'outliers': 5 % of the context readings are off by 8 standard deviations of the noise.
- 'edge': a step of 1.5 standard deviations of the field along a line.
- 'uneven': noise whose standard deviation grows tenfold from one end of the map to the other.
- 'gaussian': none of these, as a control.

Task number i of a seed has the same field, locations and noise in all kinds but for the fault.
"""

from collections.abc import Iterator
from math import cos, inf, pi, sin
from typing import NamedTuple

import numpy as np

from cmanp_ros.core.errors import ConfigError
from cmanp_ros.evaluation.kernels import Kernel, distances
from cmanp_ros.evaluation.tasks import Task

KINDS = ('gaussian', 'outliers', 'edge', 'uneven')
HALF_WIDTH = 2.0
NUM_TARGETS = 300
OUTLIER_SHARE, OUTLIER_SIZE = 0.05, 8.0  # of the readings; [noise]
STEP_SIZE = 1.5  # [scale of the field]
NOISE_RATIO = 10.0  # largest to least over the map
JITTER = 1e-8  # [variance of the field] for the factorization


class Field(NamedTuple):
    """A draw of the field prior, without noise."""

    x: np.ndarray
    """(n, 2)."""
    values: np.ndarray
    """(n,)."""
    kernel: Kernel
    """What it was drawn from."""


def tasks(
    kind: str, num: int, num_context: int, seed: int, num_target: int = NUM_TARGETS
) -> Iterator[Task]:
    """
    Draw tasks of one kind.

    :param kind: one of `KINDS`.
    :raises ConfigError: for another kind.
    """
    if kind not in KINDS:
        raise ConfigError(f'kind {kind!r}: expected one of {", ".join(KINDS)}')
    for index in range(num):
        rng, fault_rng = (
            np.random.default_rng([seed, num_context, index, part]) for part in range(2)
        )
        x, values, kernel = draw_field(rng, num_context + num_target)
        noise = kernel.noise * rng.standard_normal(len(x))
        if kind == 'edge':
            values = values + step(fault_rng, x, STEP_SIZE * kernel.scale)
        elif kind == 'uneven':
            noise = noise * noise_factor(fault_rng, x)
        y = values + noise
        context, target = slice(num_context), slice(num_context, None)
        if kind == 'outliers':
            y[context] += outliers(fault_rng, num_context, OUTLIER_SIZE * kernel.noise)
        yield Task(x[context], y[context], x[target], y[target])


def draw_field(rng: np.random.Generator, num: int) -> Field:
    """
    Draw a field at uniform locations, from a Gaussian process.

    RBF or Matern-5/2, length log-uniform in [0.25, 1.5], scale uniform in [0.3, 1), noise
    log-uniform in [0.02, 0.2].
    """
    kernel = Kernel(
        nu=(inf, 2.5)[rng.integers(2)],
        length=float(np.exp(rng.uniform(np.log(0.25), np.log(1.5)))),
        scale=float(rng.uniform(0.3, 1.0)),
        noise=float(np.exp(rng.uniform(np.log(0.02), np.log(0.2)))),
    )
    x = rng.uniform(-HALF_WIDTH, HALF_WIDTH, (num, 2))
    covariance = kernel(distances(x, x))
    covariance[np.diag_indices(num)] += JITTER * kernel.scale**2
    return Field(x, np.linalg.cholesky(covariance) @ rng.standard_normal(num), kernel)


def outliers(rng: np.random.Generator, num: int, size: float) -> np.ndarray:
    """
    Return what to add to readings, (num,): +-size for a share of `OUTLIER_SHARE`, else zero.
    """
    added = np.zeros(num)
    hit = rng.permutation(num)[: round(OUTLIER_SHARE * num)]
    added[hit] = size * rng.choice([-1.0, 1.0], len(hit))
    return added


def step(rng: np.random.Generator, x: np.ndarray, size: float) -> np.ndarray:
    """
    Return what to add to values at x, (n,): +-size / 2 on the two sides of a line.

    The line has a random direction and passes through the middle quarter of the map.
    """
    direction = _direction(rng)
    through = rng.uniform(-HALF_WIDTH / 2, HALF_WIDTH / 2, 2)
    return 0.5 * size * np.where((x - through) @ direction > 0, 1.0, -1.0)


def noise_factor(rng: np.random.Generator, x: np.ndarray) -> np.ndarray:
    """
    Return factors of the noise at x, (n,): log-linear in a random direction, 1 in the middle.

    They span `NOISE_RATIO` between the two corners of the map that lie farthest that way.
    """
    direction = _direction(rng)
    reach = HALF_WIDTH * np.abs(direction).sum()
    return NOISE_RATIO ** (0.5 * (x @ direction) / reach)


def _direction(rng):
    angle = rng.uniform(0, 2 * pi)
    return np.array([cos(angle), sin(angle)])
