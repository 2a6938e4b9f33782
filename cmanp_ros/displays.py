"""
What the node shows by itself: the map as grids and markers, and where to measure next.

    timer -> who listens, what changed -> worker -> NeuralField.predict -> visualization, markers
"""

from functools import cached_property

import numpy as np
from geometry_msgs.msg import PoseArray
from nav_msgs.msg import OccupancyGrid
from sensor_msgs.msg import PointCloud2
from visualization_msgs.msg import MarkerArray

from cmanp_ros import markers, visualization
from cmanp_ros.planning import is_free, next_best_views
from cmanp_ros.qos import LATCHED
from cmanp_ros.worker import is_over

CELLS_AT_ONCE = 500  # some 20 ms: nobody waits longer for an answer because of a grid


class Displays:
    """Publishes the map; nothing is computed for topics that nobody listens to."""

    def __init__(self, node):
        """
        Open the outputs, if the map is one of a plane.

        :param node: `CMANPNode`, configured.
        """
        self._node = node
        self._published, self._publishing = None, None
        self._costmap, self._num_costmaps = None, 0
        types = {
            'field': PointCloud2,
            'mean': OccupancyGrid,
            'stddev': OccupancyGrid,
            'markers': MarkerArray,
            'next_best_view': PoseArray,
            'grid_map': visualization.grid_map_type(),
        }
        is_plane = node.field.model.config.dim_x == 2
        self._publishers = {
            name: node.open_publisher(kind, f'~/{name}', LATCHED)
            for name, kind in types.items()
            if is_plane and kind is not None
        }

    def open(self):
        """Open the input, if there is one, and start the timer."""
        node, p = self._node, self._node.parameters
        if p.costmap:
            node.open_subscription(OccupancyGrid, p.costmap, self._on_costmap, LATCHED)
        node.open_timer(p.publish_rate, self._publish_what_changed)

    def _on_costmap(self, message):
        """Keep the newest costmap, if it can be used."""
        p, info = self._node.parameters, message.info
        if message.header.frame_id.strip('/') != p.map_frame:
            text = f"is in frame '{message.header.frame_id}', expected map_frame '{p.map_frame}'"
        elif len(message.data) != info.width * info.height or not info.resolution > 0:
            text = (
                f'has {len(message.data)} cells of {info.resolution} m, expected {info.width} x '
                f'{info.height} and a positive resolution'
            )
        else:
            self._costmap, self._num_costmaps = message, self._num_costmaps + 1
            return
        self._node.warn('costmap', f"left out: the costmap on '{p.costmap}' {text}")

    def _publish_what_changed(self):
        """Publish where somebody listens, if the map changed or somebody new listens."""
        node = self._node
        wanted = [name for name, each in self._publishers.items() if each.get_subscription_count()]
        shown = node.fleet.version, node.refresher.is_behind  # then what follows has more
        version = (*shown, tuple(wanted), node.parameters, self._num_costmaps)
        if not wanted or not is_over(self._publishing) or version == self._published:
            return
        self._published = version
        self._publishing = node.in_steps(self._publish(wanted))

    def _publish(self, names):
        """Predict and publish, a step at a time: meanwhile others are answered."""
        view = View(self._node, self._costmap)
        for _ in view.predict():
            yield
        for name in names:
            self._publishers[name].publish(getattr(view, name)())
            yield


