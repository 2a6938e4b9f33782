"""The picture of a run: what was there, what was predicted, and whether the error bars hold."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LightSource, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, MultipleLocator

from cmanp_ros.demo.drive import path_length
from cmanp_ros.demo.scores import Z_90, calibration
from cmanp_ros.demo.terrain import Terrain, height_at
from cmanp_ros.plots.style import (
    ACCENT,
    BAND,
    BLUE,
    DASHES,
    ERROR_MAP,
    HEIGHT_MAP,
    INK,
    STYLE,
    draw_path,
    head,
    plain_log_ticks,
)

WIDTH, HEIGHT, SIDE = 16.2, 11.95, 4.15  # [inch] of the figure, and of a panel
LEFT, PITCH, UPPER, LOWER = 0.75, 5.3, 5.85, 0.65  # [inch] where panels are
FINE_M = 15.0  # raster of the shaded maps


def draw(
    grids: Mapping[str, np.ndarray],
    path: np.ndarray,
    report: Mapping[str, Any],
    output: Path,
) -> None:
    """
    Draw and save the picture.

    :param grids: x (rows, columns, 2), heights, readings, mean, stddev (rows, columns) [m].
    :param path: (n, 2) [m] of the rover.
    :param report: of the run.
    :param output: file to write; its ending chooses the format.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, HEIGHT), facecolor='white')
        _headline(figure, path, report)
        truth, mean, stddev = (_axes(figure, column, UPPER) for column in range(3))
        error, calibrated = (_axes(figure, column, LOWER) for column in range(2))
        for axes in (truth, mean, stddev, error):
            _map_axes(axes, grids['x'])
        for axes in (truth, error):
            axes.set_ylabel('north [km]', labelpad=0)
        _heights(figure, truth, mean, grids, path)
        _errors(figure, stddev, error, grids, path)
        _calibration(calibrated, grids)
        gap = 0.45  # [inch] between the two charts of the last panel
        tall, low = 0.56 * (SIDE - gap), 0.44 * (SIDE - gap)
        _history(_axes(figure, 2, LOWER + low + gap, tall), _axes(figure, 2, LOWER, low), report)
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output, dpi=140)


def _axes(figure, column, bottom, height=SIDE) -> Axes:
    """Add a panel; everything in inches."""
    left = LEFT + column * PITCH
    return figure.add_axes([left / WIDTH, bottom / HEIGHT, SIDE / WIDTH, height / HEIGHT])


def _colorbar(figure, axes, mappable, **options):
    """Put a slim color scale right of a panel."""
    box = axes.get_position()
    place = [box.x1 + 0.1 / WIDTH, box.y0, 0.13 / WIDTH, box.height]
    bar = figure.colorbar(mappable, cax=figure.add_axes(place), **options)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=3)
    bar.minorticks_off()


def _headline(figure, path, report):
    """Say what was done and what came out, in words and numbers of this run."""
    scenario, start, end = report['scenario'], report['start'], report['end']
    side = scenario['window_m'] / 1000
    title = (
        f'A map with error bars, from {scenario["duration_sec"]:.0f} seconds of observations '
        'over ROS 2'
    )
    text = (
        f'A simulated rover drives a winding {path_length(path) / 1000:.0f} km over '
        f'{side:.1f} x {side:.1f} km of real terrain, the Jacksboro fault in Tennessee. '
        f'The node folds its {report["observations"]["folded"]:,} noisy readings of height into '
        f'{end["tiles"]} tiles\nof {end["tile_bytes"]:,} bytes each, however many readings they '
        f'hold. The error of the map (RMSE) falls from {start["rmse"]:.0f} m to '
        f'{end["rmse"]:.1f} m; its 90 % intervals cover {100 * end["coverage"]:.0f} % of readings '
        'that were held back.'
    )
    left = LEFT / WIDTH
    figure.text(left, 1 - 0.3 / HEIGHT, title, fontsize=21, fontweight='bold', va='top')
    figure.text(left, 1 - 0.83 / HEIGHT, text, fontsize=11.5, va='top', linespacing=1.6)


