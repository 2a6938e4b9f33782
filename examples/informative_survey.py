"""
Where to measure next: a robot that goes where its map is least certain, beside a lawnmower.

A simulated field of 50 x 50 m is calm but for one rough corner. Both robots take a noisy reading
each meter and drive equally far. The lawnmower spreads its lines evenly; the other robot asks its
own map for standard deviations and drives to the next best view, as `~/next_best_view` has it.
Prints, for both, how far the map is from the truth:

    lawnmower    396 m  RMSE 0.265  90 % intervals cover 0.93
    informative  400 m  RMSE 0.087  90 % intervals cover 1.00

With --picture FILE it also draws both maps.
"""

import argparse

import numpy as np

from cmanp_ros.field import NeuralField
from cmanp_ros.planning import next_best_views

SIDE = 50.0  # [m]
NOISE = 0.05  # [field units] standard deviation of a reading
BUMPS = np.random.default_rng(4).uniform(26, 48, (24, 2))  # [m] where they are: in one corner
HEIGHTS = np.random.default_rng(5).choice((-1.5, 1.5), len(BUMPS))


def truth(x):
    """Return the field at x (n, 2) [m]: a gentle slope, and bumps in one corner."""
    distance = np.linalg.norm(x[:, None] - BUMPS, axis=2)
    return x[:, 0] / SIDE + np.exp(-0.5 * (distance / 2.0) ** 2) @ HEIGHTS


def grid(spacing):
    """Return locations (n, 2) all over the field, spacing [m] apart."""
    axis = np.arange(spacing / 2, SIDE, spacing)
    return np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)


def leg(start, end):
    """Return a location each meter on the way from start, which is left out, to end."""
    meters = max(1, round(np.linalg.norm(end - start)))
    return start + np.arange(1, meters + 1)[:, None] / meters * (end - start)


class Robot:
    """It drives, takes readings, and folds them into its map."""

    def __init__(self, seed=0):
        """Start in a corner with an empty map."""
        self.field = NeuralField.load(bounds=((0, 0), (SIDE, SIDE)), tile_size=4.0)
        self.way, self.rng = np.zeros((1, 2)), np.random.default_rng(seed)

    def drive(self, goal, budget):
        """Take readings on the way to a goal, as far as the budget [m] goes."""
        x = leg(self.way[-1], goal)[: budget + 1 - len(self.way)]
        self.field.observe(x, truth(x) + NOISE * self.rng.standard_normal(len(x)))
        self.way = np.concatenate([self.way, x])
        return len(self.way) <= budget


def lawnmower(budget):
    """Drive up and down in lines that fill the field with the budget [m]."""
    robot, num_lines = Robot(), max(2, int(budget / SIDE - 1))
    for line in range(num_lines):
        y = (line + 0.5) * SIDE / num_lines
        for x in (0.0, SIDE) if line % 2 == 0 else (SIDE, 0.0):
            robot.drive(np.array([x, y]), budget)
    return robot


def informative(budget):
    """Drive to where the standard deviation is largest, but rather near than far."""
    robot, candidates, going = Robot(), grid(2.0), True
    while going:
        _, stddev = robot.field.predict(candidates)
        best, *_ = next_best_views(candidates, stddev[:, 0], robot.way[-1], 1, 0.02, 1.0)
        going = robot.drive(candidates[best], budget)
    return robot


def main():
    """Survey in both ways, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument('--budget', type=int, default=400, help='how far each drives [m]')
    parser.add_argument('--picture', help='where to draw both maps, such as survey.png')
    options = parser.parse_args()
    robots = {plan.__name__: plan(options.budget) for plan in (lawnmower, informative)}
    x, maps = grid(1.0), {}
    for name, robot in robots.items():
        mean, stddev = maps[name] = [each[:, 0] for each in robot.field.predict(x)]
        rmse = np.sqrt(np.mean((mean - truth(x)) ** 2))
        covered = np.mean(np.abs(mean - truth(x)) < 1.645 * stddev)
        meters = len(robot.way) - 1
        print(f'{name:<11}  {meters} m  RMSE {rmse:.3f}  90 % intervals cover {covered:.2f}')
    if options.picture:
        draw(robots, truth(x), maps, options.picture)


def draw(robots, true_values, maps, path):
    """Draw the truth, and mean and standard deviation of each map with the way on it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.2), layout='constrained')
    axes = figure.subplots(2, 3)
    axes[1, 0].set_axis_off()
    values = {'cmap': 'viridis', 'vmin': -1.5, 'vmax': 2.5}
    panels = [(axes[0, 0], 'truth', true_values, values)]
    for column, (name, (mean, stddev)) in enumerate(maps.items(), start=1):
        bars = {'cmap': 'cividis', 'vmin': 0, 'vmax': 0.8}
        panels.append((axes[0, column], f'{name}: mean', mean, values))
        panels.append((axes[1, column], f'{name}: stddev', stddev, bars))
        axes[1, column].plot(*robots[name].way.T, color='white', linewidth=0.8)
    for axis, title, shown, colors in panels:
        side, extent = int(SIDE), (0, SIDE, 0, SIDE)
        image = axis.imshow(shown.reshape(side, side), origin='lower', extent=extent, **colors)
        figure.colorbar(image, ax=axis, label='field units')
        axis.set(title=title, xlabel='x [m]', ylabel='y [m]')
    figure.savefig(path, dpi=80)


if __name__ == '__main__':
    main()
