"""
The functions of the least-squares memory, and sums of their products in few numbers.

Eigenfunctions of the Laplacian on a box, products of one sine for each axis (Hilbert-space
reduced-rank GP, Solin and Saerkkae 2020, doi 10.1007/s11222-019-09886-w), then a constant, then
the coordinates.

With 2 sin(iu) sin(ju) = cos((i-j)u) - cos((i+j)u) the product of any two eigenfunctions is made of
cosines, of which there are few: (2m + 1)^2 in a plane for m functions per axis, in place of
m^2 (m^2 + 1) / 2 products. Sums over points are kept in these numbers, `gram` makes the matrix of
them, and the variance at a target is evaluated in them (`quadratic`, `evaluate`).
"""

from functools import cache
from itertools import product
from math import pi
from typing import NamedTuple

import torch
from torch import Tensor

from cmanp_ros.core.config import LeastSquaresConfig
from cmanp_ros.core.lattice import HALF_WIDTH


class Factors(NamedTuple):
    """What the functions at some points are made of, float64."""

    sine: Tensor
    """(batch, dim_x, m, n): sin(ju), j = 1 ... m; u goes from 0 to pi along the box."""
    cosine: Tensor
    """(batch, dim_x, 2 m + 1, n): cos(ju), j = 0 ... 2 m."""
    linear: Tensor
    """(batch, 1 + dim_x, n): 1, x / 2."""


def frequencies(config: LeastSquaresConfig, dim_x: int) -> Tensor:
    """
    Return the angular frequencies of the eigenfunctions, (num_eigenfunctions, dim_x).
    """
    indices = list(product(range(1, config.functions_per_axis + 1), repeat=dim_x))
    return torch.tensor(indices, dtype=torch.float64) * (pi / (2 * config.box_half_width))


def num_functions(config: LeastSquaresConfig, dim_x: int) -> int:
    """
    Return the number of functions: eigenfunctions, one constant, dim_x coordinates.
    """
    return config.functions_per_axis**dim_x + 1 + dim_x


def num_products(config: LeastSquaresConfig, dim_x: int) -> int:
    """
    Return how many numbers all products of two functions are made of.
    """
    return sum(_sizes(config, dim_x))


def dim_of(config: LeastSquaresConfig, num_functions: int) -> int:
    """
    Return dim_x, which gives this number of functions.
    """
    return next(d for d in (1, 2, 3) if config.functions_per_axis**d + 1 + d == num_functions)


def factors(config: LeastSquaresConfig, x: Tensor) -> Factors:
    """
    Evaluate what the functions are made of; by the addition theorem, as powers are by squaring.

    :param x: (batch, n, dim_x) in model units.
    """
    x, m = x.double().mT, config.functions_per_axis
    u = (x + config.box_half_width) * (pi / (2 * config.box_half_width))
    linear = torch.cat([torch.ones_like(x[:, :1]), x / HALF_WIDTH], 1)
    if u.requires_grad:  # nothing is written in place then
        angles = u.unsqueeze(2) * torch.arange(2 * m + 1, device=u.device).unsqueeze(-1)
        return Factors(angles[:, :, 1 : m + 1].sin(), angles.cos(), linear)
    sine = u.new_empty(*u.shape[:2], m, u.shape[2])
    cosine = u.new_empty(*u.shape[:2], 2 * m + 1, u.shape[2])
    sine[:, :, 0], cosine[:, :, 0], cosine[:, :, 1] = u.sin(), 1.0, u.cos()
    known = 1
    while known < 2 * m:  # sin((k + j)u) and cos((k + j)u) of sin(ju) and cos(ju), j = 1 ... k
        more = min(known, (m if known < m else 2 * m) - known)
        top_sine, top_cosine = sine[:, :, known - 1, None], cosine[:, :, known, None]
        low_sine, low_cosine = sine[:, :, :more], cosine[:, :, 1 : more + 1]
        if known < m:
            new = sine[:, :, known : known + more]
            torch.mul(top_cosine, low_sine, out=new).addcmul_(top_sine, low_cosine)
        new = cosine[:, :, known + 1 : known + 1 + more]
        torch.mul(top_cosine, low_cosine, out=new).addcmul_(top_sine, low_sine, value=-1)
        known += more
    return Factors(sine, cosine, linear)


