"""
Two tables declare every parameter, those of the node and those of one source of observations.

A row has type, default, range, unit and text; the rows are the fields of `NodeParameters` and of
`SourceParameters`. The node's declarations, config/cmanp.yaml and the tables in docs/parameters.md
are made from them, and nothing here needs ROS until `declare` is called.
"""

from __future__ import annotations

import array
import dataclasses
import difflib
import math
import numbers
import os
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from cmanp_ros.core.errors import ConfigError

_NOT_OURS = ('use_sim_time', 'start_type_description_service')  # ROS declares these itself
_QOS_OVERRIDES = 'qos_overrides'  # and what is below this
_KINDS = {
    'bool': 'bool',
    'int': 'int',
    'float': 'double',
    'str': 'string',
    'tuple[float, ...]': 'double[]',
    'tuple[str, ...]': 'string[]',
}  # annotation of a field -> type of the ROS parameter
_DEFAULT_TYPES = {
    'points': 'sensor_msgs/msg/PointCloud2',
    'observations': 'cmanp_ros/msg/Observations',
}  # source -> type of its messages
_SOURCE_NAME = re.compile('[A-Za-z][A-Za-z0-9_]*')
_TOPIC_NAME = re.compile('(~/|/)?[A-Za-z_][A-Za-z0-9_]*(/[A-Za-z_][A-Za-z0-9_]*)*')


