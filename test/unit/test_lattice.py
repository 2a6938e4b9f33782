"""Where tiles lie, against a search over whole numbers in numpy that uses no floor."""

import json
from itertools import product

import numpy as np
import pytest
import torch

from cmanp_ros.core.errors import ConfigError
from cmanp_ros.core.lattice import FARTHEST, Lattice, OneTile, check_bounds, geometry
from cmanp_ros.core.neighbourhood import NEAR

N, NUM_LEVELS, FACTOR = 19, 3, 3
SIZE = {1: 0.7, 2: 1.3, 3: 2.1}  # [m]: no binary fraction
DIMS = pytest.mark.parametrize('dim', [1, 2, 3])
EXACT = {'rtol': 0, 'atol': 1e-12}
FAR = 1e6  # [m]
REACH = [1.0, 0.75, 0.75]  # [spacings] of a tile to both sides of its center, by level
ANSWERS = 0.75  # [spacings] to both sides of its center


def lattice(dim, **overrides):
    sizes = {'tile_size': SIZE[dim], 'num_levels': NUM_LEVELS, 'level_factor': FACTOR}
    return Lattice(dim_x=dim, **(sizes | overrides))


def spacings(dim):
    return [SIZE[dim], SIZE[dim] * 4, SIZE[dim] * 12]  # [m]


def points(dim, n=N, around=0.0, spread=40.0):
    return around + (torch.rand(n, dim, dtype=torch.float64) - 0.5) * spread


def everywhere(dim):
    """Return points on both sides of the origin and far away from it."""
    far = torch.full((dim,), FAR, dtype=torch.float64)
    return torch.cat([points(dim), points(dim) + far, points(dim) - far])


def windows_of(cover):
    """Return the windows by (point, tile); each pair once."""
    pairs = zip(cover.index.tolist(), map(tuple, cover.key.tolist()), strict=True)
    windows = dict(zip(pairs, cover.window.tolist(), strict=True))
    assert len(windows) == len(cover.index), 'a pair of a point and a tile came twice'
    return windows


def numpy_cover(dim, x):
    """
    Return window and tile coordinates by (point, tile), from the definition of a tile.

    Tile k of spacing h is centered on k h and spans 2 h, above the finest level 1.5 h: [-2, 2] in
    its own coordinates. It answers within 0.75 h of its center.
    """
    found = {}
    for (i, point), (level, h) in product(enumerate(x.numpy()), enumerate(spacings(dim))):
        ranges = []
        for value in point:
            near = round(value / h)
            around = range(near - 5, near + 6)
            r = REACH[level]
            ranges.append([k for k in around if (k - r) * h < value < (k + r) * h])
        own = {}
        for tile in product(*ranges):
            beyond = np.array([v / h - k for v, k in zip(point, tile, strict=True)])
            hat = np.cos(np.pi / 2 * beyond / ANSWERS) ** 2
            own[tile] = np.prod(np.where(abs(beyond) < ANSWERS, hat, 0)), beyond * 2 / REACH[level]
        total = sum(window for window, _ in own.values())
        for tile, (window, u) in own.items():
            found[i, (level, *tile)] = window / total, u
    return found


# Cover -------------------------------------------------------------------------------------------


@DIMS
def test_windows_of_a_level_sum_to_one_everywhere(dim):
    x = everywhere(dim)
    cover = lattice(dim).cover(x)
    for level in range(NUM_LEVELS):
        own = torch.where(cover.key[:, 0] == level, cover.window, 0.0)
        total = own.new_zeros(len(x)).index_add(0, cover.index, own)
        torch.testing.assert_close(total, torch.ones_like(total), **EXACT)


@DIMS
def test_each_location_lies_in_one_or_two_tiles_of_each_level_along_an_axis(dim):
    x = everywhere(dim)
    for cover, means in (('cover', REACH), ('answering', [ANSWERS] * NUM_LEVELS)):
        pairs = windows_of(getattr(lattice(dim), cover)(x))
        for level, mean in enumerate(means):
            own = [pair[0] for pair in pairs if pair[1][0] == level]
            numbers = np.bincount(own, minlength=len(x))
            assert set(numbers) <= {2**axes for axes in range(dim + 1)}
            assert len(own) < len(x) * (2 * mean + 0.2) ** dim  # 2 mean on average
            assert level or cover == 'answering' or (numbers == 2**dim).all()


@DIMS
def test_those_that_answer_are_those_with_a_window(dim):
    x = everywhere(dim)
    for level in (None, *range(NUM_LEVELS)):
        found, expected = lattice(dim).answering(x, level), lattice(dim).cover(x, level)
        assert windows_of(found) == {k: v for k, v in windows_of(expected).items() if v > 0}
        assert 0 < len(found.index) <= len(expected.index)
        assert (len(found.index) == len(expected.index)) is (level in (1, 2))


