"""The doctor finds each failure, made for real over Fast DDS, and says what to do."""

import sys
import types

import numpy as np
import pytest
import rclpy
from conftest import wait_for
from diagnostic_msgs.msg import DiagnosticStatus
from geometry_msgs.msg import TransformStamped
from rclpy.lifecycle import LifecycleNode
from rclpy.qos import DurabilityPolicy, QoSProfile, qos_profile_sensor_data
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import PointCloud2
from std_msgs.msg import Header, String
from std_srvs.srv import SetBool

from cmanp_ros.cli import doctor
from cmanp_ros.conversions import cloud_from_points
from cmanp_ros.graph import node_names

PERIOD_SEC = 0.05
NUM_POINTS = 31


class Report:
    """What the doctor printed, and its exit status."""

    def __init__(self):
        self.lines, self.status = [], None

    @property
    def last(self):
        """Return the sentence that says what to do."""
        return self.lines[-1]

    def line(self, title):
        """Return the mark and the text of the line with a title."""
        (found,) = [line for line in self.lines if line[11:25].strip() == title]
        return found[:11].strip(), found[25:]

    def __str__(self):
        return '\n'.join(self.lines)


@pytest.fixture
def examine(domain_id, client):
    """
    Return a function that has the doctor look, from a context of its own.

    A node stays in that context, so that it need not be discovered anew: that can take 3 s.
    """
    context = rclpy.Context()
    rclpy.init(context=context, domain_id=domain_id)
    resident = rclpy.create_node('resident', context=context)

    def is_discovered():
        names = {node.get_fully_qualified_name() for node in (client.node, *client.nodes)}
        topics = {publisher.topic_name for publisher in client.node.publishers}
        return names <= set(node_names(resident)) and all(map(resident.count_publishers, topics))

    def look(timeout_sec=0.6, **kwargs):
        wait_for(is_discovered)
        report = Report()
        report.status = doctor.examine(
            context, timeout_sec=timeout_sec, show=report.lines.append, **kwargs
        )
        print(report)  # pytest shows it when a test fails
        return report

    yield look
    rclpy.try_shutdown(context=context)


def cloud(frame_id='map', fields='xyz', shift=0.0):
    """Return a cloud in the workspace, if it is not shifted out of it [m]."""
    values = np.random.default_rng(0).uniform(-9, 9, (NUM_POINTS, len(fields))) + shift
    return cloud_from_points(dict(zip(fields, values.T, strict=True)), Header(frame_id=frame_id))


def publish(client, message, topic='points', qos=qos_profile_sensor_data):
    """Publish a message again and again, stamped, as a sensor does."""
    publisher = client.node.create_publisher(type(message), topic, qos)

    def send():
        if hasattr(message, 'header'):
            message.header.stamp = client.node.get_clock().now().to_msg()
        publisher.publish(message)

    client.node.create_timer(PERIOD_SEC, send)
    return publisher


def test_healthy_node(start_node, client, examine):
    node = start_node(status_rate=20.0, queue_size=1000)
    publish(client, cloud())
    wait_for(lambda: node.field.num_observations)
    report = examine()
    assert report.status == 0
    assert report.last.startswith('Healthy [folding]')
    assert report.line('node') == ('ok', 'found, active')
    assert report.line('points') == ('ok', "'/points' (sensor_msgs/msg/PointCloud2)")
    for words in ('/client publishes', 'best effort, volatile', 'messages heard, ', ' Hz'):
        assert words in str(report)
    assert 'stamps are' not in str(report)


def test_no_node(client, examine):
    report = examine()
    assert report.status == 1
    assert '[no_node]' in report.last and 'ros2 launch' in report.last
    ours, others = (line for line in report.lines if line[11:25].strip() == 'ROS')
    assert f'ROS_DOMAIN_ID {client.node.context.get_domain_id()}' in ours
    assert 'other computers are not seen' in others  # see conftest


def test_no_node_here_but_in_another_namespace(start_node, examine):
    start_node(activate=False, namespace='/robot1')
    report = examine()
    assert '[no_node]' in report.last and '--namespace /robot1 --name cmanp' in report.last
    assert '[not_active]' in examine(namespace='robot1').last


def test_node_that_is_not_active(start_node, examine):
    node = start_node(activate=False)
    report = examine()
    assert report.status == 1
    assert '[not_active]' in report.last and 'unconfigured' in report.last
    node.trigger_configure()
    report = examine()
    assert '[not_active]' in report.last and 'inactive' in report.last


