"""Joint distributions come block by block: chain rule, samples that feed back, one block exact."""

import re

import numpy as np
import pytest
import small_models
import torch
from torch.distributions import MultivariateNormal

from cmanp_ros.core import autoregressive, merge
from cmanp_ros.core.autoregressive import joint_log_prob, predict_block, sample
from cmanp_ros.core.config import AutoregressiveConfig
from cmanp_ros.core.errors import InputError

BATCH, N, SIZE = 2, 7, 3
EXACT = {'rtol': 1e-9, 'atol': 1e-9}
BLOCKS = AutoregressiveConfig(block_size=SIZE, num_layers=1, rank=5, depth=2)


def attentive(dim_y=1, **overrides):
    """Return a model with a covariance head."""
    return small_models.build(
        small_models.paper(2, dim_y, **{'autoregressive': BLOCKS} | overrides)
    )


def regressing(dim_y=1):
    """Return a model whose joint is in closed form."""
    return small_models.build(small_models.field(2, dim_y))


MODELS = {'network': attentive, 'regression': regressing}


@pytest.fixture(params=MODELS)
def make(request):
    return MODELS[request.param]


def folded(model, n=11):
    return model.update(
        model.init_state(BATCH), *small_models.points(model.config, n, batch=BATCH)
    )


# Blocks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize('dim_y', [1, 2])
def test_the_covariance_of_a_block_is_positive_definite(make, dim_y):
    model = make(dim_y)
    x, _ = small_models.points(model.config, SIZE, BATCH)
    found = predict_block(model, folded(model), x)
    assert found.loc.shape == (BATCH, SIZE * dim_y)
    covariance = found.covariance_matrix
    assert torch.equal(covariance, covariance.mT) or torch.allclose(covariance, covariance.mT)
    assert (torch.linalg.eigvalsh(covariance) > 0).all()
    off = covariance - torch.diag_embed(covariance.diagonal(dim1=-2, dim2=-1))
    assert off.abs().max() > 1e-3, 'targets are independent: other weights'


def test_a_block_is_what_predict_says_jointly(make):
    model = make()
    state = folded(model)
    x, y = small_models.points(model.config, SIZE, BATCH)
    found, expected = predict_block(model, state, x), model.predict(state, x, joint=True)
    torch.testing.assert_close(found.covariance_matrix, expected.covariance[:, 0], **EXACT)
    if model.covariance_head is None:  # the head's mean of a target depends on its block
        torch.testing.assert_close(found.loc, expected.mean[..., 0], **EXACT)
        log_prob = found.log_prob(y[..., 0])
        torch.testing.assert_close(log_prob, expected.log_prob(y).sum(-1), **EXACT)


def test_a_block_of_one_target_is_its_marginal(make):
    model = make(2)
    state = folded(model)
    x, _ = small_models.points(model.config, 1, BATCH)
    found, expected = predict_block(model, state, x), model.predict(state, x)
    torch.testing.assert_close(found.loc, expected.mean.flatten(1), **EXACT)
    stddev = found.covariance_matrix.diagonal(dim1=-2, dim2=-1).sqrt()
    torch.testing.assert_close(stddev, expected.stddev.flatten(1), **EXACT)


def test_the_outputs_of_a_target_stand_side_by_side():
    model = regressing(2)
    state = folded(model)
    x, _ = small_models.points(model.config, SIZE, BATCH)
    found, expected = predict_block(model, state, x), model.predict(state, x, joint=True)
    covariance = found.covariance_matrix.unflatten(2, (SIZE, 2)).unflatten(1, (SIZE, 2))
    for output in range(2):
        own = covariance[:, :, output, :, output]
        torch.testing.assert_close(own, expected.covariance[:, output], **EXACT)
        assert not covariance[:, :, output, :, 1 - output].any()
        mean = found.loc.unflatten(1, (SIZE, 2))[..., output]
        torch.testing.assert_close(mean, expected.mean[..., output], **EXACT)


def test_a_bounded_head_keeps_every_diagonal_away_from_zero():
    model = attentive(bounded_stddev=True)
    x, _ = small_models.points(model.config, SIZE, BATCH)
    factor = predict_block(model, folded(model), x).scale_tril
    diagonal = factor.diagonal(dim1=-2, dim2=-1)
    assert (diagonal >= 0.05).all() and (diagonal <= 1).all()
    assert not factor.triu(1).any()


def test_the_marginals_of_single_targets_are_those_of_blocks_of_one():
    model = attentive(2)
    state = folded(model)
    x, _ = small_models.points(model.config, N, BATCH)
    found = model.predict(state, x)
    for target in range(N):
        alone = model.predict(state, x[:, target : target + 1])
        torch.testing.assert_close(found.mean[:, target : target + 1], alone.mean, **EXACT)
        torch.testing.assert_close(found.stddev[:, target : target + 1], alone.stddev, **EXACT)


