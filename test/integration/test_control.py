"""The map as a whole, over DDS: save, load, merge, undo, peers, forgetting, clocks, parameters."""

import contextlib
import threading
import time

import numpy as np
import pytest
from builtin_interfaces.msg import Time
from cmanp_ros.msg import State
from cmanp_ros.srv import LoadState, MergeState, Predict, SaveState, Undo
from conftest import wait_for, wait_until_folded
from rcl_interfaces.msg import Parameter as ParameterMessage
from rcl_interfaces.msg import ParameterValue
from rcl_interfaces.srv import DescribeParameters, SetParametersAtomically
from rclpy.parameter import Parameter
from rclpy.qos import DurabilityPolicy, QoSProfile, qos_profile_sensor_data
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import PointCloud2, Temperature
from std_srvs.srv import Trigger
from test_node import cloud, counts, header, height, request, scattered

from cmanp_ros import control
from cmanp_ros.conversions import cloud_from_points
from cmanp_ros.core.errors import CheckpointError
from cmanp_ros.health import judge
from cmanp_ros.maps import Code, MapError
from cmanp_ros.store import TileStore

LATCHED = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)


def publish(client, node, *clouds, topic='points'):
    """Publish clouds and wait until they are folded."""
    points = client.publisher(PointCloud2, topic, qos_profile_sensor_data)
    for each in clouds:
        expected = node.field.num_observations + each.width
        points.publish(each)
        wait_until_folded(node, expected)


def content(field):
    """Return the tiles of a map and their sums."""
    keys, state = field.world.export()
    return keys, {name: part.numpy().tobytes() for name, part in state.tensors().items()}


def test_saved_map_loads_to_the_bit_and_the_load_begins_again(start_node, client, tmp_path):
    node = start_node(state_directory=str(tmp_path))
    publish(client, node, cloud(scattered(211)))
    saved = client.call(SaveState, 'cmanp/save_state', SaveState.Request(name='first'))
    assert (saved.success, saved.code, saved.num_observations) == (True, 0, 211), saved.message
    assert saved.num_bytes == (tmp_path / 'first.safetensors').stat().st_size
    before = content(node.field)

    again = client.call(SaveState, 'cmanp/save_state', SaveState.Request(name='first'))
    assert (again.success, again.code) == (False, Code.EXISTS)
    publish(client, node, cloud(scattered(101, seed=3), sec=90))
    assert content(node.field) != before
    loaded = client.call(LoadState, 'cmanp/load_state', LoadState.Request(name='first'))
    assert (loaded.success, loaded.num_observations) == (True, 211), loaded.message
    assert content(node.field) == before
    assert node.header().stamp.sec == 7, 'the stamp of the newest observation in the map'


@pytest.mark.parametrize(
    ('name', 'code'),
    [
        ('nothing', Code.NOT_FOUND),
        ('../first', Code.BAD_NAME),
        ('', Code.BAD_NAME),
        ('damaged', Code.DAMAGED),
        ('other_frame', Code.OTHER_MAP),
    ],
)
def test_map_that_cannot_be_loaded_changes_nothing(start_node, client, tmp_path, name, code):
    node = start_node(state_directory=str(tmp_path))
    publish(client, node, cloud(scattered(31)))
    if name == 'damaged':
        (tmp_path / 'damaged.safetensors').write_bytes(b'no map')
    if name == 'other_frame':
        other = start_node(state_directory=str(tmp_path), map_frame='odom', namespace='/b')
        other.control.directory.save(other.field, name, other.intake.provenance)
    before = content(node.field)
    for kind, service in ((LoadState, 'load_state'), (MergeState, 'merge_state')):
        answer = client.call(kind, f'cmanp/{service}', kind.Request(name=name))
        assert (answer.success, answer.code) == (False, code), answer.message
        assert answer.message
    assert content(node.field) == before


def test_without_a_state_directory_saving_says_so(start_node, client):
    start_node()
    answer = client.call(SaveState, 'cmanp/save_state', SaveState.Request(name='a'))
    assert (answer.success, answer.code) == (False, Code.NO_DIRECTORY)
    assert 'state_directory' in answer.message


