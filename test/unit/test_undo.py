"""Undo takes back the last seconds to the bit, and a fold that fails leaves every bit."""

import functools

import numpy as np
import pytest
import torch
from small_models import assert_states_close

from cmanp_ros.core import CMANP, CMANPConfig, Lattice, LeastSquaresConfig, Normalization
from cmanp_ros.core import state as states
from cmanp_ros.core.errors import CheckpointError, ConfigError, InputError
from cmanp_ros.field import NeuralField
from cmanp_ros.store import TileStore

WINDOW = 80.0  # [s]: a mark each 10
STORES = pytest.mark.parametrize('paged', [False, True], ids=['in memory', 'paged to a store'])


@functools.cache
def model():
    """Return a model that is small enough to fold hundreds of times."""
    sizes = {'num_latents': 5, 'num_latents_per_block': 7, 'num_blocks': 2, 'num_heads': 3}
    sizes |= {'dim_model': 12, 'dim_feedforward': 13, 'chunk_size': 11}
    memory = LeastSquaresConfig(3, voxels_per_axis=17)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = CMANPConfig.field(2, 1, least_squares=memory, **sizes)
        return CMANP(config).eval().requires_grad_(False)


def field_of(path=None, max_tiles=2048, window=WINDOW):
    lattice = Lattice.of(model().config, 5.0)
    store = None if path is None else path / 'tiles.db'
    units = Normalization(300.0, 20.0)
    field = NeuralField(model(), lattice, units, None, max_tiles, store, window)
    if window is not None:
        field.world.tiles.history.max_tiles = 1000  # more than are copied here
    return field


def make(paged, tmp_path):
    """Return a map that keeps all its tiles in memory, or few of them."""
    return field_of(tmp_path, max_tiles=53) if paged else field_of()


def walk(i, count=13):
    """Return observations (x, y) around the i-th place of a way that crosses itself."""
    generator = np.random.default_rng(i)
    x = np.array([11.0 * np.cos(i), 9.0 * np.sin(2 * i)]) + generator.uniform(-3, 3, (count, 2))
    return x, 300 + 20 * np.sin(x.sum(1) / 7)


def content(field):
    """Return all that a map holds."""
    return field.num_observations, field.robots, *field.world.export()


def assert_same_bits(found, expected):
    assert found[:3] == expected[:3]
    if expected[3] is not None:
        assert_states_close(found[3], expected[3], rtol=0, atol=0)


def drive(field, steps):
    """Mark and observe, ten seconds apart; return what the map was at each mark."""
    seen = {}
    for i in steps:
        seen[i] = content(field)
        field.mark(10.0 * i)
        field.observe(*walk(i))
    return seen


@STORES
@pytest.mark.parametrize(('seconds', 'mark'), [(5, 6), (10, 6), (11, 5), (35, 3), (60, 1)])
def test_the_map_is_to_the_bit_what_it_was_at_the_mark(paged, seconds, mark, tmp_path):
    field = make(paged, tmp_path)
    field.observe(*walk(0))
    seen = drive(field, range(1, 7))
    x = walk(3)[0]
    field.predict(x)  # so that what predictions keep would be stale
    version, held = field.version, field.num_observations
    taken_back, went_back = field.undo(seconds, now=70.0)
    assert (taken_back, went_back) == (held - seen[mark][0], 70.0 - 10.0 * mark)
    assert field.version != version
    assert field.num_tiles == len(seen[mark][2])
    assert_same_bits(content(field), seen[mark])
    expected = field_of(window=None)
    for i in range(mark):
        expected.observe(*walk(i))
    for found, other in zip(field.predict(x), expected.predict(x), strict=True):
        np.testing.assert_allclose(found, other, rtol=0, atol=20 * 1e-6)


@STORES
def test_the_map_goes_on_as_if_what_was_taken_back_had_never_come(paged, tmp_path):
    field = make(paged, tmp_path)
    drive(field, range(6))
    field.undo(25.0, now=60.0)  # 3, 4 and 5
    drive(field, range(7, 10))
    expected = field_of(window=None)
    for i in (0, 1, 2, 7, 8, 9):
        expected.observe(*walk(i))
    expected.world.tiles.totals['robots'] = field.robots
    assert_same_bits(content(field), content(expected))


@STORES
def test_asking_again_takes_back_nothing_more_and_asking_for_more_does(paged, tmp_path):
    field = make(paged, tmp_path)
    seen = drive(field, range(6))
    assert field.undo(15.0, now=60.0) == (26, 20.0)
    assert field.undo(15.0, now=60.0) == (0, 20.0)
    assert_same_bits(content(field), seen[4])
    assert field.undo(45.0, now=60.0) == (39, 50.0)
    assert_same_bits(content(field), seen[1])


