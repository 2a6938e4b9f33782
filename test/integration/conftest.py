"""A real node and a real client over Fast DDS, each in a context of its own, in its own domain."""

import gc
import os
import threading
import time

import pytest

from cmanp_ros.demo.processes import own_domain

TIMEOUT_SEC = 20.0
# Another computer on the network may run the same tests, in the same domain, with the same names.
os.environ['ROS_AUTOMATIC_DISCOVERY_RANGE'] = 'LOCALHOST'


@pytest.fixture
def domain_id():
    """Return a domain that nobody else uses, not even a test in another process."""
    with own_domain() as domain_id:
        yield domain_id
        gc.collect()  # rclpy keeps lifecycle nodes on the network until then, even destroyed ones


@pytest.fixture
def context(domain_id):
    """Return a ROS context in that domain."""
    rclpy = pytest.importorskip('rclpy', reason='rclpy is not installed: see make setup')
    context = rclpy.Context()
    rclpy.init(context=context, domain_id=domain_id)
    yield context
    rclpy.try_shutdown(context=context)


class Client:
    """A node that publishes, listens and asks, spinning on its own thread."""

    def __init__(self, context):
        """Start spinning."""
        import rclpy
        from rclpy.executors import SingleThreadedExecutor

        self.node = rclpy.create_node('client', context=context)
        self.nodes = []  # those under test
        self._executor = SingleThreadedExecutor(context=context)
        self._executor.add_node(self.node)
        self._thread = threading.Thread(target=self._executor.spin, daemon=True)
        self._thread.start()

    def collect(self, message_type, topic, qos):
        """Subscribe; return the list that grows with what arrives."""
        received = []
        self.node.create_subscription(message_type, topic, received.append, qos)
        return received

    def publisher(self, message_type, topic, qos=10):
        """Return a publisher that the nodes under test and this one know of each other."""
        publisher = self.node.create_publisher(message_type, topic, qos)
        wait_for(publisher.get_subscription_count)
        listening = (s for node in self.nodes for s in node.subscriptions)
        for subscription in listening:  # until both sides know, best effort loses messages
            if subscription.topic_name == publisher.topic_name:
                wait_for(subscription.get_publisher_count)
        return publisher

    def call(self, service_type, name, request):
        """Call a service and return the response."""
        future, client = self.call_async(service_type, name, request)
        wait_for(future.done)
        self.node.destroy_client(client)
        return future.result()

    def call_async(self, service_type, name, request):
        """Call a service; return the future of the response, and the client."""
        client = self.node.create_client(service_type, name)
        assert client.wait_for_service(TIMEOUT_SEC), f'no service {name}'
        return client.call_async(request), client

    def close(self):
        """Stop spinning."""
        self._executor.shutdown()
        self._thread.join()
        self.node.destroy_node()


@pytest.fixture
def client(context):
    """Return a client in the test's domain."""
    client = Client(context)
    yield client
    client.close()


@pytest.fixture
def start_node(domain_id, client):
    """Return a function that starts a node with parameters and returns it, active."""
    import rclpy
    from rclpy.executors import SingleThreadedExecutor
    from rclpy.parameter import Parameter

    from cmanp_ros.node import CMANPNode, spin

    running = []

    def start(activate=True, namespace=None, parameters=(), **values):
        context = rclpy.Context()
        rclpy.init(context=context, domain_id=domain_id)
        values |= dict(parameters)  # names with dots
        overrides = [Parameter(name, value=value) for name, value in values.items()]
        node = CMANPNode(context=context, parameter_overrides=overrides, namespace=namespace)
        if activate:
            node.trigger_configure()
            node.trigger_activate()
        executor = SingleThreadedExecutor(context=context)  # as `main`
        executor.add_node(node)
        thread = threading.Thread(target=spin, args=[executor], daemon=True)
        thread.start()
        running.append((node, executor, thread, context))
        client.nodes.append(node)
        return node

    yield start
    for node, executor, thread, context in running:
        executor.shutdown()
        thread.join()
        node.on_cleanup(None)
        node.destroy_node()
        rclpy.try_shutdown(context=context)


def wait_for(condition, timeout_sec=TIMEOUT_SEC):
    """Wait until a condition holds, and return its value; fail after the timeout."""
    woken, deadline = threading.Event(), time.monotonic() + timeout_sec
    while not (value := condition()):
        assert time.monotonic() < deadline, f'not within {timeout_sec} s: {condition}'
        woken.wait(0.01)
    return value


def wait_until_folded(node, count):
    """Wait until a node of this process has so many observations, and all answers have them."""
    wait_for(lambda: node.field.num_observations == count and not node.refresher.is_behind)
