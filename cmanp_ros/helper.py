"""
A second process, which solves tiles while the node folds and answers: no ROS here.
"""

import multiprocessing
import os
import signal
import threading
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cmanp_ros import checkpoint as files
from cmanp_ros.core.lattice import Lattice, OneTile
from cmanp_ros.core.solver import Request, Solver
from cmanp_ros.memory import keep_freed_memory


class Helper:
    """
    A `Solver` in a process of its own. It ends with this process, however this one ends.
    """

    def __init__(self, checkpoint: str, geometry: Lattice | OneTile):
        """
        Start the process; it is ready some seconds later.

        :param checkpoint: of the model, a name or a path.
        """
        context = multiprocessing.get_context('spawn')
        self._pool = ProcessPoolExecutor(1, context, _begin, (checkpoint, geometry))
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        self._begun = self._pool.submit(os.getpid)  # a terminal's SIGINT is not for the process
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    @property
    def is_ready(self) -> bool:
        """Whether it is there, and solves at once."""
        return self._begun.done() and self._begun.exception() is None

    @property
    def process(self) -> int:
        """Number of the process, once it is ready."""
        return self._begun.result()

    def solve(self, request: Request) -> Future:
        """
        Have a request solved.

        :return: of its `Solution`; has an exception if the process ended.
        """
        future = Future()

        def settle(done):
            if (error := done.exception()) is None:
                future.set_result(_each(done.result(), torch.from_numpy))
            else:
                future.set_exception(error)

        self._pool.submit(_solve, _each(request, Tensor.numpy)).add_done_callback(settle)
        return future

    def close(self):
        """End the process."""
        self._pool.shutdown(cancel_futures=True)


def _begin(checkpoint, geometry):
    """Prepare the process."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    keep_freed_memory()
    torch.set_num_threads(1)
    global _solver
    _solver = Solver(files.load_model(checkpoint), geometry)


def _end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


@torch.inference_mode()
def _solve(request):
    return _each(_solver.solve(_each(request, torch.from_numpy)), Tensor.numpy)


def _each(value: Any, change) -> Any:
    """Return a value with each tensor or array in its tuples and lists changed."""
    if isinstance(value, (Tensor, np.ndarray)):
        return change(value)
    if not isinstance(value, (list, tuple)):
        return value
    parts = [_each(part, change) for part in value]
    return type(value)(*parts) if hasattr(value, '_fields') else type(value)(parts)
