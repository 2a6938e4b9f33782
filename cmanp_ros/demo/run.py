"""One run: start the three processes, follow what they say, and put it into a report."""

import json
import signal
import time
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cmanp_ros.core.errors import CMANPError
from cmanp_ros.demo.drive import FOOTPRINT_M, Scenario, winding_path
from cmanp_ros.demo.processes import Child, environment, own_domain, stop
from cmanp_ros.demo.scores import scores, unaccounted
from cmanp_ros.demo.terrain import Terrain, choose_window, grid_points, load_terrain

SETUP_SEC = 90.0  # for the first answer of the node
FINISH_SEC = 45.0  # for the last measurement
LATE_SEC = 30.0  # by which the drive may take longer than it should
POLL_SEC = 0.05
CELL_M = 90.0  # of the map that the node publishes
VALUE_SCALE_M = 100.0  # what somebody who knows the region would guess


class DemoError(CMANPError):
    """The demo could not go on; the message says why and shows the end of a log."""


@dataclass
class Progress:
    """
    What is known of the run so far, for the view.

    :ivar phase: what is going on.
    :ivar drive_sec: [s] since the rover was told to go.
    :ivar rover: messages and points published, position [m].
    :ivar start: measurement before the first observation.
    :ivar series: all measurements so far, each with 'seconds' of the drive.
    :ivar map: mean and stddev as published, rows from the south.
    """

    scenario: Scenario
    terrain: Terrain
    domain_id: int
    phase: str = 'starting the node, the rover and the observer'
    drive_sec: float = 0.0
    rover: dict = field(default_factory=dict)
    start: dict | None = None
    series: list[dict] = field(default_factory=list)
    map: dict | None = None


