"""A configuration that exists can be built; any other says which value is wrong and why."""

import dataclasses
import json
import re
from math import inf, nan

import pytest
import torch

from cmanp_ros.core import CMANP, CMANPConfig, CMANPError, LeastSquaresConfig
from cmanp_ros.core.config import AutoregressiveConfig
from cmanp_ros.core.errors import ConfigError

COUNTS = [
    'dim_x',
    'dim_y',
    'num_latents',
    'num_latents_per_block',
    'dim_model',
    'dim_feedforward',
    'num_heads',
    'num_blocks',
    'embedder_depth',
    'chunk_size',
    'num_levels',
    'level_factor',
]
SMALL = {'num_latents': 3, 'num_latents_per_block': 5, 'num_blocks': 2}


def assert_refused(message, cls, **values):
    with pytest.raises(ConfigError) as error:
        cls(**values)
    assert str(error.value) == message


def test_paper_has_the_sizes_of_the_paper():
    config = CMANPConfig.paper(3, 2)
    assert (config.dim_x, config.dim_y) == (3, 2)
    assert (config.num_latents, config.num_latents_per_block, config.num_blocks) == (128, 128, 6)
    assert (config.dim_model, config.num_heads, config.dim_feedforward) == (64, 4, 128)
    assert config.least_squares is None and not config.inducing_points
    assert config.num_levels == 1


@pytest.mark.parametrize('dim_x', [1, 2, 3])
def test_field_has_both_memories_in_every_dimension(dim_x):
    config = CMANPConfig.field(dim_x, 1)
    assert config.inducing_points
    assert (config.num_levels, config.level_factor) == (3, 3)
    assert config.least_squares.functions_per_axis**dim_x < 2500
    assert config.least_squares.voxels_per_axis**dim_x < 70_000


@pytest.mark.parametrize('preset', ['paper', 'field'])
def test_overrides_replace_the_defaults(preset):
    config = getattr(CMANPConfig, preset)(2, 1, num_blocks=7, chunk_size=11, num_levels=5)
    assert (config.num_blocks, config.chunk_size, config.num_levels) == (7, 11, 5)
    assert getattr(CMANPConfig, preset)(2, 1, least_squares=None).least_squares is None


@pytest.mark.parametrize('preset', ['paper', 'field'])
def test_configurations_survive_json(preset):
    config = getattr(CMANPConfig, preset)(3, 2, num_blocks=7)
    again = CMANPConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert hash(again) == hash(config)


def test_from_dict_leaves_its_argument_unchanged():
    values = CMANPConfig.field(2, 1).to_dict()
    before = json.dumps(values)
    CMANPConfig.from_dict(values)
    assert json.dumps(values) == before


def test_configurations_are_frozen():
    for config in (CMANPConfig.field(2, 1), LeastSquaresConfig()):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, dataclasses.fields(config)[0].name, 3)


def test_sequences_become_tuples_of_floats():
    config = LeastSquaresConfig(smoothnesses=[2.5], lengths=[1, 2], noise_ratios=(0.1,))
    assert config.lengths == (1.0, 2.0)
    assert {type(value) for value in config.lengths} == {float}


@pytest.mark.parametrize('name', COUNTS)
@pytest.mark.parametrize('value', [0, -3, 1.5, 2.0, '7', None, True, inf])
def test_counts_are_integers_of_at_least_one(name, value):
    values = {'dim_x': 2, 'dim_y': 1} | {name: value}
    assert_refused(
        f'{name} is {value!r}, expected an integer of at least 1', CMANPConfig, **values
    )


def test_dim_model_is_a_multiple_of_num_heads():
    message = 'dim_model is 14, expected a multiple of num_heads = 4'
    assert_refused(message, CMANPConfig, dim_x=2, dim_y=1, dim_model=14)


def test_embedders_have_at_least_two_layers():
    message = 'embedder_depth is 1, expected at least 2'
    assert_refused(message, CMANPConfig, dim_x=2, dim_y=1, embedder_depth=1)


def test_levels_differ_in_size():
    message = 'level_factor is 1, expected at least 2'
    assert_refused(message, CMANPConfig, dim_x=2, dim_y=1, level_factor=1)
    assert CMANPConfig(2, 1, level_factor=2).level_factor == 2


@pytest.mark.parametrize('name', ['functions_per_axis', 'voxels_per_axis'])
@pytest.mark.parametrize('value', [0, -2, 2.5, 3.0, nan, inf, True])
def test_sizes_of_least_squares_are_integers_of_at_least_one(name, value):
    message = f'{name} is {value!r}, expected an integer of at least 1'
    assert_refused(message, LeastSquaresConfig, **{name: value})


