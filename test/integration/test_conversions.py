"""Messages become arrays and back without loss; whatever is malformed is refused with a reason."""

import array
import itertools

import numpy as np
import pytest
from cmanp_ros.msg import Observations, Prediction, Query
from cmanp_ros.srv import Predict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sensor_msgs.msg import PointCloud2, PointField
from std_msgs.msg import Header

from cmanp_ros.conversions import (
    MessageError,
    cloud_from_points,
    float_array,
    message_from_observations,
    nanoseconds_from_stamp,
    observations_from_message,
    points_from_cloud,
    prediction_message,
    predictions_from_message,
    stamp_from_nanoseconds,
    targets_from_query,
)
from cmanp_ros.core.errors import InputError

WIDTH, HEIGHT = 7, 3
FORMATS = {
    PointField.INT8: 'i1',
    PointField.UINT8: 'u1',
    PointField.INT16: 'i2',
    PointField.UINT16: 'u2',
    PointField.INT32: 'i4',
    PointField.UINT32: 'u4',
    PointField.FLOAT32: 'f4',
    PointField.FLOAT64: 'f8',
}
MODEST = settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
finite32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


def make_cloud(values, datatype, big_endian=False, order='xyz', gap=0, row_padding=0, count=1):
    """Write values (height, width, 3) byte by byte, independently of the code under test."""
    height, width, _ = values.shape
    dtype = np.dtype(('>' if big_endian else '<') + FORMATS[datatype])
    field_step = gap + dtype.itemsize * count
    data = bytearray()
    for row in values:
        for point in row:
            for name in order:
                data += b'\xa5' * gap  # an unnamed gap before each field shifts its offset
                data += np.array(point['xyz'.index(name)], dtype).tobytes()
                data += b'\x5a' * (dtype.itemsize * (count - 1))
        data += b'\xff' * row_padding
    cloud = PointCloud2(height=height, width=width, is_bigendian=big_endian, is_dense=True)
    cloud.fields = [
        PointField(name=name, offset=index * field_step + gap, datatype=datatype, count=count)
        for index, name in enumerate(order)
    ]
    cloud.point_step = field_step * len(order)
    cloud.row_step = cloud.point_step * width + row_padding
    cloud.data = array.array('B', data)
    return cloud


def some_values(datatype=PointField.FLOAT32):
    """Return (HEIGHT, WIDTH, 3) numbers that the datatype holds exactly, all different."""
    start = 0 if FORMATS[datatype].startswith('u') else -31
    numbers = np.arange(start, start + HEIGHT * WIDTH * 3).astype(FORMATS[datatype])
    return numbers.reshape(HEIGHT, WIDTH, 3) * (1 if FORMATS[datatype][0] in 'iu' else 0.5)


def good_cloud():
    """Return a cloud of WIDTH x HEIGHT points that a test may spoil."""
    return make_cloud(some_values(), PointField.FLOAT32)


def refused(function, *arguments, **options):
    """Return the error that a call must raise."""
    with pytest.raises(MessageError) as caught:
        function(*arguments, **options)
    return caught.value


@pytest.mark.parametrize('order', [''.join(order) for order in itertools.permutations('xyz')])
@pytest.mark.parametrize('gap, row_padding', [(0, 0), (5, 0), (0, 11), (3, 13)])
@pytest.mark.parametrize('big_endian', [False, True])
@pytest.mark.parametrize('datatype', FORMATS)
def test_cloud_of_any_layout_gives_the_same_points(datatype, big_endian, gap, row_padding, order):
    values = some_values(datatype)
    cloud = make_cloud(values, datatype, big_endian, order, gap, row_padding)
    before = bytes(cloud.data)
    x, y, rejected = points_from_cloud(cloud)
    np.testing.assert_array_equal(x, values[..., :2].reshape(-1, 2))
    np.testing.assert_array_equal(y, values[..., 2:].reshape(-1, 1))
    assert (x.dtype, y.dtype, rejected) == (np.float64, np.float64, {})
    assert bytes(cloud.data) == before


