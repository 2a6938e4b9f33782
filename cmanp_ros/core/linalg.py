"""
Factors of many small matrices: what regressions spend their time on.

On a CPU numpy makes them, on one thread. Its OpenBLAS factorizes matrices of about 100 rows twice
as fast as the library of torch where that is Intel's and the processor is not
(docs/performance.md); several threads on matrices this small wait for each other, for a hundred
times as long where another process wants a core.
"""

from functools import cache

import numpy as np
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor


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
