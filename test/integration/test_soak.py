"""
A long drive with everything that happens on one: memory stays flat, and all is accounted for.

CMANP_SOAK_SEC is for how long; the default is a short one for CI.
"""

import os
import threading
import time
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest
from cmanp_ros.msg import Prediction, Query
from cmanp_ros.srv import Predict
from conftest import wait_for
from driving import NodeProcess, driver_in, node_process
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import PointCloud2
from std_srvs.srv import SetBool

from cmanp_ros.conversions import stamp_from_nanoseconds
from cmanp_ros.demo.processes import own_domain, stop
from cmanp_ros.qos import LATCHED

SOAK_SEC = float(os.environ.get('CMANP_SOAK_SEC', 20))
STEP_SEC = 0.25
CYCLE = 40  # steps after which all happens again
NUM_POINTS = 100
JUMP_NS = 5_000_000_000
WARNING_PERIOD_SEC = 10.0  # of one reason
GROWTH_BYTES = 24 << 20  # of the resident memory after warm-up that is allowed, however long
WORKING = {'folding', 'overconfident', 'underconfident'}
NOT_YET = {'no_publisher', 'no_messages', 'clock_not_running'}


def cut(cloud):
    cloud.data = cloud.data[:-5]


def rename(cloud):
    cloud.fields[2].name = 'intensity'


def unframe(cloud):
    cloud.header.frame_id = ''


DAMAGES = {'bad_size': cut, 'missing_field': rename, 'no_frame': unframe}


class Soak:
    """The events of a drive, one step after the other, and how often each happened."""

    def __init__(self, driver, start_peer):
        """
        Connect to the node.

        :param driver: `Driver`.
        :param start_peer: starts another node and returns it.
        """
        node = driver.node
        self._driver, self._start_peer = driver, start_peer
        self._clock = node.create_publisher(Clock, '/clock', 10)
        self._queries = node.create_publisher(Query, 'query', 10)
        self._now = 1_000_000_000_000  # [ns]
        self._predict = driver.connect(Predict, 'predict', question(0))
        self._pause = driver.connect(SetBool, 'pause', SetBool.Request(data=False))
        self._subscription = self._peer = None
        self.predictions = driver.collect(Prediction, 'cmanp/prediction', 10)
        self.peers_seen, self.grids, self.answers = 0, [], []
        self.done = dict.fromkeys(('jumps', 'pauses', 'damaged', 'queries', 'peers', 'grids'), 0)

    def step(self, number: int):
        """Do what is to be done at a step, at the next moment of simulated time."""
        driver, phase = self._driver, number % CYCLE
        if phase == 24:
            self._now -= JUMP_NS
            self.done['jumps'] += 1
        self.tick()
        if number % 2:
            driver.publish_cloud(number / 5, NUM_POINTS, self._now)
        if number % 8 == 0:
            self._ask(number)
        if phase in (10, 11, 12, 20, 21, 22):  # again while the warning is still held back
            damage = list(DAMAGES.values())[phase % 10]
            driver.publish_cloud(number / 5, NUM_POINTS, self._now, damage)
            self.done['damaged'] += 1
        if phase == 14:
            self.answers.append(self._pause(SetBool.Request(data=True)))
            self.done['pauses'] += 1
        if phase == 18:
            driver.wait_for_state('paused')
            self.answers.append(self._pause(SetBool.Request(data=False)))
        if phase == 28:
            self._subscription = driver.node.create_subscription(
                PointCloud2, 'cmanp/field', self.grids.append, LATCHED
            )
            self.done['grids'] += 1
        if phase == 38:
            driver.node.destroy_subscription(self._subscription)
        if number % (6 * CYCLE) == 1:
            self._peer = self._start_peer()
            self.done['peers'] += 1
        if number % (6 * CYCLE) == 2 * CYCLE - 1:
            self.stop_peer()
        self.peers_seen = max(self.peers_seen, driver.value('peers'))

    def tick(self):
        """Let simulated time go on."""
        self._now += int(STEP_SEC * 1e9)
        self._clock.publish(Clock(clock=stamp_from_nanoseconds(self._now)))

    def _ask(self, number):
        query = Query(header=question(number).header, id=number, dim_x=2, x=question(number).x)
        self._queries.publish(query)
        self.answers.append(self._predict(question(number)))
        self.done['queries'] += 1

    def stop_peer(self):
        """End the peer, every second one as if its power failed."""
        if self._peer is not None and self.done['peers'] % 2:
            self._peer.kill()
        elif self._peer is not None:
            stop([self._peer])
        self._peer = None


def question(number: int) -> Predict.Request:
    """Return a request for five places on the way."""
    request = Predict.Request(dim_x=2)
    request.header.frame_id = 'map'
    angles = number / 5 + np.linspace(0, 1, 5)
    request.x = (8 * np.stack([np.cos(angles), np.sin(angles)], 1)).ravel().tolist()
    return request


