"""
The transforms of a bag: a tree of frames, interpolated at a stamp as tf2 does, without ROS.

All transforms are known before the first is asked for, so none is late. Between two transforms of
a frame the translation is linear and the rotation goes the shorter way (slerp); beyond the first
and the last nothing is guessed.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from cmanp_ros.conversions import nanoseconds_from_stamp
from cmanp_ros.core.errors import TransformError
from cmanp_ros.motion import rigid_motion

LONGEST_PATH = 1000  # [frames] as in tf2: a longer one goes in circles


class _Link(NamedTuple):
    """Where a frame is in its parent, at all stamps that are known."""

    parents: list[str]  # one for each stamp
    stamps: np.ndarray  # (n,) int64 [ns], sorted; empty: it never moves
    poses: np.ndarray  # (n, 7) [m] x y z, and the quaternion x y z w


class TransformTree:
    """Finds transforms between frames at a stamp."""

    def __init__(self, messages: Iterable[tuple[Any, bool]]) -> None:
        """
        Read all transforms.

        :param messages: each a tf2_msgs/TFMessage, and whether it is from /tf_static.
        """
        moving, still = {}, {}
        for message, is_static in messages:
            for each in message.transforms:
                frames = still if is_static else moving
                link = frames.setdefault(_name(each.child_frame_id), ([], array('q'), array('d')))
                link[0].append(_name(each.header.frame_id))
                link[1].append(nanoseconds_from_stamp(each.header.stamp))
                t, q = each.transform.translation, each.transform.rotation
                link[2].extend((t.x, t.y, t.z, q.x, q.y, q.z, q.w))
        self._links = {frame: _sorted(*link) for frame, link in moving.items()}
        self._links |= {
            frame: _Link(parents[-1:], np.zeros(0, np.int64), np.reshape(poses, (-1, 7))[-1:])
            for frame, (parents, _, poses) in still.items()
        }

    def motion(
        self, target: str, source: str, stamp_nanoseconds: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """
        Return what takes points from one frame to another.

        :param target: frame to go to.
        :param source: frame to come from.
        :param stamp_nanoseconds: [ns].
        :return: rotation (3, 3) and translation (3,) [m].
        :raises TransformError: 'no_transform' (not connected), 'transform_too_old' (before the
            first), 'transform_too_new' (after the last) or 'bad_transform'.
        """
        target, source = _name(target), _name(source)
        up, down = (self._path(frame, stamp_nanoseconds) for frame in (source, target))
        common = next((frame for frame in up if frame in down), None)
        if common is None:
            links = [f"'{frame}' in '{link.parents[0]}'" for frame, link in self._links.items()]
            raise TransformError(
                'no_transform',
                f"'{source}' and '{target}' are not connected in the bag; its transforms are: "
                f'{", ".join(links[:20]) or "none"}. Record /tf and /tf_static, or choose another '
                'map_frame',
            )
        rotation, translation = self._to(common, up, stamp_nanoseconds)
        if common != target:
            inverse = self._to(common, down, stamp_nanoseconds)
            rotation, translation = (
                inverse[0].T @ rotation,
                inverse[0].T @ (translation - inverse[1]),
            )
        return rotation, translation

    def _path(self, frame: str, stamp: int) -> list[str]:
        """Return a frame and those that it is in, up to the root."""
        path = [frame]
        while (link := self._links.get(path[-1])) is not None and len(path) < LONGEST_PATH:
            path.append(link.parents[_before(link, stamp)])
        return path

    def _to(self, ancestor: str, path: list[str], stamp: int) -> tuple[np.ndarray, np.ndarray]:
        """Return what takes points from the first frame of a path to one further on."""
        rotation, translation = np.eye(3), np.zeros(3)
        for frame, parent in zip(path, path[1:], strict=False):
            if frame == ancestor:
                break
            pose = _pose(self._links[frame], frame, stamp)
            up, shift = rigid_motion(pose[:3], pose[3:], frame, parent)
            rotation, translation = up @ rotation, up @ translation + shift
        return rotation, translation


def _name(frame: str) -> str:
    return frame.strip('/')


def _sorted(parents, stamps, poses) -> _Link:
    """Return what is known of a moving frame in the order of time; of equal stamps the last."""
    stamps = np.array(stamps, np.int64)
    kept = len(stamps) - 1 - np.unique(stamps[::-1], return_index=True)[1]
    poses = np.reshape(poses, (-1, 7))[kept]
    return _Link([parents[index] for index in kept], stamps[kept], poses)


def _before(link: _Link, stamp: int) -> int:
    """Return the index of the newest transform that is not after a stamp, else of the first."""
    return max(0, int(np.searchsorted(link.stamps, stamp, side='right')) - 1)


def _pose(link: _Link, frame: str, stamp: int) -> np.ndarray:
    """Return the pose (7,) at a stamp."""
    if not len(link.stamps):
        return link.poses[0]
    first, last = int(link.stamps[0]), int(link.stamps[-1])
    if not first <= stamp <= last:
        reason, seconds, where = (
            ('transform_too_old', (first - stamp) * 1e-9, 'before the first')
            if stamp < first
            else ('transform_too_new', (stamp - last) * 1e-9, 'after the last')
        )
        raise TransformError(
            reason,
            f"the stamp {stamp * 1e-9:.3f} s is {seconds:.3f} s {where} transform of '{frame}' in "
            'the bag; expected transforms around it: a recording often begins and ends without, '
            'and the clocks of two computers may differ',
        )
    index = _before(link, stamp)
    if stamp == link.stamps[index] or link.parents[index] != link.parents[index + 1]:
        return link.poses[index]  # it was hung elsewhere: as it was before
    before, after = link.poses[index], link.poses[index + 1]
    ratio = (stamp - int(link.stamps[index])) / int(link.stamps[index + 1] - link.stamps[index])
    translation = (1 - ratio) * before[:3] + ratio * after[:3]
    return np.concatenate([translation, slerp(before[3:], after[3:], ratio)])


def slerp(first: np.ndarray, second: np.ndarray, ratio: float) -> np.ndarray:
    """
    Interpolate rotations at constant speed, the shorter way.

    :param first: (4,) quaternion x y z w, at ratio 0; likewise second, at 1.
    :return: (4,).
    """
    first, second = (_normalized(quaternion) for quaternion in (first, second))
    cosine = float(first @ second)
    if cosine < 0:  # the same rotation has two quaternions
        second, cosine = -second, -cosine
    angle = np.arccos(min(cosine, 1.0))
    if np.sin(angle) < 1e-9:
        return first
    return (np.sin((1 - ratio) * angle) * first + np.sin(ratio * angle) * second) / np.sin(angle)


def _normalized(quaternion: np.ndarray) -> np.ndarray:
    """Return a unit quaternion; one of length 0 is left for `rigid_motion` to refuse."""
    length = np.linalg.norm(quaternion)
    return quaternion / length if length > 0 else quaternion