def test_merged_map_is_that_of_all_observations(start_node, client, tmp_path):
    one = start_node(namespace='/one', state_directory=str(tmp_path))
    two = start_node(namespace='/two', state_directory=str(tmp_path))
    both = start_node(namespace='/both')
    first, second = cloud(scattered(151)), cloud(scattered(97, seed=5))
    publish(client, one, first, topic='one/points')
    publish(client, two, second, topic='two/points')
    publish(client, both, first, second, topic='both/points')
    assert client.call(SaveState, 'two/cmanp/save_state', SaveState.Request(name='two')).success
    merged = client.call(MergeState, 'one/cmanp/merge_state', MergeState.Request(name='two'))
    assert (merged.success, merged.num_observations) == (True, 248), merged.message
    assert same_prediction(one.field, both.field)
    twice = client.call(MergeState, 'one/cmanp/merge_state', MergeState.Request(name='two'))
    assert not twice.success and 'count twice' in twice.message


def same_prediction(one, other):
    """Tell whether two maps predict the same, to rounding."""
    x = scattered(57, seed=8)
    pairs = zip(one.predict(x), other.predict(x), strict=True)
    return all(np.allclose(a, b, rtol=1e-6, atol=1e-6) for a, b in pairs)


def test_undo_takes_back_the_newest_and_what_it_took_may_come_again(start_node, client):
    node = start_node(parameters={'undo_window': 16.0, 'points.voxel_size': 0.01})
    publish(client, node, cloud(scattered(53)))
    before, folded_at = content(node.field), time.monotonic()
    wait_for(lambda: time.monotonic() > folded_at + 5)  # moments are marked every two seconds
    publish(client, node, cloud(scattered(29, seed=2)))
    seconds = time.monotonic() - folded_at - 4.5
    answer = client.call(Undo, 'cmanp/undo', Undo.Request(seconds=seconds))
    assert (answer.success, answer.num_taken_back) == (True, 29), answer.message
    assert answer.num_observations == 53 and answer.seconds >= seconds
    assert content(node.field) == before
    publish(client, node, cloud(scattered(29, seed=2)))


def test_moments_to_go_back_to_are_marked_while_nothing_comes(start_node, client):
    node = start_node(undo_window=0.8)
    publish(client, node, cloud(scattered(53)))
    folded_at = time.monotonic()
    wait_for(lambda: time.monotonic() > folded_at + 0.5)
    answer = client.call(Undo, 'cmanp/undo', Undo.Request(seconds=0.2))
    assert answer.success and answer.num_observations == 53, answer.message


def test_undo_that_is_off_says_how_to_switch_it_on(start_node, client):
    start_node()
    answer = client.call(Undo, 'cmanp/undo', Undo.Request(seconds=3.0))
    assert not answer.success and 'undo_window' in answer.message


def test_map_saved_at_the_end_is_there_at_the_next_start(start_node, client, tmp_path):
    node = start_node(state_directory=str(tmp_path), autosave_period=1000.0, restore='autosave')
    assert node.field.num_observations == 0, 'nothing to restore is no fault'
    publish(client, node, cloud(scattered(83)))
    before = content(node.field)
    node.trigger_deactivate()
    node.trigger_cleanup()
    again = start_node(state_directory=str(tmp_path), restore='autosave', namespace='/again')
    assert content(again.field) == before
    assert again.header().stamp.sec == 7
    (tmp_path / 'autosave.safetensors').unlink()
    again.control.autosave()
    assert not list(tmp_path.iterdir()), 'nothing changed since it was restored'


