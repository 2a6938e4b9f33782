"""`cmanp evaluate`: accuracy beside what others would use, and a tile size for recorded data."""

import argparse
import json
from functools import partial
from pathlib import Path

import numpy as np
import torch

from cmanp_ros import parameter_file
from cmanp_ros.checkpoint import load_model
from cmanp_ros.cli import replay
from cmanp_ros.cli.options import MAX_SEED, MAX_THREADS, PICTURES, check_output, number
from cmanp_ros.core.errors import ConfigError, InputError

SEAMS_PICTURE = 'build/seams.png'

STUDIES = {
    'terrain': 'windows of real terrain, beside an exact GP and linear interpolation',
    'robust': 'fields on which the assumptions of a GP fail, beside an exact GP',
    'tracks': '82,970 ship soundings in their order, each predicted before it is folded',
    'gp1d': "the paper's first benchmark, beside an exact GP and the Bayes ceiling",
    'real': 'real terrain and soundings, beside ten methods that users would pick',
    'prior': 'fields of a GP prior and beyond it, beside an exact GP that is told the kernel',
    'seams': 'jumps of the prediction where tiles end, and a picture',
    'tile-size': 'propose a tile size from recorded observations (a table or a bag)',
}
SHOWN = (
    'num_context',
    'noise',
    'kind',
    'kernel',
    'method',
    'rmse',
    'log_likelihood',
    'gap',
    'below_ceiling',
    'joint',
    'joint_below_ceiling',
    'log_likelihood_to_reference',
    'crps',
    'coverage_50',
    'coverage_90',
    'coverage_95',
    'seconds_fit',
    'seconds_predict',
    'memory_mb',
    'state_bytes',
)


def main(arguments) -> int:
    """Print a table, and write it as JSON if asked for."""
    parser = argparse.ArgumentParser(prog='cmanp evaluate', description=__doc__)
    commands = parser.add_subparsers(dest='study', required=True)
    for name, text in STUDIES.items():
        _add_options(commands.add_parser(name, help=text, description=text), name)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    _check_files(options)
    _check_models(options)
    study = {
        'terrain': _terrain,
        'robust': _robust,
        'tracks': _tracks,
        'gp1d': _gp1d,
        'real': _real,
        'prior': _prior,
        'seams': _seams,
        'tile-size': _tile_size,
    }
    return study[options.study](options)


def _add_options(parser, study):
    def add(name, of, default, text, **more):
        text += ' (default: %(default)s)'
        parser.add_argument(name, type=of, default=default, help=text, **more)

    count = number(int, 1)
    if study == 'gp1d':
        text = 'files or names of shipped models (default: those of the benchmark)'
        parser.add_argument('--checkpoint', nargs='+', help=text)
    elif study == 'tile-size':
        text = 'file or name of a shipped model (default: that of the parameters, else field)'
        parser.add_argument('--checkpoint', help=text)
    else:
        add('--checkpoint', str, 'field', 'file or name of a shipped model')
    add('--threads', number(int, 1, MAX_THREADS), 1, 'of the CPU')
    add('--seed', number(int, 0, MAX_SEED), 123 if study == 'prior' else 0, 'of all that is drawn')
    if study == 'tile-size':
        parser.add_argument('file', help='a table or a bag, as for cmanp replay')
        replay.add_source_options(parser)
        return
    if study == 'seams':
        add('--picture', str, SEAMS_PICTURE, 'where to draw the first field')
        return
    parser.add_argument('--json', metavar='FILE', help='also write the rows here')
    if study == 'prior':
        add('--num-tasks', count, 48, 'for each setting')
        add('--num-context', count, [32, 128, 256, 1024], 'observations of a task', nargs='+')
        add('--kind', str, ['prior'], 'of fields: see the study', nargs='+')
        add('--tile-size', float, 0.75, 'the map spans 4')
        return
    if study == 'gp1d':
        add('--num-batches', count, 3000, 'of 16 curves each')
        parser.add_argument('--picture', metavar='FILE', help='also draw fields that are sampled')
        add('--block-size', count, [10], 'targets scored at once', nargs='+')
        return
    add('--cache', str, 'build/evaluation', 'folder for predictions of slow peers')
    if study == 'tracks':
        add('--tile-size', float, 22.5, '[km]')
        parser.add_argument('--limit', type=count, help='only so many soundings (default: all)')
        return
    from cmanp_ros.evaluation.windows import TILE_SIZE

    add('--tile-size', float, TILE_SIZE, 'the window spans 4')
    if study != 'real':
        parser.add_argument('--attention', help='a model without least squares, to stand beside')
    add('--num-tasks', count, 30, 'for each setting')
    contexts = [64, 256] if study == 'robust' else [64, 256, 1024]
    add('--num-context', count, contexts, 'observations of a task', nargs='+')
    if study != 'robust':
        noises = [0.0] if study == 'real' else [0.0, 0.02, 0.1, 0.3]
        add('--noise', number(float, 0), noises, 'stddev of observations', nargs='+')


