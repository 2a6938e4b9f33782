"""
Messages <-> numpy, in pairs: the one place that knows field offsets, endianness and NaN.

A message is untrusted input. Its sizes are checked before anything is allocated or viewed, it is
never written to, and what cannot be read raises a `MessageError` whose reason counts it. A row
that is not finite is dropped and counted, whatever `is_dense` says: it often lies (gz-sensors
#179). Meters and field units on both sides; arrays are float64 here and float32 in messages.

Reading takes any object with the fields of the message, as a bag gives it without ROS; the types
of ROS are imported by what makes messages.
"""

from __future__ import annotations

import array
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from cmanp_ros.core.errors import InputError

if TYPE_CHECKING:
    from builtin_interfaces.msg import Time
    from sensor_msgs.msg import PointCloud2
    from std_msgs.msg import Header

    from cmanp_ros.msg import Observations, Prediction

# By the datatype of a sensor_msgs/PointField: INT8 is 1, FLOAT64 is 8.
_DATATYPES = dict(enumerate(('i1', 'u1', 'i2', 'u2', 'i4', 'u4', 'f4', 'f8'), start=1))


class MessageError(InputError):
    """
    A message that cannot be read; nothing was taken from it.

    :ivar reason: counter key: 'missing_field', 'missing_element', 'not_numeric', 'bad_datatype',
        'bad_field_layout', 'bad_size', 'wrong_dim' or 'too_many_points'.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def points_from_cloud(
    cloud: PointCloud2,
    location_fields: Sequence[str] = ('x', 'y'),
    value_field: str = 'z',
    max_points: int | None = None,
) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    """
    Read locations and values from a point cloud of any layout.

    :param cloud: any field order, offsets, datatypes, endianness, row padding; organized or not.
    :param location_fields: names of the location's coordinates [m].
    :param value_field: name of the field that holds the value [field units].
    :param max_points: most points accepted; None: no limit.
    :return: x (n, dim) float64, y (n, 1) float64, and reason -> number of points dropped for it.
    :raises MessageError: the cloud contradicts itself, lacks a field, or is too large.
    """
    num_points = cloud.width * cloud.height
    _check_count(num_points, max_points, 'cloud')
    if num_points == 0:
        _check_empty(cloud)
        return np.zeros((0, len(location_fields))), np.zeros((0, 1)), {}
    layouts = [_field_layout(cloud, name) for name in (*location_fields, value_field)]
    shape, strides = (cloud.height, cloud.width), (_checked_row_step(cloud), cloud.point_step)
    x = np.empty((*shape, len(location_fields)))
    y = np.empty((*shape, 1))
    with np.errstate(invalid='ignore'):  # a signalling NaN warns when it is widened
        columns = [*np.moveaxis(x, -1, 0), y[..., 0]]
        for (datatype, offset), column in zip(layouts, columns, strict=True):
            # A strided view of the message's own buffer, whatever its byte order and alignment.
            column[...] = np.ndarray(shape, datatype, cloud.data, offset, strides)
    return _finite_rows(x.reshape(num_points, -1), y.reshape(num_points, 1))


def cloud_from_points(
    fields: Mapping[str, np.ndarray], header: Header | None = None
) -> PointCloud2:
    """
    Write named columns as an unorganized cloud of FLOAT32 fields.

    :param fields: name -> (n,) numbers, written in this order.
    :param header: frame and stamp.
    :return: little-endian cloud of height 1; `is_dense` is true only if every number is finite.
    :raises InputError: columns of different lengths, or none.
    """
    from sensor_msgs.msg import PointCloud2, PointField
    from std_msgs.msg import Header

    columns = {name: np.asarray(column) for name, column in fields.items()}
    shapes = {name: column.shape for name, column in columns.items()}
    if len(set(shapes.values())) != 1 or any(len(shape) != 1 for shape in shapes.values()):
        raise InputError(f'cloud columns have shapes {shapes}; expected one common shape (n,)')
    rows = np.empty((len(next(iter(columns.values()))), len(columns)), dtype='<f4')
    # What is too large for float32 becomes inf, and is_dense says so.
    with np.errstate(over='ignore', invalid='ignore'):
        for index, column in enumerate(columns.values()):
            rows[:, index] = column
    cloud = PointCloud2(
        header=header or Header(), height=1, width=rows.shape[0], is_bigendian=False
    )
    cloud.fields = [
        PointField(name=name, offset=4 * index, datatype=PointField.FLOAT32, count=1)
        for index, name in enumerate(columns)
    ]
    cloud.point_step = 4 * len(columns)
    cloud.row_step = cloud.point_step * cloud.width
    cloud.data = _byte_array('B', rows)
    cloud.is_dense = bool(np.isfinite(rows).all())
    return cloud


def observations_from_message(
    message: Observations, dim_x: int, dim_y: int, max_points: int | None = None
) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    """
    Read locations and values from an Observations message.

    :param message: cmanp_ros/Observations.
    :param dim_x: numbers per location that the model takes.
    :param dim_y: numbers per value that the model takes.
    :param max_points: most points accepted; None: no limit.
    :return: x (n, dim_x) float64, y (n, dim_y) float64, and reason -> number of rows dropped.
    :raises MessageError: other dimensions, incomplete rows, or too many of them.
    """
    x = _rows(message.x, message.dim_x, dim_x, 'x', max_points)
    y = _rows(message.y, message.dim_y, dim_y, 'y', max_points)
    if len(x) != len(y):
        raise MessageError(
            'bad_size', f'x has {len(x)} rows and y has {len(y)}; expected one value per location'
        )
    return _finite_rows(x, y)


def message_from_observations(
    x: np.ndarray, y: np.ndarray, header: Header | None = None
) -> Observations:
    """
    Write locations and values as an Observations message.

    :param x: (n, dim_x) [m].
    :param y: (n, dim_y) [field units].
    :param header: frame of x and time of the readings.
    :return: cmanp_ros/Observations.
    :raises InputError: not two matrices of equally many rows.
    """
    from std_msgs.msg import Header

    from cmanp_ros.msg import Observations

    x, y = np.asarray(x), np.asarray(y)
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
        raise InputError(
            f'x has shape {x.shape} and y {y.shape}; expected (n, dim_x) and (n, dim_y)'
        )
    message = Observations(header=header or Header(), dim_x=x.shape[1], dim_y=y.shape[1])
    message.x = float_array(x)
    message.y = float_array(y)
    return message


def targets_from_query(message, dim_x: int, max_targets: int | None = None) -> np.ndarray:
    """
    Read the locations that a query or a predict request asks about.

    :param message: cmanp_ros/Query or the request of cmanp_ros/srv/Predict.
    :param dim_x: numbers per location that the model takes.
    :param max_targets: most locations accepted; None: no limit.
    :return: x (n, dim_x) float64 [m]; rows that are not finite are kept, to be answered in order.
    :raises MessageError: another dimension, an incomplete row, or too many of them.
    """
    return _rows(message.x, message.dim_x, dim_x, 'x', max_targets)


def prediction_message(
    mean: np.ndarray,
    stddev: np.ndarray,
    status: np.ndarray,
    num_observations: int,
    header: Header | None = None,
    id: int = 0,
) -> Prediction:
    """
    Write a predictive distribution as a Prediction message.

    :param mean: (n, dim_y) [field units].
    :param stddev: (n, dim_y) [field units], of an observation.
    :param status: (n,) Prediction.STATUS_*.
    :param num_observations: folded so far.
    :param header: frame of the map, stamp of the newest observation.
    :param id: of the query.
    :return: cmanp_ros/Prediction.
    :raises InputError: shapes that do not fit each other.
    """
    from std_msgs.msg import Header

    from cmanp_ros.msg import Prediction

    mean, stddev, status = np.asarray(mean), np.asarray(stddev), np.asarray(status)
    if mean.ndim != 2 or stddev.shape != mean.shape or status.shape != mean.shape[:1]:
        raise InputError(
            f'mean has shape {mean.shape}, stddev {stddev.shape} and status {status.shape}; '
            'expected (n, dim_y), (n, dim_y) and (n,)'
        )
    message = Prediction(header=header or Header(), id=int(id), dim_y=mean.shape[1])
    message.mean = float_array(mean)
    message.stddev = float_array(stddev)
    message.status = _byte_array('B', status.astype(np.uint8))
    message.num_observations = min(int(num_observations), 2**64 - 1)  # a peer may claim any
    return message


def predictions_from_message(message: Prediction) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    Read the predictive distribution from a Prediction message.

    :param message: cmanp_ros/Prediction.
    :return: mean (n, dim_y) float64, stddev (n, dim_y) float64, status (n,) uint8.
    :raises MessageError: the message contradicts itself.
    """
    mean = _rows(message.mean, message.dim_y, message.dim_y, 'mean', None)
    stddev = _rows(message.stddev, message.dim_y, message.dim_y, 'stddev', None)
    status = np.array(message.status, dtype=np.uint8)
    if not len(mean) == len(stddev) == len(status):
        raise MessageError(
            'bad_size',
            f'mean has {len(mean)} rows, stddev {len(stddev)} and status {len(status)}; '
            'expected equally many',
        )
    return mean, stddev, status


