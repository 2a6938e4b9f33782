"""
The ROS 2 node: wiring only.

::

    observations -> intake -> worker -> map <- worker <- answers <- queries, requests
                                         |- refresher: what answers have of it
                                         |- displays -> grids, markers
                                         ^- control: pause, reset, save, load, merge, undo, peers
"""

import contextlib
import functools
import shlex
import signal
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import rclpy
import torch
from rcl_interfaces.msg import SetParametersResult
from rclpy.callback_groups import MutuallyExclusiveCallbackGroup
from rclpy.clock import Clock, ClockType, JumpThreshold
from rclpy.duration import Duration
from rclpy.exceptions import InvalidHandle, NameValidationException
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.lifecycle import LifecycleNode, TransitionCallbackReturn
from rclpy.utilities import remove_ros_args
from std_msgs.msg import Header

from cmanp_ros import conversions, parameter_file, parameters
from cmanp_ros.answers import Answers
from cmanp_ros.control import Control
from cmanp_ros.core.errors import CMANPError, ConfigError
from cmanp_ros.displays import Displays
from cmanp_ros.field import NeuralField
from cmanp_ros.fleet import Fleet
from cmanp_ros.health import Calibration
from cmanp_ros.intake import Intake
from cmanp_ros.maps import empty_map
from cmanp_ros.memory import keep_freed_memory
from cmanp_ros.refresher import Refresher
from cmanp_ros.status import Status
from cmanp_ros.transforms import TransformListener
from cmanp_ros.worker import Worker

WARNING_PERIOD_SEC = 10.0


