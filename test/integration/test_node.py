"""The node over Fast DDS: observations in, predictive distributions out."""

import array
import threading
import time

import numpy as np
import pytest
from cmanp_ros.msg import Observations, Prediction, Query
from cmanp_ros.srv import Predict
from conftest import wait_for, wait_until_folded
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from lifecycle_msgs.srv import ChangeState, GetState
from nav_msgs.msg import OccupancyGrid
from rcl_interfaces.msg import Parameter, ParameterValue
from rcl_interfaces.srv import SetParameters, SetParametersAtomically
from rclpy.qos import DurabilityPolicy, QoSProfile, qos_profile_sensor_data
from sensor_msgs.msg import PointCloud2
from std_msgs.msg import Header
from std_srvs.srv import SetBool, Trigger
from visualization_msgs.msg import MarkerArray

from cmanp_ros.conversions import (
    cloud_from_points,
    message_from_observations,
    predictions_from_message,
)
from cmanp_ros.core.errors import CheckpointError
from cmanp_ros.fleet import Fleet
from cmanp_ros.store import TileStore

LATCHED = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)


def header(frame_id='map', sec=7):
    """Return a header."""
    message = Header(frame_id=frame_id)
    message.stamp.sec = sec
    return message


def height(x):
    """Return the field of these tests, (n, 1) [m]."""
    return np.sin(x[:, :1] / 6) + 0.5 * np.cos(x[:, 1:] / 9)


def scattered(num_points, seed=0):
    """Return locations in the workspace, (n, 2) [m]."""
    return np.random.default_rng(seed).uniform(-24, 24, (num_points, 2))


def cloud(x, value=None, **kwargs):
    """Return a cloud of heights at x."""
    value = height(x)[:, 0] if value is None else value
    fields = {'x': x[:, 0], 'y': x[:, 1], 'z': value}
    return cloud_from_points(fields, header(**kwargs))


def query(x, query_id=11, **kwargs):
    """Return a query."""
    message = Query(header=header(**kwargs), id=query_id, dim_x=x.shape[1])
    message.x = array.array('f', x.astype(np.float32).ravel())
    return message


def request(x, **kwargs):
    """Return a request of the service."""
    message = Predict.Request(header=header(), dim_x=x.shape[1], **kwargs)
    message.x = array.array('f', x.astype(np.float32).ravel())
    return message


def counts(node):
    """Return the counters of points and of messages."""
    return node.intake.totals()


def test_cloud_in_prediction_out_on_topic_and_service(start_node, client):
    node = start_node()
    predictions = client.collect(Prediction, 'cmanp/prediction', 10)
    queries = client.publisher(Query, 'query')
    points = client.publisher(PointCloud2, 'points', qos_profile_sensor_data)
    wait_for(lambda: client.node.count_publishers('cmanp/prediction'))
    points.publish(cloud(scattered(701)))
    wait_until_folded(node, 701)

    target = scattered(53, seed=1)
    queries.publish(query(target))
    answer = wait_for(lambda: predictions)[0]
    mean, stddev, status = predictions_from_message(answer)
    assert (answer.id, answer.num_observations, answer.header.stamp.sec) == (11, 701, 7)
    assert answer.header.frame_id == 'map'
    assert not status.any()
    error = mean - height(target)
    assert np.sqrt(np.mean(error**2)) < 0.05
    assert np.mean(np.abs(error) < 1.645 * stddev) > 0.8

    response = client.call(Predict, 'cmanp/predict', request(target))
    assert response.success, response.message
    assert response.prediction.mean == answer.mean
    assert response.prediction.stddev == answer.stddev
    assert not response.covariance and not response.samples


