"""Every parameter is declared once, validated with a clear message, and documented as it is."""

import array
import dataclasses
import math
import pathlib
import subprocess
import sys

import pytest
import rclpy
import yaml
from rcl_interfaces.msg import SetParametersResult
from rclpy.context import Context
from rclpy.node import Node
from rclpy.parameter import Parameter

from cmanp_ros import parameter_file
from cmanp_ros.core.errors import ConfigError
from cmanp_ros.parameters import (
    SOURCE_TABLE,
    TABLE,
    NodeParameters,
    SourceParameters,
    changed,
    declare,
    default_yaml,
    markdown_table,
    parameters_from,
    rows,
)

ROOT = pathlib.Path(__file__).resolve().parents[2]
SPECS = {spec.name: spec for spec in TABLE}
BOUNDED = [spec for spec in TABLE if spec.lower is not None]
DECLARED = {spec.name: spec for spec, _ in rows(NodeParameters())}
DEFAULTS = {spec.name: value for spec, value in rows(NodeParameters())}


def complaint(**values):
    """Return the text of the error that values must raise."""
    with pytest.raises(ConfigError) as caught:
        parameters_from(values)
    return str(caught.value)


def test_no_values_give_the_defaults():
    parameters = parameters_from({})
    assert parameters == NodeParameters()
    filled_in = {'mean_range': (-2.0, 2.0), 'stddev_range': (0.0, 1.0)}
    assert {name: getattr(parameters, name) for name in SPECS} == {
        spec.name: filled_in.get(spec.name, spec.default) for spec in TABLE
    }


def test_parameters_cannot_be_changed_afterwards():
    with pytest.raises(dataclasses.FrozenInstanceError):
        parameters_from({}).num_threads = 3


def test_every_parameter_has_a_text_and_every_physical_one_a_unit():
    for spec in (*TABLE, *SOURCE_TABLE):
        assert spec.text.endswith('.') and len(spec.text) > 10
        if spec.kind in ('double', 'double[]'):
            assert spec.unit


@pytest.mark.parametrize('integer', [2, 30])
def test_integers_are_accepted_for_doubles(integer):
    value = parameters_from({'publish_rate': integer}).publish_rate
    assert value == integer
    assert isinstance(value, float)


@pytest.mark.parametrize('corner', [[-3, -5], (-3, -5), array.array('q', [-3, -5]), [-3.0, -5]])
def test_integers_are_accepted_in_lists_of_doubles(corner):
    value = parameters_from({'bounds_min': corner}).bounds_min
    assert value == (-3.0, -5.0)
    assert [type(number) for number in value] == [float, float]


@pytest.mark.parametrize('spec', BOUNDED, ids=lambda spec: spec.name)
def test_range_includes_both_ends_and_nothing_beyond(spec):
    kind = int if spec.kind == 'int' else float
    free = {
        'grid_resolution': {'max_targets': 10_000_000},
        'grid_window': {'grid_resolution': 1e6},
        'autosave_period': {'state_directory': 'maps'},
    }.get(spec.name, {})
    corner = {'bounds_min': [0.0, 0.0], 'bounds_max': [1e-3, 1e-3]}  # so that tiny cells are few
    for end in (spec.lower, spec.upper):
        assert getattr(parameters_from({spec.name: kind(end), **free, **corner}), spec.name) == end
    step = 1 if spec.kind == 'int' else 1e-5
    for outside in (kind(spec.lower) - step, kind(spec.upper) + step * max(spec.upper, 1)):
        text = complaint(**{spec.name: outside})
        assert text.startswith(f'parameter {spec.name} is {outside!r}; expected')
        assert f'in {spec.range_text}' in text