@pytest.mark.parametrize('value', [2.0, 1.0, -3.0, nan])
def test_the_box_is_larger_than_the_workspace(value):
    message = f'box_half_width is {value!r}, expected more than 2'
    assert_refused(message, LeastSquaresConfig, box_half_width=value)


@pytest.mark.parametrize('name', ['smoothnesses', 'lengths', 'noise_ratios'])
@pytest.mark.parametrize('value', [(), (0.0,), (1.0, -0.5), (nan,), (nan, 1.0), (1.0, nan)])
def test_hyperparameters_are_positive(name, value):
    message = f'{name} is {value!r}, expected one or more positive numbers'
    assert_refused(message, LeastSquaresConfig, **{name: value})


@pytest.mark.parametrize('name', ['lengths', 'noise_ratios'])
def test_grids_with_settings_in_between_are_in_order(name):
    for values in ((1.0, 0.5), (0.5, 0.5, 1.0)):
        assert getattr(LeastSquaresConfig(**{name: values}), name) == values
        message = f'{name} is {values!r}, expected increasing numbers, as refinement is not 1'
        assert_refused(message, LeastSquaresConfig, refinement=2, **{name: values})
    assert LeastSquaresConfig(smoothnesses=(inf, 1.5), refinement=2).smoothnesses == (inf, 1.5)


def test_coarse_tiles_may_have_other_smoothnesses_as_many_as_the_finest():
    config = LeastSquaresConfig(smoothnesses=(1.5,), coarse_smoothnesses=(inf,))
    assert config.of_level(0) is config
    assert [config.of_level(level).smoothnesses for level in (1, 2)] == [(inf,), (inf,)]
    alike = LeastSquaresConfig(smoothnesses=(0.5, 2.5))
    assert alike.of_level(2) is alike
    for value in ((-1.0,), (nan,)):
        message = f'coarse_smoothnesses is {value!r}, expected one or more positive numbers'
        assert_refused(message, LeastSquaresConfig, coarse_smoothnesses=value)
    message = 'coarse_smoothnesses is (1.5, 2.5), expected none, or 1 as smoothnesses'
    assert_refused(message, LeastSquaresConfig, coarse_smoothnesses=(1.5, 2.5))


@pytest.mark.parametrize('name', ['lengths', 'noise_ratios'])
def test_only_the_smoothness_may_be_infinite(name):
    assert LeastSquaresConfig(smoothnesses=(inf,)).smoothnesses == (inf,)
    with pytest.raises(ConfigError, match=f'^{name} is .*inf'):
        LeastSquaresConfig(**{name: (1.0, inf)})


@pytest.mark.parametrize(
    'name',
    [
        'amplitude_shape',
        'amplitude_scale',
        'noise_stddev',
        'points_per_voxel',
    ],
)
@pytest.mark.parametrize('value', [0.0, -1.0, inf, nan])
def test_prior_parameters_are_positive(name, value):
    message = f'{name} is {value!r}, expected a positive number'
    assert_refused(message, LeastSquaresConfig, **{name: value})


@pytest.mark.parametrize('name', ['offset_variance', 'slope_variance'])
def test_prior_variances_are_not_negative(name):
    assert getattr(LeastSquaresConfig(**{name: 0.0}), name) == 0.0
    for value in (-1.0, inf, nan):
        message = f'{name} is {value!r}, expected a number of at least 0'
        assert_refused(message, LeastSquaresConfig, **{name: value})


def test_regressions_are_of_three_axes_at_most():
    message = 'dim_x is 4, expected at most 3, or a model without least_squares'
    assert_refused(message, CMANPConfig.field, dim_x=4, dim_y=1)
    assert CMANPConfig.field(4, 1, least_squares=None).dim_x == 4


def test_text_is_a_number_where_it_reads_as_one():
    assert LeastSquaresConfig(points_per_voxel='1e9').points_per_voxel == 1e9
    assert LeastSquaresConfig(lengths=['1e-1', 2]).lengths == (0.1, 2.0)
    message = "points_per_voxel is 'many', expected a number"
    assert_refused(message, LeastSquaresConfig, points_per_voxel='many')
    assert_refused("lengths is ['a'], expected numbers", LeastSquaresConfig, lengths=['a'])
    assert_refused('lengths is 5, expected numbers', LeastSquaresConfig, lengths=5)
    message = "location_lengths is ['a', 'b'], expected numbers"
    assert_refused(message, CMANPConfig, dim_x=1, dim_y=1, location_lengths=['a', 'b'])


