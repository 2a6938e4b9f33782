"""How far a long work is: a bar in a terminal, a line now and then elsewhere."""

import sys
import time

LINE_PERIOD_SEC = 2.0


def progress_for(total: int, unit: str):
    """
    Show the progress of a work; a context manager with `show(num_done, num_points)`.

    :param total: number of what is done one by one.
    :param unit: what that is, such as 'messages'.
    """
    if sys.stdout.isatty():
        try:
            return _Bar(total, unit)
        except ModuleNotFoundError:  # rich: lines do as well
            pass
    return _Lines(total, unit)


class _Lines:
    def __init__(self, total, unit):
        self._total, self._unit = total, unit
        self._began = time.monotonic()
        self._due = self._began + LINE_PERIOD_SEC

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def show(self, num_done, num_points=None):
        now = time.monotonic()
        if now < self._due:
            return
        self._due = now + LINE_PERIOD_SEC
        seconds = now - self._began
        text = f'{num_done / self._total:4.0%}  {num_done:,} of {self._total:,} {self._unit}'
        text += _points(num_points, seconds)
        if num_done:
            text += f'  {seconds * (self._total - num_done) / num_done:.0f} s left'
        print(text, flush=True)


class _Bar:
    def __init__(self, total, unit):
        from rich import progress

        self._began = time.monotonic()
        self._progress = progress.Progress(
            progress.BarColumn(),
            progress.TaskProgressColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn(f'{unit}{{task.fields[points]}}'),
            progress.TimeRemainingColumn(),
            progress.TextColumn('left'),
            transient=True,
        )
        self._task = self._progress.add_task('', total=total, points='')

    def __enter__(self):
        self._progress.__enter__()
        return self

    def __exit__(self, *error):
        self._progress.__exit__(*error)

    def show(self, num_done, num_points=None):
        points = _points(num_points, time.monotonic() - self._began)
        self._progress.update(self._task, completed=num_done, points=points)


def _points(num_points, seconds):
    if num_points is None:
        return ''
    return f'  {num_points:,} points  {num_points / max(seconds, 1e-9):,.0f} points/s'
