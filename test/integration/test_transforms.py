"""Points go from the frame of a message to the map frame, and not the other way."""

import sys
import threading
import time
import types

import numpy as np
import pytest
import rclpy
from builtin_interfaces.msg import Time
from geometry_msgs.msg import TransformStamped
from hypothesis import given, settings
from hypothesis import strategies as st
from rclpy.context import Context
from rclpy.node import Node

from cmanp_ros.core.errors import TransformError
from cmanp_ros.transforms import TransformListener, rotation_from_quaternion, transform_points

# A sensor at (10, 20, 30) m, turned by +90 degrees about z: its x axis is the map's y axis.
QUARTER_TURN = (0.0, 0.0, np.sqrt(0.5), np.sqrt(0.5))
TRANSLATION = (10.0, 20.0, 30.0)
STAMP = Time(sec=7, nanosec=11)


def test_point_is_rotated_and_then_moved():
    rotation = rotation_from_quaternion(*QUARTER_TURN)
    found = transform_points(np.array([[1.0, 2.0, 3.0]]), rotation, TRANSLATION)
    np.testing.assert_allclose(found, [[10.0 - 2.0, 20.0 + 1.0, 30.0 + 3.0]], atol=1e-12)


@pytest.mark.parametrize(
    'quaternion, expected',
    [
        ((0, 0, 0, 1), [[1, 0, 0], [0, 1, 0], [0, 0, 1]]),
        ((1, 0, 0, 1), [[1, 0, 0], [0, 0, -1], [0, 1, 0]]),
        ((0, 3, 0, 3), [[0, 0, 1], [0, 1, 0], [-1, 0, 0]]),
        ((0, 0, -2, -2), [[0, -1, 0], [1, 0, 0], [0, 0, 1]]),
        ((1, 1, 1, 1), [[0, 0, 1], [1, 0, 0], [0, 1, 0]]),
    ],
)
def test_rotation_about_each_axis_is_right_handed(quaternion, expected):
    np.testing.assert_allclose(rotation_from_quaternion(*quaternion), expected, atol=1e-12)


@settings(deadline=None, max_examples=100)
@given(st.tuples(*[st.floats(-3, 3)] * 4).filter(lambda q: np.linalg.norm(q) > 0.1))
def test_rotation_is_proper_for_any_quaternion(quaternion):
    rotation = rotation_from_quaternion(*quaternion)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(rotation) == pytest.approx(1.0)


@pytest.mark.parametrize('quaternion', [(0, 0, 0, 0), (np.nan, 0, 0, 1), (0, np.inf, 0, 1)])
def test_quaternion_that_is_no_rotation_is_refused(quaternion):
    with pytest.raises(TransformError, match='expected 1'):
        rotation_from_quaternion(*quaternion)


@pytest.mark.parametrize('dim', [1, 2, 3])
def test_missing_coordinates_are_zero(dim):
    points = np.random.default_rng(dim).normal(size=(7, dim))
    padded = np.hstack([points, np.zeros((7, 3 - dim))])
    rotation = rotation_from_quaternion(0.1, 0.2, -0.3, 0.9)
    found = transform_points(points, rotation, TRANSLATION)
    np.testing.assert_allclose(found, padded @ rotation.T + TRANSLATION, atol=1e-12)
    assert found.dtype == np.float64


def test_no_points_stay_no_points():
    assert transform_points(np.zeros((0, 2)), np.eye(3), np.zeros(3)).shape == (0, 3)


@pytest.mark.filterwarnings('error')
def test_row_not_finite_stays_so_and_leaves_others_alone():
    points = np.ones((5, 3))
    points[1, 0], points[3, 2] = np.nan, -np.inf
    found = transform_points(points, rotation_from_quaternion(*QUARTER_TURN), TRANSLATION)
    np.testing.assert_array_equal(np.isfinite(found).all(axis=1), [True, False, True, False, True])


# The rest looks up transforms. tf2_ros comes with a ROS installation only, so most of it runs
# against a stand-in with the same signatures; the last test runs against the real one.


class FakeTransformError(Exception):
    """Stands in for tf2_ros.TransformException."""


