"""From a recording to a map, as the node folds what it hears."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from cmanp_ros.core.errors import InputError
from cmanp_ros.field import NeuralField
from cmanp_ros.maps import Provenance
from cmanp_ros.recordings.parts import Losses, Points, Span
from cmanp_ros.recordings.recording import Recording


@dataclass
class Report:
    """What became of a recording, or of a part of it."""

    provenance: Provenance
    num_read: int = 0
    """Messages."""
    num_folded: int = 0
    """Points."""
    losses: Losses = field(default_factory=Losses)
    sums: np.ndarray = field(default_factory=lambda: np.zeros((3, 1)))
    """(3, dim_y): number of values, sum and sum of squares, from value_offset in value_scale."""

    def add(self, other: Report) -> None:
        """Count another part, too."""
        self.num_read += other.num_read
        self.num_folded += other.num_folded
        self.losses.add(other.losses)
        self.sums = self.sums + other.sums
        stamps = other.provenance.oldest_stamp, other.provenance.newest_stamp
        self.provenance = self.provenance.observed(*stamps)

    @property
    def mean(self) -> np.ndarray:
        """(dim_y,) of what was folded, from value_offset and in value_scale."""
        return self.sums[1] / np.maximum(self.sums[0], 1)

    @property
    def stddev(self) -> np.ndarray:
        """(dim_y,) in value_scale."""
        square = self.sums[2] / np.maximum(self.sums[0], 1)
        return np.sqrt(np.maximum(square - self.mean**2, 0))


class Folding:
    """Folds a recording into a map."""

    def __init__(self, recording: Recording, into: NeuralField) -> None:
        """Prepare; `run` does it."""
        p = recording.parameters
        self._recording, self.into = recording, into
        self.report = Report(Provenance(p.map_frame, (p.bounds_min, p.bounds_max)))

    def run(self, span: Span | None = None) -> Iterator[None]:
        """
        Fold, message by message: an iterator, which may be left between two of them.

        :param span: a part of the recording; None: all of it.
        :raises InputError: for a file that ends before its end; what was read is folded.
        """
        for points in self._recording.points(span):
            self._fade(points.stamp)
            self._fold(points)
            self._count()
            yield
        self._count()

    def _count(self) -> None:
        self.report.num_read = self._recording.num_read
        self.report.losses = self._recording.losses

    def _fade(self, stamp: int) -> None:
        """Let the time pass up to a stamp, if observations lose weight."""
        newest = self.report.provenance.newest_stamp
        if self.into.half_life_sec is not None and newest and stamp > newest:
            self.into.forget((stamp - newest) * 1e-9)

    def _fold(self, points: Points) -> None:
        """Fold one message, a chunk at a time."""
        losses, waiting = self._recording.losses, len(points.x)
        for chunk in self.into.in_chunks(points.x, self._recording.parameters.chunk_size):
            x, y = points.x[chunk], points.y[chunk]
            try:
                observed = self.into.observe(x, y)
            except InputError as error:
                return losses.reject_message('not_usable', str(error), waiting)
            waiting -= len(chunk)
            losses.reject_points(observed.rejected)
            if observed.rejected:
                y = y[self.into.usable(x, y)[0]]
            if observed.folded:
                self._note(y, observed, points)

    def _note(self, y, observed, points) -> None:
        report, n = self.report, self.into.normalization
        report.num_folded += observed.folded
        stamps = points.oldest or points.stamp, points.stamp
        report.provenance = report.provenance.observed(*stamps)
        values = (y - n.value_offset) / n.value_scale
        report.sums = report.sums + [(values**power).sum(0) for power in range(3)]
