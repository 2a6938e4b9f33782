"""What a store committed is there again, bit for bit, however the process before it ended."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest

from cmanp_ros.core.errors import CheckpointError
from cmanp_ros.core.tiles import Store
from cmanp_ros.store import TileStore

IDENTITY = {
    'weights_hash': 'c0ffee',
    'geometry': {'tile_size': 1 / 3, 'dim_x': 2},
    'normalization': {'value_offset': 0.1, 'value_scale': (5, 7)},
}
TILES = {(0, 2, -3): b'\x00two', (1, -5, 7): os.urandom(11 * 4096), (0, 0, 0): b''}


@pytest.fixture
def path(tmp_path):
    return tmp_path / 'map.tiles'


@pytest.fixture
def store(path):
    with TileStore(path, IDENTITY) as store:
        yield store


@pytest.fixture
def closed(path):
    """Write TILES and close; return the path."""
    with TileStore(path, IDENTITY) as store:
        store.write(TILES, {'num_observations': 13})
    return path


def content(store):
    """Return all that a store holds."""
    return dict(zip(store.keys(), store.read(store.keys()), strict=True)), store.extra


def refusal(path, identity=IDENTITY):
    """Return the text with which a file is refused; nothing in its folder has changed then."""

    def files():
        return {file: file.read_bytes() for file in path.parent.iterdir() if file.is_file()}

    before = files()
    with pytest.raises(CheckpointError) as error:
        TileStore(path, identity)
    assert files() == before
    return str(error.value)


def edit(path, *statements):
    """Change a store behind its back."""
    with sqlite3.connect(path) as database:
        for statement in statements:
            database.execute(*statement)
    database.close()


# Round trips -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'key',
    [(0, 0), (2, -1), (3, 2**40, -(2**40)), (5, -7, 11, -13), (1, -(2**40) + 1, 255, 256)],
    ids=str,
)
@pytest.mark.parametrize('size', [0, 1, 40_009])
def test_tiles_round_trip_bit_by_bit(path, key, size):
    expected = os.urandom(size)
    with TileStore(path, IDENTITY) as store:
        store.write({key: expected})
        assert store.read([key]) == [expected]
    with TileStore(path, IDENTITY) as store:
        assert store.keys() == [key]
        assert store.read([key]) == [expected]


def test_the_core_takes_it_as_a_store(store):
    assert isinstance(store, Store)


def test_a_new_store_is_empty(store, path):
    assert content(store) == ({}, {})
    assert len(store) == 0
    assert (0, 0, 0) not in store
    assert path.is_file()


def test_folders_are_made(tmp_path):
    with TileStore(tmp_path / 'not' / 'yet' / 'map', IDENTITY) as store:
        store.write(TILES)
    assert (tmp_path / 'not' / 'yet' / 'map').is_file()


def test_a_name_that_means_something_to_sqlite_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with TileStore(':memory:', IDENTITY) as store:
        store.write(TILES)
    assert [file.name for file in tmp_path.iterdir()] == [':memory:']


def test_neighbors_are_other_tiles(store):
    keys = [(level, i, j) for level in (0, 1) for i in (-2, -1, 0, 1) for j in (-1, 0, 1)]
    keys += [key[:2] for key in keys[::3]]  # other dimensions, too
    store.write({key: repr(key).encode() for key in keys})
    assert store.read(keys[::-1]) == [repr(key).encode() for key in keys[::-1]]
    assert sorted(store.keys()) == sorted(keys)


def test_tiles_come_in_the_order_asked_for_and_as_often(store):
    store.write(TILES)
    keys = [(1, -5, 7), (0, 2, -3), (1, -5, 7)]
    assert store.read(keys) == [TILES[key] for key in keys]
    assert store.read([]) == []


def test_many_tiles_are_read_at_once(store):
    rows = {(0, i, -i): i.to_bytes(3, 'big') for i in range(2003)}
    store.write(rows)
    assert store.read(list(rows)) == list(rows.values())


def test_the_last_write_of_a_tile_counts(path):
    with TileStore(path, IDENTITY) as store:
        store.write(TILES)
        for size in (7, 40_009, 40_009, 11):
            rows = {(1, -5, 7): os.urandom(size)}
            store.write(rows)
            assert content(store)[0] == TILES | rows
        assert len(store) == len(TILES)
    with TileStore(path, IDENTITY) as store:
        assert content(store)[0] == TILES | rows


def test_a_reopened_store_knows_its_tiles(closed):
    with TileStore(closed, IDENTITY) as store:
        assert content(store) == (TILES, {'num_observations': 13})
        assert len(store) == 3
        assert all(key in store for key in TILES)
        assert (0, -3, 2) not in store


def test_a_closed_store_is_one_file(closed):
    assert list(closed.parent.iterdir()) == [closed]


def test_any_thread_may_use_the_store(path):
    opened = []
    for step in (
        lambda: opened.append(TileStore(path, IDENTITY)),
        lambda: opened[0].write(TILES),
        lambda: opened.append(content(opened[0])),
        lambda: opened[0].close(),
    ):
        thread = threading.Thread(target=step)
        thread.start()
        thread.join()
    assert opened[1] == (TILES, {})
    with TileStore(path, IDENTITY) as store:
        assert content(store) == (TILES, {})


def test_a_store_loads_neither_torch_nor_ros():
    code = 'import sys, cmanp_ros.store; print(*sys.modules)'
    loaded = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert 'cmanp_ros.store' in loaded.stdout.split()
    assert not {'torch', 'numpy', 'rclpy'} & set(loaded.stdout.split())


# All or nothing ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'wrong',
    [{(0, 3, 5): 'text'}, {(0, 3, 5): None}, {(0, 3.5, 5): b'x'}, {(0, 2**64, 5): b'x'}],
    ids=str,
)
def test_a_write_that_fails_midway_changes_nothing(path, wrong):
    with TileStore(path, IDENTITY) as store:
        store.write(TILES, {'num_observations': 13})
        with pytest.raises(Exception, match='.'):
            store.write({(0, 2, -3): b'new', (7, 7, 7): b'x'} | wrong, {'num_observations': 17})
        assert content(store) == (TILES, {'num_observations': 13})
    with TileStore(path, IDENTITY) as store:
        assert content(store) == (TILES, {'num_observations': 13})


def test_a_full_disk_changes_nothing_and_is_said(path):
    with TileStore(path, IDENTITY) as store:
        store.write(TILES)
        store._db.execute('PRAGMA max_page_count=100')
        with pytest.raises(CheckpointError) as error:
            store.write({(0, 2, -3): b'new'} | {(2, i, i): bytes(40_009) for i in range(53)})
        assert str(error.value) == (
            f'{path} cannot be used (database or disk is full): make it writable, with space '
            'left, or use another store'
        )
        assert content(store) == (TILES, {})
        store.write({(0, 2, -3): b'new'})
        assert content(store) == (TILES | {(0, 2, -3): b'new'}, {})


def test_extra_that_is_not_json_changes_nothing(store):
    with pytest.raises(TypeError):
        store.write(TILES, {'tensor': object()})
    assert content(store) == ({}, {})


def test_extra_stays_until_it_is_written_again(path):
    with TileStore(path, IDENTITY) as store:
        store.write({}, {'num_observations': 13, 'nested': {'stamp': [1, 0.1]}})
        store.write(TILES)
        store.extra['num_observations'] = 17  # a copy
        expected = {'num_observations': 13, 'nested': {'stamp': [1, 0.1]}}
        assert store.extra == expected
    with TileStore(path, IDENTITY) as store:
        assert content(store) == (TILES, expected)
        store.write({}, {'num_observations': 19})
        assert store.extra == {'num_observations': 19}


def test_clear_forgets_all_but_the_identity(closed):
    with TileStore(closed, IDENTITY) as store:
        store.clear()
        assert content(store) == ({}, {})
        assert (0, 2, -3) not in store
        with pytest.raises(CheckpointError):
            store.read([(0, 2, -3)])
    assert 'weights_hash' in refusal(closed, IDENTITY | {'weights_hash': 'other'})
    with TileStore(closed, IDENTITY) as store:
        assert content(store) == ({}, {})
        store.write(TILES)
        assert content(store) == (TILES, {})
        store.clear({'robots': ['a']})
    with TileStore(closed, IDENTITY) as store:
        assert content(store) == ({}, {'robots': ['a']})


def test_clear_gives_the_space_back(path):
    with TileStore(path, IDENTITY) as store:
        store.write({(0, i): os.urandom(40_009) for i in range(53)})
    assert path.stat().st_size > 53 * 40_009
    with TileStore(path, IDENTITY) as store:
        store.clear()
    assert path.stat().st_size < 40_009


# Killed ------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from cmanp_ros.store import TileStore

class Rows(dict):
    def items(self):
        yield from super().items()
        os.kill(os.getpid(), signal.SIGKILL)

def rows(generation):
    return {(0, i, -i): generation.to_bytes(8, 'big') * 5003 for i in range(num_tiles)}

path, how, num_tiles = sys.argv[1], sys.argv[2], int(sys.argv[3])
store = TileStore(path, {})
generation = store.extra.get('generation', 0)
print(generation, flush=True)
while how != 'wait' or sys.stdin.read():
    generation += 1
    written = rows(generation)
    store.write(Rows(written) if how == 'die' else written, {'generation': generation})
    print(generation, flush=True)
"""