@pytest.mark.parametrize('count', [0, 1, 5])
def test_first_element_of_a_field_is_taken(count):
    values = some_values()
    cloud = make_cloud(values, PointField.FLOAT32, count=max(count, 1))
    for field in cloud.fields:
        field.count = count
    np.testing.assert_array_equal(points_from_cloud(cloud)[0], values[..., :2].reshape(-1, 2))


def test_fields_of_different_datatypes_are_read_side_by_side():
    points = np.zeros(5, dtype=[('gas', '<u2'), ('y', '<f8'), ('x', '<f4'), ('z', '<i1')])
    points['gas'], points['y'], points['x'], points['z'] = [60001, 2, 3, 5, 7], 1e-3, 0.25, -9
    cloud = PointCloud2(height=1, width=5, point_step=points.itemsize, row_step=points.nbytes)
    cloud.fields = [
        PointField(name='gas', offset=0, datatype=PointField.UINT16, count=1),
        PointField(name='y', offset=2, datatype=PointField.FLOAT64, count=1),
        PointField(name='x', offset=10, datatype=PointField.FLOAT32, count=1),
        PointField(name='z', offset=14, datatype=PointField.INT8, count=1),
    ]
    cloud.data = array.array('B', points.tobytes())
    x, y, _ = points_from_cloud(cloud, ('x', 'y', 'z'), 'gas')
    np.testing.assert_array_equal(x, [[0.25, 1e-3, -9.0]] * 5)
    np.testing.assert_array_equal(y[:, 0], [60001, 2, 3, 5, 7])


def test_value_field_may_also_be_a_coordinate():
    x, y, _ = points_from_cloud(good_cloud(), ('x', 'y', 'z'), 'z')
    np.testing.assert_array_equal(x[:, 2:], y)


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('column', range(3))
@pytest.mark.parametrize('datatype', [PointField.FLOAT32, PointField.FLOAT64])
def test_rows_not_finite_are_dropped_and_counted_even_if_dense(datatype, column, bad):
    values = some_values(datatype)
    values[1, 4, column] = values[2, 0, column] = bad
    cloud = make_cloud(values, datatype)
    assert cloud.is_dense
    x, y, rejected = points_from_cloud(cloud)
    kept = np.delete(values.reshape(-1, 3), [1 * WIDTH + 4, 2 * WIDTH], axis=0)
    np.testing.assert_array_equal(np.hstack([x, y]), kept)
    assert rejected == {'not_finite': 2}


def test_row_not_finite_in_a_field_that_is_not_read_is_kept():
    values = some_values()
    values[0, 0, 2] = np.nan
    x, _, rejected = points_from_cloud(make_cloud(values, PointField.FLOAT32), ('x',), 'y')
    assert (len(x), rejected) == (WIDTH * HEIGHT, {})


@pytest.mark.parametrize('width, height', [(0, 0), (0, 1), (7, 0)])
def test_empty_cloud_gives_no_points(width, height):
    x, y, rejected = points_from_cloud(PointCloud2(width=width, height=height), ('x', 'y', 'z'))
    assert (x.shape, y.shape, rejected) == ((0, 3), (0, 1), {})


def test_arrays_do_not_share_memory_with_the_message():
    cloud = good_cloud()
    x, _, _ = points_from_cloud(cloud)
    x[:] = 0
    assert cloud == good_cloud()


def test_missing_padding_after_the_last_row_is_accepted():
    cloud = make_cloud(some_values(), PointField.FLOAT32, row_padding=11)
    cloud.data = cloud.data[:-11]
    assert len(points_from_cloud(cloud)[0]) == WIDTH * HEIGHT


def test_row_step_left_unset_in_a_single_row_is_accepted():
    cloud = make_cloud(some_values()[:1], PointField.FLOAT32)
    cloud.row_step = 0
    assert len(points_from_cloud(cloud)[0]) == WIDTH


def test_missing_field_names_those_present_and_the_parameter():
    error = refused(points_from_cloud, good_cloud(), value_field='gas')
    assert error.reason == 'missing_field'
    assert "has no field 'gas'; it has 'x', 'y', 'z'" in str(error)
    assert 'value_field' in str(error)


@pytest.mark.parametrize('datatype', [0, 9, 255])
def test_unknown_datatype_is_refused(datatype):
    cloud = good_cloud()
    cloud.fields[1].datatype = datatype
    error = refused(points_from_cloud, cloud)
    assert error.reason == 'bad_datatype'
    assert f"field 'y' has datatype {datatype}; expected 1 (INT8) to 8 (FLOAT64)" in str(error)


