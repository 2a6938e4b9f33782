"""Readings that are far off are left out where they explain the noise, and nothing else is."""

import dataclasses
from itertools import product
from math import log

import numpy as np
import pytest
import torch
from scipy.stats import t as student

from cmanp_ros.core import Lattice, Normalization, extremes, least_squares, outliers
from cmanp_ros.core.config import ConfigError, LeastSquaresConfig
from cmanp_ros.core.model import CMANP, CMANPConfig
from cmanp_ros.core.state import concatenate, merge, select
from cmanp_ros.field import NeuralField

LARGEST = 1e3
SHARE = 0.05


def config_of(dim_x=2, **overrides):
    options = {'voxels_per_axis': {1: 9, 2: 5, 3: 3}[dim_x], 'outlier_share': SHARE}
    return LeastSquaresConfig(functions_per_axis=4, **(options | overrides))


def default_config():
    return CMANPConfig.field(2, 1).least_squares


def observations(dim_x=2, dim_y=1, n=200, batch=2, seed=0):
    """Return x, y of which many are equal: quantized, as sensors do."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(batch, n, dim_x, generator=generator).double() * 4 - 2
    y = torch.randint(-3, 4, (batch, n, dim_y), generator=generator).double()
    x[:, ::7] = x[:, :1]  # a robot stands still now and then
    return x, y


def smooth(x):
    return torch.sin(x.sum(-1, keepdim=True)) + 0.3 * x[..., :1]


def with_blunders(n=120, num=6, noise=0.05, size=1.5, seed=0):
    """Return x, y (1, n, ...) in a tile, and which of them are far off (n,)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(1, n, 2, generator=generator).double() * 4 - 2
    y = smooth(x) + noise * torch.randn(1, n, 1, generator=generator).double()
    is_off = torch.arange(n) < num
    y[:, :num] += size * torch.tensor([1.0, -1.0]).repeat(num)[:num].unsqueeze(1)
    return x, y, is_off


def solved(config, x, y, mask=None):
    folded = least_squares.sums(config, x, y, mask)
    return outliers.solve(config, least_squares.prior_variances(config, 2), folded)


# What is kept ------------------------------------------------------------------------------------


