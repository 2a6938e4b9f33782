"""Scores of predictions, their mean and standard error over tasks, and tables of them."""

import json
from collections.abc import Iterable, Mapping, Sequence
from math import erf, isfinite, log, nan, pi
from typing import Any, NamedTuple

import numpy as np

from cmanp_ros.core.errors import InputError

Z_90 = 1.6448536269514722  # half width of a normal's central 90 % interval [stddev]
NOT_KNOWN = '-'  # in tables


class Score(NamedTuple):
    """How good the predictions of one task are."""

    rmse: float
    """[field units]."""
    log_likelihood: float
    """Mean log density of the targets [nat]; NaN for a method without stddev."""
    coverage_90: float
    """Share of targets inside the central 90 % interval; NaN for a method without stddev."""
    crps: float = nan
    """
    Mean continuous ranked probability score [field units], the less the better; that of a method
    without stddev is its mean absolute error.
    """


def score(mean, stddev, y) -> Score:
    """
    Compare predictions with what was observed.

    :param mean: (n,) or (n, 1) [field units].
    :param stddev: as mean, noise included; None: the method gives none.
    :param y: as mean.
    :raises InputError: for other shapes, no targets, or a stddev that is not positive.
    """
    mean, y = np.ravel(mean), np.ravel(y)
    sizes = [len(mean), len(y)] if stddev is None else [len(mean), np.size(stddev), len(y)]
    if len(set(sizes)) > 1 or not sizes[0]:
        raise InputError(f'{sizes} numbers to score: expected as many of each, at least one')
    rmse = float(np.sqrt(np.mean((y - mean) ** 2)))
    if stddev is None:
        return Score(rmse, nan, nan, float(np.abs(y - mean).mean()))
    stddev = np.ravel(stddev)
    if not (stddev > 0).all():
        raise InputError(f'the least stddev is {stddev.min()}: expected positive ones')
    z = (y - mean) / stddev
    log_density = -0.5 * (log(2 * pi) + z * z) - np.log(stddev)
    coverage = float(np.mean(np.abs(z) <= Z_90))
    return Score(rmse, float(log_density.mean()), coverage, float(crps(mean, stddev, y).mean()))


def crps(mean, stddev, y) -> np.ndarray:
    """
    Return the continuous ranked probability score of normal distributions, (n,) [field units].

    It is the integral of the squared difference between what was predicted as distribution
    function and the step at what was observed (Gneiting and Raftery 2007, section 4.2).
    """
    z = (np.asarray(y) - mean) / stddev
    two_sided = np.array([erf(value) for value in (z / 2**0.5).ravel().tolist()]).reshape(z.shape)
    density = np.exp(-0.5 * z * z) / (2 * pi) ** 0.5
    return stddev * (z * two_sided + 2 * density - pi**-0.5)


def mean_and_error(values) -> tuple[float, float]:
    """
    Return the mean over tasks and its standard error, NaN for a single task.
    """
    values = np.asarray(values, np.float64)
    error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else nan
    return float(values.mean()), float(error)


def summary(scores: Iterable[Score]) -> dict[str, tuple[float, float]]:
    """
    Return (mean, standard error) over tasks by the name of the score.
    """
    columns = zip(*scores, strict=True)
    return {name: mean_and_error(v) for name, v in zip(Score._fields, columns, strict=True)}


def to_reference(scores: Sequence[Score], reference: Sequence[Score]) -> dict[str, tuple]:
    """
    Compare a method with another one, task by task: what is hard for both cancels.

    :return: (mean, standard error) of the differences by 'rmse_to_reference' and so on; and of
        'rmse_over_reference', the ratio of the mean errors, with the error of a jackknife.
    """
    found = {
        f'{name}_to_reference': mean_and_error(
            [getattr(a, name) - getattr(b, name) for a, b in zip(scores, reference, strict=True)]
        )
        for name in ('rmse', 'log_likelihood', 'crps')
    }
    own, other = (np.array([score.rmse for score in each]) for each in (scores, reference))
    without = (own.sum() - own) / (other.sum() - other) if len(own) > 1 else np.array([nan])
    error = float(without.std() * (len(own) - 1) ** 0.5)
    return found | {'rmse_over_reference': (float(own.sum() / other.sum()), error)}


def stream_summary(mean, stddev, y, num_blocks: int = 20) -> dict[str, tuple[float, float]]:
    """
    Score one long series; neighbors are alike, so the error comes from leaving blocks out.

    :param num_blocks: consecutive blocks of the jackknife, each left out once.
    :return: as `summary`; the means are those over the whole series.
    """
    total = score(mean, stddev, y)
    blocks = np.array_split(np.arange(len(y)), min(num_blocks, len(y)))
    if len(blocks) < 2:
        return {name: (value, nan) for name, value in total._asdict().items()}
    without = []
    for block in blocks:
        mean_, stddev_, y_ = (
            None if v is None else np.delete(np.ravel(v), block) for v in (mean, stddev, y)
        )
        without.append(score(mean_, stddev_, y_))
    spread = np.std(without, axis=0) * (len(blocks) - 1) ** 0.5
    return {
        name: (value, float(error))
        for (name, value), error in zip(total._asdict().items(), spread, strict=True)
    }


# Tables ------------------------------------------------------------------------------------------


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """
    Render rows for a page.

    :param rows: column -> text, number or (mean, standard error).
    """
    columns, cells = _cells(rows)
    lines = [columns, ['---' if _is_text(rows, c) else '---:' for c in columns], *cells]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def terminal_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """
    Render rows for a terminal, in columns of equal width.

    :param rows: as for `markdown_table`.
    """
    columns, cells = _cells(rows)
    lines = [columns, *cells]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    left = [_is_text(rows, column) for column in columns]
    return '\n'.join(
        '  '.join(
            cell.ljust(width) if is_left else cell.rjust(width)
            for cell, width, is_left in zip(line, widths, left, strict=True)
        ).rstrip()
        for line in lines
    )


def to_json(rows: Sequence[Mapping[str, Any]]) -> str:
    """
    Write rows as JSON; what is not known (NaN) becomes null.
    """
    lines = [json.dumps({k: _plain(v) for k, v in row.items()}, allow_nan=False) for row in rows]
    return '[\n' + ',\n'.join(lines) + '\n]\n'


def _plain(value):
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not isfinite(value) else value


def _cells(rows):
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return columns, [[_cell(row.get(column)) for column in columns] for row in rows]


def _cell(value) -> str:
    if isinstance(value, tuple | list):
        mean, error = map(_cell, value)
        return mean if error == NOT_KNOWN else f'{mean} ± {error}'
    if value is None or (isinstance(value, float) and not isfinite(value)):
        return NOT_KNOWN
    return f'{value:.3f}' if isinstance(value, float) else str(value)


def _is_text(rows, column) -> bool:
    return all(isinstance(row.get(column), str | None) for row in rows)
