"""What README.md and docs/parameters.md say is what the code does."""

import re
import runpy
import shlex
import textwrap
from pathlib import Path

import numpy as np
import pytest
from conftest import wait_for

from cmanp_ros import cli
from cmanp_ros.field import NeuralField

ROOT = Path(__file__).parents[2]
README = (ROOT / 'README.md').read_text(encoding='utf-8')
PARAMETERS = (ROOT / 'docs' / 'parameters.md').read_text(encoding='utf-8')
COMMON = {'/parameter_events', '/rosout', '/cmanp/transition_event', '/clock'}
BUILT_IN = {'rcl_interfaces', 'lifecycle_msgs', 'type_description_interfaces'}


def documented(kind):
    """Return name -> type of a kind of row of the table of topics and services."""
    rows = re.findall(rf'^\| {kind} \| `([^`]+)` \| `([^`]+)` \|', PARAMETERS, re.MULTILINE)
    return {'/' + name.replace('~', 'cmanp').lstrip('/'): type_name for name, type_name in rows}


@pytest.mark.parametrize(
    ('kind', 'method'),
    [
        ('in', 'get_subscriber_names_and_types_by_node'),
        ('out', 'get_publisher_names_and_types_by_node'),
        ('service', 'get_service_names_and_types_by_node'),
    ],
)
def test_table_of_topics_and_services_is_what_the_running_node_has(
    start_node, client, kind, method
):
    start_node()
    wait_for(lambda: ('cmanp', '/') in client.node.get_node_names_and_namespaces())

    def found():
        names = getattr(client.node, method)('cmanp', '/')
        return {
            name: types[0]
            for name, types in names
            if name not in COMMON and types[0].split('/')[0] not in BUILT_IN
        }

    expected = documented(kind)
    assert expected
    wait_for(lambda: expected.items() <= found().items())
    assert found() == expected


def test_python_snippet_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    snippet = re.search(r'```python\n(.*?)```', README, re.DOTALL).group(1)
    names = {}
    exec(compile(snippet, 'README.md', 'exec'), names)
    assert names['mean'].shape == names['stddev'].shape == (2, 1)
    assert (tmp_path / 'field.safetensors').is_file()


def test_lines_for_a_bag_run_with_the_parameters_for_the_robot(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / 'test' / 'unit')
    from recording_files import cloud, write_bag

    monkeypatch.chdir(tmp_path)
    block = re.search(r'^    /\*\*:\n(?:    .*\n)+', README, re.MULTILINE).group()
    Path('my_field.yaml').write_text(textwrap.dedent(block))
    points = np.random.default_rng(0).uniform(-9, 9, (53, 3)) + (0, 0, 12)
    write_bag(Path('my_bag'), [('/lidar/points', 5.0, cloud(points, 'map', 5.0))])
    lines = re.findall(r'^    cmanp (.*)$', README, re.MULTILINE)
    assert [line.split()[0] for line in lines] == ['replay', 'plot']
    for line in lines:
        assert cli.main(shlex.split(line)) == 0
    found = NeuralField.restore('my_field.safetensors')
    assert (found.num_observations, found.geometry.tile_size) == (53, 5.0)
    assert Path('mean_and_stddev.png').read_bytes()[1:4] == b'PNG'


def test_state_size_is_the_one_of_the_default_model():
    sizes = set(re.findall(r'([\d,]+) bytes', README))
    assert sizes == {f'{NeuralField.load().tile_nbytes:,}'}


def test_accuracy_is_the_one_recorded():
    script = runpy.run_path(str(ROOT / 'scripts' / 'write_accuracy.py'))
    assert script['readme_table']() in README
    page = (ROOT / 'docs' / 'accuracy.md').read_text(encoding='utf-8')
    assert page == script['page']()
