"""Tasks come from the stated priors, batches and runs repeat exactly, interrupted or not."""

import csv
import json
import os
import shutil
import socket
import threading
from dataclasses import replace
from importlib.util import find_spec
from math import sqrt

import numpy as np
import pytest
import small_models
import torch
from torch.distributions import Normal, kl_divergence

import cmanp_ros.core.neighbourhood
from cmanp_ros.checkpoint import load_model, read_extra, save_model
from cmanp_ros.core import CMANP, Lattice, World
from cmanp_ros.core.autoregressive import predict_block
from cmanp_ros.core.config import AutoregressiveConfig
from cmanp_ros.core.errors import CheckpointError, ConfigError
from cmanp_ros.training import batches, loop, objectives, priors
from cmanp_ros.training.batches import (
    MapBatches,
    WorldBatches,
    augment,
    some_worlds,
    world_batch,
)
from cmanp_ros.training.loop import train
from cmanp_ros.training.objectives import Batch, world_log_likelihood
from cmanp_ros.training.priors import WorldTask
from cmanp_ros.training.processes import MapPrior, Tasks
from cmanp_ros.training.recipe import Recipe, WorldPrior

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


def test_robots_park_in_some_worlds_and_are_asked_about_the_place():
    generator, parked = seeded(), 0
    for _ in range(211):
        task = priors.world_task(generator, 499, 8)
        if len(task.x_context) > 1 and torch.equal(*task.x_context[-2:]):
            parked += 1
            place = task.x_context[-1].expand(2, -1)
            assert torch.equal(task.x_target[:2], place)
            assert len(task.y_target.unique()) == 8  # noise is drawn for each reading
    assert 0.3 * priors.PARKED < parked / 211 < 2 * priors.PARKED


def test_worlds_have_amplitudes_over_two_decades_and_offsets_beyond_them():
    tasks = [priors.world_task(seeded(seed), 1, 101) for seed in range(211)]
    deviation = np.array([task.y_target.std() for task in tasks])
    low, high = np.quantile(deviation, (0.05, 0.95))
    assert high / low > 30
    offset = np.array([task.y_target.mean().abs() for task in tasks])
    assert 0.2 < (offset > 2 * deviation).mean() < 0.8


def test_heavy_tails_of_a_rough_field_do_not_overflow(monkeypatch):
    """They did, in one task of some thousands; in a field 40 times as large they often would."""
    drawn = priors._random_field
    monkeypatch.setattr(priors, '_random_field', lambda *arguments: 40 * drawn(*arguments))
    for seed in range(101):
        task = priors.world_task(seeded(seed), 13, N_TARGET)
        assert torch.isfinite(task.y_context).all() and torch.isfinite(task.y_target).all(), seed


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


# Recipes small enough for unit tests -------------------------------------------------------------

MAPS = MapPrior(
    kernels=('rbf', 'matern32'), num_context=(2, 7), num_target=N_TARGET, trend=0.3, scale=(1, 1)
)
BLOCKS = AutoregressiveConfig(block_size=3, num_layers=1, rank=5, depth=2)
MODELS = {
    'log_likelihood': small_models.paper(2),
    'evidence_lower_bound': small_models.paper(2, num_global=2),
    'joint_log_likelihood': small_models.paper(2, autoregressive=BLOCKS),
}


def map_recipe(objective='log_likelihood', model=None, **overrides):
    """Return a recipe for maps of one tile."""
    sizes = {'steps': 7, 'batch_size': 4, 'warmup': 2, 'learning_rate': 1e-2, 'validate_every': 4}
    model = MODELS[objective] if model is None else model
    return Recipe(model, **{'prior': MAPS, 'objective': objective} | sizes | overrides)


def world_recipe(model=None, num_batches=3, max_context=11, **overrides):
    """Return a recipe for worlds of tiles."""
    prior = WorldPrior(num_batches, max_context, N_TARGET)
    model = small_models.field(2) if model is None else model
    return map_recipe(model=model, prior=prior, **{'batch_size': 2} | overrides)


RECIPES = {
    **{f'maps, {name}': map_recipe(name) for name in MODELS},
    'maps, regression': map_recipe(model=small_models.field(2)),
    'worlds': world_recipe(),
}


# Batches of worlds -------------------------------------------------------------------------------


