"""Tasks, peers, scores and studies, against restatements, textbooks and dense algebra."""

import json
import sys
from itertools import pairwise
from math import isnan, log, nan, pi

import numpy as np
import pytest

from cmanp_ros import optional
from cmanp_ros.core.errors import CMANPError, ConfigError, InputError
from cmanp_ros.evaluation import (
    kernels,
    peers,
    robust,
    scores,
    studies,
    tile_size,
    tracks,
    windows,
)
from cmanp_ros.evaluation.cache import Cache, Key
from cmanp_ros.evaluation.kernels import Kernel, distances
from cmanp_ros.evaluation.sparse_gp import inducing_points
from cmanp_ros.evaluation.tasks import Task

NUM_TARGET = 53


def same(a: Task, b: Task) -> bool:
    return all(np.array_equal(u, v) for u, v in zip(a, b, strict=True))


def dense_gp(kernel: Kernel, x, y, x_target, offset=0.0):
    """Return mean and stddev of an exact GP, noise included."""
    covariance = kernel(distances(x, x)) + kernel.noise**2 * np.eye(len(x))
    cross = kernel(distances(x_target, x))
    mean = offset + cross @ np.linalg.solve(covariance, y - offset)
    known = np.einsum('nk,nk->n', cross, np.linalg.solve(covariance, cross.T).T)
    return mean, np.sqrt(kernel.scale**2 + kernel.noise**2 - known)


