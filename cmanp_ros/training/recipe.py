"""A training in a YAML file: which model, on which prior, to which objective, how long."""

import dataclasses
import json
from dataclasses import asdict, dataclass, field, fields
from math import isfinite
from pathlib import Path

import yaml

from cmanp_ros.core import CMANPConfig
from cmanp_ros.core.errors import ConfigError
from cmanp_ros.training.processes import MapPrior

RECIPES = Path(__file__).resolve().parent / 'recipes'
OBJECTIVES = ('log_likelihood', 'evidence_lower_bound', 'joint_log_likelihood')
PRESETS = ('paper', 'field')
LARGEST_SEED = 10**12  # times a million it seeds the generator of each batch


@dataclass(frozen=True)
class WorldPrior:
    """
    Worlds of tiles as robots meet them (`worlds.world_task`): batches are made once and kept.
    """

    num_batches: int = 1_000
    """Distinct batches; each comes back mirrored and swapped."""
    max_context: int = 1200
    num_target: int = 48

    def __post_init__(self):
        for name, value in asdict(self).items():
            _require(_is_whole(value) and value >= 1, name, value, 'at least 1')


@dataclass(frozen=True)
class Recipe:
    """
    All that decides on the weights.
    """

    model: CMANPConfig
    prior: MapPrior | WorldPrior = field(default_factory=MapPrior)
    objective: str = 'log_likelihood'
    steps: int = 10_000
    batch_size: int = 16
    """Tasks in a step, over all processes."""
    learning_rate: float = 1e-3
    warmup: int = 300
    """Steps until the learning rate is reached; then it falls as a cosine to 0."""
    weight_decay: float = 1e-2
    validate_every: int = 500
    seed: int = 0
    precision: str = 'float32'
    """Of matrix products; 'bfloat16' pays where the processor multiplies it faster."""
    start_from: str | None = None
    """A model file or the name of a shipped model: go on from its weights."""

    def __post_init__(self):
        for name in ('steps', 'batch_size', 'warmup', 'validate_every'):
            value = getattr(self, name)
            _require(_is_whole(value) and value >= 1, name, value, 'at least 1')
        is_seed = _is_whole(self.seed) and abs(self.seed) <= LARGEST_SEED
        seeds = f'a whole number within +-{LARGEST_SEED:,}'
        _require(is_seed, 'seed', self.seed, seeds)
        rate, decay = self.learning_rate, self.weight_decay
        _require(isfinite(rate) and rate > 0, 'learning_rate', rate, 'above 0, and finite')
        _require(isfinite(decay) and decay >= 0, 'weight_decay', decay, 'at least 0, and finite')
        start = self.start_from
        is_name = start is None or isinstance(start, str)
        _require(is_name, 'start_from', start, 'a model file or the name of a shipped model')
        precisions = ('float32', 'bfloat16')
        _require(self.precision in precisions, 'precision', self.precision, f'one of {precisions}')
        _require(self.objective in OBJECTIVES, 'objective', self.objective, f'one of {OBJECTIVES}')
        if isinstance(self.prior, WorldPrior):
            _require(self.model.dim_y == 1, 'dim_y', self.model.dim_y, '1 for the prior of worlds')
            _require(
                self.objective == 'log_likelihood',
                'objective',
                self.objective,
                'log_likelihood for the prior of worlds',
            )
            if self.model.autoregressive is not None or self.model.num_global:
                raise ConfigError(
                    'the prior of worlds trains no model with `autoregressive` or `num_global`: '
                    'expected one without them, or the prior of maps'
                )
        needs = {
            'evidence_lower_bound': ('num_global', self.model.num_global > 0),
            'joint_log_likelihood': ('autoregressive', self.model.autoregressive is not None),
        }
        name, given = needs.get(self.objective, ('', True))
        if not given:
            raise ConfigError(f'objective {self.objective} needs `{name}` in the model')
        if self.objective == 'joint_log_likelihood' and self.model.dim_y != 1:
            raise ConfigError(f'dim_y is {self.model.dim_y}, expected 1 for {self.objective}')

    def to_dict(self) -> dict:
        """
        Return plain values, from which `from_dict` makes the same recipe.
        """
        values = asdict(self)
        name = 'worlds' if isinstance(self.prior, WorldPrior) else 'maps'
        return json.loads(json.dumps(values | {'prior': {name: values['prior']}}))


