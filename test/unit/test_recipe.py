"""A recipe is all that decides on the weights; what it cannot mean is refused with a way out."""

import json
from dataclasses import replace

import pytest
import small_models
import yaml

from cmanp_ros.checkpoint import load_model, shipped_models
from cmanp_ros.core import CMANP, CMANPConfig
from cmanp_ros.core.config import AutoregressiveConfig
from cmanp_ros.core.errors import ConfigError
from cmanp_ros.training.batches import MapBatches
from cmanp_ros.training.processes import MapPrior
from cmanp_ros.training.recipe import (
    LARGEST_SEED,
    Recipe,
    WorldPrior,
    from_dict,
    load_recipe,
    shipped_recipes,
)

MODEL = {'preset': 'paper', 'dim_x': 2, 'dim_y': 1}
BLOCKS = AutoregressiveConfig(block_size=3, num_layers=1, rank=5, depth=2)


def written(tmp_path, text):
    path = tmp_path / 'mine.yaml'
    path.write_text(text, encoding='utf-8')
    return path


def assert_refused(values, message):
    with pytest.raises(ConfigError) as error:
        from_dict(values)
    assert str(error.value).startswith(message), str(error.value)


# Shipped -----------------------------------------------------------------------------------------


def test_some_recipes_are_shipped():
    assert {'gp1d_and', 'gp1d_attention'} <= set(shipped_recipes())


@pytest.mark.parametrize('name', shipped_recipes())
def test_shipped_recipes_load_and_round_trip(name):
    recipe = load_recipe(name)
    assert from_dict(recipe.to_dict()) == recipe
    assert from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    CMANP(recipe.model)
    if isinstance(recipe.prior, MapPrior):
        batch = MapBatches(replace(recipe, batch_size=2))[0]
        assert batch['x'].shape[::2] == (2, recipe.model.dim_x)
        num_target = batch['y_target'].shape[1]
        wanted = recipe.prior.num_target
        least, most = wanted if isinstance(wanted, tuple) else (wanted, wanted)
        assert least <= num_target <= most
        assert batch['y_target'].shape == (2, num_target, recipe.model.dim_y)


@pytest.mark.parametrize('name', shipped_models())
def test_recipes_of_shipped_models_describe_them(name):
    """A preset may get new defaults: training again would make another model then."""
    assert load_recipe(name).model == load_model(name).config


# Reading -----------------------------------------------------------------------------------------


def test_a_recipe_says_what_its_file_says(tmp_path):
    path = written(
        tmp_path,
        """
        model: {preset: field, dim_x: 1, dim_y: 1, num_levels: 2, least_squares: {lengths: [0.5]}}
        prior: {worlds: {num_batches: 7, max_context: 11}}
        steps: 13
        learning_rate: 1e-4
        """,
    )
    recipe, base = load_recipe(path), CMANPConfig.field(1, 1)
    memory = replace(base.least_squares, lengths=(0.5,))  # other options of it as they are
    assert recipe.model == replace(base, num_levels=2, least_squares=memory)
    assert recipe.prior == WorldPrior(num_batches=7, max_context=11)
    assert (recipe.steps, recipe.learning_rate, recipe.objective) == (13, 1e-4, 'log_likelihood')


def test_a_field_without_its_regression_can_be_asked_for():
    recipe = from_dict({'model': MODEL | {'preset': 'field', 'least_squares': None}})
    assert recipe.model == CMANPConfig.field(2, 1, least_squares=None)


def test_without_a_preset_the_model_is_what_is_written():
    config = small_models.field(2)
    assert from_dict({'model': config.to_dict()}).model == config
    assert from_dict({'model': MODEL}).model == CMANPConfig.paper(2, 1)


def test_no_prior_is_the_default_of_maps():
    assert from_dict({'model': MODEL}).prior == MapPrior()
    assert from_dict({'model': MODEL, 'prior': {'maps': None}}).prior == MapPrior()
    assert from_dict({'model': MODEL, 'prior': {'worlds': {}}}).prior == WorldPrior()


