"""Saved maps: whole or not at all, by names only, and verified before anything is replaced."""

import fcntl
import functools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save
from test_undo import assert_same_bits, content, field_of, walk

import cmanp_ros
from cmanp_ros import checkpoint, maps
from cmanp_ros.core import CMANP, Lattice, Normalization
from cmanp_ros.core.errors import StateMismatchError
from cmanp_ros.field import NeuralField
from cmanp_ros.maps import Code, MapError, Provenance, StateDirectory
from cmanp_ros.store import TileStore

PROVENANCE = Provenance('map', ((-50.0, -40.0), (50.0, 40.0)), 3_000_000_007, 5_000_000_011)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / 'states'


@pytest.fixture
def directory(folder):
    return StateDirectory(folder, 'map')


def observed(*places, **options):
    """Return a map of some places."""
    field = field_of(window=None, **options)
    for place in places:
        field.observe(*walk(place))
    return field


def refusal(function, *arguments, **options):
    """Return the code and the text with which something is refused."""
    with pytest.raises(MapError) as error:
        function(*arguments, **options)
    return error.value.code, str(error.value)


# Round trips -------------------------------------------------------------------------------------


@pytest.mark.parametrize('places', [(), (0, 1, 2)], ids=['empty', 'full'])
def test_a_map_comes_back_to_the_bit_with_its_provenance(directory, folder, places):
    field = observed(*places)
    path = directory.save(field, 'kitchen-1.old', PROVENANCE)
    assert path == folder / 'kitchen-1.old.safetensors'
    assert directory.names() == ['kitchen-1.old']
    assert [file.name for file in folder.iterdir()] == [path.name]
    found, provenance, file = directory.load('kitchen-1.old', field_of())
    assert file == directory.identity('kitchen-1.old') is not None
    assert directory.identity('kitchen-2') is None
    assert_same_bits(content(found), content(field))
    assert provenance == PROVENANCE


def test_a_message_carries_what_a_file_does():
    field = observed(0, 1)
    found, provenance, _ = maps.from_bytes(maps.to_bytes(field, PROVENANCE), field_of(), '/map')
    assert_same_bits(content(found), content(field))
    assert provenance == PROVENANCE


def test_the_file_says_what_is_in_it(directory):
    field = observed(0, 1)
    path = directory.save(field, 'a', PROVENANCE)
    _, _, header = checkpoint.load_map(path, field.model)
    assert header['robots'] == field.robots
    assert header['weights_hash'] == field.weights_hash
    assert header['extra'] == {
        'frame': 'map',
        'bounds': [[-50.0, -40.0], [50.0, 40.0]],
        'oldest_stamp': 3_000_000_007,
        'newest_stamp': 5_000_000_011,
        'num_observations': 26,
        'num_tiles': field.num_tiles,
        'package_version': cmanp_ros.__version__,
    }


def test_a_map_is_replaced_only_when_asked_for(directory):
    old, new = observed(0), observed(1, 2)
    directory.save(old, 'a', PROVENANCE)
    code, text = refusal(directory.save, new, 'a', PROVENANCE)
    assert code == Code.EXISTS and "'a' is there already: set overwrite" in text
    assert_same_bits(content(directory.load('a', field_of())[0]), content(old))
    directory.save(new, 'a', PROVENANCE, overwrite=True)
    assert_same_bits(content(directory.load('a', field_of())[0]), content(new))


def test_the_stamps_of_maps_and_folds_are_joined():
    empty = Provenance('map', ((0, 0), (1, 1)))
    assert empty.observed(0, 0) == empty
    first = empty.observed(7, 11)
    assert (first.oldest_stamp, first.newest_stamp) == (7, 11)
    later = first.observed(5, 9)
    assert (later.oldest_stamp, later.newest_stamp) == (5, 11)
    assert later.bounds == ((0.0, 0.0), (1.0, 1.0))


def test_a_half_life_is_announced():
    field = observed(0)
    assert maps.summary(field) == f'13 observations in {field.num_tiles} tiles'
    field.half_life_sec = 60.0
    assert 'with a half-life of 60 s: what was saved fades from the moment' in maps.summary(field)


