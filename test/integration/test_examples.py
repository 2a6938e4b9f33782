"""The examples, run for real with short settings."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / 'examples'
TIMEOUT_SEC = 240.0  # of a busy computer; seconds on an idle one

pytestmark = pytest.mark.timeout(300)


def run(*command, **environment):
    """Run a program to its end and return what it printed."""
    env = os.environ | {'OMP_NUM_THREADS': '1'} | environment
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=TIMEOUT_SEC)
    assert done.returncode == 0, done.stderr
    return done.stdout


def said_in(example):
    """Return the lines that the comment of an example says it prints, without numbers."""
    text = (EXAMPLES / example).read_text(encoding='utf-8').split('"""')[1]
    return [without_numbers(line[4:]) for line in text.splitlines() if line.startswith('    ')]


def without_numbers(line):
    """Leave out what differs from run to run."""
    return re.sub(r'\s+', ' ', re.sub(r'-?\d[\d.]*(e-?\d+)?', '0', line)).strip()


def test_informative_survey_prints_what_it_says_and_draws(tmp_path):
    picture = tmp_path / 'survey.png'
    script = EXAMPLES / 'informative_survey.py'
    out = run(sys.executable, script, '--budget', '30', '--picture', picture)
    assert [without_numbers(line) for line in out.splitlines()] == said_in(script.name)
    assert picture.stat().st_size > 10_000


def test_two_robots_have_the_map_of_one():
    out = run(sys.executable, EXAMPLES / 'two_robots.py')
    assert [without_numbers(line) for line in out.splitlines()] == said_in('two_robots.py')
    mean, stddev = re.search(r'mean (\S+), stddev (\S+)', out).groups()
    assert max(float(mean), float(stddev)) < 1e-4


@pytest.fixture
def asked(start_node, domain_id):
    """Return a function that runs a client beside a node."""
    start_node()
    return lambda *command: run(*command, ROS_DOMAIN_ID=str(domain_id))


def check_answer(out):
    """Two lines, each a location, mean and stddev of the prior: nothing was observed."""
    answers = re.findall(r'^\((\S+), (\S+)\): (\S+) \+- (\S+)$', out, re.MULTILINE)
    assert [tuple(map(float, answer)) for answer in answers] == [(1, 2, 0, 1), (3, 4, 0, 1)]


def test_client_gets_an_answer(asked):
    check_answer(asked(sys.executable, EXAMPLES / 'client.py'))


def test_client_that_nobody_answers_says_so(domain_id):
    with pytest.raises(AssertionError, match='^nobody answers cmanp/predict: run cmanp doctor'):
        run(sys.executable, EXAMPLES / 'client.py', ROS_DOMAIN_ID=str(domain_id))


def rclcpp_is_here():
    """Tell whether C++ nodes can be built."""
    prefixes = [*os.environ.get('AMENT_PREFIX_PATH', '').split(os.pathsep), sys.prefix]
    return any((Path(prefix) / 'share' / 'rclcpp' / 'cmake').is_dir() for prefix in prefixes)


@pytest.mark.skipif(
    not rclcpp_is_here(), reason='no rclcpp: there is no wheel of it; apt install ros-jazzy-rclcpp'
)
def test_cpp_client_gets_an_answer(asked, tmp_path):
    cmake = shutil.which('cmake') or str(Path(sys.executable).parent / 'cmake')
    run(cmake, '-S', EXAMPLES / 'cpp_client', '-B', tmp_path)
    run(cmake, '--build', tmp_path)
    check_answer(asked(tmp_path / 'client'))
