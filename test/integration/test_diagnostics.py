"""Counters add up under any sequence and any threads; diagnostics carry them."""

import threading

import pytest
from builtin_interfaces.msg import Time
from diagnostic_msgs.msg import DiagnosticStatus
from hypothesis import given, settings
from hypothesis import strategies as st

from cmanp_ros.diagnostics import (
    Counters,
    CounterSnapshot,
    RateMeter,
    array_message,
    status_message,
)


class FakeClock:
    """A clock that stands until it is moved."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def test_counters_start_at_zero_and_conserved():
    snapshot = Counters().snapshot()
    assert snapshot == CounterSnapshot(0, 0, {}, 0, 0, 0.0)
    assert snapshot.conserved


def test_what_is_received_is_pending_until_it_is_decided_upon():
    counters = Counters()
    counters.receive(31)
    counters.fold(7)
    counters.reject('not_finite', 5)
    counters.reject('outside', 3)
    counters.reject('not_finite', 2)
    counters.drop(11)
    snapshot = counters.snapshot()
    assert (snapshot.received, snapshot.folded, snapshot.dropped) == (31, 7, 11)
    assert snapshot.rejected == {'not_finite': 7, 'outside': 3}
    assert snapshot.pending == 31 - 7 - 10 - 11
    assert snapshot.conserved


def test_counting_something_twice_is_noticed():
    counters = Counters()
    counters.receive(5)
    counters.fold(5)
    counters.drop(5)
    assert not counters.snapshot().conserved


@pytest.mark.parametrize('missing', ['received', 'folded', 'dropped', 'pending'])
def test_snapshot_that_does_not_add_up_is_not_conserved(missing):
    numbers = {'received': 17, 'folded': 2, 'dropped': 3, 'pending': 5}
    assert CounterSnapshot(rejected={'not_finite': 7}, rate=0.0, **numbers).conserved
    numbers[missing] += 1
    assert not CounterSnapshot(rejected={'not_finite': 7}, rate=0.0, **numbers).conserved


def test_rejecting_nothing_leaves_no_reason():
    counters = Counters()
    counters.reject('not_finite', 0)
    assert counters.snapshot().rejected == {}


def test_snapshot_does_not_change_afterwards():
    counters = Counters()
    counters.receive(2)
    counters.reject('not_finite')
    before = counters.snapshot()
    counters.reject('not_finite')
    assert before.rejected == {'not_finite': 1}


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.sampled_from(['fold', 'reject', 'drop']), st.integers(0, 9))))
def test_counters_are_conserved_after_every_step(steps):
    counters = Counters()
    for action, count in steps:
        counters.receive(count)
        assert counters.snapshot().conserved
        getattr(counters, action)(*(['reason'] if action == 'reject' else []), count)
        assert counters.snapshot().conserved
    assert counters.snapshot().pending == 0


def test_counters_are_exact_with_several_threads():
    counters = Counters()

    def work():
        for _ in range(2000):
            counters.receive(3)
            counters.fold(2)
            counters.reject('not_finite')

    threads = [threading.Thread(target=work) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    snapshot = counters.snapshot()
    assert (snapshot.received, snapshot.folded) == (30000, 20000)
    assert (snapshot.rejected, snapshot.pending) == ({'not_finite': 10000}, 0)


def test_rate_of_a_steady_stream_is_its_frequency():
    clock = FakeClock()
    meter = RateMeter(window_sec=10.0, clock=clock)
    for _ in range(700):
        clock.now += 0.1
        meter.add(7)
        if clock.now > 1005.0:
            assert meter.rate() == pytest.approx(70.0, rel=0.03)


def test_rate_forgets_what_is_older_than_the_window():
    clock = FakeClock()
    counters = Counters(window_sec=10.0, clock=clock)
    clock.now += 1.0
    counters.receive(130)
    counters.fold(130)
    clock.now += 4.0
    assert counters.snapshot().rate == pytest.approx(130 / 5.0)
    clock.now += 11.0
    assert counters.snapshot().rate == 0.0


def test_rate_meter_does_not_grow():
    clock = FakeClock()
    meter = RateMeter(window_sec=1.0, clock=clock)
    for _ in range(10000):
        clock.now += 0.07
        meter.add(1)
    assert len(meter._buckets) <= 10


def test_values_of_a_snapshot_name_each_reason():
    snapshot = CounterSnapshot(17, 2, {'not_finite': 7}, 3, 5, 1.5)
    assert snapshot.values('points_') == {
        'points_received': 17,
        'points_folded': 2,
        'points_rejected_not_finite': 7,
        'points_dropped': 3,
        'points_pending': 5,
        'points_per_sec': 1.5,
    }


@pytest.mark.parametrize('level', [DiagnosticStatus.WARN, 1])
def test_status_carries_its_values_as_text(level):
    values = {'folded': 12, 'rate': 1.25, 'active': True, 'waiting_for': None, 'device': 'cpu'}
    status = status_message('cmanp: field', level, 'waiting for points', values, 'robot7')
    assert (status.name, status.message) == ('cmanp: field', 'waiting for points')
    assert (status.level, status.hardware_id) == (DiagnosticStatus.WARN, 'robot7')
    assert {item.key: item.value for item in status.values} == {
        'folded': '12',
        'rate': '1.25',
        'active': 'true',
        'waiting_for': '',
        'device': 'cpu',
    }


def test_status_has_a_hardware_id_unless_told():
    assert status_message('cmanp: field', DiagnosticStatus.OK, '', {}).hardware_id == 'cmanp'


def test_array_carries_statuses_and_stamp():
    statuses = [status_message(f'cmanp: {task}', 0, '', {}) for task in ('field', 'input')]
    message = array_message(statuses, Time(sec=3, nanosec=5))
    assert [status.name for status in message.status] == ['cmanp: field', 'cmanp: input']
    assert (message.header.stamp.sec, message.header.stamp.nanosec) == (3, 5)
