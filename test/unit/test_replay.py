"""A recording becomes a map, here or on workers, and what became of each point is said."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from recording_files import cloud, folded, temperature, transform, write_bag

from cmanp_ros import cli, maps
from cmanp_ros.cli import replay
from cmanp_ros.core.errors import CMANPError
from cmanp_ros.field import NeuralField
from cmanp_ros.maps import StateDirectory
from cmanp_ros.parameters import parameters_from
from cmanp_ros.recordings import shards

UNITS = {'value_offset': 3.0, 'value_scale': 2.0, 'tile_size': 5.0}


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    """Write maps where they are not in the way."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def bag(tmp_path):
    """Return a bag of 7 clouds along a line, and their points."""
    rng = np.random.default_rng(0)
    points = rng.uniform(0, 7, (7, 13, 3)).astype(np.float32)
    points[..., 0] += 2 * np.arange(7)[:, None]
    rows = [('/lidar', 10.0 + n, cloud(points[n], seconds=2.0 + n)) for n in range(7)]
    return write_bag(tmp_path / 'bag', rows), points.astype(np.float64)


def job(path, **values):
    """Return what is to be folded."""
    return shards.Job((str(path),), (), parameters_from(UNITS | values))


def states(field):
    """Return the tiles of a map: numbers of each part of their states."""
    keys, state, header = field.exported()
    order = sorted(range(len(keys)), key=lambda n: keys[n])
    numbers = {name: part[order] for name, part in state.tensors().items()}
    return sorted(keys), numbers, header['num_observations']


def run(capsys, *arguments):
    """Run the command; return its exit status and what it printed."""
    status = cli.main(['replay', *map(str, arguments)])
    printed = capsys.readouterr()
    return status, printed.out + printed.err


# Here --------------------------------------------------------------------------------------------


def test_the_map_is_that_of_folding_each_message_in_chunks(bag):
    path, points = bag
    field, report = folded(job(path, chunk_size=7))
    expected = job(path).empty()
    for cloud_points in points:
        for chunk in expected.in_chunks(cloud_points[:, :2], 7):
            expected.observe(cloud_points[chunk, :2], cloud_points[chunk, 2:])
    (keys, found, count), (expected_keys, expected, _) = states(field), states(expected)
    assert (keys, count) == (expected_keys, 7 * 13)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert (report.num_read, report.num_folded) == (7, 91)
    assert report.provenance.oldest_stamp == 2_000_000_000
    assert report.provenance.newest_stamp == 8_000_000_000
    np.testing.assert_allclose(report.mean, (points[..., 2].mean() - 3) / 2)
    np.testing.assert_allclose(report.stddev, points[..., 2].std() / 2)


def test_observations_fade_by_the_time_of_the_stamps(bag):
    path, points = bag
    field, _ = folded(job(path, half_life=3.0))
    expected = job(path, half_life=3.0).empty()
    for cloud_points in points:
        expected.forget(1.0)
        expected.observe(cloud_points[:, :2], cloud_points[:, 2:])
    np.testing.assert_allclose(field.predict([[9, 3]]), expected.predict([[9, 3]]), rtol=1e-9)
    counts = [states(made)[1]['least_squares.count'] for made in (field, folded(job(path))[0])]
    ages = np.arange(7)[::-1]  # [s] when the last message was folded
    faded = 13 * (0.5 ** (ages / 3.0)).sum()
    # One of the coarsest tiles has all points.
    assert counts[1].max() == 7 * 13 and counts[0].max() == pytest.approx(faded)
    assert (counts[0] <= counts[1]).all()
    np.testing.assert_allclose(counts[0], states(expected)[1]['least_squares.count'])


def test_a_table_fades_by_the_times_of_its_lines(tmp_path):
    rows = np.column_stack([np.arange(7) + 2.0, np.random.default_rng(0).uniform(0, 3, (7, 3))])
    path = tmp_path / 'a.csv'
    np.savetxt(path, rows, delimiter=',', header='time,x,y,z', comments='')
    field, report = folded(job(path, half_life=3.0))
    faded = (0.5 ** (np.arange(7) / 3.0)).sum()
    assert states(field)[1]['least_squares.count'].max() == pytest.approx(faded)
    assert report.provenance.oldest_stamp == 2_000_000_000
    assert report.provenance.newest_stamp == 8_000_000_000
    _, report = folded(job(path))
    assert report.provenance.oldest_stamp == 2_000_000_000
    assert report.provenance.newest_stamp == 8_000_000_000


