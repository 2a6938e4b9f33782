"""
The ROS side of `cmanp view`: a node beside the one that maps, which listens and asks for others.

As long as nobody looks it listens to the status alone: maps are only computed for subscribers.
"""

import os
import threading
import time
from concurrent.futures import Future

import numpy as np
import rclpy
from diagnostic_msgs.msg import DiagnosticStatus
from rclpy.clock import Clock, ClockType
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rclpy.serialization import deserialize_message
from sensor_msgs.msg import PointCloud2

from cmanp_ros import graph
from cmanp_ros.cli import doctor
from cmanp_ros.conversions import (
    MessageError,
    float_array,
    nanoseconds_from_stamp,
    observations_from_message,
    points_from_cloud,
    predictions_from_message,
)
from cmanp_ros.core.errors import InputError
from cmanp_ros.health import STATES
from cmanp_ros.motion import transform_points
from cmanp_ros.msg import Observations, Prediction
from cmanp_ros.qos import LATCHED
from cmanp_ros.srv import Predict
from cmanp_ros.transforms import TransformListener
from cmanp_ros.view.packing import pack_cells

SILENT_SEC = 4.0  # without a status for longer, the doctor has a look
DOCTOR_SEC = 2.0  # that it waits for each thing
TICK_SEC = 0.5
MAX_POINTS = 10_000_000  # of an input; more are not looked at
_INPUTS = {
    'sensor_msgs/msg/PointCloud2': PointCloud2,
    'cmanp_ros/msg/Observations': Observations,
}
_NEWEST = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)


class Listener:
    """
    Hears what a node publishes, and asks it.

    :ivar target: full name of that node.
    :ivar is_watched: whether somebody looks; set it at any time.
    """

    def __init__(self, context, namespace: str, name: str, publish) -> None:
        """
        Begin to listen, on a thread of its own.

        :param context: initialized rclpy context of its own.
        :param namespace: of the node that maps.
        :param name: of the node that maps.
        :param publish: called on that thread with a kind, and a dictionary or bytes for the page.
        """
        self.target = graph.full_name(f'/{namespace.strip("/")}', name)
        self.is_watched = False
        self._context, self._publish = context, publish
        self._namespace, self._name = namespace, name
        self._heard_at = time.monotonic()
        self._map_frame, self._transforms = 'map', None
        self._field, self._inputs, self._unread = None, {}, {}
        self._node = rclpy.create_node(
            f'cmanp_view_{os.getpid()}',
            context=context,
            enable_rosout=False,
            start_parameter_services=False,
        )
        self._client = self._node.create_client(Predict, f'{self.target}/predict')
        self._node.create_subscription(
            DiagnosticStatus, f'{self.target}/status', self._on_status, LATCHED
        )
        self._node.create_timer(
            TICK_SEC, self._tick, clock=Clock(clock_type=ClockType.STEADY_TIME)
        )
        self._executor = SingleThreadedExecutor(context=context)
        self._executor.add_node(self._node)
        self._thread = threading.Thread(target=self._spin, daemon=True)
        self._thread.start()

    @property
    def is_silent(self) -> bool:
        """Tell whether the node has said nothing of itself for a while."""
        return time.monotonic() - self._heard_at > SILENT_SEC

    def ask(self, x: float, y: float) -> Future:
        """
        Ask the node for the distribution at a place of the map.

        :return: of a dictionary for the page.
        """
        answer = Future()
        if not self._client.service_is_ready():
            answer.set_result({'error': f'{self.target}/predict is not there to answer'})
            return answer
        request = Predict.Request(dim_x=2, x=float_array([[x, y]]))
        request.header.frame_id = self._map_frame
        asked = self._client.call_async(request)

        def on_response(done) -> None:
            if answer.set_running_or_notify_cancel():
                answer.set_result(answer_from(done.result()))

        asked.add_done_callback(on_response)
        answer.add_done_callback(lambda _: self._client.remove_pending_request(asked))
        return answer

    def examine(self) -> dict:
        """Return what the doctor says, for the page; takes some seconds."""
        lines = []
        try:
            doctor.examine(self._context, self._namespace, self._name, DOCTOR_SEC, lines.append)
        except Exception as error:  # as on its own command line: whatever it is, it says so
            lines.append(f'cmanp doctor: cannot look: {error}')
        return {'text': lines[-1], 'lines': lines}

    def close(self) -> None:
        """Leave."""
        if self._transforms is not None:
            self._transforms.close()
        self._executor.shutdown(timeout_sec=1.0)
        self._thread.join(2.0)
        self._node.destroy_node()

    # On the thread --------------------------------------------------------------------------

    def _spin(self) -> None:
        try:
            self._executor.spin()
        except ExternalShutdownException:
            pass

    def _on_status(self, message) -> None:
        self._heard_at = time.monotonic()
        self._publish('status', status_from(message))

    def _on_field(self, cloud) -> None:
        try:
            message = map_from(cloud)
        except InputError as error:
            return self._publish('map', {'error': str(error)})
        if cloud.header.frame_id != self._map_frame or self._transforms is None:
            self._take_map_frame(cloud.header.frame_id)
        self._publish('map', message)

    def _take_map_frame(self, frame: str) -> None:
        """Transform to this frame from now on."""
        if self._transforms is not None:
            self._transforms.close()
        self._map_frame = frame
        self._transforms = TransformListener(self._node, map_frame=frame)

    def _tick(self) -> None:
        """Listen to what somebody looks at, and to nothing else; say where it is measured."""
        if self.is_watched and self._field is None:
            self._field = self._node.create_subscription(
                PointCloud2, f'{self.target}/field', self._on_field, LATCHED
            )
        elif not self.is_watched and self._field is not None:
            for subscription in (self._field, *self._inputs.values()):
                self._node.destroy_subscription(subscription)
            self._field, self._inputs = None, {}
        if self.is_watched:
            self._listen_to_inputs()
            self._read_inputs()

    def _listen_to_inputs(self) -> None:
        """Subscribe to the clouds and observations that the node itself subscribes to."""
        found = graph.subscriptions(self._node, self.target)
        for topic, (type_name, _) in found.items():
            if type_name in _INPUTS and topic not in self._inputs:
                self._inputs[topic] = self._node.create_subscription(
                    _INPUTS[type_name],
                    topic,
                    lambda data, kind=_INPUTS[type_name]: self._unread.update({kind: data}),
                    _NEWEST,
                    raw=True,  # reading each would cost more than all the rest
                )

    def _read_inputs(self) -> None:
        """Find the place of the newest message of each type in the map."""
        unread, self._unread = self._unread, {}
        if self._transforms is None:
            return
        for kind, data in unread.items():
            message = deserialize_message(data, kind)
            if (center := center_of(message)) is None:
                continue
            header = message.header
            self._transforms.request(
                kind.__name__,
                header.frame_id,
                header.stamp,
                lambda *motion, center=center: self._publish_place(center, motion),
                lambda error: None,  # the node says so in its status
                allow_latest=True,
            )

    def _publish_place(self, center, motion) -> None:
        x, y, _ = transform_points(center, *motion)[0]
        self._publish('place', {'x': x, 'y': y})