def test_map_that_was_not_restored_is_kept_aside(start_node, client, tmp_path):
    options = {'state_directory': str(tmp_path), 'autosave_period': 1000.0}
    node = start_node(**options)
    publish(client, node, cloud(scattered(83)))
    node.control.autosave()
    node.control.autosave()
    assert [path.stem for path in tmp_path.iterdir()] == ['autosave'], 'it is the same map'
    saved = (tmp_path / 'autosave.safetensors').read_bytes()
    begun = start_node(**options, namespace='/begun')
    publish(client, begun, cloud(scattered(7)), topic='begun/points')
    begun.control.autosave()
    (aside,) = (path for path in tmp_path.iterdir() if path.stem != 'autosave')
    assert aside.read_bytes() == saved
    assert client.call(Trigger, 'begun/cmanp/reset', Trigger.Request()).success
    begun.control.autosave()
    counts_saved = {
        begun.control.directory.load(name, begun.field).field.num_observations
        for name in begun.control.directory.names()
    }
    assert counts_saved == {83, 7, 0}, 'a reset is no reason to lose what was saved'


def test_map_to_restore_must_be_there_unless_it_is_the_first_autosave(start_node, tmp_path):
    node = start_node(activate=False, state_directory=str(tmp_path), restore='autosav')
    assert node.trigger_configure().name == 'FAILURE'


def test_folder_that_cannot_be_used_is_refused_at_once(start_node, tmp_path):
    (tmp_path / 'file').write_text('no folder')
    node = start_node(activate=False, state_directory=str(tmp_path / 'file'))
    assert node.trigger_configure().name == 'FAILURE'


def test_autosave_that_fails_is_named_until_it_works_again(start_node, client, tmp_path):
    folder = tmp_path / 'maps'
    node = start_node(state_directory=str(folder), autosave_period=1000.0)
    publish(client, node, cloud(scattered(83)))
    folder.rename(tmp_path / 'gone')
    node.control.autosave()
    verdict = judge(node.status.snapshot())
    assert verdict.state == 'not_saved' and str(folder) in verdict.text
    (tmp_path / 'gone').rename(folder)
    node.control.autosave()
    assert judge(node.status.snapshot()).state == 'folding'


def test_request_that_was_begun_is_waited_for_and_not_said_to_be_left_undone(
    start_node, client, monkeypatch
):
    node = start_node()
    publish(client, node, cloud(scattered(53)))
    given_up, reset, ask = threading.Event(), node.field.reset, node.worker.ask

    def slow():
        assert given_up.wait(20)
        reset()

    def watched(question):
        future = ask(question)
        cancel = future.cancel
        future.cancel = lambda: (given_up.set(), cancel())[1]
        return future

    monkeypatch.setattr(control, 'TIMEOUT_SEC', 0.1)
    monkeypatch.setattr(node.field, 'reset', slow)
    monkeypatch.setattr(node.worker, 'ask', watched)
    answer = client.call(Trigger, 'cmanp/reset', Trigger.Request())
    assert given_up.is_set() and answer.success and '53' in answer.message
    assert node.field.num_observations == 0


def test_request_that_was_not_begun_in_time_is_not_done_later(start_node, client, monkeypatch):
    node = start_node()
    publish(client, node, cloud(scattered(53)))
    monkeypatch.setattr(control, 'TIMEOUT_SEC', 0.1)
    go_on = threading.Event()
    held = node.worker.ask(lambda: go_on.wait(20))
    answer = client.call(Trigger, 'cmanp/reset', Trigger.Request())
    assert not answer.success and 'overloaded' in answer.message
    go_on.set()
    held.result()
    assert node.worker.ask(lambda: node.field.num_observations).result() == 53


def held_up_once(node, monkeypatch, meanwhile):
    """Have a node do something else between the copy of its map and the writing of the file."""
    make, done = node.control.directory.writer, []

    def writer(*arguments):
        write = make(*arguments)

        def late():
            if not done:
                done.append(True)
                meanwhile()
            return write()

        return late

    monkeypatch.setattr(node.control.directory, 'writer', writer)


