"""
The map as RViz markers: a surface, and below it a floor with all that has no height.

Namespaces and ids are always the same, and a marker that has nothing to show is deleted: nothing
piles up, and a late RViz sees all of it. What is not known is never in a color of the scale:
the surface ends there, and the floor is grey.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from geometry_msgs.msg import Point
from std_msgs.msg import ColorRGBA, Header
from visualization_msgs.msg import Marker, MarkerArray

from cmanp_ros.visualization import NUM_COLORS, Grid, color_table, drawable, fraction, per_cell

MAX_TILES = 1000  # outlined; of more only their larger parents are
_MAX_SURFACE, _MAX_FLOOR = 10_000, 2_500  # vertices: a marker holds an object for each
_NUM_LABELS, _NUM_STEPS = 5, 33  # of the legend
_NUM_LINES = 20  # across the longer side of the surface
_FLOOR_STEP = 0.1  # of the longer side: the floor moves in such steps, not with every message


@dataclasses.dataclass(frozen=True)
class Scene:
    """
    What is shown.

    :ivar grid: of n cells.
    :ivar mean: (n,) or (n, 1) [field units], drawn as height [m].
    :ivar stddev: (n,) or (n, 1) [field units].
    :ivar stddev_range: [lower, upper], the two ends of the colors.
    :ivar known: (n,) bool, False where nothing was observed; None: all is known.
    :ivar bounds: lower and upper corner of the workspace, (2, 2) [m]; None: not shown.
    :ivar tiles: lower and upper corners of tiles in memory, (tiles, 2, 2) [m].
    :ivar track: the way of the robot, (points, 2) [m]; the last point is where it is.
    :ivar views: where to measure next, best first, (views, 2) [m].
    :ivar max_views: markers kept for them.
    """

    grid: Grid
    mean: np.ndarray
    stddev: np.ndarray
    stddev_range: Sequence[float]
    known: np.ndarray | None = None
    bounds: np.ndarray | None = None
    tiles: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 2, 2)))
    track: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 2)))
    views: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 2)))
    max_views: int = 0

    @property
    def extent(self) -> float:
        """Longer side of the grid [m], which sizes go by."""
        return max(self.grid.width, self.grid.height) * self.grid.resolution

    @property
    def heights(self) -> np.ndarray:
        """Heights of the cells, (height, width) float32 [m]."""
        heights = drawable(self.grid, self.mean, 'mean')
        return heights.reshape(self.grid.height, self.grid.width)

    @property
    def floor(self) -> float:
        """Height [m] of what is flat: below the surface, in steps that it seldom takes."""
        heights = self.heights[np.isfinite(self.heights)]
        step = _FLOOR_STEP * self.extent
        lowest = float(heights.min()) if heights.size else 0.0
        return (math.floor(lowest / step) - 2) * step


def scene_markers(scene: Scene, header: Header | None = None) -> MarkerArray:
    """
    Show the mean as a surface colored by stddev, with lines that follow it, and all around it.

    The lines are there because RViz does not shade colored triangles: no relief would be seen.

    :param scene: what is shown.
    :param header: frame of the map, stamp of the newest observation.
    :return: markers whose namespaces and ids never change, so that new ones replace the old.
    :raises InputError: another number of values than cells, or no range.
    """
    header, floor = header or Header(), scene.floor
    return MarkerArray(
        markers=[
            *_surface(scene, header),
            _flat(scene, floor, header),
            _tiles(scene, floor + 0.002 * scene.extent, header),
            _bounds(scene, floor + 0.004 * scene.extent, header),
            *_robot(scene, header),
            *_views(scene, header),
            *_legend(scene, floor, header),
        ]
    )


def _color_messages(table: np.ndarray) -> list[ColorRGBA]:
    """Make messages, rounded to their float32, so that what arrives equals what was sent."""
    return [ColorRGBA(r=r, g=g, b=b, a=1.0) for r, g, b in table.astype(np.float32).tolist()]


_COLORS = _color_messages(color_table())
# Lines are lighter than what is below them. Not transparent: RViz ignores the alpha of a point.
_LINE_COLORS = _color_messages(1.0 - 0.6 * (1.0 - color_table()))
_GREY, _LIGHT_GREY, _WHITE, _ORANGE = _color_messages(
    np.array([[0.33, 0.33, 0.33], [0.5, 0.5, 0.5], [1.0, 1.0, 1.0], [1.0, 0.55, 0.0]])
)


def _surface(scene, header):
    """Return the surface, where something is known, and the lines on it."""
    centers, heights, deviations, known = _thinned_cells(scene, _MAX_SURFACE)
    shown = np.isfinite(heights) & np.isfinite(deviations) & known
    vertices = _points(np.dstack([centers, heights]))
    color_index = _color_index(np.where(shown, deviations, 0.0), scene.stddev_range)
    surface = _marker(header, 'surface', 0, Marker.TRIANGLE_LIST)
    colors = [_COLORS[index] for index in color_index]
    _connect(surface, _triangle_corners(shown), vertices, colors)
    mesh = _marker(header, 'mesh', 0, Marker.LINE_LIST)
    mesh.scale.x = scene.extent / 500  # [m], thickness
    mesh.pose.position.z = mesh.scale.x  # above the surface that would hide it
    colors = [_LINE_COLORS[index] for index in color_index]
    _connect(mesh, _line_ends(shown), vertices, colors)
    return surface, mesh


def _flat(scene, floor, header):
    """Return the stddev as a flat map, grey where nothing is known."""
    centers, _, deviations, known = _thinned_cells(scene, _MAX_FLOOR)
    known = np.isfinite(deviations) & known
    vertices = _points(np.dstack([centers, np.full(known.shape, floor)]))
    color_index = _color_index(np.where(known, deviations, 0.0), scene.stddev_range)
    colors = [
        _COLORS[index] if is_known else _GREY
        for index, is_known in zip(color_index, known.reshape(-1).tolist(), strict=True)
    ]
    flat = _marker(header, 'flat', 0, Marker.TRIANGLE_LIST)
    _connect(flat, _triangle_corners(np.ones(known.shape, dtype=bool)), vertices, colors)
    return flat


def _tiles(scene, height, header):
    """Return the outlines of tiles, as far as they lie on the grid."""
    grid = scene.grid
    lower = np.array(grid.origin)
    lines = np.clip(
        _sides(scene.tiles), lower, lower + grid.resolution * np.array([grid.width, grid.height])
    )
    lines = lines[(lines[:, 0] != lines[:, 1]).any(-1)]
    marker = _lines(header, 'tiles', lines, height)
    marker.scale.x, marker.color = scene.extent / 1000, _LIGHT_GREY
    return marker


def _bounds(scene, height, header):
    """Return the outline of the workspace."""
    bounds = np.zeros((0, 2, 2)) if scene.bounds is None else np.array([scene.bounds])
    marker = _lines(header, 'bounds', _sides(bounds), height)
    marker.scale.x, marker.color = scene.extent / 300, _WHITE
    return marker


def _sides(corners):
    """Return the halves of the sides of rectangles (n, 2, 2), as lines (lines, 2, 2) [m]."""
    lower, upper = corners[:, 0], corners[:, 1]
    middle = (lower + upper) / 2  # where the outline of a tile meets that of the next
    x, y = (np.stack([lower[:, i], middle[:, i], upper[:, i]], axis=1) for i in (0, 1))
    ends = [
        np.stack([x[:, a], y[:, b], x[:, c], y[:, d]], axis=-1)
        for side in (0, 2)
        for part in (0, 1)
        for a, b, c, d in ((part, side, part + 1, side), (side, part, side, part + 1))
    ]
    return np.concatenate(ends).reshape(-1, 2, 2)


def _lines(header, namespace, lines, height):
    """Return a marker of flat lines (n, 2, 2) [m], each once although neighbors share it."""
    marker = _marker(header, namespace, 0, Marker.LINE_LIST)
    ends = np.unique(lines.reshape(-1, 4).round(9), axis=0).reshape(-1, 2)
    marker.points = _points(np.column_stack([ends, np.full(len(ends), height)]))
    return _or_deleted(marker)


def _robot(scene, header):
    """Return the way of the robot, and the robot, on the surface."""
    heights = _heights_at(scene, scene.track)
    x = np.column_stack([scene.track, heights + 0.01 * scene.extent])
    is_inside = np.isfinite(heights)
    track = _marker(header, 'track', 0, Marker.LINE_LIST)
    track.scale.x, track.color = scene.extent / 200, _ORANGE
    both = np.flatnonzero(is_inside[:-1] & is_inside[1:])
    track.points = _points(x[np.stack([both, both + 1], axis=1)])
    rover = _marker(header, 'rover', 0, Marker.SPHERE)
    rover.scale.x = rover.scale.y = rover.scale.z = scene.extent / 40
    rover.color = _ORANGE
    if len(x) and is_inside[-1]:
        rover.pose.position = _points(x[-1])[0]
    else:
        rover.action = Marker.DELETE
    return _or_deleted(track), rover


def _views(scene, header):
    """Return the numbers of the places to measure next."""
    heights = _heights_at(scene, scene.views) + 0.03 * scene.extent
    markers = []
    for index in range(scene.max_views):
        marker = _marker(header, 'views', index, Marker.TEXT_VIEW_FACING)
        if index < len(heights) and np.isfinite(heights[index]):
            marker.pose.position = _points(np.append(scene.views[index], heights[index]))[0]
            marker.scale.z, marker.text = scene.extent / 20, str(index + 1)
            marker.color = _ORANGE
        else:
            marker.action = Marker.DELETE
        markers.append(marker)
    return markers


def _legend(scene, floor, header):
    """
    Put a bar of colors and their stddev along the lower side of the grid, and what grey means.

    A bar of triangles: RViz shades cubes, which then have other colors than the surface.
    """
    grid = scene.grid
    size = grid.width * grid.resolution / (2 * (_NUM_LABELS + 1))  # [m]
    top = grid.origin[1] - size / 2
    columns = [grid.origin[0] + size * (2 * index + 1) for index in range(_NUM_LABELS + 1)]
    values = np.linspace(*scene.stddev_range, _NUM_LABELS)
    texts = ['unknown', *(f'{value:.3g}' for value in values)]
    texts[-1] += ' stddev'
    steps = np.linspace(0, NUM_COLORS - 1, _NUM_STEPS).round().astype(int).tolist()
    markers = []
    for ends, num_columns, colors in (
        ((columns[1], columns[-1]), _NUM_STEPS, [_COLORS[index] for index in steps]),
        ((columns[0] - size / 2, columns[0] + size / 2), 2, [_GREY] * 2),
    ):
        x, y = np.meshgrid(np.linspace(*ends, num_columns), [top - size / 2, top])
        bar = _marker(header, 'legend', len(markers), Marker.TRIANGLE_LIST)
        points = _points(np.dstack([x, y, np.full(x.shape, floor)]))
        _connect(bar, _triangle_corners(np.ones(x.shape, dtype=bool)), points, 2 * colors)
        markers.append(bar)
    for x, text in zip(columns, texts, strict=True):
        label = _marker(header, 'legend', len(markers), Marker.TEXT_VIEW_FACING)
        label.pose.position = Point(x=x, y=top - size, z=floor)  # of its middle
        label.scale.z, label.text = 0.4 * size, text
        markers.append(label)
    return markers


def _thinned_cells(scene, max_vertices):
    """Return centers, heights, deviations and what is known, of at most so many cells."""
    grid = scene.grid
    deviations = drawable(grid, scene.stddev, 'stddev')
    known = np.ones(grid.num_cells) if scene.known is None else scene.known
    known = per_cell(grid, known, 'known').astype(bool)
    stride = max(1, math.ceil(math.sqrt(grid.num_cells / max_vertices)))
    picked = np.ix_(_thinned(grid.height, stride), _thinned(grid.width, stride))
    shape = grid.height, grid.width
    centers = grid.targets.reshape(*shape, 2)[picked]
    values = (values.reshape(shape)[picked] for values in (scene.heights, deviations, known))
    return centers, *values


def _heights_at(scene, x):
    """Return the heights [m] of the surface at locations (n, 2); NaN outside the grid."""
    grid, heights = scene.grid, np.full(len(x), np.nan)
    cell = np.floor((x - grid.origin) / grid.resolution)
    inside = ((cell >= 0) & (cell < [grid.width, grid.height])).all(1)
    column, row = cell[inside].astype(int).T
    found = scene.heights[row, column]
    heights[inside] = np.where(np.isfinite(found), found, np.nan)
    return heights


def _color_index(values: np.ndarray, limits: Sequence[float]) -> list[int]:
    """Pick the entry of the color table for each value."""
    index = np.rint(fraction(values, *limits) * (NUM_COLORS - 1))
    return index.astype(int).reshape(-1).tolist()


def _thinned(count: int, stride: int) -> np.ndarray:
    """Pick every stride-th index and the last one, so that the surface keeps its extent."""
    return np.unique(np.append(np.arange(0, count, stride), count - 1))


def _triangle_corners(shown: np.ndarray) -> np.ndarray:
    """
    List the vertex indices of the triangles all of whose corners are shown.

    :param shown: (height, width) bool.
    :return: (3 * num_triangles,) int, counter-clockwise seen from above.
    """
    height, width = shown.shape
    vertex = np.arange(height * width).reshape(height, width)
    lower_left, lower_right = vertex[:-1, :-1], vertex[:-1, 1:]
    upper_left, upper_right = vertex[1:, :-1], vertex[1:, 1:]
    triangles = np.stack(
        [lower_left, lower_right, upper_right, lower_left, upper_right, upper_left], axis=-1
    ).reshape(-1, 3)
    return triangles[shown.reshape(-1)[triangles].all(axis=1)].reshape(-1)


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
    Fill a marker with triangles or lines, or delete it when there are none.

    Corners share one object per vertex: six times fewer objects to make.
    """
    marker.points = [vertices[corner] for corner in corners.tolist()]
    marker.colors = [colors[corner] for corner in corners.tolist()]
    _or_deleted(marker)


def _or_deleted(marker: Marker) -> Marker:
    """Delete a marker without points: RViz would complain."""
    if not marker.points:
        marker.action = Marker.DELETE
    return marker


def _marker(header: Header, namespace: str, id: int, kind: int) -> Marker:
    """Make a marker at the origin of its frame that stays until it is replaced."""
    marker = Marker(header=header, ns=namespace, id=id, type=kind, action=Marker.ADD)
    marker.pose.orientation.w = 1.0
    marker.scale.x = marker.scale.y = marker.scale.z = 1.0
    marker.color = ColorRGBA(r=1.0, g=1.0, b=1.0, a=1.0)
    return marker