def test_queries_that_wait_are_answered_together_and_each_its_own(start_node, client, monkeypatch):
    node = start_node()
    node.field.observe(scattered(301), height(scattered(301)))
    predictions = client.collect(Prediction, 'cmanp/prediction', 10)
    queries = client.publisher(Query, 'query')
    wait_for(lambda: client.node.count_publishers('cmanp/prediction'))
    wait_for(lambda: queries.get_subscription_count())
    calls, predict, gate = [], node.field.predict, threading.Event()
    monkeypatch.setattr(
        node.field, 'predict', lambda x, renew: calls.append(len(x)) or predict(x, renew)
    )
    node.worker.ask(lambda: gate.wait(10))
    targets = {number: scattered(size, seed=size) for number, size in enumerate((3, 0, 1, 17), 1)}
    for number, x in targets.items():
        queries.publish(query(x, number))
        wait_for(lambda number=number: len(node.answers._queries) == number)
    gate.set()
    wait_for(lambda: len(predictions) == len(targets))
    assert calls == [21]
    for answer, (number, x) in zip(predictions, targets.items(), strict=True):
        mean, stddev, _ = predictions_from_message(answer)
        assert answer.id == number and len(mean) == len(x)
        expected = predict(x.astype(np.float32).astype(np.float64))
        np.testing.assert_allclose([mean, stddev], expected, rtol=1e-4, atol=1e-6)


def hold_refresh(node, monkeypatch, gate):
    """Have a node solve what it folds only once an event is set."""
    refreshing = node.field.refreshing

    def slowly(x):
        while not gate.wait(0.01):
            yield
        yield from refreshing(x)

    monkeypatch.setattr(node.field, 'refreshing', slowly)


def test_query_does_not_wait_for_what_is_being_folded_and_says_so(start_node, client, monkeypatch):
    node = start_node()
    x, gate = scattered(31, seed=3), threading.Event()
    node.field.observe(scattered(301), height(scattered(301)))
    before = node.field.predict(x)
    hold_refresh(node, monkeypatch, gate)
    predictions = client.collect(Prediction, 'cmanp/prediction', 10)
    queries = client.publisher(Query, 'query')
    wait_for(lambda: client.node.count_publishers('cmanp/prediction'))
    client.publisher(PointCloud2, 'points', qos_profile_sensor_data).publish(cloud(scattered(211)))
    wait_for(lambda: node.field.num_observations == 512)
    queries.publish(query(x, 1))
    answer = wait_for(lambda: predictions)[0]
    mean, stddev, _ = predictions_from_message(answer)
    np.testing.assert_allclose([mean, stddev], before, rtol=1e-3, atol=1e-5)
    assert answer.num_observations == 301
    answer = client.call(Predict, 'cmanp/predict', request(x)).prediction
    assert (answer.num_observations, answer.header.stamp.sec) == (512, 7)
    now = predictions_from_message(answer)[:2]
    np.testing.assert_allclose(now, node.field.predict(x), rtol=1e-3, atol=1e-5)
    assert (stddev / now[1]).max() > 1.1  # of the first 301 alone
    gate.set()
    wait_until_folded(node, 512)
    queries.publish(query(x, 2))
    answer = wait_for(lambda: predictions[1:])[0]
    assert (answer.num_observations, answer.header.stamp.sec) == (512, 7)


def test_observations_in_prediction_out(start_node, client):
    node = start_node()
    publisher = client.publisher(Observations, 'observations', qos_profile_sensor_data)
    x = scattered(307)
    publisher.publish(message_from_observations(x, height(x), header()))
    wait_until_folded(node, 307)
    response = client.call(Predict, 'cmanp/predict', request(x[:31]))
    mean, *_ = predictions_from_message(response.prediction)
    assert np.abs(mean - height(x[:31])).max() < 0.2


def test_prediction_before_the_first_observation_is_the_prior(start_node, client):
    start_node(value_offset=300.0, value_scale=40.0)
    x = np.concatenate([scattered(29), [[400.0, 0.0], [np.nan, 0.0]]])
    prediction = client.call(Predict, 'cmanp/predict', request(x)).prediction
    mean, stddev, status = predictions_from_message(prediction)
    assert prediction.num_observations == 0
    assert status.tolist() == [0] * 30 + [2], 'with tiles nothing is outside'
    assert np.isnan(mean[-1]) and np.isnan(stddev[-1])
    assert np.all(np.abs(mean[:-1] - 300) < 40)
    assert np.all((stddev[:-1] > 10) & (stddev[:-1] < 200))


