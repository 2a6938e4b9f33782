"""
The web side of `cmanp view`: one page, one web socket, and who may use them.

Anybody's page may open a socket to localhost from the browser of a victim. So the socket is only
for pages that came from here (Origin), and under a name that nobody else controls (Host), which
DNS rebinding needs.
"""

import asyncio
import base64
import contextlib
import errno
import hashlib
import ipaddress
import json
import logging
import math
import re
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from pathlib import Path

from websockets.asyncio.server import serve
from websockets.exceptions import ConnectionClosed

from cmanp_ros.core.errors import CMANPError, ConfigError

MAX_BROWSERS = 16
MAX_QUESTION = 256  # bytes
OPEN_SEC = 2.0  # for a request; browsers open connections ahead, which would hold up the end
CLOSE_SEC = 1.0
_HOST = re.compile(r'(\[[0-9A-Fa-f:.]+\]|[\w.-]+)(:\d+)?', re.ASCII)
_LOGGER = logging.getLogger(__name__)
_LOGGER.setLevel(logging.CRITICAL)  # browsers open connections that they never use


class Server:
    """Sends the newest of each kind of message to all browsers, and passes on their questions."""

    def __init__(self, ask: Callable[[float, float], Awaitable[dict]], name: str = '') -> None:
        """
        Read the page.

        :param ask: called with x and y [m] of a question; returns the answer, fit for JSON.
        :param name: of the host, by which the page may be asked for beside localhost and numbers.
        """
        self._ask, self._name = ask, name
        self._newest: dict[str, str | bytes] = {}
        self._browsers: set[Outbox] = set()
        self._page = Path(__file__).with_name('page.html').read_bytes()
        self._hashes = f'script-src {_hashes("script", self._page)}'
        self._hashes += f'; style-src {_hashes("style", self._page)}'

    @property
    def num_browsers(self) -> int:
        """Count who looks."""
        return len(self._browsers)

    def put(self, kind: str, message: dict | bytes) -> None:
        """
        Send a message to every browser; one that did not fetch the last of this kind misses it.

        :param kind: of which only the newest counts.
        :param message: JSON to be, with the kind added, or bytes as they are.
        """
        self._newest[kind] = _encoded(kind, message)
        for browser in self._browsers:
            browser.put(kind, self._newest[kind])

    def serve(self, host: str, port: int):
        """
        Return an asynchronous context within which browsers are served.

        :param host: address or name to listen at; 'localhost' is 127.0.0.1.
        :param port: TCP port; 0: any that is free.
        """
        return serve(
            self._talk,
            '127.0.0.1' if host == 'localhost' else host,
            port,
            process_request=self._respond,
            max_size=MAX_QUESTION,
            compression=None,  # floats do not shrink, and the way is short
            open_timeout=OPEN_SEC,
            close_timeout=CLOSE_SEC,
            logger=_LOGGER,
        )

    def _respond(self, connection, request):
        """Answer plain requests; None lets the connection become a web socket."""
        hosts, origins = (request.headers.get_all(name) for name in ('Host', 'Origin'))
        if len(hosts) != 1 or not is_own_host(hosts[0], self._name):
            return connection.respond(HTTPStatus.FORBIDDEN, 'ask for localhost or an address\n')
        if request.path == '/':
            return self._page_response(connection, hosts[0])
        if request.path != '/socket':
            return connection.respond(HTTPStatus.NOT_FOUND, 'there is only /\n')
        if len(origins) != 1 or not is_own_origin(origins[0], hosts[0]):
            return connection.respond(HTTPStatus.FORBIDDEN, 'only for the page from here\n')
        if len(self._browsers) >= MAX_BROWSERS:
            return connection.respond(HTTPStatus.SERVICE_UNAVAILABLE, 'too many look already\n')
        return None

    def _page_response(self, connection, host: str):
        """Return the page, which may load nothing and talk to nobody else."""
        response = connection.respond(HTTPStatus.OK, '')
        response.body = self._page
        del response.headers['Content-Type'], response.headers['Content-Length']
        for name, value in {
            'Content-Type': 'text/html; charset=utf-8',
            'Content-Length': str(len(self._page)),
            'Content-Security-Policy': f"default-src 'none'; {self._hashes}; img-src data:; "
            f"connect-src ws://{host} wss://{host}; base-uri 'none'; form-action 'none'; "
            "frame-ancestors 'none'",
            'Cache-Control': 'no-store',
            'Referrer-Policy': 'no-referrer',
            'X-Content-Type-Options': 'nosniff',
        }.items():
            response.headers[name] = value
        return response

    async def _talk(self, connection) -> None:
        """Serve one browser until it leaves."""
        browser = Outbox(self._newest)
        self._browsers.add(browser)
        sending = asyncio.create_task(browser.send_to(connection))
        try:
            async for message in connection:  # the next question is read after the answer
                answer = await self._answer(message)
                browser.put('answer', _encoded('answer', answer))
        except ConnectionClosed:
            pass
        finally:
            self._browsers.discard(browser)
            sending.cancel()

    async def _answer(self, message: str | bytes) -> dict:
        """Answer a question."""
        try:
            x, y = question(message)
        except ConfigError as error:
            return {'error': str(error)}
        return {'x': x, 'y': y} | await self._ask(x, y)


