"""NeuralField: numpy in, numpy out, in metres and field units."""

import numpy as np
import pytest
import torch
from small_models import assert_states_close

from cmanp_ros.checkpoint import save_model
from cmanp_ros.core import CMANP, CMANPConfig, LeastSquaresConfig, Normalization
from cmanp_ros.core.errors import CheckpointError, ConfigError, InputError, StateMismatchError
from cmanp_ros.field import NOT_FINITE, OK, OUTSIDE, NeuralField

BOUNDS = ((1000.0, -30.0), (1050.0, 10.0))  # [m] far from the origin, not square


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    """Return a small model with random corrections."""
    torch.manual_seed(5)
    memory = LeastSquaresConfig(lengths=(0.45, 1.4), noise_ratios=(0.01, 0.2))
    sizes = {'num_blocks': 2, 'num_latents': 9, 'num_latents_per_block': 11}
    model = CMANP(CMANPConfig.field(2, 1, **sizes, least_squares=memory))
    torch.nn.init.normal_(model.predictor[-1].weight, std=0.05)
    return save_model(model, tmp_path_factory.mktemp('model') / 'small.safetensors')


def loader(checkpoint, **options):
    """Return a function that makes an empty map."""
    options = {'bounds': BOUNDS, 'value_offset': 300.0, 'value_scale': 20.0} | options

    def load(**kwargs):
        return NeuralField.load(checkpoint, **options | kwargs)

    return load


@pytest.fixture(params=['tiles', 'one tile'])
def load(request, checkpoint):
    """Return a function that makes an empty map: without a border, or of a workspace."""
    return loader(checkpoint, one_tile=request.param == 'one tile')


@pytest.fixture
def load_tiles(checkpoint):
    return loader(checkpoint)


@pytest.fixture
def load_one_tile(checkpoint):
    return loader(checkpoint, one_tile=True)


def observations(count, seed=0):
    """Return locations (n, 2) [m] and values (n,) in the workspace."""
    x = np.random.default_rng(seed).uniform(*BOUNDS, (count, 2))
    return x, 300 + 20 * np.sin(x[:, 0] / 7) * np.cos(x[:, 1] / 9)


def assert_same_prediction(found, expected):
    """Compare means and stddevs to what float32 can hold, in the network and in covariances."""
    for part, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(part, other, rtol=0, atol=20 * 1e-6)


def test_prediction_near_observations_follows_them_in_field_units(load):
    field = load()
    x, y = observations(601)
    observed = field.observe(x, y)
    assert (observed.folded, observed.rejected) == (601, {})
    assert field.num_observations == 601
    x_target, y_target = observations(83, seed=1)
    mean, stddev = field.predict(x_target)
    assert mean.shape == stddev.shape == (83, 1)
    assert np.sqrt(np.mean((mean[:, 0] - y_target) ** 2)) < 1.0
    assert np.all((stddev > 0) & (stddev < 10))


def test_order_and_chunks_do_not_matter(load):
    x, y = observations(97)
    whole, parts = load(), load()
    whole.observe(x, y)
    for start in (80, 0, 37):
        chunk = slice(start, {80: 97, 0: 37, 37: 80}[start])
        parts.observe(x[chunk], y[chunk])
    assert_same_prediction(parts.predict(x), whole.predict(x))


BAD_X = np.array([[np.nan, 0], [1020, -50], [1010, 0], [1010, 0], [0, 0], [1e30, 0]])
BAD_Y = np.array([300, 300, np.inf, 1e30, np.nan, 300])


def observe_beside_bad_points(field):
    x, y = observations(31)
    return field.observe(np.concatenate([BAD_X, x]), np.concatenate([BAD_Y, y]))


@pytest.mark.parametrize('num', [0, 7, 11, 101])
def test_chunks_hold_each_point_once_and_those_of_a_tile_together(load_tiles, num):
    field, x = load_tiles(), np.random.default_rng(3).uniform(*BOUNDS, (num, 2))
    chunks = field.in_chunks(x, 11)
    assert all(len(chunk) <= 11 for chunk in chunks)
    np.testing.assert_array_equal(np.sort(np.concatenate([[], *chunks])), np.arange(num))
    if num == 101:  # neighbors are nearer than those who only came one after the other
        spread = [np.ptp(x[chunk], axis=0).max() for chunk in chunks]
        assert np.mean(spread) < 0.8 * np.mean(
            [np.ptp(part, 0).max() for part in np.split(x, range(11, 101, 11))]
        )