def test_joint_prediction_and_samples_are_consistent(start_node, client):
    node = start_node()
    points = client.publisher(PointCloud2, 'points', qos_profile_sensor_data)
    points.publish(cloud(scattered(97)))
    wait_until_folded(node, 97)
    x = np.stack([np.linspace(-20, 20, 41), np.full(41, 3.0)], 1)
    response = client.call(Predict, 'cmanp/predict', request(x, joint=True, num_samples=100))
    assert response.success, response.message
    mean, stddev, _ = predictions_from_message(response.prediction)
    covariance = np.asarray(response.covariance).reshape(41, 41)
    samples = np.asarray(response.samples).reshape(100, 41)
    np.testing.assert_allclose(np.sqrt(np.diag(covariance)), stddev[:, 0], rtol=1e-4)
    np.testing.assert_array_less(-1e-4, np.linalg.eigvalsh(covariance))
    assert np.abs(samples.mean(0) - mean[:, 0]).max() < 4 * stddev.max() / np.sqrt(100)
    deviation = samples - mean[:, 0]
    steps, spread = np.abs(np.diff(deviation, axis=1)), np.abs(np.diff(deviation, axis=0))
    assert steps.mean() < 0.6 * spread.mean(), 'samples are not smooth fields'


@pytest.mark.parametrize(
    ('arguments', 'expected'),
    [
        ({'dim_x': 3}, 'dim_x'),
        ({'joint': True, 'count': 30}, 'max_joint_targets'),
        ({'num_samples': 20, 'count': 3}, 'max_samples'),
        ({'count': 200}, 'max_targets'),
        ({'frame_id': ''}, 'frame_id'),
        ({'frame_id': 'nowhere'}, 'tf2'),
    ],
)
def test_request_that_cannot_be_served_says_why(start_node, client, arguments, expected):
    start_node(max_joint_targets=20, max_samples=10, max_targets=150, grid_resolution=10.0)
    arguments = dict(arguments)
    bad = request(scattered(arguments.pop('count', 6)))
    bad.header.frame_id = arguments.pop('frame_id', 'map')
    for name, value in arguments.items():
        setattr(bad, name, value)
    response = client.call(Predict, 'cmanp/predict', bad)
    assert not response.success
    assert expected in response.message
    assert not response.prediction.mean


def malformed(kind):
    """Return a cloud that cannot be used, and the reason under which it is counted."""
    x = scattered(13)
    message = cloud(x)
    if kind == 'missing_field':
        message.fields = message.fields[:2]
    elif kind == 'bad_size':
        message.data = message.data[:-5]
    elif kind == 'bad_datatype':
        message.fields[0].datatype = 99
    elif kind == 'bad_field_layout':
        message.fields[1].offset = 4000
    elif kind == 'no_frame':
        message.header.frame_id = ''
    elif kind == 'too_many_points':
        message = cloud(scattered(60))
    return message


@pytest.mark.parametrize(
    'reason',
    [
        'missing_field',
        'bad_size',
        'bad_datatype',
        'bad_field_layout',
        'no_frame',
        'too_many_points',
    ],
)
def test_malformed_cloud_is_counted_by_reason_and_changes_nothing(start_node, client, reason):
    node = start_node(max_points=50)
    points = client.publisher(PointCloud2, 'points', qos_profile_sensor_data)
    points.publish(cloud(scattered(23)))
    wait_for(lambda: counts(node)[0].folded == 23)
    before = node.field.version
    points.publish(malformed(reason))
    wait_for(lambda: counts(node)[1].rejected == {reason: 1})
    assert node.field.version == before
    points.publish(cloud(scattered(19)))
    wait_until_folded(node, 42)
    assert all(snapshot.conserved for snapshot in counts(node))


