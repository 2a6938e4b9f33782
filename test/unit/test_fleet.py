"""A fleet's maps combined are one map that saw everything, each observation once."""

import array
import os
import threading

import numpy as np
import pytest
from small_models import assert_states_close
from test_undo import assert_same_bits, content, field_of, walk

from cmanp_ros import maps
from cmanp_ros.core import CMANP, Lattice, Normalization
from cmanp_ros.core.errors import CheckpointError
from cmanp_ros.core.tiles import Tiles
from cmanp_ros.core.world import World
from cmanp_ros.field import NeuralField
from cmanp_ros.fleet import MAX_PEERS, Fleet
from cmanp_ros.maps import Provenance

PROVENANCE = Provenance('map', ((-50.0, -40.0), (50.0, 40.0)), 3, 5)


def fleet_of(*places, **options):
    """Return a fleet whose own map has seen some places."""
    fleet = Fleet(field_of(**options), 'map')
    for place in places:
        fleet.observe(*walk(place))
    return fleet


def send(sender, receiver, now=0):
    """Let one robot have the map of another, as a message does; return what became of it."""
    sent = sender.state(PROVENANCE, now)
    return receiver.receive(sent.robot, sent.sequence, sent.data)


def assert_saw(field, *places):
    """Compare with one map that saw all of these places, to rounding."""
    expected = field_of(window=None)
    for place in places:
        expected.observe(*walk(place))
    assert field.num_observations == expected.num_observations
    (keys, state), (expected_keys, other) = field.world.export(), expected.world.export()
    assert keys == expected_keys
    if keys:
        assert_states_close(state, other, rtol=1e-9, atol=1e-9)
    x = np.concatenate([walk(place, 7)[0] for place in range(6)])
    for found, true in zip(field.predict(x), expected.predict(x), strict=True):
        np.testing.assert_allclose(found, true, rtol=0, atol=20 * 1e-5)


# One map that saw everything ---------------------------------------------------------------------


def test_without_peers_it_is_the_own_map_and_no_other():
    fleet = fleet_of(0)
    assert fleet.combined is fleet.own
    assert fleet.state_nbytes == fleet.own.state_nbytes
    alone = field_of()
    alone.observe(*walk(0))
    alone.world.tiles.totals['robots'] = fleet.own.robots
    assert_same_bits(content(fleet.combined), content(alone))


@pytest.mark.parametrize('paged', [False, True], ids=['in memory', 'own paged to a store'])
def test_the_maps_of_three_robots_are_one_map_of_all_observations(paged, tmp_path):
    options = {'path': tmp_path, 'max_tiles': 29} if paged else {}
    own, left, right = fleet_of(0, 1, **options), fleet_of(1, 2), fleet_of(3)
    before = content(own.own)
    assert send(left, own).reason is None
    assert send(right, own).reason is None
    assert_saw(own.combined, 0, 1, 1, 2, 3)
    assert_same_bits(content(own.own), before)
    assert sorted(own.peers) == sorted([left.own.robots[0], right.own.robots[0]])


def test_an_own_map_of_which_little_fits_in_memory_is_combined(tmp_path):
    own, other = fleet_of(*range(6), path=tmp_path, max_tiles=29), fleet_of(3)
    assert own.own.num_tiles > 29
    assert send(other, own).reason is None
    assert_saw(own.combined, *range(6), 3)


def test_a_newer_map_of_a_robot_replaces_its_older_one():
    own, left, right = fleet_of(0), fleet_of(), fleet_of(4)
    for place in (1, 2, 3):
        left.observe(*walk(place))
        send(left, own)
        send(right, own)
        assert_saw(own.combined, 0, 4, *range(1, place + 1))
    assert len(own.peers) == 2


def test_observations_between_messages_count_once():
    own, left = fleet_of(0), fleet_of(1)
    own.observe(*walk(2))
    send(left, own)
    own.observe(*walk(3))  # before anything was predicted
    assert_saw(own.combined, 0, 2, 3, 1)
    combined = own.combined
    own.observe(*walk(4))  # into both
    assert own.combined is combined
    assert_saw(own.combined, 0, 2, 3, 4, 1)
    left.observe(*walk(5))
    send(left, own)
    assert_saw(own.combined, 0, 2, 3, 4, 1, 5)
    assert_saw(own.own, 0, 2, 3, 4)


