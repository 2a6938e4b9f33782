"""
Transform to the map frame: TF lookup at the stamp of a message, and rigid motion of points.

The arithmetic is plain numpy; tf2_ros is imported only when a frame differs from the map's.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time

import numpy as np
from builtin_interfaces.msg import Time

from cmanp_ros.core.errors import TransformError

_POLL_SEC = 0.01


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
            f'quaternion {quaternion.tolist()} (x, y, z, w) has norm {norm}; expected 1'
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


class TransformListener:
    """
    Looks up transforms to the map frame; listens to TF only once a frame differs from the map's.

    The listener has a node, an executor and a thread of its own: on the executor of the main node
    the buffer falls behind whenever a callback takes long.
    """

    def __init__(self, node, timeout_sec: float = 0.2) -> None:
        """
        Prepare; nothing is imported, created or subscribed yet.

        :param node: whose context, namespace, name and time source the listener takes over.
        :param timeout_sec: [s] how long a lookup waits for a transform that is not there yet.
        """
        self._node = node
        self._timeout_sec = timeout_sec
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._buffer = None
        self._listener = None
        self._listener_node = None
        self._executor = None
        self._thread = None

    def lookup(
        self, map_frame: str, frame: str, stamp: Time, allow_latest: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """
        Find the transform that takes points of a frame to the map frame, as it was at a stamp.

        It blocks up to the timeout: call it from the worker's thread, not from a callback.

        :param map_frame: where points go.
        :param frame: where points come from (frame_id of a message).
        :param stamp: time of the message.
        :param allow_latest: take a stamp of 0 for "the latest known"; refused otherwise.
        :return: rotation (3, 3), translation (3,) [m]: p_map = rotation @ p_frame + translation.
        :raises TransformError: no frame_id, no usable stamp, no tf2_ros, or no transform in time.
        """
        target, source = map_frame.strip('/'), frame.strip('/')
        if not source:
            raise TransformError(
                f"the message has no frame_id; expected the frame of its points, as in '{target}'"
            )
        if source == target:
            return np.eye(3), np.zeros(3)
        if stamp.sec == 0 and stamp.nanosec == 0 and not allow_latest:
            raise TransformError(
                f"the message in frame '{source}' has stamp 0, so where it was is unknown; "
                f"expected the time of the readings, or points in '{target}'"
            )
        if stamp.sec < 0:
            raise TransformError(
                f"the message in frame '{source}' has stamp {stamp.sec} s; "
                'expected no time before 0'
            )
        return self._lookup_transform(target, source, stamp)

    def close(self) -> None:
        """Stop listening and release the node and the thread; a waiting lookup gives up."""
        self._closed.set()
        with self._lock:
            if self._buffer is None:
                return
            self._executor.shutdown(timeout_sec=1.0)
            self._thread.join(timeout=2.0)
            self._listener_node.destroy_node()
            self._buffer = self._listener = self._listener_node = self._executor = self._thread = (
                None
            )

    def _lookup_transform(
        self, target: str, source: str, stamp: Time
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ask the tf2 buffer until the transform is there or the timeout is over."""
        tf2_ros = _import_tf2_ros(target, source)
        from rclpy.time import Time as RclpyTime

        buffer = self._started_buffer(tf2_ros)
        at = RclpyTime.from_msg(stamp)
        # tf2's own wait cannot be ended, and goes by the system clock, which may be set back.
        deadline = time.monotonic() + self._timeout_sec
        try:
            while not buffer.can_transform(target, source, at) and time.monotonic() < deadline:
                if self._closed.wait(_POLL_SEC):
                    break
            found = buffer.lookup_transform(target, source, at).transform
        except tf2_ros.TransformException as error:
            raise TransformError(
                f"no transform from '{source}' to '{target}' at {stamp.sec}.{stamp.nanosec:09d} s "
                f'within {self._timeout_sec:g} s (parameter tf_timeout): {error}'
            ) from error
        rotation = rotation_from_quaternion(
            found.rotation.x, found.rotation.y, found.rotation.z, found.rotation.w
        )
        translation = np.array([found.translation.x, found.translation.y, found.translation.z])
        if not np.isfinite(translation).all():
            raise TransformError(
                f"transform from '{source}' to '{target}' has translation {translation.tolist()} m"
            )
        return rotation, translation

    def _started_buffer(self, tf2_ros):
        """Create the listener's node, buffer and thread on first use."""
        with self._lock:
            if self._closed.is_set():
                raise TransformError('the transform listener is closed')
            if self._buffer is None:
                self._listener_node = _companion_node(self._node)
                # With a node the buffer follows simulated time, and is cleared if that jumps back.
                self._buffer = tf2_ros.Buffer(node=self._listener_node)
                self._listener = tf2_ros.TransformListener(
                    self._buffer, self._listener_node, spin_thread=False
                )
                self._executor, self._thread = _spin_in_thread(self._listener_node)
            return self._buffer


def _import_tf2_ros(target: str, source: str):
    """Import tf2_ros, or say which package brings it."""
    try:
        import tf2_ros
    except ImportError as error:
        package = f'ros-{os.environ.get("ROS_DISTRO", "jazzy")}-tf2-ros-py'
        raise TransformError(
            f"points in frame '{source}' need a transform to '{target}', but tf2_ros is not "
            f"installed: sudo apt install {package}, or publish in '{target}' ({error})"
        ) from error
    return tf2_ros


def _companion_node(node):
    """Create a node beside another one: same context, namespace and time source."""
    from rclpy.node import Node
    from rclpy.parameter import Parameter

    name = f'{node.get_name()}_transforms'
    use_sim_time = bool(
        node.has_parameter('use_sim_time') and node.get_parameter('use_sim_time').value
    )
    return Node(
        name,
        context=node.context,
        namespace=node.get_namespace(),
        cli_args=[
            '--ros-args',
            '-r',
            f'__node:={name}',
        ],  # wins over a __node remapping meant for the main node
        parameter_overrides=[Parameter('use_sim_time', value=use_sim_time)],
        start_parameter_services=False,
    )


def _spin_in_thread(node):
    """Spin a node on an executor and a thread of its own."""
    from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor

    executor = SingleThreadedExecutor(context=node.context)
    executor.add_node(node)

    def spin() -> None:
        with contextlib.suppress(ExternalShutdownException):  # context shut down before close()
            executor.spin()

    thread = threading.Thread(target=spin, name=node.get_name(), daemon=True)
    thread.start()
    return executor, thread
