"""Tasks come from the stated priors, batches and runs repeat exactly, interrupted or not."""

import csv
from math import sqrt

import numpy as np
import pytest
import scipy.stats
import small_models
import torch
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, Matern

from cmanp_ros.checkpoint import load_model, read_extra
from cmanp_ros.core import CMANP
from cmanp_ros.core.errors import ConfigError
from cmanp_ros.core.metrics import log_likelihood
from cmanp_ros.training import batches, loop, priors
from cmanp_ros.training.batches import Batch, Batches, augment, unpack
from cmanp_ros.training.evaluation import field_scores
from cmanp_ros.training.loop import TrainingConfig, batch_log_likelihood, train
from cmanp_ros.training.priors import Hyperparameters, Task

BATCH, N_TARGET = 8, 5
EXACT = {'rtol': 1e-9, 'atol': 1e-9}


def seeded(seed=3):
    return torch.Generator().manual_seed(seed)


# Priors ------------------------------------------------------------------------------------------


def test_hyperparameters_have_their_ranges_and_distributions():
    h = priors.hyperparameters(seeded(), 10_007)
    for value, low, high in ((h.length, 0.25, 1.5), (h.noise, 0.02, 0.2), (h.scale, 0.3, 1.0)):
        assert value.shape == (10_007,) and value.min() >= low and value.max() <= high
    for value, low, high in ((h.length, 0.25, 1.5), (h.noise, 0.02, 0.2)):
        position = (value.log() - np.log(low)) / np.log(high / low)
        assert scipy.stats.kstest(position, 'uniform').pvalue > 1e-3
    assert scipy.stats.kstest((h.scale - 0.3) / 0.7, 'uniform').pvalue > 1e-3
    assert abs(h.matern.float().mean() - 0.5) < 0.02


@pytest.mark.parametrize('dim_x', [1, 2, 3])
@pytest.mark.parametrize('num_context', [0, 1, 7])
def test_locations_lie_in_the_workspace(dim_x, num_context):
    context, target = priors.locations(seeded(), BATCH, num_context, N_TARGET, dim_x)
    assert context.shape == (BATCH, num_context, dim_x)
    assert target.shape == (BATCH, N_TARGET, dim_x)
    for x in (context, target):
        assert (x.abs() <= 2).all()


def test_every_second_context_is_a_random_walk():
    context, _ = priors.locations(seeded(), BATCH, 211, N_TARGET, 2)
    step = context.diff(dim=1).norm(dim=-1).mean(1)
    walk_step = 0.15 * sqrt(np.pi / 2)  # mean length of a normal step in the plane
    assert (step[0::2] > 1).all()
    np.testing.assert_allclose(step[1::2], walk_step, rtol=0.2)
    context, _ = priors.locations(seeded(), 402, 3, N_TARGET, 2)
    for start in context[1::2, 0].mT:  # anywhere
        assert scipy.stats.kstest((start + 2) / 4, 'uniform').pvalue > 1e-3


@pytest.mark.parametrize('dim_x', [1, 2, 3])
@pytest.mark.parametrize('matern', [False, True])
def test_the_exact_gp_equals_scikit_learn(dim_x, matern):
    h = Hyperparameters(
        matern=torch.tensor([matern] * 2),
        length=torch.tensor([0.4, 1.3]).double(),
        scale=torch.tensor([0.9, 0.4]).double(),
        noise=torch.tensor([0.03, 0.2]).double(),
    )
    x, x_target = priors.locations(seeded(), 2, 7, N_TARGET, dim_x)
    y = torch.sin(2 * x.sum(-1, keepdim=True))
    mean, stddev = priors.gp_predict(h, x, y, x_target)
    for row in range(2):
        length = h.length[row].item()
        shape = Matern(length, nu=2.5) if matern else RBF(length)
        noise2 = h.noise[row].item() ** 2
        oracle = GaussianProcessRegressor(
            ConstantKernel(h.scale[row].item() ** 2) * shape, alpha=noise2, optimizer=None
        ).fit(x[row], y[row, :, 0])
        expected, field = oracle.predict(x_target[row], return_std=True)
        np.testing.assert_allclose(mean[row, :, 0], expected, atol=1e-10)
        np.testing.assert_allclose(stddev[row, :, 0], np.sqrt(field**2 + noise2), atol=1e-10)


