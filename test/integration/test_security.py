"""What SECURITY.md promises: the SROS 2 policy has exactly our names, and a name is no path."""

import pickle
import xml.etree.ElementTree
from pathlib import Path

import pytest
from builtin_interfaces.msg import Time
from cmanp_ros.srv import LoadState, MergeState, SaveState
from conftest import wait_for

from cmanp_ros import transforms
from cmanp_ros.maps import Code
from cmanp_ros.visualization import grid_map_type

POLICY = Path(__file__).parents[2] / 'security' / 'cmanp.policy.xml'
TF = {'/tf', '/tf_static'}


def profiles(namespace='/'):
    """Return each profile of the policy by the name of its node, in a namespace."""
    text = POLICY.read_text(encoding='utf-8').replace('ns="/"', f'ns="{namespace}"')
    return {
        each.get('node'): each for each in xml.etree.ElementTree.fromstring(text).iter('profile')
    }


def allowed(profile, rule):
    """Return the full names that a profile allows, as sros2 expands them."""
    namespace = profile.get('ns').rstrip('/') + '/'
    names = [e.text for group in profile if group.get(rule) == 'ALLOW' for e in group]
    assert len(names) == len(set(names)), 'a name twice'
    prefix = {'/': '', '~': namespace + profile.get('node')}
    return {prefix.get(name[0], namespace) + name.removeprefix('~') for name in names}


def running(observer, node):
    """Return what a node really has, by the rule of the policy that allows it, from the graph."""
    place = node.get_name(), node.get_namespace()
    wait_for(lambda: place in observer.get_node_names_and_namespaces())
    return {
        rule: {name for name, _ in find(*place)}
        for rule, find in {
            'publish': observer.get_publisher_names_and_types_by_node,
            'subscribe': observer.get_subscriber_names_and_types_by_node,
            'reply': observer.get_service_names_and_types_by_node,
            'request': observer.get_client_names_and_types_by_node,
        }.items()
    }


def same(observer, node, expected):
    """Wait until a node has what is expected; fail with both when it does not."""
    try:
        wait_for(lambda: running(observer, node) == expected, timeout_sec=5.0)
    except AssertionError:
        assert running(observer, node) == expected
        raise
    return True


def by_rule(profile):
    """Return what a profile allows, by rule."""
    return {rule: allowed(profile, rule) for rule in ('publish', 'subscribe', 'reply', 'request')}


@pytest.mark.parametrize(
    ('namespace', 'use_sim_time'), [('/', True), ('/robot1', True), ('/', False)]
)
def test_policy_allows_exactly_what_the_running_node_has(
    start_node, client, namespace, use_sim_time
):
    node = start_node(namespace=namespace, use_sim_time=use_sim_time)
    expected = by_rule(profiles(namespace)['cmanp'])
    if not use_sim_time:
        expected['subscribe'] -= {'/clock'}
    if grid_map_type() is None:  # the package that has it is optional
        expected['publish'] -= {f'{namespace.rstrip("/")}/cmanp/grid_map'}
    assert same(client.node, node, expected)
    names = set.union(*expected.values())
    assert not [name for name in names if '*' in name], 'wildcards allow what was not thought of'


@pytest.mark.parametrize('namespace', ['/', '/robot1'])
def test_policy_allows_exactly_what_the_transform_listener_has(start_node, client, namespace):
    node = start_node(namespace=namespace, use_sim_time=True)
    expected = by_rule(profiles(namespace)[f'{node.get_name()}_transforms'])
    assert TF <= expected['subscribe']
    refused = []
    node.transforms.request('points', 'odom', Time(sec=7), lambda *_: None, refused.append)
    if refused:  # no tf2_ros here: its node alone, without what tf2_ros subscribes to
        assert refused[0].reason == 'no_tf2'
        expected['subscribe'] -= TF
        companion = transforms._companion_node(node)
    else:
        companion = node.transforms._tf2._node
    try:
        assert same(client.node, companion, expected)
    finally:
        if refused:
            companion.destroy_node()


def test_policy_is_one_that_sros2_reads():
    root = xml.etree.ElementTree.parse(POLICY).getroot()
    (enclave,) = root.findall('./enclaves/enclave')
    assert (root.tag, root.attrib, enclave.attrib) == (
        'policy',
        {'version': '0.2.0'},
        {'path': '/cmanp'},
    )
    assert list(enclave.find('profiles')) == enclave.findall('./profiles/profile')
    for profile in enclave.iter('profile'):
        assert set(profile.attrib) == {'ns', 'node'}
        for group in profile:
            item, rules = {
                'topics': ('topic', {'publish', 'subscribe'}),
                'services': ('service', {'reply', 'request'}),
            }[group.tag]
            assert len(group) and {each.tag for each in group} == {item}
            assert len(group.attrib) == 1 and group.attrib.keys() <= rules
            assert set(group.attrib.values()) == {'ALLOW'}


def test_policy_fits_the_schema_of_sros2():
    policy = pytest.importorskip('sros2.policy', reason='sros2 comes with a ROS installation only')
    policy.load_policy(POLICY)


BAD_NAMES = ['../x', '/etc/passwd', 'a;b', '', '.', '..', '.x', 'a/b', 'a\nb', 'ä', 'a' * 65, '~']


def test_name_that_is_a_path_or_worse_is_refused_by_the_services(start_node, client, tmp_path):
    folder = tmp_path / 'maps'
    node = start_node(state_directory=str(folder))
    (tmp_path / 'x.safetensors').write_bytes(b'not to be read')
    version = node.field.version
    for name in BAD_NAMES:
        for kind, service in (
            (SaveState, 'save_state'),
            (LoadState, 'load_state'),
            (MergeState, 'merge_state'),
        ):
            answer = client.call(kind, f'cmanp/{service}', kind.Request(name=name))
            assert (answer.success, answer.code) == (False, Code.BAD_NAME), (service, name)
    assert not list(folder.iterdir()), 'something was written'
    assert [path.name for path in tmp_path.iterdir() if path != folder] == ['x.safetensors']
    assert node.field.version == version


class Malicious:
    """A pickle that leaves a trace when it is loaded."""

    def __init__(self, trace):
        self._trace = trace

    def __reduce__(self):
        return Path.touch, (self._trace,)


def test_malicious_pickle_as_a_saved_map_is_refused_and_not_executed(start_node, client, tmp_path):
    node = start_node(state_directory=str(tmp_path))
    trace, data = tmp_path / 'trace', pickle.dumps(Malicious(tmp_path / 'trace'))
    (tmp_path / 'evil.safetensors').write_bytes(data)
    version = node.field.version
    for kind, service in ((LoadState, 'load_state'), (MergeState, 'merge_state')):
        answer = client.call(kind, f'cmanp/{service}', kind.Request(name='evil'))
        assert (answer.success, answer.code) == (False, Code.DAMAGED), answer.message
    assert node.field.version == version and not trace.exists()
    pickle.loads(data)
    assert trace.exists(), 'the pickle would have left a trace'
