"""
Predictive distribution on a grid -> RViz messages; pure functions, and every number is finite.

RViz scales colors by the extremes of a channel, so one infinity would flatten them all: cells
without a finite mean and stddev are left out (clouds, surfaces) or unknown (occupancy grids).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from geometry_msgs.msg import Point
from nav_msgs.msg import OccupancyGrid
from sensor_msgs.msg import PointCloud2
from std_msgs.msg import ColorRGBA, Header
from visualization_msgs.msg import Marker, MarkerArray

from cmanp_ros.conversions import cloud_from_points, int8_array
from cmanp_ros.core.errors import ConfigError, InputError

_UNKNOWN = -1
_NUM_COLORS = 256
_NUM_LABELS = 5
_NUM_BAR_ROWS = 33
_NUM_LINES = 20  # across the longer side of the surface
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
    numbers = np.array([*bounds_min, *bounds_max, resolution], dtype=np.float64)
    if len(bounds_min) != 2 or len(bounds_max) != 2 or not np.isfinite(numbers).all():
        raise ConfigError(
            f'bounds are {list(bounds_min)} to {list(bounds_max)}; a grid expects two finite '
            'numbers each'
        )
    extents = [float(high) - float(low) for low, high in zip(bounds_min, bounds_max, strict=True)]
    if min(extents) <= 0 or resolution <= 0:
        raise ConfigError(
            f'a grid over {list(bounds_min)} to {list(bounds_max)} m with {resolution} m/cell is '
            'empty; expected bounds_min < bounds_max and a positive resolution'
        )
    # A hair less, so that 50 m in cells of 0.1 m are 500 cells and not 501.
    width, height = (
        max(1, math.ceil(min(extent / resolution, 1e18) - 1e-6)) for extent in extents
    )
    if width * height > max_cells:
        raise ConfigError(
            f'{width} x {height} cells of {resolution} m; expected at most {max_cells}: '
            'use larger cells'
        )
    return Grid((float(bounds_min[0]), float(bounds_min[1])), float(resolution), width, height)


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
    mean, stddev = _drawable(grid, mean, 'mean'), _drawable(grid, stddev, 'stddev')
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
    values = _per_cell(grid, values, 'values')
    shown = np.isfinite(values)
    if known is not None:
        shown &= _per_cell(grid, known, 'known').astype(bool)
    scaled = np.where(shown, _fraction(values, lower, upper) * 100.0, _UNKNOWN)
    message = OccupancyGrid(header=header or Header())
    message.info.map_load_time = message.header.stamp
    message.info.resolution = grid.resolution
    message.info.width = grid.width
    message.info.height = grid.height
    message.info.origin.position.x, message.info.origin.position.y = grid.origin
    message.info.origin.orientation.w = 1.0
    message.data = int8_array(np.rint(scaled))
    return message


def surface_markers(
    grid: Grid,
    mean: np.ndarray,
    stddev: np.ndarray,
    stddev_range: Sequence[float],
    header: Header | None = None,
    max_vertices: int = 40_000,
) -> MarkerArray:
    """
    Show the mean as a surface colored by stddev, with lines that follow it and a legend beside it.

    The lines are there because RViz does not shade colored triangles: no relief would be seen.

    :param grid: of n cells.
    :param mean: (n,) or (n, 1) [field units], drawn as height [m].
    :param stddev: (n,) or (n, 1) [field units].
    :param stddev_range: [lower, upper], the two ends of the colors.
    :param header: frame of the map, stamp of the newest observation.
    :param max_vertices: a finer grid is drawn coarser: a marker holds an object per vertex.
    :return: markers whose namespaces and ids never change, so that new ones replace the old.
    :raises InputError: another number of values than cells, or no range.
    """
    header = header or Header()
    heights = _drawable(grid, mean, 'mean').reshape(grid.height, grid.width)
    deviations = _drawable(grid, stddev, 'stddev').reshape(grid.height, grid.width)
    stride = max(1, math.ceil(math.sqrt(grid.num_cells / max_vertices)))
    rows, columns = _thinned(grid.height, stride), _thinned(grid.width, stride)
    picked = np.ix_(rows, columns)
    heights, deviations = heights[picked], deviations[picked]
    centers = grid.targets.reshape(grid.height, grid.width, 2)[picked]
    shown = np.isfinite(heights) & np.isfinite(deviations)
    vertices = _points(np.dstack([centers, heights]))
    color_index = _color_index(np.where(shown, deviations, 0.0).reshape(-1), stddev_range)
    color_index = color_index.tolist()
    surface = _marker(header, 'surface', 0, Marker.TRIANGLE_LIST)
    colors = [_COLORS[index] for index in color_index]
    _connect(surface, _triangle_corners(shown), vertices, colors)
    mesh = _marker(header, 'mesh', 0, Marker.LINE_LIST)
    mesh.scale.x = max(grid.width, grid.height) * grid.resolution / 500  # [m], thickness
    mesh.pose.position.z = mesh.scale.x  # above the surface that would hide it
    colors = [_LINE_COLORS[index] for index in color_index]
    _connect(mesh, _line_ends(shown), vertices, colors)
    level = float(np.median(heights[shown])) if shown.any() else 0.0
    return MarkerArray(markers=[surface, mesh, *_legend(grid, stddev_range, level, header)])


def color_table(num_colors: int = _NUM_COLORS) -> np.ndarray:
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


def _color_messages(table: np.ndarray) -> list[ColorRGBA]:
    """Make messages, rounded to their float32, so that what arrives equals what was sent."""
    return [ColorRGBA(r=r, g=g, b=b, a=1.0) for r, g, b in table.astype(np.float32).tolist()]


_COLORS = _color_messages(color_table())
# Lines are lighter than what is below them. Not transparent: RViz ignores the alpha of a point.
_LINE_COLORS = _color_messages(1.0 - 0.6 * (1.0 - color_table()))


def _per_cell(grid: Grid, values: np.ndarray, name: str) -> np.ndarray:
    """Check that there is one number per cell, and return them as (n,)."""
    values = np.asarray(values)
    if values.shape not in ((grid.num_cells,), (grid.num_cells, 1)):
        raise InputError(
            f'{name} has shape {values.shape}; expected ({grid.num_cells},), one number for each '
            f'of the {grid.width} x {grid.height} cells'
        )
    return values.reshape(-1)


def _drawable(grid: Grid, values: np.ndarray, name: str) -> np.ndarray:
    """Return one float32 per cell: what is too large for RViz becomes inf, and is left out."""
    with np.errstate(over='ignore', invalid='ignore'):
        return _per_cell(grid, values, name).astype(np.float32)


def _fraction(values: np.ndarray, lower: float, upper: float) -> np.ndarray:
    """Place values within a range: 0 at lower and below, 1 at upper and above."""
    if not lower < upper:
        raise InputError(f'range is [{lower}, {upper}]; expected lower < upper')
    with np.errstate(invalid='ignore', over='ignore'):
        return np.clip((values.astype(np.float64) - lower) / (upper - lower), 0.0, 1.0)


def _color_index(values: np.ndarray, limits: Sequence[float]) -> np.ndarray:
    """Pick the entry of the color table for each value."""
    return np.rint(_fraction(values, *limits) * (_NUM_COLORS - 1)).astype(int)


def _thinned(count: int, stride: int) -> np.ndarray:
    """Pick every stride-th index and the last one, so that the surface keeps its extent."""
    return np.unique(np.append(np.arange(0, count, stride), count - 1))


def _triangle_corners(finite: np.ndarray) -> np.ndarray:
    """
    List the vertex indices of the triangles all of whose corners are finite.

    :param finite: (height, width) bool.
    :return: (3 * num_triangles,) int, counter-clockwise seen from above.
    """
    height, width = finite.shape
    vertex = np.arange(height * width).reshape(height, width)
    lower_left, lower_right = vertex[:-1, :-1], vertex[:-1, 1:]
    upper_left, upper_right = vertex[1:, :-1], vertex[1:, 1:]
    triangles = np.stack(
        [lower_left, lower_right, upper_right, lower_left, upper_right, upper_left], axis=-1
    ).reshape(-1, 3)
    return triangles[finite.reshape(-1)[triangles].all(axis=1)].reshape(-1)


def _line_ends(shown: np.ndarray) -> np.ndarray:
    """
    List the vertex indices of lines along some rows and columns, where both ends are shown.

    :param shown: (height, width) bool.
    :return: (2 * num_lines,) int.
    """
    vertex = np.arange(shown.size).reshape(shown.shape)
    step = max(1, round(max(shown.shape) / _NUM_LINES))
    ends = np.concatenate(
        [
            np.stack([vertex[::step, :-1], vertex[::step, 1:]], axis=-1).reshape(-1, 2),
            np.stack([vertex[:-1, ::step], vertex[1:, ::step]], axis=-1).reshape(-1, 2),
        ]
    )
    return ends[shown.reshape(-1)[ends].all(axis=1)].reshape(-1)


def _points(xyz: np.ndarray) -> list[Point]:
    """Make the messages of points, (..., 3) [m], in their order."""
    return [Point(x=x, y=y, z=z) for x, y, z in xyz.reshape(-1, 3).tolist()]


def _connect(
    marker: Marker, corners: np.ndarray, vertices: list[Point], colors: list[ColorRGBA]
) -> None:
    """
    Fill a marker with triangles or lines, or delete it when there are none (RViz would complain).

    Corners share one object per vertex: six times fewer objects to make.
    """
    if len(corners) == 0:
        marker.action = Marker.DELETE
    marker.points = [vertices[corner] for corner in corners.tolist()]
    marker.colors = [colors[corner] for corner in corners.tolist()]


def _marker(header: Header, namespace: str, id: int, kind: int) -> Marker:
    """Make a marker at the origin of its frame that stays until it is replaced."""
    marker = Marker(header=header, ns=namespace, id=id, type=kind, action=Marker.ADD)
    marker.pose.orientation.w = 1.0
    marker.scale.x = marker.scale.y = marker.scale.z = 1.0
    marker.color = ColorRGBA(r=1.0, g=1.0, b=1.0, a=1.0)
    return marker


def _legend(
    grid: Grid, stddev_range: Sequence[float], level: float, header: Header
) -> list[Marker]:
    """
    Put a bar of colors and their stddev to the right of the grid.

    A bar of triangles: RViz shades cubes, which then have other colors than the surface.
    """
    size = grid.height * grid.resolution / (2 * _NUM_LABELS)  # [m]
    left = grid.origin[0] + grid.width * grid.resolution + size / 2
    heights = [grid.origin[1] + size * (2 * index + 1) for index in range(_NUM_LABELS)]
    sides = np.linspace(heights[0], heights[-1], _NUM_BAR_ROWS)
    x, y = np.meshgrid([left, left + size / 2], sides)
    colors = np.linspace(0, _NUM_COLORS - 1, _NUM_BAR_ROWS).round().astype(int).repeat(2)
    bar = _marker(header, 'legend', 0, Marker.TRIANGLE_LIST)
    _connect(
        bar,
        _triangle_corners(np.ones(x.shape, dtype=bool)),
        _points(np.dstack([x, y, np.full(x.shape, level)])),
        [_COLORS[index] for index in colors],
    )
    markers = [bar]
    values = np.linspace(*stddev_range, _NUM_LABELS)
    for index, (value, y) in enumerate(zip(values, heights, strict=True), start=1):
        label = _marker(header, 'legend', index, Marker.TEXT_VIEW_FACING)
        label.pose.position.x, label.pose.position.y = left + 2 * size, y  # of its middle
        label.pose.position.z = level
        label.scale.z = 0.4 * size
        label.text = f'stddev {value:.3g}'
        markers.append(label)
    return markers
