"""Shapes in the signatures of the core are checked under pytest; every test has the same seed."""

import jaxtyping
import pytest
import torch

jaxtyping.install_import_hook('cmanp_ros.core', 'beartype.beartype')


@pytest.fixture(autouse=True)
def same_numbers_in_every_test():
    """Seed torch and keep it on one thread, so that sums are in the same order."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def without_shape_checks():
    """Switch the checks of jaxtyping off, to see the errors that users see."""
    jaxtyping.config.update('jaxtyping_disable', True)
    yield
    jaxtyping.config.update('jaxtyping_disable', False)
