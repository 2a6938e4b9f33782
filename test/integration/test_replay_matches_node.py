"""Replaying a bag gives, bit for bit, the map of a node that hears the bag's messages over DDS."""

import functools
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cmanp_ros.msg import Observations
from conftest import wait_for
from geometry_msgs.msg import TransformStamped
from rclpy.serialization import deserialize_message, serialize_message
from rclpy.time import Time
from sensor_msgs.msg import PointCloud2, Temperature

from cmanp_ros.conversions import (
    cloud_from_points,
    message_from_observations,
    stamp_from_nanoseconds,
)
from cmanp_ros.core.errors import TransformError
from cmanp_ros.motion import rotation_from_quaternion
from cmanp_ros.parameters import parameters_from
from cmanp_ros.recordings.shards import Job
from cmanp_ros.recordings.transform_tree import TransformTree

sys.path.append(str(Path(__file__).parent.parent / 'unit'))
from recording_files import TYPES, folded  # noqa: E402

PARAMETERS = {
    'sources': ['lidar', 'observations', 'gauge'],
    'lidar.type': 'sensor_msgs/msg/PointCloud2',
    'lidar.voxel_size': 0.5,
    'lidar.value_scale': 2.0,
    'lidar.min_range': 1.0,
    'gauge.type': 'sensor_msgs/msg/Temperature',
    'gauge.max_rate': 0.5,
    'chunk_size': 7,
    'queue_size': 1000,
    'max_points': 1000,
    'tile_size': 5.0,
    'value_offset': 3.0,
}
TOPICS = {'/lidar': PointCloud2, '/observations': Observations, '/gauge': Temperature}


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def lidar(points, frame='map'):
    return cloud_from_points(dict(zip('xyz', np.transpose(points), strict=True))), frame


def written(path, messages):
    """Write messages of ROS as ROS serializes them: (topic, message), one a second."""
    from rosbags.rosbag2 import StoragePlugin, Writer

    kinds = {
        topic: f'{kind.__module__.split(".")[0]}/msg/{kind.__name__}'
        for topic, kind in TOPICS.items()
    }
    with Writer(path, version=9, storage_plugin=StoragePlugin.MCAP) as writer:
        connections = {
            topic: writer.add_connection(topic, kind, typestore=TYPES)
            for topic, kind in kinds.items()
        }
        for n, (topic, message) in enumerate(messages):
            writer.write(connections[topic], (n + 1) * 10**9, serialize_message(message))
    return path


def played(path, client, node):
    """Publish the messages of a bag, in their order, each once the node is done with the last."""
    from rosbags.highlevel import AnyReader

    publishers = {topic: client.publisher(kind, topic) for topic, kind in TOPICS.items()}

    def is_done(number):
        counted = node.intake.totals()[1]
        return counted.folded + sum(counted.rejected.values()) == number

    with AnyReader([path]) as bag:
        connections = [each for each in bag.connections if each.topic in TOPICS]
        for number, (connection, _, raw) in enumerate(bag.messages(connections), start=1):
            message = deserialize_message(bytes(raw), TOPICS[connection.topic])
            publishers[connection.topic].publish(message)
            wait_for(functools.partial(is_done, number))


def replayed(path):
    """Return the map of a replay, and what became of the points."""
    return folded(Job((str(path),), (), parameters_from(PARAMETERS)))


def check_same(node, field, report):
    """Compare the maps bit for bit, and all counters."""
    keys, state, header = field.exported()
    node_keys, node_state, node_header = node.field.exported()
    order = [keys.index(key) for key in node_keys]
    assert sorted(keys) == sorted(node_keys) and len(keys) > 10
    for name, numbers in node_state.tensors().items():
        assert torch.equal(state.tensors()[name][order], numbers), name
    assert header['num_observations'] == node_header['num_observations'] > 20
    assert report.provenance == node.intake.provenance
    points, messages = node.intake.totals()
    assert dict(report.losses.points) == {r: n for r, n in points.rejected.items() if n}
    assert dict(report.losses.messages) == dict(messages.rejected)
    assert report.num_folded == points.folded and report.num_read == messages.received