@pytest.mark.parametrize('num_context', [0, 1, 7])
def test_the_exact_gp_answers_for_every_target(num_context):
    task, h = priors.exact_tasks(seeded(), BATCH, num_context, N_TARGET)
    mean, stddev = priors.gp_predict(h, task.x_context, task.y_context, task.x_target)
    assert mean.shape == stddev.shape == (BATCH, N_TARGET, 1)
    if num_context == 0:
        assert (mean == 0).all()
        expected = (h.scale.square() + h.noise.square()).sqrt()[:, None, None]
        torch.testing.assert_close(stddev, expected.expand(BATCH, N_TARGET, 1))


def test_exact_tasks_are_what_the_exact_gp_expects():
    task, h = priors.exact_tasks(seeded(), 401, 7, N_TARGET)
    mean, stddev = priors.gp_predict(h, task.x_context, task.y_context, task.x_target)
    z = ((task.y_target - mean) / stddev)[:, 0, 0]  # one a task: those of a task are correlated
    assert scipy.stats.kstest(z, 'norm').pvalue > 1e-3


@pytest.mark.parametrize('dim_x', [1, 2, 3])
@pytest.mark.parametrize('num_context', [0, 1, 7])
@pytest.mark.parametrize('tasks', ['exact', 'training'])
def test_tasks_are_finite_and_follow_the_generator(tasks, num_context, dim_x):
    def draw(seed):
        arguments = seeded(seed), BATCH, num_context, N_TARGET, dim_x
        if tasks == 'exact':
            return priors.exact_tasks(*arguments)[0]
        return priors.training_tasks(*arguments)

    first, again, other = draw(1), draw(1), draw(2)
    assert first.x_context.shape == (BATCH, num_context, dim_x)
    assert first.y_context.shape == (BATCH, num_context, 1)
    assert first.x_target.shape == (BATCH, N_TARGET, dim_x)
    assert first.y_target.shape == (BATCH, N_TARGET, 1)
    for name in Task._fields:
        value = getattr(first, name)
        assert value.isfinite().all() and value.dtype == torch.float64
        assert torch.equal(value, getattr(again, name))
    assert (first.x_context.abs() <= 2).all() and (first.x_target.abs() <= 2).all()
    assert not torch.equal(first.y_target, other.y_target)


@pytest.mark.parametrize('lag', [0.2, 1.0, 2.5])
@pytest.mark.parametrize('smoothness', [1.5, 2.5, torch.inf])
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
        correlation = (1 + z + (z**2 / 3 if smoothness == 2.5 else 0)) * np.exp(-z)
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
    assert not torch.equal(changed['task.x_target'], one[3]['task.x_target'])
    assert not torch.equal(one[0]['task.x_target'], one[3]['task.x_target'])
    assert len(one) == 7


def test_batches_are_made_once_and_then_read(tmp_path, monkeypatch):
    dataset = make_batches(tmp_path)
    first = dataset[2]
    monkeypatch.setattr(dataset, 'make', lambda index: pytest.fail('made again'))
    again = dataset[2]
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert [path.name for path in tmp_path.iterdir()] == ['000002.safetensors']


def test_batches_hold_float32_and_finite_numbers(tmp_path):
    dataset, sizes = make_batches(tmp_path, max_context=3, num_batches=23), set()
    for index in range(len(dataset)):
        tensors = dataset[index]
        batch = unpack(tensors)
        assert {value.dtype for value in tensors.values()} == {torch.float32}
        assert all(value.isfinite().all() for value in tensors.values())
        assert batch.prior.mean.shape == batch.task.y_target.shape == (4, N_TARGET, 1)
        sizes.add(batch.task.x_context.shape[1])
    assert sizes == {0, 1, 2, 3}


@pytest.mark.parametrize('dim_x', [1, 2, 3])
def test_the_prior_of_an_augmented_task_is_the_augmented_prior(dim_x):
    config = small_models.field(dim_x)
    task = priors.training_tasks(seeded(), BATCH, 13, N_TARGET, dim_x)
    augmented = augment(Batch(task, batches.solve(config, task)), seeded())
    solved = batches.solve(config, augmented.task)
    for name in solved._fields:
        expected = getattr(augmented.prior, name)
        torch.testing.assert_close(getattr(solved, name), expected, **EXACT)
    moved = augmented.task.x_context != task.x_context
    flipped = augmented.task.y_context != task.y_context
    for changed in (moved.flatten(1).any(1), flipped.flatten(1).any(1)):
        assert changed.any()


