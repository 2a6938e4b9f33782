"""Real fields beside what users would pick: scores, peers, tasks and the study around them."""

from functools import partial

import numpy as np
import pytest
import torch

from cmanp_ros.evaluation import convcnp, peers, real, real_peers, scores
from cmanp_ros.evaluation.kernels import Kernel, correlation, distances
from cmanp_ros.evaluation.tasks import Task
from cmanp_ros.optional import library

NEEDS = {
    'exact GP': 'gpytorch',
    'Vecchia GP': 'gpboost',
    'kriging': 'pykrige',
    real_peers.CONVCNP: 'neuralprocesses',
}  # all others need scipy


def needs(name):
    module = NEEDS.get(name, 'scipy')
    pytest.importorskip(module, reason=f'{module} is not installed: see requirements/evaluate.txt')


def smooth_task(num=181, num_target=307, seed=2) -> Task:
    rng = np.random.default_rng(seed)
    x = rng.uniform(-2, 2, (num + num_target, 2))
    y = 0.4 + 0.6 * np.sin(1.5 * x[:, 0]) * np.cos(1.1 * x[:, 1]) + 0.2 * x[:, 1]
    y += 0.05 * rng.standard_normal(len(y))
    return Task(x[:num], y[:num], x[num:], y[num:])


# Scores ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('mean', 'stddev', 'y'), [(0.0, 1.0, 0.0), (1.5, 0.3, 1.1), (-2.0, 2.5, 7.0), (0.0, 0.01, 1.0)]
)
def test_crps_is_its_integral(mean, stddev, y):
    # The step at y would be smeared by the rule: each side has a grid of its own.
    lowest, highest = min(mean - 12 * stddev, y), max(mean + 12 * stddev, y)
    integral = 0.0
    for low, high, step in ((lowest, y, 0.0), (y, highest, 1.0)):
        grid = torch.linspace(low, high, 400_001, dtype=torch.float64)
        below = torch.distributions.Normal(mean, stddev).cdf(grid)
        integral += float(torch.trapezoid((below - step).square(), grid))
    assert scores.crps(mean, stddev, np.array([y]))[0] == pytest.approx(integral, rel=1e-5)


def test_crps_of_a_method_without_stddev_is_its_absolute_error():
    y = np.array([1.0, 2.0, 5.0])
    without = scores.score(np.zeros(3), None, y).crps
    assert without == pytest.approx(8 / 3)
    assert scores.score(np.zeros(3), np.full(3, 1e-9), y).crps == pytest.approx(without)


# Peers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', [n for n in real_peers.peers() if n != real_peers.CONVCNP])
def test_peer_knows_a_smooth_field_better_than_its_mean(name):
    needs(name)
    task = smooth_task()
    mean, stddev = real_peers.peers()[name](task.x, task.y)(task.x_target)
    found = scores.score(mean, stddev, task.y_target)
    constant = np.full(len(task.y_target), task.y.mean())
    blind = scores.score(constant, np.full_like(constant, task.y.std()), task.y_target)
    assert found.rmse < 0.5 * blind.rmse
    assert found.log_likelihood > blind.log_likelihood + 0.3
    assert found.crps < 0.5 * blind.crps
    assert 0.7 < found.coverage_90 <= 1


def test_exact_gps_of_two_libraries_agree():
    needs('exact GP')
    pytest.importorskip('sklearn', reason='scikit-learn is not installed')
    task = smooth_task(num=real_peers.NUM_FIRST_FIT + 43)
    a = scores.score(*real_peers.exact_gp(task.x, task.y)(task.x_target), task.y_target)
    b = scores.score(*peers.exact_gp(task.x, task.y, task.x_target), task.y_target)
    assert a.rmse == pytest.approx(b.rmse, rel=0.03)
    assert a.log_likelihood == pytest.approx(b.log_likelihood, abs=0.03)


