"""Factors of small matrices equal torch's, whatever the library."""

import pytest
import torch
from threadpoolctl import threadpool_info

from cmanp_ros.core import linalg


@pytest.mark.parametrize('shape', [(0, 3), (1, 1), (4, 3), (2, 103)])
def test_factors_equal_torch(shape):
    root = torch.randn(*shape, shape[-1], dtype=torch.float64)
    matrix = root @ root.mT + torch.eye(shape[-1])
    torch.testing.assert_close(linalg.cholesky(matrix), torch.linalg.cholesky(matrix))


def test_factors_of_settings_of_tiles():
    matrix = 2 * torch.eye(3, dtype=torch.float64).expand(2, 5, 3, 3)
    torch.testing.assert_close(linalg.cholesky(matrix) ** 2, matrix)


def test_matrix_that_is_not_positive_definite_is_refused():
    with pytest.raises(torch.linalg.LinAlgError, match=r'matrix \(1, 2, 2\)'):
        linalg.cholesky(-torch.eye(2, dtype=torch.float64)[None])


def test_gradients_pass():
    matrix = torch.eye(3, dtype=torch.float64)[None].requires_grad_()
    assert linalg.cholesky(matrix).requires_grad


def test_threads_of_others_stay_as_they_are():
    before = [library['num_threads'] for library in threadpool_info()]
    linalg.cholesky(torch.eye(3, dtype=torch.float64)[None])
    assert [library['num_threads'] for library in threadpool_info()] == before
