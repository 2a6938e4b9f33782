"""A tile size from recorded observations: the one that predicts what is left out best."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from cmanp_ros.core.errors import InputError
from cmanp_ros.evaluation.scores import score

POINTS_PER_TILE = (4.0, 100.0)  # in the smallest and the largest candidate, on average
NUM_SIZES = 6
NUM_PIECES = 12  # of a recording that is too long
BLOCKS_PER_FOLD = 5
LEAST_POINTS = 20


class Proposal(NamedTuple):
    """The best candidate, and all of them."""

    tile_size: float
    """[units of x]."""
    rows: list[dict[str, float]]
    """'tile_size', 'points_per_tile', 'scattered', 'blockwise' (along tracks only) and their mean
    'log_likelihood' [nat per observation left out]."""


def propose(
    x,
    y,
    make_field: Callable,
    sizes: Iterable[float] | None = None,
    folds: int = 4,
    max_points: int = 3000,
    seed: int = 0,
) -> Proposal:
    """
    Compare tile sizes by the likelihood of observations that are left out.

    Scattered ones tell how well gaps between neighbors are filled. If the observations come in
    the order of a track, whole stretches of it are left out as well: along a track the next
    neighbor is always near, but a map is asked for what lies beside it.

    :param x: (n, 2), in the order in which they were observed.
    :param y: (n,).
    :param make_field: called with a tile size; returns an empty map with observe and predict.
    :param sizes: candidates [units of x]; None: from the density of the observations.
    :param max_points: to use of a longer recording, in contiguous pieces drawn by `seed`.
    :raises InputError: for too few observations that are finite, or all of them at one place.
    """
    x, y = np.asarray(x, np.float64), np.ravel(y).astype(np.float64)
    if len(x) != len(y):
        raise InputError(f'{len(x)} locations with {len(y)} values: expected as many')
    usable = np.isfinite(x).all(1) & np.isfinite(y)
    x, y = x[usable], y[usable]
    if len(x) < LEAST_POINTS:
        raise InputError(f'{len(x)} observations are finite: expected at least {LEAST_POINTS}')
    rng = np.random.default_rng(seed)
    candidates = candidate_sizes(x) if sizes is None else [float(size) for size in sizes]
    density = [points_per_tile(x, size) for size in candidates]
    kept = pieces(rng, len(x), max_points)
    x, y = x[kept], y[kept]

    held_out = {'scattered': rng.permutation(len(x)) % folds}
    if in_track_order(rng, x):
        block = np.arange(len(x)) * folds * BLOCKS_PER_FOLD // len(x)
        held_out['blockwise'] = block % folds
    rows = []
    for size, points in zip(candidates, density, strict=True):
        row = {'tile_size': size, 'points_per_tile': points}
        for name, fold in held_out.items():
            row[name] = float(np.mean(list(_likelihoods(x, y, fold, make_field, size))))
        row['log_likelihood'] = float(np.mean([row[name] for name in held_out]))
        rows.append(row)
    return Proposal(max(rows, key=lambda row: row['log_likelihood'])['tile_size'], rows)


def _likelihoods(x, y, fold, make_field, size) -> Iterator[float]:
    for k in np.unique(fold):
        field = make_field(size)
        field.observe(x[fold != k], y[fold != k])
        yield score(*field.predict(x[fold == k]), y[fold == k]).log_likelihood


def candidate_sizes(x: np.ndarray, num: int = NUM_SIZES) -> list[float]:
    """
    Return tile sizes from few to many points in a tile, evenly on a logarithmic scale.

    :raises InputError: for points that all lie at one place.
    """
    extent = float(np.ptp(x, axis=0).max())
    if not extent > 0:
        raise InputError(f'all {len(x)} points lie at {x[0]}: expected an area or a track')
    grid = extent * 2.0 ** np.arange(-16, 1.25, 0.25)
    density = np.array([points_per_tile(x, size) for size in grid])
    first, last = (
        grid[np.argmax(density >= min(points, len(x) / 2))] for points in POINTS_PER_TILE
    )
    return list(dict.fromkeys(float(f'{size:.2g}') for size in np.geomspace(first, last, num)))


def points_per_tile(x: np.ndarray, size: float) -> float:
    """
    Return the mean number of points in the tiles that have any.
    """
    row, column = np.floor((x - x.min(0)) / size).astype(np.int64).T
    return len(x) / len(np.unique(row * (column.max() + 1) + column))


def pieces(rng: np.random.Generator, num: int, max_points: int) -> np.ndarray:
    """
    Choose contiguous pieces of a recording that is too long, in its order.

    :return: numbers of the points to keep.
    """
    if num <= max_points:
        return np.arange(num)
    length = max(1, max_points // NUM_PIECES)
    chosen = np.sort(rng.permutation(num // length)[: max_points // length])
    return (chosen[:, None] * length + np.arange(length)).reshape(-1)


def in_track_order(rng: np.random.Generator, x: np.ndarray) -> bool:
    """
    Return whether neighbors in the recording are neighbors on the map.
    """
    step = np.linalg.norm(np.diff(x, axis=0), axis=1)
    apart = np.linalg.norm(x - rng.permutation(x), axis=1)
    return bool(np.median(step) < 0.25 * np.median(apart))
