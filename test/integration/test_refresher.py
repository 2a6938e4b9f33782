"""A node that gets help from a second process, and does without it again."""

from concurrent.futures import Future

import numpy as np
import pytest
from cmanp_ros.msg import Prediction, Query
from conftest import wait_for, wait_until_folded
from rclpy.qos import qos_profile_sensor_data
from sensor_msgs.msg import PointCloud2
from std_srvs.srv import Trigger
from test_node import cloud, height, query
from test_node import scattered as scattered_widely

from cmanp_ros import refresher
from cmanp_ros.conversions import predictions_from_message

pytestmark = pytest.mark.timeout(120)


def scattered(num_points, seed=0):
    """Return locations that fewer tiles cover than are solved together, (n, 2) [m]."""
    return scattered_widely(num_points, seed) / 10


@pytest.fixture
def publish(client):
    """Return a function that publishes scattered points."""
    publishers = []

    def publish(num_points, seed=0, sec=7):
        if not publishers:
            publishers.append(client.publisher(PointCloud2, 'points', qos_profile_sensor_data))
        publishers[0].publish(cloud(scattered(num_points, seed), sec=sec))

    return publish


@pytest.fixture
def helped(start_node, publish, monkeypatch):
    """Return a node that has help, and was asked everywhere."""
    monkeypatch.setattr(refresher, '_num_cores', lambda: 2)
    node = start_node()
    node.in_background(node.refresher._get_help).result()
    wait_for(lambda: node.refresher._helper.is_ready)
    publish(211)
    wait_until_folded(node, 211)
    node.field.predict(scattered(301, seed=9))
    return node


@pytest.fixture
def held(helped, monkeypatch):
    """Return a helped node, and a list that its solutions wait in until they are let go."""
    waiting, solve = [], helped.refresher._helper.solve

    def slowly(request):
        future, result = solve(request), Future()
        waiting.append(lambda: result.set_result(future.result(60)))
        return result

    monkeypatch.setattr(helped.refresher._helper, 'solve', slowly)
    return helped, waiting


def test_a_node_that_is_late_again_keeps_the_help_it_has(helped, monkeypatch):
    """Another one would have to start first, and answers would get old meanwhile."""
    helper = helped.refresher._helper
    monkeypatch.setattr(type(helped.worker), 'num_waiting', 1)
    for _ in range(2 * refresher.PATIENCE):
        helped.in_background(helped.refresher.end_fold).result()
    assert helped.refresher._helper is helper and helper.is_ready


def ask(node, client, x, query_id):
    """Return mean and stddev that the node answers, and the message."""
    found = client.collect(Prediction, 'cmanp/prediction', 10)
    queries = client.publisher(Query, 'query')
    wait_for(lambda: client.node.count_publishers('cmanp/prediction'))
    queries.publish(query(x, query_id))
    answer = wait_for(lambda: [each for each in found if each.id == query_id])[0]
    return np.array(predictions_from_message(answer)[:2]), answer


def test_answers_have_what_was_folded_before_until_the_helper_is_through(held, client, publish):
    (node, waiting), x = held, scattered(31, seed=3)
    before = node.field.predict(x)
    publish(101, seed=1, sec=8)
    wait_for(lambda: waiting)
    publish(102, seed=2, sec=9)
    wait_for(lambda: node.field.num_observations == 414)
    assert node.refresher.is_behind and len(waiting) == 1
    found, answer = ask(node, client, x, 1)
    assert answer.header.stamp.sec == 7 and answer.num_observations == 211
    np.testing.assert_allclose(found, before, rtol=1e-4, atol=1e-5)

    waiting[0]()
    wait_for(lambda: len(waiting) == 2)
    answer = ask(node, client, x, 2)[1]
    assert answer.header.stamp.sec == 8 and answer.num_observations == 312
    waiting[1]()
    wait_for(lambda: len(waiting) == 3)  # what is exact comes last
    answer = ask(node, client, x, 3)[1]
    assert answer.header.stamp.sec == 9 and answer.num_observations == 414
    assert node.refresher.is_behind
    waiting[2]()
    wait_for(lambda: not node.refresher.is_behind)
    found, answer = ask(node, client, x, 4)
    assert answer.header.stamp.sec == 9 and answer.num_observations == 414
    other = node.field.empty_like(2048)
    for count, seed in ((211, 0), (101, 1), (102, 2)):
        other.observe(scattered(count, seed).astype(np.float32), height(scattered(count, seed)))
    np.testing.assert_allclose(found, other.predict(x), rtol=1e-3, atol=1e-4)


