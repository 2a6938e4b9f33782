"""
Launch the node cmanp, and RViz if asked for.

    ros2 launch cmanp_ros cmanp.launch.py namespace:=robot1 params_file:=my.yaml rviz:=true

An argument that is left empty leaves the matter to params_file.
"""

from pathlib import Path

from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument, OpaqueFunction
from launch.conditions import IfCondition
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution
from launch_ros.actions import LifecycleNode, Node
from launch_ros.parameter_descriptions import ParameterValue
from launch_ros.substitutions import FindPackageShare

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
    file = _checked(value('params_file'))
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


def _checked(params_file):
    """
    Return the path of the parameter file.

    :raises RuntimeError: no such file; launch_ros would go on without it.
    """
    if not Path(params_file).is_file():
        raise RuntimeError(
            f"params_file is '{params_file}', which is no file; expected a YAML file"
        )
    return params_file
