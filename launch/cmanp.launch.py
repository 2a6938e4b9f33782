"""
Launch the node cmanp, and RViz if asked for.

    ros2 launch cmanp_ros cmanp.launch.py namespace:=robot1 params_file:=my.yaml rviz:=true

An argument that is left empty leaves the matter to params_file.
"""

import re
from pathlib import Path

import yaml
from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument, OpaqueFunction
from launch.conditions import IfCondition
from launch.logging import get_logger
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution
from launch_ros.actions import LifecycleNode, Node
from launch_ros.parameter_descriptions import ParameterValue
from launch_ros.substitutions import FindPackageShare
from launch_ros.utilities import make_namespace_absolute, prefix_namespace

NAME = 'cmanp'
CONFIG = PathJoinSubstitution([FindPackageShare('cmanp_ros'), 'config'])
RVIZ_CONFIG = PathJoinSubstitution([CONFIG, 'cmanp.rviz'])
RVIZ_TOPICS = ('points', 'cmanp/field', 'cmanp/markers', 'cmanp/stddev', 'cmanp/stddev_updates')
LEVELS = ('debug', 'info', 'warn', 'error', 'fatal')
SWITCH = ('true', 'false', 'True', 'False')


def generate_launch_description():
    """Declare the arguments; all else depends on their values."""
    arguments = (
        ('namespace', '', 'Namespace of the node, its topics and services.', None),
        ('use_sim_time', '', 'Take the time from /clock.', ['', *SWITCH]),
        (
            'params_file',
            PathJoinSubstitution([CONFIG, 'cmanp.yaml']),
            'Path of a parameter file; config/cmanp.yaml lists all parameters.',
            None,
        ),
        (
            'autostart',
            '',
            'The node configures and activates itself; if false, a lifecycle manager does.',
            ['', *SWITCH],
        ),
        ('use_respawn', 'false', 'Start the node again if it ends with an error.', SWITCH),
        ('log_level', 'info', 'Least severe messages that are logged.', LEVELS),
        ('checkpoint', '', 'Weights of the model: shipped name or path of a .safetensors.', None),
        ('rviz', 'false', 'Start RViz with config/cmanp.rviz.', SWITCH),
    )
    declared = [
        DeclareLaunchArgument(name, default_value=default, description=text, choices=choices)
        for name, default, text, choices in arguments
    ]
    return LaunchDescription([*declared, OpaqueFunction(function=_start)])


def _start(context):
    """Make the actions from the values of the arguments."""

    def value(name):
        return LaunchConfiguration(name).perform(context)

    def switch(name):
        return {name: value(name).lower() == 'true'} if value(name) else {}

    namespace, time = value('namespace'), switch('use_sim_time')
    given = {**time, **switch('autostart')}
    if value('checkpoint'):
        given['checkpoint'] = ParameterValue(value('checkpoint'), value_type=str)
    pushed = context.launch_configurations.get('ros_namespace')
    full_name = prefix_namespace(
        make_namespace_absolute(prefix_namespace(pushed, namespace)), NAME
    )
    file = _checked(value('params_file'), full_name)
    node = LifecycleNode(
        package='cmanp_ros',
        executable='cmanp_node',
        name=NAME,
        namespace=namespace,
        parameters=[file, given] if given else [file],
        ros_arguments=['--log-level', value('log_level')],
        respawn=value('use_respawn').lower() == 'true',
        respawn_delay=2.0,  # [s]
        output='screen',
    )
    rviz = Node(
        condition=IfCondition(value('rviz')),
        package='rviz2',
        executable='rviz2',
        namespace=namespace,
        arguments=['-d', RVIZ_CONFIG],
        parameters=[time] if time else [],
        remappings=[(f'/{topic}', topic) for topic in RVIZ_TOPICS],
        output='screen',
    )
    return [node, rviz]


def _checked(params_file, full_name):
    """
    Return the path of the parameter file, and warn if nothing in it is for the node.

    :raises RuntimeError: no such file; launch_ros would go on without it.
    """
    file = Path(params_file)
    if not file.is_file():
        raise RuntimeError(f"params_file is '{file}', which is no file; expected a YAML file")
    if not any(_applies(section, full_name) for section in _sections(_read(file))):
        get_logger(NAME).warning(
            f"nothing in '{file}' is for {full_name}: its parameters have their defaults; "
            'what is for any namespace stands below /**:'
        )
    return str(file)


def _read(file):
    """Read a parameter file; what is no parameter file is left for the node to refuse."""
    content = yaml.safe_load(file.read_text(encoding='utf-8'))
    return content if isinstance(content, dict) else {}


def _sections(tree, name=''):
    """List the nodes, with wildcards, that a parameter file speaks of."""
    for key, value in tree.items():
        if key == 'ros__parameters':
            yield name
        elif isinstance(value, dict):
            yield from _sections(value, f'{name}/{str(key).strip("/")}')


def _applies(section, full_name):
    """Tell whether a section is for a node, as rcl decides: * is one name, ** any number."""
    pattern = re.escape(section).replace(r'/\*\*', '(/[^/]+)*').replace(r'\*', '[^/]+')
    return re.fullmatch(pattern, full_name) is not None
