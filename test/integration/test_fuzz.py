"""
No message harms the map: fuzzed fields and fuzzed bytes, through the callbacks of a real node.

CMANP_FUZZ_EXAMPLES is how many of each kind are tried; by default few, and always the same ones.
"""

import array
import collections
import functools
import os
import resource
import time
import tracemalloc

import numpy as np
import pytest
import rclpy
import torch
from cmanp_ros.msg import Prediction, Query, State
from cmanp_ros.srv import LoadState, MergeState, Predict, SaveState, Undo
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rclpy.executors import SingleThreadedExecutor
from rclpy.parameter import Parameter
from rclpy.serialization import deserialize_message, serialize_message
from rclpy.time import Time
from sensor_msgs.msg import JointState, MagneticField, PointField, Range, Temperature
from std_msgs.msg import Header

from cmanp_ros import checkpoint
from cmanp_ros.conversions import cloud_from_points, message_from_observations
from cmanp_ros.core.state import from_tensors
from cmanp_ros.field import NeuralField
from cmanp_ros.node import CMANPNode

EXAMPLES = int(os.environ.get('CMANP_FUZZ_EXAMPLES', 5))
IS_LONG = 'CMANP_FUZZ_EXAMPLES' in os.environ
TEST_TIMEOUT_SEC = 0 if IS_LONG else 120  # 0: none
TIMEOUT_SEC = 60.0
MAX_POINTS, MAX_TARGETS, MAX_JOINT, MAX_SAMPLES = 200, 64, 16, 5
MAX_TEXT = 1100  # characters of a refusal, whatever was sent
MANY = 2**32  # points: more than fit in memory
PARAMETERS = {
    'sources': ['points', 'observations', 'air', 'echo', 'magnet', 'joint'],
    'air.type': 'sensor_msgs/msg/Temperature',
    'echo.type': 'sensor_msgs/msg/Range',
    'magnet.type': 'sensor_msgs/msg/MagneticField',
    'magnet.value_field': 'magnetic_field',
    'joint.type': 'sensor_msgs/msg/JointState',
    'joint.value_field': 'position[2]',
    'peers': ['/other/cmanp/state'],
    'tile_size': 20.0,  # few tiles, which are compared often
    'max_tiles': 128,
    'max_points': MAX_POINTS,
    'max_targets': MAX_TARGETS,
    'grid_resolution': 10.0,
    'max_joint_targets': MAX_JOINT,
    'max_samples': MAX_SAMPLES,
    'undo_window': 60.0,
    'tf_timeout': 0.0,
    'calibration_period': 1.0,
}