def _parameter(default, text, unit='', lower=None, upper=None, read_only=True, choices=()):
    """
    Describe one parameter.

    Lower and upper bound each number of it, both included; choices are all that a string may be.
    """
    metadata = {
        'text': text,
        'unit': unit,
        'lower': lower,
        'upper': upper,
        'read_only': read_only,
        'choices': choices,
    }
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class SourceParameters:
    """
    Validated parameters of one source; making one that cannot be used raises `ConfigError`.

    :ivar name: one of the node's `sources`; its parameters are declared as `<name>.<parameter>`.
    """

    name: str
    topic: str = _parameter('', 'Topic of the messages; empty: the name of the source.')
    type: str = _parameter(
        '',
        "Type of the messages, such as 'sensor_msgs/msg/Temperature'; may be left out only for "
        'points (PointCloud2) and observations (Observations).',
    )
    enabled: bool = _parameter(
        True, 'Whether its messages are folded; if not, they are rejected.', read_only=False
    )
    value_field: str = _parameter(
        '',
        "Where the value is: a field of a cloud, or a path such as 'magnetic_field.x' or "
        "'readings[0].value' (a vector counts by its length); empty: value_field of the node for "
        'a cloud, the reading of a known sensor.',
    )
    reliability: str = _parameter(
        'best_effort',
        'Quality of service; reliable is refused by publishers that are best effort.',
        choices=('best_effort', 'reliable'),
    )
    depth: int = _parameter(
        10, 'Messages that ROS keeps until they are read.', 'messages', 1, 10000
    )
    value_scale: float = _parameter(
        1.0,
        'Converts units: the value is what the message says * value_scale + value_offset.',
        'field units per unit of the message',
    )
    value_offset: float = _parameter(0.0, 'Converts units; see value_scale.', 'field units')
    min_range: float = _parameter(
        0.0,
        'Leaves out the points that lie nearer to the origin of their frame: the robot itself, '
        'and the (0, 0, 0) that some drivers send for no echo; not for points in the map frame.',
        'm',
        0.0,
        1e9,
    )
    voxel_size: float = _parameter(
        0.0,
        'Thins the points: one per voxel of this size in the map frame is folded; 0: all are.',
        'm',
        0.0,
        1e9,
        read_only=False,
    )
    revisit_interval: float = _parameter(
        0.0,
        'Time of the stamps after which a voxel may give a point again; 0: not while it is '
        'remembered.',
        's',
        0.0,
        1e9,
        read_only=False,
    )
    max_rate: float = _parameter(
        0.0,
        'Most messages folded per second of the stamps; 0: all are.',
        'Hz',
        0.0,
        1e6,
        read_only=False,
    )

    def __post_init__(self) -> None:
        """Convert integers to the doubles they stand for, fill in what is empty, and validate."""
        if not _SOURCE_NAME.fullmatch(self.name) or self.name == _QOS_OVERRIDES:
            raise ConfigError(
                f'sources has {self.name!r}; expected a name of letters, digits and _ that begins '
                f"with a letter (and not '{_QOS_OVERRIDES}'); the topic is set by <source>.topic"
            )
        for spec in SOURCE_TABLE:
            value = spec.below(self.name).checked(getattr(self, spec.name))
            object.__setattr__(self, spec.name, value)
        object.__setattr__(self, 'topic', self.topic or self.name)
        object.__setattr__(self, 'type', self.type or _DEFAULT_TYPES.get(self.name, ''))
        if not self.type:
            raise ConfigError(
                f'source {self.name!r} has no type; expected the type of its messages: set '
                f"{self.name}.type, as in 'sensor_msgs/msg/PointCloud2'"
            )
        _check_topic(f'{self.name}.topic', self.topic)
        if self.value_scale == 0:
            raise ConfigError(
                f'{self.name}.value_scale is 0, which makes all values alike; expected another '
                'number: 1 keeps the units'
            )


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
    max_processes: int = _parameter(
        2,
        'With 2 a second process solves what was observed, once observations come faster than one '
        'folds and solves them; it takes some 300 MB of memory. On a CPU only.',
        lower=1,
        upper=2,
    )
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
        'Tiles kept in memory, of 70 to 140 kB each; beyond it the least recently used go to the '
        'store.',
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
    sources: tuple[str, ...] = _parameter(
        tuple(_DEFAULT_TYPES),
        'Names of the sources of observations; each has parameters of its own, as points.topic.',
    )
    value_field: str = _parameter(
        'z', 'Field of the clouds that holds the value, unless their source has one of its own.'
    )
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
        'Messages that wait to be folded, or as many as have chunk_size points; beyond it the '
        'oldest is dropped and counted.',
        'messages',
        1,
        10000,
    )
    batch_window: float = _parameter(
        0.05,
        'How long fewer than 100 points wait for more, to be folded together.',
        's',
        0.0,
        10.0,
    )
    max_pending: int = _parameter(
        50,
        'Messages of each source that wait for their transform; beyond it the oldest is dropped '
        'and counted.',
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
        read_only=False,
    )
    max_joint_targets: int = _parameter(
        2000,
        'Most locations of one joint request, whose covariance grows with their square.',
        'locations',
        1,
        20000,
        read_only=False,
    )
    max_samples: int = _parameter(
        100, 'Most sampled fields of one request.', 'samples', 0, 10000, read_only=False
    )
    grid_resolution: float = _parameter(
        0.5,
        'Size of a cell of the published grid. 40,000 cells take some four seconds, 6,400 one to '
        'three: tiles that changed are solved for any.',
        'm/cell',
        1e-4,
        1e6,
        read_only=False,
    )
    grid_window: float = _parameter(
        0.0,
        'Side of the published grid, centered on the newest observation; 0: the bounds.',
        'm',
        0.0,
        1e9,
        read_only=False,
    )
    publish_rate: float = _parameter(
        1.0,
        'How often the grid is published if it changed and somebody listens, at most: a large '
        'grid takes longer; 0: never.',
        'Hz',
        0.0,
        100.0,
    )
    status_rate: float = _parameter(
        1.0, 'How often the status is published; 0: never.', 'Hz', 0.0, 100.0
    )
    mean_range: tuple[float, ...] = _parameter(
        (),
        'Means that ~/mean shows as 0 and as 100; empty: value_offset +- 2 value_scale.',
        'field units',
        read_only=False,
    )
    stddev_range: tuple[float, ...] = _parameter(
        (),
        'Standard deviations that ~/stddev shows as 0 and as 100; empty: 0 and value_scale.',
        'field units',
        read_only=False,
    )
    num_views: int = _parameter(
        5, 'Places that ~/next_best_view proposes to measure next.', 'places', 0, 100
    )
    costmap: str = _parameter(
        '',
        'Topic of a costmap in map_frame, such as /global_costmap/costmap, whose obstacles '
        '~/next_best_view leaves out; empty: every cell within the bounds can be reached.',
    )
    view_distance_weight: float = _parameter(
        0.1,
        'How much ~/next_best_view prefers what is near the robot: k tiles away the standard '
        'deviation counts exp(-k * view_distance_weight) of itself; 0: the way does not matter.',
        'per tile_size',
        0.0,
        1e6,
        read_only=False,
    )
    tf_timeout: float = _parameter(
        0.2,
        'How long to wait for the transform at the stamp of a message.',
        's',
        0.0,
        60.0,
        read_only=False,
    )

    half_life: float = _parameter(
        0.0,
        'Time in which what was observed comes to count half; 0: nothing is forgotten.',
        's',
        0.0,
        1e9,
    )
    state_directory: str = _parameter(
        '', 'Folder of the maps that are saved and restored; empty: none are.'
    )
    autosave_period: float = _parameter(
        0.0, 'How often the map is saved to state_directory; 0: only on request.', 's', 0.0, 1e6
    )
    restore: str = _parameter(
        '',
        "Name of the saved map to begin with, which must be there ('autosave': if it is there); "
        'empty: begin with an empty map.',
    )
    undo_window: float = _parameter(
        0.0, 'How far back ~/undo reaches; 0: nothing is kept to undo.', 's', 0.0, 1e6
    )
    peers: tuple[str, ...] = _parameter(
        (),
        "Topics with the states of other robots, such as '/robot2/cmanp/state', which are merged.",
    )
    state_rate: float = _parameter(
        0.0, 'How often ~/state is published, 44 kB a tile; 0: only on request.', 'Hz', 0.0, 100.0
    )
    on_clock_jump: str = _parameter(
        'keep',
        'What becomes of the map when time jumps back, as with a bag that begins again: keep it, '
        'reset it, or pause and keep it.',
        read_only=False,
        choices=('keep', 'reset', 'pause'),
    )
    calibration_period: float = _parameter(
        5.0,
        'How often new observations are compared with the prediction before they are folded; 0: '
        'never.',
        's',
        0.0,
        86400.0,
        read_only=False,
    )
    source_parameters: tuple[SourceParameters, ...] = ()

    def __post_init__(self) -> None:
        """
        Convert integers to the doubles they stand for, fill in what is empty, and validate.

        `source_parameters` is put in the order of `sources`; sources not in it have defaults.
        """
        for spec in TABLE:
            object.__setattr__(self, spec.name, spec.checked(getattr(self, spec.name)))
        for name in ('checkpoint', 'store', 'state_directory'):
            object.__setattr__(self, name, os.path.expanduser(getattr(self, name)))
        frame = self.map_frame.strip('/') or self.map_frame  # tf2 refuses a slash in front
        object.__setattr__(self, 'map_frame', frame)
        offset, scale = self.value_offset, self.value_scale
        for name, limits in (
            ('mean_range', (offset - 2 * scale, offset + 2 * scale)),
            ('stddev_range', (0.0, scale)),
        ):
            object.__setattr__(self, name, getattr(self, name) or limits)
        given = {source.name: source for source in self.source_parameters}
        in_order = tuple(given.get(name) or SourceParameters(name) for name in self.sources)
        object.__setattr__(self, 'source_parameters', in_order)
        _check_together(self)

    def source(self, name: str) -> SourceParameters:
        """Return the parameters of one of `sources`, as they are now."""
        return self.source_parameters[self.sources.index(name)]


