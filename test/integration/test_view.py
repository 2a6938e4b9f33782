"""`cmanp view` beside a real node: what a browser gets, and what a person sees in Chromium."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest
from cmanp_ros.srv import Predict
from conftest import TIMEOUT_SEC, wait_for, wait_until_folded
from sensor_msgs.msg import PointCloud2
from std_msgs.msg import Header

from cmanp_ros.conversions import cloud_from_points, float_array
from cmanp_ros.view.packing import pack_cells, unpack_cells

pytest.importorskip('websockets', reason='websockets is not installed: see requirements/view.txt')

from chromium import Page, browser, find_chromium
from websockets.sync.client import connect

from cmanp_ros.view.server import Server

NUM_POINTS = 31
WIDTH, HEIGHT = 13, 7  # cells of 1 m
START = 'import sys; from cmanp_ros.cli import main; sys.exit(main())'
HOSTILE = '<img src=x onerror="console.error(1)"><script>console.error(2)</script>'
SMALL = {
    'bounds_min': [-6.0, -2.0],
    'bounds_max': [7.0, 5.0],
    'grid_resolution': 1.0,
    'publish_rate': 5.0,
    'status_rate': 5.0,
}
needs_chromium = pytest.mark.skipif(
    find_chromium() is None, reason='no Chromium: apt-get install --no-install-recommends chromium'
)


class Command:
    """`cmanp view` in a process of its own."""

    def __init__(self, domain_id, *arguments):
        """Start it on a free port, and wait until it serves."""
        self.process = subprocess.Popen(
            [sys.executable, '-c', START, 'view', '--port', '0', *arguments],
            env=os.environ | {'ROS_DOMAIN_ID': str(domain_id), 'PYTHONUNBUFFERED': '1'},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.line = self.process.stdout.readline()
        self.url = re.search(r'http://\S+', self.line)[0].replace('localhost', '127.0.0.1')

    def stop(self):
        """Press Ctrl-C; return exit status and what it said of it."""
        self.process.send_signal(signal.SIGINT)
        _, errors = self.process.communicate(timeout=TIMEOUT_SEC)
        return self.process.returncode, errors


@pytest.fixture
def start_view(domain_id):
    """Return a function that starts the command in the test's domain."""
    commands = []

    def start(*arguments):
        commands.append(Command(domain_id, *arguments))
        return commands[-1]

    yield start
    for command in commands:
        command.process.kill()
        command.process.communicate(timeout=TIMEOUT_SEC)


