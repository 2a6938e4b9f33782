"""Points go from the frame of a message to the map frame, and not the other way."""

import sys
import threading
import types

import numpy as np
import pytest
import rclpy
from builtin_interfaces.msg import Time
from conftest import wait_for
from geometry_msgs.msg import TransformStamped
from hypothesis import given, settings
from hypothesis import strategies as st
from rclpy.context import Context
from rclpy.node import Node

from cmanp_ros.core.errors import TransformError
from cmanp_ros.motion import rotation_from_quaternion, transform_points
from cmanp_ros.transforms import TransformListener

# A sensor at (10, 20, 30) m, turned by +90 degrees about z: its x axis is the map's y axis.
QUARTER_TURN = (0.0, 0.0, np.sqrt(0.5), np.sqrt(0.5))
TRANSLATION = (10.0, 20.0, 30.0)


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


# The rest asks for transforms of a robot that turns about a skew axis and moves. tf2_ros comes
# with a ROS installation only: without it a buffer that interpolates the table stands in for it.

AXIS = np.array([1.0, 2.0, -2.0]) / 3
SECONDS = 7.0 + np.arange(21) / 10  # [s] stamps of the table, 7 to 9
ANGLES = 0.3 + 0.8 * (SECONDS - 7) + 0.5 * (SECONDS - 7) ** 2  # [rad]
POSITIONS = np.stack([10 + 3 * ANGLES**2, 20 - 7 * ANGLES, 30 + 5 * ANGLES**3], axis=1)  # [m]
POINTS = np.array([[1.0, 2.0, 3.0], [-5.0, 7.0, 11.0]])


def in_map(seconds):
    """Return where POINTS are in the map at a time, by Rodrigues' formula (an oracle)."""
    angle = np.interp(seconds, SECONDS, ANGLES)
    position = [np.interp(seconds, SECONDS, axis) for axis in POSITIONS.T]
    along = np.outer(POINTS @ AXIS, AXIS) * (1 - np.cos(angle))
    return POINTS * np.cos(angle) + np.cross(AXIS, POINTS) * np.sin(angle) + along + position


def stamp_at(seconds):
    """Return the stamp of a time."""
    return Time(sec=int(seconds), nanosec=round(seconds % 1 * 1e9))


def transform_stamped(parent, child, stamp, position, quaternion):
    """Return the message that says where a child frame is in its parent."""
    message = TransformStamped(child_frame_id=child)
    message.header.frame_id, message.header.stamp = parent, stamp
    vector, rotation = message.transform.translation, message.transform.rotation
    vector.x, vector.y, vector.z = map(float, position)
    rotation.x, rotation.y, rotation.z, rotation.w = map(float, quaternion)
    return message


class StandInError(Exception):
    """Stands in for tf2_ros.TransformException; those below for the ones of their name."""


class StandInLookupError(StandInError):
    pass


class StandInConnectivityError(StandInError):
    pass


class StandInExtrapolationError(StandInError):
    pass


