"""Where to measure next: what is uncertain first, then what is near, and never twice one spot."""

import numpy as np
import pytest

from cmanp_ros.planning import MAX_POINTS, OBSTACLE, Track, is_free, next_best_views

WIDTH, HEIGHT = 13, 11
X = np.stack(np.meshgrid(np.arange(WIDTH), np.arange(HEIGHT)), -1).reshape(-1, 2).astype(float)
HERE = np.array([2.0, 3.0])


def chosen(stddev, num_views=1, distance_weight=0.0, spacing=0.0, x=X):
    """Return the locations chosen from where the robot is."""
    return x[next_best_views(x, stddev, HERE, num_views, distance_weight, spacing)]


def at(x, y):
    """Return the index of a location."""
    return y * WIDTH + x


def test_most_uncertain_comes_first_when_the_way_does_not_matter():
    stddev = np.ones(len(X))
    stddev[[at(12, 10), at(2, 4), at(7, 0)]] = 5.0, 3.0, 2.0
    np.testing.assert_array_equal(chosen(stddev, 3), [[12, 10], [2, 4], [7, 0]])


def test_of_equal_uncertainty_the_nearest_comes_first():
    np.testing.assert_array_equal(chosen(np.full(len(X), 7.0)), [HERE])


def test_way_is_weighed_against_the_logarithm_of_the_stddev():
    near, far = at(3, 3), at(12, 3)  # 1 m and 10 m away
    stddev = np.full(len(X), 1e-3)
    stddev[near], stddev[far] = 1.0, 3.0
    indifferent = np.log(3.0) / (10 - 1)
    np.testing.assert_array_equal(chosen(stddev, 1, indifferent * 0.99), X[[far]])
    np.testing.assert_array_equal(chosen(stddev, 1, indifferent * 1.01), X[[near]])


def test_unit_of_the_field_does_not_matter():
    stddev = np.random.default_rng(0).uniform(0.1, 2.0, len(X))
    np.testing.assert_array_equal(chosen(stddev, 5, 0.1, 3), chosen(1e6 * stddev, 5, 0.1, 3))


@pytest.mark.parametrize('spacing', [2.0, 3.5, 5.0])
def test_places_are_apart_and_each_is_the_best_that_is_left(spacing):
    stddev = np.random.default_rng(1).uniform(1.0, 2.0, len(X))
    places = chosen(stddev, 7, 0.05, spacing)
    gain = np.log(stddev) - 0.05 * np.linalg.norm(X - HERE, axis=1)
    for index, place in enumerate(places):
        distance = np.linalg.norm(X[:, None] - places[:index], axis=-1)
        is_left = (distance >= spacing).all(1)
        np.testing.assert_array_equal(place, X[is_left][gain[is_left].argmax()])
    assert len(places) > 1


def test_there_are_fewer_when_no_more_are_apart():
    assert len(chosen(np.ones(len(X)), 5, spacing=100.0)) == 1
    assert len(chosen(np.ones(3), 5, x=X[:3])) == 3
    assert len(chosen(np.zeros(0), 5, x=X[:0])) == 0
    assert len(chosen(np.ones(len(X)), 0)) == 0


@pytest.mark.parametrize('nothing', [np.nan, np.inf, 0.0, -1.0])
def test_cells_without_a_positive_finite_stddev_are_left_out(nothing):
    stddev = np.full(len(X), nothing)
    stddev[at(5, 7)] = 1e-30
    np.testing.assert_array_equal(chosen(stddev, 3), [[5, 7]])


def test_track_keeps_the_whole_way_in_bounded_memory():
    track = Track(0.5)
    for step in range(50 * MAX_POINTS):
        track.add(np.array([0.25 * step, 0.0]))
    x = track.points[:, 0]
    assert len(x) <= MAX_POINTS + 1 and len(x) > MAX_POINTS / 3
    assert x[0] == 0.0 and x[-1] == 0.25 * (50 * MAX_POINTS - 1)
    assert np.diff(x).max() <= 2 * 50 * MAX_POINTS * 0.25 / (len(x) - 2)


def test_track_of_a_parked_robot_does_not_grow():
    track = Track(0.5)
    for angle in np.linspace(0, 50, 997):
        track.add(0.2 * np.array([np.cos(angle), np.sin(angle)]))
    assert len(track.points) == 2
    np.testing.assert_array_equal(track.points[-1], track.newest)


def test_track_can_begin_again():
    track = Track(0.5)
    assert track.points.shape == (0, 2) and track.newest is None
    track.add(np.array([3.0, 7.0]))
    track.clear()
    assert track.points.shape == (0, 2) and track.newest is None


def test_costmap_tells_what_is_free_and_outside_of_it_all_is():
    costs = np.zeros((3, 5), np.int8)
    costs[0, 4], costs[2, 1], costs[1, 1], costs[1, 2] = 100, OBSTACLE, OBSTACLE - 1, -1
    x = np.stack(np.meshgrid(np.arange(-1, 6), np.arange(-1, 4)), -1).reshape(-1, 2) + 0.5
    free = is_free(7.0 + 0.5 * x, (7.0, 7.0), 0.5, costs)
    np.testing.assert_array_equal(x[~free] - 0.5, [[4, 0], [1, 2]])