def test_autosave_that_still_writes_does_not_replace_a_newer_one(
    start_node, client, tmp_path, monkeypatch
):
    node = start_node(state_directory=str(tmp_path), autosave_period=1000.0)
    publish(client, node, cloud(scattered(53)))
    writing, go_on = threading.Event(), threading.Event()
    held_up_once(node, monkeypatch, lambda: (writing.set(), go_on.wait(10)))
    by_timer = threading.Thread(target=node.control.autosave)
    by_timer.start()
    assert writing.wait(10)
    publish(client, node, cloud(scattered(50, seed=4)))
    at_the_end = threading.Thread(target=node.control.autosave)
    at_the_end.start()
    at_the_end.join(0.3)
    go_on.set()
    by_timer.join()
    at_the_end.join()
    found = node.control.directory.load('autosave', node.field)
    assert found.field.num_observations == 103


def test_map_that_was_saved_while_another_began_is_kept_aside(
    start_node, client, tmp_path, monkeypatch
):
    node = start_node(state_directory=str(tmp_path), autosave_period=1000.0)
    publish(client, node, cloud(scattered(53)))
    begin_again = node.control.begin_again
    held_up_once(node, monkeypatch, lambda: node.worker.ask(begin_again).result(10))
    node.control.autosave()
    publish(client, node, cloud(scattered(7)))
    node.control.autosave()
    directory = node.control.directory
    counts = {directory.load(n, node.field).field.num_observations for n in directory.names()}
    assert counts == {53, 7}


def test_store_that_cannot_be_written_is_named_until_it_can_be(
    start_node, client, tmp_path, monkeypatch
):
    node = start_node(store=str(tmp_path / 'tiles.db'), store_period=0.2)
    publish(client, node, cloud(scattered(53)))

    def fail(*_):
        raise CheckpointError('no space left')

    with monkeypatch.context() as patch:
        patch.setattr(TileStore, 'write', fail)
        publish(client, node, cloud(scattered(20, seed=4)))
        wait_for(lambda: judge(node.status.snapshot()).state == 'not_saved')
        assert 'no space left' in judge(node.status.snapshot()).text
        node.trigger_deactivate()
        node.trigger_cleanup()  # which cannot write it either, and closes it
    assert node.trigger_configure().name == 'SUCCESS', 'the store is not open elsewhere'


def test_store_that_was_removed_is_named_until_it_is_back(start_node, client, tmp_path):
    folder = tmp_path / 'store'
    node = start_node(store=str(folder / 'tiles.db'), store_period=0.2)
    publish(client, node, cloud(scattered(53)))
    wait_for((folder / 'tiles.db-wal').exists)  # it was written
    folder.rename(tmp_path / 'elsewhere')  # nothing new comes: what was written is not there
    wait_for(lambda: judge(node.status.snapshot()).state == 'not_saved')
    assert 'was removed or replaced' in judge(node.status.snapshot()).text
    (tmp_path / 'elsewhere').rename(folder)
    wait_for(lambda: judge(node.status.snapshot()).state != 'not_saved')


def test_undo_takes_back_the_stamps_too(start_node, client):
    node = start_node(undo_window=16.0)
    publish(client, node, cloud(scattered(53), sec=7))
    folded_at = time.monotonic()
    wait_for(lambda: time.monotonic() > folded_at + 2.5)  # moments are marked every two seconds
    publish(client, node, cloud(scattered(29, seed=2), sec=200))
    assert node.header().stamp.sec == 200
    answer = client.call(Undo, 'cmanp/undo', Undo.Request(seconds=0.1))
    assert (answer.success, answer.num_observations) == (True, 53), answer.message
    assert (node.header().stamp.sec, node.intake.provenance.newest_stamp) == (7, 7 * 10**9)
    answer = client.call(Undo, 'cmanp/undo', Undo.Request(seconds=16.0))
    assert (answer.success, answer.num_observations) == (True, 0), answer.message
    assert node.intake.provenance == node.intake.nothing_yet()
    assert node.header().stamp.sec not in (7, 200), 'the time now'


