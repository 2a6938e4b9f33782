"""
Transform to the map frame: TF lookup at the stamp of a message.

tf2_ros is imported only when a frame differs from the map's.
"""

from __future__ import annotations

import contextlib
import functools
import os
import textwrap
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from builtin_interfaces.msg import Time
from rclpy.clock import Clock, ClockType
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.time import Time as RclpyTime

from cmanp_ros.core.errors import TransformError
from cmanp_ros.motion import check_header, rigid_motion

_CHECK_PERIOD_SEC = 0.02


class _Waiting(NamedTuple):
    """A message that waits for its transform."""

    frame: str
    stamp: RclpyTime  # 0: the latest known
    clock: int  # [ns] what the clock of the node said when the message came
    since: float  # [s] of the monotonic clock
    ready: Callable[[np.ndarray, np.ndarray], None]
    failed: Callable[[TransformError], None]


class TransformListener:
    """
    Finds transforms to the map frame without blocking; messages wait until theirs is there.

    TF is listened to only once a frame differs from the map's. What waits under the same key is
    answered in the order it came: a message whose transform is there waits for those before it,
    which is never longer than the timeout.
    """

    def __init__(
        self, node: Node, timeout_sec: float = 0.2, map_frame: str = 'map', max_pending: int = 10
    ) -> None:
        """
        Prepare; nothing is imported, created or subscribed yet.

        :param node: whose context, namespace, name and time source the listener takes over.
        :param timeout_sec: [s] how long a message waits for a transform that is not there yet;
            the attribute may be changed at any time, also for those that wait.
        :param map_frame: where points go.
        :param max_pending: messages that may wait under one key.
        """
        self.timeout_sec = timeout_sec
        self._node = node
        self._map_frame = map_frame.strip('/')
        self._max_pending = max_pending
        self._lock = threading.Lock()  # never held when somebody is called back
        self._waiting: dict[str, deque[_Waiting]] = defaultdict(deque)
        self._tf2 = None
        self._closed = False

    def is_map_frame(self, frame: str) -> bool:
        """Tell whether points of a frame are in the map frame already."""
        return frame.strip('/') == self._map_frame

    def request(
        self,
        key: str,
        frame: str,
        stamp: Time,
        ready: Callable[[np.ndarray, np.ndarray], None],
        failed: Callable[[TransformError], None],
        allow_latest: bool = False,
    ) -> None:
        """
        Ask for the transform that takes points of a frame to the map frame, as it was at a stamp.

        Exactly one of `ready` and `failed` is called, once. For points in the map frame, and for
        messages that can never be transformed, that happens before this returns; otherwise on
        the thread of the listener, or of whoever calls `request` (when the queue is full),
        `clear` or `close`. They must be short: others wait for that thread.

        :param key: whose message it is, as the name of its source; each key has its own queue.
        :param frame: where points come from (frame_id of a message).
        :param stamp: time of the message.
        :param ready: called with rotation (3, 3) and translation (3,) [m]:
            p_map = rotation @ p_frame + translation.
        :param failed: called with the error; its `reason` is a key for counting.
        :param allow_latest: take a stamp of 0 for "the latest known"; refused otherwise.
        """
        source = frame.strip('/')
        if self.is_map_frame(frame):
            return ready(np.eye(3), np.zeros(3))
        try:
            check_header(source, stamp, self._map_frame, allow_latest)
            displaced = self._enqueue(key, source, RclpyTime.from_msg(stamp), ready, failed)
        except TransformError as error:
            return failed(error)
        if displaced is not None:
            message = (
                f"more than {self._max_pending} messages of '{key}' wait for a transform to "
                f"'{self._map_frame}': the oldest, in frame '{displaced.frame}', was given up "
                f'after {time.monotonic() - displaced.since:.3f} s. Publish transforms sooner or '
                'messages less often, or shorten the parameter tf_timeout'
            )
            displaced.failed(TransformError('tf_queue_full', message))

    def pending(self, key: str | None = None) -> int:
        """Return how many messages wait, under a key or in all."""
        with self._lock:
            return sum(len(queue) for queue in self._queues(key))

    def waiting_for(self) -> list[tuple[str, float]]:
        """Return each frame that is waited for, and the longest that a message waits [s]."""
        with self._lock:
            waiting = [each for queue in self._queues() for each in queue]
        now, since = time.monotonic(), {}
        for each in sorted(waiting, key=lambda each: each.since):
            since.setdefault(each.frame, each.since)
        return [(frame, now - began) for frame, began in since.items()]

    def clear(self, key: str | None = None) -> int:
        """
        Give up what waits, under a key or all: each fails with the reason 'cleared'.

        :return: how many those were.
        """
        return self._give_up(key, 'cleared', 'was given up: the map was reset or the clock jumped')

    def close(self) -> None:
        """
        Stop listening and release the node and the thread; what waits fails with 'closed'.

        Not to be called from `ready` or `failed`.
        """
        with self._lock:
            self._closed = True
            tf2, self._tf2 = self._tf2, None
        if tf2 is not None:
            tf2.close()
        self._give_up(None, 'closed', 'was given up: the transform listener is closed')

    def _enqueue(self, key, source, stamp, ready, failed) -> _Waiting | None:
        """Add to the queue, start to listen at the first; return what had to leave for it."""
        with self._lock:
            if self._closed:
                raise TransformError('closed', 'the transform listener is closed')
            if self._tf2 is None:
                self._tf2 = self._start_tf2(source)
            clock = self._node.get_clock().now().nanoseconds
            queue = self._waiting[key]
            queue.append(_Waiting(source, stamp, clock, time.monotonic(), ready, failed))
            self._tf2.check_soon()
            return queue.popleft() if len(queue) > self._max_pending else None

    def _start_tf2(self, source: str) -> _Tf2:
        """Start to listen, or say which package is missing."""
        try:
            return _Tf2(self._node, self._answer_all)
        except ImportError as error:
            package = f'ros-{os.environ.get("ROS_DISTRO", "jazzy")}-tf2-ros-py'
            raise TransformError(
                'no_tf2',
                f"points in frame '{source}' need a transform to '{self._map_frame}', but tf2_ros "
                f'is not installed: sudo apt install {package}, or publish in '
                f"'{self._map_frame}' ({error})",
            ) from error

    def _queues(self, key: str | None = None) -> list[deque[_Waiting]]:
        """Return the queue of a key, or all. The lock is held."""
        if key is None:
            return list(self._waiting.values())
        return [self._waiting[key]] if key in self._waiting else []

    def _give_up(self, key: str | None, reason: str, why: str) -> int:
        """Empty the queue of a key, or all, and tell those who waited."""
        given_up = []
        with self._lock:
            for queue in self._queues(key):
                given_up += queue
                queue.clear()
        for each in given_up:
            each.failed(TransformError(reason, f"a message in frame '{each.frame}' {why}"))
        return len(given_up)

    def _answer_all(self) -> bool:
        """Call back all that can be answered now; return whether something still waits."""
        with self._lock:
            keys = list(self._waiting)
        for key in keys:
            while (answer := self._take_answer(key)) is not None:
                try:
                    answer()
                except Exception as error:  # a fault in a callback must not end the thread
                    self._node.get_logger().error(f"a message of '{key}' was lost: {error!r}")
        return self.pending() > 0

    def _take_answer(self, key: str) -> Callable[[], None] | None:
        """Take the first of a queue out and return the call that answers it; None: not yet."""
        with self._lock:
            if self._closed or not self._waiting[key]:
                return None
            answer = self._answer(self._waiting[key][0])
            if answer is not None:
                self._waiting[key].popleft()
            return answer

    def _answer(self, waiting: _Waiting) -> Callable[[], None] | None:
        """Look the transform up; None: it may still come."""
        try:
            found = self._tf2.lookup(self._map_frame, waiting.frame, waiting.stamp)
            return functools.partial(waiting.ready, *found)
        except TransformError as error:  # found, but not usable
            return functools.partial(waiting.failed, error)
        except self._tf2.exception as error:
            timeout_sec = self.timeout_sec
            if time.monotonic() - waiting.since < timeout_sec:
                return None
            at = f'at {_seconds(waiting.stamp)} s' if waiting.stamp.nanoseconds else 'at any time'
            reason, why = self._tf2.explain(error, self._map_frame, waiting)
            message = (
                f"no transform from '{waiting.frame}' to '{self._map_frame}' {at} within "
                f'{timeout_sec:g} s (parameter tf_timeout): {why}'
            )
            return functools.partial(waiting.failed, TransformError(reason, message))
        except Exception as error:  # a fault of tf2 must not end the thread, nor wait for ever
            message = f"a fault when '{waiting.frame}' was looked up: {error!r}"
            return functools.partial(waiting.failed, TransformError('bad_transform', message))


