"""The `paper` preset gives the numbers of the authors' implementation, with its weights."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from cmanp_ros.checkpoint import load_reference
from cmanp_ros.core import CMANPConfig, autoregressive
from cmanp_ros.core.config import AutoregressiveConfig
from cmanp_ros.core.errors import CheckpointError

DATA = Path(__file__).parent.parent / 'data'
CLOSE = {'rtol': 1e-5, 'atol': 1e-5}
CLOSER = {'rtol': 0, 'atol': 3e-6}  # random weights: predictions hardly depend on the data
RENAMED = {'min_stddev_bounded': 'bounded_stddev'}
OF_BLOCKS = {
    'and_block_size': 'block_size',
    'covariance_transformer_layers': 'num_layers',
    'projection_rank': 'rank',
    'projection_depth': 'depth',
}
UNUSED = 'predictor.'  # the reference's CMANP-AND holds a diagonal head, too


class Golden:
    """A golden file: its model in our code, and all that the authors' code answered."""

    def __init__(self, name):
        with safe_open(DATA / f'{name}.safetensors', 'pt') as file:
            sizes = json.loads(file.metadata()['config'])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        blocks = {OF_BLOCKS[k]: v for k, v in sizes.items() if k in OF_BLOCKS}
        sizes = {RENAMED.get(k, k): v for k, v in sizes.items() if k not in OF_BLOCKS}
        if blocks.get('block_size'):
            sizes['autoregressive'] = AutoregressiveConfig(**blocks)
        self.config = CMANPConfig.paper(**sizes)
        prefix = 'weights.'
        self.weights = {
            key.removeprefix(prefix): value
            for key, value in tensors.items()
            if key.startswith(prefix)
        }
        self.tensors = tensors
        self.model = load_reference(self.weights, self.config)

    def state(self, suffix):
        """Fold the context, and what came later if the suffix says so."""
        state = self.model.init_state(len(self.tensors['x_context']))
        for part in ('context', 'update') if suffix else ('context',):
            state = self.model.update(state, self.tensors[f'x_{part}'], self.tensors[f'y_{part}'])
        return state


@pytest.fixture(params=['reference_cmanp', 'reference_cmanp_bounded'])
def golden(request):
    return Golden(request.param)


@pytest.fixture(params=['', '_updated'], ids=['before', 'updated'])
def suffix(request):
    return request.param


def test_files_differ_in_every_option():
    one, other = Golden('reference_cmanp').config, Golden('reference_cmanp_bounded').config
    assert (one.dim_x, one.dim_y, one.bounded_stddev) == (2, 1, False)
    assert (other.dim_x, other.dim_y, other.bounded_stddev) == (1, 2, True)


def test_states_equal_the_reference(golden, suffix):
    attention = golden.state(suffix).attention
    for block in range(golden.config.num_blocks):
        for name in ('logsumexp', 'mean_value'):
            expected = golden.tensors[f'state{suffix}.{block}.{name}']
            found = getattr(attention, name)[:, block].float()
            torch.testing.assert_close(found, expected, **CLOSE)


def test_encodings_equal_the_reference(golden, suffix):
    latents = golden.model.encoder(golden.state(suffix).attention)
    assert len(latents) == golden.config.num_blocks
    for block, found in enumerate(latents):
        torch.testing.assert_close(found, golden.tensors[f'encoding{suffix}.{block}'], **CLOSE)


def test_predictions_equal_the_reference(golden, suffix):
    prediction = golden.model.predict(golden.state(suffix), golden.tensors['x_target'])
    for name in ('mean', 'stddev'):
        expected = golden.tensors[f'{name}{suffix}']
        torch.testing.assert_close(getattr(prediction, name), expected, **CLOSER)


def test_the_update_changes_the_reference_predictions(golden):
    for name in ('mean', 'stddev'):
        difference = golden.tensors[name] - golden.tensors[f'{name}_updated']
        assert difference.abs().max() > 15 * CLOSER['atol']  # or the tests above tell nothing


def test_every_reference_weight_is_used_once(golden):
    parameters = sum(value.numel() for value in golden.weights.values())
    assert parameters == sum(value.numel() for value in golden.model.state_dict().values())


