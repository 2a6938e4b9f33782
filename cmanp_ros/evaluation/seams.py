"""Seams: what happens to predictions on lines where one tile stops to answer or another begins."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cmanp_ros.core import Lattice, Normalization
from cmanp_ros.core.tiles import keys_of
from cmanp_ros.evaluation.windows import TILE_SIZE, windows
from cmanp_ros.field import NeuralField

STEP = 1e-6  # [tile_size] to both sides
LINES = 12  # that are walked, along each axis
HALVINGS = 50  # of a spacing: to rounding


class Seams(NamedTuple):
    """Jumps where tiles change, the largest and the mean."""

    mean_over_stddev: tuple[float, float]
    """Jump of the mean over the local standard deviation."""
    mean_over_field: tuple[float, float]
    """Jump of the mean over the standard deviation of the field."""
    stddev_over_stddev: tuple[float, float]
    """Jump of the standard deviation over itself."""
    num_crossings: int


def where_tiles_change(lattice: Lattice, x: Tensor, level: int) -> Tensor:
    """Move places (n, dim_x) along the first axis to where another tile of a level answers."""

    def answering(x):
        cover = lattice.answering(x)
        own, found = cover.key[:, 0] == level, [set() for _ in x]
        for i, key in zip(cover.index[own].tolist(), keys_of(cover.key[own]), strict=True):
            found[i].add(key)
        return found

    before, low, high = answering(x), x.clone(), x.clone()
    high[:, 0] += lattice.spacing(level)  # there they are others
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        same = [now == then for now, then in zip(answering(middle), before, strict=True)]
        same = torch.tensor(same).unsqueeze(1)
        low, high = torch.where(same, middle, low), torch.where(same, high, middle)
    return high


def seams(field: NeuralField, lower: float, upper: float, seed: int = 0) -> Seams:
    """
    Predict on both sides of where tiles of any level change, along lines in both directions.

    :param lower: least coordinate of the square that is walked [m]; `upper` the largest.
    """
    lattice, rng, parts = field.geometry, np.random.default_rng(seed), []
    for level in range(lattice.num_levels):
        h = lattice.spacing(level)
        starts = np.arange(lower, upper, h / 4)  # a tile changes several times on the way
        across = np.repeat(rng.uniform(lower, upper, LINES), len(starts))
        x = torch.tensor(np.stack([np.tile(starts, LINES), across], 1))
        parts.append(where_tiles_change(lattice, x, level).numpy())
    at = np.unique(np.concatenate(parts), axis=0)
    at = np.concatenate([at, at[:, ::-1]])  # in both directions
    step = np.zeros_like(at)
    step[: len(at) // 2, 0] = step[len(at) // 2 :, 1] = STEP * lattice.tile_size
    sides = field.predict(at - step), field.predict(at + step)
    mean, stddev = (np.stack(part) for part in zip(*sides, strict=True))
    jump, scale = np.abs(np.diff(mean, axis=0)), stddev.mean(0)
    spread = np.abs(np.diff(stddev, axis=0)) / scale

    def both(values):
        return float(values.max()), float(values.mean())

    return Seams(both(jump / scale), both(jump / mean.std()), both(spread), len(at))


def fields(model, num: int, num_context: int, seed: int, tile_size: float = TILE_SIZE):
    """Yield maps of windows of terrain, and of as many smooth fields over the same places."""
    lattice = Lattice.of(model.config, tile_size)
    for index, task in enumerate(windows(num, num_context, seed, 0.0)):
        smooth = np.sin(1.7 * task.x[:, 0] + index) * np.cos(1.3 * task.x[:, 1])
        for kind, y in (('terrain', task.y), ('smooth', smooth)):
            field = NeuralField(model, lattice, Normalization())
            field.observe(task.x, y)
            yield kind, field


def draw(field: NeuralField, path, lower: float = -2.0, upper: float = 2.0, size: int = 200):
    """
    Draw mean and standard deviation, and hill-shading, in which a seam would catch the eye.

    :param field: a map of a window of terrain, in the units of the window.
    """
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot as plt
    from matplotlib.colors import LightSource

    from cmanp_ros.plots.style import ERROR_MAP, HEIGHT_MAP

    axis = np.linspace(lower, upper, size)
    x = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    mean, stddev = (part[:, 0].reshape(size, size) for part in field.predict(x))
    cell = (upper - lower) / (size - 1)
    slope = np.hypot(*np.gradient(mean, cell))
    flatter = 1 / np.percentile(slope, 90)  # or most of it would be black or white
    shade = LightSource(315, 45).hillshade(mean, flatter, dx=cell, dy=-cell)  # rows go north
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.6), sharey=True, layout='constrained')
    for panel, values, title, unit, colors in (
        (axes[0], mean, 'mean', 'height [units of the window]', HEIGHT_MAP),
        (axes[1], shade, 'mean, lit from the north-west', '', 'gray'),
        (axes[2], stddev, 'standard deviation', 'of a reading [units of the window]', ERROR_MAP),
    ):
        image = panel.imshow(values, origin='lower', extent=(lower, upper) * 2, cmap=colors)
        panel.set(title=title, xlabel='x [units of the window]')
        if unit:
            figure.colorbar(image, ax=panel, shrink=0.8, label=unit)
    axes[0].set_ylabel('y [units of the window]')
    figure.savefig(path, dpi=120)
    plt.close(figure)
