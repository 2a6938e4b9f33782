"""
The paper's first benchmark (Feng et al. 2023, section 5): curves of one-dimensional GPs.

Beside the models: an exact GP that is told the hyperparameters, and the Bayes ceiling, which no
method that has to infer them can exceed on average. Both see what the models see.
"""

from collections.abc import Callable, Iterator
from math import log, pi
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cmanp_ros.core import CMANP, autoregressive
from cmanp_ros.evaluation.scores import mean_and_error

CEILING = 'Bayes ceiling'
BATCH_SIZE = 16
NOISE = 0.02
LENGTH, SCALE = (0.1, 0.6), (0.1, 1.0)
NUM_LENGTHS, NUM_SCALES = 16, 12  # of the quadrature over both ranges
KERNELS: dict[str, Callable[[Tensor], Tensor]] = {
    'rbf': lambda r: torch.exp(-0.5 * r.square()),
    'matern52': lambda r: (1 + 5**0.5 * r + 5 / 3 * r.square()) * torch.exp(-(5**0.5) * r),
}


class Curves(NamedTuple):
    """A batch of tasks, float64: (batch, n, 1) each."""

    x: Tensor
    y: Tensor
    x_target: Tensor
    y_target: Tensor
    length: Tensor
    """(batch, 1)."""
    scale: Tensor
    """(batch, 1)."""


class Predicted(NamedTuple):
    """What a method says of a batch, (batch, num_target), and of all its targets together."""

    mean: Tensor
    stddev: Tensor
    joint: Tensor | None
    """(batch,): joint log density; None: the method has none."""


