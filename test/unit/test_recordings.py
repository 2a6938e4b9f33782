"""Bags and tables are read as a node would have heard them, and what is left out is counted."""

import gzip
import shutil
import sqlite3
import sys

import numpy as np
import pytest
from recording_files import GAUGE, cloud, header, make, temperature, transform, write_bag
from scipy.spatial.transform import Rotation, Slerp

from cmanp_ros import parameter_file
from cmanp_ros.core.errors import CMANPError, ConfigError, InputError, TransformError
from cmanp_ros.parameters import parameters_from
from cmanp_ros.recordings import Recording
from cmanp_ros.recordings.transform_tree import TransformTree

STORAGES = ('mcap', 'sqlite3')


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def refused(*arguments, kind=ConfigError, **options):
    """Return the text of the error that opening must raise."""
    with pytest.raises(kind) as caught:
        Recording(*arguments, **options)
    return str(caught.value)


def read(*arguments, **options):
    """Return all chunks, and the recording."""
    with Recording(*arguments, **options) as recording:
        return list(recording.chunks()), recording


def all_of(chunks):
    """Return x and y of all chunks."""
    return np.concatenate([c.x for c in chunks]), np.concatenate([c.y for c in chunks])


# Bags --------------------------------------------------------------------------------------------


@pytest.mark.parametrize('storage', STORAGES)
def test_points_and_stamps_of_a_bag_are_those_written(tmp_path, rng, storage):
    points = rng.uniform(-5, 5, (3, 7, 3)).astype(np.float32)
    bag = write_bag(
        tmp_path / 'bag',
        [('/lidar', 10 + n, cloud(points[n], seconds=2.5 + n)) for n in range(3)],
        storage,
    )
    chunks, recording = read(bag)
    assert [chunk.stamp for chunk in chunks] == [2.5, 3.5, 4.5]
    np.testing.assert_array_equal([chunk.x for chunk in chunks], points[..., :2])
    np.testing.assert_array_equal([chunk.y for chunk in chunks], points[..., 2:])
    assert (recording.num_messages, recording.num_read, recording.rejected) == (3, 3, {})
    assert recording.duration_sec == pytest.approx(2.0)


def test_several_bags_are_merged_in_the_order_of_time(tmp_path):
    times = {'one': (1.0, 4.0, 5.0), 'two': (2.0, 3.0, 6.0)}
    bags = [
        write_bag(tmp_path / name, [('/c', t, cloud([[t, 0, 0]], seconds=t)) for t in found])
        for name, found in times.items()
    ]
    assert [chunk.stamp for chunk in read(bags)[0]] == [1, 2, 3, 4, 5, 6]


def test_a_single_file_of_a_bag_is_read_without_its_metadata(tmp_path):
    for storage, suffix in (('mcap', '.mcap'), ('sqlite3', '.db3')):
        bag = write_bag(tmp_path / storage, [('/c', 1.0, cloud([[2, 3, 5]]))], storage)
        (file,) = bag.glob(f'*{suffix}')
        moved = shutil.copy(file, tmp_path / f'alone{suffix}')
        assert read(moved)[0][0].y.tolist() == [[5]]


def test_the_only_cloud_is_chosen_and_else_topics_and_types_are_listed(tmp_path):
    messages = [('/gauge', 1.0, temperature(21)), ('/a', 2.0, cloud([[2, 3, 5]]))]
    bag = write_bag(tmp_path / 'one', messages)
    assert [source.topic for source in read(bag)[1].sources] == ['/a']
    bag = write_bag(tmp_path / 'two', [*messages, ('/b', 3.0, cloud([[2, 3, 5]]))])
    text = refused(bag)
    assert '2 of its topics can be it; expected --source TOPIC' in text
    assert '\n    /gauge  sensor_msgs/msg/Temperature' in text
    bag = write_bag(tmp_path / 'none', [('/tf', 1.0, transform('map', 'a', 1.0))])
    assert 'none of its topics can be it' in refused(bag)
    assert 'one of\n    /tf  tf2_msgs/msg/TFMessage' in refused(bag, ['/lidar'])
    assert 'which has no std_msgs/Header' in refused(bag, ['/tf:transforms[0].transform'])


