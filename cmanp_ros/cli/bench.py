"""`cmanp bench`: how long folding, encoding and predicting take on this machine."""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from cmanp_ros.checkpoint import load_model
from cmanp_ros.core import CMANP, CMANPConfig

FOLDS = (1, 10, 100, 1_000, 10_000)


def main(arguments) -> int:
    """Print a table and write the records as JSON."""
    parser = argparse.ArgumentParser(prog='cmanp bench', description=__doc__)
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--repeats', type=int, default=9, help='timed runs; the median is shown')
    parser.add_argument('--output', default='build/bench.json')
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    models = {
        'field': load_model('field'),
        'paper': CMANP(CMANPConfig.paper(2, 1)).eval().requires_grad_(False),
    }
    rate = _matrix_product_rate(options.repeats)
    print(f'{options.threads} threads; float32 matrix product {rate / 1e9:.0f} GFLOP/s')
    print(f'{"model":<8}{"work":<14}{"size":>7}{"median":>12}{"spread":>12}')
    records = []
    for name, model in models.items():
        for work, size, function in _works(model):
            times = _times(function, options.repeats)
            median = statistics.median(times)
            spread = statistics.quantiles(times, n=4)
            records.append(
                {
                    'work': work,
                    'size': size,
                    'threads': options.threads,
                    'implementation': name,
                    'median_s': median,
                    'spread_s': spread[2] - spread[0],
                }
            )
            print(
                f'{name:<8}{work:<14}{size:>7}{median * 1e3:>9.2f} ms'
                f'{records[-1]["spread_s"] * 1e3:>9.2f} ms',
                flush=True,
            )
    path = Path(options.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records, indent=1))
    print(f'written: {path}')
    return 0


@torch.inference_mode()
def _works(model):
    """Return (name, size, function) of everything that is timed on one model."""
    empty = model.init_state(1)
    full = model.update(empty, *_points(1_000))

    def fold(points):
        return lambda: model.update(full, *points)

    def fold_and_predict(points, targets):
        return lambda: model.predict(model.update(full, *points), targets)

    return [
        *(('fold', size, fold(_points(size))) for size in FOLDS),
        *(
            ('fold_predict', size, fold_and_predict(_points(10), _points(size)[0]))
            for size in (1, 100)
        ),
        ('predict', 10_000, lambda: model.predict(full, _points(10_000)[0])),
    ]


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