def test_points_that_cannot_be_used_are_counted_and_the_others_folded(start_node, client):
    node = start_node(one_tile=True)
    points = client.publisher(PointCloud2, 'points', qos_profile_sensor_data)
    x = scattered(17)
    x[0], value = [900.0, 0.0], height(x)[:, 0]
    value[1], value[2], value[3] = np.nan, np.inf, 1e30
    points.publish(cloud(x, value))
    wait_for(lambda: counts(node)[1].folded == 1)
    snapshot = counts(node)[0]
    assert snapshot.folded == node.field.num_observations == 13
    assert snapshot.rejected == {'not_finite': 2, 'outside_workspace': 1, 'value_out_of_range': 1}
    assert snapshot.conserved


def test_point_that_cannot_be_used_takes_no_voxel_from_those_that_can(start_node, client):
    node = start_node(parameters={'points.voxel_size': 5.0})
    points = client.publisher(PointCloud2, 'points', qos_profile_sensor_data)
    x = np.array([[1.0, 1.0], [1.5, 1.5]])
    points.publish(cloud(x, np.array([1e30, 0.5])))  # a spike first
    wait_for(lambda: counts(node)[1].folded == 1)
    snapshot = counts(node)[0]
    assert (snapshot.folded, snapshot.rejected) == (1, {'value_out_of_range': 1})


def test_rate_of_messages_without_stamps_is_that_of_their_arrival(start_node, client):
    node = start_node(parameters={'points.max_rate': 20.0})
    points = client.publisher(PointCloud2, 'points', qos_profile_sensor_data)
    for seed in range(4):
        points.publish(cloud(scattered(5, seed), sec=0))
        wait_for(lambda seed=seed: counts(node)[1].folded == seed + 1)
        folded_at = time.monotonic()
        wait_for(lambda folded_at=folded_at: time.monotonic() > folded_at + 0.06)


def test_what_was_sent_while_the_node_was_not_active_is_not_lost(start_node, client):
    node = start_node()
    points = client.publisher(PointCloud2, 'points', qos_profile_sensor_data)
    points.publish(cloud(scattered(5)))
    wait_until_folded(node, 5)
    node.trigger_deactivate()
    for seed in range(3):
        points.publish(cloud(scattered(5, seed)))
    node.trigger_activate()
    wait_for(points.get_subscription_count)
    wait_for(node.intake.sources['points'].subscription.get_publisher_count)
    points.publish(cloud(scattered(7)))
    wait_until_folded(node, 12)
    points.publish(cloud(scattered(8)))  # numbers are compared with those of the one before
    wait_until_folded(node, 20)
    assert node.status.values(node.status.snapshot())['messages_lost'] == 0


def test_fault_of_the_store_ends_no_thread(start_node, client, tmp_path, monkeypatch):
    """With peers what answers is made anew from all maps, and that fails, too."""
    node = start_node(store=str(tmp_path / 'tiles.db'), max_tiles=128, peers=['/b/state'])
    points = client.publisher(PointCloud2, 'points', qos_profile_sensor_data)
    for seed in range(4):
        points.publish(cloud(scattered(80, seed)))
        wait_for(lambda seed=seed: counts(node)[1].folded == seed + 1)
    assert node.field.num_tiles_in_memory < node.field.num_tiles
    peer = Fleet(node.field.empty_like(2048), 'map')
    peer.observe(scattered(40, seed=9), height(scattered(40, seed=9)))
    sent = peer.state(node.intake.provenance, 1)
    taken = node.worker.ask(lambda: node.fleet.receive(sent.robot, sent.sequence, sent.data))
    assert taken.result(20).reason is None

    def fail(*_):
        raise CheckpointError('disk I/O error')

    before = node.field.num_observations
    with monkeypatch.context() as patch:
        patch.setattr(TileStore, 'read', fail)
        points.publish(cloud(scattered(300, seed=11)))
        wait_for(lambda: counts(node)[1].rejected)
        assert node.worker._thread.is_alive()
        assert counts(node)[1].rejected == {'not_stored': 1}
    assert all(snapshot.conserved for snapshot in counts(node))
    points.publish(cloud(scattered(20, seed=12)))
    wait_until_folded(node, before + 20)