@contextmanager
def process(path, how, num_tiles=7):
    """Run a process that has the store open; it is killed in the end."""
    command = [sys.executable, '-c', KILLED, str(path), how, str(num_tiles)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as running:
        try:
            yield running
        finally:
            running.kill()


def generations(path, num_tiles=7):
    """Return the generation in the store, and those of its tiles: each is one, from end to end."""
    with TileStore(path, {}) as store:
        tiles, extra = content(store)
    assert len(tiles) in (0, num_tiles)
    assert all(len(tile) == 8 * 5003 and tile == tile[:8] * 5003 for tile in tiles.values())
    return extra.get('generation', 0), {int.from_bytes(tile[:8], 'big') for tile in tiles.values()}


def test_all_that_was_committed_survives_a_kill(path):
    for num_lines in (1, 2, 5, 11, 23):
        with process(path, 'write') as running:
            lines = [running.stdout.readline() for _ in range(num_lines)]
            running.send_signal(signal.SIGKILL)
            lines += running.stdout.readlines()
            assert running.wait() == -signal.SIGKILL, running.stderr.read()
        reported = int([line for line in lines if line.endswith('\n')][-1])
        found, of_tiles = generations(path)
        assert found in (reported, reported + 1)  # committed, and killed before it could say so
        assert of_tiles == ({found} if found else set())


def test_nothing_of_a_write_survives_a_kill_before_its_end(path):
    num_tiles = 101  # so large that SQLite has parts of it in its log
    with TileStore(path, {}) as store:
        store.write(
            {(0, i, -i): (3).to_bytes(8, 'big') * 5003 for i in range(num_tiles)},
            {'generation': 3},
        )
    with process(path, 'die', num_tiles) as running:
        assert running.stdout.read() == '3\n'
        assert running.wait() == -signal.SIGKILL, running.stderr.read()
    assert path.with_name(f'{path.name}-wal').stat().st_size > 1e6
    assert generations(path, num_tiles) == (3, {3})


def test_what_a_kill_left_behind_can_be_moved(path, tmp_path):
    with process(path, 'write') as running:
        for _ in range(3):
            running.stdout.readline()
    elsewhere = tmp_path / 'elsewhere'
    elsewhere.mkdir()
    for file in tmp_path.glob(f'{path.name}*'):
        shutil.copy(file, elsewhere)
    assert generations(elsewhere / path.name) == generations(path)


# One at a time -----------------------------------------------------------------------------------


def test_a_store_that_another_process_has_open_is_refused(path):
    expected = f'{path} is open elsewhere: close it there, or use another store'
    with process(path, 'wait') as running:
        assert running.stdout.readline() == '0\n'
        assert refusal(path, {}) == expected
        assert refusal(path, {}) == expected
    TileStore(path, {}).close()  # nothing is left of the lock


def test_a_refused_opener_does_not_unlock_the_store(store, path):
    store.write(TILES)
    for _ in range(2):
        with pytest.raises(CheckpointError, match='is open elsewhere'):
            TileStore(path, IDENTITY)
        with process(path, 'wait') as running:
            assert running.wait() == 1
            assert 'is open elsewhere' in running.stderr.read()
    store.write({(3, 5, 7): b'more'})
    assert content(store) == (TILES | {(3, 5, 7): b'more'}, {})


def test_a_store_that_was_refused_is_not_kept_open(closed):
    refusal(closed, {})
    TileStore(closed, IDENTITY).close()


def test_closing_twice_does_nothing(store):
    store.close()
    store.close()
    with pytest.raises(sqlite3.ProgrammingError, match='closed database'):
        store.write(TILES)


# Refused -----------------------------------------------------------------------------------------


def test_another_map_is_named_by_what_differs(closed):
    other = {
        'weights_hash': 'decade',
        'geometry': {'tile_size': 1 / 3, 'dim_x': 2},
        'normalization': {'value_offset': 0.1, 'value_scale': [5, 11]},
    }
    assert refusal(closed, other) == (
        f"{closed} belongs to another map (normalization is {{'value_offset': 0.1, 'value_scale': "
        "[5, 7]} there, {'value_offset': 0.1, 'value_scale': [5, 11]} here; weights_hash is "
        "'c0ffee' there, 'decade' here): use another store, or the settings of that one"
    )


@pytest.mark.parametrize('change', ['more', 'fewer'])
def test_an_identity_with_other_names_is_another_one(closed, change):
    other = IDENTITY | {'frame': 'map'}
    if change == 'fewer':
        other = {name: value for name, value in IDENTITY.items() if name != 'geometry'}
    name = {'more': 'frame', 'fewer': 'geometry'}[change]
    assert refusal(closed, other).startswith(f'{closed} belongs to another map ({name} is ')


def test_the_same_identity_in_other_words_is_the_same(closed):
    same = dict(reversed(IDENTITY.items()))
    same['normalization'] = {'value_scale': [5.0, 7], 'value_offset': 0.1}
    TileStore(closed, same).close()


@pytest.mark.parametrize(
    'data', [b'xy', b'PK\3\4' * 5003, bytes(8192)], ids=['xy', 'zip', 'zeros']
)
def test_a_file_that_is_no_database_is_refused(path, data):
    path.write_bytes(data)
    assert refusal(path) == (
        f'{path} is damaged, or no store wrote it (file is not a database): use a copy of it, or '
        'another store'
    )


@pytest.mark.parametrize('journal', ['delete', 'wal'])
def test_a_database_of_something_else_is_refused(path, journal):
    edit(path, (f'PRAGMA journal_mode={journal}',), ('CREATE TABLE tiles (key, value)',))
    assert refusal(path) == f'{path} is an SQLite file but no store: use another path'


def test_another_format_version_is_refused(closed):
    edit(closed, ('PRAGMA user_version=7',))
    assert refusal(closed) == (
        f'{closed} has format version 7, this release reads 5: use the release that wrote it, or '
        'another store'
    )


def test_a_folder_is_refused(path):
    path.mkdir()
    assert refusal(path).startswith(f'{path} cannot be used (unable to open database file): ')


def test_a_folder_that_cannot_be_made_is_refused(path):
    path.write_bytes(b'')
    with pytest.raises(CheckpointError) as error:
        TileStore(path / 'below' / 'map', IDENTITY)
    assert str(error.value).startswith(f'{path / "below" / "map"} cannot be used ([Errno ')


def test_an_identity_that_is_not_json_makes_no_file(path):
    with pytest.raises(TypeError):
        TileStore(path, {'geometry': object()})
    assert not path.exists()


# Damaged -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'size', [2, 17, 61, 97, 101, 509, 4093, 4096, 4099, 16_381, 32_768, -4096]
)
def test_a_truncated_file_is_refused(closed, size):
    closed.write_bytes(closed.read_bytes()[:size])
    assert 'is damaged, or no store wrote it' in refusal(closed)


