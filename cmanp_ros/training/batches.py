"""
Training batches: maps of one tile, drawn for every step, and worlds of many, kept on disk.

Batch i is a function of (seed, i) alone, so an interrupted run goes on to the same result.
"""

import dataclasses
import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset

from cmanp_ros.core import CMANP, CMANPConfig
from cmanp_ros.core.lattice import Lattice
from cmanp_ros.core.tiles import keys_of
from cmanp_ros.core.world import World
from cmanp_ros.training import objectives, priors
from cmanp_ros.training.objectives import Batch
from cmanp_ros.training.processes import Tasks
from cmanp_ros.training.recipe import Recipe

FEW_LEVELS = 0.15  # share of worlds with the finest level only: a single tile must predict, too


class MapBatches(Dataset):
    """
    Maps of one tile, drawn anew for every step.
    """

    def __init__(self, recipe: Recipe, is_held_out: bool = False):
        self.recipe = recipe
        self.seed = _seed(recipe, is_held_out)

    def __len__(self):
        return self.recipe.steps

    def __getitem__(self, index) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        config, size = self.recipe.model, self.recipe.batch_size
        return self.recipe.prior.draw(generator, size, config.dim_x, config.dim_y)._asdict()

    def order(self) -> list[int]:
        """
        Return the batch of every step.
        """
        return list(range(self.recipe.steps))

    def log_likelihood(self, model, tensors, generator, part=(0, 1)) -> Tensor:
        """
        Return the objective for each target of one part (number, of how many) of the tasks.
        """
        own = {name: value[part[0] :: part[1]] for name, value in tensors.items()}
        tasks = Tasks(**{name: value.to(_device(model)) for name, value in own.items()})
        return objectives.OBJECTIVES[self.recipe.objective](model, tasks, generator)


