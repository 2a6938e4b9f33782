"""
Child processes that never outlive the demo, in a ROS domain of their own.

Signals: the terminal's Ctrl-C reaches only the demo (each child has its own session), which then
stops the children in order. If the demo itself is killed, Linux ends them.
"""

import ctypes
import errno
import json
import os
import queue
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path

MAX_DOMAIN_ID = 100
LOCK_PORT = 32768  # as domain_coordinator of ROS has it: tests that use it keep away
MAX_PARTICIPANTS = 120  # of a domain on one machine: the next ports are those of the next domain
STOP_SEC = 5.0
FOREIGN = ('ROS_NAMESPACE', 'ROS_STATIC_PEERS', 'ROS_DISCOVERY_SERVER', 'ROS_LOCALHOST_ONLY')
_PR_SET_PDEATHSIG = 1


class Child:
    """
    One process: lines of JSON come out of it, lines of text go in, the rest goes to its log.

    :ivar name: for messages.
    :ivar log: path of its log.
    """

    def __init__(self, name: str, module: str, arguments: Sequence[str], folder: Path, env: dict):
        """
        Start a Python module.

        :param name: of the process and its log.
        :param module: run as `python -m`.
        :param arguments: of the module.
        :param folder: for the log.
        :param env: its environment.
        """
        self.name, self.log = name, folder / f'{name}.log'
        self._events = queue.SimpleQueue()
        self.log.write_bytes(b'')
        with open(self.log, 'ab') as log:  # the reader appends to it, too
            self.process = subprocess.Popen(
                [sys.executable, '-m', module, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=env,
                start_new_session=True,
                preexec_fn=_end_with_parent(),
            )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def events(self) -> list[dict]:
        """Return what the process has said since the last call."""
        return [self._events.get_nowait() for _ in range(self._events.qsize())]

    def tell(self, line: str) -> None:
        """Send a line; a process that has ended does not mind."""
        try:
            self.process.stdin.write(line.encode() + b'\n')
            self.process.stdin.flush()
        except (BrokenPipeError, ValueError):
            pass

    def ended(self) -> int | None:
        """Return the exit status once the process has ended and all it said was read."""
        status = self.process.poll()
        if status is not None:
            self._reader.join(1.0)
        return status

    def last_lines(self, count: int = 15) -> str:
        """Return the end of the log."""
        with open(self.log, encoding='utf-8', errors='replace') as log:
            return ''.join(deque(log, count)).rstrip()

    def _read(self):
        """Sort the standard output: objects of JSON are events, all else goes to the log."""
        with self.process.stdout as lines, open(self.log, 'ab') as log:
            for line in lines:
                try:
                    event = json.loads(line)
                except ValueError:
                    event = None
                if isinstance(event, dict):
                    self._events.put(event)
                else:
                    log.write(line)
                    log.flush()


def stop(children: Iterable[Child], timeout_sec: float = STOP_SEC) -> list[str]:
    """
    Ask processes to end as Ctrl-C does, and kill those that do not in time.

    :param children: ended ones are left alone.
    :param timeout_sec: [s] for all of them together.
    :return: names of those that had to be killed.
    """
    children = list(children)
    for child in children:
        try:
            child.process.stdin.close()
        except BrokenPipeError:
            pass
        if child.process.poll() is None:
            child.process.send_signal(signal.SIGINT)
    deadline, killed = time.monotonic() + timeout_sec, []
    for child in children:
        try:
            child.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.process.kill()
            child.process.wait()
            killed.append(child.name)
        child.ended()
    return killed


@contextmanager
def own_domain(domain_id: int | None = None):
    """
    Reserve a ROS domain that nothing else on this machine uses.

    :param domain_id: to use this one, used or not.
    :return: context manager that gives the id and holds it.
    :raises OSError: none is free.
    """
    if domain_id is not None:
        yield domain_id
        return
    for candidate in random.sample(range(1, MAX_DOMAIN_ID + 1), MAX_DOMAIN_ID):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as lock:
            try:
                lock.bind(('', LOCK_PORT + candidate))
            except OSError:
                continue
            if _is_silent(candidate):
                yield candidate
                return
    raise OSError(errno.EADDRINUSE, 'every ROS domain of this machine is in use: give one')


def environment(domain_id: int) -> dict[str, str]:
    """
    Return the environment of the children: this machine only, in a domain of their own.

    :param domain_id: ROS_DOMAIN_ID.
    :return: variables.
    """
    env = {name: value for name, value in os.environ.items() if name not in FOREIGN}
    return env | {
        'ROS_DOMAIN_ID': str(domain_id),
        'ROS_AUTOMATIC_DISCOVERY_RANGE': 'LOCALHOST',
        'PYTHONUNBUFFERED': '1',
    }


def _is_silent(domain_id):
    """Tell whether no DDS participant of this machine has a port of its own in a domain."""
    for participant in range(MAX_PARTICIPANTS):  # the first may have left, and others stayed
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.bind(
                    ('', 7400 + 250 * domain_id + 10 + 2 * participant)
                )  # RTPS 2.5, 9.6.2.3
            except OSError:
                return False
    return True


def _end_with_parent():
    """Return a function for the child to call before it starts; None where there is no prctl."""
    if not sys.platform.startswith('linux'):
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    return lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
