"""
The thread that owns the model: folds batches from a bounded queue, answers between chunks.

No ROS and no torch here: `fold` and the answers are callables.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from concurrent.futures import Future
from typing import Any

LONG_SHARE = 0.2  # of the time for long work while observations wait
ENOUGH = 100  # observations: more of them at once cost as much each
TIMEOUT_SEC = 30.0  # that whoever asks should wait for an answer at most


def is_over(future: Future | None) -> bool:
    """Tell whether work in the background has ended, or never began."""
    return future is None or future.done()


class Worker:
    """
    One thread, three queues.

    Observations that wait are folded together, in steps. Between two of these all questions are
    answered, as seldom as observations get half of the time, and long work, such as a grid, goes a
    step on now and then. A few observations wait for more of them.
    """

    def __init__(
        self,
        fold: Callable[[list], Iterable[None]],
        queue_size: int,
        chunk_size: int = 1,
        window_sec: float = 0.0,
    ):
        """
        Prepare; `start` starts the thread.

        :param fold: called with all batches that wait; an iterator, and between two of its steps
            answers are served. It must not raise.
        :param queue_size: batches that may wait.
        :param chunk_size: observations that may wait in any number of batches.
        :param window_sec: [s] that a few observations wait for more.
        """
        self._fold, self._queue_size, self._chunk_size = fold, queue_size, chunk_size
        self._window_sec = window_sec
        self._offered_at = self._served_at = -float('inf')
        self._served_for = 0.0  # [s] the last time
        self._may_go_on_at = -float('inf')  # while observations wait
        self._batches, self._questions, self._long = deque(), deque(), deque()
        self._condition = threading.Condition()  # its lock can be taken twice by one thread
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

    def offer(self, batch: Sized) -> list:
        """
        Hand over a batch; its length is the number of observations.

        :return: batches that were dropped for it: the oldest, if the queue was full.
        """
        with self._condition:
            if not self._batches:
                self._offered_at = time.monotonic()
            self._batches.append(batch)
            dropped = []
            while len(self._batches) > self._queue_size and self._size > self._chunk_size:
                dropped.append(self._batches.popleft())
            self._condition.notify()
        return dropped

    @property
    def _size(self):
        return sum(len(batch) for batch in self._batches)

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
        """Run a callable on the thread that owns the model, between two chunks."""
        return self._queued(self._questions, question)

    def work(self, steps: Iterator[None]) -> Future:
        """Run a long piece of work on the thread that owns the model, a step now and then."""
        return self._queued(self._long, steps)

    def _queued(self, queue, wanted):
        """Put what is wanted in a queue; after the end it is cancelled at once."""
        future = Future()
        with self._condition:
            if self._stopping:
                future.cancel()
            else:
                queue.append((wanted, future))
                self._condition.notify()
        return future

    def _run(self):
        while True:
            with self._condition:
                while not (self._stopping or self._questions or self._long or self._is_due):
                    left = self._offered_at + self._window_sec - time.monotonic()
                    self._condition.wait(max(left, 0.0) if self._batches else None)
                if self._stopping:
                    return
                batches = self.clear() if self._is_due else []
            if not batches:
                self._may_go_on_at = -float('inf')
            if not batches or self._is_time_to_serve:
                self._serve()
            for _ in self._fold(batches) if batches else ():
                if self._stopping:
                    return
                if self._is_time_to_serve:
                    self._serve()

    @property
    def _is_due(self):
        """Tell whether batches wait, and have waited long enough or are large."""
        waited = time.monotonic() - self._offered_at
        return bool(self._batches) and (waited >= self._window_sec or self._size >= ENOUGH)

    @property
    def _is_time_to_serve(self):
        return time.monotonic() - self._served_at >= self._served_for

    def _serve(self):
        """Answer all that was asked until now, and go on with long work if it is its turn."""
        began_at = time.monotonic()
        self._answer()  # who asks all the time holds up nobody: the questions of now
        answered_at = time.monotonic()
        if self._long and answered_at >= self._may_go_on_at:
            self._go_on()
            now = time.monotonic()
            self._may_go_on_at = now + (now - answered_at) * (1 / LONG_SHARE - 1)
            began_at += now - answered_at
            self._answer()  # of meanwhile: they shall not wait for observations, too
        self._served_at = time.monotonic()
        self._served_for = self._served_at - began_at

    def _go_on(self):
        """Take one step of the long work that waited longest."""
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