def test_map_from_the_future_does_not_stamp_what_is_published(start_node, client, tmp_path):
    """Saved by the time of the day, loaded where time is simulated."""
    node = start_node(state_directory=str(tmp_path))
    publish(client, node, cloud(scattered(53), sec=1000))
    assert client.call(SaveState, 'cmanp/save_state', SaveState.Request(name='day')).success
    simulated = start_node(
        state_directory=str(tmp_path), restore='day', use_sim_time=True, namespace='/sim'
    )
    clock = client.publisher(Clock, '/clock')
    tick(clock, simulated, 50)
    publish(client, simulated, cloud(scattered(9), sec=49), topic='sim/points')
    assert simulated.header().stamp.sec == 50
    assert client.call(LoadState, 'sim/cmanp/load_state', LoadState.Request(name='day')).success
    assert simulated.header().stamp.sec == 50


def test_two_nodes_that_save_in_one_folder_lose_neither_map(start_node, client, tmp_path):
    options = {'state_directory': str(tmp_path), 'autosave_period': 1000.0, 'restore': 'autosave'}
    nodes = [start_node(**options, namespace=name) for name in ('/one', '/two')]
    for number, node in enumerate(nodes):
        publish(
            client, node, cloud(scattered(20 + number)), topic=f'{node.get_namespace()}/points'
        )
        node.control.autosave()
    for number, node in enumerate(nodes):
        more = cloud(scattered(50 + number, seed=4))
        publish(client, node, more, topic=f'{node.get_namespace()}/points')
        node.control.autosave()
    directory = nodes[0].control.directory
    found = {directory.load(n, nodes[0].field).field.num_observations for n in directory.names()}
    assert {70, 72} <= found, found


def test_what_is_asked_wrongly_is_counted_and_said_by_reason(start_node, client):
    node = start_node()
    said = []
    node.warn = lambda reason, text: said.append(reason)
    for query in (
        Predict.Request(dim_x=2),
        Predict.Request(header=header('nowhere'), dim_x=2, x=[1.0, 2.0]),
        Predict.Request(header=header(), dim_x=3, x=[1.0, 2.0, 3.0]),
    ):
        assert not client.call(Predict, 'cmanp/predict', query).success
    values = node.status.values(node.status.snapshot())
    counted = {key: n for key, n in values.items() if key.startswith('questions_refused_')}
    assert sum(counted.values()) == 3 and len(counted) == len(set(said)) >= 2, (counted, said)


def test_age_of_what_is_observed_is_not_known_before_time_begins(start_node, client):
    node = start_node(use_sim_time=True)
    publish(client, node, cloud(scattered(53)))
    assert node.status.values(node.status.snapshot())['newest_observation_age_sec'] is None


def test_locations_that_messages_cannot_tell_apart_are_said(start_node, client):
    node, said = start_node(tile_size=5.0), []
    node.warn = lambda reason, text: said.append((reason, text))
    publish(client, node, cloud(scattered(53)))
    assert not said
    x = scattered(53) + [5e5, 5.4e6]
    fields = {'x': x[:, 0], 'y': x[:, 1], 'z': height(x)[:, 0]}
    far = cloud_from_points(fields, header())
    publish(client, node, far)
    ((reason, text),) = said
    assert reason == 'far_from_origin' and 'steps of 0.5 m' in text


def test_map_of_another_node_that_could_not_be_loaded_is_not_replaced(
    start_node, client, tmp_path
):
    options = {'state_directory': str(tmp_path), 'autosave_period': 1000.0}
    nodes = [
        start_node(**options, namespace=name, tile_size=size)
        for name, size in (('/one', 5.0), ('/two', 4.0))
    ]
    for number, node in enumerate(nodes):
        publish(
            client, node, cloud(scattered(20 + number)), topic=f'{node.get_namespace()}/points'
        )
        node.control.autosave()
    load = client.call(LoadState, 'one/cmanp/load_state', LoadState.Request(name='autosave'))
    assert not load.success
    publish(client, nodes[0], cloud(scattered(30, seed=4)), topic='one/points')
    nodes[0].control.autosave()
    directory, found = nodes[1].control.directory, []
    for name in directory.names():
        with contextlib.suppress(MapError):
            found.append(directory.load(name, nodes[1].field).field.num_observations)
    assert found == [21], 'the map of two, set aside'


