"""`cmanp plot`: a map or a recording as a picture, or as a file for other programs. No ROS."""

import argparse
import json
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open

from cmanp_ros import parameter_file
from cmanp_ros.checkpoint import OtherWeightsError
from cmanp_ros.cli import replay
from cmanp_ros.cli.options import PICTURES, check_output, number
from cmanp_ros.cli.progress import progress_for
from cmanp_ros.core.errors import CheckpointError, CMANPError, ConfigError, InputError
from cmanp_ros.core.lattice import check_bounds
from cmanp_ros.field import NeuralField
from cmanp_ros.optional import library
from cmanp_ros.plots import geotiff, ply, raster
from cmanp_ros.plots.watching import Watched
from cmanp_ros.recordings import shards
from cmanp_ros.recordings.folding import Folding

GEOTIFF, PLY = ('.tif', '.tiff'), ('.ply',)
FIRST_STAMP = 946_684_800 * 10**9  # [ns] the year 2000: those before are of a simulation
LAST_STAMP = 2**63  # [ns]: those after it are in other units
FARTHEST = 1e12  # [m] that a corner may be from the origin
EPILOG = """examples:
  cmanp plot terrain.safetensors --units m --hillshade
  cmanp plot terrain.safetensors --out terrain.tif --out terrain.ply --resolution 0.5
  cmanp plot survey.mcap --source /lidar/points -p value_offset:=20.0 -p tile_size:=8.0

Of a recording the picture also shows whether the error bars hold: some observations are predicted
before they are folded. `cmanp replay` keeps the map."""


class Drawn(NamedTuple):
    """What there is to draw."""

    field: NeuralField
    facts: list[str]
    watched: Watched | None = None
    """Of a recording."""
    problem: CMANPError | None = None
    """Why only a part of the recording is in it."""


def main(arguments) -> int:
    """Read, predict the cells, and write files."""
    options = _parser().parse_args(arguments)
    name = Path(options.files[0]).resolve().name.split('.')[0]
    outputs = [Path(out) for out in options.out or [f'{name}.png']]
    _check_outputs(outputs)
    if options.bounds:
        check_bounds(options.bounds[:2], options.bounds[2:])
    drawn = _restored(options) if _is_map(options) else _folded(options)
    raster.check(drawn.field)
    surface = _surface(drawn.field, options)
    for path in outputs:
        _write(surface, drawn, path, options.title or name, options)
        print(f'{path} ({path.stat().st_size / 1e6:.2g} MB)')
    if drawn.problem is not None:
        raise drawn.problem
    return 0


def _parser():
    parser = argparse.ArgumentParser(
        prog='cmanp plot',
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        'files',
        nargs='+',
        metavar='FILE',
        help='a saved map (.safetensors); or a recording: bags, .csv, .xyz, .las',
    )
    add(
        '--out',
        action='append',
        metavar='FILE',
        help='.png, .pdf, .svg, .tif (GeoTIFF) or .ply, more than once for several; '
        'default: name of the first file.png',
    )
    sizes = number(float, 1e-4, 1e6)
    add('--resolution', type=sizes, metavar='M', help='[m/cell]; default: a fifth of a tile')
    add(
        '--bounds',
        type=number(float, -FARTHEST, FARTHEST),
        nargs=4,
        metavar=('X0', 'Y0', 'X1', 'Y1'),
        help='corners [m] in the map frame; default: where there are data',
    )
    add('--title', help='of the picture; default: name of the first file')
    add('--units', default='', help='of the values, such as m')
    add('--hillshade', action='store_true', help='light the mean like a relief')
    add('--checkpoint', help='the model that folded the map; default: field')
    replay.add_source_options(parser.add_argument_group('of a recording, as for cmanp replay'))
    return parser


def _check_outputs(outputs):
    """Refuse what could not be written at the end, before all the work."""
    for path in outputs:
        check_output('--out', path, (*PICTURES, *GEOTIFF, *PLY))
        if path.suffix.lower() in GEOTIFF:
            library('rasterio', f'--out {path}')
        elif path.suffix.lower() in PICTURES:
            library('matplotlib', f'--out {path}')


