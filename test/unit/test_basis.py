"""Products of functions in few numbers: the same matrix and the same values as one by one."""

from math import pi

import numpy as np
import pytest
import torch

from cmanp_ros.core import basis
from cmanp_ros.core.config import LeastSquaresConfig

BATCH, N, DIM_Y = 3, 29, 2
SIZES = [(1, 1), (1, 11), (2, 1), (2, 10), (3, 5)]  # dim_x, functions per axis
CLOSE = {'rtol': 1e-11, 'atol': 1e-11}


@pytest.fixture(params=SIZES, ids=str)
def case(request):
    """Return dim_x, a configuration, and points over a tile."""
    dim_x, m = request.param
    x = torch.rand(BATCH, N, dim_x, dtype=torch.float64) * 4 - 2
    return dim_x, LeastSquaresConfig(functions_per_axis=m), x


def random_covariance(config, dim_x, *batch):
    size = basis.num_functions(config, dim_x)
    root = torch.randn(*batch, size, size, dtype=torch.float64)
    return root @ root.mT / size


@pytest.mark.parametrize('learns', [False, True])
def test_factors_are_cosines_and_coordinates(case, learns):
    dim_x, config, x = case
    cosine, linear = (
        part.detach() for part in basis.factors(config, x.clone().requires_grad_(learns))
    )
    count = 2 * config.functions_per_axis - 1
    for axis in range(dim_x):
        u = (x[..., axis].numpy() / config.box_half_width + 1) * (pi / 2)
        for j in range(count):
            np.testing.assert_allclose(cosine[:, axis, j], np.cos(j * u), atol=1e-14)
        assert torch.equal(linear[:, axis], x[..., axis] / 2)
    assert cosine.shape[2] == count and linear.shape[1] == dim_x


def test_one_function_is_the_constant_one(case):
    _, config, x = case
    assert (basis.functions(config, x)[..., basis.CONSTANT] == 1).all()


@pytest.mark.parametrize('n', [0, 1, N])
def test_gram_is_the_sum_of_products_one_by_one(case, n):
    dim_x, config, x = case
    x, weight = x[:, :n], torch.rand(BATCH, n, dtype=torch.float64)
    y = torch.randn(BATCH, n, DIM_Y, dtype=torch.float64)
    products, moment = basis.sums(config, x, y, weight)
    phi = basis.functions(config, x)
    weighted = phi * weight.unsqueeze(-1)
    assert products.shape == (BATCH, basis.num_products(config, dim_x))
    torch.testing.assert_close(basis.gram(config, dim_x, products), phi.mT @ weighted, **CLOSE)
    torch.testing.assert_close(moment, weighted.mT @ y, **CLOSE)


def test_numbers_of_products():
    assert basis.num_products(LeastSquaresConfig(functions_per_axis=10), 2) == 361 + 200 + 3
    assert basis.num_products(LeastSquaresConfig(functions_per_axis=12), 1) == 23 + 12 + 1
    assert basis.num_products(LeastSquaresConfig(functions_per_axis=5), 3) == 729 + 375 + 6


def test_quadratic_is_the_adjoint_of_gram(case):
    dim_x, config, _ = case
    products = torch.randn(BATCH, basis.num_products(config, dim_x), dtype=torch.float64)
    matrix = random_covariance(config, dim_x, BATCH)
    found = (basis.quadratic(config, matrix) * products).sum(-1)
    expected = (matrix * basis.gram(config, dim_x, products)).sum((-1, -2))
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize('n', [0, 1, N])
def test_values_and_variances_equal_those_function_by_function(case, n):
    dim_x, config, x = case
    x, covariance = x[:, :n], random_covariance(config, dim_x, BATCH, DIM_Y)
    weights = torch.randn(BATCH, covariance.shape[-1], DIM_Y, dtype=torch.float64)
    quadratic = basis.quadratic(config, covariance.flatten(0, 1)).unflatten(0, (BATCH, DIM_Y))
    value, square = basis.evaluate(config, x, weights, quadratic)
    phi = basis.functions(config, x)
    torch.testing.assert_close(value, phi @ weights, **CLOSE)
    expected = torch.einsum('bni,boij,bnj->bno', phi, covariance, phi)
    torch.testing.assert_close(square, expected, **CLOSE)


def test_dim_of_the_number_of_functions(case):
    dim_x, config, _ = case
    if config.functions_per_axis > 1:  # else one function is as good as another
        assert basis.dim_of(config, basis.num_functions(config, dim_x)) == dim_x