def test_a_source_is_a_topic_and_a_field(tmp_path):
    messages = [
        ('/a', 1.0, cloud([[2, 3, 5, 7]], names=['x', 'y', 'z', 'gas'])),
        ('/robot/gauge', 2.0, temperature(21)),
    ]
    bag = write_bag(tmp_path / 'bag', messages)
    chunks, recording = read(bag, ['/a:gas', 'gauge'])
    assert [chunk.y.tolist() for chunk in chunks] == [[[7]], [[21]]]
    assert recording.descriptions == [
        '/a (sensor_msgs/msg/PointCloud2, gas)',
        '/robot/gauge (sensor_msgs/msg/Temperature, temperature)',
    ]
    chunks, recording = read(bag, ['/a:gass'])
    assert chunks == [] and dict(recording.losses.messages) == {'missing_field': 1}
    assert (
        "no field 'gass'; it has 'x', 'y', 'z', 'gas'"
        in recording.losses.problems['missing_field']
    )
    assert "did you mean 'temperature'?" in refused(bag, ['gauge:temprature'])


@pytest.mark.parametrize('storage', STORAGES)
def test_types_that_only_the_bag_defines_are_read(tmp_path, storage):
    readings = [make('my_msgs/msg/Reading', value=v, valid=True) for v in (2.0, 3.0)]
    message = make(GAUGE, header=header('map', 1.0), readings=readings)
    bag = write_bag(tmp_path / 'bag', [('/gauge', 1.0, message)], storage)
    assert read(bag, ['/gauge:readings[1].value'])[0][0].y.tolist() == [[3]]
    assert 'the reading of my_msgs/msg/Gauge is not known' in refused(bag, ['/gauge'])


def test_a_bag_without_definitions_has_types_of_ros_and_of_this_package(tmp_path):
    message = make(
        'cmanp_ros/msg/Observations',
        header=header('map', 1.0),
        dim_x=2,
        dim_y=1,
        x=np.array([2, 3, 5, 7], np.float32),
        y=np.array([11, 13], np.float32),
    )
    bag = write_bag(tmp_path / 'bag', [('/observations', 1.0, message)], 'sqlite3')
    (file,) = bag.glob('*.db3')
    with sqlite3.connect(file) as connection:
        connection.execute('DELETE FROM message_definitions')
    (chunk,), _ = read(bag)
    assert (chunk.x.tolist(), chunk.y.tolist()) == ([[2, 3], [5, 7]], [[11], [13]])


def test_parameters_of_the_node_hold(tmp_path):
    (tmp_path / 'node.yaml').write_text(
        '/**:\n  ros__parameters:\n    use_sim_time: true\n    map_frame: odom\n'
        '    sources: [lidar, gauge]\n'
        '    lidar: {type: sensor_msgs/msg/PointCloud2, topic: velodyne, voxel_size: 1.0,\n'
        '            value_scale: 2.0, value_offset: -1.0}\n'
        '    gauge: {type: sensor_msgs/msg/Temperature, max_rate: 1.0}\n'
    )
    parameters = parameter_file.read(tmp_path / 'node.yaml', ['lidar.value_scale:=3.0'])
    points = [[0.5, 0.5, 2], [0.6, 0.6, 3], [1.5, 0.5, 5], [np.nan, 0, 7]]
    bag = write_bag(
        tmp_path / 'bag',
        [
            ('/robot/velodyne', 1.0, cloud(points, 'odom')),
            ('/other', 1.0, cloud(points, 'odom')),
            *(('/gauge', 2 + n, temperature(n, 'odom', 2 + n / 3)) for n in range(5)),
        ],
    )
    chunks, recording = read(bag, parameters=parameters)
    assert [chunk.y.ravel().tolist() for chunk in chunks] == [[5, 14], [0], [2]]
    assert recording.rejected == {'not_finite': 1, 'thinned': 1}
    assert dict(recording.losses.messages) == {'rate_limited': 3}