def test_a_flipped_byte_is_never_taken_for_what_was_written(closed):
    with TileStore(closed, IDENTITY) as store:
        store.write({(3, i): bytes([i]) * 53 for i in range(31)})
        expected, extra = content(store)
    data, wrong = closed.read_bytes(), []
    for position in [*range(0, 100, 11), *range(101, len(data), 1009)]:
        for flip in (1, 128):
            damaged = bytearray(data)
            damaged[position] ^= flip
            closed.write_bytes(damaged)
            try:
                with TileStore(closed, IDENTITY) as store:
                    found = content(store)
                if not (found[0].items() <= expected.items() and found[1] == extra):
                    wrong.append(position)
            except CheckpointError:
                continue
    assert not wrong


def test_a_flipped_byte_of_a_tile_is_refused_by_name(closed):
    data = bytearray(closed.read_bytes())
    position = data.find(TILES[1, -5, 7][20_000:20_064])
    assert position > 0
    data[position] ^= 1
    closed.write_bytes(data)
    with TileStore(closed, IDENTITY) as store:
        with pytest.raises(CheckpointError) as error:
            store.read([(0, 2, -3), (1, -5, 7)])
        assert str(error.value) == (
            f'{closed}: tile (1, -5, 7) is damaged, or no store wrote it (missing, or its '
            'checksum differs): use a copy of it, or another store'
        )
        assert store.read([(0, 2, -3)]) == [TILES[0, 2, -3]]  # the others can be had
        store.write({(1, -5, 7): b'new'})
        assert store.read([(1, -5, 7)]) == [b'new']