def expected_extremes(config, x, y):
    """Return those of one tile, by sorting: {(voxel, slot): (x..., y...)}."""
    m, found = config.voxels_per_axis, {}
    for point, value in zip(x.tolist(), y.tolist(), strict=True):
        cell = [min(m - 1, max(0, int((c / 2 + 1) * m / 2 // 1))) for c in point]
        voxel = int(np.ravel_multi_index(cell, (m,) * len(cell)))
        for output, sign in product(range(len(value)), (1, -1)):
            slot = 2 * output + (sign < 0)
            rank = (sign * value[output], *point, *value)
            found[voxel, slot] = max(found.get((voxel, slot), rank), rank)
    return {place: rank[1:] for place, rank in found.items()}


@pytest.mark.parametrize('dim_y', [1, 2])
@pytest.mark.parametrize('dim_x', [1, 2, 3])
def test_the_highest_and_the_lowest_of_each_voxel_are_kept(dim_x, dim_y):
    config, (x, y) = config_of(dim_x), observations(dim_x, dim_y)
    kept = least_squares.sums(config, x, y).voxel_extremes
    assert kept.shape == (2, config.voxels_per_axis**dim_x, 2 * dim_y, dim_x + dim_y + 1)
    for tile in range(2):
        expected = expected_extremes(config, x[tile], y[tile])
        assert {tuple(i) for i in (kept[tile, ..., -1] > 0).nonzero().tolist()} == set(expected)
        for (voxel, slot), values in expected.items():
            assert kept[tile, voxel, slot].tolist() == [*values, 1.0]


@pytest.mark.parametrize('dim_y', [1, 2])
@pytest.mark.parametrize('sizes', [[200], [1] * 200, [3, 90, 0, 107]])
def test_order_and_batches_do_not_matter(sizes, dim_y):
    config, (x, y) = config_of(), observations(dim_y=dim_y)
    whole = least_squares.sums(config, x, y).voxel_extremes
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    state = least_squares.empty(config, 2, dim_y, 2)
    for some in order.split(sizes):
        part = least_squares.sums(config, x[:, some], y[:, some])
        state = least_squares.merge(state, part)
    assert torch.equal(state.voxel_extremes, whole)


def test_points_that_are_not_there_are_not_kept():
    config, (x, y) = config_of(), observations()
    mask = torch.rand(2, 200, generator=torch.Generator().manual_seed(2)) < 0.2
    kept = least_squares.sums(config, x, y, mask).voxel_extremes
    for tile in range(2):
        own = (part[tile : tile + 1, mask[tile]] for part in (x, y))
        assert torch.equal(kept[tile], least_squares.sums(config, *own).voxel_extremes[0])


def test_what_is_forgotten_counts_less_and_a_fresh_copy_in_full():
    config, (x, y) = config_of(), observations()
    once = least_squares.sums(config, x, y)
    faded = least_squares.forget(once, 0.25)
    assert torch.equal(faded.voxel_extremes[..., :-1], once.voxel_extremes[..., :-1])
    assert torch.equal(faded.voxel_extremes[..., -1], once.voxel_extremes[..., -1] / 4)
    for state in (least_squares.merge(faded, once), least_squares.merge(once, faded)):
        assert torch.equal(state.voxel_extremes, once.voxel_extremes)


def test_what_fades_gives_way_to_newer_readings_in_any_order():
    config, (x, y) = config_of(), observations()
    far_out, newer = (least_squares.sums(config, x, y + offset) for offset in (6.0, 0.0))

    def fade(a, times):
        for _ in range(times):
            a = least_squares.forget(a, 0.5)
        return a

    soon = least_squares.merge(fade(far_out, 2), newer)
    late = least_squares.merge(fade(far_out, 20), newer)
    highest = soon.voxel_extremes[:, :, 0, 2]
    there = highest > 0
    assert torch.equal(highest[there], far_out.voxel_extremes[:, :, 0, 2][there])
    assert torch.equal(late.voxel_extremes, newer.voxel_extremes)
    merged_then_faded = fade(least_squares.merge(fade(far_out, 7), newer), 5)
    faded_then_merged = least_squares.merge(fade(newer, 5), fade(far_out, 12))
    assert torch.equal(merged_then_faded.voxel_extremes, faded_then_merged.voxel_extremes)


def test_in_a_map_that_faded_blunders_are_found_as_in_a_new_one():
    sizes = {'num_latents': 4, 'num_latents_per_block': 4, 'dim_model': 16, 'num_blocks': 1}
    model = CMANP(CMANPConfig.field(2, 1, **sizes)).eval()

    def field_of():
        return NeuralField(model, Lattice.of(model.config, 5.0), Normalization(), 10.0)

    rng, fields = np.random.default_rng(5), (field_of(), field_of())
    x = rng.uniform(0, 30, (1500, 2))
    y = np.sin(x[:, 0] / 8) + 0.02 * rng.standard_normal(len(x))
    fields[1].observe(x, y + 6.0)  # the field was another one, long ago
    fields[1].forget(300.0)
    y = y + 4.0 * (rng.random(len(x)) < 0.05)
    targets, found = rng.uniform(3, 27, (300, 2)), []
    for field in fields:
        field.observe(x, y)
        found.append((*field.predict(targets), field.num_far_off))
    assert found[0][2] > 50
    assert found[1][2] == found[0][2]
    np.testing.assert_allclose(found[1][0], found[0][0], atol=1e-3)
    np.testing.assert_allclose(found[1][1], found[0][1], rtol=1e-2)


def test_each_observation_is_a_candidate_once():
    x, y = torch.tensor([[[0.1, 0.1], [0.2, 0.1], [-1.9, 1.9]]]), torch.tensor([[[1.0], [2], [3]]])
    kept = least_squares.sums(config_of(), x.double(), y.double()).voxel_extremes
    found = extremes.candidates(kept, 2)
    there = found.weight[0] > 0
    assert sorted(found.y[0, there, 0].tolist()) == [1.0, 2.0, 3.0]
    x = found.x[0, there][found.y[0, there, 0].argsort()]
    torch.testing.assert_close(x, torch.tensor([[0.1, 0.1], [0.2, 0.1], [-1.9, 1.9]]).double())


def test_without_a_share_nothing_is_kept():
    config, (x, y) = config_of(outlier_share=0.0), observations()
    assert least_squares.sums(config, x, y).voxel_extremes.numel() == 0


@pytest.mark.parametrize('share', [-0.1, 0.5, 1.0, float('nan')])
def test_shares_out_of_range_are_refused(share):
    with pytest.raises(ConfigError, match=r'outlier_share is .*expected a number in \[0, 0.5\)'):
        config_of(outlier_share=share)


# Which are far off -------------------------------------------------------------------------------


def test_the_probability_is_that_of_a_regression_without_the_reading():
    rng = np.random.default_rng(0)
    n, size, noise = 30, 4, 0.3
    phi, y = rng.standard_normal((n, size)), rng.standard_normal(n)
    y[0] += 6
    config = config_of()

    def posterior(kept):
        precision = np.eye(size) + phi[kept].T @ phi[kept] / noise**2
        covariance = np.linalg.inv(precision)
        return covariance @ phi[kept].T @ y[kept] / noise**2, covariance

    weights, covariance = posterior(np.arange(n))
    variance = np.einsum('ni,ij,nj->n', phi, covariance, phi)
    as_tensor = [torch.as_tensor(part)[None, :, None] for part in (y, phi @ weights, variance)]
    y_, mean_, variance_ = as_tensor
    ones = torch.ones(1, n, dtype=torch.float64)
    found = extremes.Candidates(torch.zeros(1, n, 2).double(), y_, ones)
    noise2 = torch.tensor([[noise**2]]).double()
    chance = outliers.probability(config, found, mean_, variance_, noise2, ones, ones.sum(1))[0]
    freedom = 2 * config.amplitude_shape + n - variance.sum() / noise**2
    for i in range(n):
        weights, covariance = posterior(np.delete(np.arange(n), i))
        spread = noise**2 + phi[i] @ covariance @ phi[i]
        square = (y[i] - phi[i] @ weights) ** 2 / spread
        z = np.sqrt(square * (freedom - 1) / max(freedom - square, 1))
        wide = np.sqrt((spread + (outliers.WIDER**2 - 1) * noise**2) / spread)
        ratio = student.logpdf(z / wide, freedom - 1) - log(wide) - student.logpdf(z, freedom - 1)
        expected = 1 / (1 + (1 - SHARE) / SHARE * np.exp(-ratio))
        expected = expected if expected > outliers.LIKELY else 0
        assert float(chance[i]) == pytest.approx(expected, rel=1e-6)
    assert chance[0] > 0.5


def test_blunders_hardly_change_what_is_predicted():
    config = default_config()
    naively = dataclasses.replace(config, outlier_share=0.0)
    targets = torch.rand(1, 200, 2, generator=torch.Generator().manual_seed(9)).double() * 3 - 1.5
    squares, noises = torch.zeros(3), torch.zeros(3)
    for seed in range(8):
        x, y, is_off = with_blunders(seed=seed)
        given = (config, None), (naively, None), (naively, ~is_off[None])
        for i, (settings, mask) in enumerate(given):
            found = solved(settings, x, y, mask)
            mean = least_squares.predict(settings, found, targets)[0]
            squares[i] += (mean - smooth(targets)).square().mean()
            noises[i] += found.noise_variance.item()
    robust, naive, without = squares
    assert robust < 0.25 * naive and robust < 3 * without
    robust, naive, without = noises
    assert naive > 20 * without  # blunders look like noise
    assert robust < 0.1 * naive


def test_what_is_left_out_is_counted_in_the_part_of_a_tile_that_is_its_own():
    config = default_config()
    x, y, is_off = with_blunders()
    folded, variances = least_squares.sums(config, x, y), least_squares.prior_variances(config, 2)
    scale = least_squares.default_scale(config, 1, 1)
    weight = least_squares.weights(config, variances, folded, scale)
    assert solved(config, x, y).num_far_off.tolist() == [is_off.sum()]
    finest = torch.tensor([[0, 0, 0]])
    for nearest in (0.0, 0.8, *Lattice(1.0, 2, 3, 3).nearest(finest).tolist()):
        half = torch.tensor([nearest])
        found = outliers.posterior(config, variances, folded, scale, weight, half)
        assert found.num_far_off.tolist() == [((x[0].abs() < nearest).all(-1) & is_off).sum()]
    assert solved(config, x, y, ~is_off[None]).num_far_off.tolist() == [0]


def test_near_a_reading_that_was_left_out_the_bars_are_wider():
    config = default_config()
    x, y, is_off = with_blunders(num=1)
    found, without = (solved(config, x, y, mask) for mask in (None, ~is_off[None]))
    stddev = [
        least_squares.predict(config, one, x[:, :1])[1].sqrt().item() for one in (found, without)
    ]
    assert stddev[0] > 1.5 * stddev[1]  # it may be real after all


def test_where_nothing_is_far_off_hardly_anything_changes():
    config = default_config()
    num_same, num, naively = 0, 20, dataclasses.replace(config, outlier_share=0.0)
    for seed in range(num):
        x, y, _ = with_blunders(num=0, seed=seed)
        found, expected = (solved(settings, x, y) for settings in (config, naively))
        num_same += torch.equal(found.mean, expected.mean)
        mean, other = (least_squares.predict(config, one, x)[0] for one in (found, expected))
        assert (mean - other).square().mean() < 0.02**2  # far below the noise
    assert num_same >= 0.9 * num


def test_few_points_cannot_tell():
    config = default_config()
    x, y, _ = with_blunders(n=outliers.ENOUGH, num=2)
    found, expected = (
        solved(dataclasses.replace(config, outlier_share=share), x, y) for share in (SHARE, 0.0)
    )
    assert torch.equal(found.mean, expected.mean)


@pytest.mark.parametrize('frequency', [6, 9, 12])
def test_peaks_that_cannot_be_resolved_are_not_left_out(frequency):
    config = default_config()
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(1, 150, 2, generator=generator).double() * 4 - 2
    y = torch.exp(3 * torch.sin(frequency * x).prod(-1, keepdim=True)) / 5
    found, expected = (
        solved(dataclasses.replace(config, outlier_share=share), x, y) for share in (SHARE, 0.0)
    )
    assert torch.equal(found.mean, expected.mean)


def test_a_blunder_of_one_output_is_left_out():
    config = default_config()
    x, y, _ = with_blunders(num=0)
    both = torch.cat([y, -y], -1)
    both[:, :6, 1] += 2.0
    robust, naive = (
        solved(dataclasses.replace(config, outlier_share=share), x, both) for share in (SHARE, 0.0)
    )
    assert robust.noise_variance[0, 1] < 0.2 * naive.noise_variance[0, 1]


def test_tiles_are_solved_alone_as_together():
    config = default_config()
    variances = least_squares.prior_variances(config, 2)
    tiles = [with_blunders(num=num, seed=num)[:2] for num in (0, 3, 8)]
    tiles = [least_squares.sums(config, *tile) for tile in tiles]
    together = least_squares.LeastSquaresSums(*(torch.cat(p) for p in zip(*tiles, strict=True)))
    found = outliers.solve(config, variances, together)
    for i, tile in enumerate(tiles):
        alone = outliers.solve(config, variances, tile)
        for one, other in zip(found, alone, strict=True):
            torch.testing.assert_close(one[i : i + 1], other, rtol=1e-6, atol=1e-8)


# In states and maps ------------------------------------------------------------------------------


def test_states_merge_and_split_with_their_extremes():
    model = CMANP(CMANPConfig.field(2, 1))
    x, y, _ = with_blunders()
    whole = model.update(model.init_state(), x, y)
    parts = [model.update(model.init_state(), *(v[:, p::3] for v in (x, y))) for p in range(3)]
    merged = merge(parts[2], merge(parts[0], parts[1]))
    extremes = whole.least_squares.voxel_extremes
    assert torch.equal(merged.least_squares.voxel_extremes, extremes)
    pair = concatenate([whole, parts[0]])
    assert torch.equal(select(pair, slice(0, 1)).least_squares.voxel_extremes, extremes)


def test_a_map_with_blunders_predicts_as_one_without():
    rng = np.random.default_rng(4)
    x = rng.uniform(0, 30, (4000, 2))
    y = np.sin(x[:, 0] / 5) + np.cos(x[:, 1] / 7) + 0.05 * rng.standard_normal(len(x))
    off = rng.random(len(x)) < 0.02
    sizes = {'num_latents': 4, 'num_latents_per_block': 4, 'dim_model': 16, 'num_blocks': 1}
    errors = []
    for share in (SHARE, 0.0):
        config = CMANPConfig.field(2, 1, **sizes)
        options = dataclasses.replace(config.least_squares, outlier_share=share)
        model = CMANP(dataclasses.replace(config, least_squares=options)).eval()
        field = NeuralField(model, Lattice.of(model.config, 5.0), Normalization())
        field.observe(x, y + 3.0 * off)
        assert field.num_far_off == 0  # nothing was solved
        targets = rng.uniform(3, 27, (500, 2))
        mean, stddev = field.predict(targets)
        truth = np.sin(targets[:, 0] / 5) + np.cos(targets[:, 1] / 7)
        errors.append((np.sqrt(np.mean((mean[:, 0] - truth) ** 2)), np.median(stddev)))
        least, most = (0.85 * off.sum(), 1.2 * off.sum()) if share else (0, 0)
        assert least <= field.num_far_off <= most
    assert errors[0][0] < 0.6 * errors[1][0] and errors[0][1] < 0.6 * errors[1][1]


# What strangers send -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    'change',
    [
        lambda kept: kept * torch.tensor([1.0, 1, 1, 1.5]),  # counts more than its voxel's newest
        lambda kept: kept * torch.tensor([1.0, 1, 1, -1]),
        lambda kept: kept * torch.tensor([-1.0, 1, 1, 1]),  # in another voxel
        lambda kept: kept * torch.tensor([1.0, 1, 1e4, 1]),  # beyond the largest value
        lambda kept: kept * torch.tensor([1.0, 1, 3, 1]),  # larger than anything observed
    ],
)
def test_extremes_that_nobody_observed_are_told(change):
    config, (x, y) = config_of(), observations(n=120)
    a = least_squares.sums(config, x, y)
    num = torch.full((2,), 120)
    assert least_squares.is_possible(config, a, num, LARGEST).all()
    a = a._replace(voxel_extremes=change(a.voxel_extremes))
    assert not least_squares.is_possible(config, a, num, LARGEST).any()
