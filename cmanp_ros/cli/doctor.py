"""
`cmanp doctor`: look at a node from outside and say in one sentence what to do.

It works whether the node runs or not. `ros2 doctor` looks at the installation; this looks at one
node: its lifecycle, each of its inputs with everything a message must pass, and its clock.
"""

import argparse
import os
import sys
import time
from dataclasses import dataclass, field, replace
from importlib import import_module
from importlib.util import find_spec

from cmanp_ros.core.errors import ConfigError
from cmanp_ros.health import (
    ClockView,
    Counts,
    Level,
    Recent,
    Snapshot,
    Source,
    judge,
    judge_source,
    verdict_from_text,
)
from cmanp_ros.parameters import TABLE, NodeParameters, SourceParameters, parameters_from

MARKS = {Level.OK: 'ok', Level.WARN: 'warn', Level.ERROR: 'problem'}
DISCOVERY_SEC = 3.5  # Fast DDS announces itself every 3 s, should the first announcement be lost
TF_SEC = 1.0
ENOUGH_MESSAGES = 8
LARGEST_OFFSET_SEC = 1.0
NO_ROS = """\
cmanp doctor: cannot look, ROS 2 was not found ({}).
Source it (source /opt/ros/jazzy/setup.bash), or use the environment that `make setup` made."""


def main(arguments) -> int:
    """
    Look at the node and print what was found.

    :return: exit status: 0 healthy, 1 a problem was found, 2 could not look.
    """
    options = _options(arguments)
    try:
        import rclpy

        import_module('cmanp_ros.msg')
    except ImportError as error:
        print(NO_ROS.format(error), file=sys.stderr)
        return 2
    context = rclpy.Context()
    try:
        rclpy.init(args=[], context=context)
        return examine(context, options.namespace, options.name, options.timeout)
    except Exception as error:
        print(f'cmanp doctor: cannot look: {error}', file=sys.stderr)
        return 2
    finally:
        rclpy.try_shutdown(context=context)


def examine(context, namespace='/', name='cmanp', timeout_sec=5.0, show=print) -> int:
    """
    Look at a node over ROS.

    :param context: initialized rclpy context of its own.
    :param namespace: of the node.
    :param name: of the node.
    :param timeout_sec: [s] how long to wait for the node, and again for its messages.
    :param show: takes each line of the report.
    :return: exit status: 0 healthy, 1 a problem was found.
    """
    from cmanp_ros import graph

    target = graph.full_name(f'/{namespace.strip("/")}', name)
    visit = Visit(context, target, timeout_sec)
    try:
        visit.ask_node()
        visit.look_at_topics()
        visit.listen()
        return report(visit, show)
    finally:
        visit.close()


@dataclass
class Heard:
    """Messages of one topic as they came: how many, when, and the newest."""

    count: int = 0
    first: float = 0.0  # [s] steady
    last: float = 0.0  # [s] steady
    now: float = 0.0  # [s] on the clock of the node when the newest came
    data: bytes = b''

    @property
    def rate(self) -> float:
        """Return messages per second."""
        return (self.count - 1) / max(self.last - self.first, 1e-9)


@dataclass
class Findings:
    """What is known of one source."""

    source: Source
    configured: SourceParameters
    qos: object
    notes: list = field(default_factory=list)  # of (mark, text)