@DIMS
@pytest.mark.parametrize('around', [0.0, -37.0, FAR, -FAR])
def test_cover_is_what_the_definition_of_a_tile_says(dim, around):
    x = points(dim, around=around)
    cover, expected = lattice(dim).cover(x), numpy_cover(dim, x)
    assert windows_of(cover).keys() == expected.keys()
    rounding = {'rtol': 0, 'atol': 1e-12 + 1e-14 * abs(around)}
    for i, key, u, window in zip(*(part.tolist() for part in cover), strict=True):
        np.testing.assert_allclose(window, expected[i, tuple(key)][0], **rounding)
        np.testing.assert_allclose(u, expected[i, tuple(key)][1], **rounding)


@DIMS
def test_tile_coordinates_never_leave_the_tile(dim):
    corners = torch.tensor(list(product(range(-7, 8), repeat=dim)), dtype=torch.float64)
    x = torch.cat([everywhere(dim), *(corners * h for h in spacings(dim))])
    cover = lattice(dim).cover(x)
    assert cover.x.abs().max() <= 2
    assert ((cover.window >= 0) & (cover.window <= 1)).all()


@DIMS
def test_at_the_center_of_a_tile_it_answers_alone_of_its_level(dim):
    keys = torch.tensor(list(product(range(-4, 5), repeat=dim)))
    for level, h in enumerate(spacings(dim)):
        cover = lattice(dim).answering(keys * h, level)
        assert torch.equal(cover.key[:, 1:], keys)
        assert torch.equal(cover.index, torch.arange(len(keys)))
        torch.testing.assert_close(cover.window, torch.ones(len(keys)).double(), **EXACT)


@DIMS
def test_windows_go_over_a_border_without_a_step(dim):
    step = 1e-9
    for level, h in enumerate(spacings(dim)):
        x = points(dim, n=5)
        x[:, 0] = torch.tensor([-2 - ANSWERS, -1 + ANSWERS, ANSWERS, 1 - ANSWERS, 7 + ANSWERS]) * h
        sides = []
        for offset in (-step, 0.0, step):
            moved = x.clone()
            moved[:, 0] += offset
            sides.append(windows_of(lattice(dim).answering(moved, level)))
        for pair in set().union(*sides):
            values = [side.get(pair, 0.0) for side in sides]
            assert max(values) - min(values) < 10 * step / h


@DIMS
def test_a_level_alone_is_that_part_of_the_whole(dim):
    x = everywhere(dim)
    whole = lattice(dim).cover(x)
    parts = [lattice(dim).cover(x, level) for level in range(NUM_LEVELS)]
    assert all((part.key[:, 0] == level).all() for level, part in enumerate(parts))
    for expected, *found in zip(whole, *parts, strict=True):
        assert torch.equal(torch.cat(found), expected)


@DIMS
@pytest.mark.parametrize('factor', [3, 4, 5])  # the default, and more
def test_every_tile_lies_within_one_tile_of_the_next_level(dim, factor):
    grid = lattice(dim, level_factor=factor)
    cover = grid.cover(points(dim), 0)
    for key in map(tuple, cover.key.unique(dim=0)[:40].tolist()):
        corners = np.add.outer([1e-6 - REACH[0], REACH[0] - 1e-6], key[1:]) * grid.spacing(0)
        lower, upper = (grid.cover(x, 1) for x in torch.from_numpy(corners).split(1))
        assert windows_of(lower).keys() & windows_of(upper).keys()


def test_the_origin_is_the_center_of_a_tile_of_every_level():
    cover = lattice(2).answering(torch.zeros(1, 2))
    assert cover.key.tolist() == [[level, 0, 0] for level in range(NUM_LEVELS)]
    assert (cover.x == 0).all()


@DIMS
def test_single_precision_and_no_points_are_covered_too(dim):
    x = points(dim).float()
    found, expected = lattice(dim).cover(x), lattice(dim).cover(x.double())
    assert all(torch.equal(*parts) for parts in zip(found, expected, strict=True))
    nothing = lattice(dim).cover(torch.empty(0, dim, dtype=torch.float64))
    assert [tuple(part.shape) for part in nothing] == [(0,), (0, 1 + dim), (0, dim), (0,)]


# Places of tiles ---------------------------------------------------------------------------------


