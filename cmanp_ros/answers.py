"""
What the node answers: predictions on the topic and the service.

    query or request -> targets -> transforms -> worker -> NeuralField.predict -> conversions
"""

import time
from collections import Counter, deque
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout

import numpy as np
from rclpy.qos import QoSProfile

from cmanp_ros import conversions
from cmanp_ros.core.errors import CMANPError, InputError
from cmanp_ros.diagnostics import Latency
from cmanp_ros.motion import transform_points
from cmanp_ros.msg import Prediction, Query
from cmanp_ros.qos import REQUESTS
from cmanp_ros.srv import Predict
from cmanp_ros.worker import TIMEOUT_SEC

MAX_WAITING = 64  # queries on the topic; beyond it new ones are refused


class Answers:
    """Answers queries and requests."""

    def __init__(self, node):
        """
        Open the outputs.

        :param node: `CMANPNode`, configured.
        """
        self._node = node
        self._num_waiting = 0
        self.num_refused = Counter()
        """Reason -> queries and requests without an answer."""
        self._queries: deque[tuple[int, np.ndarray, Future]] = deque()  # ready to be answered
        self._will_answer = False
        self._latency = Latency()
        self._prediction = node.open_publisher(Prediction, '~/prediction', QoSProfile(depth=10))

    def open(self):
        """Open the inputs."""
        node = self._node
        node.open_subscription(Query, 'query', self._on_query, QoSProfile(depth=10))
        node.open_service(Predict, '~/predict', self._on_predict, node.answering, REQUESTS)

    @property
    def latency_sec(self) -> float | None:
        """Return the median time [s] from a question to its answer; None before the first."""
        return self._latency.median()

    # Queries and requests ------------------------------------------------------------------------

    def _on_query(self, message):
        node = self._node
        if self._num_waiting >= MAX_WAITING:
            text = f'{MAX_WAITING} others wait already'
            return self._count(text, f'query {message.id} not answered', 'overloaded')
        self._num_waiting += 1

        def settled(future):
            self._num_waiting -= 1
            if not future.cancelled() and (error := future.exception()) is not None:
                self._count(error, f'query {message.id} not answered')

        def ready(x, result):
            self._queries.append((message.id, x, result))
            if not self._will_answer:  # once for all that come meanwhile
                self._will_answer = True
                node.in_background(self._answer_queries)

        self._ask(message, ready).add_done_callback(settled)

    def _answer_queries(self):
        """Answer all queries that wait, together: fewer calls. On the worker's thread."""
        self._will_answer = False
        waiting = [self._queries.popleft() for _ in range(len(self._queries))]
        if not waiting:
            return
        try:
            field, targets = self._node.fleet.combined, [x for _, x, _ in waiting]
            ends = np.cumsum([len(x) for x in targets])[:-1]
            refresher = self._node.refresher
            found = field.predict(np.concatenate(targets), renew=not refresher.is_behind)
            found = (np.split(part, ends) for part in found)
            for (query_id, x, result), mean, stddev in zip(waiting, *found, strict=True):
                self._prediction.publish(
                    self._message(field, x, mean, stddev, refresher.shown, query_id)
                )
                result.set_result(None)
        except Exception as error:  # it belongs to whoever asked
            for _, _, result in waiting:
                if not result.done():
                    result.set_exception(error)

    def _on_predict(self, request, response):
        def ready(x, result):
            work = self._node.worker.ask(lambda: self._predict(request, x))
            work.add_done_callback(lambda done: _pass_on(done, result))

        future = self._ask(request, ready)
        try:
            response.prediction, covariance, samples = future.result(TIMEOUT_SEC)
        except CMANPError as error:
            return self._refuse(response, error)
        except FutureTimeout:
            future.cancel()
            late = f'no answer within {TIMEOUT_SEC:g} s: overloaded'
            return self._refuse(response, late, 'overloaded')
        except Exception as error:  # a fault of ours or of torch must not end the node
            return self._refuse(response, f'no answer: {error!r}', 'internal_error')
        response.success = True
        if covariance is not None:
            response.covariance = conversions.float_array(covariance)
        if samples is not None:
            response.samples = conversions.float_array(samples)
        return response

    def _refuse(self, response, error, reason=None):
        self._count(error, 'request refused', reason)
        response.success, response.message = False, conversions.one_line(str(error))
        return response

    def _count(self, error, what, reason=None):
        """Say why there is no answer, each reason at once, and count it."""
        if reason is None:
            known = isinstance(error, CMANPError)
            reason = getattr(error, 'reason', 'not_usable') if known else 'internal_error'
        self.num_refused[reason] += 1
        self._node.warn(f'question_{reason}', f'{what}: {error}')

    def _ask(self, message, ask) -> Future:
        """
        Find the targets of a query or request in the map frame, and let the worker answer.

        :param ask: called with the targets (n, dim_x) and the future; has the worker settle it.
        :return: of the answer, or of why there is none.
        """
        node, result, asked_at = self._node, Future(), time.monotonic()
        result.add_done_callback(lambda _: self._latency.add(time.monotonic() - asked_at))
        p, dim_x = node.parameters, node.field.model.config.dim_x

        def ready(rotation, translation):
            if result.set_running_or_notify_cancel():
                moved = transform_points(x, rotation, translation)[:, :dim_x] if moves else x
                ask(moved, result)

        def failed(error):
            if result.set_running_or_notify_cancel():
                result.set_exception(error)

        try:
            x = conversions.targets_from_query(message, dim_x, p.max_targets)
            frame, stamp = message.header.frame_id, message.header.stamp
            moves = not node.transforms.is_map_frame(frame)
            node.transforms.request('query', frame, stamp, ready, failed, allow_latest=True)
        except CMANPError as error:
            failed(error)
        return result

    def _predict(self, request, x):
        """Return the answer to a request, covariance and samples, or None where not asked for."""
        p, field = self._node.parameters, self._node.fleet.combined
        num_samples = request.num_samples
        if request.joint and len(x) > p.max_joint_targets:
            raise InputError(
                f'joint over {len(x)} locations, expected at most max_joint_targets = '
                f'{p.max_joint_targets}: ask for samples, or in parts'
            )
        if num_samples > p.max_samples or num_samples * len(x) > p.max_targets:
            raise InputError(
                f'{num_samples} samples at {len(x)} locations, expected at most max_samples '
                f'= {p.max_samples}, and max_targets = {p.max_targets} numbers in all'
            )
        covariance = None
        if request.joint:
            mean, stddev, covariance = field.predict_joint(x)
        else:
            mean, stddev = field.predict(x)
        samples = field.sample(x, num_samples) if num_samples else None
        seen = self._node.intake.newest_stamp, field.num_observations
        return self._message(field, x, mean, stddev, seen), covariance, samples

    def _message(self, field, x, mean, stddev, seen, query_id=0):
        stamp, num_observations = seen
        return conversions.prediction_message(
            mean, stddev, field.status(x), num_observations, self._node.header(stamp), query_id
        )


def _pass_on(done: Future, result: Future):
    if done.cancelled():
        result.set_exception(InputError('the node was stopped'))
    elif (error := done.exception()) is not None:
        result.set_exception(error)
    else:
        result.set_result(done.result())
