"""The markers that RViz gets are finite, in place, never pile up, and do not hide the unknown."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from rclpy.serialization import deserialize_message, serialize_message
from std_msgs.msg import Header
from visualization_msgs.msg import Marker, MarkerArray

from cmanp_ros.conversions import stamp_from_nanoseconds
from cmanp_ros.core.errors import InputError
from cmanp_ros.markers import Scene, scene_markers
from cmanp_ros.visualization import Grid, color_table

WIDTH, HEIGHT = 7, 5
GRID = Grid(origin=(-3.0, 11.0), resolution=0.5, width=WIDTH, height=HEIGHT)
HEADER = Header(frame_id='map', stamp=stamp_from_nanoseconds(13))
FINITE = np.arange(WIDTH * HEIGHT, dtype=np.float64)
NO_TRACK = np.zeros((0, 2))
SCENE = Scene(
    GRID,
    FINITE,
    FINITE,
    (0.0, 34.0),
    bounds=np.array([[-3.0, 11.0], [0.5, 13.5]]),
    tiles=np.array([[[-3.0, 11.0], [-1.0, 13.0]], [[-2.0, 11.0], [0.0, 13.0]]]),
    track=np.array([[-2.9, 11.1], [-1.4, 12.1], [0.1, 13.1]]),
    views=np.array([[0.25, 11.25], [-2.75, 13.25]]),
    max_views=3,
)
NAMES = {
    *((name, 0) for name in ('surface', 'mesh', 'flat', 'tiles', 'bounds', 'track', 'rover')),
    *(('views', index) for index in range(3)),
    *(('legend', index) for index in range(8)),
}
any_values = hnp.arrays(np.float64, WIDTH * HEIGHT, elements=st.floats())


def shown(**changes):
    """Return the markers of the scene, with changes, by namespace and id."""
    markers = scene_markers(replace(SCENE, **changes), HEADER).markers
    found = {(marker.ns, marker.id): marker for marker in markers}
    assert len(found) == len(markers), 'an id twice'
    return found


def points_of(marker):
    """Return the corners of a marker as (n, 3)."""
    return np.array([[point.x, point.y, point.z] for point in marker.points]).reshape(-1, 3)


def colors_of(marker):
    """Return the colors of the corners as (n, 3)."""
    return np.array([[color.r, color.g, color.b] for color in marker.colors]).reshape(-1, 3)


def test_surface_has_two_triangles_between_any_four_cells():
    surface = shown()['surface', 0]
    assert (surface.type, surface.action) == (Marker.TRIANGLE_LIST, Marker.ADD)
    assert (surface.header, surface.pose.orientation.w, surface.scale.x) == (HEADER, 1.0, 1.0)
    assert len(surface.points) == len(surface.colors) == 6 * (WIDTH - 1) * (HEIGHT - 1)
    vertices = {tuple(point) for point in points_of(surface)}
    expected = np.column_stack([GRID.targets, FINITE])
    assert vertices == {tuple(vertex) for vertex in expected.tolist()}


def test_surface_faces_up():
    surface = shown(mean=0 * FINITE)['surface', 0]
    first, second, third = points_of(surface).reshape(-1, 3, 3).transpose(1, 0, 2)
    normals = np.cross(second - first, third - first)
    np.testing.assert_allclose(normals, [[0.0, 0.0, 0.25]] * len(normals), atol=1e-12)


@pytest.mark.parametrize('name', ['surface', 'flat'])
def test_surface_and_flat_map_are_colored_by_stddev(name):
    cells = {tuple(x): stddev for x, stddev in zip(GRID.targets, FINITE[::-1], strict=True)}
    marker = shown(stddev=FINITE[::-1])[name, 0]
    for point, color in zip(points_of(marker), colors_of(marker), strict=True):
        expected = color_table()[round(cells[tuple(point[:2])] / 34.0 * 255)]
        np.testing.assert_allclose(color, expected, atol=0.02)


def test_surface_leaves_out_triangles_with_a_corner_not_finite():
    mean = FINITE.copy()
    mean[2 * WIDTH + 3] = np.nan  # an inner cell: corner of six triangles
    surface = shown(mean=mean)['surface', 0]
    assert len(surface.points) == 6 * (WIDTH - 1) * (HEIGHT - 1) - 6 * 3
    assert np.isfinite(points_of(surface)).all()


def test_unknown_has_no_surface_and_none_of_the_colors_of_the_scale():
    known = GRID.targets[:, 0] < -1.0
    markers = shown(known=known)
    for name in ('surface', 'mesh'):
        assert points_of(markers[name, 0])[:, 0].max() < -1.0
    flat, table = markers['flat', 0], color_table()
    unknown = points_of(flat)[:, 0] > -1.0
    assert unknown.any() and not unknown.all()
    difference = np.abs(colors_of(flat)[:, None] - table).max(-1).min(-1)
    assert (difference[unknown] > 0.1).all() and (difference[~unknown] < 1e-6).all()
    grey = colors_of(flat)[unknown][0]
    assert np.ptp(grey) == 0
    np.testing.assert_array_equal(colors_of(markers['legend', 1])[0], grey)
    assert markers['legend', 2].text == 'unknown'


def test_map_without_observations_has_a_floor_and_no_surface():
    markers = shown(known=np.zeros(len(FINITE), bool), track=NO_TRACK)
    gone = {name for (name, _), marker in markers.items() if marker.action == Marker.DELETE}
    assert {'surface', 'mesh', 'track', 'rover'} <= gone
    assert markers['flat', 0].action == markers['bounds', 0].action == Marker.ADD


@pytest.mark.parametrize('grid', [GRID, Grid((0.0, 0.0), 1.0, 1, 5)])
def test_surface_without_triangles_is_deleted(grid):
    nothing = np.full(grid.num_cells, np.nan if grid is GRID else 0.0)
    surface = shown(grid=grid, mean=nothing, stddev=nothing)['surface', 0]
    assert (surface.action, surface.points, surface.colors) == (Marker.DELETE, [], [])


def test_markers_have_the_same_names_whatever_is_shown():
    nothing = replace(SCENE, mean=FINITE * np.nan, tiles=np.zeros((0, 2, 2)), bounds=None)
    nothing = replace(nothing, track=NO_TRACK, views=NO_TRACK)
    for scene in (SCENE, nothing):
        markers = scene_markers(scene, HEADER).markers
        assert {(marker.ns, marker.id) for marker in markers} == NAMES
        for marker in markers:
            assert marker.header == HEADER and not marker.frame_locked
            assert (marker.lifetime.sec, marker.lifetime.nanosec) == (0, 0), 'it would vanish'
            is_list = marker.type in (Marker.TRIANGLE_LIST, Marker.LINE_LIST)
            assert not is_list or bool(marker.points) == (marker.action == Marker.ADD)
    gone = {(m.ns, m.id) for m in markers if m.action == Marker.DELETE}
    legend = {name for name in NAMES if name[0] == 'legend'}
    assert gone == NAMES - legend - {('flat', 0)}


def test_floor_is_below_the_surface_and_stays_while_the_surface_moves_a_little():
    floors = []
    for shift in np.linspace(100.0, 100.3, 13):
        markers = shown(mean=FINITE / 100 + shift)
        (floor,) = set(points_of(markers['flat', 0])[:, 2])
        assert floor < points_of(markers['surface', 0])[:, 2].min()
        for name in ('tiles', 'bounds'):
            assert floor < points_of(markers[name, 0])[:, 2].min() < floor + 0.02 * 3.5
        assert markers['legend', 3].pose.position.z == floor
        floors.append(floor)
    assert len(set(floors)) <= 2 and 100.0 - max(floors) < 3.5


def test_outlines_of_tiles_are_all_their_sides_each_once():
    tiles = shown()['tiles', 0]
    assert tiles.type == Marker.LINE_LIST and 0 < tiles.scale.x < 0.01
    lines = points_of(tiles)[:, :2].reshape(-1, 4)
    assert len(np.unique(lines, axis=0)) == len(lines)
    lengths = np.linalg.norm(lines[:, 2:] - lines[:, :2], axis=1)
    # Two tiles of 2 m: 16 halves of their sides, but two halves are sides of both.
    np.testing.assert_array_equal(lengths, np.ones(16 - 2))
    for corners in SCENE.tiles:
        for corner in [(x, y) for x in corners[:, 0] for y in corners[:, 1]]:
            assert (np.linalg.norm(lines.reshape(-1, 2) - corner, axis=1) < 1e-9).sum() >= 2


def test_outlines_end_where_the_grid_does():
    tiles = np.array([[[-5.0, 7.0], [-1.0, 12.0]], [[-90.0, 7.0], [-80.0, 12.0]]])
    lines = points_of(shown(tiles=tiles)['tiles', 0])[:, :2]
    np.testing.assert_array_equal(lines.min(axis=0), GRID.origin)
    np.testing.assert_array_equal(lines.max(axis=0), [-1.0, 12.0])
    assert (np.linalg.norm(lines[::2] - lines[1::2], axis=1) > 0).all()


def test_way_of_the_robot_lies_on_the_surface_and_ends_where_it_is():
    markers = shown()
    ends = points_of(markers['track', 0])
    np.testing.assert_allclose(ends[[0, 1, 3], :2], SCENE.track)
    np.testing.assert_array_equal(ends[1], ends[2])
    np.testing.assert_allclose(ends[[0, 1, 3], 2], np.array([0.0, 17.0, 34.0]) + 0.035)
    position = markers['rover', 0].pose.position
    np.testing.assert_array_equal([position.x, position.y, position.z], ends[3])


def test_way_outside_the_grid_is_left_out():
    track = np.array([[-2.9, 11.1], [-1.4, 12.1], [90.0, 12.1], [-1.4, 12.6], [1e300, -1e300]])
    markers = shown(track=track)
    np.testing.assert_allclose(points_of(markers['track', 0])[:, :2], track[:2])
    assert markers['rover', 0].action == Marker.DELETE


def test_places_to_measure_next_are_numbered_and_the_rest_deleted():
    markers = shown()
    for index, (x, y) in enumerate(SCENE.views):
        marker = markers['views', index]
        assert (marker.type, marker.action) == (Marker.TEXT_VIEW_FACING, Marker.ADD)
        assert (marker.text, marker.pose.position.x, marker.pose.position.y) == (
            str(index + 1),
            x,
            y,
        )
    assert markers['views', 2].action == Marker.DELETE


def test_legend_names_the_stddev_of_its_colors():
    markers = shown(stddev_range=(0.0, 2.0))
    labels = [markers['legend', index] for index in range(2, 8)]
    assert [label.text for label in labels] == ['unknown', '0', '0.5', '1', '1.5', '2 stddev']
    bar = markers['legend', 0]
    corners, colors = points_of(bar), colors_of(bar)
    for label, value in zip(labels[1:], np.linspace(0, 255, 5), strict=True):
        nearest = np.abs(corners[:, 0] - label.pose.position.x).argmin()
        np.testing.assert_allclose(colors[nearest], color_table()[round(value)], atol=0.02)
    assert corners[:, 1].max() < GRID.origin[1], 'beside the grid'


@pytest.mark.parametrize('limits', [(1.0, 1.0), (2.0, 1.0), (np.nan, 1.0)])
def test_colors_need_a_range(limits):
    with pytest.raises(InputError, match='expected lower < upper'):
        shown(stddev_range=limits)


@pytest.mark.parametrize('name', ['mean', 'stddev', 'known'])
def test_another_number_of_values_than_cells_is_refused(name):
    with pytest.raises(InputError, match=rf'{name} has shape \(36,\); expected \(35,\)'):
        shown(**{name: np.zeros(36)})


@settings(deadline=None, max_examples=30)
@given(any_values, any_values)
def test_markers_are_finite_for_any_prediction(mean, stddev):
    for marker in shown(mean=mean, stddev=stddev).values():
        position = marker.pose.position
        assert np.isfinite([position.x, position.y, position.z]).all()
        assert np.isfinite(points_of(marker)).all()
        assert len(marker.colors) in (0, len(marker.points))
        colors = colors_of(marker)
        assert ((colors >= 0.0) & (colors <= 1.0)).all()


def test_fine_grid_is_drawn_coarser_over_the_same_extent():
    grid = Grid((0.0, 0.0), 0.1, 401, 307)
    values = np.zeros(grid.num_cells)
    markers = shown(grid=grid, mean=values, stddev=values)
    for name, most in (('surface', 10_000), ('flat', 2_500)):
        points = np.unique(points_of(markers[name, 0]), axis=0)
        assert most / 4 < len(points) < 1.1 * most
        np.testing.assert_allclose(points[:, :2].min(axis=0), grid.targets[0])
        np.testing.assert_allclose(points[:, :2].max(axis=0), grid.targets[-1])


def test_messages_survive_serialization():
    markers = scene_markers(SCENE, HEADER)
    assert deserialize_message(serialize_message(markers), MarkerArray) == markers
