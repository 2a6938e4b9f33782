"""Incremental equals batch, predictions are lazy, the network corrects the regression."""

from dataclasses import replace
from itertools import product
from math import exp, log, log1p

import pytest
import small_models
import torch
from small_models import PRESETS, assert_states_close, build, points

import cmanp_ros.core.model
from cmanp_ros.core import (
    CMANP,
    CMANPConfig,
    attention,
    forget,
    least_squares,
    merge,
    outliers,
)
from cmanp_ros.core.attention import AttentionSums
from cmanp_ros.core.errors import InputError
from cmanp_ros.core.lattice import OneTile
from cmanp_ros.core.model import LEAST_STDDEV, Prior
from cmanp_ros.core.state import select
from cmanp_ros.core.world import World

N, N_TARGET = 13, 7
TOLERANCE = {
    torch.float64: {'rtol': 1e-10, 'atol': 1e-10},
    torch.float32: {'rtol': 1e-5, 'atol': 1e-5},
}
EXACT = TOLERANCE[torch.float64]
CHUNKINGS = [(13,), (1,) * 13, (3, 0, 10), (0, 6, 7), (11, 2, 0)]
VARIANTS = list(product(PRESETS, (1, 2, 3), (1, 2)))
NAMES = [f'{preset}-{dim_x}d-{dim_y}' for preset, dim_x, dim_y in VARIANTS]


@pytest.fixture(params=VARIANTS, ids=NAMES)
def variant(request):
    """Return a configuration: each preset in each dimension."""
    preset, dim_x, dim_y = request.param
    return PRESETS[preset](dim_x, dim_y)


@pytest.fixture(params=PRESETS)
def model(request):
    return build(PRESETS[request.param](dim_x=2, dim_y=3))


@pytest.fixture
def field():
    return build(small_models.field(dim_x=2, dim_y=3))


def folded(model, x, y):
    return model.update(model.init_state(len(x)), x, y)


def targets(config, n=N_TARGET, batch=1):
    return points(config, n, batch)[0]


def assert_same_predictions(model, found, expected, tolerance=EXACT):
    """Compare predictions from two states, covariances included."""
    x = targets(model.config, batch=expected.batch).to(model.encoder.latents.dtype)
    found, expected = model.predict(found, x, joint=True), model.predict(expected, x, joint=True)
    for name in ('mean', 'stddev', 'covariance'):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), **tolerance)


# Updating ----------------------------------------------------------------------------------------


@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
def test_every_chunking_gives_state_and_predictions_of_one_batch(variant, dtype):
    model, (x, y) = build(variant, dtype), points(variant, N, batch=2, dtype=dtype)
    one_batch = folded(model, x, y)
    for sizes in CHUNKINGS:
        state = model.init_state(2)
        for part in zip(x.split(sizes, 1), y.split(sizes, 1), strict=True):
            state = model.update(state, *part)
        assert_states_close(state, one_batch, **TOLERANCE[dtype])
        assert_same_predictions(model, state, one_batch, TOLERANCE[dtype])


@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
def test_every_order_gives_state_and_predictions_of_one_batch(variant, dtype):
    model, (x, y) = build(variant, dtype), points(variant, N, batch=2, dtype=dtype)
    one_batch = folded(model, x, y)
    for _ in range(3):
        order = torch.randperm(N)
        state = folded(model, x[:, order], y[:, order])
        assert_states_close(state, one_batch, **TOLERANCE[dtype])
        assert_same_predictions(model, state, one_batch, TOLERANCE[dtype])


def test_merged_states_of_two_robots_equal_one_that_saw_everything(variant):
    model, (x, y) = build(variant), points(variant, N, batch=2)
    first, second = folded(model, x[:, :5], y[:, :5]), folded(model, x[:, 5:], y[:, 5:])
    everything = folded(model, x, y)
    for state in (merge(first, second), merge(second, first)):
        assert_states_close(state, everything, **EXACT)
        assert_same_predictions(model, state, everything)


