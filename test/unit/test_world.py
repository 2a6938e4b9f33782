"""A world of tiles is a function of the points folded, and of nothing else."""

import dataclasses
import functools
import math
from itertools import product

import numpy as np
import pytest
import torch

from cmanp_ros.core import (
    CMANP,
    CMANPConfig,
    Lattice,
    LeastSquaresConfig,
    OneTile,
    World,
    least_squares,
    neighbourhood,
    outliers,
    world,
)
from cmanp_ros.core import state as states
from cmanp_ros.core.errors import ConfigError, StateMismatchError
from cmanp_ros.core.solver import Solver
from cmanp_ros.evaluation.seams import where_tiles_change
from cmanp_ros.store import TileStore

FUNCTIONS, VOXELS = {1: 11, 2: 5, 3: 3}, {1: 17, 2: 7, 3: 5}  # per axis, by dim_x
SIZE = {1: 0.7, 2: 1.3, 3: 2.1}  # [m]: no binary fraction
NUM_LEVELS, FACTOR = 3, 3
SPREAD = {1: 17.0, 2: 8.0, 3: 5.0}  # [m] of the points
N, N_TARGET = 53, 19
DIMS = pytest.mark.parametrize('dim', [1, 2, 3])

SAME_STATE = {'rtol': 1e-9, 'atol': 1e-12}
SAME_PREDICTION = {'rtol': 1e-6, 'atol': 1e-6}  # covariances of tiles are kept in float32
SEAMLESS = 1e-4  # [stddev] what may lie between two targets 1e-7 m apart
REACH = [1.0, 0.75, 0.75]  # [spacings] of a tile to both sides of its center, by level
ANSWERS = 0.75  # [spacings] to both sides of its center


@functools.cache
def model_of(dim=2, dim_y=1, kind='field', corrects=True, amplitude_scale=0.3, **overrides):
    """
    Return a model in float64 with weights that make every part count.

    :param corrects: else the network leaves alone what the regressions say.
    """
    sizes = {'num_latents': 5, 'num_latents_per_block': 7, 'num_blocks': 2, 'num_heads': 3}
    sizes |= {'dim_model': 12, 'dim_feedforward': 13, 'chunk_size': 11}
    memory = LeastSquaresConfig(
        functions_per_axis=FUNCTIONS[dim],
        smoothnesses=(1.5,),
        coarse_smoothnesses=(2.5,),
        lengths=(0.4, 1.0),
        noise_ratios=(0.1, 0.3),
        voxels_per_axis=VOXELS[dim],
        amplitude_scale=amplitude_scale,
        outlier_share=0.05,
    )
    if kind == 'field':
        sizes |= {'least_squares': memory, 'num_levels': NUM_LEVELS, 'level_factor': FACTOR}
    config = getattr(CMANPConfig, kind)(dim, dim_y, **(sizes | overrides))
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = CMANP(config)
        for name, parameter in model.named_parameters():
            if not corrects and name.startswith('predictor.2'):
                torch.nn.init.zeros_(parameter)
            elif not parameter.any():
                torch.nn.init.normal_(parameter, std=0.3)
    return model.double().eval().requires_grad_(False)


def lattice(dim=2, **overrides):
    sizes = {'tile_size': SIZE[dim], 'num_levels': NUM_LEVELS, 'level_factor': FACTOR}
    return Lattice(dim_x=dim, **(sizes | overrides))


def spacing(dim, level):
    """Return the distance [m] between the centers of tiles."""
    return SIZE[dim] * FACTOR**level / REACH[level]


def points(dim=2, dim_y=1, n=N, around=0.0, spread=None):
    """Return noisy observations of a wave, another for each output."""
    x = around + (torch.rand(n, dim, dtype=torch.float64) - 0.5) * (spread or SPREAD[dim])
    y = torch.sin(x.sum(-1, keepdim=True) + torch.arange(dim_y))
    return x, y + 0.1 * torch.randn(n, dim_y, dtype=torch.float64)


def targets(dim=2, n=N_TARGET, factor=1.4):
    """Return targets among the points and around them."""
    return (torch.rand(n, dim, dtype=torch.float64) - 0.5) * SPREAD[dim] * factor


def world_of(x=None, y=None, model=None, geometry=None, max_tiles=4096, store=None):
    dim = x.shape[1]
    made = World(model or model_of(dim, y.shape[1]), geometry or lattice(dim), max_tiles, store)
    made.fold(x, y)
    return made


@pytest.fixture
def new_store(tmp_path):
    """Return a function that opens a store, another each time."""
    opened = []

    def new():
        path = tmp_path / f'{len(opened)}.db'
        opened.append(TileStore(path, {'weights_hash': 'of a test'}))
        return opened[-1]

    yield new
    for store in opened:
        store.close()


def assert_same_states(found, expected, **tolerance):
    """Compare every tile of two worlds; by default bit for bit."""
    tolerance = tolerance or {'rtol': 0, 'atol': 0}
    keys, state = found.export()
    expected_keys, expected = expected.export()
    assert keys == expected_keys
    for (name, tensor), other in zip(
        state.tensors().items(), expected.tensors().values(), strict=True
    ):
        torch.testing.assert_close(
            tensor, other, **tolerance, msg=lambda message, name=name: f'{name}: {message}'
        )


def assert_same_prediction(found, expected, **tolerance):
    """Compare means and stddevs; by default but for the rounding of the covariances."""
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **(tolerance or SAME_PREDICTION))


def shuffled(x, y):
    order = torch.randperm(len(x))
    return x[order], y[order]


# States ------------------------------------------------------------------------------------------


def tiles_over(points, dim):
    """Return the keys of all tiles over points, from the definition of a tile."""
    found = set()
    for point, level in product(points.tolist(), range(NUM_LEVELS)):
        h, r = spacing(dim, level), REACH[level]
        inside = [
            [k for k in range(round(v / h) - 4, round(v / h) + 4) if abs(v / h - k) < r]
            for v in point
        ]
        found |= {(level, *tile) for tile in product(*inside)}
    return found