@pytest.mark.parametrize(
    'name, value, text',
    [
        ('autostart', 1, 'parameter autostart is 1; expected true or false'),
        ('autostart', 'true', "parameter autostart is 'true'; expected true or false"),
        ('num_threads', 2.0, 'parameter num_threads is 2.0; expected an integer in [1, 64]'),
        ('num_threads', True, 'parameter num_threads is True; expected an integer in [1, 64]'),
        ('chunk_size', '7', "chunk_size is '7'; expected an integer in [1, 65536] points"),
        ('publish_rate', '1', "publish_rate is '1'; expected a finite number in [0, 100] Hz"),
        ('publish_rate', False, 'publish_rate is False; expected a finite number in [0, 100] Hz'),
        ('publish_rate', math.nan, 'publish_rate is nan; expected a finite number in [0, 100] Hz'),
        ('value_offset', math.inf, 'value_offset is inf; expected a finite number [field units]'),
        ('value_offset', None, 'value_offset is None; expected a finite number [field units]'),
        ('bounds_min', 3.0, 'bounds_min is 3.0; expected a list of finite numbers [m]'),
        ('bounds_min', [0.0, math.nan], 'bounds_min is [0.0, nan]; expected a list of finite'),
        ('bounds_min', ['0', '0'], "bounds_min is ['0', '0']; expected a list of finite numbers"),
        ('bounds_min', '00', "bounds_min is '00'; expected a list of finite numbers [m]"),
        ('value_field', True, 'value_field is True; expected text that is not empty (quote it in'),
        ('checkpoint', '', "parameter checkpoint is ''; expected text that is not empty"),
        ('checkpoint', 3, 'parameter checkpoint is 3; expected text that is not empty'),
        (
            'on_clock_jump',
            'Reset',
            "parameter on_clock_jump is 'Reset'; expected one of 'keep', 'reset', 'pause'",
        ),
        ('on_clock_jump', True, "on_clock_jump is True; expected one of 'keep', 'reset', 'pause'"),
        ('sources', 'points', "sources is 'points'; expected a list of texts, none of them empty"),
        ('sources', [''], "sources is ['']; expected a list of texts, none of them empty"),
        ('peers', [2, 3], 'peers is [2, 3]; expected a list of texts, none of them empty'),
        ('points.depth', 0, 'parameter points.depth is 0; expected an integer in [1, 10000]'),
        ('points.voxel_size', -0.5, 'points.voxel_size is -0.5; expected a finite number in [0,'),
        ('points.type', 3, 'parameter points.type is 3; expected text'),
        (
            'observations.reliability',
            'best effort',
            "observations.reliability is 'best effort'; expected one of 'best_effort', 'reliable'",
        ),
    ],
)
def test_wrong_value_is_named_with_what_was_expected(name, value, text):
    assert text in complaint(**{name: value})


@pytest.mark.parametrize(
    'values, text',
    [
        (
            {'bounds_min': [1.0, 7.0], 'bounds_max': [2.0, 5.0]},
            'bounds_min is 7.0 m and bounds_max 5.0 m on axis 1; expected bounds_min < bounds_max',
        ),
        ({'bounds_min': [25.0, 0.0]}, 'on axis 0; expected bounds_min < bounds_max'),
        (
            {'bounds_min': [0.0, 0.0, 0.0]},
            'bounds_min has 3 and bounds_max 2 number(s); expected equally many, one per axis',
        ),
        ({'bounds_min': [], 'bounds_max': []}, 'bounds_min has 0 and bounds_max 0 number(s)'),
        ({'bounds_min': [0.0] * 5, 'bounds_max': [1.0] * 5}, 'one per axis: 1 to 3'),
        (
            {'mean_range': [1.0, 1.0]},
            'mean_range is [1.0, 1.0]; expected two numbers [lower, upper]',
        ),
        ({'mean_range': [1.0]}, 'mean_range is [1.0]; expected two numbers'),
        ({'stddev_range': [0.5, 0.25]}, 'stddev_range is [0.5, 0.25]; expected two numbers'),
        ({'stddev_range': [-0.5, 0.25]}, 'stddev_range is [-0.5, 0.25]; expected no negative'),
        (
            {'sources': ['points', 'observations', 'points']},
            "['points', 'observations', 'points']; expected names that differ: give the second "
            "'points' a name of its own",
        ),
        (
            {'sources': ['li dar']},
            "sources has 'li dar'; expected a name of letters, digits and _",
        ),
        ({'sources': ['lidar.front']}, "sources has 'lidar.front'; expected a name of letters"),
        ({'sources': ['qos_overrides']}, "sources has 'qos_overrides'; expected a name"),
        (
            {'sources': ['lidar']},
            "source 'lidar' has no type; expected the type of its messages: set lidar.type",
        ),
        (
            {'points.topic': 'lidar points'},
            "points.topic has 'lidar points'; expected the name of",
        ),
        ({'points.value_scale': 0}, 'points.value_scale is 0, which makes all values alike'),
        ({'peers': ['robot2//state']}, "peers has 'robot2//state'; expected the name of a topic"),
        (
            {'restore': 'garden'},
            "restore is 'garden', but state_directory is empty; expected the folder of the saved",
        ),
        ({'autosave_period': 60}, 'autosave_period is 60.0, but state_directory is empty'),
        ({'map_frame': '/'}, "map_frame is '/'; expected the name of a frame, such as 'map'"),
        (
            {'grid_resolution': 0.001},
            'grid_resolution 0.001 m/cell cuts 50.0 x 50.0 m into 2.5e+09 cells; '
            'expected at most max_targets = 1000000: use larger cells',
        ),
    ],
)
def test_values_that_contradict_each_other_are_refused(values, text):
    assert text in complaint(**values)


