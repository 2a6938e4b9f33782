"""
`cmanp view`: what a running node maps, as a page in the browser; for those without RViz.

It runs beside the node, on the robot or elsewhere in the ROS network, and only ever asks.
"""

import argparse
import asyncio
import contextlib
import ipaddress
from importlib import import_module

from cmanp_ros.cli.doctor import add_node_options
from cmanp_ros.core.errors import CMANPError
from cmanp_ros.optional import library

ANSWER_SEC = 5.0
NUM_TRIES = 2  # DDS loses the answer to somebody whom the node has not discovered yet
CHECK_SEC = 1.0
NO_ROS = (
    'source it (source /opt/ros/jazzy/setup.bash), or use the environment that `make setup` made'
)


def main(arguments) -> int:
    """
    Serve the page until somebody stops it.

    :return: exit status: 1 if it cannot be served, 130 after Ctrl-C.
    """
    options = _options(arguments)
    library('websockets.asyncio.server', 'cmanp view')
    try:
        import rclpy

        import_module('cmanp_ros.msg')
    except ImportError as error:
        raise CMANPError(f'ROS 2 was not found ({error}): {NO_ROS}') from error
    context = rclpy.Context()
    rclpy.init(args=[], context=context)
    try:
        asyncio.run(serve(context, options))
    finally:
        rclpy.try_shutdown(context=context)
    return 0


async def serve(context, options, show=print) -> None:
    """
    Serve the page until cancelled.

    :param context: initialized rclpy context of its own.
    :param options: as the command line gives them.
    :param show: takes each line for the user.
    :raises CMANPError: the port is taken, or the like.
    """
    import rclpy

    from cmanp_ros.view.listener import Listener
    from cmanp_ros.view.server import Server, why_not_listening

    async def ask(x: float, y: float) -> dict:
        for _ in range(NUM_TRIES):
            with contextlib.suppress(asyncio.TimeoutError):
                answer = asyncio.wrap_future(listener.ask(x, y))
                return await asyncio.wait_for(answer, ANSWER_SEC)
        return {'error': f'{listener.target} did not answer within {NUM_TRIES * ANSWER_SEC:g} s'}

    def publish(kind, message) -> None:
        loop.call_soon_threadsafe(server.put, kind, message)

    loop = asyncio.get_running_loop()
    server = Server(ask, options.host)
    try:
        listener = Listener(context, options.namespace, options.name, publish)
    except rclpy.exceptions.NameValidationException as error:
        raise CMANPError(f'no node has such a --namespace or --name: {error}') from error
    server.put('hello', {'node': listener.target, 'unit': options.unit})
    try:
        async with server.serve(options.host, options.port) as serving:
            port = serving.sockets[0].getsockname()[1]
            show(f'{listener.target} is shown at {_url(options.host, port)} (Ctrl-C ends it)')
            if not _is_loopback(options.host):
                show('Whoever reaches this computer can see the map and ask the node.')
            await watch(listener, server)
    except OSError as error:
        raise why_not_listening(error, options.host, options.port) from error
    finally:
        listener.close()
        rclpy.try_shutdown(context=context)  # a doctor at work ends, too


async def watch(listener, server) -> None:
    """Tell the listener whether somebody looks; where the node is silent, have it examined."""
    while True:
        listener.is_watched = server.num_browsers > 0
        if listener.is_watched and listener.is_silent:
            found = await asyncio.to_thread(listener.examine)
            if listener.is_silent:
                server.put('status', found)
        await asyncio.sleep(CHECK_SEC)


def _url(host: str, port: int) -> str:
    return f'http://[{host}]:{port}/' if ':' in host else f'http://{host}:{port}/'


def _is_loopback(host: str) -> bool:
    try:
        return host == 'localhost' or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _options(arguments):
    """Read and check the options."""
    parser = argparse.ArgumentParser(
        prog='cmanp view',
        description='Show the map of a running node in a browser: mean and standard deviation, '
        'where it is measured, what the node says, and the distribution at any place.',
        epilog='From another computer: ssh -L 8765:localhost:8765 ROBOT, and open '
        'http://localhost:8765/ there.',
    )
    add_node_options(parser)
    parser.add_argument(
        '--host',
        default='localhost',
        help='address to listen at; any but localhost lets others in (default: localhost)',
    )
    parser.add_argument(
        '--port', type=int, default=8765, help='0: any that is free (default: 8765)'
    )
    parser.add_argument(
        '--unit', default='', help='of the field, such as m or ppm, for the labels'
    )
    options = parser.parse_args(arguments)
    if not 0 <= options.port <= 65535:
        parser.error(f'--port is {options.port}; expected 0 to 65535')
    return options
