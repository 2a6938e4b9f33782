"""Draw docs/images/architecture.svg: the way of the data, from messages to what is shown."""

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

OUTPUT = Path(__file__).parent.parent / 'docs' / 'images' / 'architecture.svg'
INK, GRAY, ROS, PLAIN = '#1b1f24', '#5b636c', '#dbeafe', '#dcfce7'
WIDTH, HEIGHT = 1.55, 0.62
BOXES = {  # name: (x, y, what it does, color)
    'sources': (1.0, 3.0, 'type, field, units', ROS),
    'transforms': (3.0, 3.0, 'to the map frame', ROS),
    'admission': (5.0, 3.0, 'thinning, rate', PLAIN),
    'intake': (7.0, 3.0, 'queue, counters', ROS),
    'worker': (7.0, 1.8, 'the one thread', PLAIN),
    'refresher': (9.0, 1.8, 'what answers have', PLAIN),
    'helper': (9.0, 0.6, 'a second process', PLAIN),
    'field': (5.0, 1.8, 'meters, field units', PLAIN),
    'core': (3.0, 1.8, 'tiles: two memories', PLAIN),
    'store': (1.0, 1.8, 'tiles on disk', PLAIN),
    'answers': (5.0, 0.6, 'queries, requests', ROS),
    'displays': (7.0, 0.6, 'grids, markers', ROS),
    'control': (3.0, 0.6, 'save, merge, undo', ROS),
    'status': (1.0, 0.6, 'why nothing comes', ROS),
}
ARROWS = [
    ('sources', 'transforms'),
    ('transforms', 'admission'),
    ('admission', 'intake'),
    ('intake', 'worker'),
    ('worker', 'field'),
    ('field', 'core'),
    ('core', 'store'),
    ('field', 'answers'),
    ('worker', 'displays'),
    ('worker', 'refresher'),
    ('refresher', 'helper'),
    ('control', 'field'),
]
BOTH_WAYS = {('core', 'store'), ('field', 'core'), ('control', 'field'), ('field', 'answers')}
BOTH_WAYS |= {('worker', 'refresher'), ('refresher', 'helper')}
OUTSIDE = [
    (1.0, 3.75, 'points, observations, any message', (0, -1)),
    (5.0, -0.15, '~/prediction, ~/predict', (0, 1)),
    (7.0, -0.15, '~/field, ~/mean, ~/stddev', (0, 1)),
    (3.0, -0.15, '~/save_state, peers', (0, 1)),
    (1.0, -0.15, '~/status, /diagnostics', (0, 1)),
]


def main():
    """Draw boxes and arrows."""
    matplotlib.rcParams['svg.fonttype'] = 'none'
    matplotlib.rcParams['svg.hashsalt'] = 'the same file each time'
    figure = Figure(figsize=(10.4, 4.6))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-0.2, 10.2), ylim=(-0.75, 4.0))
    axes.set_axis_off()
    for name, (x, y, text, color) in BOXES.items():
        corner = (x - WIDTH / 2, y - HEIGHT / 2)
        axes.add_patch(
            FancyBboxPatch(corner, WIDTH, HEIGHT, 'round,pad=0.04', fc=color, ec=GRAY, lw=1)
        )
        axes.text(x, y + 0.12, name, ha='center', va='center', weight='bold', color=INK)
        axes.text(x, y - 0.14, text, ha='center', va='center', size=8, color=GRAY)
    for start, end in ARROWS:
        _arrow(axes, start, end, '<->' if (start, end) in BOTH_WAYS else '->')
    for x, y, text, (_, direction) in OUTSIDE:
        axes.text(x, y, text, ha='center', va='center', size=8.5, color=INK, style='italic')
        box = y + direction * 0.75
        edge = box - direction * (HEIGHT / 2 + 0.05)
        ends = [(x, y + direction * 0.12), (x, edge)]
        axes.annotate('', *(ends if direction > 0 else ends[::-1]), arrowprops=_style('->'))
    legend = 'blue: knows ROS     green: works without ROS     status reads the counters of all'
    axes.text(5.0, -0.6, legend, ha='center', va='center', size=8.5, color=GRAY)
    figure.savefig(OUTPUT, metadata={'Date': None})


def _arrow(axes, start, end, form):
    """Join two boxes at their nearest edges."""
    (x0, y0, *_), (x1, y1, *_) = BOXES[start], BOXES[end]
    if y0 == y1:
        side = 1 if x1 > x0 else -1
        ends = (x0 + side * (WIDTH / 2 + 0.05), y0), (x1 - side * (WIDTH / 2 + 0.05), y1)
    else:
        side = 1 if y1 > y0 else -1
        ends = (x0, y0 + side * (HEIGHT / 2 + 0.05)), (x1, y1 - side * (HEIGHT / 2 + 0.05))
    axes.annotate('', ends[1], ends[0], arrowprops=_style(form))


def _style(form):
    return {'arrowstyle': form, 'color': GRAY, 'lw': 1.3, 'shrinkA': 0, 'shrinkB': 0}


if __name__ == '__main__':
    main()
