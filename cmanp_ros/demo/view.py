"""What the run looks like: a live view in a terminal, plain lines elsewhere."""

import time
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from matplotlib import colormaps
from rich.color import Color
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.style import Style
from rich.table import Table
from rich.text import Text

from cmanp_ros.demo.drive import compression
from cmanp_ros.demo.run import CELL_M, Progress
from cmanp_ros.demo.terrain import height_at

BARS = '▁▂▃▄▅▆▇█'
HEIGHT_COLORS, STDDEV_COLORS = colormaps['viridis'], colormaps['cividis']
NUM_MAPS = 3
STDDEV_RANGE_M = (3.0, 200.0)  # of the colors, logarithmic
PLAIN_PERIOD_SEC = 2.0
GAP = 2  # [characters] between maps
NUM_COLORS = 64
REFRESH_HZ = 2


class PlainView:
    """One line now and then."""

    def __init__(self, console: Console) -> None:
        """:param console: to print on."""
        self._console = console
        self._phase, self._due = None, 0.0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def show(self, progress: Progress) -> None:
        """Print a line if there is news and the last one is a while ago."""
        if progress.phase != self._phase:
            self._phase, self._due = progress.phase, time.monotonic() + PLAIN_PERIOD_SEC
            if progress.start is None:
                self._console.print(_headline(progress), soft_wrap=True)
            self._console.print(progress.phase, highlight=False)
        elif progress.series and time.monotonic() >= self._due:
            self._due = time.monotonic() + PLAIN_PERIOD_SEC
            self._console.print(plain_line(progress), highlight=False, soft_wrap=True)


class FullView:
    """A screen that changes: maps, numbers and how they went."""

    def __init__(self, console: Console) -> None:
        """:param console: a terminal."""
        self._console = console
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._shown = None

    def __enter__(self):
        self._live.__enter__()
        return self

    def __exit__(self, *error):
        self._live.__exit__(*error)

    def show(self, progress: Progress) -> None:
        """Draw the screen anew if there is something new."""
        news = progress.phase, len(progress.series), int(progress.drive_sec * REFRESH_HZ)
        if news == self._shown:
            return
        self._shown = news
        self._live.update(screen(progress, *self._console.size), refresh=True)


def view(console: Console, plain: bool):
    """
    Choose the view for a console.

    :param console: where it appears.
    :param plain: no live view even on a terminal.
    :return: context manager with a method `show`.
    """
    return PlainView(console) if plain or not console.is_terminal else FullView(console)


def plain_line(progress: Progress) -> str:
    """Say in one line how the run stands."""
    now = progress.series[-1]
    return (
        f'{progress.drive_sec:5.1f} s  {now["folded"]:6,} observations folded  '
        f'{now["points_per_second"]:4.0f} points/s  {now["tiles"]:4} tiles  '
        f'RMSE {now["rmse"]:5.1f} m  90 % interval covers {100 * now["coverage"]:.0f} %'
    )


def sparkline(values, low: float, high: float, width: int = 30) -> str:
    """
    Draw a series with one character per value.

    :param values: finite numbers, oldest first.
    :param low: value of the lowest bar.
    :param high: value of the highest bar.
    :param width: most characters; longer series are thinned.
    :return: bars.
    """
    values = np.asarray(values, float)
    if len(values) > width:
        values = values[np.linspace(0, len(values) - 1, width).round().astype(int)]
    share = np.clip((values - low) / max(high - low, 1e-9), 0, 1)
    return ''.join(BARS[index] for index in np.rint(share * (len(BARS) - 1)).astype(int))


def screen(progress: Progress, width: int, height: int):
    """
    Lay out the whole view.

    :param progress: what is known.
    :param width: of the terminal [characters].
    :param height: of the terminal [characters].
    :return: renderable.
    """
    width = min(width, 130)
    rows = [_headline(progress), '']
    side = map_side(width, height)
    if side is not None:
        rows += [_maps(progress, side), '']
    rows += [_bar(progress, width), _numbers(progress)]
    title = '[bold]cmanp demo[/]  maps with error bars over ROS 2'
    return Panel(Group(*rows), title=title, title_align='left', width=width, padding=(0, 1))


