"""
What the ROS graph looks like from a node: who publishes what, and whether it can arrive here.

Graph -> the plain facts that `health` judges. Discovery takes a moment: what is not seen in the
first second may still appear.
"""

from __future__ import annotations

import difflib

from rclpy.node import NodeNameNonExistentError
from rclpy.qos import QoSCompatibility, QoSProfile, qos_check_compatible

from cmanp_ros.health import ClockView, Publisher, TopicView

_NUM_SIMILAR = 3


def look(node, topic: str, type: str, qos: QoSProfile, reader: str | None = None) -> TopicView:
    """
    Look at a topic as a subscription of one type and QoS does.

    :param node: rclpy node that looks.
    :param topic: resolved name, as in '/robot1/points'.
    :param type: as in 'sensor_msgs/msg/PointCloud2'.
    :param qos: of the subscription.
    :param reader: full name of the node that subscribes, whose own topics are no proposals; None:
        the node that looks.
    """
    infos = node.get_publishers_info_by_topic(topic)
    view = TopicView(topic, type, tuple(_publisher(info, qos) for info in infos))
    if view.usable:
        return view
    reader = reader or node.get_fully_qualified_name()
    return TopicView(topic, type, view.publishers, _similar(node, topic, type, reader))


def look_at_clock(node, seen_nanoseconds: int | None = None) -> ClockView:
    """
    Look at the clock of a node.

    :param node: rclpy node.
    :param seen_nanoseconds: its time at the last look; None: at the first look, any time will do.
    """
    now = node.get_clock().now().nanoseconds
    return ClockView(
        use_sim_time=bool(node.get_parameter('use_sim_time').value),
        has_publisher=node.count_publishers('/clock') > 0,
        is_running=now > 0 if seen_nanoseconds is None else now != seen_nanoseconds,
    )


def node_names(node, unique: bool = True) -> list[str]:
    """Return the full names of all nodes, sorted; each once, or as often as nodes have it."""
    found = node.get_node_names_and_namespaces()
    names = sorted(full_name(namespace, name) for name, namespace in found)
    return list(dict.fromkeys(names)) if unique else names


def map_nodes(node) -> list[str]:
    """Return the full names of nodes that are like ours, whatever their name and namespace."""
    named = {name for name in node_names(node) if name.rpartition('/')[2] == 'cmanp'}
    owned = {
        topic.removesuffix('/prediction')
        for topic, types in node.get_topic_names_and_types()
        if 'cmanp_ros/msg/Prediction' in types and node.count_publishers(topic)
    }
    return sorted(named | owned)


def subscriptions(node, reader: str) -> dict[str, tuple[str, QoSProfile]]:
    """
    List what another node subscribes to, after remapping.

    :param reader: full name of that node.
    :return: topic -> type and QoS; empty if there is no such node.
    """
    namespace, _, name = reader.rpartition('/')
    try:
        topics = node.get_subscriber_names_and_types_by_node(name, namespace or '/')
    except NodeNameNonExistentError:
        return {}
    return {
        topic: (info.topic_type, info.qos_profile)
        for topic, _ in topics
        for info in node.get_subscriptions_info_by_topic(topic)
        if full_name(info.node_namespace, info.node_name) == reader
    }


def full_name(namespace: str, name: str) -> str:
    """Join a namespace and the name of a node, as in '/robot1/cmanp'."""
    return f'{namespace.rstrip("/")}/{name}'


def _publisher(info, qos: QoSProfile) -> Publisher:
    """Describe one publisher to a subscription."""
    offered = info.qos_profile
    policies = (offered.reliability.name, offered.durability.name)
    return Publisher(
        node=_somebody(info),
        type=info.topic_type,
        qos=', '.join(policies).replace('_', ' ').lower(),
        conflict=_conflict(offered, qos),
    )


def _somebody(info) -> str:
    """Name who publishes, as soon as it is discovered."""
    if 'UNKNOWN' in info.node_name:  # _NODE_NAME_UNKNOWN_, by rmw
        return 'a node that is not yet known by name'
    return full_name(info.node_namespace, info.node_name)


def _conflict(offered: QoSProfile, asked: QoSProfile) -> str:
    """Say which policies keep messages from arriving, as rmw words it; empty if none does."""
    compatibility, reason = qos_check_compatible(offered, asked)
    if compatibility != QoSCompatibility.ERROR:
        return ''
    parts = [part.strip() for part in reason.split(';')]
    errors = [part.removeprefix('ERROR: ') for part in parts if part.startswith('ERROR')]
    return '; '.join(error[:1].lower() + error[1:] for error in errors)


def _similar(node, topic: str, type: str, reader: str) -> tuple[str, ...]:
    """Find topics of the type that somebody else publishes, the most similar name first."""
    maps = tuple(f'{name}/' for name in map_nodes(node))  # what they predict is no observation
    found = [
        name
        for name, types in node.get_topic_names_and_types()
        if name != topic
        and type in types
        and not name.startswith(maps)
        and _is_published(node, name, type, reader)
    ]
    found.sort(key=lambda name: -difflib.SequenceMatcher(None, topic, name).ratio())
    return tuple(found[:_NUM_SIMILAR])


def _is_published(node, topic: str, type: str, reader: str) -> bool:
    """Tell whether a node other than the reader publishes a type on a topic."""
    return any(
        info.topic_type == type and full_name(info.node_namespace, info.node_name) != reader
        for info in node.get_publishers_info_by_topic(topic)
    )
