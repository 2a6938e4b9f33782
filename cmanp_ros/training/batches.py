"""
Training batches, made once and kept on disk: the regression is solved when a batch is made.

Batch i is a function of (seed, i) alone, so an interrupted run goes on to the same result.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset

from cmanp_ros.core import least_squares
from cmanp_ros.core.model import Prior
from cmanp_ros.training import priors
from cmanp_ros.training.priors import Task


class Batch(NamedTuple):
    """
    Tasks and what least squares says at their targets; float32.
    """

    task: Task
    prior: Prior


class Batches(Dataset):
    """
    `num_batches` batches of one context size each, log-uniform up to `max_context`.
    """

    def __init__(self, config, folder, num_batches, batch_size, max_context, num_target, seed):
        self.config, self.folder, self.num_batches = config, Path(folder), num_batches
        self.batch_size, self.max_context = batch_size, max_context
        self.num_target, self.seed = num_target, seed

    def __len__(self):
        return self.num_batches

    def __getitem__(self, index) -> dict[str, Tensor]:
        path = self.folder / f'{index:06d}.safetensors'
        if not path.is_file():
            torch.set_num_threads(1)  # in a loader's process
            tensors = {
                f'{part}.{name}': value.float().contiguous()
                for part, values in self.make(index)._asdict().items()
                for name, value in values._asdict().items()
            }
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix('.partial')
            save_file(tensors, partial)
            partial.replace(path)
        return load_file(path)

    def make(self, index) -> Batch:
        """
        Draw batch `index` and solve its regressions.
        """
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        size = torch.rand(1, generator=generator).item()
        num_context = int((self.max_context + 1) ** size) if size > 0.04 else 0
        task = priors.training_tasks(
            generator, self.batch_size, num_context, self.num_target, self.config.dim_x
        )
        rows = zip(*(value.split(1) for value in task), strict=True)
        parts = [solve(self.config, Task(*row)) for row in rows]
        return Batch(task, Prior(*(torch.cat(values) for values in zip(*parts, strict=True))))


@torch.no_grad()
def solve(config, task: Task) -> Prior:
    """
    Return what least squares alone says at the targets of tasks.
    """
    options = config.least_squares
    sums = least_squares.sums(options, task.x_context, task.y_context)
    variances = least_squares.prior_variances(options, config.dim_x)
    regression = least_squares.solve(options, variances, sums)
    mean, variance = least_squares.predict(options, regression, task.x_target)
    noise = regression.noise_variance.unsqueeze(1)
    return Prior(mean, variance, noise, regression.summary.unsqueeze(1))


def unpack(tensors: dict[str, Tensor]) -> Batch:
    """
    Return the batch that a file holds.
    """
    return Batch(
        Task(*(tensors[f'task.{name}'] for name in Task._fields)),
        Prior(*(tensors[f'prior.{name}'] for name in Prior._fields)),
    )


def augment(batch: Batch, generator) -> Batch:
    """
    Mirror and swap the axes and flip the values, per task: the regression does the same.
    """
    task, prior = batch
    size, _, dim_x = task.x_target.shape
    sign = torch.randint(0, 2, (size, 1, dim_x), generator=generator) * 2.0 - 1
    order = torch.rand(size, dim_x, generator=generator).argsort(-1)
    flip = torch.randint(0, 2, (size, 1, 1), generator=generator) * 2.0 - 1

    def move(x):
        return x.gather(-1, order.unsqueeze(1).expand_as(x)) * sign

    task = Task(
        move(task.x_context), task.y_context * flip, move(task.x_target), task.y_target * flip
    )
    return Batch(task, prior._replace(mean=prior.mean * flip))