def float_array(values: np.ndarray) -> array.array:
    """
    Pack numbers for a float32[] field: rclpy checks every item of any other sequence.

    :param values: any shape, written row-major; too large for float32 becomes inf.
    :return: array.array of type 'f'.
    """
    with np.errstate(over='ignore', invalid='ignore'):
        return _byte_array('f', np.asarray(values).astype(np.float32))


def int8_array(values: np.ndarray) -> array.array:
    """
    Pack numbers for an int8[] field.

    :param values: any shape, written row-major, each within -128..127.
    :return: array.array of type 'b'.
    """
    return _byte_array('b', np.asarray(values).astype(np.int8))


def nanoseconds_from_stamp(stamp: Time) -> int:
    """
    Convert a stamp to nanoseconds.

    :param stamp: builtin_interfaces/Time.
    :return: [ns] since the epoch.
    """
    return stamp.sec * 1_000_000_000 + stamp.nanosec


def stamp_from_nanoseconds(nanoseconds: int) -> Time:
    """
    Convert nanoseconds to a stamp.

    :param nanoseconds: [ns] since the epoch; a stamp that is none (its nanoseconds are more than a
        second) can be too late for a Time, which is then the last one.
    :return: builtin_interfaces/Time.
    """
    from builtin_interfaces.msg import Time

    seconds, rest = divmod(int(nanoseconds), 1_000_000_000)
    return Time(sec=min(max(seconds, -(2**31)), 2**31 - 1), nanosec=rest)