@pytest.mark.parametrize('dim', [1, 2, 3])
def test_workspace_has_one_to_three_axes(dim):
    parameters = parameters_from({'bounds_min': [-2.0] * dim, 'bounds_max': [3.0] * dim})
    assert len(parameters.bounds_min) == dim


@pytest.mark.parametrize(
    'name, nearest',
    [('chunk_sise', 'chunk_size'), ('grid.resolution', 'grid_resolution'), ('MAP', 'map_frame')],
)
def test_unknown_name_is_refused_with_the_nearest_known_one(name, nearest):
    text = complaint(**{name: 1})
    assert f'unknown parameter {name!r}; did you mean' in text
    if name != 'MAP':
        assert f'did you mean {nearest!r}?' in text
    assert nearest in text


def test_unknown_name_below_a_source_is_refused_with_the_nearest_known_one():
    text = complaint(**{'points.voxl_size': 0.5})
    assert "unknown parameter 'points.voxl_size'; did you mean 'points.voxel_size'?" in text
    assert 'observations.' not in text


def test_parameter_of_a_source_that_is_not_listed_is_refused():
    text = complaint(**{'sources': ['points'], 'observations.depth': 3})
    assert "'observations.depth' is of a source that is not in sources = ['points']" in text
    assert "add 'observations' to sources" in text


def test_default_sources_are_points_and_observations():
    points, observations = NodeParameters().source_parameters
    assert (points.name, points.topic) == ('points', 'points')
    assert points.type == 'sensor_msgs/msg/PointCloud2'
    assert (observations.name, observations.topic) == ('observations', 'observations')
    assert observations.type == 'cmanp_ros/msg/Observations'


def test_any_number_of_sources_in_the_order_given():
    parameters = parameters_from(
        {
            'sources': ['thermometer', 'points'],
            'thermometer.type': 'sensor_msgs/msg/Temperature',
            'thermometer.topic': '/base/temperature',
            'thermometer.max_rate': 3,
            'points.voxel_size': 0.5,
        }
    )
    assert parameters.source_parameters == (
        SourceParameters(
            'thermometer', '/base/temperature', 'sensor_msgs/msg/Temperature', max_rate=3.0
        ),
        SourceParameters('points', voxel_size=0.5),
    )
    assert isinstance(parameters.source_parameters[0].max_rate, float)
    assert parameters.source('points') == parameters.source_parameters[1]


@pytest.mark.parametrize('empty', [[], (), None])  # None: as rcl reads []
def test_there_may_be_no_source(empty):
    parameters = parameters_from({'sources': empty})
    assert (parameters.sources, parameters.source_parameters) == ((), ())


@pytest.mark.parametrize('topic', ['points', '/a/b_2', '~/points', 'lidar/points', '_hidden'])
def test_topics_may_be_relative_absolute_or_private(topic):
    parameters = parameters_from({'points.topic': topic, 'peers': [topic]})
    assert parameters.source_parameters[0].topic == topic
    assert parameters.peers == (topic,)


def test_changed_parameters_are_new_and_the_old_ones_left_alone():
    before = parameters_from({'chunk_size': 7, 'points.max_rate': 3.0})
    after = changed(before, {'grid_resolution': 2, 'points.enabled': False, 'use_sim_time': True})
    assert before == parameters_from({'chunk_size': 7, 'points.max_rate': 3.0})
    assert after == parameters_from(
        {'chunk_size': 7, 'points.max_rate': 3.0, 'grid_resolution': 2.0, 'points.enabled': False}
    )


