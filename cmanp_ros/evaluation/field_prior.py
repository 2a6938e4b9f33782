"""
Fields of a Gaussian process whose hyperparameters are drawn, and fields beyond that prior.

The prior: RBF and Matern-5/2 half and half, length log-uniform in [0.25, 1.5], scale uniform in
[0.3, 1), noise log-uniform in [0.02, 0.2], on [-2, 2]^2; half of the tasks are observed anywhere,
half along a winding path. Beside the methods stands the exact GP that is told the kernel of each
task, and the Bayes ceiling, which no normal prediction that has to infer it can exceed on average.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import inf
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import torch

from cmanp_ros.checkpoint import load_model
from cmanp_ros.core import (
    CMANP,
    CMANPConfig,
    Lattice,
    LeastSquaresConfig,
    Normalization,
    OneTile,
)
from cmanp_ros.core.errors import ConfigError
from cmanp_ros.evaluation.kernels import Kernel, correlation, distances
from cmanp_ros.evaluation.ours import WINDOW
from cmanp_ros.evaluation.scores import mean_and_error, score
from cmanp_ros.evaluation.studies import one_task
from cmanp_ros.evaluation.tasks import Task
from cmanp_ros.field import NeuralField
from cmanp_ros.training.processes import MapPrior

LENGTH, SCALE, NOISE = (0.25, 1.5), (0.3, 1.0), (0.02, 0.2)
SMOOTHNESSES = {'rbf': inf, 'matern52': 2.5}
DESIGNS = ('uniform', 'trajectory')
NUM_TARGETS = 300
KNOWN = 'exact GP, kernel known'
CEILING = 'Bayes ceiling'
CEILING_CONTEXT = 256  # most observations for which it is computed: it takes a minute beyond
INTERVALS = (0.5, 0.9, 0.95)


@dataclass(frozen=True)
class Kind:
    """How tasks depart from the prior; the defaults do not."""

    length: tuple[float, float] = LENGTH
    heavy_tails: float = 0.0
    """Share of tasks in which 5 % of the readings have 8 times the noise."""
    step_edge: float = 0.0
    """Share of tasks with a step along a line, of a normal size of the field's scale each way."""


KINDS = {
    'prior': Kind(),
    'heavy tails': Kind(heavy_tails=1.0),
    'short lengths': Kind(length=(0.08, 0.2)),
    'long lengths': Kind(length=(2.0, 5.0)),
    'step edge': Kind(step_edge=1.0),
}


class Drawn(NamedTuple):
    """A task, and the kernel of its field; of its faults the kernel does not know."""

    task: Task
    kernel: Kernel