def test_rows_of_a_batch_do_not_see_each_other(variant):
    model, (x, y) = build(variant), points(variant, N, batch=3)
    x_target = targets(variant, batch=3)
    together = model.predict(folded(model, x, y), x_target, joint=True)
    for row in range(3):
        one = slice(row, row + 1)
        alone = model.predict(folded(model, x[one], y[one]), x_target[one], joint=True)
        for name in ('mean', 'stddev', 'covariance'):
            rows = getattr(together, name)[one]
            torch.testing.assert_close(rows, getattr(alone, name), **EXACT)


def test_update_with_no_points_leaves_state_unchanged(model):
    x, y = points(model.config, N, batch=2)
    for state in (model.init_state(2), folded(model, x, y)):
        assert_states_close(model.update(state, x[:, :0], y[:, :0]), state, rtol=0, atol=0)


def ragged(n):
    """Return which of n points are there: another number in each row, none in the second."""
    mask = torch.rand(3, n) < 0.6
    mask[0, 0], mask[0, -1], mask[1] = False, True, False
    mask[2, :5] = False  # a whole chunk
    return mask


@pytest.mark.parametrize('junk', [0.0, -1e9])
@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
def test_masked_points_are_the_same_as_points_left_out(variant, dtype, junk):
    model, (x, y) = build(variant, dtype), points(variant, N, batch=3, dtype=dtype)
    before, mask = points(variant, 2, batch=3, dtype=dtype), ragged(N)
    padded = (torch.where(mask.unsqueeze(-1), part, junk) for part in (x, y))
    start = folded(model, *before)
    together = model.update(start, *padded, mask)
    assert together.num_observations.tolist() == (2 + mask.sum(1)).tolist()
    for row in range(3):
        kept = x[row, mask[row]].unsqueeze(0), y[row, mask[row]].unsqueeze(0)
        alone = model.update(select(start, slice(row, row + 1)), *kept)
        found = select(together, slice(row, row + 1))
        assert_states_close(found, alone, **TOLERANCE[dtype])
        assert_same_predictions(model, found, alone, TOLERANCE[dtype])


def test_a_row_with_no_points_of_its_own_keeps_its_state(model):
    x, y = points(model.config, N, batch=3)
    for start in (model.init_state(3), folded(model, *points(model.config, 2, batch=3))):
        state = model.update(start, x, y, ragged(N))
        assert_states_close(select(state, [1]), select(start, [1]), rtol=0, atol=0)


def test_a_mask_that_keeps_all_changes_nothing(model):
    x, y = points(model.config, N, batch=3)
    state = model.update(model.init_state(3), x, y, torch.full((3, N), True))
    assert_states_close(state, folded(model, x, y), rtol=0, atol=0)


@pytest.mark.parametrize('preset', PRESETS)
def test_masked_points_have_no_part_in_gradients(preset):
    model, gradients = build(PRESETS[preset]()).requires_grad_(True), []
    x, y = points(model.config, N)
    mask = ragged(N)[:1]
    for kept in (slice(None), mask[0]):
        there = mask[:, kept]
        tokens = model.embed(x[:, kept][there], y[:, kept][there])
        sums = model.encoder.fold(tokens, there)
        model.zero_grad()
        sum(z.square().sum() for z in model.latents(sums)).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    found, expected = gradients
    assert found.keys() == expected.keys() and 'embedder.0.weight' in found
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], **EXACT)


@pytest.mark.parametrize('chunk_size', [1, 7, 28, 29, 1024])
def test_chunk_size_bounds_what_is_folded_at_once_and_never_the_result(
    model, monkeypatch, chunk_size
):
    x, y = points(model.config, 29)
    expected, seen = folded(model, x, y), []
    other = build(replace(model.config, chunk_size=chunk_size))
    other.load_state_dict(model.state_dict())
    fold, sums = other.encoder.fold, least_squares.sums

    def spy_fold(tokens, mask=None):
        seen.append(tokens.shape[1])
        return fold(tokens, mask)

    def spy_sums(config, x, y, mask=None):
        seen.append(x.shape[1])
        return sums(config, x, y, mask)

    monkeypatch.setattr(other.encoder, 'fold', spy_fold)
    monkeypatch.setattr(least_squares, 'sums', spy_sums)
    state = folded(other, x, y)
    assert max(seen) == min(chunk_size, 29)
    assert_states_close(state, expected, **EXACT)
    assert_same_predictions(model, state, expected)


