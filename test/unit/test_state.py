"""A state is immutable, of constant size, and the sum of its parts."""

import dataclasses
import re

import pytest
import small_models
import torch

from cmanp_ros.core import CMANPConfig, LeastSquaresConfig, forget, merge
from cmanp_ros.core.errors import InputError, StateMismatchError
from cmanp_ros.core.least_squares import LeastSquaresSums
from cmanp_ros.core.state import State, concatenate, from_tensors, repeat, select

EXACT = {'rtol': 1e-12, 'atol': 1e-12}


@pytest.fixture(params=small_models.PRESETS)
def model(request):
    return small_models.build(small_models.PRESETS[request.param](dim_x=2, dim_y=3))


def folded(model, n, batch=1):
    return model.update(model.init_state(batch), *small_models.points(model.config, n, batch))


def copy_of(state):
    return {name: tensor.clone() for name, tensor in state.tensors().items()}


def assert_unchanged(state, before):
    for name, tensor in state.tensors().items():
        assert torch.equal(tensor, before[name]), name


def test_attributes_cannot_be_assigned(model):
    state = model.init_state()
    for name in ('attention', 'least_squares', 'num_observations'):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(state, name, None)
    with pytest.raises(AttributeError):
        state.attention.logsumexp = None


def test_no_operation_changes_a_state_in_place(model):
    a, b = folded(model, 7), folded(model, 5)
    before_a, before_b = copy_of(a), copy_of(b)
    merge(a, b)
    forget(a, 0.5)
    model.update(a, *small_models.points(model.config, 11))
    model.predict(a, small_models.points(model.config, 3)[0], joint=True)
    assert_unchanged(a, before_a)
    assert_unchanged(b, before_b)


