"""
The way of observations into the map, and what became of each of them.

    message -> reading -> transform -> worker's queue -> admission -> NeuralField.observe

At all times, for points and for messages, of each source:
received = folded + rejected (by reason) + dropped (from a full queue) + pending.
"""

import time
from collections import deque
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
from rclpy.qos_overriding_options import QoSOverridingOptions
from std_msgs.msg import Header

from cmanp_ros import conversions, qos
from cmanp_ros.admission import Admission, RateLimit, not_in_future, thin
from cmanp_ros.conversions import MessageError
from cmanp_ros.core.errors import CheckpointError, CMANPError
from cmanp_ros.core.tiles import History
from cmanp_ros.diagnostics import Counters, CounterSnapshot, Latency
from cmanp_ros.maps import Provenance
from cmanp_ros.planning import Track
from cmanp_ros.sources import reader_for

MAX_STEP = 0.02  # of tile_size, between locations that single precision tells apart
MAX_CALIBRATED = 32  # points of a message that are predicted before they are folded


class Source:
    """One source of observations: its reader, its thinning, its counters."""

    def __init__(self, parameters, node):
        """
        Prepare to read.

        :param parameters: `SourceParameters`.
        :param node: `CMANPNode`, with its parameters and its map.
        :raises ConfigError: for a type that cannot be read.
        """
        self.name = parameters.name
        config = node.field.model.config
        self.reader = reader_for(parameters, node.parameters, config.dim_x, config.dim_y)
        self.qos = qos.of_source(parameters)
        self.points, self.messages = Counters(), Counters()
        self.rate_limit = RateLimit(parameters.max_rate)
        self.admission = Admission(parameters.voxel_size, parameters.revisit_interval)
        self.subscription = None
        self.problems = {}
        """reason -> what was said of the newest message or point rejected for it."""
        self.received_at = None  # [s] of the monotonic clock
        self.num_lost = 0
        """Messages of the only publisher that never came here; not among those received."""
        self._sequence = None

    def listen_anew(self):
        """Have what was sent while nobody listened not be taken for lost."""
        self._sequence = None

    def note(self, info):
        """
        Count the messages that a gap of the publisher's sequence numbers shows to be lost.

        Of several publishers on a topic the numbers cannot be told apart: nothing is counted.
        """
        number, last = info['publication_sequence_number'], self._sequence
        is_only_one = self.subscription.get_publisher_count() == 1
        self._sequence = number if is_only_one else None
        if is_only_one and None not in (number, last) and number > last:
            self.num_lost += number - last - 1


@dataclass(frozen=True)
class Batch:
    """Points of one message on their way to the worker."""

    source: Source
    header: Header
    x: np.ndarray
    """(n, dim) [m] in the frame of the header."""
    y: np.ndarray
    """(n, dim_y) [field units]."""
    value_is_height: bool
    """y is the third coordinate of x: it turns with the frame."""
    num_resets: int
    """Resets before it arrived."""
    received_at: float
    """[s] of the monotonic clock."""
    transform: tuple[np.ndarray, np.ndarray] | None = None
    """To the map frame; None: it is there already."""

    def __len__(self):
        return len(self.x)

    @property
    def stamp(self) -> int:
        """Stamp of the message [ns]."""
        return conversions.nanoseconds_from_stamp(self.header.stamp)

    @property
    def in_map(self) -> tuple[np.ndarray, np.ndarray]:
        """X (n, dim_x) and y (n, dim_y) in the map frame."""
        if self.transform is None:
            return self.x, self.y
        return self.source.reader.in_map(self.x, self.y, self.value_is_height, *self.transform)


