"""Metres and field units become model units and back without loss."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cmanp_ros.core import Normalization, OneTile
from cmanp_ros.core.errors import ConfigError

finite = st.floats(-1e7, 1e7)


def to_tile(geometry, x):
    """Return locations (n, dim_x) [m] in the coordinates of the one tile."""
    return geometry.cover(torch.as_tensor(x)).x.numpy()


@st.composite
def normalizations(draw):
    """Draw units of values."""
    return Normalization(draw(finite), draw(st.floats(1e-3, 1e4)))


@st.composite
def bounds(draw):
    """Draw the corners of a workspace of one to three axes."""
    corners = []
    for _ in range(draw(st.integers(1, 3))):
        low = draw(finite)
        corners.append((low, low + draw(st.floats(0.01, 1e6))))
    return tuple(zip(*corners, strict=True))


@given(bounds())
@settings(deadline=None, max_examples=50)
def test_the_longest_axis_becomes_minus_two_to_two(bounds):
    geometry = OneTile(*bounds)
    lower, upper = np.array(geometry.lower), np.array(geometry.upper)
    corners = to_tile(geometry, np.stack([lower, upper]))
    longest = np.argmax(upper - lower)
    np.testing.assert_allclose(corners[:, longest], [-2, 2], rtol=1e-5)
    np.testing.assert_allclose(corners[0], -corners[1], atol=1e-5)  # centered
    assert (np.abs(corners) <= 2 + 1e-5).all()


@given(bounds(), st.data())
@settings(deadline=None, max_examples=50)
def test_all_axes_have_one_scale(bounds, data):
    geometry = OneTile(*bounds)
    step = np.array([data.draw(st.floats(-1, 1)) for _ in range(geometry.dim_x)])
    center = np.add(geometry.lower, geometry.upper) / 2
    meters_per_unit = max(np.subtract(geometry.upper, geometry.lower)) / 4
    step = step * meters_per_unit
    moved = to_tile(geometry, np.stack([center, center + step]))
    expected = np.linalg.norm(step) / meters_per_unit
    distance = np.linalg.norm(moved[1] - moved[0])
    np.testing.assert_allclose(distance, expected, atol=1e-4)


@given(normalizations(), st.lists(finite, min_size=1, max_size=7))
@settings(deadline=None, max_examples=50)
def test_values_round_trip(normalization, values):
    values = np.array(values)
    again = normalization.value_from_model(normalization.value_to_model(values))
    np.testing.assert_allclose(again, values, rtol=1e-9, atol=1e-6)


@given(normalizations())
@settings(deadline=None, max_examples=50)
def test_normalizations_survive_json(normalization):
    assert Normalization(**json.loads(json.dumps(normalization.to_dict()))) == normalization


@given(bounds())
@settings(deadline=None, max_examples=50)
def test_workspaces_survive_json(bounds):
    geometry = OneTile(*bounds)
    assert OneTile(**json.loads(json.dumps(geometry.to_dict()))) == geometry


def test_known_numbers():
    geometry, normalization = OneTile((0, 10), (50, 30)), Normalization(3, 0.5)
    assert geometry.dim_x == 2
    found = to_tile(geometry, [[25, 20], [50, 30], [0, 45]])
    np.testing.assert_allclose(found, [[0, 0], [2, 0.8], [-2, 2]], atol=1e-15)
    np.testing.assert_allclose(normalization.value_to_model([[3.5], [2.0]]), [[1], [-2]])
    np.testing.assert_allclose(normalization.value_from_model([[1], [-2]]), [[3.5], [2.0]])


def test_a_far_origin_costs_no_precision():
    # UTM-like coordinates [m], as float32 they would be off by a quarter of a meter
    geometry = OneTile((4_500_000.0,), (4_500_050.0,))
    steps = to_tile(geometry, 4_500_000 + np.arange(0, 50, 0.001)[:, None])
    assert steps.dtype == np.float64
    np.testing.assert_allclose(np.diff(steps[:, 0]), 0.001 / 12.5, rtol=1e-4)


def test_float32_values_are_computed_in_float64():
    normalization = Normalization(1e6, 1e-3)
    assert normalization.value_to_model(np.float32([[1e6]])).dtype == np.float64
    assert normalization.value_from_model(np.float32([[0.5]]))[0, 0] == 1e6 + 0.0005


def test_contains_is_true_on_the_boundary_and_false_for_nan():
    geometry = OneTile((0, -1), (5, 1))
    x = [[0, -1], [5, 1], [2, 0], [-1e-9, 0], [2, 1.01], [np.nan, 0], [2, np.inf]]
    expected = [True, True, True, False, False, False, False]
    assert geometry.contains(torch.tensor(x, dtype=torch.float64)).tolist() == expected
    assert geometry.contains(torch.empty(0, 2)).shape == (0,)


def test_normalizations_are_frozen_and_equal_by_value():
    one, same = Normalization(2.0, 3.0), Normalization(2, 3)
    assert one == same and hash(one) == hash(same)
    assert one != Normalization(2.0, 4.0) and one != Normalization(0.1, 3.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.value_scale = 2.0


def test_workspaces_are_frozen_and_equal_by_value(without_shape_checks):
    one, same = OneTile((0,), (1,)), OneTile([0.0], np.array([1]))
    assert one == same and hash(one) == hash(same)
    assert one != OneTile((0,), (2,)) and one != OneTile((-1,), (1,))
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.lower = (2.0,)


@pytest.mark.parametrize(
    ('lower', 'upper', 'message'),
    [
        (
            (0, 0),
            (1,),
            'bounds (0, 0) and (1,) have 2 and 1 numbers, expected as many as a location has',
        ),
        ((), (), 'bounds () and () have 0 and 0 numbers, expected as many as a location has'),
        (
            (0, 3),
            (1, 3),
            'bounds (0, 3) and (1, 3): expected finite corners, every lower below its upper [m]',
        ),
        (
            (0, 4),
            (1, 3),
            'bounds (0, 4) and (1, 3): expected finite corners, every lower below its upper [m]',
        ),
        (
            (0,),
            (np.nan,),
            'bounds (0,) and (nan,): expected finite corners, every lower below its upper [m]',
        ),
        (
            (-np.inf,),
            (0,),
            'bounds (-inf,) and (0,): expected finite corners, every lower below its upper [m]',
        ),
    ],
)
def test_bounds_that_cannot_be_used_are_refused(lower, upper, message):
    with pytest.raises(ConfigError) as error:
        OneTile(lower, upper)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ('offset', 'scale'),
    [
        *[(0.0, scale) for scale in (0.0, -1.0, np.inf, np.nan, None, 'x')],
        *[(offset, 1.0) for offset in (np.nan, np.inf, None)],
    ],
)
def test_units_that_cannot_be_used_are_refused(offset, scale):
    with pytest.raises(ConfigError) as error:
        Normalization(offset, scale)
    assert str(error.value) == (
        f'value_offset {offset} and value_scale {scale}: expected a finite number and a '
        'positive one [field units]'
    )