def make_batches(folder, dim_x=2, seed=5, max_context=13, **overrides):
    recipe = world_recipe(
        small_models.field(dim_x), 7, max_context, **{'batch_size': 4, 'seed': seed} | overrides
    )
    return WorldBatches(recipe, folder)


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


def test_held_out_worlds_are_others(tmp_path):
    dataset = make_batches(tmp_path / 'training')
    held_out = WorldBatches(dataset.recipe, tmp_path / 'held_out', is_held_out=True)
    assert not torch.equal(held_out[3]['y_target'], dataset[3]['y_target'])


def test_worlds_may_come_from_elsewhere(tmp_path):
    asked = []

    def draw(*arguments):
        asked.append(arguments[1:])
        return priors.world_task(*arguments)

    WorldBatches(make_batches(tmp_path).recipe, tmp_path, draw=draw)[0]
    assert asked == [(13, N_TARGET, 2)] * 4


def test_every_batch_comes_once_in_each_epoch_in_another_order(tmp_path):
    order = WorldBatches(world_recipe(num_batches=7, steps=18), tmp_path).order()
    assert len(order) == 18
    assert sorted(order[:7]) == sorted(order[7:14]) == list(range(7))
    assert order[:7] != order[7:14] and len(set(order[14:])) == 4
    other = WorldBatches(world_recipe(num_batches=7, steps=18, seed=1), tmp_path).order()
    assert other != order


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
    for index in range(4):
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
    for index in range(4):
        batch = Batch(**dataset[index])
        asked, folded = batch.pair_tile.unique(), batch.point_tile.unique()
        assert torch.equal(asked, folded)
        assert torch.equal(asked, torch.arange(len(asked)))
        num_tiles += len(asked)
    assert num_tiles > 4 * 4


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
    monkeypatch.setattr(cmanp_ros.core.neighbourhood, 'SCALE_STEP', 1e-9)
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


def test_parts_of_a_batch_hold_every_world_once(tmp_path):
    model = small_models.build(small_models.field(2))
    dataset = make_batches(tmp_path, batch_size=6, max_context=29)
    batch = Batch(**dataset[0])
    whole = world_log_likelihood(model, batch).view(6, N_TARGET)
    for every in (1, 2, 6):
        for first in range(every):
            part = some_worlds(batch, N_TARGET, first, every)
            assert torch.equal(part.point_tile.unique(), part.pair_tile.unique())
            found = world_log_likelihood(model, part).view(-1, N_TARGET)
            torch.testing.assert_close(found, whole[first::every], **EXACT)


# Batches of maps ---------------------------------------------------------------------------------


def test_maps_are_functions_of_seed_and_index():
    one, other = MapBatches(map_recipe()), MapBatches(map_recipe())
    for index in (6, 0, 3):
        found, expected = other[index], one[index]
        assert list(found) == list(Tasks._fields)
        assert all(torch.equal(found[name], expected[name]) for name in found)
    numbers = {
        dataset[index]['y_target'][0, 0].item()
        for dataset in (
            one,
            MapBatches(map_recipe(seed=1)),
            MapBatches(map_recipe(), True),
            MapBatches(map_recipe(seed=1), True),
        )
        for index in range(7)
    }
    assert len(numbers) == 28
    assert one.order() == list(range(7)) and len(one) == 7


@pytest.mark.parametrize('objective', sorted(set(MODELS) - {'evidence_lower_bound'}))
def test_parts_of_a_batch_hold_every_map_once(objective):
    dataset = MapBatches(map_recipe(objective))
    model = small_models.build(dataset.recipe.model)
    whole = dataset.log_likelihood(model, dataset[0], None)
    for every in (2, 4):
        for first in range(every):
            found = dataset.log_likelihood(model, dataset[0], None, (first, every))
            torch.testing.assert_close(found, whole[first::every], **EXACT)


# Objectives --------------------------------------------------------------------------------------


def a_map(model, batch=3, num_context=11, num_target=N_TARGET):
    """Return tasks with a posterior that is far from white."""
    sizes = {'num_context': (num_context,) * 2, 'num_target': num_target}
    prior = replace(MAPS, length=(0.8, 0.8), noise=(0.3, 0.3), **sizes)
    return prior.draw(seeded(), batch, model.config.dim_x, model.config.dim_y)