class Visit:
    """A node of the doctor that looks at another one, one step after the other."""

    def __init__(self, context, target: str, timeout_sec: float) -> None:
        """Come up, and listen to the status and the clock."""
        import rclpy
        from diagnostic_msgs.msg import DiagnosticStatus
        from rclpy.executors import SingleThreadedExecutor
        from rclpy.qos import DurabilityPolicy, QoSProfile, qos_profile_sensor_data
        from rosgraph_msgs.msg import Clock

        self.context, self.target, self.timeout_sec = context, target, timeout_sec
        self._started = time.monotonic()
        self.lifecycle, self.use_sim_time, self.findings = None, None, []
        self.parameters, self.complaint = NodeParameters(), ''
        self.statuses, self.clock_times, self.heard = [], [], {}
        self.node = rclpy.create_node(
            f'cmanp_doctor_{os.getpid()}', context=context, enable_rosout=False
        )
        self._executor = SingleThreadedExecutor(context=context)
        self._executor.add_node(self.node)
        latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        self.node.create_subscription(
            DiagnosticStatus, f'{target}/status', self.statuses.append, latched
        )
        self.node.create_subscription(Clock, '/clock', self._on_clock, qos_profile_sensor_data)
        self._tf = _tf_buffer(self.node)

    def close(self) -> None:
        """Leave."""
        self._executor.shutdown()
        self.node.destroy_node()

    # Steps -----------------------------------------------------------------------------------

    def ask_node(self) -> None:
        """Wait for the node, and ask it for its lifecycle state and parameters."""
        from lifecycle_msgs.srv import GetState
        from rcl_interfaces.srv import GetParameters, ListParameters
        from rclpy.parameter import parameter_value_to_python

        from cmanp_ros import graph

        self._wait(lambda: self.target in graph.node_names(self.node), self.timeout_sec)
        if self.target not in graph.node_names(self.node):
            return
        state = self._call(GetState, 'get_state', GetState.Request())
        self.lifecycle = state.current_state.label if state else ''
        listed = self._call(ListParameters, 'list_parameters', ListParameters.Request())
        if listed is None:
            return
        names = list(listed.result.names)
        request = GetParameters.Request(names=names)
        if (answer := self._call(GetParameters, 'get_parameters', request)) is not None:
            values = map(parameter_value_to_python, answer.values)
            self._take_parameters(dict(zip(names, values, strict=False)))

    def look_at_topics(self) -> None:
        """Look at the topic of each source until somebody publishes it or time is up."""

        def everything_found():
            self.findings = [self._find(each) for each in self.parameters.source_parameters]
            return all(f.source.view.usable for f in self.findings)

        elapsed = time.monotonic() - self._started
        self._wait(everything_found, min(DISCOVERY_SEC, self.timeout_sec) - elapsed)

    def listen(self) -> None:
        """Take in messages, statuses and time, and look at the newest message of each source."""
        for finding in self.findings:
            if finding.source.enabled and finding.source.view.usable:
                self._subscribe(finding)
        self._wait(self._heard_enough, self.timeout_sec)
        for finding in self.findings:
            self._examine_messages(finding)

    @property
    def clock(self) -> ClockView:
        """Return the clock that the node goes by."""
        return ClockView(
            use_sim_time=bool(self.use_sim_time),
            has_publisher=self.node.count_publishers('/clock') > 0,
            is_running=len(set(self.clock_times)) > 1,
        )

    def snapshot(self) -> Snapshot:
        """Return the facts, as `health` wants them."""
        from cmanp_ros import graph
        from cmanp_ros.diagnostics import counts_from_status

        facts = Snapshot(
            node=self.target,
            lifecycle=self.lifecycle,
            num_alike=graph.node_names(self.node, unique=False).count(self.target),
            others=tuple(name for name in graph.map_nodes(self.node) if name != self.target),
            sources=tuple(finding.source for finding in self.findings),
            map_frame=self.map_frame,
            clock=self.clock,
        )
        if not self.statuses:
            return facts
        first, last = self.statuses[0], self.statuses[-1]
        lately, dropped = Recent(0.0), counts_from_status(last, 'messages_').dropped
        lately(counts_from_status(first, 'points_'))
        values = {pair.key: pair.value for pair in last.values}
        return replace(
            facts,
            paused=last.message.startswith('paused'),
            points=lately(counts_from_status(last, 'points_')),
            num_folded=int(values.get('observations_folded') or 0),
            num_dropped=dropped - counts_from_status(first, 'messages_').dropped,
            tiles_dropped=int(values.get('tiles_dropped') or 0),
        )

    @property
    def map_frame(self) -> str:
        """Return the frame of the map."""
        return self.parameters.map_frame

    # Parts of them ---------------------------------------------------------------------------

    def _wait(self, condition, timeout_sec: float) -> None:
        """Spin until a condition holds, or time is up."""
        deadline = time.monotonic() + timeout_sec
        while not condition() and time.monotonic() < deadline:
            self._executor.spin_once(timeout_sec=0.02)

    def _call(self, service_type, name: str, request):
        """Call a service of the node; return None if there is no answer."""
        client = self.node.create_client(service_type, f'{self.target}/{name}')
        try:
            self._wait(client.service_is_ready, self.timeout_sec)
            if not client.service_is_ready():
                return None
            future = client.call_async(request)
            self._wait(future.done, self.timeout_sec)
            return future.result() if future.done() else None
        finally:
            self.node.destroy_client(client)

    def _on_clock(self, message) -> None:
        self.clock_times.append(message.clock.sec + message.clock.nanosec * 1e-9)
        del self.clock_times[2:-2]  # two are enough to see it move

    def _take_parameters(self, values) -> None:
        """Take over the parameters of the node; of another version, those of this one."""
        self.use_sim_time = values.get('use_sim_time')
        own = {spec.name for spec in TABLE} | set(values.get('sources') or ())
        ours = {name: value for name, value in values.items() if name.partition('.')[0] in own}
        try:
            self.parameters = parameters_from(ours)
        except ConfigError as error:
            self.complaint = f'not understood, taken as the defaults: {error}'

    def _find(self, configured) -> Findings:
        """Look at the topic of a source with the QoS that the node has, or would have."""
        from cmanp_ros import graph
        from cmanp_ros.qos import of_source

        subscribed = graph.subscriptions(self.node, self.target)
        topic = self._actual_topic(configured, subscribed)
        qos = of_source(configured)
        if topic in subscribed:
            actual = subscribed[topic][1]
            qos.reliability, qos.durability = actual.reliability, actual.durability
        view = graph.look(self.node, topic, configured.type, qos, self.target)
        source = Source(configured.name, view, configured.topic, configured.enabled)
        return Findings(source, configured, qos)

    def _actual_topic(self, configured, subscribed) -> str:
        """Return the topic of a source; if the node does not subscribe to it, it is remapped."""
        expected = [self._resolved(each.topic) for each in self.parameters.source_parameters]
        topic = self._resolved(configured.topic)
        if topic in subscribed:
            return topic
        of_type = [
            name for name, (type_name, _) in subscribed.items() if type_name == configured.type
        ]
        return next((name for name in of_type if name not in expected), topic)

    def _resolved(self, topic: str) -> str:
        """Return the full name that a topic has in the node."""
        from rclpy.expand_topic_name import expand_topic_name

        namespace, _, name = self.target.rpartition('/')
        return expand_topic_name(topic, name, namespace or '/')

    def _reader(self, configured, dim_y: int = 1):
        """Return what reads messages in the node."""
        from cmanp_ros.sources import reader_for

        return reader_for(configured, self.parameters, len(self.parameters.bounds_min), dim_y)

    def _subscribe(self, finding: Findings) -> None:
        """Count the messages of a source, and keep the newest, unread."""
        heard = self.heard[finding.source.name] = Heard()

        def on_message(data: bytes) -> None:
            heard.last, heard.data, heard.now = time.monotonic(), data, self._now()
            heard.first = heard.first or heard.last
            heard.count += 1

        try:
            message_type = self._reader(finding.configured).message_type
        except ConfigError as error:
            finding.notes.append(('problem', str(error)))
            return
        self.node.create_subscription(
            message_type, finding.source.view.topic, on_message, finding.qos, raw=True
        )

    def _now(self) -> float:
        """Return the time [s] of the node's clock."""
        return (
            self.clock_times[-1] if self.clock.use_sim_time and self.clock_times else time.time()
        )

    def _heard_enough(self) -> bool:
        """Tell whether listening longer would tell nothing new."""
        has_status = len(self.statuses) >= 2 or self.lifecycle != 'active'
        return has_status and all(h.count >= ENOUGH_MESSAGES for h in self.heard.values())

    def _examine_messages(self, finding: Findings) -> None:
        """Read the newest message of a source as the node would, and note what strikes."""
        from rclpy.serialization import deserialize_message

        heard = self.heard.get(finding.source.name)
        if heard is None or not heard.count:
            return
        message_type = self._reader(finding.configured).message_type
        message = deserialize_message(heard.data, message_type)
        counts, example = Counts(heard.count, heard.count), ''
        if (fault := self._fault(message, finding.configured)) is not None:
            reason, example = fault
            counts = Counts(heard.count, 0, {reason: heard.count})
        age_sec = time.monotonic() - heard.last
        finding.source = replace(finding.source, messages=counts, example=example, age_sec=age_sec)
        rate = f', {heard.rate:.3g} Hz' if heard.count > 1 else ''
        finding.notes.append(('ok', f'{heard.count} messages heard{rate}'))
        finding.notes += self._header_notes(message.header, heard.now)

    def _fault(self, message, configured):
        """Find what makes the node reject a message, as (reason, text); None if nothing does."""
        from cmanp_ros.conversions import MessageError

        try:
            reading = self._reader(configured, getattr(message, 'dim_y', 1)).read(message)
        except MessageError as error:
            return error.reason, str(error)
        if reading.rejected and not len(reading.x):
            return max(reading.rejected.items(), key=lambda item: item[1])[0], ''
        fault = self._transform_fault(message.header)
        return ('no_transform', fault) if fault else None

    def _transform_fault(self, header) -> str:
        """Say why TF does not lead from the frame of a message to the map; empty if it does."""
        frame = header.frame_id.strip('/')
        if not frame:
            return 'header.frame_id is empty'
        if frame == self.map_frame or self._tf is None:
            return ''
        from rclpy.time import Time

        def connected(at):
            return self._tf.can_transform(self.map_frame, frame, at)

        at_stamp = Time.from_msg(header.stamp)
        self._wait(lambda: connected(at_stamp), min(TF_SEC, self.timeout_sec))
        if connected(at_stamp):
            return ''
        if connected(Time()):
            return f"TF knows '{self.map_frame}' <- '{frame}', but not at the stamp of the message"
        return f"TF does not connect '{self.map_frame}' <- '{frame}'"

    def _header_notes(self, header, now: float):
        """Note the frame and the stamp of a message."""
        frame = header.frame_id.strip('/')
        if frame and frame != self.map_frame:
            how = 'TF connects them' if self._tf else 'TF was not checked: tf2_ros is missing here'
            mark = 'ok' if self._tf else 'warn'
            yield mark, f"frame '{frame}', map_frame '{self.map_frame}': {how}"
        stamp = header.stamp.sec + header.stamp.nanosec * 1e-9
        if not stamp:
            return (yield 'warn', 'the header has no stamp: have the publisher set it')
        offset = now - stamp
        if abs(offset) > LARGEST_OFFSET_SEC:
            direction = 'behind' if offset > 0 else 'ahead of'
            clock = '/clock' if self.clock.use_sim_time else "this computer's clock"
            yield (
                'warn',
                f'stamps are {abs(offset):.1f} s {direction} {clock}: a bag without --clock and '
                'use_sim_time, or computers whose clocks differ',
            )


