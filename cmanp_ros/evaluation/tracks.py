"""Streams along real tracks: each batch is predicted before it is folded."""

import lzma
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

EARTH_RADIUS_KM = 6371.0
FILE = Path(__file__).parent / 'data' / 'baja-bathymetry.csv.xz'
BLUNDER = 78_708  # sounding of 5,817 m between those of 55 m before and after it


def soundings() -> tuple[np.ndarray, np.ndarray]:
    """
    Read 82,970 ship soundings off Baja California, in the order in which they were taken.

    Source: the tutorial data of the Generic Mapping Tools (file tut_ship.xyz), as they come with
    the Python library Verde (BSD-3-Clause, https://github.com/fatiando/verde).

    :return: x (n, 2) [km] to the east and north of their mean location (equirectangular
        projection about it), and heights y (n,) [km], negative below the sea.
    """
    with lzma.open(FILE, 'rt') as file:
        table = np.loadtxt(file, delimiter=',', skiprows=1)
    degrees, height_m = table[:, :2], table[:, 2]
    center = degrees.mean(0)
    x = np.radians(degrees - center) * EARTH_RADIUS_KM
    x[:, 0] *= np.cos(np.radians(center[1]))  # meridians converge
    return x, height_m / 1000


def repeats(x, y) -> np.ndarray:
    """
    Return which observations repeat an earlier one exactly, location and value, (n,) bool.

    Some 2 % of the soundings do: legs of a track that are in the table twice. To predict them is
    to look them up, and their density has no bound.
    """
    table = np.column_stack([x, y])
    _, first = np.unique(table, axis=0, return_index=True)
    return ~np.isin(np.arange(len(table)), first)


class Streamed(NamedTuple):
    """
    What a method said along a stream, and the processor time it took.

    That is the time of all threads of this process; other processes do not matter.
    """

    mean: np.ndarray
    """(n,) [field units]."""
    stddev: np.ndarray
    """(n,) [field units]."""
    seconds_observe: float
    seconds_predict: float


def stream(method, x, y, batch: int = 100, limit: int | None = None) -> Streamed:
    """
    Predict each batch from all before it, then fold it in.

    :param method: with `observe(x, y)` and `predict(x) -> mean, stddev`.
    :param x: (n, 2).
    :param y: (n,).
    :param limit: points to use of the stream; None: all.
    """
    x, y = x[:limit], y[:limit]
    mean, stddev = np.empty((2, len(y)))
    seconds_observe = seconds_predict = 0.0
    for start in range(0, len(y), batch):
        part = slice(start, start + batch)
        before = time.process_time()
        answer = method.predict(x[part])
        between = time.process_time()
        method.observe(x[part], y[part])
        seconds_observe += time.process_time() - between
        seconds_predict += between - before
        mean[part], stddev[part] = (np.ravel(v) for v in answer)
    return Streamed(mean, stddev, seconds_observe, seconds_predict)