class StandInBuffer:
    """Stands in for tf2_ros.Buffer: interpolates as tf2 does, over one link of the tree."""

    def __init__(self, cache_time=None, node=None):
        self._links = {}  # (parent, child): [(nanoseconds, position, quaternion), ...]

    def set_transform(self, message, authority):
        vector, rotation = message.transform.translation, message.transform.rotation
        position = np.array([vector.x, vector.y, vector.z])
        quaternion = np.array([rotation.x, rotation.y, rotation.z, rotation.w])
        stamp = rclpy.time.Time.from_msg(message.header.stamp).nanoseconds
        link = message.header.frame_id, message.child_frame_id
        self._links[link] = [*self._links.get(link, ()), (stamp, position, quaternion)]

    def clear(self):
        self._links = dict.fromkeys(self._links, ())

    def all_frames_as_string(self):
        return ''.join(f'Frame {c} exists with parent {p}.\n' for p, c in self._links)

    def lookup_transform(self, target_frame, source_frame, time, timeout=None):
        for frame in (target_frame, source_frame):
            if not any(frame in link for link in self._links):
                raise StandInLookupError(f'"{frame}" passed to lookupTransform does not exist')
        if self._links.get((source_frame, target_frame)):  # the other way
            stamp, position, q = self._at(self._links[source_frame, target_frame], time)
            q = q * [-1, -1, -1, 1]
            turned = position + 2 * np.cross(q[:3], np.cross(q[:3], position) + q[3] * position)
            return transform_stamped(target_frame, source_frame, stamp, -turned, q)
        if not self._links.get((target_frame, source_frame)):
            raise StandInConnectivityError('not part of the same tree')
        found = self._at(self._links[target_frame, source_frame], time)
        return transform_stamped(target_frame, source_frame, *found)

    @staticmethod
    def _at(rows, time):
        stamps = [row[0] for row in rows]
        wanted = time.nanoseconds or stamps[-1]
        if not stamps[0] <= wanted <= stamps[-1]:
            raise StandInExtrapolationError('lookup would require extrapolation')
        after = max(1, int(np.searchsorted(stamps, wanted)))
        (t0, p0, q0), (t1, p1, q1) = rows[after - 1], rows[min(after, len(rows) - 1)]
        part = (wanted - t0) / max(t1 - t0, 1)
        angle = np.arccos(np.clip(q0 @ q1, -1, 1))
        if angle > 1e-9:  # slerp
            q0 = (np.sin((1 - part) * angle) * q0 + np.sin(part * angle) * q1) / np.sin(angle)
        stamp = Time(sec=wanted // 10**9, nanosec=wanted % 10**9)
        return stamp, p0 + part * (p1 - p0), q0


class Recording:
    """Gives the table, or a part, to every buffer that is made now or later."""

    def __init__(self, buffer_type):
        self._buffer_type = buffer_type
        self._sent = []
        self.buffers, self.nodes = [], []

    def make_buffer(self, cache_time=None, node=None):
        buffer = self._buffer_type(cache_time, node)
        for message in self._sent:
            buffer.set_transform(message, 'test')
        self.buffers.append(buffer)
        self.nodes.append(node)
        return buffer

    def send(self, message):
        self._sent.append(message)
        for buffer in self.buffers:
            buffer.set_transform(message, 'test')

    def play(self, first, last, parent='map', child='base_link'):
        """Send the rows of the table from one time to another [s], both included."""
        for seconds, angle, position in zip(SECONDS, ANGLES, POSITIONS, strict=True):
            if first - 1e-6 <= seconds <= last + 1e-6:
                quaternion = [*AXIS * np.sin(angle / 2), np.cos(angle / 2)]
                stamp = stamp_at(round(seconds, 1))
                self.send(transform_stamped(parent, child, stamp, position, quaternion))

    def forget(self):
        """Do what tf2 does when simulated time jumps back."""
        self._sent.clear()
        for buffer in self.buffers:
            buffer.clear()


class Answer:
    """What a request called back, in which thread; `log` gets its name."""

    def __init__(self, name=None, log=None):
        self._name, self._log = name, [] if log is None else log
        self.calls, self.threads = [], []

    def ready(self, rotation, translation):
        self._take(transform_points(POINTS, rotation, translation))

    def failed(self, error):
        self._take(error)

    def _take(self, result):
        self._log.append(self._name)
        self.threads.append(threading.current_thread())
        self.calls.append(result)

    def get(self):
        """Wait for the one call; return the points in the map frame, or the error."""
        wait_for(lambda: self.calls)
        (result,) = self.calls
        return result

    def error(self, reason):
        """Wait for the error; check its reason and return its text."""
        error = self.get()
        assert isinstance(error, TransformError), error
        assert error.reason == reason, error
        return str(error)


def ask(listener, frame, seconds, key='points', name=None, log=None, **options):
    """Request a transform and return where the answer will be."""
    answer = Answer(name, log)
    stamp = seconds if isinstance(seconds, Time) else stamp_at(seconds)
    listener.request(key, frame, stamp, answer.ready, answer.failed, **options)
    return answer


@pytest.fixture(params=['stand-in', 'tf2_ros'])
def tf(request, monkeypatch):
    """Return the recording, played to the stand-in or to the real tf2."""
    if request.param == 'tf2_ros':
        reason = 'tf2_ros comes with a ROS installation, not from PyPI'
        module = pytest.importorskip('tf2_ros', reason=reason)
    else:
        module = types.ModuleType('tf2_ros')
        module.Buffer = StandInBuffer
        module.TransformListener = lambda buffer, node, spin_thread=False: object()
        module.TransformException = StandInError
        module.ExtrapolationException = StandInExtrapolationError
        monkeypatch.setitem(sys.modules, 'tf2_ros', module)
    recording = Recording(module.Buffer)
    monkeypatch.setattr(module, 'Buffer', recording.make_buffer)
    return recording


@pytest.fixture
def no_tf2(monkeypatch):
    """Make `import tf2_ros` fail, as without the package."""
    monkeypatch.setitem(sys.modules, 'tf2_ros', None)


@pytest.fixture
def context(domain_id):
    """Give a test a context of its own, in which nodes are renamed."""
    context = Context()
    rclpy.init(args=['--ros-args', '-r', '__node:=renamed'], context=context, domain_id=domain_id)
    yield context
    rclpy.try_shutdown(context=context)


@pytest.fixture
def node(context):
    """Give a test a node whose simulated time stands at 0."""
    node = Node('cmanp', namespace='robot7', context=context)
    node.set_parameters([rclpy.parameter.Parameter('use_sim_time', value=True)])
    yield node
    node.destroy_node()


@pytest.fixture
def start(node):
    """Give a test a function that makes a listener, closed afterwards."""
    made = []

    def start(timeout_sec=20.0, **options):
        made.append(TransformListener(node, timeout_sec, **options))
        return made[-1]

    yield start
    for listener in made:
        listener.close()


# Answered at once --------------------------------------------------------------------------------


@pytest.mark.parametrize('map_frame, frame', [('map', 'map'), ('map', '/map'), ('/map', 'map')])
def test_same_frame_is_the_identity_at_once_without_tf2(no_tf2, map_frame, frame):
    answer = ask(TransformListener(None, map_frame=map_frame), frame, Time())
    np.testing.assert_array_equal(answer.calls, [POINTS])
    assert answer.threads == [threading.current_thread()]


@pytest.mark.parametrize(
    'frame, stamp, reason, text',
    [
        (
            '',
            stamp_at(8),
            'no_frame',
            "no frame_id; expected the frame of its points, as in 'map'",
        ),
        ('/', stamp_at(8), 'no_frame', 'the message has no frame_id'),
        (
            'lidar',
            Time(),
            'no_stamp',
            'has stamp 0, so where it was is unknown; expected the time',
        ),
        (
            'lidar',
            Time(sec=-3, nanosec=5),
            'no_stamp',
            'has stamp -3 s; expected no time before 0',
        ),
    ],
)
def test_message_without_frame_or_time_fails_at_once(tf, start, frame, stamp, reason, text):
    listener = start()
    answer = ask(listener, frame, stamp)
    assert len(answer.calls) == 1 and text in answer.error(reason)
    assert answer.threads == [threading.current_thread()]
    assert listener.pending() == 0


def test_missing_tf2_names_the_package_and_the_other_way_out(no_tf2, start, monkeypatch):
    monkeypatch.setenv('ROS_DISTRO', 'jazzy')
    text = ask(start(), 'base_link', 8.0).error('no_tf2')
    assert "points in frame 'base_link' need a transform to 'map'" in text
    assert "sudo apt install ros-jazzy-tf2-ros-py, or publish in 'map'" in text


# At the stamp ------------------------------------------------------------------------------------


@pytest.mark.parametrize('seconds', [7.0, 7.3, 8.04, 8.95, 9.0])
def test_points_go_to_the_map_as_the_robot_stood_at_the_stamp(tf, start, seconds):
    tf.play(7, 9)
    answer = ask(start(), '/base_link', seconds)
    np.testing.assert_allclose(answer.get(), in_map(seconds), atol=1e-7)
    assert np.abs(in_map(seconds + 0.01) - in_map(seconds - 0.01)).max() > 0.05  # others differ
    assert answer.threads[0].name == 'renamed_transforms'


def test_stamp_of_zero_is_the_latest_known_where_that_is_allowed(tf, start):
    tf.play(7, 8.5)
    answer = ask(start(), 'base_link', Time(), allow_latest=True)
    np.testing.assert_allclose(answer.get(), in_map(8.5), atol=1e-7)


def test_message_waits_for_a_transform_that_comes_late(tf, start):
    tf.play(7, 8)
    listener = start()
    answer = ask(listener, 'base_link', 8.05)
    wait_for(lambda: listener.waiting_for()[0][1] > 0.1)  # several checks
    assert listener.waiting_for()[0][0] == 'base_link' and listener.pending() == 1
    assert answer.calls == []
    tf.play(8.1, 8.1)
    np.testing.assert_allclose(answer.get(), in_map(8.05), atol=1e-7)
    assert listener.pending() == 0 and listener.waiting_for() == []


def test_nothing_is_checked_when_nothing_waits(tf, start):
    listener = start()
    answer = ask(listener, 'base_link', 8.0)
    (timer,) = tf.nodes[0].timers
    wait_for(lambda: not timer.is_canceled())
    tf.play(7, 9)
    answer.get()
    wait_for(timer.is_canceled)


# Not at the stamp --------------------------------------------------------------------------------


def test_stamp_ahead_of_the_newest_transform_fails_and_says_how_far(tf, start):
    tf.play(7, 8)
    text = ask(start(0.05), 'base_link', 8.25).error('transform_too_new')
    assert text.startswith(
        "no transform from 'base_link' to 'map' at 8.250000000 s within 0.05 s (parameter "
        'tf_timeout): the stamp is ahead of the newest transform'
    )
    assert 'newest transform minus stamp: -0.250 s' in text
    assert (
        'clock of this node minus stamp when the message came: -8.250 s' in text
    )  # it stands at 0
    assert 'raise tf_timeout' in text and 'NTP' in text


def test_stamp_before_the_oldest_transform_fails_and_says_how_far(tf, start):
    tf.play(8, 9)
    text = ask(start(0.05), 'base_link', 7.5).error('transform_too_old')
    assert 'the stamp is before the oldest transform kept' in text
    assert 'newest transform minus stamp: +1.500 s' in text
    assert 'clock of this node minus stamp when the message came: -7.500 s' in text


def test_unknown_frame_fails_and_says_what_is_known(tf, start):
    tf.play(7, 9)
    text = ask(start(0.05), 'camera', 8.0).error('no_transform')
    assert "no transform from 'camera' to 'map' at 8.000000000 s within 0.05 s" in text
    assert '"camera" passed to lookupTransform' in text
    assert 'these transforms are known: Frame base_link exists with parent map.' in text
    assert 'correct the frame_id' in text


def test_fault_of_tf2_is_an_answer_and_the_next_one_comes(tf, start, monkeypatch):
    tf.play(7, 9)
    listener = start()
    expected = ask(listener, 'base_link', 8.0).get()

    def fault(*_):
        raise RuntimeError('a fault of tf2')

    with monkeypatch.context() as patch:
        patch.setattr(listener._tf2, 'lookup', fault)
        text = ask(listener, 'base_link', 8.0).error('bad_transform')
        assert 'a fault of tf2' in text and "'base_link'" in text
    np.testing.assert_array_equal(ask(listener, 'base_link', 8.0).get(), expected)


def test_frames_of_different_trees_fail(tf, start):
    tf.play(7, 9)
    tf.play(7, 9, parent='truck', child='trailer')
    text = ask(start(0.05), 'trailer', 8.0).error('no_transform')
    assert 'Frame trailer exists with parent truck.' in text


def test_nothing_known_at_all_is_said(tf, start):
    text = ask(start(0.05), 'base_link', Time(), allow_latest=True).error('no_transform')
    assert "from 'base_link' to 'map' at any time" in text and 'are known: none.' in text


@pytest.mark.parametrize('tf', ['stand-in'], indirect=True)  # the real one refuses them already
@pytest.mark.parametrize(
    'position, quaternion, text',
    [
        (TRANSLATION, (0, 0, 0, 0), 'has norm 0.0; expected 1'),
        ((1, np.nan, 3), QUARTER_TURN, 'has translation [1.0, nan, 3.0] m; expected finite'),
    ],
)
def test_transform_that_is_no_rigid_motion_is_refused(tf, start, position, quaternion, text):
    tf.send(transform_stamped('map', 'base_link', stamp_at(8.0), position, quaternion))
    assert text in ask(start(), 'base_link', 8.0).error('bad_transform')


def test_timeout_may_change_while_messages_wait(tf, start):
    listener = start(timeout_sec=1000.0)
    answer = ask(listener, 'base_link', 8.0)
    listener.timeout_sec = 0.01
    assert 'within 0.01 s' in answer.error('no_transform')


def test_message_times_out_when_simulated_time_jumps_back_and_the_next_is_answered(tf, start):
    tf.play(7, 9)
    listener = start()
    waiting = ask(listener, 'base_link', 9.05)
    tf.forget()
    assert waiting.calls == []
    listener.timeout_sec = 0.01
    waiting.error('no_transform')
    listener.timeout_sec = 20.0
    tf.play(7, 8)
    np.testing.assert_allclose(ask(listener, 'base_link', 7.5).get(), in_map(7.5), atol=1e-7)


# The queue ---------------------------------------------------------------------------------------


def test_messages_of_a_key_are_answered_in_the_order_they_came(tf, start):
    tf.play(7, 8)
    listener, log = start(), []
    late = ask(listener, 'base_link', 8.5, name='late', log=log)
    there = ask(listener, 'base_link', 7.5, name='there', log=log)
    wait_for(lambda: listener.waiting_for()[0][1] > 0.1)  # several checks
    assert there.calls == []
    tf.play(8.1, 9)
    np.testing.assert_allclose(there.get(), in_map(7.5), atol=1e-7)
    np.testing.assert_allclose(late.get(), in_map(8.5), atol=1e-7)
    assert log == ['late', 'there']


def test_message_behind_one_that_times_out_is_answered(tf, start):
    tf.play(7, 9)
    listener, log = start(timeout_sec=0.1), []
    unknown = ask(listener, 'camera', 8.0, name='unknown', log=log)
    there = ask(listener, 'base_link', 8.0, name='there', log=log)
    np.testing.assert_allclose(there.get(), in_map(8.0), atol=1e-7)
    unknown.error('no_transform')
    assert log == ['unknown', 'there']


def test_keys_do_not_wait_for_each_other(tf, start):
    tf.play(7, 9)
    listener = start(max_pending=2)
    waiting = [ask(listener, 'camera', 8.0, key='slow') for _ in range(2)]
    for _ in range(5):
        np.testing.assert_allclose(ask(listener, 'base_link', 8.0).get(), in_map(8.0), atol=1e-7)
    assert [answer.calls for answer in waiting] == [[], []]
    assert listener.pending('slow') == listener.pending() == 2
    assert listener.pending('points') == listener.pending('unknown key') == 0


def test_oldest_fails_when_too_many_wait(tf, start):
    tf.play(7, 8)
    listener, log = start(max_pending=3), []
    answers = [ask(listener, 'base_link', 8.1 + i / 10, name=i, log=log) for i in range(5)]
    assert log == [0, 1]
    for answer in answers[:2]:
        text = answer.error('tf_queue_full')
        assert "more than 3 messages of 'points' wait for a transform to 'map'" in text
        assert "the oldest, in frame 'base_link', was given up after 0." in text
    assert listener.pending('points') == 3
    tf.play(8.1, 9)
    for i in (2, 3, 4):
        np.testing.assert_allclose(answers[i].get(), in_map(8.1 + i / 10), atol=1e-7)
    assert log == [0, 1, 2, 3, 4]


def test_waiting_for_names_each_frame_once_the_longest_first(tf, start):
    listener = start()
    for frame, key in (('camera', 'a'), ('lidar', 'b'), ('camera', 'c')):
        ask(listener, frame, 8.0, key=key)
    (first, longest), (second, shorter) = listener.waiting_for()
    assert (first, second) == ('camera', 'lidar') and longest > shorter >= 0


def test_clear_gives_up_a_key_or_all_and_counts_them(tf, start):
    listener = start()
    of_a = [ask(listener, 'lidar', 8.0, key='a') for _ in range(3)]
    of_b = [ask(listener, 'lidar', 8.0, key='b') for _ in range(2)]
    assert listener.clear('b') == 2 and listener.clear('b') == listener.clear('none') == 0
    assert [len(answer.calls) for answer in of_a + of_b] == [0, 0, 0, 1, 1]
    assert listener.clear() == 3 and listener.pending() == 0
    for answer in of_a + of_b:
        assert "a message in frame 'lidar' was given up" in answer.error('cleared')
    tf.play(7, 9)
    np.testing.assert_allclose(ask(listener, 'base_link', 8.0).get(), in_map(8.0), atol=1e-7)


def test_callback_may_ask_again(tf, start):
    tf.play(7, 9)
    listener, again = start(), Answer()

    def ready(*transform):
        listener.request('points', 'base_link', stamp_at(7.5), again.ready, again.failed)

    listener.request('points', 'base_link', stamp_at(8.0), ready, again.failed)
    np.testing.assert_allclose(again.get(), in_map(7.5), atol=1e-7)


def test_callback_that_raises_does_not_end_the_thread(tf, start, capfd):
    tf.play(7, 9)
    listener = start()
    listener.request('gas', 'base_link', stamp_at(8.0), lambda *_: {}['lost'], Answer().failed)
    np.testing.assert_allclose(ask(listener, 'base_link', 7.5).get(), in_map(7.5), atol=1e-7)
    assert "a message of 'gas' was lost: KeyError('lost')" in capfd.readouterr().err


def test_each_is_answered_once_whoever_asks_and_clears(tf, start):
    tf.play(7, 8)
    listener = start(max_pending=5)
    answers = {key: [] for key in 'abc'}

    def run(key):
        for i in range(40):
            answers[key].append(ask(listener, 'base_link', 7.5 + i % 2, key=key))
            if i % 7 == 6:
                listener.clear(key)

    threads = [threading.Thread(target=run, args=key) for key in answers]
    for thread in threads:
        thread.start()
    tf.play(8.1, 9)
    for thread in threads:
        thread.join()
    for of_key in answers.values():
        for i, answer in enumerate(of_key):
            if isinstance(result := answer.get(), TransformError):
                assert result.reason in ('cleared', 'tf_queue_full')
            else:
                np.testing.assert_allclose(result, in_map(7.5 + i % 2), atol=1e-7)
    assert listener.pending() == 0
    assert all(len(answer.calls) == 1 for of_key in answers.values() for answer in of_key)


# The node of its own -----------------------------------------------------------------------------


def test_listener_has_a_node_of_its_own_beside_the_main_one(tf, node, start):
    tf.play(7, 9)
    listener = start()
    for _ in range(2):
        ask(listener, 'base_link', 8.0).get()
    (own,) = tf.nodes
    assert own is not node
    assert own.get_fully_qualified_name() == '/robot7/renamed_transforms'
    assert own.executor is not None and node.executor is None


@pytest.mark.parametrize('use_sim_time', [False, True])
def test_listener_follows_the_time_source_of_the_main_node(tf, node, start, use_sim_time):
    node.set_parameters([rclpy.parameter.Parameter('use_sim_time', value=use_sim_time)])
    ask(start(), 'base_link', 8.0)
    assert tf.nodes[0].get_parameter('use_sim_time').value is use_sim_time


def test_nothing_is_created_before_the_first_frame_that_differs(tf, start):
    before = set(threading.enumerate())
    ask(start(), 'map', 8.0)
    assert tf.nodes == [] and set(threading.enumerate()) == before


def test_close_fails_what_waits_stops_the_thread_and_is_final(tf, start):
    before = set(threading.enumerate())
    listener = start()
    waiting = [ask(listener, 'lidar', 8.0, key=key) for key in 'aab']
    assert set(threading.enumerate()) != before
    listener.close()
    listener.close()
    assert set(threading.enumerate()) == before
    assert [len(answer.calls) for answer in waiting] == [1, 1, 1]
    for answer in waiting:
        assert 'the transform listener is closed' in answer.error('closed')
    assert listener.pending() == 0
    assert 'is closed' in ask(listener, 'lidar', 8.0).error('closed')


def test_close_after_the_context_was_shut_down_is_quiet(tf, context, start):
    tf.play(7, 9)
    listener = start()
    ask(listener, 'base_link', 8.0).get()
    waiting = ask(listener, 'lidar', 8.0)
    rclpy.shutdown(context=context)
    listener.close()
    waiting.error('closed')


@pytest.mark.parametrize('tf', ['tf2_ros'], indirect=True)
def test_transforms_of_the_topic_are_heard(tf, node, start):
    import tf2_ros

    listener = start()
    answer = ask(listener, 'base_link', 8.0)
    message = transform_stamped('map', 'base_link', stamp_at(8.0), TRANSLATION, QUARTER_TURN)
    tf2_ros.StaticTransformBroadcaster(node).sendTransform(message)
    np.testing.assert_allclose(answer.get()[0], [8.0, 21.0, 33.0], atol=1e-12)
