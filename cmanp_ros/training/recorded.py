"""
Worlds cut from recorded observations, of which some predict the others; and what they gained.

A recording is cut in time into blocks: held-out tasks see every fifth of them, and nothing else.
"""

import copy
import hashlib
import json
from math import isfinite, log, log10
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cmanp_ros.checkpoint import load_model
from cmanp_ros.core import CMANP
from cmanp_ros.core.errors import ConfigError, InputError
from cmanp_ros.training.batches import WorldBatches
from cmanp_ros.training.loop import NUM_HELD_OUT, has_begun
from cmanp_ros.training.objectives import soften
from cmanp_ros.training.priors import WorldTask
from cmanp_ros.training.recipe import Recipe

MAX_POINTS = 1_000_000  # to keep of a recording; every other one is dropped beyond
EVERY = 5  # blocks, of which one is held out
MAX_BLOCKS = 50
TARGETS_PER_BLOCK = 2, 10  # at least, and wanted before there are more blocks than `EVERY`
SIDE = 2.5, 14.0  # [tiles] of windows
FARTHEST = 1000.0  # [tiles] from the origin: the lattice lies anywhere on the recording
NORMAL_90 = 3.29  # standard deviations from the 5th to the 95th percentile


class RecordedWorlds:
    """
    Tasks from one recording, for `loop.train(draw=...)`; can be pickled.

    :ivar pieces: (start, stop) of the observations that they are cut from, in their order.
    """

    def __init__(self, x, y, tile_size: float, value_offset=0.0, value_scale=1.0, num_target=48):
        """
        Cut a recording into what is trained on and what is held out.

        :param x: (n, dim_x) [m], in the order in which they were observed.
        :param y: (n,) [field units].
        :param tile_size: [m] of the map that the model is for.
        :param value_offset: [field units]; with `value_scale`, of that map.
        :param num_target: of a task.
        :raises InputError: for too few observations.
        :raises ConfigError: for a tile size that is no positive length.
        """
        if not (isfinite(tile_size) and tile_size > 0):
            raise ConfigError(f'tile_size is {tile_size}, expected a positive length [m]')
        self.x = torch.as_tensor(x, dtype=torch.float64) / tile_size
        values = torch.as_tensor(y, dtype=torch.float64).reshape(-1, 1)
        self.y = (values - value_offset) / value_scale
        self.pieces, self._held_out = pieces(len(x), num_target)

    @property
    def held_out(self) -> 'RecordedWorlds':
        """Tasks from the blocks that are not trained on."""
        other = copy.copy(self)
        other.pieces = self._held_out
        return other

    def __call__(self, generator, max_context=1200, num_target=48, dim_x=2) -> WorldTask:
        """
        Cut out one task: see `priors.world_task` for its units.

        Half of them are stretches of the track, all or every so many observations, with what
        comes next as targets; the others windows of the map, of which some are half-seen.
        """
        size = _uniform(generator)
        num_context = int((max_context + 1) ** size) if size > 0.04 else 0
        cut = self._stretch if _uniform(generator) < 0.5 else self._window
        context, target = cut(generator, num_context, num_target)
        place = FARTHEST * torch.rand(dim_x, dtype=torch.float64, generator=generator)
        place = place - self.x[target].mean(0)
        return WorldTask(
            self.x[context] + place, self.y[context], self.x[target] + place, self.y[target]
        )

    def _stretch(self, generator, num_context, num_target):
        """Return which observations are context and targets: those after it."""
        lengths = torch.tensor([stop - start for start, stop in self.pieces], dtype=torch.float64)
        start, stop = self.pieces[torch.multinomial(lengths, 1, generator=generator)]
        num_context = min(num_context, stop - start - num_target)
        every = 1
        if _uniform(generator) < 0.5:  # a faster robot, a slower sensor
            sparsest = (stop - start) // (num_context + num_target)
            every = int(sparsest ** _uniform(generator))
        number = torch.arange(start, stop, every)
        stride = (len(number) - num_context) // num_target
        stride = min(2 ** int(_uniform(generator, 0, 3)), stride)
        ahead = stride * num_target
        first = _integer(generator, len(number) - ahead - num_context + 1)
        number = number[first:]
        return number[:num_context], number[num_context::stride][:num_target]

    def _window(self, generator, num_context, num_target):
        """Return which observations around one of them are context and targets, at random."""
        number = torch.cat([torch.arange(*piece) for piece in self.pieces])
        center = self.x[number[_integer(generator, len(number))]]
        distance = (self.x[number] - center).abs().amax(1)
        least, most = map(log, SIDE)
        side = torch.tensor(_uniform(generator, least, most)).exp()
        is_within = distance < side / 2
        if is_within.sum() < 2 * num_target:  # few are there: the nearest
            within = number[distance.argsort(stable=True)[: 2 * num_target]]
        else:
            within = number[is_within]
        within = within[torch.randperm(len(within), generator=generator)]
        target, rest = within[:num_target], within[num_target:]
        if _uniform(generator) < 0.4:  # half of it was never seen
            direction = torch.randn(len(center), dtype=torch.float64, generator=generator)
            rest = rest[(self.x[rest] - center) @ direction < 0]
        return rest[:num_context], target