class LargestTensor(torch.overrides.TorchFunctionMode):
    """Record the most numbers in a floating-point result while it is active."""

    largest = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        """Call the function and look at what it returns."""
        result = function(*args, **kwargs or {})
        if isinstance(result, torch.Tensor) and result.is_floating_point():
            self.largest = max(self.largest, result.numel())
        return result


def test_memory_while_folding_does_not_grow_with_the_number_of_points(model):
    largest = []
    folded(model, *points(model.config, 1))  # what does not depend on points is kept
    for n in (101, 1009):
        x, y = points(model.config, n)
        with LargestTensor() as mode:
            folded(model, x, y)
        largest.append(mode.largest)
    assert largest[0] == largest[1]


# The decoder's own answer ------------------------------------------------------------------------


def own_answer(log_odds):
    """Return a model with an own answer of mean 1 and stddev 0.1, and the same model without."""
    model = build(small_models.field(dim_x=2, dim_y=3, own_answer=True))
    last = model.predictor[-1]
    values = torch.tensor(
        [0.0, 0.0, 0.0, 1.0, 5 * torch.tensor(0.1).log().div(5).atanh(), log_odds]
    )
    last.bias.copy_(values.repeat_interleave(3))
    last.weight.zero_()
    bare = CMANP(replace(model.config, own_answer=False)).double().eval().requires_grad_(False)
    weights = model.state_dict()
    for name in ('predictor.2.weight', 'predictor.2.bias'):
        weights[name] = weights[name][:9]
    bare.load_state_dict(weights)
    return model, bare


def test_own_answer_counts_as_the_decoder_says():
    x = targets(small_models.field(), 50)
    for log_odds, is_own in ((1e3, True), (-1e3, False)):
        model, bare = own_answer(log_odds)
        state = folded(model, *points(model.config, N))
        found, regression = model.predict(state, x), bare.predict(state, x)
        own_stddev = (0.1**2 + (LEAST_STDDEV * regression.stddev) ** 2).sqrt()
        expected = (1.0, own_stddev) if is_own else (regression.mean, regression.stddev)
        for part, wanted in zip((found.mean, found.stddev), expected, strict=True):
            wanted = torch.as_tensor(wanted, dtype=part.dtype).expand_as(part)
            torch.testing.assert_close(part, wanted, rtol=0.05, atol=0.05)


def test_the_network_never_claims_less_than_half_of_what_the_regression_leaves_open():
    model, bare = own_answer(1e3)  # all of the answer is its own
    x = targets(model.config, 50)
    state = folded(model, *points(model.config, N))
    stddev = bare.predict(state, x).stddev
    model.predictor[-1].bias[12:15] = -1e3  # and it is sure of it
    assert (model.predict(state, x).stddev >= LEAST_STDDEV * stddev).all()
    for second, factor in ((-1e3, LEAST_STDDEV), (1e3, exp(2.5))):
        bare.predictor[-1].bias[3:6] = second
        torch.testing.assert_close(bare.predict(state, x).stddev, factor * stddev)


def test_untrained_own_answer_steps_back_where_least_squares_is_precise():
    model, bare = own_answer(0.0)
    x = points(model.config, 400)[0]
    state = folded(model, x, 0.01 * x.sum(-1, keepdim=True).expand(-1, -1, 3))
    found, regression = model.predict(state, x), bare.predict(state, x)
    assert regression.stddev.max() < 0.1
    assert (found.mean - regression.mean).abs().max() < 3 * regression.stddev.max()


# Errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('shape_x', 'shape_y', 'message'),
    [
        ((2, 5, 3), (2, 5, 3), 'x has shape (2, 5, 3), expected (batch, n, dim) = (2, n, 2)'),
        ((2, 5, 2), (2, 5, 1), 'y has shape (2, 5, 1), expected (batch, n, dim) = (2, n, 3)'),
        ((1, 5, 2), (1, 5, 3), 'x has shape (1, 5, 2), expected (batch, n, dim) = (2, n, 2)'),
        ((2, 5, 2), (1, 5, 3), 'y has shape (1, 5, 3), expected (batch, n, dim) = (2, n, 3)'),
        ((5, 2), (5, 3), 'x has shape (5, 2), expected (batch, n, dim) = (2, n, 2)'),
        ((2, 5, 2), (2, 4, 3), 'x has 5 points and y 4: expected as many'),
        ((2, 5, 2), (2, 0, 3), 'x has 5 points and y 0: expected as many'),
    ],
)
def test_update_refuses_wrong_shapes(model, without_shape_checks, shape_x, shape_y, message):
    state = model.init_state(2)
    with pytest.raises(InputError) as error:
        model.update(state, torch.zeros(shape_x), torch.zeros(shape_y))
    assert str(error.value) == message
    assert_states_close(state, model.init_state(2), rtol=0, atol=0)


