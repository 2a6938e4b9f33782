"""Tasks of one map are Gaussian processes: their posterior against a dense one in numpy."""

from dataclasses import replace
from math import exp, pi, sin, sqrt

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from scipy.special import gamma, kv

from cmanp_ros.core.errors import ConfigError
from cmanp_ros.training import processes
from cmanp_ros.training.processes import DESIGNS, KERNELS, MapPrior

LENGTH, SCALE, NOISE = 0.7, 0.6, 0.1
EXACT = {'rtol': 1e-8, 'atol': 1e-9}


def prior_of(**overrides):
    """Return a prior in which length, scale and noise are known."""
    known = {'length': (LENGTH,) * 2, 'scale': (SCALE,) * 2, 'noise': (NOISE,) * 2}
    sizes = {'num_context': (11, 11), 'num_target': 7}
    return MapPrior(**known | sizes | overrides)


def seeded(seed=3):
    return torch.Generator().manual_seed(seed)


# The oracle: kernels of two points, one by one, and a dense Gaussian process in numpy ------------


def rbf(difference, length):
    return exp(-(difference @ difference) / (2 * length**2))


def matern(nu):
    def kernel(difference, length):
        r = max(np.linalg.norm(difference), 1e-9)
        z = sqrt(2 * nu) * r / length
        return 2 ** (1 - nu) / gamma(nu) * z**nu * kv(nu, z)

    return kernel


def periodic(difference, length):
    return np.prod([exp(-2 * sin(pi * d / (8 * length)) ** 2) for d in difference])


def fractal(difference, length):
    weights = np.array([1, 1 / 4, 1 / 16, 1 / 64, 1 / 256])
    lengths = [2 * length, length, length / 2, length / 4, length / 8]
    return weights @ [rbf(difference, one) for one in lengths] / weights.sum()


def rough_on_smooth(difference, length):
    return 0.7 * rbf(difference, 2 * length) + 0.3 * matern(1.5)(difference, length / 2)


ORACLES = {
    'rbf': rbf,
    'matern12': matern(0.5),
    'matern32': matern(1.5),
    'matern52': matern(2.5),
    'periodic': periodic,
    'fractal': fractal,
    'sum': rough_on_smooth,
}


def numpy_kernel(name, a, b, length=LENGTH):
    """Return the kernel between a (n, dim_x) and b (m, dim_x)."""
    return np.array([[ORACLES[name](p - q, length) for q in b] for p in a]).reshape(len(a), len(b))


def numpy_posterior(name, x, y, x_target, context_variance, target_variance):
    """Condition a Gaussian process of variance SCALE^2 on (n, 1) readings."""
    k = SCALE**2 * numpy_kernel(name, x, x) + np.diag(context_variance + 1e-7 * SCALE**2)
    cross = SCALE**2 * numpy_kernel(name, x_target, x)
    mean = cross @ np.linalg.solve(k, y)
    unseen = SCALE**2 * numpy_kernel(name, x_target, x_target)
    covariance = unseen - cross @ np.linalg.solve(k, cross.T)
    return mean, covariance + np.diag(target_variance + 1e-7 * SCALE**2)


@pytest.fixture
def secrets(monkeypatch):
    """Return a list that fills with the variances of readings and with what was added."""
    seen, condition = [], processes._condition

    def spy(generator, x, covariance, context_noise, target_noise, added, *sizes):
        seen.append((x, context_noise - 1e-7 * SCALE**2, target_noise, added))
        return condition(generator, x, covariance, context_noise, target_noise, added, *sizes)

    monkeypatch.setattr(processes, '_condition', spy)
    return seen


# Kernels -----------------------------------------------------------------------------------------


def test_every_kernel_has_an_oracle():
    assert ORACLES.keys() == KERNELS.keys()


@pytest.mark.parametrize('dim_x', [1, 2, 3])
@pytest.mark.parametrize('name', sorted(KERNELS))
def test_kernels_equal_their_formula_and_have_variance_1(name, dim_x):
    x = torch.rand(2, 7, dim_x, dtype=torch.float64) * 4 - 2
    length = torch.tensor([0.3, 1.1], dtype=torch.float64)[:, None, None]
    found = KERNELS[name](x.unsqueeze(2) - x.unsqueeze(1), length)
    for row in range(2):
        expected = numpy_kernel(name, x[row].numpy(), x[row].numpy(), length[row].item())
        np.testing.assert_allclose(found[row], expected, rtol=1e-6, atol=1e-9)
    ones = torch.ones(2, 7, dtype=torch.float64)
    torch.testing.assert_close(found.diagonal(dim1=-2, dim2=-1), ones, rtol=0, atol=1e-12)


