"""Tasks come from the stated priors, batches and runs repeat exactly, interrupted or not."""

import csv
from dataclasses import replace
from math import sqrt

import numpy as np
import pytest
import small_models
import torch

import cmanp_ros.core.world
from cmanp_ros.checkpoint import load_model, read_extra
from cmanp_ros.core import CMANP, Lattice, World
from cmanp_ros.core.errors import ConfigError
from cmanp_ros.training import batches, loop, priors
from cmanp_ros.training.batches import Batch, Batches, augment, world_batch
from cmanp_ros.training.loop import TrainingConfig, batch_log_likelihood, train
from cmanp_ros.training.priors import WorldTask

BATCH, N_TARGET = 8, 5
EXACT = {'rtol': 1e-9, 'atol': 1e-9}


def seeded(seed=3):
    return torch.Generator().manual_seed(seed)


# Priors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize('dim_x', [1, 2, 3])
def test_worlds_are_finite_and_follow_the_generator(dim_x):
    for seed in range(101):
        first, again, other = (
            priors.world_task(seeded(s), 13, N_TARGET, dim_x) for s in (seed, seed, seed + 1)
        )
        assert first.x_context.shape[1:] == (dim_x,) and len(first.x_context) <= 13
        assert first.y_context.shape == (len(first.x_context), 1)
        assert first.x_target.shape == (N_TARGET, dim_x)
        assert first.y_target.shape == (N_TARGET, 1)
        for name in WorldTask._fields:
            value = getattr(first, name)
            assert value.isfinite().all() and value.dtype == torch.float64
            assert torch.equal(value, getattr(again, name))
        assert not torch.equal(first.y_target, other.y_target)


def test_worlds_are_seen_as_often_by_few_readings_as_by_many():
    generator = seeded()
    sizes = np.array([len(priors.world_task(generator, 499, 2).x_context) for _ in range(211)])
    assert 0 < (sizes == 0).mean() < 0.1 and sizes.max() <= 499
    position = np.log(sizes[sizes > 0]) / np.log(500)
    for low in (0.2, 0.4, 0.6, 0.8):
        assert abs((position > low).mean() - (1 - low)) < 0.1


def test_worlds_have_amplitudes_over_two_decades_and_offsets_beyond_them():
    tasks = [priors.world_task(seeded(seed), 1, 101) for seed in range(211)]
    deviation = np.array([task.y_target.std() for task in tasks])
    low, high = np.quantile(deviation, (0.05, 0.95))
    assert high / low > 30
    offset = np.array([task.y_target.mean().abs() for task in tasks])
    assert 0.2 < (offset > 2 * deviation).mean() < 0.8


@pytest.mark.parametrize('lag', [0.2, 1.0, 2.5])
@pytest.mark.parametrize('smoothness', [0.5, 1.5, 2.5, torch.inf])
def test_fields_of_training_tasks_have_the_stated_variogram(smoothness, lag):
    batch, pairs, length = 101, 211, 0.7
    x = 1000 * torch.rand(batch, pairs, 2, dtype=torch.float64)
    step = torch.randn(x.shape, dtype=torch.float64)
    step = lag * length * step / step.norm(dim=-1, keepdim=True)
    lengths = torch.full((batch,), length).double()
    smoothnesses = torch.full((batch,), smoothness)
    both = torch.cat([x, x + step], 1)
    here, there = priors._random_field(seeded(), both, smoothnesses, lengths).chunk(2, 1)
    if smoothness == torch.inf:
        correlation = np.exp(-(lag**2) / 2)
    else:
        z = sqrt(2 * smoothness) * lag
        polynomial = {0.5: 1, 1.5: 1 + z, 2.5: 1 + z + z**2 / 3}[smoothness]
        correlation = polynomial * np.exp(-z)
    found = (here - there).square().mean() / 2
    np.testing.assert_allclose(found, 1 - correlation, rtol=0.1)


# Batches -----------------------------------------------------------------------------------------


