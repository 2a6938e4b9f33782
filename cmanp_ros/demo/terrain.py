"""
The ground truth of the demo: real heights around the Jacksboro fault, Tennessee.

The elevation model comes with matplotlib: 344 x 403 heights [m], 3 arc seconds apart. Only the
rover's simulated sensor and the observer see it; the node never does.
"""

from dataclasses import dataclass
from math import cos, pi, radians

import numpy as np

FILE = 'jacksboro_fault_dem.npz'
METERS_PER_DEGREE = 2 * pi * 6371e3 / 360  # along a meridian of the mean sphere
MARGIN_M = 400.0  # heights needed around a window, for sensor footprints that reach over its edge
NUM_CANDIDATES = 24


@dataclass(frozen=True)
class Terrain:
    """
    Heights on a regular grid of the map frame: x to the east, y to the north.

    :ivar heights: (rows, columns) [m], row 0 in the south, column 0 in the west.
    :ivar spacing: (along x, along y) [m] between neighbors.
    :ivar origin: (x, y) [m] of heights[0, 0].
    """

    heights: np.ndarray
    spacing: tuple[float, float]
    origin: tuple[float, float] = (0.0, 0.0)


def load_terrain() -> Terrain:
    """
    Read the elevation model that comes with matplotlib.

    :return: terrain whose origin is the south-west corner of the model.
    """
    from matplotlib.cbook import get_sample_data

    with np.load(get_sample_data(FILE, asfileobj=False)) as data:
        heights = data['elevation'].astype(np.float64)
        step_x, step_y = float(data['dx']), float(data['dy'])  # [degree]
        north, south = sorted((float(data['ymin']), float(data['ymax'])), reverse=True)
    shrink = cos(radians((north + south) / 2))  # meridians converge
    spacing = (step_x * METERS_PER_DEGREE * shrink, step_y * METERS_PER_DEGREE)
    return Terrain(heights[::-1], spacing)  # the file begins in the north


def choose_window(terrain: Terrain, size_m: float, seed: int) -> Terrain:
    """
    Pick the window with the most relief (beside its overall slope) among some drawn at random.

    :param terrain: all of it.
    :param size_m: [m] side of the square window.
    :param seed: of the draw.
    :return: the same terrain with the center of the window as origin of the map frame.
    :raises ValueError: a window that does not fit into the terrain.
    """
    reach = [size_m / 2 + MARGIN_M + 2 * step for step in terrain.spacing]
    extent = np.multiply(terrain.spacing, np.subtract(terrain.heights.shape[::-1], 1))
    if (extent <= np.multiply(reach, 2)).any():
        largest = min(extent) - 2 * (MARGIN_M + 2 * max(terrain.spacing))
        raise ValueError(f'a window of {size_m:g} m does not fit: at most {largest:.0f} m')
    rng = np.random.default_rng(seed)
    centers = rng.uniform(reach, np.subtract(extent, reach), (NUM_CANDIDATES, 2))
    windows = [
        Terrain(terrain.heights, terrain.spacing, tuple(np.subtract(terrain.origin, center)))
        for center in centers
    ]
    return max(windows, key=lambda window: _relief(*grid_points(window, size_m)))


def grid_points(terrain: Terrain, size_m: float) -> tuple[np.ndarray, np.ndarray]:
    """
    List the measured heights inside the window: the truth that predictions are compared with.

    :param terrain: with the center of the window as origin of the map frame.
    :param size_m: [m] side of the square window.
    :return: x (rows, columns, 2) [m] and heights (rows, columns) [m], as the elevation model has
        them, without interpolation.
    """
    axes, cuts = [], []
    counts = terrain.heights.shape[::-1]
    for origin, step, n in zip(terrain.origin, terrain.spacing, counts, strict=True):
        axis = origin + step * np.arange(n)
        inside = np.flatnonzero(np.abs(axis) <= size_m / 2)
        cuts.append(slice(inside[0], inside[-1] + 1))
        axes.append(axis[cuts[-1]])
    return np.stack(np.meshgrid(*axes), axis=-1), terrain.heights[cuts[1], cuts[0]]


def height_at(terrain: Terrain, x: np.ndarray) -> np.ndarray:
    """
    Interpolate heights: bicubic convolution, which passes through the heights of the model.

    :param terrain: heights; beyond its edge the nearest ones count.
    :param x: (n, 2) [m] in the map frame.
    :return: (n,) [m].
    """
    position = (np.asarray(x, np.float64) - terrain.origin) / terrain.spacing
    cell = np.floor(position).astype(int)
    weights = cubic_weights(position - cell)  # (n, 2, 4)
    neighbors = cell[:, :, None] + np.arange(-1, 3)  # (n, 2, 4)
    rows, columns = terrain.heights.shape
    i = np.clip(neighbors[:, 1], 0, rows - 1)
    j = np.clip(neighbors[:, 0], 0, columns - 1)
    patches = terrain.heights[i[:, :, None], j[:, None, :]]  # (n, 4, 4)
    return np.einsum('nij,ni,nj->n', patches, weights[:, 1], weights[:, 0])


def cubic_weights(fraction: np.ndarray) -> np.ndarray:
    """
    Return the weights of four neighbors at -1, 0, 1 and 2 (Keys 1981, a = -1/2).

    :param fraction: (...) position between the neighbors at 0 and 1, within [0, 1).
    :return: (..., 4), adding up to 1.
    """
    distance = np.abs(fraction[..., None] - np.arange(-1, 3))
    near = 1.5 * distance**3 - 2.5 * distance**2 + 1
    far = -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
    return np.where(distance <= 1, near, far)


def _relief(x, heights):
    """Return the standard deviation [m] of heights from the plane that fits them best."""
    design = np.column_stack([x.reshape(-1, 2), np.ones(heights.size)])
    plane, *_ = np.linalg.lstsq(design, heights.reshape(-1), rcond=None)
    return (heights.reshape(-1) - design @ plane).std()