@pytest.mark.parametrize('value', [True, None, [1.0]])
def test_numbers_are_of_their_type(value):
    message = f'box_half_width is {value!r}, expected a number'
    assert_refused(message, LeastSquaresConfig, box_half_width=value)


@pytest.mark.parametrize('name', ['bounded_stddev', 'inducing_points', 'own_answer'])
@pytest.mark.parametrize('value', ['maybe', 1, None])
def test_switches_are_true_or_false(name, value):
    message = f'{name} is {value!r}, expected true or false'
    assert_refused(message, CMANPConfig, **{'dim_x': 1, 'dim_y': 1, name: value})


def test_own_answer_needs_a_regression_to_stand_beside():
    with pytest.raises(ConfigError, match='own_answer is true without least_squares'):
        CMANPConfig.paper(1, 1, own_answer=True)


def test_the_memories_exclude_each_other():
    blocks = AutoregressiveConfig(block_size=3)
    for parts in (
        {'autoregressive': blocks, 'least_squares': LeastSquaresConfig()},
        {'autoregressive': blocks, 'num_global': 2},
        {'num_global': 2, 'least_squares': LeastSquaresConfig()},
    ):
        with pytest.raises(ConfigError, match='exclude each other'):
            CMANPConfig.paper(1, 1, **parts)
    config = CMANPConfig.paper(1, 1, autoregressive=blocks)
    assert CMANPConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize('value', [(0.3,), (0.3, 0.3), (0.0, 1.0), (1.0, inf), (2.0, 1.0)])
def test_scales_of_the_features_of_location_are_ordered(value):
    with pytest.raises(ConfigError, match='^location_lengths is'):
        CMANPConfig.paper(1, 1, location_lengths=value)


@pytest.mark.parametrize('value', [0.5, 1.0])
def test_the_amplitude_has_a_prior_mean(value):
    message = f'amplitude_shape is {value!r}, expected above 1'
    assert_refused(message, LeastSquaresConfig, amplitude_shape=value)


def test_unknown_keys_are_named():
    values = CMANPConfig.field(2, 1).to_dict()
    with pytest.raises(ConfigError) as error:
        CMANPConfig.from_dict(values | {'num_level': 3, 'a': 1})
    known = [field.name for field in dataclasses.fields(CMANPConfig)]
    assert str(error.value) == (
        f"CMANPConfig has no ['a', 'num_level']; expected keys among {known}"
    )
    values['least_squares']['lenghts'] = (1.0,)
    with pytest.raises(ConfigError, match=r"^LeastSquaresConfig has no \['lenghts'\]; expected"):
        CMANPConfig.from_dict(values)


def test_memories_are_mappings():
    for name in ('least_squares', 'autoregressive'):
        with pytest.raises(ConfigError, match=f'^{name} is 5, expected a mapping of options, or'):
            CMANPConfig.from_dict({'dim_x': 1, 'dim_y': 1, name: 5})


def test_missing_keys_are_named():
    with pytest.raises(ConfigError, match=re.escape("argument: 'dim_y'")):
        CMANPConfig.from_dict({'dim_x': 2})


def test_from_dict_refuses_values_out_of_range():
    values = CMANPConfig.field(2, 1).to_dict()
    with pytest.raises(ConfigError, match='^num_blocks is 0, expected an integer of at least 1$'):
        CMANPConfig.from_dict(values | {'num_blocks': 0})
    values['least_squares']['box_half_width'] = 1.5
    with pytest.raises(ConfigError, match='^box_half_width is 1.5, expected more than 2$'):
        CMANPConfig.from_dict(values)


def test_config_errors_are_value_errors_of_this_package():
    assert issubclass(ConfigError, CMANPError) and issubclass(ConfigError, ValueError)


@pytest.mark.parametrize(
    'sizes',
    [
        {'dim_model': 12, 'num_heads': 3},
        {'dim_model': 10, 'num_heads': 2},
        {'dim_model': 3, 'num_heads': 3},
        {'dim_model': 7, 'num_heads': 1},
    ],
    ids=str,
)
@pytest.mark.parametrize('inducing_points', [False, True])
def test_a_configuration_that_is_accepted_can_be_built(sizes, inducing_points):
    try:
        config = CMANPConfig(2, 1, **sizes, **SMALL, inducing_points=inducing_points)
    except ConfigError:
        return  # refused with a reason is as good
    model = CMANP(config).eval()
    state = model.update(model.init_state(), torch.zeros(1, 3, 2), torch.zeros(1, 3, 1))
    assert model.predict(state, torch.zeros(1, 5, 2)).mean.isfinite().all()
