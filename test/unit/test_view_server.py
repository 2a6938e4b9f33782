"""The page of `cmanp view` without ROS: its messages, who gets them, and who does not."""

import asyncio
import errno
import json
import socket

import numpy as np
import pytest

from cmanp_ros.cli import main, view
from cmanp_ros.core.errors import ConfigError, InputError
from cmanp_ros.view.packing import pack_cells, unpack_cells

pytest.importorskip('websockets', reason='websockets is not installed: see requirements/view.txt')

from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from cmanp_ros.view import server as web

TIMEOUT_SEC = 10.0
WIDTH, HEIGHT = 7, 5


def cells(width=WIDTH, height=HEIGHT, resolution=0.3, origin=(-11.0, 17.0)):
    """Return centers as the published cloud has them, in float32, and two numbers for each."""
    x = origin[0] + (np.arange(width) + 0.5) * resolution
    y = origin[1] + (np.arange(height) + 0.5) * resolution
    centers = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2).astype(np.float32)
    mean = np.arange(width * height) / 3
    return centers, mean, mean + 100


# Messages ----------------------------------------------------------------------------------------


def test_map_comes_back_as_it_was_packed():
    centers, mean, stddev = cells()
    header, *grids = unpack_cells(pack_cells(centers, mean, stddev, {'frame': 'map'}))
    assert (header['width'], header['height'], header['frame']) == (WIDTH, HEIGHT, 'map')
    assert header['resolution'] == pytest.approx(0.3, rel=1e-6)
    assert header['origin'] == pytest.approx([-11.0, 17.0], abs=1e-5)
    np.testing.assert_array_equal(grids[0], mean.reshape(HEIGHT, WIDTH).astype(np.float32))
    np.testing.assert_array_equal(grids[1], stddev.reshape(HEIGHT, WIDTH).astype(np.float32))


def test_order_of_the_cells_does_not_matter():
    centers, mean, stddev = cells()
    order = np.random.default_rng(0).permutation(len(centers))
    shuffled = pack_cells(centers[order], mean[order], stddev[order], {})
    assert shuffled == pack_cells(centers, mean, stddev, {})


def test_missing_cells_are_nan_and_the_others_stay_where_they_are():
    centers, mean, stddev = cells()
    kept = np.random.default_rng(0).random(len(centers)) < 0.6
    kept[0] = kept[-1] = True
    header, grid, _ = unpack_cells(pack_cells(centers[kept], mean[kept], stddev[kept], {}))
    assert grid.shape == (HEIGHT, WIDTH) and header['resolution'] == pytest.approx(0.3, rel=1e-6)
    expected = np.where(kept, mean, np.nan).reshape(HEIGHT, WIDTH).astype(np.float32)
    np.testing.assert_array_equal(grid, expected)


@pytest.mark.parametrize(('width', 'height'), [(1, 1), (1, 13), (13, 1)])
def test_map_of_one_row_or_column_is_a_map(width, height):
    centers, mean, stddev = cells(width, height)
    assert unpack_cells(pack_cells(centers, mean, stddev, {}))[1].shape == (height, width)


def test_cell_size_is_exact_far_from_the_origin():
    centers, mean, stddev = cells(101, 97, 0.5, (431_000.0, 5_000.0))
    header, grid, _ = unpack_cells(pack_cells(centers, mean, stddev, {}))
    assert grid.shape == (97, 101) and np.isfinite(grid).all()
    assert header['resolution'] == pytest.approx(0.5, rel=1e-3)


def test_large_map_is_thinned_and_covers_the_same_place():
    centers, mean, stddev = cells(31, 23, 1.0, (0.0, 0.0))
    header, grid, _ = unpack_cells(pack_cells(centers, mean, stddev, {}, max_cells=100))
    assert grid.size <= 100 and header['resolution'] == pytest.approx(3.0)
    assert header['origin'] == pytest.approx([-1.0, -1.0])  # centers stay where they are
    np.testing.assert_array_equal(grid, mean.reshape(23, 31)[::3, ::3].astype(np.float32))


def test_numbers_begin_where_a_browser_can_view_them_as_floats():
    for frame in ('m', 'ma', 'map', 'map1', 'map_ü'):
        data = pack_cells(*cells(), {'frame': frame})
        assert (4 + int.from_bytes(data[:4], 'little')) % 4 == 0
        assert unpack_cells(data)[0]['frame'] == frame