@DIMS
def test_the_center_of_a_tile_is_the_origin_of_its_coordinates(dim):
    grid = lattice(dim)
    keys = grid.cover(everywhere(dim)).key.unique(dim=0)
    center = grid.center(keys)
    assert center.dtype == torch.float64 and center.shape == (len(keys), dim)
    h = torch.tensor(spacings(dim), dtype=torch.float64)[keys[:, :1]]
    torch.testing.assert_close(center, keys[:, 1:] * h, rtol=1e-14, atol=0)
    beside = center + 0.01 * h  # off the border of the tiles around
    for level in range(NUM_LEVELS):
        own = keys[:, 0] == level
        cover = grid.cover(beside[own], level)
        pairs = list(zip(cover.index.tolist(), cover.key.tolist(), strict=True))
        at = [pairs.index((i, key)) for i, key in enumerate(keys[own].tolist())]
        expected = torch.full((len(at), dim), 0.01 * 2 / REACH[level], dtype=torch.float64)
        torch.testing.assert_close(cover.x[at], expected, rtol=0, atol=1e-8)


@DIMS
@pytest.mark.parametrize('radius', [0.9, 1.0, 1.75, 3.5])
def test_neighbours_are_the_tiles_within_a_radius(dim, radius):
    keys = torch.tensor([[1, *range(-1, dim - 1)], [0, *range(5, 5 + dim)]])
    around, distance = lattice(dim).neighbours(keys, radius)
    steps = np.array(list(product(range(-4, 5), repeat=dim)))
    steps = steps[np.linalg.norm(steps, axis=1) <= radius]
    for key, near in zip(keys.tolist(), around.tolist(), strict=True):
        expected = {(key[0], *np.add(key[1:], step).tolist()) for step in steps}
        assert set(map(tuple, near)) == expected and len(near) == len(expected)
        apart = np.linalg.norm(np.subtract(near, key), axis=1)
        np.testing.assert_allclose(distance.numpy(), apart, atol=1e-12)


@DIMS
def test_near_neighbours_are_those_that_overlap(dim):
    """What overlaps by a corner is a neighbour, and nothing else is."""
    grid = lattice(dim)
    key = torch.tensor([[1, *[3] * dim]])
    near = {tuple(k) for k in grid.neighbours(key, NEAR)[0][0].tolist()}
    steps = torch.tensor(list(product((-1, 0, 1), repeat=dim)), dtype=torch.float64)
    corners = grid.center(key) + steps * 0.999 * REACH[1] * spacings(dim)[1]
    assert near == {tuple(k) for k in grid.cover(corners, 1).key.tolist()}


@DIMS
def test_what_is_nearest_to_a_tile_is_nearer_to_no_other_center(dim):
    grid = lattice(dim)
    for level, h in enumerate(spacings(dim)):
        key = torch.tensor([[level, *[2] * dim]])
        (half,) = grid.nearest(key).tolist()
        for share, is_nearest in ((0.999, True), (1.001, False)):
            x = grid.center(key)
            x[0, 0] += share * half * REACH[level] * h / 2
            assert (abs(x[0, 0] / h - 2) < abs(x[0, 0] / h - 3)).item() is is_nearest
    assert OneTile([0.0] * dim, [1.0] * dim).nearest(key).isinf().all()


# Bounds ------------------------------------------------------------------------------------------


@DIMS
def test_contains_what_a_robot_can_reach_and_nothing_that_is_not_a_number(dim):
    bad = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e300, -1e300], dtype=torch.float64)
    grid = lattice(dim)
    assert grid.contains(everywhere(dim)).all()
    for axis in range(dim):
        x = torch.zeros(len(bad), dim, dtype=torch.float64)
        x[:, axis] = bad
        assert grid.contains(x).tolist() == [False] * len(bad)


@DIMS
@pytest.mark.parametrize('sign', [-1, 1])
def test_tiles_are_still_told_apart_at_the_farthest_location_contained(dim, sign):
    grid = lattice(dim)
    x = torch.full((1, dim), sign * FARTHEST * SIZE[dim] * (1 - 1e-9), dtype=torch.float64)
    assert grid.contains(x).all() and not grid.contains(x * (1 + 1e-8)).any()
    cover = grid.cover(x + torch.tensor([[0.1], [0.2], [0.3]]) * SIZE[dim])
    assert len({pair[0] for pair in windows_of(cover)}) == 3
    assert cover.x.abs().max() <= 2


@pytest.mark.parametrize('size', [0.0, -1.0, float('inf'), float('nan')])
def test_a_size_that_is_no_length_is_refused(size):
    with pytest.raises(ConfigError, match='tile_size is .*, expected a positive length'):
        Lattice(size, 2, 3, 3)