class Harness:
    """A node whose callbacks are called from here, and what must hold after each call."""

    def __init__(self, folder):
        """
        Start the node, and another one that listens to its answers over DDS.

        :param folder: of the saved maps; one of another robot is put there.
        """
        self.folder, self.tally = folder, collections.Counter()
        self._context = rclpy.Context()
        rclpy.init(context=self._context, domain_id=101)
        values = PARAMETERS | {'state_directory': str(folder)}
        overrides = [Parameter(name, value=value) for name, value in values.items()]
        self.node = CMANPNode(context=self._context, parameter_overrides=overrides)
        self.node.trigger_configure()
        self.node.trigger_activate()
        self._listener = rclpy.create_node('listener', context=self._context)
        self.answers, self._num_queries = {}, 0
        self._listener.create_subscription(
            Prediction, 'cmanp/prediction', lambda m: self.answers.update({m.id: m}), 100
        )
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self._listener)
        answers = self.node.answers
        self._wait_for(lambda: answers._prediction.get_subscription_count())
        self._receive(good_cloud())
        (folder / 'other.safetensors').write_bytes(peer_state('r9').data)

    def close(self):
        """End both nodes."""
        self._executor.shutdown()
        self._listener.destroy_node()
        self.node.on_cleanup(None)
        self.node.destroy_node()
        rclpy.try_shutdown(context=self._context)

    def take(self, message):
        """Hand over a message or request of any kind, and see what becomes of it."""
        before = content(self.node)
        take = {Query: self._query, Predict.Request: self._predict, State: self._peer}
        control = (SaveState.Request, LoadState.Request, MergeState.Request, Undo.Request)
        take |= dict.fromkeys(control, self._control)
        may_change = take.get(type(message), self._observe)(message)
        assert may_change or content(self.node) == before, 'what was refused changed the map'
        _, state = self.node.field.world.export()
        assert state is None or state.is_finite()
        name = ' '.join(type(message).__name__.removesuffix('_Request').split('_'))
        self.tally[f'{name} {"used" if may_change else "left the map as it was"}'] += 1

    def still_works(self):
        """See that a good message is folded, and a good query and a good request answered."""
        if self.node.field.num_tiles > 60:  # to compare them would take long
            self.node.worker.ask(self.node.control.begin_again).result(TIMEOUT_SEC)
        folded = counts(self.node)[0].folded
        self._receive(good_cloud())
        assert counts(self.node)[0].folded == folded + 3
        self._query(good_query())
        self._predict(Predict.Request(header=good_header(), dim_x=2, x=[1.0, 2.0]))

    # What must hold of each kind: each returns whether the map may be another one now ------------

    def _observe(self, message):
        """Observe: every point and message is counted once, and no fault of ours shows."""
        points, messages = counts(self.node)
        source = self._receive(message)
        more_points, more_messages = counts(self.node)
        assert more_messages.received == messages.received + 1
        for counted in (more_points, more_messages):
            assert counted.conserved and not counted.pending, counted
            assert 'internal_error' not in counted.rejected, source.problems
        assert all(len(text) <= MAX_TEXT for text in source.problems.values())
        assert all(text.isprintable() for text in source.problems.values())
        return more_points.folded > points.folded

    def _query(self, query):
        """Ask on the topic: a good query is answered, and no other."""
        self._num_queries += 1
        query.id = 2**63 + self._num_queries
        self.node.answers._on_query(query)
        self._settle()
        if is_good(query):
            self._wait_for(lambda: query.id in self.answers)
            answer = self.answers[query.id]
            assert len(answer.mean) == len(answer.stddev) == len(query.x) // 2
            assert_finite_where_asked(answer.mean, query)
        else:
            self._executor.spin_once(timeout_sec=0.001)
            assert query.id not in self.answers
        return False

    def _predict(self, request):
        """Ask the service: a good request is answered with all that it asked for, and no other."""
        response = self.node.answers._on_predict(request, Predict.Response())
        assert response.success == is_good(request), response.message
        assert not response.message.startswith('no answer'), response.message
        assert len(response.message) <= MAX_TEXT and response.message.isprintable()
        serialize_message(response)
        if response.success:
            count = len(request.x) // 2
            assert len(response.prediction.mean) == count
            assert len(response.covariance) == request.joint * count**2
            assert len(response.samples) == request.num_samples * count
            assert_finite_where_asked(response.prediction.mean, request)
        return False

    def _control(self, request):
        """Ask for a map: it is done, or why not is said in a few words; only maps are written."""
        control = self.node.control
        callback, service = {
            SaveState.Request: (control._on_save, SaveState),
            LoadState.Request: (control._on_load, LoadState),
            MergeState.Request: (control._on_merge, MergeState),
            Undo.Request: (control._on_undo, Undo),
        }[type(request)]
        response = callback(request, service.Response())
        serialize_message(response)
        assert not response.message.startswith('not done'), response.message
        assert len(response.message) <= MAX_TEXT and response.message.isprintable()
        assert {path.suffix for path in self.folder.iterdir()} <= {'.safetensors'}
        assert list(self.folder.parent.iterdir()) == [self.folder], 'written beside the folder'
        return response.success and service is not SaveState

    def _peer(self, message):
        """Receive the map of a peer, which never changes the own one."""
        self.node.control._on_peer('/peer/state', message)
        self._settle()
        return False

    def _receive(self, message):
        """Hand a message to the source of its type, and wait until it is decided upon."""
        sources = self.node.intake.sources.values()
        (source,) = [s for s in sources if s.reader.message_type is type(message)]
        self.node.intake.receive(source, message)
        self._settle()
        return source

    def _settle(self):
        """Wait until all that came is decided upon."""
        node = self.node
        self._wait_for(
            lambda: (
                not (
                    node.transforms.pending()
                    or counts(node)[1].pending
                    or node.answers._num_waiting
                )
            )
        )
        node.worker.ask(lambda: None).result(TIMEOUT_SEC)

    def _wait_for(self, condition):
        """Listen, and let the worker work, until a condition holds."""
        deadline = time.monotonic() + TIMEOUT_SEC
        while not condition():
            assert time.monotonic() < deadline, 'the node does not settle'
            self.node.worker.ask(lambda: None).result(TIMEOUT_SEC)
            self._executor.spin_once(timeout_sec=0.001)