# Taking it over ----------------------------------------------------------------------------------


@pytest.mark.parametrize('paged', [False, True], ids=['in memory', 'with a store'])
def test_a_loaded_map_takes_the_place_of_another_in_the_store_too(directory, tmp_path, paged):
    saved = observed(0, 1, 2)
    x, y = walk(0)
    saved.observe(x + 500.0, y)  # or all tiles fit in memory
    saved.half_life_sec = 10.0
    saved.forget(7.0)
    directory.save(saved, 'a', PROVENANCE)
    field = observed(5, 6, path=tmp_path if paged else None, max_tiles=41 if paged else 2048)
    field.predict(walk(0)[0])
    version = field.version
    field.replace_with(directory.load('a', field)[0])
    assert field.version != version
    assert_same_bits(content(field), content(saved))
    assert_same_bits(content(field), content(saved))
    fresh = field_of(window=None)
    fresh.replace_with(saved)
    for found, expected in zip(field.predict(walk(0)[0]), fresh.predict(walk(0)[0]), strict=True):
        assert abs(found - expected).max() < 20 * 1e-6
    field.observe(*walk(7))
    saved.observe(*walk(7))
    assert_same_bits(content(field), content(saved))
    if paged:
        field.close()
        again = field_of(tmp_path)
        assert_same_bits(content(again), content(saved))
        again.close()


def test_merging_a_saved_map_is_one_map_of_both_and_only_once(directory):
    directory.save(observed(0), 'a', PROVENANCE)
    field, both = observed(1), observed(1, 0)
    field.merge(directory.load('a', field)[0])
    keys, state = field.world.export()
    expected_keys, expected = both.world.export()
    assert keys == expected_keys and field.num_observations == 26
    for name, tensor in state.tensors().items():
        torch.testing.assert_close(tensor, expected.tensors()[name], rtol=1e-9, atol=1e-9)
    before = content(field)
    with pytest.raises(StateMismatchError, match='which would count twice'):
        field.merge(directory.load('a', field)[0])
    assert_same_bits(content(field), before)


def test_a_map_too_large_for_memory_is_saved_from_the_store(directory, tmp_path):
    field = observed(0, 1, 2, path=tmp_path, max_tiles=23)
    assert field.num_tiles > field.num_tiles_in_memory
    directory.save(field, 'a', PROVENANCE)
    assert_same_bits(content(directory.load('a', field_of())[0]), content(observed_like(field)))


def observed_like(field):
    """Return the same map, in memory."""
    other = observed(0, 1, 2)
    other.world.tiles.totals['robots'] = field.robots
    return other


# Names -------------------------------------------------------------------------------------------

BAD_NAMES = [
    '',
    '.a',
    '..',
    '../a',
    '/etc/passwd',
    'a/b',
    'a b',
    'a\n',
    'a\0',
    'ä',
    '$(id)',
    'a' * 65,
]


@pytest.mark.parametrize('name', BAD_NAMES)
def test_a_name_is_no_path(directory, name):
    for code, text in (
        refusal(directory.save, observed(), name, PROVENANCE),
        refusal(directory.load, name, field_of()),
    ):
        assert code == Code.BAD_NAME
        assert text.startswith(f'name {name!r}: expected 1 to 64 of the characters')
    assert directory.names() == []


@pytest.mark.parametrize('name', ['a', '0', '-rf', '_', 'a' * 64, 'A.b-c_9', 'a.safetensors'])
def test_names_are_as_many_as_possible(directory, name):
    directory.save(observed(0), name, PROVENANCE)
    assert directory.names() == [name]
    assert directory.load(name, field_of())[0].num_observations == 13


def test_a_map_that_is_not_there_is_refused_with_those_that_are(directory, folder):
    directory.save(observed(), 'a', PROVENANCE)
    (folder / 'b.safetensors').mkdir()
    os.mkfifo(folder / 'c.safetensors')
    (folder / 'd.safetensors').symlink_to(folder / 'nothing')
    for name in 'bcde':
        assert refusal(directory.load, name, field_of()) == (
            Code.NOT_FOUND,
            f"no map {name!r}: expected one of ['a']",
        )