@pytest.mark.parametrize(
    'change',
    [
        'content = NULL',
        "content = 'text'",
        'checksum = NULL',
        'checksum = checksum + 1',
        '(checksum, content) = (SELECT checksum, content FROM tiles WHERE length(content) = 4)',
    ],
)
def test_a_row_that_was_changed_is_refused_by_name(closed, change):
    edit(closed, (f'UPDATE tiles SET {change} WHERE length(content) > 4096',))
    with TileStore(closed, IDENTITY) as store:
        assert sorted(store.keys()) == sorted(TILES)
        with pytest.raises(CheckpointError, match=r'tile \(1, -5, 7\) is damaged'):
            store.read(store.keys())


def test_a_tile_never_written_is_refused_by_name(store):
    store.write(TILES)
    with pytest.raises(CheckpointError, match=r'tile \(7, 11\) is .* \(missing, or its checksum'):
        store.read([(0, 2, -3), (7, 11)])


@pytest.mark.parametrize(
    ('key', 'name'), [('identity', 'its head'), ('extra', 'what was written beside the tiles')]
)
def test_a_changed_head_is_refused(closed, key, name):
    edit(closed, ("UPDATE meta SET content = '{}' WHERE key = ?", [key.encode()]))
    assert refusal(closed).startswith(f'{closed}: {name} is damaged')


@pytest.mark.parametrize('key', [b'short', 'text', None, 7])
def test_a_key_that_is_none_is_refused(closed, key):
    edit(closed, ("INSERT INTO tiles VALUES (?, 0, x'00')", [key]))
    assert f'({key!r} is no key)' in refusal(closed)


def test_file_that_was_removed_or_replaced_is_noticed_until_it_is_back(store, path):
    store.write(TILES)
    store.check()
    aside = path.rename(path.with_name('aside'))
    for replaced in (False, True):
        if replaced:
            path.write_bytes(aside.read_bytes())
        with pytest.raises(CheckpointError, match='was removed or replaced'):
            store.check()
    assert content(store)[0] == TILES, 'it can still be saved elsewhere'
    aside.replace(path)
    store.check()