def counts(node):
    """Return the counters of points and of messages."""
    return node.intake.totals()


def content(node):
    """Return all that the own map holds."""
    keys, state = node.field.world.export()
    parts = {} if state is None else state.tensors()
    return keys, {name: part.numpy().tobytes() for name, part in parts.items()}


def is_good(message):
    """Tell whether a query or request can be answered, as its definition says."""
    count, rest = divmod(len(message.x), 2)
    good = message.header.frame_id.strip('/') == 'map' and message.dim_x == 2 and not rest
    good = good and count <= MAX_TARGETS
    if isinstance(message, Query):
        return good
    good = good and message.num_samples <= MAX_SAMPLES
    good = good and message.num_samples * count <= MAX_TARGETS
    return good and not (message.joint and count > MAX_JOINT)


def assert_finite_where_asked(mean, message):
    """See that the answer is finite exactly where the location is."""
    asked = np.isfinite(np.reshape(message.x, (-1, 2))).all(1)
    np.testing.assert_array_equal(np.isfinite(mean), asked)


@pytest.fixture(scope='module')
def harness(request, tmp_path_factory):
    """Return the harness; print what was tried."""
    torch.set_num_threads(1)
    other_map()  # before hypothesis runs: making a model draws random numbers
    harness = Harness(tmp_path_factory.mktemp('fuzz') / 'maps')
    yield harness
    harness.close()
    numbers = ''.join(f'\n{count:8} {name}' for name, count in sorted(harness.tally.items()))
    with request.config.pluginmanager.getplugin('capturemanager').global_and_fixture_disabled():
        print(f'\nfuzzed:{numbers}\n{sum(harness.tally.values()):8} in all')


def fuzz(strategy):
    """Try examples of a strategy as the argument `message`, as ROS would pass them on."""
    options = settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=not IS_LONG,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    sent = strategy.map(lambda m: deserialize_message(serialize_message(m), type(m)))
    return lambda test: pytest.mark.timeout(TEST_TIMEOUT_SEC)(options(given(message=sent)(test)))


# Good messages ----------------------------------------------------------------------------------


def good_header():
    """Return a header in the map frame."""
    header = Header(frame_id='map')
    header.stamp.sec = 7
    return header


def good_cloud():
    """Return a cloud of three points."""
    columns = {'x': [1.0, 2.0, 3.0], 'y': [0.0, -5.0, 4.0], 'z': [0.1, 0.2, 0.3]}
    return cloud_from_points(columns, good_header())


def good_observations():
    """Return two observations."""
    return message_from_observations([[1.0, 2.0], [3.0, 4.0]], [[0.1], [0.2]], good_header())


def good_query():
    """Return a query of two locations."""
    return Query(header=good_header(), dim_x=2, x=[1.0, 2.0, -3.0, 4.0])


def good_request():
    """Return a request for two locations, with all that it may ask for."""
    x = [1.0, 2.0, -3.0, 4.0]
    return Predict.Request(header=good_header(), dim_x=2, x=x, joint=True, num_samples=3)


@functools.cache
def other_map():
    """Return keys, state and header of another robot's map."""
    field = NeuralField.load(tile_size=PARAMETERS['tile_size'])
    field.observe([[1.0, 2.0], [3.0, 4.0], [-9.0, 9.0]], [0.3, -0.2, 0.1])
    bounds = ((-25.0, -25.0), (25.0, 25.0))
    return field.exported(frame='map', bounds=bounds, oldest_stamp=7, newest_stamp=7)


