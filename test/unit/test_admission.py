"""At most one point per voxel is admitted, in bounded memory, whatever the stamps do."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cmanp_ros.admission import Admission, RateLimit

MODEST = settings(deadline=None, max_examples=60)
coordinates = st.floats(-3, 3, width=32)
clouds = st.integers(1, 3).flatmap(
    lambda dim: st.lists(
        hnp.arrays(np.float64, st.tuples(st.integers(0, 11), st.just(dim)), elements=coordinates),
        min_size=1,
        max_size=5,
    )
)
stamps = st.lists(st.integers(-40, 40), min_size=5, max_size=5)


def admitted_one_by_one(messages, stamps, voxel_size, interval):
    """Decide with a dictionary what to admit: the rule, without any array."""
    last, masks = {}, []
    for x, stamp in zip(messages, stamps, strict=False):
        mask, given_now = [], set()
        for point in x:
            voxel = tuple(int(np.floor(value / voxel_size)) for value in point)
            due = voxel not in last or (interval and abs(stamp - last[voxel]) >= interval)
            mask.append(bool(due) and voxel not in given_now)
            if mask[-1]:
                last[voxel] = stamp
                given_now.add(voxel)
        masks.append(mask)
    return masks


@MODEST
@given(clouds, stamps, st.sampled_from([0.5, 0.75, 2.0]), st.sampled_from([0, 7, 23]))
def test_admitted_are_those_of_the_rule(messages, stamps, voxel_size, interval):
    admission = Admission(voxel_size, interval)
    expected = admitted_one_by_one(messages, stamps, voxel_size, interval)
    for x, stamp, mask in zip(messages, stamps, expected, strict=False):
        found = admission.admit(x, stamp)
        assert (found.dtype, found.tolist()) == (np.bool_, mask)


@MODEST
@given(clouds, stamps, st.integers(1, 13))
def test_memory_is_bounded_and_the_newest_voxel_is_remembered(messages, stamps, max_voxels):
    admission = Admission(0.5, max_voxels=max_voxels)
    for x, stamp in zip(messages, stamps, strict=False):
        mask = admission.admit(x, stamp)
        assert len(admission) <= max_voxels
        assert not admission.admit(x[mask][-1:], stamp).any()


def test_older_half_is_forgotten_when_full_though_stamps_go_back():
    admission, x = Admission(1.0, max_voxels=6), np.arange(7.0)[:, None]
    for index in range(7):
        assert admission.admit(x[index : index + 1], -float(index)).all()
    assert len(admission) == 3
    assert admission.admit(x, 0.0).tolist() == [True] * 4 + [False] * 3


def test_voxel_that_gave_a_point_again_is_among_the_newest():
    admission, x = Admission(1.0, revisit_interval=10.0, max_voxels=4), np.arange(5.0)[:, None]
    admission.admit(x[:4], 0.0)
    assert admission.admit(x[:1], 20.0).all()
    admission.admit(x[4:], 20.0)
    assert admission.admit(x, 21.0).tolist() == [False, True, True, True, False]


def test_message_of_more_voxels_than_are_remembered_is_admitted():
    admission, x = Admission(1.0, max_voxels=7), np.arange(100.0)[:, None]
    assert admission.admit(x, 0.0).all()
    assert np.flatnonzero(~admission.admit(x, 0.0)).tolist() == [96, 97, 98, 99]


def test_voxel_gives_a_point_again_after_the_interval_and_from_then_on():
    admission, x = Admission(0.5, revisit_interval=10.0), np.array([[0.1, 0.2, 0.3]])
    found = [admission.admit(x, stamp)[0] for stamp in (100, 109, 110, 111, 119, 120)]
    assert found == [True, False, True, False, False, True]


def test_stamps_that_go_back_do_not_block_a_voxel():
    admission, x = Admission(0.5, revisit_interval=10.0), np.zeros((1, 2))
    assert admission.admit(x, 1.7e9).all()
    assert admission.admit(x, 3.0).all()
    assert [admission.admit(x, stamp)[0] for stamp in (1.0, 12.0, 13.0)] == [False, False, True]


@pytest.mark.parametrize('dim', [1, 2, 3])
@pytest.mark.parametrize('corner', [0.0, -0.0, 5e6, -5e6, 1e9])
def test_neighbors_are_told_apart_far_from_the_origin(dim, corner):
    steps = np.stack(np.meshgrid(*[[-1.0, 0.0, 1.0]] * dim), axis=-1).reshape(-1, dim)
    admission = Admission(0.05)
    centers = corner + 0.05 * (steps + 0.5)
    assert admission.admit(centers, 0.0).all()
    assert not admission.admit(centers + 0.001, 0.0).any()


def test_points_not_finite_are_left_to_whoever_folds_them():
    admission = Admission(0.5)
    x = np.array([[0.1, 0.1], [np.nan, 0.1], [0.2, 0.2], [np.inf, 0.0], [-np.inf, np.nan]])
    with np.errstate(all='raise'):
        assert admission.admit(x, 0.0).tolist() == [True, True, False, True, True]
    assert len(admission) == 1


@pytest.mark.parametrize('dim', [1, 2, 3])
def test_absurd_locations_do_no_harm(dim):
    admission, x = Admission(1e-3), np.array([[0.1] * dim, [1.7e308] * dim, [-1.7e308] * dim])
    with np.errstate(all='raise', over='ignore'):
        assert admission.admit(x, 0.0)[0]
    assert not admission.admit(x, 0.0).any()


def test_without_a_voxel_size_every_point_is_admitted():
    admission = Admission(0.0)
    assert admission.admit(np.zeros((7, 3)), 0.0).all()
    assert len(admission) == 0


def test_cleared_admission_is_as_new():
    admission, x = Admission(0.5), np.zeros((1, 2))
    admission.admit(x, 0.0)
    admission.clear()
    assert len(admission) == 0
    assert admission.admit(x, 0.0).all()


def test_voxels_of_another_size_are_forgotten_and_the_interval_follows():
    admission, x = Admission(1.0), np.array([[0.2], [0.8]])
    assert admission.admit(x, 0.0).tolist() == [True, False]
    admission.voxel_size = 1.0
    assert admission.admit(x, 20.0).tolist() == [False, False]
    admission.revisit_interval = 10.0
    assert admission.admit(x, 20.0).tolist() == [True, False]
    admission.voxel_size = 0.5
    assert admission.admit(x, 20.0).tolist() == [True, True]
    admission.voxel_size = 0.0
    assert (admission.admit(x, 20.0).tolist(), len(admission)) == ([True, True], 0)


def test_robot_that_stands_still_adds_next_to_nothing():
    random, admission = np.random.default_rng(0), Admission(0.25)
    clouds = [random.normal(0, 0.3, (1000, 3)) for _ in range(50)]
    num_admitted = [int(admission.admit(x, stamp).sum()) for stamp, x in enumerate(clouds)]
    assert sum(num_admitted) == len(admission) < 1000
    assert num_admitted[0] > 10 * num_admitted[-1]


@MODEST
@given(st.lists(st.floats(0, 0.5), min_size=1, max_size=80), st.sampled_from([1.0, 4.0, 10.0]))
def test_rate_of_the_admitted_is_bounded_in_every_span(gaps, max_rate):
    limit, stamps = RateLimit(max_rate), 1000 + np.cumsum(gaps)
    admitted = [stamp for stamp in stamps if limit.admit(stamp)]
    assert admitted[0] == stamps[0]
    for index, first in enumerate(admitted):
        for num_more, last in enumerate(admitted[index:]):
            assert num_more <= max_rate * (last - first) + 0.5 + 1e-6


@pytest.mark.parametrize('jitter', [0.0, 0.4])
def test_source_that_keeps_the_rate_loses_nothing(jitter):
    noise = np.random.default_rng(0).uniform(-jitter / 2, jitter / 2, 200)
    limit = RateLimit(10.0)
    assert all(limit.admit(1.7e9 + 0.1 * (index + noise[index])) for index in range(200))


def test_every_second_message_of_a_source_twice_as_fast_is_admitted():
    limit = RateLimit(5.0)
    assert sum(limit.admit(0.1 * index) for index in range(200)) in range(99, 102)


def test_stamps_that_go_back_begin_the_rate_again():
    limit = RateLimit(2.0)
    assert [limit.admit(stamp) for stamp in (1.7e9, 3.0, 3.1, 3.5)] == [True, True, False, True]


def test_rate_can_be_changed():
    limit = RateLimit(0.1)
    assert [limit.admit(stamp) for stamp in (10.0, 11.0)] == [True, False]
    limit.max_rate = 0.0
    assert all(limit.admit(stamp) for stamp in (11.0, 11.1, 20.0, 20.1))
    limit.max_rate = 2.0
    assert [limit.admit(stamp) for stamp in (20.2, 20.3, 20.8)] == [True, False, True]


def test_message_a_little_late_is_not_a_new_beginning():
    limit = RateLimit(2.0)
    assert [limit.admit(stamp) for stamp in (10.0, 9.9, 9.8)] == [True, False, False]


def test_without_a_rate_every_message_is_admitted():
    limit = RateLimit(0.0)
    assert all(limit.admit(stamp) for stamp in (3.0, 3.0, 2.0, 1.7e9, 2.0))
