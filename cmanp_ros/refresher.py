"""
Brings answers up to date with what was folded; until they are, says what they have.

    fold -> Refresher -> a little at a time, between questions       -> answers, displays
                      -> or in a second process, while the node folds

What changed is solved in a hurry first, with hyperparameters that tiles had a little earlier, and
exactly once no observations wait: see `NeuralField.refreshing`.
"""

import os

import numpy as np

from cmanp_ros.helper import Helper, HelperError

PATIENCE = 5  # folds in a row after which others wait already


class Refresher:
    """
    Solves the tiles that observations changed and somebody asks for. For the worker's thread.

    Whoever asks meanwhile need not wait: answers have what was solved last. Where observations
    come faster than one process folds and solves them, a second one solves (`max_processes`).
    """

    def __init__(self, node):
        """
        Begin up to date.

        :param node: `CMANPNode`.
        """
        self._node = node
        self._shown = None
        self._changed = []  # locations (n, dim_x) [m] that the helper is not yet solving
        self._changed_until = None  # what answers will have once it has
        self._is_folding = self._is_helped = False
        self._helper, self._may_have_helper = None, _num_cores() > 1
        self._num_late = self._num_resets = 0
        self._exact = 0, 0  # as `exact`, when the last fold began

    @property
    def is_behind(self) -> bool:
        """Whether answers are not yet what all observations in the map give, to rounding."""
        return self._shown is not None or not self._node.fleet.is_settled

    @property
    def shown(self) -> tuple[int, int]:
        """Newest stamp [ns], and number, of the observations that answers have for certain."""
        return self._shown or self._folded

    @property
    def exact(self) -> tuple[int, int]:
        """Newest stamp [ns], and number, of the observations that answers have exactly."""
        return self._exact if self.is_behind else self._folded

    @property
    def _folded(self):
        return self._node.intake.newest_stamp, self._node.fleet.num_observations

    def begin_again(self):
        """Forget what was being solved: the map is another one."""
        self._num_resets += 1
        self._exact = 0, 0
        self._shown, self._changed = None, []
        self._node.fleet.forget_solved()

    def close(self):
        """End the second process."""
        self._may_have_helper = False
        if self._helper is not None:
            self._helper.close()

    def begin_fold(self):
        """Note that observations are being folded."""
        self._exact = self.exact
        self._shown, self._is_folding = self.shown, True

    def end_fold(self):
        """Note that they are in the map."""
        self._is_folding = False
        if not self._is_helped:
            self._shown = None
        self._num_late = self._num_late + 1 if self._node.worker.num_waiting else 0
        if self._num_late == PATIENCE:
            self._get_help()

    def refresh(self, x):
        """Solve the map where points were folded, x (n, dim_x): an iterator, see `Worker`."""
        try:
            if self._helper is None or not self._helper.is_ready:
                yield from self._node.fleet.combined.refreshing(x)
                self._shown = self._folded
                return
            self._changed.append(x)
            self._changed_until = self._folded, self._num_resets
            if not self._is_helped:
                self._start()
        except Exception as error:  # it costs nobody's points
            self._fail(error)

    def settle(self):
        """Solve exactly what was solved in a hurry, until observations wait: an iterator."""
        try:
            steps = self._node.fleet.combined.settling()
            while not (self._is_helped or self._node.worker.num_waiting):
                next(steps)
                yield
        except StopIteration:
            return
        except Exception as error:
            self._fail(error)

    # With a second process -----------------------------------------------------------------------

    def _get_help(self):
        p, field = self._node.parameters, self._node.field
        may_have = self._may_have_helper and p.max_processes > 1 and p.device == 'cpu'
        if self._helper is not None or not may_have:
            return
        self._node.get_logger().info(
            'observations come faster than one process folds and solves them: a second one is '
            'started (max_processes)'
        )
        try:
            self._helper = Helper(p.checkpoint, field.weights_hash, field.geometry)
            self._helper.begun.add_done_callback(self._report)
        except OSError as error:
            self._lose(error)

    def _report(self, begun):
        """Say that the second process is there, or why not; on its thread."""
        if self._may_have_helper and not begun.cancelled():  # else the node ends
            if error := begun.exception():
                self._lose(error)
            else:
                self._node.get_logger().info('the second process helps from now on')

    def _lose(self, error):
        """Go on without a second process, and say so."""
        text = f'{error}; the first goes on alone until the node is configured again'
        self._node.warn('no_helper', f'no second process (max_processes): {text}')
        self._may_have_helper = False

    def _start(self):
        """Have solved what changed; or else exactly what was solved in a hurry."""
        field = self._node.fleet.combined
        self._is_helped = bool(self._changed) or not field.is_settled
        if self._changed:
            x, self._changed = np.concatenate(self._changed), []
            self._go_on(field.refreshing_elsewhere(x), self._changed_until, None)
        elif self._is_helped:
            self._go_on(field.settling_elsewhere(), None, None)
        elif not self._is_folding:
            self._shown = None

    def _go_on(self, steps, reached, done):
        """
        Go on with one step.

        :param reached: what answers have after the last one, and the number of resets by now;
            None: nothing new, so that what changed meanwhile comes first.
        """
        try:
            request = steps.send(done and done.result())
            if reached is None and self._changed:
                return self._start()
            future = self._helper.solve(request)
        except StopIteration:
            if reached is not None and reached[1] == self._num_resets and self._shown is not None:
                self._shown = reached[0]
        except HelperError as error:
            self._lose(error)
            self._helper.close()
            self._helper, self._changed = None, []
            self._node.fleet.forget_solved()
        except Exception as error:
            self._fail(error)
        else:
            worker = self._node.worker
            future.add_done_callback(
                lambda done: worker.ask(lambda: self._go_on(steps, reached, done))
            )
            return
        self._start()

    def _fail(self, error):
        """Say that something was not solved; who asks has it solved."""
        self._node.fleet.forget_solved()
        self._node.warn('internal_error', f'a fault, the node goes on: {error!r}')


def _num_cores():
    """Return how many cores this process may use."""
    affinity = getattr(os, 'sched_getaffinity', None)  # not everywhere
    return (os.cpu_count() or 1) if affinity is None else len(affinity(0))