def survey(kernel, num=211, num_target=NUM_TARGET, width=6.0, seed=3):
    """Return observations of a draw of the kernel, and where to predict."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(0, width, (num, 2))
    covariance = kernel(distances(x, x)) + kernel.noise**2 * np.eye(num)
    y = 5.0 + np.linalg.cholesky(covariance) @ rng.standard_normal(num)
    return x, y, rng.uniform(0, width, (num_target, 2))


# Windows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(('cells', 'num_context'), [(17, 7), (37, 211)])
def test_window_is_that_of_the_protocol(cells, num_context):
    heights = np.random.default_rng(5).normal(size=(41, 59))
    ours, rng = (np.random.default_rng(11) for _ in range(2))
    for _ in range(3):
        task = windows.window(ours, num_context, cells, heights)
        # The protocol once more: corner, then a permutation of all cells.
        row = rng.integers(0, 41 - cells)
        column = rng.integers(0, 59 - cells)
        y = heights[row : row + cells, column : column + cells].ravel()
        y = 0.65 * (y - y.mean()) / y.std()
        axis = np.linspace(-2, 2, cells)
        x = np.array([(a, b) for a in axis for b in axis])
        order = rng.permutation(cells**2)
        context, target = order[:num_context], order[num_context:][:1000]
        np.testing.assert_allclose(task.y, y[context], rtol=1e-13, atol=1e-14)
        np.testing.assert_allclose(task.y_target, y[target], rtol=1e-13, atol=1e-14)
        assert np.array_equal(task.x, x[context]) and np.array_equal(task.x_target, x[target])


def test_windows_of_the_elevation_model_have_their_sizes_and_units():
    pytest.importorskip('matplotlib')
    assert windows.jacksboro().shape == (344, 403)
    task = windows.window(np.random.default_rng(0), 256)
    assert [len(part) for part in task] == [256, 256, 1000, 1000]
    values = np.concatenate([task.y, task.y_target])
    assert abs(values.mean()) < 0.1 and abs(values.std() - 0.65) < 0.1
    assert np.abs(task.x).max() <= 2


def test_windows_add_noise_of_a_generator_of_their_own():
    heights = np.random.default_rng(5).normal(size=(70, 71))
    clean, noisy, again = (
        list(windows.windows(3, 13, 7, noise, heights)) for noise in (0.0, 0.3, 0.3)
    )
    rng, noise_rng = np.random.default_rng(7), np.random.default_rng(7 + 1000 + 13)
    for a, b, c in zip(clean, noisy, again, strict=True):
        assert same(a, windows.window(rng, 13, heights=heights)) and same(b, c)
        np.testing.assert_allclose(b.y, a.y + 0.3 * noise_rng.standard_normal(13))
        np.testing.assert_allclose(b.y_target, a.y_target + 0.3 * noise_rng.standard_normal(1000))


# Fields on which a GP fails ----------------------------------------------------------------------


@pytest.mark.parametrize('kind', robust.KINDS)
def test_robust_tasks_reproduce_and_differ(kind):
    first = list(robust.tasks(kind, 3, 64, seed=1))
    assert all(map(same, first, robust.tasks(kind, 3, 64, seed=1)))
    assert [len(part) for part in first[0]] == [64, 64, 300, 300]
    assert not any(same(a, b) for a, b in pairwise(first))
    assert not same(first[0], next(robust.tasks(kind, 1, 64, seed=2)))


def with_control(kind, num_context=256, num=4):
    """Yield the task without the fault, with it, and the field below both."""
    pairs = zip(
        robust.tasks('gaussian', num, num_context, seed=1),
        robust.tasks(kind, num, num_context, seed=1),
        strict=True,
    )
    for index, (control, task) in enumerate(pairs):
        assert np.array_equal(control.x, task.x)
        rng = np.random.default_rng([1, num_context, index, 0])
        yield control, task, robust.draw_field(rng, num_context + 300)


@pytest.mark.parametrize(('num_context', 'share'), [(64, 3), (256, 13)])
def test_a_twentieth_of_the_readings_are_outliers_and_no_target(num_context, share):
    for control, task, field in with_control('outliers', num_context):
        added = task.y - control.y
        assert np.count_nonzero(added) == share
        np.testing.assert_allclose(np.abs(added[added != 0]), 8 * field.kernel.noise)
        assert np.array_equal(task.y_target, control.y_target)


def test_the_edge_is_a_step_along_a_line():
    for control, task, field in with_control('edge'):
        x = np.concatenate([task.x, task.x_target])
        added = np.concatenate([task.y - control.y, task.y_target - control.y_target])
        high = added > 0
        assert 0.02 < high.mean() < 0.98
        np.testing.assert_allclose(
            added[high].mean() - added[~high].mean(), 1.5 * field.kernel.scale
        )
        assert np.ptp(added[high]) < 1e-9 and np.ptp(added[~high]) < 1e-9
        # Some direction separates the two sides.
        directions = np.array([(np.cos(a), np.sin(a)) for a in np.linspace(0, 2 * pi, 3001)])
        along = x @ directions.T
        assert (along[~high].max(0) < along[high].min(0)).any()


def test_uneven_noise_is_log_linear_and_spans_a_factor_of_ten():
    corners = np.array([(a, b) for a in (-2.0, 2.0) for b in (-2.0, 2.0)])
    for seed in range(5):
        factor = robust.noise_factor(np.random.default_rng(seed), corners)
        np.testing.assert_allclose(factor.max() / factor.min(), 10)
    for control, task, field in with_control('uneven'):
        values = field.values[:256]
        factor = np.log10((task.y - values) / (control.y - values))
        slope, *_ = np.linalg.lstsq(task.x, factor, rcond=None)
        np.testing.assert_allclose(task.x @ slope, factor, atol=1e-6)
        np.testing.assert_allclose(np.abs(slope).sum() * 4, 1, atol=1e-6)


def test_fields_have_the_variance_and_correlation_of_their_kernel():
    products = []
    for seed in range(300):
        field = robust.draw_field(np.random.default_rng(seed), 2)
        expected = field.kernel(distances(field.x, field.x)) / field.kernel.scale**2
        values = field.values / field.kernel.scale
        products.append([*values**2 - 1, values.prod() - expected[0, 1]])
    assert np.abs(np.mean(products, 0)).max() < 0.3


def test_an_unknown_kind_is_refused():
    with pytest.raises(ConfigError, match=r"kind 'edges': expected one of gaussian, outliers"):
        next(robust.tasks('edges', 1, 64, 0))


# Scores ------------------------------------------------------------------------------------------


def test_score_of_numbers_made_by_hand():
    result = scores.score([0.0, 1.0, 2.0, 3.0], [1.0, 1.0, 2.0, 2.0], [[1.0], [1.0], [2.0], [7.0]])
    assert result.rmse == pytest.approx((17 / 4) ** 0.5)
    assert result.log_likelihood == pytest.approx(
        -0.5 * log(2 * pi) - (0.5 + 0 + log(2) + log(2) + 2) / 4
    )
    assert result.coverage_90 == 0.75


def test_score_without_stddev_knows_the_error_only():
    result = scores.score([0.0, 2.0], None, [1.0, 1.0])
    assert result.rmse == 1 and isnan(result.log_likelihood) and isnan(result.coverage_90)


def test_scores_of_what_does_not_fit_are_refused():
    with pytest.raises(InputError, match=r'\[3, 3, 2\] numbers'):
        scores.score(np.zeros(3), np.ones(3), np.zeros(2))
    with pytest.raises(InputError, match='least stddev is 0.0'):
        scores.score(np.zeros(2), np.array([1.0, 0.0]), np.zeros(2))


def test_summary_is_mean_and_standard_error():
    rows = [scores.Score(1.0, -1.0, 0.8), scores.Score(3.0, -1.0, 1.0)]
    found = scores.summary(rows)
    assert found['rmse'] == (2.0, pytest.approx(1.0))
    assert found['log_likelihood'] == (-1.0, 0.0)
    assert isnan(scores.mean_and_error([4.0])[1])


def test_scores_are_compared_task_by_task():
    own = [scores.Score(rmse, ll, 0.9, 0.1) for rmse, ll in ((1.1, -1.0), (2.2, 3.0), (3.3, 1.0))]
    other = [scores.Score(rmse, ll, 0.9, 0.1) for rmse, ll in ((1.0, -3.0), (2.0, 1.0), (3.0, -1))]
    found = scores.to_reference(own, other)
    assert found['rmse_over_reference'] == (pytest.approx(1.1), pytest.approx(0))
    assert found['log_likelihood_to_reference'] == (2.0, 0.0)  # however they differ among tasks
    assert found['rmse_to_reference'] == (pytest.approx(0.2), pytest.approx(0.1 / 3**0.5))
    assert isnan(scores.to_reference(own[:1], other[:1])['rmse_over_reference'][1])


def test_the_error_of_a_ratio_is_its_spread_over_many_draws():
    rng = np.random.default_rng(0)
    other = rng.uniform(1, 3, (2000, 40))
    own = other * rng.uniform(0.8, 1.4, other.shape)
    drawn = own.sum(1) / other.sum(1)

    def error(i):
        pair = ([scores.Score(rmse, 0, 0, 0) for rmse in part[i]] for part in (own, other))
        return scores.to_reference(*pair)['rmse_over_reference'][1]

    assert np.mean([error(i) for i in range(200)]) == pytest.approx(drawn.std(), rel=0.05)


def test_error_of_a_series_without_correlation_is_the_standard_error():
    rng = np.random.default_rng(0)
    mean, stddev, y = np.zeros(20_000), np.ones(20_000), rng.standard_normal(20_000)
    found = scores.stream_summary(mean, stddev, y)
    assert found['rmse'][0] == scores.score(mean, stddev, y).rmse
    density = -0.5 * (log(2 * pi) + y**2)
    assert found['log_likelihood'][1] == pytest.approx(density.std() / len(y) ** 0.5, rel=0.5)


ROWS = [
    {'method': 'a', 'num_context': 64, 'rmse': (0.25, 0.01), 'log_likelihood': (nan, nan)},
    {'method': 'long name', 'num_context': 1024, 'rmse': (0.5, nan), 'seconds': 2.0},
]


def test_tables_show_errors_and_what_is_not_known():
    assert scores.markdown_table(ROWS).splitlines() == [
        '| method | num_context | rmse | log_likelihood | seconds |',
        '| --- | ---: | ---: | ---: | ---: |',
        '| a | 64 | 0.250 ± 0.010 | - | - |',
        '| long name | 1024 | 0.500 | - | 2.000 |',
    ]
    assert scores.terminal_table(ROWS).splitlines() == [
        'method     num_context           rmse  log_likelihood  seconds',
        'a                   64  0.250 ± 0.010               -        -',
        'long name         1024          0.500               -    2.000',
    ]


def test_json_says_null_where_nothing_is_known():
    rows = json.loads(scores.to_json(ROWS))
    assert rows[0]['rmse'] == [0.25, 0.01] and rows[0]['log_likelihood'] == [None, None]
    assert rows[1]['rmse'] == [0.5, None] and rows[1]['num_context'] == 1024


# Peers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize('nu', [0.5, 1.5, 2.5, np.inf])
def test_kernels_are_covariances_also_when_tapered(nu):
    x = np.random.default_rng(0).uniform(0, 4, (61, 2))
    for support in (None, 1.7):
        kernel = Kernel(nu, 0.9, 1.3, 0.1, support)
        covariance = kernel(distances(x, x))
        np.testing.assert_allclose(np.diag(covariance), 1.3**2)
        assert np.linalg.eigvalsh(covariance).min() > -1e-9
        assert support is None or (covariance[distances(x, x) > support] == 0).all()


def test_fit_finds_the_kernel_of_a_draw():
    truth = Kernel(1.5, 0.8, 2.0, 0.2)
    x, y, _ = survey(truth, num=307)
    found = kernels.fit(x, y - 5.0, nus=(1.5,))
    assert 0.5 < found.length < 1.3 and 1.2 < found.scale < 3.2 and 0.13 < found.noise < 0.27
    assert kernels.fit(x, y - 5.0, nus=(1.5,), support_lengths=2.0).support > 1.6


def test_exact_gp_is_better_than_interpolation_on_a_smooth_field():
    x, y, x_target = survey(Kernel(2.5, 1.0, 1.0, 0.05), num=90, width=4.0)
    y_target = dense_gp(Kernel(2.5, 1.0, 1.0, 0.05), x, y, x_target, 5.0)[0]
    error = {
        name: scores.score(*predict(x, y - 5, x_target), y_target - 5).rmse
        for name, predict in peers.for_windows().items()
    }
    assert error['exact GP'] < 0.7 * error['linear interpolation']


def test_linear_interpolation_is_exact_on_a_plane_and_the_nearest_outside():
    x = np.random.default_rng(0).uniform(-1, 1, (101, 2))
    inside, outside = np.array([[0.1, -0.2]]), np.array([[9.0, 9.0]])
    mean, stddev = peers.linear_interpolation(x, x @ [2.0, 3.0] + 1, np.r_[inside, outside])
    nearest = x[np.argmin(distances(outside, x))]
    np.testing.assert_allclose(mean, [0.6, nearest @ [2.0, 3.0] + 1])
    assert (stddev > 0).all() and stddev[0] == stddev[1]


def test_stddev_of_linear_interpolation_includes_the_noise():
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (1009, 2))
    y = x.sum(1) + 0.1 * rng.standard_normal(len(x))
    assert 0.1 < peers.linear_interpolation(x, y, x[:1])[1][0] < 0.16


def test_point_index_finds_what_a_full_search_finds():
    rng = np.random.default_rng(0)
    index, known = peers.PointIndex(), np.empty((0, 2))
    for size in (3, 700, 400, 900, 50):
        new = rng.uniform(size=(size, 2))
        index.add(new)
        known = np.concatenate([known, new])
        x = rng.uniform(size=(11, 2))
        expected = np.sort(distances(x, known), axis=1)[:, :7]
        distance, number = index.query(x, 7)
        np.testing.assert_allclose(distance, expected, atol=1e-12)
        np.testing.assert_allclose(np.linalg.norm(known[number] - x[:, None], axis=-1), expected)


def test_nearest_value_learns_its_spread_by_distance():
    rng = np.random.default_rng(0)
    method = peers.NearestValue(value_offset=4.0, value_scale=3.0)
    assert [v.tolist() for v in method.predict(np.zeros((1, 2)))] == [[4.0], [3.0]]
    # A random walk along a line: the variance of a difference is the distance.
    y = np.cumsum(rng.standard_normal(4001))
    x = np.column_stack([np.arange(4001.0), np.zeros(4001)])
    for part in np.split(rng.permutation(4000), 200):
        method.observe(x[part], y[part])
    mean, stddev = method.predict(np.array([[70.0, 0.1], [70.0, 12.0], [70.0, 1e6]]))
    assert mean[0] == y[70]
    assert stddev[0] < stddev[1] < stddev[2]
    assert stddev[2] == pytest.approx(y[:4000].std())  # as far as never seen
    near = method.predict(np.array([[70.0, 1.0]]))[1]
    assert 0.7 < near[0] ** 2 < 2


def test_kalman_grid_equals_the_textbook_recursion():
    rng = np.random.default_rng(0)
    x, y = rng.uniform(-3, 3, (2, 31, 2))[0], rng.normal(2.0, 1.5, 31)
    grid = peers.KalmanGrid(cell_size=2.0, noise=0.4, value_offset=1.0, value_scale=3.0)
    belief = {}
    for start in range(0, 31, 7):
        seen = y[:start]
        prior = (seen.mean(), seen.var()) if start else (1.0, 9.0)
        for point, value in zip(x[start : start + 7], y[start : start + 7], strict=True):
            cell = tuple(np.floor(point / 2.0))
            m, p = belief.get(cell, prior)
            innovation, s = value - m, p + 0.4**2
            belief[cell] = m + p / s * innovation, p - p / s * p
        grid.observe(x[start : start + 7], y[start : start + 7])
    asked = np.array([*belief, (50.0, 50.0)]) * 2.0 + 1.0
    expected = np.array([*belief.values(), (y.mean(), y.var())])
    mean, stddev = grid.predict(asked)
    np.testing.assert_allclose(mean, expected[:, 0])
    np.testing.assert_allclose(stddev, np.sqrt(expected[:, 1] + 0.4**2))


BASIS = Kernel(1.5, 2.0, 1.2, 0.2, support=3.0)
STREAMS = {
    'local GP, all neighbors': lambda x: peers.LocalGP(BASIS, 5.0, num_neighbors=len(x)),
    'local GP, most neighbors': lambda x: peers.LocalGP(BASIS, 5.0, num_neighbors=80),
    'sparse GP, at all points': lambda x: peers.OnlineSparseGP(BASIS, x, 5.0),
    'sparse GP': lambda x: peers.OnlineSparseGP(BASIS, inducing_points(x, 150), 5.0),
    'local basis filter': lambda x: peers.LocalBasisFilter(BASIS, 0.4, value_offset=5.0),
    'local basis filter, coarse': lambda x: peers.LocalBasisFilter(BASIS, 0.6, value_offset=5.0),
}


@pytest.mark.parametrize(
    ('name', 'tolerance'),
    [*zip(STREAMS, (1e-9, 0.01, 1e-4, 0.08, 0.03, 0.09), strict=True)],
)
def test_streaming_gps_approach_the_dense_gp(name, tolerance):
    x, y, x_target = survey(BASIS)
    method = STREAMS[name](x)
    mean, stddev = method.predict(x_target[:7])
    np.testing.assert_allclose(mean, 5.0)
    np.testing.assert_allclose(stddev, np.hypot(1.2, 0.2), rtol=1e-6)
    for start in range(0, len(x), 17):
        method.observe(x[start : start + 17], y[start : start + 17])
    found = method.predict(x_target)
    expected = dense_gp(BASIS, x, y, x_target, 5.0)
    for ours, theirs in zip(found, expected, strict=True):
        assert np.sqrt(np.mean((ours - theirs) ** 2)) < tolerance
    far = method.predict(np.array([[1e3, -1e3]]))
    np.testing.assert_allclose(np.ravel(far), [5.0, np.hypot(1.2, 0.2)], rtol=1e-6)


def test_the_order_of_observations_changes_nothing_in_information_filters():
    x, y, x_target = survey(BASIS, num=101)
    for name in ('sparse GP, at all points', 'local basis filter, coarse'):
        one, other = STREAMS[name](x), STREAMS[name](x)
        one.observe(x, y)
        for part in np.array_split(np.random.default_rng(0).permutation(len(x)), 5):
            other.observe(x[part], y[part])
        for a, b in zip(one.predict(x_target), other.predict(x_target), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)


def test_the_local_basis_filter_grows_with_the_area_only():
    kernel = Kernel(1.5, 1.0, 1.0, 0.1, support=2.0)
    method = peers.LocalBasisFilter(kernel, 0.5)
    x = np.random.default_rng(0).uniform(0, 1, (307, 2))
    method.observe(x, np.zeros(307))
    functions = method.num_functions
    method.observe(x, np.zeros(307))
    assert method.num_functions == functions < 200
    with pytest.raises(ConfigError, match='support None'):
        peers.LocalBasisFilter(Kernel(1.5, 1.0, 1.0, 0.1), 0.5)


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, 'sklearn.gaussian_process', None)
    with pytest.raises(CMANPError, match='the exact GP needs sklearn.*pip install scikit-learn'):
        peers.exact_gp(np.zeros((3, 2)), np.zeros(3), np.zeros((1, 2)))
    with pytest.raises(CMANPError, match='pip install scipy'):
        monkeypatch.setitem(sys.modules, 'scipy', None)
        optional.library('scipy', 'this')


# Tracks ------------------------------------------------------------------------------------------


class Recorder:
    """A method that answers with how much it was shown."""

    def __init__(self):
        self.calls, self.shown = [], 0

    def observe(self, x, y):
        self.calls.append(('observe', len(x)))
        self.shown += len(y)

    def predict(self, x):
        self.calls.append(('predict', len(x)))
        return np.full((len(x), 1), float(self.shown)), np.ones((len(x), 1))


def test_stream_predicts_each_batch_before_it_is_folded():
    method = Recorder()
    found = tracks.stream(method, np.zeros((40, 2)), np.zeros(40), batch=7, limit=17)
    sizes = [('predict', 7), ('observe', 7)] * 2 + [('predict', 3), ('observe', 3)]
    assert method.calls == sizes
    assert found.mean.tolist() == [0.0] * 7 + [7.0] * 7 + [14.0] * 3
    assert found.stddev.tolist() == [1.0] * 17
    assert found.seconds_observe >= 0 and found.seconds_predict >= 0


def test_soundings_are_kilometers_in_the_order_of_the_tracks():
    x, y = tracks.soundings()
    assert x.shape == (82_970, 2) and y.shape == (82_970,)
    np.testing.assert_allclose(x.mean(0), 0, atol=1e-6)
    assert y.min() == -7.708 and y.max() == -0.009
    assert 1.0 < np.median(np.linalg.norm(np.diff(x, axis=0), axis=1)) < 2.0
    # The first two: 0.0031 degree to the east, 0.00269 to the south; 111.19 km are a degree.
    step = [0.0031 * 111.195 * np.cos(np.radians(23.4547)), -0.00269 * 111.195]
    np.testing.assert_allclose(x[1] - x[0], step, rtol=1e-4)


def test_repeats_are_those_that_were_seen_before_with_the_same_value():
    x = np.array([[0.0, 1.0], [2.0, 3.0], [0.0, 1.0], [0.0, 1.0], [2.0, 3.0]])
    y = np.array([5.0, 6.0, 5.0, 7.0, 6.0])
    assert tracks.repeats(x, y).tolist() == [False, False, True, False, True]
    assert 1500 < tracks.repeats(*tracks.soundings()).sum() < 2500


# Studies and their cache -------------------------------------------------------------------------


def test_the_cache_returns_what_was_stored_for_these_targets(tmp_path):
    cache, key = Cache(tmp_path / 'new'), Key('terrain', 0, 64, 0.1, 'exact GP', 3)
    y_target = np.arange(5.0)
    assert cache.load(key, y_target) is None
    cache.store(key, y_target, mean=y_target + 1, stddev=y_target + 2, seconds=0.5)
    found = cache.load(key, y_target * (1 + 1e-12))
    assert sorted(found) == ['mean', 'seconds', 'stddev']
    assert np.array_equal(found['mean'], y_target + 1) and found['seconds'] == 0.5
    assert cache.load(key, y_target + 1e-3) is None and cache.load(key, y_target[:4]) is None
    for other in (
        key._replace(study='robust'),
        key._replace(seed=1),
        key._replace(num_context=65),
        key._replace(setting=0.0),
        key._replace(method='nearest'),
        key._replace(index=4),
    ):
        assert cache.load(other, y_target) is None
    cache.path(key).write_bytes(b'damaged')
    assert cache.load(key, y_target) is None


def count_calls(calls, name):
    def predict(x, y, x_target):
        calls.append(name)
        return np.zeros(len(x_target)), np.full(len(x_target), 0.7)

    return predict


@pytest.mark.parametrize(
    ('study', 'setting'),
    [(studies.terrain, {'noises': (0.0, 0.1)}), (studies.robust, {'kinds': ('edge', 'uneven')})],
)
def test_studies_yield_a_row_for_each_setting_and_cache_what_is_slow(study, setting, tmp_path):
    if study is studies.terrain:
        pytest.importorskip('matplotlib')
    calls = []
    methods = {name: count_calls(calls, name) for name in ('exact GP', 'fast')}
    methods['no stddev'] = lambda x, y, x_target: (np.zeros(len(x_target)), None)

    def rows():
        return list(study(methods, 3, (7, 11), seed=5, cache_dir=tmp_path, **setting))

    first, second = rows(), rows()
    assert [len(first), calls.count('exact GP'), calls.count('fast')] == [12, 12, 24]
    assert [row['method'] for row in first[:3]] == ['exact GP', 'fast', 'no stddev']
    column = 'noise' if study is studies.terrain else 'kind'
    assert [row[column] for row in first[::6]] == list(next(iter(setting.values())))
    assert [row['num_context'] for row in first[::3]] == [7, 11, 7, 11]
    for a, b in zip(first, second, strict=True):
        assert a['rmse'] == b['rmse'] and len(a['log_likelihood']) == 2
        assert a['method'] != 'exact GP' or a['seconds'] == b['seconds']
    assert first[0]['rmse'] == first[1]['rmse'] == first[2]['rmse']
    assert first[1]['rmse_over_reference'] == (1, 0)
    assert isnan(first[2]['coverage_90'][0])
    alone = next(study({'fast': methods['fast']}, 3, (7,), seed=5, **setting))
    assert 'rmse_over_reference' not in alone


def test_the_track_study_scores_streams_and_caches_what_is_asked_for(tmp_path):
    made = []

    def make():
        made.append(peers.NearestValue(-2.4, 1.2))
        return made[-1]

    for _ in range(2):
        row, without = studies.tracks(
            {'nearest': make}, limit=1000, cache_dir=tmp_path, cached=['nearest']
        )
        assert (row['kind'], without['kind']) == ('all', 'no repeats')
        assert row['num_context'] == 1000 and row['method'] == 'nearest'
        assert 0 < row['rmse'][0] < 2 and 0.5 < row['coverage_90'][0] <= 1
        assert row['rmse'][1] > 0 and row['seconds_observe'] >= 0
    assert len(made) == 1


def test_tracks_are_also_scored_without_the_sounding_that_is_a_blunder(monkeypatch):
    x, y = tracks.soundings()
    number = tracks.BLUNDER
    assert y[number] < -5 and max(abs(y[number - 1] + 0.055), abs(y[number + 1] + 0.057)) < 1e-3
    monkeypatch.setattr(tracks, 'soundings', lambda: (x[number - 300 :], y[number - 300 :]))
    monkeypatch.setattr(tracks, 'BLUNDER', 300)
    rows = studies.tracks({'nearest': lambda: peers.NearestValue(-2.4, 1.2)}, limit=330)
    found = {row['kind']: row for row in rows}
    assert list(found) == ['all', 'no repeats', 'no blunder']
    squares = 330 * found['all']['rmse'][0] ** 2 - 329 * found['no blunder']['rmse'][0] ** 2
    assert abs(squares**0.5 - 5.76) < 0.1


def test_peers_for_a_stream_are_fitted_when_they_are_made():
    kernel = Kernel(1.5, 30.0, 1.0, 0.1)
    x, y, x_target = survey(kernel, num=211, num_target=17, width=150.0)
    methods = peers.for_stream(x, y, num_fit=101, num_inducing=64)
    expected = dense_gp(kernel, x, y, x_target, 5.0)[0]
    error = {}
    for name, make in methods.items():
        method = make()
        method.observe(x, y)
        mean, stddev = method.predict(x_target)
        assert (stddev > 0).all()
        error[name] = np.sqrt(np.mean((mean - expected) ** 2))
    assert max(error['local GP'], error['local basis filter']) < 0.3
    assert max(error['sparse GP'], error['nearest value'], error['Kalman grid']) < 0.9


def test_one_task_observes_once_and_predicts():
    mean, _ = studies.one_task(Recorder)(np.zeros((13, 2)), np.zeros(13), np.zeros((5, 2)))
    assert (mean == 13).all()


# Tile size ---------------------------------------------------------------------------------------


def field_of_length(length):
    return peers.LocalGP(Kernel(2.5, length, 1.0, 0.1), 5.0, num_neighbors=30)


def test_the_proposal_is_the_size_that_predicts_best():
    x, y, _ = survey(Kernel(2.5, 1.0, 1.0, 0.1), num=401)
    found = tile_size.propose(x, y, field_of_length, sizes=(0.05, 0.2, 1.0, 5.0, 20.0))
    assert found.tile_size == 1.0
    assert [row['tile_size'] for row in found.rows] == [0.05, 0.2, 1.0, 5.0, 20.0]
    assert all(row['scattered'] == row['log_likelihood'] for row in found.rows)
    assert 'blockwise' not in found.rows[0]


def test_along_a_track_stretches_are_left_out_too():
    angle = np.linspace(0, 20, 503)
    x = np.column_stack([angle * np.cos(angle), angle * np.sin(angle)])
    y = 5.0 + np.sin(x[:, 0])
    found = tile_size.propose(x, y, field_of_length, sizes=(0.5, 2.0))
    assert found == tile_size.propose(x, y, field_of_length, sizes=(0.5, 2.0))
    for row in found.rows:
        assert row['blockwise'] < row['scattered']
        assert row['log_likelihood'] == pytest.approx((row['blockwise'] + row['scattered']) / 2)


def test_candidates_follow_the_density_of_the_points():
    x = np.random.default_rng(0).uniform(0, 100.0, (4001, 2))
    sizes = tile_size.candidate_sizes(x)
    assert len(sizes) == 6 and sizes == sorted(sizes)
    assert 4 <= tile_size.points_per_tile(x, sizes[0]) < 8
    assert 90 <= tile_size.points_per_tile(x, sizes[-1]) < 200
    np.testing.assert_allclose(tile_size.candidate_sizes(x * 10), np.multiply(sizes, 10), rtol=0.1)


def test_long_recordings_are_thinned_to_contiguous_pieces():
    kept = tile_size.pieces(np.random.default_rng(0), 50_000, 3000)
    assert len(kept) == 3000 and len(set(kept)) == 3000
    assert np.count_nonzero(np.diff(kept) != 1) < tile_size.NUM_PIECES
    assert (np.diff(kept) > 0).all()
    assert len(tile_size.pieces(np.random.default_rng(0), 2999, 3000)) == 2999


def test_recordings_that_say_nothing_are_refused():
    with pytest.raises(InputError, match='3 locations with 4 values'):
        tile_size.propose(np.zeros((3, 2)), np.zeros(4), field_of_length)
    with pytest.raises(InputError, match='0 observations are finite'):
        tile_size.propose(np.zeros((40, 2)), np.full(40, nan), field_of_length)
    with pytest.raises(InputError, match='all 40 points lie at'):
        tile_size.propose(np.zeros((40, 2)), np.zeros(40), field_of_length)
