"""
What is done with the map as a whole, on request or by itself.

On request: pause, reset, save, load, merge, undo. By itself: autosave, forgetting, and the
exchange of maps with peers. The map is only touched on the worker's thread, files are written
beside it.
"""

import array
import threading
import time
from collections import Counter
from concurrent.futures import CancelledError
from concurrent.futures import TimeoutError as FutureTimeout
from functools import partial

from std_srvs.srv import SetBool, Trigger

from cmanp_ros import maps
from cmanp_ros.conversions import one_line
from cmanp_ros.core.errors import CMANPError, InputError
from cmanp_ros.core.tiles import History
from cmanp_ros.maps import Code, MapError, StateDirectory
from cmanp_ros.msg import State
from cmanp_ros.qos import LATCHED, REQUESTS
from cmanp_ros.srv import LoadState, MergeState, SaveState, Undo
from cmanp_ros.worker import TIMEOUT_SEC, is_over

FORGET_RATE = 1.0  # [Hz]
AUTOSAVE = 'autosave'  # name of the map that is saved by itself


class Control:
    """Serves requests about the map as a whole."""

    def __init__(self, node):
        """
        Open the outputs.

        :param node: `CMANPNode`, configured.
        """
        self._node = node
        p = node.parameters
        self.directory = StateDirectory(p.state_directory, p.map_frame)
        if p.state_directory:
            self.directory.check()
            node.get_logger().info(f'maps are saved in {self.directory.folder}')
        self._autosave_fault = self._store_fault = ''
        self.peer_fault = {}
        """Topic -> why the newest map there was refused."""
        self._counted_twice = {}
        """Topic -> the newest map there, if some of it was here already: it is tried again."""
        self.num_refused = Counter()
        """Reason -> maps of peers."""
        self._num_maps = 0  # begun: by a reset, or by loading one
        self._saved_map = None  # which of them is the one that is saved by itself
        self._saved_file = None  # its file, as it was written or loaded here
        self._saving = threading.Lock()
        self._state = node.open_publisher(State, '~/state', LATCHED)
        self._saved_version = node.fleet.own.version
        self._forgotten_at = None  # [ns] of the node's clock
        self._sending = self._flushing = self._sent_version = None

    @property
    def save_fault(self) -> str:
        """Why what is new was not saved by itself, or not written to the store; '' if it was."""
        return self._store_fault or self._autosave_fault

    def open(self):
        """Open the inputs and start the timers."""
        node, p = self._node, self._node.parameters
        for service_type, name, callback in (
            (Trigger, '~/reset', self._on_reset),
            (SetBool, '~/pause', self._on_pause),
            (SaveState, '~/save_state', self._on_save),
            (LoadState, '~/load_state', self._on_load),
            (MergeState, '~/merge_state', self._on_merge),
            (Undo, '~/undo', self._on_undo),
            (Trigger, '~/publish_state', self._on_publish_state),
        ):
            node.open_service(service_type, name, callback, node.controlling, REQUESTS)
        for topic in p.peers:
            node.open_subscription(State, topic, partial(self._on_peer, topic), LATCHED)
        node.open_timer(p.state_rate, self._publish_state)
        if p.half_life:
            self._forgotten_at = node.get_clock().now().nanoseconds
            node.open_timer(FORGET_RATE, self._forget)
        if p.undo_window:  # marks are an eighth of it apart, or a little more
            node.open_timer(2 * History.NUM_MARKS / p.undo_window, self._mark)
        if p.autosave_period:
            node.open_timer(1 / p.autosave_period, self.autosave, node.controlling)
        if p.store:
            node.open_timer(1 / p.store_period, self._flush)

    def restore(self):
        """
        Begin with the map of the parameter `restore`, before the worker runs.

        :raises MapError: for a map that cannot be used, or is not there (but for an autosave).
        """
        node, name = self._node, self._node.parameters.restore
        if not name:
            return
        if node.fleet.own.num_tiles:
            node.get_logger().info(f"the store holds a map: '{name}' is not restored over it")
            return
        try:
            self._replace(name)
        except MapError as error:
            if error.code != Code.NOT_FOUND or name != AUTOSAVE:
                raise
            return node.get_logger().warning(f'nothing to restore, the map begins empty: {error}')
        node.get_logger().info(f"restored '{name}': {maps.summary(node.fleet.own)}")

    # Requests ------------------------------------------------------------------------------------

    def _on_pause(self, request, response):
        self._node.intake.paused = request.data
        response.success = True
        response.message = 'paused: observations are rejected' if request.data else 'folding'
        return response

    def _on_reset(self, request, response):
        def reset():
            count = self._node.fleet.own.num_observations
            self.begin_again()
            return f'forgot {count} observations'

        return self._answer(response, reset)

    def begin_again(self):
        """Forget the map, on the worker's thread."""
        intake = self._node.intake
        self._node.fleet.own.reset()
        self._num_maps += 1
        intake.begin_again(intake.nothing_yet())
        self._try_again()

    def _on_save(self, request, response):
        def copy():
            node = self._node
            return self.directory.writer(
                node.fleet.own, request.name, node.intake.provenance, request.overwrite
            )

        def write(writer):
            response.num_bytes = writer().stat().st_size
            return f'saved {response.num_observations} observations in {response.num_tiles} tiles'

        return self._answer(response, copy, write)

    def _on_load(self, request, response):
        def load():
            self._replace(request.name)
            return f'loaded {maps.summary(self._node.fleet.own)}'

        return self._answer(response, load)

    def _on_merge(self, request, response):
        def merge():
            node, found = self._node, self.directory.load(request.name, self._node.fleet.own)
            node.intake.mark(time.monotonic())
            node.fleet.own.merge(found.field)
            node.intake.observed(found.provenance.oldest_stamp, found.provenance.newest_stamp)
            return f'merged {maps.summary(found.field)}'

        return self._answer(response, merge)

    def _on_undo(self, request, response):
        def undo():
            node, now = self._node, time.monotonic()
            taken, seconds = node.fleet.own.undo(request.seconds, now)
            if seconds is None:
                raise InputError(
                    'nothing to take back: nothing was folded since the start, or since the last '
                    'reset or load, beyond which no undo goes; load a saved map instead'
                )
            node.intake.taken_back(now - seconds)
            self._try_again()
            response.num_taken_back, response.seconds = taken, seconds
            return f'took back {taken} observations of the last {seconds:.1f} s'

        return self._answer(response, undo)

    def _on_publish_state(self, request, response):
        return self._answer(response, self._send_state)

    def _replace(self, name):
        own = self._node.fleet.own
        saved = self.directory.load(name, own)
        own.replace_with(saved.field)
        self._node.intake.begin_again(saved.provenance)
        self._num_maps += 1
        self._saved_map = self._saved_version = None
        if name == AUTOSAVE:
            self._saved_map, self._saved_version = self._num_maps, own.version
            self._saved_file, self._autosave_fault = saved.file, ''
        self._try_again()

    def _answer(self, response, work, finish=lambda result: result):
        """
        Do a piece of work on the worker's thread, and finish it here; say what became of it.

        :param finish: called with the result of `work`; returns the message.
        """

        def counted():
            try:
                return work()
            finally:
                own = self._node.fleet.own
                if hasattr(response, 'num_tiles'):
                    response.num_observations = own.num_observations
                    response.num_tiles = own.num_tiles

        future = self._node.worker.ask(counted)
        try:
            message = finish(_result(future))
            response.success = True
        except CMANPError as error:
            response.success, message = False, str(error)
            if hasattr(response, 'code'):
                response.code = int(getattr(error, 'code', Code.OTHER_MAP))
        except FutureTimeout:
            response.success, message = False, f'not done within {TIMEOUT_SEC:g} s: overloaded'
        except Exception as error:  # a fault of ours or of torch must not end the node
            response.success, message = False, f'not done: {error!r}'
        if not response.success:
            if hasattr(response, 'code') and not response.code:
                response.code = int(Code.FAILED)
            message = one_line(message)
            kind = type(response).__name__.partition('_')[0].lower()
            reason = f'{kind}_{getattr(response, "code", "")}'.rstrip('_')
            self._node.warn(reason, f'request refused: {message}')
        response.message = message
        return response

    # By itself -----------------------------------------------------------------------------------

    def autosave(self):
        """Save the map if it changed since the last time."""
        with self._saving:  # at the end, too: the newer one is written last
            self._autosave()

    def _autosave(self):
        node = self._node
        if node.fleet.own.version == self._saved_version:
            return

        def copied():
            own = node.fleet.own
            write = self.directory.writer(own, AUTOSAVE, node.intake.provenance, True)
            return own.version, self._num_maps, write

        try:
            version, number, write = _result(node.worker.ask(copied))
            there = self.directory.identity(AUTOSAVE)
            is_own = self._saved_map == number and there == self._saved_file
            if not is_own and (aside := self.directory.set_aside(AUTOSAVE)):
                node.get_logger().warning(
                    f"'{AUTOSAVE}' is of another map, which was not restored, or was reset or "
                    f"replaced, or of another node that saves there: it is kept as '{aside}'"
                )
            write()
            self._saved_file = self.directory.identity(AUTOSAVE)
            self._saved_map, self._saved_version, self._autosave_fault = number, version, ''
        except (CMANPError, FutureTimeout, CancelledError) as error:
            fault = str(error) or f'overloaded for {TIMEOUT_SEC:g} s'
            self._autosave_fault = f'autosave failed: {fault}'
            node.warn('autosave', f'not saved by itself, it is in memory only: {fault}')

    def _mark(self):
        """Let ~/undo go back to this moment."""
        mark, now = self._node.intake.mark, time.monotonic()
        self._node.in_background(lambda: mark(now))

    def _flush(self):
        """Write what changed to the store."""

        def flush():
            try:
                self._node.fleet.own.flush()
                self._store_fault = ''
            except CMANPError as error:
                self._store_fault = f'the store failed: {error}'
                self._node.warn('store', f'not written, it is in memory only: {error}')

        if is_over(self._flushing):
            self._flushing = self._node.in_background(flush)

    def _forget(self):
        """Let the time fade that has passed on the node's clock."""
        now, before = self._node.get_clock().now().nanoseconds, self._forgotten_at
        self._forgotten_at, seconds = now, (now - before) * 1e-9
        if before and seconds > 0:  # simulated time stands at 0 until it begins, and may jump back
            self._node.in_background(lambda: self._node.fleet.forget(seconds))

    # Peers ---------------------------------------------------------------------------------------

    def _publish_state(self):
        version = self._node.fleet.own.version
        is_new = version != self._sent_version
        if is_new and is_over(self._sending) and self._state.get_subscription_count():
            self._sent_version = version
            self._sending = self._node.in_background(self._send_state)

    def _send_state(self):
        node = self._node
        sent = node.fleet.state(node.intake.provenance, time.time_ns())
        message = State(
            header=node.header(),
            robot=sent.robot,
            sequence=sent.sequence,
            num_observations=sent.num_observations,
            weights_hash=sent.weights_hash,
        )
        message.data = array.array('B', sent.data)
        self._state.publish(message)
        return f'published {sent.num_observations} observations, {len(sent.data)} bytes'

    def _on_peer(self, topic, message):
        self._node.in_background(lambda: self._receive(topic, message))

    def _receive(self, topic, message):
        node = self._node
        received = node.fleet.receive(message.robot, message.sequence, bytes(message.data))
        kept = self._counted_twice.pop(topic, None)
        if received.reason == 'counted_twice':
            self._counted_twice[topic] = message
        if received.reason is None:
            self.peer_fault.pop(topic, None)
            node.get_logger().debug(received.text)
        elif received.reason not in ('own', 'old'):
            self.num_refused[received.reason] += kept is not message
            self.peer_fault[topic] = one_line(received.text)
            node.warn(f'{topic}_{received.reason}', received.text)

    def _try_again(self):
        """Take maps of peers that were refused for what was here: they may not send them again."""
        for topic, message in list(self._counted_twice.items()):
            self._receive(topic, message)


def _result(future):
    """
    Wait for an answer of the worker.

    :raises FutureTimeout: when it was not begun in time, and will not be. What was begun is
        waited for, however long it takes: nothing is done that was said not to be.
    """
    try:
        return future.result(TIMEOUT_SEC)
    except FutureTimeout:
        if future.cancel():
            raise
        return future.result()
