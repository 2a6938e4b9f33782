"""
Factors of many small matrices: what regressions spend their time on.

On a CPU numpy makes Cholesky factors, on one thread. Its OpenBLAS factorizes matrices of about 100
rows twice as fast as the library of torch where that is Intel's and the processor is not; on
its own processors that library is faster (docs/performance.md). Several threads on matrices this
small wait for each other, for a hundred times as long where another process wants a core.
"""

from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor

OVERSAMPLING = 8  # or some matrices would hardly be seen in one of their directions
SHIFT = 1e-15  # of the trace: a matrix of low rank is definite with it, and hardly another one
BEYOND = 1e200  # any square of what observations give: the corner of a matrix with a border
NOTHING = 3e-11  # of the trace: what `SHIFT` may take from a matrix


def cholesky(matrix: Tensor) -> Tensor:
    """
    Return lower factors of positive definite matrices, (batch, n, n).

    :raises torch.linalg.LinAlgError: for a matrix that is not positive definite.
    """
    if matrix.device.type != 'cpu' or matrix.requires_grad:
        return torch.linalg.cholesky(matrix)
    try:
        if torch.get_num_threads() == 1 and _suits_library_of_torch():
            return torch.linalg.cholesky(matrix)
        with _one_thread():
            return torch.from_numpy(np.linalg.cholesky(matrix.numpy()))
    except (torch.linalg.LinAlgError, np.linalg.LinAlgError) as error:
        raise torch.linalg.LinAlgError(f'matrix {tuple(matrix.shape)}: {error}') from error


@cache
def _suits_library_of_torch():
    """Tell whether the processor is of the same maker as the library: Intel."""
    try:
        is_intel = b'GenuineIntel' in Path('/proc/cpuinfo').read_bytes()
    except OSError:  # no Linux
        return False
    return is_intel and torch.backends.mkl.is_available()


class Halves(NamedTuple):
    """
    Symmetric matrices with right-hand sides, in the parts that `eliminate` takes.
    """

    first: Tensor
    """(batch, m, m), m about half of the rows."""
    across: Tensor
    """(batch, m, n - m + k): the rest of these rows, and of the right-hand sides."""
    second: Tensor
    """(batch, n - m + k, n - m + k): the other rows, with right-hand sides beside and below."""
    num_right: int
    """k."""


def halves(matrix: Tensor, right: Tensor) -> Halves:
    """
    Cut matrices (batch, n, n) with right-hand sides (batch, n, k), k at most n, in two.
    """
    k, m = right.shape[-1], (matrix.shape[-1] + right.shape[-1]) // 2
    corner = BEYOND * torch.eye(k, dtype=right.dtype, device=right.device)
    corner = corner.expand(len(matrix), k, k)
    below = torch.cat([right[:, m:].mT, corner], 2)
    rest = torch.cat([torch.cat([matrix[:, m:, m:], right[:, m:]], 2), below], 1)
    across = torch.cat([matrix[:, :m, m:], right[:, :m]], 2)
    return Halves(matrix[:, :m, :m].contiguous(), across, rest, k)


def eliminate(parts: Halves, which: Tensor, ridge: Tensor) -> tuple[Tensor, Tensor]:
    """
    Solve halfway, with L the Cholesky factor of a matrix plus a ridge on its diagonal.

    In two halves, or matrices of 100 rows would take 1.3 times as long: between the halves are
    products, at the full rate of the processor. What is right of a matrix is solved by the last
    rows of the factor of all.

    :param which: (pairs,), which of the matrices is solved with which ridge, (pairs, n).
    :return: column sums of (L^-1 right)^2, (pairs, k); half the log determinant of the matrix with
        its ridge, (pairs,).
    """
    first, across, second = (part.index_select(0, which) for part in parts[:-1])
    m, rest = first.shape[-1], second.shape[-1] - parts.num_right
    first.diagonal(dim1=1, dim2=2).add_(ridge[:, :m])
    first = cholesky(first)
    across = torch.linalg.solve_triangular(first, across, upper=False)
    second.diagonal(dim1=1, dim2=2)[:, :rest].add_(ridge[:, m:])
    second = cholesky(second.baddbmm_(across.mT, across, alpha=-1))
    solved = across[..., rest:].square().sum(1) + second[:, rest:, :rest].square().sum(2)
    logs = [part.diagonal(dim1=1, dim2=2).log() for part in (first, second[:, :rest, :rest])]
    return solved, torch.cat(logs, 1).sum(1)


def low_rank(matrix: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """
    Factorize positive semidefinite matrices of a low rank (Tropp et al. 2017, arXiv 1706.05736).

    :param matrix: (batch, n, n).
    :param right: (batch, n, k), in the range of `matrix`.
    :param rank: of each, or less.
    :return: R (batch, m, n) with matrix = R^T R, m = rank + OVERSAMPLING <= n;
        z (batch, m, k) with right = R^T z; and whether they are, (batch,): False where the rank is
        larger, or where what rounding left of a matrix is not positive semidefinite.
    """
    n, trace = matrix.shape[-1], matrix.diagonal(dim1=1, dim2=2).sum(1)
    test = _test_matrix(n, rank + OVERSAMPLING).to(matrix)
    seen = test.mT @ torch.cat([matrix, right], -1)
    core = seen[..., :n] @ test
    shift = (SHIFT * trace).clamp(min=1e-100)  # nothing at all has a factor, too
    core.diagonal(dim1=1, dim2=2).add_(shift.unsqueeze(1))
    factor, failed = torch.linalg.cholesky_ex(core)
    solved = torch.linalg.solve_triangular(factor, seen, upper=False)
    rows = solved[..., :n]
    holds = (failed == 0) & (trace - rows.square().sum((1, 2)) <= NOTHING * trace)
    return rows, solved[..., n:], holds


@cache
@torch.inference_mode(False)  # a tensor that serves in either mode
def _test_matrix(n, m):
    """Return orthogonal columns in no particular direction, (n, m), always the same."""
    generator = torch.Generator().manual_seed(0)
    return torch.linalg.qr(torch.randn(n, m, dtype=torch.float64, generator=generator))[0]


@contextmanager
def _one_thread():
    """
    Hold BLAS libraries to one thread; threadpoolctl's own `limit` costs as much as five factors.
    """
    found = _libraries()
    before = [library.get_num_threads() for library in found]
    try:
        for library in found:
            library.set_num_threads(1)
        yield
    finally:
        for library, count in zip(found, before, strict=True):
            library.set_num_threads(count)


@cache
def _libraries():
    return [one for one in ThreadpoolController().lib_controllers if one.user_api == 'blas']
