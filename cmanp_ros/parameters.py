"""
One table declares every parameter of the node: type, default, range, unit and text.

The table is the fields of `NodeParameters`. The node's declarations, config/cmanp.yaml and the
table in README.md are made from it, and nothing here needs ROS until `declare` is called.
"""

from __future__ import annotations

import array
import dataclasses
import difflib
import math
import numbers
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

from cmanp_ros.core.errors import ConfigError

_NOT_OURS = ('use_sim_time', 'start_type_description_service')  # ROS declares these itself
_KINDS = {bool: 'bool', int: 'int', float: 'double', str: 'string', tuple: 'double[]'}


def _parameter(default, text, unit='', lower=None, upper=None, read_only=True):
    """Describe one parameter; lower and upper bound each number of it, both included."""
    metadata = {'text': text, 'unit': unit, 'lower': lower, 'upper': upper, 'read_only': read_only}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class NodeParameters:
    """Validated parameters of the node; making one that cannot be used raises `ConfigError`."""

    autostart: bool = _parameter(True, 'Configure and activate without a lifecycle manager.')
    checkpoint: str = _parameter(
        'field',
        'Weights of the model: name of a shipped checkpoint, or path of a .safetensors file.',
    )
    device: str = _parameter('cpu', "Where the model runs: 'cpu', 'cuda' or 'cuda:<index>'.")
    num_threads: int = _parameter(1, 'CPU threads that the model may use.', lower=1, upper=64)
    map_frame: str = _parameter(
        'map', 'Frame in which the field is kept; observations and queries are transformed to it.'
    )
    bounds_min: tuple[float, ...] = _parameter(
        (-25.0, -25.0), 'Lower corner of the workspace in the map frame, one number per axis.', 'm'
    )
    bounds_max: tuple[float, ...] = _parameter(
        (25.0, 25.0), 'Upper corner of the workspace in the map frame, one number per axis.', 'm'
    )
    tile_size: float = _parameter(
        0.0,
        'Spacing of the finest tiles; `cmanp evaluate tile-size` proposes one from recorded '
        'observations. 0: a tenth of the longest side of the bounds.',
        'm',
        0.0,
        1e9,
    )
    one_tile: bool = _parameter(
        False, 'Use a single tile over the bounds, as in the paper, which are a border then.'
    )
    max_tiles: int = _parameter(
        2048,
        'Tiles kept in memory; beyond it the least recently used go to the store.',
        'tiles',
        128,
        10000000,
    )
    store: str = _parameter(
        '',
        'File that takes the tiles that do not fit in memory, and is read again at the next '
        'start; empty: they are dropped and counted.',
    )
    store_period: float = _parameter(
        30.0,
        'How often what changed is written to the store: the most that a crash may cost.',
        's',
        0.1,
        86400.0,
    )
    value_field: str = _parameter('z', 'Field of the clouds on points that holds the value.')
    value_offset: float = _parameter(
        0.0,
        'Typical value of the field; predictions far from any observation return to it.',
        'field units',
    )
    value_scale: float = _parameter(
        1.0, 'Typical deviation of the field from value_offset.', 'field units', 1e-9, 1e9
    )
    chunk_size: int = _parameter(
        1024, 'Points folded at once; bounds the working memory.', 'points', 1, 65536
    )
    queue_size: int = _parameter(
        10,
        'Messages that wait to be folded; beyond it the oldest is dropped and counted.',
        'messages',
        1,
        10000,
    )
    max_points: int = _parameter(
        1000000,
        'Most points of one message; a larger message is rejected and counted.',
        'points',
        1,
        100000000,
    )
    max_targets: int = _parameter(
        1000000,
        'Most locations of one query, and most cells of the published grid.',
        'locations',
        1,
        10000000,
    )
    max_joint_targets: int = _parameter(
        2000,
        'Most locations of one joint request, whose covariance grows with their square.',
        'locations',
        1,
        20000,
    )
    max_samples: int = _parameter(100, 'Most sampled fields of one request.', 'samples', 0, 10000)
    grid_resolution: float = _parameter(
        0.5, 'Size of a cell of the published grid.', 'm/cell', 1e-4, 1e6
    )
    grid_window: float = _parameter(
        0.0,
        'Side of the published grid, centered on the newest observation; 0: the bounds.',
        'm',
        0.0,
        1e9,
    )
    publish_rate: float = _parameter(
        1.0,
        'How often the grid is published if it changed and somebody listens; 0: never.',
        'Hz',
        0.0,
        100.0,
    )
    status_rate: float = _parameter(
        1.0, 'How often the status is published; 0: never.', 'Hz', 0.0, 100.0
    )
    mean_range: tuple[float, ...] = _parameter(
        (-2.0, 2.0), 'Means that ~/mean shows as 0 and as 100.', 'field units'
    )
    stddev_range: tuple[float, ...] = _parameter(
        (0.0, 1.0), 'Standard deviations that ~/stddev shows as 0 and as 100.', 'field units'
    )
    tf_timeout: float = _parameter(
        0.2, 'How long to wait for the transform at the stamp of a message.', 's', 0.0, 60.0
    )

    def __post_init__(self) -> None:
        """Convert integers to the doubles they stand for, and validate."""
        for spec in TABLE:
            object.__setattr__(self, spec.name, spec.checked(getattr(self, spec.name)))
        _check_together(self)


