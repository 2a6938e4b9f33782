"""
`cmanp demo`: a simulated rover maps real terrain over ROS 2, watched by an observer.

Three processes that talk only over DDS: the rover publishes what its sensor sees, the node folds
it, and the observer asks for predictions and compares them with the truth.
"""

import argparse
import sys
from pathlib import Path

from cmanp_ros.cli.options import MAX_SEED, PICTURES, number

DESCRIPTION = """\
A simulated rover drives over real terrain (heights around the Jacksboro fault, Tennessee) and
publishes noisy readings of height; the node cmanp folds them into a map with error bars; an
observer asks it for predictions and compares them with the truth. Three processes that talk only
over DDS. The exit status is 0 only if everything that was promised was seen."""
MAX_DOMAIN_ID = 232  # the ports of the next would be beyond 65535: RTPS 2.5, 9.6.2.3
PATH_POINTS = 1000  # of the drawn path, however few scans there were


def main(arguments) -> int:
    """
    Run the demo.

    :return: exit status: 0, or 1 if anything was missing; the reason is printed.
    """
    options = _options(arguments)
    try:
        from cmanp_ros.demo import picture, run, summary, view
    except ImportError as error:
        if error.name not in ('matplotlib', 'rich'):
            raise
        print(f"cmanp demo needs {error.name}: pip install 'cmanp_ros[demo]'", file=sys.stderr)
        return 1
    from rich.console import Console

    from cmanp_ros.demo.drive import Scenario, winding_path
    from cmanp_ros.demo.scores import shortcomings

    console = Console()
    scenario = Scenario(options.seed, options.window, options.duration, options.rate)
    folder = options.output.with_suffix('')
    with view.view(console, options.plain) as shown:
        report = run.run(scenario, folder, options.checkpoint, options.domain_id, shown.show)
    report['missing'] = shortcomings(report)
    run.write_report(report, options.output.with_suffix('.json'))
    path = winding_path(scenario.window_m, PATH_POINTS, scenario.seed)
    picture.draw(run.load_grids(folder / 'grids.npz'), path, report, options.output)
    summary.print_summary(console, report, options.output)
    for reason in report['missing']:
        print(f'cmanp demo: {reason}', file=sys.stderr)
    return 1 if report['missing'] else 0


def _options(arguments):
    """Read and check the options."""
    parser = argparse.ArgumentParser(
        prog='cmanp demo',
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    for name, kind, default, text in (
        ('--duration', number(float, 5, 3600), 30.0, 'length of the drive [s]'),
        ('--rate', number(float, 1, 100), 10.0, 'scans per second [Hz]'),
        ('--window', number(float, 1000, 10000), 3600.0, 'side of the square that is mapped [m]'),
        ('--seed', number(int, 0, MAX_SEED), 6, 'of the place, the path and the noise'),
    ):
        parser.add_argument(
            name, type=kind, default=default, metavar='N', help=f'{text} (default: {default})'
        )
    parser.add_argument(
        '--output',
        type=Path,
        metavar='FILE',
        default=Path('build/demo.png'),
        help='the picture; a report (.json) and a folder with logs go beside it '
        '(default: %(default)s)',
    )
    parser.add_argument('--plain', action='store_true', help='lines instead of the live view')
    parser.add_argument(
        '--checkpoint',
        metavar='MODEL',
        default='field',
        help='model: name of a shipped one or path of a .safetensors file (default: %(default)s)',
    )
    parser.add_argument(
        '--domain-id',
        type=number(int, 0, MAX_DOMAIN_ID),
        metavar='N',
        help='ROS_DOMAIN_ID, to look in with RViz or ros2 topic from this machine (default: one '
        'that is free)',
    )
    options = parser.parse_args(arguments)
    if options.output.suffix.lower() not in PICTURES:
        parser.error(f'--output {options.output}: expected a name that ends in .png, .pdf or .svg')
    return options
