"""
Windows of real terrain: what every accuracy of this project is quoted on.

A window is a square of cells of the elevation model that comes with matplotlib (around the
Jacksboro fault, Tennessee), scaled to [-2, 2]^2, heights centered and scaled to a standard
deviation of 0.65. Some cells are observed, up to 1,000 others are targets.
"""

from collections.abc import Iterator
from functools import cache

import numpy as np

from cmanp_ros.evaluation.tasks import Task
from cmanp_ros.optional import library

FILE = 'jacksboro_fault_dem.npz'
STDDEV = 0.65  # of the heights of a window
TILE_SIZE = 0.36  # of our maps of windows, which span 4
MAX_TARGETS = 1000


@cache
def jacksboro() -> np.ndarray:
    """Return the elevation model, (344, 403) [m]; read-only, as it is read once."""
    cbook = library('matplotlib.cbook', 'the elevation model of the terrain windows')
    with np.load(cbook.get_sample_data(FILE, asfileobj=False)) as data:
        heights = data['elevation'].astype(float)
    heights.flags.writeable = False
    return heights


def window(rng: np.random.Generator, num_context: int, cells: int = 64, heights=None) -> Task:
    """
    Cut a window, without noise; successive calls with one generator give successive windows.

    The calls of the generator and their order are part of the protocol.

    :param num_context: cells observed.
    :param cells: along each side.
    :param heights: (rows, columns); None: the elevation model that comes with matplotlib.
    """
    if heights is None:
        heights = jacksboro()
    row, column = (rng.integers(0, size - cells) for size in heights.shape)
    axis = np.linspace(-2, 2, cells)
    x = np.stack(np.meshgrid(axis, axis, indexing='ij'), -1).reshape(-1, 2)
    y = heights[row : row + cells, column : column + cells].reshape(-1)
    y = (y - y.mean()) / y.std() * STDDEV
    order = rng.permutation(len(x))
    context, target = order[:num_context], order[num_context : num_context + MAX_TARGETS]
    return Task(x[context], y[context], x[target], y[target])


def windows(num: int, num_context: int, seed: int, noise: float, heights=None) -> Iterator[Task]:
    """
    Cut windows and add observation noise to all values.

    The noise comes from a generator of its own and is drawn for each level of noise, also for
    none: the same windows at another level differ by its factor only.

    :param noise: standard deviation of what is added, in the units of a window.
    """
    rng = np.random.default_rng(seed)
    noise_rng = np.random.default_rng(seed + 1000 + num_context)
    for _ in range(num):
        x, y, x_target, y_target = window(rng, num_context, heights=heights)
        y = y + noise * noise_rng.standard_normal(y.shape)
        y_target = y_target + noise * noise_rng.standard_normal(y_target.shape)
        yield Task(x, y, x_target, y_target)
