"""
The studies: each yields rows, one for each method and setting.

A row is a dict with 'study', 'num_context', 'noise' or 'kind', 'method', the scores, how they
compare with those of the exact GP on the same tasks (`scores.to_reference`) where that is among
the methods, and 'seconds' of processor time; scores and seconds are (mean, standard error) over
tasks. Rows of `tracks` are described there.
"""

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from math import nan
from typing import Any

import numpy as np

from cmanp_ros.evaluation import robust as robust_tasks
from cmanp_ros.evaluation import tracks as track_data
from cmanp_ros.evaluation.cache import Cache, Key
from cmanp_ros.evaluation.scores import (
    mean_and_error,
    score,
    stream_summary,
    summary,
    to_reference,
)
from cmanp_ros.evaluation.tasks import Task
from cmanp_ros.evaluation.windows import windows

REFERENCE = 'exact GP'
SLOW = (REFERENCE,)
Row = dict[str, Any]


def one_task(make: Callable) -> Callable:
    """
    Turn a method for streams into one for single tasks, which observes all at once.

    :param make: returns an empty map.
    :return: function (x, y, x_target) -> mean, stddev.
    """

    def predict(x, y, x_target):
        method = make()
        method.observe(x, y)
        return method.predict(x_target)

    return predict


def terrain(
    methods: Mapping[str, Callable],
    num_windows: int = 30,
    num_contexts: Iterable[int] = (64, 256, 1024),
    noises: Iterable[float] = (0.0,),
    seed: int = 0,
    cache_dir=None,
    cached: Collection[str] = SLOW,
) -> Iterator[Row]:
    """
    Score methods on windows of real terrain.

    :param methods: name -> function (x, y, x_target) -> mean, stddev (or None).
    :param cache_dir: folder for predictions of the slow ones; None: keep none.
    :param cached: names of those.
    """
    for noise in noises:
        for num_context in num_contexts:
            tasks = windows(num_windows, num_context, seed, noise)
            head = {'study': 'terrain', 'num_context': num_context, 'noise': float(noise)}
            yield from _score_tasks(head, tasks, methods, seed, cache_dir, cached)


def robust(
    methods: Mapping[str, Callable],
    num_tasks: int = 100,
    num_contexts: Iterable[int] = (64, 256),
    kinds: Iterable[str] = robust_tasks.KINDS,
    seed: int = 0,
    cache_dir=None,
    cached: Collection[str] = SLOW,
) -> Iterator[Row]:
    """
    Score methods on synthetic fields on which the assumptions of a GP fail, and on a control.

    :param methods: as for `terrain`.
    """
    for kind in kinds:
        for num_context in num_contexts:
            tasks = robust_tasks.tasks(kind, num_tasks, num_context, seed)
            head = {'study': 'robust', 'num_context': num_context, 'kind': kind}
            yield from _score_tasks(head, tasks, methods, seed, cache_dir, cached)


def tracks(
    methods: Mapping[str, Callable],
    batch: int = 100,
    limit: int | None = None,
    cache_dir=None,
    cached: Collection[str] = (),
) -> Iterator[Row]:
    """
    Score methods along the tracks of the soundings: each batch is predicted, then folded.

    The error is that of a jackknife over consecutive blocks, see `scores.stream_summary`. Rows
    have 'batch', and 'seconds_observe' and 'seconds_predict' of the whole stream in place of
    'seconds'.

    :param methods: name -> function that makes an empty map; `peers.for_stream` has some.
    :param limit: soundings to use; None: all.
    :return: rows for each method: for all soundings, without those that repeat an earlier one
        exactly (see `tracks.repeats`), and without `tracks.BLUNDER` if it is among them. All are
        predicted and folded in any case.
    """
    x, y = (values[:limit] for values in track_data.soundings())
    cache = cache_dir and Cache(cache_dir)
    chosen = {'all': np.full(len(y), True), 'no repeats': ~track_data.repeats(x, y)}
    if len(y) > track_data.BLUNDER:
        chosen['no blunder'] = np.arange(len(y)) != track_data.BLUNDER
    for name, make in methods.items():
        key = Key('tracks', 0, len(y), f'batch-{batch}', name, 0)
        use = cache if name in cached else None
        found = use.load(key, y) if use else None
        if found is None:
            found = track_data.stream(make(), x, y, batch)._asdict()
            if use:
                use.store(key, y, **found)
        for kind, scored in chosen.items():
            yield {
                'study': 'tracks',
                'num_context': len(y),
                'kind': kind,
                'batch': batch,
                'method': name,
                **stream_summary(found['mean'][scored], found['stddev'][scored], y[scored]),
                'seconds_observe': float(found['seconds_observe']),
                'seconds_predict': float(found['seconds_predict']),
            }


def _score_tasks(head: Row, tasks: Iterable[Task], methods, seed, cache_dir, cached):
    cache = cache_dir and Cache(cache_dir)
    scores, seconds = {name: [] for name in methods}, {name: [] for name in methods}
    setting = head.get('kind', head.get('noise'))
    for index, task in enumerate(tasks):
        for name, predict in methods.items():
            key = Key(head['study'], seed, head['num_context'], setting, name, index)
            found = _predict(predict, task, key, cache if name in cached else None)
            scores[name].append(score(found['mean'], found.get('stddev'), task.y_target))
            seconds[name].append(float(found.get('seconds', nan)))
    reference = scores.get(REFERENCE)
    for name in methods:
        yield {
            **head,
            'method': name,
            **summary(scores[name]),
            **(to_reference(scores[name], reference) if reference else {}),
            'seconds': mean_and_error(seconds[name]),
        }


def _predict(predict, task: Task, key: Key, cache: Cache | None) -> dict[str, np.ndarray]:
    found = cache.load(key, task.y_target) if cache else None
    if found is not None:
        return found
    start = time.process_time()
    mean, stddev = predict(task.x, task.y, task.x_target)
    found = {'mean': mean, 'stddev': stddev, 'seconds': time.process_time() - start}
    found = {name: value for name, value in found.items() if value is not None}
    if cache:
        cache.store(key, task.y_target, **found)
    return found