def test_while_observations_wait_answers_have_all_and_are_exact_later(
    start_node, client, publish, monkeypatch
):
    node, x = start_node(max_processes=1), scattered(31, seed=3)
    publish(211)
    wait_until_folded(node, 211)
    node.field.predict(scattered(301, seed=9))
    with monkeypatch.context() as waiting:
        waiting.setattr(type(node.worker), 'num_waiting', 1)
        publish(11, seed=1, sec=8)
        wait_for(lambda: node.field.num_observations == 222)
        wait_for(lambda: node.refresher.shown == (8 * 10**9, 222))
        assert node.refresher.is_behind and not node.field.is_settled
        assert node.refresher.exact == (7 * 10**9, 211)  # what grids say that they have
        assert ask(node, client, x, 1)[1].num_observations == 222
    publish(7, seed=2, sec=9)
    wait_until_folded(node, 229)
    assert node.field.is_settled and node.refresher.exact == (9 * 10**9, 229)
    other = node.field.empty_like(2048)
    for count, seed in ((211, 0), (11, 1), (7, 2)):
        other.observe(scattered(count, seed).astype(np.float32), height(scattered(count, seed)))
    found = ask(node, client, x, 2)[0]
    np.testing.assert_allclose(found, other.predict(x), rtol=1e-3, atol=1e-4)


def test_what_is_solved_for_a_map_that_was_reset_counts_for_nothing(held, client, publish):
    node, waiting = held
    publish(101, seed=1, sec=8)
    wait_for(lambda: waiting)
    assert client.call(Trigger, 'cmanp/reset', Trigger.Request()).success
    assert not node.refresher.is_behind
    waiting[0]()
    wait_for(lambda: not node.refresher._is_helped)
    assert not node.refresher.is_behind
    answer = ask(node, client, scattered(3), 1)[1]
    assert answer.num_observations == 0
    publish(17, seed=4, sec=10)
    wait_until_folded(node, 17)


def test_node_goes_on_when_its_helper_is_killed(helped, client, publish):
    helped.refresher._helper.process.kill()
    for count, seed in ((312, 1), (413, 2)):
        publish(101, seed, sec=10 + seed)
        wait_until_folded(helped, count)
    assert helped.refresher._helper is None
    x = scattered(31, seed=3)
    found, answer = ask(helped, client, x, 1)
    assert answer.num_observations == 413
    np.testing.assert_allclose(found, helped.field.predict(x), rtol=1e-4, atol=1e-5)


def test_node_goes_on_when_no_helper_can_be_started(start_node, publish, monkeypatch):
    def fail(*_):
        raise OSError('no memory')

    monkeypatch.setattr(refresher, '_num_cores', lambda: 2)
    monkeypatch.setattr(refresher, 'Helper', fail)
    node = start_node()
    node.in_background(node.refresher._get_help).result()
    publish(211)
    wait_until_folded(node, 211)
    assert not node.refresher._may_have_helper


@pytest.mark.parametrize('max_processes', [1, 2])
def test_help_comes_once_one_process_does_not_keep_up(
    start_node, publish, monkeypatch, max_processes
):
    monkeypatch.setattr(refresher, 'PATIENCE', 2)
    monkeypatch.setattr(refresher, '_num_cores', lambda: 2)
    node = start_node(max_processes=max_processes)
    observe = node.fleet.observe

    def slowly(*points):
        publish(3, sec=8)  # before these are folded, others wait
        wait_for(lambda: node.worker.num_waiting or node.field.num_observations > 11)
        return observe(*points)

    monkeypatch.setattr(node.fleet, 'observe', slowly)
    publish(3)
    wait_for(lambda: node.field.num_observations > 11)
    monkeypatch.undo()
    assert (node.refresher._helper is not None) == (max_processes == 2)