def functions(config: LeastSquaresConfig, x: Tensor) -> Tensor:
    """
    Evaluate the functions.

    :param x: (batch, n, dim_x) in model units.
    :return: (batch, n, num_functions) float64: eigenfunctions, 1, x / 2.
    """
    sine, _, linear = factors(config, x)
    return torch.cat([_products(sine / config.box_half_width**0.5), linear], 1).mT


def sums(
    config: LeastSquaresConfig, x: Tensor, y: Tensor, present: Tensor
) -> tuple[Tensor, Tensor]:
    """
    Sum products over points.

    :param x: (batch, n, dim_x) in model units.
    :param y: (batch, n, dim_y).
    :param present: (batch, n): weight of each point.
    :return: of two functions each (batch, num_products), see `gram`, and of a function and a
        value (batch, num_functions, dim_y).
    """
    sine, cosine, linear = factors(config, x)
    num_linear, present = linear.shape[1], present.unsqueeze(1)
    right = torch.cat([linear, y.mT], 1) * present
    cosines = (cosine[:, 0] * present) @ _products(cosine[:, 1:]).mT
    others = (_products(sine[:, 1:]).unsqueeze(2) * right.unsqueeze(1)).flatten(1, 2)
    mixed = (sine[:, 0] @ others.mT).unflatten(-1, (-1, right.shape[1])).flatten(1, 2)
    mixed = mixed / config.box_half_width ** (x.shape[-1] / 2)
    own = linear @ right.mT
    row, column = _linear_pairs(x.shape[-1])
    products = torch.cat(
        [cosines.flatten(1), mixed[..., :num_linear].flatten(1), own[:, row, column]], 1
    )
    return products, torch.cat([mixed, own], 1)[..., num_linear:]


def gram(config: LeastSquaresConfig, dim_x: int, products: Tensor) -> Tensor:
    """
    Return the sums of products as a symmetric matrix (batch, num_functions, num_functions).

    :param products: (batch, num_products), of `sums`.
    """
    cosines, mixed, own = products.split(_sizes(config, dim_x), -1)
    batch, count = len(products), config.functions_per_axis**dim_x
    matrix = products.new_empty(batch, count + 1 + dim_x, count + 1 + dim_x)
    pairs = _pairs(config).to(products)
    cosines = cosines.unflatten(1, (len(pairs),) * dim_x)
    for _ in range(dim_x):  # the axis that is done goes to the end
        cosines = torch.tensordot(cosines, pairs, ([1], [0]))
    cosines = cosines.view(batch, *(config.functions_per_axis,) * (2 * dim_x))
    by_function = (0, *range(1, 2 * dim_x, 2), *range(2, 2 * dim_x + 1, 2))
    mixed = mixed.unflatten(1, (count, -1))
    row, column = _linear_pairs(dim_x)
    matrix[:, :count, :count] = cosines.permute(by_function).reshape(batch, count, count)
    matrix[:, :count, count:], matrix[:, count:, :count] = mixed, mixed.mT
    matrix[:, count + row, count + column] = matrix[:, count + column, count + row] = own
    return matrix


