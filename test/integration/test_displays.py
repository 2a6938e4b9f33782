"""What is shown over DDS: grids that nav2 can use, where to measure next, layouts for viewers."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import wait_for, wait_until_folded
from geometry_msgs.msg import PoseArray
from nav_msgs.msg import OccupancyGrid
from rclpy.qos import (
    DurabilityPolicy,
    QoSProfile,
    ReliabilityPolicy,
    qos_profile_sensor_data,
)
from sensor_msgs.msg import PointCloud2
from std_msgs.msg import Header
from std_srvs.srv import Trigger
from visualization_msgs.msg import Marker, MarkerArray

from cmanp_ros import displays, visualization
from cmanp_ros.conversions import cloud_from_points, points_from_cloud, stamp_from_nanoseconds

CONFIG = Path(__file__).parents[2] / 'config'
# As nav2's costmap filters subscribe to their mask.
NAV2 = QoSProfile(
    depth=1,
    durability=DurabilityPolicy.TRANSIENT_LOCAL,
    reliability=ReliabilityPolicy.RELIABLE,
)
QUICK = {'publish_rate': 50.0, 'grid_resolution': 1.0}
PLACE = np.array([-11.0, 7.0])


@pytest.fixture
def surveyed(start_node, client):
    """Return a function that starts a node which has observed a hill around one place."""

    def start(**parameters):
        node = start_node(**QUICK | parameters)
        points = client.publisher(PointCloud2, 'points', qos_profile_sensor_data)
        x, y = PLACE[:, None] + np.random.default_rng(0).uniform(-3.0, 3.0, (2, 311))
        fields = {'x': x, 'y': y, 'z': np.sin(x / 3)}
        header = Header(frame_id='map', stamp=stamp_from_nanoseconds(7 * 10**9))
        points.publish(cloud_from_points(fields, header))
        wait_until_folded(node, 311)
        return node

    return start


def newest(client, message_type, topic):
    """Return the first message of a latched topic."""
    received = client.collect(message_type, topic, NAV2)
    return wait_for(lambda: received)[0]


def image_of(grid):
    """Return the cells of a grid as an array (height, width)."""
    return np.array(grid.data).reshape(grid.info.height, grid.info.width)


def centers_of(grid):
    """Return the centers of the cells, (height, width, 2)."""
    x = grid.info.origin.position.x + (np.arange(grid.info.width) + 0.5) * grid.info.resolution
    y = grid.info.origin.position.y + (np.arange(grid.info.height) + 0.5) * grid.info.resolution
    return np.stack(np.meshgrid(x, y), axis=-1)


def test_mean_is_unknown_far_from_observations_and_stddev_never_is(surveyed, client):
    surveyed()
    mean = newest(client, OccupancyGrid, 'cmanp/mean')
    stddev = newest(client, OccupancyGrid, 'cmanp/stddev')
    distance = np.abs(centers_of(mean) - PLACE).max(-1)  # tiles of 5 m are squares
    assert (image_of(mean)[distance < 3] >= 0).all()
    assert (image_of(mean)[distance > 3 + 10] == -1).all()
    assert (image_of(stddev) >= 0).all()
    assert image_of(stddev)[distance > 13].min() > image_of(stddev)[distance < 2].max()


def test_markers_show_all_of_it_and_nothing_of_a_map_that_is_reset(surveyed, client):
    node = surveyed()
    received = client.collect(MarkerArray, 'cmanp/markers', NAV2)
    first = wait_for(lambda: received)[0].markers
    parts = {'surface', 'mesh', 'flat', 'tiles', 'bounds', 'rover', 'views', 'legend'}
    assert {marker.ns for marker in first if marker.action == Marker.ADD} >= parts
    assert all(marker.header.stamp.sec == 7 for marker in first)
    rover = next(marker.pose.position for marker in first if marker.ns == 'rover')
    assert np.linalg.norm([rover.x - PLACE[0], rover.y - PLACE[1]]) < 1.0
    client.call(Trigger, 'cmanp/reset', Trigger.Request())
    assert node.field.num_observations == 0

    def gone():
        return {m.ns for m in received[-1].markers if m.action == Marker.DELETE}

    wait_for(lambda: gone() >= {'surface', 'mesh', 'tiles', 'track', 'rover'})
    assert [(m.ns, m.id) for m in received[-1].markers] == [(m.ns, m.id) for m in first]


def test_next_best_views_are_uncertain_places_apart_and_within_the_bounds(surveyed, client):
    surveyed(num_views=7)
    message = newest(client, PoseArray, 'cmanp/next_best_view')
    stddev = newest(client, OccupancyGrid, 'cmanp/stddev')
    assert (message.header.frame_id, message.header.stamp.sec) == ('map', 7)
    places = np.array([[pose.position.x, pose.position.y] for pose in message.poses])
    assert places.shape == (7, 2) and (np.abs(places) < 25).all()
    apart = np.linalg.norm(places[:, None] - places, axis=-1) + 1e9 * np.eye(7)
    assert apart.min() >= 5.0, 'the side of a tile'
    centers, image = centers_of(stddev).reshape(-1, 2), image_of(stddev).reshape(-1)
    at = [np.abs(centers - place).max(1).argmin() for place in places]
    np.testing.assert_allclose(centers[at], places, atol=1e-6)
    assert image[at].min() > np.median(image[np.linalg.norm(centers - PLACE, axis=1) < 3])


def test_way_to_the_next_best_view_can_be_made_dear_while_the_node_runs(surveyed, client):
    from rclpy.parameter import Parameter

    node = surveyed(num_views=1, view_distance_weight=0.0)
    received = client.collect(PoseArray, 'cmanp/next_best_view', NAV2)

    def way():
        position = received[-1].poses[0].position
        return np.linalg.norm([position.x - PLACE[0], position.y - PLACE[1]])

    wait_for(lambda: received)
    far = way()
    node.set_parameters([Parameter('view_distance_weight', value=100.0)])
    wait_for(lambda: way() < 1.0)
    assert far > 5.0


def test_places_on_obstacles_of_a_costmap_are_left_out(surveyed, client):
    surveyed(costmap='global_costmap/costmap', num_views=3, view_distance_weight=10.0)
    received = client.collect(PoseArray, 'cmanp/next_best_view', NAV2)

    def xs():
        return [pose.position.x for pose in received[-1].poses]

    wait_for(lambda: received)
    assert max(xs()) < 0.0, 'near the robot, which is in the west'
    costmap = OccupancyGrid(header=Header(frame_id='map'))
    costmap.info.resolution, costmap.info.width, costmap.info.height = 5.0, 5, 11
    costmap.info.origin.position.x = costmap.info.origin.position.y = -25.0
    costmap.data = [100] * (5 * 11)
    costmaps = client.publisher(OccupancyGrid, 'global_costmap/costmap', NAV2)
    costmaps.publish(OccupancyGrid(header=Header(frame_id='odom')))  # is left out
    costmaps.publish(costmap)
    wait_for(lambda: min(xs()) > 0.0)
    assert len(xs()) == 3


def test_nothing_is_computed_for_topics_without_subscribers(surveyed, client, monkeypatch):
    def forbidden(*_):
        raise AssertionError('computed for nobody')

    monkeypatch.setattr(displays, 'next_best_views', forbidden)
    monkeypatch.setattr(displays.markers, 'scene_markers', forbidden)
    monkeypatch.setattr(displays.View, '_known', property(forbidden))
    node = surveyed()
    asked = []
    predict = node.field.predict
    monkeypatch.setattr(
        node.field, 'predict', lambda x, renew: asked.append(len(x)) or predict(x, renew)
    )
    newest(client, OccupancyGrid, 'cmanp/stddev')
    assert sum(asked) == 50 * 50
    assert max(asked) <= displays.CELLS_AT_ONCE


def test_grid_map_is_there_exactly_where_its_package_is(surveyed, client):
    node = surveyed()
    topics = {publisher.topic_name for publisher in node.publishers}
    assert ('/cmanp/grid_map' in topics) == (visualization.grid_map_type() is not None)


@pytest.mark.skipif(
    visualization.grid_map_type() is None, reason='grid_map_msgs comes with a ROS installation'
)
def test_grid_map_is_what_the_grids_are(surveyed, client):
    surveyed()
    message = newest(client, visualization.grid_map_type(), 'cmanp/grid_map')
    mean = newest(client, OccupancyGrid, 'cmanp/mean')
    assert list(message.layers) == ['mean', 'stddev']
    is_unknown = np.isnan(np.array(message.data[0].data)[::-1])
    np.testing.assert_array_equal(is_unknown, np.array(mean.data) == -1)


# nav2 --------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def nav2():
    """Return the parameters of each node in the example, by the name of the node."""
    text = (CONFIG / 'nav2_costmap_filter.yaml').read_text(encoding='utf-8')
    return {
        key.removeprefix('/**/'): value['ros__parameters']
        for key, value in yaml.safe_load(text).items()
    }


def test_example_for_nav2_fits_together(nav2):
    costmap = nav2['global_costmap']
    infos = {nav2[name]['filter_info_topic']: nav2[name] for name in nav2 if 'info' in name}
    types = {'nav2_costmap_2d::SpeedFilter': {1, 2}, 'nav2_costmap_2d::KeepoutFilter': {0}}
    filters = {name: value for name, value in costmap.items() if isinstance(value, dict)}
    assert set(costmap['filters']) <= set(filters) and len(filters) == len(infos) == 2
    for each in filters.values():
        assert infos[each['filter_info_topic']]['type'] in types[each['plugin']]
    page = (CONFIG.parent / 'docs' / 'nav2.md').read_text(encoding='utf-8')
    assert f'stddev_range: {nav2["cmanp"]["stddev_range"]}' in page
    assert 'speed_filter_info_server' in page and 'speed_filter_info_server' in nav2


def test_filters_of_nav2_do_with_the_real_mask_what_the_example_says(surveyed, client, nav2):
    lower, upper = nav2['cmanp']['stddev_range']
    node = surveyed(**nav2['cmanp'] | QUICK)
    speed, keepout = nav2['speed_filter_info_server'], nav2['keepout_filter_info_server']
    mask = newest(client, OccupancyGrid, speed['mask_topic'])
    assert mask.header.frame_id == nav2['global_costmap']['global_frame']
    stddev = points_from_cloud(newest(client, PointCloud2, 'cmanp/field'), value_field='stddev')
    stddev, data = stddev[1][:, 0], np.array(mask.data).astype(int)
    assert len(data) == len(stddev) == mask.info.width * mask.info.height
    assert data.min() < 20 and data.max() == 100, 'the example has both sides of the range'

    # The speed filter: 0 is no limit, -1 an error, the rest base + multiplier * mask [%].
    assert data.min() >= 0
    percentage = speed['base'] + speed['multiplier'] * data
    assert ((percentage > 0) & (percentage <= 100)).all()
    expected = np.interp(stddev, [lower, upper], [100.0, 20.0])
    np.testing.assert_allclose(percentage, expected, atol=0.5)

    # Keepout: base and multiplier are not used; 100 is lethal (254), in between it is linear.
    assert (keepout['base'], keepout['multiplier']) == (0.0, 1.0)
    assert keepout['mask_topic'] == speed['mask_topic'] == '/cmanp/stddev'
    cost = np.round(data * 254 / 100)
    rounding = (upper - lower) / 100
    assert (cost[stddev >= upper] == 254).all()
    assert (cost[stddev < upper - rounding] < 253).all(), 'neither lethal nor inscribed'
    assert (cost[stddev <= lower] == 0).all()
    centers = centers_of(mask).reshape(-1, 2)
    known = centers[node.fleet.combined.is_known(centers)]
    apart = np.abs(centers[:, None] - known).max(-1).min(1)  # the ridge goes on: that is guessed
    assert (cost[apart > 10.0] > np.median(cost[apart == 0])).all(), 'two tiles away'


# Foxglove ----------------------------------------------------------------------------------------


def leaves(layout):
    """List the panels of a layout."""
    if isinstance(layout, str):
        return [layout]
    assert layout['direction'] in ('row', 'column') and 0 < layout['splitPercentage'] < 100
    return leaves(layout['first']) + leaves(layout['second'])


def test_foxglove_layout_shows_topics_that_the_running_node_has(surveyed, client):
    text = (CONFIG / 'cmanp_foxglove.json').read_text(encoding='utf-8')
    layout = json.loads(text)
    panels = layout['configById']
    assert sorted(leaves(layout['layout'])) == sorted(panels)
    kinds = {name.split('!')[0] for name in panels}
    assert kinds == {'3D', 'DiagnosticStatusPanel', 'RawMessages', 'Plot'}
    node = surveyed()
    topics = {end.topic_name: end.msg_type for end in (*node.publishers, *node.subscriptions)}
    shown = set(re.findall(r'"(/[a-z][a-z_/]*)', text))
    assert len(shown) > 5 and shown <= set(topics)
    paths = [path['value'] for panel in panels.values() for path in panel.get('paths', [])]
    paths += [panel['topicPath'] for panel in panels.values() if 'topicPath' in panel]
    for path in paths:
        topic, field = path.split('.', 1)
        assert re.sub(r'\[.*', '', field) in topics[topic].get_fields_and_field_types()
    status = panels['DiagnosticStatusPanel!cmanp']
    assert (status['selectedHardwareId'], status['selectedName']) == ('cmanp', 'cmanp: field')
    assert panels['3D!cmanp']['followTf'] == node.parameters.map_frame
