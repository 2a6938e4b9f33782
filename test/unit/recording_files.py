"""Small bags, written with rosbags for the tests."""

import numpy as np
import pytest

pytest.importorskip('rosbags', reason='rosbags is not installed: pip install rosbags')

from rosbags.rosbag2 import StoragePlugin, Writer  # noqa: E402
from rosbags.typesys import Stores, get_types_from_msg, get_typestore  # noqa: E402

from cmanp_ros.recordings.bags import known_types  # noqa: E402
from cmanp_ros.recordings.folding import Folding  # noqa: E402

TYPES = get_typestore(Stores.ROS2_JAZZY)
TYPES.register({name: known_types().fielddefs[name] for name in ['cmanp_ros/msg/Observations']})
GAUGE = 'my_msgs/msg/Gauge'
TYPES.register(
    get_types_from_msg('std_msgs/Header header\nReading[] readings\n', GAUGE)
    | get_types_from_msg('float32 value\nbool valid\n', 'my_msgs/msg/Reading')
)


def make(name, /, **fields):
    """Make a message of a type."""
    return TYPES.types[name](**fields)


def stamp(seconds):
    """Make a builtin_interfaces/Time of an exact number of nanoseconds."""
    whole, rest = divmod(round(seconds * 1e9), 10**9)
    return make('builtin_interfaces/msg/Time', sec=int(whole), nanosec=int(rest))


def header(frame, seconds):
    """Make a header."""
    return make('std_msgs/msg/Header', stamp=stamp(seconds), frame_id=frame)


def cloud(points, frame='map', seconds=1.0, names='xyz'):
    """Make a PointCloud2 of points (n, len(names))."""
    rows = np.ascontiguousarray(points, '<f4')
    fields = [
        make('sensor_msgs/msg/PointField', name=name, offset=4 * n, datatype=7, count=1)
        for n, name in enumerate(names)
    ]
    return make(
        'sensor_msgs/msg/PointCloud2',
        header=header(frame, seconds),
        height=1,
        width=len(rows),
        fields=fields,
        is_bigendian=False,
        point_step=4 * len(names),
        row_step=rows.nbytes,
        data=rows.reshape(-1).view(np.uint8),
        is_dense=True,
    )


def temperature(value, frame='map', seconds=1.0):
    """Make a Temperature."""
    return make(
        'sensor_msgs/msg/Temperature',
        header=header(frame, seconds),
        temperature=float(value),
        variance=0.0,
    )


def transform(parent, child, seconds, translation=(0, 0, 0), quaternion=(0, 0, 0, 1)):
    """Make a TFMessage of one transform."""
    numbers = dict(zip('xyz', map(float, translation), strict=True))
    rotation = dict(zip('xyzw', map(float, quaternion), strict=True))
    each = make(
        'geometry_msgs/msg/TransformStamped',
        header=header(parent, seconds),
        child_frame_id=child,
        transform=make(
            'geometry_msgs/msg/Transform',
            translation=make('geometry_msgs/msg/Vector3', **numbers),
            rotation=make('geometry_msgs/msg/Quaternion', **rotation),
        ),
    )
    return make('tf2_msgs/msg/TFMessage', transforms=[each])


def write_bag(path, messages, storage='mcap', raw=()):
    """
    Write a bag.

    :param messages: (topic, seconds when it was written, message), in any order.
    :param raw: (topic, seconds, bytes) of topics that have messages, too.
    :return: the path.
    """
    plugin = StoragePlugin[{'mcap': 'MCAP', 'sqlite3': 'SQLITE3'}[storage]]
    with Writer(path, version=9, storage_plugin=plugin) as writer:
        connections = {}
        rows = [
            (s, t, m.__msgtype__, TYPES.serialize_cdr(m, m.__msgtype__)) for t, s, m in messages
        ]
        kinds = {topic: kind for _, topic, kind, _ in rows}
        rows += [(s, t, kinds[t], data) for t, s, data in raw]
        for seconds, topic, kind, data in sorted(rows, key=lambda row: row[0]):
            if topic not in connections:
                connections[topic] = writer.add_connection(topic, kind, typestore=TYPES)
            writer.write(connections[topic], round(seconds * 1e9), bytes(data))
    return path


def folded(job):
    """Fold here; return the map and the report."""
    field = job.empty()
    with job.open() as recording:
        folding = Folding(recording, field)
        for _ in folding.run():
            pass
    return field, folding.report
