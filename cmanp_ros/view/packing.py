"""
The published map as bytes for the page; plain numpy.

Layout: uint32 length of a header; the header as JSON, padded with spaces so that what follows is
aligned; mean and then stddev as float32, row by row from the lower left, NaN where nothing was
published. All little-endian.
"""

import json
import math
import struct

import numpy as np

from cmanp_ros.core.errors import InputError

MAX_CELLS = 250_000  # of one message, 2 MB; a finer map is thinned
MAX_LAYOUT = 10_000_000  # cells of a rectangle that holds all that was published


def pack_cells(x, mean, stddev, header: dict, max_cells: int = MAX_CELLS) -> bytes:
    """
    Put cells that lie on a regular grid, some of which may be missing, into one message.

    :param x: (n, 2) [m], the centers.
    :param mean: (n,) or (n, 1) [field units].
    :param stddev: alike.
    :param header: more that the page shall know, fit for JSON.
    :param max_cells: of a finer grid only every second, third ... row and column is sent.
    :return: see the module.
    :raises InputError: no cells, or cells so far apart that they are no grid.
    """
    if not len(x):
        raise InputError('the map has no cells; expected at least one with a finite prediction')
    (column, left), (row, lower), resolution = _indices(np.asarray(x, np.float64))
    width, height = int(column.max()) + 1, int(row.max()) + 1
    grids = np.full((2, height, width), np.nan, '<f4')
    grids[0, row, column] = np.reshape(mean, -1)
    grids[1, row, column] = np.reshape(stddev, -1)
    stride = max(1, math.ceil(math.sqrt(width * height / max_cells)))
    grids = grids[:, ::stride, ::stride]
    size = resolution * stride  # each cell that is left stands for its neighbors
    text = json.dumps(
        header
        | {
            'width': grids.shape[2],
            'height': grids.shape[1],
            'resolution': size,
            'origin': [left - size / 2, lower - size / 2],
        }
    ).encode()
    text += b' ' * (-len(text) % 4)
    return struct.pack('<I', len(text)) + text + grids.tobytes()


def unpack_cells(data: bytes) -> tuple[dict, np.ndarray, np.ndarray]:
    """
    Read what `pack_cells` wrote, as the page does.

    :return: header, mean (height, width) and stddev (height, width).
    """
    (length,) = struct.unpack_from('<I', data)
    header = json.loads(data[4 : 4 + length])
    grids = np.frombuffer(data, '<f4', offset=4 + length)
    return header, *grids.reshape(2, header['height'], header['width'])


def _indices(x):
    """Return (index, first center [m]) of the columns and of the rows, and the cell size [m]."""
    axes = [np.unique(x[:, axis]) for axis in (0, 1)]
    steps = [np.diff(axis).min() for axis in axes if len(axis) > 1]
    step = min(steps, default=1.0)
    spans = [axis[-1] - axis[0] for axis in axes]
    counts = [round(span / step) for span in spans]
    if (counts[0] + 1) * (counts[1] + 1) > MAX_LAYOUT:
        raise InputError(
            f'the cells are {step:g} m apart and cover {spans[0]:g} x {spans[1]:g} m; expected at '
            f'most {MAX_LAYOUT} cells: raise grid_resolution'
        )
    longer = int(np.argmax(counts))
    if counts[longer]:  # coordinates are float32: over all of them the step is exact
        step = spans[longer] / counts[longer]
    placed = [
        (np.rint((x[:, axis] - axes[axis][0]) / step).astype(int), float(axes[axis][0]))
        for axis in (0, 1)
    ]
    return *placed, float(step)