def test_points_that_cannot_be_used_are_counted_and_left_out(load_one_tile):
    field, clean = load_one_tile(), load_one_tile()
    x, y = observations(31)
    clean.observe(x, y)
    observed = observe_beside_bad_points(field)
    assert observed.folded == field.num_observations == 31
    assert observed.rejected == {'not_finite': 3, 'outside_workspace': 2, 'value_out_of_range': 1}
    np.testing.assert_array_equal(field.predict(x)[0], clean.predict(x)[0])


@pytest.mark.parametrize('kind', [np.float32, np.float64, int, np.int64])
def test_units_of_any_kind_of_number_can_be_saved(checkpoint, tmp_path, kind):
    field = NeuralField.load(checkpoint, BOUNDS, value_offset=kind(300), value_scale=kind(20))
    field.save(tmp_path / 'map.safetensors', stamp=np.int64(3))
    assert NeuralField.restore(tmp_path / 'map.safetensors', checkpoint).normalization == (
        Normalization(300.0, 20.0)
    )
    with pytest.raises(InputError, match='cannot be saved .* expected text, numbers'):
        field.save(tmp_path / 'map.safetensors', stamp=object())
    with pytest.raises(InputError, match='cannot be saved'):
        field.save(tmp_path / 'map.safetensors', stamp={(1, 2): 3})


def test_arrays_of_all_kinds_are_read_as_they_are(load_tiles):
    x, y = observations(31)
    mirrored, read_only = x[::-1], x.copy()
    read_only.setflags(write=False)
    expected, field = load_tiles(), load_tiles()
    expected.observe(x, y)
    field.observe(mirrored, y[::-1])
    assert_same_prediction(field.predict(mirrored), [p[::-1] for p in expected.predict(x)])
    assert_same_prediction(field.predict(read_only), expected.predict(x))
    assert len(field.in_chunks(mirrored, 10)) == 4
    complex_ones = np.ones((3, 2), complex)
    strange = ('a', [[1.0, 2.0], [3.0]], torch.ones(3, 2, requires_grad=True), complex_ones)
    strange += (torch.ones(3, 2, dtype=torch.complex64), [*complex_ones])
    for given in strange:
        with pytest.raises(InputError, match='x cannot be read as numbers'):
            field.predict(given)


@pytest.mark.parametrize('count', [0, 1, 2])
def test_views_of_few_points_are_taken_as_others(load, count):
    x, y = observations(count)
    rows = np.zeros(count, [('x', np.float64, 2), ('y', np.float64), ('ring', np.uint8)])
    rows['x'], rows['y'] = x, y
    for given in (np.ascontiguousarray(x[::-1])[::-1], rows['x']):
        field = load()
        assert field.observe(given, rows['y']).folded == count
        assert len(field.status(given)) == len(field.is_known(given)) == count
        assert len(field.predict(given)[0]) == count and len(field.in_chunks(given, 1)) == count


@pytest.mark.parametrize(
    'bounds', [(0, 50), ((0, 0),), None, ((0, 0), (50, 'x')), ((0, None), (50, 50)), 'ab']
)
def test_bounds_that_are_no_two_corners_are_named(load, bounds):
    with pytest.raises(ConfigError, match=r'^bounds .*expected .* corner.*\[m\]'):
        load(bounds=bounds)


def test_what_is_masked_out_is_not_folded(load_tiles):
    x, y = observations(31)
    expected, field = load_tiles(), load_tiles()
    expected.observe(x[y > 300], y[y > 300])
    observed = field.observe(x, np.ma.masked_where(y <= 300, np.where(y > 300, y, -9999.0)))
    assert observed.rejected == {'not_finite': int((y <= 300).sum())}
    assert_same_prediction(field.predict(x), expected.predict(x))


def test_an_offset_far_beyond_the_relief_costs_nothing():
    rng = np.random.default_rng(0)
    x, found = rng.uniform(*BOUNDS, (300, 2)), []
    y = 20 * np.sin(x[:, 0] / 7) + 0.2 * rng.standard_normal(300)
    for offset in (0.0, 1e3, 1e4, 2e5):  # up to 10,000 value_scale
        field = NeuralField.load(bounds=BOUNDS, value_scale=20.0)
        field.observe(x, y + offset)
        mean, stddev = field.predict(x[:50] + 1.0)
        found.append((mean[:, 0] - offset, stddev[:, 0]))
    for mean, stddev in found[1:]:
        np.testing.assert_allclose(mean, found[0][0], atol=0.1)
        assert 0.9 < stddev.mean() / found[0][1].mean() < 1.1


