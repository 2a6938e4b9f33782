"""Tiles in memory against a plain dict of states: paging is invisible, bit for bit."""

import functools

import pytest
import torch

from cmanp_ros.core import CMANP, CMANPConfig, LeastSquaresConfig
from cmanp_ros.core import state as states
from cmanp_ros.core.errors import ConfigError, InputError
from cmanp_ros.core.tiles import Tiles
from cmanp_ros.store import TileStore

MANY = 1000  # tiles, more than any test makes
KINDS = pytest.mark.parametrize('model', ['field', 'paper'], indirect=True)
STORES = pytest.mark.parametrize('store', ['dict', 'sqlite'], indirect=True)


@functools.cache
def model_of(kind='field'):
    sizes = {'num_latents': 5, 'num_latents_per_block': 7, 'num_blocks': 2, 'num_heads': 3}
    sizes |= {'dim_model': 12, 'dim_feedforward': 13, 'chunk_size': 11}
    memory = LeastSquaresConfig(3, voxels_per_axis=17)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        if kind == 'paper':
            return CMANP(CMANPConfig.paper(1, 2, **sizes)).eval().requires_grad_(False)
        config = CMANPConfig.field(2, 1, least_squares=memory, **sizes)
        return CMANP(config).eval().requires_grad_(False)


@pytest.fixture
def model(request):
    return model_of(getattr(request, 'param', 'field'))


class DictStore:
    """A `core.tiles.Store` in memory that remembers what was read and written."""

    def __init__(self):
        self.rows, self._extra, self.written, self.was_read = {}, {}, [], []

    def __contains__(self, key):
        return key in self.rows

    def keys(self):
        return list(self.rows)

    def read(self, keys):
        self.was_read += keys
        return [self.rows[key] for key in keys]

    def write(self, rows, extra):
        assert all(isinstance(content, bytes) for content in rows.values())
        self.written.append(list(rows))
        self.rows |= rows
        self._extra = dict(extra)

    @property
    def extra(self):
        return dict(self._extra)


@pytest.fixture
def store(request, tmp_path):
    if getattr(request, 'param', 'sqlite') == 'dict':
        yield DictStore()
        return
    with TileStore(tmp_path / 'tiles.db', {'weights_hash': 'of a test'}) as opened:
        yield opened


def key(i):
    return (i % 3, i - 7, 2 * i)


def keys(*numbers):
    return [key(i) for i in numbers]


def random_state(model, n=1):
    """Return states in which no two numbers are the same; of no points that could be folded."""
    empty = model.init_state(n).tensors()
    named = {name: torch.rand_like(tensor.double()) for name, tensor in empty.items()}
    count = named.pop('num_observations')
    return states.from_tensors(named | {'num_observations': (count * 2**40).long()})


def put(tiles, numbers, state):
    tiles.put(tiles.rows(keys(*numbers), create=True), state)


def fill(tiles, model, numbers):
    """Put another random state into each tile, one at a time; return them all."""
    expected = {i: random_state(model) for i in numbers}
    for i, state in expected.items():
        put(tiles, [i], state)
    return expected


def assert_same_bits(found, expected):
    found, expected = found.tensors(), expected.tensors()
    assert found.keys() == expected.keys()
    for name in found:
        assert found[name].dtype == expected[name].dtype
        assert torch.equal(found[name], expected[name]), name


def assert_holds(tiles, expected):
    for i, state in expected.items():
        assert_same_bits(tiles.state(tiles.rows(keys(i))), state)


# In memory ---------------------------------------------------------------------------------------


@KINDS
def test_a_new_tile_is_the_state_of_no_observations(model):
    tiles = Tiles(model, 7)
    assert_same_bits(tiles.state(tiles.rows(keys(1, 2, 3), create=True)), model.init_state(3))


@KINDS
def test_what_is_put_comes_back_in_any_order(model):
    tiles, state = Tiles(model, 11), random_state(model, 5)
    put(tiles, range(5), state)
    order = [3, 0, 4, 0, 1]  # one of them twice
    assert_same_bits(tiles.state(tiles.rows(keys(*order))), states.select(state, order))


def test_putting_a_tile_changes_no_other(model):
    tiles = Tiles(model, 31)
    expected = fill(tiles, model, range(13))
    for i in (0, 5, 12):
        expected[i] = random_state(model)
        put(tiles, [i], expected[i])
    assert_holds(tiles, expected)


def test_a_state_taken_out_is_a_copy(model):
    tiles = Tiles(model, 7)
    expected = fill(tiles, model, [1])
    taken = tiles.state(tiles.rows(keys(1)))
    put(tiles, [1], random_state(model))
    assert_same_bits(taken, expected[1])


