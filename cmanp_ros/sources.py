"""
Sources of observations: a message of any type with a header becomes locations and values.

Clouds and Observations bring many points. Any other message brings one value, which was read at
the origin of the frame of its header: TF says where that is. Values are converted to field units
here; see `SourceParameters`. A message is any object with the fields of its type, made by ROS or
read from a bag without it; ROS is imported only to find the type of a node's source.
"""

from __future__ import annotations

import array
import difflib
import importlib
import math
import numbers
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np

from cmanp_ros.conversions import MessageError, observations_from_message, points_from_cloud
from cmanp_ros.core.errors import ConfigError
from cmanp_ros.motion import transform_points
from cmanp_ros.parameters import NodeParameters, SourceParameters

POINT_CLOUD = 'sensor_msgs/msg/PointCloud2'
OBSERVATIONS = 'cmanp_ros/msg/Observations'

_TYPE = re.compile('([a-z][a-z0-9_]*)/msg/([A-Z][A-Za-z0-9]*)')
_FIELD = r'[A-Za-z][A-Za-z0-9_]*(\[[0-9]{1,9}\])?'
_PATH = re.compile(rf'{_FIELD}(\.{_FIELD})*')
READINGS = {
    'sensor_msgs/msg/FluidPressure': 'fluid_pressure',
    'sensor_msgs/msg/Illuminance': 'illuminance',
    'sensor_msgs/msg/MagneticField': 'magnetic_field',
    'sensor_msgs/msg/Range': 'range',
    'sensor_msgs/msg/RelativeHumidity': 'relative_humidity',
    'sensor_msgs/msg/Temperature': 'temperature',
}  # type of a known sensor -> path of its reading


@dataclass(frozen=True)
class Reading:
    """What one message says."""

    header: Any
    """std_msgs/Header"""
    x: np.ndarray
    """[m] (n, dim_x) in the map frame, and from Observations; (n, 3) in another frame."""
    y: np.ndarray
    """(n, dim_y) [field units]."""
    rejected: dict[str, int]
    """Reason -> number of points left out for it."""
    value_is_height: bool
    """y is the third coordinate of x, which turns with it: in the map y is scaled(x[:, 2:])."""


