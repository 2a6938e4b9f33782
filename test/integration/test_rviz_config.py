"""What config/cmanp.rviz asks for is what the node gives, seen well; RViz is not needed."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import wait_for
from rclpy.qos import DurabilityPolicy, ReliabilityPolicy

from cmanp_ros.markers import Scene, scene_markers
from cmanp_ros.parameters import NodeParameters
from cmanp_ros.visualization import color_table, field_cloud, grid_targets

CONFIG = Path(__file__).parents[2] / 'config' / 'cmanp.rviz'
DURABILITY = {
    'Transient Local': DurabilityPolicy.TRANSIENT_LOCAL,
    'Volatile': DurabilityPolicy.VOLATILE,
}
RELIABILITY = {
    'Reliable': ReliabilityPolicy.RELIABLE,
    'Best Effort': ReliabilityPolicy.BEST_EFFORT,
}
TYPES = {
    'PointCloud2': 'sensor_msgs/msg/PointCloud2',
    'Map': 'nav_msgs/msg/OccupancyGrid',
    'MarkerArray': 'visualization_msgs/msg/MarkerArray',
}
DEFAULTS = NodeParameters()
GRID = grid_targets(DEFAULTS.bounds_min, DEFAULTS.bounds_max, 5.0)


@pytest.fixture(scope='module')
def manager():
    """Return the part of the file that says what is shown."""
    return yaml.safe_load(CONFIG.read_text(encoding='utf-8'))['Visualization Manager']


@pytest.fixture(scope='module')
def displays(manager):
    """Return the displays by name."""
    return {display['Name']: display for display in manager['Displays']}


def kind_of(display):
    """Return the class of a display without its package."""
    return display['Class'].removeprefix('rviz_default_plugins/')


def test_everything_the_file_describes_is_there(displays):
    kinds = {name: kind_of(display) for name, display in displays.items()}
    assert kinds == {
        'Map': 'MarkerArray',
        'Observations': 'PointCloud2',
        'Field': 'PointCloud2',
        'Stddev': 'Map',
        'TF': 'TF',
    }
    enabled = [name for name, display in displays.items() if display['Enabled']]
    assert enabled == ['Map', 'Observations', 'TF']
    assert all(d.get('Value', d['Enabled']) == d['Enabled'] for d in displays.values())


def test_fixed_frame_is_the_default_map_frame(manager):
    assert manager['Global Options']['Fixed Frame'] == DEFAULTS.map_frame


def test_topics_exist_with_their_type_and_quality(displays, start_node, client):
    start_node()
    shown = [display for display in displays.values() if 'Topic' in display]
    assert len(shown) == 4
    for display in shown:
        settings = display['Topic']
        topic, find = settings['Value'], client.node.get_publishers_info_by_topic
        if topic == '/points':
            find = client.node.get_subscriptions_info_by_topic
        ends = wait_for(partial(find, topic))
        assert [end.topic_type for end in ends] == [TYPES[kind_of(display)]]
        quality = ends[0].qos_profile
        assert DURABILITY[settings['Durability Policy']] == quality.durability
        assert RELIABILITY[settings['Reliability Policy']] == quality.reliability


def test_outputs_are_asked_for_as_latched(displays):
    for name in ('Map', 'Field', 'Stddev'):
        assert displays[name]['Topic']['Durability Policy'] == 'Transient Local'


def test_updates_of_a_map_have_the_name_that_rviz_expects(displays):
    display = displays['Stddev']
    assert display['Update Topic']['Value'] == display['Topic']['Value'] + '_updates'


@pytest.fixture(scope='module')
def markers():
    """Return markers of a plane at 300 m that rises to the north, by namespace."""
    heights = 300.0 + GRID.targets[:, 1]
    scene = Scene(GRID, heights, np.full(heights.shape, 0.5), DEFAULTS.stddev_range, max_views=3)
    shown = scene_markers(scene).markers
    return {marker.ns: marker for marker in reversed(shown)}  # the first one stays


def test_namespaces_are_those_of_the_markers(displays, markers):
    assert displays['Map']['Namespaces'] == dict.fromkeys(markers, True)


def test_lines_run_along_the_surface_a_little_above_it(markers):
    mesh, surface = markers['mesh'], markers['surface']
    vertices = {(p.x, p.y, p.z) for p in surface.points}
    assert {(p.x, p.y, p.z) for p in mesh.points} == vertices
    assert 0 < mesh.pose.position.z <= 0.01 * GRID.width * GRID.resolution
    assert mesh.colors[0].r > surface.colors[0].r and mesh.colors[0].g > surface.colors[0].g
    assert all(color.a == 1.0 for color in mesh.colors)


def test_field_is_colored_by_stddev_between_fixed_bounds(displays):
    display = displays['Field']
    cloud = field_cloud(GRID, GRID.targets[:, 0], GRID.targets[:, 1])
    assert display['Channel Name'] == 'stddev'
    assert display['Channel Name'] in [field.name for field in cloud.fields]
    assert display['Autocompute Intensity Bounds'] is False
    bounds = (display['Min Intensity'], display['Max Intensity'])
    assert bounds == DEFAULTS.stddev_range


def test_field_has_the_colors_of_the_surface_at_both_ends(displays):
    display = displays['Field']
    assert display['Use rainbow'] is False
    ends = [tuple(round(255 * value) for value in color_table()[end]) for end in (0, -1)]
    assert [display['Min Color'], display['Max Color']] == ['{}; {}; {}'.format(*c) for c in ends]
