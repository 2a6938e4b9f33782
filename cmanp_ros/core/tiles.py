"""
The tiles in memory: states side by side in tensors, and which tile lies in which row.

At most `max_tiles` stay in memory. The least recently used go to a store and come back bit for
bit; without a store they are dropped and counted. With a `History` the last changes can be taken
back.
"""

import math
from collections import OrderedDict, deque
from collections.abc import Iterable
from numbers import Integral
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from cmanp_ros.core import state as states
from cmanp_ros.core.attention import AttentionSums
from cmanp_ros.core.errors import ConfigError, InputError
from cmanp_ros.core.least_squares import LeastSquaresSums
from cmanp_ros.core.state import State

Key = tuple[int, ...]
"""Level and lattice index."""


def keys_of(key: Tensor) -> list[Key]:
    """Return the rows of (n, 1 + dim_x) as keys."""
    return [tuple(row) for row in key.tolist()]


@runtime_checkable
class Store(Protocol):
    """Where tiles go that do not fit in memory; see `cmanp_ros.store`."""

    def __contains__(self, key: Key) -> bool:
        """Tell whether the tile was ever written."""

    def keys(self) -> list[Key]:
        """Return every tile written."""

    def read(self, keys: list[Key]) -> list[bytes]:
        """Return tiles written before."""

    def write(self, rows: dict[Key, bytes], extra: dict, remove: list[Key] = ()) -> None:
        """Write tiles and `extra` and remove other tiles, all or nothing."""

    @property
    def extra(self) -> dict:
        """Plain values written last; empty at first."""


class Mark(NamedTuple):
    """A moment that `Tiles.undo` can go back to."""

    time: float
    """[s] on the clock of the caller."""
    totals: dict
    """Of the tiles, then."""
    before: dict[Key, bytes | None]
    """What each tile was that changed between this mark and the next; None: there was none."""


class History:
    """
    What tiles were at some moments: a tile is copied before its first change after each mark.

    Bounded twice: marks that are older than the window go, all but one, and while more than
    `max_tiles` copies are kept the oldest mark goes.
    """

    NUM_MARKS = 8  # in a window

    def __init__(self, window_sec: float, max_tiles: int):
        """
        Start without marks.

        :param window_sec: [s] how far back one can go.
        :param max_tiles: copies kept.
        """
        if not 0 < window_sec < math.inf:
            raise ConfigError(f'undo_window is {window_sec}, expected a positive time [s]')
        self.window_sec, self.max_tiles = window_sec, max_tiles
        self._marks: deque[Mark] = deque()

    @property
    def nbytes(self) -> int:
        """Memory of the copies [bytes]."""
        return sum(len(content or b'') for mark in self._marks for content in mark.before.values())

    def clear(self):
        """Start again without marks."""
        self._marks.clear()

    def mark(self, now: float, totals: dict) -> bool:
        """Set a mark, if the last one is an eighth of the window old; tell whether."""
        if self._marks and now - self._marks[-1].time < self.window_sec / self.NUM_MARKS:
            return False
        self._marks.append(Mark(now, dict(totals), {}))
        while len(self._marks) > 1 and self._marks[1].time <= now - self.window_sec:
            self._marks.popleft()
        return True

    def unknown(self, keys: list[Key]) -> list[Key]:
        """
        Return the tiles of which there is no copy since the last mark.

        Where they are more than can be kept all marks go at once, and nothing is to be copied.
        """
        if not self._marks:
            return []
        found = [key for key in keys if key not in self._marks[-1].before]
        if len(found) > self.max_tiles:
            self.clear()
            return []
        return found

    def keep(self, contents: dict[Key, bytes | None]):
        """Keep copies of `unknown` tiles."""
        self._marks[-1].before.update(contents)
        while self._marks and sum(len(mark.before) for mark in self._marks) > self.max_tiles:
            self._marks.popleft()

    def find(self, time: float) -> Mark | None:
        """
        Return the newest mark that is not after a time, or the oldest; None without marks.

        Its `before` holds all that changed since, whatever marks came after it.
        """
        found = None
        for mark in reversed(self._marks):  # the oldest copy of a tile is the one that counts
            found = mark._replace(before={**(found.before if found else {}), **mark.before})
            if mark.time <= time:
                break
        return found

    def back_to(self, found: Mark):
        """Go on from a mark that was found, as if nothing had changed since."""
        while self._marks.pop().time > found.time:
            pass
        self._marks.append(found._replace(before={}))


