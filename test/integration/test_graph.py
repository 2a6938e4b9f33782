"""What a node sees of real publishers over Fast DDS: types, QoS, likely mistakes, the clock."""

import pytest
import rclpy
from cmanp_ros.msg import Prediction
from conftest import wait_for
from rclpy.parameter import Parameter
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import PointCloud2
from std_msgs.msg import String

from cmanp_ros.graph import look, look_at_clock, subscriptions
from cmanp_ros.health import ClockView

CLOUD = 'sensor_msgs/msg/PointCloud2'
BEST_EFFORT = QoSProfile(depth=7, reliability=ReliabilityPolicy.BEST_EFFORT)
RELIABLE = QoSProfile(depth=7, reliability=ReliabilityPolicy.RELIABLE)
LATCHED = QoSProfile(depth=7, durability=DurabilityPolicy.TRANSIENT_LOCAL)


@pytest.fixture
def looker(domain_id):
    """Return a node in a context of its own, as the publishers are in another process."""
    context = rclpy.Context()
    rclpy.init(context=context, domain_id=domain_id)
    yield rclpy.create_node('looker', context=context, namespace='robot1')
    rclpy.try_shutdown(context=context)


def discovered(looker, topic, qos=BEST_EFFORT, num_publishers=1, **kwargs):
    """Return the view of a topic once its publishers and their nodes are known."""

    def view():
        found = look(looker, topic, CLOUD, qos, **kwargs)
        named = [p for p in found.publishers if p.node.startswith('/')]
        return found if len(named) == num_publishers else None

    return wait_for(view)


def test_publisher_is_seen_with_node_type_and_qos(looker, client):
    client.node.create_publisher(PointCloud2, '/robot1/points', LATCHED)
    (publisher,) = discovered(looker, '/robot1/points').usable
    assert (publisher.node, publisher.type) == ('/client', CLOUD)
    assert publisher.qos == 'reliable, transient local'


def test_topic_without_a_publisher_has_none(looker, client):
    view = look(looker, '/robot1/points', CLOUD, BEST_EFFORT)
    assert view.publishers == view.usable == view.similar == ()


@pytest.mark.parametrize(
    ('offered', 'asked', 'words'),
    [
        (BEST_EFFORT, RELIABLE, ['best effort publisher and reliable subscription']),
        (RELIABLE, LATCHED, ['volatile publisher and transient local subscription']),
        (BEST_EFFORT, LATCHED, ['best effort', 'reliable', 'volatile', 'transient local']),
        (BEST_EFFORT, BEST_EFFORT, None),
        (RELIABLE, BEST_EFFORT, None),
        (LATCHED, RELIABLE, None),
    ],
)
def test_qos_that_cannot_connect_is_named_with_both_policies(
    looker, client, offered, asked, words
):
    client.node.create_publisher(PointCloud2, '/points', offered)
    view = discovered(looker, '/points', asked)
    assert bool(view.usable) == (words is None)
    for word in words or ():
        assert word in view.publishers[0].conflict


def test_judgement_of_qos_is_what_really_happens(looker, client):
    """The graph's word is compared with DDS: who is matched, and who is not."""
    publisher = client.node.create_publisher(PointCloud2, '/points', BEST_EFFORT)
    strict = looker.create_subscription(PointCloud2, '/points', print, RELIABLE)
    lax = looker.create_subscription(PointCloud2, '/points', print, BEST_EFFORT)
    wait_for(lax.get_publisher_count)
    wait_for(lambda: publisher.get_subscription_count() == 1)
    for subscription, qos in ((strict, RELIABLE), (lax, BEST_EFFORT)):
        usable = discovered(looker, '/points', qos).usable
        assert len(usable) == subscription.get_publisher_count()


def test_wrong_type_is_seen_and_a_topic_of_the_right_one_proposed(looker, client):
    client.node.create_publisher(String, '/points', 7)
    client.node.create_publisher(PointCloud2, '/cloud', 7)
    wait_for(lambda: looker.count_publishers('/cloud'))
    view = discovered(looker, '/points')
    assert [p.type for p in view.publishers] == ['std_msgs/msg/String']
    assert view.right_type == () and view.similar == ('/cloud',)