@dataclasses.dataclass(frozen=True)
class ParameterSpec:
    """
    One row of the table.

    :ivar kind: ROS type: 'bool', 'int', 'double', 'string' or 'double[]'.
    :ivar lower: least number accepted; None: no bound. Likewise upper.
    """

    name: str
    kind: str
    default: Any
    text: str
    unit: str
    lower: float | None
    upper: float | None
    read_only: bool

    @property
    def range_text(self) -> str:
        """Say the range as in [0, 100]; empty if there is none."""
        return '' if self.lower is None else f'[{_short(self.lower)}, {_short(self.upper)}]'

    def checked(self, value: Any) -> Any:
        """
        Return the value in the parameter's own type.

        :param value: from YAML, the command line or a caller; an integer stands for a double.
        :return: bool, int, float, str or tuple of float.
        :raises ConfigError: of another type, not finite, or out of range.
        """
        if self.kind == 'bool' and isinstance(value, bool):
            return value
        may_be_empty = not self.default
        if self.kind == 'string' and isinstance(value, str) and (value.strip() or may_be_empty):
            return value
        if self.kind == 'int' and _is_number(value, numbers.Integral) and self._in_range(value):
            return int(value)
        if self.kind == 'double' and _is_number(value, numbers.Real) and self._in_range(value):
            return float(value)
        is_list = self.kind == 'double[]' and isinstance(value, (list, tuple, array.array))
        if is_list and all(_is_number(v, numbers.Real) and self._in_range(v) for v in value):
            return tuple(float(item) for item in value)
        raise ConfigError(f'parameter {self.name} is {value!r}; expected {self._expectation()}')

    def _in_range(self, value: float) -> bool:
        """Tell whether a number is finite and within the range."""
        lower = -math.inf if self.lower is None else self.lower
        upper = math.inf if self.upper is None else self.upper
        return math.isfinite(value) and lower <= value <= upper

    def _expectation(self) -> str:
        """Say what the parameter takes."""
        unit = f' {self.unit}' if self.unit else ''
        what = {
            'bool': 'true or false',
            'int': 'an integer',
            'double': 'a finite number',
            'string': "text that is not empty (quote it in YAML: 'y' without quotes means true)",
            'double[]': 'a list of finite numbers',
        }[self.kind]
        if self.lower is not None:
            return f'{what} in {self.range_text}{unit}'
        return f'{what}{f" [{self.unit}]" if self.unit else ""}'


TABLE = tuple(
    ParameterSpec(
        name=field.name, kind=_KINDS[type(field.default)], default=field.default, **field.metadata
    )
    for field in dataclasses.fields(NodeParameters)
)


def parameters_from(values: Mapping[str, Any]) -> NodeParameters:
    """
    Make parameters from names and values; those not named keep their defaults.

    :param values: name -> value.
    :return: validated parameters.
    :raises ConfigError: an unknown name, or values that cannot be used.
    """
    check_names(values)
    return NodeParameters(**values)


def check_names(names: Iterable[str]) -> None:
    """
    Refuse names that are not in the table: a misspelt parameter would be ignored in silence.

    :param names: of parameters that somebody set.
    :raises ConfigError: names the first unknown one and the nearest known one.
    """
    known = [spec.name for spec in TABLE]
    for name in names:
        if name in known:
            continue
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
        raise ConfigError(
            f'unknown parameter {name!r}; did you mean {near[0]!r}? Known: {", ".join(known)}'
        )


def declare(node) -> NodeParameters:
    """
    Declare every parameter on a node, with the values that the user gave.

    Values are validated before they are declared, so that errors say all that is needed: rclpy
    would refuse an integer for a double, and a double out of range, in words of its own.

    :param node: rclpy node on which none of them is declared yet.
    :return: validated parameters.
    :raises ConfigError: an unknown name, or values that cannot be used.
    """
    given = {
        name: parameter.value
        for name, parameter in node._parameter_overrides.items()
        if name not in _NOT_OURS and not name.startswith('qos_overrides.')
    }
    parameters = parameters_from(given)
    for spec in TABLE:
        value = getattr(parameters, spec.name)
        value = list(value) if spec.kind == 'double[]' else value
        node.declare_parameter(spec.name, value, _descriptor(spec), ignore_override=True)
    return parameters


