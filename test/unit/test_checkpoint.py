"""Files hold exactly what was saved, and whatever is wrong with one is said, never executed."""

import json
import os
import pickle

import pytest
import small_models
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from cmanp_ros import checkpoint
from cmanp_ros.checkpoint import (
    load_map,
    load_model,
    read_extra,
    save_map,
    save_model,
    weights_hash,
)
from cmanp_ros.core import CMANP
from cmanp_ros.core.errors import CheckpointError, ConfigError
from cmanp_ros.core.state import State

HEADER = {
    'geometry': {'lower': [-3.0, 1.5], 'upper': [5.0, 1e7 / 3]},
    'normalization': {'value_offset': 0.1, 'value_scale': 1 / 3},
    'num_observations': 7,
    'extra': {'frame': 'map', 'stamp': [3, 5]},
}
KEYS = [(0, -(2**40), 3), (1, 0, -7), (2, 5, 11)]
TINY = {'num_blocks': 1, 'num_latents': 2, 'num_latents_per_block': 3, 'dim_feedforward': 5}


def build(preset='field', dim_x=2, dim_y=1, **overrides):
    config = small_models.PRESETS[preset](dim_x, dim_y, **TINY | overrides)
    return small_models.build(config, torch.float32)


def header_of(model):
    return HEADER | {'weights_hash': weights_hash(model)}


@pytest.fixture
def model():
    return build()


@pytest.fixture
def state(model):
    x, y = small_models.points(model.config, 7, batch=3, dtype=torch.float32)
    return model.update(model.init_state(3), x, y)


@pytest.fixture
def model_path(model, tmp_path):
    return save_model(model, tmp_path / 'model.safetensors')


@pytest.fixture
def map_path(model, state, tmp_path):
    return save_map(tmp_path / 'map.safetensors', KEYS, state, header_of(model))


def content(path):
    """Return metadata and tensors of a file."""
    with safe_open(path, 'pt') as file:
        return file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def refusal(function, *arguments):
    """Return the text with which something is refused."""
    with pytest.raises(CheckpointError) as error:
        function(*arguments)
    return str(error.value)


# Round trips -------------------------------------------------------------------------------------


@pytest.mark.parametrize('preset', small_models.PRESETS)
@pytest.mark.parametrize(('dim_x', 'dim_y'), [(1, 2), (2, 1), (3, 1)])
def test_models_round_trip_bit_by_bit(tmp_path, preset, dim_x, dim_y):
    model = build(preset, dim_x, dim_y)
    path = save_model(model, tmp_path / 'm.safetensors')
    again = load_model(path)
    assert again.config == model.config
    expected = model.state_dict()
    assert again.state_dict().keys() == expected.keys()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, expected[name]) and tensor.dtype == expected[name].dtype
    assert weights_hash(again) == weights_hash(model)
    assert not again.training and not any(p.requires_grad for p in again.parameters())


@pytest.mark.parametrize('preset', small_models.PRESETS)
def test_maps_round_trip_bit_by_bit(tmp_path, preset):
    model = build(preset)
    for n in (0, 7):
        x, y = small_models.points(model.config, n, batch=3, dtype=torch.float32)
        state = model.update(model.init_state(3), x, y)
        path = save_map(tmp_path / 's.safetensors', KEYS, state, header_of(model))
        keys, loaded, header = load_map(path, model)
        small_models.assert_states_close(loaded, state, rtol=0, atol=0)
        assert keys == KEYS
        assert header == header_of(model)


@pytest.mark.parametrize('preset', small_models.PRESETS)
def test_a_map_of_no_tiles_round_trips(tmp_path, preset):
    model = build(preset)
    path = save_map(tmp_path / 's.safetensors', [], None, header_of(model))
    keys, state, header = load_map(path, model)
    assert (keys, state.batch, header) == ([], 0, header_of(model))
    small_models.assert_states_close(state, model.init_state(0), rtol=0, atol=0)


