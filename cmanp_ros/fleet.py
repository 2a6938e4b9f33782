"""
Maps of several robots in one: a robot's own, and the latest that each other robot sent. No ROS.

A map that is sent is a whole map, so a newer one replaces the older one of the same robot and
every observation counts once: in any order, after losses, after a restart of either side.
"""

from typing import NamedTuple

import torch

from cmanp_ros import maps
from cmanp_ros.core.errors import InputError
from cmanp_ros.field import LARGEST_VALUE, NeuralField, Observed
from cmanp_ros.maps import MapError, Provenance

LATE = 60 * 10**9  # [ns] a map may be under way; clocks that are set back are further off
MAX_PEERS = 32  # a stranger who invents robots shall not fill the memory


class Sent(NamedTuple):
    """A robot's own map on its way to the others: the fields of State.msg."""

    robot: str
    sequence: int
    num_observations: int
    weights_hash: str
    data: bytes


class Received(NamedTuple):
    """What became of a map that arrived."""

    reason: str | None
    """Counter key: 'own', 'old', 'damaged', 'other_weights', 'other_map', 'counted_twice',
    'too_many_robots' or 'too_large'. None: the map was taken."""
    text: str
    """The reason in words, with the way out."""


class _Peer(NamedTuple):
    sequence: int
    field: NeuralField
    late: int | None = None
    """Sequence of an older map that came since."""

    def is_replaced_by(self, sequence: int) -> bool:
        """
        Tell whether a map replaces this one of the same robot.

        So it does with a far smaller sequence that grows again: the robot started anew, and its
        clock was set back (some have none that runs while they are off).
        """
        grows_again = self.late is not None and self.late < sequence < self.sequence - LATE
        return sequence > self.sequence or grows_again


