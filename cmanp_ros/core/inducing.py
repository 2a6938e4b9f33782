"""
Inducing-point initialization: attention that is local in space before any training.

Tokens and latents share multi-scale Fourier features of location; latents start at the features
of a grid, and queries equal keys, so a score is a stationary kernel between latent and point.
"""

import torch
from torch import Tensor, nn

SHARPNESS = 1.5  # scale of W_q = W_k at the start


class FourierFeatures(nn.Module):
    """
    Cosines and sines of location at fixed random frequencies, spread evenly over the heads.
    """

    def __init__(self, dim_x, dim_model, num_heads, shortest, longest, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        per_head = dim_model // num_heads // 2
        scales = torch.logspace(0, 1, per_head, base=longest / shortest) * shortest
        direction = torch.randn(num_heads, per_head, dim_x, generator=generator)
        self.register_buffer('frequencies', direction / scales.unsqueeze(-1))

    def forward(self, x: Tensor) -> Tensor:
        """
        Map (..., dim_x) to (..., dim_model).
        """
        phase = torch.einsum('...d,hfd->...hf', x, self.frequencies)
        return torch.cat([phase.cos(), phase.sin()], -1).flatten(-2)


def value_features(y: Tensor) -> Tensor:
    """
    Return bounded features of a value at many scales, (..., dim_y) to (..., 25 * dim_y).

    Averages of sines and cosines are robust to outliers, and fine ones see small relief: the
    rates, a factor of two apart, reach from half a period over [-6, 6] to relief of a thousandth.
    """
    rates = 2.0 ** torch.arange(-1, 11, dtype=y.dtype, device=y.device)
    phase = (y.unsqueeze(-1) * rates).flatten(-2)
    return torch.cat([4 * torch.tanh(y / 4), phase.sin(), phase.cos()], -1)


def grid(num_points, dim_x) -> Tensor:
    """
    Return about evenly spaced locations in [-2, 2]^dim_x, exactly `num_points` of them.
    """
    per_axis = round(num_points ** (1 / dim_x))
    if per_axis**dim_x == num_points:
        axis = torch.linspace(-1.9, 1.9, per_axis) if per_axis > 1 else torch.zeros(1)
        return torch.cartesian_prod(*[axis] * dim_x).reshape(num_points, dim_x)
    sobol = torch.quasirandom.SobolEngine(dim_x, scramble=True, seed=0)
    return sobol.draw(num_points) * 4 - 2


@torch.no_grad()
def initialize(model):
    """
    Start the latents on a grid and make every attention to them local.
    """
    config, encoder = model.config, model.encoder
    encoder.latents.copy_(model.location(grid(config.num_latents, config.dim_x)))
    encoder.block_latents.copy_(model.location(grid(config.num_latents_per_block, config.dim_x)))
    eye = SHARPNESS * torch.eye(config.dim_model)
    for layer in (
        encoder.gather,
        *(integration.cross_attention for integration in encoder.integrations),
        *(layer.cross_attention for layer in model.decoder),
    ):
        layer.to_q.weight.copy_(eye.expand_as(layer.to_q.weight))
        layer.to_kv.weight[..., : config.dim_model, :] = eye
    for embedder in (model.embedder, model.query_embedder):
        embedder[-1].weight.mul_(0.1)
