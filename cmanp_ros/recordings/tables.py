"""
Points from files without messages: CSV with a header, lists of x y z as lidars give them, and LAS.

They are in the map frame. Lengths are in meters: longitude and latitude have to be projected. A
column of times, if there is one, has the stamps [s].
"""

from __future__ import annotations

import gzip
import itertools
import lzma
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cmanp_ros.admission import MAX_AHEAD_SEC
from cmanp_ros.conversions import one_line
from cmanp_ros.core.errors import ConfigError, InputError
from cmanp_ros.optional import library
from cmanp_ros.parameters import NodeParameters, SourceParameters
from cmanp_ros.recordings.parts import Points, Span, evenly
from cmanp_ros.sources import POINT_CLOUD

if TYPE_CHECKING:
    from cmanp_ros.recordings.recording import Recording

NUM_LINES = 16384  # that are read at once
AXES = {'x': 'x', 'easting': 'x', 'east': 'x', 'y': 'y', 'northing': 'y', 'north': 'y', 'z': 'z'}
STAMPS = ('stamp', 'time', 'timestamp', 'gps_time')
STEPS = 16  # in which an interval of time passes for a table
ANGLES = ('lon', 'lat', 'longitude', 'latitude')


class Tables:
    """Tables that are read one after the other."""

    num_messages: int
    duration_sec = None

    def __init__(
        self,
        paths: Sequence[Path],
        sources: Sequence[str],
        parameters: NodeParameters,
        dim_x: int,
        dim_y: int,
    ) -> None:
        """Open, see `Recording`."""
        if len(sources) > 1:
            raise ConfigError(
                f'--source {" --source ".join(sources)}: expected one for a table, as all its '
                'points have the same value; several of one point are names with commas, :u,v'
            )
        alike = [s for s in parameters.source_parameters if s.type == POINT_CLOUD and s.enabled]
        source = alike[0] if alike else SourceParameters('points')
        given = sources[0].rpartition(':')[2] if sources else source.value_field
        default = parameters.value_field
        self._tables = [_Las(p) if p.suffix in ('.las', '.laz') else _Text(p) for p in paths]
        self._columns = [_columns(table, given, default, dim_x, dim_y) for table in self._tables]
        names = self._tables[0].names
        values = [names[index] for index in self._columns[0][1]]
        self.sources = [replace(source, topic='points', value_field=','.join(values))]
        ends = np.cumsum([0, *(table.num_lines for table in self._tables)]).tolist()
        self._spans = [Span(*pair) for pair in itertools.pairwise(ends)]
        self.num_messages = sum(-(-table.num_lines // NUM_LINES) for table in self._tables)

    def read(self, recording: Recording, span: Span | None) -> Iterator[Points]:
        """Read so many lines at once."""
        span, (source,) = span or Span(0, self._spans[-1].stop), self.sources
        revisit = source.revisit_interval if source.voxel_size else 0.0
        intervals = [t for t in (recording.parameters.half_life, revisit) if t]
        for table, (x, y, stamp), own in zip(
            self._tables, self._columns, self._spans, strict=True
        ):
            start, stop = (min(max(edge, own.start), own.stop) - own.start for edge in span)
            if start == stop:
                continue
            for rows in table.read(start, stop, recording.losses, {*x, *y}):
                recording.num_read += 1
                values = rows[:, y] * source.value_scale + source.value_offset
                column = np.zeros(len(rows)) if stamp is None else rows[:, stamp]
                times = self._times(column, table, intervals, recording.losses)
                for part, oldest, newest in _in_time(times, min(intervals, default=np.inf)):
                    yield Points(source, newest, rows[part][:, x], values[part], oldest)

    def _times(self, column, table, intervals, losses) -> np.ndarray:
        """Return times [s], 0 where there is none, and say so where that matters."""
        latest = time.time() + MAX_AHEAD_SEC
        usable = (column > 0) & (column <= latest)
        if len(late := column[column > latest]):
            losses.problems['no_time'] = (
                f'{table.path}: the time {late.max():.10g} [s] is in the future, and ignored; '
                'expected seconds since 1970'
            )
        elif intervals and len(column) and not usable.any():
            losses.problems['no_time'] = (
                f'{table.path}: lines without a time do not fade, nor are they thinned by time; '
                f'expected seconds in a column {" or ".join(STAMPS)}'
            )
        return np.where(usable, column, 0.0)

    @property
    def descriptions(self) -> list[str]:
        """See `Recording`."""
        return [
            f'{table.path} ({", ".join(table.names[n] for n in columns[1])})'
            for table, columns in zip(self._tables, self._columns, strict=True)
        ]

    def split(self, num_parts: int) -> list[Span]:
        """Cut the lines into so many parts at most."""
        return evenly(0, self._spans[-1].stop, num_parts)

    def close(self) -> None:
        """Do nothing: files are open only while they are read."""


class _Text:
    """A CSV, or numbers between blanks; comments begin with # or //."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with self._open() as file:
                self._num_skipped, first, comment = _first_line(file)
                self.num_lines = sum(1 for _ in file) + 1
        except (OSError, EOFError, lzma.LZMAError, UnicodeDecodeError) as error:
            raise InputError(
                f'{path}: {error}; expected a text in UTF-8 with one point a line, such as a CSV'
            ) from error
        if not first.strip():
            raise InputError(f'{path} is empty; expected one point a line')
        self._delimiter = next((mark for mark in ',;\t' if mark in first), None)
        names = self._cells(first)
        if all(_is_number(name) for name in names):
            count, said = len(names), self._cells(comment)
            self.names = ['x', 'y', 'z', *(f'column{n}' for n in range(4, count + 1))][:count]
            if len(said) == count and any(name.lower() in AXES for name in said):
                self.names = said  # as numpy.savetxt writes them
        else:
            self.names = names
            self._num_skipped, self.num_lines = self._num_skipped + 1, self.num_lines - 1

    def _cells(self, line: str) -> list[str]:
        """Return the cells of a line of names, which may be a comment."""
        line = line.lstrip('#/ ')
        return [name.strip().strip('"').lstrip('#/ ') for name in line.split(self._delimiter)]

    def read(self, start: int, stop: int, losses, used: set[int]) -> Iterator[np.ndarray]:
        """
        Read some lines, (n, columns) at a time.

        :param used: columns in which what is no number is a fault.
        """
        with self._open() as file:
            lines = itertools.islice(file, self._num_skipped + start, self._num_skipped + stop)
            while batch := list(itertools.islice(lines, NUM_LINES)):
                yield self._rows(batch, losses, used)

    def _rows(self, lines: list[str], losses, used) -> np.ndarray:
        try:
            rows = np.loadtxt(lines, delimiter=self._delimiter, ndmin=2)
            if rows.shape[1] == len(self.names) or not rows.size:
                return rows.reshape(-1, len(self.names))
        except ValueError:
            pass
        return self._good_rows(lines, losses, used)

    def _good_rows(self, lines: list[str], losses, used) -> np.ndarray:
        """Read line by line, and count those that cannot be read."""
        rows = []
        for line in lines:
            cells = line.partition('#')[0].split(self._delimiter)
            if not line.partition('#')[0].strip():
                continue
            if len(cells) != len(self.names):
                losses.reject_points({'wrong_dim': 1})
                losses.problems['wrong_dim'] = one_line(
                    f'{self.path}: {line.strip()!r} has {len(cells)} columns; expected '
                    f'{len(self.names)}: {", ".join(self.names)}'
                )
                continue
            needed = [cells[n] for n in sorted(used)]
            if strange := [cell.strip() for cell in needed if not _is_number(cell)]:
                losses.problems['not_finite'] = one_line(
                    f'{self.path}: {strange[0]!r} in {line.strip()!r} is no number; '
                    'expected one such as 3.5'
                )
            rows.append([_number(cell) for cell in cells])
        return np.array(rows, np.float64).reshape(-1, len(self.names))

    @contextmanager
    def _open(self):
        opened = {'.gz': gzip.open, '.xz': lzma.open}.get(self.path.suffix, open)
        with opened(self.path, 'rt', encoding='utf-8-sig') as file:
            yield file


class _Las:
    """A binary LAS file, read with `laspy`; LAZ needs its extra `lazrs`, too."""

    def __init__(self, path: Path) -> None:
        self.path, self._laspy = path, library('laspy', f'reading {path}')
        with self._open() as file:
            self.num_lines = file.header.point_count
            extra = [
                name for name in file.header.point_format.dimension_names if name not in 'XYZ'
            ]
        self.names = ['x', 'y', 'z', *extra]

    def read(self, start: int, stop: int, losses, used: set[int]) -> Iterator[np.ndarray]:
        """Read some points, (n, columns) at a time; all of them are numbers."""
        with self._open() as file:
            file.seek(start)
            while start < stop:
                points = file.read_points(min(NUM_LINES, stop - start))
                start += len(points)
                yield np.stack([np.asarray(points[name], float) for name in self.names], axis=1)

    @contextmanager
    def _open(self):
        try:
            with self._laspy.open(self.path) as file:
                yield file
        except (OSError, ValueError, self._laspy.errors.LaspyException) as error:
            raise InputError(
                f'{self.path}: {error}; expected a LAS file (for .laz: pip install lazrs)'
            ) from error


def _columns(table, given, default, dim_x, dim_y) -> tuple[list[int], list[int], int | None]:
    """
    Return which columns are the location, the value, and the time.

    :param given: name of the value, or names with commas; empty: the default.
    :param default: the same; z, as for clouds, need not be there if only one column can be it.
    """
    wanted = given or default
    names = [name.lower() for name in table.names]
    axes = {axis: names.index(n) for n, axis in reversed(AXES.items()) if n in names}
    location = [axes.get(axis) for axis in 'xyz'[:dim_x]]
    if None in location:
        angles = any(name in ANGLES for name in names)
        raise InputError(
            f'{table.path} has the columns {", ".join(table.names)}; expected {_axes(dim_x)}: '
            + ('project longitude and latitude to meters first' if angles else 'rename them')
        )
    stamp = next((names.index(name) for name in STAMPS if name in names), None)
    others = [n for n in range(len(names)) if n not in (*location, stamp)]
    chosen = [n for n in others if names[n] in wanted.lower().split(',')]
    if not chosen and not given and default == 'z':
        chosen = others
    if len(chosen) != dim_y:
        raise ConfigError(
            f'{table.path} has the columns {", ".join(table.names)}; {wanted!r} is not '
            f'{dim_y} of those beside the location; expected '
            + ('the name of the value' if dim_y == 1 else f'{dim_y} names with commas')
            + f': --source :{",".join(table.names[n] for n in others[-dim_y:]) or "NAME"}'
        )
    return location, chosen, stamp


def _in_time(times: np.ndarray, interval: float) -> Iterator[tuple[slice, int, int]]:
    """Cut rows where another step of an interval [s] begins: rows, oldest and newest time [ns]."""
    steps = np.maximum.accumulate(np.floor(times * (STEPS / interval)))  # time goes forwards only
    edges = np.flatnonzero(np.diff(steps)) + 1
    for start, stop in itertools.pairwise([0, *edges.tolist(), len(times)]):
        known = times[start:stop][times[start:stop] > 0]
        ends = (known.min(), known.max()) if len(known) else (0.0, 0.0)
        yield slice(start, stop), *(round(end * 1e9) for end in ends)


def _axes(dim_x: int) -> str:
    """Say how the columns of the location may be named."""
    said = []
    for axis in 'xyz'[:dim_x]:
        others = ' or '.join(name for name in AXES if AXES[name] == axis != name)
        said.append(f'{axis} ({others})' if others else axis)
    return ', '.join(said)


def _first_line(file) -> tuple[int, str, str]:
    """Return how many lines are before the first that is no comment, it, and the last of those."""
    comment = ''
    for number, line in enumerate(file):
        if line.startswith(('#', '//')):
            comment = line
        elif line.strip():
            return number, line, comment
    return 0, '', comment


def _number(text: str) -> float:
    """Return a number, or NaN for what is none: it is counted as not finite."""
    return float(text) if _is_number(text) else float('nan')


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