@pytest.mark.parametrize('offset, count, end', [(9, 1, 13), (8, 2, 16), (2**32 - 1, 1, 2**32 + 3)])
def test_field_beyond_the_point_is_refused(offset, count, end):
    cloud = good_cloud()
    cloud.fields[2].offset, cloud.fields[2].count = offset, count
    error = refused(points_from_cloud, cloud)
    assert error.reason == 'bad_field_layout'
    assert f"field 'z' ends at byte {end} of a point of point_step 12" in str(error)


def test_two_fields_of_one_name_are_refused():
    cloud = good_cloud()
    cloud.fields = [*cloud.fields, cloud.fields[0]]
    error = refused(points_from_cloud, cloud)
    assert (error.reason, str(error)) == (
        'bad_field_layout',
        "the cloud has 2 fields 'x'; expected names to differ",
    )


@pytest.mark.parametrize(
    'changes, text',
    [
        ({'width': 8}, 'row_step is 84 bytes; expected at least width * point_step = 8 * 12 = 96'),
        ({'height': 5}, 'data holds 252 bytes; expected height * row_step = 5 * 84 = 420'),
        ({'height': 2}, 'data holds 252 bytes; expected height * row_step = 2 * 84 = 168'),
        ({'height': 0}, 'data holds 252 bytes; expected none in a cloud of 7 * 0 points'),
        ({'width': 0}, 'data holds 252 bytes; expected none in a cloud of 0 * 3 points'),
        ({'row_step': 85}, 'data holds 252 bytes; expected height * row_step = 3 * 85 = 255'),
        ({'row_step': 0}, 'row_step is 0 bytes'),
        ({'width': 2**32 - 1, 'height': 2**32 - 1}, 'row_step is 84 bytes'),
        ({'point_step': 2**32 - 1}, 'row_step is 84 bytes'),
        ({'data': array.array('B')}, 'data holds 0 bytes'),
    ],
)
def test_sizes_that_contradict_the_data_are_refused(changes, text):
    cloud = good_cloud()
    for name, value in changes.items():
        setattr(cloud, name, value)
    error = refused(points_from_cloud, cloud)
    assert error.reason == 'bad_size'
    assert text in str(error)


def test_too_many_points_are_refused_before_anything_is_read():
    cloud = PointCloud2(width=2**32 - 1, height=2**32 - 1)
    error = refused(points_from_cloud, cloud, max_points=13)
    assert error.reason == 'too_many_points'
    assert 'expected at most 13' in str(error)


sizes = st.one_of(st.integers(0, 300), st.integers(0, 2**32 - 1))