@pytest.mark.parametrize('seed', range(3))
def test_any_course_of_events_is_that_of_whole_copies(seed, tmp_path):
    random = np.random.default_rng(seed)
    field, copies, now = make(True, tmp_path), {}, 0.0
    for _ in range(25):
        now += float(random.uniform(10, 25))
        if random.uniform() < 0.3:
            seconds = float(random.uniform(1, 60))
            old = [time for time in copies if time <= now - seconds]
            mark = max(old) if old else min(copies, default=None)
            assert field.undo(seconds, now)[1] == (None if mark is None else now - mark)
            if mark is not None:
                copies = {time: copy for time, copy in copies.items() if time <= mark}
                assert_same_bits(content(field), copies[mark])
        else:
            copies[now] = content(field)
            field.mark(now)
            old = [time for time in copies if time <= now - WINDOW]
            copies = {time: copy for time, copy in copies.items() if time >= max(old, default=0)}
            field.observe(*walk(int(random.integers(5))))
            if random.uniform() < 0.3:
                field.flush()


def test_the_store_holds_what_was_undone_even_if_the_process_ends_then(tmp_path):
    field = make(True, tmp_path)
    seen = drive(field, range(6))
    field.flush()
    field.undo(25.0, now=60.0)
    field._store.close()  # no flush
    again = field_of(tmp_path)
    assert_same_bits(content(again), seen[3])
    assert again.num_tiles == len(seen[3][2])
    again.close()


def test_an_undo_that_cannot_be_written_changes_nothing(tmp_path, monkeypatch):
    field = make(True, tmp_path)
    seen = drive(field, range(6))
    before = content(field)

    def fail(*_):
        raise CheckpointError('no space left')

    with monkeypatch.context() as patch:
        patch.setattr(TileStore, 'write', fail)
        with pytest.raises(CheckpointError, match='no space left'):
            field.undo(25.0, now=60.0)
    assert_same_bits(content(field), before)
    assert field.undo(25.0, now=60.0) == (39, 30.0)
    assert_same_bits(content(field), seen[3])


def test_an_undo_at_the_moment_of_its_mark_changes_the_map():
    field = field_of()
    field.mark(10.0)
    field.observe(*walk(0))
    version = field.version
    assert field.undo(5.0, now=10.0) == (13, 0.0)
    assert field.version != version


def test_before_the_first_mark_nothing_is_taken_back():
    field = field_of()
    field.observe(*walk(0))
    before, version = content(field), field.version
    assert field.undo(10.0, now=60.0) == (0, None)
    assert field.version == version
    assert_same_bits(content(field), before)


def test_further_back_than_is_kept_it_goes_to_the_oldest_mark():
    field = field_of()
    seen = drive(field, range(6))
    assert field.undo(1e6, now=60.0) == (6 * 13, 60.0)
    assert_same_bits(content(field), seen[0])


def test_marks_close_together_are_one_and_old_ones_go():
    field = field_of()
    for i in range(1000):
        field.mark(i * 1.0)
    times = [mark.time for mark in field.world.tiles.history._marks]
    assert times == [910.0 + 10 * i for i in range(9)]
    assert field.undo(WINDOW, now=999.0) == (0, 89.0)


def test_a_tile_is_copied_once_between_two_marks_and_a_new_one_not_at_all():
    field = field_of()
    size = field.tile_nbytes + 8  # and how far it is faded
    history = field.world.tiles.history
    field.mark(0.0)
    field.observe(*walk(0))
    assert history.nbytes == 0
    field.mark(10.0)
    for _ in range(3):
        field.observe(*walk(0))
        assert history.nbytes == field.num_tiles * size
    assert field.state_nbytes >= history.nbytes + field.num_tiles * field.tile_nbytes


def test_copies_are_bounded_and_the_oldest_marks_go_first():
    field = field_of()
    history = field.world.tiles.history
    field.observe(*walk(0))
    history.max_tiles = 3 * field.num_tiles
    held = []
    for i in range(7):
        field.mark(10.0 * i)
        field.observe(*walk(0))
        held.append(history.nbytes)
    assert held[2] == held[-1] == max(held)
    assert field.undo(1e3, now=70.0) == (3 * 13, 30.0)
    history.max_tiles = 1
    field.observe(*walk(0))
    assert (history.nbytes, field.undo(1e3, now=70.0)) == (0, (0, None))