@contextmanager
def a_peer_in(folder, domain_id):
    """
    Return a function that starts a second robot, which restores its map and so keeps its id.
    """
    with ExitStack() as stack:

        def start():
            peer = NodeProcess(
                folder,
                domain_id,
                'peer',
                ('__ns:=/peer', 'points:=/points'),
                state_rate=1.0,
                state_directory=folder / 'peer_maps',
                autosave_period=1.0,
                restore='autosave',
                status_rate=0.0,
            )
            stack.callback(stop, [peer])
            return peer

        yield start


@pytest.mark.slow
@pytest.mark.timeout(SOAK_SEC + 240)
def test_memory_is_flat_warnings_are_few_and_all_is_accounted_for(tmp_path):
    with (
        own_domain() as domain_id,
        a_peer_in(tmp_path, domain_id) as start_peer,
        node_process(
            tmp_path,
            domain_id,
            use_sim_time=True,
            sources=['points'],
            points__reliability='reliable',
            points__depth=100,
            queue_size=100,
            status_rate=2.0,
            grid_resolution=2.5,
            peers=['/peer/cmanp/state'],
        ) as node,
        driver_in(domain_id) as driver,
    ):
        wait_for(lambda: driver.state, 60)
        soak = Soak(driver, start_peer)
        wait_for(lambda: soak.tick() or driver.state == 'no_messages', 60)
        memory, started = drive(soak, node)
        soak.stop_peer()
        wait_for(lambda: driver.state in WORKING)
        wait_for(lambda: driver.counts('messages').received == driver.num_clouds)
        wait_for(lambda: driver.value('messages_pending') == 0)
        wait_for(lambda: all(answer.done() for answer in soak.answers))
        minutes = (time.monotonic() - started) / 60
        report(soak, driver, node, memory, minutes)

        check_memory(memory)
        check_warnings(node, soak)
        check_accounts(soak, driver)


def drive(soak, node):
    """Go through the steps in real time; return times [s] and resident memory [bytes]."""
    never, started, memory, number = threading.Event(), time.monotonic(), [], 1
    while (seconds := time.monotonic() - started) < SOAK_SEC or number % CYCLE != CYCLE - 1:
        soak.step(number)
        memory.append((seconds, node.resident_bytes))
        number += 1
        never.wait(max(0.0, started + number * STEP_SEC - time.monotonic()))
    soak.step(number)
    return np.array(memory), started


def after_warm_up(memory):
    """Return times [s] and memory [bytes] of the second half."""
    return memory[len(memory) // 2 :].T


def report(soak, driver, node, memory, minutes):
    """Print the figures, for docs/reliability.md."""
    seconds, resident = after_warm_up(memory)
    slope = np.polyfit(seconds, resident, 1)[0] * 60 / 2**20
    print(f'\n{minutes:.1f} minutes: {soak.done}, {driver.num_clouds} clouds sent')
    print(f'resident {resident[0] / 2**20:.1f} to {resident[-1] / 2**20:.1f} MiB after warm-up')
    print(f'slope {slope:.3f} MiB/min, {len(node.warnings()) / minutes:.1f} warnings/min')
    print(f'messages {driver.counts("messages")}')
    print(f'states {driver.states}, {len(soak.predictions)} predictions, {len(soak.grids)} grids')


def check_memory(memory):
    """Memory after warm-up is about the same in its first and its last third."""
    resident = after_warm_up(memory)[1]
    third = len(resident) // 3
    growth = np.median(resident[-third:]) - np.median(resident[:third])
    assert growth < GROWTH_BYTES, f'grew by {growth / 2**20:.1f} MiB'


def check_warnings(node, soak):
    """Each reason is warned of once a period; what has none are jumps and changes of state."""
    last, unexplained = {}, 0
    for seconds, reason, text in node.warnings():
        if reason is None:
            unexplained += 1
        else:
            since = seconds - last.get(reason, -np.inf)
            assert since > 0.95 * WARNING_PERIOD_SEC, f'{reason} after {since:.1f} s: {text}'
            last[reason] = seconds
    assert set(DAMAGES) <= set(last), f'only {set(last)} was warned of'
    assert 'internal_error' not in last
    assert unexplained <= 4 * (soak.done['jumps'] + soak.done['pauses']) + 10


def check_accounts(soak, driver):
    """Everything that was sent or asked is there again, and the states are those expected."""
    driver.check_conservation()
    messages = driver.counts('messages')
    each = soak.done['damaged'] // len(DAMAGES)
    on_purpose = {reason: messages.rejected.pop(reason, 0) for reason in ('paused', 'cleared')}
    assert messages.rejected == dict.fromkeys(DAMAGES, each)
    assert messages.dropped == 0
    left_out = soak.done['damaged'] + sum(on_purpose.values())
    assert messages.folded == driver.num_clouds - left_out
    assert driver.value('observations_folded') == messages.folded * NUM_POINTS
    assert driver.value('clock_jumps') == soak.done['jumps']
    assert all(a.result().success for a in soak.answers)
    assert len(soak.predictions) == soak.done['queries']
    assert soak.grids and soak.peers_seen == 1
    assert driver.states <= WORKING | NOT_YET | {'paused', 'no_node'}
    assert 'paused' in driver.states and driver.states & WORKING