def map_side(width: int, height: int) -> int | None:
    """
    Return the columns of a map so that three of them and the numbers fit; None if none do.

    :param width: of the view [characters].
    :param height: of the terminal [characters].
    """
    side = min(40, (width - 4 - GAP * NUM_MAPS) // NUM_MAPS, 2 * (height - 16))
    side -= side % 2
    return side if side >= 12 else None


class Maps:
    """
    Grids beside each other, painted with two rows in each line of the terminal.

    Yields segments directly: text with thousands of styles takes rich a tenth of a second.
    """

    def __init__(self, painted: Sequence[np.ndarray], mark=None) -> None:
        """
        Take what `paint` returned.

        :param painted: (side, side, 3) colors each, row 0 in the north.
        :param mark: (x, y) within 0..1 from the lower left, shown as a dot.
        """
        self._painted = np.stack(painted)
        self._mark = mark

    def __rich_console__(self, console, options):
        """Yield the lines from north to south."""
        side, grids, dot = self._painted.shape[1], self._painted.tolist(), None
        if self._mark is not None:
            x, y = np.clip(self._mark, 0, 1 - 1e-9)
            dot = int((1 - y) * side / 2), int(x * side)
        for line in range(side // 2):
            for grid in grids:
                for column, colors in enumerate(zip(*grid[2 * line : 2 * line + 2], strict=True)):
                    is_dot = (line, column) == dot
                    yield Segment('●' if is_dot else '▀', _style(*map(tuple, colors), is_dot))
                yield Segment(' ' * GAP)
            yield Segment.line()


def paint(values: np.ndarray, colors, low: float, high: float, side: int) -> np.ndarray:
    """
    Give the cells of a grid their colors.

    :param values: (rows, columns), row 0 in the south; NaN is black.
    :param colors: matplotlib color map.
    :param low: value of its lower end.
    :param high: value of its upper end.
    :param side: rows and columns of the result.
    :return: (side, side, 3) red, green, blue within 0..255, row 0 in the north.
    """
    values = np.asarray(values, float)
    i, j = (((np.arange(side) + 0.5) * n / side).astype(int) for n in values.shape)
    share = (values[np.ix_(i, j)][::-1] - low) / (high - low)
    rounded = np.rint(np.clip(share, 0, 1) * (NUM_COLORS - 1)) / (NUM_COLORS - 1)
    return (colors(rounded)[..., :3] * 255).astype(int)


@lru_cache(maxsize=2 * NUM_COLORS**2)
def _style(upper, lower, is_dot):
    """Return the style of two cells above each other; few colors, so that most are known."""
    if is_dot:
        return Style(color='bright_white', bgcolor=Color.from_rgb(*upper), bold=True)
    return Style(color=Color.from_rgb(*upper), bgcolor=Color.from_rgb(*lower))


def _headline(progress):
    side = progress.scenario.window_m / 1000
    return Text(
        f'{side:.1f} x {side:.1f} km near the Jacksboro fault, Tennessee; time is compressed: '
        f'{compression(progress.scenario)}; ROS_DOMAIN_ID {progress.domain_id}',
        style='dim',
    )


def _maps(progress, side):
    """Put truth, mean and standard deviation beside each other."""
    half = progress.scenario.window_m / 2
    centers = np.arange(-half + CELL_M / 2, half, CELL_M)
    cells = np.stack(np.meshgrid(centers, centers), axis=-1)
    truth = height_at(progress.terrain, cells.reshape(-1, 2)).reshape(cells.shape[:2])
    low, high = truth.min(), truth.max()
    rover, mark = progress.rover.get('position'), None
    if rover is not None:
        mark = tuple((value / half + 1) / 2 for value in rover)
    unknown = {'mean': np.full_like(truth, np.nan), 'stddev': np.full_like(truth, np.nan)}
    shown = progress.map or unknown
    darkest, brightest = STDDEV_RANGE_M
    titles = Text(no_wrap=True)
    for name, limits in (
        ('truth', f'{low:.0f} to {high:.0f} m'),
        ('predicted mean', f'{low:.0f} to {high:.0f} m'),
        ('standard deviation', f'{darkest:.0f} to {brightest:.0f} m, log'),
    ):
        title = Text.assemble((name[:side], 'bold'), f'  {limits}' if side >= 36 else '')
        title.align('left', side + GAP)
        titles.append_text(title)
    painted = [
        paint(truth, HEIGHT_COLORS, low, high, side),
        paint(shown['mean'], HEIGHT_COLORS, low, high, side),
        paint(
            np.log(np.maximum(shown['stddev'], 1)), STDDEV_COLORS, *np.log(STDDEV_RANGE_M), side
        ),
    ]
    return Group(titles, Maps(painted, mark))


def _bar(progress, width):
    """Show how much of the drive is done."""
    duration = progress.scenario.duration_sec
    done = min(progress.drive_sec, duration)
    table = Table.grid(padding=(0, 1))
    table.add_row(
        ProgressBar(total=duration, completed=done, width=min(40, width - 44)),
        Text(f'{done:4.1f} of {duration:.0f} s', style='bold'),
        Text(progress.phase, style='cyan'),
    )
    return table


def _numbers(progress):
    """Show the numbers and how they went."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style='dim', min_width=19)
    table.add_column()
    start, now = progress.start, (progress.series or [None])[-1]
    if now is None:
        for name in ('observations folded', 'state', 'RMSE', '90 % interval', 'answers', 'node'):
            table.add_row(name, '…')
        return table
    answers, rmse = now['answers'], [row['rmse'] for row in progress.series]
    published = progress.rover.get('points', 0)
    same = 'always' if now['tile_bytes'] == start['tile_bytes'] else 'NO LONGER'
    latency = answers['service_latency_sec']
    table.add_row(
        'observations folded',
        f'[bold]{now["folded"]:,}[/] of {published:,} published, '
        f'{now["points_per_second"]:.0f} points/s',
    )
    table.add_row(
        'state', f'[bold]{now["tiles"]} tiles[/] of {same} {start["tile_bytes"]:,} bytes each'
    )
    table.add_row(
        'RMSE',
        f'[bold green]{rmse[-1]:5.1f} m[/]  [green]{sparkline(rmse, 0, max(rmse))}[/]'
        f'  from {rmse[0]:.0f} m',
    )
    covered = [row['coverage'] for row in progress.series]
    table.add_row(
        '90 % interval',
        f'[bold yellow]{100 * covered[-1]:5.0f} %[/]  [yellow]{sparkline(covered, 0.5, 1)}[/]'
        '  of held-back readings inside',
    )
    table.add_row(
        'answers',
        f'service {answers["service"]}'
        + (f' (median {1000 * latency:.0f} ms)' if latency else '')
        + f', topic {answers["topic"]}, maps {answers["field"]}',
    )
    table.add_row('node', now['message'])
    return table