class Intake:
    """All sources of a node. Messages come from the executor's thread, `fold` is the worker's."""

    def __init__(self, node):
        """
        Prepare the sources.

        :param node: `CMANPNode`, with its parameters and its map.
        :raises ConfigError: for a source that cannot be read.
        """
        self._node = node
        self.sources = {
            each.name: Source(each, node) for each in node.parameters.source_parameters
        }
        self.provenance = self.nothing_yet()
        self.newest_stamp = 0
        """[ns] of the observations since the clock last began; 0 before the first."""
        self.newest_x = np.add(node.parameters.bounds_min, node.parameters.bounds_max) / 2
        self.track = Track(2 * node.parameters.grid_resolution)
        """Where the sensors were; for points in the map frame, the middle of their message."""
        self.paused = False
        self.folded_at = None  # [s] of the monotonic clock
        self._latency = Latency()
        self._num_resets = 0
        self._marks = deque(maxlen=2 * History.NUM_MARKS)  # moments that ~/undo may go back to
        self._calibrated_at = -np.inf  # [s] of the monotonic clock
        self._random = np.random.default_rng(0)

    def open(self):
        """Subscribe."""
        for each in self._node.parameters.source_parameters:
            source = self.sources[each.name]
            source.listen_anew()
            source.subscription = self._node.open_subscription(
                source.reader.message_type,
                each.topic,
                self._receiver(source),
                source.qos,
                qos_overriding_options=QoSOverridingOptions.with_default_policies(),
            )

    @property
    def latency_sec(self) -> float | None:
        """Return the median time [s] from a message to the map with it; None before the first."""
        return self._latency.median()

    def nothing_yet(self) -> Provenance:
        """Return the provenance of an empty map."""
        p = self._node.parameters
        return Provenance(p.map_frame, (p.bounds_min, p.bounds_max))

    def totals(self):
        """Return the counters of points and of messages, of all sources together."""
        sources = self.sources.values()
        points = sum((source.points.snapshot() for source in sources), CounterSnapshot())
        messages = sum((source.messages.snapshot() for source in sources), CounterSnapshot())
        return points, messages

    def observed(self, oldest_stamp: int, newest_stamp: int):
        """Note that observations of this time [ns] are in the map now."""
        self.provenance = self.provenance.observed(oldest_stamp, newest_stamp)
        self.newest_stamp = max(self._not_in_future(self.newest_stamp), newest_stamp)

    def mark(self, now: float):
        """
        Let ~/undo go back to this moment; on the worker's thread, before each change of the map.

        :param now: [s] of the monotonic clock.
        """
        if self._node.fleet.own.mark(now):
            self._marks.append((now, self.provenance, self.newest_stamp))

    def taken_back(self, moment: float):
        """
        Note that the map is what it was at a mark [s]: it has the stamps of then.

        Voxels are free again: what was taken back may come again.
        """
        while self._marks and self._marks[-1][0] > moment + 1e-6:  # the sum of two differences
            self._marks.pop()
        if self._marks:
            _, self.provenance, newest = self._marks[-1]
            self.newest_stamp = self._not_in_future(newest)
        self._node.refresher.begin_again()
        for source in self.sources.values():
            source.admission.clear()

    def _not_in_future(self, stamp):
        """See `admission.not_in_future`; simulated time may not have begun."""
        now = self._node.get_clock().now().nanoseconds
        return not_in_future(stamp, now) if now else stamp

    def begin_again(self, provenance: Provenance | None = None):
        """
        Forget what was thinned, waits or is being folded.

        To be called on the worker's thread.

        :param provenance: of the map, which is another one now; None: it is the same, but the
            clock jumped back.
        """
        self._num_resets += 1  # what is left of the message being folded is left out
        self._node.refresher.begin_again()
        for batch in self._node.worker.clear():
            self._clear([batch], len(batch))
        self._node.transforms.clear()
        self.newest_stamp = 0
        if provenance is not None:
            self.provenance = provenance
            self.newest_stamp = self._not_in_future(provenance.newest_stamp)
            self._marks.clear()
        self.track.clear()
        for source in self.sources.values():
            source.admission.clear()

    def _receiver(self, source):
        def receive(message, info):
            source.note(info)
            self.receive(source, message)

        return receive

    # Before the worker ---------------------------------------------------------------------------

    def receive(self, source: Source, message):
        """Check a message, find its transform, and hand its points to the worker."""
        source.messages.receive()
        source.received_at = time.monotonic()
        p = self._node.parameters.source(source.name)
        if self.paused or not p.enabled:
            return source.messages.reject('paused' if self.paused else 'disabled')
        source.rate_limit.max_rate = p.max_rate
        stamp = conversions.nanoseconds_from_stamp(message.header.stamp)
        if not source.rate_limit.admit(stamp * 1e-9 if stamp else source.received_at):
            return source.messages.reject('rate_limited')
        try:
            reading = source.reader.read(message)
        except MessageError as error:
            source.messages.reject(error.reason)
            return self._report(source, error.reason, f'message left out: {error}')
        rejected = reading.rejected
        source.points.receive(len(reading.x) + sum(rejected.values()))
        self._reject_points(source, rejected)
        batch = Batch(
            source,
            reading.header,
            reading.x,
            reading.y,
            reading.value_is_height,
            self._num_resets,
            source.received_at,
        )
        self._node.transforms.request(
            source.name,
            reading.header.frame_id,
            reading.header.stamp,
            lambda *transform: self._offer(batch, transform),
            lambda error: self._refuse(batch, error.reason, len(batch.x), error),
        )

    def _offer(self, batch, transform):
        if not self._node.transforms.is_map_frame(batch.header.frame_id):
            batch = replace(batch, transform=transform)
        for dropped in self._node.worker.offer(batch):
            self._drop(dropped)
            self._report(
                dropped.source,
                'dropped',
                'observations arrive faster than they are folded: the oldest message was '
                'dropped; see queue_size, or send fewer points',
            )

    # On the worker's thread ----------------------------------------------------------------------

    def fold(self, batches: list[Batch]):
        """
        Fold messages, and refresh the map, a little at a time: an iterator, see `Worker`.

        Whoever asks meanwhile need not wait for it: see `Refresher`.
        """
        refresher = self._node.refresher
        refresher.begin_fold()
        try:
            for _, of_source in groupby(batches, lambda batch: batch.source.name):
                if parts := list(self._parts(of_source)):
                    usable, x, y = zip(*parts, strict=True)
                    x, y = np.concatenate(x), np.concatenate(y)
                    yield from self._fold(usable, x, y)
                    yield from refresher.refresh(x)
            yield from refresher.settle()
        except Exception as error:  # or the thread of the worker would end, and the node be deaf
            self._node.warn('internal_error', f'a fault, the node goes on: {error!r}')
        finally:
            refresher.end_fold()

    def _parts(self, batches):
        """Yield each message with its points that take part, x and y in the map frame."""
        for batch in batches:
            if batch.num_resets != self._num_resets:
                self._clear([batch], len(batch))
                continue
            try:
                part = batch, *self._taken(batch)
            except Exception as error:
                self._fail([batch], len(batch), error)
            else:
                yield part

    def _fold(self, batches, x, y):
        """Fold messages of one source together."""
        source, waiting = batches[0].source, len(x)
        stamps = [self._not_in_future(batch.stamp) for batch in batches]
        try:
            for chunk in self._node.field.in_chunks(x, self._node.parameters.chunk_size):
                if batches[0].num_resets != self._num_resets:
                    return self._clear(batches, waiting)
                self._calibrate(x[chunk], y[chunk])
                self.mark(time.monotonic())
                observed = self._node.fleet.observe(x[chunk], y[chunk])
                waiting -= len(chunk)
                source.points.fold(observed.folded)
                self._reject_points(source, observed.rejected)
                if observed.folded:
                    self.observed(min(stamps), min(stamps) if waiting else max(stamps))
                    self.newest_x = x[-1]
                yield
            self.folded_at = time.monotonic()
            for batch in batches:
                source.messages.fold()
                self._latency.add(self.folded_at - batch.received_at)
        except Exception as error:
            self._fail(batches, waiting, error)

    def _taken(self, batch):
        """Return the points of a message that take part, x and y in the map frame."""
        x, y = batch.in_map
        good = self._admitted(batch.source, batch.stamp, x, y)
        x, y = x[good], y[good]
        self._warn_of_rounding(x)
        if batch.transform is not None:
            self.track.add(batch.transform[1][: x.shape[1]])
        elif len(x):
            self.track.add(x.mean(0))
        return x, y

    def _warn_of_rounding(self, x):
        """Say so where messages, which hold locations in single precision, lose detail."""
        step = float(np.spacing(np.float32(np.abs(x).max(initial=0))))
        if step > MAX_STEP * self._node.field.tile_size:
            self._node.warn(
                'far_from_origin',
                'the map is exact, but messages have locations in single precision, and so far '
                f'from the origin of {self._node.parameters.map_frame!r} these have steps of '
                f'{step:g} m: use a map_frame with an origin nearby',
            )

    def _admitted(self, source, stamp, x, y):
        """Return which points take part, (n,) bool: those that can be folded, after thinning."""
        p = self._node.parameters.source(source.name)
        source.admission.voxel_size = p.voxel_size
        source.admission.revisit_interval = p.revisit_interval
        usable, rejected = self._node.field.usable(x, y)
        good, thinned = thin(source.admission, x, usable, stamp * 1e-9)
        self._reject_points(source, rejected | {'thinned': thinned})
        return good

    def _calibrate(self, x, y):
        """Every now and then compare new observations with what was predicted for them."""
        node, now = self._node, time.monotonic()
        period = node.parameters.calibration_period
        if not period or now - self._calibrated_at < period or not node.field.num_observations:
            return
        self._calibrated_at = now
        # Points that lie close together: few tiles have to be solved for them.
        near = np.linalg.norm(x - x[self._random.integers(len(x))], axis=1).argsort()
        near = near[:MAX_CALIBRATED]
        try:
            node.calibration.add(*node.fleet.combined.predict(x[near]), y[near])
        except Exception as error:  # of a peer's sums: they must not cost own observations
            node.warn('calibration', f'not compared with the prediction: {error!r}')

    # What became of it ---------------------------------------------------------------------------

    def _refuse(self, batch, reason, num_points, error):
        batch.source.messages.reject(reason)
        batch.source.points.reject(reason, num_points)
        self._report(batch.source, reason, f'message left out: {error}')

    def _drop(self, batch):
        batch.source.messages.drop()
        batch.source.points.drop(len(batch))

    def _fail(self, batches, num_points, error):
        """Leave out what is left of messages: a fault of ours must not end the node."""
        known = isinstance(error, CMANPError)
        reason = 'not_stored' if isinstance(error, CheckpointError) else 'not_usable'
        reason = getattr(error, 'reason', reason) if known else 'internal_error'
        for batch in batches:
            self._refuse(batch, reason, num_points, error if known else repr(error))
            num_points = 0  # of all of them

    def _clear(self, batches, num_points):
        """Count what was on its way to a map that is another one now: no overload."""
        source = batches[0].source
        for _ in batches:
            source.messages.reject('cleared')
        source.points.reject('cleared', num_points)

    def _reject_points(self, source, rejected):
        for reason, count in rejected.items():
            if count:
                source.points.reject(reason, count)
                if reason != 'thinned':  # on purpose
                    text = f'{count} points left out: {_REASONS.get(reason, reason)}'
                    self._report(source, reason, text)

    def _report(self, source, reason, text):
        text = conversions.one_line(text)
        source.problems[reason] = text
        self._node.warn(reason, f"'{source.name}': {text}")


_REASONS = {
    'not_finite': 'NaN or infinite location or value',
    'too_near': 'nearer to the sensor than min_range',
    'out_of_range': 'no echo between min_range and max_range (REP 117)',
    'outside_workspace': 'outside bounds_min and bounds_max (one_tile), or absurdly far away',
    'value_out_of_range': 'absurdly far from value_offset; set value_offset and value_scale',
}