def drawn_targets(tasks, count):
    """Return targets (count, batch, num_target, dim_y) given the context, by numpy."""
    generator, draws = np.random.default_rng(3), []
    for mean, covariance in zip(tasks.mean.numpy(), tasks.covariance.numpy(), strict=True):
        draws.append(
            [generator.multivariate_normal(m, covariance, size=count) for m in mean.T]
        )  # (batch, dim_y, count, num_target)
    return torch.from_numpy(np.array(draws)).permute(2, 0, 3, 1)


def assert_mean_of(found, values):
    """Compare with the mean over draws, the first dimension, within its standard error."""
    error = values.std(0) / len(values) ** 0.5
    assert ((found - values.mean(0)).abs() < 5 * error).all()


@pytest.mark.parametrize('config', [small_models.paper(2, 2), small_models.field(2, 2)])
def test_the_expected_log_likelihood_is_the_mean_over_drawn_targets(config):
    model = small_models.build(config)
    tasks = a_map(model)
    found = objectives.log_likelihood(model, tasks)
    assert found.shape == (3, N_TARGET, 2)
    state = model.update(model.init_state(3), tasks.x, tasks.y)
    prediction = model.predict(state, tasks.x_target)
    y = drawn_targets(tasks, 20_011)
    assert_mean_of(found, Normal(prediction.mean, prediction.stddev).log_prob(y))


def test_the_expected_joint_log_likelihood_is_the_mean_over_drawn_targets():
    model = small_models.build(MODELS['joint_log_likelihood'])
    tasks = a_map(model)
    found = objectives.joint_log_likelihood(model, tasks)
    assert found.shape == (3, 1)
    state = model.update(model.init_state(3), tasks.x, tasks.y)
    block = predict_block(model, state, tasks.x_target)
    y = drawn_targets(tasks, 20_011)[..., 0]
    assert_mean_of(found[:, 0], block.log_prob(y) / N_TARGET)


def test_no_distribution_has_a_higher_expected_log_likelihood_than_the_posterior():
    tasks = a_map(CMANP(small_models.paper(2)))
    variance = tasks.covariance.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    score = objectives._expected_log_density
    best = score(tasks.mean, variance.sqrt(), tasks.mean, variance)
    entropy = Normal(tasks.mean, variance.sqrt()).entropy()
    torch.testing.assert_close(best, -entropy, **EXACT)
    for mean, stddev in ((0.1, 1.0), (0.0, 0.9), (0.0, 1.1)):
        other = score(tasks.mean + mean, variance.sqrt() * stddev, tasks.mean, variance)
        assert (other < best).all()


def test_the_joint_objective_refuses_more_than_one_output():
    model = small_models.build(small_models.paper(2, 2, autoregressive=BLOCKS))
    with pytest.raises(ValueError, match='^dim_y is 2, expected 1 for a joint likelihood$'):
        objectives.joint_log_likelihood(model, a_map(model))


def stochastic_parts(model, tasks):
    """Return the projected latents, prior and posterior of the variable."""
    state = model.update(model.init_state(len(tasks.x)), tasks.x, tasks.y)
    both = model.update(state, tasks.x_target, tasks.y_target)
    encoding = model.encoding(state)
    return encoding.projected, encoding.global_variable, model.encoding(both).global_variable


def log_density(model, projected, tasks, sample):
    """Return the log density of all targets of each task given the variable, (batch,)."""
    answers = model.decode(projected, tasks.x_target, None, sample)
    return Normal(answers.mean, answers.stddev).log_prob(tasks.y_target).sum((1, 2))


def again(tasks, count):
    """Return the batch of tasks `count` times over, for other samples of the variable."""
    return Tasks(*(part.repeat(count, *[1] * (part.dim() - 1)) for part in tasks))


def bounds(model, tasks, count):
    """Return the evidence lower bound of each task with other samples, (count, batch)."""
    found = objectives.evidence_lower_bound(model, again(tasks, count), seeded())
    return found.sum((1, 2)).view(count, -1)


def log_densities(model, tasks, count, of_posterior):
    """Return the log density of each task with samples of the variable, (count, batch)."""
    projected, *variables = stochastic_parts(model, again(tasks, count))
    variable = variables[of_posterior]
    white = torch.randn(variable.loc.shape, generator=seeded(7), dtype=torch.float64)
    sample = variable.loc + variable.scale * white
    return log_density(model, projected, again(tasks, count), sample).view(count, -1)


