"""
The launch files, run for real.

They need launch and launch_ros, and cmanp_ros in the ament index: skipped, with the reason, where
one of these is missing. RViz is not needed: a stand-in writes down how it was called.
"""

import importlib.util
import os
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from conftest import wait_for

LAUNCH = Path(__file__).parents[2] / 'launch'
START_SEC = 60.0  # torch is slow to import where other processes need the cores
COMMON = {'checkpoint', 'rviz'}
ARGUMENTS = {
    'cmanp.launch.py': COMMON
    | {'namespace', 'use_sim_time', 'params_file', 'autostart', 'use_respawn', 'log_level'},
    'demo.launch.py': COMMON | {'duration', 'window', 'seed'},
}
RUN = """
import sys
from launch import LaunchDescription, LaunchService
from launch.actions import IncludeLaunchDescription
from launch.launch_description_sources import PythonLaunchDescriptionSource
file, *arguments = sys.argv[1:]
included = IncludeLaunchDescription(
    PythonLaunchDescriptionSource(file), launch_arguments=[a.split(':=', 1) for a in arguments]
)
service = LaunchService(noninteractive=True)
service.include_launch_description(LaunchDescription([included]))
sys.exit(service.run())
"""
STAND_IN = '#!/bin/sh\nprintf "%s\\n" "$@" > "$RVIZ_ARGUMENTS"\n'


def missing():
    """Say what is missing; the folder ./launch of this repository is no package `launch`."""
    try:
        import_module('launch').LaunchDescription  # noqa: B018
        import_module('launch_ros.actions')
        import_module('ament_index_python').get_package_prefix('cmanp_ros')
    except (ImportError, AttributeError, LookupError, OSError) as error:
        return f'{error}; install launch_ros, and source the workspace of cmanp_ros'
    return ''


REASON = missing()
pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON)