def test_what_is_no_map_is_refused():
    with pytest.raises(InputError, match='no cells; expected at least one'):
        pack_cells(np.zeros((0, 2)), [], [], {})
    apart = np.array([[0.0, 0.0], [1e-3, 0.0], [1e6, 1e6]])
    with pytest.raises(InputError, match='expected at most 10000000 cells: raise grid_resolution'):
        pack_cells(apart, np.zeros(3), np.ones(3), {})


# Who may ask -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('host', 'name', 'is_own'),
    [
        ('localhost', '', True),
        ('localhost:8765', '', True),
        ('LOCALHOST:8765', '', True),
        ('127.0.0.1:8765', '', True),
        ('[::1]:8765', '', True),
        ('192.168.7.11', '', True),
        ('robot.local:8765', '', False),
        ('robot.local:8765', 'robot.local', True),
        ('evil.example', '', False),
        ('localhost.evil.example', '', False),
        ('127.0.0.1.evil.example:8765', '', False),
        ('', '', False),
        ('127.0.0.1:80; script-src *', '', False),
        ('localhost:', '', False),
        ('::1', '', False),
    ],
)
def test_only_names_that_nobody_else_can_point_here_are_served(host, name, is_own):
    assert web.is_own_host(host, name) == is_own


@pytest.mark.parametrize(
    ('origin', 'is_own'),
    [
        ('http://localhost:8765', True),
        ('https://localhost:8765', True),
        ('http://localhost', False),
        ('http://localhost:8766', False),
        ('http://127.0.0.1:8765', False),
        ('http://evil.example', False),
        ('http://localhost:8765.evil.example', False),
        ('null', False),
        ('', False),
    ],
)
def test_only_the_page_from_here_may_open_the_socket(origin, is_own):
    assert web.is_own_origin(origin, 'localhost:8765') == is_own


@pytest.mark.parametrize('message', ['[3, 4.5]', b'[3, 4.5]'])
def test_question_is_a_place(message):
    assert web.question(message) == (3.0, 4.5)


@pytest.mark.parametrize(
    'message',
    [
        *('', '[]', '[1]', '[1, 2, 3]', '{}', '["1", "2"]', '[true, 2]', '[1, NaN]', '[null, 1]'),
        *('[1, Infinity]', '[' * 200, b'\xff\xfe', f'[1, {10**300}{"0" * 100}]'),
    ],
)
def test_what_is_no_question_is_refused(message):
    with pytest.raises(ConfigError, match='two numbers'):
        web.question(message)


# The server, with real sockets -------------------------------------------------------------------


class Visit:
    """A server that is running, and what a client needs to reach it."""

    def __init__(self, server, port):
        self.server, self.address = server, f'127.0.0.1:{port}'

    def open(self, **changes):
        """Open a web socket as the page does."""
        url = f'ws://{self.address}/socket'
        return connect(url, **{'origin': f'http://{self.address}', 'compression': None} | changes)

    async def get(self, path='/', host=None):
        """Ask for a page; return status line and headers, and body."""
        reader, writer = await asyncio.open_connection(*self.address.split(':'))
        writer.write(f'GET {path} HTTP/1.1\r\nHost: {host or self.address}\r\n\r\n'.encode())
        head, _, body = (await reader.read()).partition(b'\r\n\r\n')
        writer.close()
        return head.decode(), body.decode()


def visit(steps, ask=None):
    """Run asynchronous steps against a server on a free port."""

    async def run():
        server = web.Server(ask)
        async with server.serve('localhost', 0) as serving:
            return await steps(Visit(server, serving.sockets[0].getsockname()[1]))

    return asyncio.run(asyncio.wait_for(run(), TIMEOUT_SEC))


def test_page_is_served_with_a_policy_that_lets_it_load_nothing():
    head, body = visit(lambda v: v.get())
    assert ' 200 ' in head.splitlines()[0] and body.startswith('<!doctype html>')
    assert "default-src 'none'; script-src 'sha256-" in head
    assert 'unsafe' not in head and 'frame-ancestors' in head
    assert '://' not in body.replace("'http://www.w3.org/2000/svg'", '').replace(
        '`${scheme}://${location.host}/socket`', ''
    )