def test_most_similar_name_comes_first_and_other_types_not_at_all(looker, client):
    for topic in ('/camera/depth', '/robot1/lidar/points', '/robot2/points', '/z'):
        client.node.create_publisher(PointCloud2, topic, 7)
    client.node.create_publisher(String, '/robot1/point', 7)
    client.node.create_subscription(PointCloud2, '/robot1/pointz', print, 7)
    topics = ['/robot2/points', '/robot1/lidar/points', '/camera/depth']
    wait_for(lambda: len(look(looker, '/robot1/points', CLOUD, BEST_EFFORT).similar) == 3)
    wait_for(lambda: looker.count_publishers('/z') and looker.count_publishers('/robot1/point'))
    assert look(looker, '/robot1/points', CLOUD, BEST_EFFORT).similar == tuple(topics)


def test_own_outputs_are_not_proposed(looker, client):
    looker.create_publisher(PointCloud2, '/robot1/pointss', 7)
    client.node.create_publisher(PointCloud2, '/elsewhere', 7)
    discovered(looker, '/robot1/pointss')
    discovered(looker, '/elsewhere')
    view = look(looker, '/robot1/points', CLOUD, BEST_EFFORT)
    assert view.similar == ('/elsewhere',)
    view = look(looker, '/robot1/points', CLOUD, BEST_EFFORT, reader='/client')
    assert view.similar == ('/robot1/pointss',)


def test_what_another_map_predicts_is_not_proposed(looker, client):
    client.node.create_publisher(PointCloud2, '/robot2/cmanp/field', 7)
    client.node.create_publisher(Prediction, '/robot2/cmanp/prediction', 7)
    client.node.create_publisher(PointCloud2, '/robot2/lidar', 7)
    wait_for(lambda: looker.count_publishers('/robot2/cmanp/prediction'))
    wait_for(lambda: looker.count_publishers('/robot2/cmanp/field'))
    wait_for(lambda: look(looker, '/robot2/points', CLOUD, BEST_EFFORT).similar)
    assert look(looker, '/robot2/points', CLOUD, BEST_EFFORT).similar == ('/robot2/lidar',)


def test_subscriptions_of_another_node_are_seen_with_their_qos(looker, client):
    client.node.create_subscription(PointCloud2, 'points', print, LATCHED)
    found = wait_for(lambda: subscriptions(looker, '/client'))
    kind, qos = found['/points']
    assert kind == CLOUD and qos.durability == DurabilityPolicy.TRANSIENT_LOCAL
    assert subscriptions(looker, '/nobody') == {}


def test_clock_of_the_system_runs(looker):
    first = look_at_clock(looker)
    assert first == ClockView(use_sim_time=False, has_publisher=False, is_running=True)
    assert look_at_clock(looker, looker.get_clock().now().nanoseconds - 1).is_running


def test_simulated_clock_is_seen_to_be_missing_to_stand_and_to_run(looker, client):
    looker.set_parameters([Parameter('use_sim_time', value=True)])
    assert look_at_clock(looker) == ClockView(True, False, False)

    publisher = client.node.create_publisher(Clock, '/clock', 7)
    wait_for(publisher.get_subscription_count)

    def advance(sec):
        message = Clock()
        message.clock.sec = sec
        publisher.publish(message)
        rclpy.spin_once(looker, executor=executor, timeout_sec=0.05)
        return looker.get_clock().now().nanoseconds == sec * 10**9

    executor = rclpy.executors.SingleThreadedExecutor(context=looker.context)
    executor.add_node(looker)
    wait_for(lambda: advance(7))
    assert look_at_clock(looker) == ClockView(True, True, True)
    assert look_at_clock(looker, 7 * 10**9) == ClockView(True, True, False)
    wait_for(lambda: advance(11))
    assert look_at_clock(looker, 7 * 10**9) == ClockView(True, True, True)
    executor.shutdown()