@pytest.mark.parametrize('batch', [1, 3])
def test_nbytes_is_the_size_of_the_tensors(model, batch):
    state, config = model.init_state(batch), model.config
    sums = config.num_blocks * config.num_heads * config.num_latents_per_block
    expected = 8 * sums * (1 + config.dim_model // config.num_heads) + 8
    if config.least_squares is not None:
        m = config.least_squares.functions_per_axis
        products, functions = (2 * m - 1) ** 2 + 2 * m**2 + 3, m**2 + 2
        extremes = 6 * (2 + 3 + 1)  # highest and lowest of three outputs: x, y, weight
        expected += 8 * (products + functions * 3 + 3 + 1 + (2 + extremes) * 17**2)
    assert state.nbytes == batch * expected
    assert state.batch == batch


def test_nbytes_is_the_same_after_ten_and_after_a_million_points():
    memory = LeastSquaresConfig(3, voxels_per_axis=29)
    sizes = {'dim_model': 4, 'num_heads': 1, 'num_blocks': 1, 'num_latents_per_block': 4}
    config = CMANPConfig.field(
        2, 1, **sizes, embedder_depth=2, least_squares=memory, chunk_size=8192
    )
    model = small_models.build(config, torch.float32)
    empty = model.init_state()
    ten = model.update(empty, *small_models.points(config, 10, dtype=torch.float32))
    state = ten
    for _ in range(10):
        state = model.update(state, *small_models.points(config, 99_999, dtype=torch.float32))
    assert state.num_observations.tolist() == [1_000_000]
    assert empty.nbytes == ten.nbytes == state.nbytes
    assert state.is_finite()
    sizes_ten = {name: tensor.shape for name, tensor in ten.tensors().items()}
    assert sizes_ten == {name: tensor.shape for name, tensor in state.tensors().items()}


def test_num_observations_counts_every_point_ever_folded(model):
    state = folded(model, 7, batch=2)
    assert state.num_observations.tolist() == [7, 7]
    assert state.num_observations.dtype == torch.int64
    assert forget(state, 0.1).num_observations.tolist() == [7, 7]
    assert merge(state, folded(model, 4, batch=2)).num_observations.tolist() == [11, 11]


def test_merge_is_commutative_and_associative_and_has_the_empty_state_as_identity(model):
    a, b, c = folded(model, 7), folded(model, 5), folded(model, 3)
    small_models.assert_states_close(merge(a, b), merge(b, a), rtol=0, atol=0)
    left, right = merge(merge(a, b), c), merge(a, merge(b, c))
    small_models.assert_states_close(left, right, **EXACT)
    small_models.assert_states_close(merge(a, model.init_state()), a, rtol=0, atol=0)
    small_models.assert_states_close(merge(model.init_state(), a), a, rtol=0, atol=0)


def test_merge_of_different_batches_is_refused_naming_the_tensors(model):
    with pytest.raises(StateMismatchError) as error:
        merge(model.init_state(1), model.init_state(2))
    text = str(error.value)
    assert text.startswith('the states differ in the shape of attention.logsumexp, attention.mean')
    assert '[(1, 2, 3, 7), ' in text and 'and [(2, 2, 3, 7), ' in text
    assert text.endswith('merge states of one model only')


def test_merge_of_states_with_and_without_regression_is_refused():
    paper = small_models.build(small_models.paper(dim_model=12))
    field = small_models.build(small_models.field())
    parts = ', '.join(sorted(f'least_squares.{name}' for name in LeastSquaresSums._fields))
    nothing = ', '.join(['None'] * len(LeastSquaresSums._fields))
    message = re.escape(f'the states differ in the shape of {parts}: [{nothing}] and [(1,), ')
    with pytest.raises(StateMismatchError, match=message):
        merge(paper.init_state(), field.init_state())
    with pytest.raises(StateMismatchError, match='least_squares.gram'):
        merge(field.init_state(), paper.init_state())


@pytest.mark.parametrize('factor', [0.0, -0.5, 1.5, float('nan'), float('inf')])
def test_forget_refuses_factors_out_of_range(model, factor):
    message = f'forget by {factor!r}: expected a factor in (0, 1]; 1 keeps everything'
    with pytest.raises(InputError) as error:
        forget(model.init_state(), factor)
    assert str(error.value) == message


def test_forget_by_one_keeps_everything(model):
    state = folded(model, 7)
    small_models.assert_states_close(forget(state, 1.0), state, rtol=0, atol=0)


def test_forget_twice_is_forget_by_the_product(model):
    state = folded(model, 7)
    once, twice = forget(state, 0.15), forget(forget(state, 0.5), 0.3)
    small_models.assert_states_close(twice, once, **EXACT)


def test_forgetting_commutes_with_merging(model):
    a, b = folded(model, 7), folded(model, 5)
    apart, together = merge(forget(a, 0.3), forget(b, 0.3)), forget(merge(a, b), 0.3)
    small_models.assert_states_close(apart, together, **EXACT)


def test_empty_and_folded_states_are_finite(model):
    assert model.init_state(2).is_finite()
    assert folded(model, 7, batch=2).is_finite()


def test_a_sum_that_is_not_finite_is_found_wherever_it_is(model):
    state = folded(model, 7)
    for name, tensor in state.tensors().items():
        if tensor.dtype != torch.float64:
            continue
        for wrong in (torch.nan, torch.inf):
            tensors = copy_of(state)
            tensors[name].view(-1)[-1] = wrong
            assert not from_tensors(tensors).is_finite(), (name, wrong)


def test_from_tensors_inverts_tensors(model):
    state = folded(model, 7)
    again = from_tensors(state.tensors())
    assert isinstance(again, State)
    small_models.assert_states_close(again, state, rtol=0, atol=0)


def test_from_tensors_names_what_is_missing(model):
    state = model.init_state()
    for name in state.tensors():
        tensors = state.tensors()
        del tensors[name]
        with pytest.raises(KeyError, match=name):
            from_tensors(tensors)


@pytest.mark.parametrize('sizes', [(7,), (2, 5), (1, 3, 0, 3)])
def test_concatenate_inverts_select(model, sizes):
    state, start, parts = folded(model, 5, batch=7), 0, []
    for size in sizes:
        parts.append(select(state, slice(start, start + size)))
        assert parts[-1].batch == size
        start += size
    small_models.assert_states_close(concatenate(parts), state, rtol=0, atol=0)


def test_selected_tiles_come_in_the_order_asked_for(model):
    state, order = folded(model, 5, batch=3), torch.tensor([2, 0, 2, 1])
    found = select(state, order)
    assert found.batch == 4
    for name, tensor in found.tensors().items():
        for row, tile in enumerate(order):
            assert torch.equal(tensor[row], state.tensors()[name][tile]), name


@pytest.mark.parametrize('times', [1, 3])
def test_repeat_is_the_whole_batch_again_and_again(model, times):
    state = folded(model, 5, batch=2)
    before, found = copy_of(state), repeat(state, times)
    assert found.batch == 2 * times
    small_models.assert_states_close(found, concatenate([state] * times), rtol=0, atol=0)
    assert_unchanged(state, before)


def test_repeated_states_go_on_apart(model):
    state, (x, y) = folded(model, 5, batch=2), small_models.points(model.config, 7, batch=6)
    found = model.update(repeat(state, 3), x, y)
    for index in range(3):
        rows = slice(2 * index, 2 * index + 2)
        expected = model.update(state, x[rows], y[rows])
        small_models.assert_states_close(select(found, rows), expected, **EXACT)


def test_states_are_compared_by_identity(model):
    state = model.init_state()
    assert state == state and state != model.init_state()
    assert len({state, state}) == 1
