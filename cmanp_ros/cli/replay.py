"""`cmanp replay`: a map from bags or tables of points, as the node would make it. No ROS here."""

import argparse
import signal
import time
from pathlib import Path

from cmanp_ros import maps, parameter_file
from cmanp_ros.cli.options import check_output
from cmanp_ros.cli.progress import progress_for
from cmanp_ros.core.errors import ConfigError, InputError
from cmanp_ros.recordings import shards
from cmanp_ros.recordings.folding import Folding

FAR = 3.0  # [value_scale] from value_offset: better units are proposed
EPILOG = """examples:
  cmanp replay my_bag --source /lidar/points --params-file my_field.yaml
  cmanp replay survey.mcap --source /base/temperature -p tile_size:=8.0 -p value_offset:=20.0
  cmanp replay soundings.csv --source :depth --out harbor.safetensors

The map is a file that `cmanp plot` draws, the node loads (~/load_state, parameter restore) and
NeuralField.restore reads."""


def main(arguments) -> int:
    """Fold files, save the map and say what became of each point."""
    options = _parser().parse_args(arguments)
    parameters = parameter_file.read(options.params_file, options.parameter)
    job = shards.Job(tuple(options.files), tuple(options.source or ()), parameters)
    out = Path(options.out or f'{Path(options.files[0]).resolve().name.split(".")[0]}.safetensors')
    _check_out(out, options.overwrite)
    with job.open() as recording, _Stop() as stop:
        print(*recording.descriptions, sep='\n', flush=True)
        began = time.monotonic()
        fold = _fold_here if options.scheduler is None else _fold_elsewhere
        field, report, problem = fold(job, recording, options.scheduler, stop)
        seconds = time.monotonic() - began
    print(_summary(field, report, seconds, None if stop.asked else recording.duration_sec))
    if not report.num_folded:
        raise problem or InputError(
            f'no point was folded, and no map is written: {why_none(report.losses)}'
        )
    maps.save(field, out, report.provenance)
    print(f'map          {out} ({out.stat().st_size / 1e6:.1f} MB)')
    if proposal := hint(field, report):
        print(proposal)
    if problem is not None:
        raise problem
    if stop.asked:
        print('stopped before the end: the map has what was folded until then')
    return 130 if stop.asked else 0


def add_source_options(parser):
    """Add the options that say what of a recording is folded, and how."""
    parser.add_argument(
        '--source',
        action='append',
        metavar='TOPIC[:FIELD]',
        help='what to fold; of a table :COLUMN; more than once for several topics',
    )
    parser.add_argument('--params-file', metavar='YAML', help='the parameters of the node')
    parser.add_argument(
        '-p',
        '--parameter',
        action='append',
        default=[],
        metavar='NAME:=VALUE',
        help='one parameter of the node, such as tile_size:=5.0',
    )


def _parser():
    parser = argparse.ArgumentParser(
        prog='cmanp replay',
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        'files',
        nargs='+',
        metavar='FILE',
        help='bags (ROS 2: folder, .mcap, .db3), .csv, .xyz, .las',
    )
    add_source_options(parser)
    parser.add_argument('--out', metavar='MAP', help='default: name of the first file.safetensors')
    parser.add_argument('--overwrite', action='store_true', help='if that is there already')
    parser.add_argument(
        '--scheduler',
        metavar='processes|ADDRESS',
        help='fold in parallel on Dask: processes of this machine, or tcp://host:8786, whose '
        'workers find the files under the same names',
    )
    return parser


def _check_out(out, overwrite):
    """Refuse what could not be written at the end, before all the work."""
    if out.suffix != '.safetensors':
        raise ConfigError(f'--out {out}: expected a name that ends in .safetensors')
    check_output('--out', out)
    if out.exists() and not overwrite:
        raise ConfigError(f'{out} is there already; expected another --out, or --overwrite')


def _fold_here(job, recording, _, stop):
    """Return the map, what became of the points, and what went wrong, if anything did."""
    field, problem = job.empty(), None
    folding = Folding(recording, field)
    report = folding.report
    with progress_for(recording.num_messages, 'messages') as progress:
        try:
            for _ in folding.run():
                progress.show(report.num_read, report.num_folded)
                if stop.asked:
                    break
        except InputError as error:
            problem = error
    return field, report, problem


def _fold_elsewhere(job, recording, scheduler, stop):
    with shards.cluster(scheduler) as client:
        work = shards.Work(job, recording, client)
        with progress_for(work.num_parts, 'parts') as progress:
            for num_done in work.run(lambda: stop.asked):
                progress.show(num_done)
        return *work.result(), None


class _Stop:
    """Ctrl-C ends the work after the message it is in; a second one ends at once."""

    def __init__(self):
        self.asked = False

    def __enter__(self):
        self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_):
        signal.signal(signal.SIGINT, self._before)

    def _ask(self, *_):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


def _summary(field, report, seconds, duration_sec):
    """Say what became of each point and message."""
    lines = [
        f'read         {report.num_read:,} messages',
        f'folded       {report.num_folded:,} points into {field.num_tiles:,} tiles',
        *left_out(report.losses),
    ]
    rate = f'{report.num_folded / seconds:,.0f} points/s' if seconds else ''
    lines.append(f'time         {seconds:.1f} s, {rate}')
    if duration_sec:
        factor = duration_sec / seconds
        lines.append(f'recorded     {duration_sec:.1f} s: {factor:.3g} times real time')
    return '\n'.join(lines)


def left_out(losses) -> list[str]:
    """Say what of a recording was left out, and why, line by line."""
    lines = []
    for what, counts in (('points', losses.points), ('messages', losses.messages)):
        for reason, number in sorted(counts.items()):
            lines.append(f'left out     {number:,} {what} ({reason})')
    return lines + [f'  [{reason}] {text}' for reason, text in sorted(losses.problems.items())]


def why_none(losses) -> str:
    """Say why no point is left of a recording, below the lines of `left_out`."""
    return 'see above why' if left_out(losses) else 'the recording has none'


def hint(field, report):
    """Propose units where those given are far from the values; empty where they are not."""
    n, (mean, *_), (stddev, *_) = field.normalization, report.mean, report.stddev
    if not report.num_folded or (abs(mean) < FAR and 1 / (10 * FAR) < stddev < FAR):
        return ''
    offset, scale = n.value_offset + mean * n.value_scale, stddev * n.value_scale
    if not scale:  # one value says nothing of how far others deviate
        better = f'hint         all are {offset:.4g}: better with -p value_offset:={offset:.4g}'
        return '' if abs(mean) < FAR else better
    return (
        f'hint         values are {offset:.4g} +- {scale:.3g}, far from value_offset '
        f'{n.value_offset:g} and value_scale {n.value_scale:g}: the map gets better with\n'
        f'             -p value_offset:={offset:.4g} -p value_scale:={scale:.3g}'
    )
