"""
The ROS 2 node: wiring only. Messages go to conversions, points to the worker, answers back.

    observations -> conversions -> worker queue -> transforms -> NeuralField.observe
    query -> worker -> NeuralField.predict -> conversions -> ~/prediction
"""

import signal
import sys
import time
from dataclasses import dataclass

import numpy as np
import rclpy
import torch
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from nav_msgs.msg import OccupancyGrid
from rclpy.clock import Clock, ClockType
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.lifecycle import LifecycleNode, TransitionCallbackReturn
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.qos_overriding_options import QoSOverridingOptions
from sensor_msgs.msg import PointCloud2
from std_msgs.msg import Header
from std_srvs.srv import SetBool, Trigger
from visualization_msgs.msg import MarkerArray

from cmanp_ros import conversions, parameters, visualization
from cmanp_ros.conversions import MessageError
from cmanp_ros.core.errors import CMANPError, ConfigError, InputError, TransformError
from cmanp_ros.diagnostics import Counters, array_message, status_message
from cmanp_ros.field import NeuralField
from cmanp_ros.msg import Observations, Prediction, Query
from cmanp_ros.srv import Predict
from cmanp_ros.transforms import TransformListener, transform_points
from cmanp_ros.worker import Worker

ANSWER_TIMEOUT_SEC = 30.0
WARNING_PERIOD_SEC = 10.0


@dataclass(frozen=True)
class Batch:
    """Points of one message on their way to the worker."""

    header: Header
    x: np.ndarray
    """(n, dim) [m] in the frame of the header."""
    y: np.ndarray
    """(n, dim_y) [field units]."""
    value_is_height: bool
    """y is the third coordinate of x: it turns with the frame."""
    num_resets: int
    """Resets before it arrived."""


