"""The grid of hyperparameters and what lies in between, against scipy's splines."""

from math import log, sqrt

import numpy as np
import pytest
import torch
from scipy.interpolate import CubicSpline

from cmanp_ros.core import least_squares, settings
from cmanp_ros.core.config import LeastSquaresConfig

LENGTHS, NOISES = (0.3, 0.6, 1.3, 2.0), (0.01, 0.04, 0.2)


def config_of(refinement=2, **options):
    return LeastSquaresConfig(
        smoothnesses=(1.5, 2.5),
        lengths=LENGTHS,
        noise_ratios=NOISES,
        refinement=refinement,
        **options,
    )


def random_fields(length, noise, num=3, num_points=200):
    """Return x and y of draws from Gaussian processes of smoothness 1.5 and variance 1."""
    x = 4 * torch.rand(num, num_points, 2, dtype=torch.float64) - 2
    scaled = sqrt(3) * torch.cdist(x, x) / length
    covariance = (1 + scaled) * (-scaled).exp()
    covariance.diagonal(dim1=1, dim2=2).add_(noise**2)
    draw = torch.randn(num, num_points, 1, dtype=torch.float64)
    return x, torch.linalg.cholesky(covariance) @ draw


@pytest.mark.parametrize('refinement', [2, 3])
def test_values_in_between_are_those_of_natural_splines_along_both_axes(refinement):
    config, values = config_of(refinement), torch.randn(5, 24, 2, dtype=torch.float64)
    expected = values.view(5, 2, 4, 3, 2).numpy()
    for axis, nodes in ((2, LENGTHS), (3, NOISES)):
        nodes, at = np.log(nodes), np.arange(refinement * (len(nodes) - 1) + 1) / refinement
        at = np.interp(at, np.arange(len(nodes)), nodes)
        expected = CubicSpline(nodes, expected, axis=axis, bc_type='natural')(at)
    found = settings.interpolated(config, values)
    assert found.shape == (5, settings.num_settings(settings.finer(config)), 2)
    np.testing.assert_allclose(found.view(expected.shape).numpy(), expected, atol=1e-12)


@pytest.mark.parametrize('lengths', [(0.5,), (0.5, 1.0)])
def test_grids_of_one_or_two_lengths_are_interpolated_on_lines(lengths):
    config = LeastSquaresConfig(lengths=lengths, noise_ratios=(0.1,), refinement=2)
    values = torch.tensor([3.0, 5.0], dtype=torch.float64)[None, : len(lengths), None]
    found = settings.interpolated(config, values)[0, :, 0].tolist()
    assert found == pytest.approx([3.0] if len(lengths) == 1 else [3.0, 4.0, 5.0])


def test_finer_grid_has_the_grid_and_geometric_means_in_between():
    finer = settings.finer(config_of())
    assert finer.lengths[::2] == pytest.approx(LENGTHS)
    assert finer.noise_ratios == pytest.approx((0.01, 0.02, 0.04, sqrt(0.008), 0.2))
    assert finer.refinement == 1 and finer.smoothnesses == (1.5, 2.5)
    assert settings.finer(finer) is finer and settings.finer(config_of(1)) == config_of(1)
    assert len(least_squares.prior_variances(config_of(), 2)) == 2 * 7


def test_without_refinement_nothing_changes():
    config, logs = config_of(1), torch.randn(2, 24, 1, dtype=torch.float64)
    assert settings.interpolated(config, logs) is logs
    torch.testing.assert_close(settings.weigh(config, logs), logs.softmax(1))


def peak(width):
    """Return log evidence (1, 24, 1) with its top between settings, the wider the less known."""
    length, noise, _ = settings.coordinates(config_of(1)).T
    away = (length - log(0.88)).square() + (noise - log(0.09)).square()
    return (-away / width**2 / 2).view(1, -1, 1)


def test_weight_goes_between_settings_where_data_leave_no_doubt():
    config = config_of()
    weight = settings.weigh(config, peak(0.1))
    best = settings.coordinates(settings.finer(config))[weight[0, :, 0].argmax()]
    assert best[:2].exp().tolist() == pytest.approx([sqrt(0.6 * 1.3), sqrt(0.04 * 0.2)])
    assert weight.sum().item() == pytest.approx(1)


def test_weight_stays_on_the_grid_where_data_leave_it_open():
    config, logs = config_of(), torch.cat([peak(2.0), peak(0.1)], -1)
    weight = settings.weigh(config, logs).view(1, 2, 7, 5, 2)
    torch.testing.assert_close(weight[:, :, ::2, ::2, 0].flatten(1), logs[..., 0].softmax(1))
    assert weight[..., 0].sum().item() == pytest.approx(1)
    assert weight[:, :, ::2, ::2, 1].sum() < 0.5  # of the other output, which is sure


def test_grid_is_kept_where_too_few_are_averaged_to_hold_the_weight():
    logs, found = peak(0.2), []
    for num in (1, 24):
        weight = settings.weigh(config_of(num_averaged=num), logs).view(2, 7, 5)
        found.append(weight[:, ::2, ::2].sum().item())
    assert found[0] == pytest.approx(1) and found[1] < 0.1


@pytest.mark.parametrize('num_points, error', [(30, 0.5), (60, 0.8), (120, 2.0)])
def test_what_is_likely_in_between_is_nearly_what_solving_there_would_find(num_points, error):
    config = LeastSquaresConfig(refinement=2)
    finer, scale = settings.finer(config), least_squares.default_scale(config, 3, 1)
    lost, lost_on_grid = [], []
    for length in (0.45, 0.9, 1.8):
        for noise in (0.02, 0.1, 0.3):
            folded = least_squares.sums(config, *random_fields(length, noise, 3, num_points))
            solved, on_grid = (
                least_squares.log_evidence(
                    one,
                    least_squares.evidence(one, least_squares.prior_variances(one, 2), folded),
                    scale,
                )
                for one in (finer, config)
            )
            found, most = settings.interpolated(config, on_grid), solved.amax(1, keepdim=True)
            is_likely = solved > most - 4
            assert (found - solved).abs()[is_likely].mean() < error
            lost.append(most - solved.gather(1, found.argmax(1, keepdim=True)))
            lost_on_grid.append(most - on_grid.amax(1, keepdim=True))
    lost, lost_on_grid = (torch.stack(part).mean() for part in (lost, lost_on_grid))
    assert lost < lost_on_grid / 2.5 and lost_on_grid > 0.2


def test_regressions_are_solved_in_between():
    config = config_of(functions_per_axis=5)
    finer = settings.finer(config)
    folded = least_squares.sums(config, *random_fields(0.8, 0.1))
    scale = least_squares.default_scale(config, 3, 1)
    weight = torch.rand(3, settings.num_settings(finer), 1, dtype=torch.float64).softmax(1)
    found, expected = (
        least_squares.posterior(one, least_squares.prior_variances(one, 2), folded, scale, weight)
        for one in (config, finer)
    )
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other)
