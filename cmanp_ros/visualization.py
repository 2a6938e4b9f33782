"""
Predictive distribution on a grid -> clouds and grids; pure functions, every number is finite.

RViz scales colors by the extremes of a channel, so one infinity would flatten them all: cells
without a finite mean and stddev are left out (clouds) or unknown (occupancy grids). Only grid maps
have NaN, which is their word for unknown. Markers are in `markers`.

The types of ROS are imported by what makes messages: grids and colors are there without ROS.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from cmanp_ros.conversions import cloud_from_points, float_array, int8_array
from cmanp_ros.core.errors import ConfigError, InputError

if TYPE_CHECKING:
    from geometry_msgs.msg import PoseArray
    from nav_msgs.msg import OccupancyGrid
    from sensor_msgs.msg import PointCloud2
    from std_msgs.msg import Float32MultiArray, Header

NUM_COLORS = 256
_UNKNOWN = -1
# Seventeen equally spaced colors of viridis (CC0): perceptually uniform, safe for the color-blind.
_VIRIDIS = (
    '440154 48186a 472d7b 424086 3b528b 33638d 2c728e 26828e 21918c '
    '1fa088 28ae80 3fbc73 5ec962 84d44b addc30 d8e219 fde725'
).split()
_ANCHORS = np.array([list(bytes.fromhex(code)) for code in _VIRIDIS]) / 255.0  # (17, 3)


@dataclasses.dataclass(frozen=True)
class Grid:
    """
    Square cells over a rectangle of the map frame.

    :ivar origin: (x, y) of the lower left corner [m], a corner, not a cell center.
    :ivar resolution: [m/cell].
    :ivar width: cells along x.
    :ivar height: cells along y.
    """

    origin: tuple[float, float]
    resolution: float
    width: int
    height: int

    @property
    def num_cells(self) -> int:
        """Count the cells."""
        return self.width * self.height

    @property
    def upper(self) -> np.ndarray:
        """(x, y) of the upper right corner [m]."""
        return np.array(self.origin) + self.resolution * np.array([self.width, self.height])

    @property
    def targets(self) -> np.ndarray:
        """List the cell centers: (n, 2) float64 [m], row by row from the lower left, x fastest."""
        x = self.origin[0] + (np.arange(self.width) + 0.5) * self.resolution
        y = self.origin[1] + (np.arange(self.height) + 0.5) * self.resolution
        return np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)


def grid_targets(
    bounds_min: Sequence[float],
    bounds_max: Sequence[float],
    resolution: float,
    max_cells: int = 10_000_000,
) -> Grid:
    """
    Lay a grid over the bounds; the last cells may reach beyond the upper ones.

    :param bounds_min: (x, y) [m].
    :param bounds_max: (x, y) [m].
    :param resolution: [m/cell].
    :param max_cells: most cells accepted.
    :return: a grid of at least one cell.
    :raises ConfigError: not a plane, an empty rectangle, or too many cells.
    """
    bounds_min, bounds_max = ([float(v) for v in corner] for corner in (bounds_min, bounds_max))
    numbers = np.array([*bounds_min, *bounds_max], dtype=np.float64)
    if len(bounds_min) != 2 or len(bounds_max) != 2 or not np.isfinite(numbers).all():
        raise ConfigError(
            f'bounds are {bounds_min} to {bounds_max}; a grid expects two finite numbers each'
        )
    extents = [high - low for low, high in zip(bounds_min, bounds_max, strict=True)]
    if min(extents) <= 0:
        raise ConfigError(
            f'a grid over {bounds_min} to {bounds_max} m is empty; expected bounds_min < '
            'bounds_max'
        )
    if not (math.isfinite(resolution) and resolution > 0):
        raise ConfigError(f'the resolution is {resolution} m/cell; expected a positive length')
    # A hair less, so that 50 m in cells of 0.1 m are 500 cells and not 501.
    width, height = (
        max(1, math.ceil(min(extent / resolution, 1e18) - 1e-6)) for extent in extents
    )
    if width * height > max_cells:
        raise ConfigError(
            f'{width} x {height} cells of {resolution} m; expected at most {max_cells}: '
            'use larger cells'
        )
    return Grid(tuple(bounds_min), float(resolution), width, height)


def field_cloud(
    grid: Grid, mean: np.ndarray, stddev: np.ndarray, header: Header | None = None
) -> PointCloud2:
    """
    Show the field as points at height mean, with the uncertainty as RViz's default color channel.

    :param grid: of n cells.
    :param mean: (n,) or (n, 1) [field units].
    :param stddev: (n,) or (n, 1) [field units].
    :param header: frame of the map, stamp of the newest observation.
    :return: FLOAT32 fields x y z (= mean) mean stddev intensity (= stddev); finite cells only.
    :raises InputError: another number of values than cells.
    """
    mean, stddev = drawable(grid, mean, 'mean'), drawable(grid, stddev, 'stddev')
    shown = np.isfinite(mean) & np.isfinite(stddev)
    x, y = grid.targets[shown].T
    mean, stddev = mean[shown], stddev[shown]
    fields = {'x': x, 'y': y, 'z': mean, 'mean': mean, 'stddev': stddev, 'intensity': stddev}
    return cloud_from_points(fields, header)


def occupancy_grid(
    grid: Grid,
    values: np.ndarray,
    lower: float,
    upper: float,
    header: Header | None = None,
    known: np.ndarray | None = None,
) -> OccupancyGrid:
    """
    Show one number per cell on the scale 0..100, -1 where it is unknown.

    :param grid: of n cells.
    :param values: (n,) or (n, 1) [field units].
    :param lower: value shown as 0; smaller ones are too.
    :param upper: value shown as 100; larger ones are too.
    :param header: frame of the map, stamp of the newest observation.
    :param known: (n,) bool, False where nothing is known; None: known wherever finite.
    :return: row-major from the lower left, origin at the lower left corner.
    :raises InputError: another number of values than cells, or lower >= upper.
    """
    from nav_msgs.msg import OccupancyGrid
    from std_msgs.msg import Header

    values = per_cell(grid, values, 'values')
    shown = np.isfinite(values)
    if known is not None:
        shown &= per_cell(grid, known, 'known').astype(bool)
    scaled = np.where(shown, fraction(values, lower, upper) * 100.0, _UNKNOWN)
    message = OccupancyGrid(header=header or Header())
    message.info.map_load_time = message.header.stamp
    message.info.resolution = grid.resolution
    message.info.width = grid.width
    message.info.height = grid.height
    message.info.origin.position.x, message.info.origin.position.y = grid.origin
    message.info.origin.orientation.w = 1.0
    message.data = int8_array(np.rint(scaled))
    return message


def grid_map_layer(grid: Grid, values: np.ndarray) -> Float32MultiArray:
    """
    Write one number per cell as a layer of grid_map_msgs/GridMap.

    There the cell (0, 0) is the one with the largest x and y, the first index runs along x and is
    the inner one in memory: our cells, row by row from the lower left, in reverse.

    :param grid: of n cells.
    :param values: (n,) or (n, 1) [field units]; what is not finite is NaN, unknown.
    :return: data and the labels of its layout, without which RViz's plugin crashes.
    """
    from std_msgs.msg import Float32MultiArray, MultiArrayDimension

    values = drawable(grid, values, 'values')
    layer = Float32MultiArray()
    layer.layout.dim = [
        MultiArrayDimension(label='column_index', size=grid.height, stride=grid.num_cells),
        MultiArrayDimension(label='row_index', size=grid.width, stride=grid.width),
    ]
    layer.data = float_array(np.where(np.isfinite(values), values, np.nan)[::-1])
    return layer


def grid_map_type():
    """Return the type grid_map_msgs/GridMap; None where that package is not installed."""
    try:
        from grid_map_msgs.msg import GridMap
    except ImportError:
        return None
    return GridMap


def grid_map(grid: Grid, layers: Mapping[str, np.ndarray], header: Header | None = None):
    """
    Show numbers per cell as grid_map_msgs/GridMap, which must be installed.

    :param grid: of n cells.
    :param layers: name -> (n,) or (n, 1) [field units]; a cell counts as known where all are.
    :param header: frame of the map, stamp of the newest observation.
    :return: grid_map_msgs/GridMap.
    """
    from std_msgs.msg import Header

    message = grid_map_type()(header=header or Header())
    message.info.resolution = grid.resolution
    message.info.length_x = grid.width * grid.resolution
    message.info.length_y = grid.height * grid.resolution
    message.info.pose.position.x = grid.origin[0] + message.info.length_x / 2  # of the center
    message.info.pose.position.y = grid.origin[1] + message.info.length_y / 2
    message.info.pose.orientation.w = 1.0
    message.layers = message.basic_layers = list(layers)
    message.data = [grid_map_layer(grid, values) for values in layers.values()]
    return message


def poses(positions: np.ndarray, origin: np.ndarray, header: Header | None = None) -> PoseArray:
    """
    Write locations as poses that look away from where one comes from.

    :param positions: (n, 2) [m].
    :param origin: (2,) [m] where one comes from.
    :param header: frame of the map, stamp of the newest observation.
    :return: in the same order, on the plane z = 0.
    """
    from geometry_msgs.msg import Pose, PoseArray
    from std_msgs.msg import Header

    message = PoseArray(header=header or Header())
    for (x, y), (ahead, left) in zip(
        positions.tolist(), (positions - origin).tolist(), strict=True
    ):
        pose, yaw = Pose(), math.atan2(left, ahead)
        pose.position.x, pose.position.y = x, y
        pose.orientation.z, pose.orientation.w = math.sin(yaw / 2), math.cos(yaw / 2)
        message.poses.append(pose)
    return message


def color_table(num_colors: int = NUM_COLORS) -> np.ndarray:
    """
    Interpolate the color map from its anchors.

    :param num_colors: entries, from the lowest value to the highest.
    :return: (num_colors, 3) red, green, blue within 0..1.
    """
    at = np.linspace(0, len(_ANCHORS) - 1, num_colors)
    return np.stack(
        [np.interp(at, np.arange(len(_ANCHORS)), _ANCHORS[:, channel]) for channel in range(3)],
        axis=-1,
    )


def per_cell(grid: Grid, values: np.ndarray, name: str) -> np.ndarray:
    """Check that there is one number per cell, and return them as (n,)."""
    values = np.asarray(values)
    if values.shape not in ((grid.num_cells,), (grid.num_cells, 1)):
        raise InputError(
            f'{name} has shape {values.shape}; expected ({grid.num_cells},), one number for each '
            f'of the {grid.width} x {grid.height} cells'
        )
    return values.reshape(-1)


def drawable(grid: Grid, values: np.ndarray, name: str) -> np.ndarray:
    """Return one float32 per cell: what is too large for RViz becomes inf, and is left out."""
    with np.errstate(over='ignore', invalid='ignore'):
        return per_cell(grid, values, name).astype(np.float32)


def fraction(values: np.ndarray, lower: float, upper: float) -> np.ndarray:
    """Place values within a range: 0 at lower and below, 1 at upper and above."""
    if not lower < upper:
        raise InputError(f'range is [{lower}, {upper}]; expected lower < upper')
    with np.errstate(invalid='ignore', over='ignore'):
        return np.clip((values.astype(np.float64) - lower) / (upper - lower), 0.0, 1.0)