# The report ----------------------------------------------------------------------------------


def report(visit: Visit, show) -> int:
    """Print what was found, and last what to do; return the exit status."""

    def line(mark, title, text):
        show(f'  {mark:<8} {title:<13} {text}')

    snapshot = visit.snapshot()
    verdict = judge(snapshot)
    show(f'cmanp doctor looks at {visit.target}')
    for mark, text in _surroundings(visit.context):
        line(mark, 'ROS', text)
    _report_node(snapshot, line)
    for finding in visit.findings:
        _report_source(finding, snapshot, line)
    if visit.complaint:
        line('warn', 'parameters', visit.complaint)
    if visit.use_sim_time is not None:
        _report_clock(visit.clock, line)
    if visit.statuses and snapshot.lifecycle == 'active':
        status = visit.statuses[-1]
        line(MARKS[Level(min(status.level[0], 2))], 'its status', status.message)
        own = verdict_from_text(status.message)
        if own is not None:  # of two alike, the node knows more
            verdict = max(replace(own, level=Level(min(status.level[0], 2))), verdict, key=_level)
    elif snapshot.lifecycle == 'active':
        line('warn', 'its status', 'none came (status_rate is 0, or the node is busy)')
    is_healthy = verdict.level == Level.OK
    show(f'{"Healthy" if is_healthy else "What to do"} [{verdict.state}]: {verdict.text}.')
    return 0 if is_healthy else 1