def one_line(text: str, limit: int = 1000) -> str:
    """
    Make a text with names from a message fit for a log, in which it must not look like others.

    :param limit: [characters] of a longer text the middle is left out.
    :return: one line without control characters.
    """
    if len(text) > limit:
        text = f'{text[: limit // 2]} ... {text[-limit // 2 :]}'
    return ''.join(character if character.isprintable() else ' ' for character in text)


def _field_layout(cloud: PointCloud2, name: str) -> tuple[np.dtype, int]:
    """Return the numpy type and the offset [bytes] of a field's first element."""
    found = [field for field in cloud.fields if field.name == name]
    if not found:
        present = ', '.join(repr(field.name) for field in cloud.fields) or 'none'
        raise MessageError(
            'missing_field',
            f'the cloud has no field {name!r}; it has {present}: choose one of them with the '
            'parameter value_field (the location is read from x, y, z)',
        )
    if len(found) > 1:
        raise MessageError(
            'bad_field_layout',
            f'the cloud has {len(found)} fields {name!r}; expected names to differ',
        )
    field = found[0]
    if field.datatype not in _DATATYPES:
        raise MessageError(
            'bad_datatype',
            f'field {name!r} has datatype {field.datatype}; expected 1 (INT8) to 8 (FLOAT64), '
            'see sensor_msgs/PointField',
        )
    datatype = np.dtype(('>' if cloud.is_bigendian else '<') + _DATATYPES[field.datatype])
    end = field.offset + datatype.itemsize * max(field.count, 1)  # a count of 0 means 1, as in PCL
    if end > cloud.point_step:
        raise MessageError(
            'bad_field_layout',
            f'field {name!r} ends at byte {end} of a point of point_step {cloud.point_step}; '
            'expected it to lie within the point',
        )
    return datatype, field.offset