class Tiles:
    """
    States of tiles by key. Rows move when tiles are paged: look rows up again after `rows`.
    """

    def __init__(self, model, max_tiles: int, store: Store | None = None, undo_window_sec=None):
        """
        Start without tiles.

        :param max_tiles: in memory.
        :param undo_window_sec: [s] how far `undo` reaches; None: nothing is kept for it.
        """
        if not isinstance(max_tiles, Integral) or max_tiles < 1:
            raise ConfigError(f'max_tiles is {max_tiles}, expected at least 1, and whole')
        self._model, self.max_tiles, self.store = model, max_tiles, store
        self.history = None if undo_window_sec is None else History(undo_window_sec, max_tiles)
        self.clear()

    @torch.inference_mode(False)  # tensors that can be changed in either mode
    def clear(self):
        """Start again with what the store holds; a new history begins."""
        if self.history is not None:
            self.history.clear()
        self.num_dropped = 0
        """Tiles lost for want of a store."""
        self._row_of: OrderedDict[Key, int] = OrderedDict()  # least recently used first
        self._free = list(range(min(16, self.max_tiles)))[::-1]
        self.totals = {'num_observations': 0, 'log_fading': 0.0}
        if self.store is not None:
            self.totals |= self.store.extra
        empty = self._model.init_state(1).tensors()
        self._empty = empty | {'faded': torch.zeros(1, dtype=torch.float64)}
        self._tensors = self._extended({}, len(self._free))
        self._dirty = torch.zeros(len(self._free), dtype=torch.bool)
        self._version = torch.zeros(len(self._free), dtype=torch.int64)
        self._changes = 0
        self._num_tiles = len(self.store.keys()) if self.store is not None else 0

    def __len__(self):
        """Return the number of tiles, in memory or in the store."""
        return self._num_tiles

    def __contains__(self, key: Key) -> bool:
        """Tell whether the tile exists, in memory or in the store."""
        return key in self._row_of or (self.store is not None and key in self.store)

    @property
    def num_in_memory(self) -> int:
        """Tiles in memory."""
        return len(self._row_of)

    @property
    def keys_in_memory(self) -> list[Key]:
        """Return the tiles in memory, the least recently used first."""
        return list(self._row_of)

    @property
    def capacity(self) -> int:
        """Rows of the tensors, used or not."""
        return len(self._dirty)

    @property
    def nbytes(self) -> int:
        """Memory of the states [bytes], and of the history."""
        kept = 0 if self.history is None else self.history.nbytes
        return kept + sum(tensor.nbytes for tensor in self._tensors.values())

    def keys(self) -> list[Key]:
        """Return every tile, in memory or in the store, in order."""
        return sorted({*self._row_of, *(self.store.keys() if self.store is not None else ())})

    @property
    def num_changes(self) -> int:
        """Return a number that changes whenever the content of any row does."""
        return self._changes

    def is_in(self, row: int, key: Key) -> bool:
        """Tell whether a tile lies in a row; it is not brought there."""
        return self._row_of.get(key) == row

    def version(self, rows: Tensor) -> Tensor:
        """Return numbers (n,) that change whenever the content of a row does."""
        return self._version[rows]

    def rows(self, keys: list[Key], create: bool = False) -> Tensor:
        """
        Bring tiles into memory and return their rows, (n,) int64; -1 for one that is nowhere.

        :param create: make what is nowhere.
        :raises ConfigError: when more are asked for at once than fit in memory.
        """
        missing = []
        for key in dict.fromkeys(keys):
            if key in self._row_of:
                self._row_of.move_to_end(key)
            elif create or key in self:
                missing.append(key)
        if missing:
            self._bring(missing, len(missing) + len(self._row_of.keys() & keys))
        rows = torch.tensor([self._row_of.get(key, -1) for key in keys], dtype=torch.int64)
        self._fade(rows[rows >= 0])
        return rows

    def forget(self, factor: float):
        """
        Weight all tiles by `factor`; each is multiplied when it is next looked at.

        :raises InputError: for a factor outside (0, 1].
        """
        if not 0 < factor <= 1:
            raise InputError(f'forget by {factor!r}: expected a factor in (0, 1]')
        self.totals['log_fading'] += math.log(factor)

    def _fade(self, rows):
        behind = self.totals['log_fading'] - self._tensors['faded'][rows]
        for difference in behind.unique().tolist():
            if difference != 0:
                some = rows[behind == difference]
                factor = math.exp(max(difference, -700.0))  # below it underflows to 0
                self.put(some, states.forget(self.state(some), factor))
                self._tensors['faded'][some] = self.totals['log_fading']

    def state(self, rows: Tensor) -> State:
        """Return a copy of the states in these rows."""
        return _state({name: part[rows] for name, part in self._tensors.items()})

    def attention(self, rows: Tensor) -> AttentionSums:
        """Return a copy of the attention sums in these rows."""
        return self._part(AttentionSums, 'attention', rows)

    def least_squares(self, rows: Tensor) -> LeastSquaresSums:
        """Return a copy of the least-squares sums in these rows."""
        return self._part(LeastSquaresSums, 'least_squares', rows)

    def count(self, rows: Tensor) -> Tensor:
        """Return the points in these rows, (n,), less what was forgotten."""
        return self._tensors['least_squares.count'][rows]

    def _part(self, cls, prefix, rows):
        return cls(*(self._tensors[f'{prefix}.{name}'][rows] for name in cls._fields))

    def state_of(self, keys: list[Key]) -> State:
        """Return a copy of the states of tiles; no points for one that is nowhere."""
        rows = self.rows(keys)
        state = self.state(rows)  # -1 is some row or other
        for name, part in state.tensors().items():
            part[rows < 0] = self._empty[name]
        return state

    def put(self, rows: Tensor, state: State):
        """Replace the states in these rows."""
        self._put(rows, state.tensors())
        self._dirty[rows] = True

    def change(self, changes: list[tuple[list[Key], State]], **totals) -> Tensor:
        """
        Replace the states of tiles, or make them: all of them or, with an error, none.

        What a store is given at any time is what all changes until then made of the map, so that
        is what remains whenever the process ends. `undo` takes it back.

        :param changes: tiles and their states; no tile twice.
        :param totals: plain values that change with them.
        :return: the rows of those in memory then, (n,) int64: all, or with more than fit none.
        """
        keys = [key for some, _ in changes for key in some]
        if self.history is not None and (first := self.history.unknown(keys)):
            there = [key for key in first if key in self]
            copies = dict(zip(there, self.to_bytes(there), strict=True))
            self.history.keep({key: copies.get(key) for key in first})
        if len(keys) > self.max_tiles and self.store is not None:
            self._change_in_store(changes, totals)
            return torch.empty(0, dtype=torch.int64)
        parts = []
        if len(keys) <= self.max_tiles:
            parts = self.rows(keys, create=True).split([len(some) for some, _ in changes])
        for number, (some, state) in enumerate(changes):
            self.put(parts[number] if parts else self.rows(some, create=True), state)
        self.totals |= totals
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)

    def _change_in_store(self, changes, totals):
        """Write more tiles than fit in memory at once, and all that was not yet written."""
        keys, faded = set(), self._empty['faded'] + self.totals['log_fading']
        contents = {}
        for some, state in changes:
            keys.update(some)
            contents |= zip(some, self._content(state.tensors(), faded), strict=True)
        dirty = [key for key in self._dirty_keys() if key not in keys]
        contents |= zip(dirty, self._packed(dirty), strict=True)
        self.store.write(contents, self.totals | totals)
        self._dirty[:] = False
        for key in keys & self._row_of.keys():
            self._drop(key)
        self._changes += 1
        self.totals |= totals
        self._num_tiles = len(self.store.keys())

    def _content(self, tensors, faded):
        """Return the content of each tile with these states, faded so far."""
        parts = tensors | {'faded': faded.expand(len(next(iter(tensors.values()))))}
        return list(_bytes([parts[name] for name in self._empty]))

    def replace(self, keys: list[Key], state: State | None, totals: dict):
        """
        Hold these tiles and no others; in a store all at once, whenever the process ends.

        :param totals: `num_observations` and other plain values.
        """
        totals = {'log_fading': 0.0} | totals
        contents = {}
        if keys:
            nothing = torch.zeros(1, dtype=torch.float64)
            contents = dict(zip(keys, self._content(state.tensors(), nothing), strict=True))
        if self.store is not None:
            gone = [key for key in self.store.keys() if key not in contents]  # noqa: SIM118
            self.store.write(contents, totals, gone)
        self.clear()
        self.totals = totals
        if self.store is None:
            self._restore(contents)

    def undo(self, seconds: float, now: float) -> float | None:
        """
        Take back what `change` did, to the bit; what was forgotten by passing time stays so.

        :param seconds: [s] how far to go back: to the newest mark that is so old, or else to the
            oldest that is kept.
        :param now: [s] on the clock of the marks.
        :return: [s] how far it went; None when no mark is kept.
        :raises InputError: for a time that is not positive, or without a history.
        """
        if self.history is None:
            raise InputError('undo is off: set undo_window [s] when the map is made')
        if not 0 < seconds < math.inf:
            raise InputError(f'undo {seconds} s: expected a positive time')
        mark = self.history.find(now - seconds)
        if mark is None:
            return None
        totals = mark.totals | {'log_fading': self.totals['log_fading']}
        before = {key: content for key, content in mark.before.items() if content is not None}
        if self.store is not None:
            gone = [key for key in mark.before if key not in before and key in self.store]
            dirty = [key for key in self._dirty_keys() if key not in mark.before]
            others = dict(zip(dirty, self.to_bytes(dirty), strict=True))
            self.store.write(before | others, totals, gone)
            self._dirty[:] = False
        for key in mark.before:
            self._drop(key)
        self.totals = totals
        if self.store is None:
            self._restore(before)
        else:
            self._num_tiles = len(self.store.keys())
        self.history.back_to(mark)
        return now - mark.time

    def flush(self):
        """Write every tile that changed since it was last written to the store."""
        if self.store is None:
            return
        keys = self._dirty_keys()
        if keys or self.store.extra != self.totals:  # forgetting alone changes no tile
            self.store.write(dict(zip(keys, self._packed(keys), strict=True)), self.totals)
            self._dirty[:] = False

    def to_bytes(self, keys: list[Key]) -> list[bytes]:
        """Return the content of tiles, in memory or in the store."""
        in_memory = [key for key in keys if key in self._row_of]
        found = dict(zip(in_memory, self._packed(in_memory), strict=True))
        stored = [key for key in keys if key not in found]
        if stored:
            found |= dict(zip(stored, self.store.read(stored), strict=True))
        return [found[key] for key in keys]

    def _unpacked(self, contents):
        data = torch.frombuffer(bytearray(b''.join(contents)), dtype=torch.uint8)
        data, start, tensors = data.view(len(contents), -1), 0, {}
        for name, empty in self._empty.items():
            end = start + empty.nbytes
            flat = data[:, start:end].contiguous().view(empty.dtype)
            tensors[name] = flat.view(len(contents), *empty.shape[1:]).to(empty.device)
            start = end
        return tensors

    def _restore(self, contents):
        """Bring tiles into memory that are nowhere, without a store."""
        keys = list(contents)
        for start in range(0, len(keys), self.max_tiles):
            some = keys[start : start + self.max_tiles]
            rows = self.rows(some, create=True)
            self._put(rows, self._unpacked([contents[key] for key in some]))

    def _put(self, rows, tensors):
        for name, value in tensors.items():
            self._tensors[name][rows] = value
        self._changes += 1
        self._version[rows] = self._changes

    def _bring(self, keys, needed):
        if needed > self.max_tiles:
            raise ConfigError(
                f'{needed} tiles are needed at once, max_tiles is {self.max_tiles}: allow more'
            )
        stored = [i for i, key in enumerate(keys) if self.store is not None and key in self.store]
        found = self._unpacked(self.store.read([keys[i] for i in stored])) if stored else {}
        self._make_room(len(keys), needed)
        rows = [self._free.pop() for _ in keys]  # nothing can fail from here on
        self._row_of |= zip(keys, rows, strict=True)
        rows = torch.tensor(rows)
        self._put(rows, self._empty)
        self._tensors['faded'][rows] = self.totals['log_fading']
        self._dirty[rows] = False
        if stored:
            self._put(rows[stored], found)
        self._num_tiles += len(keys) - len(stored)

    @torch.inference_mode(False)
    def _make_room(self, count, needed):
        """Have `count` free rows; the `needed` most recently used tiles stay."""
        grown = min(max(2 * self.capacity, self.capacity + count), self.max_tiles) - self.capacity
        if len(self._free) < count and grown > 0:
            self._free = [*range(self.capacity, self.capacity + grown)][::-1] + self._free
            self._tensors = self._extended(self._tensors, grown)
            self._dirty = torch.cat([self._dirty, torch.zeros(grown, dtype=torch.bool)])
            self._version = torch.cat([self._version, torch.zeros(grown, dtype=torch.int64)])
        excess = count - len(self._free)
        if excess > 0:  # some more at once: a transaction each time would be slow
            spare = len(self._row_of) - (needed - count)
            self._evict(list(self._row_of)[: min(max(excess, self.max_tiles // 16), spare)])

    def _evict(self, keys):
        if self.store is None:
            self.num_dropped += len(keys)
        elif self._dirty[[self._row_of[key] for key in keys]].any():
            self.flush()  # all of it, or tiles of different moments would be in the store
        for key in keys:
            self._drop(key)

    def _drop(self, key):
        """Have a tile no longer in memory; without a store it is nowhere then."""
        if key in self._row_of:
            self._free.append(self._row_of.pop(key))
            self._num_tiles -= self.store is None

    def _dirty_keys(self):
        return [key for key, row in self._row_of.items() if self._dirty[row]]

    def _packed(self, keys):
        if not keys:
            return []
        rows = [self._row_of[key] for key in keys]
        return list(_bytes([self._tensors[name][rows] for name in self._empty]))

    def _extended(self, tensors, count):
        more = {
            name: empty.expand(count, *empty.shape[1:]).clone()
            for name, empty in self._empty.items()
        }
        return {
            name: torch.cat([tensors[name], part]) if tensors else part
            for name, part in more.items()
        }


def _bytes(parts: list[Tensor]) -> Iterable[bytes]:
    """Yield the content of each tile, from tensors (tiles, ...)."""
    parts = [part.cpu().contiguous().view(len(part), -1).view(torch.uint8) for part in parts]
    return (row.numpy().tobytes() for row in torch.cat(parts, 1))


def _state(tensors):
    return states.from_tensors({k: v for k, v in tensors.items() if k != 'faded'})
