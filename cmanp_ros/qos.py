"""Quality of service of the node's topics and services."""

from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy

LATCHED = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
REQUESTS = QoSProfile(depth=200)  # clients at once: what overflows it would never be answered


def of_source(parameters) -> QoSProfile:
    """Return what the subscription of a source asks for, given its `SourceParameters`."""
    reliability = ReliabilityPolicy[parameters.reliability.upper()]
    return QoSProfile(depth=parameters.depth, reliability=reliability)