def test_a_recording_of_which_nothing_can_be_used_makes_no_map(tmp_path, capsys):
    path = tmp_path / 'text.csv'
    path.write_text('x,y,depth\n1,2,hello\n3,4,5;6\n')
    status, text = run(capsys, path)
    assert status == 1 and 'no map is written' in text
    assert "'5;6' in '3,4,5;6' is no number" in text, 'the last of them'
    assert not list(tmp_path.glob('*.safetensors'))


def test_a_recording_of_nothing_is_told_from_one_of_which_all_is_left_out(tmp_path, capsys):
    (tmp_path / 'head.csv').write_text('x,y,depth\n')
    status, text = run(capsys, tmp_path / 'head.csv')
    assert status == 1 and text.endswith('no map is written: the recording has none\n')
    (tmp_path / 'head.csv').write_text('x,y,depth\n1,2,deep\n')
    status, text = run(capsys, tmp_path / 'head.csv')
    assert status == 1 and text.endswith('no map is written: see above why\n')


def test_a_tile_size_is_proposed_from_what_would_be_folded(tmp_path, capsys):
    points = np.random.default_rng(0).uniform(0, 7, (2, 41, 3))
    rows = [('/lidar', 1.0 + n, cloud(points[n], 'odom')) for n in range(2)]
    command = ['evaluate', 'tile-size', str(write_bag(tmp_path / 'bag', rows))]
    assert cli.main(command) == 1
    said = capsys.readouterr()
    assert 'left out     82 points (no_transform)\n' in said.out
    assert "[no_transform] /lidar: 'odom' and 'map' are not connected in the bag" in said.out
    assert said.err.endswith('no point can be used: see above why\n')
    (tmp_path / 'node.yaml').write_text('/**:\n  ros__parameters: {map_frame: odom}\n')
    for parameters in (['-p', 'map_frame:=odom'], ['--params-file', 'node.yaml']):
        assert cli.main([*command, *parameters]) == 0
        assert 'tile_size: ' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('values', 'said'),
    [
        (
            [12.0, 13.0, 14.0, 13.0, 1e12],
            ('13 +- 0.707', 'value_offset:=13', 'value_scale:=0.707'),
        ),
        ([50.0, 50.0], ('all are 50', 'value_offset:=50')),
        ([0.1, -0.2], ()),
        ([0.5, 0.5], ()),
    ],
)
def test_units_that_would_be_better_are_those_of_what_was_folded(tmp_path, capsys, values, said):
    path = tmp_path / 'a.csv'
    path.write_text('x,y,depth\n' + ''.join(f'{n},{n},{v}\n' for n, v in enumerate(values)))
    status, text = run(capsys, path)
    assert status == 0 and ('hint' in text) == bool(said)
    assert all(each in text for each in said), text


def test_a_clock_that_was_wrong_once_fades_nothing(tmp_path):
    """One message is stamped a year ahead of when it was written."""
    points = np.random.default_rng(3).uniform(0, 20, (3, 13, 3))
    messages = [
        ('/points', seconds, cloud(of_message, seconds=seconds + ahead))
        for seconds, ahead, of_message in zip(
            (2.0, 3.0, 4.0), (0.0, 3e7, 0.0), points, strict=True
        )
    ]
    field, report = folded(job(write_bag(tmp_path / 'bag', messages), half_life=3.0))
    assert report.provenance.newest_stamp == 4_000_000_000
    faded = 13 * (1 + 0.5 ** (1 / 3) + 0.5 ** (2 / 3))
    assert states(field)[1]['least_squares.count'].max() == pytest.approx(faded)


def test_a_node_can_load_the_map_and_python_restores_it(bag, capsys, tmp_path):
    path, _ = bag
    status, text = run(capsys, path, '-p', 'value_offset:=3.0', '-p', 'tile_size:=5.0')
    assert status == 0
    assert '/lidar (sensor_msgs/msg/PointCloud2, z)' in text
    assert 'read         7 messages\nfolded       91 points into' in text
    assert 'recorded     6.0 s: ' in text and 'bag.safetensors' in text
    node = maps.empty_map(parameters_from({'value_offset': 3.0, 'tile_size': 5.0}))
    loaded = StateDirectory(tmp_path, 'map').load('bag', node)
    assert loaded.field.num_observations == 91
    assert loaded.provenance.newest_stamp == 8_000_000_000
    assert NeuralField.restore('bag.safetensors').num_observations == 91