class FakeBuffer:
    """Stands in for tf2_ros.Buffer: knows base_link after `delay` questions."""

    made = []
    delay = 0
    rotation = QUARTER_TURN

    def __init__(self, cache_time=None, node=None):
        self.node = node
        self.asked = []
        FakeBuffer.made.append(self)

    def can_transform(self, target_frame, source_frame, time, timeout=None):
        self.asked.append((target_frame, source_frame, time.nanoseconds))
        return len(self.asked) > self.delay and source_frame == 'base_link'

    def lookup_transform(self, target_frame, source_frame, time, timeout=None):
        if not self.can_transform(target_frame, source_frame, time):
            raise FakeTransformError(f'"{source_frame}" passed to lookupTransform does not exist')
        found = TransformStamped()
        (
            found.transform.translation.x,
            found.transform.translation.y,
            found.transform.translation.z,
        ) = TRANSLATION
        rotation = found.transform.rotation
        rotation.x, rotation.y, rotation.z, rotation.w = self.rotation
        return found


@pytest.fixture
def fake_tf2(monkeypatch):
    """Put the stand-in where `import tf2_ros` finds it."""
    module = types.ModuleType('tf2_ros')
    module.Buffer = FakeBuffer
    module.TransformListener = lambda buffer, node, spin_thread=False: object()
    module.TransformException = FakeTransformError
    monkeypatch.setitem(sys.modules, 'tf2_ros', module)
    monkeypatch.setattr(FakeBuffer, 'made', [])
    return FakeBuffer


@pytest.fixture
def no_tf2(monkeypatch):
    """Make `import tf2_ros` fail, as without the package."""
    monkeypatch.setitem(sys.modules, 'tf2_ros', None)


@pytest.fixture
def context():
    """Give a test a context and a domain of its own."""
    context = Context()
    rclpy.init(args=['--ros-args', '-r', '__node:=renamed'], context=context, domain_id=83)
    yield context
    rclpy.try_shutdown(context=context)


@pytest.fixture
def node(context):
    """Give a test a node to attach a listener to."""
    node = Node('cmanp', namespace='robot7', context=context)
    yield node
    node.destroy_node()


@pytest.fixture
def listener(node):
    """Give a test a listener, closed afterwards."""
    listener = TransformListener(node, timeout_sec=0.05)
    yield listener
    listener.close()


@pytest.mark.parametrize('map_frame, frame', [('map', 'map'), ('map', '/map'), ('/map', 'map')])
def test_same_frame_is_the_identity_without_tf2(no_tf2, map_frame, frame):
    rotation, translation = TransformListener(None).lookup(map_frame, frame, Time())
    np.testing.assert_array_equal(rotation, np.eye(3))
    np.testing.assert_array_equal(translation, np.zeros(3))


@pytest.mark.parametrize('frame', ['', '/'])
def test_message_without_frame_is_refused(frame):
    with pytest.raises(TransformError, match='the message has no frame_id; expected the frame'):
        TransformListener(None).lookup('map', frame, STAMP)


def test_missing_tf2_names_the_package_and_the_other_way_out(no_tf2, monkeypatch):
    monkeypatch.setenv('ROS_DISTRO', 'jazzy')
    with pytest.raises(TransformError) as caught:
        TransformListener(None).lookup('map', 'base_link', STAMP)
    assert "points in frame 'base_link' need a transform to 'map'" in str(caught.value)
    assert "sudo apt install ros-jazzy-tf2-ros-py, or publish in 'map'" in str(caught.value)


def test_lookup_takes_points_of_the_frame_to_the_map(fake_tf2, listener):
    rotation, translation = listener.lookup('map', '/base_link', STAMP)
    found = transform_points(np.array([[1.0, 2.0, 3.0]]), rotation, translation)
    np.testing.assert_allclose(found, [[8.0, 21.0, 33.0]], atol=1e-12)
    assert set(fake_tf2.made[0].asked) == {('map', 'base_link', 7 * 10**9 + 11)}


def test_lookup_waits_for_a_transform_that_comes_late(fake_tf2, listener, monkeypatch):
    monkeypatch.setattr(fake_tf2, 'delay', 3)
    assert listener.lookup('map', 'base_link', STAMP)[1].tolist() == list(TRANSLATION)


def test_failed_lookup_says_which_frames_when_and_why(fake_tf2, listener):
    with pytest.raises(TransformError) as caught:
        listener.lookup('map', 'lidar', STAMP)
    assert str(caught.value) == (
        "no transform from 'lidar' to 'map' at 7.000000011 s within 0.05 s "
        '(parameter tf_timeout): "lidar" passed to lookupTransform does not exist'
    )