def test_unknown_keys_are_named(golden):
    weights = golden.weights | {'encoder.layers.0.extra': torch.zeros(1)}
    message = (
        'reference weights: 1 tensors do not fit the configuration: unknown encoder.layers.0.extra'
    )
    with pytest.raises(CheckpointError) as error:
        load_reference(weights, golden.config)
    assert str(error.value) == message


@pytest.mark.parametrize(
    'key',
    [
        'latents',
        'encoder.layers.1.latents',
        'decoder.layers.0.cross_ff.fn.net.2.bias',
        'norm.bias',
    ],
)
def test_missing_keys_are_named(golden, key):
    weights = dict(golden.weights)
    del weights[key]
    with pytest.raises(CheckpointError, match=f'1 tensors do not fit .*: missing {key}$'):
        load_reference(weights, golden.config)


def test_wrong_shapes_are_named(golden):
    key = 'encoder.layers.1.layer_cross_attn.fn.to_kv.weight'
    shape = tuple(golden.weights[key].shape)
    weights = golden.weights | {key: torch.zeros(3, 5)}
    with pytest.raises(CheckpointError) as error:
        load_reference(weights, golden.config)
    assert str(error.value).endswith(f': {key} has shape (3, 5), expected {shape}')


def test_a_long_list_of_problems_is_cut(golden):
    with pytest.raises(CheckpointError) as error:
        load_reference({}, golden.config)
    text = str(error.value)
    assert text.startswith(f'reference weights: {len(golden.weights)} tensors do not fit')
    assert text.count('missing') == 8 and text.endswith('; ...')


def test_the_loaded_model_is_ready_to_predict(golden):
    assert not golden.model.training
    assert not any(parameter.requires_grad for parameter in golden.model.parameters())


# CMANP-AND ---------------------------------------------------------------------------------------


@pytest.fixture
def golden_blocks():
    return Golden('reference_cmanp_and')


def test_states_of_the_autoregressive_model_equal_the_reference(golden_blocks, suffix):
    test_states_equal_the_reference(golden_blocks, suffix)
    test_encodings_equal_the_reference(golden_blocks, suffix)


def blocks_of(golden):
    """Yield number, slice and state of every block: those before it are folded."""
    size = golden.config.autoregressive.block_size
    x, y = golden.tensors['x_target'], golden.tensors['y_target']
    state = golden.state('')
    for number, start in enumerate(range(0, x.shape[1], size)):
        block = slice(start, start + size)
        yield number, block, state
        state = golden.model.update(state, x[:, block], y[:, block])


def test_blocks_equal_the_reference(golden_blocks):
    tensors, sizes = golden_blocks.tensors, []
    for number, block, state in blocks_of(golden_blocks):
        x, y = tensors['x_target'][:, block], tensors['y_target'][:, block]
        found = autoregressive.predict_block(golden_blocks.model, state, x)
        torch.testing.assert_close(found.loc, tensors[f'block.{number}.mean'], **CLOSE)
        expected = tensors[f'block.{number}.scale_tril']
        torch.testing.assert_close(found.scale_tril, expected, **CLOSE)
        expected = tensors[f'block.{number}.log_prob']
        torch.testing.assert_close(found.log_prob(y.flatten(1)), expected, rtol=1e-5, atol=1e-4)
        sizes.append(x.shape[1])
    assert sizes == [4, 4, 3]


def test_joint_log_likelihood_equals_the_reference(golden_blocks):
    tensors = golden_blocks.tensors
    x, y = tensors['x_target'], tensors['y_target']
    found = autoregressive.joint_log_prob(golden_blocks.model, golden_blocks.state(''), x, y)
    expected = tensors['joint_log_prob_per_target']
    torch.testing.assert_close(found / x.shape[1], expected, **CLOSE)


def test_every_reference_weight_of_the_autoregressive_model_is_used_but_one_head(golden_blocks):
    used = {k: v for k, v in golden_blocks.weights.items() if not k.startswith(UNUSED)}
    assert len(golden_blocks.weights) - len(used) == 4
    parameters = sum(value.numel() for value in golden_blocks.model.state_dict().values())
    assert parameters == sum(value.numel() for value in used.values())
