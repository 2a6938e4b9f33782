"""Bags of ROS 2 (SQLite and MCAP), read with `rosbags`, which needs no ROS."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cmanp_ros
from cmanp_ros.admission import not_in_future
from cmanp_ros.conversions import MessageError, nanoseconds_from_stamp, one_line
from cmanp_ros.core.errors import ConfigError, InputError, TransformError
from cmanp_ros.motion import check_header
from cmanp_ros.optional import library
from cmanp_ros.parameters import NodeParameters, SourceParameters
from cmanp_ros.recordings.choosing import choose
from cmanp_ros.recordings.parts import Points, Span, evenly
from cmanp_ros.recordings.transform_tree import TransformTree
from cmanp_ros.sources import OBSERVATIONS, POINT_CLOUD, READINGS, Reader, reader_for

if TYPE_CHECKING:
    from cmanp_ros.recordings.recording import Recording

TF_TYPES = ('tf2_msgs/msg/TFMessage', 'tf/msg/tfMessage')
_trees: dict[tuple, TransformTree] = {}  # of the bags that were read last


class Bags:
    """Bags that are read together, in the order in which their messages were written."""

    def __init__(
        self,
        paths: Sequence[Path],
        sources: Sequence[str],
        parameters: NodeParameters,
        dim_x: int,
        dim_y: int,
    ) -> None:
        """Open, see `Recording`."""
        self._value_field = parameters.value_field
        self._map_frame, self._names = parameters.map_frame, ', '.join(map(str, paths))
        self._bags = _opened(paths, self._names)
        self._key = tuple((path.resolve(), path.stat().st_mtime_ns) for path in paths)
        try:
            topics = {each.topic: each.msgtype for each in self._bags.connections}
            self.sources = choose(topics, sources, parameters)
            self._readers = {
                source.topic: reader_for(source, parameters, dim_x, dim_y, self._empty_message)
                for source in self.sources
            }
        except ConfigError as error:
            self.close()
            raise ConfigError(f'{self._names}: {error}') from error
        self._connections = [c for c in self._bags.connections if c.topic in self._readers]
        self.num_messages = sum(connection.msgcount for connection in self._connections)
        is_empty = not self._bags.message_count
        self._begin, self._end = (0, 0) if is_empty else self._times()
        self.duration_sec = (self._end - self._begin) * 1e-9

    def read(self, recording: Recording, span: Span | None) -> Iterator[Points]:
        """Read what each message says, in the map frame."""
        for connection, written_at, raw in self._messages(self._connections, span):
            recording.num_read += 1
            reader = self._readers[connection.topic]
            try:
                message = self._bags.deserialize(raw, connection.msgtype)
            except Exception as error:  # of rosbags, of many kinds
                text = f'{connection.topic}: {error}'
                recording.losses.reject_message('unreadable', one_line(text))
                continue
            stamp = nanoseconds_from_stamp(message.header.stamp)
            if not recording.thinning.admits_message(reader.source, stamp):
                recording.losses.messages['rate_limited'] += 1
                continue
            points = self._points(reader, message, stamp, recording.losses)
            if points is not None:
                yield points._replace(stamp=not_in_future(stamp, written_at))

    @property
    def descriptions(self) -> list[str]:
        """See `Recording`."""
        fields = {POINT_CLOUD: self._value_field, OBSERVATIONS: 'y'} | READINGS
        return [f'{s.topic} ({s.type}, {s.value_field or fields[s.type]})' for s in self.sources]

    def split(self, num_parts: int) -> list[Span]:
        """Cut the time into so many parts at most."""
        return evenly(self._begin, self._end, num_parts)

    def close(self) -> None:
        """Close the bags."""
        self._bags.close()

    def _points(self, reader: Reader, message, stamp, losses) -> Points | None:
        """Return what a message says; None, and count it, if it cannot be used."""
        num_points = 0
        try:
            reading = reader.read(message)
            losses.reject_points(reading.rejected)
            x, y, frame = reading.x, reading.y, message.header.frame_id.strip('/')
            num_points = len(x)
            if frame != self._map_frame:
                check_header(frame, message.header.stamp, self._map_frame)
                motion = self._transforms.motion(self._map_frame, frame, stamp)
                x, y = reader.in_map(x, y, reading.value_is_height, *motion)
            return Points(reader.source, stamp, x, y)
        except (MessageError, TransformError) as error:
            text = one_line(f'{reader.source.topic}: {error}')
            losses.reject_message(error.reason, text, num_points)
            return None

    @property
    def _transforms(self) -> TransformTree:
        """All transforms; read when the first is needed, once for all parts of these bags."""
        if self._key not in _trees:
            _trees.clear()
            _trees[self._key] = TransformTree(self._transform_messages())
        return _trees[self._key]

    def _transform_messages(self):
        """Read each message with transforms, and tell whether they hold for good."""
        found = [each for each in self._bags.connections if each.msgtype in TF_TYPES]
        of_all = [each for each in found if each.topic in ('/tf', '/tf_static')]
        for connection, _, raw in self._messages(of_all or found, None):
            message = self._bags.deserialize(raw, connection.msgtype)
            yield message, connection.topic.endswith('tf_static')

    def _messages(self, connections, span: Span | None):
        """Read when messages [ns] were written, and what; an end before the end is an error."""
        start, stop = span or (None, None)
        if not connections:
            return
        try:
            yield from self._bags.messages(connections, start, stop)
        except Exception as error:  # of rosbags, sqlite3 or a decompressor
            raise InputError(
                f'{self._names}: cannot be read further ({error}); what was read until then '
                'counts. A bag that was cut off: ros2 bag reindex, or mcap recover'
            ) from error

    def _times(self) -> tuple[int, int]:
        """Return when the first message was written, and just after the last [ns]."""
        readers = [reader for reader in self._bags.readers if reader.message_count]
        return min(r.start_time for r in readers), max(r.end_time for r in readers)

    def _empty_message(self, source: SourceParameters) -> Any:
        """Make a message of a source's type, which must have a header."""
        definition = self._bags.typestore.fielddefs.get(source.type)
        if definition is None:
            raise ConfigError(
                f'{source.topic} is of type {source.type!r}, which is not defined in the bag; '
                'expected a bag in MCAP, which has definitions, or a type of ROS'
            )
        if ('header', 'std_msgs/msg/Header') not in [(n, d[1]) for n, d in definition[1]]:
            raise ConfigError(
                f'{source.topic} is of type {source.type!r}, which has no std_msgs/Header: where '
                'and when it was read is unknown; expected a topic with a header'
            )
        return _empty(source.type, self._bags.typestore)


