"""
What is solved of tiles alone: functions of their sums. No map here.

It is most of the work of a prediction, and may be done in another process.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cmanp_ros.core import least_squares
from cmanp_ros.core.attention import AttentionSums
from cmanp_ros.core.least_squares import Evidence, LeastSquaresSums, Regression
from cmanp_ros.core.model import CMANP

SOLVED_AT_ONCE = 16  # tiles: what their regressions need fits in caches
ENCODED_AT_ONCE = 256  # tiles


class Task(NamedTuple):
    """A call of a method of `Solver`."""

    method: str
    arguments: tuple
    """Tensors, or named tuples of tensors."""


class Solver:
    """
    Solves and encodes any number of tiles; nothing is kept.
    """

    def __init__(self, model: CMANP):
        """
        Prepare what depends on the model alone.
        """
        self._model, config = model, model.config
        self._options = config.least_squares
        if self._options is not None:
            self._variances = least_squares.prior_variances(self._options, config.dim_x)

    def do(self, tasks: list[Task]) -> list[Any]:
        """Return the result of each task."""
        return [getattr(self, method)(*arguments) for method, arguments in tasks]

    def evidence(self, sums: LeastSquaresSums) -> Evidence:
        """
        Return what the sums of tiles say about every setting of the hyperparameters.
        """
        return least_squares.evidence(self._options, self._variances, sums)

    def posterior(
        self, sums: LeastSquaresSums, evidence: Evidence, scale: Tensor, weight: Tensor
    ) -> Regression:
        """
        Solve regressions.

        :param scale: (tiles, dim_y) of the amplitude's prior; `weight` (tiles, settings, dim_y).
        """
        return least_squares.posterior(
            self._options, self._variances, sums, evidence, scale, weight
        )

    def marginals(
        self, sums: LeastSquaresSums, evidence: Evidence, scale: Tensor, weight: Tensor
    ) -> list[Tensor]:
        """
        Return what `posterior` does, without the covariances: for large numbers of tiles.
        """
        parts = []
        for some in torch.arange(len(scale)).split(SOLVED_AT_ONCE):
            own = LeastSquaresSums(*(part[some] for part in sums))
            found = Evidence(*(part[some] for part in evidence))
            parts.append(self.posterior(own, found, scale[some], weight[some])[:-1])
        return [torch.cat(part) for part in zip(*parts, strict=True)]

    def latents(self, sums: AttentionSums) -> list[Tensor]:
        """
        Return keys and values of the latents of tiles, for each layer (tiles, latents, ...).
        """
        parts = []
        for some in torch.arange(len(sums.logsumexp)).split(ENCODED_AT_ONCE):
            parts.append(self._model.latents(AttentionSums(*(part[some] for part in sums))))
        return [torch.cat(part) for part in zip(*parts, strict=True)]