@pytest.mark.parametrize('nu', real_peers.SMOOTHNESS)
def test_frequencies_are_those_of_the_covariance(nu):
    kernel = Kernel(nu, length=0.7, scale=1.3, noise=0.1)
    frequency = real_peers.spectral_sample(kernel, 40_000, np.random.default_rng(5))
    for offset in ([0.1, 0.0], [0.3, -0.4], [0.0, 1.9]):
        found = np.cos(frequency @ offset).mean()  # standard error below 0.005
        assert found == pytest.approx(correlation(nu, np.linalg.norm(offset) / 0.7), abs=0.02)


def test_random_features_are_near_the_gp_on_a_smooth_field():
    needs('random features')
    task = smooth_task(num=67)
    found = scores.score(*real_peers.random_features(*task[:2])(task.x_target), task.y_target)
    gp = scores.score(*real_peers.local_gp(*task[:2])(task.x_target), task.y_target)
    assert found.rmse == pytest.approx(gp.rmse, rel=0.2)
    assert found.log_likelihood == pytest.approx(gp.log_likelihood, abs=0.15)


def test_scale_and_noise_have_the_largest_evidence():
    rng = np.random.default_rng(11)
    features = rng.standard_normal((61, 7))
    y = features @ (0.8 * rng.standard_normal(7)) + 0.3 * rng.standard_normal(61)

    def evidence(scale, noise):
        covariance = scale**2 * features @ features.T + noise**2 * np.eye(61)
        return -np.linalg.slogdet(covariance)[1] - y @ np.linalg.solve(covariance, y)

    scale, noise = real_peers.scale_and_noise(features, y)
    assert noise == pytest.approx(0.3, rel=0.3)
    for factors in ((1.2, 1), (1 / 1.2, 1), (1, 1.2), (1, 1 / 1.2)):
        assert evidence(scale, noise) > evidence(scale * factors[0], noise * factors[1])


@pytest.fixture
def small_convcnp(monkeypatch):
    needs(real_peers.CONVCNP)
    for name, value in (('CHANNELS', (8,) * 4), ('NUM_CONTEXT', (16, 32)), ('SAVED_EVERY', 1)):
        monkeypatch.setattr(convcnp, name, value)


def test_training_of_the_convcnp_goes_on_to_the_same_result(small_convcnp, tmp_path):
    class Interrupted(Exception):
        pass

    def interrupt(step):
        if step == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        convcnp.trained(tmp_path / 'a', 4, interrupt)
    steps = []
    resumed = convcnp.trained(tmp_path / 'a', 4, steps.append)
    whole = convcnp.trained(tmp_path / 'b', 4)
    assert steps == [3, 4]
    for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)
    task = smooth_task()
    mean, stddev = resumed(*task[:3])
    assert mean.shape == stddev.shape == task.y_target.shape
    assert np.isfinite(mean).all() and (stddev > 0).all()


def test_convcnp_learns(small_convcnp, tmp_path, monkeypatch):
    monkeypatch.setattr(convcnp, 'SAVED_EVERY', 100)
    task = smooth_task()
    untrained, trained = (
        scores.score(*convcnp.trained(tmp_path, steps)(*task[:3]), task.y_target)
        for steps in (0, 40)
    )
    assert trained.log_likelihood > untrained.log_likelihood


# Tasks -------------------------------------------------------------------------------------------


