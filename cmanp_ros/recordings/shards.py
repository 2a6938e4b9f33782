"""
One map from parts of a recording that are folded elsewhere, on Dask: `Recording.split`.

Each worker loads the model once and folds with one thread; maps are merged as a tree where they
are. Thinning depends on all that came before: where there is some, this process reads ahead, and
gives each part what was admitted until then.
"""

from __future__ import annotations

import copy
import functools
import logging
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple
from uuid import uuid4

import torch

from cmanp_ros.core.errors import CMANPError
from cmanp_ros.field import NeuralField
from cmanp_ros.maps import empty_map
from cmanp_ros.optional import library
from cmanp_ros.parameters import NodeParameters
from cmanp_ros.recordings.folding import Folding, Report
from cmanp_ros.recordings.parts import Span, Thinning
from cmanp_ros.recordings.recording import Recording

PARTS_PER_WORKER = 8  # so that one that takes longer is made up for
MAX_TILES = 10_000_000  # in memory: none is dropped
CHECK_PERIOD_SEC = 0.1
STOP_PERIOD_SEC = 0.5


@dataclass(frozen=True)
class Job:
    """What is folded, and how; the same on each worker."""

    paths: tuple[str, ...]
    """As the workers find them."""
    sources: tuple[str, ...]
    parameters: NodeParameters

    def open(self) -> Recording:
        """Open the files."""
        config = self.model.config
        return Recording(
            self.paths,
            self.sources,
            dim_x=config.dim_x,
            dim_y=config.dim_y,
            parameters=self.parameters,
        )

    def empty(self) -> NeuralField:
        """Make an empty map that drops no tile."""
        return _prepared(self.parameters).empty_like(MAX_TILES)

    @property
    def model(self):
        """The model, loaded once in each process."""
        return _prepared(self.parameters).model


class Part(NamedTuple):
    """A part that was folded."""

    data: bytes
    """The map, as `NeuralField.to_bytes` writes it."""
    report: Report


@contextmanager
def cluster(scheduler: str, timeout_sec: float = 10.0) -> Iterator:
    """
    Connect to Dask.

    :param scheduler: 'processes' (one for each CPU of this machine), or the address of one that
        runs, such as 'tcp://host:8786'.
    :param timeout_sec: [s] to wait for it.
    :return: a client.
    :raises CMANPError: nobody answers there.
    """
    distributed = library('distributed', f'--scheduler {scheduler}')
    local = {
        'threads_per_worker': 1,
        'dashboard_address': None,
        'processes': True,
        'silence_logs': logging.ERROR,
    }
    options = local if scheduler == 'processes' else {'address': scheduler, 'timeout': timeout_sec}
    # Ctrl-C in a terminal reaches each process of it; those that begin here do not mind.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        if scheduler != 'processes':  # a client that finds out itself hangs when it is collected
            distributed.comm.get_address_host_port(scheduler)
        client = distributed.Client(**options, set_as_default=False)
    except (OSError, ValueError, MemoryError) as error:  # another server's bytes, as a length
        raise CMANPError(
            f'--scheduler {scheduler}: {error}; expected processes, or the address of a running '
            'dask scheduler, such as tcp://host:8786'
        ) from error
    finally:
        signal.signal(signal.SIGINT, before)
    with client:
        yield client


class Work:
    """A recording that is folded on the workers of a cluster."""

    def __init__(self, job: Job, recording: Recording, client) -> None:
        """
        Cut the recording into parts.

        :param recording: the job's, opened here.
        :param client: of `cluster`.
        """
        self._job, self._recording, self._client = job, recording, client
        num_workers = max(1, len(client.scheduler_info(n_workers=-1)['workers']))
        self._spans = recording.split(num_workers * PARTS_PER_WORKER)
        self._parts, self._name = [], f'cmanp-stop-{uuid4().hex}'

    @property
    def num_parts(self) -> int:
        """Into how many parts it was cut."""
        return len(self._spans)

    def run(self, stopped: Callable[[], bool] = lambda: False) -> Iterator[int]:
        """
        Fold the parts: an iterator of the number of those that are done.

        :param stopped: whether the parts should end where they are.
        """
        stop = _stop_of(self._name, self._client)
        for span, thinning in self._with_thinning():
            arguments = self._job, self._name, span, thinning
            self._parts.append(self._client.submit(_fold, *arguments, pure=False))
            yield self._num_done()
            if stopped():
                break
        while self._num_done() < len(self._parts):
            if stopped() and not stop.is_set():
                stop.set()
            time.sleep(CHECK_PERIOD_SEC)
            yield self._num_done()

    def result(self) -> tuple[NeuralField, Report]:
        """Merge the maps pair by pair where they are, fetch the last, and add up the reports."""
        parts, submit = self._parts, functools.partial(self._client.submit, _merge, self._job)
        while len(parts) > 1:
            pairs = [parts[n : n + 2] for n in range(0, len(parts), 2)]
            parts = [submit(*pair, pure=False) if len(pair) == 2 else pair[0] for pair in pairs]
        field = self._job.empty()
        if not parts:
            return field, Folding(self._recording, field).report
        data, report = parts[0].result()
        field.merge(field.read(data)[0])
        del field.robots[1:]  # those of the parts, which are nowhere else
        return field, report

    def _num_done(self) -> int:
        return sum(part.done() for part in self._parts)

    def _with_thinning(self) -> Iterator[tuple[Span, Thinning | None]]:
        """Go through the parts, each with what was admitted before it; None without thinning."""
        recording = self._recording
        for span in self._spans:
            yield span, copy.deepcopy(recording.thinning) if recording.is_thinned else None
            if recording.is_thinned and span is not self._spans[-1]:
                for _ in recording.points(span):
                    pass


def _stop_of(name: str, client=None):
    """Return the event that stops the parts of a work, on all workers."""
    return library('distributed', '--scheduler').Event(name, client=client)


def _fold(job: Job, stop_name: str, span: Span, thinning: Thinning | None) -> Part:
    """Fold a part, on a worker, until the end or until it is stopped."""
    stop, due = _stop_of(stop_name), 0.0
    with job.open() as recording:
        recording.thinning = thinning or recording.thinning
        folding = Folding(recording, job.empty())
        for _ in folding.run(span):
            if (now := time.monotonic()) >= due:  # to ask costs a message
                due = now + STOP_PERIOD_SEC
                if stop.is_set():
                    break
        return Part(folding.into.to_bytes(), folding.report)


def _merge(job: Job, one: Part, other: Part) -> Part:
    """Merge two parts, on a worker."""
    report = copy.deepcopy(one.report)
    report.add(other.report)
    field = job.empty()
    for part in (one, other):
        read = field.read(part.data)[0]
        age = report.provenance.newest_stamp - part.report.provenance.newest_stamp
        if read.half_life_sec is not None and age > 0:
            read.forget(age * 1e-9)
        field.merge(read)
    return Part(field.to_bytes(), report)


@functools.lru_cache(maxsize=1)
def _prepared(parameters: NodeParameters) -> NeuralField:
    """Make an empty map whose model others share; the store of the robot is left alone."""
    torch.set_num_threads(parameters.num_threads)
    return empty_map(replace(parameters, store='', undo_window=0.0))
