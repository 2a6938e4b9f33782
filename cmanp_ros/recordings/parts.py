"""What a recording consists of, what is thinned of it and what is left out."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np

from cmanp_ros.admission import Admission, RateLimit, thin
from cmanp_ros.parameters import SourceParameters


class Chunk(NamedTuple):
    """The points of one message, or of so many lines of a text file, in the map frame."""

    x: np.ndarray
    """(n, dim_x) [m]."""
    y: np.ndarray
    """(n, dim_y) [field units]."""
    stamp: float
    """[s]; 0.0 where the file has none."""


class Span(NamedTuple):
    """A part of a recording: [ns] of the time at which a bag was written, or lines of a table."""

    start: int
    stop: int
    """Not included."""


class Points(NamedTuple):
    """What a file gives for one message."""

    source: SourceParameters
    stamp: int
    """[ns]; of the last one, where they have several."""
    x: np.ndarray
    y: np.ndarray
    oldest: int = 0
    """[ns] of the first one, where they have several."""


class Thinning:
    """What was admitted so far, of each source; can be pickled and goes on elsewhere."""

    def __init__(self) -> None:
        self._admissions: dict[str, Admission] = {}
        self._rates: dict[str, RateLimit] = {}

    def admits_message(self, source: SourceParameters, stamp: int) -> bool:
        """Tell whether a message [ns] is within the rate of its source."""
        limit = self._rates.setdefault(source.name, RateLimit(source.max_rate))
        return limit.admit(stamp * 1e-9)

    def thin(self, points: Points) -> tuple[np.ndarray, dict[str, int]]:
        """Tell which points to fold, and count the others by reason."""
        source = points.source
        admission = self._admissions.setdefault(
            source.name, Admission(source.voxel_size, source.revisit_interval)
        )
        finite = np.isfinite(points.x).all(1) & np.isfinite(points.y).all(1)
        good, thinned = thin(admission, points.x, finite, points.stamp * 1e-9)
        return good, {'not_finite': int((~finite).sum()), 'thinned': thinned}


class Losses:
    """What was left out, by reason; sums of several are sums of each."""

    def __init__(self) -> None:
        self.points: Counter[str] = Counter()
        self.messages: Counter[str] = Counter()
        self.problems: dict[str, str] = {}
        """reason -> what was said of the last message left out for it."""

    def reject_points(self, rejected: dict[str, int]) -> None:
        """Count points; those of reasons that count none are passed over."""
        self.points.update({reason: count for reason, count in rejected.items() if count})

    def reject_message(self, reason: str, problem: str, num_points: int = 0) -> None:
        """Count a message, and its points as far as they are known."""
        self.messages[reason] += 1
        self.reject_points({reason: num_points})
        self.problems[reason] = problem

    def add(self, other: Losses) -> None:
        """Count what another part of the recording left out, too."""
        self.points.update(other.points)
        self.messages.update(other.messages)
        self.problems |= other.problems


def evenly(start: int, stop: int, num_parts: int) -> list[Span]:
    """Cut a range of integers into so many parts at most."""
    edges = [start + (stop - start) * index // num_parts for index in range(num_parts + 1)]
    return [Span(*pair) for pair in zip(edges, edges[1:], strict=False) if pair[0] < pair[1]]