def a_stochastic_model():
    """Return a model whose variable depends on what it sees."""
    model = small_models.build(small_models.paper(2, 2, num_global=2))
    model.global_variable.moments[-1].weight *= 300
    model.global_variable.to_token.weight *= 5
    return model


def test_the_lower_bound_is_density_less_divergence():
    model, count = a_stochastic_model(), 401
    tasks = a_map(model)
    found = bounds(model, tasks, count)
    density = log_densities(model, tasks, count, of_posterior=True)
    _, prior, posterior = stochastic_parts(model, tasks)
    divergence = kl_divergence(posterior, prior).sum(-1)
    error = (found.var(0) + density.var(0)).div(count).sqrt()
    assert (divergence > 10 * error).all(), 'it makes no difference: other weights'
    assert ((found.mean(0) - density.mean(0) + divergence).abs() < 5 * error).all()


def test_the_lower_bound_is_below_the_log_likelihood():
    model, count = a_stochastic_model(), 401
    tasks = a_map(model)
    density = log_densities(model, tasks, count, of_posterior=False)
    evidence = density.logsumexp(0) - np.log(count)
    share = (density - evidence).exp()  # of mean 1
    found = bounds(model, tasks, count)
    error = (share.var(0) + found.var(0)).div(count).sqrt()
    assert (found.mean(0) < evidence - 10 * error).all(), 'it makes no difference: other weights'


def test_a_variable_that_says_nothing_costs_nothing():
    model = small_models.build(MODELS['evidence_lower_bound'])
    for part in (model.global_variable.moments[-1].weight, model.global_variable.to_token.weight):
        part.zero_()  # neither do targets move it nor does it move predictions
    tasks = a_map(model)
    projected, prior, posterior = stochastic_parts(model, tasks)
    assert torch.equal(prior.loc, posterior.loc) and torch.equal(prior.scale, posterior.scale)
    found = objectives.evidence_lower_bound(model, tasks, seeded())
    expected = log_density(model, projected, tasks, prior.loc)
    torch.testing.assert_close(found.sum((1, 2)), expected, **EXACT)


@pytest.mark.parametrize('name', RECIPES)
def test_gradients_reach_every_weight(tmp_path, name):
    recipe = RECIPES[name]
    model = CMANP(recipe.model)
    model.load_state_dict(small_models.build(recipe.model, torch.float32).state_dict())
    data = loop._batches(recipe, tmp_path, False, priors.world_task)
    for index in range(3):
        loop._loss(recipe, data, model, data[index], seeded(), (0, 1)).backward()
    for weight, value in model.named_parameters():
        assert value.grad is not None and value.grad.isfinite().all(), weight
        if 'to_kv.bias' not in weight:
            assert value.grad.any(), weight


def test_worlds_of_which_nothing_was_seen_have_no_gradients_but_can_be_trained_on():
    config = small_models.field(2)
    task = a_world(2)
    task = task._replace(x_context=task.x_context[:0], y_context=task.y_context[:0])
    model, batch = CMANP(config), world_batch(CMANP(config), task, 3)
    found = world_log_likelihood(model, batch)
    torch.testing.assert_close(found, Normal(0.0, 1.0).log_prob(task.y_target))
    found.mean().backward()
    assert all(not value.grad.any() for value in model.parameters())


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
    found = world_log_likelihood(model, world_batch(model, task, levels))
    expected = prediction_log_likelihood(model, task, levels)
    torch.testing.assert_close(found, expected, **EXACT)


def test_training_without_the_regression_scores_what_prediction_predicts():
    model = small_models.build(small_models.field(2, least_squares=None))
    task = a_world(2, 13)
    batch = world_batch(CMANP(small_models.field(2)), task, 3)  # the tiles are the same
    found = world_log_likelihood(model, batch)
    expected = prediction_log_likelihood(model, task, 3)
    torch.testing.assert_close(found, expected, **EXACT)


def test_training_scores_every_world_of_a_batch_on_its_own(tmp_path, monkeypatch):
    dataset, drawn = make_batches(tmp_path, 2, 5, 101, batch_size=5), []

    def spy(model, task, levels):
        drawn.append((task, levels))
        return world_batch(model, task, levels)

    monkeypatch.setattr(batches, 'world_batch', spy)
    batch = Batch(**dataset[2])
    assert len(drawn) == 5
    model = small_models.build(dataset.recipe.model, torch.float32)
    found = world_log_likelihood(model, batch)
    expected = [prediction_log_likelihood(model, *world) for world in drawn]
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-3, atol=1e-3)