@pytest.mark.parametrize(
    'values, text',
    [
        (
            {'chunk_size': 7},
            'chunk_size is 1024 and cannot be changed to 7 while the node runs; set it before',
        ),
        ({'sources': None}, "sources is ['points', 'observations'] and cannot be changed to None"),
        ({'points.topic': 'lidar'}, "points.topic is 'points' and cannot be changed to 'lidar'"),
        ({'points.enabld': True}, "did you mean 'points.enabled'?"),
        ({'points.voxel_size': -3}, 'points.voxel_size is -3; expected a finite number'),
        ({'tf_timeout': None}, 'tf_timeout is None; expected a finite number'),
        ({'grid_window': 50.0, 'grid_resolution': 0.001}, 'use larger cells'),
        ({'mean_range': [3.0, 2.0]}, 'mean_range is [3.0, 2.0]; expected two numbers'),
    ],
)
def test_change_is_refused_as_a_whole(values, text):
    with pytest.raises(ConfigError) as caught:
        changed(NodeParameters(), {'calibration_period': 5.0, **values})
    assert text in str(caught.value)


def test_ranges_of_the_grids_are_those_of_the_field_unless_given():
    field = {'value_offset': 12.0, 'value_scale': 3.0}
    parameters = parameters_from(field | {'mean_range': None})  # as rcl reads []
    assert (parameters.mean_range, parameters.stddev_range) == ((6.0, 18.0), (0.0, 3.0))
    given = changed(parameters, {'stddev_range': [0.0, 1.0]})
    assert (given.mean_range, given.stddev_range) == ((6.0, 18.0), (0.0, 1.0))
    assert changed(given, {'stddev_range': []}) == parameters


def test_frames_have_no_slash_in_front_as_tf2_wants_them():
    assert parameters_from({'map_frame': '/map'}).map_frame == 'map'


def test_every_parameter_that_is_not_read_only_can_be_changed():
    for name, spec in DECLARED.items():
        if not spec.read_only:
            assert changed(NodeParameters(), {name: DEFAULTS[name]}) == NodeParameters()
    dynamic = {name for name, spec in DECLARED.items() if not spec.read_only}
    assert {'tf_timeout', 'on_clock_jump', 'points.enabled', 'observations.max_rate'} < dynamic
    assert not {'publish_rate', 'status_rate', 'state_rate', 'points.topic', 'peers'} & dynamic


def test_shipped_yaml_is_made_from_the_table():
    assert (ROOT / 'config' / 'cmanp.yaml').read_text() == default_yaml()


def test_yaml_holds_every_default_and_names_unit_and_range():
    text = default_yaml()
    document = yaml.safe_load(text)
    values = {}
    for name, value in document['/**']['ros__parameters'].items():
        below = isinstance(value, dict)
        values |= {f'{name}.{key}': value[key] for key in value} if below else {name: value}
    assert parameters_from(values) == NodeParameters()
    assert list(values) == list(DECLARED)
    prose = ' '.join(text.replace('#', ' ').split())
    for spec in (*TABLE, *SOURCE_TABLE):
        assert spec.text in prose and spec.unit in prose and spec.range_text in prose
    assert max(len(line) for line in text.splitlines()) <= 99


@pytest.mark.parametrize('table', [TABLE, SOURCE_TABLE], ids=['node', 'source'])
def test_readme_holds_the_table(table):
    assert markdown_table(table) in (ROOT / 'docs' / 'parameters.md').read_text(), (
        'run scripts/write_docs.py'
    )


@pytest.mark.parametrize('table', [TABLE, SOURCE_TABLE], ids=['node', 'source'])
def test_table_has_one_row_of_seven_cells_per_parameter(table):
    lines = markdown_table(table).splitlines()
    assert len(lines) == 2 + len(table)
    assert {line.count('|') for line in lines} == {8}


class StubNode:
    """A node as far as `declare` looks at it; records what is declared."""

    def __init__(self, **overrides):
        self._parameter_overrides = {
            name: Parameter(name, value=value) for name, value in overrides.items()
        }
        self.declared = {}

    def declare_parameter(self, name, value, descriptor, ignore_override):
        self.declared[name] = (value, descriptor)