def test_loading_what_was_saved_ends_the_fault_of_saving(
    start_node, client, tmp_path, monkeypatch
):
    node = start_node(state_directory=str(tmp_path), autosave_period=1000.0)
    publish(client, node, cloud(scattered(53)))
    node.control.autosave()
    publish(client, node, cloud(scattered(20, seed=4)))

    def fail(*_):
        raise MapError(Code.FAILED, 'no space left')

    with monkeypatch.context() as patch:
        patch.setattr(node.control.directory, 'writer', fail)
        node.control.autosave()
        assert 'no space left' in node.control.save_fault
    assert client.call(LoadState, 'cmanp/load_state', LoadState.Request(name='autosave')).success
    assert not node.control.save_fault
    node.control.autosave()
    assert node.control.directory.names() == ['autosave'], 'it is the same map'


def test_refused_requests_say_what_the_map_holds_all_the_same(start_node, client, tmp_path):
    node = start_node(state_directory=str(tmp_path))
    publish(client, node, cloud(scattered(53)))
    for service, name, asked in (
        (LoadState, 'load_state', {'name': 'none'}),
        (MergeState, 'merge_state', {'name': 'none'}),
        (Undo, 'undo', {'seconds': 3.0}),
    ):
        answer = client.call(service, f'cmanp/{name}', service.Request(**asked))
        assert not answer.success
        assert (answer.num_observations, answer.num_tiles) == (
            node.field.num_observations,
            node.field.num_tiles,
        )


def test_undo_beyond_a_reset_is_refused_and_says_why(start_node, client):
    node = start_node(undo_window=16.0)
    publish(client, node, cloud(scattered(53)))
    assert client.call(Trigger, 'cmanp/reset', Trigger.Request()).success
    answer = client.call(Undo, 'cmanp/undo', Undo.Request(seconds=3.0))
    assert not answer.success and 'reset or load' in answer.message


def test_refused_map_of_a_peer_is_named(start_node, client):
    node = start_node(peers=['/two/cmanp/state'])
    publish(client, node, cloud(scattered(53)))
    other = start_node(namespace='/two', tile_size=3.0)
    publish(client, other, cloud(scattered(11)), topic='two/points')
    assert client.call(Trigger, 'two/cmanp/publish_state', Trigger.Request()).success
    wait_for(lambda: node.control.num_refused['other_map'] == 1)
    snapshot = node.status.snapshot()
    verdict = judge(snapshot)
    assert verdict.state == 'peer_refused' and 'tile_size' in verdict.text
    assert node.status.values(snapshot)['peers_refused_other_map'] == 1


def test_map_of_a_peer_that_was_here_already_is_taken_after_a_reset(start_node, client, tmp_path):
    shared = str(tmp_path)
    node = start_node(peers=['/two/cmanp/state'], state_directory=shared)
    other = start_node(namespace='/two', state_directory=shared)
    publish(client, other, cloud(scattered(11)), topic='two/points')
    save = SaveState.Request(name='two')
    assert client.call(SaveState, 'two/cmanp/save_state', save).success
    merge = MergeState.Request(name='two')
    assert client.call(MergeState, 'cmanp/merge_state', merge).success
    assert client.call(Trigger, 'two/cmanp/publish_state', Trigger.Request()).success
    wait_for(lambda: node.control.num_refused['counted_twice'] == 1)
    assert judge(node.status.snapshot()).state == 'peer_refused'
    assert client.call(Trigger, 'cmanp/reset', Trigger.Request()).success  # as its text says
    wait_for(lambda: not node.control.peer_fault)  # the other is parked, and sends nothing new
    assert node.fleet.peers and node.control.num_refused['counted_twice'] == 1


def test_damaged_map_is_not_restored_over(start_node, client, tmp_path):
    (tmp_path / 'autosave.safetensors').write_bytes(b'half a map')
    node = start_node(
        activate=False, state_directory=str(tmp_path), restore='autosave', autosave_period=0.1
    )
    assert node.trigger_configure().name == 'FAILURE'
    assert (tmp_path / 'autosave.safetensors').read_bytes() == b'half a map'