def test_targets_far_below_the_rest_weigh_less_and_the_others_as_they_are():
    log_likelihood = torch.tensor([3.0, 0.0, -10.0, -11.0, -1e6], requires_grad=True)
    softened = objectives.soften(log_likelihood)
    assert torch.equal(softened[:3], log_likelihood[:3])
    assert (softened.diff() < 0).all() and softened.min() > -200
    (slope,) = torch.autograd.grad(softened.sum(), log_likelihood)
    assert (slope[:3] == 1).all() and 0.8 < slope[3] < 1 and 0 < slope[4] < 1e-4


# Runs --------------------------------------------------------------------------------------------


def trained_weights(folder):
    return load_model(folder / 'model.safetensors').state_dict()


def assert_equal_weights(found, expected):
    assert found.keys() == expected.keys()
    for name in found:
        assert torch.equal(found[name], expected[name]), name


def logged(folder):
    """Return the rows of a log without the seconds."""
    with open(folder / 'log.csv', newline='') as file:
        return [(row['step'], row['loss'], row['held_out_loss']) for row in csv.DictReader(file)]


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
    """Return a function that trains from start to end once and returns the folder."""
    folders = {}

    def folder_of(name):
        if name not in folders:
            torch.set_num_threads(1)
            folders[name] = tmp_path_factory.mktemp('uninterrupted')
            train(RECIPES[name], folders[name], command='cmanp train mine')
        return folders[name]

    return folder_of


def take_batches(source, folder):
    """Copy what regressions were solved for: the same batches would be made again."""
    for name in ('batches', 'held_out'):
        if (source / name).is_dir():
            shutil.copytree(source / name, folder / name)


@pytest.mark.parametrize('stops', [(1, 5)])
@pytest.mark.parametrize('name', RECIPES)
def test_an_interrupted_run_ends_with_the_same_weights(tmp_path, uninterrupted, name, stops):
    recipe, seen, expected = RECIPES[name], [], uninterrupted(name)
    take_batches(expected, tmp_path)
    for stop in (*stops, None):
        torch.rand(13)  # other random numbers were drawn in between

        def on_step(step, loss, held_out, stop=stop):
            seen.append(step)
            return step == stop

        path = train(recipe, tmp_path, on_step)
        assert path == tmp_path / 'model.safetensors' and path.is_file()
        assert read_extra(path)['step'] == (stop or 7)
    assert seen == [1, 2, 3, 4, 5, 6, 7]
    assert_equal_weights(trained_weights(tmp_path), trained_weights(expected))
    best, expected_best = (
        load_model(folder / 'best.safetensors').state_dict() for folder in (tmp_path, expected)
    )
    assert_equal_weights(best, expected_best)
    assert logged(tmp_path) == logged(expected)


def test_a_run_that_crashed_goes_on_from_its_last_checkpoint(tmp_path, uninterrupted):
    recipe = RECIPES['worlds']

    def crash(step, loss, held_out):
        if step == 5:
            raise MemoryError

    take_batches(uninterrupted('worlds'), tmp_path)
    train(recipe, tmp_path, lambda step, *_: step == 3)
    with pytest.raises(MemoryError):
        train(recipe, tmp_path, crash)
    train(recipe, tmp_path)
    assert_equal_weights(trained_weights(tmp_path), trained_weights(uninterrupted('worlds')))


def test_workers_make_the_same_batches(tmp_path, uninterrupted):
    name = 'maps, log_likelihood'
    train(RECIPES[name], tmp_path, num_workers=1)
    assert_equal_weights(trained_weights(tmp_path), trained_weights(uninterrupted(name)))


def test_another_seed_trains_another_model(tmp_path, uninterrupted):
    train(map_recipe(seed=1), tmp_path)
    found, other = (
        trained_weights(tmp_path),
        trained_weights(uninterrupted('maps, log_likelihood')),
    )
    assert not torch.equal(found['norm.weight'], other['norm.weight'])


def test_a_model_without_the_regression_is_trained_on_worlds_too(tmp_path):
    recipe = world_recipe(
        small_models.field(2, least_squares=None), 2, batch_size=1, steps=3, validate_every=3
    )
    losses = []
    path = train(recipe, tmp_path, lambda _, loss, held_out: losses.append(loss))
    assert load_model(path).config.least_squares is None
    assert np.isfinite(losses).all() and len(losses) == 3


