"""
Factors of many small matrices: what regressions spend their time on.

On a CPU numpy makes them, on one thread. Its OpenBLAS factorizes matrices of about 100 rows twice
as fast as the library of torch where that is Intel's and the processor is not
(docs/performance.md); several threads on matrices this small wait for each other, for a hundred
times as long where another process wants a core.
"""

from contextlib import contextmanager
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