class Outbox:
    """What a browser has yet to get: of each kind the newest, so that slow ones are not behind."""

    def __init__(self, messages: dict[str, str | bytes]) -> None:
        """Begin with all that is known."""
        self._waiting = dict(messages)
        self._something = asyncio.Event()
        if messages:
            self._something.set()

    def put(self, kind: str, message: str | bytes) -> None:
        """Replace what waits of this kind."""
        self._waiting[kind] = message
        self._something.set()

    async def take(self) -> str | bytes:
        """Wait for a message and take it out, in the order in which the kinds came."""
        await self._something.wait()
        message = self._waiting.pop(next(iter(self._waiting)))
        if not self._waiting:
            self._something.clear()
        return message

    async def send_to(self, connection) -> None:
        """Send what comes, as fast as the other side reads it."""
        with contextlib.suppress(ConnectionClosed):
            while True:
                await connection.send(await self.take())


def question(message: str | bytes) -> tuple[float, float]:
    """
    Read where a browser asks.

    :param message: JSON of [x, y] [m].
    :raises ConfigError: anything else.
    """
    with contextlib.suppress(ValueError, RecursionError, OverflowError):
        asked = json.loads(message)
        if isinstance(asked, list) and len(asked) == 2 and {*map(type, asked)} <= {int, float}:
            x, y = map(float, asked)
            if math.isfinite(x) and math.isfinite(y):
                return x, y
    raise ConfigError('not understood; expected the place as two numbers, [x, y] in meters')


def is_own_host(host: str, name: str = '') -> bool:
    """
    Tell whether a page was asked for by a name that no foreign DNS server can point here.

    :param host: header of a request.
    :param name: allowed beside localhost and addresses.
    """
    if not (found := _HOST.fullmatch(host)):
        return False
    asked = found[1].strip('[]').lower()
    if asked in ('localhost', name.lower()):
        return True
    try:
        ipaddress.ip_address(asked)
    except ValueError:
        return False
    return True


def is_own_origin(origin: str, host: str) -> bool:
    """
    Tell whether a page that opens the socket came from where it opens it.

    :param origin: header of a request; https where somebody puts a proxy before us.
    :param host: header of the same request.
    """
    return origin.lower() in (f'http://{host}'.lower(), f'https://{host}'.lower())


def why_not_listening(error: OSError, host: str, port: int) -> CMANPError:
    """Explain why nobody can be served there."""
    if error.errno == errno.EADDRINUSE:
        return CMANPError(
            f'port {port} on {host} is in use, perhaps by another cmanp view; choose another one '
            f'with --port, such as --port {port + 1 if port < 65535 else port - 1}'
        )
    return CMANPError(
        f'cannot listen on {host}, port {port}: {error.strerror or error}; expected localhost or '
        'an address of this computer as --host, and a --port above 1023'
    )


def _encoded(kind: str, message: dict | bytes) -> str | bytes:
    return message if isinstance(message, bytes) else json.dumps({'kind': kind} | message)


def _hashes(tag: str, page: bytes) -> str:
    """Name what stands in the page between such tags by its hash, as browsers check it."""
    parts = re.findall(rf'<{tag}>(.*?)</{tag}>'.encode(), page, re.DOTALL)
    digests = (base64.b64encode(hashlib.sha256(part).digest()).decode() for part in parts)
    return ' '.join(f"'sha256-{digest}'" for digest in digests)