def _is_map(options):
    maps = [file for file in options.files if file.endswith('.safetensors')]
    if not maps:
        return False
    if len(options.files) > 1:
        raise InputError(
            f'{", ".join(options.files)}: expected one saved map at a time, or recordings only'
        )
    if options.source or options.params_file or options.parameter:
        raise ConfigError(
            f'{maps[0]} is a saved map: --source, --params-file and -p are for recordings; '
            'leave them out'
        )
    return True


def _restored(options):
    (path,) = options.files
    torch.set_num_threads(1)  # more would wait for each other, where another process wants a core
    try:
        field = NeuralField.restore(path, options.checkpoint, max_tiles=shards.MAX_TILES)
    except OtherWeightsError as error:
        raise CheckpointError(f'{error}: --checkpoint NAME or FILE') from error
    with safe_open(path, 'numpy') as file:
        saved = json.loads(file.metadata()['header']).get('extra') or {}
    stamps = saved.get('oldest_stamp', 0), saved.get('newest_stamp', 0)
    return Drawn(field, _facts(field, saved.get('frame'), *stamps))


def _folded(options):
    settings = [*options.parameter]
    if options.checkpoint:
        settings.append(f'checkpoint:={options.checkpoint}')
    parameters = parameter_file.read(options.params_file, settings)
    job = shards.Job(tuple(options.files), tuple(options.source or ()), parameters)
    problem, field = None, job.empty()
    raster.check(field)
    with job.open() as recording:
        watched = Watched(field, recording)
        folding = Folding(recording, watched)
        report = folding.report
        with progress_for(recording.num_messages, 'messages') as progress:
            try:
                for _ in folding.run():
                    progress.show(report.num_read, report.num_folded)
            except InputError as error:
                problem = error
    for reason, count in sorted(report.losses.points.items()):
        print(f'left out: {count:,} points ({reason}) {report.losses.problems.get(reason, "")}')
    for reason in sorted(report.losses.problems.keys() - report.losses.points.keys()):
        print(f'[{reason}] {report.losses.problems[reason]}')
    coverage, seen = watched.coverage, report.provenance
    if coverage.num_points:
        print(f'{coverage.summary} of {coverage.num_points:,} observations that were predicted')
    if proposal := replay.hint(field, report):
        print(proposal)
    facts = _facts(field, seen.frame, seen.oldest_stamp, seen.newest_stamp)
    return Drawn(field, facts, watched, problem)


def _facts(field, frame, oldest, newest):
    """Say in words what a map holds."""
    facts = [f'{field.num_observations:,} observations in {field.num_tiles:,} tiles']
    if frame:
        facts.append(f'frame {frame}')
    if FIRST_STAMP <= oldest <= newest <= LAST_STAMP:
        first, last = (datetime.fromtimestamp(t * 1e-9, timezone.utc) for t in (oldest, newest))
        end = f'{last:%H:%M}' if last.date() == first.date() else f'{last:%Y-%m-%d %H:%M}'
        facts.append(f'{first:%Y-%m-%d %H:%M} to {end} UTC')
    return facts


def _surface(field, options):
    bounds = options.bounds and (options.bounds[:2], options.bounds[2:])
    grid = raster.layout(field, bounds, options.resolution)
    finest = field.tile_size / raster.CELLS_PER_TILE
    if options.resolution is None and grid.resolution > finest:
        print(
            f'cells of {_plain(grid.resolution)} m instead of {_plain(finest)} m: at most '
            f'{raster.MAX_CELLS:,}, unless --resolution is given'
        )
    with progress_for(grid.num_cells, 'cells') as progress:
        return raster.rasterize(field, grid, progress.show)


def _write(surface, drawn, path, title, options):
    if path.suffix.lower() in PLY:
        ply.write(surface, path)
    elif path.suffix.lower() in GEOTIFF:
        geotiff.write(surface, path, options.units)
    else:
        _draw(surface, drawn, path, title, options)


def _draw(surface, drawn, path, title, options):
    from cmanp_ros.plots import picture

    facts = ' · '.join([*drawn.facts, f'cells of {_plain(surface.grid.resolution)} m'])
    coverage = positions = None
    if drawn.watched is not None:
        coverage = drawn.watched.coverage if drawn.watched.coverage.num_points else None
        positions = drawn.watched.track.positions
    labels = picture.Labels(title, facts, options.units)
    picture.draw(surface, path, labels, coverage, positions, options.hillshade)


def _plain(number):
    """Write three digits of a number without an exponent."""
    return f'{float(f"{number:.3g}"):,.12g}'