class CMANPNode(LifecycleNode):
    """
    Folds observations into a map and publishes what it predicts.

    `configure` loads the model and opens outputs, `activate` opens inputs, `deactivate` keeps the
    map, `cleanup` frees it. It may be added to any executor, see `spin`; requests that take long
    wait in threads of the node. One thread for the executor is best: rclpy's MultiThreadedExecutor
    hands the same work out thousands of times where others want the interpreter's lock, and
    nothing comes through for many seconds (rclpy issue 1452).
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
        self._last_warning = {}
        self.add_on_set_parameters_callback(self._on_set_parameters)
        for service in self.services:  # those of ROS
            service.callback = self._refusing(service)
        self.answering, self.controlling = (MutuallyExclusiveCallbackGroup() for _ in range(2))
        self._threads = ThreadPoolExecutor(2, 'cmanp request')  # one for each group
        self._inputs, self._outputs, self._is_open = [], [], False
        self._jump_handle = None
        self.fleet = self.worker = self.transforms = None
        self.intake = self.refresher = self.answers = self.displays = None
        self.control = self.status = None

    @property
    def field(self) -> NeuralField | None:
        """What this node observed; `fleet.combined` has its peers, too."""
        return self.fleet and self.fleet.own

    # Lifecycle -----------------------------------------------------------------------------------

    def on_configure(self, state):
        """Load and warm up the model, restore the map, and open the outputs."""
        p = self.parameters
        self._last_warning.clear()
        self.num_clock_jumps = 0
        self.calibration = Calibration()
        try:
            torch.set_num_threads(p.num_threads)
            self.fleet = Fleet(empty_map(p), p.map_frame, time.time_ns())
            self.field.warm_up(np.array([p.bounds_min]))
            self.transforms = TransformListener(self, p.tf_timeout, p.map_frame, p.max_pending)
            self.intake, self.refresher = Intake(self), Refresher(self)
            self.worker = Worker(self.intake.fold, p.queue_size, p.chunk_size, p.batch_window)
            self.answers, self.displays = Answers(self), Displays(self)
            self.control = Control(self)
            self.control.restore()
            self.status = Status(self)
            self.worker.start()
        except Exception as error:  # rclpy would say nothing of it
            self._say_why_not('configure', error)
            self.on_cleanup(state)
            return TransitionCallbackReturn.FAILURE
        self.get_logger().info(
            f"configured: checkpoint '{p.checkpoint}' on {p.device}, "
            f"{self.field.geometry} in '{p.map_frame}', {self.field.num_tiles} tiles known, "
            f'{self.field.tile_nbytes} bytes each'
        )
        if p.half_life:
            self.get_logger().info(
                f'what is observed fades: it counts half after {p.half_life:g} s (half_life)'
            )
        return TransitionCallbackReturn.SUCCESS

    def on_activate(self, state):
        """Open the inputs and start the timers."""
        self._is_open = True
        try:
            for part in (self.intake, self.answers, self.displays, self.control, self.status):
                part.open()
        except Exception as error:  # of a topic or qos_overrides; rclpy would say nothing of it
            self._say_why_not('activate', error)
            self._close_inputs()
            return TransitionCallbackReturn.FAILURE
        self._jump_handle = self.get_clock().create_jump_callback(
            JumpThreshold(
                min_forward=None, min_backward=Duration(nanoseconds=-1), on_clock_change=False
            ),
            post_callback=self._on_clock_jump,
        )
        self.get_logger().info('active: waiting for observations')
        return super().on_activate(state)

    def on_deactivate(self, state):
        """Close the inputs; the map stays."""
        self._close_inputs()
        return super().on_deactivate(state)

    def on_cleanup(self, state):
        """Free the model and the map; what autosave has not saved yet is saved."""
        self._close_inputs()
        if self.status is not None and self.parameters.autosave_period:
            self.get_logger().info('saving the map before the end: do not kill')
            self.control.autosave()
        self._close(self._outputs)
        if self.worker is not None:
            self.worker.stop()
            if left := sum(len(batch) for batch in self.worker.clear()):
                self.get_logger().warning(f'{left} points that waited are not folded: it ends')
            self.refresher.close()
        if self.transforms is not None:
            self.transforms.close()
        if self.fleet is not None:
            try:
                self.fleet.own.close()
            except CMANPError as error:
                self.get_logger().error(f'the map was not written to the store: {error}')
        self.fleet = self.worker = self.transforms = None
        self.intake = self.refresher = self.answers = self.displays = None
        self.control = self.status = None
        return TransitionCallbackReturn.SUCCESS

    def on_shutdown(self, state):
        """End from any state."""
        return self.on_cleanup(state)

    def _say_why_not(self, transition, error):
        why = str(error) if isinstance(error, CMANPError) else repr(error)
        self.get_logger().error(f'cannot {transition}: {conversions.one_line(why)}')
        self.get_logger().debug(traceback.format_exc())

    def _close_inputs(self):
        self._is_open = False
        if self._jump_handle is not None:
            self._jump_handle.unregister()
            self._jump_handle = None
        self._close(self._inputs)

    @staticmethod
    def _close(made):
        while made:
            destroy, thing = made.pop()
            destroy(thing)

    # What the parts open; closed by the lifecycle ------------------------------------------------

    def open_publisher(self, message_type, topic, qos):
        """Publish until cleanup."""
        made = self.create_publisher(message_type, topic, qos)
        self._outputs.append((self.destroy_publisher, made))
        return made

    def open_subscription(self, message_type, topic, callback, qos, **options):
        """Subscribe until deactivated."""
        made = self.create_subscription(
            message_type, topic, self._guarded(callback), qos, **options
        )
        self._inputs.append((self.destroy_subscription, made))
        return made

    def open_service(self, service_type, name, callback, group, qos):
        """Serve until deactivated; the callback may wait, and others of its group then do."""
        made = self.create_service(
            service_type, name, self._in_thread(callback), qos_profile=qos, callback_group=group
        )
        self._inputs.append((self.destroy_service, made))
        return made

    def open_timer(self, rate, callback, group=None):
        """
        Call at a rate [Hz] until deactivated, by the steady clock; 0: never.

        :param group: the callback may wait, and others of this group then do.
        """
        if rate > 0:
            callback = self._guarded(callback)
            callback = callback if group is None else self._in_thread(callback)
            steady = Clock(clock_type=ClockType.STEADY_TIME)  # goes on when simulated time stands
            timer = self.create_timer(1 / rate, callback, group, clock=steady)
            self._inputs.append((self.destroy_timer, timer))

    def _in_thread(self, callback):
        """Return a coroutine function that calls back in a thread: the executor does not wait."""

        async def awaited(*arguments):
            return await _Outcome(self._threads.submit(callback, *arguments), self.executor)

        return awaited

    def _refusing(self, service):
        """Return the callback of a service of ROS; what rclpy cannot do must not end the node."""
        callback, name = service.callback, service.srv_name.rpartition('/')[2]
        way_out = ''
        if name == 'change_state' and self.parameters.autostart:
            way_out = '; if a lifecycle manager asks, set autostart to false'

        def refusing(request, response):
            try:
                return callback(request, response)
            except Exception as error:
                state = f'the node is {self._state_machine.current_state[1]}'
                self.warn(name, f'request refused, {state}: {error}{way_out}')
                if name == 'set_parameters':  # a result for each, or clients fail, too
                    refused = SetParametersResult(reason=conversions.one_line(str(error)))
                    response.results = [refused] * len(request.parameters)
                return response

        return refusing

    def _guarded(self, callback):
        """Return a callback whose faults are logged: they must not end the executor."""

        @functools.wraps(callback)  # rclpy looks at the arguments that it takes
        def guarded(*arguments):
            try:
                callback(*arguments)
            except Exception as error:
                if self._is_open:  # else it was on its way when the inputs were closed
                    self.warn('internal_error', f'a fault, the node goes on: {error!r}')

        return guarded

    # What the parts share ------------------------------------------------------------------------

    def header(self, stamp: int | None = None) -> Header:
        """
        Return the header of everything published.

        :param stamp: [ns] of the newest observation in it, by default in the map; 0: none, and
            the header bears the time now.
        """
        stamp = self.intake.newest_stamp if stamp is None else stamp
        header = Header(frame_id=self.parameters.map_frame)
        if stamp:
            header.stamp = conversions.stamp_from_nanoseconds(stamp)
        else:
            header.stamp = self.get_clock().now().to_msg()
        return header

    def warn(self, reason, text):
        """Log a reason at once, and again only after a while."""
        now = time.monotonic()
        if now - self._last_warning.get(reason, -np.inf) >= WARNING_PERIOD_SEC:
            self._last_warning[reason] = now
            self.get_logger().warning(f'[{reason}] {conversions.one_line(text)}')

    def in_background(self, work):
        """Do a piece of work on the worker's thread; a fault is logged. Return its future."""
        return self._reporting(self.worker.ask(work))

    def in_steps(self, steps):
        """Do long work on the worker's thread, between all else; see `in_background`."""
        return self._reporting(self.worker.work(steps))

    def _reporting(self, future):
        def report(future):
            if not future.cancelled() and (error := future.exception()) is not None:
                self.warn('internal_error', f'a fault, the node goes on: {error!r}')

        future.add_done_callback(report)
        return future

    # Changes while it runs -----------------------------------------------------------------------

    def _on_set_parameters(self, given):
        try:
            self.parameters = parameters.changed(
                self.parameters, {parameter.name: parameter.value for parameter in given}
            )
        except ConfigError as error:
            return SetParametersResult(successful=False, reason=str(error))
        if self.transforms is not None:
            self.transforms.timeout_sec = self.parameters.tf_timeout
        return SetParametersResult(successful=True)

    def _on_clock_jump(self, jump):
        """Follow `on_clock_jump`: time went back, as with a bag that begins again."""
        policy = self.parameters.on_clock_jump
        seconds = -jump.delta.nanoseconds * 1e-9
        consequence = {
            'keep': 'the map is kept, and goes on',
            'reset': 'the map begins again',
            'pause': 'the map is kept, observations are rejected until ~/pause is called',
        }[policy]
        self.get_logger().warning(
            f'time jumped back by {seconds:.3f} s: {consequence} (on_clock_jump)'
        )
        if policy == 'pause':
            self.intake.paused = True
        begin = self.control.begin_again if policy == 'reset' else self.intake.begin_again
        self.in_background(begin)
        self.num_clock_jumps += 1


