"""The picture of a map: mean and standard deviation side by side, and whether the bars hold."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LightSource, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter

from cmanp_ros.plots.raster import Raster
from cmanp_ros.plots.style import (
    ACCENT,
    BLUE,
    ERROR_MAP,
    FAINT,
    GRAY,
    HEIGHT_MAP,
    INK,
    STYLE,
    head,
    plain_log_ticks,
)
from cmanp_ros.plots.watching import Coverage

SUFFIXES = ('.png', '.pdf', '.svg')
LONG, WIDE = 4.6, 7.5  # [inch] longer side of a map; width of maps that lie over each other
CHART = 3.5  # [inch] side of the chart beside them
LEFT, RIGHT, TOP, BOTTOM = 0.8, 0.75, 1.5, 0.7  # [inch] margins
BESIDE, BELOW = 1.35, 0.85  # [inch] between panels
ELONGATED = 1.8  # maps that are longer lie over each other
LONGEST = 6.0  # beside a longer or narrower map, more is shown
MANY_DIGITS = 1e5  # on the y axis: written upright, as far east as other numbers
KILOMETERS = 5000.0  # [m] from where on axes count in km
DPI = 100
LOGARITHMIC = 6.0  # ratio of stddev from where on its colors are
UNKNOWN = {'facecolor': '#f3f4f6', 'edgecolor': '#b4bac2', 'hatch': '////', 'linewidth': 0}
DOTS = {'marker': 'o', 'ls': '', 'ms': 2.2, 'mfc': 'white', 'mec': INK, 'mew': 0.3}
CONTRAST = 0.6  # of the hillshade


class Labels(NamedTuple):
    """What the picture says beside numbers."""

    title: str
    facts: str = ''
    """Below the title."""
    units: str = ''
    """Of the field; '': not known."""


def draw(
    raster: Raster,
    path: Path,
    labels: Labels,
    coverage: Coverage | None = None,
    positions: np.ndarray | None = None,
    hillshade: bool = False,
) -> None:
    """
    Draw and save the picture.

    :param path: file to write; its ending chooses the format.
    :param coverage: of observations that were predicted, for the chart beside the maps.
    :param positions: (n, 2) [m] of observations, some of them.
    :param hillshade: light the mean as if it were a height.
    """
    with rc_context(STYLE | {'hatch.linewidth': 0.6}):
        page = _Page(raster, coverage is not None)
        page.headline(labels)
        mean, stddev = page.maps()
        units = f' [{labels.units}]' if labels.units else ''
        _mean(page, mean, raster, units, hillshade)
        _stddev(page, stddev, raster, units)
        if positions is not None:
            stddev.plot(*page.scaled(positions).T, **DOTS)
        page.legend(not raster.known.all(), positions is not None)
        if coverage is not None:
            _coverage(page.chart(), coverage)
        path.parent.mkdir(parents=True, exist_ok=True)
        page.figure.savefig(path, dpi=DPI)


class _Page:
    """Where panels are, in inches from the upper left."""

    def __init__(self, raster, has_chart):
        lower, upper = np.array(raster.grid.origin), raster.grid.upper
        sides = upper - lower
        shown = np.maximum(sides, sides.max() / LONGEST)
        middle = (lower + upper) / 2
        self._limits = np.stack([middle - shown / 2, middle + shown / 2])
        self._is_stacked = shown[0] > ELONGATED * shown[1]
        self._w, self._h = shown * (WIDE / shown[0] if self._is_stacked else LONG / shown.max())
        columns, rows = (1, 2) if self._is_stacked else (2, 1)
        self._right = LEFT + columns * (self._w + BESIDE) - BESIDE
        height = rows * (self._h + BELOW) - BELOW
        self._width, self._height = self._right + RIGHT, TOP + max(height, CHART) + BOTTOM
        if has_chart:
            self._width += CHART + 1.05
        elif not self._is_stacked:
            self._height = TOP + height + BOTTOM
        self._width = max(self._width, 7.0)
        self._unit, self._length = (1000.0, 'km') if shown.max() > KILOMETERS else (1.0, 'm')
        self.extent = np.stack([lower, upper], axis=1).reshape(-1) / self._unit
        self.figure = Figure(figsize=(self._width, self._height), facecolor='white')

    def scaled(self, x):
        """Return lengths [m] as the axes count them."""
        return x / self._unit

    def headline(self, labels):
        """Write what it is, and facts."""
        for text, top, options in (
            (labels.title, 0.25, {'fontsize': 18, 'fontweight': 'bold'}),
            (labels.facts, 0.65, {'fontsize': 11, 'color': GRAY}),
        ):
            self.figure.text(LEFT / self._width, 1 - top / self._height, text, va='top', **options)

    def maps(self):
        """Add the panels of the mean and of the stddev."""
        if self._is_stacked:
            places = [(LEFT, TOP), (LEFT, TOP + self._h + BELOW)]
        else:
            places = [(LEFT, TOP), (LEFT + self._w + BESIDE, TOP)]
        panels = [self._panel(*place, self._w, self._h) for place in places]
        for axes in panels:
            axes.set_aspect('equal')
            axes.patch.set(**UNKNOWN)
            (left, bottom), (right, top) = self.scaled(self._limits)
            axes.set(xlim=(left, right), ylim=(bottom, top))
            for axis, length in ((axes.xaxis, self._w), (axes.yaxis, self._h)):
                axis.set_major_locator(
                    MaxNLocator(max(2, int(length / 0.85)), steps=[1, 2, 5, 10])
                )
            axes.ticklabel_format(useOffset=False, style='plain')
            if self.scaled(np.abs(self._limits[:, 1]).max()) >= MANY_DIGITS:  # or 'y' is cut off
                axes.tick_params(axis='y', labelrotation=90)
                for label in axes.get_yticklabels():
                    label.set_verticalalignment('center')
        panels[0].set_ylabel(f'y [{self._length}]')
        panels[1].set_xlabel(f'x [{self._length}]')
        if self._is_stacked:
            panels[1].set_ylabel(f'y [{self._length}]')
            panels[0].tick_params(labelbottom=False)
        else:
            panels[0].set_xlabel(f'x [{self._length}]')
            panels[1].tick_params(labelleft=False)
        return panels

    def chart(self):
        """Add the panel right of the maps."""
        return self._panel(self._right + RIGHT + 0.75, TOP, CHART, CHART)

    def colorbar(self, axes, mappable, **options):
        """Put a slim color scale right of a panel."""
        box = axes.get_position()
        place = [box.x1 + 0.09 / self._width, box.y0, 0.14 / self._width, box.height]
        bar = self.figure.colorbar(mappable, cax=self.figure.add_axes(place), **options)
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=3)
        return bar

    def legend(self, has_unknown, has_dots):
        """Say what hatches and dots are, at the lower left."""
        handles = [Patch(label='nothing observed there', **UNKNOWN)] if has_unknown else []
        if has_dots:
            handles.append(Line2D([], [], label='some of the observations', **DOTS | {'ms': 4}))
        place = LEFT / self._width, 0.08 / self._height
        self.figure.legend(
            handles=handles,
            loc='lower left',
            bbox_to_anchor=place,
            ncols=2,
            borderpad=0,
            borderaxespad=0,
        )

    def _panel(self, left, top, width, height):
        place = [left, self._height - top - height, width, height]
        sizes = [self._width, self._height, self._width, self._height]
        return self.figure.add_axes(np.divide(place, sizes))


def _mean(page, axes, raster, units, hillshade):
    head(
        axes,
        'Mean',
        f'predicted value{units}' + (', lit from the north-west' if hillshade else ''),
    )
    norm, extend = _range(raster.mean, Normalize)
    scale = ScalarMappable(norm, HEIGHT_MAP)
    colors = scale.to_rgba(np.nan_to_num(raster.mean, nan=float(norm.vmin)))
    if hillshade:
        colors[..., :3] = _lit(raster, colors[..., :3])
    colors[..., 3] = raster.known
    _show(page, axes, colors)
    page.colorbar(axes, scale, extend=extend)


def _stddev(page, axes, raster, units):
    least, most = np.nanpercentile(raster.stddev, (0.5, 99.5))
    is_log = most > LOGARITHMIC * least
    norm, extend = _range(raster.stddev, LogNorm if is_log else Normalize)
    what = f'of an observation{units}' + (', logarithmic colors' if is_log else '')
    head(axes, 'Standard deviation', what)
    image = _show(page, axes, raster.stddev, cmap=ERROR_MAP, norm=norm)
    bar = page.colorbar(axes, image, extend=extend)
    if is_log:
        plain_log_ticks(bar.ax.yaxis)


def _range(values, make_norm):
    """Return a scale that a few extreme cells do not stretch, and at which ends it is cut."""
    known = values[np.isfinite(values)]
    low, high = np.percentile(known, (0.5, 99.5)).astype(float)
    if not low < high:
        low, high = low - 0.5 * abs(low or 1.0), high + 0.5 * abs(high or 1.0)
    ends = (known.min() < low - 0.05 * (high - low)), (known.max() > high + 0.05 * (high - low))
    extend = {(0, 0): 'neither', (1, 0): 'min', (0, 1): 'max', (1, 1): 'both'}[ends]
    return make_norm(low, high, clip=True), extend


def _show(page, axes, values, **options):
    pixels = DPI * LONG
    fine = max(values.shape[:2]) > pixels
    return axes.imshow(
        values,
        origin='lower',
        extent=page.extent,
        interpolation='auto' if fine else 'nearest',
        **options,
    )


def _lit(raster, colors):
    """Shade colors (height, width, 3) by the slope, exaggerated until it can be seen."""
    slopes = [slope / raster.grid.resolution for slope in np.gradient(raster.mean)]
    steep = np.nanpercentile(np.hypot(*slopes), 90) if np.isfinite(slopes).any() else 0.0
    south, west = (-slope / max(float(steep), 1e-12) for slope in slopes)
    normal = np.stack([west, south, np.ones_like(west)], axis=-1)
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
    light = LightSource(azdeg=315, altdeg=45)
    shade = normal @ light.direction
    # Flat is 0.5, which changes no color: those of the scale beside it stay true.
    shade = np.nan_to_num(0.5 + CONTRAST * (shade - light.direction[2]), nan=0.5).clip(0, 1)
    return light.blend_soft_light(colors, shade[..., np.newaxis])


def _coverage(axes, coverage):
    """Set how many observations the intervals hold against how many they should."""
    head(axes, 'Do the error bars hold?', coverage.summary)
    levels, shares = coverage.levels, coverage.shares
    axes.plot([0, 1], [0, 1], color=FAINT, lw=1.2)
    axes.fill_between(levels, levels, shares, color=BLUE, alpha=0.15, lw=0)
    axes.plot(levels, shares, color=BLUE, lw=2)
    held = [coverage.share(level) for level in coverage.NAMED]
    axes.plot(coverage.NAMED, held, 'o', ms=9, color=ACCENT, mec='white', mew=1.2, zorder=5)
    for x, y, text, ha, va in (
        (0.04, 0.96, 'bars too wide', 'left', 'top'),
        (0.96, 0.04, 'bars too narrow', 'right', 'bottom'),
    ):
        axes.text(x, y, text, color=GRAY, ha=ha, va=va)
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect='equal')
    axes.set_xlabel('observations that the bars should hold')
    axes.set_ylabel(f'held, of {coverage.num_points:,} that were predicted')
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(color='#e5e7eb', lw=0.8)
    axes.set_axisbelow(True)
