"""
CMANP-AND: joint distributions of targets, block by block (Feng et al. 2023, section 4.3).

The targets of a block share a full covariance. Then the block, with its true or sampled values, is
folded into the state and the next one is predicted: memory does not grow with the targets.
"""

import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from cmanp_ros.core.blocks import mlp
from cmanp_ros.core.config import CMANPConfig
from cmanp_ros.core.errors import InputError
from cmanp_ros.core.state import State, repeat


class CovarianceHead(nn.Module):
    """
    Decoded targets of one block to the Cholesky factor of their covariance.
    """

    def __init__(self, config: CMANPConfig):
        super().__init__()
        options, dim = config.autoregressive, config.dim_model
        layer = nn.TransformerEncoderLayer(
            dim, config.num_heads, config.dim_feedforward, dropout=0.0, batch_first=True
        )
        self.transformer = nn.TransformerEncoder(
            layer, options.num_layers, enable_nested_tensor=False
        )
        self.projector = mlp(
            dim, config.dim_feedforward, config.dim_y * options.rank, options.depth
        )
        self.rank, self.is_bounded = options.rank, config.bounded_stddev

    def forward(self, h: Tensor) -> Tensor:
        """
        Map (batch, n, dim_model) to lower triangles (batch, n * dim_y, n * dim_y).
        """
        rows = self.projector(self.transformer(h)).unflatten(-1, (-1, self.rank)).flatten(1, 2)
        factor = (rows @ rows.mT).tril()
        if not self.is_bounded:
            return factor
        diagonal = factor.diagonal(dim1=-2, dim2=-1)
        return factor.tril(-1) + torch.diag_embed(0.05 + 0.95 * diagonal.tanh())


def predict_block(model, state: State, x: Tensor) -> MultivariateNormal:
    """
    Return the joint distribution of observations at the targets of one block.

    :param x: (batch, n, dim_x) in model units.
    :return: over (batch, n * dim_y), the outputs of a target side by side.
    """
    mean, factor = model.decode_block(model.encoding(state).projected, x)
    return MultivariateNormal(mean, scale_tril=factor, validate_args=False)


def joint_log_prob(
    model, state: State, x: Tensor, y: Tensor, block_size: int | None = None
) -> Tensor:
    """
    Return the joint log density of all targets, (batch,): each block given those before it.

    :param x: (batch, n, dim_x) in model units; the order of the targets matters.
    :param y: (batch, n, dim_y).
    :param block_size: targets in a block; None: as configured.
    :raises InputError: for a model without a covariance head.
    """
    size, total = _block_size(model, block_size), 0.0
    for start in range(0, x.shape[1], size):
        block = slice(start, start + size)
        if start:
            state = model.update(state, x[:, start - size : start], y[:, start - size : start])
        distribution = predict_block(model, state, x[:, block])
        total = total + distribution.log_prob(y[:, block].flatten(1).to(distribution.loc.dtype))
    return total


def sample(
    model,
    state: State,
    x: Tensor,
    num_samples: int,
    generator=None,
    block_size: int | None = None,
) -> Tensor:
    """
    Draw joint observations at all targets, feeding each block's samples back.

    :param x: (batch, n, dim_x) in model units.
    :return: (num_samples, batch, n, dim_y).
    :raises InputError: for a model without a covariance head.
    """
    size, found = _block_size(model, block_size), []
    state, x = repeat(state, num_samples), x.repeat(num_samples, 1, 1)
    for start in range(0, x.shape[1], size):
        block = x[:, start : start + size]
        distribution = predict_block(model, state, block)
        white = torch.randn(
            distribution.loc.shape, generator=generator, device=x.device, dtype=torch.float64
        ).to(distribution.loc.dtype)
        flat = distribution.loc + (distribution.scale_tril @ white.unsqueeze(-1)).squeeze(-1)
        found.append(flat.unflatten(1, (block.shape[1], -1)))
        if start + size < x.shape[1]:
            state = model.update(state, block, found[-1])
    return torch.cat(found, 1).unflatten(0, (num_samples, -1))


def _block_size(model, block_size):
    options = model.config.autoregressive
    if options is None:
        raise InputError(
            'this model has no covariance head: expected one with `autoregressive`, such as the '
            "shipped 'gp1d_and'; a model with least squares has predict(..., joint=True)"
        )
    size = options.block_size if block_size is None else block_size
    if size < 1:
        raise InputError(f'block_size is {size}, expected at least 1 target')
    return size
