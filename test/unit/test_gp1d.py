"""The paper's benchmark: its protocol, the GPs beside it against numpy, and how it scores."""

import json
from math import pi
from pathlib import Path

import numpy as np
import pytest
import small_models
import torch
from scipy.stats import kstest, multivariate_normal

from cmanp_ros.checkpoint import load_model, shipped_models
from cmanp_ros.core import autoregressive
from cmanp_ros.core.config import AutoregressiveConfig
from cmanp_ros.evaluation import gp1d

EXACT = {'rtol': 1e-8, 'atol': 1e-8}


def kernel_of(name, distance, length, scale):
    """Return the covariance of the field by the published formulas."""
    r = np.abs(distance) / length
    if name == 'rbf':
        return scale**2 * np.exp(-(r**2) / 2)
    return scale**2 * (1 + 5**0.5 * r + 5 * r**2 / 3) * np.exp(-(5**0.5) * r)


def dense_gp(name, task, row, length, scale):
    """Return mean, covariance and log evidence of one curve by numpy."""
    x, y, x_target = (part[row, :, 0].numpy() for part in task[:3])
    k = kernel_of(name, x[:, None] - x, length, scale) + gp1d.NOISE**2 * np.eye(len(x))
    cross = kernel_of(name, x_target[:, None] - x, length, scale)
    own = kernel_of(name, x_target[:, None] - x_target, length, scale)
    own += gp1d.NOISE**2 * np.eye(len(x_target))
    mean = cross @ np.linalg.solve(k, y)
    covariance = own - cross @ np.linalg.solve(k, cross.T)
    evidence = multivariate_normal.logpdf(y, np.zeros(len(y)), k)
    return mean, covariance, evidence


def test_curves_follow_the_protocol_and_the_seed():
    drawn = list(gp1d.curves('rbf', 400, seed=3))
    numbers = np.array([(t.x.shape[1], t.x_target.shape[1]) for t in drawn])
    assert numbers.min() == 3 and numbers[:, 0].max() == 46 and numbers.sum(1).max() == 49
    x = torch.cat([t.x_target.flatten() for t in drawn])
    assert kstest(x.numpy(), 'uniform', (-2, 4)).pvalue > 1e-3
    for name, (low, high) in (('length', gp1d.LENGTH), ('scale', gp1d.SCALE)):
        values = torch.cat([getattr(t, name).flatten() for t in drawn]).numpy()
        assert kstest(values, 'uniform', (low, high - low)).pvalue > 1e-3
    again, other = (next(gp1d.curves('rbf', 1, seed)) for seed in (3, 4))
    assert all(torch.equal(a, b) for a, b in zip(again, drawn[0], strict=True))
    assert not torch.equal(other.x[:, :3], again.x[:, :3])


@pytest.mark.parametrize('kernel', gp1d.KERNELS)
def test_values_have_the_variance_that_is_stated(kernel):
    drawn = [t for t in gp1d.curves(kernel, 300)]
    z = torch.cat([(t.y / (t.scale[:, None] ** 2 + gp1d.NOISE**2).sqrt())[:, 0] for t in drawn])
    assert kstest(z.flatten().numpy(), 'norm').pvalue > 1e-3


@pytest.mark.parametrize('kernel', gp1d.KERNELS)
def test_the_exact_gp_equals_numpy(kernel):
    for task in gp1d.curves(kernel, 4, seed=1):
        found = gp1d.exact_gp(kernel, task)
        for row in (0, 7):
            mean, covariance, _ = dense_gp(
                kernel, task, row, task.length[row].item(), task.scale[row].item()
            )
            np.testing.assert_allclose(found.mean[row], mean, **EXACT)
            np.testing.assert_allclose(found.stddev[row] ** 2, covariance.diagonal(), **EXACT)
            expected = multivariate_normal.logpdf(task.y_target[row, :, 0], mean, covariance)
            np.testing.assert_allclose(found.joint[row], expected, rtol=1e-6)


@pytest.mark.parametrize('kernel', gp1d.KERNELS)
def test_the_ceiling_is_the_mixture_over_the_quadrature(kernel, monkeypatch):
    monkeypatch.setattr(gp1d, 'NUM_LENGTHS', 3)
    monkeypatch.setattr(gp1d, 'NUM_SCALES', 2)
    task = next(gp1d.curves(kernel, 1, seed=2))
    found = gp1d.ceiling(kernel, task)
    lengths = [0.1 + 0.5 * share for share in (1 / 6, 3 / 6, 5 / 6)]
    scales = [0.1 + 0.9 * share for share in (0.25, 0.75)]
    for row in (0, 5):
        gps = [dense_gp(kernel, task, row, length, s) for length in lengths for s in scales]
        weight = np.exp([e for *_, e in gps] - np.logaddexp.reduce([e for *_, e in gps]))
        mean = sum(w * m for w, (m, _, _) in zip(weight, gps, strict=True))
        second = sum(w * (c.diagonal() + m**2) for w, (m, c, _) in zip(weight, gps, strict=True))
        np.testing.assert_allclose(found.mean[row], mean, **EXACT)
        np.testing.assert_allclose(found.stddev[row] ** 2, second - mean**2, **EXACT)
        y = task.y_target[row, :, 0]
        density = [multivariate_normal.logpdf(y, m, c) for m, c, _ in gps]
        expected = np.logaddexp.reduce(np.log(weight) + density)
        np.testing.assert_allclose(found.joint[row], expected, rtol=1e-6)


