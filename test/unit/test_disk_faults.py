"""A disk that fails costs what could not be done, a kill at any time what came last, no more."""

import numpy as np
import pytest
from small_models import assert_states_close
from test_undo import assert_same_bits, content, field_of, walk

from cmanp_ros.core.errors import CheckpointError
from cmanp_ros.store import TileStore

FEW = 35  # tiles in memory: fewer than the map has, more than one fold touches
FEWER = 9  # fewer than one fold touches


def fail(*_):
    raise CheckpointError('no space left')


def two_maps(path, max_tiles):
    """Return a map whose tiles are paged to a store, and its like with a store of its own."""
    paged, whole = field_of(path / 'one', max_tiles), field_of(path / 'other', max_tiles)
    whole.world.tiles.totals['robots'] = paged.robots
    return paged, whole


def driven(path, max_tiles, steps=6):
    """Return two such maps that saw the same."""
    paged, whole = two_maps(path, max_tiles)
    for i in range(steps):
        paged.observe(*walk(i))
        whole.observe(*walk(i))
    assert paged.num_tiles_in_memory < paged.num_tiles
    return paged, whole


def goes_on(paged, whole, i=77):
    """Compare both after another fold."""
    for field in (paged, whole):
        field.observe(*walk(i))
    assert_same_bits(content(paged), content(whole))
    assert paged.num_tiles == whole.num_tiles


@pytest.mark.parametrize('max_tiles', [FEWER, FEW])
def test_a_read_that_fails_costs_no_tile(max_tiles, tmp_path, monkeypatch):
    paged, whole = driven(tmp_path, max_tiles)
    x = np.concatenate([walk(i)[0] for i in range(6)])
    with monkeypatch.context() as patch:
        patch.setattr(TileStore, 'read', fail)
        for _ in range(2):
            with pytest.raises(CheckpointError, match='no space left'):
                paged.predict(x)
            with pytest.raises(CheckpointError, match='no space left'):
                paged.observe(x, np.full(len(x), 300.0))
    assert_same_bits(content(paged), content(whole))
    goes_on(paged, whole)
    paged.close()


@pytest.mark.parametrize('max_tiles', [FEWER, FEW])
def test_a_fold_that_cannot_be_written_leaves_every_bit(max_tiles, tmp_path, monkeypatch):
    paged, whole = driven(tmp_path, max_tiles)
    version = paged.version
    for i in range(20, 40):
        try:
            with monkeypatch.context() as patch:
                patch.setattr(TileStore, 'write', fail)
                paged.observe(*walk(i))
        except CheckpointError:
            continue
        whole.observe(*walk(i))  # some still find room
        version += 1
    assert paged.version == version and whole.num_observations < 13 * 26
    assert_same_bits(content(paged), content(whole))
    goes_on(paged, whole)
    paged.close()


@pytest.mark.parametrize('max_tiles', [FEWER, FEW])
def test_a_merge_that_cannot_be_written_counts_once_when_it_is_tried_again(
    max_tiles, tmp_path, monkeypatch
):
    paged, whole = driven(tmp_path, max_tiles)
    other = field_of()
    for i in range(30, 50):
        other.observe(*walk(i))
    with monkeypatch.context() as patch:
        patch.setattr(TileStore, 'write', fail)
        with pytest.raises(CheckpointError, match='no space left'):
            paged.merge(other)
    assert_same_bits(content(paged), content(whole))
    for field in (paged, whole):
        field.merge(other)
    assert_same_bits(content(paged), content(whole))
    paged.close()


@pytest.mark.parametrize('max_tiles', [FEWER, FEW])
def test_what_a_kill_leaves_is_a_map_that_there_was(max_tiles, tmp_path, monkeypatch):
    """After each write the store is what a map holds that saw the first so many observations."""
    paged, whole = two_maps(tmp_path, max_tiles)
    there_were, written = {0: content(whole)}, []
    write = TileStore.write

    def written_and_seen(store, rows, extra, *remove):
        write(store, rows, extra, *remove)
        if store is paged._store:
            tiles = dict(zip(store.keys(), store.read(store.keys()), strict=True))
            written.append((extra['num_observations'], tiles))

    monkeypatch.setattr(TileStore, 'write', written_and_seen)
    for i in range(9):
        paged.observe(*walk(i))
        whole.observe(*walk(i))
        there_were[whole.num_observations] = content(whole)
        content(paged)  # which pages, too
    other = field_of()
    for i in range(30, 40):
        other.observe(*walk(i))
    for field in (paged, whole):
        field.merge(other)
    there_were[whole.num_observations] = content(whole)
    paged.flush()
    assert len({count for count, _ in written}) > 3
    for count, tiles in written:
        _, _, keys, state = there_were[count]
        assert sorted(tiles) == keys
        found = field_of()
        found.world.tiles._restore(tiles)
        if keys:
            assert_states_close(found.world.export()[1], state, rtol=0, atol=0)
    paged.close()


def test_folds_of_more_tiles_than_fit_write_the_others_too_and_what_has_faded(tmp_path):
    """Small folds stay in memory until a large one goes to the store with them."""
    paged, whole = field_of(tmp_path, FEWER), field_of()
    for field in (paged, whole):
        field.half_life_sec = 10.0
    (x, y), elsewhere = walk(0, count=1), np.array([[60.0, 60.0]])
    for field in (paged, whole):
        field.observe(x, y)
        field.forget(5.0)
        field.observe(*walk(1))
        field.forget(7.0)
        field.observe(elsewhere, np.array([310.0]))
        field.observe(*walk(2))
    assert not paged.world.tiles._dirty.any(), 'the large fold has written all'
    paged._store.close()  # no flush
    again = field_of(tmp_path)
    count, _, keys, state = content(again)
    expected = content(whole)
    assert (count, keys) == (expected[0], expected[2])
    assert_states_close(
        state, expected[3], rtol=1e-4, atol=1e-5
    )  # other batches, single precision
    again.close()


def test_tiles_beside_a_fold_of_more_than_fit_are_solved_anew(tmp_path):
    field = field_of(tmp_path, FEW)
    field.observe(*walk(0))
    field.predict(walk(0)[0])
    before = field.world.tiles.num_changes
    x = np.random.default_rng(0).uniform(-40, 40, (200, 2))
    field.observe(x, np.full(len(x), 300.0))
    assert field.num_tiles > FEW and field.world.tiles.num_changes > before


def test_a_map_that_was_reset_is_the_same_robots_whenever_the_process_ends(tmp_path):
    field = field_of(tmp_path)
    field.observe(*walk(0))
    field.flush()
    field.reset()
    field._store.close()  # no flush
    again = field_of(tmp_path)
    assert (again.robots, again.num_observations) == (field.robots, 0)
    again.close()


def test_a_store_that_cannot_be_written_is_closed_all_the_same(tmp_path, monkeypatch):
    field = field_of(tmp_path)
    field.observe(*walk(0))
    with monkeypatch.context() as patch:
        patch.setattr(TileStore, 'write', fail)
        with pytest.raises(CheckpointError, match='no space left'):
            field.close()
    again = field_of(tmp_path)  # it is not open elsewhere
    assert again.num_observations == 0
    again.close()
