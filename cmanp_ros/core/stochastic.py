"""
The stochastic variant: one global latent variable per map beside the latents.

As in the latent path of neural processes (Garnelo et al. 2018; Kim et al. 2019): its prior comes
from the context, in training its posterior from context and targets, and both are a function of
the same constant-size state.
"""

import torch
from torch import Tensor, nn
from torch.distributions import Normal

from cmanp_ros.core.blocks import mlp
from cmanp_ros.core.config import CMANPConfig

NUM_SAMPLES = 16  # of the variable, averaged by a prediction


class GlobalVariable(nn.Module):
    """
    Pooled latents to a normal distribution, and its samples to what they add to target tokens.
    """

    def __init__(self, config: CMANPConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.dim_model)
        self.moments = mlp(config.dim_model, config.dim_model, 2 * config.num_global, 2)
        self.to_token = nn.Linear(config.num_global, config.dim_model)

    def forward(self, latents: Tensor) -> Normal:
        """
        Return the distribution given the last latents, (batch, num_latents, dim_model).
        """
        mean, raw = self.moments(self.norm(latents).mean(1)).chunk(2, -1)
        return Normal(mean, 0.1 + 0.9 * torch.sigmoid(raw), validate_args=False)

    def quantile_samples(self, distribution: Normal) -> Tensor:
        """
        Return the same `NUM_SAMPLES` quasi-random samples each time, (samples, batch, num_global).
        """
        engine = torch.quasirandom.SobolEngine(distribution.loc.shape[-1], scramble=True, seed=0)
        uniform = engine.draw(NUM_SAMPLES).clamp(1e-4, 1 - 1e-4).to(distribution.loc)
        white = torch.special.ndtri(uniform).unsqueeze(1)
        return distribution.loc + distribution.scale * white
