"""
A node in a process of its own, as users run it, and a robot that drives for it: for hard times.
"""

import os
import re
import signal
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import rclpy
from conftest import TIMEOUT_SEC, Client, wait_for
from diagnostic_msgs.msg import DiagnosticStatus
from rclpy.qos import QoSProfile
from sensor_msgs.msg import PointCloud2
from std_msgs.msg import Header

from cmanp_ros.benchmark.measuring import status_bytes
from cmanp_ros.conversions import cloud_from_points, stamp_from_nanoseconds
from cmanp_ros.demo.processes import Child, environment, stop
from cmanp_ros.demo.run import ros_arguments
from cmanp_ros.diagnostics import counts_from_status
from cmanp_ros.qos import LATCHED, REQUESTS

START_SEC = 60.0  # for a process to import torch while others have the cores
RADIUS_M, SIGHT_M = 8.0, 4.0  # of the circle that is driven, and of what is seen from it
_WARNING = re.compile(r'\[(?:WARN|ERROR)\] \[(\d+\.\d+)\] \[[^\]]*\]: (?:\[(\w+)\])?(.*)')


class NodeProcess(Child):
    """`python -m cmanp_ros.node`, which ends with the test whatever happens."""

    def __init__(self, folder: Path, domain_id: int, name='node', remap=(), **parameters):
        """
        Start it.

        :param folder: for its log.
        :param name: of its log.
        :param remap: rules such as '__ns:=/peer'.
        :param parameters: of the node; a dot in a name is written as '__'.
        """
        values = {key.replace('__', '.'): value for key, value in parameters.items()}
        rules = [part for rule in remap for part in ('-r', rule)]
        super().__init__(
            name,
            'cmanp_ros.node',
            [*ros_arguments(values), *rules],
            folder,
            environment(domain_id),
        )
        self.was_killed = False

    @property
    def resident_bytes(self) -> int:
        """Memory of the process that is in RAM."""
        return status_bytes('VmRSS', self.process.pid)

    def kill(self) -> None:
        """End it at once, by SIGKILL: nothing of it runs any more."""
        self.was_killed = True
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def warnings(self) -> list[tuple[float, str | None, str]]:
        """Return time [s], reason (None: it has none) and text of what it warned of."""
        log = self.log.read_text(errors='replace')
        return [(float(t), reason or None, text) for t, reason, text in _WARNING.findall(log)]


@contextmanager
def node_process(*arguments, **parameters):
    """Run a node; see `NodeProcess`. The test fails if it ends before the end, unless killed."""
    node = NodeProcess(*arguments, **parameters)
    try:
        yield node
        assert node.was_killed or node.ended() is None, f'the node ended:\n{node.last_lines()}'
    finally:
        stop([node], 2 * TIMEOUT_SEC)