def test_nothing_of_ros_is_needed(tmp_path):
    rows = [('/a', 1.0, cloud([[2, 3, 5]], 'b')), ('/t', 1.0, temperature(21))]
    bag = write_bag(tmp_path / 'bag', [*rows, ('/tf', 1.0, transform('map', 'b', 1.0))])
    code = f"""
import sys

class NoRos:
    def find_spec(name, *_):
        if name.split('.')[0].endswith(('rclpy', '_msgs', '_interfaces')) or name in OURS:
            raise ModuleNotFoundError(name)

OURS = ('cmanp_ros.msg', 'cmanp_ros.srv')
sys.meta_path.insert(0, NoRos)
from cmanp_ros.cli import main
sys.exit(main(['replay', {str(bag)!r}, '--source', '/a', '--source', '/t']))
"""
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert 'folded       2 points' in result.stdout


def test_what_is_left_out_is_said_with_the_reason(tmp_path, capsys):
    rows = [('/a', 1.0, cloud([[2, 3, 5], [np.nan, 3, 5]])), ('/a', 2.0, cloud([[2, 3, 5]], 'b'))]
    status, text = run(capsys, write_bag(tmp_path / 'bag', rows), '--out', 'b.safetensors')
    assert status == 0
    assert 'left out     1 points (no_transform)' in text
    assert 'left out     1 points (not_finite)' in text
    assert 'left out     1 messages (no_transform)' in text
    assert "[no_transform] /a: 'b' and 'map' are not connected in the bag" in text


def test_better_units_are_proposed_only_where_those_given_are_far(tmp_path, capsys):
    x = np.random.default_rng(0).uniform(0, 7, (101, 3)) * [1, 1, 10] - [0, 0, 2000]
    np.savetxt('sea.csv', x, delimiter=',', header='x,y,depth', comments='')
    _, text = run(capsys, 'sea.csv')
    assert text.startswith('sea.csv (depth)\n')
    offset, scale = text.split('value_offset:=')[1].split(' -p value_scale:=')
    assert float(offset) == pytest.approx(x[:, 2].mean(), rel=0.01)
    assert float(scale) == pytest.approx(x[:, 2].std(), rel=0.01)
    settings = '-p', f'value_offset:={offset}', '-p', f'value_scale:={scale.strip()}'
    status, text = run(capsys, 'sea.csv', '--overwrite', *settings)
    assert status == 0 and 'hint' not in text


def test_a_file_that_is_there_is_kept(bag, capsys, tmp_path):
    (tmp_path / 'bag.safetensors').write_text('mine')
    status, text = run(capsys, bag[0])
    assert status == 1 and 'is there already; expected another --out, or --overwrite' in text
    assert (tmp_path / 'bag.safetensors').read_text() == 'mine'
    (tmp_path / 'folder.safetensors').mkdir()
    for out, words in (
        ('no/map.safetensors', 'there is no folder no'),
        ('folder.safetensors', 'folder.safetensors is a folder; expected the name of a file'),
        ('map.csv', 'expected a name that ends in .safetensors'),
    ):
        status, text = run(capsys, bag[0], '--overwrite', '--out', out)
        assert status == 1 and words in text and 'folded' not in text


def test_the_map_is_saved_when_it_is_interrupted(bag, capsys, monkeypatch):
    def interrupt(progress, num_done, num_points):
        if num_done == 5:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr('cmanp_ros.cli.progress._Lines.show', interrupt)
    before = signal.getsignal(signal.SIGINT)
    status, text = run(capsys, bag[0])
    assert status == 130 and 'stopped before the end' in text and 'recorded' not in text
    assert NeuralField.restore('bag.safetensors').num_observations == 5 * 13
    assert signal.getsignal(signal.SIGINT) is before


def test_a_bag_that_ends_too_early_gives_the_map_of_what_is_there(bag, capsys, monkeypatch):
    from rosbags.highlevel import AnyReader

    messages = AnyReader.messages

    def cut(reader, *arguments, **options):
        for n, message in enumerate(messages(reader, *arguments, **options)):
            if n == 3:
                raise ValueError('disk image is malformed')
            yield message

    monkeypatch.setattr(AnyReader, 'messages', cut)
    status, text = run(capsys, bag[0])
    assert status == 1 and 'cannot be read further (disk image is malformed)' in text
    assert NeuralField.restore('bag.safetensors').num_observations == 3 * 13


