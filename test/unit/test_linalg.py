"""Factors of small matrices equal torch's, whatever the library."""

import pytest
import torch
from threadpoolctl import threadpool_info

from cmanp_ros.core import linalg


@pytest.fixture(params=[False, True], autouse=True)
def library(request, monkeypatch):
    """Run each test with numpy's factorization and with torch's."""
    monkeypatch.setattr(linalg, '_suits_library_of_torch', lambda: request.param)


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


@pytest.mark.parametrize('n, k', [(1, 1), (2, 2), (5, 1), (6, 3), (103, 1)])
def test_elimination_equals_a_solution_at_once(n, k):
    root = torch.randn(3, n, n, dtype=torch.float64)
    matrix, right = root @ root.mT, torch.randn(3, n, k, dtype=torch.float64)
    which, ridge = torch.tensor([2, 0, 2, 1]), torch.rand(4, n, dtype=torch.float64) + 0.3
    solved, half_log = linalg.eliminate(linalg.halves(matrix, right), which, ridge)
    whole, right = matrix[which] + torch.diag_embed(ridge), right[which]
    torch.testing.assert_close(solved, (right * torch.linalg.solve(whole, right)).sum(1))
    torch.testing.assert_close(half_log, torch.linalg.slogdet(whole).logabsdet / 2)


@pytest.mark.parametrize('rank', [0, 1, 5, 8])
def test_matrix_of_low_rank_is_factorized(rank):
    root = torch.randn(3, rank, 29, dtype=torch.float64)
    matrix, right = root.mT @ root, root.mT @ torch.randn(3, rank, 2, dtype=torch.float64)
    rows, inner, holds = linalg.low_rank(matrix, right, 8)
    assert rows.shape == (3, 16, 29) and inner.shape == (3, 16, 2) and holds.all()
    torch.testing.assert_close(rows.mT @ rows, matrix, rtol=0, atol=1e-9)
    torch.testing.assert_close(rows.mT @ inner, right, rtol=0, atol=1e-9)


def test_matrix_of_higher_rank_is_told_from_others():
    root = torch.randn(2, 17, 29, dtype=torch.float64)
    root[1, 8:] = root[1, :8].sum(0)
    holds = linalg.low_rank(root.mT @ root, torch.zeros(2, 29, 1, dtype=torch.float64), 8)[2]
    assert holds.tolist() == [False, True]


def test_matrix_that_rounding_made_indefinite_is_told_from_others():
    root = torch.randn(2, 1, 29, dtype=torch.float64)
    matrix = root.mT @ root
    matrix[1] -= 1e-12 * torch.eye(29)
    holds = linalg.low_rank(matrix, torch.zeros(2, 29, 1, dtype=torch.float64), 8)[2]
    assert holds.tolist() == [True, False]


def test_gradients_pass():
    matrix = torch.eye(3, dtype=torch.float64)[None].requires_grad_()
    assert linalg.cholesky(matrix).requires_grad


def test_threads_of_others_stay_as_they_are():
    before = [library['num_threads'] for library in threadpool_info()]
    linalg.cholesky(torch.eye(3, dtype=torch.float64)[None])
    assert [library['num_threads'] for library in threadpool_info()] == before
