"""Shapes in the signatures of the core are checked under pytest; every test has the same seed."""

import pkgutil
import signal
from importlib.util import find_spec

import jaxtyping
import pytest
import torch

CORE = 'cmanp_ros.core'
CHECK_THEMSELVES = ('config', 'normalization')  # they accept more and say more than a type checker
CHECKER = 'beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))'  # int is a float

jaxtyping.install_import_hook(
    [
        f'{CORE}.{module.name}'
        for module in pkgutil.iter_modules(find_spec(CORE).submodule_search_locations)
        if module.name not in CHECK_THEMSELVES
    ],
    CHECKER,
)


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what it puts behind
    signal.signal(signal.SIGINT, signal.default_int_handler)  # or no child would know of Ctrl-C


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