def _opened(paths: Sequence[Path], names: str):
    """Open bags; types that they do not define are those of ROS and of this package."""
    highlevel = library('rosbags.highlevel', 'reading a bag')
    known = known_types()
    try:
        bags = highlevel.AnyReader(list(paths), default_typestore=known)
        bags.open()
    except Exception as error:  # of rosbags, sqlite3, yaml or the system
        raise InputError(
            f'{names}: cannot be opened ({error}); expected bags of ROS 2: folders with a '
            'metadata.yaml, .mcap or .db3. A bag that was cut off: ros2 bag reindex'
        ) from error
    defined = bags.typestore.fielddefs
    if any(connection.msgtype not in defined for connection in bags.connections):
        bags.typestore.register(
            {name: fields for name, fields in known.fielddefs.items() if name not in defined}
        )
    return bags


@functools.cache
def known_types():
    """Return the types of ROS 2 Jazzy and the one of this package that can be a source."""
    types = library('rosbags.typesys', 'reading a bag')
    known = types.get_typestore(types.Stores.ROS2_JAZZY)
    known.register(types.get_types_from_msg(_definition(), OBSERVATIONS))
    return known


def _definition() -> str:
    """Return the text of Observations.msg: in the source tree, or where it is installed."""
    package = Path(cmanp_ros.__file__).resolve().parent
    folders = [package.parent, *(folder / 'share/cmanp_ros' for folder in package.parents)]
    paths = [folder / 'msg/Observations.msg' for folder in folders]
    return next(path for path in paths if path.is_file()).read_text(encoding='utf-8')


def _empty(name: str, types) -> Any:
    """Make a message in which every number is 0 and every list is empty."""
    node = library('rosbags.interfaces', 'reading a bag').Nodetype

    def value(kind, detail):
        if kind == node.NAME:
            return _empty(detail, types)
        if kind == node.BASE:
            return {'string': '', 'bool': False}.get(detail[0], 0.0)
        of, length = detail
        return [value(*of) for _ in range(length if kind == node.ARRAY else 0)]

    fields = types.fielddefs[name][1]
    return types.types[name](**{field: value(*description) for field, description in fields})
