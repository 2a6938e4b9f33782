"""What is measured: each study yields records, see `cmanp_ros.benchmark`."""

import os
import tempfile
import time
from collections.abc import Iterable, Iterator

import numpy as np
import torch

from cmanp_ros.benchmark import peers
from cmanp_ros.benchmark.eager import EagerCMANP
from cmanp_ros.benchmark.measuring import Record, apart, measure, once, spread, status_bytes
from cmanp_ros.benchmark.peers import Peer
from cmanp_ros.checkpoint import load_model, load_reference
from cmanp_ros.core import CMANP, CMANPConfig, Lattice, Normalization, World
from cmanp_ros.core.errors import CMANPError
from cmanp_ros.evaluation import real_peers
from cmanp_ros.evaluation.windows import TILE_SIZE, jacksboro, windows
from cmanp_ros.field import NeuralField

OURS, TILES, EAGER = 'cmanp', 'cmanp tiles', 'eager'
FOLDS = (1, 10, 100, 1_000, 10_000)
SEEN = (1_000, 10_000, 100_000, 1_000_000)
CHUNK = 1_000  # points that come at once
TOUCHED = (1, 16, 100)  # tiles
WORLDS = (1, 100, 10_000)  # tiles known before
LONG_SEC = 1.0  # what takes less is conditioned several times


@torch.inference_mode(False)
def paper_models() -> tuple[CMANP, EagerCMANP]:
    """Return our model and the eager one, of the paper's sizes and of the same random weights."""
    torch.manual_seed(0)
    config = CMANPConfig.paper(2, 1)
    eager = EagerCMANP(config).eval().requires_grad_(False)
    return load_reference(eager.state_dict(), config), eager


def paper(repeats: int) -> Iterator[Record]:
    """Fold, fold and predict, and predict, beside the eager implementation of the paper."""
    ours, eager = paper_models()
    x, y = points(1_000)
    ours_state = ours.update(ours.init_state(1), x[None], y[None])
    eager_state = eager.condition(x[None], y[None])
    for size in FOLDS:
        new = [part[None] for part in points(size)]
        functions = {
            OURS: lambda new=new: ours.update(ours_state, *new),
            EAGER: lambda new=new: eager.update(eager_state, *new),
        }
        yield from measure('fold', size, functions, repeats)
    new = [part[None] for part in points(10)]
    for size in (1, 100):
        at = points(size)[0][None]
        functions = {
            OURS: lambda at=at: ours.predict(ours.update(ours_state, *new), at),
            EAGER: lambda at=at: eager.predict(eager.update(eager_state, *new), at),
        }
        yield from measure('fold 10, predict', size, functions, repeats)
    at = points(10_000)[0][None]
    functions = {
        OURS: lambda: ours.predict(ours_state, at),
        EAGER: lambda: eager.predict(eager_state, at),
    }
    yield from measure('predict', 10_000, functions, repeats)


def tiles(repeats: int) -> Iterator[Record]:
    """Fold, refresh and predict with the default model, in worlds of few and of many tiles."""
    model = load_model('field')
    world = World(model, Lattice.of(model.config, 1.0))
    x, y = spread_over(4, 1_000)
    world.fold(x, y)
    for size in FOLDS:
        new = spread_over(4, size)
        yield from measure('fold', size, {TILES: lambda new=new: world.fold(*new)}, repeats)
    for size in TOUCHED:
        yield from measure('refresh tiles', *_refresh(model, size), repeats)
    for size in (1_000, 10_000):
        at = spread_over(4, size)[0]
        yield from measure('predict', size, {TILES: lambda at=at: world.predict(at)}, repeats)
    at = spread_over(4, 1_000_000)[0]
    yield once('predict', len(at), TILES, lambda: world.predict(at))
    for known in WORLDS:
        world = World(model, Lattice.of(model.config, 1.0), max_tiles=1 << 20)
        for step in range(1, 1 << 20):  # ever farther from where the robot is
            if len(world.tiles) >= known:
                break
            far = 100.0 * step + 9 * torch.rand(100, 2, dtype=torch.float64)
            world.fold(far, torch.zeros(100, 1, dtype=torch.float64))
        world.fold(x, y)
        at, new = spread_over(4, 10_000)[0], (x[:100], y[:100])

        def refresh(world=world, new=new, at=at):
            world.fold(*new)
            world.predict(at[:1_000])

        works = {
            'fold 100': lambda world=world, new=new: world.fold(*new),
            'fold 100, predict 1,000': refresh,
            'predict 10,000': lambda world=world, at=at: world.predict(at),
        }
        for work, function in works.items():
            yield from measure(f'{work} in a world of', known, {TILES: function}, repeats)


def _refresh(model, size):
    """Return the number of tiles of a world of about `size`, and how to encode all of them."""
    side = {1: 1, 16: 2, 100: 7}[size]
    num_levels = 1 if size == 1 else model.config.num_levels
    world = World(model, Lattice(1.0, 2, num_levels, model.config.level_factor))
    x, y = spread_over(side, 100 * side**2)
    world.fold(x % (1 if size == 1 else side), y)
    keys = world.tiles.keys()
    if size == 1:
        keys = keys[:1]
    rows = world.tiles.rows(keys)
    state = world.tiles.state(rows)

    def refresh():
        world.tiles.put(rows, state)  # a new version of each
        world.refresh(keys)

    return len(keys), {TILES: refresh}


