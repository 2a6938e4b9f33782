"""
The node as a robot has it: clouds, a grid and queries at once, over DDS, in processes of its own.
"""

import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from cmanp_ros.benchmark.measuring import Record, family, status_bytes
from cmanp_ros.core.errors import CMANPError

DURATION_SEC = 60.0
START_SEC = 60.0  # for the node to say that it waits for points
NUM_POINTS = (1_000, 10_000)  # of a cloud
RATE_HZ, QUERY_RATE_HZ, GRID_RATE_HZ = 10.0, 20.0, 2.0
NUM_TARGETS = 100  # of a query
SPEED, SIGHT = 1.0, 5.0  # [m/s] of the robot, [m] around it that it sees
RADIUS = 10.0  # [m] of its circle, which takes more than a minute: there always is something new
VOXEL_M = 0.25  # of the large clouds: a twentieth of a tile


class Robot:
    """
    Drives in a circle, publishes clouds, asks, and listens; in this process, on its own threads.
    """

    def __init__(self, domain_id: int):
        """
        Join a ROS domain.
        """
        import rclpy
        from diagnostic_msgs.msg import DiagnosticStatus
        from rclpy.executors import SingleThreadedExecutor
        from sensor_msgs.msg import PointCloud2

        from cmanp_ros import qos
        from cmanp_ros.msg import Prediction, Query

        self._context = rclpy.Context()
        rclpy.init(context=self._context, domain_id=domain_id)
        self.node = rclpy.create_node('robot', context=self._context)
        self._clouds = self.node.create_publisher(PointCloud2, 'points', 10)
        self._queries = self.node.create_publisher(Query, 'query', 10)
        for kind, topic, callback, quality in (
            (DiagnosticStatus, 'cmanp/status', self._take_status, qos.LATCHED),
            (Prediction, 'cmanp/prediction', self._take_prediction, 10),
            (PointCloud2, 'cmanp/field', self._take_grid, qos.LATCHED),
        ):
            self.node.create_subscription(kind, topic, callback, quality)
        self._random = np.random.default_rng(0)
        self._asked: dict[int, float] = {}
        self.latencies: list[float] = []
        """[s] from asking to the answer."""
        self.ages: list[float] = []
        """[s] of the newest observation in each answer."""
        self.num_clouds = self.num_queries = self.num_grids = 0
        self.status = None
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self.node)
        self._thread = threading.Thread(target=self._executor.spin, daemon=True)
        self._thread.start()

    def close(self):
        """Leave the domain."""
        import rclpy

        self._executor.shutdown()
        self._thread.join()
        self.node.destroy_node()
        rclpy.try_shutdown(context=self._context)

    def wait_for_node(self):
        """
        Wait until the node waits for points and is connected.

        :raises CMANPError: after a minute.
        """
        deadline = time.monotonic() + START_SEC
        while self.status is None or not self._clouds.get_subscription_count():
            if time.monotonic() > deadline:
                raise CMANPError(f'no status of the node within {START_SEC:.0f} s')
            time.sleep(0.05)
        time.sleep(1.0)  # until it knows of our subscriptions, too

    def drive(self, seconds: float, num_points: int):
        """
        Publish and ask at the rates above.
        """
        start, cloud, query = time.monotonic(), 0, 0
        while (now := time.monotonic() - start) < seconds:
            if now >= cloud / RATE_HZ:
                self._publish_cloud(now, num_points)
                cloud += 1
            if now >= query / QUERY_RATE_HZ:
                self._ask(now)
                query += 1
            due = min(cloud / RATE_HZ, query / QUERY_RATE_HZ) - (time.monotonic() - start)
            time.sleep(max(due, 0.0))

    def counts(self, unit: str):
        """Return what the newest status says became of 'points' or 'messages'."""
        from cmanp_ros.diagnostics import counts_from_status

        return counts_from_status(self.status, f'{unit}_')

    def _around(self, now, count):
        angle = SPEED * now / RADIUS
        center = RADIUS * np.array([np.cos(angle), np.sin(angle)])
        return center + self._random.uniform(-SIGHT, SIGHT, (count, 2))

    def _header(self):
        from std_msgs.msg import Header

        return Header(frame_id='map', stamp=self.node.get_clock().now().to_msg())

    def _publish_cloud(self, now, num_points):
        from cmanp_ros.conversions import cloud_from_points

        x = self._around(now, num_points)
        z = np.sin(x[:, 0] / 2) + np.cos(x[:, 1] / 3) + self._random.normal(0, 0.05, num_points)
        self._clouds.publish(
            cloud_from_points({'x': x[:, 0], 'y': x[:, 1], 'z': z}, self._header())
        )
        self.num_clouds += 1

    def _ask(self, now):
        from cmanp_ros.msg import Query

        x = self._around(now, NUM_TARGETS).astype(np.float32)
        self.num_queries += 1
        self._asked[self.num_queries] = time.monotonic()
        self._queries.publish(
            Query(header=self._header(), id=self.num_queries, dim_x=2, x=x.ravel())
        )

    def _take_status(self, message):
        self.status = message

    def _take_grid(self, _):
        self.num_grids += 1

    def _take_prediction(self, message):
        asked = self._asked.pop(message.id, None)
        if asked is None:
            return
        self.latencies.append(time.monotonic() - asked)
        if message.num_observations:
            stamp = message.header.stamp.sec + 1e-9 * message.header.stamp.nanosec
            self.ages.append(self.node.get_clock().now().nanoseconds * 1e-9 - stamp)


