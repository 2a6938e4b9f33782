"""
What predictions need of tiles, from their sums alone: no map here.

It is most of the work of a prediction, and may be done in another process.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from cmanp_ros.core import least_squares, outliers
from cmanp_ros.core.attention import AttentionSums
from cmanp_ros.core.lattice import Lattice, OneTile
from cmanp_ros.core.least_squares import Evidence, LeastSquaresSums, Regression
from cmanp_ros.core.model import CMANP
from cmanp_ros.core.neighbourhood import Level, Neighbourhood
from cmanp_ros.core.tiles import Key

SOLVED_AT_ONCE = 16  # tiles: what their regressions need fits in caches
ENCODED_AT_ONCE = 256  # tiles


class Request(NamedTuple):
    """Tiles to be solved and encoded, and what is known."""

    attention: AttentionSums
    """Of the tiles to be encoded."""
    levels: list[Level]
    """See `Neighbourhood.levels`; without a regression, or with nothing to be solved, none."""
    unknown: Tensor | None = None
    """(members,) bool: whose evidence is unknown, of the members of all levels."""
    unknown_sums: LeastSquaresSums | None = None
    evidence: Evidence | None = None
    """Of the other members, in order."""
    wanted: tuple[Key, ...] = ()
    """The tiles to be solved, others of the levels are not."""
    sums: LeastSquaresSums | None = None
    """Of these."""
    version: Tensor | None = None
    """(wanted,): another one for other sums."""
    before: Tensor | None = None
    """(wanted, ...): `Solution.inputs` of the last time they were solved; -1 without one."""


class Solution(NamedTuple):
    """What predictions need; see `Request`."""

    latents: list[Tensor]
    """Of each layer (tiles, latents, ...), keys and values; of no tiles nothing."""
    evidence: Evidence | None = None
    """Of the unknown."""
    inputs: Tensor | None = None
    """(wanted, ...): version of the sums, and the hyperparameters, in one row."""
    stale: Tensor | None = None
    """Which of the wanted were solved: those with other inputs than before."""
    regression: list[Tensor] | tuple[()] = ()
    """Of these: `Regression` without covariances, amplitude scale, weights."""


class Solver:
    """
    Solves and encodes tiles; nothing is kept.
    """

    def __init__(self, model: CMANP, geometry: Lattice | OneTile):
        """
        Prepare what depends on the model and the lattice alone.
        """
        self._model, self._options = model, model.config.least_squares
        self._geometry = geometry
        self.neighbourhood = Neighbourhood(self._options, geometry)

    def solve(self, request: Request) -> Solution:
        """
        Solve the regressions of tiles, with what they take from others, and encode tiles.
        """
        latents = self._latents(request.attention)
        if not request.levels:
            return Solution(latents)
        found, evidence = self._evidence(request)
        keys, scale, weight = self.neighbourhood.hyperparameters(request.levels, evidence)
        place = {key: i for i, key in enumerate(keys)}
        wanted = torch.tensor([place[key] for key in request.wanted])
        scale, weight = scale[wanted], weight[wanted]
        inputs = torch.cat([scale.unsqueeze(1), weight], 1).flatten(1)
        inputs = torch.cat([request.version.unsqueeze(1).double(), inputs], 1)
        stale = (inputs != request.before).any(1).nonzero()[:, 0]
        keys = torch.tensor(request.wanted)[stale]
        solved = self._marginals(
            keys[:, 0],
            outliers.some_of(request.sums, stale),
            (scale[stale], weight[stale], self._geometry.nearest(keys)),
        )
        return Solution(latents, found, inputs, stale, solved)

    def posterior(
        self,
        level: int,
        sums: LeastSquaresSums,
        scale: Tensor,
        weight: Tensor,
        nearest: Tensor | None = None,
    ) -> Regression:
        """
        Solve regressions of tiles of one level whose hyperparameters are known.

        :param scale: (tiles, dim_y) of the amplitude's prior; `weight` (tiles, settings, dim_y).
        :param nearest: (tiles,), see `outliers.posterior`.
        """
        return outliers.posterior(*self._prior(level), sums, scale, weight, nearest)

    def _prior(self, level):
        """Return the options of a level, and its prior variances."""
        options = self._options.of_level(level)
        return options, least_squares.prior_variances(options, self._model.config.dim_x)

    def _evidence(self, request):
        """Return the evidence of the unknown, and of all members of all levels."""
        if not request.unknown.any():
            return None, request.evidence

        def solve(level, sums):
            return least_squares.evidence(*self._prior(level), sums)

        level = torch.tensor([key[0] for one in request.levels for key in one.members])
        found = Evidence(*_by_level(solve, level[request.unknown], request.unknown_sums))
        if request.evidence is None:
            return found, found
        merged = [part.new_empty(len(request.unknown), *part.shape[1:]) for part in found]
        for whole, unknown, known in zip(merged, found, request.evidence, strict=True):
            whole[request.unknown], whole[~request.unknown] = unknown, known
        return found, Evidence(*merged)

    def _marginals(self, level, sums, hyperparameters):
        """Return regressions without their covariances, and their hyperparameters."""

        def solve(level, sums, hyperparameters):
            scale, weight, nearest = hyperparameters
            return *self.posterior(level, sums, scale, weight, nearest)[:-1], scale, weight

        return _by_level(solve, level, sums, hyperparameters)

    def _latents(self, sums):
        return _in_parts(self._model.latents, ENCODED_AT_ONCE, sums)


def _by_level(function, level, *arguments):
    """
    Call a function of a level and tuples of tensors (tiles, ...), with some tiles of it at a time.

    :param level: (tiles,).
    :return: the tensors that it returns, for all tiles; of no tiles none.
    """
    where, parts = [], []
    for one in level.unique().tolist():
        where.append((level == one).nonzero()[:, 0])
        own = (outliers.some_of(argument, where[-1]) for argument in arguments)
        parts.append(_in_parts(partial(function, one), SOLVED_AT_ONCE, *own))
    back = torch.cat([level.new_empty(0), *where]).argsort()
    return [torch.cat(part)[back] for part in zip(*parts, strict=True)]


def _in_parts(function, size, *arguments):
    """
    Call a function of tuples of tensors (tiles, ...) with some tiles at a time.

    :return: the tensors that it returns, for all tiles; of no tiles none.
    """
    parts = []
    for some in torch.arange(len(arguments[0][0])).split(size):
        if len(some):
            parts.append(function(*(outliers.some_of(argument, some) for argument in arguments)))
    return [torch.cat(part) for part in zip(*parts, strict=True)]
