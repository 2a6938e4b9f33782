"""
A ConvCNP (Gordon et al. 2020) of the library `neuralprocesses`, trained here on synthetic fields.

Training takes minutes of one core and is kept in a file, from which it also goes on after an
interruption. That is far less than such a network is worth: what it says here is what a user gets
from it in that time, not the best that it can do.
"""

import os
import time
from collections.abc import Callable
from math import cos, exp, log, pi
from pathlib import Path
from typing import NamedTuple

import torch

from cmanp_ros.optional import library
from cmanp_ros.training.processes import MapPrior

STEPS = 400
BATCH_SIZE = 4
LEARNING_RATE = 2e-3
SAVED_EVERY = 20
SEED = 10_000  # the studies count from 0
NUM_CONTEXT = (16, 1024)  # log-uniform
POINTS_PER_UNIT = 16  # as fine as the cells of a window
CHANNELS = (32,) * 4
PRIOR = {
    'kernels': ('rbf', 'matern32', 'matern52', 'fractal'),
    'designs': ('uniform', 'trajectory'),
    'length': (0.25, 2.0),
    'scale': (0.3, 1.0),
    'noise': (0.003, 0.2),
    'log_uniform': ('length', 'noise'),
    'num_target': 300,
}


class Trained(NamedTuple):
    """A network, and what went into it."""

    model: torch.nn.Module
    steps: int
    seconds: float
    """Of processor time."""
    num_parameters: int

    def __call__(self, x, y, x_target):
        """
        Return mean and stddev (n,), noise included, for x (m, 2), y (m,), x_target (n, 2).
        """
        x, y, x_target = (torch.as_tensor(v, dtype=torch.float32) for v in (x, y, x_target))
        with torch.no_grad():
            found = self.model(x.mT[None], y[None, None], x_target.mT[None])
        mean, variance = (v[0, 0].double().numpy() for v in (found.mean, found.var))
        return mean, variance**0.5


def trained(
    folder, steps: int = STEPS, on_step: Callable[[int], None] = lambda step: None
) -> Trained:
    """
    Load the network from a folder, and train it there first as far as it is not.

    :param on_step: called with the number of steps done.
    :raises CMANPError: where `neuralprocesses` is not installed.
    """
    path = Path(folder) / f'convcnp_{steps}.pt'
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        model = _network()
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    step, seconds = 0, 0.0
    if path.is_file():
        found = torch.load(path, weights_only=True)
        model.load_state_dict(found['model'])
        optimizer.load_state_dict(found['optimizer'])
        step, seconds = found['step'], found['seconds']
    loglik = library('neuralprocesses.torch', 'the ConvCNP').loglik
    while step < steps:
        start = time.process_time()
        tasks = _tasks(step)
        for group in optimizer.param_groups:
            group['lr'] = LEARNING_RATE * 0.5 * (1 + cos(pi * step / steps))
        loss = -loglik(model, *tasks, normalise=True).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        seconds += time.process_time() - start
        if step % SAVED_EVERY == 0 or step == steps:
            _save(path, model, optimizer, step, seconds)
        on_step(step)
    num_parameters = sum(p.numel() for p in model.parameters())
    return Trained(model.eval(), step, seconds, num_parameters)


def _network():
    networks = library('neuralprocesses.torch', 'the ConvCNP')
    return networks.construct_convgnp(
        dim_x=2,
        dim_y=1,
        likelihood='het',
        points_per_unit=POINTS_PER_UNIT,
        unet_channels=CHANNELS,
        unet_resize_convs=True,
        unet_resize_conv_interp_method='bilinear',
    )


def _tasks(step):
    """Return x, y, x_target, y_target of one batch, (batch, 2 or 1, n)."""
    generator = torch.Generator().manual_seed(SEED * 1_000_003 + step)
    low, high = map(log, NUM_CONTEXT)
    num = round(exp(low + (high - low) * float(torch.rand(1, generator=generator))))
    tasks = MapPrior(num_context=(num, num), **PRIOR).draw(generator, BATCH_SIZE, 2)
    return [v.mT.float() for v in (tasks.x, tasks.y, tasks.x_target, tasks.y_target)]


def _save(path, model, optimizer, step, seconds):
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f'.{os.getpid()}.partial')
    state = {'model': model.state_dict(), 'optimizer': optimizer.state_dict()}
    torch.save(state | {'step': step, 'seconds': seconds}, partial)
    partial.replace(path)