def default_yaml() -> str:
    """
    Render config/cmanp.yaml: every parameter with its default, unit, range and text.

    :return: text of a ROS 2 parameter file.
    """
    lines = [
        '# Every parameter of the node cmanp with its default, as cmanp_ros/parameters.py has it.',
        '# Write the numbers of one list alike: [0.0, 1.5], not [0, 1.5].',
        '/**:',
        '  ros__parameters:',
    ]
    for spec in TABLE:
        lines += textwrap.wrap(
            _described(spec), 99, initial_indent='    # ', subsequent_indent='    # '
        )
        lines.append(f'    {spec.name}: {_yaml_value(spec.default)}')
    return '\n'.join(lines) + '\n'


def markdown_table() -> str:
    """
    Render the table of README.md.

    :return: a Markdown table, one row per parameter.
    """
    rows = ['| parameter | type | default | range | unit | meaning |', '|---|---|---|---|---|---|']
    for spec in TABLE:
        cells = (
            f'`{spec.name}`',
            spec.kind,
            f'`{_yaml_value(spec.default)}`',
            spec.range_text,
            spec.unit,
            spec.text,
        )
        rows.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(rows) + '\n'


def _check_together(parameters: NodeParameters) -> None:
    """Refuse values that contradict each other."""
    lower, upper = parameters.bounds_min, parameters.bounds_max
    if len(lower) != len(upper) or not 1 <= len(lower) <= 3:
        raise ConfigError(
            f'bounds_min has {len(lower)} and bounds_max {len(upper)} number(s); expected equally '
            'many, one per axis: 1 to 3'
        )
    for axis, (low, high) in enumerate(zip(lower, upper, strict=True)):
        if low >= high:
            raise ConfigError(
                f'bounds_min is {low} m and bounds_max {high} m on axis {axis}; '
                'expected bounds_min < bounds_max'
            )
    for name in ('mean_range', 'stddev_range'):
        limits = getattr(parameters, name)
        if len(limits) != 2 or limits[0] >= limits[1]:
            raise ConfigError(
                f'{name} is {list(limits)}; expected two numbers [lower, upper] with lower < upper'
            )
    if parameters.stddev_range[0] < 0:
        raise ConfigError(
            f'stddev_range is {list(parameters.stddev_range)}; expected no negative number'
        )
    if not parameters.map_frame.strip('/'):
        raise ConfigError(
            f"map_frame is {parameters.map_frame!r}; expected the name of a frame, such as 'map'"
        )
    _check_grid(parameters)


def _check_grid(parameters: NodeParameters) -> None:
    """Refuse a grid of more cells than may be asked about at once."""
    if len(parameters.bounds_min) != 2:
        return  # only fields over a plane are published as a grid
    corners = zip(parameters.bounds_min, parameters.bounds_max, strict=True)
    extents = [parameters.grid_window or high - low for low, high in corners]
    num_cells = math.prod(
        max(1, math.ceil(min(extent / parameters.grid_resolution, 1e18) - 1e-6))
        for extent in extents
    )
    if num_cells > parameters.max_targets:
        raise ConfigError(
            f'grid_resolution {parameters.grid_resolution} m/cell cuts {extents[0]} x '
            f'{extents[1]} m into {num_cells:.3g} cells; expected at most max_targets = '
            f'{parameters.max_targets}: use larger cells'
        )


def _descriptor(spec: ParameterSpec):
    """Describe a parameter to ROS."""
    from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor

    descriptor = ParameterDescriptor(
        name=spec.name, description=_described(spec), read_only=spec.read_only
    )
    descriptor.dynamic_typing = spec.kind in ('double', 'double[]')  # so that 2 may be set for 2.0
    descriptor.additional_constraints = spec._expectation()
    if spec.lower is not None and spec.kind == 'int':
        descriptor.integer_range = [
            IntegerRange(from_value=spec.lower, to_value=spec.upper, step=0)
        ]
    elif spec.lower is not None:
        descriptor.floating_point_range = [
            FloatingPointRange(from_value=float(spec.lower), to_value=float(spec.upper), step=0.0)
        ]
    return descriptor


def _described(spec: ParameterSpec) -> str:
    """Say text, unit and range in one line."""
    if spec.range_text:
        return f'{spec.text} Within {spec.range_text} {spec.unit}'.rstrip() + '.'
    return f'{spec.text} [{spec.unit}]' if spec.unit else spec.text


def _yaml_value(value: Any) -> str:
    """Write a default as YAML that rcl reads back in the same type."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f"'{value}'"
    if isinstance(value, tuple):
        return '[' + ', '.join(repr(item) for item in value) + ']'
    return repr(value)


def _is_number(value: Any, kind: type) -> bool:
    """Tell whether a value is a number of a kind; true and false are none."""
    return isinstance(value, kind) and not isinstance(value, bool)


def _short(value: float) -> str:
    """Write a number without needless digits."""
    return str(value) if isinstance(value, int) else f'{value:g}'