def quadratic(config: LeastSquaresConfig, matrix: Tensor) -> Tensor:
    """
    Return coefficients c with which phi^T C phi is a sum over c times products of functions.

    :param matrix: C (batch, num_functions, num_functions), symmetric.
    :return: (batch, num_products).
    """
    dim_x, batch = dim_of(config, matrix.shape[-1]), len(matrix)
    m, count = config.functions_per_axis, config.functions_per_axis**dim_x
    by_axis = [0, *(axis for i in range(1, 1 + dim_x) for axis in (i, i + dim_x))]
    cosines = matrix[:, :count, :count].reshape(batch, *(m,) * (2 * dim_x))
    cosines = cosines.permute(by_axis).reshape(batch, *(m * m,) * dim_x)
    pairs = _pairs(config).to(matrix)
    for _ in range(dim_x):
        cosines = torch.tensordot(cosines, pairs, ([1], [1]))
    row, column = _linear_pairs(dim_x)
    own = matrix[:, count + row, count + column] * torch.where(row == column, 1, 2).to(matrix)
    return torch.cat([cosines.flatten(1), 2 * matrix[:, :count, count:].flatten(1), own], 1)


def evaluate(config: LeastSquaresConfig, x: Tensor, mean: Tensor, quadratic: Tensor):
    """
    Evaluate phi^T w and phi^T C phi.

    :param x: (batch, n, dim_x) in model units.
    :param mean: w (batch, num_functions, dim_y).
    :param quadratic: of C, (batch, dim_y, num_products).
    :return: both (batch, n, dim_y).
    """
    dim_x = x.shape[-1]
    sine, cosine, linear = factors(config, x)
    cosines, mixed, own = quadratic.split(_sizes(config, dim_x), -1)
    cosines = cosines.unflatten(-1, (cosine.shape[2], -1))  # (batch, dim_y, first axis, others)
    field = cosines.mT @ cosine[:, 0].unsqueeze(1)
    square = (field * _products(cosine[:, 1:]).unsqueeze(1)).sum(2)

    weights = mean.mT  # (batch, dim_y, num_functions)
    count = weights.shape[2] - 1 - dim_x
    per_function = torch.cat(
        [mixed.unflatten(-1, (count, -1)), weights[..., :count].unsqueeze(-1)], -1
    )
    others = per_function.unflatten(2, (config.functions_per_axis, -1)).flatten(3)
    found = (others.mT @ sine[:, 0].unsqueeze(1)).unflatten(2, (-1, 2 + dim_x))
    found = (found * _products(sine[:, 1:])[:, None, :, None]).sum(2)
    found = found / config.box_half_width ** (dim_x / 2)

    row, column = _linear_pairs(dim_x)
    square = square + (found[:, :, :-1] * linear.unsqueeze(1)).sum(2)
    square = square + own @ (linear[:, row] * linear[:, column])
    value = found[:, :, -1] + weights[..., count:] @ linear
    return value.mT, square.mT


def _products(factor: Tensor) -> Tensor:
    """
    Return all products of one factor (batch, axes, k, n) of each axis, (batch, k^axes, n).
    """
    if not factor.shape[1]:
        return factor.new_ones(len(factor), 1, factor.shape[3])
    product, *others = factor.unbind(1)
    for other in others:
        product = (product.unsqueeze(2) * other.unsqueeze(1)).flatten(1, 2)
    return product


def _sizes(config, dim_x):
    """
    Return the numbers of products: eigenfunctions, these with linear functions, linear ones.
    """
    m = config.functions_per_axis
    return (2 * m + 1) ** dim_x, m**dim_x * (1 + dim_x), (1 + dim_x) * (2 + dim_x) // 2


@cache
@torch.inference_mode(False)  # tensors that serve in either mode
def _linear_pairs(dim_x):
    """
    Return rows and columns of the lower triangle of products of linear functions.
    """
    return torch.tril_indices(1 + dim_x, 1 + dim_x)


@cache
@torch.inference_mode(False)
def _pairs(config):
    """
    Return by which cosines the products of two sines of one axis are made, (2 m + 1, m * m).
    """
    m = config.functions_per_axis
    made = torch.zeros(2 * m + 1, m * m, dtype=torch.float64)
    for pair, (i, j) in enumerate(product(range(1, m + 1), repeat=2)):
        made[abs(i - j), pair] += 0.5 / config.box_half_width
        made[i + j, pair] -= 0.5 / config.box_half_width
    return made