def test_a_joint_prediction_of_more_than_one_block_is_refused_with_a_way_out():
    model = attentive()
    x, _ = small_models.points(model.config, SIZE + 1, BATCH)
    message = 'expected one block of at most 3 with one value: use autoregressive.sample or joint'
    with pytest.raises(InputError, match=message):
        model.predict(folded(model), x, joint=True)


# Joint density -----------------------------------------------------------------------------------


def chain_rule(model, x_context, y_context, x, y, size):
    """Return the sum over blocks, each given the context and all before, folded from scratch."""
    total = torch.zeros(len(x), dtype=torch.float64)
    for start in range(0, x.shape[1], size):
        before = torch.cat([x_context, x[:, :start]], 1), torch.cat([y_context, y[:, :start]], 1)
        state = model.update(model.init_state(len(x)), *before)
        block = slice(start, start + size)
        total += predict_block(model, state, x[:, block]).log_prob(y[:, block].flatten(1))
    return total


@pytest.mark.parametrize('size', [1, 2, 3, 5, N, 100])
@pytest.mark.parametrize('dim_y', [1, 2])
def test_the_joint_density_is_the_chain_rule_over_blocks(make, dim_y, size):
    model = make(dim_y)
    context = small_models.points(model.config, 11, BATCH)
    x, y = small_models.points(model.config, N, BATCH)
    state = model.update(model.init_state(BATCH), *context)
    found = joint_log_prob(model, state, x, y, size)
    assert found.shape == (BATCH,)
    torch.testing.assert_close(found, chain_rule(model, *context, x, y, size), **EXACT)


@pytest.mark.parametrize('dim_y', [1, 2])
def test_with_least_squares_one_block_is_the_joint_prediction(dim_y):
    model = regressing(dim_y)
    state = folded(model)
    x, y = small_models.points(model.config, N, BATCH)
    expected = model.predict(state, x, joint=True).log_prob(y).sum(-1)
    for size in (N, N + 1, 1000):
        torch.testing.assert_close(joint_log_prob(model, state, x, y, size), expected, **EXACT)


def test_without_a_size_blocks_are_as_configured():
    model = attentive()
    state, (x, y) = folded(model), small_models.points(model.config, N, BATCH)
    found = joint_log_prob(model, state, x, y)
    assert torch.equal(found, joint_log_prob(model, state, x, y, SIZE))
    assert not torch.allclose(found, joint_log_prob(model, state, x, y, SIZE + 1))
    model = regressing()
    state, size = folded(model), autoregressive.DEFAULT_BLOCK_SIZE
    x, y = small_models.points(model.config, size + 3, BATCH)
    found = joint_log_prob(model, state, x, y)
    assert torch.equal(found, joint_log_prob(model, state, x, y, size))


def test_the_joint_density_has_gradients_for_every_weight():
    model = attentive().requires_grad_(True)
    x, y = small_models.points(model.config, N, BATCH)
    joint_log_prob(model, folded(model), x, y).sum().backward()
    missing = [name for name, weight in model.named_parameters() if weight.grad is None]
    assert not missing


# Samples -----------------------------------------------------------------------------------------


def test_samples_have_the_moments_of_the_block(make):
    model, count = make(2), 4001
    state = folded(model)
    x, _ = small_models.points(model.config, SIZE, BATCH)
    found = sample(model, state, x, count, torch.Generator().manual_seed(5), SIZE)
    assert found.shape == (count, BATCH, SIZE, 2)
    expected = predict_block(model, state, x)
    for row in range(BATCH):
        factor = expected.scale_tril[row]
        white = torch.linalg.solve_triangular(
            factor, (found[:, row].flatten(1) - expected.loc[row]).T, upper=False
        )
        assert white.mean(1).abs().max() < 5 / count**0.5
        assert (white.cov() - torch.eye(len(white))).abs().max() < 7 / count**0.5


def test_samples_of_later_blocks_follow_those_of_earlier_ones():
    model, count = regressing(), 601
    state = folded(model, 3)
    near = torch.tensor([[[0.3, 0.2]], [[-1.1, 0.7]]], dtype=torch.float64)
    x = torch.cat([near, near + 0.05], 1)  # two blocks of one target at almost one place
    one, other = sample(model, state, x, count, torch.Generator().manual_seed(5), 1)[
        ..., 0
    ].unbind(2)
    joint = model.predict(state, x, joint=True).covariance[:, 0]
    for row in range(BATCH):
        found = np.corrcoef(one[:, row], other[:, row])[0, 1]
        expected = joint[row, 0, 1] / joint[row].diagonal().prod().sqrt()
        assert found > 0.5 and abs(found - expected) < 0.2