def test_map_has_no_border(start_node, client):
    node = start_node(tile_size=4.0)
    points = client.publisher(PointCloud2, 'points', qos_profile_sensor_data)
    x = scattered(307) + [9000.0, -7000.0]
    points.publish(cloud(x))
    wait_until_folded(node, 307)
    response = client.call(Predict, 'cmanp/predict', request(x[:31]))
    mean, _, status = predictions_from_message(response.prediction)
    assert not status.any()
    assert np.abs(mean - height(x[:31])).max() < 0.2


def test_map_in_a_store_is_there_after_a_restart(start_node, client, tmp_path):
    settings = {'tile_size': 2.0, 'max_tiles': 128, 'store': str(tmp_path / 'map.tiles')}
    node = start_node(**settings)
    points = client.publisher(PointCloud2, 'points', qos_profile_sensor_data)
    x = scattered(307)
    points.publish(cloud(x))
    wait_until_folded(node, 307)
    assert node.field.num_tiles > 128 >= node.field.num_tiles_in_memory
    before, _ = node.field.predict(x)
    node.trigger_deactivate()
    node.trigger_cleanup()
    node.trigger_configure()
    assert node.field.num_observations == 307
    np.testing.assert_allclose(node.field.predict(x)[0], before, atol=1e-5)


def test_map_is_written_to_the_store_while_the_node_runs(start_node, client, tmp_path):
    store = tmp_path / 'map.tiles'
    node = start_node(store=str(store), store_period=0.1)
    points = client.publisher(PointCloud2, 'points', qos_profile_sensor_data)
    points.publish(cloud(scattered(53)))
    wait_until_folded(node, 53)
    wait_for(lambda: len(node.field._store) == node.field.num_tiles > 0)
    assert node.field._store.extra['num_observations'] == 53


def test_dropped_parts_of_the_map_are_reported(start_node, client):
    start_node(tile_size=1.0, max_tiles=128, status_rate=20.0)
    statuses = client.collect(DiagnosticStatus, 'cmanp/status', LATCHED)
    points = client.publisher(PointCloud2, 'points', qos_profile_sensor_data)
    points.publish(cloud(scattered(307)))
    status = wait_for(lambda: [s for s in statuses if 'max_tiles' in s.message])[0]
    values = {pair.key: int(pair.value) for pair in status.values if 'tiles' in pair.key}
    assert status.level == DiagnosticStatus.WARN
    assert values['tiles_dropped'] > 0 and values['tiles_in_memory'] <= 128


def test_grid_follows_the_robot_in_whole_cells(start_node, client):
    node = start_node(publish_rate=50.0, grid_resolution=0.5, grid_window=8.0)
    means = client.collect(OccupancyGrid, 'cmanp/mean', LATCHED)
    points = client.publisher(PointCloud2, 'points', qos_profile_sensor_data)
    for x in ([3.1, -2.2], [500.7, 40.1]):
        points.publish(cloud(np.array([x])))
        wait_for(lambda x=x: np.array_equal(node.intake.newest_x, np.float32(x)))
        wait_for(
            lambda x=x: means and abs(means[-1].info.origin.position.x + 4 - x[0]) <= 0.25 + 1e-6
        )
        info = means[-1].info
        assert (info.width, info.height) == (16, 16)
        assert abs(info.origin.position.y + 4 - x[1]) <= 0.25 + 1e-6
        assert info.origin.position.x % 0.5 == info.origin.position.y % 0.5 == 0


