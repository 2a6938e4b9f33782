"""The stochastic variant: one global variable per map, and predictions that average over it."""

import numpy as np
import pytest
import small_models
import torch

from cmanp_ros.checkpoint import load_model, save_model
from cmanp_ros.core import stochastic

BATCH, N, NUM_GLOBAL = 3, 7, 2
EXACT = {'rtol': 1e-10, 'atol': 1e-10}


def stochastic_model(dim_y=2, **overrides):
    return small_models.build(small_models.paper(2, dim_y, num_global=NUM_GLOBAL, **overrides))


@pytest.fixture(params=[False, True], ids=['paper', 'inducing'])
def model(request):
    sizes = {'inducing_points': True, 'dim_model': 18} if request.param else {}
    return stochastic_model(**sizes)


def folded(model, n=11, batch=BATCH):
    return model.update(model.init_state(batch), *small_models.points(model.config, n, batch))


def targets(model, n=N):
    return small_models.points(model.config, n, BATCH)[0]


def test_a_prediction_is_the_same_each_time(model):
    state, x = folded(model), targets(model)
    before = torch.get_rng_state()
    first = model.predict(state, x)
    torch.rand(13)
    again = model.train().eval().predict(state, x)  # the cached encoding is dropped
    assert torch.equal(first.mean, again.mean) and torch.equal(first.stddev, again.stddev)
    model.predict(state, x)
    torch.rand(13)
    torch.set_rng_state(before)
    model.predict(state, x)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_prediction_has_the_moments_of_the_mixture_over_the_samples(model):
    state, x = folded(model), targets(model)
    found, encoding = model.predict(state, x), model.encoding(state)
    samples = model.global_variable.quantile_samples(encoding.global_variable)
    assert samples.shape == (stochastic.NUM_SAMPLES, BATCH, NUM_GLOBAL)
    parts = [model.decode(encoding.projected, x, None, sample) for sample in samples]
    mean = np.stack([part.mean for part in parts])
    stddev = np.stack([part.stddev for part in parts])
    np.testing.assert_allclose(found.mean, mean.mean(0), **EXACT)
    second_moment = (mean**2 + stddev**2).mean(0)
    expected = np.sqrt(second_moment - mean.mean(0) ** 2)
    np.testing.assert_allclose(found.stddev, expected, **EXACT)
    assert mean.std(0).max() > 1e-3, 'the variable makes no difference: other weights'


def test_the_samples_have_about_the_moments_of_the_variable(model):
    variable = model.encoding(folded(model)).global_variable
    samples = model.global_variable.quantile_samples(variable)
    assert ((samples.mean(0) - variable.loc) / variable.scale).abs().max() < 0.15
    assert (samples.std(0, correction=0) / variable.scale - 1).abs().max() < 0.25


def test_a_prediction_comes_near_that_over_very_many_samples(model):
    state, x = folded(model), targets(model)
    found, encoding = model.predict(state, x), model.encoding(state)
    variable, count = encoding.global_variable, 401
    white = torch.randn(count, *variable.loc.shape, dtype=torch.float64)
    parts = [
        model.decode(encoding.projected, x, None, variable.loc + variable.scale * one)
        for one in white
    ]
    mean = torch.stack([part.mean for part in parts])
    stddev = torch.stack([part.stddev for part in parts])
    spread = mean.std(0)
    assert ((found.mean - mean.mean(0)).abs() < 0.35 * spread + 1e-3).all()
    expected = (stddev.square().mean(0) + spread.square()).sqrt()
    torch.testing.assert_close(found.stddev, expected, rtol=0.15, atol=0)


def test_the_spread_of_the_variable_is_bounded(model):
    for n in (0, 1, 101):
        variable = model.encoding(folded(model, n)).global_variable
        assert (variable.scale > 0.1).all() and (variable.scale < 1).all()
        assert variable.loc.shape == (BATCH, NUM_GLOBAL) and variable.loc.isfinite().all()


def test_the_variable_depends_on_what_was_observed(model):
    one, other = (model.encoding(folded(model)).global_variable for _ in range(2))
    assert not torch.allclose(one.loc, other.loc) and not torch.allclose(one.scale, other.scale)


def test_the_order_of_points_does_not_matter(model):
    x, y = small_models.points(model.config, 11, BATCH)
    order, x_target = torch.randperm(11), targets(model)
    one = model.update(model.init_state(BATCH), x, y)
    other = model.update(model.init_state(BATCH), x[:, order], y[:, order])
    assert_same_prediction(model, one, other, x_target)


@pytest.mark.parametrize('sizes', [(1,) * 11, (4, 7), (3, 0, 8)])
def test_points_bit_by_bit_equal_all_at_once(model, sizes):
    x, y = small_models.points(model.config, 11, BATCH)
    state = model.init_state(BATCH)
    for part in zip(x.split(sizes, 1), y.split(sizes, 1), strict=True):
        state = model.update(state, *part)
    assert_same_prediction(
        model, state, model.update(model.init_state(BATCH), x, y), targets(model)
    )


def assert_same_prediction(model, one, other, x_target):
    found, expected = model.predict(one, x_target), model.predict(other, x_target)
    torch.testing.assert_close(found.mean, expected.mean, **EXACT)
    torch.testing.assert_close(found.stddev, expected.stddev, **EXACT)
    one, other = (model.encoding(state).global_variable for state in (one, other))
    torch.testing.assert_close(one.loc, other.loc, **EXACT)
    torch.testing.assert_close(one.scale, other.scale, **EXACT)


def test_the_state_is_that_of_a_model_without_the_variable(model):
    plain = small_models.build(small_models.paper(2, 2))
    stochastic_state, state = stochastic_model().init_state(BATCH), plain.init_state(BATCH)
    assert stochastic_state.tensors().keys() == state.tensors().keys()
    assert stochastic_state.nbytes == state.nbytes


def test_targets_are_predicted_alone_as_among_others(model):
    state, x = folded(model), targets(model)
    found = model.predict(state, x)
    for target in range(N):
        alone = model.predict(state, x[:, target : target + 1])
        torch.testing.assert_close(found.mean[:, target : target + 1], alone.mean, **EXACT)
        torch.testing.assert_close(found.stddev[:, target : target + 1], alone.stddev, **EXACT)


def test_a_saved_model_predicts_the_same(model, tmp_path):
    state, x = folded(model), targets(model)
    again = load_model(save_model(model, tmp_path / 'model.safetensors'))
    assert again.config == model.config
    found, expected = again.predict(state, x), model.predict(state, x)
    assert torch.equal(found.mean, expected.mean) and torch.equal(found.stddev, expected.stddev)