class Run:
    """The three processes and what they said."""

    def __init__(self, scenario: Scenario, folder: Path, checkpoint: str, domain_id: int):
        """
        Prepare; `start` starts the processes.

        :param scenario: what is driven.
        :param folder: for logs and grids.
        :param checkpoint: parameter of the node.
        :param domain_id: ROS domain of their own.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.grids = folder / 'grids.npz'
        self.grids.unlink(missing_ok=True)
        terrain = choose_window(load_terrain(), scenario.window_m, scenario.seed)
        self.progress = Progress(scenario, terrain, domain_id)
        self.end = None
        self.drive_started = None
        self._told_to_finish = False
        self._phase_ends = None
        self._folder, self._checkpoint = folder, checkpoint
        self.children = []

    def start(self) -> None:
        """Start the processes."""
        progress, scenario = self.progress, self.progress.scenario.to_json()
        parameters = node_parameters(progress.scenario, progress.terrain)
        parameters['checkpoint'] = self._checkpoint
        env = environment(progress.domain_id)
        for name, module, arguments in (
            ('node', 'cmanp_ros.node', ros_arguments(parameters)),
            ('rover', 'cmanp_ros.demo.rover', [scenario, *ros_arguments({})]),
            (
                'observer',
                'cmanp_ros.demo.observer',
                [scenario, str(self.grids), *ros_arguments({})],
            ),
        ):
            self.children.append(Child(name, module, arguments, self._folder, env))
        self.node, self.rover, self.observer = self.children
        self._enter(progress.phase, SETUP_SEC)

    def step(self) -> bool:
        """
        Take in what the processes said.

        :return: True once the last measurement is there.
        :raises DemoError: a process ended too early, or a phase took too long.
        """
        for event in self.rover.events():
            self.progress.rover = event
        for event in self.observer.events():
            self._take(event)
        if self.drive_started is not None and not self._told_to_finish:
            self.progress.drive_sec = time.monotonic() - self.drive_started
        self._check_children()
        return self.end is not None and self.observer.process.poll() is not None

    def _take(self, event):
        """Take in a measurement of the observer."""
        kind = event.pop('event')
        self.progress.map = event.pop('map', None) or self.progress.map
        event['seconds'] = round(self.progress.drive_sec, 2)
        if kind != 'measurement' and 'rmse' not in event:
            raise self._failure(
                f'the node did not answer at the {kind} of the run', self.observer, self.node
            )
        if kind == 'start':
            self.progress.start = event
            self.rover.tell('go')
            self.drive_started = time.monotonic()
            self._enter('driving', self.progress.scenario.duration_sec + LATE_SEC)
        if kind == 'end':
            self.end = event
        if 'rmse' in event:
            self.progress.series.append(event)

    def _check_children(self):
        """Notice processes that have ended, and phases that do not."""
        if (status := self.node.ended()) is not None and self.end is None:
            raise self._failure(f'the node ended early (exit status {status})', self.node)
        if (status := self.rover.ended()) is not None and not self._told_to_finish:
            if status != 0:
                raise self._failure(f'the rover ended early (exit status {status})', self.rover)
            self._told_to_finish = True
            self.observer.tell('finish')
            self._enter('taking the last measurement', FINISH_SEC)
        if (status := self.observer.ended()) is not None:
            for event in self.observer.events():
                self._take(event)
            if status != 0 or self.end is None:
                reason = f'the observer ended early (exit status {status})'
                raise self._failure(reason, self.observer)
        if time.monotonic() > self._phase_ends:
            raise self._failure(f'{self.progress.phase} took too long', self.node, self.observer)

    def _enter(self, phase, limit_sec):
        self.progress.phase = phase
        self._phase_ends = time.monotonic() + limit_sec

    def _failure(self, reason, *children):
        """Make an error that shows the end of the logs of those who may know more."""
        logs = [f'--- end of {child.log}\n{child.last_lines() or "(empty)"}' for child in children]
        return DemoError('\n'.join([reason, *logs]))


def run(scenario: Scenario, folder: Path, checkpoint: str, domain_id: int | None, show) -> dict:
    """
    Run the demo; whatever happens, no process is left behind.

    :param scenario: what is driven.
    :param folder: for logs and grids.
    :param checkpoint: parameter of the node.
    :param domain_id: ROS domain to use; None: one that is free.
    :param show: called with the Progress again and again.
    :return: the report, see `report_of`.
    :raises DemoError: a process ended too early, or a phase took too long.
    """
    started = time.monotonic()
    with _stop_signals_raise(), own_domain(domain_id) as domain_id:
        this = Run(scenario, folder, checkpoint, domain_id)
        try:
            this.start()
            while not this.step():
                show(this.progress)
                time.sleep(POLL_SEC)
            show(this.progress)
        finally:
            with _signals_ignored():
                killed = stop(this.children)
    if killed:
        raise DemoError(f'had to be killed, did not end by itself: {", ".join(killed)}')
    report = report_of(this.progress, this.end, this.grids)
    report['seconds'] = {
        'setup': round(this.drive_started - started, 1),
        'all': round(time.monotonic() - started, 1),
    }
    return report


def node_parameters(scenario: Scenario, terrain: Terrain) -> dict[str, Any]:
    """
    Choose parameters of the node from what a user would know of the place beforehand.

    :param scenario: gives the workspace.
    :param terrain: gives the height of the region, rounded to 50 m.
    :return: name -> value.
    """
    half = scenario.window_m / 2
    heights = grid_points(terrain, scenario.window_m)[1]
    return {
        'bounds_min': [-half, -half],
        'bounds_max': [half, half],
        'value_offset': 50.0 * round(heights.mean() / 50),
        'value_scale': VALUE_SCALE_M,
        'grid_resolution': CELL_M,
        'mean_range': [float(heights.min()), float(heights.max())],
        'stddev_range': [0.0, VALUE_SCALE_M],
        'publish_rate': 2.0,
        'status_rate': 5.0,
        'num_threads': 1,  # several wait for each other where other processes need the cores
        'queue_size': 100,
    }


def ros_arguments(parameters: Mapping[str, Any]) -> list[str]:
    """
    Write the part of a command line that ROS reads; logs go to the standard streams alone.

    :param parameters: name -> value.
    :return: arguments.
    """
    settings = [('-p', f'{name}:={value}') for name, value in parameters.items()]
    return ['--ros-args', '--disable-external-lib-logs', *(part for s in settings for part in s)]


def report_of(progress: Progress, end: dict, grids_file: Path) -> dict:
    """
    Put together what build/demo.json says.

    :param progress: of the finished run.
    :param end: last measurement.
    :param grids_file: last predictions beside the truth.
    :return: plain values, ready for JSON.
    """
    counters = end.pop('counters', {})
    published = progress.rover.get('points', 0)
    rejected = {
        key.removeprefix('points_rejected_'): count
        for key, count in counters.items()
        if key.startswith('points_rejected_')
    }
    return {
        'scenario': asdict(progress.scenario),
        'domain_id': progress.domain_id,
        'start': progress.start,
        'end': end,
        'observations': {
            'published_messages': progress.rover.get('messages', 0),
            'published': published,
            'folded': counters.get('points_folded', 0),
            'rejected': rejected,
            'dropped': counters.get('points_dropped', 0),
            'pending': counters.get('points_pending', 0),
            'not_received': published - counters.get('points_received', 0),
            'unaccounted': unaccounted(counters),
            'points_per_second': counters.get('points_folded', 0) / progress.scenario.duration_sec,
        },
        'answers': {**end['answers'], 'difference_m': end.get('difference_m')},
        'places': _places(progress.scenario, grids_file),
        'series': progress.series,
    }


def _places(scenario, grids_file):
    """Score what the rover has seen and what it has not, each for itself."""
    if not grids_file.exists():
        return {}
    grids = load_grids(grids_file)
    path = winding_path(scenario.window_m, scenario.num_scans, scenario.seed)
    distance = np.linalg.norm(grids['x'][:, :, None] - path, axis=-1).min(-1)
    result = {}
    for name, where in (('seen', distance <= FOOTPRINT_M), ('unseen', distance > FOOTPRINT_M)):
        if where.any():
            rows = {key: grids[key][where] for key in ('mean', 'stddev', 'heights', 'readings')}
            stddev = float(np.sqrt(np.mean(rows['stddev'] ** 2)))
            result[name] = {'share': float(where.mean()), 'stddev': stddev, **scores(**rows)}
    return result


def load_grids(path: Path) -> dict[str, np.ndarray]:
    """
    Read what the observer saved.

    :param path: of the .npz file.
    :return: x (rows, columns, 2), heights, readings, mean and stddev (rows, columns) [m].
    """
    with np.load(path) as file:
        return dict(file)


def write_report(report: dict, path: Path) -> None:
    """
    Write the report as JSON.

    :param report: plain values.
    :param path: file to write.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + '\n', encoding='utf-8')


@contextmanager
def _stop_signals_raise():
    """
    Let SIGTERM and SIGHUP unwind the program as Ctrl-C does, so that it cleans up.

    Ctrl-C itself may be ignored: shells start commands in the background like that.
    """

    def unwind(number, frame):
        raise SystemExit(128 + number)

    previous = {number: signal.signal(number, unwind) for number in _STOP_SIGNALS}
    previous[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def _signals_ignored():
    """Let nothing interrupt the clean-up, which is bounded in time."""
    numbers = (signal.SIGINT, *_STOP_SIGNALS)
    previous = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


_STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP)
