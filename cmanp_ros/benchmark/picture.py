"""Cost against the number of points, on log axes."""

from pathlib import Path

import matplotlib.pyplot as plt

from cmanp_ros.benchmark.measuring import Record
from cmanp_ros.plots.style import ACCENT, BLUE, GRAY, STYLE, head

PANELS = (  # work, title, unit, what is drawn
    (
        'condition',
        'Taking points in',
        'ms per 1,000 points',
        lambda r: r['median_s'] / r['size'] * 1e6,
    ),
    ('condition', 'Peak memory', 'MB', lambda r: (r['peak_bytes'] or 0) / 1e6),
    ('update after', 'Ten points more', 'ms', lambda r: r['median_s'] * 1e3),
)
OURS = {'cmanp': BLUE, 'cmanp tiles': ACCENT}
MARKERS = {'eager': 'v', 'LBANP-style': 's', 'TNP-D-style': 'D', 'sparse GP': '^', 'exact GP': 'x'}


def draw(records: list[Record], path: Path) -> None:
    """
    Draw what was measured against the number of points; nothing where it was not.
    """
    panels = [panel for panel in PANELS if any(r['work'] == panel[0] for r in records)]
    if not panels:
        return
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, len(panels), figsize=(5 * len(panels), 4.2), layout='constrained', squeeze=False
        )
        for panel, (work, title, unit, value) in zip(axes[0], panels, strict=True):
            rows = [r for r in records if r['work'] == work]
            for name in dict.fromkeys(r['implementation'] for r in rows):
                own = [r for r in rows if r['implementation'] == name]
                panel.plot(
                    [r['size'] for r in own],
                    [value(r) for r in own],
                    marker=MARKERS.get(name, 'o'),
                    color=OURS.get(name, GRAY),
                    linewidth=2 if name in OURS else 1,
                    label=name,
                    zorder=3 if name in OURS else 2,
                )
            panel.set(xscale='log', yscale='log', xlabel='points seen')
            head(panel, title, unit)
        axes[0][-1].legend(loc='center left', bbox_to_anchor=(1.0, 0.5))
        figure.savefig(path, dpi=150)
        plt.close(figure)
    print(f'written: {path}')
