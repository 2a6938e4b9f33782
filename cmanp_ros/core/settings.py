"""
The grid of hyperparameters: smoothness x length x noise ratio, and settings in between.

Evidence is found for the grid. It is smooth in the logarithms of length and noise ratio, so what
lies between neighbors is interpolated, and regressions are solved there too: a grid twice as fine
along both axes, for the price of a coarse one.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import product
from math import inf, log

import torch
from torch import Tensor

from cmanp_ros.core.config import LeastSquaresConfig


def num_settings(config: LeastSquaresConfig) -> int:
    """
    Return the number of settings of the grid, those in between left out.
    """
    return len(config.smoothnesses) * len(config.lengths) * len(config.noise_ratios)


@cache
def finer(config: LeastSquaresConfig) -> LeastSquaresConfig:
    """
    Return the same with all settings in between on its grid.
    """
    steps = config.refinement
    if steps == 1:
        return config
    return replace(
        config,
        lengths=tuple(_between(config.lengths, steps)[1].exp().tolist()),
        noise_ratios=tuple(_between(config.noise_ratios, steps)[1].exp().tolist()),
        refinement=1,
    )


def softmax(logs: Tensor) -> Tensor:
    """
    Return the weights of settings (batch, settings, dim_y) that their log evidence alone gives.
    """
    return logs.softmax(1)


def weigh(
    config: LeastSquaresConfig,
    logs: Tensor,
    weights_of: Callable[[Tensor], Tensor] = softmax,
) -> Tensor:
    """
    Return the weights of all settings by the log evidence of those of the grid.

    Settings in between count where as few as are averaged hold nearly all of the weight. Where
    the data leave it open, the grid itself is the better quadrature: it spreads wider.

    :param logs: (batch, settings of the grid, dim_y).
    :param weights_of: makes weights of log evidence, as `softmax` does.
    :return: (batch, settings of the finer grid, dim_y).
    """
    coarse = weights_of(logs)
    if config.refinement == 1:
        return coarse
    weight = weights_of(interpolated(config, logs))
    held = most_likely(config, weight)[0].sum(1, keepdim=True)
    on_grid = torch.zeros_like(weight)
    on_grid[:, _of_grid(config).to(weight.device)] = coarse
    return torch.where(held < config.averaged_weight, on_grid, weight)


def most_likely(config: LeastSquaresConfig, weight: Tensor) -> tuple[Tensor, Tensor]:
    """
    Return the largest weights of each output, as many as are averaged at most, and their settings.

    :param weight: (batch, settings, dim_y).
    :return: both (batch, num, dim_y), the largest first.
    """
    return weight.topk(min(config.num_averaged, weight.shape[1]), dim=1)


def interpolated(config: LeastSquaresConfig, values: Tensor) -> Tensor:
    """
    Return values at all settings, from those at settings of the grid, (batch, settings, dim_y).
    """
    if config.refinement == 1:
        return values
    along_length, along_noise = (
        _between(axis, config.refinement)[0].to(values)
        for axis in (config.lengths, config.noise_ratios)
    )
    grid = values.unflatten(1, (len(config.smoothnesses), len(config.lengths), -1))
    return torch.einsum('li,nj,bsijo->bslno', along_length, along_noise, grid).flatten(1, 3)


@cache
@torch.inference_mode(False)  # tensors that serve in either mode
def _between(values, steps):
    """
    Return a natural cubic spline through the logarithms of some values, at steps between them.

    :return: (points, values), by which numbers at the values are multiplied; where the points lie.
    """
    node = torch.tensor(values, dtype=torch.float64).log()
    num, width = len(node), node.diff()
    identity = torch.eye(num, dtype=torch.float64)
    slope = identity.diff(dim=0) / width.unsqueeze(1)
    bend = torch.zeros_like(identity)  # second derivatives at the nodes; none at the ends
    if num > 2:
        inner = torch.diag((width[:-1] + width[1:]) / 3)
        inner += torch.diag(width[1:-1] / 6, 1) + torch.diag(width[1:-1] / 6, -1)
        bend[1:-1] = torch.linalg.solve(inner, slope.diff(dim=0))
    rows, at = [], []
    for i in range(num - 1):
        for step in range(steps):
            b = step / steps
            a = 1 - b
            curve = ((a**3 - a) * bend[i] + (b**3 - b) * bend[i + 1]) * width[i] ** 2 / 6
            rows.append(a * identity[i] + b * identity[i + 1] + curve)
            at.append(a * node[i] + b * node[i + 1])
    return torch.stack([*rows, identity[-1]]), torch.stack([*at, node[-1]])


@cache
@torch.inference_mode(False)
def _of_grid(config):
    """Return which settings of the finer grid are those of the grid, in its order."""
    step, all_of_them = config.refinement, finer(config)
    axes = config.smoothnesses, all_of_them.lengths, all_of_them.noise_ratios
    number = torch.arange(num_settings(all_of_them)).view([len(axis) for axis in axes])
    return number[:, ::step, ::step].flatten()


def coordinates(config: LeastSquaresConfig) -> Tensor:
    """
    Return log length, log noise ratio, 1 / smoothness of every setting, (settings, 3).
    """
    rows = [
        (log(length), log(noise), 0.0 if nu == inf else 1 / nu)
        for nu, length, noise in product(config.smoothnesses, config.lengths, config.noise_ratios)
    ]
    return torch.tensor(rows, dtype=torch.float64)


@cache
def places(config: LeastSquaresConfig) -> Tensor:
    """
    Return where settings lie on the grid of smoothness, length and noise ratio, (settings, 3).
    """
    axes = config.smoothnesses, config.lengths, config.noise_ratios
    return torch.cartesian_prod(*(torch.arange(len(axis)) for axis in axes))


@cache
def beside(config: LeastSquaresConfig) -> Tensor:
    """
    Return which settings are neighbors on the grid, 0 or 1 (settings, settings).

    So are those of the next longer length and the next less noise: as likely, often, or the best
    one could hide behind a corner.
    """
    place = places(config)
    apart = place.unsqueeze(0) - place.unsqueeze(1)
    length, noise = apart[..., 1], apart[..., 2]
    is_along = (apart[..., 0] == 0) & (length * noise == -1)
    return (is_along | (apart.abs().sum(-1) == 1)).double()


@cache
def first(config: LeastSquaresConfig) -> Tensor:
    """
    Return with which settings a search begins, (settings,) bool: every other length and noise.
    """
    place = places(config)[:, 1:]
    return ((place % 2 == 1) | (place.amax(0) == 0)).all(1)
