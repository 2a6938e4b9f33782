"""
What the node did with its input, as counters that must add up, and as diagnostic_msgs.

Written without diagnostic_updater: that one publishes on an absolute topic and falls silent when
simulated time stands still. Rates go by the monotonic clock.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from builtin_interfaces.msg import Time
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue

from cmanp_ros.health import Counts

_BUCKETS_PER_WINDOW = 10


@dataclasses.dataclass(frozen=True)
class CounterSnapshot(Counts):
    """
    What became of everything received, at one moment.

    :ivar pending: received and not yet decided upon.
    :ivar rate: folded per second, over the last window.
    """

    pending: int = 0
    rate: float = 0.0

    def __add__(self, other: CounterSnapshot) -> CounterSnapshot:
        """Return the counters of two inputs together."""
        return CounterSnapshot(
            self.received + other.received,
            self.folded + other.folded,
            dict(Counter(self.rejected) + Counter(other.rejected)),
            self.dropped + other.dropped,
            self.pending + other.pending,
            self.rate + other.rate,
        )

    @property
    def conserved(self) -> bool:
        """Tell whether everything received is accounted for exactly once."""
        settled = self.folded + sum(self.rejected.values()) + self.dropped
        return self.pending >= 0 and self.received == settled + self.pending

    def values(self, prefix: str = '') -> dict[str, Any]:
        """
        List the counters for a status message.

        :param prefix: put before each key, such as ``points_``.
        :return: key -> number; a key 'rejected_<reason>' for each reason that occurred.
        """
        rejected = {
            f'{prefix}rejected_{reason}': count for reason, count in sorted(self.rejected.items())
        }
        return {
            f'{prefix}received': self.received,
            f'{prefix}folded': self.folded,
            **rejected,
            f'{prefix}dropped': self.dropped,
            f'{prefix}pending': self.pending,
            f'{prefix}per_sec': self.rate,
        }


class RateMeter:
    """Counts per second over the last window, in constant memory."""

    def __init__(
        self, window_sec: float = 10.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """
        Start counting.

        :param window_sec: [s] how far back the rate looks.
        :param clock: steady clock [s].
        """
        self._clock = clock
        self._start = clock()
        self._bucket_sec = window_sec / _BUCKETS_PER_WINDOW
        self._buckets = deque(maxlen=_BUCKETS_PER_WINDOW)  # of [index, count]

    def add(self, count: int) -> None:
        """Count some events that happened now."""
        index = int((self._clock() - self._start) / self._bucket_sec)
        if self._buckets and self._buckets[-1][0] == index:
            self._buckets[-1][1] += count
        else:
            self._buckets.append([index, count])

    def rate(self) -> float:
        """Return the events per second over the window, or since the start if later."""
        elapsed = self._clock() - self._start
        oldest = max(0, int(elapsed / self._bucket_sec) - _BUCKETS_PER_WINDOW + 1)
        total = sum(count for index, count in self._buckets if index >= oldest)
        return total / max(elapsed - oldest * self._bucket_sec, self._bucket_sec)


class Counters:
    """
    Thread-safe counters of one unit: keep one object for points and another for messages.

    Everything is received first and then folded, rejected for a reason, or dropped from a full
    queue; what is none of these yet is pending.
    """

    def __init__(
        self, window_sec: float = 10.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """
        Start at zero.

        :param window_sec: [s] over which the rate is taken.
        :param clock: steady clock [s].
        """
        self._lock = threading.Lock()
        self._meter = RateMeter(window_sec, clock)
        self._received = self._folded = self._dropped = self._pending = 0
        self._rejected: Counter[str] = Counter()

    def receive(self, count: int = 1) -> None:
        """Count what has arrived; it is pending from now on."""
        with self._lock:
            self._received += count
            self._pending += count

    def fold(self, count: int = 1) -> None:
        """Count what has become part of the state."""
        with self._lock:
            self._pending -= count
            self._folded += count
            self._meter.add(count)

    def reject(self, reason: str, count: int = 1) -> None:
        """
        Count what cannot be used.

        :param reason: short key, such as 'not_finite' or the reason of a `MessageError`.
        :param count: how many.
        """
        if count == 0:
            return
        with self._lock:
            self._pending -= count
            self._rejected[reason] += count

    def drop(self, count: int = 1) -> None:
        """Count what a full queue pushed out."""
        with self._lock:
            self._pending -= count
            self._dropped += count

    def snapshot(self) -> CounterSnapshot:
        """Read all counters at one moment."""
        with self._lock:
            return CounterSnapshot(
                received=self._received,
                folded=self._folded,
                rejected=dict(self._rejected),
                dropped=self._dropped,
                pending=self._pending,
                rate=self._meter.rate(),
            )


class Latency:
    """The last durations, in constant memory; [s]."""

    def __init__(self, size: int = 100):
        """Start with none."""
        self._last, self._number = np.zeros(size), 0

    def add(self, seconds: float):
        """Take note of one."""
        self._last[self._number % len(self._last)] = seconds
        self._number += 1

    def median(self) -> float | None:
        """Return the median of the last ones; None before the first."""
        known = self._last[: self._number]
        return float(np.median(known)) if len(known) else None


def status_message(
    name: str,
    level: bytes | int,
    message: str,
    values: Mapping[str, Any],
    hardware_id: str = 'cmanp',
) -> DiagnosticStatus:
    """
    Write a diagnostic status.

    :param name: '<node>: <task>'.
    :param level: DiagnosticStatus.OK, WARN (recoverable), ERROR or STALE.
    :param message: one line for a human: what is the matter, and what it waits for.
    :param values: key -> number, text, truth value or nothing.
    :param hardware_id: of what is diagnosed.
    :return: diagnostic_msgs/DiagnosticStatus.
    """
    status = DiagnosticStatus(name=name, message=message, hardware_id=hardware_id)
    status.level = level if isinstance(level, bytes) else bytes([level])
    status.values = [KeyValue(key=key, value=_value_text(value)) for key, value in values.items()]
    return status


def counts_from_status(status: DiagnosticStatus, prefix: str = '') -> Counts:
    """
    Read the counters that a node wrote into its status with `CounterSnapshot.values`.

    :param status: diagnostic_msgs/DiagnosticStatus, from any version of the node.
    :param prefix: as they were written with, such as ``points_``.
    :return: counters; what is not there, or no number, is 0.
    """
    numbers = {pair.key: int(pair.value) for pair in status.values if pair.value.isdecimal()}
    rejected = f'{prefix}rejected_'
    return Counts(
        *(numbers.get(f'{prefix}{key}', 0) for key in ('received', 'folded')),
        {
            key.removeprefix(rejected): count
            for key, count in numbers.items()
            if key.startswith(rejected)
        },
        numbers.get(f'{prefix}dropped', 0),
    )


def array_message(statuses: Iterable[DiagnosticStatus], stamp: Time) -> DiagnosticArray:
    """
    Wrap statuses for /diagnostics.

    :param statuses: of this node.
    :param stamp: now.
    :return: diagnostic_msgs/DiagnosticArray.
    """
    array = DiagnosticArray(status=list(statuses))
    array.header.stamp = stamp
    return array


def _value_text(value: Any) -> str:
    """Write a value for a human and for a program: true, 12, 0.25; empty for None."""
    if value is None:
        return ''
    if isinstance(value, bool):
        return str(value).lower()
    return f'{value:.6g}' if isinstance(value, float) else str(value)
