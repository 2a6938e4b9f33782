"""
The model in pure torch: no ROS, no files.

Conventions: tensors are (batch, points, channels), attention tensors (batch, head, query, key),
both with a block axis in front of the heads where all blocks run at once. x is location, y is
value; both in model units here (the workspace is [-2, 2], values are deviations).
"""

from cmanp_ros.core.config import CMANPConfig, LeastSquaresConfig
from cmanp_ros.core.errors import CMANPError
from cmanp_ros.core.model import CMANP
from cmanp_ros.core.normalization import Normalization
from cmanp_ros.core.predictive import PredictiveDistribution
from cmanp_ros.core.state import State, forget, merge

__all__ = [
    'CMANP',
    'CMANPConfig',
    'CMANPError',
    'LeastSquaresConfig',
    'Normalization',
    'PredictiveDistribution',
    'State',
    'forget',
    'merge',
]