def test_a_tile_that_is_nowhere_has_no_row_and_is_not_made(model):
    tiles = Tiles(model, 7)
    fill(tiles, model, [2])
    assert (tiles.rows(keys(1, 2, 3)) >= 0).tolist() == [False, True, False]
    assert len(tiles) == tiles.num_in_memory == 1
    assert key(1) not in tiles and key(2) in tiles and tiles.keys() == keys(2)
    assert tiles.rows([]).shape == (0,)


def test_tensors_grow_with_the_tiles_and_stop_at_the_limit(model):
    tiles = Tiles(model, 53)
    expected, sizes = {}, []
    for i in range(53):
        expected |= fill(tiles, model, [i])
        sizes.append(tiles.nbytes)
        assert tiles.num_in_memory == len(tiles) == i + 1 <= tiles.capacity <= 53
    assert_holds(tiles, expected)
    assert sizes[0] < sizes[-1] == 53 * (model.init_state(1).nbytes + 8)
    fill(tiles, model, range(53, 71))
    assert tiles.nbytes == sizes[-1] and tiles.num_in_memory <= 53


def test_rows_of_different_tiles_are_different(model):
    tiles = Tiles(model, 41)
    for start in range(0, 41, 5):
        tiles.rows(keys(*range(start, min(start + 5, 41))), create=True)
        rows = tiles.rows(tiles.keys()).tolist()
        assert len(set(rows)) == len(rows) == len(tiles)


def test_version_changes_with_the_content_and_only_then(model):
    tiles = Tiles(model, 7)
    fill(tiles, model, [1, 2])
    rows = tiles.rows(keys(1, 2))
    before = tiles.version(rows).tolist()
    assert tiles.version(tiles.rows(keys(1, 2))).tolist() == before
    put(tiles, [2], random_state(model))
    after = tiles.version(rows).tolist()
    assert after[0] == before[0] and after[1] not in before
    tiles.forget(0.5)
    assert not set(tiles.version(tiles.rows(keys(1, 2))).tolist()) & {*before, *after}


def test_a_row_never_repeats_a_version_whatever_tile_is_in_it(model, store):
    tiles, seen = Tiles(model, 2, store), set()
    for i in (0, 1, 2, 0, 1, 2, 0):
        row = tiles.rows(keys(i), create=True)
        seen.add((int(row), int(tiles.version(row))))
    assert len(seen) == 7


def test_no_room_at_all_is_refused(model):
    with pytest.raises(ConfigError, match='max_tiles is 0, expected at least 1'):
        Tiles(model, 0)


def test_states_may_be_changed_outside_of_inference_mode_too(store):
    """The node folds in inference mode; who closes the map need not."""
    model = model_of()
    tiles = Tiles(model, 23, store)
    with torch.inference_mode():
        fill(tiles, model, range(29))
    tiles.forget(0.5)
    tiles.rows(keys(*range(29))[:23])
    tiles.flush()
    assert len(store.keys()) == 29


# Without a store ---------------------------------------------------------------------------------


def test_without_a_store_the_least_recently_used_are_dropped_and_counted(model):
    tiles = Tiles(model, 5)
    expected = fill(tiles, model, range(5))
    tiles.rows(keys(0, 2))  # looking at a tile is using it
    fill(tiles, model, [5])
    assert key(1) not in tiles and tiles.num_dropped == 1
    fill(tiles, model, [6])
    assert key(3) not in tiles and tiles.num_dropped == 2
    assert len(tiles) == tiles.num_in_memory == len(tiles.keys()) == 5
    assert_holds(tiles, {i: expected[i] for i in (0, 2, 4)})


def test_a_dropped_tile_starts_again_empty(model):
    tiles = Tiles(model, 2)
    fill(tiles, model, [0, 1, 2])
    assert tiles.rows(keys(0)).tolist() == [-1]
    assert_same_bits(tiles.state(tiles.rows(keys(0), create=True)), model.init_state(1))
    assert len(tiles) == 2 and tiles.num_dropped == 2


def test_more_than_fit_at_once_are_refused_and_nothing_is_changed(model, store):
    tiles = Tiles(model, 5, store)
    expected = fill(tiles, model, range(5))
    with pytest.raises(ConfigError, match='6 tiles are needed at once, max_tiles is 5'):
        tiles.rows(keys(*range(3, 9)), create=True)
    assert_holds(tiles, expected)
    assert len(tiles) == 5


