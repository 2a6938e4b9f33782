"""
What a tile takes from the tiles around and above it: the hyperparameters of its regression.

Their weights come from the evidence of its neighbours and its own, and the prior of its amplitude
from the coarsest tiles above it; both in steps, or every point would have all tiles around it
solved again.
"""

from collections.abc import Container
from typing import NamedTuple

import torch
from torch import Tensor

from cmanp_ros.core import least_squares, settings
from cmanp_ros.core.config import LeastSquaresConfig
from cmanp_ros.core.lattice import Lattice, OneTile
from cmanp_ros.core.least_squares import Evidence
from cmanp_ros.core.tiles import Key, keys_of

SHARE_OF_NEIGHBOURS = 4.0  # weight of their evidence, all together; that of the tile itself is 1
NEAR = 1.75  # [tiles] neighbours: those that overlap
NEAR_FINEST = {1: 3.0, 2: 2.3, 3: 2.0}  # by dim_x: tiles of the finest level have few points
WEIGHT_STEP = 1 / 4  # of the weights of hyperparameters, relative to the largest
SCALE_STEP = 0.25  # of the log of the amplitude's prior scale


class Level(NamedTuple):
    """Tiles of one level that are to be solved, and those whose evidence counts for it."""

    solved: list[Key]
    members: list[Key]


class Neighbourhood:
    """
    Finds the hyperparameters of tiles from the evidence of others.
    """

    def __init__(self, options: LeastSquaresConfig | None, geometry: Lattice | OneTile):
        """
        Remember which functions, and where tiles lie.

        :param options: None: of a model without regressions, only `levels` can be had.
        """
        self._options, self._geometry = options, geometry

    def levels(self, keys: list[Key], there: Container[Key]) -> list[Level]:
        """
        Return what must be solved, and known, to solve tiles; fine levels first.

        A tile needs the evidence of its neighbours, and the amplitude of the coarsest tiles above
        it and them.

        :param there: tiles that exist.
        """
        needed, above, coarsest = [], [], self._geometry.num_levels - 1
        for level in range(self._geometry.num_levels):
            own = [key for key in keys if key[0] == level]
            solved = list(dict.fromkeys([*own, *above] if level == coarsest else own))
            if not solved:
                continue
            names = keys_of(self._neighbours(solved)[0].flatten(0, 1))
            members = [key for key in dict.fromkeys(names) if key in there]
            needed.append(Level(solved, members))
            if level < coarsest:
                above += [key for key in self._above(members)[2] if key in there]
        return needed

    def hyperparameters(
        self, levels: list[Level], evidence: Evidence
    ) -> tuple[list[Key], Tensor, Tensor]:
        """
        Return the tiles to be solved of all levels, with what `outliers.posterior` takes.

        :param evidence: of the members of all levels, one after the other.
        :return: tiles, amplitude scales (tiles, dim_y), and weights (tiles, settings, dim_y): by
            evidence, in steps.
        """
        sizes, amplitude, found = [len(level.members) for level in levels], {}, []
        parts = zip(*(part.split(sizes) for part in evidence), strict=True)
        for (solved, members), part in reversed(list(zip(levels, parts, strict=True))):
            own = Evidence(*part)
            scale = self._amplitude_prior(members, amplitude, own.residual.shape[-1])
            logs = least_squares.log_evidence(self._options, own, scale)
            place = {key: i for i, key in enumerate(members)}
            center = torch.tensor([place[key] for key in solved], dtype=torch.int64)
            weight = self._weights(solved, place, logs - logs.mean(1, keepdim=True))
            own, scale = Evidence(*(part[center] for part in own)), scale[center]
            means = least_squares.amplitude(self._options, own, scale, weight)
            amplitude |= zip(solved, means, strict=True)
            found.append((solved, scale, weight))
        keys, *parts = zip(*found, strict=True)
        return sum(keys, []), *map(torch.cat, parts)

    def _weights(self, solved, place, own):
        """
        Return the weights (tiles, settings, dim_y) of hyperparameters: by evidence, in steps.

        :param place: where each tile's own evidence lies in `own`.
        """
        near, distance = self._neighbours(solved)
        names = keys_of(near.flatten(0, 1))
        index = torch.tensor([place.get(key, -1) for key in names]).view(near.shape[:2])
        share = (index >= 0).double()
        share[:, distance > 0] *= min(1.0, SHARE_OF_NEIGHBOURS / max(1, len(distance) - 1))
        total = torch.einsum('tn,tnso->tso', share, own[index.clamp(min=0)])
        if len(distance) == 1:  # no neighbours: none would be solved again
            return settings.weigh(self._options, total)
        return settings.weigh(self._options, total, _in_steps)

    def _amplitude_prior(self, keys, amplitude, dim_y):
        """Return the scale of each tile's amplitude prior: the amplitude of the region."""
        shape = len(keys), dim_y
        default = least_squares.default_scale(self._options, *shape)
        if keys[0][0] == self._geometry.num_levels - 1:
            return default
        index, window, names = self._above(keys)
        known = [i for i, name in enumerate(names) if name in amplitude]
        if not known:
            return default
        index, window = index[known], window[known].clamp(min=1e-6).unsqueeze(-1)
        logs = torch.stack([amplitude[names[i]] for i in known]).log()
        total = torch.zeros(shape, dtype=torch.float64).index_add_(0, index, window * logs)
        weight = torch.zeros(shape[0], 1, dtype=torch.float64).index_add_(0, index, window)
        steps = ((total / weight) / SCALE_STEP).round()
        scale = (self._options.amplitude_shape - 1) * (steps * SCALE_STEP).exp()
        return torch.where(weight > 0, scale, default)

    def _neighbours(self, keys):
        """Return the neighbours of tiles of one level: see `Lattice.neighbours`."""
        key = torch.tensor(keys, dtype=torch.int64).view(-1, 1 + self._geometry.dim_x)
        radius = NEAR_FINEST[self._geometry.dim_x] if keys[0][0] == 0 else NEAR
        return self._geometry.neighbours(key, radius)

    def _above(self, keys):
        """
        Return the coarsest tiles over the centers of tiles: index, window, names.
        """
        centers = self._geometry.center(torch.tensor(keys))
        cover = self._geometry.answering(centers, self._geometry.num_levels - 1)
        return cover.index, cover.window, keys_of(cover.key)


def _in_steps(logs):
    """
    Return weights by log evidence, (tiles, settings, dim_y), in steps of the largest.
    """
    steps = ((logs - logs.amax(1, keepdim=True)).exp() / WEIGHT_STEP).round()
    return steps / steps.sum(1, keepdim=True)
