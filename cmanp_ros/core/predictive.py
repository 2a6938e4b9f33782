"""What a prediction is: a normal distribution of an observation at each target."""

from dataclasses import dataclass
from math import log, pi

import torch
from torch import Tensor


@dataclass(frozen=True)
class PredictiveDistribution:
    """
    Normal predictive distribution of *observations*: noise is included.
    """

    mean: Tensor
    """(batch, n, dim_y)."""
    stddev: Tensor
    """(batch, n, dim_y), marginal."""
    covariance: Tensor | None = None
    """(batch, dim_y, n, n) when asked for with joint=True; outputs are independent."""

    def log_prob(self, y: Tensor) -> Tensor:
        """
        Return log densities [nat]: (batch, n, dim_y), or (batch, dim_y) when joint.

        :param y: (batch, n, dim_y).
        """
        residual = y - self.mean
        if self.covariance is None:
            z = residual / self.stddev
            return -0.5 * (log(2 * pi) + z.square()) - self.stddev.log()
        factor = torch.linalg.cholesky(self.covariance)
        z = torch.linalg.solve_triangular(factor, residual.mT.unsqueeze(-1), upper=False)
        log_determinant = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        n = y.shape[1]
        return -0.5 * (n * log(2 * pi) + log_determinant + z.square().sum((-2, -1)))

    def sample(self, num_samples: int, generator=None) -> Tensor:
        """
        Draw observations, (num_samples, batch, n, dim_y): independent unless joint.
        """
        shape = (num_samples, *self.mean.shape)
        kwargs = {'dtype': self.mean.dtype, 'device': self.mean.device}
        white = torch.randn(shape, generator=generator, **kwargs)
        if self.covariance is None:
            return self.mean + self.stddev * white
        factor = torch.linalg.cholesky(self.covariance)
        return self.mean + (factor @ white.mT.unsqueeze(-1)).squeeze(-1).mT
