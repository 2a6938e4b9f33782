"""The command line `cmanp`: one module for each subcommand, imported when it is called."""

import argparse
import sys
from importlib import import_module

from safetensors import SafetensorError

from cmanp_ros.core.errors import CMANPError

COMMANDS = {
    'demo': 'a simulated rover maps real terrain over ROS 2: a live view and a picture',
    'node': 'run the ROS 2 node (same as the executable cmanp_node)',
    'replay': 'make a map from bags or tables of points, faster than they were recorded',
    'plot': 'draw a map with its error bars from a saved map or a recording: PNG, GeoTIFF, PLY',
    'doctor': 'say why a running node does not map: topics, types, QoS, transforms, clock',
    'view': 'show the map of a running node in a browser',
    'train': 'train a model, or fine-tune it on recorded observations',
    'evaluate': 'score the default model beside a Gaussian process on held-out tasks',
    'bench': 'time folding, encoding and predicting on this machine',
}


def main(arguments=None) -> int:
    """
    Run a subcommand.

    :return: exit status: 0, 1 for a failure that is explained, 2 for a wrong call.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(prog='cmanp', description='Maps with error bars.')
    parser.add_argument(
        'command',
        choices=COMMANDS,
        metavar='command',
        help='; '.join(f'{name}: {text}' for name, text in COMMANDS.items()),
    )
    parser.add_argument('arguments', nargs=argparse.REMAINDER, help='see cmanp COMMAND --help')
    if not arguments or (arguments[0].startswith('-') and arguments[0] not in ('-h', '--help')):
        parser.error(f'expected a command first, one of {", ".join(COMMANDS)}')
    parsed = parser.parse_args(arguments[:1])
    module = import_module(f'cmanp_ros.cli.{parsed.command}')
    try:
        return module.main(arguments[1:]) or 0
    except (CMANPError, OSError, SafetensorError) as error:  # a full disk, a read-only folder
        print(f'cmanp {parsed.command}: {error}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f'cmanp {parsed.command}: stopped', file=sys.stderr)
        return 130