def test_a_loaded_state_goes_on_like_the_saved_one(model, state, map_path):
    _, loaded, _ = load_map(map_path, model)
    x, y = small_models.points(model.config, 5, batch=3, dtype=torch.float32)
    states = model.update(loaded, x, y), model.update(state, x, y)
    small_models.assert_states_close(*states, rtol=0, atol=0)
    found, expected = (model.predict(s, x) for s in states)
    assert torch.equal(found.mean, expected.mean)
    assert torch.equal(found.stddev, expected.stddev)


def test_provenance_is_kept(model, tmp_path):
    extra = {'seed': 7, 'metrics': {'rmse': 0.1}, 'command': 'cmanp train'}
    path = save_model(model, tmp_path / 'm.safetensors', extra)
    assert read_extra(path) == extra
    assert read_extra(save_model(model, path)) == {}


def test_missing_folders_are_made(model, tmp_path):
    path = save_model(model, tmp_path / 'one' / 'two' / 'm.safetensors')
    assert path.is_file()


def test_the_same_weights_have_the_same_hash(model):
    again = CMANP(model.config)
    again.load_state_dict(model.state_dict())
    assert weights_hash(again) == weights_hash(model)
    with torch.no_grad():
        again.norm.bias[3] += 1e-7
    assert weights_hash(again) != weights_hash(model)


def test_the_hash_covers_the_configuration(model):
    other = CMANP(small_models.field(**TINY, chunk_size=6))
    other.load_state_dict(model.state_dict())
    assert weights_hash(other) != weights_hash(model)


def test_shipped_models_load_by_name():
    names = checkpoint.shipped_models()
    for name in names:
        model = load_model(name)
        prediction = model.predict(model.init_state(), torch.zeros(1, 1, model.config.dim_x))
        assert prediction.mean.isfinite().all()
        assert isinstance(read_extra(name), dict)


# Refusals ----------------------------------------------------------------------------------------


def test_a_device_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match="^device 'foo' cannot be used here .*'cpu' always can$"):
        load_model('field', 'foo')


def test_a_missing_file_is_named(model, tmp_path):
    path = tmp_path / 'none.safetensors'
    assert refusal(load_model, path) == f'{path}: no such file'
    assert refusal(load_map, path, model) == f'{path}: no such file'
    path.mkdir()
    assert refusal(load_model, path) == f'{path}: no such file'


@pytest.mark.parametrize('name', ['no_such_model', '../field', 'weights/model.pt'])
def test_an_unknown_name_lists_the_shipped_models(name):
    assert refusal(load_model, name) == (
        f'no checkpoint {name!r}: expected a path that ends in .safetensors or one of '
        f'{checkpoint.shipped_models()}'
    )


def test_the_wrong_kind_of_file_is_named(model, model_path, map_path):
    assert refusal(load_model, map_path) == (
        f"{map_path} is 'cmanp_ros map', expected 'cmanp_ros model'"
    )
    assert refusal(load_map, model_path, model) == (
        f"{model_path} is 'cmanp_ros model', expected 'cmanp_ros map'"
    )


@pytest.mark.parametrize('metadata', [None, {'format': 'pt'}])
def test_a_foreign_safetensors_file_is_named(tmp_path, metadata):
    path = tmp_path / 'foreign.safetensors'
    save_file({'weight': torch.zeros(3)}, path, metadata)
    assert refusal(load_model, path) == (
        f"{path} is 'a foreign safetensors file', expected 'cmanp_ros model'"
    )