def with_stamps(messages):
    """Set stamps a third of a second apart, and frames."""
    for n, (topic, (message, frame)) in enumerate(messages):
        message.header.stamp = stamp_from_nanoseconds(2 * 10**9 + n * 333_333_333)
        message.header.frame_id = frame
        yield topic, message


def test_replay_and_node_have_the_same_map_to_the_bit(tmp_path, rng, client, start_node):
    def observations(n):
        x = rng.uniform(-9, 9, (n, 2))
        return message_from_observations(x, np.sin(x[:, :1])), 'map'

    broken = lidar(rng.uniform(-9, 9, (11, 3)))
    broken[0].row_step = 1
    nothing = lidar(np.full((3, 3), np.nan))
    large = lidar(rng.uniform(-9, 9, (1001, 3)))
    messages = []
    for n in range(5):
        messages += [
            ('/lidar', lidar(rng.uniform(-9, 9, (101, 3)))),
            ('/observations', observations(13)),
            ('/gauge', (Temperature(temperature=float(n)), 'map')),
        ]
    for each in (broken, nothing, large):
        messages.insert(rng.integers(len(messages)), ('/lidar', each))
    bag = written(tmp_path / 'bag', with_stamps(messages))
    node = start_node(parameters=PARAMETERS)
    played(bag, client, node)
    field, report = replayed(bag)
    check_same(node, field, report)
    assert set(report.losses.messages) == {'bad_size', 'too_many_points', 'rate_limited'}
    assert set(report.losses.points) == {'thinned', 'not_finite'}


def test_transforms_of_a_bag_are_those_of_tf2(rng):
    tf2_ros = pytest.importorskip('tf2_ros', reason='tf2_ros comes with ROS, not from PyPI')
    moves = [('map', 'odom', 1.0), ('map', 'odom', 6.0)]
    moves += [('odom', 'base', 1.0), ('odom', 'base', 4.0)]
    still = [('base', 'sensor', 0.0), ('map', 'gps', 0.0)]
    found = {each: transform_stamped(*each, rng) for each in (*moves, *still)}
    buffer = tf2_ros.Buffer()
    for each, message in found.items():
        set_one = buffer.set_transform_static if each in still else buffer.set_transform
        set_one(message, 'test')
    tree = TransformTree(
        (SimpleNamespace(transforms=[message]), each in still) for each, message in found.items()
    )
    for target, source in (('map', 'sensor'), ('gps', 'base'), ('sensor', 'map')):
        for seconds in (1.0, 1.7, 3.9, 4.0):
            expected = buffer.lookup_transform(target, source, Time(seconds=seconds)).transform
            t, q = expected.translation, expected.rotation
            rotation, translation = tree.motion(target, source, round(seconds * 1e9))
            np.testing.assert_allclose(translation, [t.x, t.y, t.z], atol=1e-9)
            matrix = rotation_from_quaternion(q.x, q.y, q.z, q.w)
            np.testing.assert_allclose(rotation, matrix, atol=1e-9)
        for seconds in (0.9, 4.1):
            with pytest.raises(tf2_ros.ExtrapolationException):
                buffer.lookup_transform(target, source, Time(seconds=seconds))
            with pytest.raises(TransformError, match='the stamp'):
                tree.motion(target, source, round(seconds * 1e9))


def transform_stamped(parent, child, seconds, rng):
    """Make any geometry_msgs/TransformStamped."""
    message = TransformStamped(child_frame_id=child)
    message.header.frame_id = parent
    message.header.stamp = stamp_from_nanoseconds(round(seconds * 1e9))
    for name in 'xyz':
        setattr(message.transform.translation, name, rng.normal())
    quaternion = rng.normal(size=4)
    for name, number in zip('xyzw', quaternion / np.linalg.norm(quaternion), strict=True):
        setattr(message.transform.rotation, name, float(number))
    return message
