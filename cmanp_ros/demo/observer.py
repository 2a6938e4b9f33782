"""
The observer, a process of its own: it asks for predictions and holds them against the truth.

It asks over the whole window through the service, asks at some places through the topics, and
listens to the published map. What it measures leaves as lines of JSON.
"""

import argparse
import json
import select
import sys
import time
from statistics import median

import numpy as np
import rclpy
from diagnostic_msgs.msg import DiagnosticStatus
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.qos import DurabilityPolicy, QoSProfile
from sensor_msgs.msg import PointCloud2
from std_msgs.msg import Header

from cmanp_ros.conversions import float_array, points_from_cloud, predictions_from_message
from cmanp_ros.demo.drive import Scenario, readings
from cmanp_ros.demo.scores import scores
from cmanp_ros.demo.terrain import choose_window, grid_points, load_terrain
from cmanp_ros.msg import Prediction, Query
from cmanp_ros.srv import Predict

START_SEC = 60.0  # loading the model for the first time can take long
ANSWER_SEC = 10.0
SETTLE_SEC = 10.0
PERIOD_SEC = 1.0  # from one measurement to the next
NUM_QUERIED = 64  # locations of a query


class Observer:
    """Truth, the node's outputs as they arrive, and counts of what was asked and answered."""

    def __init__(self, node, scenario: Scenario) -> None:
        """
        Open clients, subscriptions and the publisher.

        :param node: rclpy node of the observer.
        :param scenario: what the rover drives through.
        """
        terrain = choose_window(load_terrain(), scenario.window_m, scenario.seed)
        x, heights = grid_points(terrain, scenario.window_m)
        self.shape = heights.shape
        self.x, self.heights = x.reshape(-1, 2), heights.reshape(-1)
        self._rng = np.random.default_rng([scenario.seed, 2])
        self.readings = readings(self.heights, self._rng)
        self.mean = self.stddev = None

        self.status, self.field, self._answers = {}, None, {}
        self.latencies, self.num_requests, self.num_queries, self.num_fields = [], 0, 0, 0
        self.num_topic_answers = 0

        latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        self._node = node
        self.client = node.create_client(Predict, 'cmanp/predict')
        self._query = node.create_publisher(Query, 'query', 10)
        node.create_subscription(Prediction, 'cmanp/prediction', self._on_prediction, 10)
        node.create_subscription(PointCloud2, 'cmanp/field', self._on_field, latched)
        node.create_subscription(DiagnosticStatus, 'cmanp/status', self._on_status, latched)
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(node)

    def wait(self, condition, timeout_sec: float) -> bool:
        """Take in messages until a condition holds, or until the time is up."""
        deadline = time.monotonic() + timeout_sec
        while not condition() and time.monotonic() < deadline:
            self._executor.spin_once(timeout_sec=0.05)
        return bool(condition())

    def ask_service(self) -> Prediction | None:
        """Ask for the predictions over the whole window; None if no answer came."""
        request = Predict.Request(header=self._header(), dim_x=2, x=float_array(self.x))
        asked, self.num_requests = time.monotonic(), self.num_requests + 1
        future = self.client.call_async(request)
        if not self.wait(future.done, ANSWER_SEC):
            self.client.remove_pending_request(future)
            return None
        response = future.result()
        if not response.success:
            print(f'cmanp/predict refused: {response.message}', file=sys.stderr)
            return None
        self.latencies.append(time.monotonic() - asked)
        return response.prediction

    def ask_topic(self, x: np.ndarray) -> int:
        """Publish a query; its answer is awaited elsewhere. Return its id."""
        self.num_queries += 1
        self._query.publish(
            Query(header=self._header(), id=self.num_queries, dim_x=2, x=float_array(x))
        )
        return self.num_queries

    def measure(self) -> dict:
        """
        Ask once, and compare with the truth.

        :return: scores and what the node says of itself; without scores if it did not answer.
        """
        self.ask_topic(self._rng.choice(self.x, NUM_QUERIED, replace=False))
        prediction = self.ask_service()
        measured = {
            'tile_bytes': self._counter('tile_bytes'),
            'tiles': self._counter('tiles') or 0,
            'folded': self._counter('observations_folded') or 0,
            'points_per_second': float(self.status.get('points_per_sec') or 0),
            'message': self.status.get('message', ''),
        }
        if prediction is not None:
            mean, stddev, _ = predictions_from_message(prediction)
            self.mean, self.stddev = mean[:, 0], stddev[:, 0]
            measured |= scores(self.mean, self.stddev, self.heights, self.readings)
            measured['folded'] = prediction.num_observations
        return measured

    def settle(self) -> None:
        """Wait until the node has folded what it received and its map shows all of it."""
        self.wait(lambda: self._counter('points_pending') == 0, SETTLE_SEC)
        seen = None
        while seen != self.counters():  # two statuses in a row say the same
            seen, self.status = self.counters(), {}
            if not self.wait(lambda: self.status, SETTLE_SEC):
                return

    def compare(self) -> float | None:
        """
        Compare the answers to one question asked of the service, the topics and the map.

        :return: largest difference [m] of a mean or stddev; None if one of them is missing.
        """
        if self.mean is None:
            return None
        asked = self.ask_topic(self.x)
        if not self.wait(lambda: asked in self._answers, ANSWER_SEC):
            return None
        answer = self._answers[asked]
        mean, stddev, _ = predictions_from_message(answer)
        newest = answer.header.stamp
        if not self.wait(lambda: self.field and self.field.header.stamp == newest, ANSWER_SEC):
            return None
        x, field_mean, field_stddev = self._field_cells()
        asked = self.ask_topic(x)
        if not self.wait(lambda: asked in self._answers, ANSWER_SEC):
            return None
        at_cells = predictions_from_message(self._answers[asked])
        pairs = (
            (mean[:, 0], self.mean),
            (stddev[:, 0], self.stddev),
            (at_cells[0], field_mean),
            (at_cells[1], field_stddev),
        )
        return float(max(np.abs(a - b).max() for a, b in pairs))

    def answers(self) -> dict:
        """Count what was asked and answered, and how fast."""
        return {
            'service_asked': self.num_requests,
            'service': len(self.latencies),
            'service_latency_sec': median(self.latencies) if self.latencies else None,
            'topic_asked': self.num_queries,
            'topic': self.num_topic_answers,
            'field': self.num_fields,
        }

    def counters(self) -> dict[str, int]:
        """Return the counters of points and messages in the node's newest status."""
        return {
            key: int(value)
            for key, value in self.status.items()
            if key.startswith(('points_', 'messages_')) and value.isdigit()
        }

    def small_map(self) -> dict | None:
        """Return the published map for the terminal: rows of rounded numbers, south first."""
        if self.field is None:
            return None
        x, mean, stddev = self._field_cells()
        columns = len(np.unique(x[:, 0]))
        if len(x) % columns:
            return None  # cells without a finite prediction are left out
        return {
            name: np.rint(values).astype(int).reshape(-1, columns).tolist()
            for name, values in (('mean', mean), ('stddev', stddev))
        }

    def _field_cells(self):
        """Return centers (n, 2), mean and stddev (n, 1) of the published map."""
        x, mean, _ = points_from_cloud(self.field, ('x', 'y'), 'mean')
        return x, mean, points_from_cloud(self.field, ('x', 'y'), 'stddev')[1]

    def _counter(self, key):
        """Return a number of the node's newest status, or None before it came."""
        return int(self.status[key]) if self.status.get(key) else None

    def _header(self):
        return Header(frame_id='map', stamp=self._node.get_clock().now().to_msg())

    def _on_prediction(self, message):
        self._answers = {message.id: message}  # only the newest is ever looked at
        self.num_topic_answers += 1

    def _on_field(self, message):
        self.field = message
        self.num_fields += 1

    def _on_status(self, message):
        self.status = {item.key: item.value for item in message.values}
        self.status['message'] = message.message


