"""Seams: what happens to predictions on lines that cross the borders of tiles."""

from typing import NamedTuple

import numpy as np

from cmanp_ros.core import Lattice, Normalization
from cmanp_ros.evaluation.windows import windows
from cmanp_ros.field import NeuralField

STEP = 1e-6  # [tile_size] to both sides of a border
LINES = 12  # that are walked, along each axis


class Seams(NamedTuple):
    """Jumps at borders, the largest and the mean."""

    mean_over_stddev: tuple[float, float]
    """Jump of the mean over the local standard deviation."""
    mean_over_field: tuple[float, float]
    """Jump of the mean over the standard deviation of the field."""
    stddev_over_stddev: tuple[float, float]
    """Jump of the standard deviation over itself."""
    num_crossings: int


def seams(field: NeuralField, lower: float, upper: float, seed: int = 0) -> Seams:
    """
    Predict on both sides of every border of every level, along lines in both directions.

    :param lower: least coordinate of the square that is walked [m]; `upper` the largest.
    """
    lattice, rng = field.geometry, np.random.default_rng(seed)
    borders = np.concatenate(
        [
            np.arange(np.ceil(lower / h), np.floor(upper / h) + 1) * h
            for h in (lattice.spacing(level) for level in range(lattice.num_levels))
        ]
    )
    along = rng.uniform(lower, upper, (LINES, 1))
    across = np.broadcast_to(np.unique(borders), (LINES, len(np.unique(borders))))
    at = np.stack([across, np.broadcast_to(along, across.shape)], -1).reshape(-1, 2)
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


def fields(model, num: int, num_context: int, seed: int, tile_size: float = 0.4):
    """Yield maps of windows of terrain, and of as many smooth fields over the same places."""
    lattice = Lattice.of(model.config, tile_size)
    for index, task in enumerate(windows(num, num_context, seed, 0.0)):
        smooth = np.sin(1.7 * task.x[:, 0] + index) * np.cos(1.3 * task.x[:, 1])
        for kind, y in (('terrain', task.y), ('smooth', smooth)):
            field = NeuralField(model, lattice, Normalization())
            field.observe(task.x, y)
            yield kind, field


def draw(field: NeuralField, path, lower: float = -2.0, upper: float = 2.0, size: int = 200):
    """Draw mean and standard deviation, and hill-shading, in which a seam would catch the eye."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot as plt
    from matplotlib.colors import LightSource

    axis = np.linspace(lower, upper, size)
    x = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    mean, stddev = (part[:, 0].reshape(size, size) for part in field.predict(x))
    shade = LightSource(315, 40).hillshade(mean, vert_exag=size / (upper - lower), dx=1, dy=1)
    figure, axes = plt.subplots(1, 3, figsize=(15, 5), layout='constrained')
    for panel, values, title, colors in (
        (axes[0], mean, 'mean', 'terrain'),
        (axes[1], shade, 'mean, lit from the side', 'gray'),
        (axes[2], stddev, 'standard deviation', 'viridis'),
    ):
        image = panel.imshow(values, origin='lower', extent=(lower, upper) * 2, cmap=colors)
        panel.set_title(title)
        figure.colorbar(image, ax=panel, shrink=0.8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
