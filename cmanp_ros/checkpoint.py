"""
Models and maps as single safetensors files, or their bytes: nothing is ever unpickled.

The header carries a format version, what the tensors mean (configuration, geometry, units) and a
hash of the content; a map also carries the hash of the weights that folded it.
"""

import fcntl
import hashlib
import json
import os
import tempfile
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from cmanp_ros.core import CMANP, CMANPConfig, State
from cmanp_ros.core.errors import CheckpointError, CMANPError, ConfigError
from cmanp_ros.core.lattice import FARTHEST
from cmanp_ros.core.state import from_tensors
from cmanp_ros.core.tiles import keys_of

MODEL, MAP = 'cmanp_ros model', 'cmanp_ros map'
FORMAT_VERSION = {MODEL: 3, MAP: 6}


class OtherWeightsError(CheckpointError):
    """
    A map that was folded by another model.
    """


def save_model(model: CMANP, path, extra: dict | None = None) -> Path:
    """
    Write weights and configuration; the file appears whole or not at all.

    :param extra: provenance kept in the header (command, seed, metrics).
    """
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    header = {'config': model.config.to_dict(), 'extra': extra or {}}
    return _write(path, _bytes(MODEL, tensors, header))


def load_model(path_or_name='field', device='cpu') -> CMANP:
    """
    Read a model for prediction.

    :param path_or_name: a .safetensors file, or the name of a shipped model.
    :raises CheckpointError: for a missing, damaged or foreign file, or weights that do not fit.
    :raises ConfigError: for a device that cannot be used.
    """
    device = usable_device(device)
    path = _find(path_or_name)
    tensors, header = _read(path, MODEL)
    try:
        model = CMANP(CMANPConfig.from_dict(header['config']))
    except CMANPError as error:
        raise CheckpointError(f'{path}: {error}') from error
    if 'norm.weight' in tensors:
        model.to(tensors['norm.weight'].dtype)
    _fill(model, tensors, str(path))
    return model.eval().requires_grad_(False).to(device)


def usable_device(device) -> torch.device:
    """
    Return a device by its name.

    :raises ConfigError: for one on which nothing can be computed here.
    """
    try:
        found = torch.zeros(1, device=device)
        found.item()
        return found.device
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).partition('\n')[0]
        raise ConfigError(
            f"device {str(device)!r} cannot be used here ({reason}); 'cpu' always can"
        ) from error


def read_extra(path_or_name='field') -> dict:
    """
    Return the provenance of a model file.
    """
    return _read(_find(path_or_name), MODEL)[1]['extra']


def shipped_models() -> list[str]:
    """
    Return the names that `load_model` knows.
    """
    return sorted(path.stem for path in _weights().glob('*.safetensors'))


def weights_hash(model: CMANP) -> str:
    """
    Return the hash that ties a state to the weights and configuration that folded it.
    """
    return _digest(model.state_dict(), {'config': model.config.to_dict()})


def save_map(path, keys: list[tuple[int, ...]], state: State | None, header: dict) -> Path:
    """
    Write the tiles of a map; the file appears whole or not at all.

    :param keys, state, header: as for `map_bytes`.
    """
    return _write(path, map_bytes(keys, state, header))


def load_map(path, model: CMANP) -> tuple[list[tuple[int, ...]], State, dict]:
    """
    Read a map folded by this model.

    :return: keys, states and header as `save_map` took them.
    :raises CheckpointError: for a missing, damaged or foreign file, or another model's map.
    """
    return map_from_bytes(_content(path), model, path)


def map_bytes(keys: list[tuple[int, ...]], state: State | None, header: dict) -> bytes:
    """
    Return the content of a map's file, to be written or sent.

    :param keys: level and lattice index of each tile; `state` holds them in this order.
    :param header: plain values: weights_hash, geometry, normalization and whatever else.
    """
    tensors = {'key': torch.tensor(keys, dtype=torch.int64)} if keys else {}
    if state is not None:
        tensors |= state.tensors()
    return _bytes(MAP, tensors, header)