class View:
    """
    The map: messages by the names of their topics. For the worker's thread.

    What is observed while it predicts is in what it predicts afterwards: no cell is older than the
    stamp, some are newer.
    """

    def __init__(self, node, costmap=None):
        """
        Lay out the grid; `predict` fills it.

        :param node: `CMANPNode`, active.
        :param costmap: OccupancyGrid with what cannot be reached; None: nothing is known of that.
        """
        self._node, self._p, self._costmap = node, node.parameters, costmap
        self._field = node.fleet.combined
        self._grid = visualization.grid_targets(*self._window(), self._p.grid_resolution)
        self._mean, self._stddev = np.empty((2, len(self._grid.targets)))
        self._header = node.header(node.refresher.exact[0] or None)  # no cell is older

    def predict(self):
        """Predict the grid: an iterator, a few cells at a time."""
        x = self._grid.targets
        for start in range(0, len(x), CELLS_AT_ONCE):
            cells = slice(start, start + CELLS_AT_ONCE)
            mean, stddev = self._field.predict(x[cells], not self._node.refresher.is_behind)
            self._mean[cells], self._stddev[cells] = mean[:, 0], stddev[:, 0]
            yield

    def field(self) -> PointCloud2:
        """Show all as points."""
        return visualization.field_cloud(self._grid, self._mean, self._stddev, self._header)

    def mean(self) -> OccupancyGrid:
        """Show the mean, where something was observed."""
        limits = self._p.mean_range
        return visualization.occupancy_grid(
            self._grid, self._mean, *limits, self._header, self._known
        )

    def stddev(self) -> OccupancyGrid:
        """Show the stddev everywhere: a costmap filter would pass over what is unknown."""
        limits = self._p.stddev_range
        return visualization.occupancy_grid(self._grid, self._stddev, *limits, self._header)

    def grid_map(self):
        """Show mean and stddev as grid_map_msgs/GridMap."""
        layers = {'mean': np.where(self._known, self._mean, np.nan), 'stddev': self._stddev}
        return visualization.grid_map(self._grid, layers, self._header)

    def next_best_view(self) -> PoseArray:
        """Say where to measure next."""
        return visualization.poses(self._next, self._position, self._header)

    def markers(self) -> MarkerArray:
        """Show all of it in RViz."""
        p = self._p
        scene = markers.Scene(
            self._grid,
            self._mean,
            self._stddev,
            p.stddev_range,
            self._known,
            np.array([p.bounds_min, p.bounds_max]),
            self._tiles(),
            self._node.intake.track.points,
            self._next,
            p.num_views,
        )
        return markers.scene_markers(scene, self._header)

    @cached_property
    def _known(self):
        return self._field.is_known(self._grid.targets)

    @cached_property
    def _next(self):
        """Where to measure next, best first, (views, 2) [m]; within the bounds."""
        p, x = self._p, self._grid.targets
        reachable = ((x >= p.bounds_min) & (x <= p.bounds_max)).all(1)
        if self._costmap is not None:
            info, costs = self._costmap.info, np.array(self._costmap.data)
            origin = info.origin.position.x, info.origin.position.y
            costs = costs.reshape(info.height, info.width)
            reachable &= is_free(x, origin, info.resolution, costs)
        x, stddev = x[reachable], self._stddev[reachable]
        size = self._field.tile_size
        weight = p.view_distance_weight / size
        return x[next_best_views(x, stddev, self._position, p.num_views, weight, size)]

    @property
    def _position(self):
        """Where the robot was last, [m]; the middle of the grid before it observed anything."""
        newest = self._node.intake.track.newest
        return (self._grid.origin + self._grid.upper) / 2 if newest is None else newest

    def _tiles(self):
        """Return corners of the finest tiles in memory that are not too many to be seen."""
        lower, upper = self._grid.origin, self._grid.upper
        tiles = np.zeros((0, 2, 2))
        for level in range(self._field.geometry.num_levels):
            tiles = self._field.tiles_in_memory(level)
            tiles = tiles[((tiles[:, 1] > lower) & (tiles[:, 0] < upper)).all(1)]
            if len(tiles) <= markers.MAX_TILES:
                break
        return tiles[: markers.MAX_TILES]

    def _window(self):
        """Return lower and upper corner [m] of the grid."""
        p = self._p
        if not p.grid_window:
            return p.bounds_min, p.bounds_max
        # Cells stay where they are while the window moves.
        center = self._node.intake.newest_x
        lower = np.round((center - p.grid_window / 2) / p.grid_resolution) * p.grid_resolution
        return lower, lower + p.grid_window