@pytest.mark.parametrize(('dim', 'dim_y'), [(1, 2), (2, 1), (3, 2)])
def test_a_tile_holds_the_points_in_its_support_and_no_others(dim, dim_y):
    x, y = points(dim, dim_y, n=29)
    made = world_of(x, y)
    keys, state = made.export()
    assert set(keys) == tiles_over(x, dim)
    assert made.num_observations == len(x)
    for level, *tile in keys[:: max(1, len(keys) // 17)]:
        half, i = SIZE[dim] * FACTOR**level, keys.index((level, *tile))
        center = np.array(tile) * spacing(dim, level)
        lower, upper = center - half, center + half
        inside = ((x.numpy() > lower) & (x.numpy() < upper)).all(-1)
        u = torch.from_numpy(4 * (x.numpy()[inside] - lower) / (upper - lower) - 2)
        model = made.model
        expected = model.update(model.init_state(1), u.unsqueeze(0), y[inside].unsqueeze(0))
        found = states.select(state, [i])
        for name, tensor in expected.tensors().items():
            torch.testing.assert_close(found.tensors()[name], tensor, rtol=1e-9, atol=1e-10)


@DIMS
def test_order_and_batches_of_points_do_not_matter(dim):
    x, y = points(dim)
    expected, found = world_of(x, y), world_of(x[:0], y[:0])
    x_target = targets(dim)
    x, y = shuffled(x, y)
    for size in (0, 1, 1, 1, 3, 0, 17, 30):
        found.fold(x[:size], y[:size])
        x, y = x[size:], y[size:]
    assert not len(x)
    assert_same_states(found, expected, **SAME_STATE)
    assert_same_prediction(found.predict(x_target), expected.predict(x_target))
    assert found.num_observations == N


def test_one_point_at_a_time_is_all_at_once():
    x, y = points(n=29)
    found = world_of(x[:0], y[:0])
    for i in range(len(x)):
        found.fold(x[i : i + 1], y[i : i + 1])
    assert_same_states(found, world_of(x, y), **SAME_STATE)


@DIMS
def test_merging_two_worlds_is_folding_all_their_points(dim):
    x, y = points(dim)
    x_target = targets(dim)
    expected, parts = world_of(x, y), [slice(0, 23), slice(23, None)]
    for one, other in (parts, parts[::-1]):
        found, other = world_of(x[one], y[one]), world_of(x[other], y[other])
        found.merge(other)
        assert_same_states(found, expected, **SAME_STATE)
        assert_same_prediction(found.predict(x_target), expected.predict(x_target))
        assert found.num_observations == N


def test_merging_into_or_from_an_empty_world_is_a_copy():
    x, y = points()
    empty, full = world_of(x[:0], y[:0]), world_of(x, y)
    full.merge(empty)
    assert_same_states(full, world_of(x, y))
    empty.merge(full)
    assert_same_states(empty, full)


def test_merging_worlds_that_page_is_merging_those_that_do_not(new_store):
    x, y = points()
    expected = world_of(x[:30], y[:30])
    expected.merge(world_of(x[30:], y[30:]))
    found = world_of(x[:30], y[:30], max_tiles=37, store=new_store())
    found.merge(world_of(x[30:], y[30:], max_tiles=5, store=new_store()))
    assert_same_states(found, expected, **SAME_STATE)


def test_worlds_on_other_lattices_are_not_merged_and_nothing_is_changed():
    x, y = points(n=11)
    made = world_of(x, y)
    for geometry in (lattice(tile_size=1.4), OneTile((-9.0, -9.0), (9.0, 9.0))):
        with pytest.raises(StateMismatchError, match='use the same tile_size'):
            made.merge(world_of(x, y, geometry=geometry))
    assert_same_states(made, world_of(x, y))
    assert made.num_observations == 11


def test_forgetting_is_forgetting_each_state():
    x, y = points()
    made, late = world_of(x[:30], y[:30]), world_of(x[30:], y[30:])
    keys, state = made.export()
    made.tiles.forget(0.7)
    forgotten = World(made.model, made.geometry)
    forgotten.load(keys, states.forget(state, 0.7), 30)
    assert_same_states(made, forgotten, rtol=1e-12, atol=1e-12)
    made.fold(x[30:], y[30:])
    forgotten.merge(late)
    assert_same_states(made, forgotten, **SAME_STATE)


def test_what_is_wholly_forgotten_is_about_as_uncertain_as_the_prior():
    (x, y), x_target = points(), targets(factor=0.5)
    made = world_of(x, y, model_of(corrects=False))
    for _ in range(40):
        made.tiles.forget(0.5)
    mean, stddev = made.predict(x_target)
    assert mean.abs().max() < stddev.min() and (0.3 < stddev).all() and (stddev < 3).all()


def test_forgetting_before_the_first_point_is_nothing():
    x, y = points()
    made = world_of(x[:0], y[:0])
    made.tiles.forget(0.5)
    made.fold(x, y)
    assert_same_states(made, world_of(x, y))


def test_clear_leaves_an_empty_world():
    x, y = points()
    made, x_target = world_of(x[:30] + 0.3, y[:30]), targets()
    made.predict(x_target)
    made.tiles.forget(0.5)
    made.clear()
    assert len(made.tiles) == 0 and made.num_observations == 0 and made.export() == ([], None)
    assert_same_prediction(made.predict(x_target), world_of(x[:0], y[:0]).predict(x_target))
    made.fold(x, y)
    expected = world_of(x, y)
    assert_same_states(made, expected)
    assert_same_prediction(made.predict(x_target), expected.predict(x_target))


@pytest.mark.parametrize('kind', ['field', 'paper'])
def test_a_world_comes_back_from_what_it_exported_bit_for_bit(kind):
    x, y = points()
    model = model_of(kind=kind)
    made = world_of(x, y, model)
    made.tiles.forget(0.7)
    again = World(model, lattice())
    again.load(*made.export(), made.num_observations)
    assert_same_states(again, made)
    assert again.num_observations == N
    x_target = targets()
    rounding = {'rtol': 1e-12, 'atol': 1e-12}  # products of other batches of tiles
    assert_same_prediction(again.predict(x_target), made.predict(x_target), **rounding)


def test_no_points_change_nothing():
    x, y = points(n=11)
    made = world_of(x, y)
    made.fold(x[:0], y[:0])
    assert_same_states(made, world_of(x, y))
    assert [tuple(part.shape) for part in made.predict(x[:0])] == [(0, 1), (0, 1)]


# Paging ------------------------------------------------------------------------------------------


def drive(made, new_points=5):
    """Fold a walk, predict on the way, and let time pass."""
    torch.manual_seed(11)
    for step in range(9):
        x, y = points(n=new_points, spread=6.0)
        made.fold(x + 2.0 * step - 9.0, y)
        made.predict(x[:2] - 2.0 * step)
        if step % 3 == 1:
            made.tiles.forget(0.9)
        if step % 4 == 0:
            made.tiles.flush()
    return made


def test_a_world_that_pages_is_bit_for_bit_one_that_never_did(new_store):
    model = model_of()
    expected = drive(World(model, lattice()))
    found = drive(World(model, lattice(), 97, new_store()))
    assert found.tiles.num_in_memory <= 97 < len(found.tiles) == len(expected.tiles)
    assert found.tiles.num_dropped == 0
    assert_same_states(found, expected)


@pytest.mark.parametrize('max_tiles', [1, 7, 41])
def test_points_may_cover_more_tiles_than_fit_in_memory(new_store, max_tiles):
    x, y = points(n=31)
    expected, found = world_of(x, y), world_of(x, y, max_tiles=max_tiles, store=new_store())
    assert found.tiles.num_in_memory <= max_tiles < len(found.tiles)
    assert_same_states(found, expected, **SAME_STATE)


def tiles_needed(x, model, store):
    """Return how many tiles each target alone brings into memory."""
    needed = []
    for target in x.split(1):
        made = World(model, lattice(x.shape[1]), store=store)
        made.predict(target)
        needed.append(made.tiles.num_in_memory)
    return needed


def around_the_origin(dim):
    """Return points of which every tile of every level near the origin has some."""
    n = {1: 13, 2: 31, 3: 41}[dim]
    x = torch.cat([points(dim, n=n, spread=6 * SIZE[dim] * scale)[0] for scale in (1, 3, 9)])
    return x, torch.sin(x.sum(-1, keepdim=True))


@DIMS
def test_memory_for_the_hungriest_target_is_enough_for_all(new_store, dim):
    x, y = around_the_origin(dim)
    store = new_store()
    made = world_of(x, y, store=store)
    made.tiles.flush()
    x_target = SIZE[dim] * (0.5 + torch.cat([torch.zeros(1, dim), torch.eye(dim)]).double())
    expected, needed = [], []
    for target in x_target.split(1):
        alone = World(made.model, made.geometry, store=store)
        expected.append(alone.predict(target))
        needed.append(alone.tiles.num_in_memory)
    expected = [torch.cat(part) for part in zip(*expected, strict=True)]
    found = World(made.model, made.geometry, max(needed), store)
    for _ in range(2):
        assert_same_prediction(found.predict(x_target), expected)
    found = World(made.model, made.geometry, max(needed) - 1, store)
    hungriest = x_target[needed.index(max(needed))].unsqueeze(0)
    with pytest.raises(ConfigError, match=f'{max(needed)} tiles are needed at once'):
        found.predict(hungriest)


def test_targets_where_no_tile_is_take_no_memory(new_store):
    x, y = points(n=7, spread=0.1)
    store = new_store()
    expected = world_of(x, y, store=store)
    expected.tiles.flush()
    found = World(expected.model, lattice(), len(expected.tiles), store)
    x_target = torch.cat([targets(factor=30.0), x])
    assert_same_prediction(found.predict(x_target), expected.predict(x_target))


def test_a_world_is_there_again_after_the_store_was_reopened(tmp_path):
    (x, y), path, identity = points(), tmp_path / 'a.db', {'weights_hash': 'of a test'}
    expected, x_target = world_of(x, y), targets()
    expected.tiles.forget(0.7)
    with TileStore(path, identity) as store:
        made = world_of(x, y, max_tiles=61, store=store)
        made.tiles.forget(0.7)
        made.tiles.flush()
    with TileStore(path, identity) as store:
        again = World(expected.model, lattice(), 97, store)
        assert again.num_observations == N and len(again.tiles) == len(expected.tiles)
        assert_same_prediction(again.predict(x_target), expected.predict(x_target))
        assert_same_states(again, expected, **SAME_STATE)


def test_without_a_store_predictions_go_on_with_the_tiles_that_are_left():
    x, y = points(n=211)
    made = world_of(x, y, max_tiles=41)
    assert made.tiles.num_dropped > 0 and len(made.tiles) <= 41
    for part in made.predict(targets(n=101)):
        assert part.isfinite().all()
    assert made.tiles.num_in_memory == len(made.tiles) == len(made.tiles.keys())


# Predictions are a function of the states --------------------------------------------------------


@DIMS
def test_a_prediction_does_not_depend_on_what_else_is_asked(dim):
    made, x_target = world_of(*points(dim, 2)), targets(dim, n=13)
    together = made.predict(x_target)
    alone = [made.predict(target) for target in x_target.split(1)]
    assert_same_prediction(map(torch.cat, zip(*alone, strict=True)), together)
    order = torch.randperm(13)
    again = made.predict(x_target[order])
    assert_same_prediction(again, [part[order] for part in together])


def test_a_prediction_does_not_depend_on_earlier_ones():
    x, y = points()
    parts, x_target = [slice(0, 50), slice(50, 51), slice(51, None)], targets()
    made = world_of(x[:0], y[:0])
    for part in parts:
        made.fold(x[part], y[part])
        found = made.predict(x_target)
    assert_same_prediction(found, world_of(x, y).predict(x_target))


def test_a_prediction_does_not_change_the_map():
    x, y = points()
    made = world_of(x, y)
    first = made.predict(targets())
    made.sample(targets(), 3, seed=5)
    made.predict_joint(targets())
    assert_same_states(made, world_of(x, y))
    assert len(first[0]) == N_TARGET


@pytest.mark.parametrize(('targets_at_once', 'at_once'), [(7, 16), (5, 1)])
def test_a_prediction_does_not_depend_on_chunks(monkeypatch, targets_at_once, at_once):
    made, x_target = world_of(*points()), targets()
    expected = made.predict(x_target)
    monkeypatch.setattr(world, 'TARGETS_AT_ONCE', targets_at_once)
    monkeypatch.setattr(world, 'AT_ONCE', at_once)
    assert_same_prediction(made.predict(x_target), expected)


# What a tile takes from others, and the mixture: loops over the definitions ----------------------


class Oracle:
    """Hyperparameters and regressions of the tiles of a world, one tile at a time."""

    def __init__(self, made):
        keys, state = made.export()
        self.options, self.grid = made.model.config.least_squares, made.geometry
        sums = [states.select(state, [i]).least_squares for i in range(len(keys))]
        self.sums = dict(zip(keys, sums, strict=True))
        self.evidence = {
            key: least_squares.evidence(*self._prior(key), own) for key, own in self.sums.items()
        }
        self.scale, self.weight, self.amplitude = {}, {}, {}
        for level in reversed(range(self.grid.num_levels)):
            own = {key: self._log_evidence(key) for key in keys if key[0] == level}
            for key in own:
                self._share(key, own)

    def _prior(self, key):
        """Return the options of a tile's level: it has its own smoothness."""
        nu = self.options.smoothnesses if key[0] == 0 else self.options.coarse_smoothnesses
        own = dataclasses.replace(self.options, smoothnesses=nu)
        return own, least_squares.prior_variances(own, self.grid.dim_x)

    def _log_evidence(self, key):
        self.scale[key] = self._scale(key)
        own = least_squares.log_evidence(self.options, self.evidence[key], self.scale[key])
        return own - own.mean(1, keepdim=True)

    def _share(self, key, own):
        finest = {1: 3.0, 2: 2.3, 3: 2.0}[self.grid.dim_x]
        reach = finest if key[0] == 0 else 3**0.5 + 0.01  # [tiles]
        steps = np.array(list(product(range(-3, 4), repeat=self.grid.dim_x)))
        steps = steps[np.linalg.norm(steps, axis=1) <= reach]
        others = [(key[0], *np.add(key[1:], step).tolist()) for step in steps if step.any()]
        weight = min(1, neighbourhood.SHARE_OF_NEIGHBOURS / len(others))
        total = own[key] + weight * sum(own[other] for other in others if other in own)
        steps = (total.sub(total.amax(1)).exp() / neighbourhood.WEIGHT_STEP).round()
        self.weight[key] = steps / steps.sum(1)
        self.amplitude[key] = least_squares.amplitude(
            self.options, self.evidence[key], self.scale[key], self.weight[key]
        )

    def _scale(self, key):
        coarsest = self.grid.num_levels - 1
        if key[0] == coarsest:
            return torch.full_like(self.sums[key].sum_squares, self.options.amplitude_scale)
        logs, total = 0, 0
        center = self.grid.center(torch.tensor([key])).numpy()[0] / self.grid.spacing(coarsest)
        for above, amplitude in self.amplitude.items():
            beyond = np.abs(center - above[1:])
            if above[0] == coarsest and beyond.max() < ANSWERS - 1e-6:
                window = np.prod(np.cos(np.pi / 2 * beyond / ANSWERS) ** 2)
                logs, total = logs + window * amplitude.log(), total + window
        steps = (logs / total / neighbourhood.SCALE_STEP).round() * neighbourhood.SCALE_STEP
        return (self.options.amplitude_shape - 1) * steps.exp()

    def regression(self, key):
        return outliers.posterior(
            *self._prior(key),
            self.sums[key],
            self.scale[key],
            self.weight[key],
        )


@DIMS
def test_a_tile_takes_evidence_from_its_neighbours_and_its_amplitude_from_above(dim):
    made, x_target = world_of(*points(dim, 2, n=13)), targets(dim, n=5)
    oracle, pairs = Oracle(made), made.pairs(x_target)
    assert len(pairs.row) > 5 * NUM_LEVELS
    for i, key in enumerate(map(tuple, pairs.cover.key.tolist())):
        expected = oracle.regression(key)
        u = pairs.cover.x[i].view(1, 1, dim)
        mean, variance = least_squares.predict(oracle.options, expected, u)
        close = {'rtol': 1e-4, 'atol': 1e-6}  # float32
        torch.testing.assert_close(pairs.prior.mean[i], mean[0, 0], **close)
        torch.testing.assert_close(pairs.prior.variance[i], variance[0, 0], **close)
        noise, summary = pairs.prior.noise_variance[i], pairs.prior.summary[i]
        torch.testing.assert_close(noise, expected.noise_variance[0], **close)
        torch.testing.assert_close(summary, expected.summary[0], **close)


def test_a_prediction_is_the_mixture_of_what_the_tiles_answer():
    made, x_target = world_of(*points(1, 2)), targets(1, factor=0.5)  # the prior has no say
    mean, stddev = made.predict(x_target)
    pairs = made.pairs(x_target)
    answers = made.decode(pairs)
    assert answers.head_start.min() < 0.1 and answers.head_start.max() > 1
    for i, output in product(range(N_TARGET), range(2)):
        own = (pairs.cover.index == i).nonzero()[:, 0].tolist()
        logs = [float(answers.log_weight[j, output]) for j in own]
        window, level = (part[own].numpy() for part in (pairs.cover.window, pairs.cover.key[:, 0]))
        of_level = np.bincount(level, window)[level].clip(max=1)
        window = (window * of_level).tolist()
        weight = [w * np.exp(log - max(logs)) for w, log in zip(window, logs, strict=True)]
        weight = np.array(weight) / np.sum(weight)
        ahead = weight * np.exp(answers.head_start[own, output].numpy())
        means = answers.mean[own, output].numpy()
        expected = ahead @ means / ahead.sum()
        variance = weight @ (answers.stddev[own, output].numpy() ** 2 + (means - expected) ** 2)
        assert float(mean[i, output]) == pytest.approx(expected, rel=1e-9, abs=1e-9)
        assert float(stddev[i, output]) == pytest.approx(variance**0.5, rel=1e-9)


def test_each_tile_is_told_what_the_levels_say_in_units_of_its_own_stddev():
    made, x_target = world_of(*points(2, 2)), targets()
    pairs = made.pairs(x_target)
    prior, window = pairs.prior, pairs.cover.window.unsqueeze(-1)
    stddev = (prior.variance + prior.noise_variance).sqrt()
    level = pairs.cover.key[:, 0]
    assert prior.context.shape == (len(level), 2, 1 + 3 * NUM_LEVELS)
    for j in range(0, len(level), 7):
        expected = [torch.full((2,), float(level[j] - 1)).double()]  # -1, 0, 1: fine to coarse
        for other in range(NUM_LEVELS):
            there = (pairs.cover.index == pairs.cover.index[j]) & (level == other)
            w = window[there]
            mean = (w * (prior.mean[there] - prior.mean[j])).sum(0) / stddev[j]
            log = (w * (stddev[there] / stddev[j]).log()).sum(0)
            expected += [w.sum(0).expand(2), mean.asinh(), log]
        found = prior.context[j]
        torch.testing.assert_close(found, torch.stack(expected, -1), rtol=1e-6, atol=1e-6)


# Symmetries --------------------------------------------------------------------------------------


@DIMS
@pytest.mark.parametrize(('size', 'factor'), [(0.25, 3), (1.3, 3), (1.3, 6)])
def test_moving_everything_by_coarse_tiles_moves_the_prediction(dim, size, factor):
    grid = lattice(dim, tile_size=size, level_factor=factor)
    x, y = points(dim, n=23, spread=9 * size)
    x_target = targets(dim) * 15 * size / SPREAD[dim]
    if size == 0.25:  # hardly any rounding
        x, x_target = (torch.round(part * 2**20) / 2**20 for part in (x, x_target))
    move = torch.tensor([[2.0, -11.0, 3.0]])[:, :dim].double() * grid.spacing(NUM_LEVELS - 1)
    expected = world_of(x, y, geometry=grid)
    found = world_of(x + move, y, geometry=grid)
    exact = {'rtol': 1e-9, 'atol': 1e-9} if size == 0.25 else SAME_PREDICTION
    assert_same_prediction(found.predict(x_target + move), expected.predict(x_target), **exact)


@pytest.mark.parametrize('dim', [1, 2])
def test_an_offset_of_all_values_moves_the_mean_and_leaves_the_stddev(dim):
    model, (x, y) = model_of(dim, corrects=False), points(dim, n=211)
    x_target = targets(dim, factor=0.8)
    mean, stddev = world_of(x, y, model).predict(x_target)
    moved_mean, moved_stddev = world_of(x, y + 3.0, model).predict(x_target)
    assert ((moved_mean - 3.0 - mean) / stddev).abs().max() < 1e-2
    torch.testing.assert_close(moved_stddev, stddev, rtol=1e-2, atol=0)


@pytest.mark.parametrize('dim', [1, 2])
def test_scaling_values_and_their_prior_scales_the_prediction(dim):
    """Inside the known world, where the prior of mean 0 and stddev 1 has no say."""
    (x, y), factor = points(dim, 2), math.exp(2)  # a whole number of steps of a tile's prior
    x_target = targets(dim, factor=0.8)
    mean, stddev = world_of(x, y, model_of(dim, 2, corrects=False)).predict(x_target)
    model = model_of(dim, 2, corrects=False, amplitude_scale=0.3 * factor**2)
    scaled = world_of(x, factor * y, model).predict(x_target)
    assert_same_prediction(scaled, (factor * mean, factor * stddev), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('dim', [1, 2])
def test_outputs_do_not_know_of_each_other(dim):
    """Where the network leaves the regressions alone: only it relates outputs."""
    (x, y), x_target = points(dim, 2), targets(dim)
    both = world_of(x, y, model_of(dim, 2, corrects=False)).predict(x_target)
    for output in (0, 1):
        own = slice(output, output + 1)
        alone = world_of(x, y[:, own], model_of(dim, 1, corrects=False)).predict(x_target)
        assert_same_prediction([part[:, own] for part in both], alone)


def test_a_robot_that_saw_the_corner_of_a_slope_first_ends_with_the_same_map():
    x, _ = points(n=301)
    y = 100 * torch.tanh(x[:, :1]) + 0.01 * torch.sin(9 * x[:, 1:])
    corner = (x > 2.0).all(-1)
    made, x_target = world_of(x[corner], y[corner]), targets()
    made.predict(x_target)  # and keeps what it thought of the corner
    made.fold(x[~corner], y[~corner])
    mean, stddev = world_of(x, y).predict(x_target)
    found = made.predict(x_target)
    assert ((found[0] - mean) / stddev).abs().max() < 1e-4
    torch.testing.assert_close(found[1], stddev, rtol=1e-4, atol=0)


@pytest.mark.parametrize('ratio', [1e-2, 1e-3])
def test_local_relief_of_a_small_part_of_the_range_is_resolved(ratio):
    """The wave of 0.7 m is as long as a fine tile is wide; the hill is ten coarse tiles wide."""
    x, _ = points(1, n=1009, spread=30.0)

    def field(x):
        return torch.cos(x * 2 * torch.pi / 120), ratio * torch.sin(x * 2 * torch.pi / 0.7)

    hill, relief = field(x)
    noise = 1e-2 * ratio * torch.randn(len(x), 1, dtype=torch.float64)
    memory = LeastSquaresConfig(FUNCTIONS[1], voxels_per_axis=VOXELS[1])
    model = model_of(1, corrects=False, least_squares=memory)
    made = world_of(x, hill + relief + noise, model)
    x_target = (torch.rand(101, 1, dtype=torch.float64) - 0.5) * 25
    hill, relief = field(x_target)
    mean, stddev = made.predict(x_target)
    error = mean - hill - relief
    assert error.square().mean().sqrt() < 0.2 * relief.square().mean().sqrt()
    assert stddev.median() < 2 * ratio  # and it is known that little is left


# Seams -------------------------------------------------------------------------------------------


def border_of_the_coarsest(dim):
    """Return a coordinate [m] at which one of the coarsest tiles ceases to answer."""
    return ANSWERS * spacing(dim, NUM_LEVELS - 1)


def borders(dim, level, reach, around=0.0):
    """Return places (n, dim) where tiles of a level cease to answer, across the first axis."""
    h = spacing(dim, level)
    first, last = (int((around + side) / h) for side in (-reach, reach))
    ends = np.add.outer(np.arange(first - 2, last + 3), [-ANSWERS, ANSWERS]).ravel() * h
    ends = torch.tensor(ends[np.abs(ends - around) <= reach])
    x = around + (torch.rand(len(ends), dim, dtype=torch.float64) - 0.5) * reach
    x[:, 0] = ends
    return x


def largest_step(function, x, eps=5e-8):
    """
    Return the largest step of (mean, stddev) over places x, in stddev.
    """
    step = torch.zeros_like(x)
    step[:, 0] = eps
    (mean, stddev), (other, other_stddev) = function(x - step), function(x + step)
    return max(
        float(((mean - other) / stddev).abs().max()),
        float((stddev / other_stddev).log().abs().max()),
    )


@pytest.mark.parametrize(('dim', 'corrects'), [(1, True), (2, False), (2, True), (3, True)])
def test_inside_the_known_world_there_are_no_seams(dim, corrects):
    middle = border_of_the_coarsest(dim)
    made = world_of(*points(dim, n=101, around=middle), model_of(dim, corrects=corrects))
    for level in range(NUM_LEVELS):
        at = borders(dim, level, SPREAD[dim] / 4, middle)
        ends = where_tiles_change(made.geometry, at + 0.1 * SIZE[dim], level)
        assert largest_step(made.predict, torch.cat([at, ends])) < SEAMLESS
        moved = at + 0.01 * SIZE[dim]  # the measure itself
        assert largest_step(made.predict, moved, 1e-2) > SEAMLESS


@pytest.mark.parametrize(('dim', 'corrects'), [(1, False), (2, False), (2, True)])
def test_the_known_world_ends_without_a_seam(dim, corrects):
    """Data end where tiles of all levels do, so that they end one after the other."""
    x, y = points(dim, n=23, spread=2 * SIZE[dim])
    made = world_of(x - 1.01 * SIZE[dim], y + 100.0, model_of(dim, corrects=corrects))
    for level in range(NUM_LEVELS):
        at = borders(dim, level, 20 * SIZE[dim])
        at[:, 1:] = 3.7 * SIZE[dim]
        ends = where_tiles_change(made.geometry, at + 0.1 * SIZE[dim], level)
        assert largest_step(made.predict, torch.cat([at, ends])) < SEAMLESS


@DIMS
def test_far_from_all_data_the_answer_is_the_prior(dim):
    made = world_of(*points(dim))
    h = SIZE[dim] * FACTOR ** (NUM_LEVELS - 1)
    beyond = SPREAD[dim] / 2 + 2 * h
    x = torch.full((3, dim), 0.3, dtype=torch.float64)
    x[:, dim - 1] = torch.tensor([beyond, -beyond, 1e6])
    for mean, stddev in (made.predict(x), World(made.model, made.geometry).predict(x)):
        assert (mean == 0).all() and (stddev == 1).all()


@DIMS
def test_beyond_the_data_the_answer_goes_over_to_the_prior(dim):
    """Steps shrink with the distance between targets, all the way from data to nowhere."""
    made = world_of(*points(dim))
    h = SIZE[dim] * FACTOR ** (NUM_LEVELS - 1)

    def steps(count):
        x = torch.full((count, dim), 0.3, dtype=torch.float64)
        x[:, 0] = torch.linspace(0, SPREAD[dim] / 2 + 2 * h, count)
        mean, stddev = made.predict(x)
        assert mean[-1] == 0 and stddev[-1] == 1
        return max(mean.diff(dim=0).abs().max(), stddev.diff(dim=0).abs().max())

    assert steps(1001) < 0.3 * steps(101)


# Joint predictions and samples -------------------------------------------------------------------

AROUND_A_BORDER = [-0.9, -0.7, -0.3, -0.1, 0.1, 0.2, 0.8]  # [tile_size]


def near_the_origin(dim, dim_y=1):
    """Return a world and targets in tiles of negative index, of positive ones, and of none."""
    x, y = points(dim, dim_y, n=23, spread=2 * SIZE[dim])
    x_target = torch.full((11, dim), 0.3, dtype=torch.float64)
    x_target[:7, 0] = torch.tensor(AROUND_A_BORDER)
    x_target[7:, 0] = torch.tensor([-0.3, 5.0, 6.0, 40.0])  # one of them twice
    return world_of(x, y), x_target * SIZE[dim]


@pytest.mark.parametrize(('dim', 'dim_y'), [(1, 1), (2, 2), (3, 1)])
def test_the_joint_covariance_has_the_variances_of_predict_and_is_one(dim, dim_y):
    made, x_target = near_the_origin(dim, dim_y)
    mean, stddev = made.predict(x_target)
    joint_mean, joint_stddev, covariance = made.predict_joint(x_target)
    assert covariance.shape == (dim_y, 11, 11)
    assert_same_prediction((joint_mean, joint_stddev), (mean, stddev))
    torch.testing.assert_close(covariance.diagonal(dim1=1, dim2=2).mT, stddev.square())
    torch.testing.assert_close(covariance, covariance.mT, rtol=0, atol=1e-12)
    scale = covariance.diagonal(dim1=1, dim2=2).max()
    assert torch.linalg.eigvalsh(covariance).min() > -1e-6 * scale


def test_targets_of_the_prior_alone_share_all_its_variance():
    made = world_of(*points(n=0))
    mean, stddev, covariance = made.predict_joint(targets(n=3))
    assert (mean == 0).all() and (stddev == 1).all()
    torch.testing.assert_close(covariance, torch.ones(1, 3, 3).double())


def test_without_a_regression_targets_are_independent():
    made = world_of(*points(), model=model_of(kind='paper'))
    _, stddev, covariance = made.predict_joint(targets())
    torch.testing.assert_close(covariance, torch.diag_embed(stddev.square().mT))


def field_covariance(made, x_target):
    """
    Return mean and covariance of the field, without noise: what two observations share.
    """
    n = len(x_target)
    mean, _, covariance = made.predict_joint(torch.cat([x_target, x_target]))
    return mean[:n], covariance[:, :n, n:]


@pytest.mark.parametrize(('dim', 'dim_y'), [(1, 1), (2, 2), (3, 1)])
def test_samples_have_the_mean_and_the_covariance_of_the_joint_prediction(dim, dim_y):
    """With S samples a covariance is off by sqrt((Cii Cjj + Cij^2) / S): five of these are far."""
    made, x_target = near_the_origin(dim, dim_y)
    mean, covariance = field_covariance(made, x_target)
    number = 4001
    samples = made.sample(x_target, number, seed=5)
    assert samples.shape == (number, 11, dim_y)
    for output in range(dim_y):
        expected, found = covariance[output], samples[..., output].T
        variance = expected.diagonal()
        error = (torch.cov(found) - expected).abs()
        far = 5 * ((variance.outer(variance) + expected.square()) / number).sqrt()
        assert (error < far + 1e-6).all()
        error = (found.mean(1) - mean[:, output]).abs()
        assert (error < 5 * (variance / number).sqrt() + 1e-6).all()


def test_one_seed_is_one_field_wherever_and_in_whatever_chunks(monkeypatch):
    made, x_target = world_of(*points(2, 2)), targets()
    expected = made.sample(x_target, 3, seed=5)
    parts = [made.sample(part, 3, seed=5) for part in x_target.split(5)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, **SAME_PREDICTION)
    order = torch.randperm(N_TARGET)
    torch.testing.assert_close(
        made.sample(x_target[order], 3, seed=5), expected[:, order], **SAME_PREDICTION
    )
    monkeypatch.setattr(world, 'TARGETS_AT_ONCE', 7)
    torch.testing.assert_close(made.sample(x_target, 3, seed=5), expected, **SAME_PREDICTION)
    other = made.sample(x_target, 3, seed=6)
    assert ((other - expected).abs() > 1e-3).any(1).all()  # another seed, other fields
    assert (expected.diff(dim=0).abs() > 1e-3).any(1).all()


def test_sampling_leaves_the_random_numbers_of_others_alone():
    made, x_target = world_of(*points()), targets()
    torch.manual_seed(3)
    expected = torch.rand(5)
    torch.manual_seed(3)
    made.sample(x_target, 3, seed=5)
    assert torch.equal(torch.rand(5), expected)


def test_a_sample_changes_little_where_the_data_do():
    """One seed is one field for whoever has the same map, though summed in another order."""
    (x, y), x_target = points(), targets()
    expected = world_of(x, y).sample(x_target, 5, seed=3)
    found = world_of(x, y + 1e-7 * torch.randn_like(y)).sample(x_target, 5, seed=3)
    assert (found - expected).abs().max() < 1e-3


@DIMS
def test_samples_have_no_seams(dim):
    middle = border_of_the_coarsest(dim)
    made = world_of(*points(dim, around=middle))
    for level in range(NUM_LEVELS):
        at = borders(dim, level, SPREAD[dim] / 4, middle)
        assert largest_step(lambda x: (made.sample(x, 5, seed=3), torch.ones(1)), at) < SEAMLESS


# Cost --------------------------------------------------------------------------------------------


@pytest.fixture
def solved(monkeypatch):
    """Count tiles that are solved, by step; steps of which others are made do not count."""
    counts, running = {}, []

    def counting(owner, name, size):
        original = getattr(owner, name)
        counts[name] = 0

        def counted(*args, **kwargs):
            counts[name] += 0 if running else size(*args)
            running.append(name)
            try:
                return original(*args, **kwargs)
            finally:
                running.pop()

        monkeypatch.setattr(owner, name, counted)

    counting(least_squares, 'evidence', lambda _, __, sums: len(sums.count))
    counting(outliers, 'posterior', lambda _, __, sums, *___: len(sums.count))
    counting(CMANP, 'latents', lambda _, sums: len(sums.logsumexp))

    def take():
        taken = dict(counts)
        counts.update(dict.fromkeys(counts, 0))
        return taken

    return take


@pytest.mark.parametrize('dim', [1, 2])
def test_one_target_costs_the_same_in_a_large_world(solved, dim):
    x, y = around_the_origin(dim)
    x_target = torch.full((1, dim), 0.45 * SIZE[dim], dtype=torch.float64)  # of two along an axis
    small, large = world_of(x, y), world_of(x, y)
    away = 20 * spacing(dim, NUM_LEVELS - 1)
    for far in (away, -away, 2 * away):
        large.fold(x + far, y)
    assert len(large.tiles) > 3 * len(small.tiles)
    small.predict(x_target)
    cost = solved()
    covering = len(small.geometry.answering(x_target).key)
    assert covering == NUM_LEVELS - 1 + 2**dim
    assert cost['posterior'] == cost['latents'] == covering
    large.predict(x_target)
    assert solved() == cost


def test_nothing_is_solved_again_before_something_changes(solved):
    made, x_target = world_of(*points()), targets()
    made.predict(x_target)
    assert all(solved().values())
    made.predict(x_target)
    made.predict(x_target[:3])
    assert not any(solved().values())
    made.predict_joint(x_target)
    made.sample(x_target, 2, seed=3)
    again = solved()
    assert again['evidence'] == again['latents'] == 0
    assert again['posterior']  # covariances are not kept: they are larger than the states


def test_one_more_point_has_its_own_tiles_solved_again_and_hardly_others(solved):
    """Evidence and amplitudes around it change a little; what they decide rarely does."""
    x, y = points(n=400)
    made = world_of(x, y)
    made.predict(x)
    num_tiles, again, own = solved()['posterior'], [], []
    for i in range(9):
        made.fold(x[i : i + 1] + 0.01, y[i : i + 1])
        made.predict(x)
        cost = solved()
        own.append(len(made.geometry.cover(x[i : i + 1] + 0.01).key))
        assert cost['evidence'] == own[-1]
        again.append(cost['posterior'])
    assert np.mean(again) < 1.5 * np.mean(own) < num_tiles / 3


def test_who_cannot_wait_is_answered_from_what_was_solved_last():
    x, y = points()
    made, x_target = world_of(x, y), targets()
    before = made.predict(x_target)
    made.fold(x, y + 1.0)
    assert_same_prediction(made.predict(x_target, renew=False), before)
    expected = world_of(torch.cat([x, x]), torch.cat([y, y + 1.0])).predict(x_target)
    assert_same_prediction(made.predict(x_target), expected)
    assert (expected[0] - before[0]).abs().max() > 0.1


def test_who_cannot_wait_still_gets_what_was_never_solved():
    x, y = points()
    made, x_target = world_of(x, y), targets()
    found = made.predict(x_target, renew=False)
    assert_same_prediction(found, made.predict(x_target), rtol=0, atol=0)


def test_what_was_asked_for_is_refreshed_in_steps_for_a_while_and_nothing_else(
    solved, monkeypatch
):
    monkeypatch.setattr(world, 'REMEMBERED', 2)
    x, y = points()
    made, x_target = world_of(x, y), targets()
    batches = made.tiles_over(x, 8)
    assert sorted(key for some in batches for key in some) == made.tiles.keys()
    assert all(len(some) <= 8 for some in batches)
    for asks, is_solved in ((False, False), (True, True), (False, True), (False, False)):
        if asks:
            made.predict(x_target)
        made.fold(x, y + 1.0)
        solved()
        for some in batches:
            made.refresh(made.asked(some))
        assert bool(solved()['posterior']) == is_solved


def test_tiles_beside_those_that_somebody_asked_for_are_expected_to_be_asked_for(solved):
    x, y = points()
    made, x_target = world_of(x, y), targets()
    keys = made.tiles.keys()
    assert made.expect(keys) == []
    made.predict(x[:1])
    assert 0 < len(made.asked(keys)) < len(keys)
    for _ in range(2):  # still so after observations, and solved without being asked for
        made.fold(x, y + 1.0)
        assert made.expect(keys) == keys
        made.refresh(made.expect(keys))
        solved()
    found = made.predict(x_target, renew=False)
    assert not any(solved().values())
    assert_same_prediction(found, made.predict(x_target))


def test_who_cannot_wait_gets_no_answer_from_before_the_last_refresh(monkeypatch):
    monkeypatch.setattr(world, 'REMEMBERED', 1)
    x, y = points()
    made, x_target = world_of(x, y), targets()
    made.predict(x_target)
    for _ in range(2):
        made.fold(x, y + 1.0)
        for some in made.tiles_over(x, 8):
            made.refresh(made.asked(some))
    found = made.predict(x_target, renew=False)  # nobody asked before the second fold
    assert_same_prediction(found, made.predict(x_target))


def test_tiles_that_were_paged_out_are_solved_again_wherever_they_come_back(new_store):
    x, y = points()
    far, x_target = x + 1000 * SIZE[2], targets()
    made = world_of(x, y, max_tiles=len(world_of(x, y).tiles), store=new_store())
    before, held = made.predict(x_target), set(made.tiles.keys_in_memory)
    made.fold(far, y)
    made.predict(far)  # in the rows that these tiles had
    assert not held & set(made.tiles.keys_in_memory)
    assert_same_prediction(made.predict(x_target, renew=False), before)


@pytest.mark.parametrize('change', ['merge', 'undo', 'clear', 'load'])
def test_nobody_is_answered_from_a_map_that_is_gone(change):
    x, y = points()
    made = World(model_of(), lattice(), undo_window_sec=10.0)
    made.tiles.history.mark(0.0, made.tiles.totals)
    made.fold(x[:30], y[:30])
    other, x_target = world_of(x[30:], y[30:]), targets()
    made.predict(x_target)
    if change == 'undo':
        made.undo(5.0, 1.0)
    elif change == 'load':
        made.load(*other.export(), other.num_observations)
    else:
        made.merge(other) if change == 'merge' else made.clear()
    found = made.predict(x_target, renew=False)
    assert_same_prediction(found, made.predict(x_target), rtol=0, atol=0)


def elsewhere(made, job):
    """Return the solution of a job by another solver."""
    return Solver(made.model, made.geometry).solve(job.request)


def being_solved(x, y, x_target):
    """Return a world of y, y + 1 and y - 3, and a job that was begun before the last of these."""
    made = world_of(x, y)
    made.predict(x_target)
    made.fold(x, y + 1.0)
    job = made.begin_refresh(made.asked(made.tiles.keys()))
    made.fold(x, y - 3.0)
    return made, job


def test_tiles_solved_while_more_is_folded_are_what_they_were_when_it_began(solved):
    (x, y), x_target = points(), targets()
    made, job = being_solved(x, y, x_target)
    made.end_refresh(job, elsewhere(made, job))
    solved()
    found = made.predict(x_target, renew=False)
    assert not any(solved().values())
    before, whole = (World(made.model, made.geometry) for _ in range(2))
    for world_, values in ((before, (y, y + 1.0)), (whole, (y, y + 1.0, y - 3.0))):
        for value in values:
            world_.fold(x, value)
    assert_same_prediction(found, before.predict(x_target))
    assert_same_prediction(made.predict(x_target), whole.predict(x_target))


def test_who_is_no_longer_asked_for_when_a_solution_comes_is_solved_for_the_next(monkeypatch):
    monkeypatch.setattr(world, 'REMEMBERED', 1)
    x_target = targets()
    made, job = being_solved(*points(), x_target)
    made.end_refresh(job, elsewhere(made, job))
    found = made.predict(x_target, renew=False)  # nothing else would solve them again
    assert_same_prediction(found, made.predict(x_target))


def hurried(x, y, more):
    """Return a world that was asked for everywhere, and then solved in a hurry for more points."""
    made = world_of(x, y)
    made.predict(x)
    made.fold(x[:more], y[:more] + 1.0)
    made.refresh(made.asked(made.tiles.keys()), in_a_hurry=True)
    return made


def test_in_a_hurry_tiles_keep_hyperparameters_and_have_all_observations(solved, monkeypatch):
    """Their weights are those that the earlier evidence gives, for the sums of now."""
    monkeypatch.setattr(world, 'GROWTH', 1e9)
    (x, y), x_target = points(n=200), targets()
    made = world_of(x, y)
    made.predict(x)
    keys = made.asked(made.tiles.keys())
    rows = made.tiles.rows(keys)
    *_, scale, weight = made._regression.get(rows)
    made.fold(x[:3], y[:3] + 1.0)
    solved()
    made.refresh(made.asked(made.tiles.keys()), in_a_hurry=True)
    found = made.predict(x_target, renew=False)
    cost, (mean, *_, scale_then, weight_then) = solved(), made._regression.get(rows)
    assert cost['evidence'] == 0 < cost['posterior'] and cost['latents'] > 0
    assert torch.equal(scale, scale_then) and torch.equal(weight, weight_then)
    for i, (level, *_) in enumerate(keys):
        own, sums = slice(i, i + 1), made.tiles.least_squares(rows[i : i + 1])
        expected = made._solver.posterior(level, sums, scale[own], weight[own])
        torch.testing.assert_close(mean[own], expected.mean, rtol=1e-5, atol=1e-6)
    assert (found[0] - world_of(x, y).predict(x_target)[0]).abs().max() > 1e-3


def test_what_was_solved_in_a_hurry_is_exact_for_who_waits_and_once_it_is_settled(solved):
    (x, y), x_target = points(n=200), targets()
    expected = world_of(torch.cat([x, x[:3]]), torch.cat([y, y[:3] + 1.0])).predict(x_target)
    assert_same_prediction(hurried(x, y, 3).predict(x_target), expected)
    made = hurried(x, y, 3)
    assert (made.predict(x_target, renew=False)[1] - expected[1]).abs().max() > 1e-6
    while tiles := made.unsettled(8):
        made.refresh(tiles)
    solved()
    found = made.predict(x_target, renew=False)
    assert not any(solved().values())
    assert_same_prediction(found, expected)
    assert_same_prediction(made.predict(x_target), expected)
    assert not any(solved().values())


@pytest.mark.parametrize('count', [1, 100])
def test_in_a_hurry_too_evidence_is_found_where_points_are_a_tenth_more(solved, count):
    x, y = points(n=200)
    made = world_of(x, y)
    made.predict(x)
    rows = made.tiles.rows(made.tiles.keys())
    before = made.tiles.count(rows)
    made.fold(x[:1].expand(count, -1), y[:1].expand(count, -1))
    after = made.tiles.count(rows)
    solved()
    made.refresh(made.asked(made.tiles.keys()), in_a_hurry=True)
    grown = int((after > 1.1 * before).sum())
    assert solved()['evidence'] == grown
    assert (grown < int((after > before).sum())) == (count == 1)


@pytest.mark.parametrize('change', ['merge', 'undo', 'page'])
def test_in_a_hurry_no_evidence_of_another_map_or_tile_counts(change, new_store, monkeypatch):
    monkeypatch.setattr(world, 'GROWTH', 1e9)
    (x, y), x_target = points(), targets()
    room = len(world_of(x, y).tiles)
    made = World(model_of(), lattice(), room, new_store(), undo_window_sec=10.0)
    made.tiles.history.mark(0.0, made.tiles.totals)
    made.fold(x[:30], y[:30])
    made.predict(x_target)
    if change == 'page':
        far = x + 1000 * SIZE[2]
        made.fold(far, y + 7.0)
        made.predict(far, renew=False)  # in the rows that these tiles had
        made.fold(x[30:], y[30:])
    else:
        made.merge(world_of(x[30:], y[30:])) if change == 'merge' else made.undo(5.0, 1.0)
    found = made.predict(x_target, renew=False)
    assert_same_prediction(found, made.predict(x_target))


def test_tiles_that_are_no_longer_in_memory_need_not_be_settled(new_store):
    x, y = points()
    made = hurried(x, y, 3)
    assert not made.is_settled and made.unsettled(9)
    made.clear()
    assert not made.unsettled(9) and made.is_settled
    made = World(model_of(), lattice(), len(world_of(x, y).tiles), new_store())
    made.fold(x, y)
    made.predict(x)
    made.fold(x, y)
    made.refresh(made.asked(made.tiles.keys()), in_a_hurry=True)
    assert not made.is_settled and made.unsettled(9)
    far = x + 1000 * SIZE[2]
    made.fold(far, y)
    made.predict(far)
    assert not made.unsettled(9) and made.is_settled


def test_tiles_that_are_expected_are_forgotten_with_those_that_were_asked_for(monkeypatch):
    monkeypatch.setattr(world, 'REMEMBERED', 5)
    x, y = points()
    made = world_of(x, y)
    keys, count = made.tiles.keys(), 0
    made.predict(x[:1])
    while made.expect(keys):
        if count == 3:
            made.predict(x[:1])
        made.fold(x, y)
        made.refresh(made.expect(keys))
        count += 1
        assert count < 20
    assert count == 8


def test_tiles_without_a_regression_that_are_only_in_a_store_are_predicted(new_store):
    x, y = points()
    model = model_of(kind='paper')
    store, geometry = new_store(), OneTile((-9.0, -9.0), (9.0, 9.0))
    made = World(model, geometry, store=store)
    made.fold(x, y)
    expected = made.predict(x)
    made.tiles.flush()
    assert_same_prediction(World(model, geometry, store=store).predict(x), expected)


def test_tiles_solved_elsewhere_and_here_meanwhile_are_solved_again_for_who_waits():
    x_target = targets()
    made, job = being_solved(*points(), x_target)
    expected = made.predict(x_target)
    made.end_refresh(job, elsewhere(made, job))
    assert_same_prediction(made.predict(x_target), expected)


@pytest.mark.parametrize('change', ['merge', 'undo', 'clear', 'load', 'page'])
def test_tiles_solved_for_a_map_that_is_gone_are_left_out(change, new_store):
    x, y = points()
    room = len(world_of(x, y).tiles)
    made = World(model_of(), lattice(), room, new_store(), undo_window_sec=10.0)
    made.tiles.history.mark(0.0, made.tiles.totals)
    made.fold(x[:30], y[:30])
    x_target, other = targets(), world_of(x[30:], y[30:])
    made.predict(x_target)
    made.fold(x[:1], y[:1] + 1.0)
    job = made.begin_refresh(made.asked(made.tiles.keys()))
    {
        'merge': lambda: made.merge(other),
        'undo': lambda: made.undo(5.0, 1.0),
        'clear': made.clear,
        'load': lambda: made.load(*other.export(), other.num_observations),
        'page': lambda: made.predict(x[:1] + 1000 * SIZE[2]) and made.fold(x + 1e4, y),
    }[change]()
    made.end_refresh(job, elsewhere(made, job))
    keys, state = made.export()
    expected = World(model_of(), lattice())
    expected.load(keys, state, made.num_observations)
    found = made.predict(x_target, renew=False)
    assert_same_prediction(found, expected.predict(x_target))


def test_only_tiles_near_a_point_are_solved_again(solved):
    """A road of 40 coarse tiles: what is far from the new point stays as it is."""
    h = SIZE[1] * FACTOR ** (NUM_LEVELS - 1)
    x, y = points(1, n=151, spread=40 * h)
    made = world_of(x, y)
    made.predict(x)
    everything = solved()
    made.fold(x[:1], y[:1])
    made.predict(x)
    again = solved()
    covering = len(made.geometry.cover(x[:1]).key)
    assert again['evidence'] == again['latents'] == covering > NUM_LEVELS
    keys = torch.tensor(made.tiles.keys())
    near = (made.geometry.center(keys)[:, 0] - x[0]).abs() < 4 * h
    solved_again = again['posterior']
    assert again['latents'] <= solved_again <= int(near.sum()) < everything['posterior'] / 3


def test_tiles_are_found_where_they_begin_and_end():
    geometry, (x, _) = lattice(2), points(2)
    found = where_tiles_change(geometry, x, 1)
    before, after = found - 1e-9, found + 1e-9
    for i in range(len(x)):
        sides = [
            {*map(tuple, geometry.answering(at[i : i + 1]).key.tolist())} for at in (before, after)
        ]
        assert {key for key in sides[0] ^ sides[1] if key[0] == 1}
    assert ((found - x)[:, 0] > 0).all() and ((found - x)[:, 0] < geometry.spacing(1)).all()
    assert torch.equal(found[:, 1], x[:, 1])


def test_forgetting_solves_what_is_looked_at_and_no_more(solved):
    made, x_target = world_of(*points()), targets(n=1)
    made.predict(x_target)
    first = solved()
    made.tiles.forget(0.5)
    assert not any(solved().values())
    made.predict(x_target)
    assert solved() == first


# One tile ----------------------------------------------------------------------------------------


@pytest.mark.parametrize('dim', [1, 3])
@pytest.mark.parametrize('kind', ['paper', 'field'])
def test_one_tile_is_the_model_alone(dim, kind):
    model = model_of(dim, kind=kind)
    x, y = points(dim)
    half = SPREAD[dim] / 2
    made = world_of(x, y, model, OneTile((-half,) * dim, (half,) * dim))
    state = model.update(model.init_state(1), (2 * x / half).unsqueeze(0), y.unsqueeze(0))
    x_target = targets(dim, factor=1.0)
    expected = model.predict(state, (2 * x_target / half).unsqueeze(0))
    found = made.predict(x_target)
    assert_same_prediction(found, (expected.mean[0], expected.stddev[0]))
    assert len(made.tiles) == 1
