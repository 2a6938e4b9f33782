"""Fields of the GP prior: draws, the GP that knows the kernel, the ceiling, and their scores."""

from itertools import pairwise
from math import exp, inf, log, pi, sqrt
from statistics import NormalDist

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import multivariate_normal

from cmanp_ros.core.errors import ConfigError
from cmanp_ros.evaluation import field_prior
from cmanp_ros.evaluation.kernels import Kernel, distances

NUM_TARGET = 23


def drawn(kind='prior', num=8, num_context=31, seed=1, num_target=NUM_TARGET):
    return list(field_prior.tasks(kind, num, num_context, seed, num_target))


# Tasks -------------------------------------------------------------------------------------------


def test_tasks_reproduce_and_differ():
    first, again, other = drawn(), drawn(), drawn(seed=2)
    for (task, kernel), (same, same_kernel) in zip(first, again, strict=True):
        assert kernel == same_kernel
        assert all(map(np.array_equal, task, same))
        assert [part.shape for part in task] == [(31, 2), (31,), (NUM_TARGET, 2), (NUM_TARGET,)]
        assert all(part.dtype == np.float64 for part in task)
        assert np.abs(task.x).max() <= 2 and np.abs(task.x_target).max() <= 2
    assert all(a.kernel != b.kernel for a, b in pairwise(first))
    assert all(a.kernel != b.kernel for a, b in zip(first, other, strict=True))


def test_hyperparameters_have_the_distributions_of_the_prior():
    kernels = [k for _, k in drawn(num=401, num_context=2, seed=2, num_target=1)]
    for values, low, high in (
        ([log(k.length) for k in kernels], log(0.25), log(1.5)),
        ([log(k.noise) for k in kernels], log(0.02), log(0.2)),
        ([k.scale for k in kernels], 0.3, 1.0),
    ):
        shares = (np.sort(values) - low) / (high - low)
        assert 0 <= shares[0] and shares[-1] <= 1
        uniform = (np.arange(401) + 0.5) / 401
        assert np.abs(shares - uniform).max() < 1.63 / sqrt(401)  # Kolmogorov-Smirnov, 1 %
    assert abs(sum(k.nu == inf for k in kernels) - 200) <= 1
    assert {k.nu for k in kernels} == {inf, 2.5}


def test_each_kernel_has_each_design_equally_often():
    """A winding path has its next reading near, uniform points have it anywhere."""
    found = []
    for task, kernel in drawn(num=40, num_context=61, num_target=1):
        step = np.median(np.linalg.norm(np.diff(task.x, axis=0), axis=1))
        found.append((kernel.nu, bool(step < 0.6)))
    expected = [(nu, winds) for nu in (inf, 2.5) for winds in (False, True)]
    assert [found.count(pair) for pair in expected] == [10, 10, 10, 10]


def whitened(kind, num=60):
    """Return residuals of all values of tasks under their kernels, (tasks, points)."""
    rows = []
    for task, kernel in drawn(kind, num, 41):
        x, y = np.concatenate([task.x, task.x_target]), np.concatenate([task.y, task.y_target])
        covariance = kernel(distances(x, x)) + kernel.noise**2 * np.eye(len(x))
        rows.append(np.linalg.solve(np.linalg.cholesky(covariance), y))
    return np.array(rows)


@pytest.mark.parametrize('kind', ['prior', 'short lengths', 'long lengths'])
def test_values_are_draws_of_the_kernel_that_is_told(kind):
    z = whitened(kind)
    assert abs(np.mean(z)) < 4 / sqrt(z.size)
    assert abs(np.mean(z**2) - 1) < 4 * sqrt(2 / z.size)
    assert abs(np.mean(z**4) - 3) < 4 * sqrt(96 / z.size)


@pytest.mark.parametrize('kind', ['heavy tails', 'step edge'])
def test_of_faults_the_kernel_does_not_know(kind):
    assert np.mean(whitened(kind) ** 2) > 1.5
    for (task, kernel), (control, same) in zip(drawn(kind), drawn(), strict=True):
        assert kernel == same
        assert np.array_equal(task.x, control.x) and np.array_equal(
            task.x_target, control.x_target
        )


def test_an_unknown_kind_is_refused():
    with pytest.raises(ConfigError, match="'rough': expected one of prior"):
        next(field_prior.tasks('rough', 1, 7, 0))


# Methods -----------------------------------------------------------------------------------------


def joint_density(kernel, x, y):
    covariance = kernel(distances(x, x)) + kernel.noise**2 * np.eye(len(x))
    return multivariate_normal(cov=covariance).logpdf(y)


def test_the_known_gp_is_the_ratio_of_joint_densities():
    for task, kernel in drawn():
        mean, stddev = field_prior.exact_gp(kernel)(*task[:3])
        for i in range(3):
            y = mean[i] + 1.3 * stddev[i]
            x = np.concatenate([task.x, task.x_target[i : i + 1]])
            expected = joint_density(kernel, x, [*task.y, y]) - joint_density(
                kernel, task.x, task.y
            )
            found = NormalDist(mean[i], stddev[i]).pdf(y)
            assert log(found) == pytest.approx(expected, abs=1e-6)