def shipped_recipes() -> list[str]:
    """
    Return the names that `load_recipe` knows.
    """
    return sorted(path.stem for path in RECIPES.glob('*.yaml'))


def load_recipe(path_or_name, **overrides) -> Recipe:
    """
    Read a recipe.

    :param path_or_name: a YAML file, or the name of a shipped recipe.
    :param overrides: of its top level; None: as in the file.
    :raises ConfigError: for a missing or damaged file, an unknown key, or a value out of range.
    """
    path = Path(path_or_name)
    if path.suffix not in ('.yaml', '.yml'):
        path = RECIPES / f'{path_or_name}.yaml'
    if not path.is_file():
        raise ConfigError(
            f'no recipe {str(path_or_name)!r}: expected a path that ends in .yaml or one of '
            f'{shipped_recipes()}'
        )
    try:
        values = yaml.safe_load(path.read_text(encoding='utf-8'))
        recipe = from_dict(values)
        given = {name: value for name, value in overrides.items() if value is not None}
        return dataclasses.replace(recipe, **given)
    except (yaml.YAMLError, UnicodeDecodeError, ConfigError) as error:
        raise ConfigError(f'{path}: {error}') from error


def from_dict(values) -> Recipe:
    """
    Build a recipe from plain values.

    :raises ConfigError: for an unknown key or a value out of range.
    """
    if not isinstance(values, dict) or not isinstance(values.get('model'), dict):
        raise ConfigError(
            'expected a mapping with the key `model`, and in it preset, dim_x, dim_y'
        )
    known = [part.name for part in fields(Recipe)]
    if unknown := sorted(set(values) - set(known)):
        raise ConfigError(f'the recipe has {unknown}; expected keys among {known}')
    values = dict(values, model=_model(values['model']), prior=_prior(values.get('prior')))
    for name in ('learning_rate', 'weight_decay'):  # YAML reads 1e-3 as text
        if name in values:
            values[name] = _number(name, values[name])
    return Recipe(**values)


def _model(values):
    values = dict(values)
    preset = values.pop('preset', None)
    if preset is None:
        return CMANPConfig.from_dict(values)
    _require(preset in PRESETS, 'preset', preset, f'one of {PRESETS}, or none and all sizes')
    dims = {name: values.pop(name, None) for name in ('dim_x', 'dim_y')}
    for name, value in dims.items():
        _require(_is_whole(value) and value >= 1, name, value, 'a number of dimensions')
    base = getattr(CMANPConfig, preset)(**dims).to_dict()
    for name, value in values.items():  # of the memories single options may be given
        is_part = isinstance(value, dict) and isinstance(base.get(name), dict)
        base[name] = base[name] | value if is_part else value
    return CMANPConfig.from_dict(base)


def _prior(values):
    if values is None:
        return MapPrior()
    if not isinstance(values, dict) or len(values) != 1 or not set(values) <= {'maps', 'worlds'}:
        raise ConfigError(f'prior is {values!r}, expected one key: maps or worlds, with options')
    ((kind, options),) = values.items()
    options = options or {}
    _require(isinstance(options, dict), kind, options, 'a mapping of options')
    if kind == 'maps':
        return MapPrior.from_dict(options)
    known = [part.name for part in fields(WorldPrior)]
    if unknown := sorted(set(options) - set(known)):
        raise ConfigError(f'worlds has {unknown}; expected keys among {known}')
    return WorldPrior(**options)


def _number(name, value):
    try:
        if not isinstance(value, bool):
            return float(value)
    except (TypeError, ValueError, OverflowError):
        pass
    raise ConfigError(f'{name} is {value!r}, expected a number')


def _is_whole(value):
    return isinstance(value, int) and not isinstance(value, bool)


def _require(condition, name, value, expected):
    if not condition:
        raise ConfigError(f'{name} is {value!r}, expected {expected}')