def test_each_block_is_drawn_given_the_samples_before_it(make, monkeypatch):
    model, count = make(), 5
    context = small_models.points(model.config, 11, BATCH)
    state = model.update(model.init_state(BATCH), *context)
    x, _ = small_models.points(model.config, N, BATCH)
    drawn_from, predict = [], predict_block

    def spy(*arguments):
        drawn_from.append(predict(*arguments))
        return drawn_from[-1]

    monkeypatch.setattr(autoregressive, 'predict_block', spy)
    found = sample(model, state, x, count, block_size=SIZE)
    assert len(drawn_from) == 3
    for number, distribution in enumerate(drawn_from):
        start = number * SIZE
        for index in range(count):
            before = model.update(state, x[:, :start], found[index, :, :start])
            expected = predict(model, before, x[:, start : start + SIZE])
            same = distribution.loc[index * BATCH :][:BATCH] if start else distribution.loc
            torch.testing.assert_close(same, expected.loc, **EXACT)


def test_samples_follow_the_generator_and_nothing_else(make):
    model = make()
    state, (x, _) = folded(model), small_models.points(model.config, N, BATCH)
    before = torch.get_rng_state()
    first, again, other = (
        sample(model, state, x, 3, torch.Generator().manual_seed(seed), SIZE) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)
    assert first[0].ne(first[1]).all()


def test_neither_sampling_nor_scoring_touches_the_state(make):
    model = make()
    state, (x, y) = folded(model), small_models.points(model.config, N, BATCH)
    before = {name: tensor.clone() for name, tensor in state.tensors().items()}
    sample(model, state, x, 3, block_size=2)
    joint_log_prob(model, state, x, y, 2)
    for name, tensor in state.tensors().items():
        assert torch.equal(tensor, before[name]), name


def test_samples_that_are_scored_have_the_entropy_of_the_model():
    # The density of the chain and its samples are of one distribution: E log p = -entropy, which
    # one block has in closed form; two samplers of other spread or order would miss it.
    model, count = regressing(), 4001
    state = folded(model)
    x, _ = small_models.points(model.config, SIZE, BATCH)
    drawn = sample(model, state, x, count, torch.Generator().manual_seed(5), SIZE)
    block = predict_block(model, state, x)
    log_prob = block.log_prob(drawn[..., 0])
    error = log_prob.std(0) / count**0.5
    assert ((log_prob.mean(0) + block.entropy()).abs() < 5 * error).all()


# Errors ------------------------------------------------------------------------------------------


def test_a_model_of_independent_targets_is_refused_naming_one_that_is_not():
    model = small_models.build(small_models.paper(2))
    state, (x, y) = folded(model), small_models.points(model.config, N, BATCH)
    message = 'its targets are independent; expected one with `autoregressive` or `least_squares`'
    for call in (
        lambda: predict_block(model, state, x),
        lambda: joint_log_prob(model, state, x, y),
        lambda: sample(model, state, x, 3),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            call()


@pytest.mark.parametrize('size', [0, -3])
def test_blocks_have_at_least_one_target(make, size):
    model = make()
    state, (x, y) = folded(model), small_models.points(model.config, N, BATCH)
    message = f'^block_size is {size}, expected at least 1 target$'
    with pytest.raises(InputError, match=message):
        joint_log_prob(model, state, x, y, size)
    with pytest.raises(InputError, match=message):
        sample(model, state, x, 3, block_size=size)


def test_wrong_shapes_and_values_are_refused(make):
    model = make()
    state, (x, y) = folded(model), small_models.points(model.config, N, BATCH)
    with pytest.raises(InputError, match='x_target has shape'):
        predict_block(model, state, x[..., :1])
    with pytest.raises(InputError, match='x_target has shape'):
        sample(model, state, x[:1], 3)
    with pytest.raises(InputError, match='y has shape'):
        joint_log_prob(model, state, x, y[:, :-1])
    with pytest.raises(InputError, match='x_target has NaN or infinite numbers'):
        predict_block(model, state, x / 0)


def test_blocks_that_are_folded_are_counted_in_the_merged_state():
    model = attentive()
    a, b = folded(model, 5), folded(model, 6)
    x, y = small_models.points(model.config, N, BATCH)
    found = joint_log_prob(model, merge(a, b), x, y)
    torch.testing.assert_close(found, joint_log_prob(model, merge(b, a), x, y), **EXACT)
    assert isinstance(predict_block(model, a, x), MultivariateNormal)
