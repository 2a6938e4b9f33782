"""What RViz gets is finite, in place, and never piles up."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from rclpy.serialization import deserialize_message, serialize_message
from std_msgs.msg import Header
from visualization_msgs.msg import Marker, MarkerArray

from cmanp_ros.conversions import points_from_cloud, stamp_from_nanoseconds
from cmanp_ros.core.errors import ConfigError, InputError
from cmanp_ros.visualization import (
    Grid,
    color_table,
    field_cloud,
    grid_targets,
    occupancy_grid,
    surface_markers,
)

WIDTH, HEIGHT = 7, 5
GRID = Grid(origin=(-3.0, 11.0), resolution=0.5, width=WIDTH, height=HEIGHT)
HEADER = Header(frame_id='map', stamp=stamp_from_nanoseconds(13))
FINITE = np.arange(WIDTH * HEIGHT, dtype=np.float64)
MODEST = settings(deadline=None, max_examples=60)
any_values = hnp.arrays(np.float64, WIDTH * HEIGHT, elements=st.floats())


def points_of(marker):
    """Return the corners of a marker as (n, 3)."""
    return np.array([[point.x, point.y, point.z] for point in marker.points]).reshape(-1, 3)


def by_name(markers):
    """Index markers by namespace and id."""
    return {(marker.ns, marker.id): marker for marker in markers.markers}


def test_targets_are_cell_centers_row_by_row_from_the_lower_left():
    targets = GRID.targets
    assert targets.shape == (WIDTH * HEIGHT, 2)
    np.testing.assert_allclose(targets[0], [-2.75, 11.25])
    np.testing.assert_allclose(targets[1], [-2.25, 11.25])
    np.testing.assert_allclose(targets[WIDTH], [-2.75, 11.75])
    np.testing.assert_allclose(targets[-1], [-3.0 + 3.5 - 0.25, 11.0 + 2.5 - 0.25])


@pytest.mark.parametrize(
    'bounds_max, resolution, width, height',
    [
        ((3.5, 2.5), 0.5, 7, 5),
        ((3.6, 2.5), 0.5, 8, 5),
        ((50.0, 0.3), 0.1, 500, 3),
        ((0.1, 0.2), 7.0, 1, 1),
    ],
)
def test_grid_covers_the_bounds_with_whole_cells(bounds_max, resolution, width, height):
    grid = grid_targets((0.0, 0.0), bounds_max, resolution)
    assert (grid.width, grid.height, grid.origin) == (width, height, (0.0, 0.0))
    assert grid.num_cells == width * height == len(grid.targets)


@pytest.mark.parametrize(
    'bounds_min, bounds_max, resolution, text',
    [
        ((0.0,), (1.0,), 0.1, 'a grid expects two finite numbers each'),
        ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), 0.1, 'a grid expects two finite numbers each'),
        ((0.0, np.nan), (1.0, 1.0), 0.1, 'a grid expects two finite numbers each'),
        ((0.0, 1.0), (1.0, 1.0), 0.1, 'is empty; expected bounds_min < bounds_max'),
        ((0.0, 0.0), (1.0, 1.0), -0.1, 'a positive resolution'),
        ((-1e308, 0.0), (1e308, 1.0), 1.0, '1000000000000000000 x 1 cells'),
        ((0.0, 0.0), (1e3, 1e3), 1e-3, 'cells of 0.001 m; expected at most 10000000: use larger'),
    ],
)
def test_grid_that_cannot_be_laid_is_refused(bounds_min, bounds_max, resolution, text):
    with pytest.raises(ConfigError, match=text):
        grid_targets(bounds_min, bounds_max, resolution)


def test_cloud_shows_mean_as_height_and_stddev_as_intensity():
    cloud = field_cloud(GRID, FINITE[:, None], FINITE[:, None] / 64, HEADER)
    names = ('x', 'y', 'z', 'mean', 'stddev')
    assert [field.name for field in cloud.fields] == [*names, 'intensity']
    assert cloud.header == HEADER
    columns, intensity, _ = points_from_cloud(cloud, names, 'intensity')
    np.testing.assert_array_equal(columns[:, :2], GRID.targets)
    np.testing.assert_array_equal(columns[:, 2], FINITE)
    np.testing.assert_array_equal(columns[:, 3], FINITE)
    np.testing.assert_array_equal(columns[:, 4], FINITE / 64)
    np.testing.assert_array_equal(intensity[:, 0], FINITE / 64)


@MODEST
@given(any_values, any_values)
def test_cloud_is_finite_for_any_prediction(mean, stddev):
    cloud = field_cloud(GRID, mean, stddev)
    assert cloud.is_dense
    assert points_from_cloud(cloud)[2] == {}
    with np.errstate(over='ignore'):
        shown = np.isfinite(mean.astype(np.float32)) & np.isfinite(stddev.astype(np.float32))
    assert cloud.width == np.count_nonzero(shown)


def test_occupancy_is_row_major_from_the_lower_left_corner():
    message = occupancy_grid(GRID, FINITE, 0.0, 100.0, HEADER)
    assert list(message.data) == list(range(WIDTH * HEIGHT))
    assert (message.info.width, message.info.height) == (WIDTH, HEIGHT)
    assert (message.info.origin.position.x, message.info.origin.position.y) == (-3.0, 11.0)
    assert message.info.origin.orientation.w == 1.0
    assert message.info.resolution == 0.5
    assert message.header == HEADER and message.info.map_load_time == HEADER.stamp


def test_occupancy_scales_and_clamps():
    grid = Grid((0.0, 0.0), 1.0, 7, 1)
    values = np.array([-1e30, -2.0, -1.0, 0.0, 1.99, 2.0, 1e30])
    assert list(occupancy_grid(grid, values, -2.0, 2.0).data) == [0, 0, 25, 50, 100, 100, 100]


def test_occupancy_is_unknown_where_not_finite_or_not_known():
    grid = Grid((0.0, 0.0), 1.0, 5, 1)
    values = np.array([np.nan, np.inf, -np.inf, 1.0, 1.0])
    known = np.array([True, True, True, True, False])
    assert list(occupancy_grid(grid, values, 0.0, 2.0).data) == [-1, -1, -1, 50, 50]
    assert list(occupancy_grid(grid, values, 0.0, 2.0, known=known).data) == [-1, -1, -1, 50, -1]


@MODEST
@given(any_values, st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_occupancy_is_legal_for_any_prediction(values, lower, extent):
    data = np.array(occupancy_grid(GRID, values, lower, lower + extent).data)
    assert len(data) == GRID.num_cells
    assert ((data >= -1) & (data <= 100)).all()
    np.testing.assert_array_equal(data == -1, ~np.isfinite(values))


@pytest.mark.parametrize('limits', [(1.0, 1.0), (2.0, 1.0), (np.nan, 1.0)])
def test_occupancy_and_colors_need_a_range(limits):
    with pytest.raises(InputError, match='expected lower < upper'):
        occupancy_grid(GRID, FINITE, *limits)
    with pytest.raises(InputError, match='expected lower < upper'):
        surface_markers(GRID, FINITE, FINITE, limits)


@pytest.mark.parametrize(
    'shape', [(WIDTH * HEIGHT + 1,), (WIDTH * HEIGHT, 2), (HEIGHT, WIDTH), ()]
)
def test_another_number_of_values_than_cells_is_refused(shape):
    text = r'expected \(35,\), one number for each of the 7 x 5 cells'
    with pytest.raises(InputError, match=text):
        occupancy_grid(GRID, np.zeros(shape), 0.0, 1.0)
    with pytest.raises(InputError, match=text):
        field_cloud(GRID, FINITE, np.zeros(shape))
    with pytest.raises(InputError, match=text):
        surface_markers(GRID, np.zeros(shape), FINITE, (0.0, 1.0))


def test_surface_has_two_triangles_between_any_four_cells():
    surface = by_name(surface_markers(GRID, FINITE, FINITE, (0.0, 34.0), HEADER))['surface', 0]
    assert (surface.type, surface.action) == (Marker.TRIANGLE_LIST, Marker.ADD)
    assert (surface.header, surface.pose.orientation.w, surface.scale.x) == (HEADER, 1.0, 1.0)
    assert len(surface.points) == len(surface.colors) == 6 * (WIDTH - 1) * (HEIGHT - 1)
    vertices = {tuple(point) for point in points_of(surface)}
    expected = np.column_stack([GRID.targets, FINITE])
    assert vertices == {tuple(vertex) for vertex in expected.tolist()}


def test_surface_faces_up():
    surface = by_name(surface_markers(GRID, 0 * FINITE, FINITE, (0.0, 34.0)))['surface', 0]
    first, second, third = points_of(surface).reshape(-1, 3, 3).transpose(1, 0, 2)
    normals = np.cross(second - first, third - first)
    np.testing.assert_allclose(normals, [[0.0, 0.0, 0.25]] * len(normals), atol=1e-12)


def test_surface_is_colored_by_stddev():
    deviations = FINITE[::-1] / 34.0
    surface = by_name(surface_markers(GRID, FINITE, deviations, (0.0, 1.0)))['surface', 0]
    table = color_table()
    for point, color in zip(surface.points, surface.colors, strict=True):
        expected = table[round(deviations[int(point.z)] * 255)]
        np.testing.assert_allclose([color.r, color.g, color.b], expected, atol=0.02)


def test_surface_leaves_out_triangles_with_a_corner_not_finite():
    mean = FINITE.copy()
    mean[2 * WIDTH + 3] = np.nan  # an inner cell: corner of six triangles
    surface = by_name(surface_markers(GRID, mean, FINITE, (0.0, 34.0)))['surface', 0]
    assert len(surface.points) == 6 * (WIDTH - 1) * (HEIGHT - 1) - 6 * 3
    assert np.isfinite(points_of(surface)).all()


@pytest.mark.parametrize('grid', [GRID, Grid((0.0, 0.0), 1.0, 1, 5)])
def test_surface_without_triangles_is_deleted(grid):
    nothing = np.full(grid.num_cells, np.nan if grid is GRID else 0.0)
    surface = by_name(surface_markers(grid, nothing, nothing, (0.0, 1.0)))['surface', 0]
    assert (surface.action, surface.points, surface.colors) == (Marker.DELETE, [], [])


def test_markers_have_the_same_names_whatever_is_shown():
    some = by_name(surface_markers(GRID, FINITE, FINITE, (0.0, 1.0)))
    nothing = by_name(surface_markers(GRID, FINITE * np.nan, FINITE, (0.0, 2.0)))
    assert list(some) == list(nothing)
    assert list(some)[0] == ('surface', 0)
    assert len(some) == len(surface_markers(GRID, FINITE, FINITE, (0.0, 1.0)).markers)


def test_legend_names_the_stddev_of_its_colors():
    markers = by_name(surface_markers(GRID, FINITE, FINITE, (0.0, 2.0), HEADER))
    labels = [m for m in markers.values() if m.type == Marker.TEXT_VIEW_FACING]
    assert [label.text for label in labels] == [
        f'stddev {v}' for v in ('0', '0.5', '1', '1.5', '2')
    ]
    right_edge = GRID.origin[0] + WIDTH * GRID.resolution
    assert all(label.pose.position.x > right_edge and label.scale.z > 0 for label in labels)
    swatches = markers['legend', 0]
    np.testing.assert_allclose(
        [swatches.colors[0].r, swatches.colors[-1].r], color_table()[[0, -1], 0], atol=1e-6
    )


@MODEST
@given(any_values, any_values)
def test_markers_are_finite_for_any_prediction(mean, stddev):
    for marker in surface_markers(GRID, mean, stddev, (0.0, 1.0)).markers:
        assert np.isfinite(points_of(marker)).all()
        assert len(marker.points) == len(marker.colors)
        assert all(
            0.0 <= c.r <= 1.0 and 0.0 <= c.g <= 1.0 and 0.0 <= c.b <= 1.0 for c in marker.colors
        )


def test_fine_grid_is_drawn_coarser_over_the_same_extent():
    grid = Grid((0.0, 0.0), 0.1, 101, 67)
    values = np.zeros(grid.num_cells)
    surface = by_name(surface_markers(grid, values, values, (0.0, 1.0), max_vertices=200))[
        'surface', 0
    ]
    points = points_of(surface)
    assert len(np.unique(points, axis=0)) < 300
    np.testing.assert_allclose(points[:, :2].min(axis=0), grid.targets[0])
    np.testing.assert_allclose(points[:, :2].max(axis=0), grid.targets[-1])


def test_messages_survive_serialization():
    markers = surface_markers(GRID, FINITE, FINITE, (0.0, 34.0), HEADER)
    assert deserialize_message(serialize_message(markers), MarkerArray) == markers


def test_colors_grow_lighter_all_the_way():
    table = color_table()
    assert table.shape == (256, 3)
    assert table.min() >= 0 and table.max() <= 1
    luminance = table @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(luminance) > 0).all()


def test_colors_are_those_of_viridis():
    matplotlib = pytest.importorskip('matplotlib', reason='compares with the original color map')
    original = matplotlib.colormaps['viridis'](np.linspace(0, 1, 256))[:, :3]
    np.testing.assert_allclose(color_table(), original, atol=0.025)