def test_every_step_augments_in_another_way_and_held_out_worlds_stay_as_they_are(
    tmp_path, monkeypatch
):
    seeds = []

    def spy(batch, generator):
        seeds.append(generator.initial_seed())
        return augment(batch, generator)

    monkeypatch.setattr(batches, 'augment', spy)
    train(world_recipe(num_batches=1, batch_size=1), tmp_path)
    assert len(seeds) == len(set(seeds)) == 7


@pytest.mark.parametrize('name', RECIPES)
def test_training_again_after_the_end_changes_nothing(uninterrupted, name):
    folder = uninterrupted(name)
    before = (folder / 'model.safetensors').read_bytes()
    train(RECIPES[name], folder, lambda *_: pytest.fail('a step'))
    assert (folder / 'model.safetensors').read_bytes() == before


@pytest.mark.parametrize('name', RECIPES)
def test_training_changes_every_weight(uninterrupted, name):
    recipe = RECIPES[name]
    torch.manual_seed(recipe.seed)
    start = CMANP(recipe.model).state_dict()
    trained = trained_weights(uninterrupted(name))
    same = [weight for weight, value in trained.items() if torch.equal(value, start[weight])]
    fixed = ['location.frequencies'] if recipe.model.inducing_points else []  # random and fixed
    assert same == fixed


@pytest.mark.parametrize('objective', MODELS)
def test_training_lowers_the_loss_on_tasks_that_are_never_trained_on(uninterrupted, objective):
    recipe = map_recipe(objective)
    torch.manual_seed(recipe.seed)
    data, untrained = MapBatches(recipe, True), CMANP(recipe.model)
    before = loop._validate(recipe, data, untrained, (0, 1))
    after = float(logged(uninterrupted(f'maps, {objective}'))[-1][2])
    assert after < before - 0.1


def test_the_learning_rate_warms_up_and_falls_to_zero():
    recipe = map_recipe(steps=1000, warmup=100)
    found = [loop.schedule(step, recipe) for step in range(1001)]
    assert found[0] == 0 and found[1000] == pytest.approx(0, abs=1e-12)
    assert all(np.diff(found[:90]) > 0) and all(np.diff(found[100:]) < 0)
    assert found[100] == pytest.approx(0.5 * (1 + np.cos(0.1 * np.pi)))


# What a run leaves -------------------------------------------------------------------------------


def test_the_log_has_a_row_for_each_step_and_held_out_losses_where_they_were_taken(uninterrupted):
    rows = logged(uninterrupted('worlds'))
    assert [row[0] for row in rows] == [str(step) for step in range(1, 8)]
    assert [bool(row[2]) for row in rows] == [False, False, False, True, False, False, True]
    assert np.isfinite([float(row[1]) for row in rows]).all()


@pytest.mark.parametrize('name', RECIPES)
def test_provenance_says_how_a_model_was_trained(uninterrupted, name):
    folder = uninterrupted(name)
    extra = read_extra(folder / 'model.safetensors')
    assert extra['recipe'] == RECIPES[name].to_dict()
    assert extra['command'] == 'cmanp train mine' and extra['git_commit'] == loop.git_commit()
    assert extra['torch'] == torch.__version__
    assert extra['step'] == 7 and extra['seconds'] > 0
    last = logged(folder)[-1][2]
    assert extra['held_out_log_likelihood'] == pytest.approx(-float(last), abs=1e-5)


@pytest.mark.parametrize('name', RECIPES)
def test_the_best_model_is_the_one_with_the_lowest_held_out_loss(uninterrupted, name):
    folder = uninterrupted(name)
    best = min((float(row[2]), int(row[0])) for row in logged(folder) if row[2])
    extra = read_extra(folder / 'best.safetensors')
    assert (pytest.approx(-extra['held_out_log_likelihood'], abs=1e-5), extra['step']) == best


def test_the_held_out_loss_is_that_of_the_saved_model(uninterrupted):
    folder = uninterrupted('maps, log_likelihood')
    model, data = load_model(folder / 'model.safetensors'), MapBatches(map_recipe(), True)
    scores = [data.log_likelihood(model, data[index], None) for index in range(7)]
    scores = [objectives.soften(score).mean() for score in scores]
    found = read_extra(folder / 'model.safetensors')['held_out_log_likelihood']
    assert found == pytest.approx(float(torch.stack(scores).mean()), rel=1e-4)