def peer_state(robot='r1', change=lambda tensors: None, **header):
    """
    Return another robot's map, with the right checksum whatever it holds.

    :param change: called with its tensors.
    :param header: entries of the file's header.
    """
    keys, state, saved = other_map()
    tensors = {name: part.clone() for name, part in state.tensors().items()}
    change(tensors)
    saved = saved | {'robots': [robot]} | header
    message = State(header=good_header(), robot=robot, sequence=time.time_ns())
    message.data = array.array('B', checkpoint.map_bytes(keys, from_tensors(tensors), saved))
    return message


GOOD = {
    'cloud': good_cloud,
    'observations': good_observations,
    'temperature': lambda: Temperature(header=good_header(), temperature=21.0),
    'range': lambda: Range(header=good_header(), min_range=0.1, max_range=9.0, range=2.0),
    'vector': lambda: MagneticField(header=good_header()),
    'list': lambda: JointState(header=good_header(), name=['a'], position=[1.0, 2.0, 3.0]),
    'query': good_query,
    'request': good_request,
    'peer': peer_state,
    'save': lambda: SaveState.Request(name='saved', overwrite=True),
    'load': lambda: LoadState.Request(name='saved'),
    'merge': lambda: MergeState.Request(name='other'),
    'undo': lambda: Undo.Request(seconds=0.5),
}


# Fields -----------------------------------------------------------------------------------------

INT32 = st.integers(-(2**31), 2**31 - 1) | st.sampled_from([0, 7, -1, 2**31 - 1, -(2**31)])
UINT32 = st.integers(0, 2**32 - 1) | st.sampled_from([0, 1, 2, 3, 4, 12, 2**16, 2**32 - 1])
FLOATS = st.floats(width=32) | st.sampled_from([3e38, -3e38, 1e12, 1e6, 25.0, 1e-45])
DOUBLES = st.floats() | st.sampled_from([1e308, 1e6, 300.0])
TEXTS = st.text(max_size=30) | st.sampled_from(
    ['', '/', '..', '../x', '/etc/passwd', 'a;b', 'a\n[ERROR] b', '\x1b[2J', 'ä/ö', 'a' * 99_999]
)
FRAMES = st.sampled_from(['map', 'map', 'map', '/map', 'odom']) | TEXTS
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS  # what JSON can hold
PLAIN |= st.lists(PLAIN, max_size=3) | st.dictionaries(st.text(max_size=5), PLAIN, max_size=3)


@st.composite
def headers(draw):
    """Return a header with any frame and any time."""
    header = Header(frame_id=draw(FRAMES))
    header.stamp.sec, header.stamp.nanosec = draw(INT32), draw(UINT32)
    return header


def some_changed(draw, message, **strategies):
    """Set some fields of a message; which ones is drawn, too."""
    names = st.lists(st.sampled_from(sorted(strategies)), unique=True, max_size=3)
    for name in draw(names):
        setattr(message, name, draw(strategies[name]))
    return message


def cut(data):
    """Return bytes that are no continuation of the rest, or the first of these."""
    some = st.binary(max_size=100).map(lambda found: array.array('B', found))
    return some | st.integers(0, len(data)).map(lambda end: data[:end])


@st.composite
def clouds(draw):
    """Return a cloud in which any field may contradict the others."""
    num_points = draw(st.integers(0, 12) | st.just(MAX_POINTS + 1))
    numbers = st.lists(FLOATS, min_size=3, max_size=15)
    columns = {name: np.resize(draw(numbers), num_points) for name in 'xyz'}
    cloud = cloud_from_points(columns, draw(headers()))
    if num_points % 3 == 0 and draw(st.booleans()):  # as from a depth camera
        cloud.height, cloud.width, cloud.row_step = 3, num_points // 3, cloud.row_step // 3
    fields = st.builds(
        PointField,
        name=st.sampled_from('xyz') | TEXTS,
        offset=UINT32,
        datatype=st.integers(0, 255) | st.integers(1, 8),
        count=UINT32,
    )
    return some_changed(
        draw,
        cloud,
        width=UINT32,
        height=UINT32,
        point_step=UINT32,
        row_step=UINT32,
        is_bigendian=st.booleans(),
        is_dense=st.booleans(),
        fields=st.lists(st.sampled_from(cloud.fields) | fields, max_size=6),
        data=cut(cloud.data),
    )