def make_batches(folder, dim_x=2, seed=5, **overrides):
    sizes = {'num_batches': 7, 'batch_size': 4, 'max_context': 13, 'num_target': N_TARGET}
    return Batches(small_models.field(dim_x), folder, **sizes | {'seed': seed} | overrides)


def test_batches_are_functions_of_seed_and_index(tmp_path):
    one, other = make_batches(tmp_path / 'one'), make_batches(tmp_path / 'other')
    for index in (0, 3, 6):
        one[index]
    for index in (6, 3, 0):
        found, expected = other[index], one[index]
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
    changed = make_batches(tmp_path / 'changed', seed=6)[3]
    assert not torch.equal(changed['y_target'], one[3]['y_target'])
    assert not torch.equal(one[0]['y_target'], one[3]['y_target'])
    assert len(one) == 7


def test_batches_are_made_once_and_then_read(tmp_path, monkeypatch):
    dataset = make_batches(tmp_path)
    first = dataset[2]
    monkeypatch.setattr(dataset, 'make', lambda index: pytest.fail('made again'))
    again = dataset[2]
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert [path.name for path in tmp_path.iterdir()] == ['000002.safetensors']


@pytest.mark.parametrize('dim_x', [1, 2])
def test_batches_hold_float32_and_finite_numbers(tmp_path, dim_x):
    dataset = make_batches(tmp_path, dim_x)
    for index in range(len(dataset)):
        batch = Batch(**dataset[index])
        numbers = [part for part in batch if part.is_floating_point()]
        assert {part.dtype for part in numbers} == {torch.float32} and len(numbers) == 10
        assert all(part.isfinite().all() for part in numbers)
        num_pairs = len(batch.pair_tile)
        for part in (*batch[3:8], *batch.prior):
            assert len(part) == num_pairs
        assert batch.prior.mean.shape == batch.prior.variance.shape == (num_pairs, 1)
        assert batch.y_target.shape == (4 * N_TARGET, 1)
        assert (batch.pair_x.abs() <= 2).all() and (batch.point_x.abs() <= 2).all()


def test_every_tile_of_a_batch_is_asked_and_has_points(tmp_path):
    dataset, num_tiles = make_batches(tmp_path), 0
    for index in range(len(dataset)):
        batch = Batch(**dataset[index])
        asked, folded = batch.pair_tile.unique(), batch.point_tile.unique()
        assert torch.equal(asked, folded)
        assert torch.equal(asked, torch.arange(len(asked)))
        num_tiles += len(asked)
    assert num_tiles > 7 * 4


def a_world(dim_x, num_context=13):
    """Return a world that was seen from a few places."""
    generator = seeded()
    while True:
        task = priors.world_task(generator, 101, N_TARGET, dim_x)
        if len(task.x_context) >= num_context:
            return task._replace(
                x_context=task.x_context[:num_context], y_context=task.y_context[:num_context]
            )


def alteration(batch, seed):
    """Return the matrix of locations, scale and shift of values by which a seed augments."""
    dim_x = batch.pair_x.shape[1]
    probe = batch._replace(
        pair_x=torch.eye(dim_x).double(), y_target=torch.tensor([[0.0], [1.0]]).double()
    )
    found = augment(probe, seeded(seed))
    zero, one = found.y_target[:, 0].tolist()
    return found.pair_x, one - zero, zero


def altered(task, matrix, scale, shift):
    """Return the task that is seen with other axes, in other units."""
    return WorldTask(
        task.x_context @ matrix,
        task.y_context * scale + shift,
        task.x_target @ matrix,
        task.y_target * scale + shift,
    )


def paired(batch):
    """Return the order of pairs in which those of other batches of this world come too."""
    columns = [batch.pair_x, batch.prior.context[:, 0, :1], batch.pair_target.double()[:, None]]
    return torch.from_numpy(np.lexsort(torch.cat(columns, 1).numpy().round(6).T))


