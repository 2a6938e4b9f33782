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


def time_of(found: list[dict], work: str, size: int | None = None, name: str = 'cmanp') -> float:
    """Return a median [s]; of the largest size where none is given."""
    same = [r for r in found if r.get('work') == work and r.get('implementation') == name]
    row = max(same, key=lambda r: r['size']) if size is None else _one(same, size)
    return row['median_s']


def _one(rows, size):
    (row,) = (r for r in rows if r['size'] == size)
    return row


def milliseconds(seconds: float) -> str:
    """Write a time with three digits."""
    value = seconds * 1e3
    return f'{value:,.0f} ms' if value >= 100 else f'{value:.3g} ms'


def comparison(found: list[dict], works: tuple[str, ...]) -> str:
    """Return a table: work, size, and for each implementation the median and the ratio to ours."""
    lines = ['| work | size | implementation | median | spread | times ours | peak memory |']
    lines.append('| --- | ---: | --- | ---: | ---: | ---: | ---: |')
    ours = {}
    for row in found:
        if row.get('work') not in works:
            continue
        key = row['work'], row['size']
        ours.setdefault(key, row['median_s'])
        peak = '-' if row['peak_bytes'] is None else f'{row["peak_bytes"] / 1e6:.1f} MB'
        lines.append(
            f'| {row["work"]} | {row["size"]:,} | {row["implementation"]} | '
            f'{milliseconds(row["median_s"])} | {milliseconds(row["spread_s"])} | '
            f'{row["median_s"] / ours[key]:.2f} | {peak} |'
        )
    return '\n'.join(lines)


def conditioning(found: list[dict]) -> str:
    """Return a table of time per 1,000 points, peak memory and size of what is kept."""
    lines = ['| implementation | points | per 1,000 points | peak memory | kept |']
    lines.append('| --- | ---: | ---: | ---: | ---: |')
    for row in found:
        if row.get('work') == 'condition':
            lines.append(
                f'| {row["implementation"]} | {row["size"]:,} | '
                f'{milliseconds(row["median_s"] / row["size"] * 1_000)} | '
                f'{row["peak_bytes"] / 1e6:.1f} MB | {row["state_bytes"] / 1e6:.2f} MB |'
            )
    return '\n'.join(lines)


def node(found: list[dict]) -> str:
    """Return a table of the node over DDS."""
    lines = [
        '| clouds of | clouds folded | dropped | answers | latency, median | 99 % | '
        'age of the map, median | 99 % | grids | cores | idle |',
        '| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |',
    ]
    for row in found:
        if row.get('study') == 'node':
            thinned = ', thinned' if 'thinned' in row['work'] else ''
            times = ('median_s', 'p99_s', 'age_median_s', 'age_p99_s')
            shown = [milliseconds(row[name]) for name in times]
            lines.append(
                f'| {row["size"]:,}{thinned} | {row["messages_folded"]} of {row["clouds"]} | '
                f'{row["messages_dropped"]} | {row["answers"]} of {row["queries"]} | '
                f'{" | ".join(shown)} | {row["grids"]} | {row["cores"]} | {row["cores_idle"]} |'
            )
    return '\n'.join(lines)


def paper_flops(config: CMANPConfig, num_points: int) -> int:
    """Return the multiplications and additions of a fold, without those of exponentials."""
    dim, queries = config.dim_model, config.num_blocks * config.num_latents_per_block
    embed = (config.dim_x + config.dim_y) * dim + (config.embedder_depth - 1) * dim**2
    return 2 * num_points * (embed + 2 * config.num_blocks * dim**2 + 2 * queries * dim)


def values() -> dict[str, str]:
    """Return everything that the page shows."""
    found = records()
    rate = found[0]['matrix_product_flops']
    soaked = records('soak')[1:] if (FIGURES / 'soak.json').is_file() else []
    fold = time_of(found, 'fold', 10_000)
    return {
        'rate': f'{rate / 1e9:.0f}',
        'paper': comparison(found, ('fold', 'fold 10, predict', 'predict')),
        'share': f'{100 * paper_flops(CMANPConfig.paper(2, 1), 10_000) / fold / rate:.0f} %',
        'conditioning': conditioning(found),
        'update': comparison(found, ('update after',)),
        'tiles': comparison(
            [r for r in found if r.get('study') == 'tiles'],
            tuple(dict.fromkeys(r['work'] for r in found[1:] if r['study'] == 'tiles')),
        ),
        'terrain': comparison(found, ('1,024 points in, answers out',)),
        'node': node(found),
        'soak': soak(soaked),
        'before': profile(records('before'), records('after')),
    }


def soak(found: list[dict]) -> str:
    """Return a sentence on the long drive."""
    if not found:
        return 'Not recorded.'
    last = found[-1]
    growth, error = last['growth_bytes_per_min'] / 1e6, last['growth_error'] / 1e6
    return (
        f'{last["seconds"] / 60:.0f} minutes, {last["size"]:,} points folded, '
        f'{last["messages_dropped"]} clouds dropped: resident memory '
        f'{found[len(found) // 5]["peak_bytes"] / 1e6:.0f} MB after a fifth of the time, '
        f'{last["peak_bytes"] / 1e6:.0f} MB at the end, {growth:+.3f} ± {error:.3f} MB per minute '
        'in between.'
    )


def profile(before: list[dict], now: list[dict]) -> str:
    """Return a table of what changed, of two runs of one script one after the other."""
    lines = ['| model | work | size | before | now | times |']
    lines.append('| --- | --- | ---: | ---: | ---: | ---: |')
    for first, last in zip(before, now, strict=True):
        lines.append(
            f'| {first["implementation"]} | {first["work"]} | {first["size"]:,} | '
            f'{milliseconds(first["median_s"])} | {milliseconds(last["median_s"])} | '
            f'{first["median_s"] / last["median_s"]:.1f} |'
        )
    return '\n'.join(lines)


if __name__ == '__main__':
    page = PAGE.format(**values())
    (ROOT / 'docs' / 'performance.md').write_text(page, encoding='utf-8')
