"""`cmanp demo` for real: three processes over DDS, and nothing left behind."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest
import torch
from conftest import wait_for

from cmanp_ros.checkpoint import save_model, shipped_models
from cmanp_ros.core import CMANP, CMANPConfig

START = [sys.executable, '-c', 'import sys; from cmanp_ros.cli import main; sys.exit(main())']
TIMEOUT_SEC = 120.0  # of a whole run on a busy machine


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    """Return the shipped model, or while there is none one that is not trained."""
    if 'field' in shipped_models():
        return 'field'
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp('model') / 'untrained.safetensors'
    return str(save_model(CMANP(CMANPConfig.field(2, 1)), path))


def command(checkpoint, folder, *options):
    """Return the command line of a demo."""
    output = ['--output', str(folder / 'demo.png'), '--plain', '--checkpoint', checkpoint]
    return [*START, 'demo', *output, *options]


@pytest.fixture(scope='module')
def finished(checkpoint, tmp_path_factory):
    """Run the demo once: what it printed, and its folder."""
    folder = tmp_path_factory.mktemp('demo')
    process = subprocess.run(
        command(checkpoint, folder, '--duration', '12'),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SEC,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout, folder


@pytest.fixture(scope='module')
def report(finished):
    return json.loads((finished[1] / 'demo.json').read_text())


def test_nothing_is_missing(report):
    assert report['missing'] == []


def test_state_of_a_tile_is_as_large_at_the_end_as_before_the_first_observation(report):
    assert report['start']['folded'] == 0 < report['end']['folded']
    assert report['start']['tile_bytes'] == report['end']['tile_bytes'] > 0
    assert {row['tile_bytes'] for row in report['series']} == {report['end']['tile_bytes']}


def test_every_published_point_is_accounted_for(report):
    observed = report['observations']
    assert observed['published_messages'] == 120
    settled = observed['folded'] + sum(observed['rejected'].values()) + observed['dropped']
    received = observed['published'] - observed['not_received']  # best effort may lose some
    assert received == settled + observed['pending']
    assert observed['rejected']['not_finite'] > 0
    assert observed['folded'] == report['end']['folded']


def test_error_falls_and_intervals_cover(report):
    assert report['end']['rmse'] < 0.5 * report['start']['rmse']
    assert 0.7 <= report['end']['coverage'] <= 1.0
    assert report['end']['log_likelihood'] > report['start']['log_likelihood']


def test_service_topic_and_map_answer_alike(report):
    answers = report['answers']
    assert answers['service'] == answers['service_asked'] > 5
    assert answers['topic'] == answers['topic_asked'] > 5
    assert answers['field'] > 5
    assert answers['difference_m'] < 0.01


def test_picture_is_there_and_not_blank(finished):
    image = matplotlib.image.imread(finished[1] / 'demo.png')
    assert min(image.shape[:2]) > 1000
    assert image[..., :3].std() > 0.1


def test_summary_tells_the_size_of_a_tile_twice_and_no_escape_codes(finished, report):
    assert finished[0].count(f'{report["end"]["tile_bytes"]:,}') >= 2
    assert 'complete' in finished[0]
    assert '\x1b' not in finished[0]


def test_node_that_cannot_start_is_explained_and_nothing_else_hangs(tmp_path):
    process = subprocess.run(
        command('no_such_model', tmp_path), capture_output=True, text=True, timeout=TIMEOUT_SEC
    )
    assert process.returncode == 1
    assert 'the node ended early' in process.stderr
    assert "no checkpoint 'no_such_model'" in process.stderr  # from the end of its log
    assert 'Traceback' not in process.stderr


def alive(pid):
    """Tell whether a process runs; one that waits to be reaped does not."""
    try:
        return Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()[0] != 'Z'
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='reads /proc')
@pytest.mark.parametrize(
    ('phase', 'number', 'status'),
    [
        ('driving', signal.SIGINT, 130),
        ('starting', signal.SIGTERM, 143),
        ('starting', signal.SIGKILL, -signal.SIGKILL),
    ],
)
def test_no_process_is_left_behind(checkpoint, tmp_path, phase, number, status):
    demo = subprocess.Popen(
        command(checkpoint, tmp_path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    children = []
    try:
        lines = []
        for line in demo.stdout:
            lines.append(line)
            if line.startswith(phase):
                break
        children = Path(f'/proc/{demo.pid}/task/{demo.pid}/children').read_text().split()
        assert len(children) == 3 and all(alive(pid) for pid in children), ''.join(lines)
        demo.send_signal(number)
        output, _ = demo.communicate(timeout=30.0)
        assert demo.returncode == status, output
        wait_for(lambda: not any(alive(pid) for pid in children), 10.0)
        assert 'Traceback' not in output
    finally:
        demo.kill()
        for pid in children:
            if alive(pid):
                os.kill(int(pid), signal.SIGKILL)