def assert_same_worlds(found, expected):
    """Compare batches whose tiles come in another order; covariances were float32."""
    torch.testing.assert_close(found.y_target, expected.y_target, **EXACT)
    order, other = paired(found), paired(expected)
    for name in ('pair_target', 'pair_x', 'pair_window', 'pair_level'):
        own, theirs = getattr(found, name)[order], getattr(expected, name)[other]
        torch.testing.assert_close(own, theirs, **EXACT)
    stddev = (expected.variance + expected.noise_variance).sqrt()[other]
    deviation = (found.mean[order] - expected.mean[other]) / stddev
    assert deviation.abs().max() < 1e-6
    for name, tolerance in (('variance', 3e-4), ('noise_variance', 1e-5)):
        own, theirs = getattr(found, name)[order], getattr(expected, name)[other]
        torch.testing.assert_close(own, theirs, rtol=tolerance, atol=0)
    for name, tolerance in (('summary', 1e-6), ('context', 3e-4)):
        own, theirs = getattr(found, name)[order], getattr(expected, name)[other]
        torch.testing.assert_close(own, theirs, rtol=tolerance, atol=tolerance)
    tiles = {
        *zip(found.pair_tile[order].tolist(), expected.pair_tile[other].tolist(), strict=True)
    }
    assert len(tiles) == len(found.pair_tile.unique()) == len(expected.pair_tile.unique())
    for tile, same in tiles:
        own, theirs = points_of(found, tile), points_of(expected, same)
        torch.testing.assert_close(own, theirs, **EXACT)


def points_of(batch, tile):
    """Return the points (n, dim_x + 1) of a tile, in an order of their own."""
    points = torch.cat([batch.point_x, batch.point_y], 1)[batch.point_tile == tile]
    return points[np.lexsort(points.numpy().round(6).T)]


@pytest.mark.parametrize('levels', [1, 3])
@pytest.mark.parametrize('dim_x', [1, 2, 3])
def test_the_prior_of_an_augmented_task_is_the_augmented_prior(monkeypatch, dim_x, levels):
    # But for what is absolute: the amplitude prior of the coarsest level, which the altered task
    # has in its own units here, and steps of scale.
    monkeypatch.setattr(cmanp_ros.core.world, 'SCALE_STEP', 1e-9)
    config = small_models.field(dim_x)
    memory = config.least_squares
    task, seen = a_world(dim_x), set()
    task = task._replace(  # some targets lie in the finest tiles, too
        x_target=torch.cat([task.x_target, task.x_context[:3] + 0.1]),
        y_target=torch.cat([task.y_target, task.y_context[:3]]),
    )
    batch = world_batch(CMANP(config), task, levels)
    for seed in range(5):
        matrix, scale, shift = alteration(batch, seed)
        unit = replace(memory, amplitude_scale=memory.amplitude_scale * scale**2)
        model = CMANP(replace(config, least_squares=unit))
        solved = world_batch(model, altered(task, matrix, scale, shift), levels)
        assert_same_worlds(augment(batch, seeded(seed)), solved)
        seen.add((torch.equal(matrix.abs(), torch.eye(dim_x)), scale < 0, shift == 0))
    assert len(seen) > 2


def test_augmenting_follows_the_generator_and_keeps_the_rest():
    batch = world_batch(CMANP(small_models.field(2)), a_world(2), 3)
    first, again, other = (augment(batch, seeded(seed)) for seed in (1, 1, 2))
    for name in Batch._fields:
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert not torch.equal(first.y_target, other.y_target)
    distance = torch.cdist(batch.pair_x, batch.point_x)
    torch.testing.assert_close(torch.cdist(first.pair_x, first.point_x), distance)
    for name in ('point_tile', 'pair_tile', 'pair_target', 'pair_window', 'pair_level'):
        assert torch.equal(getattr(first, name), getattr(batch, name))
    assert torch.equal(first.summary, batch.summary)


def test_augmented_values_are_flipped_shifted_and_scaled_by_up_to_two():
    batch = world_batch(CMANP(small_models.field(2)), a_world(2), 1)
    found = [alteration(batch, seed) for seed in range(211)]
    axes = {tuple(matrix.flatten().tolist()) for matrix, _, _ in found}
    assert len(axes) == 8  # all ways to turn and to mirror a square
    scales, shifts = np.array([part[1:] for part in found]).T
    assert scales.min() < -1.9 and scales.max() > 1.9 and np.abs(scales).max() <= 2
    assert 0.5 <= np.abs(scales).min() < 0.55
    assert 0.3 < (shifts == 0).mean() < 0.7 and np.abs(shifts).max() > 1.5


