"""Who may import whom, executed in fresh interpreters; and each check is shown to fail."""

import ast
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ALLOWED_IN_CORE = ('torch', 'numpy', 'jaxtyping', 'threadpoolctl')
MODULES = {'PyYAML': 'yaml'}  # distribution -> module, where the names differ
ROS = re.compile(
    r'(rclpy|rpyutils|tf2_\w+|ament_\w+|rosidl_\w+|launch(_\w+)?|\w+_(msgs|srvs|interfaces)'
    r'|cmanp_ros\.(msg|srv))(\.|$)'
)
NODE = re.compile(r'cmanp_ros\.node(\.|$)')


def package_folder():
    """Return where the package's own modules are: the source tree, also if linked from there."""
    spec = find_spec('cmanp_ros.core')
    return Path(spec.origin).resolve().parent.parent


def modules(folder=None, package='cmanp_ros'):
    """Return the names of all modules of a package, and their files."""
    folder = folder or package_folder()
    named = {}
    for path in sorted(folder.rglob('*.py')):
        parts = path.relative_to(folder).with_suffix('').parts
        parts = parts[:-1] if parts[-1] == '__init__' else parts
        named['.'.join([package, *parts])] = path
    return named


def is_below(name, *packages):
    return any(name == package or name.startswith(f'{package}.') for package in packages)


PARTS_WITHOUT_ROS = (
    *('core', 'training', 'evaluation', 'checkpoint', 'store', 'field'),
    *(
        'maps',
        'fleet',
        'admission',
        'health',
        'planning',
        'worker',
        'helper',
        'memory',
        'motion',
        'recordings',
        'cli.replay',
    ),
)
WITHOUT_ROS = [
    name
    for name in modules()
    if is_below(name, *(f'cmanp_ros.{part}' for part in PARTS_WITHOUT_ROS))
]


def run(code, path=()):
    """Run Python code in a fresh interpreter, outside this folder; return its words."""
    code = f'import sys; sys.path[:0] = {[str(p) for p in path]}\n{code}'
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd='/')
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def loaded_by(names, path=()):
    """Return every module that is loaded once these are imported."""
    lines = [f'import {name}' for name in names]
    return run('\n'.join([*lines, 'print(*sys.modules)']), path)


def new_with(names, allowed, path=()):
    """Return what importing `names` adds, beyond the allowed and the standard library."""
    before = '\n'.join(f'import {name}' for name in allowed)
    after = '\n'.join(f'import {name}' for name in names)
    new = run(
        f'{before}\nbefore = set(sys.modules)\n{after}\nprint(*set(sys.modules) - before)', path
    )
    known = (*allowed, *sys.stdlib_module_names)
    return sorted(name for name in new if not is_below(name, *known))