def main(arguments=None) -> int:
    """
    Measure before the drive, once a second during it, and when told to finish for the last time.

    :return: exit status: 1 if the node never answered.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('scenario', type=Scenario.from_json, help='as JSON')
    parser.add_argument('grids', help='where to write the last predictions (.npz)')
    options, ros_arguments = parser.parse_known_args(arguments)
    rclpy.init(args=ros_arguments)
    try:
        observer = Observer(rclpy.create_node('observer'), options.scenario)
        return _observe(observer, options.grids)
    except (KeyboardInterrupt, ExternalShutdownException):
        return 130
    finally:
        rclpy.try_shutdown()


def _observe(observer, grids):
    """Run from the first contact to the last measurement."""
    ready = observer.wait(observer.client.service_is_ready, START_SEC)
    if not ready or not observer.wait(lambda: observer.status, START_SEC):
        print(f'the node did not answer within {START_SEC:g} s', file=sys.stderr)
        return 1
    _say('start', observer)
    due = time.monotonic()
    while True:
        due = max(due + PERIOD_SEC, time.monotonic())
        command = None
        while command is None and time.monotonic() < due:
            observer.wait(lambda: False, 0.05)
            command = _command()
        if command == '':
            return 1  # whoever started this process is gone
        if command is not None:
            break
        _say('measurement', observer)
    observer.settle()
    _say('end', observer, difference_m=observer.compare, counters=observer.counters)
    if observer.mean is not None:
        names = ('heights', 'readings', 'mean', 'stddev')
        rows = {name: getattr(observer, name).reshape(observer.shape) for name in names}
        np.savez(grids, x=observer.x.reshape(*observer.shape, 2), **rows)
    return 0


def _command() -> str | None:
    """Return a line from standard input, '' at its end, None if there is none yet."""
    readable, _, _ = select.select([sys.stdin], [], [], 0)
    return sys.stdin.readline() if readable else None


def _say(event, observer, **more):
    """Measure, and print the event as one line of JSON."""
    values = observer.measure()
    values |= {name: function() for name, function in more.items()}
    values['answers'] = observer.answers()
    values['map'] = observer.small_map()
    print(json.dumps({'event': event, **values}), flush=True)


if __name__ == '__main__':
    sys.exit(main())
