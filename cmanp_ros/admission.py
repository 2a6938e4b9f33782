"""
Admission: which points and messages are folded, so that a robot that stands still adds nothing.

Time is that of the stamps, which may go back: a bag begins again, a simulator is reset. Nothing
here needs ROS.
"""

from __future__ import annotations

import numpy as np

_KEY_BITS = 63  # of an int64 that is not negative
MAX_AHEAD_SEC = 10.0  # of stamps, before the clock's own time is taken in their place


def not_in_future(stamp: int, now: int) -> int:
    """
    Return a stamp [ns], or the time now [ns] if it is far beyond.

    One wrong clock must not be the newest for ever: what is published bears the newest stamp, and
    what is observed fades by the stamps of a recording.
    """
    return now if stamp > now + MAX_AHEAD_SEC * 1e9 else stamp


class Admission:
    """
    Admits at most one point per voxel of the map frame; for one thread.

    It remembers the voxels that gave a point, 24 bytes each. Voxels are told apart within 2**63,
    2**31 or 2**21 of them along each of 1, 2 or 3 axes: 105 km for voxels of 5 cm in space.

    :ivar revisit_interval: [s]; may be set at any time.
    """

    def __init__(
        self, voxel_size: float, revisit_interval: float = 0.0, max_voxels: int = 2**18
    ) -> None:
        """
        Remember nothing yet.

        :param voxel_size: [m] side of a voxel; 0: every point is admitted.
        :param revisit_interval: [s] after which a voxel may give a point again; 0: not while it
            is remembered.
        :param max_voxels: remembered at most; when they are more, the older half is forgotten.
        """
        self._voxel_size = voxel_size
        self.revisit_interval = revisit_interval
        self._max_voxels = max_voxels
        self.clear()

    def __len__(self) -> int:
        """Return the number of voxels remembered."""
        return len(self._keys)

    @property
    def voxel_size(self) -> float:
        """Side of a voxel [m]; may be set at any time: voxels of another size are forgotten."""
        return self._voxel_size

    @voxel_size.setter
    def voxel_size(self, voxel_size: float) -> None:
        if voxel_size != self._voxel_size:
            self._voxel_size = voxel_size
            self.clear()

    def clear(self) -> None:
        """Forget every voxel."""
        self._keys = np.zeros(0, np.int64)  # sorted
        self._stamps = np.zeros(0)  # [s] of the point that each voxel gave last
        self._turns = np.zeros(0, np.int64)  # its number among all points: stamps may go back
        self._num_points = 0

    def admit(self, x_map: np.ndarray, stamp_sec: float) -> np.ndarray:
        """
        Tell which points of a message to fold; the first one in a voxel counts.

        A point that is not finite is in no voxel, and admitted: whoever folds it rejects it.

        :param x_map: (n, dim) float64 [m], dim 1 to 3, in the map frame.
        :param stamp_sec: [s] of the message. Time counts in both directions: when stamps go back,
            a voxel is blocked for two revisit intervals at most.
        :return: (n,) bool.
        """
        if not self._voxel_size:
            return np.ones(len(x_map), bool)
        finite = np.isfinite(x_map).all(axis=1)
        keys, rows = np.unique(_voxel_keys(x_map[finite], self._voxel_size), return_index=True)
        places = np.searchsorted(self._keys, keys)
        is_known = np.append(self._keys, -1)[places] == keys
        is_due = np.zeros(len(keys), bool)
        if self.revisit_interval:
            waited = np.abs(stamp_sec - self._stamps[places[is_known]])
            is_due[is_known] = waited >= self.revisit_interval
        turns = self._num_points + rows
        self._num_points += len(x_map)
        self._stamps[places[is_due]] = stamp_sec
        self._turns[places[is_due]] = turns[is_due]
        self._remember(places[~is_known], keys[~is_known], stamp_sec, turns[~is_known])
        admitted = ~finite
        admitted[np.flatnonzero(finite)[rows[is_due | ~is_known]]] = True
        return admitted

    def _remember(self, places, keys, stamp_sec, turns) -> None:
        """Insert new voxels where they keep the order, and forget the older half of too many."""
        self._keys = np.insert(self._keys, places, keys)
        self._stamps = np.insert(self._stamps, places, stamp_sec)
        self._turns = np.insert(self._turns, places, turns)
        if len(self._keys) > self._max_voxels:
            num_forgotten = len(self._keys) - (self._max_voxels + 1) // 2
            kept = self._turns >= np.partition(self._turns, num_forgotten)[num_forgotten]
            self._keys, self._stamps = self._keys[kept], self._stamps[kept]
            self._turns = self._turns[kept]


class RateLimit:
    """
    Admits messages at no more than a rate of their stamps.

    A period may be cut short by half to make up for one that was too long: a source whose stamps
    jitter reaches the rate, and in any time at most rate * time + 1.5 messages are admitted.

    :ivar max_rate: [Hz]; may be set at any time.
    """

    def __init__(self, max_rate: float) -> None:
        """
        Begin with the first message.

        :param max_rate: [Hz]; 0: every message is admitted.
        """
        self.max_rate = max_rate
        self._due = -np.inf  # [s] when the next message may come

    def admit(self, stamp_sec: float) -> bool:
        """
        Tell whether to fold a message.

        :param stamp_sec: [s] of the message; when it goes back by more than two periods, time
            begins again.
        :return: whether it is within the rate.
        """
        period = 1 / self.max_rate if self.max_rate else 0.0  # [s]
        if stamp_sec < self._due - 2 * period:
            self._due = stamp_sec
        if stamp_sec < self._due:
            return False
        self._due = max(self._due + period, stamp_sec + period / 2)
        return True


def thin(
    admission: Admission, x_map: np.ndarray, usable: np.ndarray, stamp_sec: float
) -> tuple[np.ndarray, int]:
    """
    Tell which points of a message to fold: of those that are usable, those that are admitted.

    :param x_map: (n, dim) [m] in the map frame.
    :param usable: (n,) bool; the others take no voxel from those.
    :param stamp_sec: [s] of the message.
    :return: (n,) bool, and how many usable points are left out.
    """
    admitted = admission.admit(x_map[usable], stamp_sec)
    good = usable.copy()
    good[usable] = admitted
    return good, int((~admitted).sum())


def _voxel_keys(x: np.ndarray, voxel_size: float) -> np.ndarray:
    """Pack the voxel of each point (n, dim) into one number >= 0: as many bits for each axis."""
    bits = _KEY_BITS // x.shape[1]
    with np.errstate(over='ignore'):
        voxels = np.clip(np.floor(x / voxel_size), -(2.0**62), 2.0**62).astype(np.int64)
    keys = np.zeros(len(x), np.int64)
    for axis in range(x.shape[1]):
        keys = (keys << bits) | (voxels[:, axis] & ((1 << bits) - 1))
    return keys