@st.composite
def mutated_clouds(draw):
    """Draw a good cloud with a few of its numbers and bytes replaced."""
    cloud = make_cloud(
        some_values(),
        draw(st.sampled_from([PointField.FLOAT32, PointField.FLOAT64])),
        draw(st.booleans()),
        gap=draw(st.integers(0, 3)),
        row_padding=draw(st.integers(0, 5)),
    )
    for name in draw(st.sets(st.sampled_from(['width', 'height', 'point_step', 'row_step']))):
        setattr(cloud, name, draw(sizes))
    for field in draw(st.lists(st.sampled_from(cloud.fields), max_size=2)):
        name = draw(st.sampled_from(['name', 'offset', 'datatype', 'count']))
        numbers = st.integers(0, 255) if name == 'datatype' else sizes
        setattr(field, name, draw(st.sampled_from('xyzq') if name == 'name' else numbers))
    data = bytearray(cloud.data)
    for _ in range(draw(st.integers(0, 7))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    cut = draw(st.one_of(st.just(len(data)), st.integers(0, len(data))))
    cloud.data = array.array('B', bytes(data[:cut]) + draw(st.binary(max_size=5)))
    return cloud


@settings(MODEST, max_examples=600)
@given(mutated_clouds())
@pytest.mark.filterwarnings('error')
def test_mutated_cloud_gives_finite_points_or_a_message_error(cloud):
    before, fields = bytes(cloud.data), [repr(field) for field in cloud.fields]
    try:
        x, y, rejected = points_from_cloud(cloud)
    except MessageError as error:
        assert error.reason in ('missing_field', 'bad_datatype', 'bad_field_layout', 'bad_size')
    else:
        assert np.isfinite(x).all() and np.isfinite(y).all()
        assert len(x) == len(y) == cloud.width * cloud.height - sum(rejected.values())
    assert bytes(cloud.data) == before
    assert [repr(field) for field in cloud.fields] == fields


@MODEST
@given(st.binary(min_size=12, max_size=600), st.booleans())
@pytest.mark.filterwarnings('error')
def test_any_bytes_give_finite_points(data, big_endian):
    width = len(data) // 12
    cloud = PointCloud2(height=1, width=width, point_step=12, row_step=12 * width)
    cloud.fields = good_cloud().fields
    cloud.is_bigendian = big_endian
    cloud.data = array.array('B', data[: 12 * width])
    x, y, rejected = points_from_cloud(cloud)
    assert np.isfinite(x).all() and np.isfinite(y).all()
    assert len(x) + rejected.get('not_finite', 0) == width


@MODEST
@given(hnp.arrays(np.float32, st.tuples(st.integers(0, 11), st.just(4)), elements=finite32))
def test_cloud_round_trips(rows):
    header = Header(frame_id='map', stamp=stamp_from_nanoseconds(17))
    cloud = cloud_from_points(dict(zip(['gas', 'y', 'z', 'x'], rows.T, strict=True)), header)
    x, y, rejected = points_from_cloud(cloud, ('x', 'y', 'z'), 'gas')
    np.testing.assert_array_equal(np.hstack([y, x[:, [1, 2, 0]]]), rows)
    assert rejected == {}
    assert cloud.header == header
    assert (cloud.height, cloud.width, cloud.point_step) == (1, len(rows), 16)
    assert cloud.row_step == len(cloud.data) == 16 * len(rows)
    assert cloud.is_dense and not cloud.is_bigendian


@pytest.mark.parametrize('bad', [np.nan, np.inf, 1e300])
def test_written_cloud_is_dense_only_if_every_number_is_finite_as_float32(bad):
    assert not cloud_from_points({'x': np.array([0.0, bad])}).is_dense


@pytest.mark.parametrize('columns', [{}, {'x': np.zeros(3), 'y': np.zeros(5)}, {'x': np.eye(2)}])
def test_columns_of_different_lengths_are_refused(columns):
    with pytest.raises(InputError, match=r'expected one common shape \(n,\)'):
        cloud_from_points(columns)


@MODEST
@given(
    hnp.arrays(np.float32, st.tuples(st.integers(0, 11), st.just(3)), elements=finite32),
    st.integers(1, 2),
)
def test_observations_round_trip(rows, dim_x):
    x, y = rows[:, :dim_x], rows[:, dim_x:]
    message = message_from_observations(x, y, Header(frame_id='map'))
    assert (message.dim_x, message.dim_y, message.header.frame_id) == (dim_x, 3 - dim_x, 'map')
    found_x, found_y, rejected = observations_from_message(message, dim_x, 3 - dim_x)
    np.testing.assert_array_equal(found_x, x)
    np.testing.assert_array_equal(found_y, y)
    assert (found_x.dtype, found_y.dtype, rejected) == (np.float64, np.float64, {})


def test_observations_not_finite_are_dropped_and_counted():
    x, y = np.arange(10.0).reshape(5, 2), np.arange(15.0).reshape(5, 3)
    x[1, 1], y[3, 2], y[4, 0] = np.nan, np.inf, -np.inf
    found_x, found_y, rejected = observations_from_message(message_from_observations(x, y), 2, 3)
    np.testing.assert_array_equal(found_x, x[[0, 2]])
    np.testing.assert_array_equal(found_y, y[[0, 2]])
    assert rejected == {'not_finite': 3}


@pytest.mark.parametrize(
    'num_x, num_y, dims, reason, text',
    [
        (14, 21, (3, 3), 'wrong_dim', 'dim_x is 3, numbers per location; expected 2'),
        (14, 21, (2, 2), 'wrong_dim', 'dim_y is 2, numbers per value; expected 3'),
        (14, 21, (0, 3), 'wrong_dim', 'dim_x is 0, numbers per location; expected 2'),
        (13, 21, (2, 3), 'bad_size', 'x holds 13 numbers; expected a multiple of 2'),
        (14, 20, (2, 3), 'bad_size', 'y holds 20 numbers; expected a multiple of 3'),
        (14, 18, (2, 3), 'bad_size', 'x has 7 rows and y has 6; expected one value per location'),
    ],
)
def test_observations_that_do_not_fit_are_refused(num_x, num_y, dims, reason, text):
    message = Observations(dim_x=dims[0], dim_y=dims[1])
    message.x, message.y = float_array(np.zeros(num_x)), float_array(np.zeros(num_y))
    error = refused(observations_from_message, message, 2, 3)
    assert error.reason == reason
    assert text in str(error)


def test_too_many_observations_are_refused():
    message = message_from_observations(np.zeros((7, 2)), np.zeros((7, 3)))
    assert refused(observations_from_message, message, 2, 3, 5).reason == 'too_many_points'
    assert len(observations_from_message(message, 2, 3, 7)[0]) == 7


@pytest.mark.parametrize('shapes', [((7, 2), (5, 3)), ((7,), (7, 3)), ((7, 2), (7,))])
def test_observations_to_write_must_be_matrices_of_equally_many_rows(shapes):
    with pytest.raises(InputError, match=r'expected \(n, dim_x\) and \(n, dim_y\)'):
        message_from_observations(np.zeros(shapes[0]), np.zeros(shapes[1]))


@pytest.mark.parametrize('kind', [Query, Predict.Request])
def test_query_keeps_rows_that_are_not_finite(kind):
    locations = np.array([[0.5, 1.5], [np.nan, 2.0], [3.0, -np.inf]])
    query = kind(dim_x=2, x=float_array(locations))
    found = targets_from_query(query, 2)
    np.testing.assert_array_equal(found, locations)
    assert found.dtype == np.float64


def test_query_that_does_not_fit_is_refused():
    query = Query(dim_x=2, x=float_array(np.zeros(13)))
    assert refused(targets_from_query, query, 3).reason == 'wrong_dim'
    assert refused(targets_from_query, query, 2).reason == 'bad_size'
    query.x = float_array(np.zeros(14))
    assert refused(targets_from_query, query, 2, 6).reason == 'too_many_points'
    assert targets_from_query(query, 2, 7).shape == (7, 2)


def test_prediction_round_trips():
    rng = np.random.default_rng(0)
    mean, stddev = rng.normal(size=(7, 3)).astype('f4'), rng.random((7, 3)).astype('f4')
    mean[2] = stddev[2] = np.nan
    status = np.array([Prediction.STATUS_OK] * 7, dtype=np.uint8)
    status[2] = Prediction.STATUS_NOT_FINITE
    message = prediction_message(mean, stddev, status, 2**40, Header(frame_id='map'), id=2**63)
    assert (message.id, message.num_observations, message.dim_y) == (2**63, 2**40, 3)
    assert message.header.frame_id == 'map'
    for found, expected in zip(
        predictions_from_message(message), (mean, stddev, status), strict=True
    ):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    'shapes', [((7,), (7,), (7,)), ((7, 3), (7, 2), (7,)), ((7, 3), (7, 3), (5,))]
)
def test_prediction_of_shapes_that_do_not_fit_is_refused(shapes):
    with pytest.raises(InputError, match=r'expected \(n, dim_y\), \(n, dim_y\) and \(n,\)'):
        prediction_message(*(np.zeros(shape) for shape in shapes), 0)


def test_prediction_that_contradicts_itself_is_refused():
    message = prediction_message(np.zeros((7, 3)), np.ones((7, 3)), np.zeros(7), 11)
    message.status = message.status[:5]
    error = refused(predictions_from_message, message)
    assert str(error) == 'mean has 7 rows, stddev 7 and status 5; expected equally many'


@MODEST
@given(st.integers(-(2**31) * 10**9, (2**31 - 1) * 10**9))
def test_stamp_round_trips(nanoseconds):
    assert nanoseconds_from_stamp(stamp_from_nanoseconds(nanoseconds)) == nanoseconds
