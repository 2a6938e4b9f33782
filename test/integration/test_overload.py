"""Far more clouds than can be folded, twenty clients at once, and clients that vanish."""

import subprocess
import sys
import threading
import time
from contextlib import ExitStack

import numpy as np
import pytest
from cmanp_ros.srv import LoadState, Predict, SaveState
from conftest import wait_for
from driving import RADIUS_M, driver_in, node_process
from std_srvs.srv import Trigger

from cmanp_ros.demo.processes import environment, own_domain

BURST_SEC, PAUSE_SEC = 32.0, 1.0  # the pause is between two requests
NUM_POINTS, RATE = 20000, 20.0  # [Hz] 400,000 points a second
GROWTH_BYTES = 96 << 20  # a step of 45 MiB comes at times and stays one; an endless queue: 208
SETTLED_BYTES = 2 << 20  # less from one answer to the next: buffers have found their size
DEADLINE_SEC = 30.0  # of ~/predict

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.fixture(scope='module')
def domain_id():
    with own_domain() as domain_id:
        yield domain_id


@pytest.fixture(scope='module')
def node(domain_id, tmp_path_factory):
    """Return a node in a process of its own; all tests of this file have it."""
    folder = tmp_path_factory.mktemp('overload')
    with node_process(
        folder,
        domain_id,
        sources=['points'],
        queue_size=1,
        state_directory=folder / 'maps',
        calibration_period=0.0,
        status_rate=4.0,
    ) as node:
        yield node


@pytest.fixture
def driver(node, domain_id):
    """Return a robot in front of a node that has forgotten all that came before."""
    with driver_in(domain_id) as driver:
        wait_for(lambda: driver.state, 60)
        driver.connect(Trigger, 'reset', Trigger.Request())
        wait_for(lambda: driver.value('observations_folded') == 0)
        yield driver


def question(num_targets=1) -> Predict.Request:
    """Return a request for places on the way of the robot."""
    request = Predict.Request(dim_x=2)
    request.header.frame_id = 'map'
    angles = np.linspace(0, 1, num_targets)
    request.x = (RADIUS_M * np.stack([np.cos(angles), np.sin(angles)], 1)).ravel().tolist()
    return request


def answers_of(futures):
    """Wait for all answers and return them."""
    wait_for(lambda: all(future.done() for future in futures), len(futures) * DEADLINE_SEC)
    return [future.result() for future in futures]


def warm_up(node, predict):
    """Ask until the memory has settled; one that never does is for the test to find."""
    for _ in range(12):
        before = node.resident_bytes
        answers_of([predict(question(17)) for _ in range(2)])
        if node.resident_bytes - before < SETTLED_BYTES:
            return


def watch(node, predict):
    """Return memory [bytes] during a burst, and the answers and how long [s] each took."""
    resident, answers, never, ends = [], [], threading.Event(), time.monotonic() + BURST_SEC

    def sample_until(condition):
        while not condition():
            resident.append(node.resident_bytes)
            never.wait(0.02)

    while time.monotonic() < ends:
        paused = time.monotonic()
        sample_until(lambda since=paused: time.monotonic() - since > PAUSE_SEC)
        asked, future = time.monotonic(), predict(question(17))
        sample_until(
            lambda: future.done() or time.monotonic() - asked > DEADLINE_SEC  # noqa: B023
        )
        assert future.done(), 'no answer within the deadline'
        answers.append((future.result(), time.monotonic() - asked))
    return np.array(resident), *zip(*answers, strict=True)


def test_burst_costs_observations_but_neither_memory_nor_answers(node, driver):
    predict = driver.connect(Predict, 'predict', question())
    with driver.driving(RATE, NUM_POINTS):
        driver.wait_for_state('overloaded')
        warm_up(node, predict)
        before, sent = driver.counts('points'), driver.num_points
        resident, answers, seconds = watch(node, predict)
        after, sent = driver.counts('points'), driver.num_points - sent
        assert driver.state == 'overloaded'
    folded, third = after.folded - before.folded, len(resident) // 3
    growth = np.median(resident[-third:]) - np.median(resident[:third])
    print(f'\n{sent} points sent, {folded} folded: {sent / max(folded, 1):.0f} times too many')
    print(f'resident {resident[0] / 2**20:.0f} MiB, grew by {growth / 2**20:.1f} MiB')
    print(f'{len(seconds)} answers, median {np.median(seconds):.2f} s, max {max(seconds):.2f} s')
    assert growth < GROWTH_BYTES
    assert all(answer.success and len(answer.prediction.mean) == 17 for answer in answers)
    assert after.dropped > before.dropped

    # Without a restart it folds again all that comes, and says so.
    wait_for(lambda: driver.value('messages_pending') == 0, 60)
    before = driver.counts('messages')
    with driver.driving(2.0, 100):
        driver.wait_for_state('folding')
    wait_for(lambda: driver.value('messages_pending') == 0)
    after = driver.counts('messages')
    assert after.folded - before.folded == after.received - before.received > 0
    driver.check_conservation()