@st.composite
def observations(draw):
    """Return observations whose sizes need not agree."""
    rows = np.resize(draw(st.lists(FLOATS, min_size=3, max_size=30)), (draw(st.integers(0, 9)), 3))
    message = message_from_observations(rows[:, :2], rows[:, 2:], draw(headers()))
    numbers = st.lists(FLOATS, max_size=9) | st.just([1.0] * (2 * MAX_POINTS + 2))
    return some_changed(draw, message, dim_x=UINT32, dim_y=UINT32, x=numbers, y=numbers)


@st.composite
def vectors(draw):
    """Return a reading of three numbers."""
    message = MagneticField(header=draw(headers()))
    vector = message.magnetic_field
    vector.x, vector.y, vector.z = draw(DOUBLES), draw(DOUBLES), draw(DOUBLES)
    return message


def questions(kind, **more):
    """Return queries or requests: any number of any locations."""
    too_many = [[1.0] * (2 * MAX_JOINT + 2), [1.0] * (2 * MAX_TARGETS + 2)]
    x = st.lists(st.tuples(FLOATS, FLOATS), max_size=8).map(lambda rows: np.ravel(rows).tolist())
    x |= st.lists(FLOATS, max_size=5) | st.sampled_from(too_many)
    dim = st.sampled_from([2, 2, 2]) | UINT32
    return st.builds(kind, header=headers(), dim_x=dim, x=x, **more)


@st.composite
def states(draw):
    """Return another robot's map: whole, with anything in its header, or damaged."""
    entries = st.sampled_from([*other_map()[2], 'extra'])
    message = peer_state('r1', **draw(st.dictionaries(entries, PLAIN, max_size=2)))
    sequences = st.integers(0, 2**64 - 1)
    return some_changed(draw, message, robot=TEXTS, sequence=sequences, data=cut(message.data))


READINGS = {
    'temperature': st.builds(Temperature, header=headers(), temperature=DOUBLES),
    'range': st.builds(Range, header=headers(), range=FLOATS, min_range=FLOATS, max_range=FLOATS),
    'vector': vectors(),
    'list': st.builds(JointState, header=headers(), position=st.lists(DOUBLES, max_size=4)),
}
NAMES = st.just('saved') | TEXTS
COMMANDS = [
    st.builds(SaveState.Request, name=NAMES, overwrite=st.booleans()),
    st.builds(LoadState.Request, name=NAMES),
    st.builds(MergeState.Request, name=NAMES | st.just('other')),
    st.builds(Undo.Request, seconds=DOUBLES | st.sampled_from([0.0, -1.0, 1e-9])),
]


@fuzz(clouds())
def test_no_cloud_harms_the_map(harness, message):
    harness.take(message)
    harness.still_works()


@fuzz(observations())
def test_no_observations_harm_the_map(harness, message):
    harness.take(message)
    harness.still_works()


@fuzz(st.one_of(*READINGS.values()))
def test_no_reading_harms_the_map(harness, message):
    harness.take(message)
    harness.still_works()


@fuzz(questions(Query))
def test_no_query_harms_the_map(harness, message):
    harness.take(message)
    harness.still_works()


@fuzz(
    questions(
        Predict.Request,
        joint=st.booleans(),
        num_samples=st.integers(0, MAX_SAMPLES) | UINT32,
    )
)
def test_no_request_for_a_prediction_harms_the_map(harness, message):
    harness.take(message)
    harness.still_works()


@fuzz(st.one_of(*COMMANDS))
def test_no_request_about_the_map_damages_it(harness, message):
    harness.take(message)
    harness.still_works()


@fuzz(states())
def test_no_map_of_a_peer_changes_the_own_map(harness, message):
    harness.take(message)
    harness.still_works()


# Bytes ------------------------------------------------------------------------------------------


