"""How good the predictions are, and what a run lacks: pure functions on plain numbers."""

from collections.abc import Mapping, Sequence
from math import log, pi
from typing import Any

import numpy as np

Z_90 = 1.6449  # half width of a normal's central 90 % interval [standard deviations]
MOST_LOST_ON_THE_WIRE = 0.05  # sensor topics are best effort: DDS may lose a message unseen
COVERAGE_RANGE = (0.7, 1.0)  # what the demo accepts of a 90 % interval
TOLERANCE_M = 0.01  # by which answers of one state may differ: float32, at heights of hundreds


def scores(mean, stddev, heights, readings) -> dict[str, float]:
    """
    Compare a predictive distribution with the truth.

    A prediction is that of a reading, sensor noise included. So its interval and its density are
    held against readings that the node never got, and its mean against the heights themselves.

    :param mean: (n,) [m].
    :param stddev: (n,) [m].
    :param heights: (n,) [m] the truth.
    :param readings: (n,) [m] the truth with fresh sensor noise.
    :return: 'rmse' [m], 'coverage' of the 90 % interval and 'log_likelihood' [nat], means.
    """
    z = (readings - mean) / stddev
    return {
        'rmse': float(np.sqrt(np.mean((mean - heights) ** 2))),
        'coverage': float(np.mean(np.abs(z) <= Z_90)),
        'log_likelihood': float(np.mean(-0.5 * (log(2 * pi) + z**2) - np.log(stddev))),
    }


def calibration(error, stddev, num_bins: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """
    Set the error that was made against the error that was predicted.

    :param error: (n,) [m] prediction minus reading.
    :param stddev: (n,) [m] predicted.
    :param num_bins: of equally many predictions.
    :return: (num_bins,) root mean square of stddev and of error [m].
    """
    groups = np.array_split(np.argsort(stddev), num_bins)
    predicted = [np.sqrt(np.mean(stddev[group] ** 2)) for group in groups if len(group)]
    made = [np.sqrt(np.mean(error[group] ** 2)) for group in groups if len(group)]
    return np.array(predicted), np.array(made)


def unaccounted(counters: Mapping[str, int]) -> int:
    """
    Count the points that the node received and that no other counter of it explains.

    :param counters: values of the node's status, 'points_*'.
    :return: 0 if all is in order.
    """
    settled = sum(
        count
        for key, count in counters.items()
        if key in ('points_folded', 'points_dropped', 'points_pending')
        or key.startswith('points_rejected_')
    )
    return counters.get('points_received', 0) - settled


def shortcomings(report: Mapping[str, Any]) -> list[str]:
    """
    Say what a run lacks.

    :param report: as `cmanp_ros.cli.demo` writes it.
    :return: one sentence each; empty if everything that was promised was seen.
    """
    start, end, answers = report['start'], report['end'], report['answers']
    lost = report['observations']['unaccounted']
    not_received = report['observations']['not_received']
    folded = report['observations']['folded']
    low, high = COVERAGE_RANGE
    checks: Sequence[tuple[bool, str]] = (
        (answers['service'] > 1, 'the service cmanp/predict gave no answers'),
        (
            answers['service'] == answers['service_asked'],
            f'the service cmanp/predict answered {answers["service"]} of '
            f'{answers["service_asked"]} requests',
        ),
        (answers['topic'] > 0, 'no predictions arrived on cmanp/prediction'),
        (answers['field'] > 0, 'no cloud arrived on cmanp/field'),
        (
            answers['difference_m'] is not None and answers['difference_m'] <= TOLERANCE_M,
            'at the end the service and the topics did not give the same answers: they differ by '
            f'{answers["difference_m"]} m',
        ),
        (folded > 0, 'no observation was folded'),
        (
            start['tile_bytes'] is not None and start['tile_bytes'] == end['tile_bytes'],
            f'the state of a tile had {start["tile_bytes"]} bytes at the start and '
            f'{end["tile_bytes"]} at the end',
        ),
        (lost == 0, f'{lost} of the points received were lost, and no counter says why'),
        (
            not_received <= MOST_LOST_ON_THE_WIRE * report['observations']['published'],
            f'{not_received} of the published points did not reach the node; best effort may '
            f'lose some, expected at most {100 * MOST_LOST_ON_THE_WIRE:.0f} %',
        ),
        (
            end['rmse'] < start['rmse'],
            f'RMSE did not fall: {start["rmse"]:.1f} m at the start, {end["rmse"]:.1f} m at the '
            'end',
        ),
        (
            low <= end['coverage'] <= high,
            f'the 90 % interval covers {end["coverage"]:.2f} of the readings; expected '
            f'{low} to {high}',
        ),
    )
    return [text for in_order, text in checks if not in_order]
