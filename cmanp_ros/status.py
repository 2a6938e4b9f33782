"""
What the node says of itself: facts of the moment, judged by `health`, as diagnostic_msgs.

Timers go by the steady clock, so that the status goes on when simulated time stands.
"""

import dataclasses
import time

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from rclpy.qos import QoSProfile

from cmanp_ros import graph, health
from cmanp_ros.diagnostics import array_message, status_message
from cmanp_ros.qos import LATCHED


class Status:
    """Publishes ~/status and /diagnostics."""

    def __init__(self, node):
        """
        Open the outputs.

        :param node: `CMANPNode`, configured.
        """
        self._node = node
        self._recent_points = health.Recent()
        self._recent_messages = {name: health.Recent() for name in node.intake.sources}
        self._clock, self._said = None, None
        self._status = node.open_publisher(DiagnosticStatus, '~/status', LATCHED)
        self._diagnostics = node.open_publisher(
            DiagnosticArray, '/diagnostics', QoSProfile(depth=10)
        )

    def open(self):
        """Start the timer."""
        self._clock, self._said = None, None
        self._node.open_timer(self._node.parameters.status_rate, self.publish)

    def publish(self):
        """Say what the node does or waits for; log it when that changes."""
        node, snapshot = self._node, self.snapshot()
        verdict = health.judge(snapshot)
        if verdict.state != self._said:
            self._said = verdict.state
            if verdict.level == health.Level.OK:  # on lines of their own: rclpy asks for that
                node.get_logger().info(str(verdict))
            else:
                node.get_logger().warning(str(verdict))
        status = status_message(
            f'{node.get_name()}: field', int(verdict.level), str(verdict), self.values(snapshot)
        )
        self._status.publish(status)
        self._diagnostics.publish(array_message([status], node.get_clock().now().to_msg()))

    def snapshot(self) -> health.Snapshot:
        """Return the facts of this moment."""
        node, intake = self._node, self._node.intake
        points, _ = intake.totals()
        recent = {
            name: self._recent_messages[name](source.messages.snapshot())
            for name, source in intake.sources.items()
        }
        now = time.monotonic()
        clock = graph.look_at_clock(node, self._clock)
        self._clock = node.get_clock().now().nanoseconds
        return health.Snapshot(
            node=node.get_fully_qualified_name(),
            paused=intake.paused,
            sources=tuple(self._source(each, recent[each.name]) for each in self._enabled()),
            points=self._recent_points(points),
            num_folded=node.field.num_observations,
            idle_sec=None if intake.folded_at is None else now - intake.folded_at,
            map_frame=node.parameters.map_frame,
            pending_transforms=dict(node.transforms.waiting_for()),
            clock=clock,
            queue_length=node.worker.num_waiting,
            num_dropped=sum(counts.dropped for counts in recent.values()),
            latency_sec=intake.latency_sec,
            tiles_dropped=node.field.num_tiles_dropped,
            save_fault=node.control.save_fault,
            peer_fault=dict(node.control.peer_fault),
            coverage=node.calibration.coverage(),
        )

    def _enabled(self):
        return [each for each in self._node.parameters.source_parameters if each.enabled]

    def _source(self, parameters, messages):
        node, source = self._node, self._node.intake.sources[parameters.name]
        topic = source.subscription.topic_name
        reason = max(messages.rejected, key=messages.rejected.get, default=None)
        age = None if source.received_at is None else time.monotonic() - source.received_at
        return health.Source(
            name=parameters.name,
            view=graph.look(node, topic, parameters.type, source.qos),
            given_topic=parameters.topic,
            messages=messages,
            example=source.problems.get(reason, ''),
            age_sec=age,
        )

    def values(self, snapshot) -> dict:
        """Return the numbers beside the words."""
        node = self._node
        points, messages = node.intake.totals()
        newest = node.intake.newest_stamp
        now = node.get_clock().now().nanoseconds  # 0: simulated, and not yet begun
        age = (now - newest) * 1e-9 if newest and now else None
        coverage = snapshot.coverage and dataclasses.asdict(snapshot.coverage)
        return {
            'state_bytes': node.fleet.state_nbytes,
            'tile_bytes': node.field.tile_nbytes,
            'tiles': node.field.num_tiles,
            'tiles_in_memory': node.field.num_tiles_in_memory,
            'tiles_dropped': node.field.num_tiles_dropped,
            'observations_folded': node.field.num_observations,
            'observations_far_off': node.fleet.num_far_off,
            'newest_observation_age_sec': age,
            'fold_latency_sec': snapshot.latency_sec,
            'answer_latency_sec': node.answers.latency_sec,
            'queue_length': snapshot.queue_length,
            **{f'questions_refused_{k}': n for k, n in dict(node.answers.num_refused).items()},
            'peers': len(node.fleet.peers),
            **{f'peers_refused_{key}': n for key, n in dict(node.control.num_refused).items()},
            'clock_jumps': node.num_clock_jumps,
            **{f'calibration_{name}': value for name, value in (coverage or {}).items()},
            **points.values('points_'),
            **messages.values('messages_'),
            'messages_lost': sum(s.num_lost for s in node.intake.sources.values()),
            **{
                f'source_{name}_received': source.messages.snapshot().received
                for name, source in node.intake.sources.items()
            },
        }