@pytest.mark.parametrize('dim_x', [1, 2, 3])
@pytest.mark.parametrize('name', sorted(KERNELS))
def test_kernels_are_positive_definite(name, dim_x):
    x = torch.rand(1, 101, dim_x, dtype=torch.float64) * 4 - 2
    for length in (0.1, 0.6, 3.0):
        lengths = torch.full((1, 1, 1), length, dtype=torch.float64)
        covariance = KERNELS[name](x.unsqueeze(2) - x.unsqueeze(1), lengths)
        assert torch.linalg.eigvalsh(covariance).min() > -1e-12 * len(x[0])


def test_the_periodic_kernel_repeats_after_eight_lengths():
    difference = torch.tensor([0.0, 0.3, 0.3 + 8 * LENGTH, 4 * LENGTH], dtype=torch.float64)
    found = KERNELS['periodic'](difference[None, None, :, None], torch.full((1, 1, 1), LENGTH))
    zero, near, again, half = found[0, 0].tolist()
    assert zero == 1 and near == pytest.approx(again, rel=1e-6) and half == pytest.approx(exp(-2))


# Posterior ---------------------------------------------------------------------------------------


def assert_posterior(tasks, secret, name):
    """Compare three tasks with the oracle, given the noise and what was added."""
    _, context_variance, target_variance, added = secret
    num_context = tasks.x.shape[1]
    for row in range(3):
        before, after = added[row].numpy()[:num_context], added[row].numpy()[num_context:]
        mean, covariance = numpy_posterior(
            name,
            tasks.x[row].numpy(),
            tasks.y[row].numpy() - before,
            tasks.x_target[row].numpy(),
            np.broadcast_to(context_variance[row], num_context),
            target_variance[row].numpy(),
        )
        np.testing.assert_allclose(tasks.mean[row], mean + after, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(tasks.covariance[row], covariance, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(('dim_x', 'dim_y'), [(1, 1), (2, 2), (3, 2)])
@pytest.mark.parametrize('name', sorted(KERNELS))
def test_the_posterior_is_that_of_a_dense_gp(secrets, name, dim_x, dim_y):
    tasks = prior_of(kernels=(name,)).draw(seeded(), 3, dim_x, dim_y)
    assert tasks.x.shape == (3, 11, dim_x) and tasks.y.shape == (3, 11, dim_y)
    assert tasks.mean.shape == tasks.y_target.shape == (3, 7, dim_y)
    _, context_variance, target_variance, added = secrets[0]
    assert np.allclose(context_variance, NOISE**2) and np.allclose(target_variance, NOISE**2)
    assert not added.any()
    assert_posterior(tasks, secrets[0], name)


@pytest.mark.parametrize('design', sorted(DESIGNS))
def test_the_posterior_is_that_of_a_dense_gp_wherever_it_is_observed(secrets, design):
    tasks = prior_of(designs=(design,)).draw(seeded(), 3, 2)
    assert_posterior(tasks, secrets[0], 'rbf')


def test_the_posterior_knows_uneven_noise_which_grows_tenfold_from_end_to_end(secrets):
    tasks = prior_of(uneven_noise=1.0).draw(seeded(), 5, 2, 2)
    x, context_variance, target_variance, _ = secrets[0]
    noise = torch.cat([context_variance, target_variance], 1).sqrt()
    expected = NOISE * 10 ** (x[..., 0] / 4)
    torch.testing.assert_close(noise, expected, rtol=1e-8, atol=0)
    assert_posterior(tasks, secrets[0], 'rbf')


def test_the_posterior_knows_which_readings_are_outliers_and_targets_never_are(secrets):
    tasks = prior_of(heavy_tails=1.0, num_context=(31, 31)).draw(seeded(), 17, 1)
    _, context_variance, target_variance, _ = secrets[0]
    factor = (context_variance.sqrt() / NOISE).round(decimals=6)
    assert set(factor.flatten().tolist()) == {1.0, 8.0}
    assert 0.01 < (factor == 8).double().mean() < 0.1
    torch.testing.assert_close(target_variance.sqrt(), torch.full((17, 7), NOISE).double())
    assert_posterior(tasks, secrets[0], 'rbf')


def test_a_trend_is_linear_and_part_of_the_mean(secrets):
    tasks = prior_of(trend=1.0).draw(seeded(), 5, 2)
    x, _, _, added = secrets[0]
    for row in range(5):
        slope, left, *_ = np.linalg.lstsq(x[row].numpy(), added[row].numpy(), rcond=None)
        assert left < 1e-20 and 0 < np.linalg.norm(slope) < 5 * SCALE
    assert_posterior(tasks, secrets[0], 'rbf')


def test_a_step_edge_is_straight_and_part_of_the_mean(secrets):
    tasks = prior_of(step_edge=1.0, num_context=(31, 31)).draw(seeded(), 17, 2)
    x, _, _, added = secrets[0]
    sides = added.sign()
    assert (added.abs() == added[:, :1].abs()).all()
    assert (sides.mean(1).abs() < 1).double().mean() > 0.7  # most maps are cut in two
    for row in range(17):  # by a line: there are w, b with side * (w x + b) >= 1
        lines = sides[row] * torch.cat([x[row], torch.ones(38, 1)], 1)
        found = linprog(np.zeros(3), -lines.numpy(), -np.ones(38), bounds=(None, None))
        assert found.success
    assert_posterior(tasks, secrets[0], 'rbf')


def test_shares_are_of_tasks(secrets):
    shares = {'uneven_noise': 0.3, 'trend': 0.6, 'step_edge': 0.0}
    prior_of(**shares).draw(seeded(), 999, 1)
    _, context_variance, _, added = secrets[0]
    uneven = (context_variance.std(1) > 1e-6).double().mean()
    trended = (added != 0).any(1).double().mean()
    assert abs(uneven - 0.3) < 0.06 and abs(trended - 0.6) < 0.06


def test_each_task_has_one_of_the_kernels(monkeypatch):
    seen = []
    for name in ('rbf', 'matern12'):
        own = KERNELS[name]
        monkeypatch.setitem(
            KERNELS,
            name,
            lambda difference, length, name=name, own=own: (
                seen.append((name, len(difference))) or own(difference, length)
            ),
        )
    prior_of(kernels=('rbf', 'matern12')).draw(seeded(), 999, 1)
    counts = dict(seen)
    assert sum(counts.values()) == 999 and min(counts.values()) > 400


# Draws -------------------------------------------------------------------------------------------


def whitened(tasks):
    """Return targets (batch, num_target, dim_y) in units in which they are white."""
    factor = torch.linalg.cholesky(tasks.covariance)
    left = tasks.y_target - tasks.mean
    return torch.linalg.solve_triangular(factor, left, upper=False)


HARD = {'heavy_tails': 0.5, 'uneven_noise': 0.5, 'step_edge': 0.5, 'trend': 0.5}


@pytest.mark.parametrize('options', [{}, HARD], ids=['plain', 'hard'])
def test_drawn_targets_have_the_mean_and_covariance_of_the_posterior(options):
    batch = 9001
    prior = prior_of(kernels=tuple(KERNELS), num_target=4, num_context=(5, 5), **options)
    tasks = prior.draw(seeded(), batch, 2, 2)
    white = whitened(tasks).mT.flatten(0, 1)  # (batch * dim_y, num_target)
    error = 5 / (2 * batch) ** 0.5
    assert white.mean(0).abs().max() < error
    assert (white.T.cov() - torch.eye(4)).abs().max() < 1.5 * error
    kurtosis = (white**4).mean(0)
    assert (kurtosis - 3).abs().max() < 5 * (96 / (2 * batch)) ** 0.5
    one, other = whitened(tasks).unbind(-1)
    assert (one * other).mean(0).abs().max() < error * 2**0.5  # outputs are independent


def test_observations_have_the_covariance_of_the_process():
    batch = 20_001
    prior = prior_of(kernels=('matern32',), num_context=(3, 3), num_target=2)
    tasks = prior.draw(seeded(), batch, 1)
    both = torch.cat([tasks.x, tasks.x_target], 1)
    values = torch.cat([tasks.y, tasks.y_target], 1)[..., 0]
    distance = (both - both.mT).abs()
    z = sqrt(3) * distance / LENGTH
    covariance = SCALE**2 * (1 + z) * torch.exp(-z) + NOISE**2 * torch.eye(5)
    factor = torch.linalg.cholesky(covariance)
    white = torch.linalg.solve_triangular(factor, values.unsqueeze(-1), upper=False)[..., 0]
    assert white.mean(0).abs().max() < 5 / batch**0.5
    assert (white.T.cov() - torch.eye(5)).abs().max() < 7 / batch**0.5


def test_nothing_observed_leaves_the_process_itself():
    tasks = prior_of(designs=('empty',)).draw(seeded(), 3, 2, 2)
    assert tasks.x.shape == (3, 0, 2) and tasks.y.shape == (3, 0, 2)
    assert not tasks.mean.any()
    diagonal = tasks.covariance.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(
        diagonal, torch.full_like(diagonal, SCALE**2 + NOISE**2), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize('design', sorted(set(DESIGNS) - {'empty'}))
def test_every_design_can_have_no_points(design):
    tasks = prior_of(designs=(design,), num_context=(0, 0)).draw(seeded(), 2, 2)
    assert tasks.x.shape == (2, 0, 2) and all(part.isfinite().all() for part in tasks)


def test_draws_are_functions_of_the_generator():
    prior = MapPrior(kernels=tuple(KERNELS), designs=tuple(DESIGNS), **HARD)
    for seed in range(7):
        first, again, other = (prior.draw(seeded(s), 2, 2) for s in (seed, seed, seed + 1))
        for name, part, same in zip(first._fields, first, again, strict=True):
            assert torch.equal(part, same) and part.dtype == torch.float64, name
            assert part.isfinite().all(), name
        assert not torch.equal(first.y_target, other.y_target)


def test_numbers_of_observations_are_uniform_over_the_range():
    prior = MapPrior(num_context=(2, 5), num_target=1)
    sizes = [prior.draw(seeded(seed), 1).x.shape[1] for seed in range(201)]
    assert sorted(set(sizes)) == [2, 3, 4, 5]
    assert min(sizes.count(size) for size in (2, 3, 4, 5)) > 25


@pytest.mark.parametrize('name', ['length', 'scale', 'noise'])
@pytest.mark.parametrize('is_log', [False, True])
def test_hyperparameters_are_uniform_over_the_range_or_in_their_logarithm(name, is_log):
    prior = MapPrior(**{name: (0.01, 1.0)}, log_uniform=(name,) if is_log else ())
    found = prior._hyperparameter(seeded(), name, 4001).flatten()
    assert 0.01 <= found.min() and found.max() <= 1
    share = (found.log() / np.log(100) + 1) if is_log else (found - 0.01) / 0.99
    for low in (0.2, 0.5, 0.8):
        assert abs((share > low).double().mean() - (1 - low)) < 0.05


@pytest.mark.parametrize('name', sorted(KERNELS))
def test_a_thousand_observations_are_conditioned_on(name):
    options = {'length': (0.5, 3.0), 'noise': (1e-3, 1e-3), 'num_context': (1024, 1024)}
    tasks = prior_of(kernels=(name,), **options).draw(seeded(), 1, 2)
    assert tasks.x.shape == (1, 1024, 2)
    assert all(part.isfinite().all() for part in tasks)
    assert whitened(tasks).abs().max() < 6
    assert torch.linalg.eigvalsh(tasks.covariance).min() > 0


# Designs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize('dim_x', [1, 2, 3])
@pytest.mark.parametrize('name', sorted(DESIGNS))
def test_designs_stay_in_the_map(name, dim_x):
    x = DESIGNS[name](seeded(), 31, 97, dim_x)
    assert x.shape == (31, 97, dim_x) and x.dtype == torch.float64
    assert x.abs().max() <= 2


def test_uniform_designs_cover_the_map():
    x = DESIGNS['uniform'](seeded(), 31, 97, 2)
    share, _ = torch.histogram(x.flatten(), bins=4, range=(-2, 2))
    assert (share / share.sum() - 0.25).abs().max() < 0.03


def test_half_seen_covers_one_half_only():
    x = DESIGNS['half_seen'](seeded(), 31, 97, 2)
    assert x[..., 0].min() >= 0 and x[..., 0].max() > 1.9
    assert x[..., 1].min() < -1.9 and x[..., 1].max() > 1.9


def test_a_parked_robot_reads_its_place_again_and_again():
    x = DESIGNS['parked'](seeded(), 31, 97, 2)
    at_home = (x == x[:, :1]).all(-1)
    assert 0.85 < at_home.double().mean() < 0.95
    assert x[~at_home].unique(dim=0).shape[0] == (~at_home).sum()


def test_a_trajectory_moves_on_from_where_it_was():
    x = DESIGNS['trajectory'](seeded(), 31, 97, 2)
    step = (x[:, 1:] - x[:, :-1]).norm(dim=-1).mean()
    shuffled = (x[:, 1:] - x[:, torch.randperm(97)][:, 1:]).norm(dim=-1).mean()
    assert step < 0.25 * shuffled


def test_clusters_are_few_and_narrow():
    x = DESIGNS['clusters'](seeded(), 31, 97, 2)
    near = torch.cdist(x, x) < 0.4
    assert near.double().mean() > 0.15
    uniform = DESIGNS['uniform'](seeded(), 31, 97, 2)
    assert (torch.cdist(uniform, uniform) < 0.4).double().mean() < 0.06


# Errors ------------------------------------------------------------------------------------------

OF_KERNELS = f'expected some of {sorted(KERNELS)}'
OF_DESIGNS = f'expected some of {sorted(DESIGNS)}'
OF_HYPER = "expected some of ['length', 'scale', 'noise']"
TWO = 'expected least and most: two numbers of at least 1e-09, in this order'


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'kernels': ['rbf', 'white']}, f"kernels is ['rbf', 'white'], {OF_KERNELS}"),
        ({'kernels': []}, f'kernels is [], {OF_KERNELS}'),
        ({'kernels': 'rbf'}, f"kernels is 'rbf', {OF_KERNELS}"),
        ({'designs': ['spiral']}, f"designs is ['spiral'], {OF_DESIGNS}"),
        ({'length': [0.6, 0.1]}, f'length is [0.6, 0.1], {TWO}'),
        ({'scale': [0.0, 1.0]}, f'scale is [0.0, 1.0], {TWO}'),
        ({'noise': [0.1]}, f'noise is [0.1], {TWO}'),
        ({'noise': 0.1}, f'noise is 0.1, {TWO}'),
        ({'noise': ['much', 'more']}, f"noise is ['much', 'more'], {TWO}"),
        ({'length': [0.1, float('inf')]}, f'length is [0.1, inf], {TWO}'),
        ({'length': [float('nan'), 1]}, f'length is [nan, 1], {TWO}'),
        (
            {'num_context': [9, 3]},
            'num_context is [9, 3], expected least and most: two whole numbers of at least 0, in '
            'this order',
        ),
        (
            {'num_context': [0.5, 3]},
            'num_context is [0.5, 3], expected least and most: two whole numbers of at least 0, '
            'in this order',
        ),
        ({'heavy_tails': 1.5}, 'heavy_tails is 1.5, expected a share between 0 and 1'),
        ({'trend': -0.1}, 'trend is -0.1, expected a share between 0 and 1'),
        ({'trend': 'some'}, "trend is 'some', expected a share between 0 and 1"),
        ({'kernels': [['rbf']]}, f"kernels is [['rbf']], {OF_KERNELS}"),
        ({'log_uniform': ['trend']}, f"log_uniform is ['trend'], {OF_HYPER}"),
        ({'log_uniform': 5}, f'log_uniform is 5, {OF_HYPER}'),
        ({'log_uniform': [['noise']]}, f"log_uniform is [['noise']], {OF_HYPER}"),
        ({'num_target': 0}, 'num_target is 0, expected at least 1'),
    ],
)
def test_values_out_of_range_are_named_with_what_was_expected(options, message):
    with pytest.raises(ConfigError) as error:
        MapPrior.from_dict(options)
    assert str(error.value) == message


def test_unknown_keys_are_named_with_the_known_ones():
    with pytest.raises(ConfigError) as error:
        MapPrior.from_dict({'lenght': [0.1, 0.6], 'noise': [0.1, 0.1]})
    assert str(error.value).startswith("prior has ['lenght']; expected keys among ['kernels', ")


def test_numbers_that_yaml_reads_as_text_are_numbers():
    found = MapPrior.from_dict({'noise': ['1e-3', '1e-1'], 'num_context': [3, 7]})
    assert found == replace(MapPrior(), noise=(0.001, 0.1), num_context=(3, 7))