class CMANPNode(LifecycleNode):
    """
    Folds observations into a `NeuralField` and publishes what it predicts.

    `configure` loads the model and opens outputs, `activate` opens inputs, `deactivate` keeps the
    map, `cleanup` frees it.
    """

    def __init__(self, **kwargs):
        """
        Declare and check parameters; nothing else happens before `configure`.

        :raises ConfigError: for an unknown or unusable parameter.
        """
        super().__init__('cmanp', **kwargs)
        try:
            self.parameters = parameters.declare(self)
        except ConfigError:
            self.destroy_node()
            raise
        self._grid_outputs, self._inputs, self._outputs = {}, [], []
        self.field = self._worker = self._transforms = None

    # Lifecycle -------------------------------------------------------------------------------

    def on_configure(self, state):
        """Load and warm up the model, and open the outputs."""
        p = self.parameters
        try:
            torch.set_num_threads(p.num_threads)
            self.field = NeuralField.load(
                p.checkpoint,
                (p.bounds_min, p.bounds_max),
                p.device,
                p.value_offset,
                p.value_scale,
                tile_size=p.tile_size or None,
                one_tile=p.one_tile,
                max_tiles=p.max_tiles,
                store=p.store or None,
            )
            self.field.warm_up(np.array([p.bounds_min]))
        except CMANPError as error:
            self.get_logger().error(f'cannot configure: {error}')
            return TransitionCallbackReturn.FAILURE
        self._points, self._messages = Counters(), Counters()
        self._newest_stamp = 0  # [ns] of the observations folded
        self._paused, self._last_warning, self._num_resets = False, {}, 0
        self._published, self._publishing, self._flushing = None, None, None
        self._newest_x = np.add(p.bounds_min, p.bounds_max) / 2  # [m] of the observations folded
        self._transforms = TransformListener(self, p.tf_timeout)
        self._worker = Worker(self._fold, p.queue_size)
        self._worker.start()
        self._open_outputs()
        self.get_logger().info(
            f"configured: checkpoint '{p.checkpoint}' on {p.device}, "
            f"{self.field.geometry} in '{p.map_frame}', {self.field.num_tiles} tiles known, "
            f'{self.field.tile_nbytes} bytes each'
        )
        return TransitionCallbackReturn.SUCCESS

    def on_activate(self, state):
        """Open the inputs and start the timers."""
        sensor = QoSProfile(
            depth=self.parameters.queue_size, reliability=ReliabilityPolicy.BEST_EFFORT
        )
        for message_type, topic, callback, qos in (
            (PointCloud2, 'points', self._on_points, sensor),
            (Observations, 'observations', self._on_observations, sensor),
            (Query, 'query', self._on_query, QoSProfile(depth=10)),
        ):
            overridable = QoSOverridingOptions.with_default_policies()
            subscription = self.create_subscription(
                message_type, topic, callback, qos, qos_overriding_options=overridable
            )
            self._inputs.append((self.destroy_subscription, subscription))
        for service_type, name, callback in (
            (Predict, '~/predict', self._on_predict),
            (Trigger, '~/reset', self._on_reset),
            (SetBool, '~/pause', self._on_pause),
        ):
            service = self.create_service(service_type, name, callback)
            self._inputs.append((self.destroy_service, service))
        steady = Clock(clock_type=ClockType.STEADY_TIME)  # goes on when simulated time stands
        for rate, callback in (
            (self.parameters.publish_rate, self._publish_grid),
            (self.parameters.status_rate, self._publish_status),
        ):
            if rate > 0:
                timer = self.create_timer(1 / rate, callback, clock=steady)
                self._inputs.append((self.destroy_timer, timer))
        if self.parameters.store:
            timer = self.create_timer(self.parameters.store_period, self._flush, clock=steady)
            self._inputs.append((self.destroy_timer, timer))
        self.get_logger().info('active: waiting for observations')
        return super().on_activate(state)

    def on_deactivate(self, state):
        """Close the inputs; the map stays."""
        self._close(self._inputs)
        return super().on_deactivate(state)

    def on_cleanup(self, state):
        """Free the model and the map."""
        self._close(self._inputs)
        self._close(self._outputs)
        if self._worker is not None:
            self._worker.stop()
            self._transforms.close()
            self.field.close()
        self.field = self._worker = self._transforms = None
        self._grid_outputs.clear()
        return TransitionCallbackReturn.SUCCESS

    def on_shutdown(self, state):
        """End from any state."""
        return self.on_cleanup(state)

    def _open_outputs(self):
        latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        plain = QoSProfile(depth=10)

        def publisher(message_type, topic, qos):
            made = self.create_publisher(message_type, topic, qos)
            self._outputs.append((self.destroy_publisher, made))
            return made

        self._prediction = publisher(Prediction, '~/prediction', plain)
        self._status = publisher(DiagnosticStatus, '~/status', latched)
        self._diagnostics = publisher(DiagnosticArray, '/diagnostics', plain)
        if self.field.model.config.dim_x == 2:
            self._grid_outputs = {
                'field': publisher(PointCloud2, '~/field', latched),
                'mean': publisher(OccupancyGrid, '~/mean', latched),
                'stddev': publisher(OccupancyGrid, '~/stddev', latched),
                'markers': publisher(MarkerArray, '~/markers', latched),
            }

    @staticmethod
    def _close(made):
        while made:
            destroy, thing = made.pop()
            destroy(thing)

    # Observations ----------------------------------------------------------------------------

    def _on_points(self, message):
        p, config = self.parameters, self.field.model.config
        in_map = message.header.frame_id.strip('/') == p.map_frame.strip('/')
        location = ('x', 'y', 'z')[: config.dim_x if in_map else 3]

        def read():
            return conversions.points_from_cloud(message, location, p.value_field, p.max_points)

        is_height = not in_map and p.value_field == 'z' and config.dim_x < 3
        self._receive(message.header, read, is_height)

    def _on_observations(self, message):
        config, limit = self.field.model.config, self.parameters.max_points

        def read():
            return conversions.observations_from_message(
                message, config.dim_x, config.dim_y, limit
            )

        self._receive(message.header, read, False)

    def _receive(self, header, read, value_is_height):
        """Check a message and hand its points to the worker."""
        self._messages.receive()
        if self._paused:
            return self._messages.reject('paused')
        try:
            x, y, rejected = read()
        except MessageError as error:
            self._messages.reject(error.reason)
            return self._warn(error.reason, f'message left out: {error}')
        self._points.receive(len(x) + sum(rejected.values()))
        self._reject_points(rejected)
        for batch in self._worker.offer(Batch(header, x, y, value_is_height, self._num_resets)):
            self._drop(batch)
            self._warn(
                'dropped',
                'observations arrive faster than they are folded: the oldest message was '
                'dropped; see queue_size, or send fewer points',
            )

    def _fold(self, batch):
        """Fold one message on the worker's thread, a chunk at a time (see `Worker`)."""
        waiting = len(batch.x)
        try:
            x, y = self._to_map(batch)
            step = self.parameters.chunk_size
            for start in range(0, len(x), step):
                if batch.num_resets != self._num_resets:
                    return self._drop(batch, waiting)
                chunk = slice(start, start + step)
                observed = self.field.observe(x[chunk], y[chunk])
                waiting -= len(x[chunk])
                self._points.fold(observed.folded)
                self._reject_points(observed.rejected)
                if observed.folded:
                    stamp = conversions.nanoseconds_from_stamp(batch.header.stamp)
                    self._newest_stamp = max(self._newest_stamp, stamp)
                    self._newest_x = x[chunk][-1]
                yield
            self._messages.fold()
        except TransformError as error:
            self._refuse(batch, 'no_transform', waiting, error)
        except InputError as error:
            self._refuse(batch, 'not_usable', waiting, error)
        except Exception as error:  # a fault of ours or of torch must not end the node
            self._refuse(batch, 'internal_error', waiting, error)

    def _to_map(self, batch):
        """Return x (n, dim_x) and y in the map frame."""
        p, dim_x = self.parameters, self.field.model.config.dim_x
        frame = batch.header.frame_id.strip('/')
        if frame == p.map_frame.strip('/'):
            return batch.x, batch.y
        rotation, translation = self._transforms.lookup(p.map_frame, frame, batch.header.stamp)
        x = transform_points(batch.x, rotation, translation)
        return x[:, :dim_x], x[:, 2:] if batch.value_is_height else batch.y

    def _refuse(self, batch, reason, num_points, error):
        self._messages.reject(reason)
        self._points.reject(reason, num_points)
        self._warn(reason, f'message left out: {error}')

    def _drop(self, batch, num_points=None):
        self._messages.drop()
        self._points.drop(len(batch.x) if num_points is None else num_points)

    def _reject_points(self, rejected):
        for reason, count in rejected.items():
            self._points.reject(reason, count)
            self._warn(reason, f'{count} points left out: {_REASONS.get(reason, reason)}')

    def _warn(self, reason, text):
        """Log a reason at once, and again only after a while."""
        now = time.monotonic()
        if now - self._last_warning.get(reason, -np.inf) >= WARNING_PERIOD_SEC:
            self._last_warning[reason] = now
            self.get_logger().warning(f'[{reason}] {text}')

    # Answers ---------------------------------------------------------------------------------

    def _header(self):
        """Return the header of everything published: stamp of the newest observation."""
        header = Header(frame_id=self.parameters.map_frame)
        if self._newest_stamp:
            header.stamp = conversions.stamp_from_nanoseconds(self._newest_stamp)
        else:
            header.stamp = self.get_clock().now().to_msg()
        return header

    def _targets(self, message):
        """
        Return the locations of a query or request in the map frame, (n, dim_x).

        :raises CMANPError: when they cannot be used.
        """
        p, dim_x = self.parameters, self.field.model.config.dim_x
        x = conversions.targets_from_query(message, dim_x, p.max_targets)
        frame = message.header.frame_id.strip('/')
        if frame == p.map_frame.strip('/'):
            return x
        transform = self._transforms.lookup(
            p.map_frame, frame, message.header.stamp, allow_latest=True
        )
        return transform_points(x, *transform)[:, :dim_x]

    def _answer(self, x, mean, stddev, query_id=0):
        return conversions.prediction_message(
            mean,
            stddev,
            self.field.status(x),
            self.field.num_observations,
            self._header(),
            query_id,
        )

    def _on_query(self, message):
        def answer():
            try:
                x = self._targets(message)
                self._prediction.publish(self._answer(x, *self.field.predict(x), message.id))
            except CMANPError as error:
                self._warn('query', f'query {message.id} not answered: {error}')

        self._worker.ask(answer).add_done_callback(self._report_fault)

    def _on_predict(self, request, response):
        p = self.parameters

        def answer():
            x = self._targets(request)
            if request.joint and len(x) > p.max_joint_targets:
                raise InputError(
                    f'joint over {len(x)} locations, expected at most max_joint_targets = '
                    f'{p.max_joint_targets}: ask for samples, or in parts'
                )
            num_samples = request.num_samples
            if num_samples > p.max_samples or num_samples * len(x) > p.max_targets:
                raise InputError(
                    f'{num_samples} samples at {len(x)} locations, expected at most max_samples '
                    f'= {p.max_samples}, and max_targets = {p.max_targets} numbers in all'
                )
            covariance = None
            if request.joint:
                mean, stddev, covariance = self.field.predict_joint(x)
            else:
                mean, stddev = self.field.predict(x)
            samples = self.field.sample(x, num_samples) if num_samples else None
            return self._answer(x, mean, stddev), covariance, samples

        try:
            future = self._worker.ask(answer)
            response.prediction, covariance, samples = future.result(ANSWER_TIMEOUT_SEC)
        except CMANPError as error:
            return self._refuse_request(response, str(error))
        except Exception as error:  # a fault of ours or of torch must not end the node
            return self._refuse_request(response, f'no answer: {error!r}')
        response.success = True
        if covariance is not None:
            response.covariance = conversions.float_array(covariance)
        if samples is not None:
            response.samples = conversions.float_array(samples)
        return response

    def _refuse_request(self, response, message):
        self._warn('request', f'request refused: {message}')
        response.success, response.message = False, message
        return response

    def _on_reset(self, request, response):
        for batch in self._worker.clear():
            self._drop(batch)
        try:
            count = self._worker.ask(self._reset).result(ANSWER_TIMEOUT_SEC)
        except Exception as error:
            return self._refuse_request(response, f'not reset: {error!r}')
        response.success, response.message = True, f'forgot {count} observations'
        return response

    def _reset(self):
        count = self.field.num_observations
        self.field.reset()
        self._newest_stamp = 0
        self._num_resets += 1  # what is left of the message being folded is dropped
        return count

    def _on_pause(self, request, response):
        self._paused = request.data
        response.success = True
        response.message = 'paused: observations are rejected' if request.data else 'folding'
        return response

    def _flush(self):
        """Write what changed to the store, unless the last time is still under way."""
        if self._flushing is None or self._flushing.done():
            self._flushing = self._worker.ask(self.field.flush)
            self._flushing.add_done_callback(self._report_fault)

    # Outputs ---------------------------------------------------------------------------------

    def _publish_grid(self):
        """Publish the grid where somebody listens, if it changed or somebody new listens."""
        wanted = [
            name for name, output in self._grid_outputs.items() if output.get_subscription_count()
        ]
        version = (self.field.version, tuple(wanted))
        is_busy = self._publishing is not None and not self._publishing.done()
        if not wanted or is_busy or version == self._published:
            return
        self._published = version
        self._publishing = self._worker.ask(lambda: self._publish_grid_on(wanted))
        self._publishing.add_done_callback(self._report_fault)

    def _report_fault(self, future):
        if not future.cancelled() and (error := future.exception()) is not None:
            self._warn('internal_error', f'no answer and no grid: {error!r}')

    def _publish_grid_on(self, names):
        p = self.parameters
        grid = visualization.grid_targets(*self._window(), p.grid_resolution)
        mean, stddev = (value[:, 0] for value in self.field.predict(grid.targets))
        header = self._header()
        make = {
            'field': lambda: visualization.field_cloud(grid, mean, stddev, header),
            'mean': lambda: visualization.occupancy_grid(grid, mean, *p.mean_range, header),
            'stddev': lambda: visualization.occupancy_grid(grid, stddev, *p.stddev_range, header),
            'markers': lambda: visualization.surface_markers(
                grid, mean, stddev, p.stddev_range, header
            ),
        }
        for name in names:
            self._grid_outputs[name].publish(make[name]())

    def _window(self):
        """Return lower and upper corner [m] of the published grid."""
        p = self.parameters
        if not p.grid_window:
            return p.bounds_min, p.bounds_max
        # Cells stay where they are while the window moves.
        lower = np.round((self._newest_x - p.grid_window / 2) / p.grid_resolution)
        lower = lower * p.grid_resolution
        return lower, lower + p.grid_window

    def _publish_status(self):
        points, messages = self._points.snapshot(), self._messages.snapshot()
        level, text = DiagnosticStatus.OK, 'folding observations'
        if self._paused:
            level, text = DiagnosticStatus.WARN, 'paused: observations are rejected'
        elif self.field.num_tiles_dropped:
            level = DiagnosticStatus.WARN
            text = 'parts of the map were dropped: max_tiles are in memory and store is not set'
        elif points.folded == 0 and messages.received == 0:
            text = "no observations yet on 'points' and 'observations'"
        elif points.folded == 0:
            level, text = DiagnosticStatus.WARN, f'nothing folded yet: {dict(messages.rejected)}'
            if points.rejected:
                text = f'nothing folded yet: points left out {dict(points.rejected)}'
        values = {
            'state_bytes': self.field.state_nbytes,
            'tile_bytes': self.field.tile_nbytes,
            'tiles': self.field.num_tiles,
            'tiles_in_memory': self.field.num_tiles_in_memory,
            'tiles_dropped': self.field.num_tiles_dropped,
            'observations_folded': self.field.num_observations,
            **points.values('points_'),
            **messages.values('messages_'),
        }
        status = status_message(f'{self.get_name()}: field', level, text, values)
        self._status.publish(status)
        self._diagnostics.publish(array_message([status], self.get_clock().now().to_msg()))


_REASONS = {
    'not_finite': 'NaN or infinite location or value',
    'outside_workspace': 'outside bounds_min and bounds_max',
    'value_out_of_range': 'absurdly far from value_offset; set value_offset and value_scale',
}


def main(arguments=None) -> int:
    """
    Run the node until it is interrupted.

    :return: exit status: 0, or 1 when it could not start (the log says why).
    """
    rclpy.init(args=arguments)
    node = None
    try:
        node = CMANPNode()
        if node.parameters.autostart:
            for transition in (node.trigger_configure, node.trigger_activate):
                if transition() != TransitionCallbackReturn.SUCCESS:
                    return 1
        executor = SingleThreadedExecutor()
        executor.add_node(node)
        executor.spin()
    except ConfigError as error:
        print(f'cmanp_node: {error}', file=sys.stderr)
        return 1
    except (KeyboardInterrupt, ExternalShutdownException):
        pass
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one must not end the ending
        if node is not None:
            node.on_cleanup(None)
            node.destroy_node()
        rclpy.try_shutdown()
    return 0


if __name__ == '__main__':
    sys.exit(main())
