"""What all pictures have in common: colors, fonts, titles and paths."""

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

HEIGHT_MAP, ERROR_MAP = 'viridis', 'cividis'  # uniform, safe for the color-blind
INK, GRAY, FAINT = '#1b1f24', '#5b636c', '#8a919a'
BLUE, ACCENT, BAND = '#31688e', '#c2410c', '#94a3b8'
DASHES = (0, (4, 2))
STYLE = {
    'font.size': 10,
    'axes.labelcolor': INK,
    'axes.edgecolor': FAINT,
    'axes.linewidth': 0.8,
    'text.color': INK,
    'xtick.color': INK,
    'ytick.color': INK,
    'xtick.labelsize': 9,
    'ytick.labelsize': 9,
    'legend.frameon': True,
    'legend.framealpha': 0.9,
    'legend.edgecolor': 'white',
    'legend.fancybox': False,
    'legend.fontsize': 9,
}


def head(axes: Axes, text: str, subtitle: str) -> None:
    """Head a panel with what it shows and, smaller, in which unit."""
    for words, lift, options in (
        (text, 22, {'fontsize': 12.5, 'fontweight': 'bold'}),
        (subtitle, 7, {'fontsize': 10, 'color': GRAY}),
    ):
        axes.annotate(
            words, (0, 1), (0, lift), 'axes fraction', textcoords='offset points', **options
        )


def draw_path(axes: Axes, x, y, width: float = 1.1) -> None:
    """Draw where something was, readable on any color."""
    casing = [withStroke(linewidth=width + 1.5, foreground=(0, 0, 0, 0.45))]
    axes.plot(x, y, color='white', linewidth=width, path_effects=casing, solid_capstyle='round')


def plain_log_ticks(axis: Axis) -> None:
    """Label a logarithmic axis with plain numbers: 1, 2, 5, 10."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:g}'))
    axis.set_minor_formatter(NullFormatter())