def test_nothing_is_known_where_nothing_can_be_observed(load):
    field = load()
    assert field.is_known(np.zeros((0, 2))).shape == (0,)
    x, y = observations(31)
    field.observe(x, y)
    assert field.is_known(x).all()
    nowhere = np.array([[np.nan, 0.0], [1e30, 0.0]])
    assert not field.is_known(nowhere).any()
    assert not field.is_known([[900.0, 0.0]]).any()


@pytest.mark.parametrize('given', [{'num_samples': -1}, {'num_samples': 1.5}, {'seed': -1}])
def test_samples_that_cannot_be_drawn_are_refused(load_tiles, given):
    name = next(iter(given))
    with pytest.raises(InputError, match=f'{name} is .*, expected a whole number of at least 0'):
        load_tiles().sample(np.zeros((1, 2)), **{'num_samples': 2} | given)


def test_with_tiles_only_what_no_robot_can_reach_is_outside(load_tiles):
    field, clean = load_tiles(), load_tiles()
    x, y = observations(31)
    clean.observe(np.concatenate([BAD_X[1:2], x]), np.concatenate([BAD_Y[1:2], y]))
    observed = observe_beside_bad_points(field)
    assert observed.folded == field.num_observations == 32
    assert observed.rejected == {'not_finite': 3, 'outside_workspace': 1, 'value_out_of_range': 1}
    x = np.concatenate([x, BAD_X[1:2]])
    np.testing.assert_array_equal(field.predict(x)[0], clean.predict(x)[0])
    assert field.predict(BAD_X[1:2])[1][0, 0] < 20
    assert field.status(BAD_X).tolist() == [NOT_FINITE, OK, OK, OK, OK, OUTSIDE]


def test_wrong_shapes_leave_the_map_unchanged(load):
    field = load()
    before, prior = field.version, field.predict(observations(7)[0])
    for x, y, text in (
        (np.zeros((3, 3)), np.zeros(3), 'x has shape (3, 3), expected (n, 2)'),
        (np.zeros((3, 2)), np.zeros((3, 2)), 'y has shape (3, 2), expected (n, 1)'),
        (np.zeros((3, 2)), np.zeros(4), 'x has 3 rows and y has 4'),
    ):
        with pytest.raises(InputError) as error:
            field.observe(x, y)
        assert text in str(error.value)
    assert field.version == before
    assert field.num_observations == field.num_tiles == 0
    np.testing.assert_array_equal(field.predict(observations(7)[0]), prior)


def test_the_version_changes_with_the_map_and_with_nothing_else(load):
    field, other = load(half_life_sec=10.0), load()
    other.observe(*observations(5))
    x, y = observations(7)
    seen = [field.version]
    for change in (
        lambda: field.observe(x, y),
        lambda: field.forget(3.0),
        lambda: field.merge(other),
        lambda: field.reset(),
    ):
        change()
        seen.append(field.version)
        field.predict(x)
        field.predict_joint(x)
        field.sample(x, 2)
        field.observe(x[:0], y[:0])
        field.observe(x, np.full_like(y, np.nan))
        assert field.version == seen[-1]
    assert len(set(seen)) == 5


def test_tiles_in_memory_have_corners_also_while_there_are_none(load):
    field = load()
    assert field.tiles_in_memory().shape == (0, 2, 2)
    x, y = observations(1)
    field.observe(x, y)
    tiles = field.tiles_in_memory()
    assert ((tiles[:, 0] <= x) & (x <= tiles[:, 1])).all(1).any()


def test_empty_map_predicts_the_prior_and_so_does_a_target_outside(load_one_tile):
    field = load_one_tile()
    x = np.array([[1025.0, -10.0], [0.0, 0.0], [np.nan, 0.0]])
    assert field.status(x).tolist() == [OK, OUTSIDE, NOT_FINITE]
    mean, stddev = field.predict(x)
    assert mean[0] == mean[1] and stddev[0] == stddev[1]
    assert mean[0, 0] == 300 and stddev[0, 0] == 20
    assert np.isnan(mean[2, 0]) and np.isnan(stddev[2, 0])
    field.observe(*observations(59))
    assert field.predict(x)[1][1] == stddev[1], 'the prior outside does not change'