@dataclasses.dataclass(frozen=True)
class ParameterSpec:
    """
    One row of the table.

    :ivar kind: ROS type: 'bool', 'int', 'double', 'string', 'double[]' or 'string[]'.
    :ivar lower: least number accepted; None: no bound. Likewise upper.
    :ivar read_only: it cannot be changed once it is declared.
    :ivar choices: all that a string may be; empty: anything.
    """

    name: str
    kind: str
    default: Any
    text: str
    unit: str
    lower: float | None
    upper: float | None
    read_only: bool
    choices: tuple[str, ...]

    @property
    def range_text(self) -> str:
        """Say the range as in [0, 100], or the choices; empty if there are none."""
        if self.choices:
            return ', '.join(repr(choice) for choice in self.choices)
        return '' if self.lower is None else f'[{_short(self.lower)}, {_short(self.upper)}]'

    def below(self, source: str) -> ParameterSpec:
        """Return this row of the sources' table as it is declared for one of them."""
        return dataclasses.replace(self, name=f'{source}.{self.name}')

    def checked(self, value: Any) -> Any:
        """
        Return the value in the parameter's own type.

        :param value: from YAML, the command line or a caller; an integer stands for a double.
        :return: bool, int, float, str, or tuple of float or str.
        :raises ConfigError: of another type, not finite, or out of range.
        """
        if self.kind == 'bool' and isinstance(value, bool):
            return value
        if self.kind == 'string' and isinstance(value, str) and self._may_be(value):
            return value
        if self.kind == 'int' and _is_number(value, numbers.Integral) and self._in_range(value):
            return int(value)
        if self.kind == 'double' and _is_number(value, numbers.Real) and self._in_range(value):
            return float(value)
        is_list = isinstance(value, (list, tuple, array.array))
        if self.kind == 'double[]' and is_list:
            if all(_is_number(item, numbers.Real) and self._in_range(item) for item in value):
                return tuple(float(item) for item in value)
        if value is None and self.kind.endswith('[]'):
            return ()  # rcl reads the list [] as a parameter that is not set
        if self.kind == 'string[]' and is_list:
            if all(isinstance(item, str) and item.strip() for item in value):
                return tuple(value)
        raise ConfigError(f'parameter {self.name} is {value!r}; expected {self._expectation()}')

    def _in_range(self, value: float) -> bool:
        """Tell whether a number is finite and within the range."""
        lower = -math.inf if self.lower is None else self.lower
        upper = math.inf if self.upper is None else self.upper
        return math.isfinite(value) and lower <= value <= upper

    def _may_be(self, value: str) -> bool:
        """Tell whether a text is one of the choices, or not empty unless the default is."""
        return value in self.choices if self.choices else bool(value.strip() or not self.default)

    def _expectation(self) -> str:
        """Say what the parameter takes."""
        if self.choices:
            return f'one of {self.range_text}'
        unit = f' {self.unit}' if self.unit else ''
        what = {
            'bool': 'true or false',
            'int': 'an integer',
            'double': 'a finite number',
            'string': "text that is not empty (quote it in YAML: 'y' without quotes means true)",
            'double[]': 'a list of finite numbers',
            'string[]': 'a list of texts, none of them empty',
        }[self.kind]
        if self.lower is not None:
            return f'{what} in {self.range_text}{unit}'
        return f'{what}{f" [{self.unit}]" if self.unit else ""}'