def test_node_that_does_not_answer(client, context, examine):
    """A node of that name without its services, as seen when its process hangs."""
    client.nodes.append(
        rclpy.create_node('cmanp', context=context, start_parameter_services=False)
    )
    report = examine()
    assert report.status == 1 and '[no_answer]' in report.last


@pytest.mark.parametrize(
    ('level', 'message', 'state'),
    [
        (b'\x01', 'overconfident: errors are larger than the map says: see why', 'overconfident'),
        (b'\x00', 'folding: 7 observations in the map', 'no_publisher'),
        (b'\x01', 'something else: that is no state', 'no_publisher'),
    ],
)
def test_word_of_the_node_counts_unless_more_is_wrong(client, examine, level, message, state):
    """A node of another make, which says of itself what ours would say after hours."""
    node = LifecycleNode('cmanp', context=client.node.context)
    client.nodes.append(node)
    client.node.executor.add_node(node)
    node.trigger_configure()
    node.trigger_activate()
    latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
    status = node.create_publisher(DiagnosticStatus, '~/status', latched)
    status.publish(DiagnosticStatus(level=level, message=message))
    report = examine()
    assert report.status == 1
    assert f'[{state}]' in report.last
    assert report.line('its status')[1] == message


def test_nobody_publishes_but_something_like_it_is_there(start_node, client, examine):
    start_node(status_rate=20.0)
    publish(client, cloud(), 'lidar/points')
    report = examine()
    assert report.status == 1
    assert '[no_publisher]' in report.last
    assert 'remap points:=/lidar/points' in report.last
    assert '/cmanp/field' not in report.last, 'the own output'
    assert report.line('points')[0] == 'warn'


def test_topic_that_was_remapped_is_found(start_node, client, examine, monkeypatch):
    from cmanp_ros.node import CMANPNode

    init = CMANPNode.__init__
    remap = ['--ros-args', '-r', 'points:=/lidar/points']
    monkeypatch.setattr(
        CMANPNode, '__init__', lambda self, **kwargs: init(self, cli_args=remap, **kwargs)
    )
    node = start_node(status_rate=20.0, queue_size=1000)
    publish(client, cloud(), 'lidar/points')
    wait_for(lambda: node.field.num_observations)
    report = examine()
    assert report.status == 0
    assert report.line('points')[1].startswith("'/lidar/points'")


def test_wrong_type(start_node, client, examine):
    start_node(status_rate=20.0)
    publish(client, String(), 'points')
    report = examine()
    assert report.status == 1
    for words in ('[wrong_type]', 'std_msgs/msg/String from /client', 'PointCloud2'):
        assert words in report.last
    assert report.line('points')[0] == 'problem'


def test_qos_that_cannot_connect(start_node, client, examine):
    start_node(status_rate=20.0, **{'qos_overrides./points.subscription.reliability': 'reliable'})
    publish(client, cloud())
    report = examine()
    assert report.status == 1
    assert '[incompatible_qos]' in report.last
    assert 'best effort publisher and reliable subscription' in report.last


def test_publisher_that_says_nothing(start_node, client, examine):
    start_node(status_rate=20.0)
    client.node.create_publisher(PointCloud2, 'points', 7)
    report = examine()
    assert report.status == 1
    assert '[no_messages]' in report.last and '/client' in report.last


def test_missing_field_is_named_with_those_that_exist(start_node, client, examine):
    start_node(status_rate=20.0, value_field='intensity')
    publish(client, cloud())
    report = examine()
    assert report.status == 1
    for words in ('[field_missing]', "'intensity'", 'x', 'y', 'z', 'value_field'):
        assert words in report.last


def test_all_points_outside(start_node, client, examine):
    node = start_node(status_rate=20.0, one_tile=True)
    publish(client, cloud(shift=500.0))
    wait_for(lambda: 'outside_workspace' in str(examine()))
    report = examine()
    assert report.status == 1
    assert '[all_outside]' in report.last and 'bounds_min' in report.last
    assert node.field.num_observations == 0


def test_paused_node(start_node, client, examine):
    """It comes before what else is wrong: as long as it is paused nothing else matters."""
    start_node(status_rate=20.0)
    publish(client, String(), 'points')
    client.call(SetBool, 'cmanp/pause', SetBool.Request(data=True))
    report = examine()
    assert report.status == 1
    assert '[paused]' in report.last
    client.call(SetBool, 'cmanp/pause', SetBool.Request(data=False))
    assert '[wrong_type]' in examine().last