def test_empty_cloud_is_folded_without_effect(start_node, client):
    node = start_node()
    points = client.publisher(PointCloud2, 'points', qos_profile_sensor_data)
    points.publish(cloud(np.zeros((0, 2))))
    wait_for(lambda: counts(node)[1].folded == 1)
    assert node.field.num_observations == 0


def test_reset_gives_the_prior_again(start_node, client):
    node = start_node()
    x = scattered(37)
    prior = client.call(Predict, 'cmanp/predict', request(x)).prediction
    points = client.publisher(PointCloud2, 'points', qos_profile_sensor_data)
    points.publish(cloud(x))
    wait_until_folded(node, 37)
    response = client.call(Trigger, 'cmanp/reset', Trigger.Request())
    assert (response.success, response.message) == (True, 'forgot 37 observations')
    after = client.call(Predict, 'cmanp/predict', request(x)).prediction
    assert (after.num_observations, after.mean, after.stddev) == (0, prior.mean, prior.stddev)


def test_paused_node_answers_but_rejects_observations(start_node, client):
    node = start_node()
    points = client.publisher(PointCloud2, 'points', qos_profile_sensor_data)
    assert client.call(SetBool, 'cmanp/pause', SetBool.Request(data=True)).success
    points.publish(cloud(scattered(41)))
    wait_for(lambda: counts(node)[1].rejected == {'paused': 1})
    assert client.call(Predict, 'cmanp/predict', request(scattered(3))).success
    assert client.call(SetBool, 'cmanp/pause', SetBool.Request(data=False)).success
    points.publish(cloud(scattered(41)))
    wait_until_folded(node, 41)


def test_grid_topics_are_latched_and_published_only_where_somebody_listens(start_node, client):
    node = start_node(publish_rate=50.0, grid_resolution=2.0)
    points = client.publisher(PointCloud2, 'points', qos_profile_sensor_data)
    points.publish(cloud(scattered(211)))
    wait_until_folded(node, 211)
    assert node.displays._published is None
    received = {
        topic: client.collect(message_type, f'cmanp/{topic}', LATCHED)
        for topic, message_type in (
            ('field', PointCloud2),
            ('mean', OccupancyGrid),
            ('stddev', OccupancyGrid),
            ('markers', MarkerArray),
        )
    }
    wait_for(lambda: all(received.values()))
    field, mean = received['field'][-1], received['mean'][-1]
    assert field.width == 625 and {f.name for f in field.fields} >= {'mean', 'stddev'}
    assert (mean.info.width, mean.info.height, mean.info.resolution) == (25, 25, 2.0)
    assert all(-1 <= cell <= 100 for cell in [*mean.data, *received['stddev'][-1].data])
    assert field.header.stamp.sec == 7


def test_status_tells_what_became_of_everything(start_node, client):
    start_node(status_rate=20.0)
    statuses = client.collect(DiagnosticStatus, 'cmanp/status', LATCHED)
    arrays = client.collect(DiagnosticArray, '/diagnostics', 10)
    points = client.publisher(PointCloud2, 'points', qos_profile_sensor_data)
    wait_for(lambda: statuses and statuses[-1].message.startswith('no_messages'))
    points.publish(malformed('missing_field'))
    wait_for(lambda: statuses[-1].message.startswith('field_missing'))
    points.publish(cloud(scattered(43)))
    wait_for(lambda: statuses[-1].message.startswith('folding: 43 observations'))
    values = {pair.key: pair.value for pair in statuses[-1].values}
    assert values['observations_folded'] == '43' and values['observations_far_off'] == '0'
    assert values['messages_rejected_missing_field'] == '1'
    assert int(values['state_bytes']) > 0
    assert wait_for(lambda: arrays)[-1].status[0].name == 'cmanp: field'