def _level(verdict) -> Level:
    """Order verdicts by how bad they are."""
    return verdict.level


def _surroundings(context):
    """Say in which part of the network we are, as (mark, text)."""
    from rclpy.utilities import get_rmw_implementation_identifier

    text = f'ROS_DOMAIN_ID {context.get_domain_id()}, {get_rmw_implementation_identifier()}'
    reach = os.environ.get('ROS_AUTOMATIC_DISCOVERY_RANGE', 'SUBNET').upper()
    if os.environ.get('ROS_LOCALHOST_ONLY') == '1':
        reach = 'LOCALHOST'
    if peers := os.environ.get('ROS_STATIC_PEERS'):
        reach += f' and {peers}'
    yield 'ok', f'{text}, sees {reach}'
    if reach in ('LOCALHOST', 'OFF'):
        yield (
            'warn',
            'other computers are not seen: ROS_LOCALHOST_ONLY or ROS_AUTOMATIC_DISCOVERY_RANGE',
        )


def _report_node(snapshot: Snapshot, line) -> None:
    """Print the line of the node itself."""
    if snapshot.lifecycle is None:
        others = f'; there is {", ".join(snapshot.others)}' if snapshot.others else ''
        line('problem', 'node', f'not found{others}')
    elif not snapshot.lifecycle:
        line('problem', 'node', 'found, but it does not answer')
    else:
        mark = 'ok' if snapshot.lifecycle == 'active' else 'problem'
        line(mark, 'node', f'found, {snapshot.lifecycle}')
    if snapshot.num_alike > 1:
        line('warn', '', f'{snapshot.num_alike} nodes have this name: any of them may answer')