class Socket:
    """What the page does with the web socket: the newest message of each kind."""

    def __init__(self, url):
        """Open it."""
        address = url.removeprefix('http').rstrip('/')
        self._stack = ExitStack()
        socket = connect(f'ws{address}/socket', origin=f'http{address}', compression=None)
        self._socket = self._stack.enter_context(socket)
        self.newest = {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._stack.close()

    def wait_for(self, condition, timeout_sec=TIMEOUT_SEC):
        """Take messages until a condition on the newest holds, and return its value."""

        def step():
            if not (value := condition(self.newest)):
                message = self._socket.recv(timeout_sec)
                is_map = isinstance(message, bytes)
                message = unpack_cells(message) if is_map else json.loads(message)
                self.newest['map' if is_map else message['kind']] = message
            return value

        return wait_for(step, timeout_sec)

    def ask(self, x, y):
        """Ask for a distribution and return the answer."""
        self.newest.pop('answer', None)
        self._socket.send(json.dumps([x, y]))
        return self.wait_for(lambda newest: newest.get('answer'))


def cloud():
    """Return some observations and where they are, (n, 2)."""
    x = np.random.default_rng(0).uniform(-1.5, 4.5, (NUM_POINTS, 2))
    header = Header(frame_id='map')
    header.stamp.sec = 1
    return cloud_from_points({'x': x[:, 0], 'y': x[:, 1], 'z': x[:, 0] / 9}, header), x


def test_browser_gets_map_status_place_and_answers(start_node, start_view, client):
    node = start_node(**SMALL)
    publisher, (observed, x) = client.publisher(PointCloud2, 'points'), cloud()
    view = start_view('--unit', 'ppm')
    with Socket(view.url) as page:
        header, *_ = page.wait_for(lambda newest: newest.get('map'))
        assert (header['width'], header['height'], header['resolution']) == (WIDTH, HEIGHT, 1.0)
        assert (header['origin'], header['frame']) == ([-6.0, -2.0], 'map')
        assert page.newest['hello'] == {'kind': 'hello', 'node': '/cmanp', 'unit': 'ppm'}

        # Until both know of each other, best effort loses messages.
        place = page.wait_for(lambda newest: newest.get('place') or publisher.publish(observed))

        def has_settled():  # what is still on its way would change the answers below
            before = node.field.num_observations
            return not threading.Event().wait(1.0) and node.field.num_observations == before

        wait_for(has_settled)
        assert [place['x'], place['y']] == pytest.approx(x.mean(axis=0), abs=1e-6)

        def is_told(newest):
            values = newest['status']['values']
            folded = values['observations_folded'] == str(node.field.num_observations)
            return folded and values['points_pending'] == '0'

        page.wait_for(is_told)
        status = page.newest['status']
        assert status['state'] in ('folding', 'idle') and status['level'] == 0
        assert f'{node.field.num_observations} observations in the map' in status['text']

        row, column = 4, 9
        asked = [-6.0 + column + 0.5, -2.0 + row + 0.5]
        answer = page.ask(*asked)
        request = Predict.Request(dim_x=2, x=float_array(asked), header=Header(frame_id='map'))
        response = client.call(Predict, 'cmanp/predict', request)
        assert answer['mean'] == response.prediction.mean[0] and not answer['is_outside']
        page.wait_for(
            lambda newest: np.allclose(
                [grid[row, column] for grid in newest['map'][1:]],
                [answer['mean'], answer['stddev']],
                rtol=1e-5,
            )
        )


def test_maps_are_computed_only_while_somebody_looks(start_node, start_view, client):
    start_node(**SMALL)
    view = start_view()
    wait_for(lambda: client.node.count_subscribers('/cmanp/status') == 1)
    assert client.node.count_subscribers('/cmanp/field') == 0
    with Socket(view.url) as page:
        page.wait_for(lambda newest: newest.get('map'))
        assert client.node.count_subscribers('/cmanp/field') == 1
    wait_for(lambda: client.node.count_subscribers('/cmanp/field') == 0)
    with Socket(view.url) as page:  # once more, by who comes later
        page.wait_for(lambda newest: newest.get('map'))


def test_missing_node_is_explained_as_by_the_doctor_and_ctrl_c_ends_cleanly(start_view):
    view = start_view('--namespace', '/robot1', '--name', 'mapper')
    with Socket(view.url) as page:
        status = page.wait_for(lambda newest: newest.get('status'))
        assert 'What to do [no_node]: there is no node /robot1/mapper: start it' in status['text']
        assert status['lines'][0] == 'cmanp doctor looks at /robot1/mapper'
        assert status['lines'][-1] == status['text']
        assert 'is not there to answer' in page.ask(1, 2)['error']
    assert view.stop() == (130, 'cmanp view: stopped\n')


# In a browser --------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def chromium(tmp_path_factory):
    """Return the address of a browser."""
    with browser(tmp_path_factory.mktemp('profile')) as address:
        yield address


def center(page, id):
    """Return the middle of a map in the window, as a person would click."""
    box = f'document.getElementById({id!r}).getBoundingClientRect()'
    return page.value(f'[{box}.x + {box}.width / 2 - 10, {box}.y + {box}.height / 2 - 16]')


@needs_chromium
def test_person_sees_the_map_and_a_click_is_answered(chromium, start_node, start_view, client):
    node = start_node(**SMALL)
    client.publisher(PointCloud2, 'points').publish(cloud()[0])
    wait_until_folded(node, NUM_POINTS)
    view = start_view('--unit', 'ppm')
    with Page(chromium, view.url) as page:
        page.wait_for('document.querySelector("#facts")?.textContent')
        assert page.text('facts') == f'{WIDTH} × {HEIGHT} m in cells of 1 m, frame map'
        page.wait_for('document.querySelector("#text").textContent.includes("observations in")')
        assert page.text('node') == '/cmanp'
        assert page.value('document.querySelector("#status").className') == 'ok'
        colors = page.value(
            'new Set(new Uint32Array(document.querySelector("#mean").getContext("2d")'
            '.getImageData(0, 0, 500, 300).data.buffer)).size'
        )
        assert colors > 20  # it is drawn
        page.click(*center(page, 'mean'))
        page.wait_for('/±|No answer/.test(document.querySelector("#answer").textContent)')
        answer = page.text('answer')
        assert re.search(r'-?[\d.]+ ± [\d.]+ ppm.*lie within -?[\d.]+ to -?[\d.]+ ppm', answer)
        assert page.value('document.querySelectorAll("#curve svg").length') == 1
        assert page.value('location.hash').startswith('#at=')
        assert page.complaints == []


@needs_chromium
def test_address_names_a_place_and_keys_move_to_another(chromium, start_node, start_view):
    start_node(**SMALL)
    view = start_view()
    with Page(chromium, f'{view.url}#at=3,4', size=(390, 844), is_dark=True) as page:
        page.wait_for('document.querySelector("#curve svg") !== null')
        assert 'at (3, 4) m lie within' in page.text('answer')
        page.value('document.getElementById("stddev").focus()')
        for key in ('ArrowLeft', 'ArrowUp', 'ArrowLeft', 'Enter'):
            page.press(key)
        page.wait_for('document.querySelector("#answer").textContent.includes("at (1,")')
        assert page.value('document.documentElement.scrollWidth') <= 390
        assert page.complaints == []


@contextmanager
def served(ask=None, port=0):
    """Serve the page without ROS; return a function that puts messages, and the address."""
    started, loop = threading.Event(), asyncio.new_event_loop()
    address, stopped = [], asyncio.Event()

    async def run():
        server = Server(ask)
        async with server.serve('localhost', port) as serving:
            address.extend((server, serving.sockets[0].getsockname()[1]))
            started.set()
            await stopped.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=[run()], daemon=True)
    thread.start()
    assert started.wait(TIMEOUT_SEC)
    server, port = address
    yield (
        lambda *message: loop.call_soon_threadsafe(server.put, *message),
        f'http://127.0.0.1:{port}/',
    )
    loop.call_soon_threadsafe(stopped.set)
    thread.join(TIMEOUT_SEC)
    loop.close()


