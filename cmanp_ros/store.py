"""
Tiles in a file: an SQLite database that outlives the process, however that ends.

A write is one transaction in a write-ahead log. After `kill -9` all that was committed is there,
nothing else, and the store opens again. With synchronous=FULL this also holds for a power cut: it
costs one fsync a write, little as tiles come in batches. The log, `<path>-wal`, is part of the
store for as long as it exists; closing the store removes it.
"""

import json
import os
import sqlite3
import struct
import zlib
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from cmanp_ros.core.errors import CheckpointError

FORMAT_VERSION = 5
APPLICATION_ID = int.from_bytes(b'cmnp', 'big')  # by which SQLite files are told apart

Key = tuple[int, ...]
"""Level and lattice index, as in `core.tiles`, which loads torch."""


class TileStore:
    """
    Tiles by key, as `core.tiles.Store` wants them, each with a checksum.

    The file is open to one process at a time. The store may go from thread to thread but takes
    one call at a time: whoever shares it serializes (in the node, the worker does). Its keys are
    in memory, about 200 bytes a tile.
    """

    def __init__(self, path, identity: dict):
        """
        Open a store; a file that is not there, or empty, becomes one.

        :param identity: plain values that must be those the store was made with: weights_hash,
            geometry, normalization.
        :raises CheckpointError: for another identity, a store that is open elsewhere, or a file
            that is damaged or no store; what it holds stays as it is.
        """
        self.path, identity = Path(path), _to_json(identity)
        path = self.path.absolute()  # ':memory:' is a file like any other
        with _explained(self.path), ExitStack() as on_error:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(
                path, timeout=0.1, isolation_level=None, check_same_thread=False
            )
            on_error.callback(self.close)
            self._db.execute('PRAGMA locking_mode=EXCLUSIVE')
            self._db.execute('PRAGMA synchronous=FULL')
            with self._transaction():  # its lock is kept until the store is closed
                self._create_or_check(identity)
                self._extra = self._get('meta', b'extra', 'what was written beside the tiles')
                keys = self._db.execute('SELECT key FROM tiles').fetchall()
                self._keys = {_unpacked(key) for (key,) in keys}
            self._db.execute('PRAGMA journal_mode=WAL')
            self._file = path, path.stat()
            on_error.pop_all()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def __len__(self):
        """Return the number of tiles."""
        return len(self._keys)

    def __contains__(self, key: Key) -> bool:
        """Tell whether the tile was ever written."""
        return key in self._keys

    @property
    def extra(self) -> dict:
        """What was last written beside the tiles."""
        return json.loads(self._extra)

    def keys(self) -> list[Key]:
        """Return every tile written."""
        return list(self._keys)

    def read(self, keys: list[Key]) -> list[bytes]:
        """
        Return tiles written before.

        :raises CheckpointError: naming the tile that is damaged or missing.
        """
        return [self._get('tiles', _packed(key), f'tile {key}') for key in keys]

    def write(self, rows: dict[Key, bytes], extra: dict | None = None, remove: list[Key] = ()):
        """
        Write tiles and `extra` and remove other tiles, all or none.

        :param extra: plain values that belong to these tiles, such as counts; None: no change.
        :raises CheckpointError: when the disk is full or fails; nothing is written then.
        """
        text = self._extra if extra is None else _to_json(extra)
        with self._transaction():
            gone = ((_packed(key),) for key in remove)
            self._db.executemany('DELETE FROM tiles WHERE key = ?', gone)
            self._put('tiles', ((_packed(key), content) for key, content in rows.items()))
            self._put('meta', [(b'extra', text)])
        self._keys.difference_update(remove)
        self._keys.update(rows)
        self._extra = text

    def clear(self, extra: dict | None = None):
        """
        Delete the tiles, all or none; the identity stays.

        :param extra: what is there instead of what was written beside them; None: nothing.
        """
        text = _to_json(extra or {})
        with self._transaction():
            self._db.execute('DELETE FROM tiles')
            self._put('meta', [(b'extra', text)])
        self._keys, self._extra = set(), text
        with suppress(sqlite3.Error):
            self._db.execute('VACUUM')  # makes the file small; else its space is used again

    def check(self):
        """
        See whether the file is where it was opened: what is written to one that is not is lost.

        :raises CheckpointError: when it was removed or replaced; it can be read until closed.
        """
        path, opened = self._file
        try:
            if os.path.samestat(path.stat(), opened):
                return
            why = 'another file'
        except OSError as error:
            why = error.strerror
        raise CheckpointError(
            f'{self.path} was removed or replaced since it was opened ({why}): put it back, or '
            'save the map elsewhere before the end'
        )

    def close(self):
        """Close the file, so that others may open it. Closing again does nothing."""
        self._db.close()

    def _create_or_check(self, identity):
        application = self._value('PRAGMA application_id')
        version = self._value('PRAGMA user_version')
        if not (application or self._value('SELECT count() FROM sqlite_master')):
            self._create(identity)
        elif application != APPLICATION_ID:
            raise CheckpointError(f'{self.path} is an SQLite file but no store: use another path')
        elif version != FORMAT_VERSION:
            raise CheckpointError(
                f'{self.path} has format version {version}, this release reads {FORMAT_VERSION}: '
                'use the release that wrote it, or another store'
            )
        here, there = json.loads(identity), json.loads(self._get('meta', b'identity', 'its head'))
        different = '; '.join(
            f'{name} is {there.get(name)!r} there, {here.get(name)!r} here'
            for name in sorted(here.keys() | there.keys())
            if here.get(name) != there.get(name)
        )
        if different:
            raise CheckpointError(
                f'{self.path} belongs to another map ({different}): use another store, or the '
                'settings of that one'
            )

    def _value(self, query):
        return self._db.execute(query).fetchone()[0]

    def _create(self, identity):
        self._db.execute(f'PRAGMA application_id={APPLICATION_ID}')
        self._db.execute(f'PRAGMA user_version={FORMAT_VERSION}')
        columns = '(key BLOB PRIMARY KEY, checksum INTEGER, content BLOB)'
        self._db.execute(f'CREATE TABLE meta {columns}')
        self._db.execute(f'CREATE TABLE tiles {columns}')  # WITHOUT ROWID, reads are slower
        self._put('meta', [(b'identity', identity), (b'extra', _to_json({}))])

    @contextmanager
    def _transaction(self):
        """Do what is done inside, or nothing of it."""
        with _explained(self.path), self._db:
            self._db.execute('BEGIN EXCLUSIVE')
            yield

    def _put(self, table, rows):
        self._db.executemany(
            f'INSERT INTO {table} VALUES (?, ?, ?) ON CONFLICT (key) DO UPDATE '
            'SET checksum = excluded.checksum, content = excluded.content',
            ((key, _checksum(key, content), content) for key, content in rows),
        )

    def _get(self, table, key, name):
        with _explained(f'{self.path}: {name}'):
            query = f'SELECT checksum, CAST(content AS BLOB) FROM {table} WHERE key = ?'
            checksum, content = self._db.execute(query, (key,)).fetchone() or (None, None)
            if checksum != _checksum(key, content or b''):
                raise sqlite3.DatabaseError('missing, or its checksum differs')
        return content


@contextmanager
def _explained(subject):
    """Say which file or tile it is that SQLite complains of, and what to do."""
    try:
        yield
    except (OSError, sqlite3.OperationalError) as error:
        reason = f'cannot be used ({error}): make it writable, with space left'
        if str(error) == 'database is locked':
            reason = 'is open elsewhere: close it there'
        raise CheckpointError(f'{subject} {reason}, or use another store') from error
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        if isinstance(error, sqlite3.ProgrammingError):
            raise  # not about the file: the store was closed
        raise CheckpointError(
            f'{subject} is damaged, or no store wrote it ({error}): use a copy of it, or another '
            'store'
        ) from error


def _packed(key):
    return struct.pack(f'>{len(key)}q', *key)


def _unpacked(data):
    try:
        return struct.unpack(f'>{len(data) // 8}q', data)
    except (struct.error, TypeError) as error:
        raise sqlite3.DatabaseError(f'{data!r} is no key') from error


def _checksum(key, content):
    return zlib.crc32(content, zlib.crc32(key))


def _to_json(values):
    return json.dumps(values, sort_keys=True).encode()