def test_nothing_is_declared_if_a_name_is_unknown():
    node = StubNode(**{'chunk_sise': 7})
    with pytest.raises(
        ConfigError, match="unknown parameter 'chunk_sise'; did you mean 'chunk_size'"
    ):
        declare(node)
    assert node.declared == {}


def test_parameters_of_ros_itself_are_left_to_ros():
    node = StubNode(
        **{
            'use_sim_time': True,
            'start_type_description_service': False,
            'qos_overrides./points.subscription.depth': 3,
        }
    )
    assert declare(node) == NodeParameters()
    assert set(node.declared) == set(DECLARED)


def test_description_carries_text_unit_range_and_whether_it_can_change():
    node = StubNode()
    declare(node)
    for name, spec in DECLARED.items():
        descriptor = node.declared[name][1]
        assert spec.text in descriptor.description
        assert spec.unit in descriptor.description
        assert spec.range_text in descriptor.description
        assert descriptor.read_only == spec.read_only
        ranges = [*descriptor.integer_range, *descriptor.floating_point_range]
        assert [(r.from_value, r.to_value) for r in ranges] == (
            [(spec.lower, spec.upper)] if spec.lower is not None else []
        )


@pytest.fixture
def ros_node():
    """Make nodes in a context and domain of their own, with command line arguments."""
    made = []

    def make(*arguments):
        context = Context()
        rclpy.init(args=['--ros-args', *arguments], context=context, domain_id=84)
        node = Node('cmanp', context=context)
        made.append((node, context))
        return node

    yield make
    for node, context in made:
        node.destroy_node()
        rclpy.shutdown(context=context)


def test_node_takes_values_from_file_and_command_line(ros_node, tmp_path):
    path = tmp_path / 'cmanp.yaml'
    text = default_yaml().replace('chunk_size: 1024', 'chunk_size: 512')
    path.write_text(text.replace('voxel_size: 0.0', 'voxel_size: 0.25', 1))
    node = ros_node(
        *['--params-file', str(path), '-p', 'publish_rate:=2', '-p', 'bounds_min:=[-10,-20]'],
        *['-p', 'use_sim_time:=false', '-p', 'observations.depth:=3'],
    )
    parameters = declare(node)
    expected = NodeParameters(
        chunk_size=512,
        publish_rate=2.0,
        bounds_min=(-10.0, -20.0),
        source_parameters=(
            SourceParameters('points', voxel_size=0.25),
            SourceParameters('observations', depth=3),
        ),
    )
    assert parameters == expected
    for spec, value in rows(expected):
        found = node.get_parameter(spec.name).value
        assert (tuple(found) if isinstance(value, tuple) else found) == value
    assert node.get_parameter('publish_rate').type_ == Parameter.Type.DOUBLE
    assert node.get_parameter('bounds_min').type_ == Parameter.Type.DOUBLE_ARRAY


def test_node_refuses_what_the_table_refuses(ros_node):
    with pytest.raises(ConfigError, match=r'publish_rate is 500\.0; expected .* in \[0, 100\] Hz'):
        declare(ros_node('-p', 'publish_rate:=500.0'))
    with pytest.raises(ConfigError, match="unknown parameter 'publish_rat'"):
        declare(ros_node('-p', 'publish_rat:=1.0'))


def test_read_only_parameter_cannot_be_set_later(ros_node):
    node = ros_node()
    declare(node)
    (result,) = node.set_parameters([Parameter('chunk_size', value=7)])
    assert not result.successful
    assert 'read-only' in result.reason