def test_stamp_of_zero_is_refused_unless_the_latest_will_do(fake_tf2, listener):
    with pytest.raises(TransformError, match='has stamp 0, so where it was is unknown'):
        listener.lookup('map', 'base_link', Time())
    assert listener.lookup('map', 'base_link', Time(), allow_latest=True)[1][0] == 10.0


def test_negative_stamp_is_refused(fake_tf2, listener):
    with pytest.raises(TransformError, match='has stamp -3 s; expected no time before 0'):
        listener.lookup('map', 'base_link', Time(sec=-3, nanosec=5))


def test_transform_that_is_no_rotation_is_refused(fake_tf2, listener, monkeypatch):
    monkeypatch.setattr(fake_tf2, 'rotation', (0.0, 0.0, 0.0, 0.0))
    with pytest.raises(TransformError, match='has norm 0.0; expected 1'):
        listener.lookup('map', 'base_link', STAMP)


def test_listener_has_a_node_of_its_own_beside_the_main_one(fake_tf2, node, listener):
    listener.lookup('map', 'base_link', STAMP)
    listener.lookup('map', 'base_link', STAMP)
    (buffer,) = fake_tf2.made
    assert buffer.node is not node
    assert buffer.node.get_fully_qualified_name() == '/robot7/renamed_transforms'
    assert buffer.node.executor is not None and node.executor is None


def test_listener_follows_the_time_source_of_the_main_node(fake_tf2, node, listener):
    node.set_parameters([rclpy.parameter.Parameter('use_sim_time', value=True)])
    listener.lookup('map', 'base_link', STAMP)
    assert fake_tf2.made[0].node.get_parameter('use_sim_time').value is True


def test_nothing_is_created_before_the_first_frame_that_differs(fake_tf2, node):
    listener = TransformListener(node)
    listener.lookup('map', 'map', STAMP)
    listener.close()
    assert fake_tf2.made == []


def test_close_stops_the_thread_and_is_final(fake_tf2, node):
    before = set(threading.enumerate())
    listener = TransformListener(node)
    listener.lookup('map', 'base_link', STAMP)
    assert set(threading.enumerate()) != before
    listener.close()
    listener.close()
    assert set(threading.enumerate()) == before
    with pytest.raises(TransformError, match='closed'):
        listener.lookup('map', 'base_link', STAMP)


def test_close_ends_a_lookup_that_waits(fake_tf2, node):
    listener = TransformListener(node, timeout_sec=60.0)
    failed = threading.Event()

    def wait():
        with pytest.raises(TransformError):
            listener.lookup('map', 'lidar', STAMP)
        failed.set()

    thread = threading.Thread(target=wait)
    thread.start()
    deadline = time.monotonic() + 10.0
    while not (fake_tf2.made and fake_tf2.made[0].asked) and time.monotonic() < deadline:
        failed.wait(0.01)
    listener.close()
    assert failed.wait(10.0)
    thread.join()


def test_close_after_the_context_was_shut_down_is_quiet(fake_tf2, context, node):
    listener = TransformListener(node)
    listener.lookup('map', 'base_link', STAMP)
    rclpy.shutdown(context=context)
    listener.close()


def test_direction_is_right_with_the_real_tf2(node, listener):
    reason = 'tf2_ros comes with a ROS installation, not from PyPI'
    tf2_ros = pytest.importorskip('tf2_ros', reason=reason)
    with pytest.raises(
        TransformError, match="no transform from 'base_link' to 'map' at 7.0000000"
    ):
        listener.lookup('map', 'base_link', STAMP)
    transform = FakeBuffer().lookup_transform('map', 'base_link', rclpy.time.Time())
    transform.header.frame_id, transform.child_frame_id = 'map', 'base_link'
    transform.header.stamp = STAMP
    tf2_ros.StaticTransformBroadcaster(node).sendTransform(transform)
    patient = TransformListener(node, timeout_sec=10.0)
    rotation, translation = patient.lookup('map', '/base_link', STAMP)
    patient.close()
    found = transform_points(np.array([[1.0, 2.0, 3.0]]), rotation, translation)
    np.testing.assert_allclose(found, [[8.0, 21.0, 33.0]], atol=1e-12)
