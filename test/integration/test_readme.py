"""What README.md and docs/parameters.md say is what the code does."""

import re
import runpy
from pathlib import Path

import pytest
from conftest import wait_for

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


def test_state_size_is_the_one_of_the_default_model():
    from cmanp_ros.field import NeuralField

    sizes = set(re.findall(r'([\d,]+) bytes', README))
    assert sizes == {f'{NeuralField.load().tile_nbytes:,}'}


def test_accuracy_is_the_one_recorded():
    script = runpy.run_path(str(ROOT / 'scripts' / 'write_accuracy.py'))
    assert script['readme_table']() in README
    page = (ROOT / 'docs' / 'accuracy.md').read_text(encoding='utf-8')
    assert page == script['page']()