def test_what_cannot_be_used_is_counted_once_and_folded_nowhere():
    own, left = fleet_of(0), fleet_of(1)
    send(left, own)
    assert own.combined.num_observations == 26
    observed = own.observe(np.array([[np.nan, 0.0], [1.0, 1.0]]), np.array([300.0, 301.0]))
    assert (observed.folded, observed.rejected) == (1, {'not_finite': 1})
    assert (own.own.num_observations, own.combined.num_observations) == (14, 27)


def test_a_robot_whose_clock_was_set_back_over_a_restart_is_heard_again():
    own, left = fleet_of(0), fleet_of(1)
    assert send(left, own, now=10**18).reason is None
    again = Fleet(left.own, 'map', now=10)  # no battery keeps its clock
    again.observe(*walk(2))
    assert [send(again, own).reason for _ in range(3)] == ['old', None, None]
    assert_saw(own.combined, 0, 1, 2)
    assert own.receive(left.own.robots[0], 5, b'').reason == 'old'


def test_late_maps_in_their_order_do_not_replace_a_newer_one():
    own, left, sent = fleet_of(0), fleet_of(1), []
    for place in (2, 3, 4, 5):
        sent.append(left.state(PROVENANCE, 10**18))
        left.observe(*walk(place))
    *late, newest = sent
    assert own.receive(newest.robot, newest.sequence, newest.data).reason is None
    for each in late:
        assert own.receive(each.robot, each.sequence, each.data).reason == 'old'


def test_maps_that_arrive_twice_late_or_from_oneself_change_nothing():
    own, left = fleet_of(0), fleet_of(1)
    first = left.state(PROVENANCE, 7)
    left.observe(*walk(2))
    second = left.state(PROVENANCE, 5)  # a clock that was set back
    assert (first.sequence, second.sequence) == (7, 8)
    mirror = own.state(PROVENANCE, 0)
    assert own.receive(second.robot, second.sequence, second.data).reason is None
    combined, version = own.combined, own.version
    for sent, reason in ((first, 'old'), (second, 'old'), (mirror, 'own')):
        assert own.receive(sent.robot, sent.sequence, sent.data).reason == reason
    assert own.combined is combined and own.version == version
    assert_saw(own.combined, 0, 1, 2)


def test_the_version_changes_with_what_is_predicted():
    own, left, seen = fleet_of(0), fleet_of(1), []
    for change in (
        lambda: send(left, own),
        lambda: own.observe(*walk(2)),
        lambda: left.observe(*walk(3)) and send(left, own),
        own.own.reset,
    ):
        seen.append(own.version)
        change()
    assert len({*seen, own.version}) == 5


# Other changes of the own map --------------------------------------------------------------------


def test_undo_and_reset_are_of_the_own_map_and_reach_the_others_with_the_next_message():
    own, left = fleet_of(0), fleet_of(1)
    send(left, own)
    own.own.mark(0.0)
    own.observe(*walk(2))
    send(own, left)
    assert_saw(own.combined, 0, 2, 1)
    own.own.undo(1.0, now=2.0)
    assert_saw(own.combined, 0, 1)
    assert_saw(left.combined, 1, 0, 2)
    send(own, left)
    assert_saw(left.combined, 1, 0)
    own.own.reset()
    assert_saw(own.combined, 1)
    send(own, left)
    assert_saw(left.combined, 1)


@pytest.mark.parametrize('kept', ['in a store', 'in a file'])
def test_a_robot_that_restarts_with_its_map_replaces_its_older_one(kept, tmp_path):
    own, left = fleet_of(0, path=tmp_path if kept == 'in a store' else None), fleet_of(1)
    send(own, left, now=100)
    saved = maps.to_bytes(own.own, PROVENANCE)
    own.own.close()
    again = Fleet(field_of(tmp_path), 'map')
    if kept == 'in a file':
        again.own.replace_with(maps.from_bytes(saved, again.own, 'map').field)
    again.observe(*walk(2))
    assert again.own.robots == own.own.robots
    assert send(again, left, now=200).reason is None
    assert_saw(left.combined, 1, 0, 2)
    assert left.peers == own.own.robots