def test_progress_is_lines_where_there_is_no_terminal(capsys, monkeypatch):
    monkeypatch.setattr('cmanp_ros.cli.progress.LINE_PERIOD_SEC', 0.0)
    with replay.progress_for(7, 'messages') as progress:
        progress.show(0, 0)
        progress.show(7, 1300)
    first, last = capsys.readouterr().out.splitlines()
    assert first == '  0%  0 of 7 messages  0 points  0 points/s'
    assert last.startswith('100%  7 of 7 messages  1,300 points  ') and last.endswith('  0 s left')


# On workers --------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def client():
    """Return a client of two workers."""
    distributed = pytest.importorskip(
        'distributed', reason="distributed is not installed: pip install 'dask[distributed]'"
    )
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None
    ) as cluster:
        with distributed.Client(cluster, set_as_default=False) as client:
            yield client


@pytest.mark.parametrize(
    'values', [{}, {'points.voxel_size': 2.0}, {'half_life': 3.0}], ids=['all', 'thinned', 'faded']
)
def test_parts_on_workers_give_the_map_of_one_process(bag, client, values):
    work_job = job(bag[0], **values)
    with work_job.open() as recording:
        work = shards.Work(work_job, recording, client)
        done = list(work.run())
        field, report = work.result()
    expected_field, expected = folded(work_job)
    (keys, found, count), (expected_keys, numbers, expected_count) = map(
        states, (field, expected_field)
    )
    assert (work.num_parts, done[-1]) == (16, 16)
    assert (keys, count) == (expected_keys, expected_count)
    for name in numbers:
        torch.testing.assert_close(found[name], numbers[name], rtol=1e-5, atol=1e-5)
    x = np.random.default_rng(0).uniform(0, 20, (17, 2))
    np.testing.assert_allclose(field.predict(x), expected_field.predict(x), rtol=1e-4, atol=1e-4)
    assert (report.num_read, report.num_folded) == (7, expected.num_folded)
    assert report.losses.points == expected.losses.points
    assert report.provenance == expected.provenance
    assert len(field.robots) == 1


def test_when_it_is_stopped_what_is_folded_until_then_is_the_map(bag, client, monkeypatch):
    monkeypatch.setattr(shards, 'STOP_PERIOD_SEC', 0.0)
    work_job = job(bag[0])
    with work_job.open() as recording:
        work = shards.Work(work_job, recording, client)
        list(work.run(lambda: True))
        field, report = work.result()
    assert field.num_observations == report.num_folded
    assert report.num_folded == 13  # the first part has one message


def test_a_scheduler_that_does_not_answer_is_named(monkeypatch):
    pytest.importorskip('distributed')
    for address in ('tcp://127.0.0.1:9', 'nonsense://a', 'foo'):
        with pytest.raises(CMANPError, match=f'--scheduler {address}: .*expected processes'):
            with shards.cluster(address, timeout_sec=0.5):
                pass
    monkeypatch.setitem(sys.modules, 'distributed', None)
    with pytest.raises(CMANPError, match=r"pip install 'dask\[distributed\]'"):
        with shards.cluster('processes'):
            pass


def test_no_address_is_refused_at_once_and_in_a_line(tmp_path):
    pytest.importorskip('distributed')
    (tmp_path / 'a.csv').write_text('x,y,depth\n1,2,3\n')
    command = [sys.executable, '-m', 'cmanp_ros.cli', 'replay', 'a.csv', '--scheduler', 'foo']
    found = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert found.returncode == 1 and found.stderr.count('\n') == 1, found.stderr
    assert "--scheduler foo: missing port number in address 'foo'" in found.stderr


def test_processes_of_this_machine_fold(tmp_path):
    pytest.importorskip('distributed')
    rows = [('/t', 1.0 + n, temperature(n, seconds=1.0 + n)) for n in range(7)]
    bag = write_bag(tmp_path / 'bag', rows)
    script = tmp_path / 'cmanp.py'  # as the installed command: with a main module
    script.write_text(
        'import sys\nfrom cmanp_ros.cli import main\n'
        "if __name__ == '__main__':\n    sys.exit(main(sys.argv[1:]))\n"
    )
    result = subprocess.run(
        [sys.executable, script, 'replay', bag, '--scheduler', 'processes'],
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert result.returncode == 0, result.stderr
    assert 'read         7 messages\nfolded       7 points into' in result.stdout
    assert NeuralField.restore('bag.safetensors').num_observations == 7