def test_tiles_that_are_nowhere_take_no_room(model, store):
    tiles = Tiles(model, 3, store)
    expected = fill(tiles, model, range(7))
    found = tiles.rows(keys(0, 1, 2, *range(50, 90)))
    assert (found >= 0).tolist() == [True] * 3 + [False] * 40
    assert_holds(tiles, expected)


def test_what_is_needed_at_once_is_never_evicted_for_the_rest_of_it(model, store):
    tiles = Tiles(model, 7, store)
    expected = fill(tiles, model, range(19))
    for numbers in ([0, 18, 5, 1, 17, 6, 2], [2, 3, 4, 0, 18, 9, 90], [11, 2, 11, 2, 12]):
        rows = tiles.rows(keys(*numbers))
        for i, row in zip(numbers, rows.split(1), strict=True):
            if i in expected:
                assert_same_bits(tiles.state(row), expected[i])


# With a store ------------------------------------------------------------------------------------


@KINDS
@STORES
def test_paging_out_and_back_is_exact_for_many_rounds(model, store):
    tiles = Tiles(model, 5, store)
    expected = fill(tiles, model, range(23))
    for _ in range(3):
        assert_holds(tiles, expected)
        assert tiles.num_in_memory <= 5 and len(tiles) == len(tiles.keys()) == 23
        expected |= fill(tiles, model, [1, 22, 7])
    assert tiles.num_dropped == 0


@KINDS
@STORES
def test_values_that_are_hard_to_write_down_survive_paging(model, store):
    """Sums of no points hold -inf, huge sums all bits of a float64."""
    tiles, state = Tiles(model, 1, store), random_state(model)
    named = {name: tensor * 3.0**70 for name, tensor in state.tensors().items()}
    named['attention.logsumexp'] = torch.full_like(named['attention.logsumexp'], -torch.inf)
    named['num_observations'] = torch.tensor([2**62 + 1])
    state = states.from_tensors(named)
    put(tiles, [0], state)
    put(tiles, [1], random_state(model))
    assert_same_bits(tiles.state(tiles.rows(keys(0))), state)


