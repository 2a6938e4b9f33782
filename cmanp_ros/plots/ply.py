"""A map as PLY, for MeshLab, CloudCompare or Blender: its surface, colored by stddev."""

from pathlib import Path

import numpy as np

from cmanp_ros.plots.raster import Raster
from cmanp_ros.visualization import color_table, fraction

VERTEX = [
    *((name, '<f8') for name in ('x', 'y', 'z')),
    ('stddev', '<f4'),
    *((name, 'u1') for name in ('red', 'green', 'blue')),
]
FACE = [('count', 'u1'), ('corners', '<i4', 3)]
TYPES = {'<f8': 'double', '<f4': 'float', 'u1': 'uchar'}


def write(raster: Raster, path: Path) -> None:
    """
    Write a vertex for each known cell, at height mean, and two triangles between each four.

    The colors are those of the surface in RViz, from the least stddev to the greatest.
    """
    vertices, faces = _vertices(raster), _faces(raster.known)
    lines = [
        'ply',
        'format binary_little_endian 1.0',
        'comment x y [m], z: mean [field units], stddev [field units]',
        f'element vertex {len(vertices)}',
        *(f'property {TYPES[kind]} {name}' for name, kind in VERTEX),
        f'element face {len(faces)}',
        'property list uchar int vertex_indices',
        'end_header\n',
    ]
    with open(path, 'wb') as file:
        file.write('\n'.join(lines).encode())
        file.write(vertices.tobytes())
        file.write(faces.tobytes())


def _vertices(raster):
    known = raster.known
    vertices = np.zeros(known.sum(), VERTEX)
    vertices['x'], vertices['y'] = raster.grid.targets[known.reshape(-1)].T
    vertices['z'], stddev = raster.mean[known], raster.stddev[known]
    vertices['stddev'] = stddev
    least, most = float(stddev.min()), float(stddev.max())
    table = np.rint(color_table() * 255).astype(np.uint8)
    at = fraction(stddev, least, max(most, np.nextafter(least, np.inf))) * (len(table) - 1)
    for channel, name in enumerate(('red', 'green', 'blue')):
        vertices[name] = table[np.rint(at).astype(int), channel]
    return vertices


def _faces(known):
    """Connect known cells, counter-clockwise seen from above; there are none at the borders."""
    vertex = np.where(known, known.cumsum(dtype=np.int32).reshape(known.shape) - 1, -1)
    low, right, top = vertex[:-1, :-1], vertex[:-1, 1:], vertex[1:, 1:]
    left = vertex[1:, :-1]
    corners = np.stack([low, right, top, low, top, left], axis=-1).reshape(-1, 3)
    corners = corners[(corners >= 0).all(1)]
    faces = np.zeros(len(corners), FACE)
    faces['count'], faces['corners'] = 3, corners
    return faces