def _table_of(parameters: type) -> tuple[ParameterSpec, ...]:
    """Return the rows that the fields of a dataclass declare."""
    return tuple(
        ParameterSpec(
            name=field.name, kind=_KINDS[field.type], default=field.default, **field.metadata
        )
        for field in dataclasses.fields(parameters)
        if field.metadata
    )


TABLE = _table_of(NodeParameters)
SOURCE_TABLE = _table_of(SourceParameters)


def parameters_from(values: Mapping[str, Any]) -> NodeParameters:
    """
    Make parameters from names and values; those not named keep their defaults.

    :param values: name -> value; those of a source as '<source>.<name>'.
    :return: validated parameters.
    :raises ConfigError: an unknown name, or values that cannot be used.
    """
    (spec,) = (spec for spec in TABLE if spec.name == 'sources')
    sources = spec.checked(values.get('sources', spec.default))
    check_names(values, sources)
    return NodeParameters(
        **_of_the_node(values),
        source_parameters=tuple(
            SourceParameters(name, **_of_source(name, values)) for name in sources
        ),
    )


def changed(parameters: NodeParameters, values: Mapping[str, Any]) -> NodeParameters:
    """
    Make parameters in which some have other values, all at once or none; for a set callback.

    :param parameters: as they are; left alone.
    :param values: name -> new value; those that ROS declares itself are passed over.
    :return: validated parameters.
    :raises ConfigError: an unknown name, one that is read-only, or values that cannot be used.
    """
    values = without_those_of_ros(values)
    check_names(values, parameters.sources)
    for spec, value in rows(parameters):
        if spec.name in values and spec.read_only:
            raise ConfigError(
                f'parameter {spec.name} is {_yaml_value(value)} and cannot be changed to '
                f'{values[spec.name]!r} while the node runs; set it before start'
            )
    return dataclasses.replace(
        parameters,
        **_of_the_node(values),
        source_parameters=tuple(
            dataclasses.replace(source, **_of_source(source.name, values))
            for source in parameters.source_parameters
        ),
    )


def rows(parameters: NodeParameters) -> Iterator[tuple[ParameterSpec, Any]]:
    """
    Go through every parameter as it is declared.

    :param parameters: validated parameters.
    :return: specification, with the full name, and value of each.
    """
    for spec in TABLE:
        yield spec, getattr(parameters, spec.name)
    for source in parameters.source_parameters:
        for spec in SOURCE_TABLE:
            yield spec.below(source.name), getattr(source, spec.name)


