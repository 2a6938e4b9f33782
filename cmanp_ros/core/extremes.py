"""
Extremes: the highest and the lowest observation of each voxel, as they are.

Sums alone cannot tell a blunder from noise; blunders are among these. Which observations are kept
does not depend on order or batches (but for rounding between equals that faded). What fades gives
way to newer ones, bit by bit: it counts as less far out by the logarithm of its weight, which
keeps its order among others that fade with it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from cmanp_ros.core.config import LeastSquaresConfig

FADES = 1.0  # [model units] by which an observation counts as less far out at 1 / e of its weight


class Candidates(NamedTuple):
    """Observations that may be far off, see `outliers`; float64."""

    x: Tensor
    """(batch, n, dim_x) in model units."""
    y: Tensor
    """(batch, n, dim_y)."""
    weight: Tensor
    """(batch, n): less what was forgotten; 0 where there is none."""


def num_slots(config: LeastSquaresConfig, dim_y: int) -> int:
    """
    Return how many observations of each voxel are kept: highest and lowest of each output.
    """
    return 2 * dim_y if config.outlier_share else 0


def empty(config: LeastSquaresConfig, dim_x: int, dim_y: int, batch: int, device=None) -> Tensor:
    """
    Return the extremes of no points, see `find`.
    """
    shape = batch, config.voxels_per_axis**dim_x, num_slots(config, dim_y), dim_x + dim_y + 1
    return torch.zeros(shape, dtype=torch.float64, device=device)


def find(
    config: LeastSquaresConfig, x: Tensor, y: Tensor, voxel: Tensor, present: Tensor
) -> Tensor:
    """
    Find the highest and the lowest observation of each voxel; of equal ones the last in x, then y.

    :param x: (batch, n, dim_x) in model units.
    :param y: (batch, n, dim_y).
    :param voxel: (batch, n), which.
    :param present: (batch, n): 1, or 0 where there is no point.
    :return: (batch, num_voxels, slots, dim_x + dim_y + 1) float64: x, y, weight.
    """
    batch, n, dim_x = x.shape
    found = empty(config, dim_x, y.shape[-1], batch, x.device)
    if not n or not found.shape[2]:
        return found
    there, num_voxels = present > 0, found.shape[1]
    rows = torch.cat([x.double(), y, present.unsqueeze(-1)], -1)[there]
    place = (torch.arange(batch, device=x.device).unsqueeze(1) * num_voxels + voxel)[there]
    found = found.flatten(0, 1)
    for slot, score in enumerate(_scores(rows, dim_x).unbind(-1)):
        best = _largest(place, score, len(found))
        for column in rows[:, :-1].unbind(-1):
            if len(best) <= 1 or int(place[best].bincount().max()) == 1:
                break
            best = best[_largest(place[best], column[best], len(found))]
        found[place[best], slot] = rows[best]
    return found.unflatten(0, (batch, num_voxels))


def _scores(rows, dim_x):
    """
    Return by what observations (..., columns) are compared in each slot, (..., slots).
    """
    y, fresh = rows[..., dim_x:-1], FADES * rows[..., -1:].log()
    return torch.stack([y + fresh, fresh - y], -1).flatten(-2)


def _largest(place, score, size):
    """
    Return the numbers of the points of the largest score in their place; of equal ones all.
    """
    best = score.new_full((size,), -torch.inf).scatter_reduce(0, place, score, 'amax')
    return (score == best[place]).nonzero()[:, 0]


def merge(a: Tensor, b: Tensor, dim_x: int) -> Tensor:
    """
    Return the extremes of both sets of points.
    """
    there = b[..., -1] > 0
    slot, p, q = there.nonzero()[:, 2:], a[there], b[there]
    ranks = (torch.cat([_scores(part, dim_x).gather(1, slot), part], 1) for part in (p, q))
    is_equal = p[:, -1] > 0
    is_better = ~is_equal
    for one, other in zip(*(rank.unbind(1) for rank in ranks), strict=True):
        is_better = is_better | is_equal & (other > one)
        is_equal = is_equal & (other == one)
    found = a.clone()
    found[there] = torch.where(is_better.unsqueeze(1), q, p)
    return found


def forget(a: Tensor, factor: float) -> Tensor:
    """
    Weight the observations by `factor`.
    """
    return torch.cat([a[..., :-1], a[..., -1:] * factor], -1)


def candidates(extremes: Tensor, dim_x: int) -> Candidates:
    """
    Return the extremes of each tile, each observation once.
    """
    weight = extremes[..., -1].clone()
    for slot in range(1, weight.shape[2]):
        known = extremes[:, :, slot, None] == extremes[:, :, :slot]
        weight[:, :, slot].masked_fill_(known.all(-1).any(-1), 0.0)
    weight, rows = weight.flatten(1), extremes.flatten(1, 2)
    most = int((weight > 0).sum(1).amax()) if len(weight) else 0
    order = (weight > 0).byte().argsort(dim=1, descending=True, stable=True)[:, :most]
    rows = rows.gather(1, order.unsqueeze(-1).expand(-1, -1, rows.shape[-1]))
    return Candidates(rows[..., :dim_x], rows[..., dim_x:-1], weight.gather(1, order))
