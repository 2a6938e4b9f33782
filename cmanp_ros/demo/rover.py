"""
The simulated rover, a process of its own: it drives, and publishes what its sensor sees.

By itself, for a node that runs already: `python -m cmanp_ros.demo.rover --now`.
"""

import argparse
import json
import sys
import time

import numpy as np
import rclpy
from rclpy.executors import ExternalShutdownException
from rclpy.qos import qos_profile_sensor_data
from sensor_msgs.msg import PointCloud2
from std_msgs.msg import Header

from cmanp_ros.conversions import cloud_from_points
from cmanp_ros.demo.drive import Scenario, scan, winding_path
from cmanp_ros.demo.terrain import choose_window, load_terrain

WAIT_SEC = 60.0
LINGER_SEC = 0.5  # the last messages must reach the node before the publisher is gone


def main(arguments=None) -> int:
    """
    Drive once a line arrives on standard input, print progress as lines of JSON, and end.

    :return: exit status: 1 if nobody listens.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        'scenario', nargs='?', type=Scenario.from_json, default=Scenario(), help='as JSON'
    )
    parser.add_argument('--now', action='store_true', help='drive without being told to')
    options, ros_arguments = parser.parse_known_args(arguments)
    scenario = options.scenario
    terrain = choose_window(load_terrain(), scenario.window_m, scenario.seed)
    rclpy.init(args=ros_arguments)
    try:
        node = rclpy.create_node('rover')
        publisher = node.create_publisher(PointCloud2, 'points', qos_profile_sensor_data)
        if not options.now and sys.stdin.readline() == '':
            return 1  # whoever started this process is gone
        if not _wait_for_listener(publisher):
            print(f'nobody subscribed to points within {WAIT_SEC} s', file=sys.stderr)
            return 1
        _drive(node, publisher, scenario, terrain)
    except (KeyboardInterrupt, ExternalShutdownException):
        return 130
    finally:
        rclpy.try_shutdown()
    return 0


def _drive(node, publisher, scenario, terrain):
    """Publish a scan at every stop of the path, on time."""
    path = winding_path(scenario.window_m, scenario.num_scans, scenario.seed)
    rng = np.random.default_rng([scenario.seed, 1])
    num_points, started = 0, time.monotonic()
    for index, position in enumerate(path):
        time.sleep(max(0.0, started + index / scenario.rate_hz - time.monotonic()))
        if not rclpy.ok():
            raise ExternalShutdownException
        x, y, z = scan(terrain, position, rng).T
        header = Header(frame_id='map', stamp=node.get_clock().now().to_msg())
        publisher.publish(cloud_from_points({'x': x, 'y': y, 'z': z}, header))
        num_points += len(z)
        _say(
            messages=index + 1,
            points=num_points,
            position=[round(float(value), 1) for value in position],
        )
    time.sleep(LINGER_SEC)


def _wait_for_listener(publisher) -> bool:
    """Wait until a subscription is matched: what is sent before is lost."""
    deadline = time.monotonic() + WAIT_SEC
    while publisher.get_subscription_count() == 0 and time.monotonic() < deadline:
        time.sleep(0.02)
    return publisher.get_subscription_count() > 0


def _say(**values):
    print(json.dumps(values), flush=True)


if __name__ == '__main__':
    sys.exit(main())
