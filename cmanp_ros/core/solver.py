"""
What predictions need of tiles, from their sums alone: no map here.

It is most of the work of a prediction, and may be done in another process.
"""

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
        if self._options is not None:
            dim_x = model.config.dim_x
            self._variances = least_squares.prior_variances(self._options, dim_x)

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
        solved = self._marginals(
            LeastSquaresSums(*(part[stale] for part in request.sums)),
            scale[stale],
            weight[stale],
            self._geometry.nearest(torch.tensor(request.wanted)[stale]),
        )
        return Solution(latents, found, inputs, stale, solved)

    def posterior(
        self,
        sums: LeastSquaresSums,
        scale: Tensor,
        weight: Tensor,
        nearest: Tensor | None = None,
    ) -> Regression:
        """
        Solve regressions whose hyperparameters are known.

        :param scale: (tiles, dim_y) of the amplitude's prior; `weight` (tiles, settings, dim_y).
        :param nearest: (tiles,), see `outliers.posterior`.
        """
        return outliers.posterior(self._options, self._variances, sums, scale, weight, nearest)

    def _evidence(self, request):
        """Return the evidence of the unknown, and of all members of all levels."""
        if not request.unknown.any():
            return None, request.evidence

        def solve(sums):
            return least_squares.evidence(self._options, self._variances, sums)

        found = Evidence(*_in_parts(solve, SOLVED_AT_ONCE, request.unknown_sums))
        if request.evidence is None:
            return found, found
        merged = [part.new_empty(len(request.unknown), *part.shape[1:]) for part in found]
        for whole, unknown, known in zip(merged, found, request.evidence, strict=True):
            whole[request.unknown], whole[~request.unknown] = unknown, known
        return found, Evidence(*merged)

    def _marginals(self, sums, *hyperparameters):
        """Return regressions without their covariances, and their hyperparameters."""

        def solve(sums, hyperparameters):
            scale, weight, nearest = hyperparameters
            return *self.posterior(sums, scale, weight, nearest)[:-1], scale, weight

        return _in_parts(solve, SOLVED_AT_ONCE, sums, hyperparameters)

    def _latents(self, sums):
        return _in_parts(self._model.latents, ENCODED_AT_ONCE, sums)


def _in_parts(function, size, *arguments):
    """
    Call a function of tuples of tensors (tiles, ...) with some tiles at a time.

    :return: the tensors that it returns, for all tiles; of no tiles none.
    """
    parts = []
    for some in torch.arange(len(arguments[0][0])).split(size):
        if len(some):
            own = ([part[some] for part in argument] for argument in arguments)
            kinds = (getattr(type(argument), '_make', tuple) for argument in arguments)
            parts.append(function(*(kind(one) for kind, one in zip(kinds, own, strict=True))))
    return [torch.cat(part) for part in zip(*parts, strict=True)]
