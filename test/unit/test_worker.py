"""One thread for all that touches the map: answers first, long work a step at a time."""

import threading

import pytest

from cmanp_ros.worker import Worker

TIMEOUT_SEC = 10.0


@pytest.fixture
def said():
    return []


@pytest.fixture
def worker(said):
    """Return a worker that is stopped at the end; batches are lists of names."""

    def fold(batch):
        for name in batch:
            said.append(name)
            yield

    worker = Worker(fold, queue_size=3)
    yield worker
    worker.stop()


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
    assert said == ['answer', 'a', 'grid0', 'b', 'grid1', 'grid2']


def test_one_who_asks_all_the_time_holds_up_nobody(worker, said):
    def again():
        if len(said) < 3:
            worker.ask(again)
        said.append('answer')

    worker.ask(again)
    worker.offer(['a'])
    done = worker.work(steps(said, 'grid', 1))
    worker.start()
    done.result(TIMEOUT_SEC)
    assert said.index('a') == 1
    assert 'grid0' in said[:4]


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
