"""
Rigid motion from one frame to another, in plain numpy: no ROS here.

Messages are any objects with their fields.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cmanp_ros.core.errors import TransformError


def rotation_from_quaternion(x: float, y: float, z: float, w: float) -> np.ndarray:
    """
    Convert a quaternion to a rotation matrix.

    :param x: of the vector part; likewise y and z.
    :param w: scalar part. The quaternion need not be normalized.
    :return: (3, 3) float64.
    :raises TransformError: the quaternion is zero or not finite.
    """
    quaternion = np.array([x, y, z, w], dtype=np.float64)
    norm = np.linalg.norm(quaternion)
    if not np.isfinite(norm) or norm < 1e-6:
        raise TransformError(
            'bad_transform',
            f'quaternion {quaternion.tolist()} (x, y, z, w) has norm {norm}; expected 1',
        )
    x, y, z, w = quaternion / norm
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


def transform_points(
    points: np.ndarray, rotation: np.ndarray, translation: np.ndarray
) -> np.ndarray:
    """
    Move points from one frame to another: rotation @ p + translation for each row p.

    :param points: (n, 1), (n, 2) or (n, 3) [m]; missing coordinates are 0.
    :param rotation: (3, 3).
    :param translation: (3,) [m].
    :return: (n, 3) float64 [m]; a row that was not finite is not finite.
    """
    padded = np.zeros((len(points), 3))
    padded[:, : points.shape[1]] = points
    with np.errstate(invalid='ignore', over='ignore'):
        return padded @ np.asarray(rotation).T + np.asarray(translation)


def rigid_motion(
    translation: Sequence[float], quaternion: Sequence[float], source: str, target: str
) -> tuple[np.ndarray, np.ndarray]:
    """
    Check a transform, and return it as `transform_points` takes it.

    :param translation: x y z [m].
    :param quaternion: x y z w; it need not be normalized.
    :param source: frame that it takes points from; likewise target, to. For the message.
    :return: rotation (3, 3) and translation (3,) [m].
    :raises TransformError: it is no rigid motion.
    """
    rotation, translation = rotation_from_quaternion(*quaternion), np.array(translation)
    if not np.isfinite(translation).all():
        raise TransformError(
            'bad_transform',
            f"transform from '{source}' to '{target}' has translation "
            f'{translation.tolist()} m; expected finite numbers',
        )
    return rotation, translation


def check_header(source: str, stamp: Any, target: str, allow_latest: bool = False) -> None:
    """
    Refuse a message that can never be transformed.

    :param source: frame of its points, which is not the target.
    :param stamp: builtin_interfaces/Time of its points.
    :param target: frame in which they are wanted.
    :param allow_latest: a stamp of 0 means "the latest known".
    :raises TransformError: 'no_frame' or 'no_stamp'.
    """
    if not source:
        raise TransformError(
            'no_frame',
            f"the message has no frame_id; expected the frame of its points, as in '{target}'",
        )
    if stamp.sec == 0 and stamp.nanosec == 0 and not allow_latest:
        raise TransformError(
            'no_stamp',
            f"the message in frame '{source}' has stamp 0, so where it was is unknown; "
            f"expected the time of the readings, or points in '{target}'",
        )
    if stamp.sec < 0:
        raise TransformError(
            'no_stamp',
            f"the message in frame '{source}' has stamp {stamp.sec} s; expected no time before 0",
        )