# Order -------------------------------------------------------------------------------------------


@DIMS
def test_order_keeps_the_points_of_a_cell_of_any_level_together(dim):
    x = points(dim, n=211, spread=4 * spacings(dim)[1])
    order = lattice(dim).order(x)
    assert sorted(order.tolist()) == list(range(len(x)))
    for h in spacings(dim):
        cells = [tuple(np.floor(point / h)) for point in x[order].numpy()]
        changes = sum(a != b for a, b in zip(cells, cells[1:], strict=False))
        assert changes == len(set(cells)) - 1


@DIMS
def test_order_of_no_points_is_empty(dim):
    assert lattice(dim).order(torch.empty(0, dim, dtype=torch.float64)).shape == (0,)


# One tile ----------------------------------------------------------------------------------------

BOUNDS = ((-3.0, 2.0, 5.0), (8.0, 9.0, 7.0))  # [m], the first axis is the longest


def one_tile(dim):
    return OneTile(*(corner[:dim] for corner in BOUNDS))


@DIMS
def test_one_tile_is_the_affine_map_of_its_workspace(dim):
    lower, upper = (np.array(corner[:dim]) for corner in BOUNDS)
    x = lower + (upper - lower) * points(dim, spread=1.0).add(0.5).numpy()
    cover = one_tile(dim).cover(torch.from_numpy(x))
    expected = [np.interp(x[:, 0], [-3, 8], [-2, 2])]
    expected += [(x[:, i] - (lower[i] + upper[i]) / 2) * 4 / 11 for i in range(1, dim)]
    np.testing.assert_allclose(cover.x, np.stack(expected, 1), rtol=0, atol=1e-12)
    assert torch.equal(cover.window, torch.ones(N, dtype=torch.float64))
    assert torch.equal(cover.index, torch.arange(N))
    assert torch.equal(cover.key, torch.zeros(N, 1 + dim, dtype=torch.int64))


@DIMS
def test_one_tile_contains_its_workspace_with_the_border(dim):
    tile = one_tile(dim)
    lower, upper = (torch.tensor([corner[:dim]], dtype=torch.float64) for corner in BOUNDS)
    assert tile.contains(torch.cat([lower, upper, (lower + upper) / 2])).all()
    for axis, value in product(range(dim), (-1e-6, torch.nan, -torch.inf)):
        outside = lower.clone()
        outside[0, axis] += value
        assert not tile.contains(outside).any()
    assert not tile.contains(upper + torch.tensor([0.0] * (dim - 1) + [1e-6])).any()


@DIMS
def test_one_tile_has_one_level_no_neighbours_and_any_order(dim):
    tile, key = one_tile(dim), torch.zeros(1, 1 + dim, dtype=torch.int64)
    assert tile.num_levels == 1 and tile.dim_x == dim
    around, distance = tile.neighbours(key, 3.5)
    assert torch.equal(around, key.unsqueeze(1)) and distance.tolist() == [0]
    assert torch.equal(tile.order(points(dim)), torch.arange(N))


def test_corners_in_the_wrong_order_or_not_finite_are_refused():
    for lower, upper in [
        ((0.0, 0.0), (1.0, 0.0)),
        ((2.0, 0.0), (1.0, 1.0)),
        ((0.0, 0.0), (1.0, float('inf'))),
        ((float('nan'), 0.0), (1.0, 1.0)),
    ]:
        with pytest.raises(ConfigError, match='every lower below its upper'):
            OneTile(lower, upper)
    for lower, upper in [((0.0,), (1.0, 1.0)), ((), ())]:
        with pytest.raises(ConfigError, match='as many as a location has'):
            OneTile(lower, upper)


@pytest.mark.filterwarnings('error')
def test_corners_may_be_arrays_of_numpy_and_larger_than_float32():
    lower, upper = np.array([-1e39, 3.0]), np.array([1e39, 7.0])
    for kind in (lambda corner: corner, list):  # an array, a list of numbers of numpy
        check_bounds(kind(lower), kind(upper))
        with pytest.raises(ConfigError, match='every lower below its upper'):
            check_bounds(kind(upper), kind(lower))


@pytest.mark.parametrize('tiles', [lattice(2), lattice(3, level_factor=2), one_tile(3)])
def test_a_geometry_survives_json(tiles):
    assert geometry(json.loads(json.dumps(tiles.to_dict()))) == tiles


def test_geometries_that_differ_are_not_equal():
    assert lattice(2) != lattice(2, tile_size=1.4) and lattice(2) != one_tile(2)
    assert lattice(2) == lattice(2) and one_tile(2) == one_tile(2)
