"""
`cmanp node`: run the ROS 2 node; what follows are arguments of ROS.

  cmanp node --ros-args --params-file my_field.yaml -p tile_size:=5.0 -r points:=/lidar/points

docs/parameters.md has every parameter, topic and service.
"""

import sys


def main(arguments) -> int:
    """Run the node."""
    if {'-h', '--help'} & set(arguments):
        print(__doc__.strip())
        return 0
    from cmanp_ros import node

    return node.main([sys.argv[0], *arguments])