def test_an_empty_map_of_tiles_predicts_the_prior_and_so_does_one_far_from_data(load_tiles):
    field = load_tiles()
    x = np.array([[1025.0, -10.0], [-1e6, 3e6], [1e30, 0.0], [np.nan, 0.0]])
    assert field.status(x).tolist() == [OK, OK, OUTSIDE, NOT_FINITE]
    for known in (False, True):
        mean, stddev = field.predict(x)
        assert (stddev[0, 0] < 20) == known and (mean[0, 0] != 300) == known
        assert mean[1:3, 0].tolist() == [300, 300] and stddev[1:3, 0].tolist() == [20, 20]
        assert np.isnan(mean[3, 0]) and np.isnan(stddev[3, 0])
        field.observe(*observations(59))


def test_joint_prediction_agrees_with_the_marginals(load):
    field = load()
    field.observe(*observations(61))
    x = np.concatenate([observations(13, seed=2)[0], [[0.0, 0.0]]])
    mean, stddev, covariance = field.predict_joint(x)
    np.testing.assert_allclose(mean, field.predict(x)[0])
    np.testing.assert_allclose(stddev, field.predict(x)[1], rtol=1e-5)
    np.testing.assert_allclose(np.sqrt(np.diag(covariance[0])), stddev[:, 0])
    np.testing.assert_allclose(covariance[0], covariance[0].T)
    assert np.linalg.eigvalsh(covariance[0]).min() > 0
    if field.status(x)[-1] == OUTSIDE:
        assert not covariance[0, -1, :-1].any(), 'outside is independent'


def test_joint_prediction_is_not_a_number_where_the_location_is_not(load):
    field = load()
    field.observe(*observations(61))
    x = np.concatenate([[[1010.0, np.nan]], observations(5, seed=2)[0]])
    mean, stddev, covariance = field.predict_joint(x)
    assert np.isnan(mean[0, 0]) and np.isnan(stddev[0, 0])
    assert np.isnan(covariance[0, 0]).all() and np.isnan(covariance[0, :, 0]).all()
    assert np.isfinite(covariance[0, 1:, 1:]).all()


def test_samples_with_one_seed_are_one_field(load):
    field = load()
    field.observe(*observations(61))
    x = observations(17, seed=3)[0]
    whole = field.sample(x, 7, seed=11)
    assert whole.shape == (7, 17, 1)
    np.testing.assert_allclose(whole[:, 5:9], field.sample(x[5:9], 7, seed=11))
    assert np.abs(whole - field.sample(x, 7, seed=12)).max() > 0.1


def test_samples_have_the_mean_and_the_spread_of_the_prediction(load):
    field, count = load(), 4001
    field.observe(*observations(61))
    x = observations(17, seed=3)[0]
    samples = field.sample(x, count, seed=11)[..., 0]
    mean, _, covariance = field.predict_joint(x)
    stddev = samples.std(0)
    assert np.abs((samples.mean(0) - mean[:, 0]) / stddev).max() < 5 / count**0.5
    share = stddev / np.sqrt(np.diag(covariance[0]))
    assert share.max() < 1 + 5 / (2 * count) ** 0.5 and share.min() < 0.9, 'they have no noise'
    found = np.cov(samples.T)
    np.fill_diagonal(found, covariance[0].diagonal())
    error = (found - covariance[0]) / stddev / stddev[:, None]
    assert np.abs(error).max() < 8 / count**0.5


def test_samples_outside_come_from_the_prior(load_one_tile):
    field = load_one_tile()
    field.observe(*observations(61))
    samples = field.sample(np.array([[0.0, 0.0], [1.0, 1.0], [np.nan, 0.0]]), 4001, seed=3)[..., 0]
    assert np.abs(samples[:, :2].mean(0) - 300).max() < 5 * 20 / 4001**0.5
    np.testing.assert_allclose(samples[:, :2].std(0), 20, rtol=0.05)
    assert abs(np.corrcoef(samples[:, :2].T)[0, 1]) < 0.1
    assert np.isnan(samples[:, 2]).all()


def test_merge_equals_one_map_with_all_observations(load):
    (xa, ya), (xb, yb) = observations(43), observations(71, seed=4)
    a, b, both = load(), load(), load()
    a.observe(xa, ya)
    b.observe(xb, yb)
    both.observe(np.concatenate([xa, xb]), np.concatenate([ya, yb]))
    a.merge(b)
    assert a.num_observations == 114
    assert_same_prediction(a.predict(xa), both.predict(xa))


