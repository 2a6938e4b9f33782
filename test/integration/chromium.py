"""A browser without a window, driven over its DevTools protocol: for pages as people see them."""

import base64
import itertools
import json
import re
import shutil
import subprocess
import threading
from contextlib import ExitStack, contextmanager

from conftest import TIMEOUT_SEC, wait_for
from websockets.sync.client import connect

NAMES = ('chromium', 'chromium-browser', 'google-chrome')


def find_chromium() -> str | None:
    """Return the path of a browser, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def browser(folder):
    """
    Run a browser.

    :param folder: for its profile, which is new.
    :return: address of its DevTools.
    """
    process = subprocess.Popen(
        [
            find_chromium(),
            '--headless=new',
            '--no-sandbox',  # which root must not have
            '--disable-gpu',
            '--no-first-run',
            '--disable-background-networking',
            '--hide-scrollbars',
            '--remote-debugging-port=0',
            f'--user-data-dir={folder}',
            'about:blank',
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    address = []

    def read():
        for line in process.stderr:
            address.extend(re.findall(r'DevTools listening on (\S+)', line))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        wait_for(lambda: address)
        yield address[0]
    finally:
        process.terminate()
        process.wait(TIMEOUT_SEC)
        reader.join(TIMEOUT_SEC)
        process.stderr.close()


class Page:
    """
    One tab.

    :ivar complaints: what came to the console as an error.
    """

    def __init__(self, address: str, url: str, size=(1280, 980), is_dark=False) -> None:
        """Open it."""
        self._stack = ExitStack()
        socket = connect(address, max_size=None, compression=None)
        self._socket = self._stack.enter_context(socket)
        self._ids, self._session, self.complaints = itertools.count(1), None, []
        target = self._call('Target.createTarget', url='about:blank')['targetId']
        found = self._call('Target.attachToTarget', targetId=target, flatten=True)
        self._session = found['sessionId']
        for domain in ('Page', 'Runtime', 'Log'):
            self._call(f'{domain}.enable')
        width, height = size
        self._call(
            'Emulation.setDeviceMetricsOverride',
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 500,
        )
        scheme = {'name': 'prefers-color-scheme', 'value': 'dark' if is_dark else 'light'}
        self._call('Emulation.setEmulatedMedia', features=[scheme])
        self._call('Page.navigate', url=url)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._call('Page.close')
        self._stack.close()

    def value(self, expression: str):
        """Return the value of an expression of the page."""
        answer = self._call('Runtime.evaluate', expression=expression, returnByValue=True)
        assert 'exceptionDetails' not in answer, answer
        return answer['result'].get('value')

    def text(self, id: str) -> str:
        """Return the text of an element."""
        return self.value(f'document.getElementById({id!r}).textContent')

    def wait_for(self, expression: str, timeout_sec: float = TIMEOUT_SEC):
        """Wait until an expression of the page is true."""
        return wait_for(lambda: self.value(expression), timeout_sec)

    def click(self, x: float, y: float) -> None:
        """Click at a place of the window."""
        for kind in ('mousePressed', 'mouseReleased'):
            self._call(
                'Input.dispatchMouseEvent', type=kind, x=x, y=y, button='left', clickCount=1
            )

    def press(self, key: str) -> None:
        """Press a key."""
        for kind in ('keyDown', 'keyUp'):
            self._call('Input.dispatchKeyEvent', type=kind, key=key)

    def screenshot(self, path, is_whole=False) -> None:
        """Save a picture."""
        data = self._call('Page.captureScreenshot', captureBeyondViewport=is_whole)['data']
        path.write_bytes(base64.b64decode(data))

    def _call(self, method: str, **parameters) -> dict:
        """Call the browser and return its answer; take note of what it says meanwhile."""
        message = {'id': next(self._ids), 'method': method, 'params': parameters}
        if self._session is not None:
            message['sessionId'] = self._session
        self._socket.send(json.dumps(message))
        while True:
            answer = json.loads(self._socket.recv(TIMEOUT_SEC))
            if answer.get('id') == message['id']:
                assert 'error' not in answer, (method, answer)
                return answer['result']
            self._take_note(answer)

    def _take_note(self, event: dict) -> None:
        """Keep complaints."""
        parameters = event.get('params', {})
        is_error = {
            'Runtime.exceptionThrown': True,
            'Log.entryAdded': parameters.get('entry', {}).get('level') == 'error',
            'Runtime.consoleAPICalled': parameters.get('type') in ('error', 'assert'),
        }
        if is_error.get(event.get('method')):
            self.complaints.append(parameters)