def imports(path):
    """Return all that a file imports, inside of functions too, and by name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{path}: relative import'
            found |= {node.module} | {f'{node.module}.{alias.name}' for alias in node.names}
        elif isinstance(node, ast.Call) and getattr(node.func, 'id', '') == 'import_module':
            first = node.args[0]
            found |= {first.value} if isinstance(first, ast.Constant) else set()
    return found


def importers(pattern, folder=None, package='cmanp_ros'):
    """Return the modules that import what matches the pattern, at any place in their code."""
    return [
        name
        for name, path in modules(folder, package).items()
        if any(pattern.match(imported) for imported in imports(path))
    ]


# The rules ---------------------------------------------------------------------------------------


def test_core_loads_nothing_but_its_four_libraries():
    core = [name for name in modules() if is_below(name, 'cmanp_ros.core')]
    assert len(core) > 10
    new = new_with(core, ALLOWED_IN_CORE)
    assert [name for name in new if not is_below(name, 'cmanp_ros.core')] == ['cmanp_ros']


def test_core_imports_nothing_else_when_it_is_called():
    for name, path in modules().items():
        if is_below(name, 'cmanp_ros.core'):
            for imported in imports(path):
                known = ('cmanp_ros.core', *ALLOWED_IN_CORE, *sys.stdlib_module_names)
                assert is_below(imported, *known), f'{name} imports {imported}'


def test_nothing_below_the_node_loads_ros():
    for part in PARTS_WITHOUT_ROS:
        assert any(is_below(name, f'cmanp_ros.{part}') for name in WITHOUT_ROS)
    assert not [name for name in loaded_by(WITHOUT_ROS) if ROS.match(name)]


def test_nothing_below_the_node_imports_ros_when_it_is_called():
    assert not [name for name in importers(ROS) if name in WITHOUT_ROS]


def test_nobody_imports_the_node_but_the_command_line():
    assert 'cmanp_ros.node' in modules()
    assert not [name for name in importers(NODE) if not is_below(name, 'cmanp_ros.cli')]


def test_what_core_imports_is_required_to_run():
    requirements = package_folder().parent / 'requirements' / 'run.txt'
    if not requirements.is_file():
        pytest.skip('not in the source tree')
    required = re.findall(r'^[\w-]+', requirements.read_text(), re.MULTILINE)
    required = {MODULES.get(name, name) for name in required}
    missing = {
        imported.split('.')[0]
        for name in WITHOUT_ROS
        if not is_below(name, 'cmanp_ros.evaluation')  # says what is missing when it is called
        for imported in imports(modules()[name])
        if not is_below(imported, 'cmanp_ros', *sys.stdlib_module_names)
    } - required
    assert not missing


# The rules can fail ------------------------------------------------------------------------------


@pytest.fixture
def violator(tmp_path):
    """Write a package that breaks every rule, and ROS packages that it can import."""
    for name in ('rclpy', 'made_up_msgs', 'made_up_library'):
        (tmp_path / f'{name}.py').touch()
    package = tmp_path / 'violator'
    package.mkdir()
    for name, code in {
        '__init__': '',
        'at_import': 'import made_up_library\nfrom made_up_msgs import *',
        'when_called': 'def f():\n    import rclpy.node',
        'innocent': 'import torch, json\nfrom cmanp_ros.core import State',
        'node_user': 'def f():\n    from cmanp_ros import node',
        'node_user_by_name': (
            'from importlib import import_module\n'
            "def f():\n    return import_module('cmanp_ros.node')"
        ),
    }.items():
        (package / f'{name}.py').write_text(code)
    return package


def test_a_foreign_library_in_core_is_found(violator):
    path = [violator.parent]
    new = new_with(['violator.at_import'], ['json'], path)
    assert new == ['made_up_library', 'made_up_msgs', 'violator', 'violator.at_import']
    assert new_with(['violator'], ['json'], path) == ['violator']


def test_ros_that_is_loaded_is_found(violator):
    loaded = loaded_by(['violator.at_import'], [violator.parent])
    assert [name for name in loaded if ROS.match(name)] == ['made_up_msgs']
    loaded = loaded_by(['violator'], [violator.parent])
    assert not [name for name in loaded if ROS.match(name)]


def test_ros_that_is_imported_later_is_found(violator):
    found = importers(ROS, violator, 'violator')
    assert found == ['violator.at_import', 'violator.when_called']


def test_users_of_the_node_are_found(violator):
    found = importers(NODE, violator, 'violator')
    assert found == ['violator.node_user', 'violator.node_user_by_name']


@pytest.mark.parametrize(
    ('name', 'is_ros'),
    [
        ('rclpy', True),
        ('rclpy.node', True),
        ('sensor_msgs.msg', True),
        ('std_srvs', True),
        ('builtin_interfaces.msg', True),
        ('rcl_interfaces', True),
        ('cmanp_ros.msg', True),
        ('cmanp_ros.srv._predict', True),
        ('tf2_ros', True),
        ('launch', True),
        ('cmanp_ros.core', False),
        ('cmanp_ros.field', False),
        ('torch.msgs', False),
        ('numpy', False),
    ],
)
def test_ros_is_recognized_by_name(name, is_ros):
    assert bool(ROS.match(name)) == is_ros
