"""The node at full rate for a long time, to see whether its memory grows."""

import threading
import time
from collections.abc import Iterator

import numpy as np

from cmanp_ros.benchmark.measuring import Record, family, status_bytes
from cmanp_ros.benchmark.node import PARAMETERS, robot_and_node

SAMPLES = 60  # of the resident memory
WARM_UP = 0.2  # of the time: tiles of the way are opened, caches filled
NUM_POINTS = 1_000


def soak(seconds: float) -> Iterator[Record]:
    """
    Drive for so long; yield one record for each sample of the memory, the last with the slope.
    """
    with robot_and_node(**PARAMETERS) as (robot, child):
        driving = threading.Thread(target=robot.drive, args=(seconds, NUM_POINTS), daemon=True)
        start = time.monotonic()
        driving.start()
        try:
            yield from _samples(robot, child.process.pid, start, seconds)
        finally:
            driving.join()


def _samples(robot, process, start, seconds):
    times, sizes = [], []
    for number in range(1, SAMPLES + 1):
        time.sleep(max(start + number * seconds / SAMPLES - time.monotonic(), 0.0))
        times.append(time.monotonic() - start)
        sizes.append(sum(status_bytes('VmRSS', each) for each in family(process)))
        latency = np.array(robot.latencies or [np.nan])
        record = {
            'work': 'soak',
            'size': robot.counts('points').folded,
            'implementation': 'cmanp node',
            'median_s': float(np.median(latency)),
            'spread_s': float(np.subtract(*np.quantile(latency, [0.75, 0.25]))),
            'peak_bytes': sizes[-1],
            'seconds': round(times[-1], 1),
            'messages_dropped': robot.counts('messages').dropped,
        }
        if number == SAMPLES:
            record |= slope(times, sizes)
        yield record


def slope(times: list[float], sizes: list[int]) -> Record:
    """
    Return how memory grows after the warm-up, with its standard error [bytes / min].
    """
    late = [i for i, t in enumerate(times) if t > WARM_UP * times[-1]]
    t, size = np.array(times)[late] / 60, np.array(sizes)[late]
    (rate, _), covariance = np.polyfit(t, size, 1, cov=True)
    return {
        'growth_bytes_per_min': float(rate),
        'growth_error': float(np.sqrt(covariance[0, 0])),
    }