@needs_chromium
def test_what_comes_from_ros_stays_text(chromium):
    async def ask(x, y):
        return {'error': HOSTILE}

    grid = np.stack(np.meshgrid(np.arange(5.0), np.arange(3.0)), axis=-1).reshape(-1, 2)
    with served(ask) as (put, url), Page(chromium, f'{url}#at=1,1') as page:
        put('hello', {'node': HOSTILE, 'unit': HOSTILE})
        put('map', pack_cells(grid, grid[:, 0], grid[:, 1] + 1, {'frame': HOSTILE, 'stamp': 1}))
        values = {'observations_folded': HOSTILE, 'points_per_sec': '3'}
        put('status', {'level': 2, 'state': HOSTILE, 'text': HOSTILE, 'values': values})
        page.wait_for('document.querySelector("#answer")?.textContent.startsWith("No answer: <")')
        for id in ('node', 'facts', 'state', 'sentence', 'unknown', 'answer'):
            page.wait_for(f'document.getElementById({id!r}).textContent.includes("<img src=x")')
        put('status', {'text': HOSTILE, 'lines': [HOSTILE, HOSTILE]})
        page.wait_for('document.getElementById("lines").textContent.includes("<img src=x")')
        assert page.value('document.querySelectorAll("img").length') == 0
        assert page.complaints == []


@needs_chromium
def test_page_says_that_the_connection_is_lost_and_comes_back_by_itself(chromium):
    with served() as (put, url):
        put('hello', {'node': '/cmanp', 'unit': ''})
        page = Page(chromium, url)
        page.wait_for('document.querySelector("#connection")?.textContent.includes("live")')
    with page:
        page.wait_for('document.querySelector("#state").textContent.includes("no connection")')
        assert 'Trying again by itself' in page.text('sentence')
        with served(port=int(url.strip('/').rpartition(':')[2])) as (put, _):
            put('status', {'level': 0, 'state': 'folding', 'text': '7 observations', 'values': {}})
            page.wait_for('document.querySelector("#state").textContent.includes("folding")')
