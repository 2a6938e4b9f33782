"""What is seen of a recording while it is folded: whether the bars hold, and where it went."""

from __future__ import annotations

import math

import numpy as np

from cmanp_ros.field import NeuralField, Observed
from cmanp_ros.plots.raster import is_known
from cmanp_ros.recordings import Recording

NUM_COMPARED = 100  # chunks of a recording: a prediction costs more than a fold
POINTS_COMPARED = 32  # of each, at most
NUM_PIECES = 8  # of a table that is read at once, at least
MAX_POSITIONS = 2000  # of the track


class Coverage:
    """How often observations fell into the central intervals that were predicted for them."""

    NUM_LEVELS = 100
    NAMED = (0.5, 0.9)

    def __init__(self) -> None:
        self._counts = np.zeros(self.NUM_LEVELS, np.int64)

    def add(self, mean: np.ndarray, stddev: np.ndarray, y: np.ndarray) -> None:
        """
        Compare predictions with what was then observed.

        :param mean: (n,) predicted before these observations were folded.
        :param stddev: (n,) alike, of an observation.
        :param y: (n,) observed, finite.
        """
        level = [math.erf(z / math.sqrt(2)) for z in np.abs(y - mean) / stddev]
        index = np.minimum(np.array(level) * self.NUM_LEVELS, self.NUM_LEVELS - 1).astype(int)
        self._counts += np.bincount(index, minlength=self.NUM_LEVELS)

    @property
    def num_points(self) -> int:
        """How many were compared."""
        return int(self._counts.sum())

    @property
    def levels(self) -> np.ndarray:
        """Share that the intervals should hold: 0, 0.01, ... 1."""
        return np.linspace(0, 1, self.NUM_LEVELS + 1)

    @property
    def shares(self) -> np.ndarray:
        """Share that they held, of each level; NaN without observations."""
        with np.errstate(invalid='ignore'):
            return np.append(0, self._counts.cumsum()) / self._counts.sum()

    def share(self, level: float) -> float:
        """Return the share that the intervals of one level held."""
        return float(self.shares[round(level * self.NUM_LEVELS)])

    @property
    def summary(self) -> str:
        """Say it in words."""
        return ', '.join(
            f'{level:.0%} bars hold {self.share(level):.0%}' for level in self.NAMED
        ).replace('%', ' %')


class Track:
    """Positions in the order of time, however many: evenly thinned."""

    def __init__(self) -> None:
        self._kept: list[np.ndarray] = []
        self._stride, self._count = 1, 0

    def add(self, x: np.ndarray) -> None:
        """Go on with positions (n, 2) [m]."""
        self._kept += list(x[-self._count % self._stride :: self._stride])
        self._count += len(x)
        while len(self._kept) > MAX_POSITIONS:
            self._kept = self._kept[::2]
            self._stride *= 2

    @property
    def positions(self) -> np.ndarray:
        """(n, 2) [m]."""
        return np.array(self._kept).reshape(-1, 2)


class Watched:
    """
    A map to be filled by `Folding`: some observations are predicted before they are folded.

    Those around a random one of each of some chunks, which are evenly spread over the recording;
    only where the map is known already: elsewhere the bars are what somebody chose.

    :ivar coverage: of these predictions.
    :ivar track: where the observations were: their center in each chunk of a bag, or all of a
        table, thinned.
    """

    def __init__(self, field: NeuralField, recording: Recording) -> None:
        self._field, self._recording = field, recording
        self.coverage, self.track = Coverage(), Track()
        self._num_compared, self._rng = 0, np.random.default_rng(0)

    def __getattr__(self, name: str):
        """Find all else in the map."""
        return getattr(self._field, name)

    def in_chunks(self, x: np.ndarray, size: int) -> list[np.ndarray]:
        """Cut as the map does; a table that is read at once in the order of its lines, finer."""
        if not self._is_table or self._recording.num_messages > 1:
            return self._field.in_chunks(x, size)
        size = min(size, max(2 * POINTS_COMPARED, -(-len(x) // NUM_PIECES)))
        return np.split(np.arange(len(x)), range(size, len(x), size))

    def observe(self, x: np.ndarray, y: np.ndarray) -> Observed:
        """Fold observations, see `NeuralField.observe`."""
        self.track.add(x[:, :2] if self._is_table else x[:, :2].mean(0, keepdims=True))
        done = self._recording.num_read / max(self._recording.num_messages, 1)
        if self._field.num_observations and self._num_compared < NUM_COMPARED * done:
            self._compare(x, y[:, 0])
        return self._field.observe(x, y)

    @property
    def _is_table(self):
        return self._recording.duration_sec is None

    def _compare(self, x, y):
        known = is_known(self._field, x)
        if not known.any():
            return
        x, y = x[known], y[known]
        # Points that lie close together: few tiles have to be solved for them.
        near = np.linalg.norm(x - self._rng.choice(x), axis=1).argsort()[:POINTS_COMPARED]
        mean, stddev = self._field.predict(x[near])
        self.coverage.add(mean[:, 0], stddev[:, 0], y[near])
        self._num_compared += 1
