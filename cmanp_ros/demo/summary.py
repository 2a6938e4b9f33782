"""The summary of a run, as a table."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cmanp_ros.demo.drive import Scenario, compression, path_length, winding_path


def print_summary(console: Console, report: Mapping[str, Any], picture: Path) -> None:
    """
    Print what a run showed.

    :param console: where to.
    :param report: of the run.
    :param picture: path of the picture.
    """
    console.print(_before_and_after(report))
    console.print(_facts(report))
    verdict = '[bold red]incomplete[/]' if report['missing'] else '[bold green]complete[/]'
    report_file = picture.with_suffix('.json')
    console.print(
        f'{verdict} in {report["seconds"]["all"]:.0f} s, of which set-up took '
        f'{report["seconds"]["setup"]:.0f} s. Look at: [bold]{picture}[/] ({report_file}, logs '
        f'in {picture.with_suffix("")})',
        highlight=False,
        soft_wrap=True,
    )


def _before_and_after(report):
    """Compare the last measurement with the one before the first observation."""
    table = Table(box=SIMPLE_HEAD)
    table.add_column('over the whole window')
    table.add_column('before any observation', justify='right')
    table.add_column('at the end', justify='right')
    start, end = report['start'], report['end']
    for name, form in (
        ('observations folded', lambda row: f'{row["folded"]:,}'),
        ('state of a tile [bytes]', lambda row: f'{row["tile_bytes"]:,}'),
        ('tiles', lambda row: f'{row["tiles"]:,}'),
        ('RMSE of the mean [m]', lambda row: f'{row["rmse"]:.1f}'),
        ('90 % interval covers [%]', lambda row: f'{100 * row["coverage"]:.0f}'),
        ('log-likelihood [nat]', lambda row: f'{row["log_likelihood"]:.2f}'),
    ):
        table.add_row(escape(name), form(start), form(end))
    return table


def _facts(report):
    """List where everything went."""
    table = Table.grid(padding=(0, 2))
    table.add_column(min_width=24)
    table.add_column()
    observed, answers = report['observations'], report['answers']
    scenario = Scenario(**report['scenario'])
    path = winding_path(scenario.window_m, scenario.num_scans, scenario.seed)
    table.add_row(
        '  drive',
        f'{path_length(path) / 1000:.0f} km in {scenario.duration_sec:g} s; time is compressed: '
        f'{compression(scenario)}',
    )
    rejected = ', '.join(f'{count} {reason}' for reason, count in observed['rejected'].items())
    latency = answers['service_latency_sec']
    for name, place in (('where the rover looked', 'seen'), ('where it did not', 'unseen')):
        if place in report['places']:
            row = report['places'][place]
            table.add_row(
                f'  {name}',
                f'{100 * row["share"]:.0f} % of the window: RMSE {row["rmse"]:.1f} m, predicted '
                f'{row["stddev"]:.1f} m, covers {100 * row["coverage"]:.0f} %',
            )
    table.add_row(
        '  readings',
        f'{observed["published"]:,} published in {observed["published_messages"]:,} messages, '
        f'{observed["not_received"]} lost on the wire: '
        f'{observed["folded"]:,} folded, rejected: {rejected or "none"}; '
        f'{observed["dropped"]} dropped, {observed["unaccounted"]} unaccounted for',
    )
    table.add_row('  folded per second', f'{observed["points_per_second"]:.0f}')
    table.add_row(
        '  predictions',
        f'service {answers["service"]} of {answers["service_asked"]} (median '
        f'{1000 * latency:.0f} ms each), topic {answers["topic"]} of {answers["topic_asked"]}, '
        f'{answers["field"]} maps',
    )
    table.add_row(
        '  held against', 'heights for RMSE; readings with fresh sensor noise for the rest'
    )
    return table
