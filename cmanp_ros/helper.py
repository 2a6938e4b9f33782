"""
A second process, which solves tiles while the node folds and answers: no ROS here.
"""

import os
import subprocess
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cmanp_ros import checkpoint as files
from cmanp_ros.core.errors import CheckpointError, CMANPError
from cmanp_ros.core.lattice import Lattice, OneTile
from cmanp_ros.core.solver import Request, Solver
from cmanp_ros.memory import keep_freed_memory

TIMEOUT_SEC = 10.0  # for a request, which takes a tenth of a second
START_SEC = 120.0  # until the model is loaded, on a slow computer


class HelperError(CMANPError):
    """The second process ended, or does not answer."""


class Helper:
    """
    A `Solver` in a process of its own. It ends with this process, however this one ends.

    Not by `multiprocessing`, which would import the program that runs the node once more.
    """

    def __init__(self, checkpoint: str, weights_hash: str, geometry: Lattice | OneTile):
        """
        Start the process; it is ready some seconds later.

        :param checkpoint: of the model, a name or a path; `weights_hash` of what is in it.
        """
        self._pipe, theirs = Pipe()
        self.process = subprocess.Popen(
            [sys.executable, '-m', 'cmanp_ros.helper', str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env=os.environ | {'PYTHONPATH': os.pathsep.join(sys.path), 'PYTHONSAFEPATH': '1'},
            start_new_session=True,  # a terminal's Ctrl-C is for the node, which ends this
        )
        theirs.close()
        self._thread = ThreadPoolExecutor(1, 'cmanp helper')
        first = checkpoint, weights_hash, geometry
        self.begun = self._thread.submit(self._exchange, first, START_SEC)
        """Done when it is ready; has a `CMANPError` if it never will be."""

    @property
    def is_ready(self) -> bool:
        """Whether it is there, and solves at once."""
        begun = self.begun
        return begun.done() and not begun.cancelled() and begun.exception() is None

    def solve(self, request: Request) -> Future:
        """
        Have a request solved.

        :return: of its `Solution`; has a `HelperError` if the process ended, or does not answer.
        """
        return self._thread.submit(self._exchange, request, TIMEOUT_SEC)

    def close(self):
        """End the process."""
        self.process.kill()
        self._thread.shutdown(cancel_futures=True)
        self._pipe.close()
        self.process.wait()

    def _exchange(self, sent, timeout_sec):
        timer = threading.Timer(timeout_sec, self.process.kill)  # sending may take for ever, too
        timer.start()
        try:
            self._pipe.send(_each(sent, Tensor.numpy))
            found = self._pipe.recv()
        except (EOFError, OSError) as error:
            text = f'the second process ended, or gave no answer within {timeout_sec:g} s'
            raise HelperError(text) from error
        finally:
            timer.cancel()
        if isinstance(found, Exception):
            raise found
        return _each(found, torch.from_numpy)


def _each(value: Any, change) -> Any:
    """Return a value with each tensor or array in its tuples and lists changed."""
    if isinstance(value, (Tensor, np.ndarray)):
        return change(value)
    if not isinstance(value, (list, tuple)):
        return value
    parts = [_each(part, change) for part in value]
    return type(value)(*parts) if hasattr(value, '_fields') else type(value)(parts)


@torch.inference_mode()
def main():
    """Solve what comes until the other end of the pipe is closed; its number is the argument."""
    keep_freed_memory()
    torch.set_num_threads(1)
    pipe = Connection(int(sys.argv[1]))
    try:
        checkpoint, weights_hash, geometry = pipe.recv()
        model = files.load_model(checkpoint)
        is_same = files.weights_hash(model) == weights_hash
        pipe.send(None if is_same else CheckpointError(f'{checkpoint} has other weights by now'))
        solver = Solver(model, geometry)
        while True:
            request = _each(pipe.recv(), torch.from_numpy)
            try:
                found = _each(solver.solve(request), Tensor.numpy)
            except Exception as error:  # it belongs to who asked
                found = error
            pipe.send(found)
    except (EOFError, OSError):  # the node has ended
        return


if __name__ == '__main__':
    main()