def test_last_grid_has_what_was_being_folded_while_the_one_before_was_made(
    start_node, client, monkeypatch
):
    node = start_node(publish_rate=20.0)
    gate = threading.Event()
    grids = client.collect(PointCloud2, 'cmanp/field', LATCHED)
    points = client.publisher(PointCloud2, 'points', qos_profile_sensor_data)
    points.publish(cloud(scattered(211)))
    wait_until_folded(node, 211)
    wait_for(lambda: grids and grids[-1].header.stamp.sec == 7)

    hold_refresh(node, monkeypatch, gate)
    points.publish(cloud(scattered(53, seed=1), sec=9))
    wait_for(lambda: node.field.num_observations == 264)
    before = len(grids)
    wait_for(lambda: len(grids) > before)
    gate.set()
    wait_for(lambda: grids[-1].header.stamp.sec == 9)


@pytest.fixture
def held_up(start_node, client):
    """Return a node whose worker does nothing, what lets it go on, and a request that waits."""
    node, gate = start_node(), threading.Event()
    node.worker.ask(lambda: gate.wait(20))
    asked = client.call_async(Predict, 'cmanp/predict', request(scattered(5)))[0]
    wait_for(lambda: node.worker._questions)
    yield node, gate, asked
    gate.set()


def test_request_that_waits_holds_up_neither_messages_nor_other_services(held_up, client):
    node, gate, asked = held_up
    client.publisher(PointCloud2, 'points', 100).publish(cloud(scattered(5)))
    wait_for(lambda: counts(node)[1].received == 1)
    assert client.call(SetBool, 'cmanp/pause', SetBool.Request(data=True)).success
    assert client.call(GetState, 'cmanp/get_state', GetState.Request()).current_state.id == 3
    assert not asked.done()
    gate.set()
    wait_for(asked.done)
    assert asked.result().success


def test_node_goes_on_when_it_is_deactivated_while_somebody_waits_for_an_answer(held_up, client):
    _, gate, asked = held_up
    for transition_id, after in ((4, lambda: gate.set()), (3, lambda: None)):
        message = ChangeState.Request()
        message.transition.id = transition_id
        assert client.call(ChangeState, 'cmanp/change_state', message).success
        after()
    assert client.call(Predict, 'cmanp/predict', request(scattered(5))).success
    assert not asked.done()


def test_full_queue_drops_the_oldest_and_counts_it(start_node, client):
    node = start_node(queue_size=2, chunk_size=1)
    points = client.publisher(PointCloud2, 'points', 100)
    gate = threading.Event()
    node.worker.ask(lambda: gate.wait(10))
    for number, size in enumerate((5, 7, 11, 13), 1):
        points.publish(cloud(scattered(size)))
        wait_for(lambda number=number: counts(node)[1].received == number)
    gate.set()
    wait_until_folded(node, 24)
    snapshots = counts(node)
    assert (snapshots[0].dropped, snapshots[1].dropped) == (12, 2)
    assert all(snapshot.conserved for snapshot in snapshots)


def test_messages_that_wait_are_folded_together(start_node, client, monkeypatch):
    node = start_node(queue_size=1, batch_window=1.0, calibration_period=0.0)
    points = client.publisher(PointCloud2, 'points', 100)
    sizes, observe = [], node.fleet.observe
    monkeypatch.setattr(node.fleet, 'observe', lambda x, y: sizes.append(len(x)) or observe(x, y))
    x = scattered(40)
    for number, part in enumerate(np.split(x, [1, 1, 2, 39]), 1):
        points.publish(cloud(part, sec=number))
        wait_for(lambda number=number: counts(node)[1].received == number)
    wait_for(lambda: counts(node)[1].folded == 5)
    assert sizes == [40]
    assert counts(node)[0].folded == 40 and all(each.conserved for each in counts(node))
    assert node.intake.provenance.oldest_stamp == 1e9 and node.intake.newest_stamp == 5e9
    np.testing.assert_allclose(node.intake.newest_x, x[-1], rtol=1e-6)
    alone = node.field.empty_like(2048)
    for one in np.concatenate([x, height(x)], 1).astype(np.float32).astype(np.float64):
        alone.observe(one[None, :2], one[None, 2:])
    expected, found = alone.predict(x), node.field.predict(x)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_namespace_holds_every_topic_and_service(start_node, client):
    start_node(namespace='/rover7')
    response = client.call(Predict, 'rover7/cmanp/predict', request(scattered(5)))
    assert response.success
    topics = {name for name, _ in client.node.get_topic_names_and_types()}
    assert {'/rover7/points', '/rover7/query', '/rover7/cmanp/prediction'} <= topics