def tasks(
    kind: str, num: int, num_context: int, seed: int, num_target: int = NUM_TARGETS
) -> Iterator[Drawn]:
    """
    Draw tasks; four in a row have each kernel with each design.

    :param kind: one of `KINDS`. Task number i has the same locations in all of them.
    :raises ConfigError: for another kind.
    """
    if kind not in KINDS:
        raise ConfigError(f'kind {kind!r}: expected one of {", ".join(KINDS)}')
    for index in range(num):
        rng = np.random.default_rng([seed, num_context, index])
        name = tuple(SMOOTHNESSES)[index % 2]
        length, noise = (
            float(np.exp(rng.uniform(*np.log(span)))) for span in (KINDS[kind].length, NOISE)
        )
        kernel = Kernel(SMOOTHNESSES[name], length, float(rng.uniform(*SCALE)), noise)
        drawn = MapPrior(
            kernels=(name,),
            designs=(DESIGNS[index // 2 % 2],),
            length=(length, length),
            scale=(kernel.scale, kernel.scale),
            noise=(noise, noise),
            num_context=(num_context, num_context),
            num_target=num_target,
            heavy_tails=KINDS[kind].heavy_tails,
            step_edge=KINDS[kind].step_edge,
        ).draw(torch.Generator().manual_seed(int(rng.integers(2**62))), 1, dim_x=2)
        x, y, x_target, y_target = (part[0].numpy() for part in drawn[:4])
        yield Drawn(Task(x, y[:, 0], x_target, y_target[:, 0]), kernel)


# Methods: function (x, y, x_target) -> mean, stddev ----------------------------------------------


def exact_gp(kernel: Kernel) -> Callable:
    """
    Return the method that knows the kernel: no other can be better on the prior.
    """

    def predict(x, y, x_target):
        covariance = kernel(distances(x, x)) + kernel.noise**2 * np.eye(len(x))
        factor = np.linalg.cholesky(covariance)
        half = np.linalg.solve(factor, kernel(distances(x, x_target)))
        mean = half.T @ np.linalg.solve(factor, y)
        variance = kernel.scale**2 + kernel.noise**2 - np.square(half).sum(0)
        return mean, np.sqrt(np.maximum(variance, kernel.noise**2))

    return predict


def ceiling(x, y, x_target, num_lengths: int = 12, num_scales: int = 6, num_noises: int = 8):
    """
    Predict by the mixture over all kernels of the prior: its mean and its standard deviation.

    Numbers are points of the quadrature. Each length costs one eigendecomposition.
    """
    lengths = np.exp(_midpoints(*np.log(LENGTH), num_lengths))
    scales, noises = _midpoints(*SCALE, num_scales), np.exp(_midpoints(*np.log(NOISE), num_noises))
    scale2, noise2 = (
        np.square(part).ravel() for part in np.meshgrid(scales, noises, indexing='ij')
    )  # (settings,)
    within, across = distances(x, x), distances(x_target, x)
    evidences, means, variances = [], [], []
    for nu in SMOOTHNESSES.values():
        for length in lengths:
            value, vector = np.linalg.eigh(correlation(nu, within / length))
            value, rotated = np.maximum(value, 0), vector.T @ y
            spectrum = scale2 * value[:, None] + noise2  # (n, settings)
            explained = np.square(rotated)[:, None] / spectrum
            evidences.append(-0.5 * (explained + np.log(spectrum)).sum(0))
            cross = correlation(nu, across / length) @ vector  # (m, n)
            means.append(cross @ (scale2 * rotated[:, None] / spectrum))
            variances.append(scale2 + noise2 - np.square(cross) @ (scale2**2 / spectrum))
    evidence = np.concatenate(evidences)
    weight = np.exp(evidence - evidence.max())
    weight /= weight.sum()
    means, variances = np.concatenate(means, 1), np.concatenate(variances, 1)
    mean = means @ weight
    return mean, np.sqrt((variances + np.square(means - mean[:, None])) @ weight)


def _midpoints(low, high, count):
    return low + (high - low) * (np.arange(count) + 0.5) / count


def one_tile(options: LeastSquaresConfig) -> Callable:
    """
    Return the method that is one tile with nothing but its least-squares memory.
    """
    model = CMANP(CMANPConfig.field(2, 1, num_levels=1, least_squares=options))
    model = model.eval().requires_grad_(False)  # no training: its corrections are zero

    def predict(x, y, x_target):
        x, y, x_target = (torch.from_numpy(part).unsqueeze(0) for part in (x, y, x_target))
        state = model.update(model.init_state(1), x, y.unsqueeze(-1))
        found = model.predict(state, x_target)
        return found.mean[0, :, 0].numpy(), found.stddev[0, :, 0].numpy()

    return predict


ONE_TILE = LeastSquaresConfig(
    functions_per_axis=16,
    box_half_width=2.2,
    smoothnesses=(2.5, inf),
    lengths=(0.24, 0.3, 0.38, 0.48, 0.6, 0.76, 0.96, 1.2, 1.5),
    noise_ratios=(0.02, 0.03, 0.045, 0.067, 0.1, 0.15, 0.225, 0.34, 0.5, 0.7),
    amplitude_shape=2.5,
    amplitude_scale=0.65,
    offset_variance=0.0,
    slope_variance=0.0,
    voxels_per_axis=24,
    points_per_voxel=1e9,
    num_averaged=60,
    averaged_weight=1.0,
)
"""What the prior says, as far as 16 functions per axis can: chosen on draws of other seeds."""


def methods(checkpoint='field', tile_size: float = 0.75) -> dict[str, Callable]:
    """
    Return what is scored: the ceiling, one tile made for this prior, and a model as it is.

    :param checkpoint: file or name of a model, as one tile and as tiles.
    :param tile_size: of the finest tiles; the map spans 4.
    """
    model = load_model(checkpoint)

    def mapped(geometry):
        return one_task(lambda: NeuralField(model, geometry, Normalization()))

    return {
        CEILING: ceiling,
        'one tile, least squares': one_tile(ONE_TILE),
        f'{checkpoint}, one tile': mapped(OneTile(*WINDOW)),
        f'{checkpoint}, tiles': mapped(Lattice.of(model.config, tile_size)),
    }


# The study ---------------------------------------------------------------------------------------


def evaluate(
    methods: Mapping[str, Callable],
    num_tasks: int = 48,
    num_contexts: Iterable[int] = (32, 128, 256, 1024),
    kinds: Iterable[str] = tuple(KINDS),
    seed: int = 123,
    on_task: Callable[[int], None] = lambda number: None,
) -> Iterator[dict]:
    """
    Score methods, and the exact GP that knows the kernel, on the same tasks.

    :param methods: name -> function (x, y, x_target) -> mean, stddev; the ceiling is left out
        where observations are many.
    :return: a row for each kind, number of observations and method: (mean, standard error) over
        tasks of `rmse`, `log_likelihood`, `gap` (the exact GP's log-likelihood less that),
        `coverage_50`, `coverage_90`, `coverage_95` and `seconds` of processor time.
    """
    done = 0
    for kind in kinds:
        for num_context in num_contexts:
            used = dict(methods)
            if num_context > CEILING_CONTEXT:
                used.pop(CEILING, None)
            found = {name: [] for name in (KNOWN, *used)}
            for task, kernel in tasks(kind, num_tasks, num_context, seed):
                for name, predict in {KNOWN: exact_gp(kernel), **used}.items():
                    start = time.process_time()
                    mean, stddev = predict(task.x, task.y, task.x_target)
                    seconds = time.process_time() - start
                    found[name].append((*_scores(mean, stddev, task.y_target), seconds))
                done += 1
                on_task(done)
            columns = {name: np.array(rows).T for name, rows in found.items()}
            for name, (rmse, likelihood, *inside, seconds) in columns.items():
                yield {
                    'study': 'prior',
                    'kind': kind,
                    'num_context': num_context,
                    'num_tasks': num_tasks,
                    'method': name,
                    'rmse': mean_and_error(rmse),
                    'log_likelihood': mean_and_error(likelihood),
                    'gap': mean_and_error(columns[KNOWN][1] - likelihood),
                    **{
                        f'coverage_{100 * level:.0f}': mean_and_error(shares)
                        for level, shares in zip(INTERVALS, inside, strict=True)
                    },
                    'seconds': mean_and_error(seconds),
                }


def _scores(mean, stddev, y):
    """Return RMSE, mean log density, and the share inside each central interval."""
    found = score(mean, stddev, y)
    z = np.abs(y - np.ravel(mean)) / np.ravel(stddev)
    inside = [np.mean(z <= NormalDist().inv_cdf((1 + level) / 2)) for level in INTERVALS]
    return found.rmse, found.log_likelihood, *inside
