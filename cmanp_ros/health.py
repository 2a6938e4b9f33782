"""
What state the node is in, named: pure judgement on plain facts, shared by the node and the doctor.

"It runs, no error, nothing is published" has some twenty causes. `judge` takes the facts of one
moment and names the one cause, says what is waited for, and what to do. Nothing here needs ROS.
"""

from __future__ import annotations

import dataclasses
import enum
import time
from collections import deque
from collections.abc import Callable, Mapping

import numpy as np

SILENT_SEC = 10.0
"""[s] A source without a message for longer is silent."""
WITHIN_90 = (0.75, 0.98)
"""Share of observations in the 90 % interval that is taken for calibrated, both included."""
ENOUGH_POINTS = 500
"""Observations before calibration is judged."""


class Level(enum.IntEnum):
    """How bad it is; the numbers of diagnostic_msgs/DiagnosticStatus."""

    OK = 0
    WARN = 1
    ERROR = 2


STATES = {
    # The node.
    'no_node': Level.ERROR,
    'no_answer': Level.ERROR,
    'not_active': Level.WARN,
    'paused': Level.WARN,
    'no_sources': Level.ERROR,
    'clock_not_running': Level.ERROR,
    # A source, in the order in which messages get stuck: the later, the further they came.
    'no_publisher': Level.WARN,
    'wrong_type': Level.ERROR,
    'incompatible_qos': Level.ERROR,
    'no_messages': Level.WARN,
    'field_missing': Level.ERROR,
    'no_transform': Level.ERROR,
    'no_points': Level.WARN,
    'all_rejected': Level.ERROR,
    'all_outside': Level.ERROR,
    'all_thinned': Level.OK,
    # A node that works.
    'not_saved': Level.ERROR,
    'overloaded': Level.WARN,
    'tiles_dropped': Level.WARN,
    'peer_refused': Level.ERROR,
    'overconfident': Level.WARN,
    'underconfident': Level.WARN,
    'idle': Level.OK,
    'folding': Level.OK,
}
"""Every state and its level. docs/troubleshooting.md has one section for each."""

_SILENT = ('no_publisher', 'no_messages')
_RANK = {state: rank for rank, state in enumerate(STATES)}


@dataclasses.dataclass(frozen=True)
class Verdict:
    """
    The state of the node, or of one source, for a human and for a program.

    :ivar state: one of `STATES`.
    :ivar what: what is the matter, and what is waited for.
    :ivar way_out: what to do; empty if nothing.
    """

    level: Level
    state: str
    what: str
    way_out: str = ''

    @property
    def text(self) -> str:
        """Say both in one sentence."""
        return f'{self.what}: {self.way_out}' if self.way_out else self.what

    def __str__(self) -> str:
        """Write it as the message of a status: 'state: sentence'."""
        return f'{self.state}: {self.text}'


def verdict_from_text(text: str) -> Verdict | None:
    """
    Read what `str(verdict)` wrote.

    :param text: message of a status.
    :return: the verdict with all words in `what`; None if the text names no state.
    """
    state, _, what = text.partition(': ')
    return Verdict(STATES[state], state, what) if state in STATES else None


# Facts ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Counts:
    """
    What became of everything received; `rejected` maps reason -> count.
    """

    received: int = 0
    folded: int = 0
    rejected: Mapping[str, int] = dataclasses.field(default_factory=dict)
    dropped: int = 0

    def since(self, earlier: Counts) -> Counts:
        """Subtract what had been counted earlier."""
        rejected = {
            reason: count - earlier.rejected.get(reason, 0)
            for reason, count in self.rejected.items()
        }
        return Counts(
            self.received - earlier.received,
            self.folded - earlier.folded,
            {reason: count for reason, count in rejected.items() if count},
            self.dropped - earlier.dropped,
        )


