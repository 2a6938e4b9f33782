"""
Where tiles lie: square tiles on a lattice in several levels, or one tile over a workspace.

In tile coordinates a tile spans [-2, 2] along every axis. On a lattice neighbouring tiles overlap:
a tile folds all that lies within its borders, and one of the finest answers in the middle of it,
where it has seen what is around. So one or two tiles of a level answer along each axis. Their
windows are squared cosines, divided by their sum: those of a level add up to one everywhere.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

from cmanp_ros.core.config import CMANPConfig
from cmanp_ros.core.errors import ConfigError

HALF_WIDTH = 2.0  # of a tile, in tile coordinates
ANSWERS = 0.75  # [spacings] from the center of a tile to where others answer alone
REACH, REACH_OF_COARSER = 1.0, ANSWERS  # [spacings] from the center of a tile to its borders
FARTHEST = 2.0**40  # [tiles] from the origin: beyond it neighbours could not be told apart


class Cover(NamedTuple):
    """Pairs of a location and a tile that covers it, float64 and int64."""

    index: Tensor
    """(pairs,): which location."""
    key: Tensor
    """(pairs, 1 + dim_x): level and lattice index of the tile."""
    x: Tensor
    """(pairs, dim_x): the location in tile coordinates."""
    window: Tensor
    """(pairs,): weight of the tile in an answer; 0 where others answer alone."""


@dataclass(frozen=True)
class Lattice:
    """
    An unbounded lattice; the origin of the map frame is the center of a tile in every level.

    Tile k of a level with spacing h spans ((k - r) h, (k + r) h) along each axis: r is 1 for the
    finest tiles, so that any location lies in two of them, and 0.75 for the others, which have
    more to go by. All of them answer within 0.75 h of their centers.
    """

    tile_size: float
    """[m] spacing of the finest tiles, each of which reaches as far to all sides."""
    dim_x: int
    num_levels: int
    level_factor: int
    """How many times larger the tiles of each level are than those of the one before."""

    def __post_init__(self):
        if not 0 < self.tile_size < float('inf'):
            raise ConfigError(f'tile_size is {self.tile_size}, expected a positive length [m]')
        object.__setattr__(self, 'tile_size', float(self.tile_size))

    @classmethod
    def of(cls, config: CMANPConfig, tile_size: float) -> 'Lattice':
        """Return the lattice that a model's levels are made for."""
        return cls(tile_size, config.dim_x, config.num_levels, config.level_factor)

    def reach(self, level: int) -> float:
        """Return how far it is from the center of a tile to its borders, in spacings."""
        return REACH_OF_COARSER if level else REACH

    def spacing(self, level: int) -> float:
        """Return the distance [m] between neighbouring tiles of a level; 0 is the finest."""
        half_width = self.tile_size * REACH * self.level_factor**level  # of its tiles
        return half_width / self.reach(level)

    def contains(self, x: Tensor) -> Tensor:
        """Return which locations (n, dim_x) [m] can be covered, (n,) bool; NaN can not."""
        return ((x.double() / self.tile_size).abs() < FARTHEST).all(-1)

    def cover(self, x: Tensor, level: int | None = None) -> Cover:
        """
        Return every tile that each location lies in: those that fold it.

        :param x: (n, dim_x) [m].
        :param level: of which level only; None: of all.
        """
        levels = range(self.num_levels) if level is None else (level,)
        return Cover(*map(torch.cat, zip(*(self._cover(x, one) for one in levels), strict=True)))

    def answering(self, x: Tensor, level: int | None = None) -> Cover:
        """Return every tile that answers at each location (n, dim_x) [m]; see `cover`."""
        cover = self.cover(x, level)
        answers = cover.window > 0
        return Cover(*(part[answers] for part in cover))

    def _cover(self, x, level):
        position = x.double() / self.spacing(level)  # (n, dim_x)
        first = position.floor()
        beyond = (position - first).unsqueeze(1) - position.new_tensor([0, 1]).unsqueeze(-1)
        u = beyond * (HALF_WIDTH / self.reach(level))  # (n, 2, dim_x)
        window = torch.cos(beyond * (torch.pi / (2 * ANSWERS))).square()
        window = torch.where(beyond.abs() < ANSWERS, window, 0.0)
        window = window / window.sum(1, keepdim=True)  # one axis at a time
        steps = torch.tensor(list(product((0, 1), repeat=self.dim_x)), device=x.device)
        axes = torch.arange(self.dim_x, device=x.device)
        window = window[:, steps, axes].prod(-1)  # (n, 2**dim_x)
        u = u[:, steps, axes]
        index, which = (u.abs() < HALF_WIDTH).all(-1).nonzero(as_tuple=True)
        key = torch.nn.functional.pad(first.long()[index] + steps[which], (1, 0), value=level)
        return index, key, u[index, which], window[index, which]

    def order(self, x: Tensor) -> Tensor:
        """Return an order (n,) of locations in which those of a tile of any level are together."""
        order = torch.arange(len(x), device=x.device)
        for level in range(self.num_levels):
            cells = (x.double() / self.spacing(level)).floor()
            for cell in cells.unbind(1):
                order = order[cell[order].argsort(stable=True)]
        return order

    def neighbours(self, key: Tensor, radius: float) -> tuple[Tensor, Tensor]:
        """
        Return the tiles of the same level around each tile, itself among them.

        :param key: (n, 1 + dim_x).
        :param radius: [tiles].
        :return: keys (n, neighbours, 1 + dim_x) and distances (neighbours,) in tiles.
        """
        most = int(radius)
        steps = list(product(range(-most, most + 1), repeat=self.dim_x))
        steps = torch.tensor(steps, device=key.device)
        distance = steps.double().norm(dim=-1)
        is_near = distance <= radius
        around = key.unsqueeze(1) + torch.nn.functional.pad(steps[is_near], (1, 0))
        return around, distance[is_near]

    def center(self, key: Tensor) -> Tensor:
        """Return the centers [m] of tiles (n, 1 + dim_x), (n, dim_x)."""
        return key[:, 1:] * self._of_each(key, self.spacing).unsqueeze(1)

    def nearest(self, key: Tensor) -> Tensor:
        """Return how far it is half the way to the next center, in tile coordinates, (n,)."""
        return HALF_WIDTH / 2 / self._of_each(key, self.reach)

    def _of_each(self, key, of_level):
        """Return what a function of levels gives for each tile, (n,)."""
        values = [of_level(level) for level in range(self.num_levels)]
        return torch.tensor(values, dtype=torch.float64, device=key.device)[key[:, 0]]

    def to_dict(self) -> dict:
        """Return plain values, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class OneTile:
    """
    A single tile over a workspace, as in the paper; its longest axis spans [-2, 2].
    """

    lower: Sequence[float]
    """[m] lower corner of the workspace."""
    upper: Sequence[float]
    """[m] upper corner."""
    num_levels = 1

    def __post_init__(self):
        check_bounds(self.lower, self.upper)
        object.__setattr__(self, 'lower', tuple(float(v) for v in self.lower))
        object.__setattr__(self, 'upper', tuple(float(v) for v in self.upper))

    @property
    def dim_x(self) -> int:
        """Return the numbers per location."""
        return len(self.lower)

    def contains(self, x: Tensor) -> Tensor:
        """Return which locations (n, dim_x) [m] lie in the workspace; NaN does not."""
        lower, upper = (x.new_tensor(corner) for corner in (self.lower, self.upper))
        return ((x >= lower) & (x <= upper)).all(-1)

    def cover(self, x: Tensor, level: int | None = None) -> Cover:
        """Return the one tile for each location (n, dim_x) [m]; see `Lattice.cover`."""
        lower = torch.tensor(self.lower, dtype=torch.float64, device=x.device)
        upper = torch.tensor(self.upper, dtype=torch.float64, device=x.device)
        half = (upper - lower).max() / 2
        u = HALF_WIDTH * (x.double() - (lower + upper) / 2) / half
        index = torch.arange(len(x), device=x.device)
        key = torch.zeros(len(x), 1 + self.dim_x, dtype=torch.int64, device=x.device)
        return Cover(index, key, u, torch.ones_like(u[:, 0]))

    def answering(self, x: Tensor, level: int | None = None) -> Cover:
        """Return the one tile for each location (n, dim_x) [m]: it answers wherever it is."""
        return self.cover(x, level)

    def order(self, x: Tensor) -> Tensor:
        """Return the locations (n, dim_x) as they come; see `Lattice.order`."""
        return torch.arange(len(x), device=x.device)

    def neighbours(self, key: Tensor, radius: float) -> tuple[Tensor, Tensor]:
        """Return each tile alone; see `Lattice.neighbours`."""
        return key.unsqueeze(1), torch.zeros(1, dtype=torch.float64, device=key.device)

    def nearest(self, key: Tensor) -> Tensor:
        """Return infinity, (n,): there is no other center; see `Lattice.nearest`."""
        return torch.full_like(key[:, 0], inf, dtype=torch.float64)

    def to_dict(self) -> dict:
        """Return plain values, ready for JSON."""
        return asdict(self)


def geometry(values: dict) -> Lattice | OneTile:
    """Build what `to_dict` gave."""
    return Lattice(**values) if 'tile_size' in values else OneTile(**values)


def check_bounds(lower, upper):
    """
    Check the corners of a workspace.

    :raises ConfigError: unless they are finite, equally long, and lower is below upper.
    """
    try:
        corners = [[float(v) for v in corner] for corner in (lower, upper)]
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(
            f'bounds {lower!r} and {upper!r}: expected two corners [m], each of as many numbers '
            'as a location has'
        ) from None
    if len(corners[0]) != len(corners[1]) or not corners[0]:
        raise ConfigError(
            f'bounds {lower} and {upper} have {len(corners[0])} and {len(corners[1])} numbers, '
            'expected as many as a location has'
        )
    corners = torch.tensor(corners, dtype=torch.float64)
    if not (corners.isfinite().all() and (corners[0] < corners[1]).all()):
        raise ConfigError(
            f'bounds {lower} and {upper}: expected finite corners, every lower below its upper [m]'
        )