@dataclass(frozen=True)
class Reader:
    """Reads the messages of one source; made by `reader_for`."""

    source: SourceParameters
    message_type: type
    map_frame: str
    dim_x: int
    dim_y: int
    points: Callable[[Any, int], tuple[np.ndarray, np.ndarray, dict[str, int]]]
    """Message and number of coordinates -> x, y in the units of the message, and rejected."""
    value_is_height: bool

    def read(self, message: Any) -> Reading:
        """
        Read a message.

        :param message: of `message_type`.
        :return: locations in the frame of the message, and values in field units.
        :raises MessageError: the message cannot be used; its reason counts it.
        """
        in_map = message.header.frame_id.strip('/') == self.map_frame
        x, y, rejected = self.points(message, self.dim_x if in_map else 3)
        if y.shape[1] != self.dim_y:
            raise MessageError(
                'wrong_dim',
                f'source {self.source.name!r} has {y.shape[1]} number per value; expected '
                f'{self.dim_y}, as the loaded checkpoint: publish cmanp_ros/msg/Observations',
            )
        if self.source.min_range and not in_map:
            far = np.linalg.norm(x, axis=1) >= self.source.min_range
            x, y, rejected = x[far], y[far], {**rejected, 'too_near': int((~far).sum())}
        is_height = self.value_is_height and not in_map
        return Reading(message.header, x, self.scaled(y), rejected, is_height)

    def in_map(
        self,
        x: np.ndarray,
        y: np.ndarray,
        value_is_height: bool,
        rotation: np.ndarray,
        translation: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """
        Move what a reading says to the map frame.

        :param x: of the reading; likewise y and value_is_height.
        :param rotation: (3, 3), and translation (3,) [m]: from the frame of the message.
        :return: x (n, dim_x) [m] and y (n, dim_y) [field units].
        """
        x = transform_points(x, rotation, translation)
        return x[:, : self.dim_x], self.scaled(x[:, 2:]) if value_is_height else y

    def scaled(self, values: np.ndarray) -> np.ndarray:
        """
        Convert values to field units.

        :param values: any shape, in the units of the message.
        :return: values * value_scale + value_offset; too large for float64 becomes inf.
        """
        with np.errstate(over='ignore'):
            return values * self.source.value_scale + self.source.value_offset


def reader_for(
    source: SourceParameters,
    parameters: NodeParameters,
    dim_x: int,
    dim_y: int,
    empty_message: Callable[[SourceParameters], Any] | None = None,
) -> Reader:
    """
    Make what reads the messages of a source.

    :param source: parameters of the source.
    :param parameters: of the node.
    :param dim_x: numbers per location that the model takes.
    :param dim_y: numbers per value that the model takes.
    :param empty_message: makes a message of the source's type, with a header; None: of ROS.
    :return: a reader.
    :raises ConfigError: an unknown type, one without header, or no such value in it.
    """
    message, limit = (empty_message or _empty_message)(source), parameters.max_points
    is_height = False
    if source.type == POINT_CLOUD:
        field = source.value_field or parameters.value_field
        is_height = field == 'z' and dim_x < 3

        def points(cloud, num_coordinates):
            return points_from_cloud(cloud, ('x', 'y', 'z')[:num_coordinates], field, limit)

    elif source.type == OBSERVATIONS:
        if source.value_field:
            raise ConfigError(
                f'{source.name}.value_field is {source.value_field!r}; expected none: the values '
                'of cmanp_ros/msg/Observations are in y'
            )

        def points(observations, _):
            return observations_from_message(observations, dim_x, dim_y, limit)

    else:
        path = _checked_path(source, message)
        if source.min_range:
            raise ConfigError(
                f'{source.name}.min_range is {source.min_range}, but {source.type} is read at the '
                'origin of its frame; expected 0: only points of a cloud are near or far'
            )

        def points(message, num_coordinates):
            return _point_at_origin(message, path, num_coordinates)

    return Reader(source, type(message), parameters.map_frame, dim_x, dim_y, points, is_height)


def value_at(message: Any, path: str) -> float:
    """
    Read one number of a message; a geometry_msgs/Vector3 counts by its length.

    :param message: any ROS message.
    :param path: names of fields, as in 'magnetic_field.x' or 'readings[0].value'.
    :return: the number, which need not be finite.
    :raises MessageError: 'missing_field', 'missing_element', or 'not_numeric'.
    """
    value = message
    for step in re.findall(r'[A-Za-z0-9_]+', path):
        value = _element(value, int(step), path) if step.isdigit() else _field(value, step, path)
    if _type_name(value) == 'geometry_msgs/msg/Vector3':
        return math.hypot(value.x, value.y, value.z)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise MessageError(
            'not_numeric',
            f'{path!r} is of type {type(value).__name__}; expected a number: correct value_field',
        )
    return float(value)


def _field(message: Any, name: str, path: str) -> Any:
    """Return a field that the message's own definition names, and nothing else of the object."""
    names = _field_names(message)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
        hint = f'did you mean {near[0]!r}? It has {", ".join(names)}' if near else 'it has none'
        raise MessageError(
            'missing_field', f'{path!r}: {type(message).__name__} has no field {name!r}; {hint}'
        )
    return getattr(message, name)


def _field_names(message: Any) -> list[str]:
    """Return the fields that a message's definition names; none of what is no message."""
    if is_dataclass(message):  # from a bag
        return [field.name for field in fields(message)]
    return list(getattr(type(message), 'get_fields_and_field_types', dict)())


def _type_name(message: Any) -> str:
    """Return the type of a message as in 'sensor_msgs/msg/Range'."""
    message_type = type(message)
    of_ros = [*message_type.__module__.split('.')[:2], message_type.__name__]
    return getattr(message_type, '__msgtype__', '/'.join(of_ros))  # the first from a bag


def _element(sequence: Any, index: int, path: str) -> Any:
    """Return an element of a list."""
    if not isinstance(sequence, (list, tuple, array.array, np.ndarray)):
        raise MessageError(
            'missing_field',
            f'{path!r}: [{index}] is asked of {type(sequence).__name__}; expected a list there',
        )
    if index >= len(sequence):
        raise MessageError(
            'missing_element',
            f'{path!r}: [{index}] is asked of {len(sequence)} elements; expected more of them',
        )
    return sequence[index]


def _point_at_origin(message: Any, path: str, num_coordinates: int):
    """Read one value, at the origin of the frame of the message."""
    value = value_at(message, path)
    reason = _why_rejected(message, path, value)
    num_points = 0 if reason else 1
    x, y = np.zeros((num_points, num_coordinates)), np.full((num_points, 1), value)
    return x, y, {reason: 1} if reason else {}


def _why_rejected(message: Any, path: str, value: float) -> str:
    """Say why a value is no sample of the field; empty if it is one."""
    if _type_name(message) == 'sensor_msgs/msg/Range' and path == 'range':
        # REP 117: too close, too far or erroneous
        is_reading = message.min_range <= value <= message.max_range
        return '' if is_reading and math.isfinite(value) else 'out_of_range'
    return '' if math.isfinite(value) else 'not_finite'


def _checked_path(source: SourceParameters, message: Any) -> str:
    """Return the path of the value, once an empty message shows that it can be there."""
    path = source.value_field or READINGS.get(source.type, '')
    name = f'{source.name}.value_field'
    if not path:
        names = ', '.join(_field_names(message))
        raise ConfigError(
            f"{name} is '', but the reading of {source.type} is not known; expected the path of "
            f'a number below one of its fields: {names}'
        )
    if not _PATH.fullmatch(path):
        raise ConfigError(
            f"{name} is {path!r}; expected names, dots and [index], as in 'readings[0].value'"
        )
    try:
        value_at(message, path)
    except MessageError as error:
        if error.reason != 'missing_element':  # lists are empty here, and filled later
            raise ConfigError(f'{name} does not fit {source.type}: {error}') from error
    return path


def _empty_message(source: SourceParameters) -> Any:
    """Import the type of a source's messages, which must have a header, and make one."""
    spelled = _TYPE.fullmatch(source.type)
    if not spelled:
        raise ConfigError(
            f'{source.name}.type is {source.type!r}; expected package/msg/Name, such as '
            "'sensor_msgs/msg/Temperature'"
        )
    package, name = spelled.groups()
    try:
        module = importlib.import_module(f'{package}.msg')
    except ImportError as error:
        debian = f'ros-{os.environ.get("ROS_DISTRO", "jazzy")}-{package.replace("_", "-")}'
        raise ConfigError(
            f'{source.name}.type is {source.type!r}, but the package {package} is not found '
            f'({error}): sudo apt install {debian}, or source the workspace that has it'
        ) from error
    known = [known for known in dir(module) if known[0].isupper()]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
        hint = f'did you mean {near[0]!r}?' if near else 'it has none.'
        raise ConfigError(
            f'{source.name}.type is {source.type!r}, but {package} has no such message; {hint}'
        )
    message_type = getattr(module, name)
    if message_type.get_fields_and_field_types().get('header') != 'std_msgs/Header':
        raise ConfigError(
            f'{source.name}.type is {source.type!r}, which has no std_msgs/Header: where and when '
            'it was read is unknown; expected a type with a header: publish that instead'
        )
    return message_type()