class Recent:
    """Tells what happened lately from counters that only grow, in constant memory."""

    def __init__(
        self, window_sec: float = SILENT_SEC, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """
        Start with nothing counted.

        :param window_sec: [s] how far back "lately" reaches.
        :param clock: steady clock [s].
        """
        self._clock, self._window_sec = clock, window_sec
        self._seen = deque([(-np.inf, Counts())], maxlen=64)

    def __call__(self, total: Counts) -> Counts:
        """
        Take note of the counters and return what they counted within the window.

        :param total: since the start; call it regularly, as with every status.
        :return: over the window; if nothing was received in it, `total`: the last that is known.
        """
        now = self._clock()
        while len(self._seen) > 1 and self._seen[1][0] <= now - self._window_sec:
            self._seen.popleft()
        recent = total.since(self._seen[0][1])
        if now - self._seen[-1][0] >= self._window_sec / 32:
            self._seen.append((now, total))
        return recent if recent.received else total


@dataclasses.dataclass(frozen=True)
class Publisher:
    """
    Somebody who publishes on a topic.

    :ivar node: full name, as in '/lidar/driver'.
    :ivar type: as in 'sensor_msgs/msg/PointCloud2'.
    :ivar qos: reliability and durability, as in 'best effort, volatile'.
    :ivar conflict: why its QoS does not reach the subscription, naming both; empty if it does.
    """

    node: str
    type: str
    qos: str = ''
    conflict: str = ''


@dataclasses.dataclass(frozen=True)
class TopicView:
    """
    A topic as somebody sees it who wants to subscribe.

    :ivar similar: topics that carry this type, the most similar name first; only looked for when
        nobody usable publishes.
    """

    topic: str
    type: str
    publishers: tuple[Publisher, ...] = ()
    similar: tuple[str, ...] = ()

    @property
    def right_type(self) -> tuple[Publisher, ...]:
        """Return the publishers of the type."""
        return tuple(p for p in self.publishers if p.type == self.type)

    @property
    def usable(self) -> tuple[Publisher, ...]:
        """Return the publishers whose messages arrive."""
        return tuple(p for p in self.right_type if not p.conflict)


@dataclasses.dataclass(frozen=True)
class ClockView:
    """
    The clock that the node goes by.

    :ivar has_publisher: somebody publishes on /clock.
    :ivar is_running: the node's time has moved since the last look.
    """

    use_sim_time: bool = False
    has_publisher: bool = False
    is_running: bool = True


@dataclasses.dataclass(frozen=True)
class Source:
    """
    One input of the node.

    :ivar given_topic: topic as it was given, before remapping; what to remap.
    :ivar messages: lately, see `Recent`.
    :ivar example: text of the newest rejection.
    :ivar age_sec: [s] since the last message; None: there was none.
    """

    name: str
    view: TopicView
    given_topic: str = ''
    enabled: bool = True
    messages: Counts = Counts()
    example: str = ''
    age_sec: float | None = None


@dataclasses.dataclass(frozen=True)
class Coverage:
    """
    Share of new observations that fell into intervals predicted before they were folded.

    :ivar num_points: observations that this rests on; older ones count less.
    """

    within_50: float
    within_90: float
    num_points: float


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """
    The facts of one moment, as far as they are known.

    :ivar node: full name.
    :ivar lifecycle: 'unconfigured', 'inactive', 'active', ...; None: no such node is there;
        '': it is there and does not answer.
    :ivar num_alike: nodes of this very name.
    :ivar others: other nodes of this kind, full names.
    :ivar points: lately, of all sources, see `Recent`.
    :ivar num_folded: observations in the map.
    :ivar idle_sec: [s] since something was folded; None: never or not known.
    :ivar pending_transforms: frame -> how long [s] its oldest message has waited.
    :ivar queue_length: messages that wait to be folded.
    :ivar num_dropped: messages that a full queue pushed out lately.
    :ivar latency_sec: [s] from receiving a message to having it folded.
    :ivar tiles_dropped: lost because they fit neither into memory nor into a store.
    :ivar save_fault: why autosave or the store failed the last time; '' if neither did.
    :ivar peer_fault: topic -> why the newest map of a peer there was refused.
    """

    node: str = '/cmanp'
    lifecycle: str | None = 'active'
    num_alike: int = 1
    others: tuple[str, ...] = ()
    paused: bool = False
    sources: tuple[Source, ...] = ()
    points: Counts = Counts()
    num_folded: int = 0
    idle_sec: float | None = None
    map_frame: str = 'map'
    pending_transforms: Mapping[str, float] = dataclasses.field(default_factory=dict)
    clock: ClockView = ClockView()
    queue_length: int = 0
    num_dropped: int = 0
    latency_sec: float | None = None
    tiles_dropped: int = 0
    save_fault: str = ''
    peer_fault: Mapping[str, str] = dataclasses.field(default_factory=dict)
    coverage: Coverage | None = None


# Judgement -----------------------------------------------------------------------------------


def judge(snapshot: Snapshot) -> Verdict:
    """
    Name the state of the node: what stops everything comes first, then what is not as it should.

    Of several sources that all are stuck, the one that came furthest is named: the others are
    likely not in use. A node that works also lists its sources that do not.
    """
    if (verdict := _judge_node(snapshot)) is not None:
        return verdict
    troubles = {
        source.name: judge_source(source, snapshot)
        for source in snapshot.sources
        if source.enabled
    }
    stuck = [trouble for trouble in troubles.values() if trouble is not None]
    if len(stuck) == len(troubles):
        return _judge_stuck(snapshot, stuck)
    if (verdict := _judge_points(snapshot)) is not None:
        return verdict
    return _with_notes(_judge_working(snapshot), snapshot, troubles)


def judge_source(source: Source, snapshot: Snapshot) -> Verdict | None:
    """
    Name what keeps the messages of one source from the map.

    :return: a state from 'no_publisher' to 'all_thinned'; None if they get through.
    """
    view, what = source.view, f"'{source.view.topic}' ({source.view.type})"
    if not view.publishers:
        return _verdict('no_publisher', f'nothing publishes on {what}', _other_topic(source))
    if not view.right_type:
        found = _listed(sorted({p.type for p in view.publishers}))
        elsewhere = f', or {_other_topic(source)}' if view.similar else ''
        return _verdict(
            'wrong_type',
            f"'{view.topic}' carries {found} from {_listed(p.node for p in view.publishers)}, "
            f'and source {source.name} takes {view.type}',
            f'{_conversion(source)}{elsewhere}',
        )
    if not view.usable:
        return _judge_qos(source)
    if source.age_sec is None or source.age_sec > SILENT_SEC:
        return _judge_silence(source)
    return _judge_rejected(source.messages, source.name, 'messages', source.example, snapshot)


def _judge_node(s: Snapshot) -> Verdict | None:
    """Judge what concerns the node as a whole."""
    if s.lifecycle is None:
        way_out = (
            'start it with `ros2 launch cmanp_ros cmanp.launch.py`; if it runs, ROS_DOMAIN_ID and '
            'RMW_IMPLEMENTATION must be the same there and here'
        )
        if s.others:
            name = s.others[0].rpartition('/')
            way_out = (
                f'{_listed(s.others)} runs: ask for it with '
                f'--namespace {name[0] or "/"} --name {name[2]}'
            )
        return _verdict('no_node', f'there is no node {s.node}', way_out)
    if not s.lifecycle:
        return _verdict(
            'no_answer',
            f'{s.node} is there and does not answer',
            'wait if it is starting or busy, otherwise restart it; on another computer, check '
            'that the firewall lets UDP through',
        )
    if s.lifecycle != 'active':
        steps = '' if s.lifecycle == 'inactive' else f'`ros2 lifecycle set {s.node} configure`, '
        return _verdict(
            'not_active',
            f"{s.node} is '{s.lifecycle}', so it has no inputs",
            f'{steps}`ros2 lifecycle set {s.node} activate`, or set autostart to true; if it '
            'refuses, its log says why',
        )
    if s.paused:
        return _verdict(
            'paused',
            'observations are rejected until somebody resumes',
            f"`ros2 service call {s.node}/pause std_srvs/srv/SetBool '{{data: false}}'`",
        )
    if not any(source.enabled for source in s.sources):
        return _verdict(
            'no_sources',
            'no source is enabled',
            'name one in the parameter sources and set its enabled to true',
        )
    return None


def _judge_stuck(s: Snapshot, stuck: list[Verdict]) -> Verdict:
    """Judge a node that gets nothing from any source."""
    furthest = max(stuck, key=lambda trouble: _RANK[trouble.state])
    if s.num_folded and furthest.state in _SILENT:
        if s.save_fault:
            return _judge_saving(s)
        if s.peer_fault:
            return _judge_peers(s)
        since = '' if s.idle_sec is None else f' for {s.idle_sec:.0f} s'
        reasons = '; '.join(trouble.what for trouble in stuck)
        return _verdict(
            'idle', f'nothing new{since}, {s.num_folded} observations in the map; {reasons}'
        )
    if (trouble := _judge_clock(s.clock)) is not None:
        return trouble
    alike = [trouble for trouble in stuck if trouble.state == furthest.state]
    if len(alike) == 1:
        return furthest
    ways_out = '; '.join(dict.fromkeys(trouble.way_out for trouble in alike))
    what = ' and '.join(trouble.what for trouble in alike)
    return _verdict(furthest.state, what, ways_out)


def _judge_saving(s: Snapshot) -> Verdict:
    """Judge a node whose map would be lost with it."""
    return _verdict(
        'not_saved',
        f'what is new in the map is in memory only: {s.save_fault}',
        'make room or make state_directory and store writable; it is tried again each '
        'autosave_period and store_period',
    )


def _judge_peers(s: Snapshot) -> Verdict:
    """Judge a node that does not have what others observed."""
    topic, text = next(iter(s.peer_fault.items()))
    return _verdict('peer_refused', f"the newest map on '{topic}' was refused", text)


def _judge_clock(clock: ClockView) -> Verdict | None:
    """Judge a node that waits for simulated time."""
    if not clock.use_sim_time or (clock.has_publisher and clock.is_running):
        return None
    if clock.has_publisher:
        return _verdict(
            'clock_not_running',
            'use_sim_time is true and the time on /clock stands still',
            'let the simulation or the bag go on',
        )
    return _verdict(
        'clock_not_running',
        'use_sim_time is true and nothing publishes on /clock',
        'play the bag with --clock, start the simulation, or set use_sim_time to false',
    )


def _judge_qos(source: Source) -> Verdict:
    """Judge a source whose publishers all offer less than is asked for."""
    publisher = source.view.right_type[0]
    way_out = 'have the publisher offer what is asked for, or ask for less in qos_overrides'
    if 'reliable subscription' in publisher.conflict:
        way_out = f"set {source.name}.reliability to 'best_effort'"
    return _verdict(
        'incompatible_qos',
        f"{publisher.node} publishes '{source.view.topic}', but no message can arrive: "
        f'{publisher.conflict}',
        way_out,
    )


def _judge_silence(source: Source) -> Verdict:
    """Judge a source that could deliver and does not."""
    since = ' yet' if source.age_sec is None else f' for {source.age_sec:.0f} s'
    names = list(dict.fromkeys(publisher.node for publisher in source.view.usable))
    return _verdict(
        'no_messages',
        f"nothing has come on '{source.view.topic}'{since}, although {_listed(names)} "
        f'{"publishes" if len(names) == 1 else "publish"} it',
        f'see whether `ros2 topic hz {source.view.topic}` shows messages; if not, its publisher '
        'is the place to look',
    )


def _judge_rejected(
    counts: Counts, source: str, unit: str, example: str, s: Snapshot
) -> Verdict | None:
    """Judge what was received and all rejected, by its most frequent reason."""
    rejected = {reason: n for reason, n in counts.rejected.items() if reason not in _NO_FAULT}
    if counts.folded or not rejected:
        return None
    reason, count = max(rejected.items(), key=lambda item: item[1])
    state, way_out = _REASONS.get(reason, ('all_rejected', 'correct what is published'))
    if state == 'no_transform' and s.pending_transforms:
        return _judge_pending(s)
    if state == 'all_thinned':
        return _verdict(state, f'{count} points lately, all in voxels that have given one already')
    of = f' of {source}' if source else ''
    what = f'no {unit}{of} can be used, {count} rejected lately as {reason}'
    return _verdict(state, f'{what} ({example})' if example else what, way_out)


def _judge_points(s: Snapshot) -> Verdict | None:
    """Judge a node that receives messages, and folds none of their points."""
    if s.points.folded:
        return None
    if s.pending_transforms and not s.points.rejected:
        return _judge_pending(s)
    if not (s.points.received or s.num_folded) and any(each.messages.folded for each in s.sources):
        return _verdict(
            'no_points',
            'messages come, and no point is in any of them',
            'see why what publishes them finds nothing: its range, its filters, a cover',
        )
    return _judge_rejected(s.points, '', 'points', '', s)


def _judge_pending(s: Snapshot) -> Verdict:
    """Judge messages that wait for their transform."""
    frame, seconds = max(s.pending_transforms.items(), key=lambda item: item[1])
    return _verdict(
        'no_transform',
        f"no transform '{s.map_frame}' <- '{frame}' at the stamps of messages that have waited "
        f'{seconds:.1f} s',
        _REASONS['no_transform'][1],
    )


def _judge_working(s: Snapshot) -> Verdict:
    """Judge how well a node does that folds."""
    if s.save_fault:
        return _judge_saving(s)
    if s.num_dropped:
        latency = '' if s.latency_sec is None else f', {s.latency_sec:.1f} s from arrival to map'
        return _verdict(
            'overloaded',
            f'{s.num_dropped} messages dropped lately, {s.queue_length} wait{latency}',
            'send fewer points (voxel_size, max_rate), or let it have two cores (max_processes)',
        )
    if s.tiles_dropped:
        return _verdict(
            'tiles_dropped',
            f'{s.tiles_dropped} tiles of the map are lost: max_tiles are in memory and there is '
            'no store',
            'set store to a file, or raise max_tiles',
        )
    if s.peer_fault:
        return _judge_peers(s)
    if s.coverage is not None and s.coverage.num_points >= ENOUGH_POINTS:
        within = f'{s.coverage.within_90:.0%} of new observations lie in the 90 % interval'
        if s.coverage.within_90 < WITHIN_90[0]:
            return _verdict(
                'overconfident',
                f'errors are larger than the map says, {within}',
                'look for drift of the pose, wrong transforms or a field that changes; set '
                'value_offset and value_scale to the field',
            )
        if s.coverage.within_90 > WITHIN_90[1]:
            return _verdict(
                'underconfident',
                f'errors are smaller than the map says, {within}',
                'lower value_scale to the deviation of the field, or tile_size',
            )
    return _verdict('folding', f'{s.num_folded} observations in the map')


def _with_notes(verdict: Verdict, s: Snapshot, troubles: Mapping[str, Verdict | None]) -> Verdict:
    """Add what else does not work, and raise the level if that is an error."""
    notes = {name: trouble for name, trouble in troubles.items() if trouble is not None}
    if (clock := _judge_clock(s.clock)) is not None:
        notes['clock'] = clock
    if not notes:
        return verdict
    said = {name: n.text if n.level == Level.ERROR else n.what for name, n in notes.items()}
    listed = f'besides, {"; ".join(f"{name}: {text}" for name, text in said.items())}'
    is_error = any(note.level == Level.ERROR for note in notes.values())
    level = max(verdict.level, Level.WARN) if is_error else verdict.level
    if verdict.way_out:
        return dataclasses.replace(verdict, level=level, way_out=f'{verdict.way_out}; {listed}')
    return dataclasses.replace(verdict, level=level, what=f'{verdict.what}; {listed}')


def _conversion(source: Source) -> str:
    """Say how to use messages of another type."""
    found = {publisher.type for publisher in source.view.publishers}
    if 'sensor_msgs/msg/LaserScan' in found:
        return 'convert it to sensor_msgs/msg/PointCloud2 (package laser_geometry)'
    if found & {'sensor_msgs/msg/PointCloud2', 'cmanp_ros/msg/Observations'}:
        return f'set {source.name}.type to what is published'
    return (
        f'set {source.name}.type to what is published, and {source.name}.value_field to where in '
        'it the value is, which counts for the origin of its frame'
    )


def _other_topic(source: Source) -> str:
    """Say how to get messages of the type from elsewhere."""
    given, similar = source.given_topic or source.name, source.view.similar
    if not similar:
        return (
            f"start what publishes '{source.view.topic}', set {source.name}.topic, or leave "
            f'{source.name} out of sources'
        )
    others = f' (so do {_listed(similar[1:])})' if similar[1:] else ''
    return f'remap {given}:={similar[0]}, which carries this type{others}'


def _verdict(state: str, what: str, way_out: str = '') -> Verdict:
    """Make a verdict with the level of its state."""
    return Verdict(STATES[state], state, what, way_out)


def _listed(names) -> str:
    """List names, three at most."""
    names = list(dict.fromkeys(names))
    more = f' and {len(names) - 3} more' if len(names) > 3 else ''
    return ', '.join(names[:3]) + more


_CLOCKS = 'synchronize the clocks of the computers (chrony), or raise tf_timeout'
_REASONS = {
    'missing_field': (
        'field_missing',
        'set value_field to one of the fields that exist, or publish x, y (and z)',
    ),
    'outside_workspace': (
        'all_outside',
        'set bounds_min and bounds_max around the observations (in map_frame), or one_tile to '
        'false',
    ),
    'thinned': ('all_thinned', ''),
    'value_out_of_range': ('all_rejected', 'set value_offset and value_scale to the field'),
    'not_finite': ('all_rejected', 'see why the sensor sends NaN'),
    'not_stored': ('all_rejected', 'make room, or make store writable'),
    'too_near': ('all_rejected', 'lower min_range'),
    'too_many_points': ('all_rejected', 'raise max_points, or send fewer'),
    'no_transform': (
        'no_transform',
        'start what publishes it (localization, robot_state_publisher), or set map_frame; '
        '`ros2 run tf2_tools view_frames` shows what is there',
    ),
    'no_frame': ('no_transform', 'have the publisher set header.frame_id'),
    'no_stamp': ('no_transform', 'have the publisher set header.stamp'),
    'no_tf2': ('no_transform', 'install tf2_ros, or publish in map_frame'),
    'transform_too_old': ('no_transform', _CLOCKS),
    'transform_too_new': ('no_transform', _CLOCKS),
    'bad_transform': ('no_transform', 'correct the rotation or translation that is published'),
    'tf_queue_full': ('no_transform', 'publish the transform more often, or raise max_pending'),
}
"""Reason of a rejection -> state if it hits everything, and way out."""


_NO_FAULT = ('paused', 'disabled', 'rate_limited', 'cleared', 'closed')
"""Reasons that somebody wanted."""


# Calibration ---------------------------------------------------------------------------------


class Calibration:
    """
    Counts how often new observations fall into the intervals predicted before they were folded.

    Constant memory: each observation weighs less the more came after it, by 1 / window each. One
    thread adds; any may ask.
    """

    def __init__(self, window_points: float = 1000.0) -> None:
        """
        Start with none.

        :param window_points: how many observations back the weight has fallen to 1/e.
        """
        self._decay = 1.0 - 1.0 / window_points
        self._sums = np.zeros(3)  # weights: of all, within 50 %, within 90 %; replaced as a whole

    def add(self, mean: np.ndarray, stddev: np.ndarray, y: np.ndarray) -> None:
        """
        Compare predictions with what was then observed.

        :param mean: (n, dim_y) or (n,) predicted before these observations were folded.
        :param stddev: alike, of an observation.
        :param y: alike, observed; rows with something not finite, or no spread, do not count.
        """
        mean, stddev, y = (np.asarray(v, np.float64).reshape(-1) for v in (mean, stddev, y))
        with np.errstate(invalid='ignore', divide='ignore', over='ignore'):
            deviation = np.abs(y - mean) / stddev
        deviation = deviation[np.isfinite(deviation) & np.isfinite(stddev) & (stddev > 0)]
        weight = self._decay ** np.arange(len(deviation) - 1, -1, -1)
        counted = [np.ones(len(deviation), bool), *(deviation <= h for h in _HALF_WIDTHS)]
        new = np.array([weight[mask].sum() for mask in counted])
        self._sums = self._sums * self._decay ** len(deviation) + new

    def coverage(self) -> Coverage | None:
        """Return the shares, perfect if 0.5 and 0.9; None before the first observation."""
        total, within_50, within_90 = self._sums.tolist()
        return Coverage(within_50 / total, within_90 / total, total) if total else None


_HALF_WIDTHS = (0.6744897501960817, 1.6448536269514722)
"""[standard deviations] of the central 50 % and 90 % of a normal distribution."""