def _checked_row_step(cloud: PointCloud2) -> int:
    """Return the bytes from one row to the next, once the buffer is known to hold every row."""
    row_bytes = cloud.width * cloud.point_step
    row_step = cloud.row_step
    if cloud.height == 1 and row_step == 0:
        row_step = row_bytes  # left unset by many drivers, and of no meaning for a single row
    if row_step < row_bytes:
        raise MessageError(
            'bad_size',
            f'row_step is {cloud.row_step} bytes; expected at least width * point_step = '
            f'{cloud.width} * {cloud.point_step} = {row_bytes}',
        )
    highest = cloud.height * row_step
    lowest = highest - row_step + row_bytes  # the padding of the last row may be missing
    if not lowest <= len(cloud.data) <= highest:
        raise MessageError(
            'bad_size',
            f'data holds {len(cloud.data)} bytes; expected height * row_step = '
            f'{cloud.height} * {row_step} = {highest}',
        )
    return row_step


def _check_empty(cloud: PointCloud2) -> None:
    """Refuse a cloud that claims to be empty and brings data: its size was not written."""
    if len(cloud.data) > 0:
        raise MessageError(
            'bad_size',
            f'data holds {len(cloud.data)} bytes; expected none in a cloud of '
            f'{cloud.width} * {cloud.height} points',
        )


def _rows(values, found_dim: int, dim: int, name: str, max_rows: int | None) -> np.ndarray:
    """Copy a float32[] field into a float64 matrix (n, dim)."""
    what = 'location' if name == 'x' else 'value'
    if found_dim != dim or dim < 1:
        raise MessageError(
            'wrong_dim',
            f'dim_{name} is {found_dim}, numbers per {what}; expected {max(dim, 1)}, the '
            'dimension of the loaded checkpoint',
        )
    if len(values) % dim:
        raise MessageError(
            'bad_size',
            f'{name} holds {len(values)} numbers; expected a multiple of {dim}, one row a {what}',
        )
    _check_count(len(values) // dim, max_rows, name)
    with np.errstate(invalid='ignore'):
        return np.array(values, dtype=np.float32).astype(np.float64).reshape(-1, dim)


def _check_count(count: int, limit: int | None, what: str) -> None:
    """Refuse more rows than the limit."""
    if limit is not None and count > limit:
        raise MessageError(
            'too_many_points',
            f'{what} holds {count} points; expected at most {limit}: send smaller messages, or '
            'raise max_points (observations) or max_targets (queries)',
        )


def _finite_rows(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    """Keep the rows in which every number is finite, and count the others."""
    finite = np.isfinite(x).all(axis=1) & np.isfinite(y).all(axis=1)
    num_rejected = len(finite) - int(np.count_nonzero(finite))
    if num_rejected == 0:
        return x, y, {}
    return x[finite], y[finite], {'not_finite': num_rejected}


def _byte_array(typecode: str, values: np.ndarray) -> array.array:
    """Copy a numpy array into an array.array of the same item size in one go."""
    packed = array.array(typecode)
    packed.frombytes(np.ascontiguousarray(values).reshape(-1).view(np.uint8))
    return packed