def test_observations_that_were_merged_are_not_counted_again():
    own, left, right = fleet_of(0), fleet_of(1), fleet_of(2)
    send(left, own)
    send(right, own)
    own.own.merge(maps.from_bytes(maps.to_bytes(left.own, PROVENANCE), own.own, 'map')[0])
    assert_saw(own.combined, 0, 1, 2)
    assert own.peers == right.own.robots
    assert send(left, own).reason == 'counted_twice'
    assert_saw(own.combined, 0, 1, 2)
    assert send(right, left).reason is None
    assert send(own, left).reason == 'counted_twice'
    assert_saw(left.combined, 1, 2)
    third = fleet_of(3)
    send(left, third)
    refused = send(own, third)
    assert refused.reason == 'counted_twice' and left.own.robots[0] in refused.text
    assert_saw(third.combined, 3, 1)


def test_a_peer_counts_again_when_the_merge_of_its_map_is_taken_back():
    own, left = fleet_of(0), fleet_of(1)
    send(left, own)
    own.own.mark(0.0)
    own.own.merge(left.own)
    assert own.peers == [] and own.num_observations == 26
    assert_saw(own.combined, 0, 1)
    own.own.undo(5.0, now=6.0)
    assert own.peers == left.own.robots and own.num_observations == 26
    assert_saw(own.own, 0)
    assert_saw(own.combined, 0, 1)


def test_two_robots_that_began_from_one_file_are_told_so():
    own = fleet_of(0)
    twin = Fleet(own.own.read(own.own.to_bytes())[0], 'map', now=50)
    twin.observe(*walk(3))
    refused = send(twin, own, now=60)
    assert refused.reason == 'counted_twice' and 'start one of the two without' in refused.text
    assert send(own, twin, now=40).reason == 'own', 'sent before the twin began: its own, perhaps'
    assert_saw(own.combined, 0)


def test_a_map_of_all_that_cannot_be_made_is_not_answered_from(monkeypatch):
    own, left = fleet_of(0), fleet_of(1)
    send(left, own)
    change, calls = Tiles.change, []

    def fails_at_last(tiles, *arguments, **totals):
        calls.append(tiles)
        if len(calls) == 2:
            raise CheckpointError('no space left')
        return change(tiles, *arguments, **totals)

    with monkeypatch.context() as patch:
        patch.setattr(World, '_batches', lambda _, keys, *__: [keys[:9], keys[9:]])
        patch.setattr(Tiles, 'change', fails_at_last)
        with pytest.raises(CheckpointError, match='no space left'):
            _ = own.combined
    assert_saw(own.combined, 0, 1)


def test_what_others_ask_of_a_fleet_makes_no_map_anew():
    """They ask on another thread, while observations are folded."""
    own, left = fleet_of(0), fleet_of(1)
    send(left, own)
    combined = own.combined
    own.own.observe(*walk(2))  # as a merge or an undo does: the combined one is behind
    assert own.is_settled and own.num_observations == 39 and own.num_far_off == 0
    own.forget_solved()
    assert own._combined is combined and combined.num_observations == 26
    assert_saw(own.combined, 0, 1, 2)


def test_time_passes_in_all_maps():
    own, left, everything = fleet_of(0), fleet_of(1), field_of(window=None)
    send(left, own)
    for field in (own.own, everything, *(peer.field for peer in own._peers.values())):
        field.half_life_sec = 10.0
    everything.observe(*walk(0))
    everything.observe(*walk(1))
    assert own.combined.num_observations == 26
    own.forget(7.0)
    everything.forget(7.0)
    combined = own.combined
    for _ in range(2):
        (keys, state), (expected_keys, expected) = (
            field.world.export() for field in (own.combined, everything)
        )
        assert keys == expected_keys
        assert_states_close(state, expected, rtol=1e-9, atol=1e-9)
        own._combined = None  # made anew from own and peers it is the same
    assert own.combined is not combined


# What is refused ---------------------------------------------------------------------------------