def check_names(names: Iterable[str], sources: Iterable[str] = tuple(_DEFAULT_TYPES)) -> None:
    """
    Refuse names that are not in the tables: a misspelt parameter would be ignored in silence.

    :param names: of parameters that somebody set.
    :param sources: names of the sources.
    :raises ConfigError: names the first unknown one and the nearest known one.
    """
    of_node = [spec.name for spec in TABLE]
    of_source = {name: [spec.below(name).name for spec in SOURCE_TABLE] for name in sources}
    known = [*of_node, *(name for below in of_source.values() for name in below)]
    for name in names:
        if name in known:
            continue
        prefix, _, last = name.partition('.')
        if prefix not in of_source and last in [spec.name for spec in SOURCE_TABLE]:
            raise ConfigError(
                f'parameter {name!r} is of a source that is not in sources = {list(sources)}; '
                f'expected one of them: add {prefix!r} to sources, or take the parameter away'
            )
        there = of_source.get(prefix, of_node)
        near = difflib.get_close_matches(name, there, n=1, cutoff=0.0)
        raise ConfigError(
            f'unknown parameter {name!r}; did you mean {near[0]!r}? Known: {", ".join(there)}'
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
    overrides = without_those_of_ros(node._parameter_overrides)
    parameters = parameters_from({name: given.value for name, given in overrides.items()})
    for spec, value in rows(parameters):
        value = list(value) if isinstance(value, tuple) else value
        node.declare_parameter(spec.name, value, _descriptor(spec), ignore_override=True)
    return parameters


def default_yaml() -> str:
    """
    Render config/cmanp.yaml: every parameter with its default, unit, range and text.

    :return: text of a ROS 2 parameter file.
    """
    parameters = NodeParameters()
    lines = [
        '# Every parameter of the node cmanp with its default, as cmanp_ros/parameters.py has it.',
        '# Write the numbers of one list alike: [0.0, 1.5], not [0, 1.5].',
        '/**:',
        '  ros__parameters:',
    ]
    for spec in TABLE:
        lines += _yaml_comment(spec, '    ') + [f'    {spec.name}: {_yaml_value(spec.default)}']
    for index, source in enumerate(parameters.source_parameters):
        lines += ['', f'    {source.name}:']
        for spec in SOURCE_TABLE:  # what they mean is said once, at the first source
            lines += _yaml_comment(spec, '      ') if index == 0 else []
            lines.append(f'      {spec.name}: {_yaml_value(getattr(source, spec.name))}')
    return '\n'.join(lines) + '\n'


def markdown_table(table: tuple[ParameterSpec, ...] = TABLE) -> str:
    """
    Render a table of docs/parameters.md.

    :param table: `TABLE`, or `SOURCE_TABLE`.
    :return: a Markdown table, one row per parameter.
    """
    lines = [
        '| parameter | type | default | range | unit | while it runs | meaning |',
        '|---|---|---|---|---|---|---|',
    ]
    for spec in table:
        cells = (
            f'`{spec.name}`',
            spec.kind,
            f'`{_yaml_value(spec.default)}`',
            spec.range_text,
            spec.unit,
            '' if spec.read_only else 'may change',
            spec.text,
        )
        lines.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines) + '\n'


def without_those_of_ros(values: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out the parameters that ROS declares itself."""
    return {
        name: value
        for name, value in values.items()
        if name not in _NOT_OURS and not name.startswith(f'{_QOS_OVERRIDES}.')
    }


def _of_the_node(values: Mapping[str, Any]) -> dict[str, Any]:
    """Keep the parameters that are of no source."""
    return {name: value for name, value in values.items() if '.' not in name}


def _of_source(source: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Keep the parameters of one source, under their names in its table."""
    start = f'{source}.'
    return {
        name.removeprefix(start): value for name, value in values.items() if name.startswith(start)
    }


def _check_topic(name: str, topic: str) -> None:
    """Refuse what is no name of a topic."""
    if not _TOPIC_NAME.fullmatch(topic):
        raise ConfigError(
            f"parameter {name} has {topic!r}; expected the name of a topic, such as 'lidar/points'"
        )


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
    for name in parameters.sources:
        if parameters.sources.count(name) > 1:
            raise ConfigError(
                f'sources is {list(parameters.sources)}; expected names that differ: give the '
                f'second {name!r} a name of its own, and set its topic'
            )
    for topic in parameters.peers:
        _check_topic('peers', topic)
    if parameters.costmap:
        _check_topic('costmap', parameters.costmap)
    for name in ('restore', 'autosave_period'):
        if getattr(parameters, name) and not parameters.state_directory:
            raise ConfigError(
                f'{name} is {_yaml_value(getattr(parameters, name))}, but state_directory is '
                'empty; expected the folder of the saved maps: set state_directory'
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


def _yaml_comment(spec: ParameterSpec, indent: str) -> list[str]:
    """Write what a parameter means as lines of a comment."""
    start = f'{indent}# '
    return textwrap.wrap(_described(spec), 99, initial_indent=start, subsequent_indent=start)


def _described(spec: ParameterSpec) -> str:
    """Say text, unit and range in one line."""
    if spec.choices:
        return f'{spec.text} One of {spec.range_text}.'
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