class Launched:
    """A launch file run in a process of its own."""

    def __init__(self, file, arguments, env, folder):
        """Start it; its output goes to a file."""
        self._log = folder / 'output.txt'
        with open(self._log, 'wb') as log:
            self.process = subprocess.Popen(
                [sys.executable, '-c', RUN, str(LAUNCH / file), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=env,
                cwd=folder,
                start_new_session=True,
            )

    @property
    def output(self):
        """Return what it has printed so far."""
        return self._log.read_text(encoding='utf-8', errors='replace')

    def end(self):
        """Wait until it ends by itself, and return its exit status."""
        return self.process.wait(START_SEC)

    def stop(self):
        """Interrupt it, and return its exit status."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(START_SEC)


@pytest.fixture
def rviz_arguments(tmp_path):
    """Return the file into which the stand-in for rviz2 writes its arguments."""
    return tmp_path / 'rviz_arguments.txt'


@pytest.fixture
def run(domain_id, tmp_path, rviz_arguments):
    """Return a function that runs a launch file in the test's domain."""
    prefix, started = tmp_path / 'prefix', []
    for file, text in (
        (prefix / 'share/ament_index/resource_index/packages/rviz2', ''),
        (prefix / 'lib/rviz2/rviz2', STAND_IN),
    ):
        file.parent.mkdir(parents=True)
        file.write_text(text)
        file.chmod(0o755)
    env = os.environ | {
        'AMENT_PREFIX_PATH': f'{prefix}{os.pathsep}{os.environ["AMENT_PREFIX_PATH"]}',
        'ROS_DOMAIN_ID': str(domain_id),
        'ROS_LOG_DIR': str(tmp_path / 'log'),
        'TMPDIR': str(tmp_path),
        'RVIZ_ARGUMENTS': str(rviz_arguments),
    }

    def start(file, *arguments):
        started.append(Launched(file, arguments, env, tmp_path))
        return started[-1]

    yield start
    for launched in started:
        try:
            launched.stop()
        finally:
            try:
                os.killpg(launched.process.pid, signal.SIGKILL)  # whatever it left behind
            except ProcessLookupError:
                pass


@pytest.fixture(scope='module')
def cmanp():
    """Return the module launch/cmanp.launch.py."""
    spec = importlib.util.spec_from_file_location('cmanp_launch', LAUNCH / 'cmanp.launch.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ask(client, service_type, name, **request):
    """Call a service of a node that may still be starting, and return the response."""
    asked = client.node.create_client(service_type, name)
    wait_for(asked.service_is_ready, START_SEC)
    future = asked.call_async(service_type.Request(**request))
    wait_for(future.done, START_SEC)
    client.node.destroy_client(asked)
    return future.result()


def state_of(client, name):
    """Ask a node for its lifecycle state."""
    from lifecycle_msgs.srv import GetState

    return ask(client, GetState, f'{name}/get_state').current_state.label


def parameters_of(client, name, *names):
    """Ask a node for parameters."""
    from rcl_interfaces.srv import GetParameters
    from rclpy.parameter import parameter_value_to_python

    values = ask(client, GetParameters, f'{name}/get_parameters', names=names).values
    return [parameter_value_to_python(value) for value in values]


@pytest.mark.parametrize('file', ARGUMENTS)
def test_launch_file_has_exactly_these_arguments(file):
    from launch.launch_description_sources import get_launch_description_from_python_launch_file

    description = get_launch_description_from_python_launch_file(str(LAUNCH / file))
    arguments = description.get_launch_arguments()
    assert {argument.name for argument in arguments} == ARGUMENTS[file]
    assert all(argument.description for argument in arguments)
    assert all(argument.default_value is not None for argument in arguments)


def test_cmanp_brings_up_an_active_node_in_the_namespace_and_ends_cleanly(
    run, client, rviz_arguments
):
    from cmanp_ros.srv import Predict
    from std_msgs.msg import Header

    launched = run('cmanp.launch.py', 'namespace:=robot1', 'rviz:=true')
    wait_for(lambda: state_of(client, '/robot1/cmanp') == 'active', START_SEC)
    request = {'header': Header(frame_id='map'), 'dim_x': 2, 'x': [1.0, 2.0]}
    response = ask(client, Predict, '/robot1/cmanp/predict', **request)
    assert response.success and response.prediction.stddev[0] > 0

    arguments = rviz_arguments.read_text().splitlines()
    config = yaml.safe_load(Path(arguments[arguments.index('-d') + 1]).read_text())
    assert '__ns:=/robot1' in arguments
    for display in config['Visualization Manager']['Displays']:
        for key in {'Topic', 'Update Topic'} & display.keys():
            topic = display[key]['Value']
            assert f'{topic}:={topic.removeprefix("/")}' in arguments
    assert launched.stop() == 0
    assert 'process has finished cleanly' in launched.output
    assert 'cmanp_node-1]: process has died' not in launched.output


def test_arguments_override_the_file_only_where_they_are_given(run, client, tmp_path):
    file = tmp_path / 'mine.yaml'
    own = {'autostart': False, 'grid_resolution': 2, 'checkpoint': 'field', 'max_samples': 7}
    file.write_text(yaml.safe_dump({'/**': {'ros__parameters': own}}))
    run('cmanp.launch.py', f'params_file:={file}', 'checkpoint:=12', 'use_sim_time:=True')
    assert state_of(client, '/cmanp') == 'unconfigured'
    names = ('autostart', 'grid_resolution', 'max_samples', 'checkpoint', 'use_sim_time')
    assert parameters_of(client, '/cmanp', *names) == [False, 2.0, 7, '12', True]


@pytest.mark.parametrize(
    'argument, text',
    [
        ('params_file:=nowhere.yaml', "params_file is 'nowhere.yaml', which is no file"),
        ('autostart:=maybe', 'Argument "autostart" provided value "maybe" is not valid'),
        ('log_level:=loud', 'Argument "log_level" provided value "loud" is not valid'),
        ('namespace:=2nd', 'namespace must not have a token that starts with a number'),
    ],
)
def test_argument_that_cannot_be_used_is_an_error(run, argument, text):
    launched = run('cmanp.launch.py', argument)
    assert launched.end() == 1
    assert text in launched.output


def test_unknown_parameter_in_the_file_is_named(run, tmp_path):
    file = tmp_path / 'mine.yaml'
    file.write_text('/**:\n  ros__parameters:\n    grid_resolutoin: 0.5\n')
    launched = run('cmanp.launch.py', f'params_file:={file}')
    launched.end()
    text = "unknown parameter 'grid_resolutoin'; did you mean 'grid_resolution'?"
    assert text in launched.output
    assert 'process has died' in launched.output


def test_file_with_nothing_for_the_node_is_a_warning(run, tmp_path):
    file = tmp_path / 'mine.yaml'
    file.write_text('cmanp:\n  ros__parameters:\n    grid_resolution: 0.5\n')
    arguments = ('namespace:=robot1', f'params_file:={file}', 'checkpoint:=nowhere')
    launched = run('cmanp.launch.py', *arguments)
    launched.end()
    assert f"nothing in '{file}' is for /robot1/cmanp" in launched.output
    assert "no checkpoint 'nowhere'" in launched.output


def test_demo_has_the_defaults_of_the_command():
    from launch import LaunchContext
    from launch.launch_description_sources import get_launch_description_from_python_launch_file

    from cmanp_ros.cli.demo import _options

    description = get_launch_description_from_python_launch_file(str(LAUNCH / 'demo.launch.py'))
    context, options = LaunchContext(), vars(_options([]))
    for argument in description.get_launch_arguments():
        if argument.name != 'rviz':
            (default,) = argument.default_value
            default = default.perform(context)
            assert type(options[argument.name])(default) == options[argument.name]


def test_demo_drives_and_the_node_folds_what_the_rover_sees(run, client, rviz_arguments):
    from diagnostic_msgs.msg import DiagnosticStatus
    from rclpy.qos import DurabilityPolicy, QoSProfile

    latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
    statuses = client.collect(DiagnosticStatus, '/cmanp/status', latched)
    launched = run('demo.launch.py', 'duration:=2', 'window:=2000')

    def folded():
        values = {pair.key: pair.value for status in statuses[-1:] for pair in status.values}
        return int(values.get('observations_folded', 0)) > 500

    wait_for(folded, START_SEC)
    arguments = rviz_arguments.read_text().splitlines()
    fitted = yaml.safe_load(Path(arguments[arguments.index('-d') + 1]).read_text())
    as_shipped = yaml.safe_load((LAUNCH.parent / 'config' / 'cmanp.rviz').read_text())
    distances = [
        config['Visualization Manager']['Views']['Current']['Distance']
        for config in (fitted, as_shipped)
    ]
    assert distances[0] == distances[1] * 2000 / 50
    assert launched.stop() == 0
