"""`cmanp node`: run the ROS 2 node; arguments after it are those of ROS (--ros-args ...)."""

import sys


def main(arguments) -> int:
    """Run the node."""
    from cmanp_ros import node

    return node.main([sys.argv[0], *arguments])