class WorldBatches(Dataset):
    """
    Batches of a few worlds each, in a folder: regressions are solved when a batch is made.
    """

    def __init__(self, recipe: Recipe, folder, is_held_out: bool = False, draw=priors.world_task):
        """
        Name the folder; nothing is drawn yet.

        :param draw: of one task, given a generator and what `priors.world_task` takes.
        """
        self.recipe, self.folder, self.draw = recipe, Path(folder), draw
        self.seed, self.is_held_out = _seed(recipe, is_held_out), is_held_out

    def __len__(self):
        return self.recipe.prior.num_batches

    def __getitem__(self, index) -> dict[str, Tensor]:
        path = self.folder / f'{index:06d}.safetensors'
        if not path.is_file():
            threads = torch.get_num_threads()
            torch.set_num_threads(1)  # to the same bits, however many train
            tensors = {
                name: part.contiguous() for name, part in self.make(index)._asdict().items()
            }
            torch.set_num_threads(threads)
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f'.{os.getpid()}.partial')
            save_file(tensors, partial)
            partial.replace(path)
        return load_file(path)

    def order(self) -> list[int]:
        """
        Return the batch of every step: all of them shuffled, again and again.
        """
        steps, num_batches = self.recipe.steps, len(self)
        order = []
        for epoch in range(-(-steps // num_batches)):
            generator = torch.Generator().manual_seed(self.recipe.seed + epoch)
            order += torch.randperm(num_batches, generator=generator).tolist()
        return order[:steps]

    def log_likelihood(self, model, tensors, generator, part=(0, 1)) -> Tensor:
        """
        Return the log-likelihood of each target of one part (number, of how many) of the worlds.
        """
        batch = Batch(**tensors)
        if not self.is_held_out:
            batch = augment(batch, generator)
        if part[1] > 1:
            batch = some_worlds(batch, self.recipe.prior.num_target, *part)
        batch = Batch(*(value.to(_device(model)) for value in batch))
        return objectives.world_log_likelihood(model, batch)

    @torch.no_grad()
    def make(self, index) -> Batch:
        """
        Draw the worlds of batch `index` and solve their regressions.
        """
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        config, prior = self.recipe.model, self.recipe.prior
        if config.least_squares is None:  # not to be read, but the tiles are the same
            options = CMANPConfig.field(config.dim_x, config.dim_y).least_squares
            config = dataclasses.replace(config, least_squares=options)
        model = CMANP(config)  # its weights do not matter here
        parts, tiles, targets = [], 0, 0
        for _ in range(self.recipe.batch_size):
            task = self.draw(generator, prior.max_context, prior.num_target, config.dim_x)
            few = torch.rand(1, generator=generator) < FEW_LEVELS
            levels = 1 if few else config.num_levels
            part = world_batch(model, task, levels)
            part = part._replace(
                point_tile=part.point_tile + tiles,
                pair_tile=part.pair_tile + tiles,
                pair_target=part.pair_target + targets,
            )
            tiles = int(part.pair_tile.max()) + 1 if len(part.pair_tile) else tiles
            targets += prior.num_target
            parts.append(part)
        joined = (torch.cat(values) for values in zip(*parts, strict=True))
        return Batch(*(v.float() if v.is_floating_point() else v for v in joined))


def _device(model):
    return next(model.parameters()).device


def _seed(recipe, is_held_out):
    return -1 - recipe.seed if is_held_out else recipe.seed


def some_worlds(batch: Batch, num_target: int, first: int, every: int) -> Batch:
    """
    Return world `first`, the one `every` after it, and so on; each has `num_target` targets.
    """
    target = torch.arange(len(batch.y_target))
    is_kept = (target // num_target) % every == first
    pairs = is_kept[batch.pair_target]
    number = is_kept.cumsum(0) - 1
    asked, pair_tile = batch.pair_tile[pairs].unique(return_inverse=True)
    tile = torch.full((int(batch.pair_tile.max()) + 1 if len(pairs) else 0,), -1)
    tile[asked] = torch.arange(len(asked))
    point_tile = tile[batch.point_tile]
    points = point_tile >= 0
    kept = {name: getattr(batch, name)[pairs] for name in PAIRS}
    return batch._replace(
        **kept
        | {
            'pair_tile': pair_tile,
            'pair_target': number[batch.pair_target[pairs]],
            'point_tile': point_tile[points],
            'point_x': batch.point_x[points],
            'point_y': batch.point_y[points],
            'y_target': batch.y_target[is_kept],
        }
    )


PAIRS = (
    'pair_x',
    'pair_window',
    'pair_level',
    'mean',
    'variance',
    'noise_variance',
    'summary',
    'context',
)


def world_batch(model, task, num_levels) -> Batch:
    """
    Fold a task into a world and return the tiles that its targets need.
    """
    geometry = dataclasses.replace(Lattice.of(model.config, 1.0), num_levels=num_levels)
    world = World(model, geometry)
    world.fold(task.x_context, task.y_context)
    pairs = world.pairs(task.x_target)
    names = keys_of(pairs.cover.key)
    tile_of = {key: i for i, key in enumerate(dict.fromkeys(names))}
    points = geometry.cover(task.x_context)
    tile = torch.tensor([tile_of.get(key, -1) for key in keys_of(points.key)], dtype=torch.int64)
    there = tile >= 0
    return Batch(
        point_tile=tile[there],
        point_x=points.x[there],
        point_y=task.y_context[points.index[there]],
        pair_tile=torch.tensor([tile_of[key] for key in names]).long(),
        pair_target=pairs.cover.index,
        pair_x=pairs.cover.x,
        pair_window=pairs.cover.window,
        pair_level=pairs.cover.key[:, 0] + model.config.num_levels - num_levels,
        y_target=task.y_target,
        **pairs.prior._asdict(),
    )


def augment(batch: Batch, generator) -> Batch:
    """
    Mirror and swap the axes; flip, shift and scale the values: the regressions do the same.
    """
    dim_x = batch.pair_x.shape[1]
    sign = torch.randint(0, 2, (dim_x,), generator=generator) * 2.0 - 1
    order = torch.randperm(dim_x, generator=generator)
    flip = torch.randint(0, 2, (1,), generator=generator) * 2.0 - 1
    scale = flip * 2 ** (2 * torch.rand(1, generator=generator) - 1)
    shift = torch.randn(1, generator=generator) * torch.randint(0, 2, (1,), generator=generator)

    distance = torch.ones(batch.context.shape[-1])
    distance[2::3] = flip  # of the means: the odd features of `blending.compare`
    return batch._replace(
        point_x=batch.point_x[:, order] * sign,
        pair_x=batch.pair_x[:, order] * sign,
        point_y=batch.point_y * scale + shift,
        y_target=batch.y_target * scale + shift,
        mean=batch.mean * scale + shift,
        variance=batch.variance * scale.square(),
        noise_variance=batch.noise_variance * scale.square(),
        context=batch.context * distance,
    )
