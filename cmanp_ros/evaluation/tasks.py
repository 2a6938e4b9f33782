"""What is scored: observations, and others to be predicted from them."""

from typing import NamedTuple

import numpy as np


class Task(NamedTuple):
    """One field, observed at some places and asked for at others; all float64."""

    x: np.ndarray
    """(num_context, 2)."""
    y: np.ndarray
    """(num_context,)."""
    x_target: np.ndarray
    """(num_target, 2)."""
    y_target: np.ndarray
    """(num_target,): observations, noise included."""
