"""A map on a grid of cells: where it holds data, as far as it is known there."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from cmanp_ros.core.errors import ConfigError, InputError
from cmanp_ros.field import OK, NeuralField
from cmanp_ros.visualization import Grid, grid_targets

CELLS_PER_TILE = 5  # along a side; what is finer is noise to a tile
CELLS_PER_SIDE = 160  # at least, along the longer side: as many as an eye can see
MAX_CELLS = 250_000  # unless a resolution is given: minutes on a small computer
CELLS_AT_ONCE = 1 << 14  # bounds the working memory


class Raster(NamedTuple):
    """A map on a grid; rows from the south to the north, NaN where nothing was observed."""

    grid: Grid
    mean: np.ndarray
    """(height, width) float32 [field units]."""
    stddev: np.ndarray
    """(height, width) float32 [field units], of an observation."""

    @property
    def known(self) -> np.ndarray:
        """(height, width) bool."""
        return np.isfinite(self.mean)


def check(field: NeuralField) -> None:
    """
    See whether a map can be drawn.

    :raises ConfigError: unless it is of one value over two axes.
    """
    config = field.model.config
    if (config.dim_x, config.dim_y) != (2, 1):
        raise ConfigError(
            f'the map has {config.dim_x} numbers per location and {config.dim_y} per value; '
            'expected 2 and 1: look at it with NeuralField.predict instead'
        )


def is_known(field: NeuralField, x: np.ndarray) -> np.ndarray:
    """Tell where a map holds data, (n,) bool, of finite locations (n, 2) [m]."""
    return (field.status(x) == OK) & field.is_known(x)


def extent(field: NeuralField) -> tuple[np.ndarray, np.ndarray]:
    """
    Return lower and upper corner [m] of the finest tiles that hold data, all of them in memory.

    :raises InputError: for an empty map.
    """
    corners = field.tiles_in_memory()
    if not len(corners):
        raise InputError('the map is empty: it holds no observations to draw')
    return corners[:, 0].min(0), corners[:, 1].max(0)


def layout(
    field: NeuralField,
    bounds: tuple[Sequence[float], Sequence[float]] | None = None,
    resolution: float | None = None,
) -> Grid:
    """
    Choose the cells.

    :param bounds: lower and upper corner [m]; None: those of the tiles that hold data.
    :param resolution: [m/cell]; None: see `default_resolution`.
    :raises ConfigError: for bounds or a resolution that cannot be used.
    :raises InputError: for an empty map, or bounds beside it.
    """
    there = extent(field)
    lower, upper = np.array(there if bounds is None else bounds, np.float64)
    if resolution is None:
        resolution = default_resolution(field.tile_size, upper - lower)
    grid = grid_targets(lower, upper, resolution)
    if (lower >= there[1]).any() or (upper <= there[0]).any():
        raise InputError(
            f'nothing was observed within {_corners(lower, upper)}; expected bounds that overlap '
            f'{_corners(*there)}, where the map holds data'
        )
    return grid


def default_resolution(tile_size: float, sides: np.ndarray) -> float:
    """
    Choose the size of cells: a fifth of a tile, finer where that are few cells.

    :param sides: (2,) [m] of the bounds; of large ones the cells are coarser, for `MAX_CELLS`.
    :return: [m/cell].
    """
    sides = np.maximum(sides, 0.0)
    fine = min(tile_size / CELLS_PER_TILE, float(sides.max()) / CELLS_PER_SIDE)
    return max(fine, _round_up(math.sqrt(sides[0] * sides[1] / MAX_CELLS)))


def rasterize(
    field: NeuralField, grid: Grid, show: Callable[[int], None] = lambda num_cells: None
) -> Raster:
    """
    Predict each cell, some rows at a time.

    :param show: called with the number of cells done.
    :raises InputError: when nothing was observed in any.
    """
    shape = grid.height, grid.width
    mean, stddev = np.full((2, *shape), np.nan, np.float32)
    num_rows = max(1, CELLS_AT_ONCE // grid.width)
    for start in range(0, grid.height, num_rows):
        x = _rows(grid, start, min(start + num_rows, grid.height))
        known = is_known(field, x)
        if known.any():
            for whole, part in zip((mean, stddev), field.predict(x[known]), strict=True):
                whole.reshape(-1)[np.flatnonzero(known) + start * grid.width] = part[:, 0]
        show((start + len(x) // grid.width) * grid.width)
    if not np.isfinite(mean).any():
        raise InputError(
            f'no center of a cell of {grid.resolution:g} m within '
            f'{_corners(grid.origin, grid.upper)} lies where something was observed; expected '
            'bounds around the observations, or a finer resolution'
        )
    return Raster(grid, mean, stddev)


def _rows(grid, start, stop):
    """List the cell centers of some rows (n, 2) [m]."""
    x, y = grid.origin
    lower = (x, y + start * grid.resolution)
    return Grid(lower, grid.resolution, grid.width, stop - start).targets


def _round_up(value):
    """Round a length up to two digits."""
    if not value > 0:
        return 0.0
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f'{math.ceil(value / unit) * unit:.2g}')


def _corners(lower, upper):
    return ' to '.join(f'({x:g}, {y:g})' for x, y in (lower, upper)) + ' m'