class _Tf2:
    """
    The tf2 buffer, with a node, an executor and a thread of its own that fill it.

    On the executor of the main node the buffer falls behind whenever a callback takes long.
    """

    def __init__(self, node: Node, check: Callable[[], bool]) -> None:
        """
        Start to listen.

        :param node: the main node.
        :param check: called on the thread after `check_soon`, and then periodically for as long
            as it returns true.
        :raises ImportError: tf2_ros is not installed.
        """
        import tf2_ros

        self.exception = tf2_ros.TransformException
        self._extrapolation = tf2_ros.ExtrapolationException
        self._check, self._began = check, time.monotonic()
        self._node = _companion_node(node)
        # With a node the buffer follows simulated time, and is cleared if that jumps back.
        self._buffer = tf2_ros.Buffer(node=self._node)
        self._listener = tf2_ros.TransformListener(self._buffer, self._node, spin_thread=False)
        self._soon = self._node.create_guard_condition(self._run_check)
        self._timer = self._node.create_timer(
            _CHECK_PERIOD_SEC,
            self._run_check,
            clock=Clock(clock_type=ClockType.STEADY_TIME),  # goes on when simulated time stands
            autostart=False,
        )
        self._executor, self._thread = _spin_in_thread(self._node)

    def check_soon(self) -> None:
        """Have the check run on the thread."""
        self._soon.trigger()

    def lookup(self, target: str, source: str, stamp: RclpyTime) -> tuple[np.ndarray, np.ndarray]:
        """
        Return rotation (3, 3) and translation (3,) [m] of what is known now, without waiting.

        :raises exception: no such transform is known.
        :raises TransformError: it is no rigid motion.
        """
        found = self._buffer.lookup_transform(target, source, stamp).transform
        t, q = found.translation, found.rotation
        return rigid_motion((t.x, t.y, t.z), (q.x, q.y, q.z, q.w), source, target)

    def explain(self, error: Exception, target: str, waiting: _Waiting) -> tuple[str, str]:
        """Return why a lookup failed: a key for counting, and words."""
        newest = None
        if isinstance(error, self._extrapolation):  # the frames are connected at other times
            with contextlib.suppress(self.exception):
                latest = self._buffer.lookup_transform(target, waiting.frame, RclpyTime())
                newest = RclpyTime.from_msg(latest.header.stamp).nanoseconds
        if newest is None:
            known = textwrap.shorten(self._buffer.all_frames_as_string(), 400, placeholder=' ...')
            return 'no_transform', (
                f'{error}. After {time.monotonic() - self._began:.1f} s of listening these '
                f'transforms are known: {known or "none"}. Publish what connects the two frames, '
                'or correct the frame_id'
            )
        stamp = waiting.stamp.nanoseconds
        offsets = (
            f'newest transform minus stamp: {(newest - stamp) / 1e9:+.3f} s, clock of this node '
            f'minus stamp when the message came: {(waiting.clock - stamp) / 1e9:+.3f} s'
        )
        if stamp > newest:
            return 'transform_too_new', (
                f'the stamp is ahead of the newest transform ({offsets}). Publish transforms '
                'sooner or raise tf_timeout; if they come from another computer than the message, '
                'synchronize the clocks (NTP)'
            )
        return 'transform_too_old', (
            f'the stamp is before the oldest transform kept ({offsets}). Send messages sooner; '
            'if they come from another computer than the transforms, synchronize the clocks (NTP)'
        )

    def close(self) -> None:
        """Stop the thread and destroy the node."""
        self._executor.shutdown(timeout_sec=1.0)
        self._thread.join(timeout=2.0)
        self._node.destroy_node()

    def _run_check(self) -> None:
        if self._check():
            self._timer.reset()
        else:
            self._timer.cancel()


def _seconds(stamp: RclpyTime) -> str:
    """Write a time with all its digits."""
    seconds, nanoseconds = stamp.seconds_nanoseconds()
    return f'{seconds}.{nanoseconds:09d}'


def _companion_node(node):
    """Create a node beside another one: same context, namespace and time source."""
    name = f'{node.get_name()}_transforms'
    use_sim_time = bool(
        node.has_parameter('use_sim_time') and node.get_parameter('use_sim_time').value
    )
    return Node(
        name,
        context=node.context,
        namespace=node.get_namespace(),
        cli_args=[
            '--ros-args',
            '-r',
            f'__node:={name}',
        ],  # wins over a __node remapping meant for the main node
        parameter_overrides=[Parameter('use_sim_time', value=use_sim_time)],
        start_parameter_services=False,
    )


def _spin_in_thread(node):
    """Spin a node on an executor and a thread of its own."""
    executor = SingleThreadedExecutor(context=node.context)
    executor.add_node(node)

    def spin() -> None:
        with contextlib.suppress(ExternalShutdownException):  # context shut down before close()
            executor.spin()

    thread = threading.Thread(target=spin, name=node.get_name(), daemon=True)
    thread.start()
    return executor, thread