def test_foreign_host_and_other_paths_are_refused():
    async def steps(v):
        return [await v.get(host='evil.example'), await v.get('/../etc/passwd')]

    (forbidden, _), (missing, _) = visit(steps)
    assert ' 403 ' in forbidden and ' 404 ' in missing


@pytest.mark.parametrize('origin', [None, 'http://evil.example', 'null'])
def test_foreign_page_gets_no_socket(origin):
    async def steps(v):
        with pytest.raises(InvalidStatus) as refused:
            async with v.open(origin=origin):
                pass
        return refused.value.response.status_code, v.server.num_browsers

    assert visit(steps) == (403, 0)


def test_one_browser_too_many_is_refused(monkeypatch):
    monkeypatch.setattr(web, 'MAX_BROWSERS', 1)

    async def steps(v):
        async with v.open() as first:
            v.server.put('hello', {})
            await first.recv()
            with pytest.raises(InvalidStatus) as refused:
                async with v.open():
                    pass
        return refused.value.response.status_code

    assert visit(steps) == 503


def test_who_comes_late_gets_all_that_is_known():
    async def steps(v):
        v.server.put('status', {'text': 'old'})
        v.server.put('map', b'\x00\x01')
        v.server.put('status', {'text': 'new'})
        async with v.open() as browser:
            return {await browser.recv(), await browser.recv()}

    assert visit(steps) == {json.dumps({'kind': 'status', 'text': 'new'}), b'\x00\x01'}


def test_slow_browser_gets_the_newest_and_no_queue():
    async def steps():
        outbox = web.Outbox({})
        for number in range(1000):
            outbox.put('map', bytes([number % 251]))
            outbox.put('status', str(number))
        first, second = await outbox.take(), await outbox.take()
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(outbox.take(), 0.01)
        return first, second

    assert asyncio.run(steps()) == (bytes([999 % 251]), '999')


def test_questions_are_answered_and_wrong_ones_explained():
    async def ask(x, y):
        return {'mean': x + y}

    async def steps(v):
        async with v.open() as browser:
            answers = []
            for question in ('[3, 4]', 'nonsense'):
                await browser.send(question)
                answers.append(json.loads(await browser.recv()))
            return answers

    right, wrong = visit(steps, ask)
    assert right == {'kind': 'answer', 'x': 3.0, 'y': 4.0, 'mean': 7.0}
    assert 'expected the place as two numbers' in wrong['error']


def test_oversized_question_ends_the_connection_and_nothing_else():
    async def steps(v):
        async with v.open() as browser:
            await browser.send('[' + '1' * web.MAX_QUESTION + ', 2]')
            with pytest.raises(ConnectionClosed) as closed:
                await browser.recv()
        return closed.value.rcvd.code, (await v.get())[0]

    code, head = visit(steps)
    assert code == 1009 and ' 200 ' in head


# The command -------------------------------------------------------------------------------------


def test_port_in_use_is_named_with_the_way_out(capsys):
    pytest.importorskip('rclpy', reason='rclpy is not installed: see make setup')
    with socket.create_server(('127.0.0.1', 0)) as taken:
        port = taken.getsockname()[1]
        assert main(['view', '--port', str(port)]) == 1
    assert f'port {port} on localhost is in use' in capsys.readouterr().err


def test_other_failures_to_listen_are_explained():
    error = web.why_not_listening(OSError(errno.EACCES, 'Permission denied'), 'localhost', 80)
    assert 'localhost, port 80: Permission denied; expected' in str(error)


@pytest.mark.parametrize('port', ['-1', '65536', 'http'])
def test_impossible_port_is_a_wrong_call(port, capsys):
    with pytest.raises(SystemExit) as stopped:
        view.main(['--port', port])
    assert stopped.value.code == 2 and '--port' in capsys.readouterr().err


def test_impossible_name_is_explained(capsys):
    pytest.importorskip('rclpy', reason='rclpy is not installed: see make setup')
    assert main(['view', '--name', 'a b', '--port', '0']) == 1
    assert '--namespace or --name' in capsys.readouterr().err