def test_two_robots_end_with_the_map_of_one_that_saw_everything(start_node, client):
    one = start_node(namespace='/one', peers=['/two/cmanp/state'], state_rate=20.0)
    two = start_node(namespace='/two', peers=['/one/cmanp/state'], state_rate=20.0)
    both = start_node(namespace='/both')
    clouds = [cloud(scattered(61, seed=seed)) for seed in range(4)]
    for number, each in enumerate(clouds):  # newer states replace older ones
        robot = (one, two)[number % 2]
        publish(client, robot, each, topic=f'{robot.get_namespace()}/points')
        publish(client, both, each, topic='both/points')
    total = both.field.num_observations

    def combined(node):
        return node.worker.ask(lambda: node.fleet.combined).result()

    for node in (one, two):
        wait_for(lambda node=node: combined(node).num_observations == total)
        assert node.field.num_observations == total / 2, 'what it publishes is its own'
        assert same_prediction(combined(node), both.field)
    name = 'one/cmanp/predict'
    assert client.call(Predict, name, request(scattered(3))).prediction.num_observations == total


def test_state_is_published_on_request_and_latched(start_node, client):
    node = start_node()
    publish(client, node, cloud(scattered(23)))
    assert client.call(Trigger, 'cmanp/publish_state', Trigger.Request()).success
    states = client.collect(State, 'cmanp/state', LATCHED)
    message = wait_for(lambda: states)[0]
    assert (message.num_observations, message.header.frame_id) == (23, 'map')
    found, _ = node.field.read(bytes(message.data))
    assert content(found) == content(node.field)


def test_what_was_observed_fades_with_the_time_of_the_node(start_node, client):
    node = start_node(use_sim_time=True, half_life=100.0, calibration_period=0.0)
    clock = client.publisher(Clock, '/clock')
    node.field.observe(scattered(150), height(scattered(150)))  # as of a map that was restored
    tick(clock, node, 1000)
    wait_for(lambda: node.control._forgotten_at == 1000 * 10**9)
    _, fresh = node.field.predict(scattered(20, seed=1))
    assert (fresh < 0.1).all(), 'a clock that begins is no time that passes'
    for seconds in (1400, 1800):
        tick(clock, node, seconds)
    wait_for(lambda: (node.field.predict(scattered(20, seed=1))[1] > fresh).all())


def tick(clock, node, seconds):
    """Publish a time and wait until the node has it."""
    message = Clock(clock=Time(sec=seconds))

    def is_there():
        clock.publish(message)
        return node.get_clock().now().nanoseconds == seconds * 10**9

    wait_for(is_there)


