"""
Send a message of ours from one process to another, with what is installed at a prefix.

    python round_trip.py PREFIX BUILT    # starts itself a second time as the publisher
"""

import array
import os
import subprocess
import sys
from pathlib import Path

TIMEOUT_SEC = 20.0


def create_node(name):
    """Import what is under test only here: the domain must be in the environment first."""
    import rclpy
    from cmanp_ros.msg import Observations

    rclpy.init()
    return rclpy, rclpy.create_node(name), Observations


def publish():
    """Publish until the parent has seen enough and ends this process."""
    rclpy, node, message_type = create_node('publisher')
    publisher = node.create_publisher(message_type, 'observations', 1)
    x, y = array.array('f', range(6)), array.array('f', range(3))
    message = message_type(dim_x=2, dim_y=1, x=x, y=y)
    node.create_timer(0.1, lambda: publisher.publish(message))
    rclpy.spin(node)


def receive():
    """Return the first message received."""
    rclpy, node, message_type = create_node('subscriber')
    received = rclpy.task.Future()
    node.create_subscription(message_type, 'observations', received.set_result, 1)
    rclpy.spin_until_future_complete(node, received, timeout_sec=TIMEOUT_SEC)
    assert received.done(), f'no message within {TIMEOUT_SEC} s'
    return received.result()


def check(prefix, built):
    """
    Check that the package in use is the one installed at the prefix, and complete.

    :param prefix: where it is installed.
    :param built: the folder with all that was built; links may lead from the prefix to there.
    """
    import cmanp_ros.msg

    assert cmanp_ros.__version__, 'no version'
    assert prefix in Path(cmanp_ros.msg.__file__).parents, cmanp_ros.msg.__file__
    libraries = {line.split()[-1] for line in open('/proc/self/maps') if 'libcmanp_ros' in line}
    assert len(libraries) >= 3, libraries
    for library in libraries:
        assert Path(library).is_relative_to(built), f'{library} is not below {built}'
    for name in ('cmanp', 'cmanp_node'):
        executable = prefix / 'lib' / 'cmanp_ros' / name
        assert os.access(executable, os.X_OK), f'{executable} is not an executable'
    for path in (
        'cmanp_ros/cmake/cmanp_rosConfig.cmake',
        'cmanp_ros/package.xml',
        'ament_index/resource_index/packages/cmanp_ros',
    ):
        assert (prefix / 'share' / path).is_file(), f'no share/{path}'


def main():
    """Run both ends."""
    os.environ['ROS_DOMAIN_ID'] = str(1 + os.getpid() % 100)
    publisher = subprocess.Popen([sys.executable, __file__, '--publish'])
    try:
        message = receive()
    finally:
        publisher.kill()
        publisher.wait(timeout=TIMEOUT_SEC)
    assert list(message.x) == list(range(6)) and list(message.y) == list(range(3)), message
    check(*(Path(argument).resolve() for argument in sys.argv[1:]))
    print('round trip of a message: ok')


if __name__ == '__main__':
    if sys.argv[1] == '--publish':
        publish()
    else:
        main()
