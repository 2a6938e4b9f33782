"""
The functions of the least-squares memory, and sums of their products in few numbers.

Eigenfunctions of the Laplacian on a box whose walls let nothing through (Neumann), products of one
cosine for each axis, then the coordinates: a reduced-rank GP (Solin and Saerkkae 2020, doi
10.1007/s11222-019-09886-w, who take sines). Cosines do not vanish at the walls, so these may stand
close to the tile, and the same number of functions resolves finer detail.

With 2 cos(iu) cos(ju) = cos((i-j)u) + cos((i+j)u) the product of any two eigenfunctions is made of
cosines, of which there are few: (2m - 1)^2 in a plane for m functions per axis, in place of
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

CONSTANT = 0  # which function is the constant 1


class Factors(NamedTuple):
    """What the functions at some points are made of, float64."""

    cosine: Tensor
    """(batch, dim_x, 2 m - 1, n): cos(ju), j = 0 ... 2 m - 2; u is 0 to pi along the box."""
    linear: Tensor
    """(batch, dim_x, n): x / 2."""


def frequencies(config: LeastSquaresConfig, dim_x: int) -> Tensor:
    """
    Return the angular frequencies of the eigenfunctions, (num_eigenfunctions, dim_x).

    That of the constant is 0.
    """
    indices = list(product(range(config.functions_per_axis), repeat=dim_x))
    return torch.tensor(indices, dtype=torch.float64) * (pi / (2 * config.box_half_width))


def squared_norms(config: LeastSquaresConfig, dim_x: int) -> Tensor:
    """
    Return the integrals of the squared eigenfunctions over the box, (num_eigenfunctions,).
    """
    is_constant = frequencies(config, dim_x) == 0
    return torch.where(is_constant, 2.0, 1.0).prod(-1).double() * config.box_half_width**dim_x


def num_functions(config: LeastSquaresConfig, dim_x: int) -> int:
    """
    Return the number of functions: eigenfunctions, dim_x coordinates.
    """
    return config.functions_per_axis**dim_x + dim_x


def num_products(config: LeastSquaresConfig, dim_x: int) -> int:
    """
    Return how many numbers all products of two functions are made of.
    """
    return sum(_sizes(config, dim_x))


def dim_of(config: LeastSquaresConfig, num_functions: int) -> int:
    """
    Return dim_x, which gives this number of functions.
    """
    return next(d for d in (1, 2, 3) if config.functions_per_axis**d + d == num_functions)


def factors(config: LeastSquaresConfig, x: Tensor) -> Factors:
    """
    Evaluate what the functions are made of; by the addition theorem, as powers are by squaring.

    :param x: (batch, n, dim_x) in model units.
    """
    x, most = x.double().mT, 2 * config.functions_per_axis - 2
    u = (x + config.box_half_width) * (pi / (2 * config.box_half_width))
    linear = x / HALF_WIDTH
    if u.requires_grad:  # nothing is written in place then
        angles = u.unsqueeze(2) * torch.arange(most + 1, device=u.device).unsqueeze(-1)
        return Factors(angles.cos(), linear)
    cosine = u.new_empty(*u.shape[:2], most + 1, u.shape[2])
    cosine[:, :, 0], cosine[:, :, 1:2] = 1.0, u.cos().unsqueeze(2)
    known = 1
    while known < most:  # cos((k + j)u) = 2 cos(ku) cos(ju) - cos((k - j)u), j = 1 ... k
        more = min(known, most - known)
        new = cosine[:, :, known + 1 : known + 1 + more]
        torch.mul(cosine[:, :, known, None], cosine[:, :, 1 : more + 1], out=new)
        new.mul_(2).sub_(cosine[:, :, known - more : known].flip(2))
        known += more
    return Factors(cosine, linear)


def functions(config: LeastSquaresConfig, x: Tensor) -> Tensor:
    """
    Evaluate the functions.

    :param x: (batch, n, dim_x) in model units.
    :return: (batch, n, num_functions) float64: eigenfunctions, none beyond 1; x / 2.
    """
    cosine, linear = factors(config, x)
    return torch.cat([_products(cosine[:, :, : config.functions_per_axis]), linear], 1).mT


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
    cosine, linear = factors(config, x)
    m, dim_x, present = config.functions_per_axis, x.shape[-1], present.unsqueeze(1)
    right = torch.cat([linear, y.mT], 1) * present
    cosines = (cosine[:, 0] * present) @ _products(cosine[:, 1:]).mT
    others = (_products(cosine[:, 1:, :m]).unsqueeze(2) * right.unsqueeze(1)).flatten(1, 2)
    mixed = (cosine[:, 0, :m] @ others.mT).unflatten(-1, (-1, right.shape[1])).flatten(1, 2)
    own = linear @ right.mT
    row, column = _linear_pairs(dim_x)
    products = torch.cat(
        [cosines.flatten(1), mixed[..., :dim_x].flatten(1), own[:, row, column]], 1
    )
    return products, torch.cat([mixed, own], 1)[..., dim_x:]


def gram(config: LeastSquaresConfig, dim_x: int, products: Tensor) -> Tensor:
    """
    Return the sums of products as a symmetric matrix (batch, num_functions, num_functions).

    :param products: (batch, num_products), of `sums`.
    """
    cosines, mixed, own = products.split(_sizes(config, dim_x), -1)
    batch, count = len(products), config.functions_per_axis**dim_x
    matrix = products.new_empty(batch, count + dim_x, count + dim_x)
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
    dim_x, m = x.shape[-1], config.functions_per_axis
    cosine, linear = factors(config, x)
    cosines, mixed, own = quadratic.split(_sizes(config, dim_x), -1)
    cosines = cosines.unflatten(-1, (cosine.shape[2], -1))  # (batch, dim_y, first axis, others)
    field = cosines.mT @ cosine[:, 0].unsqueeze(1)
    square = (field * _products(cosine[:, 1:]).unsqueeze(1)).sum(2)

    weights = mean.mT  # (batch, dim_y, num_functions)
    count = weights.shape[2] - dim_x
    per_function = torch.cat(
        [mixed.unflatten(-1, (count, -1)), weights[..., :count].unsqueeze(-1)], -1
    )
    others = per_function.unflatten(2, (m, -1)).flatten(3)
    found = (others.mT @ cosine[:, 0, :m].unsqueeze(1)).unflatten(2, (-1, 1 + dim_x))
    found = (found * _products(cosine[:, 1:, :m])[:, None, :, None]).sum(2)

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
    Return the numbers of products: eigenfunctions, these with coordinates, coordinates.
    """
    m = config.functions_per_axis
    return (2 * m - 1) ** dim_x, m**dim_x * dim_x, dim_x * (1 + dim_x) // 2


@cache
@torch.inference_mode(False)  # tensors that serve in either mode
def _linear_pairs(dim_x):
    """
    Return rows and columns of the lower triangle of products of coordinates.
    """
    return torch.tril_indices(dim_x, dim_x)


@cache
@torch.inference_mode(False)
def _pairs(config):
    """
    Return by which cosines the products of two of one axis are made, (2 m - 1, m * m).
    """
    m = config.functions_per_axis
    made = torch.zeros(2 * m - 1, m * m, dtype=torch.float64)
    for pair, (i, j) in enumerate(product(range(m), repeat=2)):
        made[abs(i - j), pair] += 0.5
        made[i + j, pair] += 0.5
    return made