def test_merge_of_maps_that_do_not_fit_says_why_and_changes_nothing(load):
    field = load()
    x, y = observations(23)
    field.observe(x, y)
    before, prediction = field.version, field.predict(x)
    with pytest.raises(StateMismatchError, match='use the same value_offset and value_scale'):
        field.merge(load(value_offset=1.0))
    with pytest.raises(StateMismatchError, match='use the same tile_size, or the same bounds'):
        field.merge(load(bounds=((1000.0, -30.0), (1060.0, 10.0))))
    other = NeuralField.load(bounds=BOUNDS)
    with pytest.raises(StateMismatchError, match='use one checkpoint for both'):
        field.merge(other)
    assert field.version == before
    np.testing.assert_array_equal(field.predict(x), prediction)


def assert_same_tiles(found, expected):
    """Compare two maps bit for bit."""
    assert found.geometry == expected.geometry
    assert found.normalization == expected.normalization
    assert found.num_observations == expected.num_observations
    (keys, state), (other_keys, other) = found.world.export(), expected.world.export()
    assert keys == other_keys
    assert_states_close(state, other, rtol=0, atol=0)


def test_restored_map_holds_bit_for_bit_what_was_saved(load, checkpoint, tmp_path):
    field = load()
    field.observe(*observations(53))
    path = tmp_path / 'map.safetensors'
    field.save(path, frame='map')
    restored = NeuralField.restore(path, checkpoint)
    assert_same_tiles(restored, field)
    x = observations(19, seed=5)[0]
    assert_same_prediction(restored.predict(x), field.predict(x))
    with pytest.raises(CheckpointError, match='load it with the checkpoint that made it'):
        NeuralField.restore(path)


def test_restored_map_of_one_tile_predicts_bit_for_bit_what_was_saved(
    load_tiles, checkpoint, tmp_path
):
    field = load_tiles(one_tile=True)  # tiles may stand in another order in memory, and round
    field.observe(*observations(53))
    path = tmp_path / 'map.safetensors'
    field.save(path)
    restored, x = NeuralField.restore(path, checkpoint), observations(19, seed=5)[0]
    for saved, loaded in zip(field.predict(x), restored.predict(x), strict=True):
        np.testing.assert_array_equal(saved, loaded)


def test_an_empty_map_can_be_saved_and_restored(load, checkpoint, tmp_path):
    path = tmp_path / 'map.safetensors'
    load().save(path)
    restored = NeuralField.restore(path, checkpoint)
    assert restored.num_observations == restored.num_tiles == 0
    assert restored.predict(np.array([[1025.0, -10.0]]))[0] == 300


def test_reset_gives_the_prior_and_the_size_of_a_tile_never_changes(load):
    field = load()
    x, y = observations(211)
    prior, size = field.predict(x), field.tile_nbytes
    field.observe(x, y)
    assert field.num_tiles == field.num_tiles_in_memory > 0
    assert field.tile_nbytes == size
    field.reset()
    assert field.num_observations == field.num_tiles == 0
    assert field.tile_nbytes == size
    np.testing.assert_array_equal(field.predict(x), prior)


def test_memory_does_not_depend_on_how_much_was_observed(load):
    field, sizes = load(), []
    x, y = observations(211)
    for _ in range(3):
        field.observe(x, y)
        field.predict(x)
        sizes.append(field.state_nbytes)
    assert sizes[0] == sizes[1] == sizes[2] > field.tile_nbytes
    assert field.num_tiles_dropped == 0


def test_a_map_in_a_store_is_there_when_it_is_loaded_again(load, tmp_path):
    path, x = tmp_path / 'map.db', observations(19, seed=5)[0]
    field = load(store=path)
    field.observe(*observations(53))
    expected, keys = field.predict(x), field.num_tiles
    field.close()
    again = load(store=path)
    assert (again.num_observations, again.num_tiles) == (53, keys)
    assert again.num_tiles_in_memory == 0
    assert_same_prediction(again.predict(x), expected)
    in_memory = load()
    in_memory.observe(*observations(53))
    assert_same_tiles(again, in_memory)
    again.reset()
    again.close()
    empty = load(store=path)
    assert empty.num_observations == empty.num_tiles == 0
    empty.close()