class Driver(Client):
    """A client that drives a robot in a circle, and reads the status of the node."""

    def __init__(self, context, name='cmanp'):
        """
        Listen to ~/status.

        :param name: of the node.
        """
        super().__init__(context)
        self._name, self._random = name, np.random.default_rng(0)
        self._statuses = self.collect(DiagnosticStatus, f'{name}/status', LATCHED)
        self._points = self.node.create_publisher(PointCloud2, 'points', QoSProfile(depth=10))
        self.num_clouds = self.num_points = 0
        """Published so far."""

    def wait_until_ready(self):
        """Wait until the node waits for points, and this one is connected to it."""
        wait_for(self._points.get_subscription_count, START_SEC)
        self.wait_for_state('no_messages', 'idle', timeout_sec=START_SEC)

    def connect(self, service_type, name, request):
        """
        Return a function that calls a service and returns the future.

        :param request: asked first, until an answer came: both sides know each other then.
        """
        client = self.node.create_client(
            service_type, f'{self._name}/{name}', qos_profile=REQUESTS
        )  # a client has the answers to all others, too, until it reads its own
        assert client.wait_for_service(TIMEOUT_SEC), f'no service {name}'
        wait_for(lambda: _answered(client.call_async(request)), 3 * TIMEOUT_SEC)
        return client.call_async

    # The robot -----------------------------------------------------------------------------------

    def publish_cloud(self, angle: float, num_points: int, stamp: int = 1, damage=None):
        """
        Publish what the robot sees from one place of the circle.

        :param angle: of the place.
        :param stamp: [ns].
        :param damage: changes the cloud before it is published.
        """
        header = Header(frame_id='map', stamp=stamp_from_nanoseconds(stamp))
        center = RADIUS_M * np.array([np.cos(angle), np.sin(angle)])
        x = center + self._random.uniform(-SIGHT_M, SIGHT_M, (num_points, 2))
        noise = self._random.normal(0, 0.05, num_points)
        fields = {'x': x[:, 0], 'y': x[:, 1], 'z': height(x) + noise}
        cloud = cloud_from_points(fields, header)
        if damage is not None:
            damage(cloud)
        self._points.publish(cloud)
        self.num_clouds += 1
        self.num_points += num_points

    @contextmanager
    def driving(self, rate: float, num_points: int):
        """Publish clouds at a rate [Hz] from a thread of its own, meanwhile."""
        stopped = threading.Event()

        def drive():
            while not stopped.wait(1 / rate):
                self.publish_cloud(self.num_clouds / 50, num_points, 1 + self.num_clouds)

        thread = threading.Thread(target=drive, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stopped.set()
            thread.join()

    # The status ----------------------------------------------------------------------------------

    @property
    def state(self) -> str:
        """What the node says that it does, in one word; '' before it said anything."""
        return self._statuses[-1].message.partition(':')[0] if self._statuses else ''

    @property
    def states(self) -> set[str]:
        """All that it ever said it did."""
        return {status.message.partition(':')[0] for status in self._statuses}

    def value(self, key: str) -> float:
        """Return a number of the newest status; 0 if it is not there."""
        values = {pair.key: pair.value for pair in self._statuses[-1].values}
        return float(values.get(key) or 0)

    def counts(self, unit: str):
        """Return what became of all 'points' or 'messages', as the newest status says."""
        return counts_from_status(self._statuses[-1], f'{unit}_')

    def wait_for_state(self, *states: str, timeout_sec=3 * TIMEOUT_SEC):
        """Wait until the node says that it is in one of these states."""
        wait_for(lambda: self.state in states, timeout_sec)

    def check_conservation(self):
        """
        Check in every status received: received = folded + rejected + dropped + pending.
        """
        assert self._statuses
        for status in list(self._statuses):
            pending = {pair.key: pair.value for pair in status.values}
            for unit in ('points', 'messages'):
                c = counts_from_status(status, f'{unit}_')
                settled = c.folded + sum(c.rejected.values()) + c.dropped
                assert c.received == settled + int(pending[f'{unit}_pending']), (unit, c)
                assert int(pending[f'{unit}_pending']) >= 0


@contextmanager
def driver_in(domain_id: int, name='cmanp'):
    """Return a driver in a context of its own, which never heard of nodes that were killed."""
    context, before = rclpy.Context(), os.environ.copy()
    os.environ.update(environment(domain_id))
    try:
        rclpy.init(context=context, domain_id=domain_id)
    finally:
        os.environ.clear()
        os.environ.update(before)
    driver = Driver(context, name)
    try:
        yield driver
    finally:
        driver.close()
        rclpy.try_shutdown(context=context)


def height(x: np.ndarray) -> np.ndarray:
    """Return the field that is driven over, (n,) [m], at x (n, 2) [m]."""
    return np.sin(x[:, 0] / 6) + 0.5 * np.cos(x[:, 1] / 9)


def _answered(future) -> bool:
    """Tell whether an answer comes soon."""
    answered = threading.Event()
    future.add_done_callback(lambda _: answered.set())
    return answered.wait(5.0)