def test_twenty_clients_at_once_get_each_its_own_answer(node, driver, domain_id):
    with ExitStack() as stack:
        others = [stack.enter_context(driver_in(domain_id)) for _ in range(3)]
        clients = [
            each.connect(Predict, 'predict', question())
            for each in (driver, *others)
            for _ in range(5)
        ]
        with driver.driving(5.0, 500):
            futures = [predict(question(3 + n)) for n, predict in enumerate(clients)]
            answers = answers_of(futures)
    assert [answer.success for answer in answers] == 20 * [True]
    assert [len(answer.prediction.mean) for answer in answers] == list(range(3, 23))


VANISHING = """
import sys, time, rclpy
from cmanp_ros.srv import Predict
rclpy.init()
node = rclpy.create_node('vanishing')
client = node.create_client(Predict, 'cmanp/predict')
client.wait_for_service(20)
request = Predict.Request(dim_x=2, x=[0.0, 0.0])
request.header.frame_id = 'map'
while True:  # until both sides know each other
    future = client.call_async(request)
    rclpy.spin_until_future_complete(node, future, timeout_sec=5)
    if future.done():
        break
request.x = [x / 400 for x in range(20000)]
for _ in range(4):
    client.call_async(request)
request.joint = True  # too many for that: the node will say so once it comes to it
client.call_async(request)
print('asked', flush=True)
time.sleep(60)
"""


def test_client_that_vanishes_in_the_middle_of_a_request_hurts_nobody(node, driver, domain_id):
    def is_refused():
        return any('joint over 10000' in text for *_, text in node.warnings())

    predict = driver.connect(Predict, 'predict', question())
    with driver.driving(5.0, 500):  # of an empty map the answers would be there at once
        wait_for(lambda: driver.value('observations_folded') > 2000)
    with subprocess.Popen(
        [sys.executable, '-c', VANISHING], stdout=subprocess.PIPE, env=environment(domain_id)
    ) as vanishing:
        assert vanishing.stdout.readline() == b'asked\n'
        vanishing.kill()
    assert not is_refused(), 'it was too late: the node was through with it'
    (answer,) = answers_of([predict(question(7))])
    assert answer.success and len(answer.prediction.mean) == 7
    wait_for(is_refused)


def test_services_called_while_maps_are_saved_are_all_answered(node, driver):
    predict = driver.connect(Predict, 'predict', question())
    reset = driver.connect(Trigger, 'reset', Trigger.Request())
    wait_for(lambda: driver.value('observations_folded') == 0)
    nothing = SaveState.Request(name='connected', overwrite=True)
    save = driver.connect(SaveState, 'save_state', nothing)
    load = driver.connect(LoadState, 'load_state', LoadState.Request(name='connected'))
    names = [f'map{number}' for number in range(4)]
    with driver.driving(10.0, 500):
        wait_for(lambda: driver.value('observations_folded') > 2000)
        saved = answers_of([save(SaveState.Request(name=names[0]))])
        futures = [reset(Trigger.Request()) for _ in range(2)]
        for name in names[1:]:
            futures += [save(SaveState.Request(name=name)), predict(question(5))]
        answers = answers_of(futures)
    assert all(answer.success for answer in answers), [answer.message for answer in answers]
    saved += [answer for answer in answers if isinstance(answer, SaveState.Response)]
    assert saved[0].num_observations > 2000
    for name, answer in zip(names, saved, strict=True):
        (loaded,) = answers_of([load(LoadState.Request(name=name))])
        assert loaded.success, loaded.message
        found = loaded.num_observations, loaded.num_tiles
        assert found == (answer.num_observations, answer.num_tiles)
