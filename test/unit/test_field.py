"""NeuralField: numpy in, numpy out, in metres and field units."""

import numpy as np
import pytest
import torch

from cmanp_ros.checkpoint import save_model
from cmanp_ros.core import CMANP, CMANPConfig
from cmanp_ros.core.errors import CheckpointError, ConfigError, InputError, StateMismatchError
from cmanp_ros.field import NOT_FINITE, OK, OUTSIDE, NeuralField

BOUNDS = ((1000.0, -30.0), (1050.0, 10.0))  # [m] far from the origin, not square


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    """Return a small model with random corrections."""
    torch.manual_seed(5)
    model = CMANP(CMANPConfig.field(2, 1, num_blocks=2, num_latents=9, num_latents_per_block=11))
    torch.nn.init.normal_(model.predictor[-1].weight, std=0.05)
    return save_model(model, tmp_path_factory.mktemp('model') / 'small.safetensors')


@pytest.fixture
def load(checkpoint):
    """Return a function that makes an empty map."""

    def load(**kwargs):
        return NeuralField.load(
            checkpoint, **{'bounds': BOUNDS, 'value_offset': 300.0, 'value_scale': 20.0, **kwargs}
        )

    return load


def observations(count, seed=0):
    """Return locations (n, 2) [m] and values (n,) in the workspace."""
    x = np.random.default_rng(seed).uniform(*BOUNDS, (count, 2))
    return x, 300 + 20 * np.sin(x[:, 0] / 7) * np.cos(x[:, 1] / 9)


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
    np.testing.assert_allclose(whole.predict(x)[0], parts.predict(x)[0], rtol=1e-6)


def test_points_that_cannot_be_used_are_counted_and_left_out(load):
    field, clean = load(), load()
    x, y = observations(31)
    clean.observe(x, y)
    bad_x = np.array([[np.nan, 0], [1020, -50], [1010, 0], [1010, 0], [0, 0]])
    bad_y = np.array([300, 300, np.inf, 1e30, np.nan])
    observed = field.observe(np.concatenate([bad_x, x]), np.concatenate([bad_y, y]))
    assert observed.folded == 31
    assert observed.rejected == {'not_finite': 3, 'outside_workspace': 1, 'value_out_of_range': 1}
    np.testing.assert_array_equal(field.predict(x)[0], clean.predict(x)[0])


def test_wrong_shapes_leave_the_map_unchanged(load):
    field = load()
    before = field.state
    for x, y, text in (
        (np.zeros((3, 3)), np.zeros(3), 'x has shape (3, 3), expected (n, 2)'),
        (np.zeros((3, 2)), np.zeros((3, 2)), 'y has shape (3, 2), expected (n, 1)'),
        (np.zeros((3, 2)), np.zeros(4), 'x has 3 rows and y has 4'),
    ):
        with pytest.raises(InputError) as error:
            field.observe(x, y)
        assert text in str(error.value)
    assert field.state is before


def test_empty_map_predicts_the_prior_and_so_does_a_target_outside(load):
    field = load()
    x = np.array([[1025.0, -10.0], [0.0, 0.0], [np.nan, 0.0]])
    assert field.status(x).tolist() == [OK, OUTSIDE, NOT_FINITE]
    mean, stddev = field.predict(x)
    assert mean[0] == mean[1] and stddev[0] == stddev[1]
    assert abs(mean[0, 0] - 300) < 10 and 5 < stddev[0, 0] < 60
    assert np.isnan(mean[2, 0]) and np.isnan(stddev[2, 0])
    field.observe(*observations(59))
    assert field.predict(x)[1][1] == stddev[1], 'the prior outside does not change'


def test_joint_prediction_agrees_with_the_marginals(load):
    field = load()
    field.observe(*observations(61))
    x = np.concatenate([observations(13, seed=2)[0], [[0.0, 0.0]]])
    mean, stddev, covariance = field.predict_joint(x)
    np.testing.assert_allclose(mean, field.predict(x)[0])
    np.testing.assert_allclose(np.sqrt(np.diag(covariance[0])), stddev[:, 0])
    assert np.linalg.eigvalsh(covariance[0]).min() > 0
    assert not covariance[0, -1, :-1].any(), 'outside is independent'


def test_samples_with_one_seed_are_one_field(load):
    field = load()
    field.observe(*observations(61))
    x = observations(17, seed=3)[0]
    whole = field.sample(x, 7, seed=11)
    assert whole.shape == (7, 17, 1)
    np.testing.assert_allclose(whole[:, 5:9], field.sample(x[5:9], 7, seed=11))
    assert np.abs(whole - field.sample(x, 7, seed=12)).max() > 0.1


def test_merge_equals_one_map_with_all_observations(load):
    (xa, ya), (xb, yb) = observations(43), observations(71, seed=4)
    a, b, both = load(), load(), load()
    a.observe(xa, ya)
    b.observe(xb, yb)
    both.observe(np.concatenate([xa, xb]), np.concatenate([ya, yb]))
    a.merge(b)
    assert a.num_observations == 114
    for merged, joint in zip(a.predict(xa), both.predict(xa), strict=True):
        np.testing.assert_allclose(merged, joint, rtol=1e-6)


def test_merge_of_maps_that_do_not_fit_says_why_and_changes_nothing(load):
    field = load()
    before = field.state
    with pytest.raises(StateMismatchError, match='use the same bounds'):
        field.merge(load(value_offset=1.0))
    other = NeuralField.load(bounds=BOUNDS)
    with pytest.raises(StateMismatchError, match='use one checkpoint for both'):
        field.merge(other)
    assert field.state is before


def test_restored_map_predicts_bit_for_bit_what_was_saved(load, checkpoint, tmp_path):
    field = load()
    field.observe(*observations(53))
    path = tmp_path / 'map.safetensors'
    field.save(path, frame='map')
    restored = NeuralField.restore(path, checkpoint)
    assert restored.normalization == field.normalization
    x = observations(19, seed=5)[0]
    for saved, loaded in zip(field.predict(x), restored.predict(x), strict=True):
        np.testing.assert_array_equal(saved, loaded)
    with pytest.raises(CheckpointError, match='load it with the checkpoint that made it'):
        NeuralField.restore(path)


def test_reset_gives_the_prior_and_size_never_changes(load):
    field = load()
    x, y = observations(211)
    prior, size = field.predict(x), field.state_nbytes
    field.observe(x, y)
    assert field.state_nbytes == size
    field.reset()
    assert field.num_observations == 0
    np.testing.assert_array_equal(field.predict(x), prior)


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


@pytest.mark.parametrize(
    ('arguments', 'error', 'text'),
    [
        ({'bounds': ((0, 0, 0), (1, 1, 1))}, ConfigError, 'locations of 2'),
        ({'bounds': ((0, 0), (1, 0))}, ConfigError, 'every lower below its upper'),
        ({'value_scale': 0.0}, ConfigError, 'value_scale 0.0'),
        ({'device': 'abacus'}, ConfigError, "'cpu' always can"),
    ],
)
def test_map_that_cannot_be_made_says_why(load, arguments, error, text):
    with pytest.raises(error) as caught:
        load(**arguments)
    assert text in str(caught.value)


def test_unknown_checkpoint_names_those_that_exist():
    with pytest.raises(CheckpointError, match="one of .*'field'"):
        NeuralField.load('feld')