def test_a_commit_is_told_or_unknown():
    found = loop.git_commit()
    assert found == 'unknown' or len(found.rstrip('+')) == 40


@pytest.mark.skipif(find_spec('tensorboard') is None, reason='tensorboard is not installed')
def test_losses_are_written_for_tensorboard(tmp_path):
    train(map_recipe(steps=2), tmp_path)
    (path,) = (tmp_path / 'tensorboard').glob('events.*')
    content = path.read_bytes()
    assert b'loss' in content and b'held_out_loss' in content


# Refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('other', 'message'),
    [
        (map_recipe(batch_size=5), 'batch_size is 5, was 4'),
        (map_recipe(steps=9, seed=1), 'seed is 1, was 0; steps is 9, was 7'),
        (map_recipe(prior=replace(MAPS, trend=0.4)), 'prior.maps.trend is 0.4, was 0.3'),
        (map_recipe(model=small_models.paper(2, num_blocks=3)), 'model.num_blocks is 3, was 2'),
    ],
)
def test_a_folder_of_another_training_is_refused(uninterrupted, other, message):
    folder = uninterrupted('maps, log_likelihood')
    expected = f'{folder} holds another training: {message}. Use another folder, or the settings'
    with pytest.raises(ConfigError) as error:
        train(other, folder)
    assert str(error.value).startswith(expected)


@pytest.mark.parametrize(
    ('mistake', 'device', 'error', 'words'),
    [
        ({'start_from': 'nope'}, 'cpu', CheckpointError, "no checkpoint 'nope'"),
        ({}, 'foo', ConfigError, "device 'foo' cannot be used here .*'cpu' always can"),
    ],
)
def test_a_folder_in_which_nothing_was_trained_takes_other_settings(
    tmp_path, mistake, device, error, words
):
    with pytest.raises(error, match=words):
        train(map_recipe(steps=1, **mistake), tmp_path, device=device)
    train(map_recipe(steps=1, seed=7), tmp_path)
    with pytest.raises(ConfigError, match='holds another training: seed is 0, was 7'):
        train(map_recipe(steps=1), tmp_path)


def test_batches_that_were_made_are_of_their_settings(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, '_loss', stop)
        with pytest.raises(KeyboardInterrupt):
            train(world_recipe(), tmp_path)
    with pytest.raises(ConfigError, match='holds another training: prior.worlds.max_context is 7'):
        train(world_recipe(max_context=7), tmp_path)


@pytest.mark.parametrize('name', ['num_batches', 'max_context', 'num_target'])
def test_sizes_of_worlds_are_at_least_one(name):
    with pytest.raises(ConfigError, match=f'^{name} is 0, expected at least 1$'):
        WorldPrior(**{name: 0})


# Going on from a model ---------------------------------------------------------------------------


def test_training_goes_on_from_the_weights_of_another_model(tmp_path):
    model = small_models.build(small_models.paper(2), torch.float32)
    path = save_model(model, tmp_path / 'other.safetensors')
    recipe = map_recipe(start_from=str(path), learning_rate=1e-9, weight_decay=0.0)
    train(recipe, tmp_path / 'run')
    found = trained_weights(tmp_path / 'run')
    for name, value in model.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-7)
    assert read_extra(tmp_path / 'run' / 'model.safetensors')['recipe']['start_from'] == str(path)


def test_a_model_of_another_configuration_is_no_start(tmp_path):
    other = small_models.build(small_models.paper(2, num_blocks=3), torch.float32)
    path = save_model(other, tmp_path / 'other.safetensors')
    with pytest.raises(ConfigError) as error:
        train(map_recipe(start_from=str(path)), tmp_path / 'run')
    assert str(error.value) == (
        f'start_from {path}: its num_blocks are [3], the recipe has [2]; expected one model'
    )


# Precision ---------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', RECIPES)
def test_bfloat16_trains_about_the_same(tmp_path, uninterrupted, name):
    recipe = replace(RECIPES[name], precision='bfloat16', steps=2)
    losses = []
    take_batches(uninterrupted(name), tmp_path)
    train(recipe, tmp_path, lambda step, loss, held_out: losses.append(loss))
    assert all(value.dtype != torch.bfloat16 for value in trained_weights(tmp_path).values())
    expected = [float(row[1]) for row in logged(uninterrupted(name))[:2]]
    assert losses[0] == pytest.approx(expected[0], rel=0.05, abs=0.05)
    assert np.isfinite(losses).all()