@STORES
def test_predictions_after_an_undo_are_those_of_before(paged, tmp_path):
    """Also by the hyperparameters that tiles take from others around."""
    field = field_of(tmp_path, max_tiles=300) if paged else field_of()
    for i in range(6):
        field.observe(*walk(i))
    x = np.concatenate([walk(i)[0] for i in range(6)])
    before = field.predict(x)
    field.mark(0.0)
    field.observe(*walk(2))
    field.predict(x)
    assert field.world._solved
    field.undo(5.0, now=6.0)
    assert not field.world._solved, 'hyperparameters would be those of what was taken back'
    for found, expected in zip(field.predict(x), before, strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=20 * 1e-5)  # single precision


def test_without_a_window_nothing_is_kept_and_asking_says_so():
    field = field_of(window=None)
    field.mark(0.0)
    field.observe(*walk(0))
    field.mark(1.0)
    field.observe(*walk(0))
    assert field.world.tiles.history is None
    with pytest.raises(InputError, match='undo is off: set undo_window'):
        field.undo(1.0, now=2.0)


@pytest.mark.parametrize('seconds', [0.0, -1.0, np.nan, np.inf])
def test_the_time_must_be_positive(seconds):
    with pytest.raises(InputError, match=r'undo .* s: expected a positive time'):
        field_of().undo(seconds, now=2.0)
    with pytest.raises(ConfigError, match='expected a positive time'):
        field_of(window=seconds)


# Across other changes ----------------------------------------------------------------------------


@STORES
def test_a_merge_is_taken_back(paged, tmp_path):
    field, other = make(paged, tmp_path), field_of()
    field.observe(*walk(0))
    other.observe(*walk(1))
    before = content(field)
    field.mark(0.0)
    field.merge(other)
    assert len(field.robots) == 2
    assert field.undo(1.0, now=2.0) == (13, 2.0)
    assert_same_bits(content(field), before)
    field.merge(other)


@STORES
def test_reset_and_load_begin_a_new_history(paged, tmp_path):
    field, other = make(paged, tmp_path), field_of()
    drive(field, range(3))
    own = field.robots
    field.reset()
    assert (field.num_observations, field.robots) == (0, own)
    assert field.undo(10.0, now=40.0) == (0, None)
    drive(field, range(5, 7))
    other.observe(*walk(1))
    field.replace_with(other)
    assert field.undo(10.0, now=80.0) == (0, None)
    assert_same_bits(content(field), content(other))


@STORES
def test_what_is_forgotten_meanwhile_stays_forgotten(paged, tmp_path):
    fields = make(paged, tmp_path), field_of(window=None)
    for field in fields:
        field.half_life_sec = 30.0
        field.observe(*walk(0))
        field.mark(0.0)
        field.forget(10.0)
    fields[0].observe(*walk(0))
    fields[0].observe(*walk(1))
    for field in fields:
        field.forget(20.0)
    fields[0].undo(1.0, now=30.0)
    (count, _, keys, state), (other_count, _, other_keys, other) = map(content, fields)
    assert (count, keys) == (other_count, other_keys)
    assert_states_close(state, other, rtol=1e-13, atol=1e-13)


# A fold that fails -------------------------------------------------------------------------------


@STORES
@pytest.mark.parametrize(
    ('name', 'value'),
    [
        ('attention.logsumexp', np.nan),
        ('attention.logsumexp', np.inf),
        ('attention.mean_value', -np.inf),
        ('least_squares.gram', np.nan),
        ('least_squares.moment', np.inf),
    ],
)
def test_a_fold_whose_sums_are_not_finite_leaves_every_bit(paged, name, value, tmp_path):
    field = make(paged, tmp_path)
    field.observe(*walk(0))
    tiles = field.world.tiles
    broken = (field.geometry.num_levels - 1, 0, 0)  # that the most points fall into: the last
    tensors = tiles.state_of([broken]).tensors()
    tensors[name].view(-1)[3] = value  # as a fault of the memory would do it
    tiles.put(tiles.rows([broken]), states.from_tensors(tensors))
    before = dict(zip(tiles.keys(), tiles.to_bytes(tiles.keys()), strict=True))
    version, totals = field.version, dict(tiles.totals)
    x, y = walk(0, count=101)
    elsewhere = np.random.default_rng(0).uniform(-60, 60, (29, 2))
    with pytest.raises(InputError, match='is not finite after the fold') as error:
        field.observe(np.concatenate([x, elsewhere]), np.concatenate([y, np.full(29, 300.0)]))
    assert error.value.reason == 'not_finite_state' and name in str(error.value)
    assert tiles.keys() == list(before) and len(tiles) == len(before)
    assert tiles.to_bytes(list(before)) == list(before.values())
    assert (field.version, tiles.totals) == (version, totals)
    field.observe(elsewhere[:5] + 1000, np.full(5, 300.0))  # far from it, the map goes on