# Training ----------------------------------------------------------------------------------------


def prediction_log_likelihood(model, task, levels):
    """Return the log-likelihood of each target, as a world predicts it."""
    geometry = Lattice(1.0, model.config.dim_x, levels, model.config.level_factor)
    world = World(model, geometry)
    world.fold(task.x_context, task.y_context)
    mean, stddev = world.predict(task.x_target)
    return torch.distributions.Normal(mean, stddev).log_prob(task.y_target)


@pytest.mark.parametrize('levels', [1, 3])
@pytest.mark.parametrize('num_context', [0, 1, 13])
def test_training_scores_what_prediction_predicts(num_context, levels):
    model, task = small_models.build(small_models.field(2)), a_world(2, num_context)
    found = batch_log_likelihood(model, world_batch(model, task, levels))
    expected = prediction_log_likelihood(model, task, levels)
    torch.testing.assert_close(found, expected, **EXACT)


def test_training_without_the_regression_scores_what_prediction_predicts():
    model = small_models.build(small_models.field(2, least_squares=None))
    task = a_world(2, 13)
    batch = world_batch(CMANP(small_models.field(2)), task, 3)  # the tiles are the same
    found = batch_log_likelihood(model, batch)
    expected = prediction_log_likelihood(model, task, 3)
    torch.testing.assert_close(found, expected, **EXACT)


def test_training_scores_every_world_of_a_batch_on_its_own(tmp_path, monkeypatch):
    dataset, drawn = make_batches(tmp_path, batch_size=5, max_context=101), []

    def spy(model, task, levels):
        drawn.append((task, levels))
        return world_batch(model, task, levels)

    monkeypatch.setattr(batches, 'world_batch', spy)
    batch = Batch(**dataset[2])
    assert len(drawn) == 5
    model = small_models.build(dataset.config, torch.float32)
    found = batch_log_likelihood(model, batch)
    expected = [prediction_log_likelihood(model, *world) for world in drawn]
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-3, atol=1e-3)


def test_targets_far_below_the_rest_weigh_less_and_the_others_as_they_are():
    log_likelihood = torch.tensor([3.0, 0.0, -10.0, -11.0, -1e6], requires_grad=True)
    softened = loop._soften(log_likelihood)
    assert torch.equal(softened[:3], log_likelihood[:3])
    assert (softened.diff() < 0).all() and softened.min() > -200
    (slope,) = torch.autograd.grad(softened.sum(), log_likelihood)
    assert (slope[:3] == 1).all() and 0.8 < slope[3] < 1 and 0 < slope[4] < 1e-4


def training_config(folder, **overrides):
    sizes = {'num_batches': 3, 'batch_size': 2, 'max_context': 11, 'num_target': N_TARGET}
    options = sizes | {'steps': 7, 'warmup': 2, 'learning_rate': 1e-2, 'workers': 0}
    return TrainingConfig(str(folder), **options | overrides)


def trained_weights(folder):
    return load_model(folder / 'model.safetensors').state_dict()