def test_of_no_observations_the_known_gp_and_the_ceiling_say_the_prior():
    nothing = np.zeros((0, 2)), np.zeros(0), np.zeros((1, 2))
    kernel = Kernel(2.5, 0.7, 0.8, 0.1)
    assert np.ravel(field_prior.exact_gp(kernel)(*nothing)) == pytest.approx([0, sqrt(0.65)])
    scale2 = quad(lambda s: s**2 / 0.7, 0.3, 1.0)[0]
    noise2 = quad(lambda u: exp(2 * u) / log(10), log(0.02), log(0.2))[0]
    found = np.ravel(field_prior.ceiling(*nothing))
    assert found == pytest.approx([0, sqrt(scale2 + noise2)], rel=2e-3)


def test_the_ceiling_is_the_mixture_over_kernels_by_their_evidence():
    """The quadrature once more, by densities of whole tasks and no eigendecomposition."""
    sizes = {'num_lengths': 3, 'num_scales': 2, 'num_noises': 2}
    settings = [
        Kernel(
            nu, 0.25 * 6 ** ((i + 0.5) / 3), 0.3 + 0.7 * (j + 0.5) / 2, 0.02 * 10 ** (k / 2 + 0.25)
        )
        for nu in (inf, 2.5)
        for i in range(3)
        for j in range(2)
        for k in range(2)
    ]
    for task, _ in drawn(num=4, num_context=11):
        evidence = np.array([joint_density(kernel, task.x, task.y) for kernel in settings])
        weight = (
            np.exp(evidence - evidence.max())[:, None] / np.exp(evidence - evidence.max()).sum()
        )
        means, stddevs = np.swapaxes([field_prior.exact_gp(k)(*task[:3]) for k in settings], 0, 1)
        mean = (weight * means).sum(0)
        second = (weight * (stddevs**2 + means**2)).sum(0)
        found = field_prior.ceiling(*task[:3], **sizes)
        np.testing.assert_allclose(found[0], mean, atol=1e-6)
        np.testing.assert_allclose(found[1], np.sqrt(second - mean**2), rtol=1e-6)


def test_one_tile_is_as_wide_as_the_prior_where_nothing_is_known():
    nothing = np.zeros((0, 2)), np.zeros(0), np.array([[0.0, 0.0], [0.4, -0.3]])
    mean, stddev = field_prior.one_tile(field_prior.ONE_TILE)(*nothing)
    expected = field_prior.ceiling(*nothing)
    assert mean == pytest.approx([0, 0])
    assert stddev == pytest.approx(expected[1], rel=0.15)


# Scores ------------------------------------------------------------------------------------------


def test_rows_hold_the_scores_of_each_method_and_the_gap_to_the_known_gp():
    def guess(x, y, x_target):
        return np.zeros(len(x_target)), np.full(len(x_target), 0.7)

    seen = []
    rows = list(
        field_prior.evaluate({'guess': guess}, 5, (7, 13), ('prior', 'step edge'), 3, seen.append)
    )
    assert seen == list(range(1, 21))
    assert [(r['kind'], r['num_context'], r['method']) for r in rows] == [
        (kind, n, method)
        for kind in ('prior', 'step edge')
        for n in (7, 13)
        for method in (field_prior.KNOWN, 'guess')
    ]
    for known, row in zip(rows[::2], rows[1::2], strict=True):
        y = [task.y_target for task, _ in field_prior.tasks(row['kind'], 5, row['num_context'], 3)]
        densities = [np.mean(-0.5 * log(2 * pi * 0.49) - v**2 / 0.98) for v in y]
        assert row['log_likelihood'] == pytest.approx(
            (np.mean(densities), np.std(densities, ddof=1) / sqrt(5))
        )
        assert known['gap'] == (0, 0)
        assert row['gap'][0] == pytest.approx(known['log_likelihood'][0] - np.mean(densities))
        for level, reach in ((50, 0.674490), (90, 1.644854), (95, 1.959964)):
            shares = [np.mean(np.abs(v) < 0.7 * reach) for v in y]
            assert row[f'coverage_{level}'][0] == pytest.approx(np.mean(shares))


def test_the_known_gp_covers_what_it_says():
    """On the prior, and where there is a step less than it says."""
    known, step = field_prior.evaluate({}, 40, (17,), ('prior', 'step edge'), 5)
    for level in (50, 90, 95):
        mean, error = known[f'coverage_{level}']
        assert abs(mean - level / 100) < 4 * error
    assert step['coverage_90'][0] < known['coverage_90'][0] - 0.05


def test_the_ceiling_is_left_out_where_it_would_take_minutes(monkeypatch):
    monkeypatch.setattr(field_prior, 'CEILING_CONTEXT', 9)
    methods = {field_prior.CEILING: field_prior.ceiling}
    rows = list(field_prior.evaluate(methods, 2, (7, 11), ('prior',), 0))
    assert [(row['num_context'], row['method']) for row in rows] == [
        (7, field_prior.KNOWN),
        (7, field_prior.CEILING),
        (11, field_prior.KNOWN),
    ]
