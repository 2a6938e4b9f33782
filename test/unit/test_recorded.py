"""Recorded observations become tasks; what is held out is never trained on; what it gained."""

import csv
import pickle

import numpy as np
import pytest
import small_models
import torch
from safetensors.torch import load_file

from cmanp_ros.checkpoint import save_model
from cmanp_ros.core.errors import ConfigError, InputError
from cmanp_ros.recordings import Recording
from cmanp_ros.training import recorded
from cmanp_ros.training.loop import train
from cmanp_ros.training.recipe import Recipe, WorldPrior
from cmanp_ros.training.recorded import RecordedWorlds

N, N_TARGET, TILE_SIZE, OFFSET, SCALE = 997, 5, 3.0, 400.0, 300.0  # five blocks of 50 and more


def seeded(seed=3):
    return torch.Generator().manual_seed(seed)


def a_track(n=N, dim_x=2):
    """Return a winding track [m]; the value of each observation is its number."""
    rng = np.random.default_rng(0)
    heading = np.cumsum(0.3 * rng.normal(size=(n, dim_x)), 0)
    x = np.cumsum(0.5 * heading / np.linalg.norm(heading, axis=1, keepdims=True), 0)
    return 1e6 + x, np.arange(n, dtype=float)


def recorded_worlds(n=N, dim_x=2, **options):
    return RecordedWorlds(*a_track(n, dim_x), TILE_SIZE, OFFSET, SCALE, N_TARGET, **options)


def numbers(y):
    """Return which observations values in model units are."""
    found = y[:, 0].double() * SCALE + OFFSET
    assert (found - found.round()).abs().max() < 1e-2 if len(found) else True
    return found.round().long()


def draw(worlds, seed, max_context=31, dim_x=2):
    task = worlds(seeded(seed), max_context, N_TARGET, dim_x)
    return task, numbers(task.y_context), numbers(task.y_target)


def in_pieces(number, pieces):
    return any(start <= number < stop for start, stop in pieces)


# Tasks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize('dim_x', [1, 2, 3])
def test_tasks_are_observations_moved_as_one_and_in_the_units_of_the_map(dim_x):
    worlds, (x, _) = recorded_worlds(dim_x=dim_x), a_track(dim_x=dim_x)
    for seed in range(53):
        task, context, target = draw(worlds, seed, dim_x=dim_x)
        assert task.x_target.shape == (N_TARGET, dim_x) and task.y_target.shape == (N_TARGET, 1)
        assert len(task.x_context) == len(task.y_context) <= 31
        number = torch.cat([context, target])
        assert len(set(number.tolist())) == len(number)  # no target is known already
        moved = torch.cat([task.x_context, task.x_target]) - torch.as_tensor(x)[number] / TILE_SIZE
        assert (moved - moved[0]).abs().max() < 1e-6
        assert all(part.dtype == torch.float64 and part.isfinite().all() for part in task)


def test_held_out_tasks_share_no_observation_with_those_trained_on():
    worlds = recorded_worlds()
    seen = {False: set(), True: set()}
    for is_held_out, numbers_seen in seen.items():
        for seed in range(211):
            _, *drawn = draw(worlds.held_out if is_held_out else worlds, seed)
            numbers_seen.update(torch.cat(drawn).tolist())
    assert not seen[True] & seen[False]
    held_out = worlds.held_out.pieces
    assert all(in_pieces(number, held_out) for number in seen[True])
    assert all(in_pieces(number, worlds.pieces) for number in seen[False])
    assert len(seen[True]) > 0.9 * N / 5 and len(seen[False]) > 0.7 * N