def test_lifecycle_services_configure_activate_and_keep_the_map(start_node, client):
    node = start_node(activate=False)

    def change(transition_id):
        message = ChangeState.Request()
        message.transition.id = transition_id
        return client.call(ChangeState, 'cmanp/change_state', message).success

    def state():
        return client.call(GetState, 'cmanp/get_state', GetState.Request()).current_state.label

    assert state() == 'unconfigured'
    assert change(1) and state() == 'inactive'
    assert change(3) and state() == 'active'
    points = client.publisher(PointCloud2, 'points', qos_profile_sensor_data)
    points.publish(cloud(scattered(47)))
    wait_until_folded(node, 47)
    assert change(4) and state() == 'inactive'
    assert node.field.num_observations == 47
    assert change(3) and state() == 'active'
    assert client.call(Predict, 'cmanp/predict', request(scattered(3))).prediction.num_observations
    assert change(4) and change(2) and state() == 'unconfigured'
    assert node.field is None


def test_node_that_cannot_configure_stays_unconfigured_and_can_be_mended(start_node, client):
    start_node(activate=False, checkpoint='/nowhere/model.safetensors')
    message = ChangeState.Request()
    message.transition.id = 1
    assert not client.call(ChangeState, 'cmanp/change_state', message).success
    state = client.call(GetState, 'cmanp/get_state', GetState.Request()).current_state
    assert state.label == 'unconfigured'


@pytest.mark.parametrize(
    ('is_active', 'number'),  # configure, as of a lifecycle manager, and activate
    [(True, 1), (False, 3)],
)
def test_transition_that_is_none_is_refused_and_the_node_goes_on(
    start_node, client, capfd, is_active, number
):
    start_node(activate=is_active, autostart=is_active)
    message = ChangeState.Request()
    message.transition.id = number
    assert not client.call(ChangeState, 'cmanp/change_state', message).success
    state = client.call(GetState, 'cmanp/get_state', GetState.Request()).current_state
    assert state.label == ('active' if is_active else 'unconfigured')
    said = capfd.readouterr().err
    assert f'the node is {state.label}' in said
    assert ('set autostart to false' in said) == is_active


@pytest.mark.parametrize('is_active', [True, False])
def test_parameter_of_no_type_is_refused_and_the_node_goes_on(start_node, client, is_active):
    start_node(activate=is_active)
    several = SetParameters.Request(parameters=[Parameter(name=n) for n in ('tf_timeout', 'a')])
    several.parameters[0].value.type = 200
    results = client.call(SetParameters, 'cmanp/set_parameters', several).results
    assert [result.successful for result in results] == [False, False]
    message = SetParametersAtomically.Request(parameters=[Parameter(name='tf_timeout')])
    message.parameters[0].value.type = 200
    name = 'cmanp/set_parameters_atomically'
    assert not client.call(SetParametersAtomically, name, message).result.successful
    message.parameters[0].value = ParameterValue(type=3, double_value=1.0)
    assert client.call(SetParametersAtomically, name, message).result.successful


def test_node_that_cannot_activate_says_why_and_stays_inactive(start_node, client, capfd):
    override = {'qos_overrides./points.subscription.reliability': 'best-effort'}
    start_node(parameters=override)
    state = client.call(GetState, 'cmanp/get_state', GetState.Request()).current_state
    assert state.label == 'inactive'
    assert 'cannot activate: ' in (said := capfd.readouterr().err) and 'best-effort' in said