class _Outcome:
    """Of a future, for a coroutine; rclpy's own `Future` does not wake the executor."""

    def __init__(self, future, executor):
        self._future, self._executor = future, executor
        future.add_done_callback(self._wake)

    def _wake(self, _):
        with contextlib.suppress(InvalidHandle):  # it was shut down meanwhile
            self._executor.wake()

    def __await__(self):
        while not self._future.done():
            yield
        return self._future.result()


def spin(executor):
    """Spin until the end; whoever asked a service that is closed meanwhile has no answer."""
    while True:
        with contextlib.suppress(InvalidHandle):
            return executor.spin()


def _made(arguments):
    """
    Return a node.

    :raises ConfigError: for arguments or files of parameters that ROS cannot read, too.
    """
    try:
        others = remove_ros_args(arguments)[1:]
        if others:  # ROS would pass over them
            raise ConfigError(f'{shlex.join(others)}: expected it after --ros-args')
        rclpy.init(args=arguments)
        node = CMANPNode()
    except (RuntimeError, NameValidationException) as error:  # all that rclpy says of them
        raise ConfigError(conversions.one_line(str(error))) from error
    name = node.get_fully_qualified_name()
    for option, file in pairwise(sys.argv if arguments is None else arguments):
        with contextlib.suppress(ConfigError):  # ROS could read it
            if option == '--params-file' and not parameter_file.is_for(file, name):
                node.get_logger().warning(
                    f"nothing in '{file}' is for {name}: its parameters have their defaults; "
                    'what is for any namespace stands below /**:'
                )
    return node


def main(arguments=None) -> int:
    """
    Run the node until it is interrupted.

    :return: exit status: 0, or 1 when it could not start (the log says why).
    """
    keep_freed_memory()
    node = None
    try:
        node = _made(arguments)
        if node.parameters.autostart:
            for transition in (node.trigger_configure, node.trigger_activate):
                if transition() != TransitionCallbackReturn.SUCCESS:
                    return 1
        executor = SingleThreadedExecutor()
        executor.add_node(node)
        spin(executor)
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
