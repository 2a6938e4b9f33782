"""`cmanp bench`: how long folding, encoding and predicting take on this machine."""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from cmanp_ros.checkpoint import load_model
from cmanp_ros.core import CMANP, CMANPConfig, Lattice, Normalization, World
from cmanp_ros.field import NeuralField

FOLDS = (1, 10, 100, 1_000, 10_000)
WORLDS = (1, 100, 10_000)  # tiles known before


def main(arguments) -> int:
    """Print a table and write the records as JSON."""
    parser = argparse.ArgumentParser(prog='cmanp bench', description=__doc__)
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--repeats', type=int, default=9, help='timed runs; the median is shown')
    parser.add_argument('--output', default='build/bench.json')
    parser.add_argument(
        '--stream', action='store_true', help='also fold a whole model of terrain, row by row'
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    field, paper = load_model('field'), CMANP(CMANPConfig.paper(2, 1)).eval().requires_grad_(False)
    rate = _matrix_product_rate(options.repeats)
    print(f'{options.threads} threads; float32 matrix product {rate / 1e9:.0f} GFLOP/s')
    print(f'{"implementation":<22}{"work":<14}{"size":>7}{"median":>12}{"spread":>12}')
    records = []
    for name, work, size, function in (
        *(('one tile', *work) for work in _model_works(field)),
        *(('paper', *work) for work in _model_works(paper)),
        *(work for num_tiles in WORLDS for work in _world_works(field, num_tiles)),
    ):
        times = _times(function, options.repeats)
        quartiles = statistics.quantiles(times, n=4)
        record = {
            'work': work,
            'size': size,
            'threads': options.threads,
            'implementation': name,
            'median_s': statistics.median(times),
            'spread_s': quartiles[2] - quartiles[0],
        }
        records.append(record)
        print(
            f'{name:<22}{work:<14}{size:>7}{record["median_s"] * 1e3:>9.2f} ms'
            f'{record["spread_s"] * 1e3:>9.2f} ms',
            flush=True,
        )
    if options.stream:
        records += _stream(field)
    path = Path(options.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records, indent=1))
    print(f'written: {path}')
    return 0


@torch.inference_mode()
def _model_works(model):
    """Yield (name, size, function) of what is timed on one tile."""
    empty = model.init_state(1)
    full = model.update(empty, *_points(1_000))

    def fold(points):
        return lambda: model.update(full, *points)

    def fold_and_predict(points, targets):
        return lambda: model.predict(model.update(full, *points), targets)

    yield from (('fold', size, fold(_points(size))) for size in FOLDS)
    for size in (1, 100):
        yield 'fold_predict', size, fold_and_predict(_points(10), _points(size)[0])
    yield 'predict', 10_000, lambda: model.predict(full, _points(10_000)[0])


@torch.inference_mode()
def _world_works(model, num_tiles):
    """Yield (name, work, size, function) of what is timed in a world of so many tiles."""
    geometry = Lattice.of(model.config, 1.0)
    world = World(model, geometry, max_tiles=1 << 20)
    far = 0
    while len(world.tiles) < num_tiles:  # ever farther from where the robot is
        far += 1
        x = 100.0 * far + 9 * torch.rand(100, 2, dtype=torch.float64)
        world.fold(x, torch.zeros(100, 1, dtype=torch.float64))
    x = 4 * torch.rand(1_000, 2, dtype=torch.float64)  # some 49 tiles
    y = torch.sin(3 * x[:, :1])
    world.fold(x, y)
    targets = 4 * torch.rand(10_000, 2, dtype=torch.float64)
    touched = len(set(map(tuple, geometry.cover(x).key.tolist())))

    def refresh():
        world.fold(x, y)
        world.predict(targets[:1])
        world.pairs(targets[:1000])

    name = f'world of {num_tiles:,} tiles'
    yield name, 'fold', 100, lambda: world.fold(x[:100], y[:100])
    yield name, 'refresh', touched, refresh
    yield name, 'predict', 10_000, lambda: world.predict(targets)


def _stream(model):
    """Fold 138,632 heights row by row through a small memory; return records."""
    import matplotlib.cbook

    heights = matplotlib.cbook.get_sample_data('jacksboro_fault_dem.npz')['elevation']
    rows, columns = heights.shape
    print(f'{"row":>5}{"points/s":>10}{"tiles":>8}{"in memory":>11}{"process [MB]":>14}')
    records, place = [], np.arange(columns) * 90.0  # [m] about 3 arc-seconds
    with tempfile.TemporaryDirectory() as folder:
        geometry = Lattice.of(model.config, 480.0)
        field = NeuralField(
            model, geometry, Normalization(400.0, 150.0), None, 1024, f'{folder}/tiles'
        )
        start = time.perf_counter()
        for row in range(rows):
            x = np.stack([place, np.full(columns, 90.0 * row)], 1)
            field.observe(x, heights[row].astype(float))
            if row % 50 == 49 or row == rows - 1:
                record = {
                    'work': 'stream',
                    'size': field.num_observations,
                    'threads': torch.get_num_threads(),
                    'implementation': 'tiles with a store',
                    'points_per_s': field.num_observations / (time.perf_counter() - start),
                    'tiles': field.num_tiles,
                    'tiles_in_memory': field.num_tiles_in_memory,
                    'process_mb': _resident_mb(),
                }
                records.append(record)
                print(
                    f'{row + 1:>5}{record["points_per_s"]:>10.0f}{record["tiles"]:>8}'
                    f'{record["tiles_in_memory"]:>11}{record["process_mb"]:>14.0f}',
                    flush=True,
                )
        field.close()
    return records


def _resident_mb():
    """Return the memory that this process holds now [MB]."""
    pages = int(Path('/proc/self/statm').read_text(encoding='ascii').split()[1])
    return pages * os.sysconf('SC_PAGE_SIZE') / 1e6


def _points(count):
    x = 4 * torch.rand(1, count, 2) - 2
    return x, torch.sin(3 * x[..., :1])


@torch.inference_mode()
def _times(function, repeats):
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return times


def _matrix_product_rate(repeats):
    """Return the rate of float32 matrix products [FLOP/s]."""
    a = torch.randn(1024, 1024)
    return 2 * 1024**3 / statistics.median(_times(lambda: a @ a, repeats))