def windows_of_terrain(repeats: int) -> Iterator[Record]:
    """Take 1,024 points of a window of terrain in, and give 1,000 answers: beside GPs."""
    (task,) = windows(1, 1024, 0, 0.0)
    fits = {TILES: real_peers.ours_in_tiles('field', TILE_SIZE)}
    for name, fit in (('exact GP', real_peers.exact_gp), ('Vecchia GP', real_peers.vecchia_gp)):
        try:
            _answers(fit, task.x[:32], task.y[:32], task.x_target[:1])
        except CMANPError as error:
            print(f'{name} left out: {error}')
            continue
        fits[name] = fit
    functions = {
        name: lambda fit=fit: _answers(fit, task.x, task.y, task.x_target)
        for name, fit in fits.items()
    }
    yield from measure('1,024 points in, answers out', len(task.x_target), functions, repeats)


@torch.inference_mode(False)  # GPs are fitted by gradients
def _answers(fit, x, y, x_target):
    return fit(x, y)(x_target)


def memories() -> dict[str, Peer]:
    """Return what takes observations, by name."""
    ours, eager = paper_models()
    return {
        OURS: peers.Ours(ours),
        TILES: peers.OurTiles(load_model('field')),
        EAGER: peers.Eager(eager),
        'LBANP-style': peers.Reencoding(eager),
        'TNP-D-style': peers.FullAttention(ours.config),
        'sparse GP': peers.SparseGP(),
        'exact GP': peers.ExactGP(),
    }


def conditioning(repeats: int) -> Iterator[Record]:
    """Take in 1,000 to 1,000,000 points, 1,000 at a time: time, peak memory, size of the state."""
    for name, peer in memories().items():
        for size in sorted({min(size, peer.limit or size) for size in SEEN}):
            found, peak = apart(lambda peer=peer, size=size: _condition(peer, size))
            yield {
                'work': 'condition',
                'size': size,
                'implementation': name,
                **found,
                'peak_bytes': peak,
            }


def _condition(peer, count):
    times = []
    while not times or (sum(times) < LONG_SEC and len(times) < 9):
        start = time.perf_counter()
        memory = peer.condition(stream(count))
        times.append(time.perf_counter() - start)
    found = spread(times) if len(times) > 1 else {'median_s': times[0], 'spread_s': 0.0}
    return found | {'state_bytes': peer.nbytes(memory)}


def updating(repeats: int) -> Iterator[Record]:
    """Take in ten points more after 1,000 to 1,000,000."""
    x, y = points(10)
    every = memories()
    for size in SEEN:
        functions = {}
        for name, peer in every.items():
            if size <= (peer.limit or size):
                memory = peer.condition(stream(size))
                functions[name] = lambda peer=peer, memory=memory: peer.update(memory, x, y)
        yield from measure('update after', size, functions, repeats)


def jacksboro_stream(repeats: int) -> Iterator[Record]:
    """Fold a whole model of terrain, 138,632 heights row by row, through a small memory."""
    heights, model = jacksboro(), load_model('field')
    rows, columns = heights.shape
    place = np.arange(columns) * 90.0  # [m] about 3 arc-seconds
    with tempfile.TemporaryDirectory() as folder:
        geometry = Lattice.of(model.config, 480.0)
        field = NeuralField(
            model, geometry, Normalization(400.0, 150.0), None, 1024, os.path.join(folder, 'tiles')
        )
        start = time.perf_counter()
        for row in range(rows):
            field.observe(np.stack([place, np.full(columns, 90.0 * row)], 1), heights[row])
            if row % 50 == 49 or row == rows - 1:
                yield {
                    'work': 'stream',
                    'size': field.num_observations,
                    'implementation': 'cmanp tiles with a store',
                    'median_s': time.perf_counter() - start,
                    'spread_s': 0.0,
                    'peak_bytes': status_bytes('VmRSS'),
                    'tiles': field.num_tiles,
                    'tiles_in_memory': field.num_tiles_in_memory,
                }
        field.close()


def points(count: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Return locations in [-2, 2]^2 and values, float32."""
    generator = torch.Generator().manual_seed(seed)
    x = 4 * torch.rand(count, 2, generator=generator) - 2
    return x, torch.sin(3 * x[:, :1]) + 0.1 * torch.randn(count, 1, generator=generator)


def spread_over(side: float, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return locations in [0, side]^2 and values, float64."""
    x, y = points(count)
    return (x.double() + 2) * (side / 4), y.double()


def stream(count: int) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """Yield so many points a chunk at a time; none is kept."""
    for number in range(-(-count // CHUNK)):
        yield points(min(CHUNK, count - number * CHUNK), number)


STUDIES = {
    'paper': paper,
    'tiles': tiles,
    'terrain': windows_of_terrain,
    'condition': conditioning,
    'update': updating,
    'stream': jacksboro_stream,
}
