"""
Two robots, one map: what each has observed is merged, exactly.

Each robot maps half of a field. Their states are sent as bytes, as `~/state` does over ROS, and
merged; the result is compared with one robot that has observed everything. Prints

    robot 1  300 observations,  70 tiles, 3.1 MB to send
    robot 2  300 observations,  70 tiles, 3.1 MB to send
    merged   600 observations, 113 tiles
    largest difference from one robot with all observations: mean 6.6e-09, stddev 6.3e-09
    merged a second time: refused, both maps hold observations of the same robot
"""

import numpy as np

from cmanp_ros.core.errors import StateMismatchError
from cmanp_ros.field import NeuralField


def empty_map():
    """Return an empty map; tile size and units are the same for all who want to merge."""
    return NeuralField.load(tile_size=6.0, value_offset=20.0, value_scale=5.0)


def main():
    """Observe, merge and compare."""
    rng = np.random.default_rng(0)
    x = rng.uniform((0, 0), (50, 50), (600, 2))  # [m]
    y = 20 + 5 * np.sin(x[:, 0] / 8) * np.cos(x[:, 1] / 6) + 0.2 * rng.standard_normal(len(x))
    west = x[:, 0] < np.median(x[:, 0])

    first, second, alone = empty_map(), empty_map(), empty_map()
    first.observe(x[west], y[west])
    second.observe(x[~west], y[~west])
    alone.observe(x, y)
    for name, field in (('robot 1', first), ('robot 2', second)):
        megabytes = len(field.to_bytes()) / 1e6
        print(
            f'{name}  {field.num_observations} observations, {field.num_tiles:>3} tiles, '
            f'{megabytes:.1f} MB to send'
        )

    received, _ = first.read(second.to_bytes())
    first.merge(received)
    print(f'merged   {first.num_observations} observations, {first.num_tiles:>3} tiles')

    targets = rng.uniform(0, 50, (500, 2))
    pairs = zip(first.predict(targets), alone.predict(targets), strict=True)
    mean, stddev = (np.abs(a - b).max() for a, b in pairs)
    print(
        'largest difference from one robot with all observations: '
        f'mean {mean:.1e}, stddev {stddev:.1e}'
    )
    try:
        first.merge(received)
    except StateMismatchError:
        print('merged a second time: refused, both maps hold observations of the same robot')


if __name__ == '__main__':
    main()