def test_set_callback_takes_changes_that_fit_each_other_and_refuses_others(ros_node):
    node = ros_node('-p', "sources:=['points']")
    held = [declare(node)]

    def on_set(parameters):
        try:
            values = {parameter.name: parameter.value for parameter in parameters}
            held.append(changed(held[-1], values))
        except ConfigError as error:
            return SetParametersResult(successful=False, reason=str(error))
        return SetParametersResult(successful=True)

    node.add_on_set_parameters_callback(on_set)

    def set_together(**values):
        parameters = [Parameter(name, value=value) for name, value in values.items()]
        return node.set_parameters_atomically(parameters)

    assert set_together(**{'points.voxel_size': 2, 'points.enabled': False}).successful
    assert held[-1].source_parameters == (SourceParameters('points', voxel_size=2, enabled=False),)
    refused = set_together(**{'tf_timeout': 3.0, 'grid_resolution': 1e-3})
    assert not refused.successful and 'use larger cells' in refused.reason
    assert held[-1].tf_timeout == node.get_parameter('tf_timeout').value == 0.2
    assert not set_together(on_clock_jump='stop').successful


@pytest.mark.parametrize(
    ('text', 'said'),
    [
        ('/**:\n  foo: 1\n', "Couldn't parse params file"),
        (
            '/**:\n  ros__parameters:\n    bounds_min: [1.0, a]\n',
            'Sequence should be of same type',
        ),
        ('/**:\n  ros__parameters:\n    tile_size: [1.0, 2.0]\n', 'tile_size is [1.0, 2.0]'),
    ],
)
def test_file_that_is_none_of_parameters_ends_the_node_with_a_line(tmp_path, text, said):
    path = tmp_path / 'p.yaml'
    path.write_text(text)
    command = [sys.executable, '-m', 'cmanp_ros.cli', 'node', '--ros-args', '--params-file', path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and 'Traceback' not in done.stderr
    assert said in done.stderr.splitlines()[-1], done.stderr


@pytest.mark.parametrize('section', ['/**', '/*/*', '/a/**', '/**/n', '/a/b/n', '/a/*/n', 'n'])
@pytest.mark.parametrize('namespace', ['/', '/a', '/a/b'])
def test_a_section_is_for_a_node_exactly_when_rcl_says_so(domain_id, tmp_path, section, namespace):
    file = tmp_path / 'some.yaml'
    file.write_text(yaml.safe_dump({section: {'ros__parameters': {'probe': 1}}}))
    context = Context()
    rclpy.init(
        args=['--ros-args', '--params-file', str(file)], context=context, domain_id=domain_id
    )
    try:
        node = Node('n', namespace=namespace, context=context)
        arrived = 'probe' in node._parameter_overrides
        node.destroy_node()
    finally:
        rclpy.shutdown(context=context)
    assert parameter_file.is_for(file, f'{namespace.rstrip("/")}/n') == arrived


@pytest.mark.parametrize(
    ('text', 'is_said'),
    [
        ('cmanp_node:\n  ros__parameters:\n    grid_resolution: 0.25\n', True),
        ('other:\n  ros__parameters:\n    note: 2024-02-30\n', False),  # ROS can read it
    ],
)
def test_file_with_nothing_for_the_node_is_a_warning(tmp_path, text, is_said):
    file = tmp_path / 'mine.yaml'
    file.write_text(text)
    command = [sys.executable, '-m', 'cmanp_ros.cli', 'node', '--ros-args', '--params-file', file]
    command += ['-r', '__ns:=/robot1', '-p', 'checkpoint:=nowhere']  # it ends by itself
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    said = f"nothing in '{file}' is for /robot1/cmanp: its parameters have"
    assert (said in done.stderr) == is_said and "no checkpoint 'nowhere'" in done.stderr


@pytest.mark.parametrize('arguments', [['-p', 'tile_size:=3.0'], ['foo', '--ros-args']])
def test_arguments_that_ros_would_pass_over_end_the_node_with_a_line(arguments):
    command = [sys.executable, '-m', 'cmanp_ros.cli', 'node', *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and 'Traceback' not in done.stderr
    assert f'{arguments[0]}' in done.stderr.splitlines()[-1], done.stderr
    assert done.stderr.endswith('expected it after --ros-args\n')


def test_help_of_the_node_starts_none():
    command = [sys.executable, '-m', 'cmanp_ros.cli', 'node', '--help']
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and '--params-file' in done.stdout


def test_node_with_a_name_too_long_says_so_in_a_line():
    arguments = ['--ros-args', '-r', f'__node:={"n" * 250}']
    command = [sys.executable, '-m', 'cmanp_ros.cli', 'node', *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert 'cmanp_node: ' in done.stderr and 'length should not exceed' in done.stderr
    assert 'Traceback' not in done.stderr
