"""Where the simulated rover drives and what its downward sensor reads: pure functions."""

from dataclasses import asdict, dataclass
from json import dumps, loads

import numpy as np

from cmanp_ros.demo.terrain import Terrain, height_at

ROVER_SPEED = 5.0  # [m/s] of the rover's own time
NUM_LANES = 9
FOOTPRINT_M = 150.0  # radius of the disk that one scan sees
EDGE_M = 90.0  # the path keeps this far from the edge of the window
RANGE_NOISE_M = 1.5  # standard deviation of a reading
DROPOUT_RATE = 0.02  # share of readings that are NaN
POINTS_PER_SCAN = 48


@dataclass(frozen=True)
class Scenario:
    """
    What all three processes of a run agree upon beforehand.

    :ivar seed: of the window, the path and the noise.
    :ivar window_m: [m] side of the square window.
    :ivar duration_sec: [s] of the drive, on the clock of the machine.
    :ivar rate_hz: [Hz] scans per second.
    """

    seed: int = 0
    window_m: float = 3600.0
    duration_sec: float = 30.0
    rate_hz: float = 10.0

    @property
    def num_scans(self) -> int:
        """Count the scans of the whole drive."""
        return max(1, round(self.duration_sec * self.rate_hz))

    def to_json(self) -> str:
        """Write the scenario on one line."""
        return dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> 'Scenario':
        """Read what `to_json` wrote."""
        return cls(**loads(text))


def winding_path(window_m: float, num_points: int, seed: int) -> np.ndarray:
    """
    Lay a smooth sweep over the window that bends, and avoids a place it never sees.

    :param window_m: [m] side of the square window around the origin.
    :param num_points: positions, equally far apart along the path.
    :param seed: of its bends.
    :return: (num_points, 2) [m].
    """
    rng = np.random.default_rng(seed)
    half = window_m / 2 - EDGE_M
    along = np.linspace(-1, 1, 60)
    lanes = []
    for k, y in enumerate(np.linspace(-1, 1, NUM_LANES)):
        phase, cycles = rng.uniform(0, 2 * np.pi), rng.uniform(0.6, 1.4)
        bend = 0.1 * np.sin(np.pi * cycles * along + phase)
        reach = 1 - rng.uniform(0.0, 0.25)  # not every lane goes to the edge
        lane = np.stack([along * reach, y * 0.92 + bend], axis=-1)
        lanes.append(lane if k % 2 == 0 else lane[::-1])
    path = np.concatenate(lanes)
    angle = rng.uniform(0, 2 * np.pi)
    path = _around(path, 0.35 * np.array([np.cos(angle), np.sin(angle)]), 0.36)
    path = _smooth(path, 11)
    if rng.integers(2):
        path = path[:, ::-1]  # lanes from south to north
    return resample(np.clip(path, -1, 1) * half, num_points)


def path_length(path: np.ndarray) -> float:
    """
    Measure a path.

    :param path: (n, 2) [m].
    :return: [m].
    """
    return float(np.linalg.norm(np.diff(path, axis=0), axis=1).sum())


def resample(path: np.ndarray, num_points: int) -> np.ndarray:
    """
    Place points at equal distances along a path, both ends included.

    :param path: (n, 2) [m].
    :param num_points: at least 1.
    :return: (num_points, 2) [m].
    """
    steps = np.linalg.norm(np.diff(path, axis=0), axis=1)
    at = np.concatenate([[0.0], np.cumsum(steps)])
    wanted = np.linspace(0.0, at[-1], num_points)
    return np.stack([np.interp(wanted, at, column) for column in path.T], axis=-1)


def compression(scenario: Scenario) -> str:
    """
    Say how much faster than a real rover the demo is.

    :param scenario: what is driven.
    :return: text.
    """
    path = winding_path(scenario.window_m, scenario.num_scans, scenario.seed)
    minutes = path_length(path) / ROVER_SPEED / scenario.duration_sec / 60
    return f'1 s is {minutes:.1f} min of driving at {ROVER_SPEED:g} m/s'


def scan(
    terrain: Terrain,
    position: np.ndarray,
    rng: np.random.Generator,
    num_points: int = POINTS_PER_SCAN,
) -> np.ndarray:
    """
    Read heights at points scattered over a disk below the rover.

    :param terrain: the truth.
    :param position: (2,) [m] of the rover in the map frame.
    :param rng: of the places and the noise.
    :param num_points: readings.
    :return: (num_points, 3) x, y, z [m]; z is NaN where the sensor got no echo.
    """
    radius = FOOTPRINT_M * np.sqrt(rng.random(num_points))
    angle = rng.uniform(0, 2 * np.pi, num_points)
    x = position + np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)
    z = readings(height_at(terrain, x), rng)
    z[rng.random(num_points) < DROPOUT_RATE] = np.nan
    return np.column_stack([x, z])


def readings(heights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """
    Add the noise of the sensor.

    :param heights: (n,) [m].
    :param rng: of the noise.
    :return: (n,) [m].
    """
    return heights + RANGE_NOISE_M * rng.standard_normal(heights.shape)


def _smooth(path, width):
    """Average neighbors, so that turns are round; both ends stay."""
    kernel = np.hanning(width + 2)[1:-1]
    padded = np.pad(path, ((width // 2, width // 2), (0, 0)), mode='edge')
    columns = [np.convolve(column, kernel / kernel.sum(), 'valid') for column in padded.T]
    return np.stack(columns, axis=-1)


def _around(path, center, radius):
    """Push a path out of a disk, less the farther away it is."""
    offset = path - center
    distance = np.linalg.norm(offset, axis=1, keepdims=True)
    pushed = np.sqrt(distance**2 + radius**2 * np.exp(-((distance / (2 * radius)) ** 2)))
    return center + offset / np.maximum(distance, 1e-9) * pushed
