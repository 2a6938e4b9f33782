"""
Real fields beside what users would pick: the same points and targets for all, each alone.

Every method runs in a process of its own, all tasks of a setting one after the other, so that its
memory can be told from that of the others.
"""

import gc
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from math import nan
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cmanp_ros.benchmark.measuring import status_bytes
from cmanp_ros.core.errors import CMANPError
from cmanp_ros.evaluation import tracks
from cmanp_ros.evaluation.cache import Cache, Key
from cmanp_ros.evaluation.scores import mean_and_error, score, summary, to_reference
from cmanp_ros.evaluation.tasks import Task
from cmanp_ros.evaluation.windows import STDDEV, windows

STRETCH = 2560  # soundings: some thousand kilometers of tracks
STRETCH_CONTEXT = 256
STRETCH_TARGETS = 500
KM_PER_UNIT = 75.0  # about the units of the windows: their tiles are 27 km here
Row = dict[str, Any]


class Setting(NamedTuple):
    """Tasks that are scored together."""

    kind: str
    """'terrain' or 'soundings'."""
    num_context: int
    noise: float
    """Standard deviation of what was added to terrain; soundings have their own."""
    tasks: list[Task]


def settings(
    num_tasks: int = 30,
    num_contexts: Iterable[int] = (64, 256, 1024),
    noises: Iterable[float] = (0.0,),
    seed: int = 0,
    on_skip: Callable[[str, Exception], None] = lambda what, reason: None,
) -> Iterator[Setting]:
    """
    Make the tasks: windows of terrain, and stretches of soundings.

    :param on_skip: called with what is not there and how to get it.
    """
    try:
        for noise in noises:
            for num_context in num_contexts:
                tasks = list(windows(num_tasks, num_context, seed, noise))
                yield Setting('terrain', num_context, float(noise), tasks)
    except (CMANPError, OSError) as reason:
        on_skip('terrain', reason)
    try:
        x, y = tracks.soundings()
    except OSError as reason:
        on_skip('soundings', reason)
        return
    yield Setting('soundings', STRETCH_CONTEXT, 0.0, list(stretches(x, y, num_tasks, seed)))