def mutated(data, random):
    """Return bytes with one to four faults: set, flipped, inserted, left out, repeated, cut."""
    data = bytearray(data)
    for _ in range(random.integers(1, 5)):
        at = int(random.integers(4, max(5, len(data))))  # behind the kind of encoding
        size = int(random.choice([1, 4, 8, 64]))
        number = int(random.choice([0, 1, 255, 2**16, 2**31, 2**32 - 1, len(data)]))
        fault = random.integers(6)
        if fault == 0:
            data[at - at % 4 : at - at % 4 + 4] = number.to_bytes(4, 'little')
        elif fault == 1:
            data[at : at + 1] = [byte ^ 1 << int(random.integers(8)) for byte in data[at : at + 1]]
        elif fault == 2:
            data[at:at] = random.bytes(size)
        elif fault == 3:
            del data[at : at + size]
        elif fault == 4:
            data[at:at] = data[at : at + size]
        else:
            del data[at:]
    return bytes(data)


@pytest.mark.timeout(TEST_TIMEOUT_SEC)
@pytest.mark.parametrize('kind', GOOD)
def test_no_fault_in_the_bytes_of_a_message_harms_the_map(harness, kind):
    good = GOOD[kind]()
    harness.take(good)
    data, random = serialize_message(good), np.random.default_rng(list(GOOD).index(kind))
    for _ in range(8 * EXAMPLES):
        try:
            message = deserialize_message(mutated(data, random), type(good))
        except Exception:  # of any kind: such bytes do not reach the node
            harness.tally['bytes that are no message'] += 1
            continue
        harness.take(message)
    harness.still_works()


# Sizes ------------------------------------------------------------------------------------------


def too_large():
    """Return messages just over the limits, by name."""
    points, targets, joint = ([[1.0, 2.0]] * (n + 1) for n in (MAX_POINTS, MAX_TARGETS, MAX_JOINT))
    columns = dict.fromkeys('xyz', np.ones(MAX_POINTS + 1))
    question = {'header': good_header(), 'dim_x': 2}
    values = [[0.1]] * len(points)
    return {
        'points of a cloud': cloud_from_points(columns, good_header()),
        'observations': message_from_observations(points, values, good_header()),
        'targets of a query': Query(**question, x=np.ravel(targets).tolist()),
        'targets': Predict.Request(**question, x=np.ravel(targets).tolist()),
        'joint': Predict.Request(**question, x=np.ravel(joint).tolist(), joint=True),
        'samples': Predict.Request(**question, x=[1.0, 2.0], num_samples=MAX_SAMPLES + 1),
    }


@pytest.mark.parametrize('name', too_large())
def test_message_over_a_limit_is_refused(harness, name):
    message, before = too_large()[name], counts(harness.node)
    harness.take(message)
    points, messages = counts(harness.node)
    assert points.received == before[0].received, 'a point was taken in'
    if name in ('points of a cloud', 'observations'):
        assert messages.rejected['too_many_points'] > before[1].rejected.get('too_many_points', 0)
    harness.still_works()


@pytest.mark.parametrize('text', ['a' * 99_999, 'a\n[ERROR] forged', '\x1b[2J\u202e'])
def test_names_from_outside_make_no_long_and_no_forged_line(harness, text):
    cloud = good_cloud()
    cloud.fields = [PointField(name=text)]
    elsewhere = good_cloud()
    elsewhere.header.frame_id = text
    query, request = good_query(), good_request()
    query.header.frame_id = request.header.frame_id = text
    for message in (cloud, elsewhere, query, request, LoadState.Request(name=text)):
        harness.take(message)
    harness.still_works()


def test_points_that_are_not_finite_are_counted_and_the_others_folded(harness):
    columns = {'x': [1.0, np.nan, 3.0], 'y': [1.0, 2.0, np.inf], 'z': [0.1, 0.2, 0.3]}
    before = counts(harness.node)[0]
    harness.take(cloud_from_points(columns, good_header()))
    after = counts(harness.node)[0]
    assert after.folded == before.folded + 1
    assert after.rejected['not_finite'] == before.rejected.get('not_finite', 0) + 2


def huge_claims():
    """Return messages that claim more than fits in memory, and hold little."""
    cloud = good_cloud()
    cloud.width = cloud.height = 2**16
    wide = good_cloud()
    wide.width, wide.row_step = 2**32 - 1, 2**32 - 1
    numbers = good_observations()
    numbers.dim_x = numbers.dim_y = 2**32 - 1
    query, request, samples = good_query(), good_request(), good_request()
    query.dim_x = request.dim_x = 2**32 - 1
    samples.num_samples = 2**32 - 1
    return [cloud, wide, numbers, query, request, samples]