@pytest.mark.parametrize('wrong', [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize('name', ['x', 'y'])
def test_update_refuses_values_that_are_not_finite(model, name, wrong):
    values = dict(zip('xy', points(model.config, N), strict=True))
    values[name][0, -1, -1] = wrong
    state = model.init_state()
    with pytest.raises(InputError) as error:
        model.update(state, **values)
    assert str(error.value) == f'{name} has NaN or infinite numbers; drop those points first'
    assert_states_close(state, model.init_state(), rtol=0, atol=0)


@pytest.mark.parametrize('shape', [(1, 5, 2), (2, 5, 1), (5, 2), (2, 2, 5, 2)])
def test_predict_refuses_wrong_shapes(model, without_shape_checks, shape):
    with pytest.raises(InputError) as error:
        model.predict(model.init_state(2), torch.zeros(shape))
    assert str(error.value) == (
        f'x_target has shape {shape}, expected (batch, n, dim) = (2, n, 2)'
    )


def test_predict_refuses_targets_that_are_not_finite(model):
    x = targets(model.config)
    x[0, 3, 1] = torch.nan
    message = 'x_target has NaN or infinite numbers; drop those targets first'
    with pytest.raises(InputError, match=message):
        model.predict(model.init_state(), x)


def test_fields_cannot_be_sampled_without_the_regression():
    model = build(small_models.paper())
    with pytest.raises(InputError, match='no least-squares memory, so no fields to sample'):
        model.sample_fields(model.init_state(), targets(model.config), 3)


# Predicting --------------------------------------------------------------------------------------


def test_prediction_has_a_number_for_each_target_and_output(variant):
    model, (x, y) = build(variant), points(variant, N, batch=2)
    for state in (model.init_state(2), folded(model, x, y)):
        for n in (0, 1, N_TARGET):
            prediction = model.predict(state, targets(variant, n, batch=2), joint=True)
            assert prediction.mean.shape == prediction.stddev.shape == (2, n, variant.dim_y)
            assert prediction.covariance.shape == (2, variant.dim_y, n, n)
            assert prediction.mean.isfinite().all() and (prediction.stddev > 0).all()


@pytest.mark.parametrize('dim_x', [1, 2, 3])
def test_prediction_of_no_observations_is_finite_and_wide(dim_x):
    config = small_models.field(dim_x, dim_y=2)
    model = CMANP(config).eval()
    x, y = points(config, 37)
    x_target = targets(config, 29)
    before = model.predict(model.init_state(), x_target)
    after = model.predict(folded(model, x, y), x_target)
    assert (before.mean == 0).all() and before.stddev.isfinite().all()
    assert (before.stddev > 0.5).all()
    assert after.stddev.mean() < before.stddev.mean()


@pytest.mark.parametrize('at_once', [1, 5, 7, 8])
def test_predictions_in_parts_equal_predictions_of_all(model, monkeypatch, at_once):
    x, y = points(model.config, N, batch=2)
    state, x_target = folded(model, x, y), targets(model.config, 17, batch=2)
    expected = model.predict(state, x_target)
    parts = [model.predict(state, part) for part in x_target.split(at_once, 1)]
    monkeypatch.setattr(cmanp_ros.core.model, 'TARGETS_AT_ONCE', at_once)
    inside = model.predict(state, x_target)
    for name in ('mean', 'stddev'):
        whole = getattr(expected, name)
        torch.testing.assert_close(
            torch.cat([getattr(part, name) for part in parts], 1), whole, **EXACT
        )
        torch.testing.assert_close(getattr(inside, name), whole, **EXACT)


def test_a_target_does_not_see_the_others(model):
    x, y = points(model.config, N)
    state, x_target = folded(model, x, y), targets(model.config)
    together, alone = model.predict(state, x_target), model.predict(state, x_target[:, 3:4])
    torch.testing.assert_close(together.mean[:, 3:4], alone.mean, **EXACT)
    torch.testing.assert_close(together.stddev[:, 3:4], alone.stddev, **EXACT)


def test_joint_variances_are_the_marginal_ones(variant):
    model, (x, y) = build(variant), points(variant, N, batch=2)
    state, x_target = folded(model, x, y), targets(variant, batch=2)
    joint, marginal = model.predict(state, x_target, joint=True), model.predict(state, x_target)
    diagonal = joint.covariance.diagonal(dim1=-2, dim2=-1).mT
    torch.testing.assert_close(diagonal, joint.stddev.square(), **EXACT)
    torch.testing.assert_close(joint.stddev, marginal.stddev, **EXACT)
    torch.testing.assert_close(joint.mean, marginal.mean, **EXACT)
    assert marginal.covariance is None


def test_joint_covariance_at_nearby_targets_is_positive_definite(field):
    state = folded(field, *points(field.config, N))
    x_target = torch.tensor([[[0.1, 0.2]]]) + 1e-9 * torch.randn(1, 5, 2, dtype=torch.float64)
    prediction = field.predict(state, x_target, joint=True)
    torch.linalg.cholesky(prediction.covariance)
    correlation = prediction.covariance[0, 0, 0, 1] / prediction.covariance[0, 0, 0, 0]
    assert 0 < correlation < 1


def test_joint_log_prob_equals_the_multivariate_normal(model):
    x, y = points(model.config, N, batch=2)
    x_target, y_target = points(model.config, N_TARGET, batch=2)
    prediction = model.predict(folded(model, x, y), x_target, joint=True)
    oracle = torch.distributions.MultivariateNormal(prediction.mean.mT, prediction.covariance)
    torch.testing.assert_close(prediction.log_prob(y_target), oracle.log_prob(y_target.mT))


def test_an_untrained_field_model_is_least_squares_alone():
    for dim_x, dim_y in product((1, 2, 3), (1, 2)):
        config = small_models.field(dim_x, dim_y)
        model = CMANP(config).eval()
        x, y = points(config, N, batch=2)
        x_target = targets(config, batch=2)
        prediction = model.predict(folded(model, x, y), x_target, joint=True)
        memory = config.least_squares
        regression = outliers.solve(
            memory,
            least_squares.prior_variances(memory, dim_x),
            merge_chunks(memory, x, y, config.chunk_size),
        )
        mean, variance = least_squares.predict(memory, regression, x_target)
        stddev = (variance + regression.noise_variance.unsqueeze(1)).sqrt()
        assert torch.equal(prediction.mean, mean)
        assert torch.equal(prediction.stddev, stddev)
        noise = regression.noise_variance[..., None, None] * torch.eye(N_TARGET)
        covariance = least_squares.joint_covariance(memory, regression, x_target) + noise
        torch.testing.assert_close(prediction.covariance, covariance, **EXACT)


def merge_chunks(memory, x, y, chunk_size):
    """Return the sums of least squares, added up in the order of the model."""
    state = least_squares.empty(memory, x.shape[-1], y.shape[-1], len(x))
    for part in zip(x.split(chunk_size, 1), y.split(chunk_size, 1), strict=True):
        state = least_squares.merge(state, least_squares.sums(memory, *part))
    return state


def decoded(model, state, x_target, change=lambda prior: None):
    """Return what one tile answers, and its regression, which may be changed before."""
    encoding = model.encoding(state)
    prior = model.regress(encoding, x_target)
    change(prior)
    return model.decode(encoding.projected, x_target, prior), prior


def test_tiles_with_different_numbers_of_targets_answer_as_each_alone(field):
    x, y = points(field.config, N, batch=3)
    state, (x_target, _) = folded(field, x, y), points(field.config, N_TARGET, batch=3)
    whole, prior = decoded(field, state, x_target)
    mask = torch.arange(N_TARGET) < torch.tensor([[N_TARGET], [0], [3]])
    some = [part.expand(*mask.shape, *part.shape[2:])[mask] for part in prior]
    projected = field.encoding(state).projected
    found = field.decode(projected, x_target[mask], Prior(*some), mask=mask)
    for one, other in zip(found, whole, strict=True):
        torch.testing.assert_close(one, other[mask], **EXACT)


def test_an_untrained_field_model_weights_its_answers_by_precision():
    model = CMANP(small_models.field(dim_x=2, dim_y=3)).eval()
    x_target = targets(model.config, batch=2)
    state = folded(model, *points(model.config, N, batch=2))

    def coarsest(prior):  # has no head start
        prior.context[..., 0] = 1.0

    found, prior = decoded(model, state, x_target, coarsest)
    assert (found.correction == 1).all()
    precision = 1 / (prior.variance + prior.noise_variance)
    torch.testing.assert_close(found.log_weight, precision.log(), **EXACT)


@pytest.mark.parametrize('level', [0, 1, 2])  # finest to coarsest
@pytest.mark.parametrize(
    ('seen', 'honesty', 'full', 'log_amplitude', 'is_trusted', 'for_both'),
    [
        (1.0, 1.0, 0.1, 0.0, True, 0.38),
        (1.0, 1.0, 0.1, -3.0, True, 0.38),
        (0.8, 1.0, 0.1, 0.0, True, 0.28),  # nearly all over
        (0.8, 0.7, 0.1, 0.0, True, 0.0),  # by passes
        (0.8, 0.3, 0.8, 0.0, True, 0.28),  # by passes that fill it
        (0.2, 1.0, 0.1, 0.0, False, 0.0),
        (0.8, 1.0, 0.1, 1.0, False, 0.0),  # a cliff
    ],
)
def test_finer_tiles_that_are_trusted_have_a_head_start(
    level, seen, honesty, full, log_amplitude, is_trusted, for_both
):
    def change(prior):
        prior.context[..., 0] = level - 1
        prior.summary[..., 5], prior.summary[..., 8] = log_amplitude, seen
        prior.summary[..., 6], prior.summary[..., 7] = log1p(full * num_voxels * 2), log(honesty)

    model = CMANP(small_models.field(dim_x=2, dim_y=3)).eval()
    num_voxels = model.config.least_squares.voxels_per_axis**2
    assert model.config.least_squares.points_per_voxel == 2
    state = folded(model, *points(model.config, N, batch=2))
    x_target = targets(model.config, batch=2)
    before, prior = decoded(model, state, x_target)
    found, _ = decoded(model, state, x_target, change)
    weight = found.log_weight + (prior.variance + prior.noise_variance).log()
    expected = torch.full_like(found.mean, (2 - level) ** 2 * is_trusted)
    torch.testing.assert_close(found.head_start + weight, expected, rtol=0.02, atol=0.02)
    torch.testing.assert_close(weight, for_both * expected, rtol=0.02, atol=0.02)
    assert found.head_start.shape == found.mean.shape
    for name in ('mean', 'stddev', 'correction'):  # of an untrained model
        torch.testing.assert_close(getattr(found, name), getattr(before, name))


def test_the_correction_is_that_of_the_stddev_of_the_regression(field):
    x_target = targets(field.config, batch=2)
    state = folded(field, *points(field.config, N, batch=2))
    found, prior = decoded(field, state, x_target)
    for part in found:
        assert part.shape == (2, N_TARGET, 3) and part.dtype == torch.float64
    stddev = (prior.variance + prior.noise_variance).sqrt()
    torch.testing.assert_close(found.stddev, stddev * found.correction, **EXACT)
    bias = found.log_weight + 2 * stddev.log()
    deviation = (found.mean - prior.mean) / stddev
    for value, limit in ((deviation, 2.0), (found.correction.log(), 1.5), (bias, 6.0)):
        assert (value.abs() <= limit).all() and value.abs().max() > 0


def test_answers_without_a_regression_are_neither_corrected_nor_weighted():
    model = build(small_models.paper(dim_y=3))
    state = folded(model, *points(model.config, N, batch=2))
    found, prior = decoded(model, state, targets(model.config, batch=2))
    assert prior is None
    assert (found.correction == 1).all()
    assert (found.log_weight == 0).all() and (found.head_start == 0).all()


@pytest.mark.parametrize('preset', PRESETS)
@pytest.mark.parametrize(('dim_x', 'dim_y'), [(1, 2), (2, 3), (3, 1)])
def test_a_model_alone_predicts_as_a_world_of_its_only_tile(preset, dim_x, dim_y):
    model = build(PRESETS[preset](dim_x, dim_y))
    x, y = points(model.config, N)
    world = World(model, OneTile((-2.0,) * dim_x, (2.0,) * dim_x))
    world.fold(x[0], y[0])
    x_target = targets(model.config)
    mean, stddev = world.predict(x_target[0])
    alone = model.predict(folded(model, x, y), x_target)
    # A world keeps covariances in float32.
    torch.testing.assert_close(mean, alone.mean[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(stddev, alone.stddev[0], rtol=1e-6, atol=1e-6)


def test_forgotten_points_count_less(field):
    (x, y), (x_new, _) = points(field.config, N), points(field.config, N)
    y_new = torch.full_like(y, 3.0)
    x_target = x_new
    new_alone = field.predict(folded(field, x_new, y_new), x_target).mean
    distance = []
    for factor in (1.0, 0.1, 1e-9):
        state = field.update(forget(folded(field, x, y), factor), x_new, y_new)
        distance.append((field.predict(state, x_target).mean - new_alone).abs().mean())
    assert distance[0] > distance[2]


@pytest.mark.parametrize('scale', [1e3, 1e6])
def test_odd_inputs_give_finite_predictions(model, scale):
    x, y = points(model.config, N)
    state = folded(model, x, scale * y)
    prediction = model.predict(state, scale * targets(model.config))
    assert prediction.mean.isfinite().all() and prediction.stddev.isfinite().all()


@pytest.mark.parametrize('preset', PRESETS)
def test_full_sized_presets_fold_and_predict(preset):
    config = getattr(CMANPConfig, preset)(2, 1)
    model = CMANP(config).eval().requires_grad_(False)
    state = folded(model, *points(config, N, dtype=torch.float32))
    prediction = model.predict(state, targets(config).float())
    assert prediction.mean.isfinite().all() and (prediction.stddev > 0).all()


def test_the_null_point_is_read_by_predictions_and_never_stored(field):
    empty, encoder = field.init_state(2), field.encoder
    assert (empty.attention.logsumexp == -torch.inf).all()
    null = (encoder.null_score, encoder.null_value)
    null = AttentionSums(*(part.expand(2, *part.shape) for part in null))
    for state in (empty, folded(field, *points(field.config, N, batch=2))):
        with_null = encoder(state.attention)
        encoder.null_score, score = None, encoder.null_score
        by_hand = encoder(attention.merge(state.attention, null))
        encoder.null_score = score
        for found, expected in zip(with_null, by_hand, strict=True):
            torch.testing.assert_close(found, expected, **EXACT)


# Lazy encoding -----------------------------------------------------------------------------------


class Calls:
    """Count the calls of what folding must not run and predicting must run once."""

    def __init__(self, monkeypatch, model):
        self.encode, self.solve = 0, 0
        forward, solve = model.encoder.forward, outliers.solve

        def count_forward(*args):
            self.encode += 1
            return forward(*args)

        def count_solve(*args, **kwargs):
            self.solve += 1
            return solve(*args, **kwargs)

        monkeypatch.setattr(model.encoder, 'forward', count_forward)
        monkeypatch.setattr(outliers, 'solve', count_solve)

    def count(self):
        """Return the calls of the encoder and of the solver so far."""
        return self.encode, self.solve


@torch.no_grad()
def test_update_runs_neither_encoder_nor_solver(field, monkeypatch):
    calls = Calls(monkeypatch, field)
    state = folded(field, *points(field.config, N))
    field.update(state, *points(field.config, N))
    merge(state, forget(state, 0.5))
    assert calls.count() == (0, 0)


@torch.no_grad()
def test_predictions_from_one_state_encode_and_solve_once(field, monkeypatch):
    state = folded(field, *points(field.config, N))
    calls = Calls(monkeypatch, field)
    first = field.predict(state, targets(field.config))
    field.predict(state, targets(field.config), joint=True)
    field.sample_fields(state, targets(field.config), 2)
    assert calls.count() == (1, 1)
    new = field.update(state, *points(field.config, 1))
    second = field.predict(new, targets(field.config))
    assert calls.count() == (2, 2)
    assert not torch.equal(first.mean, second.mean)
    field.predict(state, targets(field.config))
    assert calls.count() == (2, 2)


def test_predictions_of_a_loaded_model_need_no_context_manager_to_solve_once(field, monkeypatch):
    state = folded(field, *points(field.config, N))
    calls = Calls(monkeypatch, field)
    field.predict(state, targets(field.config))
    field.predict(state, targets(field.config))
    assert calls.count() == (1, 1)


@torch.no_grad()
def test_encodings_live_as_long_as_their_state(field):
    state = folded(field, *points(field.config, N))
    field.predict(state, targets(field.config))
    assert len(field._encodings) == 1
    del state
    assert len(field._encodings) == 0


@torch.no_grad()
def test_new_weights_are_seen_by_the_next_prediction(field):
    state, x_target = folded(field, *points(field.config, N)), targets(field.config)
    field.predict(state, x_target)
    other = build(field.config)
    field.load_state_dict(other.state_dict())
    expected = other.predict(state, x_target)
    assert torch.equal(field.predict(state, x_target).mean, expected.mean)


@torch.no_grad()
def test_a_model_converted_after_a_prediction_predicts_again(field):
    state, x_target = folded(field, *points(field.config, N)), targets(field.config)
    expected = field.predict(state, x_target).mean
    found = field.float().predict(state, x_target).mean
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_predictions_carry_gradients_to_every_weight_while_training():
    for preset in PRESETS.values():
        model = build(preset(dim_x=2, dim_y=3)).train().requires_grad_(True)
        state = folded(model, *points(model.config, N))
        x_target, y_target = points(model.config, N_TARGET)
        model.predict(state, x_target).log_prob(y_target).mean().backward()
        without = [name for name, p in model.named_parameters() if p.grad is None]
        assert not without


# Sampled fields ----------------------------------------------------------------------------------


def seeded():
    return torch.Generator().manual_seed(11)


def test_one_seed_is_one_field_wherever_it_is_evaluated(field, monkeypatch):
    state, x_target = folded(field, *points(field.config, N)), targets(field.config, 11)
    samples = field.sample_fields(state, x_target, 5, seeded())
    assert samples.shape == (5, 1, 11, 3)
    for subset in ([3], [0, 10], [7, 2, 5]):
        part = field.sample_fields(state, x_target[:, subset], 5, seeded())
        torch.testing.assert_close(part, samples[:, :, subset], **EXACT)
    monkeypatch.setattr(cmanp_ros.core.model, 'TARGETS_AT_ONCE', 4)
    in_parts = field.sample_fields(state, x_target, 5, seeded())
    torch.testing.assert_close(in_parts, samples, **EXACT)


def test_sampled_fields_have_the_predictive_mean_and_covariance_without_noise(field):
    state, x_target = folded(field, *points(field.config, N)), targets(field.config, 5)
    count = 20_011
    samples = field.sample_fields(state, x_target, count, seeded())[:, 0]
    prediction = field.predict(state, x_target, joint=True)
    regression = field.encoding(state).regression
    _, variance = least_squares.predict(field.config.least_squares, regression, x_target)
    noise = regression.noise_variance
    ratio2 = prediction.stddev[0] ** 2 / (variance[0] + noise)
    for output in range(3):
        drawn, stddev = samples[..., output], prediction.stddev[0, :, output]
        error = (drawn.mean(0) - prediction.mean[0, :, output]) / stddev
        assert error.abs().max() < 5 / count**0.5
        without_noise = prediction.covariance[0, output] - torch.diag(
            ratio2[:, output] * noise[0, output]
        )
        error = (drawn.mT.cov() - without_noise) / stddev / stddev.unsqueeze(-1)
        assert error.abs().max() < 8 / count**0.5


def test_sampled_fields_are_continuous(field):
    state, x_target = folded(field, *points(field.config, N)), targets(field.config)
    here = field.sample_fields(state, x_target, 5, seeded())
    beside = field.sample_fields(state, x_target + 1e-7, 5, seeded())
    assert (here - beside).abs().max() < 1e-4