def _check_files(options):
    """Refuse what could not be written at the end, before hours of work."""
    if getattr(options, 'json', None):
        check_output('--json', Path(options.json))
    if picture := getattr(options, 'picture', None):
        if picture == SEAMS_PICTURE:  # `build` is ours
            Path(picture).parent.mkdir(exist_ok=True)
        check_output('--picture', Path(picture), PICTURES)


def _check_models(options):
    """Refuse models that cannot be scored, before hours of work."""
    for option in ('checkpoint', 'attention'):
        given = getattr(options, option, None) or []
        for name in [given] if isinstance(given, str) else given:
            _check_model(name, options.study)


def _check_model(name, study):
    """Refuse a model of other fields than those of the study."""
    dim_x, like = (1, 'gp1d') if study == 'gp1d' else (2, 'field')
    config = load_model(name).config
    if (config.dim_x, config.dim_y) != (dim_x, 1):
        raise ConfigError(
            f'the model {name} has dim_x {config.dim_x} and dim_y {config.dim_y}; `cmanp evaluate '
            f"{study}` expects {dim_x} and 1, such as '{like}'"
        )


def _terrain(options):
    from cmanp_ros.evaluation import studies

    return _score(studies.terrain, options, noises=options.noise)


def _robust(options):
    from cmanp_ros.evaluation import studies

    return _score(studies.robust, options)


def _score(study, options, **settings):
    from cmanp_ros.evaluation import ours, peers

    methods = ours.for_windows(options.checkpoint, options.tile_size, options.attention)
    rows = study(
        methods | peers.for_windows(),
        options.num_tasks,
        options.num_context,
        seed=options.seed,
        cache_dir=options.cache,
        **settings,
    )
    return _show(rows, options)


def _tracks(options):
    from cmanp_ros.evaluation import ours, peers, studies, tracks

    x, y = tracks.soundings()
    # What a user knows of a sea: depths of some kilometers.
    known = {'tile_size': options.tile_size, 'value_offset': -2.0}
    others = peers.for_stream(x, y)
    rows = studies.tracks(
        {
            'cmanp tiles': ours.stream(options.checkpoint, **known),
            'least squares alone': ours.stream(options.checkpoint, corrected=False, **known),
            **others,
        },
        limit=options.limit,
        cache_dir=options.cache,
        cached=tuple(others),
    )
    return _show(rows, options)


def _gp1d(options):
    from cmanp_ros.checkpoint import shipped_models
    from cmanp_ros.cli.progress import progress_for
    from cmanp_ros.evaluation import gp1d

    names = options.checkpoint or [n for n in shipped_models() if n.startswith('gp1d')]
    blocks = ' '.join(map(str, options.block_size))
    command = (
        f'cmanp evaluate gp1d --checkpoint {" ".join(names)} --num-batches {options.num_batches} '
        f'--seed {options.seed} --block-size {blocks}'
    )
    methods = {'exact GP, hyperparameters known': gp1d.exact_gp, gp1d.CEILING: gp1d.ceiling}
    sizes = {}
    models = {name: load_model(name) for name in names}
    if options.picture:
        joint = {name: model for name, model in models.items() if gp1d.has_joint(model)}
        gp1d.draw_samples(joint, options.picture)
        print(f'picture: {options.picture}')
    for name, model in models.items():
        for block_size in options.block_size if gp1d.has_joint(model) else [None]:
            title = name if block_size is None else f'{name}, blocks of {block_size}'
            methods[title] = gp1d.by_model(model, block_size)
            sizes[title] = model.init_state(1).nbytes
    with progress_for(len(gp1d.KERNELS) * options.num_batches, 'batches') as progress:
        rows = [
            row | {'state_bytes': sizes.get(row['method']), 'command': command}
            for row in gp1d.evaluate(
                methods, num_batches=options.num_batches, seed=options.seed, on_batch=progress.show
            )
        ]
    return _show(rows, options)


