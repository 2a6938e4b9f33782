"""What RViz gets is finite, in place, and never piles up."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from std_msgs.msg import Header

from cmanp_ros.conversions import points_from_cloud, stamp_from_nanoseconds
from cmanp_ros.core.errors import ConfigError, InputError
from cmanp_ros.visualization import (
    Grid,
    color_table,
    field_cloud,
    grid_map,
    grid_map_layer,
    grid_map_type,
    grid_targets,
    occupancy_grid,
    poses,
)

WIDTH, HEIGHT = 7, 5
GRID = Grid(origin=(-3.0, 11.0), resolution=0.5, width=WIDTH, height=HEIGHT)
HEADER = Header(frame_id='map', stamp=stamp_from_nanoseconds(13))
FINITE = np.arange(WIDTH * HEIGHT, dtype=np.float64)
MODEST = settings(deadline=None, max_examples=60)
any_values = hnp.arrays(np.float64, WIDTH * HEIGHT, elements=st.floats())


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
        ((0.0, 0.0), (1.0, 1.0), -0.1, 'resolution is -0.1 m/cell; expected a positive length'),
        ((0.0, 0.0), (1.0, 1.0), np.nan, 'resolution is nan m/cell; expected a positive'),
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
def test_occupancy_needs_a_range(limits):
    with pytest.raises(InputError, match='expected lower < upper'):
        occupancy_grid(GRID, FINITE, *limits)


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
        grid_map_layer(GRID, np.zeros(shape))


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


def at_of_grid_map(layer, row, column):
    """Read a cell as grid_map does: an Eigen matrix, column by column."""
    (outer, inner), data = layer.layout.dim, np.array(layer.data)
    assert (outer.label, inner.label) == ('column_index', 'row_index')
    assert outer.stride == outer.size * inner.size == len(data) and inner.stride == inner.size
    return data[layer.layout.data_offset + inner.stride * column + row]


def test_grid_map_begins_at_the_largest_x_and_y_and_goes_down_along_both():
    x, y = GRID.targets.T
    layers = [grid_map_layer(GRID, coordinate) for coordinate in (x, y)]
    for row in range(WIDTH):  # grid_map: the first index is that of x
        for column in range(HEIGHT):
            found = [at_of_grid_map(layer, row, column) for layer in layers]
            np.testing.assert_allclose(
                found, [x.max() - row * GRID.resolution, y.max() - column * GRID.resolution]
            )


def test_grid_map_has_nan_where_a_value_is_not_finite():
    values = FINITE.copy()
    values[[3, 11, 17]] = np.nan, np.inf, 1e300
    data = np.array(grid_map_layer(GRID, values).data)[::-1]
    np.testing.assert_array_equal(np.flatnonzero(np.isnan(data)), [3, 11, 17])
    assert np.isfinite(np.delete(data, [3, 11, 17])).all()


@pytest.mark.skipif(grid_map_type() is None, reason='grid_map_msgs comes with a ROS installation')
def test_grid_map_lies_where_the_grid_does():
    message = grid_map(GRID, {'mean': FINITE, 'stddev': FINITE / 7}, HEADER)
    assert message.header == HEADER
    assert (list(message.layers), list(message.basic_layers)) == (['mean', 'stddev'],) * 2
    assert (message.info.length_x, message.info.length_y) == (3.5, 2.5)
    assert (message.info.pose.position.x, message.info.pose.position.y) == (-1.25, 12.25)
    assert (message.outer_start_index, message.inner_start_index) == (0, 0)
    assert list(message.data[1].data) == list(grid_map_layer(GRID, FINITE / 7).data)


def test_poses_are_in_order_and_look_away_from_the_origin():
    origin = np.array([2.0, 3.0])
    positions = origin + np.array([[5.0, 0.0], [0.0, 7.0], [-11.0, 0.0], [0.0, -13.0], [0.0, 0.0]])
    message = poses(positions, origin, HEADER)
    assert message.header == HEADER
    np.testing.assert_array_equal(
        [[p.position.x, p.position.y, p.position.z] for p in message.poses],
        np.column_stack([positions, np.zeros(5)]),
    )
    yaw = [2 * np.arctan2(p.orientation.z, p.orientation.w) for p in message.poses]
    np.testing.assert_allclose(np.array(yaw[:4]) / np.pi, [0, 0.5, 1, -0.5], atol=1e-12)
    for p in message.poses:
        q = p.orientation
        np.testing.assert_allclose(q.x**2 + q.y**2 + q.z**2 + q.w**2, 1.0)