class Fleet:
    """
    A robot's own map and those of its peers; what predicts is all of them.

    Everything that changes the own map apart from new observations and time is done on `own`:
    undo, reset, merge and replace_with (of a loaded map) touch that alone, and the peers see it
    with the next `state`. Their maps stay; those whose observations `own` holds itself do not
    count meanwhile.
    """

    def __init__(self, own: NeuralField, frame: str, now: int = 0):
        """
        Start without peers.

        :param frame: of all maps.
        :param now: [ns] since 1970: what was sent before was not sent from here.
        """
        self.own, self._frame = own, frame
        self._peers: dict[str, _Peer] = {}
        self._combined, self._combined_version = None, -1
        self._num_taken, self._sequence = 0, now

    @property
    def peers(self) -> list[str]:
        """Ids of the maps received that count."""
        own = set(self.own.robots)
        return [name for name, p in self._peers.items() if own.isdisjoint(p.field.robots)]

    @property
    def version(self) -> int:
        """A number that changes whenever what is predicted does."""
        return self.own.version + self._num_taken

    @property
    def state_nbytes(self) -> int:
        """Memory of all maps [bytes]; without peers that of the own one."""
        fields = [self.own, *(peer.field for peer in self._peers.values())]
        fields += [] if self._combined is None else [self._combined]
        return sum(field.state_nbytes for field in fields)

    @property
    def num_far_off(self) -> int:
        """Observations that predictions leave out: `NeuralField.num_far_off`."""
        return self._answering.num_far_off

    @property
    def num_observations(self) -> int:
        """Points in all maps that count."""
        return sum(field.num_observations for field in self._fields())

    @property
    def is_settled(self) -> bool:
        """`NeuralField.is_settled` of what answers; it is not made anew for that."""
        return self._answering.is_settled

    def forget_solved(self):
        """Have nobody answered from what was solved until now."""
        self._answering.forget_solved()

    @property
    def _answering(self):
        return self._combined or self.own

    @property
    def combined(self) -> NeuralField:
        """
        The map to predict from: the own one, or with peers one of all, made anew when needed.

        Not to be changed; it is another object whenever a peer's map arrived.
        """
        if not self.peers:
            self._combined = None
            return self.own
        if not self._is_current():
            most = self.own.world.tiles.max_tiles * (1 + MAX_PEERS)  # memory grows as needed
            combined = self.own.empty_like(most)
            keys = {key for field in self._fields() for key in field.world.tiles.keys()}
            self._renew(combined, sorted(keys))
            self._combined, self._combined_version = combined, self.own.version
        return self._combined

    def observe(self, x, y) -> Observed:
        """Fold observations into the own map, and into the combined one: `NeuralField.observe`."""
        return self._in_both(lambda field: field.observe(x, y))

    def forget(self, dt_sec: float):
        """Let time pass in all maps: `NeuralField.forget`."""
        self._in_both(lambda field: field.forget(dt_sec))
        for peer in self._peers.values():
            peer.field.forget(dt_sec)

    def state(self, provenance: Provenance, now: int) -> Sent:
        """
        Return the own map for the others.

        :param now: [ns] since 1970, the sequence number: it goes on after a restart.
        """
        self._sequence = max(self._sequence + 1, now)
        own = self.own
        return Sent(
            own.robots[0],
            self._sequence,
            own.num_observations,
            own.weights_hash,
            maps.to_bytes(own, provenance),
        )

    def receive(self, robot: str, sequence: int, data: bytes) -> Received:
        """
        Take another robot's map in place of its older one; it is verified before.

        :param data: the bytes of a saved map.
        """
        if robot == self.own.robots[0]:
            if sequence <= self._sequence:
                return Received('own', 'this map itself came back: nothing to do')
            return Received(
                'counted_twice',
                f'robot {robot!r} sent a map of the same id as this one: both began from one '
                'file, whose observations would count twice; start one of the two without that '
                '(restore, store)',
            )
        older = self._peers.get(robot)
        if older is not None and not older.is_replaced_by(sequence):
            if sequence < older.sequence:
                self._peers = self._peers | {robot: older._replace(late=sequence)}
            return Received(
                'old', f'map {sequence} of robot {robot!r}: {older.sequence} is here already'
            )
        try:
            field = maps.from_bytes(data, self.own, self._frame, f'the map of robot {robot!r}')[0]
        except MapError as error:
            return Received(error.code.name.lower(), str(error))
        if (refused := self._refusal(robot, field)) is not None:
            return refused
        changed = field.world.changed_since(older and older.field.world)
        self._peers = self._peers | {robot: _Peer(sequence, field)}  # others may be reading it
        self._num_taken += 1
        combined, is_current = self._combined, self._is_current()
        self._combined = None
        if changed is not None and is_current:  # what did not change need not be solved again
            self._renew(combined, changed)
            self._combined = combined
        return Received(None, f'map {sequence} of robot {robot!r}: {maps.summary(field)}')

    def _refusal(self, robot, field):
        """Return why a map that was verified cannot be taken; None if it can."""
        if field.robots[0] != robot:
            return Received(
                'damaged', f'the map of robot {robot!r} says it is that of {field.robots[0]!r}'
            )
        with torch.inference_mode():
            is_possible = field.world.is_possible(LARGEST_VALUE)
        if not is_possible:
            return Received(
                'damaged',
                f'the map of robot {robot!r} holds sums that no observations give: see what sends '
                'on that topic',
            )
        others = [peer.field for name, peer in self._peers.items() if name != robot]
        held = {name for other in (self.own, *others) for name in other.robots}
        if shared := held & set(field.robots):
            return Received(
                'counted_twice',
                f'the map of robot {robot!r} holds observations of {sorted(shared)}, which are '
                'here already: they would count twice; reset one of the two maps',
            )
        if len(others) >= MAX_PEERS:
            return Received(
                'too_many_robots',
                f'robot {robot!r} is one more than {MAX_PEERS} peers: restart this node to '
                'forget those that are gone',
            )
        if field.num_tiles > (limit := self.own.world.tiles.max_tiles):
            return Received(
                'too_large',
                f'the map of robot {robot!r} has {field.num_tiles} tiles, max_tiles is {limit}: '
                'allow more',
            )
        return None

    def _renew(self, combined, keys):
        """Make tiles of a combined map anew."""
        with torch.inference_mode():
            combined.world.renew(keys, [field.world for field in self._fields()])

    def _fields(self):
        return [self.own, *(self._peers[robot].field for robot in sorted(self.peers))]

    def _is_current(self):
        return self._combined is not None and self._combined_version == self.own.version

    def _in_both(self, change):
        """Change the own map, and in the same way the combined one, if that is up to date."""
        is_current = self._is_current()
        result = change(self.own)
        if is_current:
            try:
                change(self._combined)
            except InputError:  # of a peer's sums: the own map is what counts
                self._combined = None
                return result
            self._combined_version = self.own.version
        return result