def map_from_bytes(data: bytes, model: CMANP, source='the map'):
    """
    Read the content of a map's file, wherever it came from: all of it is verified.

    :param source: what errors call it.
    :return: keys, states and header as `map_bytes` took them.
    :raises OtherWeightsError: for another model's map.
    :raises CheckpointError: for damaged or foreign content.
    """
    tensors, header = _parse(data, MAP, source)
    expected = weights_hash(model)
    if (found := str(header.get('weights_hash'))) != expected:
        raise OtherWeightsError(
            f'{source} was folded by weights {found[:12]}, this model has '
            f'{expected[:12]}: load it with the checkpoint that made it'
        )
    empty = model.init_state(0).tensors()
    keys = _keys(tensors.pop('key', None), model.config, source)
    tensors = tensors or empty  # a map of no tiles
    _compare(
        {name: tuple(tensor.shape[1:]) for name, tensor in tensors.items()},
        {name: tuple(tensor.shape[1:]) for name, tensor in empty.items()},
        str(source),
    )
    for name, tensor in tensors.items():
        if len(tensor) != len(keys) or tensor.dtype != empty[name].dtype:
            raise CheckpointError(
                f'{source}: {name} holds {len(tensor)} tiles of {tensor.dtype}, expected '
                f'{len(keys)} of {empty[name].dtype}'
            )
    device = empty['num_observations'].device
    state = from_tensors({name: tensor.to(device) for name, tensor in tensors.items()})
    if not state.is_finite():
        raise CheckpointError(f'{source} holds sums that are not finite; it cannot be used')
    return keys, state, header


def remove_leftovers(folder):
    """
    Remove what writers left that were killed; one that is writing now holds a lock on its file.
    """
    for path in Path(folder).glob('.*.safetensors.*'):
        with suppress(OSError), open(path, 'rb') as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def load_reference(state_dict: dict, config: CMANPConfig) -> CMANP:
    """
    Import weights of the authors' implementation by their names there.

    :param config: of the `paper` kind, with the sizes of those weights.
    :raises CheckpointError: naming unknown, missing or wrongly shaped keys.
    """
    model = CMANP(config)
    if config.autoregressive is not None:  # it also holds a diagonal head that it does not use
        state_dict = {k: v for k, v in state_dict.items() if not k.startswith('predictor.')}
    ours = {}
    for name in model.state_dict():
        ours |= {key: name for key in _reference_names(name, config)}
    expected = {}
    for key, name in ours.items():
        shape = tuple(model.state_dict()[name].shape)
        expected[key] = shape[1:] if _is_stacked(name) else shape
    _compare({k: tuple(v.shape) for k, v in state_dict.items()}, expected, 'reference weights')
    tensors = {}
    for name in model.state_dict():
        parts = [state_dict[key] for key in _reference_names(name, config)]
        tensors[name] = torch.stack(parts) if _is_stacked(name) else parts[0]
    model.load_state_dict(tensors)
    return model.eval().requires_grad_(False)


_STACKED = {
    'encoder.block_latents': 'latents',
    'encoder.gather': 'layer_cross_attn',
    'encoder.gather_feedforward': 'layer_cross_ff',
    'encoder.block_attention': 'layer_latent_self_attn',
    'encoder.block_feedforward': 'layer_latent_ff',
}
_NESTED = {
    'cross_attention': 'cross_attn',
    'cross_feedforward': 'cross_ff',
    'self_attention': 'latent_self_attn',
    'feedforward': 'latent_ff',
}
_LEAVES = {
    'to_q': 'fn.to_q',
    'to_kv': 'fn.to_kv',
    'to_out': 'fn.to_out',
    'wide': 'fn.net.0',
    'narrow': 'fn.net.2',
}


def _stacked_prefix(name):
    return next((p for p in _STACKED if name == p or name.startswith(f'{p}.')), None)


def _is_stacked(name):
    return _stacked_prefix(name) is not None


def _reference_names(name, config):
    """
    Return the reference's name of one of our weights, or one name for each block of a stack.
    """
    parts = [_LEAVES.get(part, part) for part in name.split('.')]
    prefix = _stacked_prefix(name)
    if prefix is not None:
        rest = '.'.join([_STACKED[prefix], *parts[2:]])
        return [f'encoder.layers.{block}.{rest}' for block in range(config.num_blocks)]
    if name.startswith('encoder.integrations.'):
        rest = '.'.join([_NESTED[parts[3]], *parts[4:]])
        return [f'encoder.layers.{parts[2]}.{rest}']
    if name.startswith('decoder.'):
        layer = {'cross_attention': 'cross_attn', 'feedforward': 'cross_ff'}[parts[2]]
        return ['.'.join(['decoder.layers', parts[1], layer, *parts[3:]])]
    if config.autoregressive is not None:
        name = name.replace('covariance_head.transformer.', 'std_encoder.')
        name = name.replace('covariance_head.projector.', 'projector.')
        name = name.replace('predictor.', 'mean_net.')
    return ['latents' if name == 'encoder.latents' else name]


