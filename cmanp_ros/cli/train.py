"""
`cmanp train`: train a model from a recipe, on synthetic fields or on recorded observations.

With --data the tasks are cut from your own recordings; a fifth of them is held out in time, and at
the end the model is compared on it with what the training started from.
"""

import argparse
import os
import shlex
import signal
from pathlib import Path

import torch
import yaml

from cmanp_ros import parameter_file
from cmanp_ros.cli import replay
from cmanp_ros.cli.options import MAX_THREADS, number
from cmanp_ros.cli.progress import progress_for
from cmanp_ros.core.errors import ConfigError
from cmanp_ros.recordings import Recording
from cmanp_ros.training import priors, recorded
from cmanp_ros.training.loop import train
from cmanp_ros.training.recipe import WorldPrior, load_recipe, shipped_recipes

OVERRIDES = ('steps', 'batch_size', 'learning_rate', 'seed', 'precision', 'start_from')
STDERRS = 2.0  # of the difference, to say that training helped
EPILOG = """examples:
  cmanp train fine_tune --folder build/tuned --data survey.mcap --source /base/temperature
  cmanp train fine_tune --folder build/tuned --data soundings.csv --source :depth --tile-size 30
  torchrun --nproc-per-node 2 -m cmanp_ros.cli train field --folder build/mine

Ctrl-C stops, and the same command goes on."""


def main(arguments) -> int:
    """
    Train, or go on, and print progress.

    :return: exit status: 0, or 130 if it was stopped before the end.
    """
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    overrides = {name: getattr(options, name) for name in OVERRIDES}
    recipe = load_recipe(options.recipe, **overrides)
    say = print if os.environ.get('RANK', '0') == '0' else lambda *_, **__: None
    folder, draw, facts = Path(options.folder), priors.world_task, None
    _check_folder(folder)
    if options.data:
        draw, facts = _recorded(options, recipe, say)
    else:
        _refuse_options_of_data(options)
        if recipe.start_from is not None:
            say(
                f'goes on from {recipe.start_from} with synthetic fields, which takes hours; for '
                'fields of yours: --data'
            )
    recorded.keep(folder, facts)

    has_begun, stopping, recent = [], [], []

    def stop(*_):
        if not has_begun:  # batches that are made are kept, and there is nothing else to lose
            raise KeyboardInterrupt
        stopping.append(True)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    with progress_for(recipe.steps, 'steps') as progress:

        def on_step(step, loss, validation):
            has_begun.append(True)
            recent.append(loss)
            if say is print:
                progress.show(step)
            if validation is not None:
                mean = sum(recent) / len(recent)
                recent.clear()
                say(
                    f'step {step}: loss {mean:.3f}, on held-out tasks {validation:.3f}', flush=True
                )
            return bool(stopping)

        path = train(
            recipe,
            folder,
            on_step,
            options.workers,
            options.device,
            draw=draw,
            command=shlex.join(['cmanp', 'train', *arguments]),
        )
    if stopping:
        say(f'stopped; the same command goes on: {folder}')
        return 130
    say(f'trained: {path}')
    if facts is not None and say is print:
        _show_gain(recorded.gain(recipe, folder, draw), recipe)
        _show_parameters(path, facts)
    return 0


def _parser():
    parser = argparse.ArgumentParser(
        prog='cmanp train',
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        'recipe', help=f'a YAML file, or the name of a shipped one: {", ".join(shipped_recipes())}'
    )
    add('--folder', required=True, help='of this training: go on if it has begun')
    add('--steps', type=int, help='instead of those in the recipe')
    add('--batch-size', type=int)
    add('--learning-rate', type=float)
    add('--seed', type=int)
    add('--precision', help='of matrix products: float32 or bfloat16')
    add('--start-from', help='a model file or the name of a shipped model')
    add('--threads', type=number(int, 1, MAX_THREADS), default=1, help='default: 1')
    add(
        '--workers',
        type=number(int, 0),
        default=0,
        help='processes that make batches; default: 0, the one that trains makes them',
    )
    add('--device', default='cpu', help='cpu or cuda; default: cpu')
    group = parser.add_argument_group('on recorded observations; sources as for cmanp replay')
    group.add_argument(
        '--data', nargs='+', metavar='FILE', help='bags (ROS 2: folder, .mcap), .csv, .xyz, .las'
    )
    group.add_argument(
        '--tile-size',
        type=float,
        metavar='M',
        help='[m] of the maps to come; default: that of the parameters, or what '
        '`cmanp evaluate tile-size` would propose',
    )
    replay.add_source_options(group)
    return parser


