"""One thread for all that touches the map: what waits goes together, long work in steps."""

import threading
import time
from itertools import chain

import pytest

from cmanp_ros.worker import ENOUGH, LONG_SHARE, Worker

TIMEOUT_SEC = 10.0


class Said(list):
    """What was done, in order; one can wait for it."""

    def __init__(self):
        super().__init__()
        self._changed = threading.Condition()

    def append(self, name):
        with self._changed:
            super().append(name)
            self._changed.notify_all()

    def wait_for(self, count):
        """Wait until so much was done."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self) >= count, TIMEOUT_SEC), list(self)


@pytest.fixture
def said():
    return Said()


@pytest.fixture
def worker_with(said):
    """Return a function that makes workers; batches are lists of names."""
    made = []

    def fold(batches):
        for name in chain(*batches):
            said.append(name)
            time.sleep(0.01)  # longer than an answer takes
            yield

    def make(**options):
        made.append(Worker(fold, **{'queue_size': 3} | options))
        return made[-1]

    yield make
    for worker in made:
        worker.stop()


@pytest.fixture
def worker(worker_with):
    """Return a worker."""
    return worker_with()


def steps(said, name, count):
    for number in range(count):
        said.append(f'{name}{number}')
        yield


def test_long_work_goes_on_between_all_else(worker, said):
    done = worker.work(steps(said, 'grid', 3))
    worker.offer(['a'])
    worker.offer(['b'])
    worker.ask(lambda: said.append('answer'))
    worker.start()
    done.result(TIMEOUT_SEC)
    # A question waits for nothing, a batch for a step, and no batch stops the grid.
    assert said == ['answer', 'grid0', 'a', 'grid1', 'b', 'grid2']


def test_batches_that_wait_go_together_and_questions_between_their_steps(worker_with, said):
    worker = worker_with()
    worker.ask(lambda: said.append('before'))
    for names in (['a', 'b'], ['c'], ['d']):
        worker.offer(names)
    grid = worker.work(steps(said, 'grid', 2))
    worker.ask(lambda: worker.ask(lambda: said.append('after')))
    worker.start()
    grid.result(TIMEOUT_SEC)
    said.wait_for(8)
    # Nobody was served for ever, so questions come first; then after each step, of long work too.
    assert said == ['before', 'grid0', 'after', 'a', 'grid1', 'b', 'c', 'd']


def test_observations_get_half_of_the_time(worker_with, said):
    worker = worker_with()
    worker.ask(lambda: time.sleep(0.3))
    worker.offer(['a', 'b', 'c'])
    worker.ask(lambda: worker.ask(lambda: said.append('after')))
    worker.start()
    said.wait_for(4)
    assert said == ['a', 'b', 'c', 'after']


def test_long_work_gets_a_fifth_of_the_time_while_observations_wait(worker_with):
    worker, spans = worker_with(), []

    def long():
        for _ in range(2):
            began = time.monotonic()
            time.sleep(0.02)
            spans.append((began, time.monotonic()))
            yield

    worker.offer(['a'] * 50)
    done = worker.work(long())
    worker.start()
    done.result(TIMEOUT_SEC)
    (began, ended), (again, _) = spans
    assert again - ended >= (1 / LONG_SHARE - 1) * (ended - began)


def test_whoever_asked_is_answered_at_once_when_no_batch_waits(worker_with, said):
    worker = worker_with()
    worker.start()
    for number in range(3):
        assert worker.ask(lambda number=number: number).result(TIMEOUT_SEC) == number


def test_few_observations_wait_for_more_but_questions_do_not(worker_with, said):
    worker = worker_with(window_sec=0.2, queue_size=9)
    worker.start()
    worker.offer(['a'])
    assert worker.ask(lambda: list(said)).result(TIMEOUT_SEC) == []
    worker.offer(['b'])
    said.wait_for(2)
    assert said == ['a', 'b']


def test_many_observations_wait_for_nothing(worker_with, said):
    worker = worker_with(window_sec=1e9)
    worker.start()
    worker.offer(['a'] * (ENOUGH - 1))
    assert worker.ask(lambda: list(said)).result(TIMEOUT_SEC) == []
    worker.offer(['b'])
    said.wait_for(ENOUGH)
    assert len(said) == ENOUGH


def test_full_queue_drops_the_oldest(worker_with):
    worker = worker_with(chunk_size=5)
    assert not any(worker.offer([name]) for name in 'abcde')  # small ones take no room
    assert worker.offer(['f', 'g']) == [['a'], ['b']]
    assert worker.offer(['h'] * 6) == [['c'], ['d']]
    assert worker.num_waiting == 3  # large ones do


def test_one_who_asks_all_the_time_holds_up_nobody(worker, said):
    def again():
        if len(said) < 9:
            worker.ask(again)
        said.append('answer')

    worker.ask(again)
    worker.offer(['a'])
    done = worker.work(steps(said, 'grid', 1))
    worker.start()
    done.result(TIMEOUT_SEC)
    said.wait_for(5)
    assert said[:4] == ['answer', 'grid0', 'answer', 'a']


def test_questions_asked_during_a_step_are_answered_before_the_next(worker, said):
    def asking():
        worker.ask(lambda: said.append('answer'))
        said.append('first')
        yield
        said.append('second')

    done = worker.work(asking())
    worker.start()
    done.result(TIMEOUT_SEC)
    assert said == ['first', 'answer', 'second']


def test_one_piece_of_long_work_after_the_other(worker, said):
    futures = [worker.work(steps(said, name, 2)) for name in 'ab']
    worker.start()
    for future in futures:
        future.result(TIMEOUT_SEC)
    assert said == ['a0', 'a1', 'b0', 'b1']


def test_fault_of_long_work_is_that_of_who_asked(worker, said):
    def broken():
        yield
        raise ValueError('of the grid')

    failed, done = worker.work(broken()), worker.work(steps(said, 'next', 1))
    worker.start()
    with pytest.raises(ValueError, match='of the grid'):
        failed.result(TIMEOUT_SEC)
    done.result(TIMEOUT_SEC)
    assert said == ['next0']


def test_who_asks_after_the_end_is_told_at_once(worker, said):
    worker.stop()
    assert worker.ask(lambda: said.append('too late')).cancelled() and not said
    assert worker.work(iter([said.append])).cancelled() and not said


def test_stop_cancels_what_waits(worker, said):
    entered, gate = threading.Event(), threading.Event()

    def endless():
        while True:
            entered.set()
            gate.wait(TIMEOUT_SEC)
            yield

    futures = [worker.work(endless()), worker.work(steps(said, 'never', 1))]
    worker.start()
    assert entered.wait(TIMEOUT_SEC)
    gate.set()
    worker.stop()
    assert all(future.cancelled() for future in futures)
    assert said == []