def test_a_truncated_file_is_refused_wherever_it_ends(model, model_path, map_path):
    for path, load in ((model_path, load_model), (map_path, lambda p: load_map(p, model))):
        data = path.read_bytes()
        for length in (0, 1, 7, 8, 9, 1000, len(data) // 2, len(data) - 1):
            path.write_bytes(data[:length])
            text = refusal(load, path)
            assert text.startswith(f'{path} is truncated, damaged or not a safetensors file (')


def test_bytes_at_the_end_are_refused(model_path):
    model_path.write_bytes(model_path.read_bytes() + b'\0' * 8)
    assert 'is truncated, damaged or not a safetensors file (' in refusal(load_model, model_path)


@pytest.mark.parametrize('length', [3, 31, 10_007])
def test_random_bytes_are_refused(model, tmp_path, length):
    path = tmp_path / 'random.safetensors'
    path.write_bytes(bytes(torch.randint(256, (length,)).tolist()))
    expected = f'{path} is truncated, damaged or not a safetensors file ('
    assert refusal(load_model, path).startswith(expected)
    assert refusal(load_map, path, model).startswith(expected)


class Malicious:
    """A pickle that leaves a trace when it is loaded."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        """Return what unpickling calls."""
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize('writer', ['pickle', 'torch', 'torch_legacy'])
def test_a_malicious_pickle_is_refused_without_being_executed(model, tmp_path, writer):
    path, trace = tmp_path / 'model.safetensors', tmp_path / 'executed'
    if writer == 'pickle':
        path.write_bytes(pickle.dumps(Malicious(trace)))
    else:
        is_zip = writer == 'torch'
        torch.save(Malicious(trace), path, _use_new_zipfile_serialization=is_zip)
    expected = f'{path} is truncated, damaged or not a safetensors file ('
    assert refusal(load_model, path).startswith(expected)
    assert refusal(load_map, path, model).startswith(expected)
    assert not trace.exists()


def test_another_format_version_is_named(model_path):
    metadata, tensors = content(model_path)
    save_file(tensors, model_path, metadata | {'format_version': '1'})
    assert refusal(load_model, model_path) == (
        f'{model_path} has format version 1, this release reads 3: use the release that wrote it'
    )


def test_a_flipped_byte_of_a_tensor_is_found_by_the_checksum(model, model_path, map_path):
    for path, load in ((model_path, load_model), (map_path, lambda p: load_map(p, model))):
        data = bytearray(path.read_bytes())
        header = 8 + int.from_bytes(data[:8], 'little')
        for position in range(header, len(data), len(data) // 11):
            damaged = data.copy()
            damaged[position] ^= 1
            path.write_bytes(damaged)
            assert refusal(load, path) == (
                f'{path} is damaged: its content does not match its checksum'
            )


@pytest.mark.parametrize('kind', ['model', 'map'])
def test_a_flipped_byte_of_the_header_is_refused(model, state, tmp_path, kind):
    path = tmp_path / 'file.safetensors'
    if kind == 'model':
        save_model(model, path)
    else:  # numbers short enough that another last digit is another number
        geometry = {'lower': [0, 0], 'upper': [1, 1]}
        save_map(path, KEYS, state, header_of(model) | {'geometry': geometry})
    data, wrong = bytearray(path.read_bytes()), set()
    header = 8 + int.from_bytes(data[:8], 'little')
    for position in range(0, header, 11 if kind == 'model' else 3):
        damaged = data.copy()
        damaged[position] ^= 1
        path.write_bytes(damaged)
        try:
            load_model(path) if kind == 'model' else load_map(path, model)
        except CheckpointError:
            continue
        except Exception as error:
            wrong.add(repr(error)[:40])
        else:
            wrong.add(f'accepted: {damaged[position - 30 : position + 10]}')
    assert not wrong


@pytest.mark.parametrize('what', ['tensor', 'config', 'extra'])
def test_edited_content_does_not_match_its_checksum(model_path, what):
    metadata, tensors = content(model_path)
    header = json.loads(metadata['header'])
    if what == 'tensor':
        tensors['norm.bias'] += 1
    elif what == 'config':
        header['config']['chunk_size'] += 1
    else:
        header['extra']['trusted'] = True
    save_file(tensors, model_path, metadata | {'header': json.dumps(header)})
    assert refusal(load_model, model_path) == (
        f'{model_path} is damaged: its content does not match its checksum'
    )


def test_a_checksum_that_is_gone_is_refused(model_path):
    metadata, tensors = content(model_path)
    del metadata['sha256']
    save_file(tensors, model_path, metadata)
    assert refusal(load_model, model_path).endswith('its content does not match its checksum')


def rewrite(path, change):
    """Edit header and tensors of a file, and sign it again."""
    metadata, tensors = content(path)
    header = json.loads(metadata['header'])
    change(header, tensors)
    checksum = checkpoint._digest(tensors, header)
    save_file(tensors, path, metadata | {'header': json.dumps(header), 'sha256': checksum})


def test_a_configuration_of_another_release_is_named(model_path):
    rewrite(model_path, lambda header, _: header['config'].update(num_memories=3))
    text = refusal(load_model, model_path)
    assert text.startswith(
        f"{model_path}: CMANPConfig has no ['num_memories']; expected keys among"
    )


def test_a_configuration_out_of_range_is_named(model_path):
    rewrite(model_path, lambda header, _: header['config'].update(num_blocks=0))
    assert refusal(load_model, model_path) == (
        f'{model_path}: num_blocks is 0, expected an integer of at least 1'
    )


def test_tensors_that_do_not_fit_the_configuration_are_named(model_path):
    def change(header, tensors):
        del tensors['norm.bias']
        tensors['norm.scale'] = torch.zeros(2)
        tensors['norm.weight'] = torch.zeros(5)

    rewrite(model_path, change)
    assert refusal(load_model, model_path) == (
        f'{model_path}: 3 tensors do not fit the configuration: unknown norm.scale; missing '
        'norm.bias; norm.weight has shape (5,), expected (12,)'
    )


def test_a_map_of_other_weights_is_refused(model, map_path):
    other = build()
    hashes = weights_hash(model)[:12], weights_hash(other)[:12]
    assert refusal(load_map, map_path, other) == (
        f'{map_path} was folded by weights {hashes[0]}, this model has {hashes[1]}: load it '
        'with the checkpoint that made it'
    )


def test_a_map_with_other_tensors_is_refused(model, map_path):
    def change(header, tensors):
        del tensors['least_squares.gram']
        tensors['attention.logsumexp'] = tensors['attention.logsumexp'][..., :2].contiguous()

    rewrite(map_path, change)
    assert refusal(load_map, map_path, model) == (
        f'{map_path}: 2 tensors do not fit the configuration: missing least_squares.gram; '
        'attention.logsumexp has shape (1, 3, 2), expected (1, 3, 3)'
    )


def test_a_map_that_is_not_finite_is_refused(model, state, tmp_path):
    broken = State(
        state.attention._replace(mean_value=state.attention.mean_value * torch.nan),
        state.least_squares,
        state.num_observations,
    )
    path = save_map(tmp_path / 's.safetensors', KEYS, broken, header_of(model))
    assert refusal(load_map, path, model) == (
        f'{path} holds sums that are not finite; it cannot be used'
    )


# Saving ------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['model', 'model.pt', 'model.safetensors.bak'])
def test_other_suffixes_are_refused(model, state, tmp_path, name):
    path = tmp_path / name
    expected = f'{path}: expected a name that ends in .safetensors'
    assert refusal(save_model, model, path) == expected
    assert refusal(save_map, path, KEYS, state, header_of(model)) == expected
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('step', ['fsync', 'replace'])
@pytest.mark.parametrize('problem', [OSError('no space left'), KeyboardInterrupt()], ids=repr)
def test_a_failed_save_leaves_the_previous_file(model, model_path, monkeypatch, step, problem):
    def fail(*_):
        raise problem

    before = model_path.read_bytes()
    monkeypatch.setattr(os, step, fail)
    with pytest.raises(type(problem)):
        save_model(build(), model_path)
    assert model_path.read_bytes() == before
    assert [path.name for path in model_path.parent.iterdir()] == ['model.safetensors']


def test_provenance_that_is_not_json_leaves_the_previous_file(model, model_path):
    before = model_path.read_bytes()
    with pytest.raises(TypeError):
        save_model(build(), model_path, {'tensor': torch.zeros(1)})
    assert model_path.read_bytes() == before
    assert [path.name for path in model_path.parent.iterdir()] == ['model.safetensors']