# Several processes -------------------------------------------------------------------------------

SPREAD = {  # in this order; lower rates: Adam makes rounding errors of small gradients large
    'maps': map_recipe(steps=3, learning_rate=1e-3),
    'worlds': world_recipe(steps=3, learning_rate=1e-3, num_batches=2, validate_every=3),
    'stopped': map_recipe(),
}


def run_rank(rank, ports, folder):
    """Train every recipe as one of two processes, the second of which stops the last early."""
    torch.set_num_threads(1)
    for (name, recipe), port in zip(SPREAD.items(), ports, strict=True):
        os.environ |= {
            'MASTER_ADDR': 'localhost',
            'MASTER_PORT': str(port),
            'WORLD_SIZE': '2',
            'RANK': str(rank),
            'LOCAL_RANK': str(rank),
        }
        seen, is_to_stop = [], name == 'stopped' and rank == 1

        def on_step(*step, seen=seen, is_to_stop=is_to_stop):
            seen.append(step)
            return is_to_stop and step[0] == 2

        train(recipe, folder / name, on_step)
        (folder / f'{name}{rank}.json').write_text(json.dumps(seen))


def free_ports(count):
    sockets = [socket.create_server(('localhost', 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture(scope='module')
def in_two_processes(tmp_path_factory):
    """Return the folder in which two processes have trained."""
    folder = tmp_path_factory.mktemp('two')
    torch.multiprocessing.spawn(run_rank, (free_ports(3), folder), nprocs=2)
    return folder


@pytest.mark.timeout(600)  # [s], on a busy machine
@pytest.mark.parametrize('name', ['maps', 'worlds'])
def test_two_processes_train_as_one_does_with_the_whole_batch(tmp_path, in_two_processes, name):
    seen = []
    train(SPREAD[name], tmp_path, lambda *step: seen.append(step))
    expected = [list(step) for step in seen]
    for rank in (0, 1):
        found = json.loads((in_two_processes / f'{name}{rank}.json').read_text())
        assert [step[0] for step in found] == [1, 2, 3]
        for (_, loss, held_out), (_, one, other) in zip(found, expected, strict=True):
            assert loss == pytest.approx(one, rel=1e-4, abs=1e-5)
            assert (held_out is None) == (other is None)
            assert held_out is None or held_out == pytest.approx(other, rel=1e-4, abs=1e-5)
    found, expected = trained_weights(in_two_processes / name), trained_weights(tmp_path)
    if name == 'worlds':  # adding to the log weight of all tiles changes nothing: no gradient,
        for weights in (found, expected):  # and Adam makes steps of what rounding leaves
            weights['predictor.2.bias'][2] = 0.0
    for weight in expected:
        torch.testing.assert_close(found[weight], expected[weight], rtol=1e-4, atol=1e-4)
    torch.manual_seed(0)
    start = CMANP(SPREAD[name].model).state_dict()
    moved = max((expected[weight] - start[weight]).abs().max() for weight in expected)
    assert moved > 5e-4  # or the weights are close because nothing was learned


@pytest.mark.timeout(600)
def test_one_process_that_stops_stops_all_after_the_same_step(in_two_processes):
    for rank in (0, 1):
        found = json.loads((in_two_processes / f'stopped{rank}.json').read_text())
        assert [step[0] for step in found] == [1, 2]
    assert read_extra(in_two_processes / 'stopped' / 'model.safetensors')['step'] == 2


def test_a_batch_that_cannot_be_shared_out_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(loop.distributed, 'start', lambda: (0, 3))
    message = '^batch_size is 4, expected a multiple of the 3 processes$'
    with pytest.raises(ConfigError, match=message):
        train(map_recipe(), tmp_path)


def test_a_worker_lets_its_threads_end_and_does_not_wait_for_ever():
    ended, never = threading.Event(), threading.Event()
    threading.Timer(0.05, ended.set).start()
    blocked = threading.Thread(target=never.wait, daemon=True)
    blocked.start()
    loop._let_threads_end(0.2)
    assert ended.is_set() and blocked.is_alive()
    never.set()
