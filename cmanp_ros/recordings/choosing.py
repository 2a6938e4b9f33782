"""Which topics of a bag are folded."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from cmanp_ros.core.errors import ConfigError
from cmanp_ros.parameters import NodeParameters, SourceParameters
from cmanp_ros.sources import OBSERVATIONS, POINT_CLOUD, READINGS


def choose(
    topics: Mapping[str, str], wanted: Sequence[str], parameters: NodeParameters
) -> list[SourceParameters]:
    """
    Choose the sources of a bag.

    :param topics: name -> type of all that is in the bag.
    :param wanted: each 'TOPIC[:FIELD]'; empty: the sources of the parameters that are there, or
        else the only topic that can be one.
    :param parameters: of the node; a chosen topic that is one of its sources has its parameters.
    :return: sources, with the topics as the bag has them.
    :raises ConfigError: lists the topics of the bag.
    """
    declared = [_found(source, topics) for source in parameters.source_parameters]
    if wanted:
        return [_source(each, topics, declared) for each in wanted]
    found = [source for source in declared if source.topic in topics and source.enabled]
    if found:
        for source in found:
            if source.type != topics[source.topic]:
                raise ConfigError(
                    f'{source.name}.type is {source.type!r}, but {source.topic} in the bag is '
                    f'{topics[source.topic]!r}; expected the same: correct the parameter'
                )
        return found
    for kinds in ((POINT_CLOUD, OBSERVATIONS), READINGS):
        likely = [topic for topic, kind in topics.items() if kind in kinds]
        if len(likely) == 1:
            return [_of_topic(likely[0], topics, declared)]
        if likely:
            break
    number = 'none of its topics' if not likely else f'{len(likely)} of its topics'
    raise ConfigError(
        f'what to fold is not obvious: {number} can be it; expected --source TOPIC or '
        f'--source TOPIC:FIELD with one of{_listed(topics)}'
    )


def _source(wanted: str, topics, declared) -> SourceParameters:
    """Return the source of 'TOPIC[:FIELD]'."""
    name, _, field = wanted.partition(':')
    topic = _topic(name, topics)
    if topic is None:
        raise ConfigError(
            f'--source {wanted}: expected a topic of the bag, one of{_listed(topics)}'
        )
    source = _of_topic(topic, topics, declared)
    return replace(source, value_field=field) if field else source


def _of_topic(topic: str, topics, declared) -> SourceParameters:
    """Return the source that was declared for a topic, else for its type, or a new one."""
    kind = topics[topic]
    alike = [source for source in declared if (source.topic, source.type) == (topic, kind)]
    alike += [s for s in declared if s.topic not in topics and s.type == kind]
    if alike:
        return replace(alike[0], topic=topic)
    name = re.sub('[^A-Za-z0-9]+', '_', topic).strip('_')
    return SourceParameters(name if name[:1].isalpha() else f'source_{name}', topic, kind)


def _found(source: SourceParameters, topics) -> SourceParameters:
    """Return a source with its topic as the bag has it, if it is there."""
    return replace(source, topic=_topic(source.topic, topics) or source.topic)


def _topic(name: str, topics) -> str | None:
    """Find a topic by its name, which may be relative to a namespace; None: not, or not only."""
    if name in topics:
        return name
    end = '/' + name.removeprefix('~/').strip('/')
    if end in topics:
        return end
    found = [topic for topic in topics if topic.endswith(end)]
    return found[0] if len(found) == 1 and not name.startswith('/') else None


def _listed(topics) -> str:
    """List topics and types, one a line."""
    width = max(map(len, topics), default=0)
    return ''.join(f'\n    {topic:<{width}}  {topics[topic]}' for topic in sorted(topics))
