"""
Where observations came from, and where the next ones tell most. No ROS.
"""

from __future__ import annotations

import numpy as np

MAX_POINTS = 1000  # of a track
OBSTACLE = 99  # cost from which the center of the robot must not be there: nav2's "inscribed"


class Track:
    """The way of the robot as a line of bounded length, coarser where it got long."""

    def __init__(self, spacing: float):
        """
        Start without points.

        :param spacing: [m] between points, at least; doubled whenever there are too many.
        """
        self._first_spacing = spacing
        self.clear()

    def clear(self):
        """Start again."""
        self._spacing, self._points, self.newest = self._first_spacing, [], None

    def add(self, x: np.ndarray):
        """
        Note where the robot is.

        :param x: (dim_x,) [m].
        """
        self.newest = np.array(x, np.float64)
        if self._points and np.linalg.norm(self.newest - self._points[-1]) < self._spacing:
            return
        self._points.append(self.newest)
        if len(self._points) > MAX_POINTS:
            self._points, self._spacing = self._points[::2], 2 * self._spacing

    @property
    def points(self) -> np.ndarray:
        """Points in the order of time, (n, dim_x) [m]; the last is where the robot is."""
        if self.newest is None:
            return np.zeros((0, 2))
        return np.array([*self._points, self.newest])


def is_free(
    x: np.ndarray, origin: tuple[float, float], resolution: float, costs: np.ndarray
) -> np.ndarray:
    """
    Tell where a costmap has no obstacle; what it does not know or does not cover is free.

    :param x: (n, 2) [m] in the frame of the costmap.
    :param origin: its lower left corner [m].
    :param resolution: [m/cell].
    :param costs: (height, width) 0..100 and -1, row by row from the lower left.
    :return: (n,) bool.
    """
    cell = np.floor((x - origin) / resolution)
    inside = ((cell >= 0) & (cell < costs.shape[::-1])).all(1)
    column, row = cell[inside].astype(int).T
    free = np.ones(len(x), bool)
    free[inside] = costs[row, column] < OBSTACLE
    return free


def next_best_views(
    x: np.ndarray,
    stddev: np.ndarray,
    position: np.ndarray,
    num_views: int,
    distance_weight: float,
    spacing: float,
) -> np.ndarray:
    """
    Choose where to measure next, one by one: the most uncertain location that is not too far.

    The gain of a location is the entropy of an observation there, ln(stddev) and a constant,
    less distance_weight for each metre to it. Entropy is what greedy placement of sensors goes by
    (Shewry and Wynn 1987; Krause, Singh, Guestrin 2008, who compare it with mutual information);
    that stddev * exp(-distance_weight * distance) falls with the way is the criterion of
    Gonzalez-Banos and Latombe 2002. A measurement tells of what is around it, too: instead of
    predicting that for every choice, locations nearer than `spacing` to one chosen are left out.

    :param x: (n, 2) [m], the locations that can be reached.
    :param stddev: (n,) [field units]; locations without a positive finite one are left out.
    :param position: (2,) [m] of the robot; ways are straight.
    :param num_views: how many to choose, at most.
    :param distance_weight: [1/m]; 0: the way does not matter, but for equal gains.
    :param spacing: [m] between those chosen.
    :return: indices of locations, best first.
    """
    stddev = np.asarray(stddev, np.float64)
    distance = np.linalg.norm(x - position, axis=1)
    is_left = np.isfinite(stddev) & (stddev > 0) & np.isfinite(distance)
    gain = np.log(np.where(is_left, stddev, 1.0)) - distance_weight * distance
    order = np.lexsort((distance, -gain))  # by gain, then by distance
    order = order[is_left[order]]
    chosen = []
    while len(order) and len(chosen) < num_views:
        best, order = order[0], order[1:]
        chosen.append(best)
        order = order[np.linalg.norm(x[order] - x[best], axis=1) >= spacing]
    return np.array(chosen, dtype=int)