@contextmanager
def robot_and_node(**parameters):
    """
    Start the node with parameters, in a domain of its own; yield the robot and the process.
    """
    from cmanp_ros.demo.processes import Child, environment, own_domain, stop
    from cmanp_ros.demo.run import ros_arguments

    with own_domain() as domain_id, tempfile.TemporaryDirectory() as folder:
        child = Child(
            'node',
            'cmanp_ros.node',
            ros_arguments({name.replace('__', '.'): v for name, v in parameters.items()}),
            Path(folder),
            environment(domain_id),
        )
        robot = Robot(domain_id)
        try:
            robot.wait_for_node()
            yield robot, child
            if child.ended() is not None:
                raise CMANPError(f'the node ended:\n{child.last_lines()}')
        finally:
            robot.close()
            stop([child], 10.0)


PARAMETERS = {  # else the defaults: tiles of 5 m in a workspace of 50 m
    'grid_resolution': 0.5,
    'publish_rate': GRID_RATE_HZ,
    'status_rate': 2.0,
}


def over_dds(repeats: int) -> Iterator[Record]:
    """Drive for a minute with each size of cloud; `repeats` does not matter."""
    for num_points in NUM_POINTS:
        thinned = {} if num_points <= 1_000 else {'points__voxel_size': VOXEL_M}
        with robot_and_node(**PARAMETERS, **thinned) as (robot, child):
            idle = processor_seconds(child.process.pid)
            time.sleep(5.0)
            idle = (processor_seconds(child.process.pid) - idle) / 5.0
            before = processor_seconds(child.process.pid)
            robot.drive(DURATION_SEC, num_points)
            used = (processor_seconds(child.process.pid) - before) / DURATION_SEC
            time.sleep(2.0)  # until the last status
            points, messages = robot.counts('points'), robot.counts('messages')
            yield record_of(robot, num_points, bool(thinned)) | {
                'peak_bytes': sum(status_bytes('VmHWM', p) for p in family(child.process.pid)),
                'messages_folded': messages.folded,
                'messages_dropped': messages.dropped,
                'points_folded': points.folded,
                'points_dropped': points.dropped,
                'cores': round(used, 2),
                'cores_idle': round(idle, 3),
            }


def record_of(robot: Robot, num_points: int, is_thinned: bool) -> Record:
    """Return the latencies of a drive."""
    latency, age = np.array(robot.latencies), np.array(robot.ages)
    quartiles = np.quantile(latency, [0.25, 0.75])
    return {
        'work': f'node over DDS{", thinned" if is_thinned else ""}',
        'size': num_points,
        'implementation': 'cmanp node',
        'median_s': float(np.median(latency)),
        'spread_s': float(quartiles[1] - quartiles[0]),
        'p99_s': float(np.quantile(latency, 0.99)),
        'age_median_s': float(np.median(age)),
        'age_p99_s': float(np.quantile(age, 0.99)),
        'clouds': robot.num_clouds,
        'queries': robot.num_queries,
        'answers': len(latency),
        'grids': robot.num_grids,
    }


def processor_seconds(process: int) -> float:
    """Return the processor time of a process, and of those that it started, so far [s]."""
    ticks = 0
    for each in family(process):
        stat = Path(f'/proc/{each}/stat').read_text(encoding='ascii').rsplit(')', 1)[1].split()
        ticks += int(stat[11]) + int(stat[12])
    return ticks / os.sysconf('SC_CLK_TCK')