@pytest.mark.parametrize('policy', ['keep', 'reset', 'pause'])
def test_clock_that_jumps_back_is_followed_as_the_parameter_says(start_node, client, policy):
    node = start_node(use_sim_time=True, on_clock_jump=policy)
    clock = client.publisher(Clock, '/clock')
    tick(clock, node, 500)
    publish(client, node, cloud(scattered(37), sec=500))
    tick(clock, node, 20)
    wait_for(lambda: node.num_clock_jumps == 1)
    node.worker.ask(lambda: None).result()
    assert node.field.num_observations == (0 if policy == 'reset' else 37)
    points = client.publisher(PointCloud2, 'points', qos_profile_sensor_data)
    points.publish(cloud(scattered(11, seed=2), sec=21))
    expected = {'keep': 48, 'reset': 11, 'pause': 37}[policy]
    wait_for(lambda: sum(counts(node)[1].rejected.values()) + node.intake.newest_stamp)
    wait_until_folded(node, expected)
    assert node.intake.paused == (policy == 'pause')
    if policy != 'pause':
        assert node.header().stamp.sec == 21, 'not the stamp from before the jump'
    found = node.intake.provenance
    stamps = {'keep': (21, 500), 'reset': (21, 21), 'pause': (500, 500)}[policy]
    assert (found.oldest_stamp // 10**9, found.newest_stamp // 10**9) == stamps, 'of the map'


def set_parameters(client, **values):
    """Set parameters of the node from outside, all or none."""
    parameters = [
        Parameter(name.replace('__', '.'), value=value).to_parameter_msg()
        for name, value in values.items()
    ]
    question = SetParametersAtomically.Request(parameters=parameters)
    return client.call(SetParametersAtomically, 'cmanp/set_parameters_atomically', question).result


def test_parameters_change_all_or_none_while_the_node_runs(start_node, client):
    node = start_node()
    assert set_parameters(client, grid_resolution=2, stddev_range=[0.0, 3.0]).successful
    assert node.parameters.grid_resolution == 2.0
    refused = set_parameters(client, grid_resolution=4.0, stddev_range=[5.0, 1.0])
    assert not refused.successful and 'lower < upper' in refused.reason
    assert node.parameters.grid_resolution == 2.0
    refused = set_parameters(client, checkpoint='other')
    assert not refused.successful
    assert set_parameters(client, tf_timeout=1.5).successful
    assert node.transforms.timeout_sec == 1.5


def test_source_that_is_disabled_is_counted_and_comes_back(start_node, client):
    node = start_node()
    points = client.publisher(PointCloud2, 'points', qos_profile_sensor_data)
    assert set_parameters(client, points__enabled=False).successful
    points.publish(cloud(scattered(9)))
    wait_for(lambda: counts(node)[1].rejected == {'disabled': 1})
    assert set_parameters(client, points__enabled=True).successful
    points.publish(cloud(scattered(9)))
    wait_until_folded(node, 9)


def test_parameters_are_described_with_range_and_text(start_node, client):
    start_node()
    names = ['publish_rate', 'points.voxel_size']
    question = DescribeParameters.Request(names=names)
    found = client.call(DescribeParameters, 'cmanp/describe_parameters', question).descriptors
    assert all(each.description and each.floating_point_range for each in found)


def test_any_sensor_with_a_header_is_a_source(start_node, client):
    node = start_node(
        parameters={
            'sources': ['thermometer'],
            'thermometer.type': 'sensor_msgs/msg/Temperature',
            'thermometer.topic': 'weather/temperature',
            'thermometer.value_scale': 1.8,
            'thermometer.value_offset': 32.0,
            'value_offset': 60.0,
            'value_scale': 10.0,
        }
    )
    sensor = client.publisher(Temperature, 'weather/temperature', qos_profile_sensor_data)
    message = Temperature(temperature=20.0)
    message.header.frame_id, message.header.stamp.sec = 'map', 3
    for number in range(1, 6):
        sensor.publish(message)
        wait_until_folded(node, number)
    mean, _ = node.field.predict([[0.0, 0.0]])
    assert abs(mean[0, 0] - 68.0) < 2.0


def test_thinned_points_are_counted_and_all_add_up(start_node, client):
    node = start_node(parameters={'points.voxel_size': 5.0})
    points = client.publisher(PointCloud2, 'points', qos_profile_sensor_data)
    for seed in range(3):
        points.publish(cloud(scattered(400, seed)))
        wait_for(lambda seed=seed: counts(node)[1].folded == seed + 1)
    found, messages = counts(node)
    assert 0 < found.folded <= 100 and found.rejected == {'thinned': 1200 - found.folded}
    assert found.conserved and messages.conserved


def test_calibration_is_part_of_the_status(start_node, client):
    node = start_node(calibration_period=0.001)
    for seed in range(12):
        x, noise = scattered(200, seed), np.random.default_rng(seed).normal(0, 0.1, 200)
        publish(client, node, cloud(x, height(x)[:, 0] + noise))
    coverage = node.status.snapshot().coverage
    assert coverage.num_points > 100
    assert coverage.within_50 < coverage.within_90 <= 1
    assert coverage.within_90 > 0.7


def test_unset_type_of_a_parameter_is_refused(start_node, client):
    node = start_node()
    message = ParameterMessage(name='grid_resolution', value=ParameterValue(type=0))
    question = SetParametersAtomically.Request(parameters=[message])
    result = client.call(
        SetParametersAtomically, 'cmanp/set_parameters_atomically', question
    ).result
    assert not result.successful
    assert node.parameters.grid_resolution == 0.5