def _real(options):
    from importlib.util import find_spec

    from cmanp_ros.cli.progress import progress_for
    from cmanp_ros.evaluation import convcnp, real, real_peers

    recorded = {
        'command': f'cmanp evaluate real --checkpoint {options.checkpoint} --seed {options.seed} '
        f'--threads {options.threads} --tile-size {options.tile_size:g} '
        f'--num-tasks {options.num_tasks} --num-context {" ".join(map(str, options.num_context))} '
        f'--noise {" ".join(f"{noise:g}" for noise in options.noise)}'
    }
    training = {}
    if find_spec('neuralprocesses'):
        with progress_for(convcnp.STEPS, 'training steps of the ConvCNP') as progress:
            network = convcnp.trained(options.cache, on_step=progress.show)
        print(f'ConvCNP: {network.steps:,} steps, {network.seconds / 60:.1f} minutes of one core')
        training = {'training_steps': network.steps, 'training_seconds': network.seconds}
    skipped = set()

    def on_skip(what, reason):
        if what not in skipped:
            print(f'left out: {what}: {reason}')
        skipped.add(what)

    tasks = (options.num_tasks, options.num_context, options.noise, options.seed)
    rows = real.evaluate(
        partial(real_peers.peers, options.checkpoint, options.tile_size, options.cache),
        real.settings(*tasks, on_skip),
        real_peers.REFERENCE,
        options.seed,
        options.cache,
        real_peers.STORED,
        options.threads,
        on_skip,
    )
    return _show(
        (
            row | recorded | (training if row['method'] == real_peers.CONVCNP else {})
            for row in rows
        ),
        options,
    )


def _prior(options):
    from cmanp_ros.cli.progress import progress_for
    from cmanp_ros.evaluation import field_prior

    total = len(options.kind) * len(options.num_context) * options.num_tasks
    with progress_for(total, 'tasks') as progress:
        rows = list(
            field_prior.evaluate(
                field_prior.methods(options.checkpoint, options.tile_size),
                options.num_tasks,
                options.num_context,
                options.kind,
                options.seed,
                progress.show,
            )
        )
    return _show(rows, options)


def _seams(options):
    from cmanp_ros.evaluation import scores, seams

    rows = []
    for index, (kind, field) in enumerate(
        seams.fields(load_model(options.checkpoint), 2, 1024, options.seed)
    ):
        rows.append({'field': kind, **seams.seams(field, -1.9, 1.9)._asdict()})
        if index == 0:
            seams.draw(field, options.picture)
    print('jumps where tiles change: the largest, and the mean of all')
    print(scores.terminal_table([{k: _pair(v) for k, v in row.items()} for row in rows]))
    print(f'picture: {options.picture}')
    return 0


def _shown(row):
    """Return what fits on a line, in columns of one width."""
    shown = {k: row[k] for k in SHOWN if k in row}
    return shown | {'method': f'{row["method"]:<22}'}


def _pair(value):
    return f'{value[0]:.1e} {value[1]:.1e}' if isinstance(value, tuple) else str(value)


def _tile_size(options):
    from cmanp_ros.evaluation import ours, scores, tile_size
    from cmanp_ros.recordings import Recording

    settings = [*options.parameter]
    if options.checkpoint:
        settings.append(f'checkpoint:={json.dumps(options.checkpoint)}')
    parameters = parameter_file.read(options.params_file, settings)
    _check_model(parameters.checkpoint, options.study)
    with Recording(options.file, options.source, parameters=parameters) as recording:
        print(*recording.descriptions, sep='\n', flush=True)
        chunks = list(recording.chunks())
        for line in replay.left_out(recording.losses):
            print(line)
    if not chunks:
        why = replay.why_none(recording.losses)
        raise InputError(f'{options.file}: no point can be used: {why}')
    x, y = (np.concatenate(part) for part in ([c.x for c in chunks], [c.y[:, 0] for c in chunks]))
    offset, scale = parameters.value_offset, parameters.value_scale
    if (offset, scale) == (0.0, 1.0):  # nobody has chosen them
        offset, scale = float(y.mean()), float(y.std()) or 1.0
    make = ours.stream(parameters.checkpoint, 1.0, offset, scale)
    found = tile_size.propose(x, y, make, seed=options.seed)
    print(scores.terminal_table(found.rows))
    print(f'tile_size: {found.tile_size:g}')
    return 0


def _show(rows, options):
    from cmanp_ros.evaluation import scores

    found = []
    for row in rows:
        found.append(row)
        head, values = scores.terminal_table([_shown(row)]).splitlines()
        print(*([head] if len(found) == 1 else []), values, sep='\n', flush=True)
    if options.json:
        Path(options.json).write_text(scores.to_json(found), encoding='utf-8')
        print(f'written: {options.json}')
    return 0
