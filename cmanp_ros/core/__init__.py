"""
The model in pure torch: no ROS, no files.

Conventions: tensors are (batch, points, channels), attention tensors (batch, head, query, key),
both with a block axis in front of the heads where all blocks run at once. x is location, y is
value; both in model units here (the workspace is [-2, 2], values are deviations).
"""

from importlib import import_module

_PUBLIC = {
    'CMANP': 'model',
    'CMANPConfig': 'config',
    'CMANPError': 'errors',
    'Lattice': 'lattice',
    'LeastSquaresConfig': 'config',
    'Normalization': 'normalization',
    'OneTile': 'lattice',
    'PredictiveDistribution': 'predictive',
    'State': 'state',
    'World': 'world',
    'forget': 'state',
    'merge': 'state',
}
__all__ = list(_PUBLIC)


def __getattr__(name):
    """Import what is asked for: messages and errors need no torch, which takes seconds."""
    if name not in _PUBLIC:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(import_module(f'{__name__}.{_PUBLIC[name]}'), name)