@pytest.mark.parametrize('n', [50, 51, 499, 500, 997, 12_345])
def test_every_fifth_block_of_time_is_held_out(n):
    trained_on, held_out = recorded.pieces(n, N_TARGET)
    order = sorted([*trained_on, *held_out])
    assert [start for start, _ in order] == [0, *(stop for _, stop in order[:-1])]
    assert order[-1][1] == n and order[0] not in held_out and order[-1] not in held_out
    lengths = [stop - start for start, stop in held_out]
    assert min(lengths) >= 2 * N_TARGET and max(lengths) - min(lengths) <= 1
    assert abs(sum(lengths) - n / 5) < len(held_out)
    assert len(held_out) == min(max(n // (50 * N_TARGET), 1), 10)


def test_targets_of_a_stretch_come_after_its_context_at_an_even_pace():
    worlds, paces, strides = recorded_worlds(), set(), set()
    for seed in range(211):
        context, target = worlds._stretch(seeded(seed), 13, N_TARGET)
        assert len(context) == 13 and len(target) == N_TARGET and target[0] > context[-1]
        (pace,) = set(context.diff().tolist())
        (stride,) = set(target.diff().tolist())
        assert stride % pace == 0 and target[0] == context[-1] + pace
        whole = (context[0].item(), target[-1].item())
        assert any(all(start <= n < stop for n in whole) for start, stop in worlds.pieces)
        paces.add(pace)
        strides.add(stride // pace)
    assert strides >= {1, 2, 4} and 1 in paces and len(paces) > 3


def test_a_stretch_that_is_longer_than_its_block_has_less_context_and_all_targets():
    worlds = recorded_worlds(50).held_out
    for seed in range(53):
        context, target = worlds._stretch(seeded(seed), 31, N_TARGET)
        assert len(target) == N_TARGET and len(context) <= 5


def test_windows_hold_what_is_around_and_some_are_seen_from_one_side_only():
    worlds, num_one_sided = recorded_worlds(), 0
    for seed in range(101):
        context, target = worlds._window(seeded(seed), 101, N_TARGET)
        assert len(target) == N_TARGET
        x = worlds.x[torch.cat([context, target])]
        assert (x.amax(0) - x.amin(0)).max() < 14
        if len(context) > 2:
            apart = worlds.x[context].mean(0) - worlds.x[target].mean(0)
            spread = worlds.x[target].std(0).norm() + 1e-9
            num_one_sided += bool(apart.norm() > 0.7 * spread)
    assert 5 < num_one_sided < 70


def test_windows_where_few_observations_are_take_the_nearest():
    x, y = a_track()
    worlds = RecordedWorlds(1000 * x, y, 1.0, num_target=N_TARGET)  # tiles that hold one each
    for seed in range(13):
        context, target = worlds._window(seeded(seed), 101, N_TARGET)
        assert len(target) == N_TARGET and len(context) <= N_TARGET
        number = torch.cat([context, target])
        assert number.max() - number.min() < 300


def test_contexts_are_as_often_small_as_large():
    worlds, sizes = recorded_worlds(), []
    for seed in range(401):
        sizes.append(len(draw(worlds, seed, max_context=99)[1]))
    sizes = np.array(sizes)
    assert 0 < (sizes == 0).mean() < 0.15 and sizes.max() <= 99
    position = np.log(np.maximum(sizes, 1)) / np.log(100)
    for low in (0.2, 0.4, 0.6):
        assert abs((position > low).mean() - (1 - low)) < 0.15


def test_the_lattice_lies_anywhere_on_the_recording():
    worlds = recorded_worlds(50)
    for size in (1.0, 9.0):  # [tiles] of the finest and of the coarsest
        place = np.array([draw(worlds, s)[0].x_target[0].numpy() % size for s in range(211)])
        for low in (0.25, 0.5, 0.75):
            assert (np.abs((place < low * size).mean(0) - low) < 0.12).all()


def test_tasks_follow_the_generator_in_another_process_too():
    worlds = recorded_worlds()
    for ours, theirs in ((worlds, pickle.loads(pickle.dumps(worlds))),):
        for one, other in ((ours, theirs), (ours.held_out, theirs.held_out)):
            for first, again in zip(draw(one, 7)[0], draw(other, 7)[0], strict=True):
                assert torch.equal(first, again)
    assert not torch.equal(draw(worlds, 7)[0].x_target, draw(worlds, 8)[0].x_target)


def test_too_few_observations_are_refused_with_how_many_are_needed():
    with pytest.raises(InputError, match='^49 usable observations: expected at least 50 .10 for'):
        recorded_worlds(49)


@pytest.mark.parametrize('size', [0.0, -1.0, float('nan'), float('inf')])
def test_a_tile_size_is_a_positive_length(size):
    with pytest.raises(ConfigError, match='^tile_size is .*, expected a positive length'):
        RecordedWorlds(*a_track(), size)


# Reading -----------------------------------------------------------------------------------------


def write_csv(path, rows):
    path.write_text('\n'.join(['x,y,gas', *(','.join(map(str, row)) for row in rows)]))
    return path


def test_rows_that_are_not_finite_are_left_out_and_counted(tmp_path):
    rows = np.arange(21.0).reshape(7, 3)
    rows[2, 1], rows[5, 2] = np.nan, np.inf
    with Recording(write_csv(tmp_path / 'gas.csv', rows), [':gas']) as recording:
        x, y, every = recorded.read(recording)
    good = [0, 1, 3, 4, 6]
    assert np.array_equal(x, rows[good, :2]) and np.array_equal(y, rows[good, 2:]) and every == 1
    assert recording.losses.points == {'not_finite': 2}


def test_of_a_recording_without_usable_rows_nothing_is_read(tmp_path):
    path = write_csv(tmp_path / 'gas.csv', [[1, 2, 'nan']])
    with Recording(path) as recording, pytest.raises(InputError, match='^no usable observation'):
        recorded.read(recording)


def test_of_a_long_recording_every_so_manieth_observation_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(recorded, 'MAX_POINTS', 7)
    monkeypatch.setattr('cmanp_ros.recordings.tables.NUM_LINES', 3)  # messages of three
    rows = [[n, -n, n] for n in range(101)]
    with Recording(write_csv(tmp_path / 'gas.csv', rows)) as recording:
        _, y, every = recorded.read(recording)
    assert every == 8 and np.array_equal(y[:, 0], np.arange(0, 101, 8))


def test_units_are_typical_whatever_a_few_readings_say():
    rng = np.random.default_rng(0)
    y = 1234.5 + 20 * rng.normal(size=1009)
    y[:20] = 1e9
    offset, scale = recorded.units(y)
    assert abs(offset - 1234.5) < 2.0 and abs(scale - 20) < 2.0
    assert offset == round(offset, 1) and scale == float(f'{scale:.3g}')


def test_units_of_a_field_that_is_flat_nearly_everywhere_are_positive():
    offset, scale = recorded.units(np.where(np.arange(1009) % 101, 5.0, 6.0))
    assert offset == 5.0 and 0.05 < scale < 0.2


def test_a_constant_field_is_refused():
    with pytest.raises(InputError, match='^all 3 values are 0.1: expected a field that varies'):
        recorded.units(np.full(3, 0.1))


# Training ----------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """Return recipe, folder and worlds of a training that went on from a model file."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp('trained')
    config, start = small_models.field(2), folder / 'start.safetensors'
    save_model(small_models.build(config, torch.float32), start)
    recipe = Recipe(
        config,
        WorldPrior(num_batches=3, max_context=11, num_target=N_TARGET),
        steps=5,
        batch_size=2,
        warmup=1,
        learning_rate=1e-2,
        validate_every=2,
        start_from=str(start),
    )
    worlds = recorded_worlds()
    train(recipe, folder, draw=worlds)
    return recipe, folder, worlds


def test_training_draws_its_held_out_tasks_from_what_is_held_out(trained):
    _, folder, worlds = trained
    for name, pieces in (('batches', worlds.pieces), ('held_out', worlds.held_out.pieces)):
        files = sorted((folder / name).glob('*.safetensors'))
        assert len(files) == 3
        for file in files:
            batch = load_file(file)
            targets = numbers(batch['y_target']).tolist()
            context = numbers(batch['point_y']).tolist()
            assert all(in_pieces(number, pieces) for number in targets + context)


def test_the_log_begins_with_what_there_was_before(trained):
    recipe, folder, worlds = trained
    with open(folder / 'log.csv') as file:
        rows = list(csv.DictReader(file))
    assert [row['step'] for row in rows] == ['0', '1', '2', '3', '4', '5']
    assert rows[0]['loss'] == '' and all(row['loss'] for row in rows[1:])
    assert [bool(row['held_out_loss']) for row in rows] == [True, False, True, False, True, True]
    gain = recorded.gain(recipe, folder, worlds)
    assert gain.before == pytest.approx(-float(rows[0]['held_out_loss']), abs=1e-4)
    assert gain.after == pytest.approx(-float(rows[-1]['held_out_loss']), abs=1e-4)
    assert gain.difference == pytest.approx(gain.after - gain.before, abs=1e-6)
    assert gain.num_tasks == 6 and gain.stderr > 0


def test_a_folder_keeps_to_its_data(tmp_path):
    facts = {'sha256': 'abc', 'tile_size': 3.0}
    recorded.keep(tmp_path, facts)
    recorded.keep(tmp_path, facts | {'tile_size': 4.0})  # nothing was trained yet
    recorded.keep(tmp_path, None)
    assert recorded.known(tmp_path) is None
    recorded.keep(tmp_path, facts | {'tile_size': 4.0})
    (tmp_path / 'log.csv').write_text('')
    recorded.keep(tmp_path, facts | {'tile_size': 4.0})
    assert recorded.known(tmp_path)['tile_size'] == 4.0
    with pytest.raises(ConfigError, match=r'on other data: tile_size is 3.0, was 4.0\. Use'):
        recorded.keep(tmp_path, facts)
    with pytest.raises(ConfigError, match='holds a training on recorded data, not on synthetic'):
        recorded.keep(tmp_path, None)


def test_a_folder_of_synthetic_worlds_takes_no_data(tmp_path):
    recorded.keep(tmp_path, None)
    (tmp_path / 'batches').mkdir()
    recorded.keep(tmp_path, None)
    with pytest.raises(ConfigError, match='on synthetic worlds, not on recorded data'):
        recorded.keep(tmp_path, {'sha256': 'abc'})


def test_other_observations_have_another_fingerprint():
    x, y = a_track()
    assert recorded.fingerprint(x, y) == recorded.fingerprint(x.copy(), y)
    y[-1] += 1e-9
    assert recorded.fingerprint(x, y) != recorded.fingerprint(*a_track())