def test_augmenting_follows_the_generator_and_keeps_the_rest():
    config = small_models.field(2)
    task = priors.training_tasks(seeded(), BATCH, 13, N_TARGET)
    batch = Batch(task, batches.solve(config, task))
    first, again = augment(batch, seeded(1)), augment(batch, seeded(1))
    for part, same in zip((*first.task, *first.prior), (*again.task, *again.prior), strict=True):
        assert torch.equal(part, same)
    distance = torch.cdist(task.x_context, task.x_target)
    torch.testing.assert_close(torch.cdist(first.task.x_context, first.task.x_target), distance)
    torch.testing.assert_close(first.task.y_target.abs(), task.y_target.abs())


# Training ----------------------------------------------------------------------------------------


@pytest.mark.parametrize('num_context', [0, 1, 13])
def test_training_scores_what_prediction_predicts(num_context):
    model = small_models.build(small_models.field(2, chunk_size=1024))
    task = priors.training_tasks(seeded(), BATCH, num_context, N_TARGET)
    found = batch_log_likelihood(model, Batch(task, batches.solve(model.config, task)))
    state = model.update(model.init_state(BATCH), task.x_context, task.y_context)
    prediction = model.predict(state, task.x_target)
    expected = log_likelihood(prediction.mean, prediction.stddev, task.y_target)
    torch.testing.assert_close(found, expected, **EXACT)


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


def test_every_step_augments_in_another_way(tmp_path, monkeypatch):
    seeds = []

    def spy(batch, generator):
        seeds.append(generator.initial_seed())
        return augment(batch, generator)

    monkeypatch.setattr(loop, 'augment', spy)
    train(small_models.field(2), training_config(tmp_path))
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


# Evaluation --------------------------------------------------------------------------------------


def test_scores_of_an_untrained_model_are_those_of_least_squares():
    torch.manual_seed(0)
    model = CMANP(small_models.field(2, chunk_size=1024)).eval()
    scores = list(field_scores(model, (1, 7), num_tasks=6, num_target=N_TARGET, at_once=3))
    methods = ['gp', 'least squares', 'model']
    assert [(s.num_context, s.method) for s in scores] == [(n, m) for n in (1, 7) for m in methods]
    for gp, alone, untrained in (scores[:3], scores[3:]):
        for name in ('log_likelihood', 'rmse', 'coverage'):
            assert getattr(gp, name).shape == (6,)
            torch.testing.assert_close(getattr(untrained, name), getattr(alone, name), **EXACT)


def test_scores_of_the_gp_are_those_of_the_tasks_it_knows(monkeypatch):
    drawn, exact_tasks = [], priors.exact_tasks

    def spy(*arguments):
        drawn.append(exact_tasks(*arguments))
        return drawn[-1]

    monkeypatch.setattr(priors, 'exact_tasks', spy)
    model = CMANP(small_models.field(2)).eval()
    gp, *_ = field_scores(model, (7,), num_tasks=6, num_target=N_TARGET, at_once=3)
    assert len(drawn) == 2
    for (task, h), found in zip(drawn, gp.log_likelihood.split(3), strict=True):
        mean, stddev = priors.gp_predict(h, task.x_context, task.y_context, task.x_target)
        torch.testing.assert_close(found, log_likelihood(mean, stddev, task.y_target))


def test_no_method_beats_the_gp_that_knows_the_truth():
    model = CMANP(small_models.field(2)).eval()
    gp, alone, _ = field_scores(model, (23,), num_tasks=100, num_target=N_TARGET)
    assert gp.log_likelihood.mean() > alone.log_likelihood.mean()
    assert gp.rmse.mean() < alone.rmse.mean()
    assert abs(gp.coverage.mean() - 0.9) < 0.05


def test_a_folder_of_another_training_is_refused(tmp_path):
    train(small_models.field(2), training_config(tmp_path, steps=1))
    with pytest.raises(ConfigError, match='batch_size is 5, was 2'):
        train(small_models.field(2), training_config(tmp_path, batch_size=5))


def test_a_model_that_cannot_be_trained_is_refused(tmp_path):
    with pytest.raises(ConfigError, match='expected dim_y 1 and the least-squares memory'):
        train(small_models.field(2, dim_y=2), training_config(tmp_path))


def test_the_model_file_tells_the_command_that_made_it(uninterrupted):
    extra = read_extra(uninterrupted / 'model.safetensors')
    assert extra['command'].startswith('cmanp train --folder')
    assert '--seed 0' in extra['command'] and extra['step'] == 7
