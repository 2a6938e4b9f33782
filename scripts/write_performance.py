"""
Write docs/performance.md from what `cmanp bench` wrote.

Run it after new figures were recorded in docs/performance/; a test compares the page with them.
"""

import json
from pathlib import Path

from cmanp_ros.core import CMANPConfig

ROOT = Path(__file__).parent.parent
FIGURES = ROOT / 'docs' / 'performance'
PAGE = (ROOT / 'scripts' / 'performance.md.in').read_text(encoding='utf-8')


def records(name: str = 'bench') -> list[dict]:
    """Return what one run wrote."""
    return json.loads((FIGURES / f'{name}.json').read_text(encoding='utf-8'))


def time_of(found: list[dict], work: str, size: int, name: str) -> float:
    """Return a median [s]."""
    wanted = work, size, name
    (row,) = (r for r in found[1:] if (r['work'], r['size'], r['implementation']) == wanted)
    return row['median_s']


def milliseconds(seconds: float) -> str:
    """Write a time with three digits."""
    value = seconds * 1e3
    return f'{value:,.0f} ms' if value >= 100 else f'{value:.3g} ms'


def table(head: str, rows: list[tuple[str, ...]]) -> str:
    """
    Return a table in Markdown.

    :param head: names of the columns, with bars between; those of numbers begin with '>'.
    """
    names = head.split(' | ')
    rule = ['---:' if name.startswith('>') else '---' for name in names]
    lines = ([name.lstrip('>') for name in names], rule, *rows)
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def megabytes(count: int | None) -> str:
    """Write a size, or that it is not known."""
    return '-' if count is None else f'{count / 1e6:.1f} MB'


def of_study(found: list[dict], study: str) -> list[dict]:
    """Return the records of a study."""
    return [row for row in found if row.get('study') == study]


def comparison(found: list[dict], study: str) -> str:
    """Return a table: work, size, and for each implementation the median and the ratio to ours."""
    rows, ours = [], {}
    for row in of_study(found, study):
        first = ours.setdefault((row['work'], row['size']), row['median_s'])
        times = milliseconds(row['median_s']), milliseconds(row['spread_s'])
        ratio, peak = f'{row["median_s"] / first:.2f}', megabytes(row['peak_bytes'])
        rows.append((row['work'], f'{row["size"]:,}', row['implementation'], *times, ratio, peak))
    head = 'work | >size | implementation | >median | >spread | >times ours | >peak memory'
    return table(head, rows)


def conditioning(found: list[dict]) -> str:
    """Return a table of time per 1,000 points, peak memory and size of what is kept."""
    rows = [
        (
            row['implementation'],
            f'{row["size"]:,}',
            milliseconds(row['median_s'] / row['size'] * 1_000),
            megabytes(row['peak_bytes']),
            f'{row["state_bytes"] / 1e6:.2f} MB',
        )
        for row in of_study(found, 'condition')
    ]
    return table('implementation | >points | >per 1,000 points | >peak memory | >kept', rows)


def node(found: list[dict]) -> str:
    """Return a table of the node over DDS."""
    rows = []
    for row in of_study(found, 'node'):
        thinned = ', thinned' if 'thinned' in row['work'] else ''
        rows.append(
            (
                f'{row["size"]:,}{thinned}',
                f'{row["messages_folded"]} of {row["clouds"]}',
                f'{row["messages_dropped"]}',
                f'{row["answers"]} of {row["queries"]}',
                *(milliseconds(row[k]) for k in ('median_s', 'p99_s')),
                *(milliseconds(row[k]) for k in ('age_median_s', 'age_p99_s')),
                *(f'{row[k]}' for k in ('grids', 'cores', 'cores_idle')),
                megabytes(row['peak_bytes']),
            )
        )
    head = '>clouds of | >clouds folded | >dropped | >answers | >latency, median | >99 % | '
    return table(
        f'{head}>age of the map, median | >99 % | >grids | >cores | >idle | >peak memory', rows
    )


def paper_flops(config: CMANPConfig, num_points: int) -> int:
    """Return the multiplications and additions of a fold, without those of exponentials."""
    dim, queries = config.dim_model, config.num_blocks * config.num_latents_per_block
    embed = (config.dim_x + config.dim_y) * dim + (config.embedder_depth - 1) * dim**2
    return 2 * num_points * (embed + 2 * config.num_blocks * dim**2 + 2 * queries * dim)


def values() -> dict[str, str]:
    """Return everything that the page shows."""
    found = records()
    rate = found[0]['matrix_product_flops']
    fold = time_of(found, 'fold', 10_000, 'cmanp')
    return {
        'rate': f'{rate / 1e9:.0f}',
        'paper': comparison(found, 'paper'),
        'share': f'{100 * paper_flops(CMANPConfig.paper(2, 1), 10_000) / fold / rate:.0f} %',
        'conditioning': conditioning(found),
        'update': comparison(found, 'update'),
        'tiles': comparison(found, 'tiles'),
        'terrain': comparison(found, 'terrain'),
        'node': node(found),
        'soak': soak(records('soak')),
        'before': profile(records('before'), records('after')),
    }


def soak(found: list[dict]) -> str:
    """Return a sentence on the long drive."""
    last = found[-1]
    growth, error = last['growth_bytes_per_min'] / 1e6, last['growth_error'] / 1e6
    return (
        f'{last["seconds"] / 60:.0f} minutes, {last["size"]:,} points folded, '
        f'{last["messages_dropped"]:,} clouds dropped: resident memory '
        f'{found[len(found) // 5]["peak_bytes"] / 1e6:.0f} MB after a fifth of the time, '
        f'{last["peak_bytes"] / 1e6:.0f} MB at the end, {growth:+.3f} ± {error:.3f} MB per minute '
        'in between.'
    )


def profile(before: list[dict], now: list[dict]) -> str:
    """Return a table of what changed, of two runs of one script one after the other."""
    rows = []
    for first, last in zip(before, now, strict=True):
        times = first['median_s'], last['median_s']
        rows.append(
            (
                first['implementation'],
                first['work'],
                f'{first["size"]:,}',
                *map(milliseconds, times),
                f'{times[0] / times[1]:.1f}',
            )
        )
    return table('model | work | >size | >before | >now | >times', rows)


if __name__ == '__main__':
    page = PAGE.format(**values())
    (ROOT / 'docs' / 'performance.md').write_text(page, encoding='utf-8')