def _map_axes(axes: Axes, x):
    """Prepare a map in kilometers."""
    half = min(x[-1, -1].min(), -x[0, 0].max()) / 1000
    axes.set_aspect('equal')
    axes.set_xlim(-half, half)
    axes.set_ylim(-half, half)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MultipleLocator(1.0))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:g}'))
    axes.set_xlabel('east [km]', labelpad=2)


def _heights(figure, truth_axes, mean_axes, grids, path):
    """Show truth and mean alike: one scale of colors, one light, the same contours."""
    heights = grids['heights']
    norm = Normalize(np.floor(heights.min() / 50) * 50, np.ceil(heights.max() / 50) * 50)
    levels = np.arange(norm.vmin, norm.vmax + 1, 50)
    for axes, name, title in (
        (truth_axes, 'heights', 'Truth, which the node never sees'),
        (mean_axes, 'mean', 'Predicted mean, and the path of the rover'),
    ):
        head(axes, title, 'height [m], contours every 50 m')
        fine, extent = _fine(grids['x'], grids[name])
        light = LightSource(azdeg=315, altdeg=45)
        cmap = ScalarMappable(norm, HEIGHT_MAP).get_cmap()
        shaded = light.shade(
            fine, cmap, norm, blend_mode='soft', vert_exag=2, dx=FINE_M, dy=FINE_M
        )
        axes.imshow(shaded, origin='lower', extent=extent, interpolation='bilinear')
        raster = np.linspace(*extent[:2], fine.shape[1]), np.linspace(*extent[2:], fine.shape[0])
        axes.contour(*raster, fine, levels, colors='white', linewidths=0.5, alpha=0.55)
    _draw_path(mean_axes, path, label=True)
    scale = ScalarMappable(norm, HEIGHT_MAP)
    for axes in (truth_axes, mean_axes):
        _colorbar(figure, axes, scale)


def _errors(figure, stddev_axes, error_axes, grids, path):
    """Show the error that was predicted and the error that was made on one scale."""
    error = np.abs(grids['mean'] - grids['heights'])
    top = 10 * np.ceil(np.percentile([grids['stddev'], error], 99) / 10)
    norm = LogNorm(0.8 * grids['stddev'].min(), max(top, 10), clip=True)
    x = grids['x'] / 1000
    low, high = x[0, 0], x[-1, -1]
    half = (high - low) / (np.array(error.shape[::-1]) - 1) / 2  # of a cell
    extent = np.stack([low - half, high + half], axis=-1).reshape(-1)
    for axes, values, title, subtitle in (
        (
            stddev_axes,
            grids['stddev'],
            'Predicted standard deviation',
            'of a reading [m], logarithmic colors',
        ),
        (error_axes, error, 'Error that was made', '|mean - truth| [m], same colors'),
    ):
        head(axes, title, subtitle)
        image = axes.imshow(
            values, ERROR_MAP, norm, origin='lower', extent=extent, interpolation='bilinear'
        )
        ticks = [tick for tick in (1, 2, 5, 10, 20, 50, 100) if norm.vmin <= tick <= norm.vmax]
        _colorbar(figure, axes, image, ticks=ticks, format='{x:g}', extend='both')
        _draw_path(axes, path)


def _draw_path(axes, path, label=False):
    """Draw where the rover was, readable on any color."""
    x, y = path.T / 1000
    draw_path(axes, x, y)
    for place, fill in ((0, 'white'), (-1, ACCENT)):
        axes.plot(x[place], y[place], 'o', ms=6, mfc=fill, mec=INK, mew=1.0, zorder=5)
    if not label:
        return
    for place, word in ((0, 'start'), (-1, 'end')):
        below = y[place] < 0
        axes.annotate(
            word,
            (x[place], y[place]),
            xytext=(0, 9 if below else -9),
            textcoords='offset points',
            ha='left' if x[place] < 0 else 'right',
            va='bottom' if below else 'top',
            fontsize=9.5,
            color='white',
            path_effects=[withStroke(linewidth=2.2, foreground=INK)],
        )