def _report_source(finding: Findings, snapshot: Snapshot, line) -> None:
    """Print the lines of one source."""
    source, view = finding.source, finding.source.view
    if not source.enabled:
        return line('ok', source.name, f"disabled (topic '{view.topic}')")
    if (trouble := judge_source(source, snapshot)) is not None:
        line(MARKS[trouble.level], source.name, trouble.what)
    else:
        line('ok', source.name, f"'{view.topic}' ({view.type})")
    for publisher in view.publishers:
        mark = 'ok' if publisher in view.usable else 'problem'
        line(mark, '', f'{publisher.node} publishes {publisher.type}, {publisher.qos}')
    for mark, text in finding.notes:
        line(mark, '', text)


def _report_clock(clock: ClockView, line) -> None:
    """Print the line of the clock."""
    if not clock.use_sim_time:
        extra = ', although somebody publishes /clock' if clock.has_publisher else ''
        line('warn' if extra else 'ok', 'clock', f'of the system{extra} (use_sim_time is false)')
    elif clock.has_publisher and clock.is_running:
        line('ok', 'clock', 'simulated time on /clock runs')
    else:
        what = 'stands still' if clock.has_publisher else 'has no publisher'
        line('problem', 'clock', f'use_sim_time is true and /clock {what}')


def _tf_buffer(node):
    """Listen to TF on a node; return None where tf2_ros is not installed."""
    if find_spec('tf2_ros') is None:
        return None
    import tf2_ros

    buffer = tf2_ros.Buffer()
    buffer.listener = tf2_ros.TransformListener(buffer, node, spin_thread=False)
    return buffer


def add_node_options(parser):
    """Add the options that say which node is looked at."""
    parser.add_argument('--namespace', default='/', help='of the node, such as /robot1')
    parser.add_argument('--name', default='cmanp', help='of the node (default: cmanp)')


def _options(arguments):
    """Read and check the options."""
    parser = argparse.ArgumentParser(
        prog='cmanp doctor',
        description='Say why a node maps nothing, and what to do. Exit status: 0 healthy, '
        '1 a problem was found, 2 could not look.',
    )
    add_node_options(parser)
    parser.add_argument(
        '--timeout',
        type=float,
        default=5.0,
        metavar='S',
        help='how long to wait for the node, and again for messages [s] (default: 5)',
    )
    options = parser.parse_args(arguments)
    if not 0 < options.timeout <= 3600:
        parser.error(f'--timeout is {options.timeout}; expected seconds in (0, 3600]')
    return options
