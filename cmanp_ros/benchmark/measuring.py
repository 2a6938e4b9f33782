"""Time and memory of functions: in turn, in one process, on as many threads as were set."""

import ctypes
import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

Record = dict[str, Any]
REPEATS = 9
LIMIT_SEC = 20.0  # for all runs of one function, but two are made in any case


def measure(
    work: str, size: int, functions: Mapping[str, Callable], repeats: int = REPEATS
) -> Iterator[Record]:
    """
    Time functions in turn, so that what slows the machine down meets all of them.

    :param functions: implementation -> what to time; each is called once before.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(repeats):
        for name, function in functions.items():
            if len(times[name]) >= 2 and sum(times[name]) > LIMIT_SEC:
                continue
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    for name, function in functions.items():
        record = {'work': work, 'size': size, 'implementation': name}
        yield record | spread(times[name]) | {'peak_bytes': peak_bytes(function)}


def once(work: str, size: int, name: str, function: Callable) -> Record:
    """Time one call of what takes long, in a copy of this process; its memory likewise."""

    def timed():
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    seconds, peak = apart(timed)
    record = {'work': work, 'size': size, 'implementation': name}
    return record | {'median_s': seconds, 'spread_s': 0.0, 'peak_bytes': peak}


def spread(times: list[float]) -> Record:
    """Return median and distance of the quartiles."""
    quartiles = statistics.quantiles(times, n=4)
    return {'median_s': statistics.median(times), 'spread_s': quartiles[2] - quartiles[0]}


def matrix_product_rate(repeats: int = REPEATS) -> float:
    """Return the rate of float32 matrix products of torch [FLOP/s]."""
    a = torch.randn(1024, 1024)
    (record,) = measure('matrix product', 1024, {'torch': lambda: a @ a}, repeats)
    return 2 * 1024**3 / record['median_s']


def peak_bytes(function: Callable) -> int | None:
    """
    Return the memory that a call takes beyond what the process holds; None where none can tell.
    """
    return apart(lambda: (function(), None)[1])[1]


def apart(function: Callable) -> tuple[Any, int | None]:
    """
    Call a function in a copy of this process, and return what it returned and its peak memory.

    :return: the result, which must be small, and [bytes] or None where Linux does not tell.
    """
    gc.collect()
    context = multiprocessing.get_context('fork')
    ours, theirs = context.Pipe()
    process = context.Process(target=_call, args=(function, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        return ours.recv()
    finally:
        process.join()


def _call(function, pipe):
    torch.set_num_threads(1)  # the threads of the parent are not here
    with torch.inference_mode():
        can_tell = _forget_peak()
        before = status_bytes('VmRSS')
        result = function()
        peak = status_bytes('VmHWM') - before if can_tell else None
    pipe.send((result, peak))


def _forget_peak() -> bool:
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before shall not be used again unseen
        Path('/proc/self/clear_refs').write_text('5')
    except (OSError, AttributeError):
        return False
    return True


def family(process: int) -> list[int]:
    """Return a process and those that it started."""
    found = [process]
    for path in Path(f'/proc/{process}/task').glob('*/children'):
        with suppress(OSError):  # the thread has ended
            found += map(int, path.read_text(encoding='ascii').split())
    return found


def status_bytes(entry: str, process: int | str = 'self') -> int:
    """
    Return an entry of what Linux knows of a process, such as 'VmRSS' [bytes].

    One that has ended, and that nobody has waited for yet, has no memory: 0.
    """
    lines = Path(f'/proc/{process}/status').read_text(encoding='ascii').splitlines()
    return next((int(v.split()[1]) * 1024 for v in lines if v.startswith(f'{entry}:')), 0)