@pytest.mark.parametrize('message', huge_claims(), ids=lambda message: type(message).__name__)
def test_message_that_claims_to_be_huge_takes_no_memory(harness, message):
    tracemalloc.start()  # numpy reports to it, too
    try:
        harness.take(message)
        used = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    largest = sum(len(part) for part in content(harness.node)[1].values())
    assert used < 4 * largest + 2**22, 'more than to compare the map before and after'
    harness.still_works()


def peak_memory():
    """Return the most memory that this process ever had [bytes]."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize('kind', GOOD)
def test_length_of_a_sequence_is_not_believed(harness, kind):
    data, before = serialize_message(GOOD[kind]()), peak_memory()
    for at in range(4, min(len(data), 400) - 3, 4):  # each place where a length can be
        for length in (MANY - 1, MANY // 16):
            claimed = data[:at] + length.to_bytes(4, 'little') + data[at + 4 :]
            try:
                deserialize_message(claimed, type(GOOD[kind]()))
            except Exception:
                harness.tally['bytes that are no message'] += 1
    assert peak_memory() - before < 2**27


# Sums -------------------------------------------------------------------------------------------


def test_huge_and_finite_values_leave_the_map_finite(harness):
    largest = float(np.finfo(np.float32).max)
    for x in (largest, 1e13, 1e12, 24.0):
        for y in (largest, 1.01e6, 0.99e6, -0.99e6):
            rows = np.array([[x, x], [-x, x], [x / 3, -x / 7]])
            harness.take(message_from_observations(rows, [[y], [-y], [y]], good_header()))
    harness.still_works()


def test_fold_that_would_not_be_finite_is_rolled_back_and_counted(harness):
    weights = list(harness.node.field.model.encoder.parameters())
    good = [weight.clone() for weight in weights]
    before, (points, messages) = content(harness.node), counts(harness.node)
    with torch.no_grad():
        for weight in weights:
            weight.fill_(torch.nan)
    try:
        harness.take(good_observations())
    finally:
        with torch.no_grad():
            for weight, value in zip(weights, good, strict=True):
                weight.copy_(value)
    assert content(harness.node) == before
    more_points, more_messages = counts(harness.node)
    reason = 'not_finite_state'
    assert more_points.rejected[reason] == points.rejected.get(reason, 0) + 2
    assert more_messages.rejected[reason] == messages.rejected.get(reason, 0) + 1
    harness.still_works()


def test_stamp_that_is_later_than_any_time_stops_no_answer(harness):
    cloud = good_cloud()
    cloud.header.stamp.sec, cloud.header.stamp.nanosec = 2**31 - 1, 2**32 - 1
    harness.take(cloud)
    now = harness.node.get_clock().now()
    assert Time.from_msg(harness.node.header().stamp, now.clock_type) <= now, 'not that for ever'
    harness.still_works()
    harness.node.status.publish()


def test_peer_that_claims_any_number_of_observations_stops_no_answer(harness):
    for count in (2**53 - 1, 2**70):
        harness.take(peer_state('boaster', num_observations=count))
    harness.still_works()


def multiply(tensor, factor):
    """Multiply in place, in the tensor's type."""
    tensor.copy_((tensor.double() * factor).clamp(-1.7e308, 1.7e308))


@pytest.fixture
def liar(harness):
    """Have a peer leave that sent what it was told to send."""
    yield 'liar'
    harness.node.fleet._peers.pop('liar', None)
    harness.node.fleet._combined = None


@pytest.mark.parametrize('factor', [-1e3, 1e-12, 1e300])
@pytest.mark.parametrize('name', other_map()[1].tensors())
def test_peer_with_sums_that_no_observations_give_stops_no_answer(harness, liar, name, factor):
    harness.node.intake._calibrated_at = -np.inf  # compare with the prediction now
    harness.take(peer_state(liar, change=lambda tensors: multiply(tensors[name], factor)))
    harness.still_works()
