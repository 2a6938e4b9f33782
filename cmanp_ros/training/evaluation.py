"""Held-out scores on the field prior, beside the exact GP that knows the hyperparameters."""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from cmanp_ros.core import CMANP, metrics
from cmanp_ros.training import priors


class Scores(NamedTuple):
    """Scores of one method at one context size, (tasks,) each."""

    num_context: int
    method: str
    log_likelihood: torch.Tensor
    """[nat per target]."""
    rmse: torch.Tensor
    coverage: torch.Tensor
    """Share of targets inside the 90 % interval."""


@torch.inference_mode()
def field_scores(
    model: CMANP, num_contexts, num_tasks=200, num_target=128, seed=123, at_once=10
) -> Iterator[Scores]:
    """
    Score model, least squares alone and the GP on the same tasks, none seen in training.

    :param num_contexts: context sizes; each has its own tasks.
    :return: for each size, the scores of 'gp', 'least squares' and 'model'.
    """
    for num_context in num_contexts:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + num_context)
        found = {'gp': [], 'least squares': [], 'model': []}
        for _ in range(0, num_tasks, at_once):
            task, truth = priors.exact_tasks(
                generator, at_once, num_context, num_target, model.config.dim_x
            )
            found['gp'].append(
                _score(
                    task, *priors.gp_predict(truth, task.x_context, task.y_context, task.x_target)
                )
            )
            state = model.update(model.init_state(at_once), task.x_context, task.y_context)
            prior = model.regress(model.encoding(state), task.x_target)
            stddev = (prior.variance + prior.noise_variance).sqrt()
            found['least squares'].append(_score(task, prior.mean, stddev))
            p = model.predict(state, task.x_target)
            found['model'].append(_score(task, p.mean, p.stddev))
        for method, parts in found.items():
            yield Scores(
                num_context, method, *(torch.cat(part) for part in zip(*parts, strict=True))
            )


def _score(task, mean, stddev):
    y = task.y_target
    return (
        metrics.log_likelihood(mean, stddev, y),
        metrics.rmse(mean, y),
        metrics.coverage(mean, stddev, y, 0.9),
    )
