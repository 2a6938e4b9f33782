"""
Write docs/accuracy.md, and the table of README.md, from what `cmanp evaluate --json` wrote.

Run it after new figures were recorded in docs/accuracy/; a test compares the pages with them.
"""

import json
from pathlib import Path

from cmanp_ros.evaluation.scores import markdown_table

ROOT = Path(__file__).parent.parent
FIGURES = ROOT / 'docs' / 'accuracy'
BEGIN, END = '<!-- accuracy: made by scripts/write_accuracy.py -->', '<!-- end of accuracy -->'
NAMES = {'rmse': 'RMSE', 'log_likelihood': 'log-likelihood', 'coverage_90': '90 % covers'}
PAGE = """# Accuracy

Made by `scripts/write_accuracy.py` from the files in `docs/accuracy/`, which the commands below
wrote: mean ± standard error over tasks. Nothing was tuned on these tasks; tuning was done on
synthetic fields and on windows of `topobathy.npz` (matplotlib).

## Real terrain

    cmanp evaluate terrain --json docs/accuracy/terrain.json

30 windows of 64 x 64 cells of the Jacksboro fault model (matplotlib), seed 0, scaled to a standard
deviation of 0.65; as many cells observed as the first column says, up to 1,000 others asked for;
observation noise added to both. One tile size and one set of weights for all. The exact GP is
fitted to each window: Matern-3/2 or -5/2, two starts, the best by evidence.

{terrain}

## Where the assumptions of a Gaussian process fail

    cmanp evaluate robust --num-tasks 100 --json docs/accuracy/robust.json

Synthetic fields (`cmanp_ros/evaluation/robust.py`): 5 % of the readings off by 8 sigma; a step
edge; noise that varies tenfold over the map; and none of these, as a control.

{robust}

## Along real tracks

    cmanp evaluate tracks --json docs/accuracy/tracks.json

82,970 ship soundings off Baja California in their order, each 100 predicted before they are
folded [km]. All peers are given mean, variance and hyperparameters fitted in hindsight to the
whole of it; `cmanp tiles` is given tiles of 20 km, and -2 ± 1 km.

{tracks}
"""


def rows(study: str) -> list[dict]:
    """Return recorded rows, ready for a table."""
    recorded = json.loads((FIGURES / f'{study}.json').read_text(encoding='utf-8'))
    columns = ('noise', 'kind', 'num_context', 'method', *NAMES)
    chosen = [{c: row[c] for c in columns if c in row} for row in recorded]
    if study == 'tracks':
        for row, whole in zip(chosen, recorded, strict=True):
            row.pop('num_context')
            row['seconds in all'] = whole['seconds_observe'] + whole['seconds_predict']
    return [{NAMES.get(k, k.replace('num_context', 'N')): v for k, v in r.items()} for r in chosen]


def page() -> str:
    """Return docs/accuracy.md."""
    tables = {study: markdown_table(rows(study)) for study in ('terrain', 'robust', 'tracks')}
    return PAGE.format(**tables)


def readme_table() -> str:
    """Return the table of README.md: terrain, without added noise."""
    kept = [
        {k: v for k, v in row.items() if k != 'noise'}
        for row in rows('terrain')
        if row['noise'] == 0 and row['method'] in ('cmanp tiles', 'exact GP')
    ]
    return markdown_table(kept)


def main():
    """Write both pages."""
    (ROOT / 'docs' / 'accuracy.md').write_text(page(), encoding='utf-8')
    path = ROOT / 'README.md'
    before, rest = path.read_text(encoding='utf-8').split(BEGIN)
    after = rest.split(END)[1]
    path.write_text(f'{before}{BEGIN}\n\n{readme_table()}\n\n{END}{after}', encoding='utf-8')


if __name__ == '__main__':
    main()