def stretches(x, y, num: int, seed: int = 0) -> Iterator[Task]:
    """
    Cut stretches of consecutive soundings: evenly thinned ones are observed, others are targets.

    Soundings that repeat an earlier one are left out first. A unit is 75 km; heights are centered
    and scaled by what is observed to the standard deviation of the windows.

    :param x: (n, 2) [km].
    :param y: (n,) [km].
    :param num: drawn without overlap; fewer if there are not so many.
    """
    is_new = ~tracks.repeats(x, y)
    x, y = x[is_new], y[is_new]
    for number in np.random.default_rng(seed).permutation(len(x) // STRETCH)[:num].tolist():
        rng, start = np.random.default_rng([seed, number]), number * STRETCH
        is_context = np.arange(STRETCH) % (STRETCH // STRETCH_CONTEXT) == 0
        target = rng.permutation(np.flatnonzero(~is_context))[:STRETCH_TARGETS]
        here, height = x[start : start + STRETCH], y[start : start + STRETCH]
        here = (here - here[is_context].mean(0)) / KM_PER_UNIT
        height = (height - height[is_context].mean()) / height[is_context].std() * STDDEV
        yield Task(here[is_context], height[is_context], here[target], height[target])


def evaluate(
    make_methods: Callable[[], dict[str, Callable]],
    all_settings: Iterable[Setting],
    reference: str,
    seed: int = 0,
    cache_dir=None,
    cached: Collection[str] = (),
    num_threads: int = 1,
    on_skip: Callable[[str, Exception], None] = lambda what, reason: None,
) -> Iterator[Row]:
    """
    Score methods, and yield a row for each setting and method.

    Beside the scores, (mean, standard error) over tasks, a row has their difference to the
    reference, task by task, such as 'rmse_to_reference'; 'seconds_fit' and 'seconds_predict' of
    processor time; 'memory_mb', the most that the process took above what it had after a first
    small task (libraries, weights); and 'load', how many others wanted each processor.

    :param make_methods: returns name -> fit, see `real_peers.peers`; called in other processes, so
        it has to be a function of a module, or a `functools.partial` of one.
    :param reference: name of the method that the others are compared with; it runs first.
    :param cache_dir: folder for predictions of those named in `cached`; None: keep none.
    :param on_skip: called with the name of a method that cannot run, and why.
    """
    cache = cache_dir and Cache(cache_dir)
    names = sorted(make_methods(), key=lambda name: name != reference)
    for setting in all_settings:
        compared = None
        for name in names:
            use = cache if name in cached else None
            try:
                found = _predictions(make_methods, name, setting, seed, use, num_threads)
            except CMANPError as reason:
                on_skip(name, reason)
                continue
            scores = [
                score(f['mean'], f['stddev'], task.y_target)
                for f, task in zip(found, setting.tasks, strict=True)
            ]
            compared = scores if name == reference else compared
            yield {
                'study': 'real',
                'kind': setting.kind,
                'num_context': setting.num_context,
                'noise': setting.noise,
                'num_tasks': len(scores),
                'method': name,
                **summary(scores),
                **(to_reference(scores, compared) if compared else {}),
                **{k: mean_and_error([float(f[k]) for f in found]) for k in COSTS},
            }


COSTS = ('seconds_fit', 'seconds_predict', 'memory_mb', 'load')


def _predictions(make_methods, name, setting, seed, cache, num_threads):
    """Return what the method says of each task, from the cache or from a process of its own."""
    kind = f'{setting.kind}-{setting.noise:g}'
    keys = [
        Key('real', seed, setting.num_context, kind, name, i) for i in range(len(setting.tasks))
    ]
    found = [
        cache.load(key, task.y_target) if cache else None
        for key, task in zip(keys, setting.tasks, strict=True)
    ]
    missing = [i for i, stored in enumerate(found) if stored is None]
    if not missing:
        return found
    os.environ['OMP_NUM_THREADS'] = str(num_threads)  # read by libraries when they are loaded
    context = get_context('forkserver')
    context.set_forkserver_preload(['cmanp_ros.evaluation.real_peers'])  # once for all processes
    with ProcessPoolExecutor(1, mp_context=context) as alone:
        alone.submit(_prepare, make_methods, name, num_threads).result()
        for i in missing:
            found[i] = alone.submit(_measure, setting.tasks[i]).result()
            if cache:
                cache.store(keys[i], setting.tasks[i].y_target, **found[i])
    return found


# In the process of the method --------------------------------------------------------------------

_ready: dict[str, Any] = {}


def _prepare(make_methods, name, num_threads):
    """Load what the method needs, and let it do a small task."""
    import torch

    torch.set_num_threads(num_threads)
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (32, 2))
    y = np.sin(3 * x).sum(1) + 0.1 * rng.standard_normal(32)
    _ready['fit'] = make_methods()[name]
    _ready['fit'](x, y)(x[:3])
    gc.collect()
    _ready['memory'] = _megabytes('VmRSS')


def _measure(task: Task) -> dict[str, np.ndarray | float]:
    gc.collect()
    try:
        Path('/proc/self/clear_refs').write_text('5')  # the peak counts from here
        can_tell = True
    except OSError:
        can_tell = False
    start = time.process_time()
    predict = _ready['fit'](task.x, task.y)
    between = time.process_time()
    mean, stddev = predict(task.x_target)
    seconds_predict = time.process_time() - between
    return {
        'mean': np.asarray(mean),
        'stddev': np.asarray(stddev),
        'seconds_fit': between - start,
        'seconds_predict': seconds_predict,
        'memory_mb': max(_megabytes('VmHWM') - _ready['memory'], 0.0) if can_tell else nan,
        'load': os.getloadavg()[0] / (os.cpu_count() or 1),
    }


def _megabytes(entry) -> float:
    """Return an entry of what Linux knows of this process [MB]; NaN elsewhere."""
    try:
        return status_bytes(entry) / 2**20
    except OSError:
        return nan