def curves(kernel: str, num_batches: int, seed: int = 0) -> Iterator[Curves]:
    """
    Draw batches of 16 curves by the protocol of the benchmark.

    N_c ~ U{3..46}, N_t ~ U{3..49 - N_c}, x ~ U[-2, 2], scale ~ U[0.1, 1), length ~ U[0.1, 0.6),
    noise 0.02.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape, low, high):
        drawn = torch.rand(*shape, generator=generator, dtype=torch.float64)
        return low + (high - low) * drawn

    for _ in range(num_batches):
        num_context = int(torch.randint(3, 47, (1,), generator=generator))
        num_target = int(torch.randint(3, 50 - num_context, (1,), generator=generator))
        total = num_context + num_target
        x = uniform(BATCH_SIZE, total, 1, low=-2, high=2)
        length = uniform(BATCH_SIZE, 1, low=LENGTH[0], high=LENGTH[1])
        scale = uniform(BATCH_SIZE, 1, low=SCALE[0], high=SCALE[1])
        factor = torch.linalg.cholesky(_covariance(kernel, x, length, scale))
        white = torch.randn(BATCH_SIZE, total, 1, generator=generator, dtype=torch.float64)
        y = factor @ white
        context, target = slice(num_context), slice(num_context, None)
        yield Curves(x[:, context], y[:, context], x[:, target], y[:, target], length, scale)


def _covariance(kernel, x, length, scale):
    """Return covariances of observations, (..., n, n), for (..., 1) hyperparameters."""
    distance = (x - x.mT).abs()
    value = KERNELS[kernel](distance / length.unsqueeze(-1)) * scale.square().unsqueeze(-1)
    value.diagonal(dim1=-2, dim2=-1).add_(NOISE**2)
    return value


def exact_gp(kernel: str, task: Curves) -> Predicted:
    """
    Predict by the GP that drew the curves, hyperparameters known.
    """
    _, mean, variance, joint = _solve(kernel, task, task.length, task.scale)
    return Predicted(mean, variance.sqrt(), joint)


def ceiling(kernel: str, task: Curves) -> Predicted:
    """
    Predict by the mixture over all hyperparameters that the curves may have had.

    Mean and stddev are its first two moments: the best that a normal distribution can say of each
    target. The joint is that of the mixture itself.
    """
    length = _midpoints(*LENGTH, NUM_LENGTHS)
    scale = _midpoints(*SCALE, NUM_SCALES)
    found = _solve(kernel, task, length.view(-1, 1, 1, 1), scale.view(-1, 1, 1))
    evidence, means, variances, joints = (part.flatten(0, 1) for part in found)
    weight = evidence.softmax(0).unsqueeze(-1)  # (settings, batch, 1)
    mean = (weight * means).sum(0)
    variance = (weight * (variances + (means - mean).square())).sum(0)
    joint = (evidence + joints).logsumexp(0) - evidence.logsumexp(0)
    return Predicted(mean, variance.sqrt(), joint)


def _midpoints(low, high, count):
    return low + (high - low) * (torch.arange(count, dtype=torch.float64) + 0.5) / count


def _solve(kernel, task, length, scale):
    """
    Return log evidence (..., batch), mean and variance (..., batch, num_target), joint density.
    """
    n = task.x.shape[-2]
    x = torch.cat([task.x, task.x_target], -2)
    y = torch.cat([task.y, task.y_target], -2)
    factor = torch.linalg.cholesky(_covariance(kernel, x, length, scale))
    y = y.expand(*factor.shape[:-1], 1)
    white = torch.linalg.solve_triangular(factor, y, upper=False)[..., 0]
    density = -0.5 * (log(2 * pi) + white.square()) - factor.diagonal(dim1=-2, dim2=-1).log()
    mean = (factor[..., n:, :n] @ white[..., :n].unsqueeze(-1))[..., 0]
    variance = factor[..., n:, n:].square().sum(-1)
    return density[..., :n].sum(-1), mean, variance, density[..., n:].sum(-1)


def has_joint(model: CMANP) -> bool:
    """
    Return whether a model knows how its targets depend on each other.
    """
    return model.covariance_head is not None or model.config.least_squares is not None


def by_model(model: CMANP, block_size: int | None = None) -> Callable[[str, Curves], Predicted]:
    """
    Return the method that predicts by a model; the joint, if it has one, block by block.
    """

    @torch.no_grad()
    def method(kernel: str, task: Curves) -> Predicted:
        state = model.update(model.init_state(len(task.x)), task.x, task.y)
        found, joint = model.predict(state, task.x_target), None
        if has_joint(model):
            joint = autoregressive.joint_log_prob(
                model, state, task.x_target, task.y_target, block_size
            )
        return Predicted(found.mean[..., 0], found.stddev[..., 0], joint)

    return method


@torch.no_grad()
def log_likelihood_of_samples(model: CMANP, task: Curves) -> Tensor:
    """
    Return the log-likelihood of targets in the stochastic variant, (batch, num_target).

    The mean is over the densities that samples of its global variable give.
    """
    state = model.update(model.init_state(len(task.x)), task.x, task.y)
    encoding = model.encoding(state)
    densities = []
    for sample in model.global_variable.quantile_samples(encoding.global_variable):
        found = model.decode(encoding.projected, task.x_target, None, sample)
        normal = torch.distributions.Normal(found.mean, found.stddev)
        densities.append(normal.log_prob(task.y_target)[..., 0])
    return torch.stack(densities).logsumexp(0) - log(len(densities))


def evaluate(
    methods: dict[str, Callable[[str, Curves], Predicted]],
    kernels=tuple(KERNELS),
    num_batches: int = 3000,
    seed: int = 0,
    on_batch: Callable[[int], None] = lambda number: None,
) -> Iterator[dict]:
    """
    Score methods on the same curves; yield a row for each kernel and method.

    A row has (mean, standard error) over tasks of `log_likelihood`, that of a target alone, and of
    `joint`, that of all targets of a task together over their number; and `below_ceiling`, the
    mean and error of the difference to the ceiling where that is among the methods.
    """
    done = 0
    for kernel in kernels:
        found = {name: ([], [], []) for name in methods}
        for task in curves(kernel, num_batches, seed):
            for name, method in methods.items():
                predicted = method(kernel, task)
                y = task.y_target[..., 0]
                z = (y - predicted.mean) / predicted.stddev
                density = -0.5 * (log(2 * pi) + z.square()) - predicted.stddev.log()
                inside = (z.abs() <= 1.6448536269514722).double()
                joint = predicted.joint
                joint = torch.full((len(y),), torch.nan) if joint is None else joint / y.shape[1]
                for values, value in zip(
                    found[name], (density.mean(1), joint, inside.mean(1)), strict=True
                ):
                    values.append(value.double().numpy())
            done += 1
            on_batch(done)
        scores = {name: [np.concatenate(part) for part in parts] for name, parts in found.items()}
        best = scores.get(CEILING)
        for name, (marginal, joint, inside) in scores.items():
            row = {
                'kernel': kernel,
                'method': name,
                'num_tasks': len(marginal),
                'log_likelihood': mean_and_error(marginal),
                'joint': mean_and_error(joint),
                'coverage_90': mean_and_error(inside),
            }
            if best is not None:
                row['below_ceiling'] = mean_and_error(best[0] - marginal)
                row['joint_below_ceiling'] = mean_and_error(best[1] - joint)
            yield row


def draw_samples(models: dict[str, CMANP], path, num_curves: int = 3, num_samples: int = 6):
    """
    Draw fields that models with a joint sample, each block fed back before the next.

    :param path: of a picture; a row for each model, a column for each curve.
    """
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    task = next(t for t in curves('rbf', 100, seed=5) if t.x.shape[1] in range(7, 12))
    grid = torch.linspace(-2, 2, 161, dtype=torch.float64)
    order = torch.randperm(len(grid), generator=torch.Generator().manual_seed(0))
    figure, axes = pyplot.subplots(
        len(models),
        num_curves,
        figsize=(3.6 * num_curves, 2.4 * len(models)),
        sharex=True,
        sharey='col',
        squeeze=False,
        layout='constrained',
    )
    x, y = task.x[:num_curves], task.y[:num_curves]
    targets = grid[order].view(1, -1, 1).expand(num_curves, -1, -1)
    for row, (name, model) in zip(axes, models.items(), strict=True):
        with torch.no_grad():
            state = model.update(model.init_state(num_curves), x, y)
            generator = torch.Generator().manual_seed(1)
            drawn = autoregressive.sample(model, state, targets, num_samples, generator)
            found = model.predict(state, grid.view(1, -1, 1).expand(num_curves, -1, -1))
        drawn = drawn[:, :, order.argsort(), 0]
        for curve, panel in enumerate(row):
            mean, stddev = found.mean[curve, :, 0], found.stddev[curve, :, 0]
            band = panel.fill_between(
                grid, mean - 2 * stddev, mean + 2 * stddev, color='0.88', lw=0
            )
            lines = panel.plot(grid, drawn[:, curve].T, lw=0.9, color='#3b6fb6', alpha=0.7)
            (dots,) = panel.plot(x[curve, :, 0], y[curve, :, 0], 'o', ms=4, color='black')
            panel.spines[['top', 'right']].set_visible(False)
        row[0].set_ylabel(f'{name}: y')
    for curve in range(num_curves):
        axes[0, curve].set_title(f'curve {curve + 1}', fontsize='medium')
        axes[-1, curve].set_xlabel('x')
    figure.legend(
        [dots, lines[0], band],
        ['observed', f'{num_samples} samples', 'mean ± 2 standard deviations, each x alone'],
        loc='outside lower center',
        ncols=3,
        frameon=False,
    )
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
