"""
Products and factors of many small matrices: what regressions spend their time on.

On a CPU numpy does them, on one thread. Its OpenBLAS computes a symmetric product by half, and
factorizes matrices of about 100 rows twice as fast as the library of torch where that is Intel's
and the processor is not (docs/performance.md); several threads on matrices this small wait for
each other, for a hundred times as long where another process wants a core.
"""

from functools import cache

import numpy as np
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor


def inner_products(phi: Tensor) -> Tensor:
    """
    Return phi^T phi of matrices (batch, n, m), (batch, m, m).
    """
    if phi.device.type != 'cpu' or phi.requires_grad:
        return phi.mT @ phi
    phi = phi.numpy()
    with _one_thread():
        return torch.from_numpy(np.matmul(phi.swapaxes(-1, -2), phi))


def cholesky(matrix: Tensor) -> Tensor:
    """
    Return lower factors of positive definite matrices, (batch, n, n).

    :raises torch.linalg.LinAlgError: for a matrix that is not positive definite.
    """
    if matrix.device.type != 'cpu' or matrix.requires_grad:
        return torch.linalg.cholesky(matrix)
    try:
        with _one_thread():
            return torch.from_numpy(np.linalg.cholesky(matrix.numpy()))
    except np.linalg.LinAlgError as error:
        raise torch.linalg.LinAlgError(f'matrix {tuple(matrix.shape)}: {error}') from error


def _one_thread():
    return _controller().limit(limits=1, user_api='blas')


@cache
def _controller():
    return ThreadpoolController()
