"""The parameters of a node from its YAML file, as ROS would read it, without ROS."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from cmanp_ros.core.errors import ConfigError
from cmanp_ros.parameters import NodeParameters, parameters_from, without_those_of_ros

NODE = 'cmanp'


def read(path: str | Path | None, settings: Sequence[str] = ()) -> NodeParameters:
    """
    Read the parameters of the node `cmanp`.

    :param path: a parameter file of ROS 2; None: defaults.
    :param settings: each 'NAME:=VALUE', which come before those of the file.
    :return: validated parameters.
    :raises ConfigError: no such file, none for this node in it, or values that cannot be used.
    """
    values = {} if path is None else _of_file(Path(path))
    for setting in settings:
        name, mark, value = setting.partition(':=')
        if not mark or not name:
            raise ConfigError(f'-p {setting}: expected NAME:=VALUE, such as tile_size:=5.0')
        values[name] = _parsed(value, f'-p {setting}')
    return parameters_from(without_those_of_ros(values))


def is_for(path: str | Path, full_name: str) -> bool:
    """
    Tell whether anything in a file is for a node, as rcl decides: * is one name, ** any number.

    :param path: a parameter file of ROS 2.
    :param full_name: of the node, with its namespace.
    :raises ConfigError: no such file, or none that can be read.
    """
    patterns = (
        re.escape(name.rstrip('/')).replace(r'/\*\*', '(/[^/]+)*').replace(r'\*', '[^/]+')
        for name, _ in _nodes(_content(Path(path)))
    )
    return any(re.fullmatch(pattern, full_name) for pattern in patterns)


def _of_file(path: Path) -> dict[str, Any]:
    nodes = dict(_nodes(_content(path)))
    ours = [name for name in nodes if name.split('/')[-1] in (NODE, '*', '**')]
    if not ours:
        raise ConfigError(
            f'{path} has no parameters of a node {NODE!r}, but of {", ".join(nodes) or "none"}; '
            f"expected '/**:' or '{NODE}:', below it 'ros__parameters:' and below that the names"
        )
    return {name: value for node in ours for name, value in _flat(nodes[node])}


def _content(path: Path) -> Any:
    try:
        return _parsed(path.read_text(encoding='utf-8'), str(path))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, 'strerror', None) or error
        raise ConfigError(f'{path}: {reason}; expected a parameter file of ROS 2') from error


def _nodes(content: Any, name: str = '') -> Iterator[tuple[str, Mapping]]:
    """Find the parameters of each node, also below namespaces."""
    if isinstance(content, Mapping):
        if isinstance(content.get('ros__parameters'), Mapping):
            yield name, content['ros__parameters']
        for key, below in content.items():
            if key != 'ros__parameters':
                yield from _nodes(below, f'{name}/{key}'.replace('//', '/'))


def _flat(values: Mapping, start: str = '') -> Iterator[tuple[str, Any]]:
    """Write names below names with dots."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f'{start}{name}.')
        else:
            yield f'{start}{name}', value


def _parsed(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # such as a date that is none
        raise ConfigError(f'{where}: {error}; expected YAML') from error