def test_stretches_are_thinned_evenly_and_scaled_by_what_is_observed():
    rng = np.random.default_rng(3)
    x = rng.uniform(0, 500, (5303, 2))
    y = rng.standard_normal(5303) - 3
    x[1700:1800], y[1700:1800] = x[100:200], y[100:200]  # repeats
    kept = np.r_[0:1700, 1800:5303]
    found = list(real.stretches(x, y, 5, seed=1))
    assert len(found) == 2 and len(list(real.stretches(x, y, 1, seed=1))) == 1
    order = np.random.default_rng(1).permutation(2)
    for task, number in zip(found, order, strict=True):
        part = kept[number * real.STRETCH :][: real.STRETCH]
        context = part[:: real.STRETCH // real.STRETCH_CONTEXT]
        assert len(task.y) == len(context) == real.STRETCH_CONTEXT
        assert len(task.y_target) == real.STRETCH_TARGETS
        assert task.y.mean() == pytest.approx(0) and task.y.std() == pytest.approx(0.65)
        scale = y[context].std() / 0.65
        np.testing.assert_allclose(task.y * scale + y[context].mean(), y[context])
        np.testing.assert_allclose(task.x * 75 + x[context].mean(0), x[context])
        # Targets are other soundings of the stretch.
        distance = distances(task.x_target * 75 + x[context].mean(0), x[part])
        which = part[distance.argmin(1)]
        assert distance.min(1).max() < 1e-9 and not set(which) & set(context)
        np.testing.assert_allclose(task.y_target * scale + y[context].mean(), y[which])


def test_what_is_absent_is_said_and_the_rest_goes_on(monkeypatch):
    def missing(*_):
        library('no_such_module', 'the elevation model')

    monkeypatch.setattr(real, 'windows', missing)
    monkeypatch.setattr(real.tracks, 'soundings', lambda: tuple(np.random.rand(3000, 3).T[:2]))
    monkeypatch.setattr(real, 'stretches', lambda *_: [])
    skipped = []
    found = list(real.settings(1, on_skip=lambda *what: skipped.append(what)))
    assert [setting.kind for setting in found] == ['soundings']
    ((what, reason),) = skipped
    assert what == 'terrain' and 'pip install no_such_module' in str(reason)


# The study ---------------------------------------------------------------------------------------


def constant(value, x, y):
    return lambda x_target: (np.full(len(x_target), value), np.ones(len(x_target)))


def large(x, y):
    held = np.ones(25_000_000 if len(y) > 32 else 1)  # 200 MB, but not in the task before
    return lambda x_target: (np.zeros(len(x_target)), held[0] * np.ones(len(x_target)))


def missing(x, y):
    library('no_such_module', 'this method')


def methods(value):
    return {
        'missing': missing,
        'constant': partial(constant, value),
        'zero': partial(constant, 0.0),
        'large': large,
    }


def run(cache_dir=None, value=1.0):
    rng = np.random.default_rng(7)
    tasks = [
        Task(rng.random((41, 2)), rng.random(41), rng.random((13, 2)), rng.standard_normal(13))
        for _ in range(3)
    ]
    skipped = []
    rows = real.evaluate(
        partial(methods, value),
        [real.Setting('terrain', 41, 0.0, tasks)],
        reference='zero',
        cache_dir=cache_dir,
        cached=('constant', 'large'),
        on_skip=lambda *what: skipped.append(what),
    )
    return {row['method']: row for row in rows}, skipped, tasks


def test_study_compares_task_by_task_and_tells_memory_apart(tmp_path):
    rows, ((name, reason),), tasks = run(tmp_path)
    assert list(rows) == ['zero', 'constant', 'large']  # the reference comes first
    assert name == 'missing' and 'pip install no_such_module' in str(reason)
    assert rows['zero']['rmse_to_reference'] == (0, 0)
    gain = [np.mean(t.y_target**2 - (t.y_target - 1) ** 2) / 2 for t in tasks]
    assert rows['constant']['log_likelihood_to_reference'] == pytest.approx(
        scores.mean_and_error(gain)
    )
    if not np.isnan(rows['large']['memory_mb'][0]):  # not known but on Linux
        assert 180 < rows['large']['memory_mb'][0] < 260
        assert rows['constant']['memory_mb'][0] < 50
    # Those named are not asked again, the others are.
    again, _, _ = run(tmp_path, value=2.0)
    assert again['constant']['rmse'] == rows['constant']['rmse']
    assert again['large']['seconds_fit'] == rows['large']['seconds_fit']