def test_a_link_leads_to_another_map_here_but_not_outside(directory, folder, tmp_path):
    path = directory.save(observed(0), 'a', PROVENANCE)
    outside = tmp_path / 'outside.safetensors'
    outside.write_bytes(path.read_bytes())
    (folder / 'inside.safetensors').symlink_to(path)
    (folder / 'leads_out.safetensors').symlink_to(outside)
    (folder / 'loop.safetensors').symlink_to('loop.safetensors')
    assert directory.load('inside', field_of())[0].num_observations == 13
    code, text = refusal(directory.load, 'leads_out', field_of())
    assert code == Code.BAD_NAME and 'leads out of state_directory' in text
    assert refusal(directory.load, 'loop', field_of())[0] == Code.FAILED
    before = outside.read_bytes()
    for name in ('leads_out', 'loop'):
        assert refusal(directory.save, observed(), name, PROVENANCE)[0] == Code.EXISTS
        directory.save(observed(), name, PROVENANCE, overwrite=True)
        assert directory.load(name, field_of())[0].num_observations == 0
    assert outside.read_bytes() == before


# What cannot be used -----------------------------------------------------------------------------


def test_every_damage_is_found_before_it_is_used(directory):
    path = directory.save(observed(0), 'a', PROVENANCE)
    data = path.read_bytes()
    for damaged in (
        b'',
        b'not a map',
        data[:1000],
        data[:-1],
        data + b'\0',
        *(data[:i] + bytes([data[i] ^ 4]) + data[i + 1 :] for i in range(9, len(data), 9001)),
    ):
        path.write_bytes(damaged)
        assert refusal(directory.load, 'a', field_of())[0] == Code.DAMAGED


def crafted(data, change):
    """Return other content with a checksum that fits it."""
    length = int.from_bytes(data[:8], 'little')
    metadata = json.loads(data[8 : 8 + length])['__metadata__']
    tensors, header = load(data), json.loads(metadata['header'])
    change(tensors, header)
    digest = checkpoint._digest(tensors, header)
    return save(tensors, metadata | {'header': json.dumps(header), 'sha256': digest})


def break_sums(tensors, _):
    tensors['least_squares.moment'].view(-1)[3] = torch.nan


def break_count(tensors, _):
    tensors['num_observations'] = tensors['num_observations'][1:].contiguous()


def break_type(tensors, _):
    tensors['least_squares.gram'] = tensors['least_squares.gram'].float()


def double_a_tile(tensors, _):
    tensors['key'][0] = tensors['key'][1]


def move_a_tile(tensors, _):
    tensors['key'][0, 1] = -(2**63)


def flatten_keys(tensors, _):
    tensors['key'] = tensors['key'].flatten()


@pytest.mark.parametrize(
    'change',
    [
        break_sums,
        break_count,
        break_type,
        double_a_tile,
        move_a_tile,
        flatten_keys,
        lambda _, header: header.update(num_observations=-1),
        lambda _, header: header.update(num_observations='many'),
        lambda _, header: header.update(robots=[]),
        lambda _, header: header.update(robots=[3]),
        lambda _, header: header.pop('extra'),
        lambda _, header: header['extra'].update(frame=7),
        lambda _, header: header['extra'].update(bounds=3),
        lambda _, header: header['extra'].update(newest_stamp='now'),
    ],
)
def test_content_that_cannot_be_is_refused_though_its_checksum_fits(change):
    data = maps.to_bytes(observed(0), PROVENANCE)
    assert maps.from_bytes(crafted(data, lambda *_: None), field_of(), 'map')
    code, text = refusal(maps.from_bytes, crafted(data, change), field_of(), 'map')
    assert code == Code.DAMAGED and text.startswith('the map')


@pytest.mark.parametrize(
    ('change', 'code'),
    [
        (lambda _, header: header.pop('weights_hash'), Code.OTHER_WEIGHTS),
        (lambda _, header: header.pop('geometry'), Code.OTHER_MAP),
        (lambda _, header: header.update(normalization=None), Code.OTHER_MAP),
    ],
)
def test_content_that_says_nothing_of_its_map_is_of_another(change, code):
    data = crafted(maps.to_bytes(observed(0), PROVENANCE), change)
    assert refusal(maps.from_bytes, data, field_of(), 'map')[0] == code


