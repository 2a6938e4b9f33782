"""
Launch the demo for RViz: the simulated rover and the node, without the observer of `cmanp demo`.

    ros2 launch cmanp_ros demo.launch.py

Place, path, noise and parameters are those of `cmanp demo`. The rover waits for the node to
listen, drives and ends; the node goes on until Ctrl-C.
"""

import sys
from pathlib import Path
from tempfile import NamedTemporaryFile

import yaml
from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument, OpaqueFunction
from launch.conditions import IfCondition
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import LifecycleNode, Node
from launch_ros.substitutions import FindPackageShare

SWITCH = ('true', 'false', 'True', 'False')
WINDOW_M = 50.0  # side of the workspace that config/cmanp.rviz is made for


def generate_launch_description():
    """Declare the arguments; all else depends on their values."""
    arguments = (
        ('duration', '30.0', 'Length of the drive [s].', None),
        ('window', '3600.0', 'Side of the square that is mapped [m].', None),
        ('seed', '6', 'Seed of the place, the path and the noise.', None),
        ('checkpoint', 'field', 'Model: shipped name or path of a .safetensors.', None),
        ('rviz', 'true', 'Start RViz with config/cmanp.rviz, fitted to the place.', SWITCH),
    )
    declared = [
        DeclareLaunchArgument(name, default_value=default, description=text, choices=choices)
        for name, default, text, choices in arguments
    ]
    return LaunchDescription([*declared, OpaqueFunction(function=_start)])


def _start(context):
    """Make the actions from the values of the arguments."""
    from cmanp_ros.demo.drive import Scenario  # not above: slow, and not needed for --show-args
    from cmanp_ros.demo.run import node_parameters
    from cmanp_ros.demo.terrain import choose_window, grid_points, load_terrain

    def value(name):
        return LaunchConfiguration(name).perform(context)

    scenario = Scenario(int(value('seed')), float(value('window')), float(value('duration')))
    terrain = choose_window(load_terrain(), scenario.window_m, scenario.seed)
    parameters = {**node_parameters(scenario, terrain), 'checkpoint': value('checkpoint')}
    node = LifecycleNode(
        package='cmanp_ros',
        executable='cmanp_node',
        name='cmanp',
        namespace='',
        parameters=[parameters],
        output='screen',
    )
    rover = Node(
        executable=sys.executable,
        arguments=['-m', 'cmanp_ros.demo.rover', '--now', scenario.to_json()],
        exec_name='rover',
    )
    actions = [node, rover]
    if IfCondition(value('rviz')).evaluate(context):
        heights = grid_points(terrain, scenario.window_m)[1]
        file = _rviz_config(context, parameters, heights)
        rviz = Node(package='rviz2', executable='rviz2', arguments=['-d', file], output='screen')
        actions.append(rviz)
    return actions


def _rviz_config(context, parameters, heights):
    """Fit config/cmanp.rviz to a place of another size, at another height; return a new file."""
    share = FindPackageShare('cmanp_ros').perform(context)
    config = yaml.safe_load(Path(share, 'config', 'cmanp.rviz').read_text(encoding='utf-8'))
    displays = {shown['Name']: shown for shown in config['Visualization Manager']['Displays']}
    views = config['Visualization Manager']['Views']
    orbit, top = views['Current'], views['Saved'][0]
    scale = (parameters['bounds_max'][0] - parameters['bounds_min'][0]) / WINDOW_M

    displays['Observations']['Size (m)'] *= scale
    displays['Field']['Size (m)'] = 0.8 * parameters['grid_resolution']
    displays['Field']['Max Intensity'] = parameters['stddev_range'][1]
    orbit['Distance'] *= scale
    orbit['Near Clip Distance'] *= scale
    orbit['Focal Point'] = {axis: scale * at for axis, at in orbit['Focal Point'].items()}
    orbit['Focal Point']['Z'] += float(heights.mean())
    top['Scale'] /= scale
    top['Y'] *= scale
    with NamedTemporaryFile('w', prefix='cmanp_', suffix='.rviz', delete=False) as file:
        yaml.safe_dump(config, file)
    return file.name