def _calibration(axes, grids):
    """Set every error against the standard deviation predicted for it."""
    stddev = grids['stddev'].reshape(-1)
    error = (grids['mean'] - grids['readings']).reshape(-1)
    head(axes, 'Do the error bars hold?', 'each dot a reading held back from the node')
    low, high = stddev.min() / 1.2, stddev.max() * 1.3
    floor = low / 20
    line = np.array([low, high])
    axes.fill_between(line, Z_90 * line, floor, color=BAND, alpha=0.18, lw=0)
    axes.plot(stddev, np.maximum(np.abs(error), floor), '.', color=BLUE, ms=3.2, alpha=0.35)
    axes.plot(line, Z_90 * line, color=INK, lw=1.0, ls=DASHES)
    axes.plot(line, line, color=INK, lw=1.2)
    axes.plot(*calibration(error, stddev), 'o', ms=8, color=ACCENT, mec='white', mew=1.2, zorder=5)
    axes.set(xscale='log', yscale='log')
    plain_log_ticks(axes.xaxis)
    plain_log_ticks(axes.yaxis)
    axes.set_xlim(low, high)
    top = max(np.abs(error).max(), Z_90 * high)
    axes.set_ylim(floor, top * (top / floor) ** 0.2)  # room for the legend
    axes.set_xlabel('predicted standard deviation [m]')
    axes.set_ylabel('|mean - reading| [m]', labelpad=0)
    handles = [
        Line2D([], [], marker='o', ms=8, color=ACCENT, ls='', mec='white'),
        Line2D([], [], color=INK, lw=1.2),
        Line2D([], [], color=INK, lw=1, ls=DASHES),
    ]
    labels = [
        'RMS of an eighth of the dots',
        'where RMS should lie: 1 stddev',
        f'90 % of dots should lie below: {Z_90:.2f} stddev',
    ]
    axes.legend(handles, labels, loc='upper left', handletextpad=0.7, borderaxespad=0.3)


def _history(error_axes, coverage_axes, report):
    """Show how error and coverage went while observations came in."""
    series = report['series']
    seconds = [row['seconds'] for row in series]
    head(error_axes, 'As observations come in', 'over the whole window')
    error_axes.plot(seconds, [row['rmse'] for row in series], color=BLUE, lw=2)
    error_axes.set_ylabel('RMSE of the mean [m]')
    error_axes.set_ylim(0, None)
    error_axes.tick_params(labelbottom=False)
    coverage_axes.plot(seconds, [100 * row['coverage'] for row in series], color=ACCENT, lw=2)
    coverage_axes.axhline(90, color=INK, lw=1, ls=DASHES)
    coverage_axes.set_ylim(min(50, *(100 * row['coverage'] for row in series)), 100)
    coverage_axes.set_ylabel('in the 90 % interval [%]')
    coverage_axes.set_xlabel('time since the first scan [s]')
    for axes in (error_axes, coverage_axes):
        axes.set_xlim(0, max(seconds[-1], 1))
        axes.grid(color='#e5e7eb', lw=0.8)
        axes.spines[['top', 'right']].set_visible(False)
        axes.set_axisbelow(True)


def _fine(x, values):
    """Interpolate a grid as the terrain itself is, for smooth shading."""
    low, high = x[0, 0], x[-1, -1]
    spacing = (high - low) / (np.array(values.shape[::-1]) - 1)
    axes = [np.arange(a, b, FINE_M) for a, b in zip(low, high, strict=True)]
    raster = np.stack(np.meshgrid(*axes), axis=-1)
    terrain = Terrain(values, tuple(spacing), tuple(low))
    fine = height_at(terrain, raster.reshape(-1, 2)).reshape(raster.shape[:2])
    extent = (axes[0][0], axes[0][-1], axes[1][0], axes[1][-1])
    return fine, tuple(edge / 1000 for edge in extent)