@pytest.mark.parametrize(
    'recipe',
    [
        Recipe(small_models.field(2), WorldPrior(3, 11, 5), seed=7, start_from='field'),
        Recipe(
            small_models.paper(3, 2, num_global=2),
            MapPrior(kernels=('sum', 'rbf'), log_uniform=('noise',), trend=0.3),
            'evidence_lower_bound',
            precision='bfloat16',
        ),
        Recipe(small_models.paper(autoregressive=BLOCKS), objective='joint_log_likelihood'),
    ],
    ids=['worlds', 'stochastic', 'joint'],
)
def test_from_dict_inverts_to_dict(recipe):
    values = recipe.to_dict()
    assert values == json.loads(json.dumps(values))
    assert from_dict(values) == recipe
    assert from_dict(yaml.safe_load(yaml.safe_dump(values))) == recipe


def test_overrides_replace_what_the_file_says_and_none_does_not():
    recipe = load_recipe('gp1d_attention', steps=7, seed=None, precision='bfloat16')
    expected = replace(load_recipe('gp1d_attention'), steps=7, precision='bfloat16')
    assert recipe == expected and recipe.seed == 0


# Errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        ({'modle': 1}, "the recipe has ['modle']; expected keys among ['model', 'prior', "),
        ({'model': MODEL | {'dim_z': 3}}, "CMANPConfig has no ['dim_z']; expected keys among ["),
        (
            {'model': MODEL | {'preset': 'field', 'least_squares': {'length': [1.0]}}},
            "LeastSquaresConfig has no ['length']; expected keys among ['functions_per_axis', ",
        ),
        (
            {'model': MODEL | {'autoregressive': {'blocks': 3}}},
            "AutoregressiveConfig has no ['blocks']; expected keys among ['block_size', ",
        ),
        (
            {'prior': {'maps': {'kernel': 'rbf'}}},
            "prior has ['kernel']; expected keys among ['kernels', ",
        ),
        (
            {'prior': {'worlds': {'kernels': ['rbf']}}},
            "worlds has ['kernels']; expected keys among ['num_batches', ",
        ),
    ],
    ids=['recipe', 'model', 'regression', 'blocks', 'maps', 'worlds'],
)
def test_unknown_keys_are_named_at_every_level(values, message):
    assert_refused({'model': MODEL} | values, message)


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        (None, 'expected a mapping with the key `model`, and in it preset, dim_x, dim_y'),
        ([1, 2], 'expected a mapping with the key `model`'),
        ({'steps': 3}, 'expected a mapping with the key `model`'),
        ({'model': 'paper'}, 'expected a mapping with the key `model`'),
        (
            {'model': MODEL | {'preset': 'big'}},
            "preset is 'big', expected one of ('paper', 'field'), or none and all sizes",
        ),
        (
            {'model': {'preset': 'paper', 'dim_x': 2}},
            'dim_y is None, expected a number of dimensions',
        ),
        (
            {'model': MODEL | {'dim_x': 'two'}},
            "dim_x is 'two', expected a number of dimensions",
        ),
        (
            {'model': MODEL | {'least_squares': 5}},
            'least_squares is 5, expected a mapping of options, or null',
        ),
        (
            {'model': MODEL | {'num_blocks': 0}},
            'num_blocks is 0, expected an integer of at least 1',
        ),
        (
            {'model': MODEL, 'prior': 'worlds'},
            "prior is 'worlds', expected one key: maps or worlds, with options",
        ),
        (
            {'model': MODEL, 'prior': {'maps': {}, 'worlds': {}}},
            "prior is {'maps': {}, 'worlds': {}}, expected one key: maps or worlds, with options",
        ),
        ({'model': MODEL, 'prior': {'fields': {}}}, "prior is {'fields': {}}, expected one key"),
        ({'model': MODEL, 'prior': {'maps': 5}}, 'maps is 5, expected a mapping of options'),
        (
            {'model': MODEL, 'prior': {'maps': {'noise': [0.2, 0.1]}}},
            'noise is [0.2, 0.1], expected least and most',
        ),
        (
            {'model': MODEL, 'prior': {'worlds': {'num_target': 0}}},
            'num_target is 0, expected at least 1',
        ),
        ({'model': MODEL, 'steps': 0}, 'steps is 0, expected at least 1'),
        ({'model': MODEL, 'batch_size': 2.5}, 'batch_size is 2.5, expected at least 1'),
        ({'model': MODEL, 'warmup': 0}, 'warmup is 0, expected at least 1'),
        ({'model': MODEL, 'validate_every': -1}, 'validate_every is -1, expected at least 1'),
        ({'model': MODEL, 'learning_rate': 0}, 'learning_rate is 0.0, expected above 0'),
        ({'model': MODEL, 'learning_rate': 'fast'}, "learning_rate is 'fast', expected a number"),
        ({'model': MODEL, 'weight_decay': -1}, 'weight_decay is -1.0, expected at least 0'),
        ({'model': MODEL, 'learning_rate': True}, 'learning_rate is True, expected a number'),
        (
            {'model': MODEL, 'learning_rate': float('inf')},
            'learning_rate is inf, expected above 0',
        ),
        ({'model': MODEL, 'weight_decay': float('nan')}, 'weight_decay is nan, expected at least'),
        ({'model': MODEL, 'steps': True}, 'steps is True, expected at least 1'),
        ({'model': MODEL, 'start_from': 5}, 'start_from is 5, expected a model file or the name'),
        (
            {'model': MODEL, 'seed': 20261201130000},
            'seed is 20261201130000, expected a whole number within +-1,000,000,000,000',
        ),
        ({'model': MODEL, 'seed': 'one'}, "seed is 'one', expected a whole number"),
        (
            {'model': MODEL, 'precision': 'float16'},
            "precision is 'float16', expected one of ('float32', 'bfloat16')",
        ),
        (
            {'model': MODEL, 'objective': 'accuracy'},
            "objective is 'accuracy', expected one of ('log_likelihood', ",
        ),
    ],
)
def test_values_out_of_range_are_named_with_what_was_expected(values, message):
    assert_refused(values, message)


