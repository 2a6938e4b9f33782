"""
Training batches, made once and kept on disk: the regressions are solved when a batch is made.

Batch i is a function of (seed, i) alone, so an interrupted run goes on to the same result.
"""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset

from cmanp_ros.core import CMANP, CMANPConfig
from cmanp_ros.core.lattice import Lattice
from cmanp_ros.core.model import Prior
from cmanp_ros.core.tiles import keys_of
from cmanp_ros.core.world import World
from cmanp_ros.training import priors

FEW_LEVELS = 0.15  # share of worlds with the finest level only: a single tile must predict, too


class Batch(NamedTuple):
    """
    Tiles of several worlds: their points, their targets, and what least squares says; float32.
    """

    point_tile: Tensor
    """(points,): the tile that each point is folded into."""
    point_x: Tensor
    """(points, dim_x) in tile coordinates."""
    point_y: Tensor
    """(points, 1)."""
    pair_tile: Tensor
    """(pairs,): the tile that answers for a target."""
    pair_target: Tensor
    """(pairs,): which target."""
    pair_x: Tensor
    """(pairs, dim_x) in tile coordinates."""
    pair_window: Tensor
    """(pairs,)."""
    pair_level: Tensor
    """(pairs,): level of the tile, of which the last is the coarsest in worlds of few, too."""
    y_target: Tensor
    """(targets, 1)."""
    mean: Tensor
    """(pairs, 1), as the following: the fields of `Prior`."""
    variance: Tensor
    noise_variance: Tensor
    summary: Tensor
    context: Tensor

    @property
    def prior(self) -> Prior:
        """
        Return what least squares says.
        """
        return Prior(*self[-5:])


class Batches(Dataset):
    """
    `num_batches` batches of a few worlds each.
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
                name: part.contiguous() for name, part in self.make(index)._asdict().items()
            }
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix('.partial')
            save_file(tensors, partial)
            partial.replace(path)
        return load_file(path)

    @torch.no_grad()
    def make(self, index) -> Batch:
        """
        Draw the worlds of batch `index` and solve their regressions.
        """
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        config = self.config
        if config.least_squares is None:  # not to be read, but the tiles are the same
            options = CMANPConfig.field(config.dim_x, config.dim_y).least_squares
            config = dataclasses.replace(config, least_squares=options)
        model = CMANP(config)  # its weights do not matter here
        parts, tiles, targets = [], 0, 0
        for _ in range(self.batch_size):
            task = priors.world_task(
                generator, self.max_context, self.num_target, self.config.dim_x
            )
            few = torch.rand(1, generator=generator) < FEW_LEVELS
            levels = 1 if few else self.config.num_levels
            part = world_batch(model, task, levels)
            part = part._replace(
                point_tile=part.point_tile + tiles,
                pair_tile=part.pair_tile + tiles,
                pair_target=part.pair_target + targets,
            )
            tiles = int(part.pair_tile.max()) + 1 if len(part.pair_tile) else tiles
            targets += self.num_target
            parts.append(part)
        joined = (torch.cat(values) for values in zip(*parts, strict=True))
        return Batch(*(v.float() if v.is_floating_point() else v for v in joined))


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