def _check_folder(folder):
    """Refuse a folder that could not be written to, before all the work."""
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    if not os.path.isdir(there) or not os.access(there, os.W_OK | os.X_OK):
        what = 'cannot be written to' if os.path.isdir(there) else 'is no folder'
        raise ConfigError(f'--folder {folder}: {there} {what}; expected a folder, or a new one')


def _refuse_options_of_data(options):
    given = {
        '--tile-size': options.tile_size,
        '--source': options.source,
        '--params-file': options.params_file,
        '-p': options.parameter,
    }
    if names := [name for name, value in given.items() if value not in (None, [])]:
        raise ConfigError(f'{", ".join(names)} without --data: expected the recordings, too')


def _recorded(options, recipe, say):
    """Read the recordings; return what draws their tasks, and what there is to know of them."""
    if not isinstance(recipe.prior, WorldPrior):
        raise ConfigError(
            f'--data with the recipe {options.recipe}, whose prior is maps: expected one with '
            '`prior: {worlds: ...}`, such as fine_tune'
        )
    parameters = parameter_file.read(options.params_file, options.parameter)
    with Recording(
        options.data,
        options.source,
        dim_x=recipe.model.dim_x,
        dim_y=recipe.model.dim_y,
        parameters=parameters,
    ) as recording:
        say(*recording.descriptions, sep='\n', flush=True)
        try:
            x, y, every = recorded.read(recording)
        finally:
            for line in replay.left_out(recording.losses):
                say(line)
    y = y[:, 0]
    say(f'observations {len(y):,}' + (f', one in {every}' if every > 1 else ''))
    recorded.pieces(len(y), recipe.prior.num_target)  # too few: said before all the work
    offset, scale = parameters.value_offset, parameters.value_scale
    if (offset, scale) == (0.0, 1.0):  # nobody has chosen them
        offset, scale = recorded.units(y)
    digest = recorded.fingerprint(x, y)
    earlier = recorded.known(options.folder) or {}
    size = options.tile_size if options.tile_size is not None else parameters.tile_size or None
    if size is None and earlier.get('sha256') == digest:
        size = earlier['tile_size']
    if size is None:
        size = _proposed_size(x, y, recipe, (offset, scale), say)
    worlds = recorded.RecordedWorlds(x, y, size, offset, scale, recipe.prior.num_target)
    num_held_out = sum(stop - start for start, stop in worlds.held_out.pieces)
    say(f'held out     {num_held_out:,} in {len(worlds.held_out.pieces)} blocks of time')
    say(f'units        tiles of {size:g} m, values {offset:g} +- {scale:g}', flush=True)
    facts = {
        'sha256': digest,
        'num_observations': len(y),
        'tile_size': size,
        'value_offset': offset,
        'value_scale': scale,
    }
    return worlds, facts


def _proposed_size(x, y, recipe, units, say):
    from cmanp_ros.evaluation import ours, tile_size

    if recipe.model.dim_x != 2:
        raise ConfigError(
            f'no tile size is given, and for {recipe.model.dim_x} dimensions none can be '
            'proposed: expected --tile-size M'
        )
    say('comparing tile sizes (--tile-size M: none of this)', flush=True)
    make = ours.stream(recipe.start_from or 'field', 1.0, *units)
    return tile_size.propose(x, y, make).tile_size


def _show_gain(gain, recipe):
    start = recipe.start_from or 'the untrained model'
    print(
        f'log-likelihood per held-out target, {gain.num_tasks} tasks: {gain.before:.3f} before '
        f'({start}), {gain.after:.3f} after: {gain.difference:+.3f} +- {gain.stderr:.3f}'
    )
    if gain.difference > STDERRS * gain.stderr:
        print('training helped')
    elif gain.difference < -STDERRS * gain.stderr:
        print(f'training made it worse: keep {start}')
    else:
        print(f'training made no difference that can be told from chance: keep {start}')


def _show_parameters(path, facts):
    names = ('tile_size', 'value_offset', 'value_scale')
    values = {'checkpoint': str(path.resolve())} | {name: float(facts[name]) for name in names}
    file = path.parent / 'parameters.yaml'
    file.write_text(
        yaml.safe_dump({'/**': {'ros__parameters': values}}, sort_keys=False), encoding='utf-8'
    )
    print(f'parameters of the node, for --params-file {file}:')
    print(yaml.safe_dump(values, sort_keys=False), end='')
