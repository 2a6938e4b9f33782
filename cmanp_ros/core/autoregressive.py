"""
Joint distributions of targets, block by block: CMANP-AND (Feng et al. 2023, section 4.3).

The targets of a block share a full covariance, from a network or from least squares. Then the
block, with its true or sampled values, is folded into the state and the next one is predicted:
memory does not grow with the targets.
"""

import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from cmanp_ros.core.blocks import mlp
from cmanp_ros.core.config import CMANPConfig
from cmanp_ros.core.errors import InputError
from cmanp_ros.core.state import State, repeat

DEFAULT_BLOCK_SIZE = 10  # of models whose joint is in closed form


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
    :raises InputError: for a model that takes all targets for independent.
    """
    if model.covariance_head is not None:
        model.check_targets(state, x)
        mean, factor = model.decode_block(model.encoding(state).projected, x)
        return MultivariateNormal(mean, scale_tril=factor, validate_args=False)
    if model.config.least_squares is None:
        raise InputError(
            'this model has no covariance head and no least squares: its targets are independent; '
            "expected one with `autoregressive` or `least_squares`, such as 'gp1d_and'"
        )
    found = model.predict(state, x, joint=True)
    n, dim_y = found.mean.shape[1:]
    covariance = found.covariance.new_zeros(len(x), n, dim_y, n, dim_y)
    for output in range(dim_y):  # independent
        covariance[:, :, output, :, output] = found.covariance[:, output]
    covariance = covariance.flatten(3).flatten(1, 2)
    return MultivariateNormal(found.mean.flatten(1), covariance, validate_args=False)


def joint_log_prob(
    model, state: State, x: Tensor, y: Tensor, block_size: int | None = None
) -> Tensor:
    """
    Return the joint log density of all targets, (batch,): each block given those before it.

    :param x: (batch, n, dim_x) in model units; the order of the targets matters.
    :param y: (batch, n, dim_y).
    :param block_size: targets in a block; None: as configured.
    :raises InputError: for wrong shapes, or a model that takes all targets for independent.
    """
    expected = (*x.shape[:2], model.config.dim_y)
    if tuple(y.shape) != expected:
        raise InputError(f'y has shape {tuple(y.shape)}, expected {expected} as x')
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
    :raises InputError: for a model that takes all targets for independent.
    """
    size, found = _block_size(model, block_size), []
    repeated = x.repeat(num_samples, 1, 1)
    for start in range(0, x.shape[1], size):
        block = slice(start, start + size)
        distribution = predict_block(model, state, (repeated if start else x)[:, block])
        times = 1 if start else num_samples  # the first block is the same for all samples
        mean = distribution.loc.repeat(times, 1)
        white = torch.randn(
            mean.shape, generator=generator, device=x.device, dtype=torch.float64
        ).to(mean.dtype)
        factor = distribution.scale_tril.repeat(times, 1, 1)
        flat = mean + (factor @ white.unsqueeze(-1)).squeeze(-1)
        found.append(flat.unflatten(1, (-1, model.config.dim_y)))
        if start + size < x.shape[1]:
            state = repeat(state, times)
            state = model.update(state, repeated[:, block], found[-1])
    return torch.cat(found, 1).unflatten(0, (num_samples, -1))


def _block_size(model, block_size):
    options = model.config.autoregressive
    if block_size is None:
        block_size = DEFAULT_BLOCK_SIZE if options is None else options.block_size
    if block_size < 1:
        raise InputError(f'block_size is {block_size}, expected at least 1 target')
    return block_size