def test_a_parameter_file_that_does_not_fit_is_refused(tmp_path):
    path = tmp_path / 'node.yaml'

    def error():
        with pytest.raises(ConfigError) as caught:
            parameter_file.read(path)
        return str(caught.value)

    assert error() == f'{path}: No such file or directory; expected a parameter file of ROS 2'
    path.write_text('other:\n  ros__parameters: {tile_size: 3.0}\n')
    assert "has no parameters of a node 'cmanp', but of /other; expected '/**:'" in error()
    path.write_text('robot:\n  cmanp:\n    ros__parameters: {tile_sise: 3.0}\n')
    assert "unknown parameter 'tile_sise'; did you mean 'tile_size'?" in error()
    path.write_text('robot: [')
    assert 'expected YAML' in error()
    path.write_text('/**:\n  ros__parameters: {tile_size: 3.0}\n')
    assert parameter_file.read(path).tile_size == 3.0
    with pytest.raises(ConfigError, match='-p tile_size=3: expected NAME:=VALUE'):
        parameter_file.read(None, ['tile_size=3'])


def test_a_message_that_cannot_be_read_is_counted_and_the_others_are_not_lost(tmp_path):
    good = ('/a', 1.0, cloud([[2, 3, 5]]))
    bag = write_bag(tmp_path / 'bag', [good], raw=[('/a', 2.0, b'\0\1\0\0' + b'\xff' * 13)])
    chunks, recording = read(bag)
    assert len(chunks) == 1 and dict(recording.losses.messages) == {'unreadable': 1}


def test_what_is_no_bag_is_refused(tmp_path):
    assert 'is not there; expected a bag' in refused(tmp_path / 'none', kind=InputError)
    assert 'no file is given' in refused([], kind=InputError)
    (tmp_path / 'folder').mkdir()
    text = refused(tmp_path / 'folder', kind=InputError)
    assert 'cannot be opened' in text and 'ros2 bag reindex' in text
    (tmp_path / 'cut.mcap').write_bytes(b'\x89MCAP0\r\n\0')
    assert 'cannot be opened' in refused(tmp_path / 'cut.mcap', kind=InputError)
    (tmp_path / 'a.csv').write_text('x,y,z\n2,3,5\n')
    assert 'bags and tables' in refused([tmp_path / 'a.csv', tmp_path / 'folder'], kind=InputError)