def test_what_is_known_helps_and_nothing_exceeds_it():
    methods = {'known': gp1d.exact_gp, gp1d.CEILING: gp1d.ceiling}
    known, best = gp1d.evaluate(methods, ('rbf',), num_batches=30)
    for name in ('below_ceiling', 'joint_below_ceiling'):
        mean, error = known[name]
        assert mean < -2 * error
        assert best[name] == (0.0, 0.0)
    for row in (known, best):
        assert abs(row['coverage_90'][0] - 0.9) < 0.03


def test_rows_are_means_over_tasks_of_plain_densities():
    def unit(kernel, task):
        zero = torch.zeros_like(task.y_target[..., 0])
        return gp1d.Predicted(zero, zero + 2.0, zero.sum(1) + 3.0)

    rows = list(gp1d.evaluate({'unit': unit}, ('rbf', 'matern52'), num_batches=5))
    assert [row['kernel'] for row in rows] == ['rbf', 'matern52']
    for row in rows:
        drawn = list(gp1d.curves(row['kernel'], 5))
        each = [
            (-0.5 * (np.log(2 * pi) + t.y_target[..., 0].square() / 4) - np.log(2)).mean(1)
            for t in drawn
        ]
        each = torch.cat(each).numpy()
        error = each.std(ddof=1) / len(each) ** 0.5
        np.testing.assert_allclose(row['log_likelihood'], (each.mean(), error), rtol=1e-9)
        joint = torch.cat([torch.full((16,), 3.0 / t.y_target.shape[1]) for t in drawn])
        np.testing.assert_allclose(row['joint'][0], joint.double().mean(), rtol=1e-6)
        assert 'below_ceiling' not in row


@pytest.mark.parametrize('kind', ['both memories', 'autoregressive', 'attention'])
def test_models_are_scored_by_their_own_joint(kind):
    torch.manual_seed(0)
    blocks = AutoregressiveConfig(block_size=3, rank=5)
    config = {
        'both memories': small_models.field(1),
        'autoregressive': small_models.paper(1, autoregressive=blocks),
        'attention': small_models.paper(1),
    }[kind]
    model = small_models.build(config)
    task = next(gp1d.curves('rbf', 1))
    found = gp1d.by_model(model, 2)('rbf', task)
    state = model.update(model.init_state(16), task.x, task.y)
    expected = model.predict(state, task.x_target)
    torch.testing.assert_close(found.mean, expected.mean[..., 0])
    torch.testing.assert_close(found.stddev, expected.stddev[..., 0])
    assert gp1d.has_joint(model) == (found.joint is not None) == (kind != 'attention')
    if found.joint is not None:
        joint = autoregressive.joint_log_prob(model, state, task.x_target, task.y_target, 2)
        assert torch.equal(found.joint, joint)


def test_samples_of_the_global_variable_are_mixed_as_densities():
    torch.manual_seed(0)
    model = small_models.build(small_models.paper(1, num_global=3))
    task = next(gp1d.curves('rbf', 1))
    found = gp1d.log_likelihood_of_samples(model, task)
    state = model.update(model.init_state(16), task.x, task.y)
    encoding = model.encoding(state)
    density = 0.0
    samples = model.global_variable.quantile_samples(encoding.global_variable)
    for sample in samples:
        answer = model.decode(encoding.projected, task.x_target, None, sample)
        z = (task.y_target - answer.mean) / answer.stddev
        density = density + torch.exp(-0.5 * z.square()) / answer.stddev / (2 * pi) ** 0.5
    expected = (density / len(samples)).log()[..., 0]
    torch.testing.assert_close(found, expected)


FIGURES = Path(__file__).parents[2] / 'docs' / 'accuracy' / 'gp1d.json'


@pytest.mark.parametrize('name', [n for n in shipped_models() if n.startswith('gp1d')])
def test_recorded_figures_are_those_of_the_shipped_weights(name):
    rows = json.loads(FIGURES.read_text(encoding='utf-8'))
    methods = {gp1d.CEILING: gp1d.ceiling, name: gp1d.by_model(load_model(name))}
    for found in list(gp1d.evaluate(methods, ('rbf',), num_batches=8))[1:]:
        recorded = next(
            r for r in rows if r['kernel'] == 'rbf' and r['method'].split(',')[0] == name
        )
        for column in ('below_ceiling', 'joint_below_ceiling'):
            if recorded[column][0] is not None:
                (mean, error), expected = found[column], recorded[column][0]
                assert abs(mean - expected) < 5 * error + 0.1
