"""
The thread that owns the model: folds batches from a bounded queue, answers between chunks.

No ROS and no torch here: `fold` and the answers are callables.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Any

TIMEOUT_SEC = 30.0  # that whoever asks should wait for an answer at most


def is_over(future: Future | None) -> bool:
    """Tell whether work in the background has ended, or never began."""
    return future is None or future.done()


class Worker:
    """
    One thread, three queues.

    Answers go first, so that a burst of observations delays no client; then observations; long
    work, such as a grid, goes on a step at a time after each of them.
    """

    def __init__(self, fold: Callable[[Any], Iterable[None]], queue_size: int):
        """
        Prepare; `start` starts the thread.

        :param fold: called with each batch; an iterator, and between two of its steps answers
            are served. It must not raise.
        :param queue_size: batches that may wait.
        """
        self._fold, self._queue_size = fold, queue_size
        self._batches, self._questions, self._long = deque(), deque(), deque()
        self._condition = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name='cmanp worker', daemon=True)

    def start(self):
        """Start the thread."""
        self._thread.start()

    def stop(self):
        """End the thread after the step it is in; what waits is cancelled."""
        with self._condition:
            self._stopping = True
            self._condition.notify()
        if self._thread.is_alive():
            self._thread.join()
        for _, future in (*self._questions, *self._long):
            future.cancel()

    def offer(self, batch) -> list:
        """
        Hand over a batch.

        :return: batches that were dropped for it: the oldest, if the queue was full.
        """
        with self._condition:
            self._batches.append(batch)
            dropped = []
            while len(self._batches) > self._queue_size:
                dropped.append(self._batches.popleft())
            self._condition.notify()
        return dropped

    @property
    def num_waiting(self) -> int:
        """Batches that wait."""
        return len(self._batches)

    def clear(self) -> list:
        """Take back and return the batches that wait."""
        with self._condition:
            waiting = list(self._batches)
            self._batches.clear()
        return waiting

    def ask(self, question: Callable[[], Any]) -> Future:
        """Run a callable on the thread that owns the model, before the next chunk."""
        future = Future()
        with self._condition:
            self._questions.append((question, future))
            self._condition.notify()
        return future

    def work(self, steps: Iterator[None]) -> Future:
        """Run a long piece of work on the thread that owns the model, a step now and then."""
        future = Future()
        with self._condition:
            self._long.append((steps, future))
            self._condition.notify()
        return future

    def _run(self):
        while True:
            with self._condition:
                self._condition.wait_for(
                    lambda: self._stopping or self._questions or self._batches or self._long
                )
                if self._stopping:
                    return
                batch = self._batches.popleft() if self._batches else None
            self._answer()  # who asks all the time holds up no observations: one batch each time
            if batch is not None:
                for _ in self._fold(batch):
                    self._answer()
                    if self._stopping:
                        return
            self._go_on()

    def _go_on(self):
        """Take one step of the long work that waited longest."""
        if not self._long:
            return
        steps, future = self._long[0]
        try:
            next(steps)
            return
        except StopIteration:
            future.set_result(None)
        except Exception as error:  # it belongs to whoever asked
            future.set_exception(error)
        self._long.popleft()

    def _answer(self):
        for _ in range(len(self._questions)):
            question, future = self._questions.popleft()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(question())
                except Exception as error:  # it belongs to whoever asked
                    future.set_exception(error)