def test_a_map_of_another_kind_is_refused_and_nothing_is_changed(directory):
    field = field_of()
    directory.save(observed(0), 'a', PROVENANCE)
    lattice, units = field.geometry, field.normalization
    other_model = CMANP(field.model.config).eval().requires_grad_(False)
    for other, code, text in (
        (NeuralField(other_model, lattice, units), Code.OTHER_WEIGHTS, 'folded by weights'),
        (
            NeuralField(field.model, Lattice.of(field.model.config, 3.0), units),
            Code.OTHER_MAP,
            'use the same tile_size',
        ),
        (
            NeuralField(field.model, lattice, Normalization(300.0, 21.0)),
            Code.OTHER_MAP,
            'use the same value_offset and value_scale',
        ),
    ):
        other.observe(*walk(3))
        before, version = content(other), other.version
        found, said = refusal(directory.load, 'a', other)
        assert found == code and text in said and "the map 'a'" in said
        assert_same_bits(content(other), before)
        assert other.version == version


def test_a_map_in_another_frame_is_refused(folder):
    StateDirectory(folder, 'odom').save(
        observed(0), 'a', Provenance('odom', ((0, 0), (1, 1)), 1, 2)
    )
    code, text = refusal(StateDirectory(folder, 'map').load, 'a', field_of())
    assert code == Code.OTHER_MAP and "in the frame 'odom', this map in 'map'" in text


def test_a_map_that_is_too_large_is_not_read(directory, folder):
    size = directory.save(observed(0), 'a', PROVENANCE).stat().st_size
    assert StateDirectory(folder, 'map', size).load('a', field_of())
    assert refusal(StateDirectory(folder, 'map', size - 1).load, 'a', field_of()) == (
        Code.FAILED,
        f"the map 'a' has {size} bytes, at most {size - 1} are read: use a smaller map",
    )


def test_without_a_folder_everything_is_refused(tmp_path):
    (tmp_path / 'file').touch()
    for folder, text in (
        ('', 'state_directory is not set'),
        (None, 'state_directory is not set'),
        (tmp_path / 'file', 'is no folder'),
        (tmp_path / 'file' / 'below', 'is no folder'),
    ):
        directory = StateDirectory(folder, 'map')
        assert directory.names() == []
        for code, said in (
            refusal(directory.save, observed(), 'a', PROVENANCE),
            refusal(directory.load, 'a', field_of()),
        ):
            assert code == Code.NO_DIRECTORY and text in said


def test_a_disk_that_fails_leaves_what_was_there(directory, folder, monkeypatch):
    old = observed(0)
    directory.save(old, 'a', PROVENANCE)

    def fail(*_):
        raise OSError('no space left on device')

    with monkeypatch.context() as patch:
        patch.setattr(os, 'fsync', fail)
        code, text = refusal(directory.save, observed(1), 'a', PROVENANCE, overwrite=True)
    assert code == Code.FAILED and 'no space left on device' in text
    assert [file.name for file in folder.iterdir()] == ['a.safetensors']
    assert_same_bits(content(directory.load('a', field_of())[0]), content(old))


# Kills -------------------------------------------------------------------------------------------