def test_a_bag_that_ends_too_early_gives_what_is_there_and_then_an_error(tmp_path, rng):
    rows = [('/a', 1.0 + n, cloud(rng.uniform(0, 1, (1000, 3)))) for n in range(40)]
    bag = write_bag(tmp_path / 'bag', rows, 'sqlite3')
    (file,) = bag.glob('*.db3')
    with Recording(bag) as recording:
        chunks = recording.chunks()
        assert next(chunks).x.shape == (1000, 2)
        size = file.stat().st_size
        with open(file, 'r+b') as opened:
            opened.seek(size // 4)
            opened.write(b'\xff' * (size - size // 4))
        with pytest.raises(InputError, match='cannot be read further .*what was read'):
            list(chunks)


@pytest.mark.parametrize('module', ['rosbags', 'laspy'])
def test_a_missing_library_is_named(tmp_path, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    for name in [name for name in sys.modules if name.startswith(f'{module}.')]:
        monkeypatch.setitem(sys.modules, name, None)
    path = tmp_path / {'rosbags': 'a.mcap', 'laspy': 'a.las'}[module]
    path.touch()
    assert f'pip install {module}' in refused(path, kind=CMANPError)


# Transforms --------------------------------------------------------------------------------------


def tree(*messages):
    """Make a tree of (message, is_static) or messages that are not static."""
    return TransformTree(m if isinstance(m, tuple) else (m, False) for m in messages)


def ns(seconds):
    return round(seconds * 1e9)


def test_interpolation_is_linear_and_on_the_sphere(rng):
    for _ in range(11):
        quaternions, shifts = rng.normal(size=(2, 4)), rng.normal(size=(2, 3))
        found = tree(
            *(transform('map', 'a', 2 + 3 * n, shifts[n], quaternions[n]) for n in range(2))
        )
        expected = Slerp([2, 5], Rotation.from_quat(quaternions))
        for seconds in (2.0, 2.3, 4.1, 5.0):
            rotation, translation = found.motion('map', 'a', ns(seconds))
            np.testing.assert_allclose(rotation, expected(seconds).as_matrix(), atol=1e-12)
            ratio = (seconds - 2) / 3
            np.testing.assert_allclose(
                translation, (1 - ratio) * shifts[0] + ratio * shifts[1], atol=1e-12
            )


def test_a_path_goes_up_and_down_the_tree_as_the_matrices_multiply(rng):
    links = {'odom': 'map', 'base': 'odom', 'lidar': 'base', 'gps': 'map', 'mast': 'gps'}
    poses = {child: (rng.normal(size=3), rng.normal(size=4)) for child in links}
    found = tree(
        *((transform(links[c], c, 0.0, *pose), c != 'base') for c, pose in poses.items()),
        *(transform('odom', 'base', t, *poses['base']) for t in (1.0, 3.0)),
    )

    def matrix(frame):
        result = np.eye(4)
        while frame in links:
            step = np.eye(4)
            step[:3, :3] = Rotation.from_quat(poses[frame][1]).as_matrix()
            step[:3, 3] = poses[frame][0]
            result, frame = step @ result, links[frame]
        return result

    for target, source in (('map', 'lidar'), ('lidar', 'map'), ('/mast', '/lidar')):
        rotation, translation = found.motion(target, source, ns(2.0))
        names = target.strip('/'), source.strip('/')
        expected = np.linalg.inv(matrix(names[0])) @ matrix(names[1])
        np.testing.assert_allclose(rotation, expected[:3, :3], atol=1e-12)
        np.testing.assert_allclose(translation, expected[:3, 3], atol=1e-12)


def test_past_future_and_unconnected_are_told_apart():
    found = tree(
        transform('map', 'a', 2.0),
        transform('map', 'a', 5.0),
        (transform('elsewhere', 'b', 0.0), True),
        transform('map', 'zero', 2.0, quaternion=(0, 0, 0, 0)),
        transform('map', 'nan', 2.0, translation=(np.nan, 0, 0)),
        transform('p', 'q', 1.0),
        transform('q', 'p', 1.0),
    )
    for source, seconds, reason, text in (
        ('a', 1.5, 'transform_too_old', '0.500 s before the first transform'),
        ('a', 5.25, 'transform_too_new', "0.250 s after the last transform of 'a'"),
        ('b', 2.0, 'no_transform', "its transforms are: 'a' in 'map', 'zero' in 'map'"),
        ('c', 2.0, 'no_transform', "'c' and 'map' are not connected in the bag"),
        ('p', 1.0, 'no_transform', 'not connected'),
        ('zero', 2.0, 'bad_transform', 'norm 0'),
        ('nan', 2.0, 'bad_transform', 'expected finite numbers'),
    ):
        with pytest.raises(TransformError) as caught:
            found.motion('map', source, ns(seconds))
        assert caught.value.reason == reason and text in str(caught.value)


def test_a_frame_that_is_hung_elsewhere_stays_where_it_was_until_then():
    found = tree(
        transform('map', 'a', 1.0, (2, 0, 0)),
        transform('base', 'a', 3.0, (5, 0, 0)),
        (transform('map', 'base', 0.0, (7, 0, 0)), True),
    )
    assert found.motion('map', 'a', ns(2.9))[1].tolist() == [2, 0, 0]
    assert found.motion('map', 'a', ns(3.0))[1].tolist() == [12, 0, 0]


def test_points_of_a_sensor_come_into_the_map_and_the_others_are_counted(tmp_path):
    quarter = (0, 0, np.sqrt(0.5), np.sqrt(0.5))
    messages = [
        ('/tf_static', 0.5, transform('map', 'odom', 0.0, (0, 0, 100))),
        ('/tf', 1.0, transform('odom', 'lidar', 1.0)),
        ('/tf', 3.0, transform('odom', 'lidar', 3.0, (10, 20, 30), quarter)),
        ('/robot2/tf', 2.0, transform('nowhere', 'lidar', 2.0)),
        *(
            ('/a', 1.0 + n / 10, cloud([[2, 3, 5], [7, 11, 13]], frame, seconds))
            for n, (frame, seconds) in enumerate(
                [('lidar', 3.0), ('lidar', 0.9), ('lidar', 3.1), ('gps', 2.0), ('', 2.0)]
                + [('lidar', 0.0), ('map', 0.0)]
            )
        ),
    ]
    (first, second), recording = read(write_bag(tmp_path / 'bag', messages))
    np.testing.assert_allclose(first.x, [[10 - 3, 20 + 2], [10 - 11, 20 + 7]])
    np.testing.assert_allclose(first.y, [[135], [143]])  # the height turns and rises with it
    assert second.x.tolist() == [[2, 3], [7, 11]]
    reasons = 'transform_too_old transform_too_new no_transform no_frame no_stamp'.split()
    assert dict(recording.losses.messages) == dict.fromkeys(reasons, 1)
    assert recording.rejected == dict.fromkeys(reasons, 2)


# Tables ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'name, text, sources',
    [
        ('a.csv', 'x,y,depth\n2,3,5\n7,11,13\n', None),
        ('a.csv', 'Depth;Northing;Easting\n5;3;2\n13;11;7\n', None),
        ('a.csv', 'time,x,y,z,gas\n1,2,3,0,5\n2,7,11,0,13\n', [':gas']),
        ('a.csv', '"x","y","value"\r\n2,3,5\r\n7,11,13', None),
        ('a.xyz', '# made by hand\n2 3 5\n\n7 11 13\n', None),
        ('a.csv', '# by numpy.savetxt\n# y,x,depth\n3,2,5\n11,7,13\n', None),
        ('a.txt', '# Northing Easting Depth\n3 2 5\n11 7 13\n', None),
        ('a.txt', '//X Y Z intensity\n2 3 5 1\n7 11 13 1\n', None),
        ('a.txt', '2\t3\t0\t5\n7\t11\t0\t13\n', ['column4']),
    ],
)
def test_tables_of_many_forms_are_read(tmp_path, name, text, sources):
    (tmp_path / name).write_text(text)
    with gzip.open(tmp_path / f'{name}.gz', 'wt') as file:
        file.write(text)
    for path in (tmp_path / name, tmp_path / f'{name}.gz'):
        x, y = all_of(read(path, sources)[0])
        assert (x.tolist(), y.tolist()) == ([[2, 3], [7, 11]], [[5], [13]])


def test_words_beside_the_numbers_are_no_fault(tmp_path):
    (tmp_path / 'a.csv').write_text('time,x,y,depth\n2024-05-01T10:00:00Z,2,3,5\n')
    chunks, recording = read(tmp_path / 'a.csv', [':depth'])
    assert chunks[0].y.tolist() == [[5]] and not recording.losses.problems


def test_times_of_a_table_are_those_of_its_lines(tmp_path):
    rows = ''.join(f'{100 + n},{n},0,5\n' for n in range(9))
    (tmp_path / 'a.csv').write_text('time,x,y,depth\n' + rows)
    chunks, recording = read(tmp_path / 'a.csv', [':depth'])
    assert [chunk.stamp for chunk in chunks] == [108] and recording.num_read == 1
    parameters = parameters_from({'half_life': 48.0})  # 16 steps of 3 s
    chunks, recording = read(tmp_path / 'a.csv', [':depth'], parameters=parameters)
    assert [chunk.stamp for chunk in chunks] == [101, 104, 107, 108]
    assert all_of(chunks)[0][:, 0].tolist() == [*range(9)] and recording.num_read == 1


def test_lines_out_of_the_order_of_time_are_not_cut_one_by_one(tmp_path):
    times = (100, 104, 101, '', 108, 102, 3e9, 107)  # one is missing, one in the future
    rows = ''.join(f'{time},{n},0,5\n' for n, time in enumerate(times))
    (tmp_path / 'a.csv').write_text('time,x,y,depth\n' + rows)
    parameters = parameters_from({'half_life': 48.0})
    chunks, recording = read(tmp_path / 'a.csv', [':depth'], parameters=parameters)
    assert [(chunk.stamp, len(chunk.y)) for chunk in chunks] == [(100, 1), (104, 3), (108, 4)]
    assert '3000000000 [s] is in the future' in recording.losses.problems['no_time']


@pytest.mark.parametrize(
    ('time', 'said'),
    [
        ('1700000000000', 'the time 1.7e+12 [s] is in the future, and ignored; expected seconds'),
        ('2024-05-01T10:00:00Z', 'lines without a time do not fade'),
        ('', 'expected seconds in a column stamp or time or timestamp or gps_time'),
        ('-5', 'lines without a time'),
    ],
)
def test_times_that_are_no_seconds_are_said(tmp_path, time, said):
    (tmp_path / 'a.csv').write_text(f'time,x,y,depth\n{time},2,3,5\n')
    parameters = parameters_from({'half_life': 3.0})
    (chunk,), recording = read(tmp_path / 'a.csv', [':depth'], parameters=parameters)
    assert chunk.stamp == 0 and said in recording.losses.problems['no_time']


def test_locations_and_values_have_as_many_columns_as_the_model(tmp_path):
    (tmp_path / 'a.csv').write_text('x,y,z,u,v\n2,3,5,7,11\n')
    (chunk,), _ = read(tmp_path / 'a.csv', [':u,v'], dim_x=3, dim_y=2)
    assert (chunk.x.tolist(), chunk.y.tolist()) == ([[2, 3, 5]], [[7, 11]])


def test_a_table_that_does_not_fit_is_refused(tmp_path):
    path = tmp_path / 'a.csv'
    path.write_text('lon,lat,depth\n1,2,3\n')
    assert 'project longitude and latitude to meters' in refused(path, kind=InputError)
    path.write_text('x,z\n1,2\n')
    assert refused(path, kind=InputError).endswith(
        'the columns x, z; expected x (easting or east), y (northing or north): rename them'
    )
    path.write_text('x,y,gas,smoke\n1,2,3,4\n')
    text = refused(path)
    assert 'has the columns x, y, gas, smoke' in text and '--source :smoke' in text
    assert "'dust' is not 1 of those" in refused(path, [':dust'])
    assert text.endswith('expected the name of the value: --source :smoke')
    assert refused(path, [':gas'], dim_y=2).endswith('2 names with commas: --source :gas,smoke')
    text = refused(path, [':gas', ':smoke'])
    assert text.startswith('--source :gas --source :smoke: expected one for a table')
    path.write_text('')
    assert 'is empty' in refused(path, kind=InputError)
    path.write_bytes(b'\xff\xfe\0x')
    assert 'expected a text in UTF-8 with one point a line' in refused(path, kind=InputError)


@pytest.mark.parametrize('source', [':z', 'depth:z'])
def test_a_column_that_was_chosen_is_not_replaced_by_another(tmp_path, source):
    (tmp_path / 'a.csv').write_text('x,y,depth\n2,3,5\n')
    assert "'z' is not 1 of those beside the location" in refused(tmp_path / 'a.csv', [source])
    chosen = parameters_from({'points.value_field': 'z'})
    assert "'z' is not 1 of those" in refused(tmp_path / 'a.csv', parameters=chosen)
    assert read(tmp_path / 'a.csv')[0][0].y.tolist() == [[5]]


def test_lines_that_cannot_be_used_are_counted(tmp_path):
    (tmp_path / 'a.csv').write_text('x,y,value\n2,3,5\n1,2\n,1,2\n3,nan,1\n# 1,2,3\nno,1,2\n')
    (chunk,), recording = read(tmp_path / 'a.csv')
    assert chunk.x.tolist() == [[2, 3]]
    assert recording.rejected == {'wrong_dim': 1, 'not_finite': 3}
    assert "'1,2' has 2 columns; expected 3: x, y, value" in recording.losses.problems['wrong_dim']


def test_las_is_read(tmp_path, rng):
    laspy = pytest.importorskip('laspy', reason='laspy is not installed: pip install laspy')
    las = laspy.create(point_format=1)
    las.header.scales = [0.001] * 3
    points = np.round(rng.uniform(0, 50, (17, 3)), 3)
    las.x, las.y, las.z = points.T
    las.intensity = np.arange(17)
    las.write(tmp_path / 'a.las')
    x, y = all_of(read(tmp_path / 'a.las')[0])
    np.testing.assert_allclose(np.hstack([x, y]), points, atol=1e-9)
    chunks, recording = read([tmp_path / 'a.las'] * 2, ['intensity'])
    assert all_of(chunks)[1].ravel().tolist() == [*range(17), *range(17)]
    assert recording.num_messages == recording.num_read == 2
    (tmp_path / 'b.las').write_bytes(b'LASF')
    assert 'expected a LAS file' in refused(tmp_path / 'b.las', kind=InputError)


# Parts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize('kind', ['mcap', 'sqlite3', 'csv'])
def test_parts_are_together_the_whole(tmp_path, rng, kind):
    points = rng.uniform(0, 1, (13, 3)).astype(np.float32)
    if kind == 'csv':
        path = [tmp_path / f'{n}.csv' for n in range(2)]
        for file, rows in zip(path, (points[:5], points[5:]), strict=True):
            np.savetxt(file, rows, delimiter=',', header='x,y,z', comments='')
    else:
        rows = [('/a', 1.0 + n, cloud([point])) for n, point in enumerate(points)]
        path = write_bag(tmp_path / 'bag', rows, kind)
    whole, _ = read(path)
    with Recording(path) as recording:
        spans = recording.split(3)
        parts = [chunk for span in spans for chunk in recording.chunks(span)]
    assert len(spans) == 3
    np.testing.assert_array_equal(np.hstack(all_of(parts)), np.hstack(all_of(whole)))


def test_thinning_goes_on_from_what_was_admitted_before(tmp_path, rng):
    rows = [('/a', 1.0 + n, cloud(rng.uniform(0, 3, (17, 3)))) for n in range(5)]
    bag = write_bag(tmp_path / 'bag', rows)
    parameters = parameters_from({'points.voxel_size': 1.0})
    whole, _ = read(bag, parameters=parameters)
    with Recording(bag, parameters=parameters) as first:
        spans = first.split(2)
        parts = list(first.chunks(spans[0]))
        with Recording(bag, parameters=parameters) as second:
            second.thinning = first.thinning
            parts += second.chunks(spans[1])
    np.testing.assert_array_equal(all_of(parts)[0], all_of(whole)[0])
    assert len(all_of(whole)[0]) == 9