def _fill(model, tensors, source):
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    _compare({name: tuple(tensor.shape) for name, tensor in tensors.items()}, expected, source)
    model.load_state_dict(tensors)


def _compare(found, expected, source):
    """
    Compare shapes by name.

    :raises CheckpointError: naming what is unknown, missing or of another shape.
    """
    problems = [f'unknown {name}' for name in sorted(found.keys() - expected.keys())] + [
        f'missing {name}' for name in sorted(expected.keys() - found.keys())
    ]
    problems += [
        f'{name} has shape {found[name]}, expected {expected[name]}'
        for name in sorted(found.keys() & expected.keys())
        if found[name] != expected[name]
    ]
    if problems:
        shown = '; '.join(problems[:8]) + ('; ...' if len(problems) > 8 else '')
        raise CheckpointError(
            f'{source}: {len(problems)} tensors do not fit the configuration: {shown}'
        )


def _weights():
    return Path(__file__).resolve().parent / 'weights'


def _find(path_or_name):
    path = Path(path_or_name)
    if path.suffix == '.safetensors':
        return path
    shipped = _weights() / f'{path_or_name}.safetensors'
    if not shipped.is_file():
        raise CheckpointError(
            f'no checkpoint {str(path_or_name)!r}: expected a path that ends in .safetensors or '
            f'one of {shipped_models()}'
        )
    return shipped


def _digest(tensors, header):
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f'{name} {tensor.dtype} {tuple(tensor.shape)}'.encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _keys(tensor, config, source):
    """
    Return the keys of tiles; None is no tiles.

    :raises CheckpointError: for keys that no tile can have.
    """
    if tensor is None:
        return []
    width = 1 + config.dim_x
    if tensor.dtype != torch.int64 or tensor.ndim != 2 or tensor.shape[1] != width:
        raise CheckpointError(
            f'{source}: key has shape {tuple(tensor.shape)} of {tensor.dtype}, expected '
            f'(tiles, {width}) of torch.int64'
        )
    keys, is_near = keys_of(tensor), ((tensor >= -FARTHEST) & (tensor <= FARTHEST)).all()
    if not is_near or len(set(keys)) < len(keys):
        raise CheckpointError(
            f'{source} holds a tile that is {FARTHEST:.0e} tiles away, or twice; it cannot be used'
        )
    return keys


def _bytes(kind, tensors, header):
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {
        'kind': kind,
        'format_version': str(FORMAT_VERSION[kind]),
        'header': json.dumps(header, sort_keys=True),
        'sha256': _digest(tensors, header),
    }
    return save(tensors, metadata)


def _write(path, data):
    path = Path(path)
    if path.suffix != '.safetensors':
        raise CheckpointError(f'{path}: expected a name that ends in .safetensors')
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name}.')
    try:
        with os.fdopen(descriptor, 'wb') as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed: see remove_leftovers
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), 0o644)  # mkstemp is private; maps are to be shared
            os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name, too, outlives a power cut
    finally:
        os.close(folder)
    return path


def _read(path, kind):
    return _parse(_content(path), kind, path)


def _content(path):
    if not Path(path).is_file():
        raise CheckpointError(f'{path}: no such file')
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise CheckpointError(f'{path} cannot be read ({error}): make it readable') from error


def _parse(data, kind, path):
    """
    Read and verify the content of a file.

    :return: tensors by name, header.
    :raises CheckpointError: saying what is wrong with it.
    """
    try:
        tensors = load(data)
        length = int.from_bytes(data[:8], 'little')
        metadata = json.loads(data[8 : 8 + length]).get('__metadata__') or {}
    except (SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(
            f'{path} is truncated, damaged or not a safetensors file ({error})'
        ) from error
    if metadata.get('kind') != kind:
        raise CheckpointError(
            f'{path} is {metadata.get("kind", "a foreign safetensors file")!r}, expected {kind!r}'
        )
    if metadata.get('format_version') != str(FORMAT_VERSION[kind]):
        raise CheckpointError(
            f'{path} has format version {metadata.get("format_version")}, this release reads '
            f'{FORMAT_VERSION[kind]}: use the release that wrote it'
        )
    try:
        header = json.loads(metadata.get('header', ''))
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict) or metadata.get('sha256') != _digest(tensors, header):
        raise CheckpointError(f'{path} is damaged: its content does not match its checksum')
    return tensors, header
