"""Before any training, attention is local in space, and odd values stay harmless."""

import pytest
import small_models
import torch

from cmanp_ros.core import CMANP, inducing


@pytest.mark.parametrize('dim_x', [1, 2, 3])
@pytest.mark.parametrize('num_points', [1, 7, 8, 27, 49, 64])
def test_the_grid_has_exactly_the_points_asked_for_inside_the_workspace(num_points, dim_x):
    grid = inducing.grid(num_points, dim_x)
    assert grid.shape == (num_points, dim_x)
    assert (grid.abs() <= 2).all()
    assert len(grid.unique(dim=0)) == num_points
    assert torch.equal(grid, inducing.grid(num_points, dim_x))


@pytest.mark.parametrize('dim_x', [1, 2, 3])
def test_products_of_features_depend_on_the_difference_of_locations_alone(dim_x):
    features = inducing.FourierFeatures(dim_x, 30, 5, 0.3, 2.0).double()
    a, b, shift = torch.randn(3, 7, dim_x, dtype=torch.float64)
    here = (features(a) * features(b)).unflatten(-1, (5, 6)).sum(-1)
    moved = (features(a + shift) * features(b + shift)).unflatten(-1, (5, 6)).sum(-1)
    torch.testing.assert_close(here, moved)
    torch.testing.assert_close(features(a).square().sum(-1), torch.full((7,), 15.0).double())


def test_features_are_the_same_in_every_model():
    one, other = (inducing.FourierFeatures(2, 12, 3, 0.3, 2.0).frequencies for _ in range(2))
    assert torch.equal(one, other)


@pytest.mark.parametrize('dim_y', [1, 3])
def test_value_features_are_bounded_and_tell_values_apart(dim_y):
    y = torch.tensor([-1e6, -4.0, 0.0, 0.001, 0.002, 0.01, 0.02, 4.0, 1e6]).double()
    features = inducing.value_features(y.unsqueeze(-1).expand(-1, dim_y))
    assert features.shape == (9, 25 * dim_y)
    assert (features.abs() <= 4).all()
    assert torch.cdist(features, features).fill_diagonal_(1).min() > 0.1


def test_latents_attend_most_to_the_points_around_them():
    config = small_models.field(
        1, num_latents_per_block=5, dim_model=60, num_blocks=2, least_squares=None
    )
    model = CMANP(config)
    grid = inducing.grid(5, 1)
    x = torch.linspace(-1.9, 1.9, 61).reshape(1, 61, 1)
    y = torch.zeros(1, 61, 1)
    with torch.no_grad():
        alone = [
            model.update(model.init_state(), x[:, i : i + 1], y[:, i : i + 1]).attention.logsumexp
            for i in range(61)
        ]
    score = torch.stack(alone, -1)[0].mean(1)  # (block, query, point), over the heads
    nearest = x[0, score.argmax(-1), 0]
    assert (nearest - grid[:, 0]).abs().max() < 0.2