def assert_equal_weights(found, expected):
    assert found.keys() == expected.keys()
    for name in found:
        assert torch.equal(found[name], expected[name]), name


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
    """Return the folder of a run from start to end."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp('uninterrupted')
    train(small_models.field(2), training_config(folder))
    return folder


@pytest.mark.parametrize('stops', [(1,), (3,), (2, 5), (6,), (7,)])
def test_an_interrupted_run_ends_with_the_same_weights(tmp_path, uninterrupted, stops):
    config, model_config, seen = training_config(tmp_path), small_models.field(2), []
    for stop in (*stops, None):
        torch.rand(13)  # other random numbers were drawn in between

        def on_step(step, loss, stop=stop):
            seen.append(step)
            return step == stop

        path = train(model_config, config, on_step)
        assert path == tmp_path / 'model.safetensors' and path.is_file()
        assert read_extra(path)['step'] == (stop or 7)
    assert seen == [1, 2, 3, 4, 5, 6, 7]
    assert_equal_weights(trained_weights(tmp_path), trained_weights(uninterrupted))
    with open(tmp_path / 'log.csv') as file:
        found = [(row['step'], row['loss']) for row in csv.DictReader(file)]
    with open(uninterrupted / 'log.csv') as file:
        assert found == [(row['step'], row['loss']) for row in csv.DictReader(file)]


def test_a_run_that_crashed_goes_on_from_its_last_checkpoint(tmp_path, uninterrupted):
    config, model_config = training_config(tmp_path), small_models.field(2)

    def crash(step, loss):
        if step == 5:
            raise MemoryError

    train(model_config, config, lambda step, loss: step == 3)
    with pytest.raises(MemoryError):
        train(model_config, config, crash)
    train(model_config, config)
    assert_equal_weights(trained_weights(tmp_path), trained_weights(uninterrupted))


def test_a_model_without_the_regression_is_trained_too(tmp_path):
    model_config = small_models.field(2, least_squares=None)
    losses = []
    config = training_config(tmp_path, num_batches=2, batch_size=1)
    path = train(model_config, config, lambda _, loss: losses.append(loss))
    assert load_model(path).config.least_squares is None
    assert np.isfinite(losses).all() and len(losses) == 7


def test_every_step_augments_in_another_way(tmp_path, monkeypatch):
    seeds = []

    def spy(batch, generator):
        seeds.append(generator.initial_seed())
        return augment(batch, generator)

    monkeypatch.setattr(loop, 'augment', spy)
    train(small_models.field(2), training_config(tmp_path, num_batches=1, batch_size=1))
    assert len(set(seeds)) == 7


def test_training_again_after_the_end_changes_nothing(uninterrupted):
    before = (uninterrupted / 'model.safetensors').read_bytes()
    train(small_models.field(2), training_config(uninterrupted), lambda *_: pytest.fail('a step'))
    assert (uninterrupted / 'model.safetensors').read_bytes() == before


def test_training_changes_every_weight(uninterrupted):
    torch.manual_seed(training_config(uninterrupted).seed)
    start = CMANP(small_models.field(2)).state_dict()
    same = [
        name
        for name, value in trained_weights(uninterrupted).items()
        if torch.equal(value, start[name])
    ]
    assert same == ['location.frequencies']  # random and fixed


def test_provenance_says_how_a_model_was_trained(uninterrupted):
    extra = read_extra(uninterrupted / 'model.safetensors')
    assert extra['step'] == 7 and extra['seconds'] > 0
    assert extra['training']['max_context'] == 11 and extra['training']['seed'] == 0
    assert extra['training']['folder'] == uninterrupted.name  # no path of the machine


@pytest.mark.parametrize(
    'name', ['steps', 'num_batches', 'batch_size', 'max_context', 'num_target']
)
def test_training_sizes_are_at_least_one(name):
    with pytest.raises(ConfigError, match=f'^{name} is 0, expected at least 1$'):
        TrainingConfig('folder', **{name: 0})


def test_a_folder_of_another_training_is_refused(tmp_path):
    train(small_models.field(2), training_config(tmp_path, steps=1))
    with pytest.raises(ConfigError, match='batch_size is 5, was 2'):
        train(small_models.field(2), training_config(tmp_path, batch_size=5))


def test_a_model_that_cannot_be_trained_is_refused(tmp_path):
    with pytest.raises(ConfigError, match='a model with dim_y 2: expected dim_y 1'):
        train(small_models.field(2, dim_y=2), training_config(tmp_path))


def test_the_model_file_tells_the_command_that_made_it(uninterrupted):
    extra = read_extra(uninterrupted / 'model.safetensors')
    assert extra['command'].startswith('cmanp train --folder')
    assert '--seed 0' in extra['command'] and extra['step'] == 7