def pieces(n: int, num_target: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """
    Cut n observations into blocks of time: those to train on, neighbors together, and the others.

    :return: (start, stop) of each.
    :raises InputError: for too few.
    """
    each = EVERY * TARGETS_PER_BLOCK[0]
    if n < each * num_target:
        raise InputError(
            f'{n} usable observations: expected at least {each * num_target} ({each} for each of '
            f'the num_target = {num_target} of a task); record more of them, or set a smaller '
            'num_target in the prior of the recipe'
        )
    wanted = n // (EVERY * TARGETS_PER_BLOCK[1] * num_target)
    num_blocks = EVERY * min(max(wanted, 1), MAX_BLOCKS // EVERY)
    edges = [n * block // num_blocks for block in range(num_blocks + 1)]
    held_out = [(edges[b], edges[b + 1]) for b in range(EVERY // 2, num_blocks, EVERY)]
    starts, stops = [0, *(stop for _, stop in held_out)], [*(start for start, _ in held_out), n]
    return list(zip(starts, stops, strict=True)), held_out


def read(recording) -> tuple[np.ndarray, np.ndarray, int]:
    """
    Read all observations of a recording; what is not finite it leaves out and counts.

    :return: x (n, dim_x) [m], y (n, dim_y) [field units], and of how many one was kept.
    :raises InputError: for a file that ends before its end.
    """
    x, y, every, num_kept, num_seen = [], [], 1, 0, 0
    for points in recording.points():
        kept = slice(-num_seen % every, None, every)
        num_seen += len(points.x)
        x.append(np.array(points.x[kept], np.float64))
        y.append(np.array(points.y[kept], np.float64))
        num_kept += len(x[-1])
        if num_kept > 2 * MAX_POINTS:
            x, y = [np.concatenate(x)[::2]], [np.concatenate(y)[::2]]
            every, num_kept = 2 * every, len(x[0])
    if not num_kept:
        raise InputError('no usable observation is in the recording; expected some: see --source')
    return np.concatenate(x), np.concatenate(y), every


def units(y) -> tuple[float, float]:
    """
    Return a typical value and a typical deviation from it [field units], to few digits.

    The deviation is that of a normal distribution with the same 5th and 95th percentiles.

    :param y: (n,).
    :raises InputError: for values that are all the same.
    """
    if not np.ptp(y) > 0:
        raise InputError(
            f'all {len(y)} values are {y[0]:g}: expected a field that varies; if this is not the '
            'value that was meant, choose it with --source'
        )
    low, middle, high = np.quantile(y, (0.05, 0.5, 0.95))
    scale = float(f'{(high - low) / NORMAL_90 or np.std(y):.3g}')
    return round(float(middle), 1 - int(np.floor(log10(scale)))), scale


def fingerprint(x, y) -> str:
    """Return a hash of observations."""
    digest = hashlib.sha256()
    for part in (x, y):
        digest.update(np.ascontiguousarray(part, np.float64).tobytes())
    return digest.hexdigest()


def known(folder) -> dict | None:
    """Return what `keep` wrote into the folder of a training; None: nothing."""
    path = Path(folder) / 'data.json'
    return json.loads(path.read_text(encoding='utf-8')) if path.is_file() else None


def keep(folder, facts: dict | None):
    """
    Write what is trained on into the folder, or check that it is what was trained on there.

    :param facts: plain values; None: synthetic worlds.
    :raises ConfigError: saying what differs.
    """
    folder = Path(folder)
    if not has_begun(folder):
        if facts is None:
            (folder / 'data.json').unlink(missing_ok=True)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / 'data.json').write_text(json.dumps(facts, indent=1), encoding='utf-8')
        return
    found = known(folder)
    if found == facts:
        return
    if found is None or facts is None:
        what, other = ('recorded data', 'synthetic worlds')[:: -1 if found is None else 1]
        raise ConfigError(
            f'{folder} holds a training on {what}, not on {other}: use another folder'
        )
    differing = [
        f'{name} is {value!r}, was {found.get(name)!r}'
        for name, value in facts.items()
        if value != found.get(name)
    ]
    raise ConfigError(
        f'{folder} holds a training on other data: {"; ".join(differing)}. Use another folder, or '
        'the data and units of that one'
    )


class Gain(NamedTuple):
    """Log-likelihood per held-out target [nat], before and after training."""

    before: float
    after: float
    difference: float
    stderr: float
    """Of the difference: over tasks, which overlap."""
    num_tasks: int


@torch.no_grad()
def gain(recipe: Recipe, folder, worlds: RecordedWorlds) -> Gain:
    """
    Compare the model file of a folder with what its training started from, on held-out tasks.

    As `held_out_loss` in its log: what lies below -10 counts less.
    """
    torch.manual_seed(recipe.seed)
    start = (
        CMANP(recipe.model).eval() if recipe.start_from is None else load_model(recipe.start_from)
    )
    models = start, load_model(Path(folder) / 'model.safetensors')
    held_out = WorldBatches(recipe, Path(folder) / 'held_out', True, worlds.held_out)
    found = torch.cat(
        [
            torch.stack([_by_task(held_out, model, held_out[index]) for model in models])
            for index in range(min(NUM_HELD_OUT, len(held_out)))
        ],
        1,
    )  # (2, tasks)
    difference, num_tasks = found[1] - found[0], found.shape[1]
    stderr = difference.std().item() / num_tasks**0.5
    return Gain(*found.mean(1).tolist(), difference.mean().item(), stderr, num_tasks)


def _by_task(held_out, model, tensors) -> Tensor:
    found = soften(held_out.log_likelihood(model, tensors, None))
    return found.reshape(-1, held_out.recipe.prior.num_target).mean(1)


def _uniform(generator, low=0.0, high=1.0):
    return low + (high - low) * torch.rand(1, dtype=torch.float64, generator=generator).item()


def _integer(generator, stop):
    return torch.randint(stop, (1,), generator=generator).item()