@pytest.mark.parametrize(
    ('objective', 'part'),
    [('evidence_lower_bound', 'num_global'), ('joint_log_likelihood', 'autoregressive')],
)
def test_an_objective_without_its_part_is_refused_naming_the_part(objective, part):
    message = f'objective {objective} needs `{part}` in the model'
    assert_refused({'model': MODEL, 'objective': objective}, message)


def test_the_joint_objective_is_of_one_output():
    config = small_models.paper(dim_y=2, autoregressive=BLOCKS)
    with pytest.raises(ConfigError, match='^dim_y is 2, expected 1 for joint_log_likelihood$'):
        Recipe(config, objective='joint_log_likelihood')


def test_worlds_have_one_output_and_one_objective_and_no_other_model():
    worlds = WorldPrior()
    with pytest.raises(ConfigError, match='^dim_y is 2, expected 1 for the prior of worlds$'):
        Recipe(small_models.field(dim_y=2), worlds)
    stochastic = small_models.paper(num_global=2)
    with pytest.raises(ConfigError, match="^objective is 'evidence_lower_bound', expected log_l"):
        Recipe(stochastic, worlds, 'evidence_lower_bound')
    for config in (stochastic, small_models.paper(autoregressive=BLOCKS)):
        with pytest.raises(ConfigError, match='without them, or the prior of maps$'):
            Recipe(config, worlds)


def test_a_missing_recipe_is_refused_naming_the_shipped_ones(tmp_path):
    with pytest.raises(ConfigError) as error:
        load_recipe('nothing')
    assert str(error.value) == (
        f"no recipe 'nothing': expected a path that ends in .yaml or one of {shipped_recipes()}"
    )
    with pytest.raises(ConfigError, match='^no recipe '):
        load_recipe(tmp_path / 'nowhere.yaml')


@pytest.mark.parametrize('text', ['model: [', '', '\x00', 'model: {dim_x: 1}'])
def test_a_damaged_file_is_refused_with_its_name(tmp_path, text):
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as error:
        load_recipe(path)
    assert str(error.value).startswith(f'{path}: ')


def test_a_file_that_is_no_text_is_refused_with_its_name(tmp_path):
    path = tmp_path / 'mine.yml'
    path.write_bytes(b'model: \xff\xfe')
    with pytest.raises(ConfigError, match='mine.yml: '):
        load_recipe(path)


@pytest.mark.parametrize('seed', [-LARGEST_SEED, LARGEST_SEED])
def test_batches_can_be_drawn_with_each_seed(seed):
    recipe = Recipe(small_models.paper(1), MapPrior(num_target=3), batch_size=2, seed=seed)
    for is_held_out in (False, True):
        assert MapBatches(recipe, is_held_out)[recipe.steps - 1]['x'].isfinite().all()


def test_an_override_out_of_range_is_refused():
    with pytest.raises(ConfigError, match='steps is 0, expected at least 1$'):
        load_recipe('gp1d_attention', steps=0)
