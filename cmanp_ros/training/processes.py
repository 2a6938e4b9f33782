"""
Composable priors of one map: a Gaussian process, what is added to it, and where it is observed.

Whatever is drawn here is Gaussian once its hyperparameters, its step or trend and the noise of
each reading are known. So a task carries the exact posterior of its targets beside a draw of them,
and training need not average over draws.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from math import inf, log, pi
from typing import NamedTuple

import torch
from torch import Tensor

from cmanp_ros.core.errors import ConfigError

HALF_WIDTH = 2.0
JITTER = 1e-7  # relative, of the variance of the field


class Tasks(NamedTuple):
    """
    A batch of maps, float64; outputs share a kernel and are independent.
    """

    x: Tensor
    """(batch, num_context, dim_x) in [-2, 2]."""
    y: Tensor
    """(batch, num_context, dim_y)."""
    x_target: Tensor
    """(batch, num_target, dim_x)."""
    y_target: Tensor
    """(batch, num_target, dim_y): observations, noise included, no outliers."""
    mean: Tensor
    """(batch, num_target, dim_y): of the targets given all that was drawn but they."""
    covariance: Tensor
    """(batch, num_target, num_target): the same, noise included."""


@dataclass(frozen=True)
class MapPrior:
    """
    What is drawn; ranges are uniform, those of `log_uniform` in their logarithm.

    Shares are of tasks; several of them may apply to one.
    """

    kernels: tuple[str, ...] = ('rbf',)
    """Each task has one, all equally likely."""
    designs: tuple[str, ...] = ('uniform',)
    """Where observations lie; each batch has one."""
    length: tuple[float, float] = (0.1, 0.6)
    scale: tuple[float, float] = (0.1, 1.0)
    """Standard deviation of the field."""
    noise: tuple[float, float] = (0.02, 0.02)
    """Standard deviation of a reading."""
    log_uniform: tuple[str, ...] = ()
    """Which of length, scale and noise."""
    num_context: tuple[int, int] = (3, 46)
    num_target: int | tuple[int, int] = 48
    """A number, or the least and the most of a batch."""
    heavy_tails: float = 0.0
    """Share with readings that are off by several times the noise."""
    uneven_noise: float = 0.0
    """Share whose noise grows tenfold from end to end."""
    step_edge: float = 0.0
    """Share with a step through the map."""
    trend: float = 0.0
    """Share with a slope."""

    def __post_init__(self):
        for name, known in (('kernels', KERNELS), ('designs', DESIGNS)):
            if not getattr(self, name) or not _are_among(getattr(self, name), known):
                found = _plain(getattr(self, name))
                raise ConfigError(f'{name} is {found}, expected some of {sorted(known)}')
        for name in (*HYPER, 'num_context'):
            object.__setattr__(self, name, _range(name, getattr(self, name)))
        for name in ('heavy_tails', 'uneven_noise', 'step_edge', 'trend'):
            found = getattr(self, name)
            is_number = isinstance(found, int | float) and not isinstance(found, bool)
            if not is_number or not 0 <= found <= 1:
                raise ConfigError(f'{name} is {found!r}, expected a share between 0 and 1')
        if not _are_among(self.log_uniform, HYPER):
            found = _plain(self.log_uniform)
            raise ConfigError(f'log_uniform is {found}, expected some of {list(HYPER)}')
        if isinstance(self.num_target, tuple):
            object.__setattr__(self, 'num_target', _range('num_target', self.num_target))
        elif type(self.num_target) is not int or self.num_target < 1:
            raise ConfigError(f'num_target is {self.num_target!r}, expected at least 1')

    @classmethod
    def from_dict(cls, values: dict) -> 'MapPrior':
        """
        Build it from plain values.

        :raises ConfigError: for an unknown key or a value out of range.
        """
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise ConfigError(f'prior has {unknown}; expected keys among {known}')
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})

    def draw(self, generator, batch: int, dim_x: int = 1, dim_y: int = 1) -> Tasks:
        """
        Draw a batch of maps with one number of observations.
        """
        low, high = self.num_context
        num_context = int(torch.randint(low, high + 1, (1,), generator=generator))
        design = self.designs[int(torch.randint(0, len(self.designs), (1,), generator=generator))]
        if design == 'empty':
            num_context = 0
        num_target = self.num_target
        if isinstance(num_target, tuple):
            low, high = num_target
            num_target = int(torch.randint(low, high + 1, (1,), generator=generator))
        total = num_context + num_target
        x_context = DESIGNS[design](generator, batch, num_context, dim_x)
        anywhere = _uniform(generator, (batch, num_target, dim_x), -HALF_WIDTH, HALF_WIDTH)
        x = torch.cat([x_context, anywhere], 1)
        length, scale, noise = (self._hyperparameter(generator, n, batch) for n in HYPER)
        kernel = torch.randint(0, len(self.kernels), (batch,), generator=generator)
        covariance = torch.empty(batch, total, total, dtype=torch.float64)
        for number, name in enumerate(self.kernels):
            if (rows := kernel == number).any():
                difference = x[rows].unsqueeze(2) - x[rows].unsqueeze(1)
                covariance[rows] = KERNELS[name](difference, length[rows])
        covariance = covariance * scale.square()
        noise = noise.expand(batch, total, 1)
        noise = self._uneven(generator, noise, x)
        target_noise = noise[:, num_context:, 0].square()
        context_noise = self._with_outliers(generator, noise[:, :num_context])[..., 0].square()
        context_noise = context_noise + JITTER * scale[:, :, 0].square()
        added = self._added(generator, x, scale)
        return _condition(
            generator, x, covariance, context_noise, target_noise, added, num_context, dim_y
        )

    def _hyperparameter(self, generator, name, batch):
        low, high = getattr(self, name)
        if name in self.log_uniform:
            return _uniform(generator, (batch, 1, 1), log(low), log(high)).exp()
        return _uniform(generator, (batch, 1, 1), low, high)

    def _uneven(self, generator, noise, x):
        along = x[..., :1] / HALF_WIDTH
        uneven = noise * 10 ** ((along + 1) / 2 - 0.5)
        return torch.where(_chance(generator, len(x), self.uneven_noise), uneven, noise)

    def _with_outliers(self, generator, noise):
        wrong = torch.rand(noise.shape, generator=generator, dtype=torch.float64) < 0.05
        wrong = wrong & _chance(generator, len(noise), self.heavy_tails)
        return torch.where(wrong, 8 * noise, noise)

    def _added(self, generator, x, scale):
        direction = torch.randn(len(x), x.shape[-1], 1, generator=generator, dtype=torch.float64)
        across = x @ (direction / direction.norm(dim=1, keepdim=True))
        edge = (across - _uniform(generator, (len(x), 1, 1), -1, 1)).sign()
        size = scale * torch.randn(2, len(x), 1, 1, generator=generator, dtype=torch.float64)
        edge = _chance(generator, len(x), self.step_edge) * edge * size[0]
        return edge + _chance(generator, len(x), self.trend) * across * size[1]


def _condition(generator, x, covariance, context_noise, target_noise, added, n, dim_y):
    """
    Draw observations at the first n points, and the targets given them.
    """
    context = covariance[:, :n, :n] + torch.diag_embed(context_noise)
    factor = torch.linalg.cholesky(context)
    white = torch.randn(len(x), x.shape[1], dim_y, generator=generator, dtype=torch.float64)
    half = torch.linalg.solve_triangular(factor, covariance[:, :n, n:], upper=False)
    mean = half.mT @ white[:, :n]
    left = covariance[:, n:, n:] - half.mT @ half + torch.diag_embed(target_noise)
    jitter = JITTER * covariance.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    left = left + jitter * torch.eye(left.shape[-1], dtype=left.dtype)
    y_target = mean + torch.linalg.cholesky(left) @ white[:, n:]
    return Tasks(
        x[:, :n],
        factor @ white[:, :n] + added[:, :n],
        x[:, n:],
        y_target + added[:, n:],
        mean + added[:, n:],
        left,
    )


HYPER = ('length', 'scale', 'noise')


def _range(name, values):
    """
    Return least and most of a range, whose numbers may be text: YAML reads 1e-3 as such.
    """
    is_count = name in ('num_context', 'num_target')
    least = {'num_context': 0, 'num_target': 1}.get(name, 1e-9)
    try:
        low, high = (float(value) for value in values)
    except (TypeError, ValueError):
        low, high = inf, inf
    is_whole = not is_count or (low.is_integer() and high.is_integer())
    if not (least <= low <= high < inf and is_whole):
        numbers = 'whole numbers' if is_count else 'numbers'
        raise ConfigError(
            f'{name} is {_plain(values)}, expected least and most: two {numbers} of at least '
            f'{least:g}, in this order'
        )
    return (int(low), int(high)) if is_count else (low, high)


def _are_among(found, known):
    return isinstance(found, tuple) and all(each in tuple(known) for each in found)


def _plain(values):
    return list(values) if isinstance(values, tuple) else repr(values)


def _uniform(generator, shape, low, high):
    return low + (high - low) * torch.rand(shape, dtype=torch.float64, generator=generator)


def _chance(generator, batch, share):
    return torch.rand(batch, 1, 1, generator=generator, dtype=torch.float64) < share


# Kernels of variance 1: differences (batch, n, m, dim_x), lengths (batch, 1, 1) -> (batch, n, m)


def _rbf(difference, length):
    return torch.exp(-0.5 * difference.square().sum(-1) / length.square())


def _matern(polynomial, nu):
    def kernel(difference, length):
        r = (2 * nu) ** 0.5 * difference.norm(dim=-1) / length
        return polynomial(r) * torch.exp(-r)

    return kernel


def _periodic(difference, length):
    """Repeat after eight lengths, along every axis."""
    phase = pi * difference / (8 * length.unsqueeze(-1))
    return torch.exp(-2 * phase.sin().square().sum(-1))


def _fractal(difference, length):
    """Add up detail of ever shorter lengths, as terrain has."""
    octaves = range(5)
    parts = [4.0**-k * _rbf(difference, 2 * length / 2**k) for k in octaves]
    return sum(parts) / sum(4.0**-k for k in octaves)


def _sum(difference, length):
    return 0.7 * _rbf(difference, 2 * length) + 0.3 * KERNELS['matern32'](difference, length / 2)


KERNELS: dict[str, Callable] = {
    'rbf': _rbf,
    'matern12': _matern(lambda r: 1.0, 0.5),
    'matern32': _matern(lambda r: 1 + r, 1.5),
    'matern52': _matern(lambda r: 1 + r + r * r / 3, 2.5),
    'periodic': _periodic,
    'fractal': _fractal,
    'sum': _sum,
}


# Designs: where a map is observed, (batch, n, dim_x)


def _anywhere(generator, batch, n, dim_x):
    return _uniform(generator, (batch, n, dim_x), -HALF_WIDTH, HALF_WIDTH)


def _trajectory(generator, batch, n, dim_x):
    """Wind through the map with a footprint, reflected at its borders."""
    step = _uniform(generator, (batch, 1, 1), log(0.01), log(0.3)).exp()
    turn = torch.randn(batch, n, dim_x, generator=generator, dtype=torch.float64)
    turn[:, 1:] *= 0.2
    heading = turn.cumsum(1)
    heading = heading / heading.norm(dim=-1, keepdim=True).clamp(min=1e-9)
    start = _anywhere(generator, batch, 1, dim_x)
    white = torch.randn(batch, n, dim_x, generator=generator, dtype=torch.float64)
    path = start + (step * heading).cumsum(1) + 0.05 * white
    period = 4 * HALF_WIDTH
    path = (path + HALF_WIDTH) % period
    return torch.minimum(path, period - path) - HALF_WIDTH


def _half_seen(generator, batch, n, dim_x):
    x = _anywhere(generator, batch, n, dim_x)
    return torch.cat([x[..., :1].abs(), x[..., 1:]], -1)


def _clusters(generator, batch, n, dim_x):
    center = _anywhere(generator, batch, 4, dim_x)
    which = torch.randint(0, 4, (batch, n, 1), generator=generator).expand(-1, -1, dim_x)
    white = torch.randn(batch, n, dim_x, generator=generator, dtype=torch.float64)
    return (center.gather(1, which) + 0.1 * white).clamp(-HALF_WIDTH, HALF_WIDTH)


def _parked(generator, batch, n, dim_x):
    """Read nine times in ten at one place."""
    x = _anywhere(generator, batch, n, dim_x)
    is_parked = torch.rand(batch, n, 1, generator=generator) < 0.9
    return torch.where(is_parked, x[:, :1], x)


DESIGNS: dict[str, Callable] = {
    'uniform': _anywhere,
    'trajectory': _trajectory,
    'half_seen': _half_seen,
    'clusters': _clusters,
    'parked': _parked,
    'empty': _anywhere,
}
