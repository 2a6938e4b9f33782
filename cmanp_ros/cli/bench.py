"""`cmanp bench`: what folding, refreshing and predicting cost here, beside peers."""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from threadpoolctl import threadpool_limits

from cmanp_ros.benchmark import node, soak, studies
from cmanp_ros.benchmark.measuring import REPEATS, Record, matrix_product_rate

QUICK = ('paper', 'tiles', 'terrain', 'condition', 'update', 'node')
STUDIES = studies.STUDIES | {'node': node.over_dds}


def main(arguments) -> int:
    """Print a table of each study, and write records and pictures."""
    parser = argparse.ArgumentParser(
        prog='cmanp bench', description=__doc__, epilog='Takes some 25 minutes for all of them.'
    )
    parser.add_argument(
        'studies',
        nargs='*',
        metavar='STUDY',
        help=f'which: {", ".join(STUDIES)}; default: {" ".join(QUICK)}',
    )
    parser.add_argument('--threads', type=int, default=1, help='default: 1')
    parser.add_argument(
        '--repeats', type=int, default=REPEATS, help='timed runs; the median is shown'
    )
    parser.add_argument('--output', type=Path, default=Path('build/bench.json'))
    parser.add_argument(
        '--soak',
        type=float,
        metavar='MINUTES',
        help='instead: run the node at full rate for so long, and print how its memory grows',
    )
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.studies) - set(STUDIES)):
        parser.error(f'no study {", ".join(unknown)}: expected some of {", ".join(STUDIES)}')
    if options.threads < 1 or options.repeats < 2:
        parser.error(f'--threads {options.threads} --repeats {options.repeats}: at least 1 and 2')
    torch.set_num_threads(options.threads)
    threadpool_limits(options.threads, 'blas')  # numpy's, of the peers
    torch.manual_seed(0)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    if options.soak is not None:
        records = shown(soak.soak(options.soak * 60), 'soak', options)
    else:
        records = compared(options)
    options.output.write_text(json.dumps(records, indent=1), encoding='utf-8')
    print(f'\nwritten: {options.output}')
    return 0


def compared(options) -> list[Record]:
    """Run studies, and draw what they found."""
    rate = matrix_product_rate(options.repeats)
    print(f'{options.threads} threads; float32 matrix product {rate / 1e9:.0f} GFLOP/s')
    records = []
    for name in options.studies or QUICK:
        with torch.inference_mode():
            records += shown(STUDIES[name](options.repeats), name, options)
    try:
        from cmanp_ros.benchmark import picture
    except ImportError as error:
        print(f'no picture: {error}', file=sys.stderr)
    else:
        picture.draw(records, options.output.with_suffix('.png'))
    return [{'matrix_product_flops': rate}, *records]


def shown(records: Iterable[Record], study: str, options) -> list[Record]:
    """Print records as they come: what the first of equal work and size took is the unit."""
    print(f'\n{study}\n{"work":<28}{"size":>9}  {"implementation":<26}', end='')
    print(f'{"median":>12}{"spread":>11}{"ratio":>8}{"peak":>10}')
    found: list[Record] = []
    for record in records:
        record = record | {'study': study, 'threads': options.threads}
        found.append(record)
        print(_line(record, _ratio(record, found)), flush=True)
    return found


def _ratio(record, records):
    same = (r for r in records if (r['work'], r['size']) == (record['work'], record['size']))
    return record['median_s'] / next(same)['median_s']


def _line(record, ratio):
    peak = record.get('peak_bytes')
    memory = '-' if peak is None else f'{peak / 1e6:.1f} MB'
    line = (
        f'{record["work"]:<28}{record["size"]:>9,}  {record["implementation"]:<26}'
        f'{_time(record["median_s"]):>12}{_time(record["spread_s"]):>11}{ratio:>8.2f}{memory:>10}'
    )
    known = ('work', 'size', 'implementation', 'median_s', 'spread_s', 'peak_bytes')
    more = [f'{k} {_number(v)}' for k, v in record.items() if k not in (*known, *OF_RUN)]
    return f'{line}  {", ".join(more)}'.rstrip()


OF_RUN = ('study', 'threads')


def _time(seconds):
    return f'{seconds * 1e3:.3f} ms' if seconds < 0.1 else f'{seconds * 1e3:,.0f} ms'


def _number(value):
    return f'{value:,.3g}' if isinstance(value, float) else f'{value:,}'