SERVER = """
import os, sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from test_maps import *
fields = [generation(i) for i in range(3)]
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        exec(line)
        os._exit(0)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


@pytest.fixture(scope='module')
def run():
    """Return a function that runs code of this module in a process, and kills it after a time."""
    command = [sys.executable, '-c', SERVER, str(Path(__file__).parent)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as server:

        def run(code, kill_after_sec=None):
            server.stdin.write(f'{code}\n')
            server.stdin.flush()
            process = int(server.stdout.readline())
            if kill_after_sec is not None:
                time.sleep(kill_after_sec)
                os.kill(process, signal.SIGKILL)
            status = int(server.stdout.readline())
            assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL

        yield run
        server.stdin.close()


@functools.cache
def generation(i):
    """Return a map that tells which of some it is."""
    field = observed(*range(i + 1))
    field.world.tiles.totals['robots'] = [f'generation {i}']
    return field


def save_for_ever(folder):
    """Save one map after the other over the same name, until the process is killed."""
    directory, fields = StateDirectory(folder, 'map'), [generation(i) for i in range(3)]
    while True:
        for field in fields:
            directory.save(field, 'a', PROVENANCE, overwrite=True)


def test_after_a_kill_a_file_is_one_of_those_saved_and_nothing_is_left_over(run, folder):
    expected = [content(generation(i)) for i in range(3)]
    StateDirectory(folder, 'map').save(generation(0), 'a', PROVENANCE)
    delays, found, num_leftovers = random.Random(7), set(), 0
    for _ in range(20):
        run(f'save_for_ever({str(folder)!r})', delays.uniform(0.02, 0.15))
        num_leftovers += len(list(folder.iterdir())) - 1
        directory = StateDirectory(folder, 'map')
        assert [file.name for file in folder.iterdir()] == ['a.safetensors']
        loaded = content(directory.load('a', field_of())[0])
        i = int(loaded[1][0][-1])
        assert_same_bits(loaded, expected[i])
        found.add(i)
    assert num_leftovers > 0 and len(found) > 1, 'no kill came in the middle of a save'


def test_what_another_process_is_writing_is_not_removed(folder):
    folder.mkdir()
    with open(folder / '.a.safetensors.x1', 'wb') as file:
        (folder / '.b.safetensors.x2').touch()
        (folder / 'notes.txt').touch()
        fcntl.flock(file, fcntl.LOCK_EX)
        StateDirectory(folder, 'map')
        assert {file.name for file in folder.iterdir()} == {'.a.safetensors.x1', 'notes.txt'}
    StateDirectory(folder, 'map')
    assert [file.name for file in folder.iterdir()] == ['notes.txt']


def load_into_store_and_die(folder, store, moment):
    """Replace the map in a store by a saved one; be killed before or after it is committed."""
    field, put = field_of(Path(store), max_tiles=23), TileStore._put
    if moment == 'before':

        def die(self, table, rows):
            rows = list(rows)
            put(self, table, rows)
            if table == 'tiles' and rows:  # the old ones are removed by now
                os.kill(os.getpid(), signal.SIGKILL)

        TileStore._put = die
    field.replace_with(StateDirectory(folder, 'map').load('a', field)[0])
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize('moment', ['before', 'after'])
def test_a_kill_while_a_map_is_loaded_leaves_one_or_the_other(run, directory, tmp_path, moment):
    directory.save(generation(2), 'a', PROVENANCE)
    field = observed(5, 6, path=tmp_path, max_tiles=23)
    expected = content(field)
    field.close()
    folder = str(tmp_path / 'states')
    run(f'load_into_store_and_die({folder!r}, {str(tmp_path)!r}, {moment!r})')
    again = field_of(tmp_path)
    assert_same_bits(content(again), expected if moment == 'before' else content(generation(2)))
    again.close()


# Services ----------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['SaveState', 'LoadState', 'MergeState'])
def test_the_services_have_the_same_codes(name):
    srv = pytest.importorskip('cmanp_ros.srv', reason='the interfaces are not built')
    response = getattr(srv, name).Response
    values = {key: getattr(response, key) for key in dir(response)}
    constants = {key: value for key, value in values.items() if type(value) is int}
    assert constants == {code.name: code.value for code in Code}


def test_of_maps_set_aside_the_newest_stay(directory, folder):
    assert directory.set_aside('a') is None, 'there is none'
    for hour in range(maps.NUM_ASIDE + 3):
        path = directory.save(observed(0), 'a', PROVENANCE, overwrite=True)
        os.utime(path, (3600 * hour, 3600 * hour))
        aside = directory.set_aside('a')
        assert directory.set_aside('a') == aside, 'once is enough'
        assert (folder / f'{aside}.safetensors').read_bytes() == path.read_bytes()
    hours = [f'a-19700101T{hour:02}0000.000000' for hour in range(3, maps.NUM_ASIDE + 3)]
    assert directory.names() == ['a', *hours]
    assert directory.load(hours[0], observed()).field.num_observations > 0