def test_maps_that_do_not_fit_are_refused_with_the_reason():
    own, good = fleet_of(0), fleet_of(1)
    field = own.own
    other_model = CMANP(field.model.config).eval().requires_grad_(False)
    other_tiles = Lattice.of(field.model.config, 3.0)
    data = good.state(PROVENANCE, 0).data
    elsewhere = Fleet(field_of(), 'odom').state(Provenance('odom', ((0, 0), (1, 1))), 0)
    tests = [
        ('damaged', 'r', data[:-1], 'is truncated, damaged'),
        ('damaged', 'r', os.urandom(1009), 'is truncated, damaged'),
        ('damaged', 'r', data, 'says it is that of'),
        ('other_map', elsewhere.robot, elsewhere.data, "in the frame 'odom'"),
    ]
    model, tiles, units = field.model, field.geometry, field.normalization
    for parts, reason, text in (
        ((other_model, tiles, units), 'other_weights', 'folded by weights'),
        ((model, other_tiles, units), 'other_map', 'use the same tile_size'),
        ((model, tiles, Normalization(0, 1)), 'other_map', 'use the same value_offset'),
    ):
        sent = Fleet(NeuralField(*parts), 'map').state(PROVENANCE, 0)
        tests.append((reason, sent.robot, sent.data, text))
    before, version = content(own.combined), own.version
    for reason, robot, data, text in tests:
        received = own.receive(robot, 1, data)
        assert received.reason == reason and text in received.text, received
        assert f'robot {robot!r}' in received.text
    assert own.peers == [] and own.version == version
    assert_same_bits(content(own.combined), before)


def test_a_map_that_is_refused_leaves_the_older_one_of_its_robot():
    own, left = fleet_of(0), fleet_of(1)
    send(left, own)
    left.observe(*walk(2))
    sent = left.state(PROVENANCE, 100)
    damaged = sent.data[:-3] + b'abc'
    assert own.receive(sent.robot, sent.sequence, damaged).reason == 'damaged'
    assert_saw(own.combined, 0, 1)
    assert own.receive(sent.robot, sent.sequence, sent.data).reason is None, 'not yet seen'
    assert_saw(own.combined, 0, 1, 2)


def test_strangers_do_not_fill_the_memory():
    own = fleet_of(0)
    for _ in range(MAX_PEERS):
        assert send(fleet_of(), own).reason is None
    refused = send(fleet_of(), own)
    assert refused.reason == 'too_many_robots' and str(MAX_PEERS) in refused.text
    small = fleet_of(max_tiles=23)
    refused = send(fleet_of(0, 1, 2), small)
    assert refused.reason == 'too_large' and 'max_tiles is 23: allow more' in refused.text


# As a message ------------------------------------------------------------------------------------


def test_a_map_goes_over_the_wire_as_a_message():
    rclpy = pytest.importorskip('rclpy', reason='rclpy is not installed: see make setup')
    from cmanp_ros.msg import State
    from rclpy.executors import SingleThreadedExecutor

    own, left = fleet_of(0), fleet_of(1, 2)
    sent, arrived = left.state(PROVENANCE, 7), threading.Event()
    received = []

    def on_state(message):
        received.append(own.receive(message.robot, message.sequence, message.data.tobytes()))
        arrived.set()

    context = rclpy.Context()
    rclpy.init(context=context, domain_id=1 + os.getpid() % 100)
    nodes = [rclpy.create_node(name, context=context) for name in ('left', 'own')]
    executor = SingleThreadedExecutor(context=context)
    executor.add_node(nodes[1])
    try:
        publisher = nodes[0].create_publisher(State, 'fleet', 1)
        nodes[1].create_subscription(State, 'fleet', on_state, 1)
        message = State(**sent._replace(data=array.array('B', sent.data))._asdict())
        for _ in range(200):
            publisher.publish(message)
            executor.spin_once(timeout_sec=0.1)
            if arrived.is_set():
                break
        assert received[0].reason is None, received
    finally:
        executor.shutdown()
        for node in nodes:
            node.destroy_node()
        rclpy.try_shutdown(context=context)
    assert_saw(own.combined, 0, 1, 2)