def test_a_store_of_another_map_is_refused(load, tmp_path):
    load(store=tmp_path / 'map.db').close()
    with pytest.raises(CheckpointError, match='belongs to another map'):
        load(store=tmp_path / 'map.db', value_scale=3.0)


def test_an_offset_told_beforehand_changes_nothing_else(load):
    x, y = observations(211)
    relief = (y - 300) / 20 * 1e-3
    answers = []
    for offset in (0.0, 4000.0):
        field = load(value_offset=offset, value_scale=1e-3)
        field.observe(x, offset + relief)
        mean, stddev = field.predict(observations(83, seed=1)[0])
        answers.append((mean - offset, stddev))
    for found, expected in zip(*answers, strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * 1e-3)


def test_forgotten_observations_lose_to_new_ones(load):
    field = load(half_life_sec=10.0)
    x, y = observations(151)
    field.observe(x, y)
    field.forget(200.0)
    field.observe(x, y + 15.0)
    mean, _ = field.predict(x)
    assert abs((mean[:, 0] - y - 15).mean()) < 2
    with pytest.raises(InputError, match='half_life_sec None'):
        load().forget(1.0)
    with pytest.raises(InputError, match='at least 0'):
        field.forget(-1.0)


@pytest.mark.parametrize('half_lives', [20, 100])
def test_a_forgotten_map_is_about_as_certain_as_an_empty_one(load, half_lives):
    field = load(half_life_sec=10.0, tile_size=7.5)  # tiles that span 11 m
    x, y = observations(151)
    field.observe(x, y)
    field.forget(half_lives * 10.0)
    mean, stddev = field.predict(x)
    assert ((10 < stddev) & (stddev < 40)).all()
    # Relief is forgotten; what stays longest is the mean of what each tile once held.
    assert np.abs(mean - 300).max() < 15 and (np.abs(mean - 300) < stddev).all()


@pytest.mark.parametrize('half_lives', [40, 100, 900, 1100])
def test_a_forgotten_map_is_where_an_empty_one_is_however_far_off_its_values_were(
    load, half_lives
):
    field = load(half_life_sec=10.0, tile_size=7.5)
    x, y = observations(151)
    field.observe(x, y + 5000.0)
    field.forget(half_lives * 10.0)
    mean, stddev = field.predict(x)
    assert np.abs(mean - 300).max() < 15 and ((10 < stddev) & (stddev < 40)).all()


@pytest.mark.parametrize('half_life_sec', [0.0, -1.0, float('nan')])
def test_a_half_life_that_is_none_is_refused(load, half_life_sec):
    with pytest.raises(
        ConfigError, match=f'half_life_sec is {half_life_sec}, expected a positive'
    ):
        load(half_life_sec=half_life_sec)


@pytest.mark.parametrize('checkpoint', ['gp1d_and'])
def test_a_model_that_is_for_no_map_is_refused(checkpoint):
    with pytest.raises(ConfigError, match="such as 'field'"):
        NeuralField.load(checkpoint, bounds=((-2.0,), (2.0,)))


@pytest.mark.parametrize(
    ('arguments', 'error', 'text'),
    [
        ({'bounds': ((0, 0, 0), (1, 1, 1))}, ConfigError, 'locations of 2'),
        ({'bounds': ((0, 0), (1, 0))}, ConfigError, 'every lower below its upper'),
        ({'value_scale': 0.0}, ConfigError, 'value_scale 0.0'),
        ({'device': 'abacus'}, ConfigError, "'cpu' always can"),
        ({'max_tiles': 0}, ConfigError, 'max_tiles is 0, expected at least 1'),
    ],
)
def test_map_that_cannot_be_made_says_why(load, arguments, error, text):
    with pytest.raises(error) as caught:
        load(**arguments)
    assert text in str(caught.value)


@pytest.mark.parametrize('size', [0.0, -1.0, np.inf, np.nan])
def test_tiles_have_a_positive_size(load_tiles, size):
    with pytest.raises(ConfigError) as error:
        load_tiles(tile_size=size)
    assert str(error.value) == f'tile_size is {size}, expected a positive length [m]'


def test_tiles_are_a_tenth_of_the_longest_side_unless_told_otherwise(load_tiles):
    assert load_tiles().geometry.tile_size == 50 / 10
    assert load_tiles(tile_size=3.0).geometry.tile_size == 3.0


def test_unknown_checkpoint_names_those_that_exist():
    with pytest.raises(CheckpointError, match="one of .*'field'"):
        NeuralField.load('feld')