def status_from(message: DiagnosticStatus) -> dict:
    """Return what a node says of itself, for the page."""
    state, _, text = message.message.partition(': ')
    if state not in STATES:
        state, text = '', message.message
    return {
        'level': message.level[0],
        'state': state,
        'text': text,
        'values': {pair.key: pair.value for pair in message.values},
    }


def map_from(cloud: PointCloud2) -> bytes:
    """
    Return the published map, for the page.

    :raises InputError: it cannot be read or is no grid.
    """
    x, mean, _ = points_from_cloud(cloud, ('x', 'y'), 'mean')
    x_stddev, stddev, _ = points_from_cloud(cloud, ('x', 'y'), 'stddev')
    if len(x) != len(x_stddev):
        raise InputError('some cells of the map have only one of mean and stddev; expected both')
    stamp = nanoseconds_from_stamp(cloud.header.stamp) * 1e-9
    return pack_cells(x, mean, stddev, {'frame': cloud.header.frame_id, 'stamp': stamp})


def answer_from(response) -> dict:
    """Return the answer of the service to one question, for the page."""
    if not response.success:
        return {'error': response.message}
    mean, stddev, status = predictions_from_message(response.prediction)
    return {
        'mean': mean[0, 0],
        'stddev': stddev[0, 0],
        'is_outside': bool(status[0] == Prediction.STATUS_OUTSIDE_WORKSPACE),
    }


def center_of(message: PointCloud2 | Observations) -> np.ndarray | None:
    """
    Return where the points of an input lie.

    :return: (1, 3) their mean [m] in their frame; None if there are none, or none can be read.
    """
    try:
        if isinstance(message, PointCloud2):
            x, _, _ = points_from_cloud(message, ('x', 'y', 'z'), 'x', MAX_POINTS)
        else:
            x, _, _ = observations_from_message(message, message.dim_x, message.dim_y, MAX_POINTS)
    except MessageError:
        return None
    center = np.zeros((1, 3))
    if not len(x):
        return None
    center[0, : x.shape[1]] = x.mean(axis=0)
    return center