def test_simulated_time_without_a_clock(start_node, client, examine):
    node = start_node(status_rate=20.0, queue_size=1000, use_sim_time=True)
    report = examine()
    assert report.status == 1
    assert '[clock_not_running]' in report.last and '--clock' in report.last
    assert report.line('clock')[0] == 'problem'

    clock, message = client.node.create_publisher(Clock, '/clock', 7), Clock()

    def tick():
        message.clock.nanosec += 10_000_000
        clock.publish(message)

    client.node.create_timer(0.01, tick)
    publish(client, cloud())
    wait_for(lambda: node.field.num_observations)
    report = examine()
    assert report.line('clock') == ('ok', 'simulated time on /clock runs')
    assert report.status == 0
    assert 'ahead of /clock' in str(report), 'the client stamps with the time of the system'


def test_source_in_another_frame(start_node, client, examine, connect):
    start_node(status_rate=20.0)
    publish(client, cloud(frame_id='lidar'))
    report = examine()
    assert report.status == 1
    assert '[no_transform]' in report.last
    assert "'map' <- 'lidar'" in report.last

    connect()
    report = examine()
    assert "frame 'lidar', map_frame 'map': TF connects them" in str(report)


@pytest.fixture(params=['stand-in', 'tf2_ros'])
def connect(request, client, monkeypatch):
    """Return what connects the frame 'lidar' to the map: in tf2, and in a stand-in for it."""
    if request.param == 'stand-in':
        return stand_in(monkeypatch)
    tf2_ros = pytest.importorskip('tf2_ros', reason='tf2_ros is not installed')

    def broadcast():
        connection = TransformStamped(child_frame_id='lidar')
        connection.header.frame_id, connection.transform.rotation.w = 'map', 1.0
        client.broadcaster = tf2_ros.StaticTransformBroadcaster(client.node)
        client.broadcaster.sendTransform(connection)

    return broadcast


def stand_in(monkeypatch):
    """Put the part of tf2_ros that the doctor asks in its place."""
    module, connected = types.ModuleType('tf2_ros'), []

    class Buffer:
        def can_transform(self, target, source, at):
            assert (target, source) == ('map', 'lidar')
            return bool(connected)

    module.Buffer = Buffer
    module.TransformListener = lambda buffer, node, spin_thread: None
    monkeypatch.setitem(sys.modules, 'tf2_ros', module)
    monkeypatch.setattr(doctor, 'find_spec', lambda name: True)
    return lambda: connected.append(True)


def test_without_tf2_it_says_that_it_has_not_looked(start_node, client, examine, monkeypatch):
    monkeypatch.setattr(doctor, 'find_spec', lambda name: None)
    start_node(status_rate=20.0)
    publish(client, cloud(frame_id='lidar'))
    assert 'TF was not checked' in str(examine())


def test_old_stamps_are_noticed(start_node, client, examine):
    node = start_node(status_rate=20.0)
    message = cloud()
    message.header.stamp.sec = 7
    publisher = client.node.create_publisher(PointCloud2, 'points', qos_profile_sensor_data)
    client.node.create_timer(PERIOD_SEC, lambda: publisher.publish(message))
    wait_for(lambda: node.field.num_observations)
    report = examine()
    assert "behind this computer's clock" in str(report)


def test_doctor_leaves_nothing_behind(start_node, client, examine):
    start_node(status_rate=20.0)
    examine()
    wait_for(lambda: not [n for n in client.node.get_node_names() if 'doctor' in n])


def test_command_line_without_ros(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'rclpy', None)
    assert doctor.main([]) == 2
    assert 'ROS 2 was not found' in capsys.readouterr().err


def test_command_line_looks_in_the_domain_of_the_shell(domain_id, monkeypatch, capsys):
    monkeypatch.setenv('ROS_DOMAIN_ID', str(domain_id))
    monkeypatch.setenv('ROS_LOCALHOST_ONLY', '1')
    assert doctor.main(['--timeout', '0.3', '--namespace', 'robot1']) == 1
    printed = capsys.readouterr().out
    assert f'ROS_DOMAIN_ID {domain_id}' in printed
    assert 'other computers are not seen' in printed
    assert printed.splitlines()[-1].startswith('What to do [no_node]: there is no node /robot1/')


@pytest.mark.parametrize('value', ['0', '-1', 'nan', 'soon'])
def test_timeout_that_is_none_is_refused(value, capsys):
    with pytest.raises(SystemExit):
        doctor.main(['--timeout', value])
    assert 'timeout' in capsys.readouterr().err