def run(tiles, model, seed=3):
    """Fold, look, and forget at random; return every tile at the end, with what it holds."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(60):
        some = torch.randperm(17, generator=generator)[:4].tolist()
        rows = tiles.rows(keys(*some), create=True)
        if step % 3 == 0:
            merged = states.merge(tiles.state(rows), random_state(model, 4))
            tiles.put(rows, merged)
        if step % 5 == 0:
            tiles.forget(0.5 + 0.4999 * float(torch.rand(1, generator=generator)))
        if step % 11 == 0:
            tiles.flush()
    return {k: tiles.state(tiles.rows([k])) for k in tiles.keys()}


@STORES
@pytest.mark.parametrize('max_tiles', [4, 5, 13])
def test_paging_is_invisible_among_folding_and_forgetting(model, store, max_tiles):
    torch.manual_seed(5)
    expected = run(Tiles(model, MANY), model)
    torch.manual_seed(5)
    found = run(Tiles(model, max_tiles, store), model)
    assert found.keys() == expected.keys()
    for name in found:
        assert_same_bits(found[name], expected[name])


def test_flush_writes_what_changed_and_nothing_else(model):
    store = DictStore()
    tiles = Tiles(model, 11, store)
    fill(tiles, model, range(7))
    assert store.written == []
    tiles.flush()
    assert [sorted(written) for written in store.written] == [sorted(keys(*range(7)))]
    tiles.flush()
    tiles.rows(keys(*range(7)))  # looking is no change
    tiles.flush()
    assert len(store.written) == 1
    fill(tiles, model, [3, 5])
    tiles.flush()
    assert sorted(store.written[1]) == sorted(keys(3, 5))


def test_eviction_writes_no_tile_that_the_store_has_already(model):
    store = DictStore()
    tiles = Tiles(model, 3, store)
    fill(tiles, model, range(3))
    tiles.flush()
    fill(tiles, model, [3])
    tiles.rows(keys(0, 1, 2))
    tiles.rows(keys(3, 0, 1))
    assert [len(written) for written in store.written] == [3, 1]


def test_only_tiles_out_of_memory_are_read(model):
    store = DictStore()
    tiles = Tiles(model, 3, store)
    fill(tiles, model, range(5))
    tiles.rows(keys(3, 4, 0))
    tiles.rows(keys(0, 3, 4))
    assert store.was_read == keys(0)


@STORES
def test_flush_and_eviction_leave_nothing_of_a_map_behind(model, store, tmp_path):
    tiles = Tiles(model, 5, store)
    expected = fill(tiles, model, range(13))
    tiles.flush()
    again = Tiles(model, 3, store)
    assert len(again) == 13 and again.num_in_memory == 0 and again.keys() == tiles.keys()
    assert_holds(again, expected)


@STORES
def test_totals_survive_reopening(model, store):
    tiles = Tiles(model, 5, store)
    fill(tiles, model, range(7))
    tiles.totals['num_observations'] = 2**40 + 1
    tiles.forget(0.7)
    tiles.forget(0.9)
    tiles.flush()
    assert Tiles(model, 5, store).totals == tiles.totals


def test_forgetting_survives_reopening_though_no_tile_was_touched(model, store):
    tiles = Tiles(model, 5, store)
    fill(tiles, model, range(3))
    tiles.flush()
    tiles.forget(0.7)
    tiles.flush()
    again = Tiles(model, 5, store)
    assert again.totals == tiles.totals
    for i in range(3):
        state = tiles.state(tiles.rows(keys(i)))
        assert_same_bits(again.state(again.rows(keys(i))), state)


def test_clear_starts_with_what_the_store_holds(model, store):
    tiles = Tiles(model, 5, store)
    expected = fill(tiles, model, range(7))
    tiles.flush()
    tiles.clear()
    assert tiles.num_in_memory == 0 and len(tiles) == 7
    assert_holds(tiles, expected)


def test_clear_without_a_store_starts_with_nothing(model):
    tiles = Tiles(model, 5)
    fill(tiles, model, range(5))
    tiles.forget(0.5)
    tiles.totals['num_observations'] = 15
    tiles.clear()
    assert len(tiles) == 0 and tiles.keys() == [] and key(0) not in tiles
    assert tiles.totals == {'num_observations': 0, 'log_fading': 0.0}
    assert_holds(tiles, fill(tiles, model, range(5)))


@pytest.mark.parametrize('numbers', [[0, 6], [6, 0, 5], [0], [6]])
def test_bytes_are_the_same_from_memory_and_from_the_store(model, numbers):
    store = DictStore()
    everything, some = Tiles(model, MANY), Tiles(model, 3, store)
    torch.manual_seed(5)
    fill(everything, model, range(7))
    torch.manual_seed(5)
    fill(some, model, range(7))
    assert key(0) in store and key(6) not in store
    assert some.to_bytes(keys(*numbers)) == everything.to_bytes(keys(*numbers))


# Forgetting --------------------------------------------------------------------------------------


def test_forgetting_is_forgetting_each_state_once_it_is_looked_at(model, store):
    tiles = Tiles(model, 3, store)
    expected = fill(tiles, model, range(7))
    tiles.forget(0.9)
    late = fill(tiles, model, [7])  # it was not there yet
    tiles.forget(0.7)
    for i, factor in [*((i, 0.63) for i in range(7)), (7, 0.7)]:
        found = tiles.state(tiles.rows(keys(i))).tensors()
        state = states.forget((expected | late)[i], factor).tensors()
        for name in found:
            torch.testing.assert_close(found[name], state[name], rtol=1e-12, atol=1e-12)


def test_a_tile_is_faded_once_though_it_is_asked_for_twice(model):
    tiles = Tiles(model, 3)
    expected = fill(tiles, model, [1])
    tiles.forget(0.5)
    rows = tiles.rows(keys(1, 1, 1))
    for row in (*rows.split(1), tiles.rows(keys(1))):
        assert_same_bits(tiles.state(row), states.forget(expected[1], 0.5))


def test_forgetting_by_one_changes_nothing(model):
    tiles = Tiles(model, 3)
    expected = fill(tiles, model, range(3))
    version = tiles.version(tiles.rows(keys(0, 1, 2)))
    tiles.forget(1.0)
    assert torch.equal(tiles.version(tiles.rows(keys(0, 1, 2))), version)
    assert_holds(tiles, expected)


@pytest.mark.parametrize('factor', [0.0, -1.0, 1.5, float('nan')])
def test_a_factor_that_is_none_is_refused_at_once(model, factor):
    tiles = Tiles(model, 3)
    expected = fill(tiles, model, [1])
    with pytest.raises(InputError, match='expected a factor in'):
        tiles.forget(factor)
    assert_holds(tiles, expected)


def test_a_tile_can_be_looked_at_however_long_it_was_left_alone(model, store):
    """After a thousand half-lives the factor of a tile is no float any more."""
    tiles = Tiles(model, 3, store)
    fill(tiles, model, range(5))
    for _ in range(3):
        for _ in range(5):
            tiles.forget(1e-200)
        for i in range(5):
            assert tiles.state(tiles.rows(keys(i))).is_finite()
